import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio.boot import Multiboot
from kvmaio.cpu import Context, DescriptorTable, Segment
from kvmaio.errors import ConfigurationError
from kvmaio.memory import GuestMemory
from tests.assembler import guest_file
from tests.boot.elf_files import Load, damage, elf_file, flips
from tests.boot.walker import ram, segment_at, word

MIB = 1 << 20
KIB = 1 << 10
MAGIC = 0x1BADB002


def header(flags: int = 0, *addresses: int, magic: int = MAGIC, off: int = 0) -> bytes:
    checksum = -(magic + flags) + off & 0xFFFF_FFFF
    return struct.pack("<III", magic, flags, checksum) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


def kernel(flags: int = 0, address: int = MIB, size: int = 0x200) -> bytes:
    return elf_file(Load(address, header(flags).ljust(0x100, b"\x90"), size=size))


def string(memory: GuestMemory, address: int) -> str:
    return memory.read(address, 4096).split(b"\0")[0].decode()


def memory_map(memory: GuestMemory, info: int) -> list[tuple[int, int, int]]:
    """(base, length, type) of each entry, walked as the specification says."""
    entries = []
    at, end = word(memory, info + 48, 4), word(memory, info + 48, 4) + word(memory, info + 44, 4)
    while at < end:
        size, base, length, kind = struct.unpack("<IQQI", memory.read(at, 24))
        entries.append((base, length, kind))
        at += 4 + size
    assert at == end
    return entries


def modules(memory: GuestMemory, info: int) -> list[tuple[bytes, str]]:
    """(contents, string) of each module."""
    found = []
    for index in range(word(memory, info + 20, 4)):
        entry = memory.read(word(memory, info + 24, 4) + index * 16, 16)
        start, end, text, zero = struct.unpack("<IIII", entry)
        assert (start % 4096, zero) == (0, 0)
        found.append((memory.read(start, end - start), string(memory, text)))
    return found


def test_cpu_starts_as_the_specification_says():
    memory = ram(16 * MIB)
    state = Multiboot(kernel(), cmdline="a b").place(memory)
    base = 640 * KIB - 4 * KIB
    data = Segment(limit=0xFFFF_FFFF, selector=0x10, type=3, db=1, g=1)
    assert state.context == Context(
        rax=0x2BADB002,
        rbx=base + 0x100,
        rdx=0,
        rip=MIB,
        rsp=base,
        cs=Segment(limit=0xFFFF_FFFF, selector=0x08, type=0xB, db=1, g=1),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(base=base + 0x40, limit=0x67, selector=0x18, type=0xB, s=0),
        ldt=Segment(limit=0, type=2, s=0, present=0, unusable=1),
        gdt=DescriptorTable(base, 0x1F),
        idt=DescriptorTable(0, 0),
        cr0=0x33,
    )
    assert (state.cpuid, state.xcr0, state.platform) == ("emulator-safe", False, "pc")
    for segment in (state.context.cs, state.context.ds, state.context.tr):
        assert segment_at(memory, base, segment.selector, bits=32) == segment


def test_information_structure_tells_all():
    memory = GuestMemory()
    memory.add_ram(0, 16 * MIB)
    memory.add_ram(1 << 32, 32 * MIB)
    memory.add_rom(0xFFFE_0000, bytes(0x2_0000))
    image = Multiboot(kernel(3), "root=/dev/ram quiet", [b"first", (b"second" * 1000, "two args")])
    info = image.place(memory).context.rbx
    assert word(memory, info, 4) == 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert word(memory, info + 4, 4) == 640
    assert word(memory, info + 8, 4) == 15 * 1024
    assert string(memory, word(memory, info + 16, 4)) == "root=/dev/ram quiet"
    assert string(memory, word(memory, info + 64, 4)) == "kvmaio"
    assert modules(memory, info) == [(b"first", ""), (b"second" * 1000, "two args")]
    assert memory_map(memory, info) == [
        (0, 640 * KIB, 1),
        (MIB, 15 * MIB, 1),
        (1 << 32, 32 * MIB, 1),
    ]
    # Not offered: boot device, symbols, drives, configuration table, APM, VBE, frame buffer.
    for offset, size in ((12, 4), (28, 16), (52, 12), (68, 52)):
        assert memory.read(info + offset, size) == bytes(size)


