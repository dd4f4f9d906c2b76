"""No wake-up of the loop is lost while its thread is in a guest.

`KVMAIO_WAKEUPS` says how many; 1000000 take a quarter of an hour.
"""

import asyncio
import bisect
import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import attrs
import pytest

from kvmaio.kvm import resident
from tests.resident import guests
from tests.resident.guests import PATIENCE, machine_with, run_on
from tests.resident.guests import resident as living_here

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("eager")]

WAKEUPS = int(os.environ.get("KVMAIO_WAKEUPS", 2_000 if guests.SVMLAB else 100_000))
LOST_S = 2 * PATIENCE
LATE_S = 0.1 * PATIENCE
CONTROL_S = 0.002  # how long the control thread sleeps at a time
PHASE_S = 0.15
NEVER_NS = 1 << 62

GUESTS = {
    "storming": (guests.STORMING, None),
    "computing": (guests.COMPUTING, None),
    "alternating": (guests.ALTERNATING, None),
    "halted": (guests.HALTING, "kernel"),
}


@attrs.define
class Figures:
    """What came of the wake-ups, by kind."""

    counts: dict[str, int] = attrs.field(factory=dict)
    worst_s: dict[str, float] = attrs.field(factory=dict)
    late: list[tuple[str, float, float]] = attrs.field(factory=list)  # kind, from, to
    lost: list[str] = attrs.field(factory=list)
    starts: list[tuple[float, float]] = attrs.field(factory=list)  # of child processes: from, to
    enough: int = 0
    over: asyncio.Event = attrs.field(factory=asyncio.Event)

    def note(self, kind, due_s, seen_s):
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.worst_s[kind] = max(self.worst_s.get(kind, 0.0), seen_s - due_s)
        if seen_s - due_s > LATE_S:
            self.late.append((kind, due_s, seen_s))
        if self.total >= self.enough:
            self.over.set()

    @property
    def total(self):
        return sum(self.counts.values())


class Control(threading.Thread):
    """Sleeps and wakes on one processor, and keeps for how long it was held up itself."""

    def __init__(self, processor):
        super().__init__(daemon=True)
        self.processor = processor
        self.over = threading.Event()
        self.times_s, self.held_up_s = [], []  # the latter in total, until then

    def run(self):
        os.sched_setaffinity(0, {self.processor})  # this thread's
        held_up_s = 0.0
        while not self.over.is_set():
            due_s = time.monotonic() + CONTROL_S
            time.sleep(CONTROL_S)
            now_s = time.monotonic()
            held_up_s += now_s - due_s
            self.times_s.append(now_s)
            self.held_up_s.append(held_up_s)

    def held_up_between(self, start_s, end_s):
        last = len(self.times_s) - 1
        first = max(bisect.bisect(self.times_s, start_s) - 1, 0)
        after = min(bisect.bisect(self.times_s, end_s), last)
        return self.held_up_s[after] - self.held_up_s[first]

    @property
    def worst_s(self):
        return max(after - before for before, after in itertools.pairwise(self.times_s))


def is_excused(controls, starts, start_s, end_s):
    """Were the control threads held up for a quarter of this time, or was it a child's start?

    No more, since a sleeper gets a processor sooner than a loop's thread that runs a guest. Both
    loops wait in their own thread until a child process executes its program.
    """
    held_up_s = sum(control.held_up_between(start_s, end_s) for control in controls)
    starting_s = sum(max(0.0, min(end_s, to_s) - max(start_s, from_s)) for from_s, to_s in starts)
    return held_up_s > (end_s - start_s) / 4 or starting_s > (end_s - start_s) / 2


class Waker(threading.Thread):
    """Wakes the loop, waits for the answer, pauses at random, and again."""

    kind = "call_soon_threadsafe"

    def __init__(self, loop, figures, over, seed, turn):
        super().__init__(daemon=True)
        self.loop, self.figures, self.over = loop, figures, over
        self.random = random.Random(seed)
        self.turn = turn
        self.answer = threading.Semaphore(0)
        self.sent_s = 0.0
        self.prepare()

    def prepare(self):
        """On the loop's thread."""

    def wake(self):
        self.loop.call_soon_threadsafe(self.woken)

    def close(self):
        """On the loop's thread."""

    def woken(self):
        self.figures.note(self.kind, self.sent_s, time.monotonic())
        self.answer.release()

    def run(self):
        while not self.over.is_set():
            self.sent_s = time.monotonic()
            self.wake()
            if not self.answer.acquire(timeout=LOST_S):
                self.figures.lost.append(self.kind)
                self.loop.call_soon_threadsafe(self.figures.over.set)
                return
            self.pause()

    def pause(self):
        while alone() not in (None, self.turn) and not self.over.is_set():
            time.sleep(PHASE_S / 10)
        kind = self.random.random()
        if kind < 0.4:
            time.sleep(self.random.expovariate(1 / 200e-6))
        elif kind < 0.6:
            end_s = time.monotonic() + self.random.random() * 50e-6
            while time.monotonic() < end_s:
                pass


