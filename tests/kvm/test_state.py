"""A vCPU's state: every part there and back, all of it into another VM, and what a host refuses."""

import errno
import logging
import struct

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmaio import ConfigurationError, HostError
from kvmaio.cpu import GENERAL, SEGMENTS, TABLES, Context, CpuState
from kvmaio.kvm import state
from kvmaio.kvm._native import ffi, lib
from kvmaio.kvm.msrs import describe_msrs

pytestmark = pytest.mark.kvm

TSC, TSC_DEADLINE, STAR, LSTAR, KERNEL_GS_BASE = 0x10, 0x6E0, 0xC0000081, 0xC0000082, 0xC0000102
CLOCKS = {TSC, 0x40000010, 0x40000020}  # the latter two: Hyper-V's run time and reference time
NO_SUCH_MSR = 0x7777
HALTED = 3


# ---- section D of the reference: registers ------------------------------------------------


def test_registers_of_a_new_vcpu_are_those_after_reset(vcpu):
    """`Context()` says so, too, but for what processors differ in.

    RDX tells the processor's version; kvm_amd leaves the accessed and busy bits out of the types.
    """
    context, ours = state.get_context(vcpu.fd), Context()
    for name in SEGMENTS:
        getattr(context, name).type = getattr(ours, name).type
    assert attrs.evolve(context, rdx=ours.rdx) == ours


def test_registers_regs_and_sregs_round_trip(vcpu):
    context = state.get_context(vcpu.fd)
    for number, name in enumerate(GENERAL[:-2]):
        setattr(context, name, 0xFEDCBA9876543210 ^ number)
    context.rip, context.rflags = 0x7C00, 0x246
    context.cs.base, context.cs.selector = 0x70000, 0x7000
    context.gdt.base, context.gdt.limit = 0x5000, 0x27
    context.cr2, context.cr8 = 0x123456789000, 5
    state.set_context(vcpu.fd, context)
    assert state.get_context(vcpu.fd) == context


def test_cr8_and_apic_base_are_carried(vcpu):
    context = state.get_context(vcpu.fd)
    context.cr8, context.apic_base = 9, 0xFEC00900
    state.set_context(vcpu.fd, context)
    again = state.get_context(vcpu.fd)
    assert (again.cr8, again.apic_base) == (9, 0xFEC00900)


def test_reading_into_a_context_does_not_tell_its_owner(vcpu):
    told: list[str] = []
    context = Context()
    context.notify(told.append)
    state.read_context(vcpu.fd, context)
    assert told == [] and context.rip == 0xFFF0


def test_the_run_pages_copy_is_the_same(vcpu, memory):
    """SYNC_REGS: what KVM leaves in the run page fills a context as well."""
    memory.write(0x1000, b"\xb8\x34\x12\xf4")  # mov ax, 0x1234; hlt
    vcpu.real16(0x1000)
    vcpu.page.kvm_valid_regs = lib.KVM_SYNC_X86_REGS | lib.KVM_SYNC_X86_SREGS
    assert vcpu.run() == lib.KVM_EXIT_HLT
    registers = vcpu.page.s.regs
    context = state.context_from(registers.regs, registers.sregs)
    assert context == state.get_context(vcpu.fd)
    assert context.rax & 0xFFFF == 0x1234


@pytest.mark.parametrize(
    ("register", "value", "problem"),
    [
        ("rax", -1, "rax = -1: it must be an unsigned number of 64 bits"),
        ("rip", 1 << 64, "rip = 18446744073709551616: it must be an unsigned number of 64 bits"),
        ("cr8", "5", "cr8 = '5': it must be an unsigned number of 64 bits"),
        ("cs.type", 256, "cs.type = 256: it must be an unsigned number of 8 bits"),
        ("ss.selector", 1 << 16, "ss.selector = 65536: it must be an unsigned number of 16 bits"),
        ("idt.limit", -5, "idt.limit = -5: it must be an unsigned number of 16 bits"),
    ],
)
def test_a_value_that_does_not_fit_is_named(vcpu, register, value, problem):
    context = state.get_context(vcpu.fd)
    before = state.get_context(vcpu.fd)
    part, _, field = register.rpartition(".")
    setattr(getattr(context, part) if part else context, field, value)
    with pytest.raises(ConfigurationError) as caught:
        state.set_context(vcpu.fd, context)
    assert str(caught.value) == problem
    assert state.get_context(vcpu.fd) == before


