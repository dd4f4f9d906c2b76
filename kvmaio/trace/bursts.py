"""What a trace to a file makes of accesses that come back to back: one note for exit and access.

The usual way there is a record for each, with a call of its own. Between exits that follow one
another within microseconds that would take half of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import attrs

from ..bus import Target
from ..cpu import AccessBurst
from ..suspension import Suspended, drive
from .accesses import TracedTarget

__all__ = ["BurstAccess", "Burstable", "WatchedTarget"]


@attrs.frozen
class BurstAccess:
    """A kind of access that a burst has.

    Attributes:
        vcpu: who makes it.
        reason: of its exits: ``IO`` or ``MMIO``.
        key: as `kvmaio.cpu.AccessBurst.due`.
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


@runtime_checkable
class Burstable(Protocol):
    """A trace file that takes such notes."""

    def taker(self, access: BurstAccess) -> Callable[[], int] | None:
        """What is told when an access of this kind has been answered; None: records only.

        1: call `write()` then. -1: and tell it again behind that.
        """

    def arrival(self, access: BurstAccess) -> Callable[[], None] | None:
        """What is told when such an exit comes in the midst of a burst; None: nothing."""

    def write(self) -> None:
        """Write what has been taken."""


class WatchedTarget:
    """See `kvmaio.vcpu.states.WatchedAccess`."""

    __slots__ = ("_access", "_left", "_target", "target", "told", "write", "arrived")

    def __init__(
        self,
        target: TracedTarget,
        access: BurstAccess,
        told: Callable[[], int],
        file: Burstable,
        left: Callable[[int, int], None],
    ) -> None:
        self._target = target
        self._access = access
        self._left = left
        self.target: Target = target.inner
        self.told = told
        self.write = file.write
        self.arrived = file.arrival(access)

    def failed(self, value: int | None) -> None:
        self._target.tell(self._exit(), self._access.register, self._access.is_write, value)

    def read_goes_on(self, rest: Any) -> Any:
        if not isinstance(rest, Suspended):  # no number, either: who takes it will say so
            self.failed(None)
            return rest
        return drive(self._target.rest_of_read(rest, self._exit(), self._access.register))

    def write_goes_on(self, rest: Suspended[None], value: int) -> Any:
        return drive(self._target.rest_of_write(rest, self._exit(), self._access.register, value))

    def _exit(self) -> int:
        """Tell of the exit, if nobody has; when it was."""
        left_ns, executed_ns = self._access.burst.exit()
        left_ns += self._access.offset_ns
        if executed_ns >= 0:
            self._left(left_ns, executed_ns)
        return left_ns
