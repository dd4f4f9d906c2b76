"""gem5's KVM CPU, section A: the state machine, a test per row."""

import asyncio
from typing import Any

import pytest

from kvmaio import Bus, Device, Halted, Register, Stopped, VCpu, VCpuState
from kvmaio.errors import ConfigurationError
from kvmaio.exits import HaltExit, InterruptedExit, IoExit
from kvmaio.testing import ManualClock
from kvmaio.vcpu.registers_sync import Newer
from tests.engine.support import Diary, deadline, until
from tests.scripted import INTERRUPTED, ScriptedCpu, halt, port_in, port_out, scripted_machine

IDLE, RUNNING = VCpuState.IDLE, VCpuState.RUNNING
SERVICE, COMPLETION = VCpuState.RUNNING_SERVICE, VCpuState.RUNNING_SERVICE_COMPLETION

SPIN = ("again:", "inc bx", "jmp again")


class Nobody:
    """A vCPU's owner that does nothing."""

    watches_exits = has_doorbells = False

    def __init__(self) -> None:
        self.posted_lock = asyncio.Lock()

    def check_steppable(self) -> None: ...
    def idle(self, vcpu) -> None: ...
    def ended(self, vcpu, outcome) -> None: ...
    def failed(self, vcpu, error) -> None: ...


def lone_vcpu(*steps, clock=None, **arguments) -> Any:
    """A `VCpu` without a machine, on a scripted CPU: its `model`."""
    cpu = ScriptedCpu(*steps)
    buses = Bus("pio", 1 << 16), Bus("mmio", 1 << 52)
    return VCpu(0, cpu, *buses, clock or ManualClock(), Nobody(), **arguments)


# ---- States ------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_states_a_new_cpu_is_idle_with_its_context_newer(machine):
    (vcpu,) = machine.vcpus
    assert (vcpu.state, vcpu._registers.newer, vcpu.halted) == (IDLE, Newer.CONTEXT, False)
    assert vcpu.stats.as_dict() == {
        name: None if name in ("numInsts", "ctrInsts", "totalInsts", "totalOps") else 0
        for name in vcpu.stats.as_dict()
    }


@pytest.mark.kvm
async def test_states_of_one_port_access(boot):
    machine = boot("mov al, 1", "out 0x10, al", "hlt")
    (vcpu,) = machine.vcpus
    seen = []

    async def look():
        seen.append(vcpu.state)
        await asyncio.sleep(0)
        seen.append(vcpu.state)

    machine.attach(Diary(during=look), pio=0x10)
    async with deadline():
        assert await machine.run() == Halted()
    assert seen == [COMPLETION, VCpuState.RUNNING_MMIO_PENDING]
    assert vcpu.state is IDLE


# ---- activateContext ---------------------------------------------------------------------


@pytest.mark.kvm
async def test_activate_context_twice_is_an_error(boot):
    machine = boot("hlt")
    (vcpu,) = machine.vcpus
    vcpu.activate()
    assert vcpu.state is RUNNING
    with pytest.raises(ConfigurationError, match=r"cpu0 is Running, not Idle: it is active"):
        vcpu.activate()


async def test_activate_context_adds_the_idle_span_to_num_cycles():
    """Scripted: the clock is moved by hand."""
    clock = ManualClock(5_000)
    vcpu = lone_vcpu(clock=clock, clock_hz=2_000_000_000)
    await clock.advance(1_000)
    vcpu.activate()
    assert (vcpu.state, vcpu.stats.numCycles) == (RUNNING, 2_000)
    vcpu.suspend()
    await clock.advance(500)
    vcpu.activate()
    assert vcpu.stats.numCycles == 3_000


# ---- suspendContext, deallocateContext, haltContext ------------------------------------------


async def test_suspend_context_is_a_no_op_in_idle():
    vcpu = lone_vcpu()
    vcpu.suspend()
    vcpu.deallocate()
    assert vcpu.state is IDLE


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["suspend", "deallocate"])
async def test_suspend_context_from_running_service_is_an_error(boot, name):
    machine = boot("out 0x10, al", "hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        exit_ = await vcpu.run()
    assert (type(exit_), vcpu.state) == (IoExit, SERVICE)
    with pytest.raises(ConfigurationError, match="cannot suspend cpu0 in RunningService"):
        getattr(vcpu, name)()


@pytest.mark.kvm
async def test_suspend_context_from_running_service_completion(boot):
    machine = boot("out 0x10, al", "mov al, 2", "out 0x10, al", "hlt")
    (vcpu,) = machine.vcpus
    device = machine.attach(Diary(during=vcpu.suspend), pio=0x10)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: device.entries)
        await until(lambda: vcpu.state is IDLE)
        entries = vcpu.stats.numVMExits
        for _ in range(50):
            await asyncio.sleep(0)
        assert (vcpu.state, vcpu.stats.numVMExits) == (IDLE, entries)
        device.during = None
        vcpu.activate()
        assert await run == Halted()
    assert device.entries == [("write", 0, 1, 0), ("write", 0, 1, 2)]


