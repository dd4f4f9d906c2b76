"""vCPUs that live on the loop's thread: turns, moves, kicks, limits, and the end of it all."""

import asyncio
import itertools
import os
import random
import select
import selectors
import signal
import socket
import threading
import time
import traceback
import warnings
from contextlib import AsyncExitStack
from typing import Any

import pytest

from kvmaio.boot import Flat
from kvmaio.device import Device
from kvmaio.exits import InterruptedExit, Stopped
from kvmaio.kvm import promotion, resident
from kvmaio.kvm._native import lib
from kvmaio.kvm.resident import SelectorTurns, SliceTurns
from kvmaio.machine import Machine
from tests.leftovers import Held, nothing_left, threads
from tests.resident.guests import (
    ALTERNATING,
    COMPUTING,
    HALTING,
    LOOPS,
    PATIENCE,
    SPINNING,
    STORMING,
    SVMLAB,
    Port,
    cpu_of,
    machine_with,
    posix_timers,
    run_on,
)
from tests.resident.guests import resident as living_here

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(60 * PATIENCE)]

CLOSES = int(os.environ.get("KVMAIO_CLOSES", 20 if SVMLAB else 250))
"""How often a machine is closed at a random moment, by loop and guest."""

LOST_S = 2 * PATIENCE


async def until_more(port, by=50):
    """Wait until the guest has made `by` more accesses."""
    before = port.count
    async with asyncio.timeout(LOST_S * 5):
        while port.count < before + by:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


# ---- turns, alone ------------------------------------------------------------------------


class FakeResidents:
    """One guest, whose turns are scripted."""

    slice_ns = 1_000_000

    def __init__(self, *outcomes):
        self.waiting = ["guest"]
        self.outcomes = list(outcomes)
        self.turns = []
        self.delivered = []
        self.owed = False

    def is_owed_a_turn(self, now_ns):
        return self.owed

    def turn(self, now_ns, deadline_ns):
        self.turns.append(deadline_ns - now_ns)
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def deliver(self, cpu):
        self.delivered.append(cpu)
        self.waiting.remove(cpu)


@pytest.fixture
def selected():
    """A selector with one pair of sockets, and a list of what its own select() was asked."""
    selector = selectors.EpollSelector()
    ours, theirs = socket.socketpair()
    selector.register(ours, selectors.EVENT_READ)
    asked = []
    original = selector.select

    def select(timeout=None):
        asked.append(timeout)
        return original(0)

    vars(selector)["select"] = select
    yield selector, asked, theirs
    selector.close()
    ours.close()
    theirs.close()


class FakeLoop:
    """What the turns need of a loop."""

    def __init__(self):
        self.calls = []
        self.readers = {}

    def call_soon(self, callback, *arguments):
        self.calls.append((callback, arguments))

    def add_reader(self, fd, callback):
        self.readers[fd] = callback

    def remove_reader(self, fd):
        del self.readers[fd]

    def is_closed(self):
        return False

    def run_once(self):
        """Returns whether there was something to do."""
        ready = select.select(list(self.readers), [], [], 0)[0]
        calls = [(self.readers[fd], ()) for fd in ready] + self.calls
        self.calls = []
        for callback, arguments in calls:
            callback(*arguments)
        return bool(calls)


def turns_of(kind: Any, *arguments: Any) -> Any:
    """Made with fakes, which a type checker would refuse."""
    return kind(*arguments)


def test_selector_without_a_guest_just_waits(selected):
    selector, asked, _ = selected
    residents = FakeResidents()
    residents.waiting.clear()
    turns_of(SelectorTurns, residents, FakeLoop(), selector)
    assert selector.select(3.5) == [] and selector.select() == []
    assert (asked, residents.turns) == ([3.5, None], [])