def test_modules_from_files_follow_the_kernel(tmp_path):
    file = tmp_path / "initrd"
    file.write_bytes(b"contents")
    memory = ram(16 * MIB)
    image = Multiboot(
        kernel(size=0x1234), modules=[file, str(file), (file, "named"), (str(file), "")]
    )
    info = image.place(memory).context.rbx
    assert modules(memory, info) == [
        (b"contents", str(file)),
        (b"contents", str(file)),
        (b"contents", "named"),
        (b"contents", ""),
    ]
    first = word(memory, word(memory, info + 24, 4), 4)
    assert first == MIB + 0x2000


@pytest.mark.parametrize(
    ("address", "size"), [(0x9_0000, 0x1_0000), (0x1_0000, 0x20_0000), (0x1000, 0x9_F000)]
)
def test_information_goes_behind_a_kernel_that_fills_low_memory(address, size):
    memory = ram(16 * MIB)
    memory.write(0, b"\xaa" * 16 * MIB)
    image = Multiboot(kernel(address=address, size=size), "text", [b"module"])
    context = image.place(memory).context
    end = max(address + size, MIB)
    assert modules(memory, context.rbx) == [(b"module", "")]
    assert context.rbx == end + 0x1000 + 0x100
    assert memory.read(address + 0x100, size - 0x100) == bytes(size - 0x100)


def test_long_command_line_is_kept_whole():
    memory = ram(16 * MIB)
    text = "x=y " * 50_000
    info = Multiboot(kernel(), text).place(memory).context.rbx
    address = word(memory, info + 16, 4)
    assert memory.read(address, len(text) + 1) == text.encode() + b"\0"
    assert info + 120 <= address < 640 * KIB


def test_header_with_addresses_needs_no_elf():
    body = b"text" * 16
    # The header is at 8 in the file and at 1 MiB + 8 in memory.
    addresses = (MIB + 8, MIB, 0, MIB + 0x1000, MIB + 40)
    data = bytes(8) + header(1 << 16, *addresses) + body
    memory = ram(4 * MIB)
    memory.write(MIB, b"\xaa" * 0x2000)
    assert Multiboot(data).place(memory).context.rip == MIB + 40
    assert memory.read(MIB, 0x1000) == data + bytes(0x1000 - len(data))
    assert memory.read(MIB + 0x1000, 4) == b"\xaa" * 4

    # A part of the file only: from 4 on, up to load_end_addr.
    addresses = (MIB + 4, MIB, MIB + 44, 0, MIB + 36)
    data = bytes(8) + header(1 << 16, *addresses) + body
    memory = ram(4 * MIB)
    Multiboot(data).place(memory)
    assert memory.read(MIB, 0x1000) == data[4:48] + bytes(0x1000 - 44)


def test_header_is_found_only_where_and_how_it_must_be():
    def image(prefix: int, what: bytes) -> bytes:
        return elf_file(Load(MIB, bytes(prefix) + what + bytes(8)))

    before = 52 + 32  # ELF header and program header
    Multiboot(image(8192 - before - 12, header()))
    Multiboot(image(4, header(off=1) + header()))  # a wrong checksum is not a header
    for wrong in (
        image(8192 - before - 8, header()),
        image(2, header()),
        image(0, header(off=1)),
        image(0, header(magic=0xE85250D6)),
        b"\x7fELF",
        b"x",
    ):
        with pytest.raises(
            ConfigurationError, match="not a Multiboot kernel: no Multiboot 1 header"
        ):
            Multiboot(wrong)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (kernel(1 << 5), "demands what kvmaio does not offer: header flags 0x20"),
        (elf_file(Load(MIB, header()), kind=3), "type ET_DYN cannot be started"),
        (header() + bytes(64), "not an ELF file: it begins with 02 b0 ad 1b"),
        (header(1 << 16, MIB, MIB + 4, 0, 0, MIB), "the Multiboot header's addresses do not fit"),
        (header(1 << 16, MIB + 4, MIB, 0, 0, MIB), "the Multiboot header's addresses do not fit"),
        (header(1 << 16, MIB, MIB, MIB - 4, 0, MIB), "the Multiboot header's addresses do not fit"),
        (
            header(1 << 16, MIB, MIB, MIB + 33, 0, MIB),
            "the Multiboot header's addresses do not fit",
        ),
        (header(1 << 16, MIB, MIB, 0, MIB + 8, MIB), "the Multiboot header's addresses do not fit"),
        (header(1 << 16, MIB, MIB, 0, 0, MIB + 32), "header's entry_addr 0x100020 is not loaded"),
    ],
)
def test_a_kernel_that_cannot_be_started_is_refused(data, message):
    with pytest.raises(ConfigurationError) as error:
        Multiboot(data)
    assert message in str(error.value)


