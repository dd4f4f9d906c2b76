"""The gate between the C core and Python: negative results become HostErrors with hints."""

from __future__ import annotations

import errno

from ..errors import HostError

__all__ = ["check", "host_error"]

_NO_DEVICE = (
    "there is no KVM here: load kvm_intel or kvm_amd, switch on virtualisation in the firmware "
    '(or nested virtualisation on the outer host), or use cpu="soft"'
)
_NO_ACCESS = 'is this user in the group "kvm"? (sudo usermod -aG kvm $USER, then log in again)'
_BAD_SREGS = (
    "the registers contradict each other (CR0, CR4, EFER and segments), or set bits that the "
    "guest's CPUID does not offer"
)

# What to do about an error: by operation where it means something special
# there, else by the errno alone.
_HINTS: dict[tuple[str, int], str] = {
    ("open", errno.ENOENT): _NO_DEVICE,
    ("open", errno.ENODEV): _NO_DEVICE,
    ("open", errno.ENXIO): _NO_DEVICE,
    ("open", errno.EACCES): _NO_ACCESS,
    ("open", errno.EPERM): _NO_ACCESS,
    ("KVM_GET_API_VERSION", errno.ENOTTY): "this is not KVM's device",
    ("KVM_CREATE_VM", errno.EBUSY): (
        "another hypervisor (VirtualBox, VMware) holds the processor's virtualisation"
    ),
    ("KVM_CREATE_VM", errno.ENOMEM): "the host has no memory left for another machine",
    ("KVM_CREATE_VCPU", errno.EEXIST): "this machine already has a vCPU with that number",
    ("KVM_CREATE_VCPU", errno.EINVAL): "the number of vCPUs is above what this host allows",
    ("KVM_CREATE_IRQCHIP", errno.EINVAL): "it must be created before the first vCPU",
    ("KVM_CREATE_IRQCHIP", errno.EEXIST): "this machine already has one",
    ("KVM_CREATE_PIT2", errno.ENOENT): "the PIT needs the in-kernel interrupt controllers first",
    ("KVM_CREATE_PIT2", errno.EEXIST): "this machine already has one",
    ("KVM_SET_USER_MEMORY_REGION", errno.EEXIST): "the memory overlaps another slot",
    ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL): (
        "address or size is not a multiple of the page size, or beyond the guest's address space"
    ),
    ("KVM_SET_GSI_ROUTING", errno.EINVAL): (
        "a pin or a type is out of range, or the machine has no in-kernel irqchip"
    ),
    ("KVM_IRQ_LINE", errno.ENXIO): "the machine has no in-kernel interrupt controllers",
    ("KVM_IRQFD", errno.EBUSY): "this eventfd is already bound to an interrupt line",
    ("KVM_IRQFD", errno.EINVAL): "the machine has no in-kernel irqchip, or this is no eventfd",
    ("KVM_IOEVENTFD", errno.EEXIST): "an eventfd is already bound to this address",
    ("KVM_IOEVENTFD", errno.ENOENT): "no such eventfd is bound to this address",
    ("KVM_REGISTER_COALESCED_MMIO", errno.ENOSPC): "the machine has too many coalesced ranges",
    ("KVM_CREATE_DEVICE", errno.ENODEV): "this host's KVM has no such device",
    ("KVM_SET_SREGS", errno.EINVAL): _BAD_SREGS,
    ("KVM_SET_SREGS2", errno.EINVAL): _BAD_SREGS,
    ("KVM_SET_XSAVE", errno.EINVAL): (
        "it holds components that this host lacks, or reserved bits of MXCSR are set"
    ),
    ("KVM_SET_XCRS", errno.EINVAL): "it enables components that the guest's CPUID does not offer",
    ("KVM_SET_CPUID2", errno.EINVAL): (
        "the table is impossible, or the vCPU has run: the table is fixed at its first entry"
    ),
    ("KVM_SET_CPUID2", errno.E2BIG): "too many CPUID entries",
    ("KVM_SET_MP_STATE", errno.EINVAL): (
        "without an in-kernel local APIC a vCPU can only be runnable"
    ),
    ("KVM_RUN", errno.EFAULT): (
        "the guest touched a memory slot whose host memory is not there any more"
    ),
}
_HINTS_BY_ERRNO: dict[int, str] = {
    errno.EMFILE: "this process has too many open files; close machines, or raise ulimit -n",
    errno.ENFILE: "the host has too many open files",
    errno.ENOMEM: "the host has no memory left for this",
    errno.ENOTTY: "this host's KVM does not know this operation; a newer kernel might",
}


def check(result: int, operation: str, hint: str = "") -> int:
    """The one gate between the C core and Python: `result`, or a HostError if it is negative.

    Args:
        result: a function's value; negative ones are -errno.
        operation: the ioctl's or system call's name, with details after a space.
        hint: what to do; without it, one that is known for this operation and errno.
    """
    if result >= 0:
        return result
    raise host_error(operation, -result, hint)


def host_error(operation: str, number: int, hint: str = "") -> HostError:
    """The error for `operation` failing with errno `number`, with the hint known for it."""
    name = operation.partition(" ")[0]
    known = _HINTS.get((name, number))
    return HostError(operation, number, hint or known or _HINTS_BY_ERRNO.get(number, ""))