def test_the_wait_of_the_selector_is_the_turn_of_the_guest(selected):
    selector, asked, _ = selected
    residents, loop = FakeResidents(None, "guest"), FakeLoop()
    turns_of(SelectorTurns, residents, loop, selector)
    assert selector.select(0.005) == []  # nothing came of it: polled before and after
    assert asked == [0, 0]
    assert selector.select(None) == []  # the guest's run has ended: the loop goes on with that
    assert asked == [0, 0, 0]
    assert residents.turns == [5_000_000, resident.LONGEST_WAIT_NS]
    assert residents.delivered == [] and len(loop.calls) == 1
    loop.run_once()
    assert residents.delivered == ["guest"]


def test_what_is_ready_goes_first(selected):
    selector, _, theirs = selected
    residents = FakeResidents()
    turns_of(SelectorTurns, residents, FakeLoop(), selector)
    theirs.send(b"x")
    assert len(selector.select(1)) == 1 and selector.select(0) != [] and residents.turns == []


@pytest.mark.parametrize("timeout", [0, -1, 1e-6])
def test_a_loop_that_is_always_busy_owes_the_guest_a_slice(selected, timeout):
    selector, _, _ = selected
    residents = FakeResidents()
    residents.owed = True
    turns_of(SelectorTurns, residents, FakeLoop(), selector)
    selector.select(timeout)
    assert residents.turns == [residents.slice_ns]


def test_the_selector_is_left_as_it_was():
    loop: Any = asyncio.new_event_loop()
    selector = loop._selector
    turns = turns_of(SelectorTurns, FakeResidents(), loop, selector)
    assert "select" in vars(selector)
    turns.close()
    assert "select" not in vars(selector)
    loop.close()


def test_a_wrapper_around_ours_stays():
    loop: Any = asyncio.new_event_loop()
    selector = loop._selector
    residents = FakeResidents()
    turns = turns_of(SelectorTurns, residents, loop, selector)
    ours = selector.select
    selector.select = wrapper = lambda timeout=None: ours(timeout)
    residents.waiting.clear()
    turns.close()
    assert vars(selector)["select"] is wrapper and selector.select(0) == []
    del selector.select
    loop.close()


def test_slices_follow_each_other_while_a_guest_waits():
    residents, loop = FakeResidents(None, None, "guest"), FakeLoop()
    turns = turns_of(SliceTurns, residents, loop)
    assert not loop.run_once()
    turns.parked()
    turns.parked()
    assert [loop.run_once() for _ in range(4)] == [True, True, True, False]
    assert residents.turns == [residents.slice_ns] * 3
    assert residents.delivered == ["guest"]
    turns.close()
    assert loop.readers == {}


def test_a_keyboard_interrupt_does_not_end_the_slices():
    residents, loop = FakeResidents(KeyboardInterrupt(), "guest"), FakeLoop()
    turns = turns_of(SliceTurns, residents, loop)
    turns.parked()
    with pytest.raises(KeyboardInterrupt):
        loop.run_once()
    assert (loop.run_once(), residents.delivered, loop.run_once()) == (True, ["guest"], False)
    turns.close()


@pytest.mark.parametrize("code", [STORMING, ALTERNATING], ids=["storming", "alternating"])
def test_a_task_may_close_the_machine_as_soon_as_its_run_has_ended(loop_kind, eager, code):
    """Its run ends within the runner's callback, and takes the runner away."""

    async def main():
        for runs in range(1, 30, 9 if SVMLAB else 1):
            async with machine_with(code) as machine:
                for number in range(runs):
                    await machine.vcpus[0].run()
                    if number == 0:
                        move_in(cpu_of(machine))

    run_on(loop_kind, main())


# ---- who gets how much ---------------------------------------------------------------------


def test_two_residents_share_fairly(loop_kind, eager):
    async def main():
        ports = [Port(), Port()]
        async with AsyncExitStack() as stack:
            machines = [
                await stack.enter_async_context(machine_with(STORMING, port)) for port in ports
            ]
            runs = [asyncio.ensure_future(machine.run()) for machine in machines]
            for machine in machines:
                await living_here(machine)
            before = [port.count for port in ports]
            await asyncio.sleep(0.5 * PATIENCE)
            shares = [port.count - count for port, count in zip(ports, before, strict=True)]
            for machine in machines:
                machine.stop()
            await asyncio.gather(*runs)
        return shares

    shares = run_on(loop_kind, main())
    assert min(shares) > 50 and max(shares) < 3 * min(shares), shares


