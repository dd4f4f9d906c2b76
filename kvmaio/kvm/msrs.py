"""Model-specific registers: get and set many, of which a host may refuse some.

Source: api.rst, KVM_GET_MSRS and KVM_SET_MSRS.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence

from ._native import ffi, lib
from .gate import check

__all__ = ["MTRRS", "describe_msrs", "get_msrs", "set_msrs"]

MSR_IA32_TSC = 0x10
MSR_IA32_TSC_DEADLINE = 0x6E0

# State that KVM keeps but leaves out of its list: the memory type ranges, variable (8 pairs),
# fixed, and the default (SDM vol. 3A, 12.11). Firmware sets them and kernels compare them.
MTRRS = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)

_AT_MOST = 255  # entries in one call (fewer than MAX_IO_MSRS in the kernel)


def get_msrs(fd: int, indices: Iterable[int]) -> dict[int, int]:
    """Index -> value of those of `indices` that this vCPU lets be read."""
    entries = [(index, 0) for index in indices]
    return dict(_transfer(fd, lib.KVM_GET_MSRS, "KVM_GET_MSRS", entries))


def set_msrs(fd: int, msrs: Mapping[int, int]) -> dict[int, int]:
    """Write MSRs; returns those that the host refused, and that do not hold the value already."""
    # The time stamp counter first, the deadline that counts by it last.
    order = sorted(
        msrs.items(),
        key=lambda entry: (entry[0] == MSR_IA32_TSC_DEADLINE, entry[0] != MSR_IA32_TSC),
    )
    taken = _transfer(fd, lib.KVM_SET_MSRS, "KVM_SET_MSRS", order)
    refused = msrs.keys() - {index for index, _ in taken}
    if not refused:
        return {}
    present = get_msrs(fd, refused)
    return {
        index: value
        for index, value in msrs.items()
        if index in refused and present.get(index) != value
    }


def _transfer(
    fd: int, request: int, operation: str, entries: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The entries that were transferred, with their values.

    The kernel stops at the first entry that it refuses and returns how many
    came before: go on behind it.
    """
    done: list[tuple[int, int]] = []
    start = 0
    while start < len(entries):
        part = entries[start : start + _AT_MOST]
        msrs = ffi.new("struct kvm_msrs *", [len(part), len(part)])
        for slot, (index, value) in enumerate(part):
            msrs.entries[slot].index = index
            msrs.entries[slot].data = value
        count = lib.kvmaio_ioctl(fd, request, msrs)
        if count == -errno.EINVAL:  # some kernels, when already the first is refused
            count = 0
        check(count, operation)
        done += [(msrs.entries[i].index, msrs.entries[i].data) for i in range(count)]
        start += count if count == len(part) else count + 1
    return done


def describe_msrs(refused: Iterable[int], of: int) -> str:
    """One line for any number of refused MSRs."""
    indices = sorted(refused)
    shown = ", ".join(f"{index:#x}" for index in indices[:12])
    more = f" and {len(indices) - 12} more" if len(indices) > 12 else ""
    return f"{len(indices)} of {of} MSRs: {shown}{more}"
