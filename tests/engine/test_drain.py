"""Drain: a test for each state, and what disturbs, holds, cancels or misuses it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

import kvmaio
from kvmaio import (
    Checkpoint,
    Device,
    DrainTimeout,
    Exited,
    Halted,
    Machine,
    Register,
    Stopped,
    VCpuState,
)
from kvmaio.boot import Flat
from kvmaio.devices import DebugExit
from kvmaio.errors import ConfigurationError
from kvmaio.exits import EndRun
from kvmaio.trace import Record
from tests.assembler import assemble
from tests.engine.support import Diary, deadline, until
from tests.scripted import (
    INTERRUPTED,
    ScriptedCpu,
    halt,
    mmio_read,
    plain,
    port_in,
    port_out,
    scripted_machine,
)

# Those that take a machine of the fixtures; the mark `kvm` does not keep these from running
# without it.
pytestmark = pytest.mark.kvmaio_cpu("kvm", "soft")

IDLE, RUNNING = VCpuState.IDLE, VCpuState.RUNNING
PENDING, SERVICE = VCpuState.RUNNING_MMIO_PENDING, VCpuState.RUNNING_SERVICE
SPIN = ("spin: jmp spin",)


# ---- one test for each state --------------------------------------------------------


@pytest.mark.kvm
async def test_running(boot):
    """Running → Idle; resume() makes it Running, and run() has been active all along."""
    machine = boot("again: inc eax", "jmp again")
    cpu = machine.vcpus[0]
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: cpu.inside)
        await machine.drain()
        assert cpu.state is IDLE
        assert machine.is_running
        at = cpu.stats.numVMExits
        for _ in range(10):
            await asyncio.sleep(0)
        assert cpu.stats.numVMExits == at
        machine.resume()
        assert cpu.state is RUNNING
        await until(lambda: cpu.inside)
        machine.stop("seen")
        assert await run == Stopped("seen")


@pytest.mark.kvm
async def test_idle_suspended_vcpu_stays_idle(boot):
    machine = boot(*SPIN)
    cpu = machine.vcpus[0]
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: cpu.inside)
        cpu.suspend()
        await until(lambda: not cpu.inside)
        async with machine.drained():
            assert cpu.state is IDLE
        assert cpu.state is IDLE
        cpu.activate()
        await until(lambda: cpu.inside)
        machine.stop()
        await run


async def test_service(monkeypatch):
    """An exit that nobody has served yet: served, completed by a half entry, drained."""
    cpu = ScriptedCpu(port_in(0x60), halt())
    async with deadline(), scripted_machine(monkeypatch, cpu) as machine:
        diary = machine.attach(Diary(0x42), pio=0x60)
        vcpu = machine.vcpus[0]
        await vcpu.run()
        assert vcpu.state is SERVICE
        await machine.drain()
        assert diary.entries == [("read", 0, 1)]
        assert cpu.log[-2:] == ["half_entry", "read_context"]
        assert (vcpu.state, vcpu.context.rax) == (IDLE, 0x42)
        machine.resume()
        assert await machine.run() == Halted()
        assert len(diary.entries) == 1


@pytest.mark.kvm
async def test_completion(boot):
    """Between the service and the next entry: a half entry puts the data into the register."""
    machine = boot("in al, 0x60", "hlt")
    machine.attach(Diary(0x42, during=lambda: machine.stop()), pio=0x60)
    cpu = machine.vcpus[0]
    async with deadline():
        await machine.run()
        assert cpu.state is VCpuState.RUNNING_SERVICE_COMPLETION
        halves = cpu.stats.numVMHalfEntries
        async with machine.drained():
            assert cpu.state is IDLE
            assert cpu.stats.numVMHalfEntries == halves + 1
            assert cpu.context.rax & 0xFF == 0x42
        assert cpu.state is RUNNING
        assert await machine.run() == Halted()


@pytest.mark.kvm
async def test_mmio_pending(boot):
    """A device that answers later holds the drain until it has answered."""
    answer = asyncio.Event()
    machine = boot("in al, 0x60", "hlt")
    machine.attach(Diary(0x42, during=answer.wait), pio=0x60)
    cpu = machine.vcpus[0]
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: cpu.state is PENDING)
        drain = asyncio.create_task(machine.drain())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not drain.done()
        answer.set()
        await drain
        assert cpu.context.rax & 0xFF == 0x42
        machine.resume()
        assert await run == Halted()


async def test_access_in_many_pieces_is_completed(monkeypatch):
    """One instruction's access may come as several exits: all are served before the rest."""
    cpu = ScriptedCpu(mmio_read(0xD0001000, 8), halt())
    cpu.pieces.append(mmio_read(0xD0001008, 4))
    async with deadline(), scripted_machine(monkeypatch, cpu) as machine:
        diary = machine.attach(Diary(1, 2), mmio=0xD0001000, name="first")
        other = machine.attach(Diary(3), mmio=0xD0001008, name="second")
        await machine.vcpus[0].run()
        await machine.drain()
        assert (len(diary.entries), len(other.entries)) == (1, 1)