async def yielding():
    while True:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def timing():
    while True:  # noqa: ASYNC110
        await asyncio.sleep(10e-6)


async def reading():
    """A descriptor that is always ready."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    theirs.send(b"x")
    loop.add_reader(ours, lambda: None)
    try:
        await asyncio.Event().wait()
    finally:
        loop.remove_reader(ours)
        ours.close()
        theirs.close()


@pytest.mark.parametrize("busy", [yielding, timing, reading])
@pytest.mark.parametrize("code", [STORMING, ALTERNATING], ids=["storming", "alternating"])
def test_a_busy_loop_still_gives_the_guest_its_turns(loop_kind, eager, busy, code):
    async def main():
        port = Port()
        async with machine_with(code, port) as machine:
            run = asyncio.ensure_future(machine.run())
            await living_here(machine)
            task = asyncio.ensure_future(busy())
            await until_more(port, by=1000)
            task.cancel()
            machine.stop()
            assert await run == Stopped("stopped")
            await asyncio.wait([task])

    run_on(loop_kind, main())


def test_a_storm_gives_the_loop_its_turns(loop_kind, eager):
    async def main():
        async with machine_with(STORMING) as machine:
            run = asyncio.ensure_future(machine.run())
            await living_here(machine)
            for _ in range(200):
                await asyncio.sleep(0)
            machine.stop()
            await run

    run_on(loop_kind, main())


def test_one_wakeup_serves_a_batch(loop_kind, monkeypatch):
    monkeypatch.setattr(promotion, "OFTEN_EXITS", 1 << 62)  # all on their own threads
    count, batch = (10, 2) if SVMLAB else (50, 5)

    async def main():
        ports = [Port() for _ in range(count)]
        async with AsyncExitStack() as stack:
            machines = [
                await stack.enter_async_context(machine_with(STORMING, port)) for port in ports
            ]
            runs = [asyncio.ensure_future(machine.run()) for machine in machines]
            for port in ports:
                await until_more(port)
            hub = cpu_of(machines[0])._hub
            before = sum(port.count for port in ports), hub.wakeups
            await asyncio.sleep(0.5 * PATIENCE)
            after = sum(port.count for port in ports), hub.wakeups
            for machine in machines:
                machine.stop()
            await asyncio.gather(*runs)
        return after[0] - before[0], after[1] - before[1]

    arrivals, wakeups = run_on(loop_kind, main())
    assert arrivals > batch * wakeups, (arrivals, wakeups)


# ---- moving out ------------------------------------------------------------------------------


def test_a_guest_that_stops_exiting_moves_out_and_goes_on(loop_kind):
    async def main():
        async with machine_with(COMPUTING) as machine:
            vcpu, cpu = machine.vcpus[0], cpu_of(machine)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(promotion, "OFTEN_WITHIN_NS", 1 << 62)
                run = asyncio.ensure_future(machine.run())
                await living_here(machine)
            run_id = None
            async with asyncio.timeout(LOST_S * 5):
                while cpu.is_resident:
                    run_id = cpu.handle.run_id
                    await asyncio.sleep(0.002)
            assert cpu.moves == 2 and cpu._inside
            # The same run: whoever had kicked it before the move would not have been lost.
            assert lib.kvmaio_vcpu_current_run(cpu.handle) == cpu.handle.run_id >= run_id
            vcpu.kick()
            await asyncio.sleep(0.01)
            assert not run.done() and vcpu.inside, "a kick alone ends no run of the machine"
            machine.stop()
            async with asyncio.timeout(LOST_S):
                assert await run == Stopped("stopped")

    run_on(loop_kind, main())


def was_kicked(ended):
    return isinstance(ended, InterruptedExit) and not ended.timer_expired


def move_in(cpu):
    """Have it live on the loop's thread, whatever the policy says."""
    residents = cpu._hub.residents
    residents.move_in(cpu)
    cpu._residents = residents
    cpu._promotion.moves = 1


