"""`RawRegisters`: a vCPU's registers as KVM gives them, for another CPU model in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cpu import SystemState
from . import state
from ._native import ffi, lib
from .gate import check

if TYPE_CHECKING:
    from .cpu import KvmCpu

__all__ = ["RawRegisters"]

_CR0_PE, _RFLAGS_VM, _EFER_LMA = 1 << 0, 1 << 17, 1 << 10

_EXCEPTION = 8
"""Bytes of the exception at the beginning of kvm_vcpu_events."""

_MASKS_END = 16
"""Behind kvm_vcpu_events' exception, interrupt and NMI; flags and SMM follow."""


class RawRegisters:
    """kvm_regs, the beginning of kvm_sregs and the XSAVE area of one vCPU.

    Attributes:
        cpu: whose they are.
        regs, sregs, xsave: where they lie; whoever is given these addresses edits in place.
    """

    def __init__(self, cpu: KvmCpu) -> None:
        self.cpu = cpu
        size = cpu.xsave_size
        self._areas = [ffi.new("uint8_t[]", size) for _ in range(2)]
        self._raw = raw = ffi.new("kvmaio_raw *")
        raw.fd, raw.get_xsave, raw.xsave_size = cpu.fd, cpu.get_xsave, size
        raw.xsave, raw.xsave_before = self._areas
        self._regs, self._sregs = raw.regs, raw.sregs
        self._events = b""
        self.regs, self.sregs, self.xsave = (
            int(ffi.cast("uintptr_t", part))
            for part in (ffi.addressof(raw, "regs"), ffi.addressof(raw, "sregs"), raw.xsave)
        )

    def fetch(self) -> None:
        """Have them as they are now; the guest must not be running, no access pending."""
        self._check(lib.kvmaio_raw_fetch(self._raw))

    def where(self) -> tuple[int, int]:
        """The linear address of the next instruction, and its 16, 32 or 64 bits."""
        cs, rip = self._sregs.cs, int(self._regs.rip)
        if self._sregs.efer & _EFER_LMA and cs.l:
            return rip, 64
        is_32 = self._sregs.cr0 & _CR0_PE and not self._regs.rflags & _RFLAGS_VM and cs.db
        return int(cs.base) + rip & 0xFFFFFFFF, 32 if is_32 else 16

    def put_back(self) -> None:
        """Give KVM what has changed.

        The general registers in any case: that drops the #UD which KVM has made pending
        for the instruction that it could not emulate.
        """
        self._check(lib.kvmaio_raw_put_back(self._raw))
        self.cpu.registers_changed(int(self._sregs.cr8))

    def _check(self, result: int) -> None:
        if result < 0:
            check(result, ffi.string(self._raw.operation).decode())

    def system(self, msrs: tuple[int, ...]) -> SystemState:
        """What else an instruction may look at; of the MSRs, those with these indices."""
        fd = self.cpu.fd
        self._events = state.get_events(fd)
        return SystemState(
            state.get_msrs(fd, msrs),
            state.get_xcrs(fd),
            state.get_debug_registers(fd),
            # Without the #UD, which is of the instruction that is to be executed now.
            bytes(_EXCEPTION) + self._events[_EXCEPTION:],
        )

    def change_system(self, before: SystemState, after: SystemState) -> None:
        """Give KVM what differs between the two; behind `put_back()`."""
        fd = self.cpu.fd
        written = {i: value for i, value in after.msrs.items() if before.msrs.get(i) != value}
        if written:
            state.set_msrs(fd, written)
        if after.xcrs != before.xcrs:
            state.set_xcrs(fd, after.xcrs)
        if after.debug_registers != before.debug_registers:
            state.set_debug_registers(fd, after.debug_registers)
        if after.events != before.events:
            state.set_events(fd, after.events[:_MASKS_END] + self._events[_MASKS_END:])
