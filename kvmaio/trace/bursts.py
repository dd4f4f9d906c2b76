"""What a trace to a file makes of accesses that come back to back: one note for exit and access.

The usual way there is a record for each, with a call of its own. Between exits that follow one
another within microseconds that would take half of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import attrs

from ..access_burst import AccessBurst
from ..bus import Target
from .accesses import TracedTarget

__all__ = ["BurstAccess", "Burstable", "Taker", "WatchedTarget"]


@attrs.frozen
class BurstAccess:
    """A kind of access that a burst has.

    Attributes:
        vcpu: who makes it.
        reason: of its exits: ``IO`` or ``MMIO``.
        key: as `kvmaio.access_burst.AccessBurst.due`.
        offset_ns: of guest time from CLOCK_MONOTONIC.
        host_factor: guest time for executed host time.
    """

    burst: AccessBurst
    vcpu: str
    reason: str
    source: str
    register: str | None
    bus: str
    address: int
    size: int
    is_write: bool
    key: int
    offset_ns: int
    host_factor: float


@attrs.frozen
class Taker:
    """What takes the accesses of one kind.

    Attributes:
        note: notes them in C; see `kvmaio.access_burst.AccessBurst.note_by()`. None: nothing does.
        told: told when one has been answered; None: nothing is. 1: call `write()` then. -1: and
            tell it again behind that.
        arrived: told when the first of some in a row has come; None: nothing is.
    """

    note: Any = None
    told: Callable[[], int] | None = None
    arrived: Callable[[], None] | None = None


@runtime_checkable
class Burstable(Protocol):
    """A trace file that takes such notes."""

    def taker(self, access: BurstAccess) -> Taker | None:
        """What takes accesses of this kind; None: records only."""

    def write(self) -> None:
        """Write what has been taken."""


class WatchedTarget:
    """See `kvmaio.vcpu.states.WatchedAccess`."""

    __slots__ = ("_access", "_left", "_target", "arrived", "note", "target", "told", "write")

    def __init__(
        self,
        target: TracedTarget,
        access: BurstAccess,
        taker: Taker,
        file: Burstable,
        left: Callable[[int, int], None],
    ) -> None:
        self._target = target
        self._access = access
        self._left = left
        self.target: Target = target.inner
        self.note, self.told, self.arrived = taker.note, taker.told, taker.arrived
        self.write = file.write

    def failed(self, value: int | None) -> None:
        begun_ns = self._tell_exit()
        self._target.tell(begun_ns, self._access.register, self._access.is_write, value)

    def suspends(self) -> None:
        self._tell_exit()

    def _tell_exit(self) -> int:
        """Tell of the exit, if nobody has; when it was."""
        burst = self._access.burst
        left_ns, executed_ns = burst.exit()
        left_ns += self._access.offset_ns
        if burst.exit_told():
            self._left(left_ns, executed_ns)
        return left_ns
