"""CPUID policies and tables."""

import attrs
import pytest

from kvmaio import ConfigurationError, HostError
from kvmaio.kvm import state
from kvmaio.kvm._native import lib
from kvmaio.kvm.cpuid import POLICIES, CpuidEntry, select

INDEXED = 1


class FakeHost:
    """A host with every feature of every leaf."""

    def __init__(self, *further: CpuidEntry) -> None:
        full = 0xFFFFFFFF
        self.entries = (
            CpuidEntry(0, eax=0x1F, ebx=0x756E6547, ecx=0x6C65746E, edx=0x49656E69),
            CpuidEntry(1, eax=0x000A0F11, ebx=full, ecx=full, edx=full),
            CpuidEntry(4, 0, INDEXED, eax=0xFFFFC121, ebx=1, ecx=63),
            CpuidEntry(4, 3, INDEXED, eax=0xFFFFC163, ebx=1, ecx=63),
            CpuidEntry(4, 4, INDEXED),
            CpuidEntry(7, 0, INDEXED, eax=1, ebx=full, ecx=full, edx=full),
            CpuidEntry(7, 1, INDEXED, eax=full, edx=full),
            CpuidEntry(0xB, 0, INDEXED, eax=7, ebx=128, ecx=0x100, edx=99),
            CpuidEntry(0xD, 0, INDEXED, eax=7, ebx=576, ecx=832),
            CpuidEntry(0xD, 2, INDEXED, eax=256, ebx=576),
            CpuidEntry(0x1F, 0, INDEXED, eax=7, ebx=128, ecx=0x100, edx=99),
            CpuidEntry(0x40000000, eax=0x40000001, ebx=0x4B4D564B, ecx=0x564B4D56, edx=0x4D),
            CpuidEntry(0x40000001, eax=full),
            CpuidEntry(0x80000000, eax=0x80000026),
            CpuidEntry(0x80000001, ecx=full, edx=full),
            CpuidEntry(0x80000008, eax=0x3030, ebx=full, ecx=0x707F),
            CpuidEntry(0x8000001D, 3, INDEXED, eax=0xFFFFC163),
            CpuidEntry(0x8000001E, eax=99, ebx=0x0163, ecx=7),
            CpuidEntry(0x80000026, 0, INDEXED, eax=7, ebx=128, ecx=0x100, edx=99),
            *further,
        )

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        return self.entries


def table(policy="host", vcpu_id=0, vcpus=1, **options):
    entries = select(FakeHost(), policy, vcpu_id, vcpus, **options)
    found = {(entry.function, entry.index): entry for entry in entries}
    assert len(found) == len(entries)
    return found


def has(word: int, *bits: int) -> list[bool]:
    return [bool(word >> bit & 1) for bit in bits]


# ---- policies --------------------------------------------------------------------------


def test_host_keeps_every_feature():
    full = table("host")
    assert full[1, 0].ecx == 0xFFFFFFFF
    assert full[7, 0].ebx == 0xFFFFFFFF
    assert full[0xD, 2].eax == 256
    assert full[0x40000000, 0].ebx == 0x4B4D564B


def test_emulator_safe_hides_what_the_emulator_lacks():
    safe = table("emulator-safe")
    cx16, movbe, popcnt, xsave, osxsave, avx = 13, 22, 23, 26, 27, 28
    assert not any(has(safe[1, 0].ecx, cx16, movbe, popcnt, xsave, osxsave, avx))
    fma, f16c = 12, 29  # AVX's encoding
    assert not any(has(safe[1, 0].ecx, fma, f16c))
    bmi1, avx2, bmi2, avx512f, clwb = 3, 5, 8, 16, 24
    assert not any(has(safe[7, 0].ebx, bmi1, avx2, bmi2, avx512f, clwb))
    lzcnt, xop, fma4 = 5, 11, 16
    assert not any(has(safe[0x80000001, 0].ecx, lzcnt, xop, fma4))
    assert (safe[7, 1].eax, safe[7, 1].edx) == (0, 0)
    smap = 20  # its STAC and CLAC surround every access to user memory
    assert not any(has(safe[7, 0].ebx, smap))
    assert not any(function == 0xD for function, _ in safe)