def test_impossible_registers_are_refused_with_a_hint(vcpu):
    context = state.get_context(vcpu.fd)
    context.cr4 = 1 << 40
    with pytest.raises(HostError, match=r"KVM_SET_SREGS.*contradict each other") as caught:
        state.set_context(vcpu.fd, context)
    assert caught.value.errno == errno.EINVAL


def test_a_queued_interrupt_survives_a_register_write(vcpu):
    request = ffi.new("struct kvm_interrupt *", {"irq": 0x33})
    assert lib.kvmaio_ioctl(vcpu.fd, lib.KVM_INTERRUPT, request) == 0
    queued = state.get_events(vcpu.fd)[8:10]
    assert queued == b"\x01\x33"
    context = state.get_context(vcpu.fd)
    context.rbx = 7
    state.set_context(vcpu.fd, context)
    assert state.get_events(vcpu.fd)[8:10] == queued


def test_kernels_without_sregs2(vcpu, monkeypatch):
    """Before Linux 5.14; the queued interrupt is kept there, too."""

    class Older:
        KVM_GET_SREGS2 = 0xAE00 | 0xFF  # no such ioctl

        def __getattr__(self, name):
            return getattr(lib, name)

    monkeypatch.setattr("kvmaio.kvm.context.lib", Older())
    test_a_queued_interrupt_survives_a_register_write(vcpu)
    test_cr8_and_apic_base_are_carried(vcpu)


addresses = st.integers(0, (1 << 47) - 1) | st.integers((1 << 64) - (1 << 47), (1 << 64) - 1)
rflags = st.sets(st.sampled_from([0, 2, 4, 6, 7, 10, 11, 21])).map(
    lambda bits: sum(1 << bit for bit in bits) | 2
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    general=st.lists(st.integers(0, (1 << 64) - 1), min_size=16, max_size=16),
    rip=st.integers(0, 0xFFFF),
    flags=rflags,
    bases=st.lists(st.integers(0, 0xFFFFF), min_size=6, max_size=6),
    selectors=st.lists(st.integers(0, 0xFFFF), min_size=6, max_size=6),
    tables=st.lists(st.tuples(addresses, st.integers(0, 0xFFFF)), min_size=2, max_size=2),
    cr2=addresses,
    cr8=st.integers(0, 15),
)
def test_any_context_round_trips(vcpu, general, rip, flags, bases, selectors, tables, cr2, cr8):
    """Set, then get: identical; a real-mode context, whose segments nothing else constrains."""
    context = state.get_context(vcpu.fd)
    for name, value in zip(GENERAL, [*general, rip, flags], strict=True):
        setattr(context, name, value)
    for name, base, selector in zip(SEGMENTS, bases, selectors, strict=False):
        segment = getattr(context, name)
        segment.base, segment.selector = base, selector
    for name, (base, limit) in zip(TABLES, tables, strict=True):
        table = getattr(context, name)
        table.base, table.limit = base, limit
    context.cr2, context.cr8 = cr2, cr8
    state.set_context(vcpu.fd, context)
    assert state.get_context(vcpu.fd) == context


@given(
    st.lists(st.integers(0, (1 << 64) - 1), min_size=len(GENERAL), max_size=len(GENERAL)),
    st.lists(st.integers(0, 255), min_size=8, max_size=8),
)
def test_any_value_passes_through_the_kernels_structures(general, types):
    regs, sregs = ffi.new("struct kvm_regs *"), ffi.new("struct kvm_sregs2 *")
    sregs.flags = 1
    context = Context(**dict(zip(GENERAL, general, strict=True)))
    for name, value in zip(SEGMENTS, types, strict=True):
        getattr(context, name).type = value
    state.store(context, regs, sregs)
    assert state.context_from(regs, sregs) == context
    # Against the compiler's idea of the layout.
    assert (regs.rflags, sregs.ldt.type, sregs.apic_base) == (general[-1], types[-1], 0xFEE00900)
    assert sregs.flags == 1


