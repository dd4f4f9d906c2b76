"""`LinuxKernel`: a bzImage (Linux, Documentation/arch/x86/boot.rst, "The Linux/x86 Boot Protocol").

What else follows that protocol starts as well, such as memtest86+.
"""

from __future__ import annotations

import os
import struct
from typing import Self

import attrs

from ..cpu import Context, DescriptorTable
from ..errors import ConfigurationError
from ..memory import PAGE_SIZE, GuestMemory
from .image import (
    FOUR_GIB,
    ONE_MIB,
    BootState,
    Source,
    low_ram,
    read_source,
    require_ram,
    usable_ram,
)
from .modes import blank_context, enter_long_mode, enter_protected_mode
from .tables import (
    flat_segment,
    global_descriptor_table,
    identity_map,
    page_tables_size,
    task_segment,
    task_state32,
    task_state64,
)

__all__ = ["LinuxKernel", "SetupHeader", "is_linux"]

LARGEST_FILE = 1 << 30
SECTOR = 512

# Below 640 KiB, where no kernel lies: descriptors, page tables, zero page, command line.
GDT = 0x1000
PAGE_TABLES = 0x2000
ZERO_PAGE = 0x8000
CMDLINE = 0x9000
LONGEST_CMDLINE = 0x8000
STACK = 0x1000  # down from here; kernels bring their own

CODE, DATA, TASK = 0x10, 0x18, 0x20  # the selectors that the protocol asks for, and one more

# The setup header lies at the same offsets in the file and in the zero page.
HEADER = 0x1F1
BOOT_FLAG = 0x1FE
MAGIC = 0x202
TYPE_OF_LOADER = 0x210
RAMDISK = 0x218
CMD_LINE_PTR = 0x228
E820_COUNT = 0x1E8
E820_TABLE = 0x2D0
E820_MOST = 128
E820_RAM = 1

OLDEST_VERSION = 0x0202  # the first whose command line may lie anywhere
UNDEFINED_LOADER = 0xFF
LOADED_HIGH = 0x01
XLF_KERNEL_64 = 0x01
ENTRY_64 = 0x200  # from the beginning of the protected-mode code

DEFAULT_SETUP_SECTORS = 4  # what 0 means
DEFAULT_CMDLINE_SIZE = 255  # before version 2.06
DEFAULT_INITRD_MAX = 0x37FF_FFFF  # before version 2.03


def is_linux(data: bytes) -> bool:
    """Are the boot flag and the setup header's magic there?"""
    return data[BOOT_FLAG : BOOT_FLAG + 2] == b"\x55\xaa" and data[MAGIC : MAGIC + 4] == b"HdrS"


@attrs.frozen(kw_only=True)
class SetupHeader:
    """What a kernel's setup header says, with the defaults of its version filled in.

    Attributes:
        version: of the protocol, such as 0x20f.
        raw: the header's bytes, from offset 0x1f1 on.
        code_offset: where in the file the protected-mode code begins.
        code_size: how long it should be; 0 where the header does not say.
        load_address: where it wants to lie.
        memory_size: bytes from there that it needs before it knows about memory.
        entry_64: it can be entered in 64-bit mode.
        cmdline_size: the longest command line that it takes, without the terminator.
        initrd_last: the highest address that its initrd may occupy.
    """

    version: int
    raw: bytes
    code_offset: int
    code_size: int
    load_address: int
    memory_size: int
    entry_64: bool
    cmdline_size: int
    initrd_last: int

    @classmethod
    def read(cls, data: bytes) -> Self:
        """Read a file's header.

        Raises:
            ConfigurationError: it is none, or of a kernel that cannot be started.
        """
        if not is_linux(data):
            raise ConfigurationError(
                "not a Linux kernel: no setup header (boot flag at 0x1fe, HdrS at 0x202); "
                "what is wanted is a bzImage, not a vmlinux"
            )
        end = MAGIC + data[MAGIC - 1]
        raw = data[HEADER:end]
        # Fields that an old header does not have read as 0.
        fields = bytes(HEADER) + raw.ljust(0x290 - HEADER, b"\0")

        def field(offset: int, kind: str) -> int:
            return int(struct.unpack_from("<" + kind, fields, offset)[0])

        version = field(0x206, "H")
        if version < OLDEST_VERSION or len(raw) < end - HEADER:
            raise ConfigurationError(
                f"the Linux kernel's boot protocol is {version >> 8}.{version & 0xFF:02}: "
                "2.02 (Linux 2.4) is the oldest that can be started"
            )
        if not field(0x211, "B") & LOADED_HIGH:
            raise ConfigurationError(
                "the Linux kernel is a zImage, made to be loaded below 640 KiB; build a bzImage"
            )
        sectors = field(HEADER, "B") or DEFAULT_SETUP_SECTORS
        code_offset = (sectors + 1) * SECTOR
        load_address = field(0x214, "I")
        if version >= 0x20A and field(0x234, "B"):  # relocatable: it says where it likes it best
            load_address = field(0x258, "Q")
        return cls(
            version=version,
            raw=raw,
            code_offset=code_offset,
            code_size=field(0x1F4, "I") * 16 if version >= 0x204 else 0,
            load_address=load_address,
            memory_size=max(field(0x260, "I"), len(data) - code_offset),
            entry_64=version >= 0x20C and bool(field(0x236, "H") & XLF_KERNEL_64),
            cmdline_size=field(0x238, "I") if version >= 0x206 else DEFAULT_CMDLINE_SIZE,
            initrd_last=field(0x22C, "I") if version >= 0x203 else DEFAULT_INITRD_MAX,
        )


