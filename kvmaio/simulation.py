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

from .errors import ConfigurationError

__all__ = ["SimulatedGuest", "SimulationLoop", "real_time"]

NS = 1_000_000_000
QUANTUM_NS = 1_000_000
"""How far guests run ahead of an event that does not exist yet."""

Schedule = Literal["parallel", "sequential"]


class SimulatedGuest(Protocol):
    """A vCPU that waits for the loop to run it (`timed_cpu.TimedCpu`)."""

    local_ns: int
    """Its own time; ahead of the loop's by its debt."""

    @property
    def wants_out(self) -> bool:
        """Was it kicked while it waited?"""

    def interrupted(self) -> None:
        """End its entry without running it."""

    def run_slice(self, until_ns: int) -> None:
        """Start running it up to `until_ns` of its own time."""

    def end_slice(self) -> bool:
        """Wait for the run to end; has its entry ended with it? Then it arrives at `local_ns`."""

    def arrived(self) -> None:
        """Called at `local_ns`: go on with the vCPU's task."""


class SimulationLoop(asyncio.SelectorEventLoop):
    """asyncio's selector loop with simulated time; works with all that asyncio has.

    Args:
        pace: hold time to `pace` x wall clock at most; None is as fast as it goes.
        quantum_ns: how long guests run at most before the real world is looked at
            and vCPUs wait for one another.
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
        if pace is not None and not pace > 0:
            raise ConfigurationError(f"pace={pace}: it must be greater than 0")
        if quantum_ns <= 0:
            raise ConfigurationError(f"quantum_ns={quantum_ns}: it must be greater than 0")
        if schedule not in ("parallel", "sequential"):
            raise ConfigurationError(f'schedule={schedule!r}: "parallel" or "sequential"')
        self._now_ns = 0
        self._guests: list[SimulatedGuest] = []
        self._holders = 0
        self._quantum_ns = quantum_ns
        self._sequential = schedule == "sequential"
        self._pace = pace
        self._started_wall_ns = time.monotonic_ns()
        self.arrival_sink: Callable[[int, int, int], None] | None = None
        """Told of every event from the real world: time_ns, descriptor, mask; in order."""
        self._real = selectors.EpollSelector()
        super().__init__(_WaitingSelector(self, self._real))
        # Deadlines are exact: a timer is due when its time has come, not a little before.
        self._clock_resolution = 1e-9

    # ---- time ---------------------------------------------------------------------

    def time(self) -> float:
        """Simulated seconds since the loop was made."""
        return self._now_ns / NS

    def time_ns(self) -> int:
        """Simulated nanoseconds; exact."""
        return self._now_ns

    @property
    def achieved_pace(self) -> float:
        """Simulated time / wall clock since the loop was made."""
        return self._now_ns / max(1, time.monotonic_ns() - self._started_wall_ns)

    def hold(self) -> Callable[[], None]:
        """Let idle time follow the wall clock until the returned function is called."""
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

    async def _make_subprocess_transport(self, *args: Any, **kwargs: Any) -> Any:
        release = self.hold()
        try:
            transport = await super()._make_subprocess_transport(  # type: ignore[misc]
                *args, **kwargs
            )
        except BaseException:
            release()
            raise
        ended = self.create_task(transport._wait())
        ended.add_done_callback(lambda _: release())
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

    def wait(self, timeout: float | None) -> list[tuple[Any, int]]:
        """The selector's wait: run guests or jump, to the next timer at most."""
        events = self._poll(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if self._let_kicked_guests_out():
            return []
        target_ns = self._next_timer_ns()
        if self._guests:
            horizon_ns = self._now_ns + self._quantum_ns
            if target_ns is not None:
                horizon_ns = min(horizon_ns, target_ns)
            self._run_guests(horizon_ns)
            return self._advance(horizon_ns)
        if target_ns is None:
            return self._poll(None)  # nothing can happen but what comes from outside
        if self._holders:
            return self._follow_wall_clock(target_ns)
        return self._advance(target_ns)

    def _poll(self, timeout: float | None) -> list[tuple[Any, int]]:
        events = self._real.select(timeout)
        if self.arrival_sink is not None:
            for key, mask in events:
                self.arrival_sink(self._now_ns, key.fd, mask)
        return events

    def _next_timer_ns(self) -> int | None:
        scheduled = self._scheduled  # type: ignore[attr-defined]
        return max(self._now_ns, round(scheduled[0]._when * NS)) if scheduled else None

    def _let_kicked_guests_out(self) -> bool:
        kicked = [guest for guest in self._guests if guest.wants_out]
        for guest in kicked:
            self._guests.remove(guest)
            guest.interrupted()
            self.call_soon(guest.arrived)
        return bool(kicked)

    def _run_guests(self, horizon_ns: int) -> None:
        """Run those that are behind the horizon up to it, or to their exits."""
        behind = [guest for guest in self._guests if guest.local_ns < horizon_ns]
        if self._sequential:
            # Who is furthest behind goes first, and never beyond what another has come to.
            for guest in sorted(behind, key=lambda guest: guest.local_ns):
                timer_ns = self._next_timer_ns()
                until_ns = horizon_ns if timer_ns is None else min(horizon_ns, timer_ns)
                if guest.local_ns < until_ns:
                    guest.run_slice(until_ns)
                    self._take_back(guest)
        else:
            for guest in behind:
                guest.run_slice(horizon_ns)
            for guest in behind:
                self._take_back(guest)

    def _take_back(self, guest: SimulatedGuest) -> None:
        if guest.end_slice():
            self._guests.remove(guest)
            self.call_at(guest.local_ns / NS, guest.arrived)

    def _advance(self, target_ns: int) -> list[tuple[Any, int]]:
        """Move time to `target_ns`, or to an event that has come up before it."""
        timer_ns = self._next_timer_ns()
        if timer_ns is not None:
            target_ns = min(target_ns, timer_ns)
        if self._pace is not None:
            events = self._keep_pace(target_ns)
            if events:
                return events
        self._now_ns = max(self._now_ns, target_ns)
        return []

    def _keep_pace(self, target_ns: int) -> list[tuple[Any, int]]:
        assert self._pace is not None
        due_wall_ns = self._started_wall_ns + int(target_ns / self._pace)
        while (early_ns := due_wall_ns - time.monotonic_ns()) > 0:
            events = self._real.select(early_ns / NS)
            if events:
                elapsed_ns = time.monotonic_ns() - self._started_wall_ns
                self._now_ns = max(self._now_ns, min(target_ns, int(elapsed_ns * self._pace)))
                return events
        return []

    def _follow_wall_clock(self, target_ns: int) -> list[tuple[Any, int]]:
        before_ns = time.monotonic_ns()
        events = self._poll((target_ns - self._now_ns) / NS)
        elapsed_ns = time.monotonic_ns() - before_ns
        self._now_ns = min(target_ns, self._now_ns + elapsed_ns)
        return events


class _WaitingSelector(selectors.BaseSelector):
    """The loop's selector: registers with the real one, waits as the simulation does."""

    def __init__(self, loop: SimulationLoop, real: selectors.EpollSelector) -> None:
        self._loop = loop
        self._real = real
        self.register = real.register  # type: ignore[method-assign]
        self.unregister = real.unregister  # type: ignore[method-assign]
        self.modify = real.modify  # type: ignore[method-assign]
        self.close = real.close  # type: ignore[method-assign]
        self.get_map = real.get_map  # type: ignore[method-assign]
        self.get_key = real.get_key  # type: ignore[method-assign]

    def select(self, timeout: float | None = None) -> list[tuple[Any, int]]:
        return self._loop.wait(timeout)

    def register(self, fileobj: Any, events: int, data: Any = None) -> Any: ...
    def unregister(self, fileobj: Any) -> Any: ...
    def get_map(self) -> Any: ...


@contextlib.asynccontextmanager
async def real_time() -> AsyncIterator[None]:
    """Inside, simulated time follows the wall clock instead of jumping while idle.

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
