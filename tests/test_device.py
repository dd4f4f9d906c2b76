"""Device: declared registers answer accesses of any size and place."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio.device import Device
from kvmaio.errors import ConfigurationError
from kvmaio.registers import Access, Register
from kvmaio.testing import BusDriver


class Sample(Device):
    """Two wide registers next to each other, a hole, and a byte."""

    first = Register(0x0, int, bits=32, reset=0x4433_2211)
    second = Register(0x4, int, bits=16, reset=0x6655)
    last = Register(0x9, int, reset=0xAA)


WINDOW = bytes.fromhex("11223344 5566 000000 AA")


def test_a_device_is_whole_without_its_init():
    class Bare(Device):
        def __init__(self, answer):
            self.answer = answer

    device = Bare(42)
    assert (device.answer, device.name, device.irq.level, device.clock.now_ns) == (
        42, "bare", False, 0,
    )  # fmt: skip
    assert (device.alarm.deadline_ns, device.size, repr(device)) == (None, 0, "<Bare bare>")


def test_the_window_reaches_as_far_as_the_registers_unless_size_says_more():
    class Wide(Sample):
        size = 0x100

    class Longer(Sample):
        extra = Register(0x10, int, bits=64)

    assert (Sample.size, Wide.size, Longer.size) == (10, 0x100, 0x18)


@pytest.mark.parametrize("offset", range(10))
@pytest.mark.parametrize("size", [1, 2, 4, 8])
async def test_a_read_of_any_size_and_place_sees_the_window_in_little_endian(offset, size):
    if offset + size <= len(WINDOW):
        async with BusDriver(Sample()) as bus:
            expected = int.from_bytes(WINDOW[offset : offset + size], "little")
            assert await bus.read(offset, size) == expected


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 4, 8]), st.binary(
    min_size=8, max_size=8))))  # fmt: skip
def test_writes_of_any_size_and_place_change_those_bytes_only(writes):
    async def story():
        window = bytearray(WINDOW)
        async with BusDriver(Sample()) as bus:
            for offset, size, data in writes:
                if offset + size > len(window):
                    continue
                await bus.write(offset, size, int.from_bytes(data[:size], "little"))
                window[offset : offset + size] = data[:size]
                window[6:9] = bytes(3)  # the hole ignores writes
            assert bytes([await bus.read(i) for i in range(10)]) == window

    asyncio.run(story())


async def test_banked_registers_hide_those_below_them():
    class Banked(Device):
        select = Register(0x1, int)
        below = Register(0x0, int, reset=1)
        above = Register(0x0, int, Access.R, reset=2, when=lambda device: device.select == 1)

    async with BusDriver(Banked()) as bus:
        assert await bus.read(0) == 1
        await bus.write(1, 1, 1)
        await bus.write(0, 1, 99)  # read-only, and what is hidden stays untouched
        assert await bus.read(0) == 2
        await bus.write(1, 1, 0)
        assert await bus.read(0) == 1


async def test_one_offset_for_reading_and_another_for_writing():
    class Port(Device):
        received = Register(0x0, int, Access.R, reset=0x55)
        sent = Register(0x0, int, Access.W)

    async with BusDriver(Port()) as bus:
        await bus.write(0, 1, 0xAA)
        assert (await bus.read(0), bus.device.sent) == (0x55, 0xAA)


@pytest.mark.parametrize(
    "accesses", [(Access.RW, Access.RW), (Access.R, Access.R), (Access.W, Access.RW)]
)
def test_overlapping_registers_are_refused(accesses):
    declared = {
        "low": Register(0x0, int, accesses[0], bits=32),
        "high": Register(0x2, int, accesses[1], bits=16),
    }
    message = r"Bad: high at 0x2\.\.0x3 overlaps low at 0x0\.\.0x3"
    with pytest.raises(ConfigurationError, match=message):
        type("Bad", (Device,), declared)


def test_a_register_beyond_the_window_is_refused():
    declared = {"size": 4, "far": Register(0x4, int)}
    with pytest.raises(ConfigurationError, match="Bad: far lies beyond the window of 0x4 bytes"):
        type("Bad", (Device,), declared)


def test_a_subclass_can_replace_and_remove_a_register():
    class Replaced(Sample):
        first = Register(0x0, int, reset=9)
        last = None  # type: ignore[assignment]

    assert [register.name for register in Replaced.registers] == ["first", "second"]
    assert Replaced().read(0, 1) == 9


class Handlers(Device):
    """Plain and async handlers, and a count of update()."""

    plain = Register(0x0, int, bits=16)
    slow = Register(0x2, int, bits=16)
    updates = 0

    @plain.on_read
    def answer(self):
        return 0xBEEF

    @plain.on_write
    def take(self, value):
        self.plain = value + 1

    @slow.on_read
    async def answer_late(self):
        await asyncio.sleep(0)
        return 0xCAFE

    @slow.on_write
    async def take_late(self, value):
        await asyncio.sleep(0)
        self.slow = value

    def update(self):
        self.updates += 1


async def test_handlers_answer_alone_and_in_pieces():
    async with BusDriver(Handlers()) as bus:
        device = bus.device
        assert [await bus.read(0, 2), await bus.read(2, 2), await bus.read(0, 4)] == [
            0xBEEF, 0xCAFE, 0xCAFE_BEEF,
        ]  # fmt: skip
        assert await bus.read(1, 2) == 0xFEBE
        await bus.write(0, 2, 1)
        await bus.write(2, 2, 2)
        assert (device.plain, device.slow, device.updates) == (2, 2, 2)
        await bus.write(0, 4, 0x0004_0003)
        assert (device.plain, device.slow, device.updates) == (4, 4, 3)
        await bus.write(3, 1, 0x12)
        assert device.slow == 0x1204


def test_a_plain_access_makes_no_coroutine():
    device = Handlers()
    assert (device.read(0, 2), device.write(0, 2, 5)) == (0xBEEF, None)


def test_reset_restores_the_declared_values_and_the_alarm():
    device = Sample()
    device.first = 0
    device.alarm.arm(5)
    device.reset()
    assert (device.first, device.alarm.deadline_ns) == (0x4433_2211, None)


async def test_bus_driver_raises_what_run_raised():
    class Broken(Sample):
        async def run(self):
            async for _ in self.alarm:
                raise ZeroDivisionError("in run()")

    async with BusDriver(Broken()) as bus:
        bus.device.alarm.arm(10)
        with pytest.raises(ZeroDivisionError):
            await bus.advance(10)
        assert await bus.read(9) == 0xAA  # reported once
    driver = BusDriver(Broken())

    async def until_the_exit():
        async with driver:
            driver.device.alarm.arm(0)
            await driver.clock.advance(0)

    with pytest.raises(ZeroDivisionError):
        await until_the_exit()


async def test_bus_driver_cancels_run_and_waits_for_it():
    ended = []

    class Endless(Sample):
        async def run(self):
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append(True)

    with pytest.raises(KeyError):
        async with BusDriver(Endless()):
            raise KeyError
    assert ended == [True]
