"""`Pace`: simulated time held to a multiple of the wall clock."""

from __future__ import annotations

import time

__all__ = ["Pace"]

SLACK_NS = 10_000_000
"""Wall clock that a late simulation makes up for; more is lost, or it would come in a burst."""


class Pace:
    """How far simulated time may have come, at a rate that may change.

    The rate is an upper bound: a simulation that is slower is not hurried, and
    what it is late by, it may make up for only where that is little.
    """

    def __init__(self) -> None:
        self._rate: float | None = None
        self._wall_ns = 0
        self._simulated_ns = 0

    def allowed_ns(self, rate: float, now_ns: int) -> int:
        """The simulated time that `rate` x wall clock allows at this moment.

        Args:
            now_ns: simulated time so far; where the rate is new, it counts from there.
        """
        wall_ns = time.monotonic_ns()
        if rate != self._rate:
            self._start(rate, wall_ns, now_ns)
        allowed_ns = self._simulated_ns + int((wall_ns - self._wall_ns) * rate)
        return max(now_ns, allowed_ns)

    def forget_delay(self, now_ns: int) -> None:
        """Before an idle wait: what took longer than the slack since is not made up for."""
        if self._rate is None:
            return
        earliest_ns = time.monotonic_ns() - SLACK_NS
        if self._wall_ns + (now_ns - self._simulated_ns) / self._rate < earliest_ns:
            self._start(self._rate, earliest_ns, now_ns)

    def wait_s(self, until_ns: int) -> float:
        """Wall clock seconds until `until_ns` is allowed."""
        if self._rate is None:
            return 0.0
        due_ns = self._wall_ns + (until_ns - self._simulated_ns) / self._rate
        return max(0.0, (due_ns - time.monotonic_ns()) / 1e9)

    def stop(self) -> None:
        """There is no rate at present."""
        self._rate = None

    def _start(self, rate: float, wall_ns: int, now_ns: int) -> None:
        self._rate = rate
        self._wall_ns = wall_ns
        self._simulated_ns = now_ns