@pytest.mark.kvm
async def test_suspend_context_after_a_refused_entry_by_hand(boot):
    """The exit before it was passed over: nobody is going to serve it."""
    machine = boot("out 0x10, al", "hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        assert type(await vcpu.run()) is IoExit
        vcpu.context.rflags = 1 << 64
        with pytest.raises(ConfigurationError, match="rflags = "):
            await vcpu.run()
    vcpu.suspend()
    assert vcpu.state is VCpuState.IDLE


@pytest.mark.kvm
async def test_suspend_context_ends_the_entry_under_way(boot):
    machine = boot(*SPIN)
    (vcpu,) = machine.vcpus
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: vcpu.inside)
        vcpu.suspend()
        await until(lambda: not vcpu.inside)
        assert (vcpu.state, vcpu.stats.numExitSignal) == (IDLE, 1)
        machine.stop("enough")
        assert await run == Stopped("enough")
    assert vcpu.state is IDLE


async def test_halt_context_books_its_sleep_as_cycles(monkeypatch):
    """Scripted: the clock is moved by hand."""
    clock = ManualClock()
    vcpu = lone_vcpu(halt(if_flag=1), clock=clock)
    assert await vcpu.run() == HaltExit()
    vcpu.halt()
    assert (vcpu.state, vcpu.halted) == (IDLE, True)
    await clock.advance(700)
    vcpu.wakeup()
    assert (vcpu.stats.numCycles, vcpu.halted) == (700, False)


# ---- tick in Running / Completion -----------------------------------------------------------


async def test_tick_calls_in_order(monkeypatch):
    """Scripted: sync, then inject, then enter; served after that."""
    cpu = ScriptedCpu(INTERRUPTED, port_in(0x60), INTERRUPTED, halt())
    async with scripted_machine(monkeypatch, cpu) as machine:
        (vcpu,) = machine.vcpus

        def edit():
            cpu.log.append("device")
            vcpu.context.rbx = 7

        machine.attach(Diary(0x42, during=edit), pio=0x60)
        cpu.page.ready_for_interrupt_injection = 1
        vcpu.context.rflags |= 0x200
        await vcpu.interrupt(0x30)
        async with deadline():
            assert await machine.run() == Halted()
        assert cpu.log == [
            *("write_context", "interrupt 0x30", "enter"),  # ended by a kick: nothing to serve
            "enter",  # IN
            *("device", "read_context", "half_entry", "read_context", "write_context", "enter"),
            "enter",  # HLT
        ]
        assert (vcpu.context.rax & 0xFF, vcpu.context.rbx) == (0x42, 7)
        assert vcpu.stats.numExitSignal == 2


async def test_tick_intr_goes_back_to_running_and_other_exits_to_running_service():
    """Scripted: any exit will do."""
    vcpu = lone_vcpu(INTERRUPTED, port_out(0x10, 1))
    assert await vcpu.run() == InterruptedExit()
    assert (vcpu.state, vcpu.stats.numExitSignal) == (RUNNING, 1)
    assert await vcpu.run() == IoExit(0x10, 1, 1, True, b"\1")
    assert (vcpu.state, vcpu.stats.numExitSignal) == (SERVICE, 1)


async def test_tick_that_became_idle_does_not_enter(monkeypatch):
    """Scripted: no entry after the device has suspended its CPU."""
    cpu = ScriptedCpu(port_out(0x10, 1), halt())
    async with scripted_machine(monkeypatch, cpu) as machine:
        (vcpu,) = machine.vcpus
        machine.attach(Diary(during=vcpu.suspend), pio=0x10)
        async with deadline():
            run = asyncio.create_task(machine.run())
            await until(lambda: vcpu.stats.numIO and vcpu.state is IDLE)
            for _ in range(20):
                await asyncio.sleep(0)
            assert cpu.log == ["write_context", "enter"]
            vcpu.activate()
            assert await run == Halted()


# ---- tick in RunningService ---------------------------------------------------------------


@pytest.mark.kvm
async def test_tick_service_a_device_sees_the_time_after_the_executed_ticks(boot):
    machine = boot("mov cx, 2000", "again: loop again", "out 0x10, al", "hlt")
    (vcpu,) = machine.vcpus
    seen = []

    class Watch(Device):
        port = Register(0, int)

        @port.on_write
        def look(self, value):
            seen.append((self.clock.now_ns, vcpu.last_exit().ticks))

    machine.attach(Watch(), pio=0x10)
    start_ns = machine.clock.now_ns
    async with deadline():
        assert await machine.run() == Halted()
    ((now_ns, ticks),) = seen
    assert ticks > 0
    assert now_ns >= start_ns + ticks


