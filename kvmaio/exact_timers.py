"""`ExactTimers`: asyncio's selector loop with timers in integer nanoseconds.

asyncio compares deadlines as floats, fires timers a clock's resolution early,
and leaves the order of equal deadlines to its heap. Here a deadline is an
integer, equal ones fire in the order in which they were asked for, and none
fires before or without its time.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import selectors
from collections.abc import Callable
from contextvars import Context
from itertools import count
from typing import Any

__all__ = ["NS", "ExactTimers"]

NS = 1_000_000_000

_NEVER = math.inf


class ExactTimer(asyncio.TimerHandle):
    """A timer of the loop's, ordered by nanoseconds and then by age."""

    __slots__ = ("due_ns", "order")

    due_ns: float  # an int, or infinity
    order: int

    def __lt__(self, other: object) -> bool:
        if isinstance(other, ExactTimer):
            return (self.due_ns, self.order) < (other.due_ns, other.order)
        return NotImplemented


class ExactTimers(asyncio.SelectorEventLoop):
    """A loop whose time is what `_now_ns` says; `SimulationLoop` moves that."""

    _scheduled: list[ExactTimer]  # asyncio's heap
    _closed = True  # until __init__: one that refuses its arguments leaves nothing to close

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._now_ns = 0
        self._timers_made = count()
        super().__init__(selector)
        # asyncio then finds nothing due itself: what is due has been taken before.
        self._clock_resolution = 0.0

    def time(self) -> float:
        """Simulated seconds since the loop was made."""
        return self._now_ns / NS

    def time_ns(self) -> int:
        """Simulated nanoseconds; exact."""
        return self._now_ns

    def call_at_ns(
        self,
        deadline_ns: int,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call `callback` when `time_ns()` is exactly `deadline_ns`; if that is past, at once."""
        return self._schedule(deadline_ns, deadline_ns / NS, callback, args, context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """As asyncio's; the deadline is rounded to the nearest nanosecond."""
        if when is None:
            raise TypeError("when cannot be None")
        return self._schedule(_nanoseconds(when), when, callback, args, context)

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """As asyncio's; the delay is rounded to the nearest nanosecond."""
        if delay is None:
            raise TypeError("delay must not be None")
        due_ns = self._now_ns + _nanoseconds(delay)
        return self._schedule(due_ns, self.time() + delay, callback, args, context)

    def _schedule(
        self,
        due_ns: float,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context | None,
    ) -> ExactTimer:
        self._check_closed()  # type: ignore[attr-defined]
        if self.get_debug():
            self._check_thread()  # type: ignore[attr-defined]
            self._check_callback(callback, "call_at")  # type: ignore[attr-defined]
        timer = ExactTimer(when, callback, args, self, context)
        timer.due_ns = due_ns
        timer.order = next(self._timers_made)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def next_timer_ns(self) -> int | None:
        """When the next timer is due, not before now; None without one."""
        scheduled = self._scheduled
        while scheduled and scheduled[0].cancelled():
            self._drop(heapq.heappop(scheduled))
        if not scheduled or scheduled[0].due_ns == _NEVER:
            return None
        due_ns = scheduled[0].due_ns
        return self._now_ns if due_ns <= self._now_ns else int(due_ns)

    def has_work(self) -> bool:
        """Is there anything to call at the present time?"""
        if self._ready or self._stopping:  # type: ignore[attr-defined]
            return True
        return self.next_timer_ns() == self._now_ns

    def _process_events(self, event_list: Any) -> None:
        """asyncio's step behind its wait; its next one would be to take due timers."""
        super()._process_events(event_list)  # type: ignore[misc]
        scheduled = self._scheduled
        while scheduled and scheduled[0].due_ns <= self._now_ns:
            timer = heapq.heappop(scheduled)
            if timer.cancelled():
                self._drop(timer)
            else:
                timer._scheduled = False  # type: ignore[attr-defined]
                self._ready.append(timer)  # type: ignore[attr-defined]

    def _drop(self, timer: ExactTimer) -> None:
        timer._scheduled = False  # type: ignore[attr-defined]
        self._timer_cancelled_count -= 1  # type: ignore[attr-defined]


def _nanoseconds(seconds: float) -> float:
    if math.isnan(seconds):
        raise ValueError("a deadline or delay that is not a number")
    if math.isinf(seconds):
        return seconds
    return round(seconds * NS)
