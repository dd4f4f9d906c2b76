"""`SoftBurst`: accesses of a software CPU, back to back; see `kvmaio.access_burst`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..access_burst import AccessBurst, function_address
from ..cpu import EntryResult
from ._soft import ffi, lib

if TYPE_CHECKING:
    from .cpu import SoftCpu

__all__ = ["SoftBurst"]


class SoftBurst(AccessBurst):
    """Goes on until something else than an access comes, or others on the loop have a turn."""

    __slots__ = ("_cpu", "_taken", "_taken_ns")

    again_at = function_address(ffi, lib, "kvmaio_soft_again")
    _again = staticmethod(lib.kvmaio_soft_again)

    def __init__(self, cpu: SoftCpu) -> None:
        super().__init__(cpu.handle, cpu.page, ffi)
        self._cpu = cpu
        self._taken = 0  # ticks up to which the time is in `_taken_ns`, or with whoever took that
        self._taken_ns = 0

    def begin(self, told: bool) -> None:
        super().begin(told)
        self._taken = self.handle.burst_ticks = self.handle.ticks
        self._taken_ns = 0

    def take_ns(self) -> int:
        self.settle()
        taken_ns, self._taken_ns = self._taken_ns, 0
        return taken_ns

    def settle(self) -> None:
        """Ticks are about to become something else: what they were so far is turned into time."""
        ticks: int = self.handle.burst_ticks
        self._taken_ns += self._cpu.elapsed_ns(self._taken, ticks)
        self._taken = ticks

    @property
    def executed_ns(self) -> int:
        return self._cpu.executed_ns

    def is_running(self) -> bool:
        return bool(lib.kvmaio_soft_is_running(self.handle))

    def end(self) -> EntryResult | None:
        # Also where an exception came behind an entry with an access: what is taken is booked.
        self.handle.began = self._taken
        return self._cpu.outcome_of(self._state.end)
