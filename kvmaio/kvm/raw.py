"""`RawRegisters`: a vCPU's registers as KVM gives them, for another CPU model in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import state
from ._native import ffi, lib
from .gate import check

if TYPE_CHECKING:
    from .cpu import KvmCpu

__all__ = ["RawRegisters"]

_MSR_TSC, _MSR_TSC_AUX = 0x10, 0xC0000103


class RawRegisters:
    """kvm_regs, the beginning of kvm_sregs and the XSAVE area of one vCPU.

    Attributes:
        regs, sregs, xsave: where they lie; whoever is given these addresses edits in place.
    """

    def __init__(self, cpu: KvmCpu) -> None:
        self._cpu = cpu
        self._get_xsave = cpu.get_xsave
        self._regs = ffi.new("struct kvm_regs *")
        self._sregs = ffi.new("struct kvm_sregs *")
        self._xsave = ffi.new("char[]", cpu.xsave_size)
        self._before: tuple[bytes, bytes] = b"", b""
        self.regs, self.sregs, self.xsave = (
            int(ffi.cast("uintptr_t", part)) for part in (self._regs, self._sregs, self._xsave)
        )

    def fetch(self) -> None:
        """Have them as they are now; the guest must not be running, no access pending."""
        fd = self._cpu.fd
        check(lib.kvmaio_ioctl(fd, lib.KVM_GET_REGS, self._regs), "KVM_GET_REGS")
        check(lib.kvmaio_ioctl(fd, lib.KVM_GET_SREGS, self._sregs), "KVM_GET_SREGS")
        check(lib.kvmaio_ioctl(fd, self._get_xsave, self._xsave), "KVM_GET_XSAVE")
        self._before = self._parts()

    def put_back(self) -> None:
        """Give KVM what has changed."""
        fd = self._cpu.fd
        sregs, xsave = self._parts()
        if sregs != self._before[0]:
            check(lib.kvmaio_ioctl(fd, lib.KVM_SET_SREGS, self._sregs), "KVM_SET_SREGS")
        if xsave != self._before[1]:
            check(lib.kvmaio_ioctl(fd, lib.KVM_SET_XSAVE, self._xsave), "KVM_SET_XSAVE")
        check(lib.kvmaio_ioctl(fd, lib.KVM_SET_REGS, self._regs), "KVM_SET_REGS")
        self._cpu.registers_changed(int(self._sregs.cr8))

    def _parts(self) -> tuple[bytes, bytes]:
        return bytes(ffi.buffer(self._sregs)), bytes(ffi.buffer(self._xsave))

    @property
    def xcr0(self) -> int:
        """XCR0, asked of KVM each time."""
        return state.get_xcrs(self._cpu.fd).get(0, 1)

    @xcr0.setter
    def xcr0(self, value: int) -> None:
        state.set_xcrs(self._cpu.fd, {0: value})

    @property
    def clock(self) -> dict[int, int]:
        """The MSRs that RDTSCP reads: the time stamp counter and its companion."""
        return state.get_msrs(self._cpu.fd, (_MSR_TSC, _MSR_TSC_AUX))
