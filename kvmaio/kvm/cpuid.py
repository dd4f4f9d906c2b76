"""What a guest is told of its processor: CPUID tables, and policies that make them.

Sources: SDM vol. 2A, CPUID; APM vol. 3, appendix E; the kernel's
``Documentation/virt/kvm/api.rst``, KVM_GET_SUPPORTED_CPUID.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import attrs

from ..errors import ConfigurationError
from ._native import ffi, lib
from .gate import check

__all__ = ["POLICIES", "CpuidEntry", "CpuidTable", "read_entries", "select", "write_entries"]

_INDEXED = lib.KVM_CPUID_FLAG_SIGNIFCANT_INDEX


@attrs.frozen
class CpuidEntry:
    """What CPUID answers for EAX = `function` and, if flags bit 0 is set, ECX = `index`."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


CpuidTable = Mapping[Any, Sequence[int]] | Iterable[CpuidEntry]
"""Function, or (function, index) -> (eax, ebx, ecx, edx); or entries."""

POLICIES = ("host", "emulator-safe", "common")


class CpuidSource(Protocol):
    """What `select` needs to know of the host."""

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]: ...


# ---- to and from the kernel ---------------------------------------------------


def read_entries(fd: int, request: int, operation: str) -> tuple[CpuidEntry, ...]:
    """The entries that an ioctl of the kvm_cpuid2 kind reports."""
    capacity = 64
    while True:
        table = ffi.new("struct kvm_cpuid2 *", [capacity, capacity])
        result = lib.kvmaio_ioctl(fd, request, table)
        if result != -errno.E2BIG or capacity > 4096:
            break
        capacity *= 2
    check(result, operation)
    return tuple(
        CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
        for e in (table.entries[i] for i in range(table.nent))
    )


def write_entries(fd: int, entries: Sequence[CpuidEntry]) -> None:
    """KVM_SET_CPUID2: fix what the vCPU tells its guest, before its first entry."""
    table = ffi.new("struct kvm_cpuid2 *", [len(entries), len(entries)])
    for slot, entry in enumerate(entries):
        for name, value in attrs.asdict(entry).items():
            setattr(table.entries[slot], name, value)
    check(lib.kvmaio_ioctl(fd, lib.KVM_SET_CPUID2, table), "KVM_SET_CPUID2")


# ---- policies -------------------------------------------------------------------


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


_ALL = 0xFFFFFFFF

# (function, index, register) -> features whose instructions KVM's emulator cannot execute, or
# executes wrongly (LZCNT, TZCNT), and what builds on them. On PVM it runs the guest's kernel, and
# kernels choose instructions by these bits. Each was tried there, in real and in 64-bit mode.
_NOT_EMULATED: dict[tuple[int, int, str], int] = {
    # SSE3, PCLMULQDQ, MONITOR, SSSE3, FMA, CX16, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE,
    # OSXSAVE, AVX, F16C, RDRAND
    (1, 0, "ecx"): _bits(0, 1, 3, 9, 12, 13, 19, 20, 22, 23, 25, 26, 27, 28, 29, 30),
    # BMI1, AVX2, BMI2, INVPCID, RTM, AVX-512 F and DQ, RDSEED, ADX, SMAP (STAC, CLAC), AVX-512
    # IFMA, CLWB, AVX-512 PF, ER, CD, SHA, AVX-512 BW and VL
    (7, 0, "ebx"): _bits(3, 5, 8, 10, 11, 16, 17, 18, 19, 20, 21, 24, 26, 27, 28, 29, 30, 31),
    # AVX-512 VBMI, PKU, OSPKE, WAITPKG, VBMI2, CET_SS, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG,
    # VPOPCNTDQ, RDPID, CLDEMOTE, MOVDIRI, MOVDIR64B, ENQCMD
    (7, 0, "ecx"): _bits(1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 22, 25, 27, 28, 29),
    # AVX-512 4VNNIW and 4FMAPS, UINTR, AVX-512 VP2INTERSECT, MD_CLEAR (VERW), PCONFIG, CET_IBT,
    # AMX BF16, FP16, TILE and INT8
    (7, 0, "edx"): _bits(2, 3, 5, 8, 10, 18, 20, 22, 23, 24, 25),
    (7, 1, "eax"): _ALL,  # AVX-VNNI, AVX-512 BF16, and what came later
    (7, 1, "edx"): _ALL,
    (0x80000001, 0, "ecx"): _bits(5, 11, 15, 16, 21, 29),  # LZCNT, XOP, LWP, FMA4, TBM, MONITORX
    (0x80000001, 0, "edx"): _bits(27),  # RDTSCP
    (0x80000008, 0, "ebx"): _bits(0),  # CLZERO
}
# Leaves that only describe features masked above: XSAVE, AMX, AVX10.
_NOT_EMULATED_LEAVES = {0xD, 0x1D, 0x1E, 0x24}

