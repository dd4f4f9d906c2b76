"""Accesses of a KVM vCPU, back to back; see `kvmaio.access_burst`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..access_burst import AccessBurst, function_address
from ..cpu import EntryResult
from ._native import ffi, lib

if TYPE_CHECKING:
    from .cpu import KvmCpu

__all__ = ["NativeBurst", "ResidentBurst"]


class NativeBurst(AccessBurst):
    """Of a vCPU on its own thread: a burst is one access long, and its way back in."""

    __slots__ = ("_cpu",)

    takes_notes = True
    again_at = function_address(ffi, lib, "kvmaio_vcpu_again")
    _again = staticmethod(lib.kvmaio_vcpu_again)

    def __init__(self, cpu: KvmCpu) -> None:
        super().__init__(cpu.handle, cpu.page, ffi)
        self._cpu = cpu

    def begin(self, told: bool) -> None:
        super().begin(told)
        self._state.entered = self._state.noted = 0
        self.note_by(None)

    @property
    def must_write(self) -> bool:
        return bool(self._state.held == lib.KVMAIO_HELD_TO_WRITE)

    def note_by(self, note: Any) -> None:
        self._state.notes, self._state.kind = note or (ffi.NULL, ffi.NULL)

    def take_ns(self) -> int:
        taken_ns: int = self._state.executed_ns
        self._state.executed_ns = 0
        return taken_ns

    @property
    def executed_ns(self) -> int:
        return self._cpu.executed_ns

    def is_running(self) -> bool:
        return bool(lib.kvmaio_vcpu_is_running(self.handle))

    def end(self) -> EntryResult | None:
        return self._cpu.enter(None)


class ResidentBurst(NativeBurst):
    """Of a vCPU on the loop's thread: it goes on until something else than an access comes."""

    __slots__ = ()

    again_at = function_address(ffi, lib, "kvmaio_resident_again")
    _again = staticmethod(lib.kvmaio_resident_again)

    def end(self) -> EntryResult | None:
        return self._cpu.burst_ended(self._state.end)