async def test_injected_event_holds_it(monkeypatch):
    """archIsDrained: request the window, run at most 1 ms, again, until the event is taken."""
    cpu = ScriptedCpu(INTERRUPTED, INTERRUPTED, INTERRUPTED, halt(if_flag=1))
    async with deadline(), scripted_machine(monkeypatch, cpu) as machine:
        await machine.vcpus[0].run()
        cpu.injected_for = 2
        await machine.vcpus[0].interrupt(0x30)  # a new one: not to be injected now
        cpu.limits.clear()
        await machine.drain()
        assert cpu.limits == [1_000_000, 1_000_000]
        assert cpu.page.request_interrupt_window == 1
        assert cpu.injected == []
        assert machine.vcpus[0].interrupts.maskable


@pytest.mark.kvm
async def test_injected_event_is_taken_first(boot):
    """The same on a real CPU: the guest goes on until it is in the handler."""
    machine = boot(
        *("mov word ptr [0x80], offset handler", "mov word ptr [0x82], 0", "mov sp, 0x7000"),
        *("sti", "spin: jmp spin", "handler: inc byte ptr [0x5000]", "again: jmp again"),
    )
    cpu = machine.vcpus[0]
    async with deadline():
        while not (cpu.context.rflags & 1 << 9 and cpu.model.page.ready_for_interrupt_injection):
            await cpu.run(ticks=1_000_000)
        cpu.model.interrupt(0x20)
        assert cpu.model.has_injected_event()
        handler = cpu.context.rip
        await machine.drain()
        assert not cpu.model.has_injected_event()
        assert cpu.state is IDLE
        assert (cpu.context.rsp, cpu.context.rflags & 1 << 9) == (0x7000 - 6, 0)
        assert cpu.context.rip > handler
        machine.resume()


# The NMI's handler says how often it has been entered, and ends when it is told to.
NMI_HANDLER = (
    *("mov word ptr [8], offset handler", "mov word ptr [10], 0", "mov sp, 0x7000"),
    *("mov byte ptr [0x5004], 1", "again: cmp byte ptr [0x5002], 2", "jne again", "cli", "hlt"),
    *("handler: inc byte ptr [0x5002]", "mov al, [0x5002]", "out 0x60, al"),
    *("wait: cmp byte ptr [0x5000], 0", "je wait", "iret"),
)


@pytest.mark.kvm
@pytest.mark.parametrize("restored", [False, True], ids=["drained", "restored"])
async def test_nmi_that_waits_for_the_end_of_another_ones_handler(boot, restored):
    """It is state, and no reason to wait: it is taken once, behind the IRET."""
    machine = boot(*NMI_HANDLER)
    diary = machine.attach(Diary(), pio=0x60)
    cpu = machine.vcpus[0]
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.memory.read(0x5004, 1) != bytes(1))  # it is set up
        await cpu.nmi()
        await until(diary.reached(1))
        await cpu.nmi()
        await until(lambda: not cpu.interrupts.nmi)  # it is the CPU model's now
        checkpoint = await machine.checkpoint(timeout=5)
        machine.memory.write(0x5000, b"\1")
        assert await run == Halted()
        if restored:
            await machine.restore(checkpoint)
            machine.memory.write(0x5000, b"\1")
            assert await machine.run() == Halted()
    assert [entry[3] for entry in diary.entries] == [1, 2, 2][: 2 + restored]


