"""LinuxKernel: the setup header, where everything goes, the registers, and a kernel that runs."""

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio import Halted, Machine
from kvmaio.boot import LinuxKernel
from kvmaio.boot.linux import SetupHeader
from kvmaio.devices import DebugConsole
from kvmaio.errors import ConfigurationError
from tests.assembler import assemble
from tests.boot.walker import ram, segment_at, translate, word
from tests.engine.support import deadline

MIB = 1 << 20
ZERO_PAGE, CMDLINE = 0x8000, 0x9000


def bzimage(
    code=b"\xf4",
    *,
    version=0x20F,
    sectors=1,
    flags=1,
    load=MIB,
    relocatable=0,
    preferred=MIB,
    memory_size=0,
    entry_64=False,
    cmdline_size=255,
    initrd_last=0x7FFF_FFFF,
    size=None,
):
    """A kernel file around `code`; the fields are where boot.rst says."""
    setup = bytearray(((sectors or 4) + 1) * 512)
    setup[0x1F1] = sectors
    struct.pack_into("<I", setup, 0x1F4, -(-(len(code) if size is None else size) // 16))
    struct.pack_into("<HBB4sH", setup, 0x1FE, 0xAA55, 0xEB, 0x66, b"HdrS", version)
    setup[0x211] = flags
    struct.pack_into("<I", setup, 0x214, load)
    struct.pack_into("<I", setup, 0x22C, initrd_last)
    struct.pack_into("<IBBHI", setup, 0x230, 0x1000, relocatable, 12, entry_64, cmdline_size)
    struct.pack_into("<QI", setup, 0x258, preferred, memory_size)
    return bytes(setup) + code


# ---- what goes where ----------------------------------------------------------------------------


def test_zero_page_command_line_and_ramdisk():
    memory = ram(16 * MIB)
    file = bzimage(b"\x90" * 100)
    state = LinuxKernel(file, b"ramdisk", "console=ttyS0 ro").place(memory)
    assert memory.read(MIB, 100) == b"\x90" * 100
    for start, end in ((0x1F1, 0x210), (0x22C, 0x268)):  # the header, but for what is filled in
        assert memory.read(ZERO_PAGE + start, end - start) == file[start:end]
    assert memory.read(ZERO_PAGE + 0x210, 1) == b"\xff"
    assert memory.read(word(memory, ZERO_PAGE + 0x228, 4), 17) == b"console=ttyS0 ro\0"
    initrd, size = word(memory, ZERO_PAGE + 0x218, 4), word(memory, ZERO_PAGE + 0x21C, 4)
    assert (initrd, memory.read(initrd, size)) == (16 * MIB - 4096, b"ramdisk")
    assert memory.read(ZERO_PAGE + 0x1E8, 1) == b"\x02"
    assert struct.unpack("<QQIQQI", memory.read(ZERO_PAGE + 0x2D0, 40)) == (
        *(0, 0xA0000, 1),
        *(MIB, 15 * MIB, 1),
    )
    assert (state.platform, state.cpuid, state.context.rsi) == ("pc", "emulator-safe", ZERO_PAGE)


def test_ram_above_4_gib_is_in_the_map_and_the_ramdisk_stays_low():
    memory = ram(16 * MIB)
    memory.add_ram(4 << 30, 32 * MIB)
    LinuxKernel(bzimage(), b"x").place(memory)
    assert memory.read(ZERO_PAGE + 0x1E8, 1) == b"\x03"
    assert struct.unpack("<QQI", memory.read(ZERO_PAGE + 0x2D0 + 40, 20)) == (4 << 30, 32 * MIB, 1)
    assert word(memory, ZERO_PAGE + 0x218, 4) == 16 * MIB - 4096


def test_the_ramdisk_goes_no_higher_than_the_kernel_allows():
    memory = ram(64 * MIB)
    LinuxKernel(bzimage(initrd_last=32 * MIB - 1), bytes(5000)).place(memory)
    assert word(memory, ZERO_PAGE + 0x218, 4) == 32 * MIB - 8192


def test_a_relocatable_kernel_lies_where_it_likes_it_best():
    memory = ram(32 * MIB)
    state = LinuxKernel(bzimage(b"\xf4", relocatable=1, preferred=16 * MIB)).place(memory)
    assert (memory.read(16 * MIB, 1), state.context.rip) == (b"\xf4", 16 * MIB)


@pytest.mark.parametrize(("entry_64", "bits"), [(False, 32), (True, 64)])
def test_registers_are_those_of_the_protocol(entry_64, bits):
    memory = ram(16 * MIB)
    context = LinuxKernel(bzimage(entry_64=entry_64)).place(memory).context
    assert context.rip == MIB + (0x200 if entry_64 else 0)
    assert (context.rbp, context.rdi, context.rbx, context.rflags) == (0, 0, 0, 2)
    assert (context.cs.selector, context.cs.l, context.cs.db) == (
        (0x10, 1, 0) if entry_64 else (0x10, 0, 1)
    )
    for segment in (context.ds, context.es, context.ss):
        assert (segment.selector, segment.base, segment.limit) == (0x18, 0, 0xFFFF_FFFF)
    for segment in (context.cs, context.ds, context.tr):
        loaded = segment_at(memory, context.gdt.base, segment.selector, bits=bits)
        assert (loaded.base, loaded.limit, loaded.type) == (
            segment.base,
            segment.limit,
            segment.type,
        )
    if entry_64:
        for address in (0, ZERO_PAGE, MIB, (4 << 30) - 1):
            mapping = translate(memory, context.cr3, address)
            assert mapping is not None and mapping.physical == address and mapping.writable
    else:
        assert (context.cr0 >> 31, context.efer) == (0, 0)


def test_old_headers_have_the_defaults_of_their_version():
    header = SetupHeader.read(bzimage(version=0x202, entry_64=True, cmdline_size=9, sectors=0))
    assert (header.cmdline_size, header.initrd_last, header.entry_64) == (255, 0x37FFFFFF, False)
    assert (header.code_size, header.code_offset) == (0, 5 * 512)


# ---- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x7fELF" + bytes(2000), "not a Linux kernel: no setup header"),
        (bzimage(version=0x201), r"boot protocol is 2\.01: 2\.02 .* is the oldest"),
        (bzimage(flags=0), "a zImage, made to be loaded below 640 KiB"),
        (bzimage(size=4096), "cut short: 1 bytes of code, where its header tells of 4096"),
        (bzimage(b""), "cut short"),
        (bzimage()[:0x206], "boot protocol"),
    ],
)
def test_files_that_are_no_kernels_are_refused(data, message):
    with pytest.raises(ConfigurationError, match=message):
        LinuxKernel(data)


