"""`Multiboot`: a kernel for the Multiboot Specification, version 0.6.96."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from typing import TypeAlias

import attrs

from ..errors import ConfigurationError
from ..memory import PAGE_SIZE, GuestMemory
from .elf import LARGEST_FILE, Segment, place_segments, read_elf
from .image import (
    FOUR_GIB,
    LOW_END,
    ONE_MIB,
    BootState,
    Source,
    low_ram,
    read_source,
    require_ram,
    usable_ram,
)
from .modes import prot32_state

__all__ = ["Header", "Module", "Multiboot", "find_header"]

Module: TypeAlias = Source | tuple[Source, str]
"""A module's contents or path; by itself, or with the string that the kernel is given."""

_HEADER_MAGIC = 0x1BADB002
_LOADER_MAGIC = 0x2BADB002
_SEARCHED = 8192

# The header's flags (3.1.1). Bits 0 to 15 are demands; the loader must know each that is set.
_ALIGN_MODULES = 1 << 0
_WANT_MEMORY = 1 << 1
_WANT_VIDEO = 1 << 2
_HAS_ADDRESSES = 1 << 16
_KNOWN_DEMANDS = _ALIGN_MODULES | _WANT_MEMORY | _WANT_VIDEO

# The information structure's flags (3.3).
_INFO_MEMORY = 1 << 0
_INFO_CMDLINE = 1 << 2
_INFO_MODULES = 1 << 3
_INFO_MMAP = 1 << 6
_INFO_LOADER_NAME = 1 << 9
_INFO_SIZE = 120
_LOADER_NAME = "kvmaio"

_GDT_SIZE = 0x100


@attrs.frozen
class Header:
    """A Multiboot header (3.1); the addresses are None without flag bit 16."""

    offset: int
    flags: int
    addresses: tuple[int, int, int, int, int] | None
    """header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr."""