@pytest.mark.kvm
async def test_nmi_while_drained_is_taken_afterwards(boot):
    machine = boot(*NMI_HANDLER)
    diary = machine.attach(Diary(), pio=0x60)
    machine.memory.write(0x5000, b"\1")
    cpu = machine.vcpus[0]
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.memory.read(0x5004, 1) != bytes(1))
        for count in (1, 2):
            async with machine.drained():
                await cpu.nmi()
                await asyncio.sleep(0)
                assert len(diary.entries) == count - 1
            await until(diary.reached(count))
        assert await run == Halted()


# ---- what arrives, or ends, meanwhile -----------------------------------------------


@pytest.mark.kvm
async def test_interrupt_while_drained_wakes_afterwards(boot):
    machine = boot(
        *("mov word ptr [0x80], offset handler", "mov word ptr [0x82], 0", "sti", "hlt"),
        *("mov bl, al", "cli", "hlt", "handler: mov al, 7", "iret"),
    )
    cpu = machine.vcpus[0]
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: cpu.halted)
        async with machine.drained():
            await cpu.interrupt(0x20)
            assert (cpu.state, cpu.halted) == (IDLE, False)
            for _ in range(5):
                await asyncio.sleep(0)
            assert cpu.stats.numInterrupts == 0
        assert await run == Halted()
    assert cpu.context.rbx & 0xFF == 7


@pytest.mark.kvm
async def test_outcome_met_while_draining_is_kept(boot):
    """The guest ends itself in the access that is pending: run() says so after resume()."""
    go_on = asyncio.Event()

    class SlowExit(DebugExit):
        async def write(self, offset, size, value):
            await go_on.wait()
            return super().write(offset, size, value)

    machine = boot("mov al, 3", "out 0xf8, al", "hlt")
    machine.attach(SlowExit(), pio=0xF8)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.vcpus[0].state is PENDING)
        drain = asyncio.create_task(machine.drain())
        await asyncio.sleep(0)
        go_on.set()
        await drain
        assert not run.done()
        machine.resume()
        assert await run == Exited(7)


async def test_halt_met_while_draining_may_still_end(monkeypatch):
    """With IF=0 only an NMI ends it, and one comes before the machine goes on."""
    go_on = asyncio.Event()
    cpu = ScriptedCpu(port_in(0x60), halt())
    cpu.pieces.append(halt())
    async with deadline(), scripted_machine(monkeypatch, cpu) as machine:
        machine.attach(Diary(during=go_on.wait), pio=0x60)
        (vcpu,) = machine.vcpus
        run = asyncio.create_task(machine.run())
        await until(lambda: vcpu.state is PENDING)
        drain = asyncio.create_task(machine.drain())
        await until(lambda: machine.barrier.is_moving)
        go_on.set()
        await drain
        assert vcpu.halted
        await vcpu.nmi()
        machine.resume()
        assert await run == Halted()
        assert cpu.log[-2:] == ["nmi", "enter"]


@pytest.mark.kvm
async def test_failing_device_fails_the_drain(boot):
    go_on = asyncio.Event()

    async def fail() -> None:
        await go_on.wait()
        raise ZeroDivisionError("the device's own")

    machine = boot("in al, 0x60", "hlt")
    machine.attach(Diary(during=fail), pio=0x60)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.vcpus[0].state is PENDING)
        drain = asyncio.create_task(machine.drain())
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(ConfigurationError, match="cpu0 cannot be drained: the device's own"):
            await drain
        with pytest.raises(ZeroDivisionError):
            await run
        with pytest.raises(ConfigurationError, match="cannot be drained"):
            await machine.drain()  # it fails again, and does not hang


@pytest.mark.kvm
async def test_four_vcpus_that_compute_and_exit(boot):
    machine = boot(
        *("mov ax, 0", "again: inc ax", "test al, 0x3f", "jnz again", "out 0x60, al"),
        "jmp again",
        vcpus=4,
    )
    machine.attach(Diary(), pio=0x60)
    async with deadline():
        run = asyncio.create_task(machine.run())
        for vcpu in machine.vcpus[1:]:
            vcpu.init()
            vcpu.start_up(1)
            vcpu.context.rip = 0
        for _ in range(50):
            await asyncio.sleep(0.0005)
            async with machine.drained():
                assert {vcpu.state for vcpu in machine.vcpus} == {IDLE}
                assert not any(vcpu.inside for vcpu in machine.vcpus)
        machine.stop()
        await run
    assert all(vcpu.stats.numIO for vcpu in machine.vcpus)


