"""`SimulationLoop`: the event loop as the simulator's event queue.

``loop.time()`` is guest time. Callbacks take no time. When none is ready, the
loop's wait *is* the guests' run: they execute until the next timer is due, time
has advanced by what they executed, and the timer fires, exactly at its
deadline. Without a guest that can run, time jumps there.

::

        now                    target: the next timer
    ─────●──────────────────────────●────────────► simulated time
         ├── cpu0 runs ─────────────┤
         ├── cpu1 runs ──┤ exit: served here, as an event of its own
                         ├─ cpu1 ───┼──┤ overshoot: carried as debt, the timer does not move
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, Protocol

from .arguments import speed, whole
from .errors import ConfigurationError, KvmaioError
from .exact_timers import ExactTimers
from .pace import Pace

__all__ = ["SimulatedGuest", "SimulationLoop", "real_time"]

QUANTUM_NS = 1_000_000
"""How far guests run ahead of an event that does not exist yet."""

FLOOD_POLLS = 1000
"""A real world that has had something new for so many looks in a row may not stop time."""

STANDSTILL_TURNS = 100_000
STANDSTILL_S = 5.0
"""Callbacks that follow one another for so long, both, keep a guest waiting for ever."""

Schedule = Literal["parallel", "sequential"]
Events = list[tuple[Any, int]]


class SimulatedGuest(Protocol):
    """A vCPU that waits for the loop to run it (`timed_cpu.TimedCpu`)."""

    name: str
    local_ns: int
    """Its own time; ahead of the loop's by its debt."""

    @property
    def wants_out(self) -> bool:
        """Was it kicked while it waited?"""

    def interrupted(self) -> int:
        """End its entry without running it; returns when it is to arrive, in ns."""

    def run_slice(self, until_ns: int) -> None:
        """Start running it up to `until_ns` of its own time."""

    def end_slice(self) -> bool:
        """Wait for the run to end; is its entry over? Then it arrives at `local_ns`."""

    def arrived(self) -> None:
        """Called at `local_ns`: go on with the vCPU's task."""

    def give_up(self, error: Exception) -> None:
        """End its entry by `error`."""