def find_header(data: bytes) -> Header | None:
    """The Multiboot header in the first 8 KiB, at a multiple of 4, with a right checksum."""
    for offset in range(0, min(len(data), _SEARCHED) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", data, offset)
        if magic != _HEADER_MAGIC or (magic + flags + checksum) & 0xFFFF_FFFF:
            continue
        if not flags & _HAS_ADDRESSES:
            return Header(offset, flags, None)
        if offset + 32 <= len(data):
            return Header(offset, flags, struct.unpack_from("<5I", data, offset + 12))
    return None


class Multiboot:
    """A Multiboot 1 kernel, with its command line and modules.

    It starts in 32-bit protected mode without paging, interrupts off, EAX the
    magic number, EBX the information structure; beyond what the specification
    promises, GDTR is valid and ESP points to free memory. The memory map has
    RAM below 640 KiB and from 1 MiB on. No video mode is set, even if the
    kernel would like one.

    Kernel: ELF32 (or ELF64 with a 32-bit entry point), or any format with
    addresses in its header. Modules lie behind the kernel, on page boundaries;
    GDT, information structure, strings and maps at the end of the RAM below
    640 KiB if the kernel left room there, else behind the modules.

    Args:
        source: the kernel's contents or path.
        cmdline: passed on as it is.
        modules: contents, paths, or pairs of one of these and a string; by
            default a path is its own string.
    """

    def __init__(self, source: Source, cmdline: str = "", modules: Iterable[Module] = ()) -> None:
        data = read_source(source, "the Multiboot kernel", LARGEST_FILE)
        self.segments, self.entry = _kernel(data)
        self.cmdline = _c_string("the command line", cmdline)
        self.modules = [_module(index, module) for index, module in enumerate(modules)]

    def place(self, memory: GuestMemory) -> BootState:
        """Put kernel, modules and information into `memory`; the engine calls this."""
        for segment in self.segments:
            require_ram(memory, segment.name, segment.address, segment.size)
            if segment.end > FOUR_GIB:
                raise ConfigurationError(f"{segment.name} is above 4 GiB, out of a kernel's reach")
        at = _align(max([ONE_MIB, *(segment.end for segment in self.segments)]))
        modules = []
        for index, (data, text) in enumerate(self.modules):
            module = Segment(f"module {index}", at, len(data), memoryview(data))
            require_ram(memory, module.name, at, module.size)
            modules.append((module, text))
            at = _align(module.end)
        taken = [*self.segments, *(module for module, _ in modules)]

        size = _align(_GDT_SIZE + len(self._information(memory, 0, modules)))
        base = min(LOW_END, low_ram(memory).end) - size
        if base < PAGE_SIZE or any(base < s.end and s.address < base + size for s in taken):
            base = at
            require_ram(memory, "the Multiboot information", base, size)
        tables, context = prot32_state(base, self.entry)
        context.rax, context.rbx = _LOADER_MAGIC, base + _GDT_SIZE
        information = self._information(memory, base + _GDT_SIZE, modules)
        memory.write(base, tables.ljust(_GDT_SIZE, b"\0") + information)
        place_segments(memory, taken)
        return BootState(context, platform="pc")

    def _information(
        self, memory: GuestMemory, base: int, modules: list[tuple[Segment, bytes]]
    ) -> bytes:
        """The information structure (3.3) at `base`, and behind it what it points to."""
        tail = bytearray()

        def append(data: bytes) -> int:
            address = base + _INFO_SIZE + len(tail)
            tail.extend(data.ljust(-(-len(data) // 4) * 4, b"\0"))
            return address

        cmdline, loader_name = append(self.cmdline), append(_c_string("", _LOADER_NAME))
        table = b"".join(
            struct.pack("<IIII", module.address, module.end, append(text), 0)
            for module, text in modules
        )
        module_table = append(table)
        ranges = list(usable_ram(memory))
        mmap = b"".join(struct.pack("<IQQI", 20, start, end - start, 1) for start, end in ranges)
        mmap_address = append(mmap)
        lower = next((end for start, end in ranges if start == 0), 0) // 1024
        upper = next((end - start for start, end in ranges if start == ONE_MIB), 0) // 1024
        flags = _INFO_MEMORY | _INFO_CMDLINE | _INFO_MODULES | _INFO_MMAP | _INFO_LOADER_NAME
        head = bytearray(_INFO_SIZE)
        struct.pack_into("<III", head, 0, flags, lower, upper)
        struct.pack_into("<III", head, 16, cmdline, len(modules), module_table)
        struct.pack_into("<II", head, 44, len(mmap), mmap_address)
        struct.pack_into("<I", head, 64, loader_name)
        return bytes(head + tail)


def _kernel(data: bytes) -> tuple[list[Segment], int]:
    header = find_header(data)
    if header is None:
        raise ConfigurationError(
            "not a Multiboot kernel: no Multiboot 1 header in the first 8 KiB "
            "(at a multiple of 4, with a right checksum)"
        )
    if unknown := header.flags & 0xFFFF & ~_KNOWN_DEMANDS:
        raise ConfigurationError(
            f"the Multiboot kernel demands what kvmaio does not offer: header flags {unknown:#x}"
        )
    if header.addresses is not None:
        return _by_addresses(data, header.offset, *header.addresses)
    program = read_elf(data)
    return list(program.segments), program.entry


def _by_addresses(
    data: bytes, offset: int, header: int, load: int, load_end: int, bss_end: int, entry: int
) -> tuple[list[Segment], int]:
    """One segment, by the addresses in the header (3.1.3)."""
    start = offset - (header - load)
    length = load_end - load if load_end else len(data) - start
    end = load + length
    size = (bss_end or end) - load
    if header < load or start < 0 or length <= 0 or start + length > len(data) or size < length:
        raise ConfigurationError(
            f"the Multiboot header's addresses do not fit the file of {len(data):#x} bytes: "
            f"header_addr {header:#x} (at {offset:#x} in the file), load_addr {load:#x}, "
            f"load_end_addr {load_end:#x}, bss_end_addr {bss_end:#x}"
        )
    if not load <= entry < load + size:
        raise ConfigurationError(f"the Multiboot header's entry_addr {entry:#x} is not loaded")
    content = memoryview(data)[start : start + length]
    return [Segment("the Multiboot kernel", load, size, content)], entry


def _module(index: int, module: Module) -> tuple[bytes, bytes]:
    """The contents, and the string with its terminator."""
    if isinstance(module, tuple):
        source, text = module
    else:
        source, text = module, os.fspath(module) if isinstance(module, str | os.PathLike) else ""
    name = f"module {index}"
    return read_source(source, name, LARGEST_FILE), _c_string(f"the string of {name}", text)


def _c_string(what: str, text: str) -> bytes:
    if "\0" in text:
        raise ConfigurationError(f"{what} contains a null character: {text!r}")
    return os.fsencode(text) + b"\0"


def _align(address: int) -> int:
    return -(-address // PAGE_SIZE) * PAGE_SIZE
