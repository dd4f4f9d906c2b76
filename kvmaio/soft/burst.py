"""`SoftBurst`: accesses of a software CPU, back to back; see `kvmaio.cpu.AccessBurst`."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from ..cpu import EntryResult
from ._soft import ffi, lib

if TYPE_CHECKING:
    from .cpu import SoftCpu

__all__ = ["SoftBurst"]

_PIO_DATA = 4096  # in the run page
_WORDS = {size: f"uint{8 * size}_t *" for size in (1, 2, 4, 8)}


class SoftBurst:
    """Goes on until something else than an access comes, or others on the loop have a turn.

    Attributes:
        next: straight to C: between two accesses nothing else is called.
    """

    __slots__ = ("_cpu", "_handle", "_taken", "_taken_ns", "next")

    def __init__(self, cpu: SoftCpu) -> None:
        self._cpu = cpu
        self._handle = cpu.handle
        self._taken = 0  # ticks up to which the time is in `_taken_ns`, or with whoever took that
        self._taken_ns = 0
        self.next = partial(lib.kvmaio_soft_next, cpu.handle)

    def begin(self) -> None:
        """From here on: all time before has been booked."""
        self._taken = self._handle.burst_ticks = self._handle.ticks
        self._taken_ns = 0

    @property
    def due(self) -> int:
        access: int = self._handle.access
        return access

    def end(self) -> EntryResult | None:
        # Also where an exception came behind an entry with an access: what is taken is booked.
        self._handle.began = self._taken
        return self._cpu.outcome_of(self._handle.burst_end)

    def is_running(self) -> bool:
        return bool(lib.kvmaio_soft_is_running(self._handle))

    def words(self, access: int) -> Any:
        page = self._cpu.page
        is_pio, size = access & 1, access >> 2 & 15
        start = ffi.cast("uint8_t *", page) + _PIO_DATA if is_pio else page.mmio.data
        return ffi.cast(_WORDS[size], start)

    def begins(self) -> None:
        self._handle.exit_untold = 0
        self._handle.left_ns = time.monotonic_ns()

    def exit(self) -> tuple[int, int]:
        handle = self._handle
        return handle.left_ns, self.executed_ns if handle.exit_untold else -1

    def noter(self, notes: Any, kind: Any) -> None:
        return None  # those are KVM's, which may not be here

    def take_ns(self) -> int:
        self.settle()
        taken_ns, self._taken_ns = self._taken_ns, 0
        return taken_ns

    def settle(self) -> None:
        """Ticks are about to become something else: what they were so far is turned into time."""
        ticks: int = self._handle.burst_ticks
        self._taken_ns += self._cpu.elapsed_ns(self._taken, ticks)
        self._taken = ticks

    @property
    def executed_ns(self) -> int:
        return self._cpu.executed_ns