def test_command_lines_that_do_not_fit_are_refused():
    with pytest.raises(ConfigurationError, match="11 bytes long; this kernel takes 10 at most"):
        LinuxKernel(bzimage(cmdline_size=10), cmdline="hello world")
    with pytest.raises(ConfigurationError, match="null character"):
        LinuxKernel(bzimage(), cmdline="a\0b")


@pytest.mark.parametrize(
    ("arguments", "initrd", "message"),
    [
        ({"memory_size": 32 * MIB}, b"", r"the Linux kernel does not fit at .* at least 33M"),
        ({"load": 0x10000}, b"", "only 1 MiB to 4 GiB is possible"),
        ({"preferred": 1 << 62, "relocatable": 1}, b"", "the Linux kernel does not fit"),
        ({"memory_size": 15 * MIB}, bytes(MIB), "give the machine at least 18M"),
        ({"initrd_last": 2 * MIB}, bytes(MIB), "make it smaller"),
    ],
)
def test_what_does_not_fit_is_refused_and_writes_nothing(arguments, initrd, message):
    memory = ram(16 * MIB)
    kernel = LinuxKernel(bzimage(**arguments), initrd or None)
    with pytest.raises(ConfigurationError, match=message):
        kernel.place(memory)
    assert memory.read(0, 16 * MIB) == bytes(16 * MIB)


@given(
    changes=st.lists(st.tuples(st.integers(0x1F1, 0x270), st.integers(0, 255)), max_size=12),
    length=st.integers(0, 1200),
)
def test_damaged_headers_are_refused_in_words_or_placed(changes, length):
    data = bytearray(bzimage(b"\xf4" * 200))
    for offset, value in changes:
        data[offset] = value
    with suppress(ConfigurationError):
        LinuxKernel(bytes(data[:length]) or b"\0", b"ramdisk", "line").place(ram(4 * MIB))


# ---- a kernel that runs -------------------------------------------------------------------------

# Prints the command line and the ramdisk that the zero page (RSI) tells of.
PRINT = (
    *("mov edx, 0x402", "mov ebx, esi", "mov esi, [ebx+0x228]"),
    *("line: mov al, [esi]", "test al, al", "jz disk", "out dx, al", "inc esi", "jmp line"),
    *("disk: mov esi, [ebx+0x218]", "mov ecx, [ebx+0x21c]"),
    *("more: mov al, [esi]", "out dx, al", "inc esi", "dec ecx", "jnz more", "hlt"),
)


@pytest.mark.kvm
@pytest.mark.parametrize("mode", ["prot32", "long64"])
async def test_a_kernel_finds_its_command_line_and_ramdisk(mode):
    code = assemble(PRINT, mode, MIB)
    if mode == "long64":
        code = b"\x0f\x0b".ljust(0x200, b"\x90") + code  # its 32-bit entry is not the one
    kernel = LinuxKernel(bzimage(code, entry_64=mode == "long64"), b", disk", "a=b c")
    async with Machine(memory="16M") as machine:
        console = machine.attach(DebugConsole(), pio=0x402)
        machine.load(kernel)
        async with deadline():
            assert await machine.run() == Halted()
    assert console.output == b"a=b c, disk"