@pytest.mark.parametrize("after_us", [0, 500, 1500, 3000])
def test_a_kick_during_the_move_ends_the_run_that_moves_and_no_other(
    loop_kind, monkeypatch, after_us
):
    """The guest is quiet for 1 ms and moves out; the kick comes from a thread, about then."""
    monkeypatch.setattr(promotion, "QUIET_NS", 1_000_000)
    pauses = random.Random(after_us)

    async def main():
        loop = asyncio.get_running_loop()
        async with machine_with(SPINNING) as machine:
            vcpu, cpu = machine.vcpus[0], cpu_of(machine)

            def kick():
                time.sleep(after_us * 1e-6 * pauses.uniform(0.7, 1.3))
                vcpu.kick()

            for _ in range(5 if SVMLAB else 100):
                if not cpu.is_resident:
                    move_in(cpu)
                async with asyncio.timeout(LOST_S):
                    kicking = loop.run_in_executor(None, kick)
                    assert was_kicked(await vcpu.run())
                    await kicking
                # The next one is left alone: a late signal makes it look around, no more.
                ended = await vcpu.run(ticks=300_000)
                assert isinstance(ended, InterruptedExit) and ended.timer_expired

    run_on(loop_kind, main())


def test_a_kick_between_runs_ends_the_next_one_wherever_it_is(loop_kind, eager):
    async def main():
        async with machine_with(SPINNING) as machine:
            vcpu, cpu = machine.vcpus[0], cpu_of(machine)
            await vcpu.run(ticks=0)
            for inside in (False, True):
                if inside:
                    move_in(cpu)
                for ticks in (None, 50_000_000, 0):
                    vcpu.kick()
                    vcpu.kick()
                    assert was_kicked(await vcpu.run(ticks))
                    ended = await vcpu.run(ticks=1_000_000)
                    assert isinstance(ended, InterruptedExit) and ended.timer_expired
            vcpu.kick()  # and across a move
            cpu._move_out()
            assert was_kicked(await vcpu.run())

    run_on(loop_kind, main())


# ---- runs by hand ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_limit_is_kept_and_never_early(loop_kind, eager, is_busy):
    async def main():
        async with machine_with(SPINNING) as machine:
            vcpu, cpu = machine.vcpus[0], cpu_of(machine)
            await vcpu.run(ticks=0)
            move_in(cpu)
            other = asyncio.ensure_future(yielding() if is_busy else asyncio.sleep(0))
            for ticks in (1, 50_000, 300_000, 2_000_000, 30_000_000, 70_000_000):
                began_ns = time.monotonic_ns()
                async with asyncio.timeout(LOST_S):
                    ended = await vcpu.run(ticks)
                took_ns = time.monotonic_ns() - began_ns
                assert isinstance(ended, InterruptedExit) and ended.timer_expired
                assert took_ns >= max(ticks, cpu.resolution_ns)
            assert cpu.is_resident
            other.cancel()
            await asyncio.wait([other])

    run_on(loop_kind, main())


def test_a_limit_holds_within_the_budget_too(loop_kind, eager):
    """Exits grant a budget, in which the guest is entered without looking at the loop."""

    async def main():
        async with machine_with(ALTERNATING) as machine:
            vcpu, cpu = machine.vcpus[0], cpu_of(machine)
            await vcpu.run()
            move_in(cpu)
            expired = 0
            for _ in range(2_000):
                before = time.monotonic_ns()
                ended = await vcpu.run(ticks=60_000)
                if isinstance(ended, InterruptedExit):
                    assert ended.timer_expired and time.monotonic_ns() - before >= 60_000
                    expired += 1
            return expired

    assert run_on(loop_kind, main()) > 0


