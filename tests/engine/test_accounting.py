"""Guest time and cycles from what the host spent: gem5's accounting, by hand and for real."""

import time

import pytest

from kvmaio.exits import InterruptedExit
from kvmaio.kvm.counters import TASK_CLOCK, CounterConfig
from kvmaio.stats import CpuStatistics
from tests.engine.support import deadline
from tests.engine.test_section_a import SPIN, lone_vcpu
from tests.kvm.test_counters import needs_events
from tests.scripted import INTERRUPTED, TIMER, port_in, port_out

MS = 1_000_000


@pytest.mark.parametrize(
    ("host_ns", "factor", "ticks", "cycles"),
    [
        (500, 2.0, 1_000, 2_000),  # 1000 host cycles at 2 GHz
        (500, 1.0, 500, 1_000),
        (1_000_000, 0.5, 500_000, 1_000_000),
        (0, 1.0, 0, 0),
    ],
)
async def test_host_time_to_ticks_and_cycles(host_ns, factor, ticks, cycles):
    """Scripted: the host's time is given; its clock counts as 2 GHz."""
    vcpu = lone_vcpu(port_out(0x10, 1), host_factor=factor)
    vcpu.model.executed_ns = host_ns
    before = vcpu.stats.numCycles
    exit_ = await vcpu.run()
    assert (exit_.ticks, vcpu.stats.numCycles - before) == (ticks, cycles)


async def test_a_half_entry_costs_one_clock_period():
    """Scripted, at 250 MHz: 4 ns, however long the host took."""
    vcpu = lone_vcpu(port_in(0x60), INTERRUPTED, clock_hz=250_000_000)
    vcpu.model.executed_ns = 7_000
    await vcpu.run()
    assert await vcpu.run(0) == InterruptedExit(ticks=4)
    stats = vcpu.stats
    assert (stats.numVMExits, stats.numVMHalfEntries, stats.numExitSignal) == (2, 1, 1)


@pytest.mark.parametrize(
    ("ticks", "factor", "armed"),
    [
        (1 * MS, 1.0, 1 * MS),
        (1 * MS, 2.0, MS // 2),
        (1 * MS, 0.5, 2 * MS),
        (1_000_001, 3.0, 333_334),
    ],
)
async def test_the_armed_host_time(ticks, factor, armed):
    """Scripted: factor 2 halves it; a fraction is rounded up, or the run would end early."""
    vcpu = lone_vcpu(TIMER, host_factor=factor)
    assert (await vcpu.run(ticks)).timer_expired
    assert vcpu.model.limits == [armed]


async def test_every_kind_of_entry_is_counted():
    vcpu = lone_vcpu(port_out(0x10, 1), INTERRUPTED, TIMER, port_in(0x10))
    for _ in range(4):
        await vcpu.run()
    stats = vcpu.stats
    assert (stats.numVMExits, stats.numExitSignal, stats.numIO) == (4, 2, 2)


def test_what_nobody_counts_is_unknown():
    stats = CpuStatistics()
    assert (stats.numInsts, stats.ctrInsts, stats.totalInsts, stats.totalOps) == (None,) * 4


@pytest.mark.kvm
async def test_a_native_vcpu_is_charged_its_threads_cpu_time(boot):
    """For real: at least what it was in the guest for, and no more than passed."""
    machine = boot(*SPIN, mode="user64")
    (vcpu,) = machine.vcpus
    async with deadline():
        start_ns = time.monotonic_ns()
        exit_ = await vcpu.run(20 * MS)
        passed_ns = time.monotonic_ns() - start_ns
    assert exit_.timer_expired
    assert 0 < exit_.ticks <= passed_ns


@pytest.mark.kvmaio_cpu("kvm")
@needs_events
async def test_a_native_vcpu_is_charged_the_cycles_that_were_counted(boot, monkeypatch):
    """A stand-in: the task clock in the place of the PMU's cycles, on a host of "500 MHz"."""
    monkeypatch.setattr("kvmaio.kvm.cpu.host_hz", lambda: 500_000_000)
    machine = boot(*SPIN)
    (vcpu,) = machine.vcpus
    vcpu.model._count_cycles(CounterConfig(TASK_CLOCK))
    async with deadline():
        exit_ = await vcpu.run(20 * MS)
    counted, worked_ns = vcpu.model.handle.executed_cycles, vcpu.model.handle.executed_ns
    assert worked_ns // 2 < counted < worked_ns * 2
    assert exit_.ticks == counted * 2


@pytest.mark.kvmaio_cpu("kvm")
async def test_a_guest_that_waits_within_kvm_is_not_charged(boot):
    """For real: HLT with KVM's own interrupt controllers waits inside of KVM_RUN."""
    machine = boot("hlt", irqchip="kernel")
    (vcpu,) = machine.vcpus
    async with deadline():
        start_ns = time.monotonic_ns()
        exit_ = await vcpu.run(50 * MS)
        passed_ns = time.monotonic_ns() - start_ns
    assert exit_.timer_expired and passed_ns >= 50 * MS
    assert exit_.ticks < passed_ns // 2


@pytest.mark.kvmaio_cpu("kvm")
async def test_a_resident_vcpu_is_charged_the_time_inside(boot):
    """For real: CLOCK_MONOTONIC around KVM_RUN, which costs the hot path no system call."""
    machine = boot("again: out 0x10, al", "jmp again")
    (vcpu,) = machine.vcpus
    ticks = []
    async with deadline():
        start_ns = time.monotonic_ns()
        while not vcpu.model.is_resident:
            await vcpu.run()
            assert time.monotonic_ns() - start_ns < 5_000_000_000 or pytest.skip("never resident")
        start_ns = time.monotonic_ns()
        for _ in range(100):
            ticks.append((await vcpu.run()).ticks)
        passed_ns = time.monotonic_ns() - start_ns
    assert all(tick > 0 for tick in ticks) and sum(ticks) <= passed_ns