def test_emulator_safe_keeps_what_a_64_bit_kernel_needs():
    safe = table("emulator-safe")
    pcid, x2apic, hypervisor = 17, 21, 31
    assert all(has(safe[1, 0].ecx, pcid, x2apic, hypervisor))
    assert safe[1, 0].edx | 1 << 28 == 0xFFFFFFFF
    rdtscp = 27
    assert safe[0x80000001, 0].edx == 0xFFFFFFFF ^ 1 << rdtscp


def test_emulator_safe_masks_the_kvm_signature():
    safe = table("emulator-safe")
    assert safe[0x40000000, 0] == CpuidEntry(0x40000000)
    assert (0x40000001, 0) not in safe


def test_common_is_a_part_of_emulator_safe():
    common, safe = table("common"), table("emulator-safe")
    assert common.keys() == safe.keys()
    for key in ((1, 0), (7, 0), (0x80000001, 0)):
        for register in ("ecx", "edx"):
            ours, theirs = getattr(common[key], register), getattr(safe[key], register)
            assert ours & ~theirs == 0


def test_common_hides_what_the_software_cpu_lacks():
    common = table("common")
    fma, pcid, x2apic, tsc_deadline, avx = 12, 17, 21, 24, 28
    assert not any(has(common[1, 0].ecx, fma, pcid, x2apic, tsc_deadline, avx))
    invpcid = 10
    assert not any(has(common[7, 0].ebx, invpcid))
    assert (common[7, 0].ecx, common[7, 0].edx) == (0, 0)


def test_common_keeps_the_basics_of_x86_64():
    common = table("common")
    assert all(has(common[1, 0].edx, 0, 4, 5, 6, 8, 9, 13, 15, 24, 25, 26))
    syscall, nx, long_mode = 11, 20, 29
    assert all(has(common[0x80000001, 0].edx, syscall, nx, long_mode))


def test_unknown_policy_names_the_choices():
    with pytest.raises(ConfigurationError) as caught:
        select(FakeHost(), "max")
    assert str(caught.value) == (
        "cpuid='max' is no CPUID policy; there are "
        '"host", "emulator-safe", "common", or give a table'
    )


def test_without_a_local_apic_none_is_offered():
    bare = table("host", local_apic=False)
    assert not any(has(bare[1, 0].ecx, 21, 24)) and not any(has(bare[1, 0].edx, 9))
    assert not any(has(bare[0x80000001, 0].edx, 9))


# ---- which processor of how many ---------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("vcpu_id", "vcpus"), [(0, 1), (0, 2), (1, 2), (2, 3), (3, 4)])
def test_apic_id_and_logical_count(policy, vcpu_id, vcpus):
    entry = table(policy, vcpu_id, vcpus)[1, 0]
    assert entry.ebx >> 24 == vcpu_id
    assert entry.ebx >> 16 & 0xFF == vcpus
    assert bool(entry.edx >> 28 & 1) is (vcpus > 1)  # HTT