def test_a_limited_run_keeps_its_limit_when_it_moves_out(loop_kind, monkeypatch):
    monkeypatch.setattr(promotion, "QUIET_NS", 1_000_000)

    async def main():
        async with machine_with(SPINNING) as machine:
            vcpu, cpu = machine.vcpus[0], cpu_of(machine)
            await vcpu.run(ticks=0)
            move_in(cpu)
            began_ns = time.monotonic_ns()
            async with asyncio.timeout(LOST_S):
                ended = await vcpu.run(ticks=80_000_000)
            assert isinstance(ended, InterruptedExit) and ended.timer_expired
            assert time.monotonic_ns() - began_ns >= 80_000_000
            assert not cpu.is_resident
            assert ended.ticks > 0

    run_on(loop_kind, main())


# mov dx, 0x3f8; again: in al, dx; mov [0x500], al; jmp again
READING = bytes.fromhex("baf803 ec a20005 ebfa")


def test_half_entries_complete_an_access_and_execute_nothing(loop_kind, eager):
    async def main():
        async with machine_with(READING) as machine:
            vcpu, cpu = machine.vcpus[0], cpu_of(machine)
            await vcpu.run()
            move_in(cpu)
            for value in range(1, 100):
                cpu.io_words[1][cpu.page.io.data_offset] = value
                half = await vcpu.run(ticks=0)
                assert half == InterruptedExit(ticks=1)
                assert vcpu.context.rax & 0xFF == value
                assert machine.memory.read(0x500, 1)[0] == value - 1
                await vcpu.run()  # stores, and reads again
                assert machine.memory.read(0x500, 1)[0] == value
                assert cpu.is_resident

    run_on(loop_kind, main())


def test_state_may_be_edited_while_resident(loop_kind, eager):
    async def main():
        async with machine_with(READING) as machine:
            vcpu, cpu = machine.vcpus[0], cpu_of(machine)
            await vcpu.run()
            move_in(cpu)
            for value in range(1, 100):
                vcpu.context.rip = 0x1004  # mov [0x500], al
                vcpu.context.rax = value
                await vcpu.run()
                assert machine.memory.read(0x500, 1)[0] == value
            assert cpu.is_resident and "rip" in vcpu.dump().lower()

    run_on(loop_kind, main())


class Slow(Device):
    """Its handler suspends."""

    size = 1

    def __init__(self):
        self.count = 0

    async def write(self, offset, size, value):
        await asyncio.sleep(0.001)
        self.count += 1


def test_a_handler_that_suspends_leaves_the_loop_free(loop_kind, eager):
    async def main():
        port = Slow()
        async with machine_with(STORMING, port) as machine:
            run = asyncio.ensure_future(machine.run())
            async with asyncio.timeout(LOST_S * 10):
                await living_here(machine)
                await until_more(port, by=20)
            machine.stop()
            assert await run == Stopped("stopped")

    run_on(loop_kind, main())


@pytest.mark.parametrize("code", [SPINNING, STORMING, HALTING], ids=["spin", "storm", "halt"])
def test_a_run_may_be_cancelled_and_begun_again(loop_kind, eager, code):
    async def main():
        async with machine_with(code, irqchip="kernel") as machine:
            for ms in range(5 if SVMLAB else 20):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(ms / 1000):
                        await machine.run()
            vcpu = machine.vcpus[0]
            assert not vcpu.inside
            if code is SPINNING:
                cpu = cpu_of(machine)
                move_in(cpu)
                for ms in range(5 if SVMLAB else 20):
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(ms / 1000):
                            await vcpu.run()
                assert cpu.is_resident

    run_on(loop_kind, main())