def test_fpu_round_trip(vcpu, kvm):
    saved = state.get_fpu(vcpu.fd)
    assert len(saved) == ffi.sizeof("struct kvm_fpu")
    changed = bytearray(saved)
    changed[160:176] = bytes(range(16))  # xmm0
    state.set_fpu(vcpu.fd, bytes(changed))
    assert state.get_fpu(vcpu.fd)[160:176] == bytes(range(16))


def test_one_reg_round_trip(vcpu):
    register = 0x2030_0002_0000_0000 | KERNEL_GS_BASE  # KVM_X86_REG_MSR
    try:
        before = state.get_one_reg(vcpu.fd, register)
    except HostError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            pytest.skip(f"this KVM has no single registers on x86 ({error})")
        raise
    state.set_one_reg(vcpu.fd, register, before ^ 0x1234000)
    assert state.get_one_reg(vcpu.fd, register) == before ^ 0x1234000
    assert state.get_msrs(vcpu.fd, [KERNEL_GS_BASE]) == {KERNEL_GS_BASE: before ^ 0x1234000}


def test_one_reg_errors_name_the_register(vcpu):
    register = 0x2030_0002_0000_0000 | NO_SUCH_MSR
    with pytest.raises(HostError, match=r"KVM_GET_ONE_REG \(register 0x2030000200007777\)"):
        state.get_one_reg(vcpu.fd, register)
    with pytest.raises(HostError, match=r"KVM_SET_ONE_REG \(register 0x2030000200007777\)"):
        state.set_one_reg(vcpu.fd, register, 1)


# ---- section H: state pushed, one test a part ----------------------------------------------


def an_xsave(kvm, vcpu, *, avx: bool) -> bytes:
    area = bytearray(state.get_xsave(kvm, vcpu.fd))
    area[0:2] = b"\x7f\x0b"  # FCW: round up
    area[24:28] = struct.pack("<I", 0x1FA0)  # MXCSR with the precision flag
    for n in range(16):
        area[160 + 16 * n : 176 + 16 * n] = bytes([n + 1] * 16)
    components = 0b011
    if avx:
        components = 0b111
        for n in range(16):
            area[576 + 16 * n : 592 + 16 * n] = bytes([0x80 + n] * 16)
    area[512:520] = components.to_bytes(8, "little")
    return bytes(area)


def has_avx(kvm) -> bool:
    return any(
        entry.function == 0xD and entry.index == 0 and entry.eax & 4
        for entry in kvm.supported_cpuid()
    )


def test_xsave_round_trip_with_avx_upper_halves(kvm, vcpu):
    if not has_avx(kvm):
        pytest.skip("this host's KVM has no AVX")
    state.set_xcrs(vcpu.fd, {0: 7})
    area = an_xsave(kvm, vcpu, avx=True)
    state.set_xsave(kvm, vcpu.fd, area)
    again = state.get_xsave(kvm, vcpu.fd)
    assert len(area) >= 4096
    assert again[:28] == area[:28] and again[32:416] == area[32:416]
    assert again[576:832] == area[576:832]


def test_xsave2_size_is_the_hosts(kvm, vm, vcpu):
    size = vm.capability(lib.KVM_CAP_XSAVE2)
    if not size:
        pytest.skip("this KVM has no XSAVE2 (before Linux 5.17)")
    assert len(state.get_xsave(vm, vcpu.fd)) == size


def test_xsave_without_xsave2(kvm, vcpu):
    class Older:
        def capability(self, number: int) -> int:
            return 0 if number == lib.KVM_CAP_XSAVE2 else kvm.capability(number)

    area = state.get_xsave(Older(), vcpu.fd)
    assert len(area) == 4096
    state.set_xsave(Older(), vcpu.fd, area)