# ---- devices -------------------------------------------------------------------------


class Worker(Device):
    """Does `steps` steps when kicked, and then kicks the `next_one`."""

    kick = Register(0, int)

    def __init__(self, steps: int = 5) -> None:
        self.steps = steps
        self.done = 0
        self.next_one: Worker | None = None
        self.go_on: asyncio.Event | None = None  # waited for within each step
        self.kicked = asyncio.Event()

    @kick.on_write
    def on_kick(self, value: int) -> None:
        self.begin()

    def begin(self) -> None:
        self.kicked.set()

    async def run(self) -> None:
        while True:
            await self.kicked.wait()
            self.kicked.clear()
            async with self.busy("copying"):
                for _ in range(self.steps):
                    await asyncio.sleep(0.001)
                    self.done += 1
                    if self.go_on is not None:
                        await self.go_on.wait()
                if self.next_one is not None:
                    self.next_one.begin()
                    await asyncio.sleep(0)  # it has begun before this is over


@pytest.mark.kvm
async def test_device_that_disturbs_a_drained_peer_forces_another_round(boot):
    machine = boot("out 0x60, al", *SPIN)
    first, second = Worker(), Worker()
    # The disturbed one is asked first, and is at rest then.
    machine.attach(second, pio=0x61)
    machine.attach(first, pio=0x60)
    first.next_one = second
    first.go_on = asyncio.Event()
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: first.done)
        drain = asyncio.create_task(machine.drain())
        await until(lambda: machine.barrier.is_moving)
        first.go_on.set()
        await drain
        assert (first.done, second.done) == (5, 5)
        assert machine.barrier.rounds >= 3  # first busy; second busy; all at rest
        machine.resume()
        machine.stop()
        await run


@pytest.mark.kvm
async def test_busy_section_waits_to_begin_while_drained(boot):
    machine = boot(*SPIN)
    worker = machine.attach(Worker(), pio=0x60)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.vcpus[0].inside)
        async with machine.drained():
            await machine.pio.write(0x60, 1, 1)
            await asyncio.sleep(0.02)
            assert worker.done == 0
        await until(lambda: worker.done == 5)
        machine.stop()
        await run


@pytest.mark.kvm
async def test_alarm_does_not_ring_while_drained(boot):
    class Ringing(Device):
        size = 1
        rang = False

        async def run(self) -> None:
            async for _ in self.alarm:
                self.rang = True

    machine = boot(*SPIN)
    device = machine.attach(Ringing(), pio=0x60)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.vcpus[0].inside)
        async with machine.drained():
            device.alarm.arm(machine.clock.now_ns + 1_000_000)
            await asyncio.sleep(0.02)
            assert not device.rang
        await until(lambda: device.rang)
        machine.stop()
        await run


@pytest.mark.kvm
async def test_device_that_is_attached_meanwhile_is_at_rest_too(boot):
    class Late(Device):
        size = 1
        rang = worked = False

        async def run(self) -> None:
            self.alarm.arm(self.clock.now_ns)
            async with self.busy():
                self.worked = True
            async for _ in self.alarm:
                self.rang = True

    machine = boot(*SPIN)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.vcpus[0].inside)
        async with machine.drained():
            device = machine.attach(Late(), pio=0x60)
            await asyncio.sleep(0.01)
            assert not (device.worked or device.rang)
        await until(lambda: device.worked and device.rang)
        machine.stop()
        await run


@pytest.mark.kvm
async def test_trace_tells_of_no_alarm_that_nobody_sets(boot):
    machine = boot("hlt")
    device = machine.attach(Diary(), pio=0x60)
    records: list[Record] = []
    machine.trace(records.append, only="alarm")
    async with deadline():
        device.alarm.arm(machine.clock.now_ns + 10**12)
        async with machine.drained():
            pass
    assert [record.source for record in records] == [device.name]


