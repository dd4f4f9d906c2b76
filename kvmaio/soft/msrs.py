"""The MSRs that are state of the software CPU (SDM vol. 4, chapter 2)."""

from __future__ import annotations

__all__ = ["MSRS", "is_as_after_reset"]

MSRS = (
    0x10,  # TSC
    0x1B,  # APIC_BASE
    *(0x174, 0x175, 0x176),  # SYSENTER
    0x277,  # PAT
    *range(0x200, 0x210),  # memory type ranges: variable,
    *(0x250, 0x258, 0x259, *range(0x268, 0x270)),  # fixed,
    0x2FF,  # and the default
    *(0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084),  # SYSCALL
    *(0xC0000102, 0xC0000103),  # KERNEL_GS_BASE, TSC_AUX
)

# Of those that only KVM has: what tells of the processor, and no guest can write,
_INFORMATION = frozenset(
    {
        0x8B,  # microcode revision
        0xCE,  # PLATFORM_INFO
        0x10A,  # ARCH_CAPABILITIES
        0x345,  # PERF_CAPABILITIES
        *range(0x480, 0x494),  # what VMX can do
        *(0x40000010, 0x40000020),  # Hyper-V's clocks: of the CPU and of the machine,
        *(0x40000022, 0x40000023),  # and the frequencies of the TSC and the APIC
    }
)
# and what is not 0 after a reset (KVM: kvm_vcpu_reset, kvm_arch_vcpu_create).
_RESET = {
    0x9E: 0x30000,  # SMBASE
    0x1A0: 1,  # MISC_ENABLE: fast strings
    0xC0000104: 1 << 32,  # TSC_RATIO: 1.0
    0xC0010015: 1 << 24,  # HWCR: the time stamp counter's frequency is fixed
    0x4B564D05: 1,  # KVM's, for the host's polling
}
# Bits that no guest can write.
_READ_ONLY = {0x1A0: 0x1800}  # MISC_ENABLE: neither BTS nor PEBS


def is_as_after_reset(index: int, value: int) -> bool:
    """Is there nothing to an MSR of KVM's that somebody would miss?"""
    state = value & ~_READ_ONLY.get(index, 0)
    return index in _INFORMATION or state in (0, _RESET.get(index, 0))
