"""Accesses of a KVM vCPU, back to back; see `kvmaio.cpu.AccessBurst`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..cpu import EntryResult
from ._native import ffi, lib

if TYPE_CHECKING:
    from .cpu import KvmCpu
    from .resident import Residents

__all__ = ["NativeBurst", "ResidentBurst"]

_WORDS = {size: f"uint{8 * size}_t *" for size in (1, 2, 4, 8)}


class NativeBurst:
    """Of a vCPU on its own thread: a burst is one access long, and its way back in."""

    __slots__ = ("_cpu", "_handle")

    def __init__(self, cpu: KvmCpu) -> None:
        self._cpu = cpu
        self._handle = cpu.handle

    @property
    def due(self) -> int:
        access: int = self._handle.access
        return access

    def next(self) -> int:
        return -1

    def end(self) -> EntryResult | None:
        return self._cpu.enter(None)

    def is_running(self) -> bool:
        return bool(lib.kvmaio_vcpu_is_running(self._handle))

    def words(self, access: int) -> Any:
        page = self._cpu.page
        is_pio, size = access & 1, access >> 2 & 15
        start = ffi.cast("uint8_t *", page) + lib.KVMAIO_PIO_DATA if is_pio else page.mmio.data
        return ffi.cast(_WORDS[size], start)

    def begins(self) -> None:
        self._handle.exit_untold = 0
        self._handle.left_ns = time.monotonic_ns()

    def exit(self) -> tuple[int, int]:
        handle = self._handle
        return handle.left_ns, handle.executed_ns if handle.exit_untold else -1

    def noter(self, notes: Any, kind: Any) -> Callable[[], int]:
        return partial(lib.kvmaio_note_access, notes, kind, self._handle)

    def take_ns(self) -> int:
        return 0

    @property
    def executed_ns(self) -> int:
        return self._cpu.executed_ns


class ResidentBurst(NativeBurst):
    """Of a vCPU on the loop's thread: it goes on until something else than an access comes."""

    __slots__ = ("next",)

    def __init__(self, cpu: KvmCpu, residents: Residents) -> None:
        super().__init__(cpu)
        self.next = partial(  # type: ignore[method-assign]
            lib.kvmaio_resident_next, residents.handle, cpu.handle
        )

    def end(self) -> EntryResult | None:
        return self._cpu.burst_ended()

    def take_ns(self) -> int:
        taken_ns: int = self._handle.burst_ns
        self._handle.burst_ns = 0
        return taken_ns