class LinuxKernel:
    """A bzImage with its command line and initial ramdisk.

    It starts at its 64-bit entry point if it has one (identity-mapped pages
    for 4 GiB), else at the 32-bit one (no paging), interrupts off. Its memory
    map has the RAM below 640 KiB and from 1 MiB on. There is no video mode, no
    ACPI and no MP table; a console is what the command line says, such as
    ``console=ttyS0``.

    The kernel lies where its header wants it, and the initial ramdisk as high as
    the header allows.

    Args:
        path: the kernel's contents or path.
        initrd: the initial ramdisk's, or None.
        cmdline: passed on as it is.
    """

    def __init__(self, path: Source, initrd: Source | None = None, cmdline: str = "") -> None:
        data = read_source(path, "the Linux kernel", LARGEST_FILE)
        self.header = SetupHeader.read(data)
        self.code = data[self.header.code_offset :]
        # The size is in units of 16 bytes, rounded up; behind may be a signature.
        if not self.code or len(self.code) + 15 < self.header.code_size:
            raise ConfigurationError(
                f"the Linux kernel is cut short: {len(self.code)} bytes of code, where its header "
                f"tells of {self.header.code_size}; copy the file again"
            )
        if initrd is None:
            self.initrd = b""
        else:
            self.initrd = read_source(initrd, "the initial ramdisk", LARGEST_FILE)
        self.cmdline = os.fsencode(cmdline)
        longest = min(self.header.cmdline_size, LONGEST_CMDLINE - 1)
        if b"\0" in self.cmdline:
            raise ConfigurationError(f"the command line contains a null character: {cmdline!r}")
        if len(self.cmdline) > longest:
            raise ConfigurationError(
                f"the command line is {len(self.cmdline)} bytes long; "
                f"this kernel takes {longest} at most"
            )

    def place(self, memory: GuestMemory) -> BootState:
        """Put kernel, ramdisk and zero page into `memory`; the engine calls this."""
        header = self.header
        require_ram(memory, "the Linux kernel's tables", 0, CMDLINE + LONGEST_CMDLINE)
        require_ram(memory, "the Linux kernel", header.load_address, header.memory_size)
        if not ONE_MIB <= header.load_address <= FOUR_GIB - header.memory_size:
            raise ConfigurationError(
                f"the Linux kernel wants to lie at {header.load_address:#x}: "
                "only 1 MiB to 4 GiB is possible"
            )
        initrd_at = self._place_of_initrd(memory)
        memory.write(header.load_address, self.code)
        memory.write(initrd_at, self.initrd)
        memory.write(CMDLINE, self.cmdline + b"\0")
        memory.write(ZERO_PAGE, self._zero_page(memory, initrd_at))
        context = self._start_64(memory) if header.entry_64 else self._start_32(memory)
        context.rsi = ZERO_PAGE
        return BootState(context, platform="pc")

    def _place_of_initrd(self, memory: GuestMemory) -> int:
        """As high as possible, so that it is out of the way of a kernel that unpacks itself."""
        if not self.initrd:
            return 0
        kernel_end = self.header.load_address + self.header.memory_size
        limit = min(low_ram(memory).end, self.header.initrd_last + 1)
        address = (limit - len(self.initrd)) // PAGE_SIZE * PAGE_SIZE
        if address < kernel_end:
            advice = "make it smaller: the kernel allows no higher address"
            if limit <= self.header.initrd_last:
                need = -(-(kernel_end + len(self.initrd) + PAGE_SIZE) // ONE_MIB)
                advice = f"give the machine at least {need}M of memory"
            raise ConfigurationError(
                f"the initial ramdisk of {len(self.initrd)} bytes does not fit between the "
                f"kernel's end at {kernel_end:#x} and {limit:#x}; {advice}"
            )
        return address

    def _zero_page(self, memory: GuestMemory, initrd_at: int) -> bytes:
        page = bytearray(PAGE_SIZE)
        page[HEADER : HEADER + len(self.header.raw)] = self.header.raw
        page[TYPE_OF_LOADER] = UNDEFINED_LOADER
        struct.pack_into("<I", page, CMD_LINE_PTR, CMDLINE)
        struct.pack_into("<II", page, RAMDISK, initrd_at, len(self.initrd))
        ranges = list(usable_ram(memory))[:E820_MOST]
        page[E820_COUNT] = len(ranges)
        for index, (start, end) in enumerate(ranges):
            struct.pack_into("<QQI", page, E820_TABLE + 20 * index, start, end - start, E820_RAM)
        return bytes(page)

    def _start_32(self, memory: GuestMemory) -> Context:
        context = _context(memory, self.header.load_address, 32)
        enter_protected_mode(context)
        return context

    def _start_64(self, memory: GuestMemory) -> Context:
        assert PAGE_TABLES + page_tables_size() <= ZERO_PAGE
        memory.write(PAGE_TABLES, identity_map(PAGE_TABLES))
        context = _context(memory, self.header.load_address + ENTRY_64, 64)
        enter_long_mode(context, PAGE_TABLES)
        return context


def _context(memory: GuestMemory, entry: int, bits: int) -> Context:
    """The GDT put into memory, and the registers that go with it."""
    state = task_state64(STACK) if bits == 64 else task_state32(STACK, DATA)
    task = task_segment(TASK, GDT + 0x80, len(state) - 1)
    code = flat_segment(CODE, code=True, bits=bits)
    data = [flat_segment(DATA, code=False, bits=bits) for _ in range(5)]
    table = global_descriptor_table(code, data[0], task=task, bits=bits)
    memory.write(GDT, table.ljust(0x80, b"\0") + state)
    context = blank_context(entry, STACK, code, data)
    context.tr = task
    context.gdt = DescriptorTable(GDT, len(table) - 1)
    return context