def test_a_shorter_xsave_leaves_the_rest_initial(kvm, vcpu):
    """Such as the software CPU's, of 576 bytes."""
    area = an_xsave(kvm, vcpu, avx=False)
    state.set_xsave(kvm, vcpu.fd, area[:576])
    again = state.get_xsave(kvm, vcpu.fd)
    assert again[160:416] == area[160:416] and not any(again[576:832])


def test_xcrs_round_trip(kvm, vcpu):
    assert state.get_xcrs(vcpu.fd) == {0: 1}
    if not has_avx(kvm):
        pytest.skip("this host's KVM has no AVX to enable")
    state.set_xcrs(vcpu.fd, {0: 7})
    assert state.get_xcrs(vcpu.fd) == {0: 7}


def test_debug_registers_round_trip(vcpu):
    assert state.get_debug_registers(vcpu.fd) == (0, 0, 0, 0, 0xFFFF0FF0, 0x400)
    values = (0x1000, 0x2000, 0x3000, 0x4000, 0xFFFF0FF1, 0x700)
    state.set_debug_registers(vcpu.fd, values)
    assert state.get_debug_registers(vcpu.fd) == values


def test_events_round_trip(vcpu):
    events = bytearray(state.get_events(vcpu.fd))
    assert len(events) == 64
    events[14] = 1  # NMIs masked
    struct.pack_into("<4BI", events, 0, 1, 13, 1, 0, 0x18)  # #GP injected, error code
    state.set_events(vcpu.fd, bytes(events))
    again = state.get_events(vcpu.fd)
    assert again[14] == 1
    assert struct.unpack_from("<4BI", again) == (1, 13, 1, 0, 0x18)


def test_mp_state_round_trip(vm, make_vcpu):
    vm.create_irqchip()
    vcpu = make_vcpu()
    assert state.get_mp_state(vcpu.fd) == lib.KVM_MP_STATE_RUNNABLE
    state.set_mp_state(vcpu.fd, HALTED)
    assert state.get_mp_state(vcpu.fd) == HALTED


def test_a_second_processor_waits_for_its_start_up(vm, make_vcpu):
    vm.create_irqchip()
    make_vcpu(vcpus=2)
    second = make_vcpu(index=1, vcpus=2)
    assert state.get_mp_state(second.fd) == lib.KVM_MP_STATE_UNINITIALIZED


def test_mp_state_without_local_apic(vcpu):
    assert state.get_mp_state(vcpu.fd) == lib.KVM_MP_STATE_RUNNABLE
    with pytest.raises(HostError, match=r"KVM_SET_MP_STATE.*without an in-kernel local APIC"):
        state.set_mp_state(vcpu.fd, HALTED)


def test_lapic_round_trip(vm, make_vcpu):
    vm.create_irqchip()
    vcpu = make_vcpu()
    lapic = bytearray(state.get_lapic(vcpu.fd) or b"")
    assert len(lapic) == 0x400
    struct.pack_into("<I", lapic, 0x80, 0x30)  # TPR
    struct.pack_into("<I", lapic, 0xF0, 0x1FF)  # SVR: enabled
    state.set_lapic(vcpu.fd, bytes(lapic))
    again = state.get_lapic(vcpu.fd) or b""
    assert struct.unpack_from("<I", again, 0x80) == (0x30,)
    assert struct.unpack_from("<I", again, 0xF0) == (0x1FF,)


def test_lapic_without_irqchip_is_none(vcpu):
    assert state.get_lapic(vcpu.fd) is None


def test_a_part_of_the_wrong_size_is_refused(vcpu):
    with pytest.raises(
        ConfigurationError, match=r"KVM_SET_VCPU_EVENTS: 3 bytes .* 64 are expected"
    ):
        state.set_events(vcpu.fd, b"abc")


# ---- MSRs: partial success ---------------------------------------------------------------