class SocketWaker(Waker):
    kind = "socket"

    def prepare(self):
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.loop.add_reader(self.ours, self.readable)

    def wake(self):
        self.theirs.send(b"x")

    def readable(self):
        self.ours.recv(16)
        self.woken()

    def close(self):
        self.loop.remove_reader(self.ours)
        self.ours.close()
        self.theirs.close()


class SignalWaker(Waker):
    """By the loop's own handler: through its wake-up descriptor."""

    kind = "signal"

    def prepare(self):
        self.loop.add_signal_handler(signal.SIGUSR1, self.woken)

    def wake(self):
        os.kill(os.getpid(), signal.SIGUSR1)

    def close(self):
        self.loop.remove_signal_handler(signal.SIGUSR1)


class PlainSignalWaker(Waker):
    """By a handler of Python's alone, which runs once the loop's thread is back in Python."""

    kind = "plain signal"

    def prepare(self):
        self.before = signal.signal(signal.SIGUSR2, lambda number, frame: self.woken())

    def wake(self):
        os.kill(os.getpid(), signal.SIGUSR2)

    def close(self):
        signal.signal(signal.SIGUSR2, self.before)


WAKERS = (Waker, SocketWaker, SignalWaker, *[Waker] * 3, *[SocketWaker] * 3)


def alone():
    """Which of the first three wakers has the loop for itself; None: all together.

    Alone, since any other would hide that one was lost, and since the watcher gets
    armed only when some time goes by without a wake-up.
    """
    phase = int(time.monotonic() / PHASE_S) % 6
    return None if phase % 2 else phase // 2


async def timers(figures, over, seed):
    """The loop's own timers."""
    loop, pauses = asyncio.get_running_loop(), random.Random(seed)
    while not over.is_set():
        due_s = loop.time() + pauses.expovariate(1 / 1e-3)
        if alone() is not None:
            due_s += PHASE_S
        await asyncio.sleep(due_s - loop.time())
        figures.note("timer", due_s, loop.time())


async def children(figures, over):
    """The end of a child process."""
    while not over.is_set():
        began_s = time.monotonic()
        child = await asyncio.create_subprocess_exec("/bin/true")
        figures.starts.append((began_s, time.monotonic()))
        async with asyncio.timeout(30 * PATIENCE):
            await child.wait()
        figures.note("subprocess", 0.0, 0.0)  # when it ended cannot be known
        await asyncio.sleep(0.5)


async def wake_often(code, irqchip, kinds, count, seed):
    """Wake the loop `count` times while its thread runs `code`."""
    loop, over, figures = asyncio.get_running_loop(), threading.Event(), Figures(enough=count)
    async with machine_with(code, irqchip=irqchip) as machine, asyncio.TaskGroup() as group:
        run = group.create_task(machine.run())
        cpu = await living_here(machine)
        controls = [Control(processor) for processor in os.sched_getaffinity(0)]
        wakers = [kind(loop, figures, over, seed + n, n) for n, kind in enumerate(kinds)]
        began_s = time.monotonic()
        activities = []
        if len(wakers) > 1:
            activities = [group.create_task(timers(figures, over, seed - n)) for n in range(3)]
            activities.append(group.create_task(children(figures, over)))
        for thread in (*controls, *wakers):
            thread.start()
        await figures.over.wait()
        over.set()
        took_s = time.monotonic() - began_s
        for thread in wakers:
            while thread.is_alive():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            thread.close()
        for control in controls:
            control.over.set()
            control.join()
        await asyncio.gather(*activities)
        assert cpu.is_resident and cpu.moves == 1, "it was to stay on the loop's thread"
        runner = cpu._hub.residents.handle
        took = (
            f"{took_s:.1f} s and {runner.waits} waits, watcher {runner.armed} times armed, "
            f"{runner.fired} fired, {runner.kicks} kicked"
        )
        machine.stop()
        await run
    return figures, controls, took


def check(capsys, loop_kind, guest, kinds, count):
    seed = random.SystemRandom().getrandbits(32)
    result = run_on(loop_kind, wake_often(*GUESTS[guest], kinds, count, seed))
    judge(capsys, loop_kind, guest, seed, count, *result)


def judge(capsys, loop_kind, guest, seed, count, figures, controls, took):
    late = [entry for entry in figures.late if not is_excused(controls, figures.starts, *entry[1:])]
    with capsys.disabled():
        worst = ", ".join(
            f"{kind} {figures.counts[kind]} ({worst_s * 1e3:.1f} ms)"
            for kind, worst_s in figures.worst_s.items()
        )
        print(
            f"\n{loop_kind}, {guest}: {figures.total} wake-ups in {took}; {worst}; "
            f"late and excused {len(figures.late) - len(late)}, "
            f"control threads {max(c.worst_s for c in controls) * 1e3:.1f} ms"
        )
    assert (figures.lost, late) == ([], []), f"seed {seed}"
    assert figures.total >= count