# ---- the end, at any moment -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(60 * PATIENCE + CLOSES)
@pytest.mark.parametrize("code", [STORMING, ALTERNATING], ids=["storming", "alternating"])
def test_a_machine_may_be_closed_at_any_moment(loop_kind, eager, code):
    before, timers = Held.now(), posix_timers()
    pauses = random.Random(CLOSES)
    lived_here = 0

    async def main():
        nonlocal lived_here
        own = Held.now()
        for _ in range(CLOSES):
            async with machine_with(code) as machine:
                run = asyncio.ensure_future(machine.run())
                if pauses.random() < 0.5:
                    await living_here(machine)
                await asyncio.sleep(pauses.random() * 0.005 * PATIENCE)
                cpu = cpu_of(machine)
                lived_here += cpu.is_resident
                if pauses.random() < 0.3:
                    run.cancel()
            assert cpu.handle is None
            nothing_left(own)
            await asyncio.wait([run])

    run_on(loop_kind, main())
    assert lived_here > CLOSES / 4
    nothing_left(before)
    assert posix_timers() == timers


def test_the_watcher_ends_with_the_last_machine(eager):
    async def main():
        before, timers = Held.now(), posix_timers()
        async with machine_with(STORMING) as machine:
            run = asyncio.ensure_future(machine.run())
            await living_here(machine)
            assert len(threads() - before.threads) == 2  # the vCPU's own, and the watcher
            machine.stop()
            await run
        nothing_left(before)
        assert posix_timers() == timers

    run_on("asyncio", main())


# ---- loops -------------------------------------------------------------------------------------


async def storm_for_a_while():
    port = Port()
    async with machine_with(STORMING, port) as machine:
        run = asyncio.ensure_future(machine.run())
        await living_here(machine)
        await until_more(port)
        machine.stop()
        await run


def test_loops_one_after_the_other(eager):
    for kind in itertools.islice(itertools.cycle(LOOPS), 6):
        run_on(kind, storm_for_a_while())


def test_loops_in_two_threads_at_once(eager):
    failures = []

    def run(kind):
        try:
            for _ in range(3):
                run_on(kind, storm_for_a_while())
        except BaseException:
            failures.append(traceback.format_exc())

    both = [threading.Thread(target=run, args=(kind,)) for kind in LOOPS]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("elsewhere", [False, True], ids=["the same thread", "other threads"])
@pytest.mark.parametrize("code", [STORMING, ALTERNATING], ids=["storming", "alternating"])
def test_a_loop_may_be_stopped_and_go_on(loop_kind, eager, code, elsewhere):
    """Also in another thread, whose kicks and timers are then others."""
    loop = LOOPS[loop_kind]()
    port = Port()
    failures = []

    def go_on(main):
        def run():
            try:
                loop.run_until_complete(main)
            except BaseException:
                failures.append(traceback.format_exc())

        if elsewhere:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        else:
            run()

    async def begin():
        machine = await Machine(memory="512K", cpu="kvm").__aenter__()
        machine.attach(port, pio=0x3F8)
        machine.load(Flat(code, address=0x1000))
        run = asyncio.ensure_future(machine.run())
        await living_here(machine)
        return machine, run

    machine, run = loop.run_until_complete(begin())
    for _ in range(5):
        go_on(until_more(port, by=500))
    go_on(machine.close())
    loop.run_until_complete(asyncio.wait([run]))
    loop.close()
    assert failures == []


# ---- signals ------------------------------------------------------------------------------------


def signal_state():
    wakeup_fd = signal.set_wakeup_fd(-1)
    if wakeup_fd != -1:
        signal.set_wakeup_fd(wakeup_fd)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return wakeup_fd, handlers, signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_handlers_mask_and_wakeup_descriptor_are_left_alone(loop_kind, eager):
    async def main():
        before = signal_state()
        async with machine_with(STORMING) as machine:
            run = asyncio.ensure_future(machine.run())
            await living_here(machine)
            assert signal_state() == before
            machine.stop()
            await run
        assert signal_state() == before

    run_on(loop_kind, main())


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_thread_that_blocks_all_signals_can_be_a_loops(loop_kind, eager, when):
    """Nothing but a signal ends KVM_RUN."""
    failures = []

    def block():
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())

    async def main():
        async with machine_with(COMPUTING) as machine:
            run = asyncio.ensure_future(machine.run())
            await living_here(machine)
            block()
            for _ in range(20):
                await asyncio.sleep(0.001)
            machine.stop()
            await run

    def run():
        if when == "before":
            block()
        try:
            run_on(loop_kind, main())
        except BaseException:
            failures.append(traceback.format_exc())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(LOST_S * 5)
    assert (thread.is_alive(), failures) == (False, [])