# What the software CPU has: a mask of features by register; a leaf's other registers are no
# feature words and stay. No AVX, FMA, PCID, x2APIC or TSC deadline.
_COMMON: dict[tuple[int, int, str], int] = {
    (1, 0, "ecx"): _bits(31),  # a hypervisor is present; the rest is not emulator-safe
    # FPU, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFLUSH,
    # MMX, FXSR, SSE, SSE2, SS, HTT
    (1, 0, "edx"): _bits(
        *(0, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27, 28)
    ),
    (7, 0, "ebx"): _bits(0, 7, 9),  # FSGSBASE, SMEP, ERMS
    (7, 0, "ecx"): 0,
    (7, 0, "edx"): 0,
    (6, 0, "eax"): 0,  # thermal and power management
    (0xA, 0, "eax"): 0,  # no performance counters
    (0x80000001, 0, "ecx"): _bits(0, 1),  # LAHF in long mode, CMP_LEGACY
    # as leaf 1, then SYSCALL, NX, FXSR, long mode
    (0x80000001, 0, "edx"): _bits(
        *(0, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 20, 23, 24, 29)
    ),
    (0x80000007, 0, "edx"): _bits(8),  # invariant TSC
    (0x80000008, 0, "ebx"): 0,
}

# KVM announces itself here; Linux would then use VMMCALL, which never returns on PVM.
_KVM_SIGNATURE = 0x40000000
_HYPERVISOR_LEAVES = range(0x40000000, 0x40010000)
# Topology of the host that must not shine through: extended (Intel), extended (AMD).
_HOST_TOPOLOGY = {0x1F, 0x80000026}


def select(
    kvm: CpuidSource,
    policy: str | CpuidTable,
    vcpu_id: int = 0,
    vcpus: int = 1,
    *,
    local_apic: bool = True,
    plain_apic: bool = False,
) -> list[CpuidEntry]:
    """The table for one vCPU of a machine with `vcpus`, by a policy or as given.

    Policies: ``"host"`` (all that this host's KVM offers), ``"emulator-safe"``
    (without what KVM's instruction emulator cannot execute, and without KVM's
    own signature), ``"common"`` (of that, only what the software CPU has as
    well, for hand-over). The guest sees one package of `vcpus` cores with one
    thread each; the APIC id is `vcpu_id`. An explicit table is kept as it is
    but for the APIC id and the processor count.

    Args:
        local_apic: false hides APIC, x2APIC and the TSC deadline timer.
        plain_apic: true hides the last two only.

    Raises:
        ConfigurationError: an unknown policy, or a malformed table.
    """
    if isinstance(policy, str):
        entries = _by_policy(kvm.supported_cpuid(), policy)
        entries = [e for e in entries if e.function not in _HOST_TOPOLOGY | {0xB}]
        entries += _topology(entries, vcpu_id, vcpus)
    else:
        entries = _explicit(policy)
    entries = [_identified(entry, vcpu_id, vcpus) for entry in entries]
    if not local_apic:
        entries = [_masked(entry, _NO_APIC, keep=False) for entry in entries]
    if plain_apic:
        entries = [_masked(entry, _PLAIN_APIC, keep=False) for entry in entries]
    return sorted(entries, key=lambda entry: (entry.function, entry.index))


_PLAIN_APIC = {(1, 0, "ecx"): _bits(21, 24)}

_NO_APIC = _PLAIN_APIC | {
    (1, 0, "edx"): _bits(9),
    (0x80000001, 0, "edx"): _bits(9),
}


def _by_policy(supported: Sequence[CpuidEntry], policy: str) -> list[CpuidEntry]:
    match policy:
        case "host":
            return list(supported)
        case "emulator-safe":
            return _emulator_safe(supported)
        case "common":
            return [_masked(entry, _COMMON, keep=True) for entry in _emulator_safe(supported)]
        case _:
            choices = ", ".join(f'"{name}"' for name in POLICIES)
            raise ConfigurationError(
                f"cpuid={policy!r} is no CPUID policy; there are {choices}, or give a table"
            )


def _emulator_safe(supported: Sequence[CpuidEntry]) -> list[CpuidEntry]:
    entries = [
        _masked(entry, _NOT_EMULATED, keep=False)
        for entry in supported
        if entry.function not in _NOT_EMULATED_LEAVES and entry.function not in _HYPERVISOR_LEAVES
    ]
    # An empty leaf, since a missing one reads as the highest basic leaf on Intel.
    return [*entries, CpuidEntry(_KVM_SIGNATURE)]


