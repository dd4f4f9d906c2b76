"""Time is exact, never goes backwards, and never stands still in silence."""

import asyncio
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmaio.clock import Alarm, LoopClock
from kvmaio.cpu import EntryResult
from kvmaio.errors import ConfigurationError, KvmaioError
from kvmaio.simulation import SimulationLoop
from tests.simulation.support import (
    MS,
    PATIENCE,
    ScriptedModel,
    enter_again_and_again,
    running,
    simulate,
    timed,
)

TIMER, EXIT = EntryResult.TIMER, EntryResult.EXIT


def whole(limit_ns):
    """A compute-bound guest."""
    return limit_ns, TIMER


# ---- timers ---------------------------------------------------------------------------


def test_a_loop_starts_at_zero_and_jumps_from_timer_to_timer():
    async def main():
        loop, seen = running(), [running().time()]
        for delay in (3600.0, 0.25, 1e-9):
            await asyncio.sleep(delay)
            seen.append(loop.time())
        return seen, loop.time_ns()

    assert simulate(main()) == ([0.0, 3600.0, 3600.25, 3600.250000001], 3_600_250_000_001)


def test_ten_seconds_of_idle_time_pass_at_once():
    async def main():
        before = time.thread_time()
        await asyncio.sleep(10)
        return time.thread_time() - before

    assert simulate(main()) < 0.5


@pytest.mark.parametrize("start_s", [0, 10**6, 10**8])
def test_a_callback_sees_exactly_its_deadline(start_s):
    """Also where a float no longer holds nanoseconds."""
    deadlines = random.Random(1).sample(range(1, 5000), 300)

    async def main():
        loop = running()
        await asyncio.sleep(start_s)
        start_ns, seen = loop.time_ns(), []
        for deadline in deadlines:
            loop.call_at_ns(start_ns + deadline, lambda: seen.append(loop.time_ns() - start_ns))
        await asyncio.sleep(1)
        return start_ns, seen

    assert simulate(main()) == (start_s * 10**9, sorted(deadlines))


@settings(max_examples=50 // PATIENCE)
@given(st.lists(st.floats(min_value=0, max_value=1e6), max_size=30))
def test_a_float_deadline_is_rounded_to_the_nearest_nanosecond(deadlines):
    async def main():
        loop, seen = running(), []
        for when in deadlines:
            loop.call_at(when, lambda when=when: seen.append((round(when * 1e9), loop.time_ns())))
        await asyncio.sleep(2e6)
        return seen

    seen = simulate(main())
    assert [now for _, now in seen] == sorted(round(when * 1e9) for when in deadlines)
    assert all(due == now for due, now in seen)


def test_neighbouring_nanoseconds_are_not_merged():
    async def main():
        loop, seen = running(), []
        for ns in (3, 1, 2):
            loop.call_at(ns * 1e-9, lambda: seen.append(loop.time_ns()))
        await asyncio.sleep(1e-6)
        return seen

    assert simulate(main()) == [1, 2, 3]


def test_equal_deadlines_fire_in_the_order_of_their_calls_whatever_is_cancelled():
    async def main():
        loop, fired = running(), list[object]()
        timers = [loop.call_at(1.0, fired.append, n) for n in range(500)]
        random.Random(2).shuffle(timers)
        for timer in timers[:450]:
            timer.cancel()
        await asyncio.sleep(2)
        return fired

    fired = simulate(main())
    assert len(fired) == 50 and fired == sorted(fired)


def test_impossible_and_endless_deadlines():
    async def main():
        loop, fired = running(), list[object]()
        loop.call_at(math.inf, fired.append, "never")
        loop.call_later(math.inf, fired.append, "never")
        loop.call_at(-math.inf, fired.append, "past")
        loop.call_later(-1, fired.append, "past")
        with pytest.raises(ValueError, match="not a number"):
            loop.call_later(math.nan, fired.append, "nan")
        await asyncio.sleep(1e9)
        return fired, loop.time()

    assert simulate(main()) == (["past", "past"], 1e9)


def test_an_alarm_is_exact_where_floats_are_not():
    async def main():
        loop = running()
        alarm, start_ns = Alarm(LoopClock(loop)), 10**17 + 1
        alarm.arm(start_ns)
        return [await anext(alarm), loop.time_ns()]

    assert simulate(main()) == [10**17 + 1] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"pace": 0},
        {"pace": math.nan},
        {"pace": math.inf},
        {"pace": "x"},
        {"quantum_ns": 0},
        {"quantum_ns": 0.5},
        {"schedule": "any"},
    ],
)
def test_impossible_loops_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        SimulationLoop(**options)


