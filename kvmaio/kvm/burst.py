"""`KvmBurst`: a resident vCPU's plain accesses, back to back; see `kvmaio.cpu.AccessBurst`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..cpu import EntryResult
from ._native import ffi, lib

if TYPE_CHECKING:
    from .cpu import KvmCpu
    from .resident import Residents

__all__ = ["KvmBurst"]

_WORDS = {size: f"uint{8 * size}_t *" for size in (1, 2, 4, 8)}


class KvmBurst:
    """One stay of a vCPU on the loop's thread."""

    __slots__ = ("_cpu", "_handle", "next")

    def __init__(self, cpu: KvmCpu, residents: Residents) -> None:
        self._cpu = cpu
        self._handle = cpu.handle
        self.next = partial(lib.kvmaio_resident_next, residents.handle, cpu.handle)

    def end(self) -> EntryResult | None:
        return self._cpu.burst_ended()

    def words(self, key: int) -> Any:
        page = self._cpu.page
        is_pio, size = key & 1, key >> 2 & 15
        start = ffi.cast("uint8_t *", page) + lib.KVMAIO_PIO_DATA if is_pio else page.mmio.data
        return ffi.cast(_WORDS[size], start)

    def take_ns(self) -> int:
        taken_ns: int = self._handle.burst_ns
        self._handle.burst_ns = 0
        return taken_ns

    @property
    def executed_ns(self) -> int:
        executed_ns: int = self._handle.executed_ns
        return executed_ns