# ---- Budget ----------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_budget_of_zero_executes_no_instruction(boot):
    machine = boot("inc bx", "hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        exit_ = await vcpu.run(0)
    assert exit_ == InterruptedExit(ticks=1)
    assert (vcpu.context.rip, vcpu.context.rbx) == (0x1000, 0)
    assert (vcpu.stats.numVMExits, vcpu.stats.numVMHalfEntries) == (1, 1)


@pytest.mark.kvmaio_cpu("kvm", "soft")
async def test_budget_of_zero_an_event_due_now_on_a_running_guest(boot):
    machine = boot(*SPIN)
    (vcpu,) = machine.vcpus
    async with deadline():
        run = asyncio.create_task(machine.run())
        await vcpu.at_instruction(100)
        seen = [(vcpu.context.rip, vcpu.context.rbx, vcpu.stats.numInsts)]
        for event in (vcpu.at_instruction(100), vcpu.at_instruction(0, from_now=True)):
            await event
            assert machine.is_running
            seen.append((vcpu.context.rip, vcpu.context.rbx, vcpu.stats.numInsts))
        machine.stop()
        await run
    assert seen == [(0x1000, 50, 100)] * 3


# ---- After a timer exit ---------------------------------------------------------------------


@pytest.mark.kvm
async def test_after_a_timer_exit_an_idle_guest_reaches_the_next_event(boot):
    """A guest that waits in HLT is woken by the alarm's interrupt, and runs nothing meanwhile."""
    machine = boot(
        *("mov word ptr [0x28*4], offset handler", "mov word ptr [0x28*4+2], 0"),
        *("sti", "wait: hlt", "jmp wait"),
        *("handler: mov al, 3", "out 0xf4, al"),
    )
    (vcpu,) = machine.vcpus

    class Bell(Device):
        port = Register(0, int)

        async def run(self):
            async for deadline_ns in self.alarm:
                rung.append((deadline_ns, self.clock.now_ns))
                self.irq.pulse()

    rung: list[tuple[int, int]] = []
    bell = machine.attach(Bell(), pio=0x10, irq=8)
    due_ns = machine.clock.now_ns + 20_000_000
    bell.alarm.arm(due_ns)
    async with deadline():
        outcome = await machine.run()
    assert outcome.code == 7
    assert rung[0][0] == due_ns <= rung[0][1]
    assert (vcpu.stats.numHalt, vcpu.stats.numInterrupts) == (1, 1)


# ---- wakeup and kick ------------------------------------------------------------------------


@pytest.mark.kvm
async def test_wakeup_of_a_running_vcpu_is_one_intr_exit(boot):
    machine = boot(*SPIN)
    (vcpu,) = machine.vcpus
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: vcpu.inside)
        vcpu.wakeup()
        assert vcpu.state is RUNNING
        await until(lambda: vcpu.stats.numVMExits)
        await until(lambda: vcpu.inside)
        assert (vcpu.state, vcpu.stats.numVMExits, vcpu.stats.numExitSignal) == (RUNNING, 1, 1)
        machine.stop()
        await run


@pytest.mark.kvm
async def test_wakeup_activates_a_suspended_vcpu(boot):
    machine = boot("out 0x10, al", "hlt")
    (vcpu,) = machine.vcpus
    machine.attach(Diary(during=vcpu.suspend), pio=0x10)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: vcpu.stats.numIO and vcpu.state is IDLE)
        vcpu.wakeup()
        assert vcpu.state is RUNNING
        assert await run == Halted()


@pytest.mark.kvm
async def test_kick_before_entry_makes_the_next_entry_exit_at_once(boot):
    machine = boot("inc bx", "out 0x10, al", "hlt")
    (vcpu,) = machine.vcpus
    vcpu.kick()
    async with deadline():
        assert type(await vcpu.run()) is InterruptedExit
        assert (vcpu.context.rip, vcpu.context.rbx) == (0x1000, 0)
        assert type(await vcpu.run()) is IoExit
        assert vcpu.context.rbx == 1


@pytest.mark.kvm
async def test_kick_before_entry_survives_the_half_entry_of_a_register_push(boot):
    machine = boot("in al, 0x10", "hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        assert type(await vcpu.run()) is IoExit
        vcpu.context.rbx = 5
        vcpu.kick()
        assert type(await vcpu.run()) is InterruptedExit
        assert type(await vcpu.run()) is HaltExit


@pytest.mark.kvm
async def test_kick_ends_a_spinning_guest_from_another_thread(boot):
    machine = boot(*SPIN)
    (vcpu,) = machine.vcpus
    async with deadline():
        run = asyncio.create_task(vcpu.run())
        await until(lambda: vcpu.inside)
        await asyncio.to_thread(vcpu.kick)
        assert type(await run) is InterruptedExit


@pytest.mark.kvm
async def test_suspend_outlasts_a_halt_that_was_under_way(boot):
    """An entry that suspend() ends may end in HLT: an interrupt is no reason to go on then."""
    machine = boot("hlt")
    vcpu = machine.vcpus[0]
    vcpu.activate()
    vcpu.suspend()
    vcpu.halt()  # what the service of that exit does
    await vcpu.interrupt(0x20)
    assert (vcpu.state, vcpu.can_wake) == (VCpuState.IDLE, True)
    vcpu.activate()
    assert (vcpu.state, vcpu.halted) == (VCpuState.RUNNING, False)