# ---- timers and guests -----------------------------------------------------------------


def test_a_guest_runs_exactly_from_event_to_event_and_overshoot_is_debt():
    overshoots = iter([0, 300, 0, 0, 0])

    def step(limit_ns):
        slices.append(limit_ns)
        return limit_ns + next(overshoots), TIMER

    slices: list[int] = []

    async def main():
        loop, seen = running(), []
        cpu, stats = timed(ScriptedModel(step))
        task = asyncio.create_task(enter_again_and_again(cpu))
        for ns in (1000, 2000, 2200, 2500):
            loop.call_at_ns(ns, lambda: seen.append((loop.time_ns(), cpu.local_ns)))
        await asyncio.sleep(2.5e-6)
        task.cancel()
        return seen, stats.ticksOvershot

    # The event at 2200 comes while the guest is at 2300: it is not entered before.
    assert simulate(main()) == ([(1000, 1000), (2000, 2300), (2200, 2300), (2500, 2500)], 300)
    assert slices == [1000, 1000, 200]


def test_an_exit_is_served_at_exit_time_plus_executed_time():
    exits = iter([(700, EXIT), (100, EXIT), (450, EXIT)])

    async def main():
        loop, served = running(), []
        cpu, stats = timed(ScriptedModel(lambda limit_ns: next(exits, (limit_ns, TIMER))))
        task = asyncio.create_task(
            enter_again_and_again(
                cpu, lambda local_ns, _: served.append((local_ns, loop.time_ns()))
            )
        )
        await asyncio.sleep(1e-5)
        task.cancel()
        return served, stats.ticksLate

    assert simulate(main()) == ([(700, 700), (800, 800), (1250, 1250)], 0)


@pytest.mark.parametrize("host_factor", [0.001, 0.3, 1.0, 2.0, 1000.0])
def test_the_host_factor_scales_time_without_losing_fractions(host_factor):
    async def main():
        model = ScriptedModel(lambda limit_ns: (min(limit_ns, 7), EXIT))
        cpu, _ = timed(model, host_factor)
        entries = 0

        def count(*_):
            nonlocal entries
            entries += 1

        task = asyncio.create_task(enter_again_and_again(cpu, count))
        await asyncio.sleep(2000 * 7e-9 * host_factor)
        task.cancel()
        return cpu.local_ns, entries

    local_ns, entries = simulate(main())
    assert abs(local_ns - entries * 7 * host_factor) <= 1000 * host_factor + 1


