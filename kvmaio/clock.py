"""Guest time in integer nanoseconds, and the alarms that devices set by it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from .errors import ConfigurationError

__all__ = ["Alarm", "Clock", "LoopClock", "StoppedClock"]


MOST_NS = 1 << 63
"""No deadline is further away, on either side of 0."""


class Cancellable(Protocol):
    """What `Clock.call_at_ns` returns."""

    def cancel(self) -> None:
        """Call off the callback; harmless when it has run."""


class Clock(Protocol):
    """A source of time that can call back."""

    @property
    def now_ns(self) -> int:
        """The present time in nanoseconds; it never goes backwards."""

    def call_at_ns(self, deadline_ns: int, callback: Callable[[], None]) -> Cancellable:
        """Call `callback` at about `deadline_ns`; it may come a little early."""

    def of_loop(self, loop_ns: int) -> int:
        """By this clock, what the event loop's own nanoseconds are."""


class StoppedClock:
    """The clock of a device that is attached to nothing: time 0 for ever."""

    now_ns = 0

    def of_loop(self, loop_ns: int) -> int:
        return loop_ns

    def call_at_ns(self, deadline_ns: int, callback: Callable[[], None]) -> Cancellable:
        return _Never()


class _Never:
    def cancel(self) -> None:
        pass


class LoopClock:
    """The event loop's time as integer nanoseconds.

    What a second is, is the loop's choice: wall clock on asyncio and uvloop,
    simulated time on a simulating loop.

    Attributes:
        read_ns: `now_ns` as a function, for those who look at every exit; another one after
            each `set()`.
        on_set: called after each `set()`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._offset_ns = 0
        # Both asyncio's and uvloop's time is CLOCK_MONOTONIC, but uvloop's is a cached number
        # of milliseconds. A loop with a time of its own has `time_ns`.
        self._time_ns: Callable[[], int] = getattr(loop, "time_ns", time.monotonic_ns)
        self.read_ns = self._time_ns
        self.on_set: Callable[[], None] | None = None
        # And exact timers: a float holds whole nanoseconds for some months only.
        self._call_at_ns: Callable[..., Cancellable] | None = getattr(loop, "call_at_ns", None)

    @property
    def now_ns(self) -> int:
        return self.read_ns()

    def call_at_ns(self, deadline_ns: int, callback: Callable[[], None]) -> Cancellable:
        deadline_ns -= self._offset_ns
        if self._call_at_ns is not None:
            return self._call_at_ns(deadline_ns, callback)
        return self._loop.call_at(deadline_ns / 1e9, callback)

    def set(self, now_ns: int) -> None:
        """Have it be `now_ns` now, as in a checkpoint; callbacks that wait keep their instants."""
        self._offset_ns = offset_ns = now_ns - self._time_ns()
        self.read_ns = lambda: self._time_ns() + offset_ns
        if self.on_set is not None:
            self.on_set()

    def of_loop(self, loop_ns: int) -> int:
        return loop_ns + self._offset_ns


class Alarm:
    """One deadline of a device, as an asynchronous iterator of the deadlines reached.

    ::

        self.alarm.arm(self.clock.now_ns + 1_000_000)
        async for deadline_ns in self.alarm:
            ...

    Never early: uvloop's timers and rounded floats can be, so the alarm looks
    at the clock again before it rings. Its state is plain data (`deadline_ns`
    and the deadlines that rang unheard), so a checkpoint holds it.

    Attributes:
        watcher: called with each deadline, and whether it is armed (False) or rings (True).
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.deadline_ns: int | None = None
        self.watcher: Callable[[int, bool], None] | None = None
        self._rung: deque[int] = deque()
        self._clock: Clock = clock or StoppedClock()
        self._timer: Cancellable | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._held = False

    def arm(self, deadline_ns: int) -> None:
        """Ring once at `deadline_ns` guest time; a past deadline rings at once.

        An earlier deadline that has not rung yet is replaced.
        """
        self.deadline_ns = deadline_ns
        if self.watcher is not None:
            self.watcher(deadline_ns, False)
        self._set_timer()

    def disarm(self) -> None:
        """Forget the deadline, if there is one."""
        self.deadline_ns = None
        self._set_timer()

    def reset(self) -> None:
        """Forget the deadline, and those that rang but were not heard yet."""
        self.disarm()
        self._rung.clear()

    def hold(self, held: bool) -> None:
        """Do not ring while held; what was due meanwhile rings afterwards."""
        self._held = held
        self._set_timer()

    def save(self) -> dict[str, object]:
        """The state for a checkpoint: absolute deadlines, in guest nanoseconds."""
        return {"deadline_ns": self.deadline_ns, "rung": list(self._rung)}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `save()` gave.

        Raises:
            ConfigurationError: it is no such thing.
        """
        match state:
            case {"deadline_ns": int() | None as deadline_ns, "rung": list() as rung}:
                times = rung if deadline_ns is None else [*rung, deadline_ns]
            case _:
                raise ConfigurationError(f"{state!r} is no alarm's state")
        if not all(isinstance(each, int) and abs(each) < MOST_NS for each in times):
            raise ConfigurationError(f"{state!r} is no alarm's state")
        self.reset()
        self._rung.extend(rung)
        if deadline_ns is not None:
            self.arm(deadline_ns)

    def use_clock(self, clock: Clock) -> None:
        """Move to another clock; an armed deadline keeps its value."""
        self._clock = clock
        self._set_timer()

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        while not self._rung:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._rung.popleft()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.deadline_ns is not None and not self._held:
            self._timer = self._clock.call_at_ns(self.deadline_ns, self._ring)

    def _ring(self) -> None:
        deadline_ns = self.deadline_ns
        if deadline_ns is None:
            return
        if self._clock.now_ns < deadline_ns:
            self._timer = self._clock.call_at_ns(deadline_ns, self._ring)
            return
        self.disarm()
        if self.watcher is not None:
            self.watcher(deadline_ns, True)
        self._rung.append(deadline_ns)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
