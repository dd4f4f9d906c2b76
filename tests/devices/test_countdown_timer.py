"""CountdownTimer: one-shot, periodic, write one to clear."""

from kvmaio.devices import CountdownTimer
from kvmaio.devices.countdown_timer import Control, Status
from kvmaio.testing import BusDriver

INTERVAL, CONTROL, STATUS = 0x0, 0x4, 0x8


async def test_one_shot_rings_once_and_is_acknowledged():
    async with BusDriver(CountdownTimer()) as bus:
        await bus.write(INTERVAL, 4, 5_000)
        await bus.write(CONTROL, 4, Control.ENABLE)
        await bus.advance(4_999)
        assert await bus.read(STATUS, 4) == 0
        await bus.advance(10_000)
        assert await bus.read(STATUS, 4) == Status.EXPIRED
        await bus.write(STATUS, 4, Status.EXPIRED)
        await bus.advance(100_000)
        assert bus.irq.edges == [(5_000, True), (14_999, False)]


async def test_periodic_rings_from_the_deadline_and_not_from_the_service():
    async with BusDriver(CountdownTimer()) as bus:
        await bus.write(INTERVAL, 4, 10_000)
        await bus.write(CONTROL, 4, Control.ENABLE | Control.PERIODIC)
        for _ in range(3):
            await bus.advance(10_000)
            await bus.write(STATUS, 4, Status.EXPIRED)
        await bus.advance(9_999)
        assert bus.irq.edges == [
            (10_000, True), (10_000, False),
            (20_000, True), (20_000, False),
            (30_000, True), (30_000, False),
        ]  # fmt: skip


async def test_writing_a_zero_clears_nothing():
    async with BusDriver(CountdownTimer()) as bus:
        await bus.write(INTERVAL, 4, 1_000)
        await bus.write(CONTROL, 4, Control.ENABLE)
        await bus.advance(1_000)
        await bus.write(STATUS, 4, 0)
        assert bus.irq.edges == [(1_000, True)]


async def test_stopping_before_the_deadline():
    async with BusDriver(CountdownTimer()) as bus:
        await bus.write(INTERVAL, 4, 1_000)
        await bus.write(CONTROL, 4, Control.ENABLE)
        await bus.advance(999)
        await bus.write(CONTROL, 4, 0)
        await bus.advance(1_000_000)
        assert bus.irq.edges == []


async def test_the_guest_cannot_stop_time_with_an_interval_of_nothing():
    async with BusDriver(CountdownTimer()) as bus:
        await bus.write(CONTROL, 4, Control.ENABLE | Control.PERIODIC)
        await bus.advance(1_000)
        assert bus.irq.edges == [(1_000, True)]


async def test_reset_forgets_a_ring_that_was_not_heard_yet():
    async with BusDriver(CountdownTimer()) as bus:
        await bus.write(INTERVAL, 4, 1_000)
        await bus.write(CONTROL, 4, Control.ENABLE)
        bus.clock.now_ns = 1_000
        bus.device.alarm._ring()  # before run() gets its turn
        bus.reset()
        await bus.advance(10_000)
        assert await bus.read(STATUS, 4) == 0
        assert bus.irq.edges == []
