"""`await vcpu.at_instruction(n)`: exact where the host can, refused with the reason where not."""

import asyncio

import pytest

from kvmaio import ConfigurationError, Device, Halted, Machine, Register, Stopped
from kvmaio.cpu import EntryResult
from kvmaio.exits import InterruptedExit, IoExit
from kvmaio.stats import CpuStatistics
from kvmaio.vcpu.instruction_events import InstructionEvents
from tests.engine.support import Diary, deadline, host_only
from tests.engine.test_section_a import lone_vcpu
from tests.scripted import INTERRUPTED


class Scratch(Device):
    """One register; a read answers 7."""

    size = 8
    cell = Register(0, int, bits=32)

    def __init__(self) -> None:
        self.written: list[int] = []

    @cell.on_read
    def read_cell(self) -> int:
        return 7

    @cell.on_write
    def write_cell(self, value: int) -> None:
        self.written.append(value)


async def addresses(machine, counts):
    """Run to each count in turn; where the guest is then."""
    found = []
    (vcpu,) = machine.vcpus

    async def follow():
        for count in counts:
            await vcpu.at_instruction(count)
            assert vcpu.stats.numInsts == count
            found.append(vcpu.context.rip)
        machine.stop()

    async with deadline(), asyncio.TaskGroup() as group:
        group.create_task(follow())
        group.create_task(machine.run())
    return found


# ---- on the host's KVM -----------------------------------------------------------------


@pytest.mark.kvm
async def test_every_instruction_of_a_guest(boot):
    machine = boot("mov cx, 2", "again: dec cx", "jnz again", "out 0x10, al", "nop", "in al, 0x10")
    machine.attach(Scratch(), pio=0x10)
    #          mov    dec    jnz    dec    jnz    out    nop    in
    behind = [0x1003, 0x1004, 0x1003, 0x1004, 0x1006, 0x1008, 0x1009, 0x100B]
    assert await addresses(machine, range(1, 9)) == behind
    assert machine.vcpus[0].context.rax & 0xFF == 7


@pytest.mark.kvm
async def test_memory_mapped_accesses_count_once(boot):
    machine = boot(
        *("mov edi, 0xd0000000", "mov [edi], eax", "nop", "mov eax, [edi]", "nop", "hlt"),
        mode="long64",
    )
    device = machine.attach(Scratch(), mmio=0xD000_0000)
    (vcpu,) = machine.vcpus
    found = await addresses(machine, range(1, 6))
    sizes = [after - before for before, after in zip([0x1000, *found], found, strict=False)]
    assert sizes == [5, 3, 1, 3, 1]
    assert (device.written, vcpu.context.rax) == ([0], 7)


@pytest.mark.kvm
async def test_a_repeated_string_instruction_counts_once(boot):
    machine = boot(
        *("mov cx, 3", "mov si, 0x2000", "mov di, 0x3000", "rep movsb", "mov cx, 3"),
        *("mov dx, 0x10", "rep outsb", "mov cx, 2", "rep insb", "nop", "hlt"),
    )
    diary = machine.attach(Diary(1, 2), pio=0x10)
    found = await addresses(machine, [3, 4, 6, 7, 8, 9, 10])
    assert found == [0x1009, 0x100B, 0x1011, 0x1013, 0x1016, 0x1018, 0x1019]
    assert [entry[0] for entry in diary.entries] == ["write"] * 3 + ["read"] * 2


@pytest.mark.kvm
async def test_an_instruction_that_jumps_to_itself_counts_each_time(boot):
    machine = boot("mov cx, 4", "again: loop again", "nop", "hlt")
    assert await addresses(machine, [1, 4, 5, 6]) == [0x1003, 0x1003, 0x1005, 0x1006]


