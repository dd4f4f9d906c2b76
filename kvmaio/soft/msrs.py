"""The MSRs that are state of the software CPU (SDM vol. 4, chapter 2)."""

from __future__ import annotations

__all__ = ["MSRS"]

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