@pytest.mark.kvm
async def test_batched_writes_arrive_first():
    class Posted(Device):
        data = Register(0, int, posted=True)

        def __init__(self) -> None:
            self.seen: list[int] = []

        @data.on_write
        def take(self, value: int) -> None:
            self.seen.append(value)

    writes = ("mov al, 1", "out 0x60, al", "mov al, 2", "out 0x60, al", "mov [0x500], al")
    async with deadline(), Machine() as machine:
        device = machine.attach(Posted(), pio=0x60)
        machine.load(Flat(assemble((*writes, *SPIN), "real16", 0x1000), 0x1000))
        run = asyncio.create_task(machine.run())
        cpu = machine.vcpus[0]
        await until(lambda: cpu.inside and machine.memory.read(0x500, 1) == b"\2")
        await machine.drain()
        assert device.seen == [1, 2]
        machine.resume()
        machine.stop()
        await run


class Posted(Device):
    """Takes batched writes, each when `go_on` is set; the first may do something else."""

    data = Register(0, int, posted=True)

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.begun: list[int] = []
        self.seen: list[int] = []
        self.first: Callable[[], Awaitable[None]] | None = None

    @data.on_write
    async def take(self, value: int) -> None:
        self.begun.append(value)
        if value == 1 and self.first is not None:
            await self.first()
        await self.go_on.wait()
        self.seen.append(value)


@pytest.fixture
async def posting() -> AsyncIterator[tuple[Machine, Posted]]:
    """A machine whose guest has made three batched writes that nobody has served yet."""
    outs = [line for n in (1, 2, 3) for line in (f"mov al, {n}", "out 0x60, al")]
    async with deadline(), Machine(memory="1M") as machine:
        device = machine.attach(Posted(), pio=0x60)
        code = (*outs, "mov [0x500], al", *SPIN)
        machine.load(Flat(assemble(code, "real16", 0x1000), 0x1000))
        while machine.memory.read(0x500, 1) != b"\3":
            await machine.vcpus[0].run(2_000_000)
        yield machine, device


@pytest.mark.kvm
async def test_drain_that_gives_up_cuts_no_batched_write_short(posting):
    machine, device = posting
    with pytest.raises(DrainTimeout, match="posted writes or doorbells are being served"):
        await machine.drain(timeout=0.05)
    assert (device.begun, device.seen) == ([1], [])
    device.go_on.set()
    await machine.drain()
    assert device.seen == [1, 2, 3]


@pytest.mark.kvm
async def test_handler_of_a_batched_write_is_refused_a_drain(posting):
    machine, device = posting
    device.go_on.set()
    device.first = machine.drain
    await machine.drain()  # while this one is under way, too
    with pytest.raises(ConfigurationError, match="cannot be drained by the handler of an access"):
        await machine.checkpoint()
    assert device.seen == [2, 3]


@pytest.mark.kvm
async def test_batched_write_that_ends_the_guest_leaves_the_others(posting):
    async def end() -> None:
        raise EndRun(Exited(3))

    machine, device = posting
    device.go_on.set()
    device.first = end
    await machine.drain()
    assert device.seen == [2, 3]
    assert not machine.vcpus[0].model.has_posted()
    machine.resume()
    assert await machine.run() == Exited(3)


@pytest.mark.kvm
@pytest.mark.parametrize("turns", range(0, 12, 2))
async def test_closing_while_batched_writes_hold_a_drain(posting, turns):
    machine, device = posting
    drain = asyncio.create_task(machine.drain())
    for _ in range(turns):
        await asyncio.sleep(0)
    close = asyncio.create_task(machine.close())
    await asyncio.sleep(0)
    device.go_on.set()
    await close
    with pytest.raises(ConfigurationError, match="closed"):
        await drain


@pytest.mark.kvm
async def test_end_of_an_activity_waits_until_the_machine_goes_on(boot):
    """EndRun in run() of a device while all is at rest: the active run() tells of it then."""
    ends = asyncio.Event()

    class Ending(Device):
        size = 1

        async def run(self) -> None:
            await ends.wait()
            raise EndRun(Exited(5))

    machine = boot(*SPIN)
    machine.attach(Ending(), pio=0x60)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.vcpus[0].inside)
        async with machine.drained():
            ends.set()
            await asyncio.sleep(0.01)
            assert not run.done()
            assert machine.kept_outcome() == Exited(5)
        assert await run == Exited(5)


