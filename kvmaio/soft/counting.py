"""`SoftStop`: the software CPU's `kvmaio.vcpu.instruction_events.InstructionStop`; exact, free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cpu import EntryResult

if TYPE_CHECKING:
    from .cpu import SoftCpu

__all__ = ["SoftStop"]


class SoftStop:
    """See `kvmaio.vcpu.instruction_events.InstructionStop`.

    Attributes:
        reset_at: the CPU's ticks at the reset; None: nobody knows what was executed since.
        until: those at which the entry is to end, in however many slices it is run, or None.
    """

    counts_always = True
    loses_interrupts = False

    def __init__(self, cpu: SoftCpu) -> None:
        self._cpu = cpu
        self.reset_at: int | None = 0
        self.until: int | None = None

    @property
    def counted(self) -> int:
        """Instructions since the reset, or since any moment if those are lost."""
        return int(self._cpu.handle.ticks) - (self.reset_at or 0)

    @property
    def lost(self) -> bool:
        return self.reset_at is None or not self._cpu.counting

    def reset(self, count: int | None) -> None:
        """Count from `count` on; None: it is lost."""
        self.reset_at = None if count is None else int(self._cpu.handle.ticks) - count

    def refusal(self) -> str | None:
        if not self._cpu.counting:
            return "this software CPU runs uncounted; set its `counting`"
        return None

    def arm(self, remaining: int, access_pending: bool) -> bool:
        self.until = int(self._cpu.handle.ticks) + remaining
        return False

    def entered(self, result: EntryResult) -> EntryResult:
        return result

    def disarm(self) -> None:
        self.until = None
