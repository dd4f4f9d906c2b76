"""Alarm and LoopClock; ManualClock is tested with them."""

import asyncio
import time
from typing import cast

import pytest
import uvloop

from kvmaio.clock import Alarm, LoopClock, StoppedClock
from kvmaio.testing import ManualClock, settle


async def hear(alarm, heard, clock):
    async for deadline_ns in alarm:
        heard.append((clock.now_ns, deadline_ns))


@pytest.fixture
async def parts():
    clock = ManualClock()
    alarm = Alarm(clock)
    heard: list[tuple[int, int]] = []
    listener = asyncio.create_task(hear(alarm, heard, clock))
    yield clock, alarm, heard
    listener.cancel()
    await asyncio.wait([listener])


async def test_an_alarm_rings_once_exactly_at_its_deadline(parts):
    clock, alarm, heard = parts
    alarm.arm(100)
    await clock.advance(99)
    assert (heard, alarm.deadline_ns) == ([], 100)
    await clock.advance(1000)
    assert (heard, alarm.deadline_ns, clock.now_ns) == ([(100, 100)], None, 1099)


async def test_a_new_deadline_replaces_the_old_one(parts):
    clock, alarm, heard = parts
    alarm.arm(100)
    alarm.arm(200)
    await clock.advance(1000)
    assert heard == [(200, 200)]


async def test_a_past_deadline_rings_at_once(parts):
    clock, alarm, heard = parts
    await clock.advance(500)
    alarm.arm(100)
    await clock.advance(0)
    assert heard == [(500, 100)]


async def test_disarm_forgets_the_deadline_and_reset_the_unheard_rings_too(parts):
    clock, alarm, heard = parts
    alarm.arm(100)
    alarm.disarm()
    alarm.disarm()
    alarm.arm(300)
    clock.now_ns = 300
    alarm._ring()
    alarm.reset()
    alarm.arm(400)
    await clock.advance(1000)
    assert heard == [(400, 400)]


async def test_rings_that_nobody_hears_are_kept():
    clock = ManualClock()
    alarm = Alarm(clock)
    heard: list[tuple[int, int]] = []
    for deadline_ns in (10, 20):
        alarm.arm(deadline_ns)
        await clock.advance(10)
    listener = asyncio.create_task(hear(alarm, heard, clock))
    await settle()
    listener.cancel()
    assert heard == [(20, 10), (20, 20)]


async def test_cancelling_the_listener_loses_no_ring():
    clock = ManualClock()
    alarm = Alarm(clock)
    heard: list[tuple[int, int]] = []
    first = asyncio.create_task(hear(alarm, heard, clock))
    await settle()
    alarm.arm(0)
    alarm._ring()
    first.cancel()  # it was woken, but has not run yet
    await asyncio.wait([first])
    second = asyncio.create_task(hear(alarm, heard, clock))
    await settle()
    second.cancel()
    assert heard == [(0, 0)]


async def test_a_callback_that_comes_early_does_not_ring(parts):
    clock, alarm, heard = parts
    alarm.arm(100)
    clock.now_ns = 99
    alarm._ring()
    await settle()
    assert (heard, alarm.deadline_ns) == ([], 100)
    await clock.advance(1)
    assert heard == [(100, 100)]


async def test_an_armed_alarm_moves_to_another_clock(parts):
    clock, alarm, heard = parts
    alarm.arm(100)
    other = ManualClock(50)
    alarm.use_clock(other)
    await clock.advance(1000)
    assert heard == []
    await other.advance(50)
    assert [deadline_ns for _, deadline_ns in heard] == [100]


async def test_an_unattached_device_has_a_clock_that_stands():
    clock = StoppedClock()
    alarm = Alarm(clock)
    alarm.arm(0)
    await settle()
    assert (clock.now_ns, alarm.deadline_ns) == (0, 0)
    alarm.disarm()


class SimulatingLoop:
    """What LoopClock asks of a loop that has a time of its own."""

    now_ns = 0

    def time_ns(self):
        return self.now_ns

    def call_at(self, when, callback):
        self.call = (when, callback)


def test_loop_clock_shows_the_time_of_a_loop_that_has_its_own():
    loop = SimulatingLoop()
    clock = LoopClock(cast(asyncio.AbstractEventLoop, loop))
    for ns in (0, 1, 86_400 * 10**9 + 1):
        loop.now_ns = ns
        assert clock.now_ns == ns
    clock.call_at_ns(1_500_000_000, print)
    assert loop.call == (1.5, print)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_loop_clock_shows_the_monotonic_time_on_an_ordinary_loop(new_loop):
    loop = new_loop()
    clock = LoopClock(loop)
    before, shown, after = time.monotonic_ns(), clock.now_ns, time.monotonic_ns()
    loop.close()
    assert before <= shown <= after


async def test_the_alarm_never_rings_early_on_a_real_loop():
    clock = LoopClock(asyncio.get_running_loop())
    alarm = Alarm(clock)
    for _ in range(20):
        alarm.arm(clock.now_ns + 12_345)
        deadline_ns = await anext(alarm)
        assert clock.now_ns >= deadline_ns


async def test_manual_clock_runs_what_is_due_in_the_order_of_deadlines():
    clock, log = ManualClock(), []

    def note(name):
        return lambda: log.append((name, clock.now_ns))

    def chain():
        log.append(("chain", clock.now_ns))
        clock.call_at_ns(clock.now_ns + 5, note("link"))

    clock.call_at_ns(30, note("c"))
    clock.call_at_ns(10, chain)
    clock.call_at_ns(20, note("first"))
    clock.call_at_ns(20, note("second"))
    clock.call_at_ns(20, note("never")).cancel()
    clock.call_at_ns(31, note("later"))
    await clock.advance(30)
    assert log == [("chain", 10), ("link", 15), ("first", 20), ("second", 20), ("c", 30)]
    assert clock.now_ns == 30


async def test_manual_clock_refuses_to_stand_still():
    clock = ManualClock()

    def again():
        clock.call_at_ns(clock.now_ns, again)

    again()
    with pytest.raises(RuntimeError, match="time stands still at 0 ns"):
        await clock.advance(1)