@pytest.mark.timeout(120 * PATIENCE + WAKEUPS / 100)
@pytest.mark.parametrize("guest", GUESTS)
def test_no_wakeup_is_lost_or_late(loop_kind, guest, capsys, monkeypatch):
    # Else it would hide that one was lost.
    monkeypatch.setattr(resident, "LONGEST_WAIT_NS", NEVER_NS)
    check(capsys, loop_kind, guest, WAKERS, WAKEUPS // (2 * len(GUESTS)))


@pytest.mark.timeout(120 * PATIENCE + WAKEUPS / 100)
@pytest.mark.parametrize("guest", GUESTS)
def test_no_signal_without_a_descriptor_is_lost_or_late(loop_kind, guest, capsys):
    """Python's own handlers run on the loop's thread, which nothing but the signal wakes."""
    check(capsys, loop_kind, guest, [PlainSignalWaker], WAKEUPS // (20 * len(GUESTS)))


class InterruptWaker(Waker):
    """By KeyboardInterrupt, which leaves the loop: it goes on behind that."""

    kind = "KeyboardInterrupt"

    def prepare(self):
        self.before = signal.signal(signal.SIGINT, self.interrupt)
        self.is_running = self.came_outside = False

    def wake(self):
        os.kill(os.getpid(), signal.SIGINT)

    def interrupt(self, number, frame):
        self.figures.note(self.kind, self.sent_s, time.monotonic())
        if self.is_running:
            raise KeyboardInterrupt
        self.came_outside = True

    def run_loop(self, waiting):
        """Until it is left by an interrupt, which is answered; else `waiting` is done."""
        try:
            self.is_running = True
            if self.came_outside:
                raise KeyboardInterrupt  # between two runs
            self.loop.run_until_complete(waiting)
        except KeyboardInterrupt:
            self.is_running = self.came_outside = False
            self.answer.release()

    def close(self):
        signal.signal(signal.SIGINT, self.before)


def interrupt_often(loop, guest, count, seed):
    code, irqchip = GUESTS[guest]
    figures, over = Figures(enough=count), threading.Event()
    controls = [Control(processor) for processor in os.sched_getaffinity(0)]
    waker = InterruptWaker(loop, figures, over, seed, None)

    async def begin():
        machine = await stack.enter_async_context(machine_with(code, irqchip=irqchip))
        run = asyncio.ensure_future(machine.run())
        cpu = await living_here(machine)
        async with asyncio.timeout(20 * PATIENCE):
            while machine.vcpus[0].stats.numIO < guests.FIRST_EXITS:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        return machine, run, cpu

    async def end():
        machine.stop()
        async with asyncio.timeout(20 * PATIENCE):
            await run
        await stack.aclose()

    async def until_enough():
        await figures.over.wait()

    stack = contextlib.AsyncExitStack()
    waiting = loop.create_task(until_enough())
    machine, run, cpu = loop.run_until_complete(begin())
    for thread in (*controls, waker):
        thread.start()
    try:
        while not figures.over.is_set():
            waker.run_loop(waiting)
    finally:
        over.set()
        waker.answer.release()
        waker.join()
        waker.close()
        for control in controls:
            control.over.set()
            control.join()
    assert cpu.is_resident and cpu.moves == 1, "it was to stay on the loop's thread"
    loop.run_until_complete(end())
    return figures, controls, "all"


@pytest.mark.timeout(120 * PATIENCE + WAKEUPS / 100)
@pytest.mark.parametrize("guest", ["computing", "halted"])
def test_no_keyboard_interrupt_is_lost_or_late(guest, capsys):
    """Of asyncio's loop: uvloop does not go on behind one that came at the wrong moment.

    And of guests without exits: in a device's handler it is the handler's failure.
    """
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    seed = random.SystemRandom().getrandbits(32)
    count = WAKEUPS // (20 * len(GUESTS))
    try:
        judge(capsys, "asyncio", guest, seed, count, *interrupt_often(loop, guest, count, seed))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


SPINNING = """
import asyncio, sys
from kvmaio.kvm import promotion
from tests.resident.guests import COMPUTING, machine_with, resident, run_on

promotion.OFTEN_WITHIN_NS = 1 << 62 if sys.argv[2] == "resident" else -1
promotion.QUIET_NS = 1 << 62

async def main():
    async with machine_with(COMPUTING) as machine:
        run = asyncio.ensure_future(machine.run())
        if sys.argv[2] == "resident":
            await resident(machine)
        print("spinning", flush=True)
        await run

try:
    run_on(sys.argv[1], main())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""

INTERRUPTS = 3 if guests.SVMLAB else int(os.environ.get("KVMAIO_INTERRUPTS", 10))


@pytest.mark.timeout(60 * PATIENCE + 5 * INTERRUPTS)
@pytest.mark.parametrize("where", ["resident", "native"])
def test_sigint_into_a_spinning_guest_is_a_clean_keyboard_interrupt(loop_kind, where):
    pauses = random.Random(1)
    for _ in range(INTERRUPTS):
        command = [sys.executable, "-c", SPINNING, loop_kind, where]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "spinning\n"
            time.sleep(pauses.random() * 0.05)
            child.send_signal(signal.SIGINT)
            try:
                output, errors = child.communicate(timeout=20 * PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
        assert (output, errors, child.returncode) == ("interrupted\n", "", 0)
