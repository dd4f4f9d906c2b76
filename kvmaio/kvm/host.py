"""The host's KVM: `/dev/kvm` and its capabilities, and the one gate for errors.

Source: the Linux kernel's ``Documentation/virt/kvm/api.rst``, section 4.
"""

from __future__ import annotations

import errno
import os
import stat
from functools import cache
from pathlib import Path
from types import TracebackType

from ..errors import HostError
from ._native import ffi, lib
from .cpuid import CpuidEntry, read_entries
from .gate import check, host_error

__all__ = ["Kvm", "check", "is_virtual", "kvm_kind", "usable"]

DEVICE = "/dev/kvm"

# Without these the engine cannot work; both are in every kernel from 4.17 on.
_REQUIRED = {
    "KVM_CAP_USER_MEMORY": lib.KVM_CAP_USER_MEMORY,
    "KVM_CAP_SET_TSS_ADDR": lib.KVM_CAP_SET_TSS_ADDR,
    "KVM_CAP_EXT_CPUID": lib.KVM_CAP_EXT_CPUID,
    "KVM_CAP_MP_STATE": lib.KVM_CAP_MP_STATE,
    "KVM_CAP_VCPU_EVENTS": lib.KVM_CAP_VCPU_EVENTS,
    "KVM_CAP_IMMEDIATE_EXIT": lib.KVM_CAP_IMMEDIATE_EXIT,
    "KVM_CAP_SYNC_REGS": lib.KVM_CAP_SYNC_REGS,
}


class Kvm:
    """The open `/dev/kvm`: what this host's KVM can do.

    Attributes:
        fd: its file descriptor; -1 once closed.
        vcpu_page_size: bytes to map for a vCPU's run page.
    """

    def __init__(self, fd: int) -> None:
        """Take over `fd`; users call `Kvm.open()`."""
        self.fd = fd
        self._capabilities: dict[int, int] = {}
        self._supported_cpuid: tuple[CpuidEntry, ...] | None = None
        self._msr_indices: tuple[int, ...] | None = None
        self._verify()
        self.vcpu_page_size = check(
            lib.kvmaio_ioctl_value(fd, lib.KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE"
        )

    @classmethod
    def open(cls, path: str = DEVICE) -> Kvm:
        """Open KVM's device.

        Raises:
            HostError: it is not there, not ours to open, not KVM, or too old.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise host_error(f"open {path}", error.errno or errno.EIO) from None
        try:
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def _verify(self) -> None:
        version = check(
            lib.kvmaio_ioctl_value(self.fd, lib.KVM_GET_API_VERSION, 0), "KVM_GET_API_VERSION"
        )
        if version != lib.KVM_API_VERSION:
            raise HostError(
                "KVM_GET_API_VERSION",
                errno.ENOTSUP,
                f"version {version}, and only {lib.KVM_API_VERSION} is known",
            )
        missing = [name for name, number in _REQUIRED.items() if not self.capability(number)]
        if missing:
            raise HostError(
                "KVM_CHECK_EXTENSION",
                errno.ENOTSUP,
                f"this host's KVM lacks {', '.join(missing)}; Linux 4.17 or later has it",
            )

    def close(self) -> None:
        """Close the device; machines made from it live on. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Kvm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def capability(self, number: int) -> int:
        """The value of a KVM_CAP_* capability: 0 if it is missing; asked once."""
        if (value := self._capabilities.get(number)) is None:
            value = check(
                lib.kvmaio_ioctl_value(self.fd, lib.KVM_CHECK_EXTENSION, number),
                f"KVM_CHECK_EXTENSION {number}",
            )
            self._capabilities[number] = value
        return value

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """The CPUID entries that this host's KVM can offer to a guest."""
        if self._supported_cpuid is None:
            self._supported_cpuid = read_entries(
                self.fd, lib.KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID"
            )
        return self._supported_cpuid

    def msr_indices(self) -> tuple[int, ...]:
        """The MSRs that make up a vCPU's state on this host; some may still refuse."""
        if self._msr_indices is None:
            probe = ffi.new("struct kvm_msr_list *", [0, 0])
            result = lib.kvmaio_ioctl(self.fd, lib.KVM_GET_MSR_INDEX_LIST, probe)
            if result != -errno.E2BIG:  # the expected answer: it fills in how many there are
                check(result, "KVM_GET_MSR_INDEX_LIST")
            count = probe.nmsrs
            msrs = ffi.new("struct kvm_msr_list *", [count, count])
            check(
                lib.kvmaio_ioctl(self.fd, lib.KVM_GET_MSR_INDEX_LIST, msrs),
                "KVM_GET_MSR_INDEX_LIST",
            )
            self._msr_indices = tuple(msrs.indices[i] for i in range(msrs.nmsrs))
        return self._msr_indices

    @property
    def kind(self) -> str:
        """Which KVM this is: "VMX", "SVM", "PVM", or "unknown"."""
        return kvm_kind()

    @property
    def emulates_kernel_code(self) -> bool:
        """Is all but 64-bit CPL3 code run by KVM's instruction emulator? True on PVM."""
        return self.kind == "PVM"


_MODULES = {"kvm_pvm": "PVM", "kvm_intel": "VMX", "kvm_amd": "SVM"}
_CPU_FLAGS = {"VMX": "vmx", "SVM": "svm"}


@cache
def kvm_kind(modules: Path = Path("/sys/module"), cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Which vendor module serves `/dev/kvm`: "VMX", "SVM", "PVM", or "unknown".

    KVM itself does not tell. The module that is loaded does; one built into
    the kernel is listed even where it found no such processor and gave up, so
    if there are several, a VMX or SVM that the processor lacks is ruled out.
    Still several: "unknown", never a guess.
    """
    present = [kind for name, kind in _MODULES.items() if (modules / name).exists()]
    if len(present) > 1:
        flags = _cpu_flags(cpuinfo)
        present = [kind for kind in present if _CPU_FLAGS.get(kind, "") in flags | {""}]
    return present[0] if len(present) == 1 else "unknown"


def is_virtual(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Is this host itself a virtual machine, as its processor tells? Then KVM here is nested."""
    return "hypervisor" in _cpu_flags(cpuinfo)


def _cpu_flags(cpuinfo: Path) -> set[str]:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()[2:]) for line in lines if line.startswith("flags")), set())


def usable(path: str = DEVICE) -> str | None:
    """Why this process cannot use KVM, in one line with what to do; None if it can."""
    try:
        if not stat.S_ISCHR(os.stat(path).st_mode):
            return f"{path} is not a device"
    except OSError:
        pass  # opening it tells why
    try:
        with Kvm.open(path) as kvm:
            # Only this shows that the processor's virtualisation can be had.
            os.close(check(lib.kvmaio_ioctl_value(kvm.fd, lib.KVM_CREATE_VM, 0), "KVM_CREATE_VM"))
    except HostError as error:
        return str(error)
    return None