class SimulationLoop(ExactTimers):
    """asyncio's selector loop with simulated time; works with all that asyncio has.

    Args:
        pace: hold time to `pace` x wall clock at most; None is as fast as it goes.
        quantum_ns: guests look at the real world, and wait for one another, at each
            multiple of this.
        schedule: ``"parallel"``: vCPUs run on their threads to the barrier;
            ``"sequential"``: one after the other, for reproducible order.

    Raises:
        ConfigurationError: a pace or quantum that is not above 0.
    """

    def __init__(
        self,
        *,
        pace: float | None = None,
        quantum_ns: int = QUANTUM_NS,
        schedule: Schedule = "parallel",
    ) -> None:
        if pace is not None:
            speed("pace", pace)
        if whole("quantum_ns", quantum_ns) <= 0:
            raise ConfigurationError(f"quantum_ns={quantum_ns}: it must be greater than 0")
        if schedule not in ("parallel", "sequential"):
            raise ConfigurationError(f'schedule={schedule!r}: "parallel" or "sequential"')
        self._guests: list[SimulatedGuest] = []  # entered, and not over
        self._running: list[SimulatedGuest] = []  # of these, in a slice
        self._holders = 0
        self._quantum_ns = quantum_ns
        self._sequential = schedule == "sequential"
        self._pace = pace
        self._pacing = Pace()
        self._started_wall_ns: int | None = None
        self._polls_with_events = 0
        self._turns_without_time = 0
        self._turns_since = (0, 0.0)  # simulated ns, wall clock s
        self.arrival_sink: Callable[[int, int, int], None] | None = None
        """Told of every event from the real world: time_ns, descriptor, mask; in order."""
        self._real = selectors.EpollSelector()
        super().__init__(_WaitingSelector(self, self._real))

    # ---- time ---------------------------------------------------------------------

    @property
    def achieved_pace(self) -> float:
        """Simulated time / wall clock, since the loop first waited."""
        started_ns = self._started_wall_ns
        if started_ns is None:
            return 0.0
        return self._now_ns / max(1, time.monotonic_ns() - started_ns)

    def hold(self) -> Callable[[], None]:
        """Let time go no faster than the wall clock until the returned function is called."""
        held = True
        self._holders += 1

        def release() -> None:
            nonlocal held
            if held:
                held = False
                self._holders -= 1

        return release

    # ---- the real world: awaiting it holds simulated time -----------------------------

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Any, *args: Any
    ) -> asyncio.Future[Any]:
        future = super().run_in_executor(executor, func, *args)
        release = self.hold()
        future.add_done_callback(lambda _: release())
        return future

    async def shutdown_default_executor(self, *args: Any) -> None:
        release = self.hold()  # newer Pythons limit it by a timer of the loop's
        try:
            await super().shutdown_default_executor(*args)
        finally:
            release()

    async def sock_connect(self, sock: Any, address: Any) -> None:
        release = self.hold()
        try:
            await super().sock_connect(sock, address)
        finally:
            release()

    async def _make_subprocess_transport(self, *args: Any, **kwargs: Any) -> Any:
        release = self.hold()
        try:
            transport = await super()._make_subprocess_transport(  # type: ignore[misc]
                *args, **kwargs
            )
        except BaseException:
            release()
            raise
        if transport.get_returncode() is None:
            # A waiter of our own, as `transport._wait()` makes one, but without a task.
            ended = self.create_future()
            ended.add_done_callback(lambda _: release())
            transport._exit_waiters.append(ended)
        else:
            release()
        return transport

    # ---- guests ---------------------------------------------------------------------

    def park(self, guest: SimulatedGuest) -> None:
        """`guest` has entered: run it when the loop has nothing else to do."""
        guest.local_ns = max(guest.local_ns, self._now_ns)
        self._guests.append(guest)

    def remove(self, guest: SimulatedGuest) -> None:
        """`guest` is gone."""
        if guest in self._guests:
            self._guests.remove(guest)

    # ---- waiting ----------------------------------------------------------------------

    def wait(self) -> Events:
        """The selector's wait: run guests or jump, to the next timer at most."""
        if self._started_wall_ns is None:
            self._started_wall_ns = time.monotonic_ns()
        self._end_slices()  # only where an exception has ended the previous wait
        events = self._poll(0)
        self._polls_with_events = self._polls_with_events + 1 if events else 0
        if self.has_work():
            if self._guests and not events and not self._holders:
                self._watch_standstill()
            return events
        if events and not self._is_flooded:
            return events
        self._turns_without_time = 0
        if self._let_kicked_guests_out():
            return events
        self._run_guests()
        return events or self._advance()

    @property
    def _is_flooded(self) -> bool:
        return self._polls_with_events >= FLOOD_POLLS

    @property
    def _rate(self) -> float | None:
        """What time is held to, in multiples of the wall clock."""
        if not self._holders and not self._is_flooded:
            return self._pace
        return 1.0 if self._pace is None else min(1.0, self._pace)

    def _limit_ns(self) -> int | None:
        """What time cannot pass as things are: a timer, or a guest that has not come further."""
        limit_ns = self.next_timer_ns()
        for guest in self._guests:
            if limit_ns is None or guest.local_ns < limit_ns:
                limit_ns = guest.local_ns
        return limit_ns

    def _poll(self, timeout: float | None) -> Events:
        """Look at the real world, and let time go on with it where it is held to it."""
        # Not while something is to be called now: it would find that time has gone on.
        is_idle = not self.has_work()
        self._pacing.forget_delay(self._now_ns)
        events = self._real.select(timeout)
        rate = self._rate
        if rate is None:
            self._pacing.stop()
        elif is_idle:
            allowed_ns = self._pacing.allowed_ns(rate, self._now_ns)
            limit_ns = self._limit_ns()
            self._now_ns = allowed_ns if limit_ns is None else min(allowed_ns, limit_ns)
        if self.arrival_sink is not None:
            for key, mask in events:
                self.arrival_sink(self._now_ns, key.fd, mask)
        return events

    def _advance(self) -> Events:
        """Move time to the next event."""
        limit_ns = self._limit_ns()
        if limit_ns is None:
            return self._poll(None)  # nothing can happen but what comes from outside
        if self._rate is None:
            self._now_ns = limit_ns
            return []
        while self._now_ns < limit_ns:
            events = self._poll(self._pacing.wait_s(limit_ns))
            if events:
                return events
        return []

    # ---- running guests -----------------------------------------------------------------

    def _let_kicked_guests_out(self) -> bool:
        kicked = [guest for guest in self._guests if guest.wants_out]
        for guest in kicked:
            arrival_ns = guest.interrupted()
            self._guests.remove(guest)
            self.call_at_ns(arrival_ns, guest.arrived)
        return bool(kicked)

    def _run_guests(self) -> None:
        """Run those that are behind the barrier up to it, or to their exits."""
        barrier_ns = (self._now_ns // self._quantum_ns + 1) * self._quantum_ns
        # Who is furthest behind goes first; at a tie, who has waited longer.
        for guest in sorted(self._guests, key=lambda guest: guest.local_ns):
            # One after the other, nobody passes the exit of somebody before.
            timer_ns = self.next_timer_ns()
            until_ns = barrier_ns if timer_ns is None else min(barrier_ns, timer_ns)
            if guest.local_ns < until_ns:
                self._running.append(guest)
                guest.run_slice(until_ns)
                if self._sequential:
                    self._end_slices()
        self._end_slices()

    def _end_slices(self) -> None:
        while self._running:
            guest = self._running[0]
            if guest.end_slice() and guest in self._guests:
                self._guests.remove(guest)
                self.call_at_ns(guest.local_ns, guest.arrived)
            del self._running[0]

    def _watch_standstill(self) -> None:
        """Callbacks without end and without a wait keep a guest from running: say so."""
        self._turns_without_time += 1
        if self._turns_without_time == 1 or self._turns_since[0] != self._now_ns:
            self._turns_since = (self._now_ns, time.monotonic())
            self._turns_without_time = 1
        if self._turns_without_time % STANDSTILL_TURNS:
            return
        if time.monotonic() - self._turns_since[1] < STANDSTILL_S:
            return
        self._turns_without_time = 0
        guest = self._guests.pop(0)
        guest.give_up(
            KvmaioError(
                f"{guest.name} cannot run: simulated time stands still at {self._now_ns} ns, "
                f"since there is always a callback to run; is there a loop around sleep(0)?"
            )
        )
        self.call_soon(guest.arrived)


class _WaitingSelector(selectors.BaseSelector):
    """The loop's selector: registers with the real one, waits as the simulation does."""

    def __init__(self, loop: SimulationLoop, real: selectors.EpollSelector) -> None:
        self._loop = loop
        self.register = real.register  # type: ignore[method-assign]
        self.unregister = real.unregister  # type: ignore[method-assign]
        self.modify = real.modify  # type: ignore[method-assign]
        self.close = real.close  # type: ignore[method-assign]
        self.get_map = real.get_map  # type: ignore[method-assign]
        self.get_key = real.get_key  # type: ignore[method-assign]

    def select(self, timeout: float | None = None) -> Events:
        return self._loop.wait()

    def register(self, fileobj: Any, events: int, data: Any = None) -> Any: ...
    def unregister(self, fileobj: Any) -> Any: ...
    def get_map(self) -> Any: ...


@contextlib.asynccontextmanager
async def real_time() -> AsyncIterator[None]:
    """Inside, simulated time follows the wall clock: it neither jumps nor runs ahead of it.

    For waiting on the real world: a socket, another process. Without it, an
    `asyncio.timeout` around such a wait would fire at once. On a loop without
    simulated time it does nothing.
    """
    loop = asyncio.get_running_loop()
    release = loop.hold() if isinstance(loop, SimulationLoop) else None
    try:
        yield
    finally:
        if release is not None:
            release()