@pytest.mark.parametrize(
    ("vcpu_id", "vcpus", "width"), [(0, 1, 0), (1, 2, 1), (2, 3, 2), (3, 4, 2)]
)
def test_topology_is_one_package_of_single_threaded_cores(vcpu_id, vcpus, width):
    full = table("host", vcpu_id, vcpus)
    assert full[0xB, 0] == CpuidEntry(0xB, 0, INDEXED, 0, 1, 0x100, vcpu_id)
    assert full[0xB, 1] == CpuidEntry(0xB, 1, INDEXED, width, vcpus, 0x201, vcpu_id)
    assert full[0xB, 2] == CpuidEntry(0xB, 2, INDEXED, 0, 0, 2, vcpu_id)
    assert full[4, 0].eax == 0x121 | (vcpus - 1) << 26  # the first level is a core's own
    assert full[4, 3].eax == 0x163 | (vcpus - 1) << 26 | (vcpus - 1) << 14
    assert full[4, 4].eax == 0
    assert full[0x80000008, 0].ecx == vcpus - 1 | width << 12
    assert full[0x8000001D, 3].eax == 0x163 | (vcpus - 1) << 14
    assert full[0x8000001E, 0] == CpuidEntry(0x8000001E, eax=vcpu_id, ebx=vcpu_id)
    assert bool(full[0x80000001, 0].ecx >> 1 & 1) is (vcpus > 1)  # CMP_LEGACY


def test_the_hosts_topology_does_not_shine_through():
    assert not {0x1F, 0x80000026} & {function for function, _ in table("host", 1, 2)}


def test_an_old_processor_has_no_topology_leaf():
    old = FakeHost()
    old.entries = (CpuidEntry(0, eax=7), CpuidEntry(1))
    assert [entry.function for entry in select(old, "host", 1, 2)] == [0, 1]


# ---- explicit tables -----------------------------------------------------------------------


def test_a_mapping_is_a_table():
    entries = select(FakeHost(), {0: (1, 2, 3, 4), (7, 0): [5, 6, 7, 8]})
    assert entries == [
        CpuidEntry(0, 0, 0, 1, 2, 3, 4),
        CpuidEntry(7, 0, INDEXED, 5, 6, 7, 8),
    ]


def test_a_table_is_kept_but_for_the_processors_number():
    one = CpuidEntry(1, eax=0xA, ebx=0x0800, ecx=1 << 28, edx=0)
    (entry,) = select(FakeHost(), [one], vcpu_id=2, vcpus=4)
    assert entry == attrs.evolve(one, ebx=0x02040800, edx=1 << 28)


@pytest.mark.parametrize(
    "policy",
    [{0: (1, 2, 3)}, {0: (1, 2, 3, 1 << 32)}, {(7, -1): (0, 0, 0, 0)}, [(1, 2)]],
)
def test_a_malformed_table_is_refused(policy):
    with pytest.raises(ConfigurationError, match="CPUID table"):
        select(FakeHost(), policy)


# ---- on the real thing -------------------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize("policy", POLICIES)
def test_the_host_takes_every_policy(make_vcpu, policy):
    first = make_vcpu(policy=policy, vcpus=2)
    second = make_vcpu(index=1, policy=policy, vcpus=2)
    for number, vcpu in enumerate((first, second)):
        (entry,) = (e for e in state.get_cpuid(vcpu.fd) if e.function == 1)
        assert (entry.ebx >> 24, entry.ebx >> 16 & 0xFF) == (number, 2)


@pytest.mark.kvm
def test_a_guest_sees_its_table(vcpu, memory):
    """In real mode, where CPUID is not the host's own even under PVM."""
    table = {0: (1, 0x41414141, 0x42424242, 0x43434343), 1: (0, 0, 0, 0)}
    vcpu.set_cpuid(table)
    memory.write(0x1000, bytes.fromhex("66 31c0 0fa2 f4"))  # xor eax, eax; cpuid; hlt
    vcpu.real16(0x1000)
    assert vcpu.run() == lib.KVM_EXIT_HLT
    context = state.get_context(vcpu.fd)
    assert (context.rax, context.rbx, context.rcx, context.rdx) == table[0]


@pytest.mark.kvm
def test_the_table_is_fixed_once_the_vcpu_has_run(vcpu, memory):
    memory.write(0x1000, b"\xf4")
    vcpu.real16(0x1000)
    assert vcpu.run() == lib.KVM_EXIT_HLT
    with pytest.raises(HostError, match=r"KVM_SET_CPUID2.*fixed at its first entry"):
        vcpu.set_cpuid({0: (0, 0, 0, 0)})
