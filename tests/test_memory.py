import gc
import os
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio.errors import ConfigurationError
from kvmaio.memory import GuestMemory, parse_size

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE = 4 * KIB


def two_regions_and_a_rom() -> GuestMemory:
    """RAM 0..0x3fff, RAM 0x4000..0x7fff, ROM 0x8000..0x8fff; a hole; RAM 0x10000..0x10fff."""
    memory = GuestMemory()
    memory.add_ram(0x4000, 0x4000)
    memory.add_rom(0x8000, b"rom")
    memory.add_ram(0x10000, 0x1000)
    memory.add_ram(0, 0x4000)
    return memory


def listing(memory: GuestMemory) -> list[str]:
    return [str(region) for region in memory.regions]


# parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16M", 16 * MIB),
        ("16m", 16 * MIB),
        ("16MB", 16 * MIB),
        ("16MiB", 16 * MIB),
        (" 5G ", 5 * GIB),
        ("1 K", KIB),
        ("1T", 1 << 40),
        ("4096", 4096),
        ("4096B", 4096),
        ("0x1000", 0x1000),
        ("0x10K", 16 * KIB),
        (12345, 12345),
    ],
)
def test_size_is_understood(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "many", "16X", "1.5G", "1e3", "16M64", "K16", "--5"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigurationError, match="is no size; write it like 64M or 2G"):
        parse_size(text)


@pytest.mark.parametrize("text", [0, -1, "0", "0M", "-16M"])
def test_sizes_without_room_are_refused(text):
    with pytest.raises(ConfigurationError, match="it must be greater than 0"):
        parse_size(text)


@given(number=st.integers(1, 1 << 60), unit=st.sampled_from(["", "K", "M", "G", "T"]))
def test_size_and_unit_multiply(number, unit):
    assert (
        parse_size(f"{number}{unit}") == number << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[unit]
    )


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_an_error(text):
    try:
        assert parse_size(text) > 0
    except ConfigurationError:
        return


# Regions


def test_regions_are_ordered_and_sized():
    memory = two_regions_and_a_rom()
    assert listing(memory) == [
        "RAM 0x0..0x3fff",
        "RAM 0x4000..0x7fff",
        "ROM 0x8000..0x8fff",
        "RAM 0x10000..0x10fff",
    ]
    assert memory.size == 0x9000
    assert [region.readonly for region in memory.regions] == [False, False, True, False]


def test_region_is_found_by_address():
    memory = two_regions_and_a_rom()
    found = {address: str(memory.region_at(address)) for address in (0, 0x3FFF, 0x4000, 0x8FFF)}
    assert found == {
        0: "RAM 0x0..0x3fff",
        0x3FFF: "RAM 0x0..0x3fff",
        0x4000: "RAM 0x4000..0x7fff",
        0x8FFF: "ROM 0x8000..0x8fff",
    }
    for address in (-1, 0x9000, 0xFFFF, 0x11000, 1 << 70):
        assert memory.region_at(address) is None
    assert GuestMemory().region_at(0) is None


def test_overlapping_region_is_found():
    memory = two_regions_and_a_rom()
    assert str(memory.overlapping(0x3FFF, 2)) == "RAM 0x0..0x3fff"
    assert str(memory.overlapping(0x8FFF, 0x10000)) == "ROM 0x8000..0x8fff"
    assert memory.overlapping(0x9000, 0x7000) is None


@pytest.mark.parametrize(
    ("base", "size", "message"),
    [
        (0, 0, "RAM of 0 bytes at 0x0: the size must be greater than 0"),
        (0, -PAGE, "the size must be greater than 0"),
        (1, PAGE, "RAM of 0x1000 bytes at 0x1: base and size must be multiples of 4096"),
        (0, PAGE + 1, "RAM of 0x1001 bytes at 0x0: base and size must be multiples of 4096"),
        (-PAGE, PAGE, "base and size must be multiples of 4096"),
        (
            0x2000,
            0x1000,
            "cannot add RAM at 0x2000..0x2fff: RAM 0x0..0x3fff is already there",
        ),
        (0x7000, 0x9000, "cannot add RAM at 0x7000..0xffff: RAM 0x4000..0x7fff is already there"),
        (0x9000, 0x8000, "cannot add RAM at 0x9000..0x10fff: RAM 0x10000..0x10fff is already"),
    ],
)
def test_an_impossible_region_is_refused(base, size, message):
    memory = two_regions_and_a_rom()
    before = listing(memory)
    with pytest.raises(ConfigurationError) as error:
        memory.add_ram(base, size)
    assert message in str(error.value)
    assert listing(memory) == before