@pytest.mark.parametrize("code", [STORMING, ALTERNATING], ids=["storming", "alternating"])
def test_no_exit_is_lost_to_an_exception_in_the_runner(loop_kind, eager, code):
    """A handler of Python's raises whenever the interpreter is between KVM_RUN and the task."""
    raised = 0

    def interrupt(number, frame):
        nonlocal raised
        names = []
        while frame is not None:
            names.append(os.path.basename(frame.f_code.co_filename))
            frame = frame.f_back
        if "resident.py" in names and "vcpu.py" not in names and names[0] != "deque":
            raised += 1
            raise KeyboardInterrupt

    class Checking(Device):
        """Each write is one more than the last: an exit lost or served twice shows."""

        size = 2

        def __init__(self):
            self.count = 0
            self.wrong = []

        def write(self, offset, size, value):
            self.count += 1
            if value != self.count & 0xFFFF:
                self.wrong.append((self.count, value))
                self.count = value

    # mov dx, 0x3f8; again: inc ax; out dx, ax; jmp again
    counting = bytes.fromhex("baf803 40 ef ebfc")
    # the same with a pause: mov cx, 300; wait: loop wait, before the jump
    pausing = bytes.fromhex("baf803 40 ef b92c01 e2fe ebf7")
    loop = LOOPS[loop_kind]()
    device = Checking()
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:

        async def begin():
            machine = await Machine(memory="512K", cpu="kvm").__aenter__()
            machine.attach(device, pio=0x3F8)
            machine.load(Flat(counting if code is STORMING else pausing, address=0x1000))
            run = asyncio.ensure_future(machine.run())
            await living_here(machine)
            return machine, run

        async def bother():
            await asyncio.sleep(3600)

        machine, run = loop.run_until_complete(begin())
        over = threading.Event()
        loop_thread = threading.get_ident()

        def send():
            pauses = random.Random(5)
            while not over.is_set():
                time.sleep(pauses.random() * 0.002)
                signal.pthread_kill(loop_thread, signal.SIGUSR1)

        sender = threading.Thread(target=send)
        bothered = loop.create_task(bother())
        sender.start()
        end_s = time.monotonic() + 1.5 * PATIENCE
        while time.monotonic() < end_s:
            try:
                loop.run_until_complete(asyncio.wait([bothered], timeout=0.2))
            except KeyboardInterrupt:
                continue
        over.set()
        sender.join()
        loop.run_until_complete(until_more(device, by=500))
        bothered.cancel()
        loop.run_until_complete(machine.close())
        loop.run_until_complete(asyncio.wait([run, bothered]))
    finally:
        signal.signal(signal.SIGUSR1, before)
        loop.close()
    assert (raised > 3, device.wrong) == (True, []), raised


# ---- fork ---------------------------------------------------------------------------------------


def test_a_child_by_fork_has_machines_of_its_own(loop_kind, eager):
    def in_the_child():
        status = 1
        try:
            signal.alarm(20 * PATIENCE)
            run_on(loop_kind, storm_for_a_while())
            status = 0
        finally:
            os._exit(status)

    async def main():
        port = Port()
        async with machine_with(STORMING, port) as machine:
            run = asyncio.ensure_future(machine.run())
            await living_here(machine)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: threads, and fork
                child = os.fork()
            if child == 0:
                in_the_child()
            await until_more(port)
            _, status = await asyncio.get_running_loop().run_in_executor(None, os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            await until_more(port)
            machine.stop()
            await run

    run_on(loop_kind, main())