@pytest.mark.kvm
async def test_doorbells_have_rung_first():
    class Rung(Device):
        bell = Register(0, doorbell=True)

    rings = ("mov cx, 5", "again: out 0x60, al", "loop again", "mov byte ptr [0x500], 1")
    lines = (*rings, *SPIN)
    async with deadline(), Machine() as machine:
        device = machine.attach(Rung(), pio=0x60)
        machine.load(Flat(assemble(lines, "real16", 0x1000), 0x1000))
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.vcpus[0].inside and machine.memory.read(0x500, 1) == b"\1")
        saved = await machine.checkpoint()
        assert saved.devices["rung0"].registers == {"bell": 5}
        device.bell.pending = 0
        await machine.restore(saved)
        assert device.bell.pending == 5
        machine.stop()
        await run


# ---- timeouts, cancellation, misuse ------------------------------------------------------


@pytest.mark.kvm
async def test_timeout_names_who_holds_it_and_leaves_it_running(boot):
    machine = boot("in al, 0x60", *SPIN)
    release = asyncio.Event()
    machine.attach(Diary(during=release.wait), pio=0x60)
    worker = machine.attach(Worker(steps=10_000), pio=0x70)
    cpu = machine.vcpus[0]
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: cpu.state is PENDING)
        worker.begin()
        await until(lambda: worker.done)
        with pytest.raises(DrainTimeout) as caught:
            await machine.drain(timeout=0.05)
        assert str(caught.value) == (
            "machine not at rest within 0.05 s: cpu0 waits for a read from pio 0x60 (1 byte) "
            "(RunningMMIOPending); worker0 is busy: copying"
        )
        release.set()
        await until(lambda: cpu.inside)
        machine.stop()
        assert await run == Stopped("stopped")


@pytest.mark.kvm
async def test_cancelled_drain_leaves_it_running(boot):
    machine = boot("in al, 0x60", *SPIN)
    release = asyncio.Event()
    machine.attach(Diary(during=release.wait), pio=0x60)
    cpu = machine.vcpus[0]
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: cpu.state is PENDING)
        drain = asyncio.create_task(machine.drain())
        await asyncio.sleep(0.01)
        drain.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drain
        release.set()
        await until(lambda: cpu.inside)
        machine.stop()
        await run


@pytest.mark.kvm
async def test_refused_where_it_would_wait_for_itself(boot):
    refusals: list[str] = []

    class Suicidal(Worker):
        async def attempt(self) -> None:
            with pytest.raises(ConfigurationError) as caught:
                await machine.drain()
            refusals.append(str(caught.value))

        async def read(self, offset: int, size: int) -> int:
            await self.attempt()
            return 0

        async def run(self) -> None:
            async with self.busy("draining"):
                await self.attempt()

    machine = boot("in al, 0x60", "hlt")
    machine.attach(Suicidal(), pio=0x60)
    async with deadline():
        assert await machine.run() == Halted()
    assert sorted(refusal.split(":")[0] for refusal in refusals) == [
        "machine cannot be drained by the handler of an access",
        "machine cannot be drained within busy() of suicidal0",
    ]


def is_busy_or_over(machine: Machine, busy: asyncio.Task[None]) -> bool:
    return machine.barrier.is_moving or machine.barrier.is_down or busy.done()


async def brief_checkpoint(machine: Machine, saved: Checkpoint) -> None:
    await machine.checkpoint()


async def brief_restore(machine: Machine, saved: Checkpoint) -> None:
    await machine.restore(saved)


async def brief_fork(machine: Machine, saved: Checkpoint) -> None:
    (copy,) = await machine.fork(1)
    await copy.close()


@pytest.mark.kvm
@pytest.mark.parametrize("brief", [brief_checkpoint, brief_restore, brief_fork])
async def test_run_that_begins_while_somebody_takes_a_checkpoint(boot, brief):
    """It is nobody's drain to resume: run() goes on from there, and can be stopped meanwhile."""
    machine = boot("again: inc word ptr [0x5000]", "jmp again")
    async with deadline(30):
        saved = await machine.checkpoint()
        for stops_before in (False, True) * 5:
            busy = asyncio.create_task(brief(machine, saved))
            await until(functools.partial(is_busy_or_over, machine, busy))
            run = asyncio.create_task(machine.run())
            await asyncio.sleep(0)
            if not stops_before:
                await busy
                machine.memory.write(0x5000, bytes(2))
                await until(lambda: machine.memory.read(0x5000, 2) != bytes(2))
            machine.stop("seen")
            assert await run == Stopped("seen")
            await busy


