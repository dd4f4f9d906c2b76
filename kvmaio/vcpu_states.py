"""A vCPU's states, and what it tells those around it."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import attrs

from .cpu import EntryResult
from .exits import Outcome

if TYPE_CHECKING:
    from .assist import Assisted
    from .vcpu import VCpu

__all__ = [
    "COMPLETION",
    "IDLE",
    "PENDING",
    "RUNNING",
    "SERVICE",
    "VCpuHooks",
    "VCpuOwner",
    "VCpuState",
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


@attrs.frozen
class VCpuHooks:
    """What to call when something happens to a vCPU; None: nothing.

    Attributes:
        left: an entry ended: its result, the exit's reason, guest nanoseconds executed.
        stalls: a handler has suspended, in words which; what it returns is called when the
            vCPU goes on.
        injected: an interrupt is injected; None is an NMI.
        assisted: the software CPU has executed what KVM could not.
    """

    left: Callable[[EntryResult, int, int], None] | None = None
    stalls: Callable[[str], Callable[[], None]] | None = None
    injected: Callable[[int | None], None] | None = None
    assisted: Callable[[Assisted], None] | None = None


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