@pytest.mark.kvm
async def test_a_halt_counts_and_halts(boot):
    """PVM's emulator loses a halt that is single-stepped; it is given back."""
    machine = boot("nop", "hlt", "nop")
    (vcpu,) = machine.vcpus
    async with deadline():
        run = asyncio.create_task(machine.run())
        await vcpu.at_instruction(2)
        assert await run == Halted()
    assert (vcpu.context.rip, vcpu.stats.numHalt, vcpu.stats.numInsts) == (0x1002, 1, 2)


@pytest.mark.kvmaio_cpu("kvm")
async def test_an_event_fires_once_and_the_guest_is_free_again(boot):
    machine = boot("mov cx, 1000", "again: dec cx", "jnz again", "hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        run = asyncio.create_task(machine.run())
        await vcpu.at_instruction(3)
        exits = vcpu.stats.numVMExits
        assert vcpu.stats.numInsts == 3
        assert await run == Halted()
    assert vcpu.stats.numVMExits < exits + 100
    # From there on nobody has counted: unknown, not 0.
    assert (vcpu.stats.numInsts, vcpu.stats.ctrInsts, vcpu.stats.totalInsts) == (None,) * 3


@pytest.mark.kvm
async def test_several_wait(boot):
    machine = boot("again: inc ax", "jmp again")
    (vcpu,) = machine.vcpus
    order = []

    async def wait(name, count):
        await vcpu.at_instruction(count)
        order.append((name, count, vcpu.context.rax))

    async with deadline():
        tasks = [asyncio.create_task(wait(*who)) for who in [("a", 7), ("b", 3), ("c", 7)]]
        run = asyncio.create_task(machine.run())
        await asyncio.gather(*tasks)
        machine.stop()
        await run
    assert order == [("b", 3, 2), ("a", 7, 4), ("c", 7, 4)]


@pytest.mark.kvmaio_cpu("kvm")
async def test_a_cancelled_wait_is_forgotten(boot):
    machine = boot("again: inc ax", "jmp again")
    (vcpu,) = machine.vcpus
    async with deadline():
        waits = asyncio.create_task(vcpu.at_instruction(1_000_000))
        await asyncio.sleep(0)
        waits.cancel()
        assert await addresses(machine, [4]) == [0x1000]
        assert (await vcpu.run(1_000_000)).timer_expired  # freely: no step ends it
    assert vcpu.stats.numInsts is None


@pytest.mark.kvm
async def test_what_is_reached_returns_at_once(boot):
    machine = boot("nop", "nop", "nop", "hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        await vcpu.at_instruction(0)
        assert vcpu.stats.numVMExits == 0
        assert await addresses(machine, [2]) == [0x1002]
        exits = vcpu.stats.numVMExits
        await vcpu.at_instruction(2)
        await vcpu.at_instruction(1)
        await vcpu.at_instruction(0, from_now=True)
    assert (vcpu.stats.numVMExits, vcpu.context.rip) == (exits, 0x1002)


@pytest.mark.kvmaio_cpu("kvm")
async def test_from_now(boot):
    """A guest that has run uncounted: no count since its reset, but any count from here."""
    machine = boot("nop", "in al, 0x10", "nop", "nop", "nop", "hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        assert isinstance(await vcpu.run(), IoExit)
        with pytest.raises(ConfigurationError, match="is unknown: it has run"):
            await vcpu.at_instruction(4)
        machine.attach(Scratch(), pio=0x10)
        # The access is completed first: its instruction had begun before.
        await vcpu.run(0)
        run = asyncio.create_task(machine.run())
        await vcpu.at_instruction(2, from_now=True)
        machine.stop()
        await run
    assert (vcpu.context.rip, vcpu.stats.numInsts) == (0x1005, None)


@pytest.mark.kvm
async def test_from_now_in_a_guest_that_runs(boot):
    machine = boot("again: inc eax", "jmp again")
    (vcpu,) = machine.vcpus
    async with deadline():
        run = asyncio.create_task(machine.run())
        await asyncio.sleep(0.02)
        await vcpu.at_instruction(1, from_now=True)
        first = vcpu.context.rip
        await vcpu.at_instruction(4, from_now=True)
        assert vcpu.context.rip == first
        machine.stop()
        await run


@pytest.mark.kvm
async def test_run_by_hand_goes_on_to_the_event(boot):
    machine = boot("nop", "nop", "nop", "nop", "hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        waits = asyncio.create_task(vcpu.at_instruction(3))
        await asyncio.sleep(0)
        assert isinstance(await vcpu.run(), InterruptedExit)
        await waits
        assert vcpu.context.rip == 0x1003
        await vcpu.run()
    assert vcpu.context.rip == 0x1005


@pytest.mark.kvm
async def test_a_load_counts_from_0_again(boot):
    machine = boot("nop", "nop", "nop", "hlt")
    (vcpu,) = machine.vcpus
    assert await addresses(machine, [2]) == [0x1002]
    async with deadline():
        assert await machine.run() == Halted()
    state = vcpu.context
    state.rip = 0x1000
    vcpu.load(state)
    assert await addresses(machine, [1]) == [0x1001]


@pytest.mark.kvm
async def test_registers_edited_by_a_handler(boot):
    """The access is completed by a half entry of the engine's own: its instruction counts."""
    machine = boot("out 0x10, al", "nop", "nop", "hlt")
    (vcpu,) = machine.vcpus

    def edit():
        vcpu.context.rbx = 5

    machine.attach(Diary(during=edit), pio=0x10)
    assert await addresses(machine, [1, 2]) == [0x1002, 0x1003]
    assert vcpu.context.rbx == 5


@pytest.mark.kvm
async def test_posted_writes_are_counted_one_by_one(boot):
    """What C takes in without an exit would go uncounted; it gets exits meanwhile."""

    class Sink(Device):
        cell = Register(0, int, posted="timed")

        def __init__(self) -> None:
            self.written: list[int] = []

        @cell.on_write
        def write_cell(self, value: int) -> None:
            self.written.append(value)

    machine = boot("out 0x10, al", "inc ax", "out 0x10, al", "nop", "out 0x10, al", "hlt")
    sink = machine.attach(Sink(), pio=0x10)
    assert await addresses(machine, [1, 2, 3, 4]) == [0x1002, 0x1003, 0x1005, 0x1006]
    async with deadline():
        assert await machine.run() == Halted()
    assert sink.written == [0, 1, 1]


# ---- interrupts --------------------------------------------------------------------------

# The handler lies behind the halt; vector 0x20's entry in real mode's table points there.
HANDLER = ("sti", "nop", "nop", "nop", "hlt", "handler: inc bx", "iret")


async def interrupted_at_2(machine):
    machine.memory.write(0x20 * 4, bytes((0x05, 0x10, 0, 0)))  # 0000:1005
    (vcpu,) = machine.vcpus
    found = []
    async with deadline():
        run = asyncio.create_task(machine.run())
        await vcpu.at_instruction(2)
        await vcpu.interrupt(0x20)
        try:
            for count in (3, 4, 5):
                await vcpu.at_instruction(count)
                found.append(vcpu.context.rip)
        finally:
            machine.stop()
            await run
    return found


@pytest.mark.kvm
@host_only(pvm=True, why="processors do not single-step into an interrupt's handler")
async def test_a_handler_is_counted_on_pvm(boot):
    assert await interrupted_at_2(boot(*HANDLER)) == [0x1006, 0x1002, 0x1003]


@pytest.mark.kvm
@host_only(pvm=False, why="PVM's emulator steps into an interrupt's handler")
async def test_an_interrupt_ends_the_count_elsewhere(boot):
    with pytest.raises(ConfigurationError, match="cannot single-step into its handler"):
        await interrupted_at_2(boot(*HANDLER))


@pytest.mark.kvm
@host_only(pvm=False, why="PVM's emulator steps into the handler of INT n")
async def test_int_n_ends_the_count_elsewhere(boot):
    machine = boot("nop", "int 0x20", "hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        run = asyncio.create_task(machine.run())
        with pytest.raises(ConfigurationError, match=r"at INT n \(0x1001\)"):
            await vcpu.at_instruction(2)
        machine.stop()
        await run


@pytest.mark.kvm
@host_only(pvm=False, why="PVM's emulator steps between the two")
async def test_behind_mov_ss_a_count_comes_one_late(boot):
    machine = boot("mov ss, ax", "nop", "nop", "nop", "hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        run = asyncio.create_task(machine.run())
        await vcpu.at_instruction(1)
        machine.stop()
        await run
    assert (vcpu.context.rip, vcpu.stats.numInsts) in [(0x1003, 2), (0x1002, 1)]


@pytest.mark.kvm
@host_only(pvm=False, why="PVM steps with KVM's own interrupt controllers, too")
async def test_an_in_kernel_irqchip_is_refused_elsewhere(boot):
    machine = boot("nop", "hlt", irqchip="kernel")
    with pytest.raises(ConfigurationError, match=r"no instruction events here: .*deliver them uns"):
        await machine.vcpus[0].at_instruction(1)


# ---- modes -------------------------------------------------------------------------------


@pytest.mark.kvmaio_cpu("kvm")
@host_only(pvm=True, why="VMX and SVM step in every mode")
async def test_native_code_is_refused_on_pvm(boot):
    machine = boot("nop", "hlt", mode="user64")
    (vcpu,) = machine.vcpus
    async with deadline():
        run = asyncio.create_task(machine.run())
        with pytest.raises(ConfigurationError, match="64-bit user mode, which this host's KVM"):
            await vcpu.at_instruction(1)
        await run
    assert vcpu.stats.numInsts is None


@pytest.mark.kvm
@host_only(pvm=False, why="PVM runs 64-bit user mode natively, and cannot step there")
async def test_user_mode_elsewhere(boot):
    machine = boot("mov ecx, 2", "again: dec ecx", "jnz again", "nop", "hlt", mode="user64")
    assert await addresses(machine, range(1, 7)) == [0x1005, 0x1007, 0x1005, 0x1007, 0x1009, 0x100A]


@pytest.mark.kvm
async def test_a_negative_count(boot):
    machine = boot("hlt")
    with pytest.raises(ConfigurationError, match="instruction -1"):
        await machine.vcpus[0].at_instruction(-1)


@pytest.mark.kvm
async def test_close_cancels_who_waits(boot):
    async with Machine(memory="1M") as machine:
        waits = asyncio.create_task(machine.vcpus[0].at_instruction(5))
        await asyncio.sleep(0)
    async with deadline():
        await asyncio.wait([waits])
    assert waits.cancelled()


@pytest.mark.kvmaio_cpu("kvm")
async def test_a_stop_between_is_no_loss(boot):
    machine = boot("again: inc ax", "jmp again")
    (vcpu,) = machine.vcpus

    async def stop_at(count):
        await vcpu.at_instruction(count)
        machine.stop("there")

    async with deadline():
        waits = asyncio.create_task(stop_at(400))
        for _ in range(5):
            run = asyncio.create_task(machine.run())
            await asyncio.sleep(0.002)
            vcpu.kick()
            machine.stop()
            assert await run == Stopped("stopped")
        assert await machine.run() == Stopped("there")
        await waits
    assert (vcpu.context.rax, vcpu.stats.numInsts) == (200, 400)


# ---- scripted: any CPU model that counts -------------------------------------------------


class Counting:
    """An `InstructionStop` of a model that always counts; each entry executes what it may."""

    counts_always = True
    lost = False
    loses_interrupts = False

    def __init__(self, *executes: int) -> None:
        self.counted = 0
        self.executes = list(executes)
        self.armed: list[int] = []
        self.free = 0

    def refusal(self) -> str | None:
        return None

    def arm(self, remaining: int, access_pending: bool) -> bool:
        self.armed.append(remaining)
        return False

    def entered(self, result: EntryResult) -> EntryResult:
        self.counted += self.executes.pop(0)
        return result

    def disarm(self) -> None:
        self.free += 1


async def test_an_early_stop_arms_the_remainder_and_overshoot_is_accepted():
    """Scripted: 100 wanted, the model stops after 60, then after 45 more."""
    stop = Counting(60, 45)
    events = InstructionEvents(stop, CpuStatistics(), fresh=False)
    future = events.add(100, from_now=False)
    assert events.before_entry(None, False) is None
    events.after_entry(EntryResult.INTERRUPTED)
    assert not future.done()
    events.before_entry(None, False)
    events.after_entry(EntryResult.INTERRUPTED)
    assert future.done() and stop.armed == [100, 40] and events.count == 105
    await events.let_waiters_run()
    assert events.before_entry(5, False) == 5  # nothing waits: as asked, and free
    assert (stop.armed, stop.free) == ([100, 40], 1)


async def test_an_event_at_the_current_count_gets_a_half_entry():
    stop = Counting(10, 0)
    events = InstructionEvents(stop, CpuStatistics(), fresh=False)
    events.add(10, from_now=False)
    events.before_entry(None, False)
    events.after_entry(EntryResult.INTERRUPTED)
    assert events.fired
    await events.let_waiters_run()
    due = events.add(10, from_now=False)
    assert events.before_entry(1_000, False) == 0
    events.after_entry(EntryResult.INTERRUPTED)
    assert due.done() and events.count == 10


async def test_statistics_of_a_model_that_counts():
    stats = CpuStatistics()
    events = InstructionEvents(Counting(7), stats, fresh=False)
    assert (stats.numInsts, stats.ctrInsts, stats.totalInsts) == (0, 0, 0)
    events.add(7, from_now=True)
    events.before_entry(None, False)
    events.after_entry(EntryResult.INTERRUPTED)
    assert (stats.numInsts, stats.ctrInsts, stats.totalInsts) == (7, 7, 7)


async def test_a_model_that_cannot_is_refused():
    """Scripted: the model has no `instruction_stop`."""
    vcpu = lone_vcpu(INTERRUPTED)
    with pytest.raises(ConfigurationError, match="this CPU model cannot stop"):
        await vcpu.at_instruction(3)


# ---- drains, restores, switches ----------------------------------------------------------


@pytest.mark.kvmaio_cpu("kvm")
async def test_counts_since_the_reset_go_with_a_restore(boot):
    """Also with who waits for one; and into another machine."""
    machine, other = boot(*["inc ax"] * 99, "hlt"), boot("hlt")
    (vcpu,) = machine.vcpus

    async def stop_at(count: int) -> None:
        await vcpu.at_instruction(count)
        machine.stop(f"at {count}")

    assert await addresses(machine, [10])
    async with deadline():
        saved = await machine.checkpoint()
        waits = [asyncio.create_task(stop_at(count)) for count in (30, 60)]
        await asyncio.sleep(0)
        assert await machine.run() == Stopped("at 30")
        await machine.restore(saved)
        assert vcpu.stats.numInsts == 10
        assert await machine.run() == Stopped("at 60")
        assert vcpu.context.rax == 60
        await asyncio.gather(*waits)
    async with deadline():
        await other.restore(saved)
        assert await addresses(other, [25])
        assert other.vcpus[0].context.rax == 25
        await other.run()  # uncounted
        assert other.vcpus[0].stats.numInsts is None
        assert (await other.checkpoint()).cpus[0].engine["instructions"] is None


@pytest.mark.kvmaio_cpu("kvm")
async def test_who_waits_across_a_switch_is_told(boot):
    machine = boot("spin: jmp spin")
    (vcpu,) = machine.vcpus
    async with deadline():
        waits = asyncio.create_task(vcpu.at_instruction(1_000_000))
        await asyncio.sleep(0)
        await machine.switch_cpu("kvm")
        with pytest.raises(ConfigurationError, match="another CPU model has taken over"):
            await waits