def test_msrs_round_trip(vcpu):
    values = {LSTAR: 0xFFFFFFFF81000000, STAR: 0x23001000000000, KERNEL_GS_BASE: 0x1000}
    assert state.set_msrs(vcpu.fd, values) == {}
    assert state.get_msrs(vcpu.fd, values) == values


def test_msrs_that_are_refused_do_not_stop_the_others(vcpu):
    """KVM_SET_MSRS stops at the first one: go on behind it."""
    values = {NO_SUCH_MSR: 1, LSTAR: 0x1000, NO_SUCH_MSR + 1: 2, STAR: 0x3000, NO_SUCH_MSR + 2: 3}
    assert state.set_msrs(vcpu.fd, values) == {NO_SUCH_MSR + n: n + 1 for n in range(3)}
    assert state.get_msrs(vcpu.fd, values) == {LSTAR: 0x1000, STAR: 0x3000}


def test_more_msrs_than_one_call_takes(vcpu):
    many = {NO_SUCH_MSR + n: n for n in range(300)} | {LSTAR: 0x5000}
    refused = state.set_msrs(vcpu.fd, many)
    assert len(refused) == 300
    assert state.get_msrs(vcpu.fd, [LSTAR] * 600) == {LSTAR: 0x5000}


def test_an_msr_that_refuses_but_holds_the_value_is_not_reported(vcpu, monkeypatch):
    monkeypatch.setattr("kvmaio.kvm.msrs.get_msrs", lambda fd, indices: {NO_SUCH_MSR: 5})
    assert state.set_msrs(vcpu.fd, {NO_SUCH_MSR: 5, NO_SUCH_MSR + 1: 6}) == {NO_SUCH_MSR + 1: 6}


def test_the_time_stamp_counter_comes_first_and_its_deadline_last(vcpu, monkeypatch):
    order: list[int] = []

    def transfer(fd, request, operation, entries):
        order.extend(index for index, _ in entries)
        return list(entries)

    monkeypatch.setattr("kvmaio.kvm.msrs._transfer", transfer)
    state.set_msrs(vcpu.fd, {TSC_DEADLINE: 1, STAR: 2, TSC: 3, LSTAR: 4})
    assert order == [TSC, STAR, LSTAR, TSC_DEADLINE]


def test_refused_msrs_are_described_in_one_line():
    assert describe_msrs([0x20, 0x10], of=40) == "2 of 40 MSRs: 0x10, 0x20"
    assert describe_msrs(range(300), of=400) == (
        "300 of 400 MSRs: 0x0, 0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0x7, 0x8, 0x9, 0xa, 0xb and 288 more"
    )


# ---- all of it ------------------------------------------------------------------------------


def comparable(saved: CpuState) -> CpuState:
    """Without what goes on by itself."""
    return attrs.evolve(
        saved,
        msrs={index: value for index, value in saved.msrs.items() if index not in CLOCKS},
        lapic=saved.lapic and saved.lapic[:0x390] + saved.lapic[0x394:],  # the current count
    )


def test_set_what_you_get_get_again_identical(kvm, vm, vcpu):
    saved = state.get_state(kvm, vm, vcpu.fd)
    assert state.set_state(kvm, vm, vcpu.fd, saved) == ()
    assert comparable(state.get_state(kvm, vm, vcpu.fd)) == comparable(saved)


