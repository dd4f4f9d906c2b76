"""A vCPU's states, and what it tells those around it."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from ..cpu import EntryResult
from ..exits import Outcome

if TYPE_CHECKING:
    from ..access_burst import AccessBurst
    from ..assist import Assisted
    from ..bus import Target
    from .vcpu import VCpu

__all__ = [
    "COMPLETION",
    "IDLE",
    "PENDING",
    "RUNNING",
    "SERVICE",
    "BurstWatch",
    "VCpuHooks",
    "VCpuOwner",
    "VCpuState",
    "WatchedAccess",
]


class VCpuState(enum.Enum):
    """gem5's states of a KVM CPU."""

    IDLE = "Idle"
    RUNNING = "Running"
    RUNNING_SERVICE = "RunningService"
    RUNNING_SERVICE_COMPLETION = "RunningServiceCompletion"
    RUNNING_MMIO_PENDING = "RunningMMIOPending"


IDLE = VCpuState.IDLE
RUNNING = VCpuState.RUNNING
SERVICE = VCpuState.RUNNING_SERVICE
COMPLETION = VCpuState.RUNNING_SERVICE_COMPLETION
PENDING = VCpuState.RUNNING_MMIO_PENDING


class WatchedAccess(Protocol):
    """Is told of a burst's accesses of one kind, and of the exits with which they come."""

    @property
    def target(self) -> Target:
        """Who answers them."""

    @property
    def arrived(self) -> Callable[[], None] | None:
        """The first of some in a row has come; nothing is called where it is None."""

    @property
    def note(self) -> Any:
        """What notes in C that one has been answered, see `AccessBurst.note_by()`; or None."""

    @property
    def told(self) -> Callable[[], int] | None:
        """Called when one has been answered, its data being in the run page, unless it is None.

        1: call `write()`. -1: and this again behind that, as there was no room.
        """

    @property
    def write(self) -> Callable[[], None]:
        """Write it."""

    def failed(self, value: int | None) -> None:
        """The handler has raised; None is a read."""

    def suspends(self) -> None:
        """The handler waits: other things may happen before the access has been answered."""


BurstWatch = Callable[["Target", int, "AccessBurst"], WatchedAccess | None]


@attrs.frozen
class VCpuHooks:
    """What to call when something happens to a vCPU; None: nothing.

    Attributes:
        left: an entry ended: its result, the exit's reason, guest nanoseconds executed.
        stalls: a handler has suspended, in words which; what it returns is called when the
            vCPU goes on.
        injected: an interrupt is injected; None is an NMI.
        assisted: the software CPU has executed what KVM could not.
        bursts: asked once for each access that a burst may have (its target, as in
            `AccessBurst.due`, the burst), who is told of these in place of `left`; None: nobody.
    """

    left: Callable[[EntryResult, int, int], None] | None = None
    stalls: Callable[[str], Callable[[], None]] | None = None
    injected: Callable[[int | None], None] | None = None
    assisted: Callable[[Assisted], None] | None = None
    bursts: BurstWatch | None = None


class VCpuOwner(Protocol):
    """What a vCPU tells the machine it belongs to."""

    watches_exits: bool
    has_doorbells: bool
    """Are writes batched? If not, an exit is served straight away."""

    @property
    def posted_lock(self) -> asyncio.Lock:
        """Held while batched writes are being served, so that exits stay behind them."""

    def check_steppable(self) -> None:
        """Raise ConfigurationError if a vCPU cannot be run by hand now."""

    def idle(self, vcpu: VCpu) -> None:
        """The vCPU has become idle."""

    def ended(self, vcpu: VCpu, outcome: Outcome) -> None:
        """The vCPU's guest ended the run."""

    def failed(self, vcpu: VCpu, error: BaseException) -> None:
        """An exit could not be served, or the host refused to run the guest."""