def test_kernels_that_would_like_a_video_mode_start():
    info = Multiboot(kernel(7)).place(memory := ram(4 * MIB)).context.rbx
    assert not word(memory, info, 4) & 1 << 12


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="the command line contains a null character"):
        Multiboot(kernel(), "a\0b")
    with pytest.raises(ConfigurationError, match="the string of module 0 contains a null"):
        Multiboot(kernel(), modules=[(b"x", "a\0b")])
    with pytest.raises(ConfigurationError, match="module 1 is empty"):
        Multiboot(kernel(), modules=[b"x", b""])
    with pytest.raises(ConfigurationError, match=r"cannot read module 0 .*none: No such file"):
        Multiboot(kernel(), modules=[tmp_path / "none"])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            Multiboot(kernel(address=8 * MIB)),
            "ELF segment 0 does not fit at 0x800000..0x8001ff: the machine has RAM "
            "0x0..0x1fffff; give the machine at least 9M of memory, or place it lower",
        ),
        (
            Multiboot(kernel(), modules=[bytes(4 * MIB)]),
            "module 0 does not fit at 0x101000..0x500fff: the machine has RAM 0x0..0x1fffff; "
            "give the machine at least 6M of memory, or place it lower",
        ),
        (
            Multiboot(kernel(), "x" * (2 * MIB)),
            "the Multiboot information does not fit at 0x101000..0x301fff: the machine has RAM "
            "0x0..0x1fffff; give the machine at least 4M of memory, or place it lower",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(image, message):
    memory = ram(2 * MIB)
    with pytest.raises(ConfigurationError) as error:
        image.place(memory)
    assert str(error.value) == message
    assert memory.read(0, 2 * MIB) == bytes(2 * MIB)


def test_a_segment_above_4_gib_is_refused():
    memory = ram(2 * MIB)
    memory.add_ram(1 << 32, MIB)
    file = elf_file(Load(MIB, header()), Load(1 << 32, b"x"), bits=64)
    with pytest.raises(ConfigurationError, match="ELF segment 1 is above 4 GiB"):
        Multiboot(file).place(memory)


def test_linked_guest_is_placed():
    memory = ram(4 * MIB)
    context = Multiboot(guest_file("multiboot32"), "hi").place(memory).context
    assert memory.read(MIB, 4) == MAGIC.to_bytes(4, "little")
    assert context.rip == MIB + 12


@given(flips=flips, length=st.one_of(st.just(1 << 20), st.integers(0, 9000)))
def test_damaged_elf_kernels_are_refused_or_placed(flips, length):
    with suppress(ConfigurationError):
        Multiboot(damage(guest_file("multiboot32"), flips, length)).place(ram(2 * MIB))


@given(
    addresses=st.tuples(
        *[st.one_of(st.integers(MIB - 8, MIB + 80), st.integers(0, 2**32 - 1))] * 5
    ),
    offset=st.integers(0, 16),
    tail=st.integers(0, 64),
)
def test_wild_addresses_are_refused_or_placed(addresses, offset, tail):
    data = bytes(offset * 4) + header(1 << 16, *addresses) + bytes(tail)
    with suppress(ConfigurationError):
        Multiboot(data).place(ram(2 * MIB))