@pytest.mark.parametrize("irqchip", [False, True])
def test_everything_goes_into_another_vm(kvm, vm, second_vm, make_vcpu, irqchip):
    if irqchip:
        vm.create_irqchip()
        second_vm.create_irqchip()
    first, second = make_vcpu(), make_vcpu(vm=second_vm)
    avx = has_avx(kvm)
    first.real16(0x1000, rax=0x1111, rbx=0x2222, cr8=3)
    if avx:
        state.set_xcrs(first.fd, {0: 7})
    state.set_xsave(kvm, first.fd, an_xsave(kvm, first, avx=avx))
    state.set_debug_registers(first.fd, (1, 2, 3, 4, 0xFFFF0FF1, 0x400))
    msrs = {LSTAR: 0x1000, STAR: 0x2000, KERNEL_GS_BASE: 0x3000, 0x2FF: 0xC06, 0x200: 0x1000006}
    assert state.set_msrs(first.fd, msrs) == {}
    if irqchip:
        lapic = bytearray(state.get_lapic(first.fd) or b"")
        struct.pack_into("<I", lapic, 0xF0, 0x1FF)
        struct.pack_into("<I", lapic, 0x320, 0x20031)  # timer: periodic, vector 0x31
        state.set_lapic(first.fd, bytes(lapic))
        state.set_mp_state(first.fd, HALTED)
    events = bytearray(state.get_events(first.fd))
    events[14] = 1  # NMIs masked
    struct.pack_into("<4BI", events, 0, 1, 13, 1, 0, 0x18)  # #GP injected, error code 0x18
    state.set_events(first.fd, bytes(events))

    saved = state.get_state(kvm, vm, first.fd)
    assert saved.msrs.items() >= msrs.items()
    assert saved.mp_state == (HALTED if irqchip else 0)
    assert (saved.lapic is not None) is irqchip
    assert comparable(state.get_state(kvm, second_vm, second.fd)) != comparable(saved)
    assert state.set_state(kvm, second_vm, second.fd, saved) == ()
    assert comparable(state.get_state(kvm, second_vm, second.fd)) == comparable(saved)


def test_cpuid_goes_along(kvm, vm, vcpu):
    saved = state.get_state(kvm, vm, vcpu.fd)
    # Not one that says which MSRs there are: those that are missing would be refused.
    brand = 0x80000002
    table = [entry for entry in state.get_cpuid(vcpu.fd) if entry.function != brand]
    assert state.set_state(kvm, vm, vcpu.fd, saved, cpuid=table) == ()
    functions = {entry.function for entry in state.get_cpuid(vcpu.fd)}
    assert {0, 1, brand + 1} <= functions and brand not in functions


def test_the_tsc_deadline_survives(kvm, vm, second_vm, make_vcpu):
    """It is taken only by a LAPIC whose timer is in deadline mode already."""
    vm.create_irqchip()
    second_vm.create_irqchip()
    first, second = make_vcpu(), make_vcpu(vm=second_vm)
    deadline_bit = {1: 1 << 24}  # KVM offers it apart from its CPUID table
    for vcpu in (first, second):
        vcpu.set_cpuid(
            attrs.evolve(entry, ecx=entry.ecx | deadline_bit.get(entry.function, 0))
            for entry in kvm.supported_cpuid()
        )
    lapic = bytearray(state.get_lapic(first.fd) or b"")
    struct.pack_into("<I", lapic, 0xF0, 0x1FF)
    struct.pack_into("<I", lapic, 0x320, 0x40031)  # timer: TSC deadline, vector 0x31
    state.set_lapic(first.fd, bytes(lapic))
    deadline = state.get_msrs(first.fd, [TSC])[TSC] + (1 << 50)
    assert state.set_msrs(first.fd, {TSC_DEADLINE: deadline}) == {}
    saved = state.get_state(kvm, vm, first.fd)
    if saved.msrs.get(TSC_DEADLINE) != deadline:
        pytest.skip("this host's LAPIC has no TSC deadline timer")
    assert state.set_state(kvm, second_vm, second.fd, saved) == ()
    assert state.get_msrs(second.fd, [TSC_DEADLINE]) == {TSC_DEADLINE: deadline}


def test_msrs_and_components_that_are_refused_are_one_summary_once(kvm, vm, vcpu, caplog):
    saved = state.get_state(kvm, vm, vcpu.fd)
    saved.msrs |= {NO_SUCH_MSR + n: 1 for n in range(100)}
    area = bytearray(an_xsave(kvm, vcpu, avx=False))
    area[512:520] = (1 << 40 | 0b11).to_bytes(8, "little")
    saved.xsave = bytes(area)
    with caplog.at_level(logging.WARNING):
        refused = state.set_state(kvm, vm, vcpu.fd, saved)
        assert state.set_state(kvm, vm, vcpu.fd, saved) == refused
    assert [part.partition(":")[0] for part in refused] == [
        "XSAVE components 40",
        f"100 of {len(saved.msrs)} MSRs",
    ]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"this host refused part of a vCPU's state: {'; '.join(refused)}"
    )