@pytest.mark.kvm
async def test_run_is_refused_while_the_user_drains_too(boot):
    machine = boot(*SPIN)
    async with deadline(), machine.drained():
        busy = asyncio.create_task(machine.checkpoint())
        await asyncio.sleep(0)
        with pytest.raises(ConfigurationError, match="drained and cannot be run; resume"):
            await machine.run()
        await busy


class Draining(Device):
    """Its handler drains its own machine, in a way that a test sets."""

    size = 1

    def __init__(self, how: Callable[[], Awaitable[None]]) -> None:
        self.how = how
        self.error: Exception | None = None

    async def read(self, offset: int, size: int) -> int:
        try:
            await self.how()
        except Exception as error:
            self.error = error
        return 0


@pytest.mark.kvm
@pytest.mark.parametrize("through", ["task", "two tasks", "wait_for"])
async def test_refused_through_a_task_that_the_handler_awaits(boot, through):
    async def drain() -> None:
        await machine.drain(timeout=5)

    async def two() -> None:
        await asyncio.create_task(drain())

    async def how() -> None:
        if through == "wait_for":
            await asyncio.wait_for(drain(), 2)
        else:
            await asyncio.create_task(drain() if through == "task" else two())

    machine = boot("in al, 0x60", "hlt")
    device = machine.attach(Draining(how), pio=0x60)
    async with deadline():
        assert await machine.run() == Halted()
    assert isinstance(device.error, ConfigurationError)
    assert str(device.error).startswith("machine cannot be drained by the handler of an access")


@pytest.mark.kvm
async def test_refused_through_a_task_that_a_busy_section_awaits(boot):
    class Copying(Worker):
        error = None

        async def run(self) -> None:
            async with self.busy("copying"):
                try:
                    await asyncio.create_task(machine.drain())
                except ConfigurationError as error:
                    self.error = str(error)

    machine = boot("hlt")
    device = machine.attach(Copying())
    async with deadline():
        await machine.run()
        await until(lambda: device.error)
    assert device.error.startswith("machine cannot be drained within busy() of copying0")


@pytest.mark.kvm
async def test_timeout_of_a_drain_that_a_handler_has_started_says_so(boot):
    async def in_a_group() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(machine.drain(timeout=0.05))

    machine = boot("in al, 0x60", "hlt")
    device = machine.attach(Draining(in_a_group), pio=0x60)
    async with deadline():
        assert await machine.run() == Halted()
    assert isinstance(device.error, ExceptionGroup)
    (timeout,) = device.error.exceptions
    assert isinstance(timeout, DrainTimeout)
    assert str(timeout) == (
        "machine not at rest within 0.05 s: cpu0 waits for a read from pio 0x60 (1 byte) "
        "(RunningMMIOPending); the handler of an access of cpu0 has started the task that drains, "
        "and must not wait for it"
    )


@pytest.mark.kvm
async def test_task_that_a_handler_starts_and_does_not_await_may_drain(boot):
    tasks: list[asyncio.Task[None]] = []

    async def drain() -> None:
        async with machine.drained():
            machine.memory.write(0x5000, b"\1")

    async def how() -> None:
        tasks.append(asyncio.create_task(drain()))
        await asyncio.sleep(0.01)

    machine = boot("in al, 0x60", "wait: cmp byte ptr [0x5000], 0", "je wait", "hlt")
    machine.attach(Draining(how), pio=0x60)
    async with deadline():
        assert await machine.run() == Halted()
        await tasks[0]


@pytest.mark.kvm
async def test_without_a_run_and_what_is_refused_while_drained(boot):
    machine = boot("hlt")
    async with deadline():
        await machine.drain()
        with pytest.raises(ConfigurationError, match="drained and cannot be run; resume"):
            await machine.run()
        with pytest.raises(ConfigurationError, match="drained and cannot be stepped"):
            await machine.vcpus[0].run(1000)
        machine.resume()
        assert machine.vcpus[0].stats.numVMExits == 0
        assert await machine.run() == Halted()
        machine.resume()  # nothing to resume: harmless