def test_a_guest_that_the_host_kept_from_running_has_the_rest_still_to_run():
    executed = []

    async def main():
        loop, seen = running(), []

        def step(limit_ns):
            executed.append(limit_ns // 3 + 1)
            return executed[-1], TIMER

        cpu, _ = timed(ScriptedModel(step))
        task = asyncio.create_task(enter_again_and_again(cpu))
        loop.call_at_ns(1000, lambda: seen.append((loop.time_ns(), cpu.local_ns)))
        await asyncio.sleep(1e-6)
        task.cancel()
        return seen

    assert simulate(main()) == [(1000, 1000)]
    assert sum(executed) in (999, 1000) and len(executed) > 5


def test_less_than_a_model_can_run_is_run_all_the_same_and_debt():
    """Nothing passes as time that was not executed."""
    limits, executed = [], []

    async def main():
        def step(limit_ns):
            limits.append(limit_ns)
            executed.append(limit_ns - 10)  # a timer is not that exact
            return executed[-1], TIMER

        model = ScriptedModel(step)
        model.resolution_ns = 500
        cpu, stats = timed(model)
        task = asyncio.create_task(enter_again_and_again(cpu))
        for ns in (1000, 1200, 2000):
            running().call_at_ns(ns, lambda: None)
        await asyncio.sleep(2e-6)
        task.cancel()
        return cpu.local_ns, stats.ticksOvershot

    local_ns, overshot_ns = simulate(main())
    assert limits == [1000, 500, 520, 500]
    assert (local_ns, overshot_ns) == (sum(executed), 480 + 480)


@pytest.mark.parametrize(("waiting", "most_slices"), [(True, 1), (False, 60)])
def test_a_guest_that_executes_nothing_gets_to_the_event(waiting, most_slices):
    """At once if it is halted inside of the model; if the host does not run it, in the end."""

    async def main():
        model = ScriptedModel(lambda limit_ns: (0, TIMER))
        model.waiting = waiting
        task = asyncio.create_task(enter_again_and_again(timed(model)[0]))
        await asyncio.sleep(1e-6)
        task.cancel()
        return model.log.count("begin")

    assert 1 <= simulate(main()) <= most_slices


class Random:
    """A random program: timers that set timers, guests that exit and overshoot."""

    def __init__(self, seed, schedule):
        self.random = random.Random(seed)
        self.schedule = schedule
        self.trace: list[tuple[str, int]] = []
        self.times: list[int] = []
        self.left = 60

    def timer(self, deadline_ns):
        now_ns = running().time_ns()
        self.times.append(now_ns)
        self.trace.append(("timer", now_ns))
        assert now_ns == deadline_ns
        for _ in range(self.random.choice((0, 1, 1, 2))):
            if self.left:
                self.left -= 1
                next_ns = now_ns + self.random.choice((0, 1, 50, 1000, 30_000, 2_000_000))
                running().call_at_ns(next_ns, self.timer, next_ns)

    def step(self, limit_ns):
        kind = self.random.random()
        if kind < 0.3:
            return self.random.randrange(limit_ns + 1) or 1, EXIT
        if kind < 0.4:
            return limit_ns + self.random.randrange(500), EXIT
        return limit_ns + self.random.choice((0, 0, 20, 400)), TIMER

    def ended(self, index, local_ns):
        now_ns = running().time_ns()
        self.times.append(now_ns)
        self.trace.append((f"cpu{index}", now_ns))
        assert now_ns == local_ns

    async def guest(self, index):
        cpu, stats = timed(ScriptedModel(self.step))
        try:
            await enter_again_and_again(cpu, lambda local_ns, _: self.ended(index, local_ns))
        finally:
            assert stats.ticksLate == 0

    async def main(self):
        guests = [asyncio.create_task(self.guest(n)) for n in range(self.random.randrange(4))]
        for _ in range(5):
            deadline_ns = self.random.randrange(3_000_000)
            running().call_at_ns(deadline_ns, self.timer, deadline_ns)
        await asyncio.sleep(0.002)
        for guest in guests:
            guest.cancel()
        await asyncio.gather(*guests, return_exceptions=True)
        return self.times, self.trace


@settings(max_examples=50 // PATIENCE)
@given(st.integers(min_value=0), st.sampled_from(["parallel", "sequential"]))
def test_time_never_goes_backwards_and_everything_happens_at_its_time(seed, schedule):
    times, trace = simulate(Random(seed, schedule).main(), schedule=schedule)
    assert times == sorted(times)
    assert simulate(Random(seed, schedule).main(), schedule=schedule) == (times, trace)


def test_one_after_the_other_nobody_passes_the_exit_of_somebody_before():
    first = iter([(300, EXIT)])

    async def main():
        reached = []
        one, _ = timed(ScriptedModel(lambda limit_ns: next(first, (limit_ns, TIMER))))
        other, _ = timed(ScriptedModel(whole))
        tasks = [
            asyncio.create_task(
                enter_again_and_again(one, lambda local_ns, _: reached.append(other.local_ns))
            ),
            asyncio.create_task(enter_again_and_again(other)),
        ]
        await asyncio.sleep(1e-6)
        for task in tasks:
            task.cancel()
        return reached

    assert simulate(main(), schedule="sequential") == [300]


@pytest.mark.parametrize(("schedule", "order"), [("parallel", "bbff"), ("sequential", "bfbf")])
def test_in_parallel_all_are_under_way_before_the_first_is_waited_for(schedule, order):
    async def main():
        log: list[str] = []
        models = [ScriptedModel(whole) for _ in range(2)]
        tasks = []
        for model in models:
            model.log = log
            tasks.append(asyncio.create_task(enter_again_and_again(timed(model)[0])))
        await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        return "".join(entry[0] for entry in log)

    assert simulate(main(), schedule=schedule) == order


# ---- standing still ---------------------------------------------------------------------


def test_a_guest_that_leaves_without_executing_anything_is_named(monkeypatch):
    monkeypatch.setattr("kvmaio.timed_cpu.MOST_ENTRIES_WITHOUT_PROGRESS", 50)

    async def main():
        cpu, _ = timed(ScriptedModel(lambda limit_ns: (0, EXIT)), name="pump.cpu3")
        await enter_again_and_again(cpu)

    with pytest.raises(KvmaioError, match=r"pump\.cpu3 left its guest 50 times .* at 0 ns"):
        simulate(main())


def test_progress_now_and_then_is_progress(monkeypatch):
    monkeypatch.setattr("kvmaio.timed_cpu.MOST_ENTRIES_WITHOUT_PROGRESS", 50)
    executed = iter([*([0] * 40), 1] * 10)

    async def main():
        cpu, _ = timed(ScriptedModel(lambda limit_ns: (next(executed), EXIT)))
        with pytest.raises(StopIteration):
            await enter_again_and_again(cpu)

    # An iterator's end, raised by the model, arrives where the entry is awaited.
    with pytest.raises(RuntimeError, match="StopIteration"):
        simulate(main())


def test_a_loop_around_sleep_0_that_keeps_a_guest_waiting_is_an_error(monkeypatch):
    monkeypatch.setattr("kvmaio.simulation.STANDSTILL_TURNS", 100)
    monkeypatch.setattr("kvmaio.simulation.STANDSTILL_S", 0.0)

    async def main():
        cpu, _ = timed(ScriptedModel(whole), name="pump.cpu0")
        guest = asyncio.create_task(enter_again_and_again(cpu))
        while not guest.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
        await guest

    with pytest.raises(KvmaioError, match=r"pump\.cpu0 cannot run: .*sleep\(0\)"):
        simulate(main())


# ---- kicks --------------------------------------------------------------------------------


def test_a_kick_ends_one_entry_and_only_one():
    async def main():
        model, ended = ScriptedModel(whole), []
        cpu, _ = timed(model)
        task = asyncio.create_task(
            enter_again_and_again(
                cpu, lambda _, result: ended.append((result, running().time_ns()))
            )
        )
        for when in (0.001, 0.0025):
            running().call_at(when, cpu.kick)
        await asyncio.sleep(0.01)
        task.cancel()
        return ended, model.kicks

    interrupted = EntryResult.INTERRUPTED
    # From the loop's thread, which is not in the guest: nobody to send a signal to.
    assert simulate(main()) == ([(interrupted, MS), (interrupted, 2 * MS + MS // 2)], 0)


def test_a_stray_interruption_of_a_slice_does_not_end_the_entry():
    results = iter([(400, EntryResult.INTERRUPTED), (100, EXIT)])

    async def main():
        ended = []
        cpu, _ = timed(ScriptedModel(lambda limit_ns: next(results, (limit_ns, TIMER))))
        task = asyncio.create_task(enter_again_and_again(cpu, lambda *end: ended.append(end)))
        await asyncio.sleep(1e-3)
        task.cancel()
        return ended

    assert simulate(main()) == [(500, EXIT)]