def _mxcsr_with_reserved_bits(saved: CpuState) -> CpuState:
    assert saved.xsave is not None
    area = bytearray(saved.xsave)
    area[24:28], area[512] = b"\xff" * 4, 0b11  # which says that it is there
    return attrs.evolve(saved, xsave=bytes(area))


@pytest.mark.parametrize(
    ("spoil", "operation"),
    [
        (lambda saved: attrs.evolve(saved, xcrs={0: 1 << 40 | 1}), "KVM_SET_XCRS"),
        (_mxcsr_with_reserved_bits, "KVM_SET_XSAVE: .*reserved bits of MXCSR"),
        (lambda saved: attrs.evolve(saved, lapic=bytes(0x400)), "KVM_SET_LAPIC"),
        (
            lambda saved: attrs.evolve(saved, mp_state=HALTED),
            "KVM_SET_MP_STATE.*a vCPU can only be runnable",
        ),
    ],
    ids=["XCRs", "XSAVE", "LAPIC", "MP state"],
)
def test_any_other_state_that_is_refused_is_an_error(kvm, vm, vcpu, spoil, operation):
    saved = spoil(state.get_state(kvm, vm, vcpu.fd))
    with pytest.raises(HostError, match=operation):
        state.set_state(kvm, vm, vcpu.fd, saved)


def test_xsave_components_that_this_host_lacks_are_left_out(kvm, vm, vcpu):
    saved = state.get_state(kvm, vm, vcpu.fd)
    area = bytearray(an_xsave(kvm, vcpu, avx=False))
    area[512:520] = (1 << 40 | 0b11).to_bytes(8, "little")
    saved.xsave = bytes(area)
    assert state.set_state(kvm, vm, vcpu.fd, saved) == ("XSAVE components 40",)
    assert state.get_xsave(kvm, vcpu.fd)[160:416] == bytes(area[160:416])


def test_parts_that_are_none_are_left_alone(kvm, vm, vcpu):
    """A state from a CPU model without them."""
    area = an_xsave(kvm, vcpu, avx=False)
    state.set_xsave(kvm, vcpu.fd, area)
    bare = CpuState(state.get_context(vcpu.fd))
    assert state.set_state(kvm, vm, vcpu.fd, bare) == ()
    assert state.get_xsave(kvm, vcpu.fd)[160:416] == area[160:416]


def test_a_host_with_no_further_state(kvm, vm, vcpu):
    class Bare:
        def capability(self, number: int) -> int:
            return 0

    saved = state.get_state(kvm, Bare(), vcpu.fd)
    assert (saved.xsave, saved.xcrs, saved.debug_registers) == (
        None,
        {},
        CpuState(Context()).debug_registers,
    )


def test_a_guest_goes_on_in_another_vm(kvm, vm, second_vm, memory, make_vcpu):
    """Saved between two exits, it answers the rest there."""
    # mov cx, 3; again: mov al, cl; out 0x10, al; loop again; hlt
    memory.write(0x1000, bytes.fromhex("b90300 88c8 e610 e2fa f4"))
    first, second = make_vcpu(), make_vcpu(vm=second_vm)
    first.real16(0x1000)
    assert first.run() == lib.KVM_EXIT_IO
    assert lib.kvmaio_vcpu_half_entry(first.handle, 10**10) == lib.KVMAIO_INTERRUPTED
    saved = state.get_state(kvm, vm, first.fd)
    second_vm.slots.region_of(0).mapping[:] = memory.regions[0].mapping[:]
    state.set_state(kvm, second_vm, second.fd, saved)
    written = []
    while second.run() == lib.KVM_EXIT_IO:
        page = ffi.cast("uint8_t *", second.page)
        written.append(page[second.page.io.data_offset])
    assert written == [2, 1]
    assert second.page.exit_reason == lib.KVM_EXIT_HLT
