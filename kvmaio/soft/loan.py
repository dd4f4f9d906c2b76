"""`Loan`: the registers of another CPU model, for as long as a few instructions take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..cpu import SystemState
from ._soft import ffi, lib
from .msrs import MSRS

if TYPE_CHECKING:
    from .cpu import SoftCpu

__all__ = ["Loan"]

_TSC, _APIC_BASE = 0x10, 0x1B
_TAKEN = tuple(index for index in MSRS if index != _APIC_BASE)  # which is in kvm_sregs


class Lender(Protocol):
    """Where the other model's registers lie, in the kernel's structures."""

    regs: int
    sregs: int
    xsave: int

    def system(self, msrs: tuple[int, ...]) -> SystemState:
        """What else an instruction may look at; of the MSRs, those with these indices."""

    def change_system(self, before: SystemState, after: SystemState) -> None:
        """Take over what differs between the two."""


class Loan:
    """Takes registers where they lie, and puts them back there."""

    def __init__(self, cpu: SoftCpu) -> None:
        self._cpu = cpu
        self._lender: Lender | None = None

    def take(self, lender: Lender, *, whole: bool) -> None:
        """Have the CPU go on from there. Memory has been another's: translations are forgotten,
        those at RIP, or all if more than an instruction is to be executed (`whole`).
        """
        if lender is not self._lender:
            self._lender = lender
            self._parts = (
                ffi.cast("struct kvm_regs *", lender.regs),
                ffi.cast("struct kvm_sregs *", lender.sregs),
                ffi.cast("uint8_t *", lender.xsave),
            )
        lib.kvmaio_soft_borrow(self._cpu.handle, *self._parts, whole)

    def give_back(self) -> None:
        """Put the registers where they were taken from; what is not the CPU's stays."""
        lib.kvmaio_soft_give_back(self._cpu.handle, *self._parts)

    def take_system(self, lender: Lender) -> None:
        """What else an instruction may look at, behind `take()`."""
        cpu, system = self._cpu, lender.system(_TAKEN)
        cpu.set_msrs(system.msrs)
        if 0 in system.xcrs:
            cpu.xcr0 = system.xcrs[0]
        cpu.set_debug_registers(system.debug_registers)
        cpu.set_events(system.events)
        self._tsc_offset = int(cpu.handle.tsc_offset)
        self._system = cpu.system()

    def give_system_back(self, lender: Lender) -> None:
        """What the guest has changed of it, behind the registers."""
        after = self._cpu.system()
        if int(self._cpu.handle.tsc_offset) == self._tsc_offset:
            # The time stamp counter went on meanwhile, over there as well, and by its own clock.
            after.msrs.pop(_TSC, None)
        lender.change_system(self._system, after)