def test_more_memory_than_the_host_has_is_refused():
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = GuestMemory()
    memory.add_ram(0, MIB)
    with pytest.raises(
        ConfigurationError, match=r"but this host has only .* GiB; give the machine"
    ):
        memory.add_ram(4 * GIB, host // PAGE * PAGE)
    with pytest.raises(ConfigurationError, match="but this host has only"):
        memory.add_ram(4 * GIB, 1 << 62)
    assert memory.size == MIB


def test_rom_is_rounded_up_to_pages_and_the_host_may_write_it():
    memory = GuestMemory()
    region = memory.add_rom(0xF000_0000, b"x" * 5000)
    assert (region.size, region.readonly, memory.size) == (8192, True, 0)
    assert memory.read(0xF000_0000, 8192) == b"x" * 5000 + bytes(3192)
    memory.write(0xF000_0000, b"new")
    assert memory.read(0xF000_0000, 4) == b"newx"
    with pytest.raises(ConfigurationError, match="a ROM of zero bytes at 0x1000"):
        memory.add_rom(0x1000, b"")
    with pytest.raises(ConfigurationError, match="cannot add ROM at 0xf0001000"):
        memory.add_rom(0xF000_1000, b"y")


def test_watchers_are_told_of_every_region():
    memory = GuestMemory()
    memory.add_ram(0, PAGE)
    told: list[str] = []
    memory.watch(lambda region: told.append(f"+{region}"), lambda region: told.append(f"-{region}"))
    rom = memory.add_rom(0x1000, b"rom")
    memory.remove(rom)
    memory.add_ram(0x1000, PAGE)
    assert told == [
        "+RAM 0x0..0xfff",
        "+ROM 0x1000..0x1fff",
        "-ROM 0x1000..0x1fff",
        "+RAM 0x1000..0x1fff",
    ]
    assert listing(memory) == ["RAM 0x0..0xfff", "RAM 0x1000..0x1fff"]


def test_a_region_that_a_watcher_refuses_is_not_there():
    memory = GuestMemory()

    def refuse(region: object) -> None:
        raise ConfigurationError("no slot left")

    memory.watch(refuse, lambda region: None)
    with pytest.raises(ConfigurationError, match="no slot left"):
        memory.add_ram(0, PAGE)
    assert memory.regions == [] and memory.region_at(0) is None


def test_a_guard_may_refuse_a_region():
    memory = GuestMemory()

    def check(base: int, size: int, what: str) -> None:
        if base == 0x1000:
            raise ConfigurationError(f"{what} at {base:#x}: a device is there")

    memory.guard(check)
    memory.add_ram(0, PAGE)
    with pytest.raises(ConfigurationError, match="ROM at 0x1000: a device is there"):
        memory.add_rom(0x1000, b"rom")
    assert listing(memory) == ["RAM 0x0..0xfff"]


def test_each_guard_is_asked_until_it_ends():
    memory = GuestMemory()

    def guard(forbidden: int) -> Callable[[int, int, str], None]:
        def check(base: int, size: int, what: str) -> None:
            if base == forbidden:
                raise ConfigurationError(f"not at {forbidden:#x}")

        return check

    memory.guard(guard(0))
    end = memory.guard(guard(0x1000))
    for base in (0, 0x1000):
        with pytest.raises(ConfigurationError, match=f"not at {base:#x}"):
            memory.add_ram(base, PAGE)
    end()
    end()
    memory.add_ram(0x1000, PAGE)
    assert listing(memory) == ["RAM 0x1000..0x1fff"]


# Access


def test_access_spans_regions_that_touch():
    memory = two_regions_and_a_rom()
    memory.write(0x3FFE, b"abcd")
    assert memory.read(0x3FFC, 8) == b"\0\0abcd\0\0"
    memory.write(0x7FFF, b"1234")
    assert memory.read(0x7FFE, 6) == b"\x001234\0"
    assert len(memory.read(0, 0x9000)) == 0x9000


@pytest.mark.parametrize(
    ("address", "size"),
    [(-1, 1), (0x9000, 1), (0x8FFF, 2), (0x10FFF, 2), (0, 1 << 60), (1 << 64, 1)],
)
def test_access_outside_memory_is_refused_whole(address, size):
    memory = two_regions_and_a_rom()
    with pytest.raises(ConfigurationError, match="are not all in memory; the machine has RAM 0x0"):
        memory.read(address, size)
    with pytest.raises(ConfigurationError, match="are not all in memory"):
        memory.view(address, size)
    if size < MIB:
        with pytest.raises(ConfigurationError, match="are not all in memory"):
            memory.write(address, b"x" * size)
    assert memory.read(0, 0x9000) == bytes(0x8000) + b"rom" + bytes(0xFFD)


def test_a_refused_write_writes_nothing():
    memory = two_regions_and_a_rom()
    with pytest.raises(ConfigurationError):
        memory.write(0x8FFC, b"12345678")
    assert memory.read(0x8FFC, 4) == bytes(4)


def test_nothing_may_be_read_and_written_anywhere():
    memory = two_regions_and_a_rom()
    assert memory.read(0x1000, 0) == b""
    memory.write(0x1000, b"")
    with pytest.raises(ConfigurationError, match="an access of -1 bytes at 0x1000"):
        memory.read(0x1000, -1)


def test_memory_without_regions_says_so():
    with pytest.raises(ConfigurationError, match="the machine has no memory at all"):
        GuestMemory().read(0, 1)


def test_any_buffer_may_be_written():
    memory = two_regions_and_a_rom()
    for data in (b"abcd", bytearray(b"abcd"), memoryview(b"abcd"), memoryview(b"abcd").cast("I")):
        memory.write(0x100, bytes(4))
        memory.write(0x100, data)
        assert memory.read(0x100, 4) == b"abcd"


def test_a_view_is_the_memory_itself():
    memory = two_regions_and_a_rom()
    view = memory.view(0x3F00, 0x100)
    view[0:2] = b"hi"
    assert memory.read(0x3F00, 2) == b"hi"
    memory.write(0x3FFF, b"!")
    assert view[-1] == ord("!") and len(view) == 0x100 and not view.readonly


def test_a_view_stays_within_one_region():
    memory = two_regions_and_a_rom()
    with pytest.raises(ConfigurationError, match="are not all in memory"):
        memory.view(0x3FFF, 2)
    with pytest.raises(ConfigurationError):
        memory.view(0x1000, -1)


def test_views_outlive_the_machine():
    memory = two_regions_and_a_rom()
    view = memory.view(0, 4)
    memory.close()
    gc.collect()
    view[:] = b"safe"
    assert bytes(view) == b"safe"
    assert memory.regions == [] and memory.size == 0


@given(
    pieces=st.lists(st.tuples(st.integers(0, 0x8FFF), st.binary(max_size=0x3000)), max_size=20),
    reads=st.lists(st.tuples(st.integers(0, 0x8FFF), st.integers(0, 0x3000)), max_size=5),
)
def test_memory_is_an_array_of_bytes(pieces, reads):
    memory = two_regions_and_a_rom()
    model = bytearray(0x9000)
    model[0x8000:0x8003] = b"rom"
    for address, data in pieces:
        fitting = data[: 0x9000 - address]
        memory.write(address, fitting)
        model[address : address + len(fitting)] = fitting
    for address, size in reads:
        fits = min(size, 0x9000 - address)
        assert memory.read(address, fits) == model[address : address + fits]
    assert memory.read(0, 0x9000) == model


def test_ram_on_both_sides_of_the_hole():
    memory = GuestMemory()
    memory.add_ram(0, MIB)
    memory.add_ram(4 * GIB, MIB)
    memory.write(4 * GIB, b"high")
    assert memory.read(4 * GIB, 4) == b"high" and memory.size == 2 * MIB
    with pytest.raises(ConfigurationError, match="are not all in memory"):
        memory.read(MIB - 1, 2)
    with pytest.raises(ConfigurationError, match="are not all in memory"):
        memory.read(4 * GIB - 1, 2)