def _masked(
    entry: CpuidEntry, masks: Mapping[tuple[int, int, str], int], *, keep: bool
) -> CpuidEntry:
    """`entry` with only (`keep`), or without, the bits in `masks`."""
    changes = {}
    for register in ("eax", "ebx", "ecx", "edx"):
        mask = masks.get((entry.function, entry.index, register))
        if mask is not None:
            changes[register] = getattr(entry, register) & (mask if keep else ~mask & _ALL)
    return attrs.evolve(entry, **changes) if changes else entry


# ---- which processor of how many -----------------------------------------------


def _topology(entries: Sequence[CpuidEntry], vcpu_id: int, vcpus: int) -> list[CpuidEntry]:
    """Leaf 0xB, if the table reaches so far: level 0 is the thread, level 1 the core."""
    highest = max((entry.eax for entry in entries if entry.function == 0), default=0)
    if highest < 0xB:
        return []
    return [
        CpuidEntry(0xB, 0, _INDEXED, eax=0, ebx=1, ecx=0x100, edx=vcpu_id),
        CpuidEntry(0xB, 1, _INDEXED, eax=_width(vcpus), ebx=vcpus, ecx=0x201, edx=vcpu_id),
        CpuidEntry(0xB, 2, _INDEXED, eax=0, ebx=0, ecx=2, edx=vcpu_id),
    ]


def _width(count: int) -> int:
    """Bits of an APIC id that tell `count` processors apart."""
    return (count - 1).bit_length()


def _identified(entry: CpuidEntry, vcpu_id: int, vcpus: int) -> CpuidEntry:
    """`entry` with this vCPU's number, and the machine's number of cores."""
    match entry.function:
        case 1:
            # EBX 31:24 the initial APIC id, 23:16 logical processors, valid if EDX 28 (HTT) is set.
            ebx = entry.ebx & 0xFFFF | (vcpu_id & 0xFF) << 24 | min(vcpus, 255) << 16
            edx = entry.edx & ~_bits(28) | (_bits(28) if vcpus > 1 else 0)
            return attrs.evolve(entry, ebx=ebx, edx=edx)
        case 4 if entry.eax & 0x1F:
            # EAX 31:26 cores of the package - 1; 25:14 processors sharing this cache - 1.
            level = entry.eax >> 5 & 7
            shared = min(vcpus, 64) - 1
            eax = entry.eax & 0x3FFF | shared << 26 | (shared << 14 if level >= 3 else 0)
            return attrs.evolve(entry, eax=eax)
        case 0xB:
            return attrs.evolve(entry, edx=vcpu_id)
        case 0x80000001:
            # ECX 1 (CMP_LEGACY): more than one core; 22 (TOPOEXT): leaves 0x8000001D and 1E.
            ecx = entry.ecx & ~_bits(1) | (_bits(1) if vcpus > 1 else 0)
            return attrs.evolve(entry, ecx=ecx)
        case 0x80000008:
            # ECX 7:0 cores - 1, 15:12 the width of the core id.
            ecx = entry.ecx & ~0xF0FF | min(vcpus - 1, 255) | _width(vcpus) << 12
            return attrs.evolve(entry, ecx=ecx)
        case 0x8000001D if entry.eax & 0x1F:
            level = entry.eax >> 5 & 7
            shared = vcpus - 1 if level >= 3 else 0
            return attrs.evolve(entry, eax=entry.eax & 0x3FFF | shared << 14)
        case 0x8000001E:
            # EAX the APIC id; EBX 7:0 the core, 15:8 threads per core - 1; ECX the node.
            return attrs.evolve(entry, eax=vcpu_id, ebx=vcpu_id & 0xFF, ecx=0)
        case _:
            return entry


# ---- a user's own table ---------------------------------------------------------


def _explicit(table: CpuidTable) -> list[CpuidEntry]:
    if not isinstance(table, Mapping):
        entries = list(table)
        for entry in entries:
            if not isinstance(entry, CpuidEntry):
                raise ConfigurationError(f"a CPUID table of entries holds {entry!r}")
        return entries
    entries = []
    for key, values in table.items():
        function, index = key if isinstance(key, tuple) else (key, 0)
        if len(values) != 4 or any(not 0 <= value <= _ALL for value in (function, index, *values)):
            raise ConfigurationError(
                f"the CPUID table's entry {key!r}: {values!r} is not (eax, ebx, ecx, edx) "
                "of 32 bits each"
            )
        flags = _INDEXED if isinstance(key, tuple) else 0
        entries.append(CpuidEntry(function, index, flags, *values))
    return entries
