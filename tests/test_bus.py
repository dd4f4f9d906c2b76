"""Bus: who lies where, and what an access does there."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio.bus import Bus, Unmapped
from kvmaio.device import Device
from kvmaio.errors import ConfigurationError, UnmappedAccess
from kvmaio.registers import Register


class Byte(Device):
    value = Register(0x0, int)


class Memory(Device):
    """`size` bytes that remember their accesses."""

    def __init__(self, size, name="memory"):
        self.size = size
        self.name = name
        self.log = []

    def read(self, offset, size):
        self.log.append(("read", offset, size))
        return (1 << 64) - 1

    def write(self, offset, size, value):
        self.log.append(("write", offset, size, value))


async def test_an_access_reaches_the_device_at_its_offset():
    bus, memory = Bus("mmio", 1 << 64), Memory(0x1000)
    bus.map(memory, 0xFEDC_0000_0000)
    assert await bus.read(0xFEDC_0000_0010, 4) == 0xFFFF_FFFF  # cut to its size
    await bus.write(0xFEDC_0000_0FFF, 1, 0x1234)
    assert memory.log == [("read", 0x10, 4), ("write", 0xFFF, 1, 0x34)]


@pytest.mark.parametrize(("base", "size"), [(0x3F8, 8), (0x3FF, 1), (0x3F1, 8), (0x3F0, 0x100)])
def test_overlapping_windows_are_refused_by_name(base, size):
    bus = Bus("pio", 0x10000)
    bus.map(Memory(8, "uart0"), 0x3F8)
    with pytest.raises(ConfigurationError) as refused:
        bus.map(Memory(size, "uart1"), base)
    assert str(refused.value) == (
        f"cannot map uart1 at {base:#x}..{base + size - 1:#x}: uart0 already occupies 0x3f8..0x3ff"
    )
    assert [mapping.device.name for mapping in bus] == ["uart0"]


@pytest.mark.parametrize(
    ("base", "size", "message"),
    [
        (0xFFFF, 2, r"0xffff\.\.0x10000: the bus ends at 0xffff"),
        (-1, 1, "the bus ends at 0xffff"),
        (0, 0, "its size is 0"),
    ],
)
def test_impossible_windows_are_refused(base, size, message):
    with pytest.raises(ConfigurationError, match=message):
        Bus("pio", 0x10000).map(Memory(size), base)


@pytest.mark.parametrize("size", [0, 9, 16, 17, -1])
async def test_impossible_sizes_are_refused_also_when_the_place_is_known(size):
    bus = Bus("pio", 0x10000)
    bus.map(Memory(0x100), 0)
    for address in range(4):  # fill the bus's own tables first
        await bus.read(address, 1)
    with pytest.raises(ConfigurationError, match=f"an access of {size} bytes at pio 0x0"):
        await bus.read(0, size)
    with pytest.raises(ConfigurationError, match=f"an access of {size} bytes at pio 0x0"):
        await bus.write(0, size, 0)


async def test_windows_may_touch():
    bus = Bus("pio", 0x10000)
    parts = [Memory(4, name) for name in "abc"]
    for place, part in zip((4, 0, 8), parts, strict=True):
        bus.map(part, place)
    assert [str(mapping) for mapping in bus] == [
        "b at 0x0..0x3", "a at 0x4..0x7", "c at 0x8..0xb",
    ]  # fmt: skip
    assert [str(bus.find(address))[0] for address in (0, 3, 4, 7, 8, 11)] == list("bbaacc")
    assert (bus.find(12), bus.overlapping(12, 4)) == (None, None)
    assert str(bus.overlapping(0, 12)) == "b at 0x0..0x3"


async def test_nobody_there_is_the_guests_error_or_an_open_bus():
    bus = Bus("pio", 0x10000)
    with pytest.raises(UnmappedAccess) as read:
        await bus.read(0x80, 2)
    with pytest.raises(UnmappedAccess, match="write of 0x55 of 1 byte at pio 0x80"):
        await bus.write(0x80, 1, 0x55)
    assert (read.value.address, read.value.size, read.value.value) == (0x80, 2, None)
    assert "read of 2 bytes at pio 0x80" in str(read.value)
    bus.unmapped = Unmapped.OPEN_BUS
    await bus.write(0x80, 1, 0x55)
    assert await bus.read(0x80, 2) == 0xFFFF


async def test_an_access_over_the_edge_of_a_window_becomes_bytes():
    bus = Bus("pio", 0x10000, Unmapped.OPEN_BUS)
    first, second = Memory(2, "first"), Byte()
    bus.map(first, 0x10)
    bus.map(second, 0x12)
    await bus.write(0x11, 4, 0x4433_2211)
    assert (first.log, second.value) == ([("write", 1, 1, 0x11)], 0x22)
    first.log.clear()
    assert await bus.read(0x0F, 8) == 0xFFFF_FFFF_22FF_FFFF
    assert first.log == [("read", 0, 1), ("read", 1, 1)]


async def test_what_was_resolved_before_does_not_outlive_map_and_unmap():
    bus, byte = Bus("pio", 0x10000, Unmapped.OPEN_BUS), Byte()
    assert await bus.read(0x10, 1) == 0xFF
    bus.map(byte, 0x10)
    assert await bus.read(0x10, 1) == 0
    bus.unmap(byte)
    bus.unmap(byte)
    assert await bus.read(0x10, 1) == 0xFF
    bus.map(byte, 0x20)
    assert await bus.read(0x20, 1) == 0


async def test_one_device_in_two_places():
    bus, byte = Bus("pio", 0x10000), Byte()
    bus.map(byte, 0x10)
    bus.map(byte, 0x20)
    await bus.write(0x10, 1, 7)
    assert await bus.read(0x20, 1) == 7


class Counting(Byte):
    """Counts how often it is asked to derive its state."""

    slow = Register(0x1, int)
    updates = 0

    @slow.on_write
    async def take(self, value):
        assert self.updates == 0  # not before the write is done
        await asyncio.sleep(0)

    def update(self):
        self.updates += 1


async def test_update_follows_each_write_and_no_read():
    for offset in (0, 1):
        bus, device = Bus("pio", 0x10000), Counting()
        bus.map(device, 0)
        await bus.read(offset, 1)
        await bus.write(offset, 1, 1)
        assert device.updates == 1


def test_plain_accesses_make_no_coroutine():
    bus = Bus("pio", 0x10000)
    bus.map(Counting(), 0)
    assert bus.begin_write(0, 1, 9) is None
    assert bus.begin_read(0, 1) == 9


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(1, 20)), max_size=20))
def test_windows_never_overlap_and_find_agrees_with_them(requests):
    bus = Bus("pio", 64)
    taken: dict[int, Device] = {}
    for number, (base, size) in enumerate(requests):
        places = range(base, base + size)
        device = Memory(size, f"d{number}")
        free = base + size <= 64 and not any(place in taken for place in places)
        try:
            bus.map(device, base)
        except ConfigurationError:
            assert not free
        else:
            assert free
            taken |= dict.fromkeys(places, device)
    for address in range(64):
        mapping = bus.find(address)
        assert (mapping and mapping.device) is taken.get(address)