@pytest.mark.kvm
async def test_each_holder_holds_it(boot):
    machine = boot(*SPIN)
    cpu = machine.vcpus[0]
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: cpu.inside)
        async with machine.drained():
            await machine.drain()
            async with machine.drained():
                pass
            assert cpu.state is IDLE
        assert cpu.state is IDLE
        machine.resume()
        assert cpu.state is RUNNING
        machine.stop()
        await run


@pytest.mark.kvm
async def test_resume_before_it_is_at_rest_ends_nothing(boot):
    machine = boot(*SPIN)
    cpu = machine.vcpus[0]
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: cpu.inside)
        drain = asyncio.create_task(machine.drain())
        await until(lambda: machine.barrier.is_moving)
        machine.resume()
        await drain
        assert cpu.state is IDLE
        machine.resume()
        assert cpu.state is RUNNING
        machine.stop()
        await run


@pytest.mark.kvm
async def test_cancelled_drain_leaves_another_its_hold(boot):
    machine = boot(*SPIN)
    cpu = machine.vcpus[0]
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: cpu.inside)
        one, other = (asyncio.create_task(machine.drain()) for _ in range(2))
        await until(lambda: machine.barrier.is_moving)
        one.cancel()
        await other
        assert cpu.state is IDLE
        machine.resume()
        assert cpu.state is RUNNING
        machine.stop()
        await run


@pytest.mark.kvm
async def test_several_machines_together(boot):
    """Neither is at rest alone: what one does to the other is over in both."""
    one, other = boot(*SPIN), boot(*SPIN)
    first, second = Worker(), Worker()
    one.attach(second, pio=0x60)
    other.attach(first, pio=0x60)
    first.next_one = second
    async with deadline():
        runs = [asyncio.create_task(machine.run()) for machine in (one, other)]
        await until(lambda: one.vcpus[0].inside and other.vcpus[0].inside)
        first.begin()
        await until(lambda: first.done)
        async with kvmaio.drained(one, other):
            assert (first.done, second.done) == (5, 5)
            assert (one.vcpus[0].state, other.vcpus[0].state) == (IDLE, IDLE)
        assert (one.vcpus[0].state, other.vcpus[0].state) == (RUNNING, RUNNING)
        # The other way round at the same time: no deadlock.
        await asyncio.gather(*(drain_once(*pair) for pair in ((one, other), (other, one))))
        for machine in (one, other):
            machine.stop()
        await asyncio.gather(*runs)


async def drain_once(*machines: Machine) -> None:
    async with kvmaio.drained(*machines):
        await asyncio.sleep(0.001)


@pytest.mark.kvm
async def test_closing_ends_a_drain(boot):
    machine = boot("in al, 0x60", "hlt")
    machine.attach(Diary(during=asyncio.Event().wait), pio=0x60)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.vcpus[0].state is PENDING)
        drain = asyncio.create_task(machine.drain())
        await asyncio.sleep(0)
        await machine.close()
        with pytest.raises(ConfigurationError, match="closed"):
            await drain
        await run


async def test_final_exit_is_at_rest(monkeypatch):
    """An exit that nothing answers holds no drain; the next run reports it."""
    cpu = ScriptedCpu(plain(9, fail_entry={"cpu": 1}))
    async with deadline(), scripted_machine(monkeypatch, cpu) as machine:
        with pytest.raises(kvmaio.GuestError):
            await machine.run()
        async with machine.drained():
            assert machine.vcpus[0].state is IDLE
        with pytest.raises(kvmaio.GuestError):
            await machine.run()


async def test_shutdown_is_kept(monkeypatch):
    cpu = ScriptedCpu(plain(8))
    async with deadline(), scripted_machine(monkeypatch, cpu) as machine:
        await machine.vcpus[0].run()
        await machine.drain()
        machine.resume()
        assert isinstance(await machine.run(), kvmaio.Shutdown)
        assert cpu.log.count("enter") == 1


async def test_string_output_is_served_whole(monkeypatch):
    cpu = ScriptedCpu(port_out(0x60, 1, 2, 3), halt())
    async with deadline(), scripted_machine(monkeypatch, cpu) as machine:
        diary = machine.attach(Diary(), pio=0x60)
        await machine.vcpus[0].run()
        await machine.drain()
        assert [entry[-1] for entry in diary.entries] == [1, 2, 3]
