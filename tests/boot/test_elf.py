import ctypes
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio.boot import Elf, Flat
from kvmaio.errors import ConfigurationError
from kvmaio.memory import GuestMemory
from tests.assembler import guest_file
from tests.boot.elf_files import Load, damage, elf_file, flips
from tests.boot.walker import ram

MIB = 1 << 20
KIB = 1 << 10


@pytest.mark.parametrize(("bits", "mode"), [(32, "prot32"), (64, "long64")])
def test_segments_are_placed_and_bss_is_zeroed(bits, mode):
    memory = ram(4 * MIB)
    memory.write(0, b"\xaa" * 4 * MIB)
    image = Elf(
        elf_file(
            Load(0x10_0000, b"code" * 100),
            Load(0x10_2000, b"data", size=0x3001),
            Load(0x10_8000, size=0x10),
            Load(0x99_9999, b"a note", type=4),
            bits=bits,
            entry=0x10_0010,
        )
    )
    state = image.place(memory)
    expected = bytearray(b"\xaa" * (4 * MIB - 128 * KIB))
    expected[0x10_0000:0x10_0190] = b"code" * 100
    expected[0x10_2000:0x10_5001] = b"data" + bytes(0x2FFD)
    expected[0x10_8000:0x10_8010] = bytes(0x10)
    assert memory.read(0, len(expected)) == expected
    # The CPU starts as a flat image of the mode does.
    flat = Flat(b"\xf4", 0x1000, mode, entry=0x10_0010).place(ram(4 * MIB))
    assert state == flat


def test_linked_guests_are_placed(tmp_path):
    for name, start in (("hello32", "e8"), ("hello64", "e8")):
        file = tmp_path / name
        file.write_bytes(guest_file(name))
        memory = ram(4 * MIB)
        memory.write(MIB, b"\xaa" * MIB)
        state = Elf(file).place(memory)
        assert state.context.rip == MIB
        assert memory.read(MIB, 1).hex() == start
        text = b"hello from ELF" + name[-2:].encode() + b", \0"
        assert memory.read(MIB + 0x1000, len(text)) == text
        bss = MIB + 0x1000 + len(text)
        assert memory.read(bss, 0x2346) == bytes(0x2346)


def test_virtual_entry_point_is_translated():
    kernel = Load(0x10_0000, bytes(0x100), virtual=0xFFFF_FFFF_8010_0000)
    image = Elf(elf_file(kernel, bits=64, entry=0xFFFF_FFFF_8010_0020))
    assert image.place(ram(4 * MIB)).context.rip == 0x10_0020
    image = Elf(elf_file(kernel, bits=64, entry=0x10_0040))
    assert image.place(ram(4 * MIB)).context.rip == 0x10_0040


def test_large_bss_takes_no_host_memory():
    memory = GuestMemory()
    memory.add_ram(0, 512 * MIB)
    Elf(elf_file(Load(0x10_0000, b"\xf4", size=400 * MIB))).place(memory)
    with open("/proc/self/smaps") as smaps:
        mapping = memory.regions[0].mapping
        start = _address(mapping)
        for line in smaps:
            if line.startswith(f"{start:x}-"):
                break
        usage = dict(line.split(":", 1) for _, line in zip(range(20), smaps, strict=False))
    assert int(usage["Anonymous"].split()[0]) < 4 * KIB


def _address(mapping) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


