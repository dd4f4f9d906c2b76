"""What a trace to a file makes of accesses that come back to back: one note for exit and access.

The usual way there is a record for each, with a call of its own. Between exits that follow one
another within microseconds that would take half of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import attrs

from ..bus import Target
from ..suspension import Suspended, drive
from .accesses import TracedTarget

__all__ = ["BurstAccess", "Burstable", "WatchedTarget"]


@attrs.frozen
class BurstAccess:
    """A kind of access that a burst has.

    Attributes:
        vcpu: who makes it.
        reason: of its exits: ``IO`` or ``MMIO``.
        now: guest time.
        ticks_of: guest nanoseconds of executed host nanoseconds.
    """

    vcpu: str
    reason: str
    source: str
    register: str | None
    bus: str
    address: int
    size: int
    is_write: bool
    now: Callable[[], int]
    ticks_of: Callable[[int], int]


@runtime_checkable
class Burstable(Protocol):
    """A trace file that takes such notes."""

    def taker(self, access: BurstAccess) -> Callable[[int, int, int], None]:
        """What is told when an access of this kind is over: the value, when the guest was left,
        the host time executed before that (-1: the exit is in the trace already)."""


class WatchedTarget:
    """See `kvmaio.vcpu_states.WatchedAccess`."""

    __slots__ = ("_is_write", "_left", "_register", "_target", "now", "target", "told")

    def __init__(
        self,
        target: TracedTarget,
        access: BurstAccess,
        told: Callable[[int, int, int], None],
        left: Callable[[int, int], None],
    ) -> None:
        self._target = target
        self._left = left
        self._register = access.register
        self._is_write = access.is_write
        self.target: Target = target.inner
        self.now = access.now
        self.told = told

    def failed(self, value: int | None, left_ns: int, executed_ns: int) -> None:
        self._exit(left_ns, executed_ns)
        self._target.tell(left_ns, self._register, self._is_write, value)

    def read_goes_on(self, rest: Any, left_ns: int, executed_ns: int) -> Any:
        if not isinstance(rest, Suspended):  # no number, either: who takes it will say so
            self.failed(None, left_ns, executed_ns)
            return rest
        self._exit(left_ns, executed_ns)
        return drive(self._target.rest_of_read(rest, left_ns, self._register))

    def write_goes_on(
        self, rest: Suspended[None], value: int, left_ns: int, executed_ns: int
    ) -> Any:
        self._exit(left_ns, executed_ns)
        return drive(self._target.rest_of_write(rest, left_ns, self._register, value))

    def _exit(self, left_ns: int, executed_ns: int) -> None:
        if executed_ns >= 0:
            self._left(left_ns, executed_ns)