GOOD = Load(0x10_0000, bytes(64))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"MZ\x90\0" + bytes(60), "not an ELF file: it begins with 4d 5a 90 00"),
        (b"\x7fELF", "a damaged ELF file"),
        (b"\x7fELF\1\1\1" + bytes(20), "a damaged ELF file"),
        (elf_file(GOOD, machine=183), "an ELF32 file for EM_AARCH64: it must be ELF32 for EM_386"),
        (elf_file(GOOD, bits=64, machine=3), "an ELF64 file for EM_386: it must be ELF32 for"),
        (elf_file(GOOD, bits=32, machine=62), "an ELF32 file for EM_X86_64: it must be"),
        (elf_file(GOOD, machine=8, big_endian=True), "an ELF32 file for EM_MIPS: it must be"),
        (elf_file(GOOD, machine=3, big_endian=True), "it must be"),
        (elf_file(GOOD, machine=12345), "an ELF32 file for 12345"),
        (elf_file(GOOD, kind=1), "type ET_REL cannot be started: it is an object file; link it"),
        (elf_file(GOOD, kind=3), "type ET_DYN cannot be started: it is position-independent"),
        (elf_file(GOOD, kind=4), "type ET_CORE cannot be started: it is a core dump"),
        (elf_file(GOOD, kind=777), "type 777 cannot be started: only executables"),
        (elf_file(GOOD, Load(0, type=2)), "a dynamically linked ELF file cannot be started"),
        (elf_file(GOOD, Load(0, type=3)), "a dynamically linked ELF file cannot be started"),
        (elf_file(), "no program headers, so nothing to load"),
        (elf_file(Load(0, type=4)), "nothing to load (no PT_LOAD segment)"),
        (elf_file(Load(0x10_0000)), "nothing to load (no PT_LOAD segment)"),
        (elf_file(GOOD, count=100), "100 program headers of 32 bytes at 0x34, in a file of 0x94"),
        (elf_file(GOOD, header_size=0), "1 program headers of 0 bytes"),
        (elf_file(GOOD, count=0xFFFF), "65535 or more program headers"),
        (
            elf_file(Load(0x10_0000, b"abc", size=2)),
            "ELF segment 0 has 0x3 bytes in the file, 0x2 in memory",
        ),
        (
            elf_file(Load(0x10_0000, b"abc", length=0x1000)),
            "the ELF file ends at 0x57, but ELF segment 0 goes up to 0x1054",
        ),
        (
            elf_file(GOOD, Load(0x10_0030, bytes(64))),
            "ELF segment 0 at 0x100000..0x10003f and ELF segment 1 at 0x100030..0x10006f overlap",
        ),
        (elf_file(GOOD, entry=0x1000), "entry point 0x1000 is in none of its segments"),
        (
            elf_file(Load(1 << 32, bytes(64)), bits=64),
            "entry point 0x100000000 is above 4 GiB, where the CPU cannot start",
        ),
    ],
)
def test_what_cannot_be_started_is_refused(data, message):
    with pytest.raises(ConfigurationError) as error:
        Elf(data)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            Load(3 * MIB, b"x" * 64, size=2 * MIB),
            "ELF segment 0 does not fit at 0x300000..0x4fffff: the machine has RAM "
            "0x0..0x3fffff; give the machine at least 6M of memory, or place it lower",
        ),
        (
            Load(4 * MIB - 64 * KIB, b"x"),
            "ELF segment 0 does not fit at 0x3f0000..0x3f0000: the engine's tables begin at "
            "0x3e0000; give the machine at least 5M of memory, or place it lower",
        ),
        (
            Load(0x10_0000, b"x", size=1 << 60),
            "ELF segment 0 does not fit at 0x100000..0x10000000000fffff: the machine has RAM "
            "0x0..0x3fffff; no memory size reaches there, place or link it lower",
        ),
        (
            Load(0xF000_0000, b"x"),
            "ELF segment 0 does not fit at 0xf0000000..0xf0000000: the machine has RAM "
            "0x0..0x3fffff; no memory size reaches there, place or link it lower",
        ),
    ],
)
def test_a_segment_outside_memory_is_refused_and_nothing_written(load, message):
    memory = ram(4 * MIB)
    with pytest.raises(ConfigurationError) as error:
        Elf(elf_file(load, bits=64)).place(memory)
    assert str(error.value) == message
    assert memory.read(0, 4 * MIB) == bytes(4 * MIB)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"cannot read the ELF file .*none: No such file"):
        Elf(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="the ELF file is empty"):
        Elf(b"")


@pytest.mark.parametrize("name", ["hello32", "hello64"])
@given(flips=flips, length=st.one_of(st.just(1 << 20), st.integers(0, 9000)))
def test_damaged_files_are_refused_or_placed(name, flips, length):
    memory = ram(2 * MIB)
    with suppress(ConfigurationError):
        Elf(damage(guest_file(name), flips, length)).place(memory)
