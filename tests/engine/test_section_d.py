"""gem5's KVM CPU, section D: which copy of the registers is newer, a test per row."""

import asyncio
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio import Halted, Stopped, VCpuState
from kvmaio.boot import Flat
from kvmaio.cpu import Segment
from kvmaio.dump import format_register
from kvmaio.errors import ConfigurationError
from kvmaio.exits import HaltExit, InterruptedExit, IoExit
from kvmaio.vcpu.registers_sync import Newer
from tests.assembler import assemble
from tests.engine.support import Diary, deadline, until
from tests.engine.test_section_a import SPIN, lone_vcpu
from tests.scripted import INTERRUPTED, halt, plain, port_in, port_out

# ---- contextDirty -----------------------------------------------------------------------------


@pytest.mark.kvm
async def test_context_dirty_write_run_and_the_guest_sees_it(boot):
    machine = boot("out 0x10, al", "out 0x10, al", "hlt")
    (vcpu,) = machine.vcpus
    device = machine.attach(Diary(), pio=0x10)
    context = vcpu.context
    context.rax = 0x31
    async with deadline():
        assert type(await vcpu.run()) is IoExit
        # A context kept from before the run is the same one, and is brought up to date first.
        context.rax = 0x32
        assert vcpu._registers.newer is Newer.CONTEXT
        assert await machine.run() == Halted()
    # The first OUT had its data before the edit; it was still to be served.
    assert device.entries == [("write", 0, 1, 0x31), ("write", 0, 1, 0x32)]


@pytest.mark.kvm
async def test_context_dirty_by_a_write_to_a_part(boot):
    """Also to a part that was itself assigned, and may be assigned to two registers."""
    machine = boot("mov al, es:[0]", "out 0x10, al", "mov al, fs:[0]", "out 0x10, al", "hlt")
    machine.memory.write(0x3000, b"E")
    machine.memory.write(0x4000, b"F")
    (vcpu,) = machine.vcpus
    device = machine.attach(Diary(), pio=0x10)
    shared = Segment()
    vcpu.context.es = shared
    vcpu.context.fs = shared
    vcpu.context.es.base = 0x3000
    vcpu.context.fs.base = 0x4000
    assert shared.base == 0
    async with deadline():
        assert await machine.run() == Halted()
    assert device.entries == [("write", 0, 1, ord("E")), ("write", 0, 1, ord("F"))]


@pytest.mark.kvm
@pytest.mark.parametrize("served", [True, False], ids=["served", "not served"])
async def test_context_dirty_while_a_read_is_pending_loses_nothing(boot, served):
    """KVM writes the data of an IN when it is entered again: pushing registers first loses it."""
    machine = boot("in al, 0x10", "hlt")
    (vcpu,) = machine.vcpus
    device = machine.attach(Diary(0x42), pio=0x10)
    async with deadline():
        assert type(await vcpu.run()) is IoExit
        if served:
            device.during = lambda: setattr(vcpu.context, "rbx", 5)
        else:
            vcpu.context.rbx = 5
        assert await machine.run() == Halted()
    assert (vcpu.context.rax & 0xFF, vcpu.context.rbx) == (0x42, 5)


@pytest.mark.kvm
async def test_context_dirty_after_an_exit_stepped_over_by_hand(boot):
    machine = boot("in al, 0x10", "hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        assert type(await vcpu.run()) is IoExit
        vcpu.model.io_words[1][vcpu.model.page.io.data_offset] = 0x24
        vcpu.context.rbx = 5
        assert type(await vcpu.run()) is HaltExit
    assert (vcpu.context.rax & 0xFF, vcpu.context.rbx) == (0x24, 5)


@pytest.mark.kvm
@pytest.mark.parametrize("code", ["in al, 0x10", "mov ecx, 300; mov dx, 0x10; rep outsb"])
async def test_load_after_an_exit_that_was_not_served(boot, code):
    """What the old guest's access would still do must not reach the new guest."""
    machine = boot(code, "hlt")
    (vcpu,) = machine.vcpus
    machine.attach(Diary(0x42), pio=0x10)
    async with deadline():
        assert type(await vcpu.run()) is IoExit
        machine.load(Flat(assemble(["nop", "inc bx", "hlt"], address=0x2000), 0x2000))
        assert await machine.run() == Halted()
    context = vcpu.context
    assert (context.rax, context.rbx, context.rcx, context.rip) == (0, 1, 0, 0x2003)


# ---- kvmStateDirty -------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_kvm_state_dirty_reading_the_context_twice_costs_one_register_read(boot, monkeypatch):
    machine = boot("mov bx, 1", "out 0x10, al", "hlt")
    (vcpu,) = machine.vcpus
    reads = []
    read_context = vcpu.model.read_context

    def count():
        reads.append(1)
        return read_context()

    monkeypatch.setattr(vcpu.model, "read_context", count)
    async with deadline():
        await vcpu.run()
    assert vcpu._registers.newer is Newer.MODEL
    assert (vcpu.context.rbx, vcpu.context.rip > 0x1000) == (1, True)
    assert (len(reads), vcpu._registers.newer) == (1, Newer.NEITHER)


@pytest.mark.kvm
async def test_kvm_state_dirty_only_after_an_entry_that_happened(boot):
    machine = boot("hlt")
    (vcpu,) = machine.vcpus
    vcpu.context.rbx = 1
    assert vcpu._registers.newer is Newer.CONTEXT
    vcpu.suspend()
    assert vcpu._registers.newer is Newer.CONTEXT


# ---- Invariant ---------------------------------------------------------------------------------

ACTIONS = st.one_of(
    st.tuples(st.just("edit"), st.sampled_from(["rax", "rbx", "rip"]), st.integers(0, 255)),
    st.tuples(st.just("edit"), st.sampled_from(["cs", "es"]), st.integers(0, 255)),
    st.tuples(st.just("look")),
    st.tuples(st.just("half entry")),
    st.tuples(st.just("guest sets"), st.sampled_from(["rax", "rbx"]), st.integers(0, 255)),
    st.tuples(st.just("guest reads a port"), st.integers(0, 255)),
    st.tuples(st.just("kick")),
)


@given(st.lists(ACTIONS, max_size=30))
def test_invariant_never_both_dirty_and_no_edit_is_lost(actions):
    """Scripted: a guest of which every register is known at every moment.

    "Both dirty" cannot be represented; that nothing is lost shows that neither is needed.
    """
    asyncio.run(play(actions))


async def play(actions):
    vcpu = lone_vcpu()
    cpu = vcpu.model
    expected = {"rax": 0, "rbx": 0, "rip": 0xFFF0, "cs": 0xFFFF0000, "es": 0}
    pending: list[int] = []  # the data of a port read that the next entry completes
    edited_since: set[str] = set()

    def completed():
        if pending and "rax" not in edited_since:
            expected["rax"] = expected["rax"] & ~0xFF | pending[0]
        pending.clear()
        edited_since.clear()

    for action in actions:
        match action:
            case ("edit", ("cs" | "es") as name, value):
                getattr(vcpu.context, name).base = value
                expected[name] = value
                edited_since.add(name)
            case ("edit", name, value):
                setattr(vcpu.context, name, value)
                expected[name] = value
                edited_since.add(name)
            case ("look",):
                shown = dict(expected)
                assert visible(vcpu) == shown
                assert vcpu._registers.newer is not Newer.MODEL
            case ("half entry",):
                await vcpu.run(0)
                completed()
            case ("guest sets", name, value):
                cpu.steps = deque([setting(name, value)])
                await vcpu.run()
                completed()
                expected[name] = value
            case ("guest reads a port", data):
                cpu.steps = deque([port_in(0x60)])
                await vcpu.run()
                completed()
                cpu.io_words[1][4096] = data
                pending.append(data)
            case ("kick",):
                cpu.steps = deque([INTERRUPTED])
                await vcpu.run()
                completed()
    await vcpu.run(0)
    completed()
    assert visible(vcpu) == expected
    registers = cpu.registers
    assert (registers.rax, registers.rbx, registers.rip) == (
        expected["rax"],
        expected["rbx"],
        expected["rip"],
    )


def visible(vcpu):
    context = vcpu.context
    return {
        "rax": context.rax,
        "rbx": context.rbx,
        "rip": context.rip,
        "cs": context.cs.base,
        "es": context.es.base,
    }


def setting(name, value):
    def step(cpu):
        setattr(cpu.registers, name, value)
        return plain(7)(cpu)

    return step


# ---- getContext ---------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_get_context_the_pc_is_current_after_a_run(boot):
    machine = boot("nop", "nop", "hlt")
    (vcpu,) = machine.vcpus
    assert vcpu.context.rip == 0x1000
    async with deadline():
        assert await machine.run() == Halted()
    assert vcpu.context.rip == 0x1003


@pytest.mark.kvm
async def test_get_context_is_refused_while_the_guest_runs(boot):
    machine = boot(*SPIN)
    (vcpu,) = machine.vcpus
    context = vcpu.context
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: vcpu.inside)
        with pytest.raises(ConfigurationError, match="the guest is running"):
            _ = vcpu.context
        with pytest.raises(ConfigurationError, match="the guest is running"):
            context.rax = 1
        with pytest.raises(ConfigurationError, match="the guest is running"):
            vcpu.dump()
        machine.stop()
        await run
    assert vcpu.context.rip in (0x1000, 0x1001)


@pytest.mark.kvm
async def test_get_context_is_refused_once_the_machine_is_closed(boot):
    machine = boot("hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        await machine.run()
    await machine.close()
    for look in (lambda: vcpu.context, vcpu.dump):
        with pytest.raises(ConfigurationError, match="the machine is closed"):
            look()


# ---- Registers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bits", "text"),
    [
        (0x5, 8, "0x05"),
        (0x1234, 16, "0x1234"),
        (0x1234, 32, "0x00001234"),
        (0x1234, 64, "0x0000000000001234"),
        (0x0201, 128, "[01 02" + " 00" * 14 + "]"),
    ],
)
def test_registers_are_formatted_by_their_width(value, bits, text):
    assert format_register(value, bits) == text


# ---- Interrupt, NMI ----------------------------------------------------------------------------

HANDLERS = (
    *("mov word ptr [0x31*4], offset irq31", "mov word ptr [0x31*4+2], 0"),
    *("mov word ptr [0x32*4], offset irq32", "mov word ptr [0x32*4+2], 0"),
    *("mov word ptr [2*4], offset nmi", "mov word ptr [2*4+2], 0"),
)
REPORTS = (
    *("irq31: mov al, 0x31", "out 0x10, al", "iret"),
    *("irq32: mov al, 0x32", "out 0x10, al", "iret"),
    *("nmi: mov al, 2", "out 0x10, al", "iret"),
)


@pytest.mark.kvm
async def test_interrupt_and_nmi_count_and_vector(boot):
    machine = boot(*HANDLERS, "sti", "wait: hlt", "jmp wait", *REPORTS)
    (vcpu,) = machine.vcpus
    device = machine.attach(Diary(), pio=0x10)
    async with deadline():
        run = asyncio.create_task(machine.run())
        for done, deliver in enumerate([(0x31,), (0x32,), (), (0x31,)], start=1):
            await until(lambda: vcpu.halted and vcpu.state is VCpuState.IDLE)
            await (vcpu.interrupt(*deliver) if deliver else vcpu.nmi())
            await until(device.reached(done))
            assert vcpu.stats.numInterrupts == done
        await until(lambda: vcpu.halted)
        machine.stop()
        await run
    assert [entry[3] for entry in device.entries] == [0x31, 0x32, 2, 0x31]


@pytest.mark.kvm
async def test_interrupt_needs_the_guest_to_be_ready(boot):
    """Pended while interrupts are off: it waits, and is not lost."""
    machine = boot(
        *HANDLERS,
        *("out 0x20, al", "mov cx, 500", "again: loop again", "out 0x20, al"),
        *("sti", "here: jmp here"),
        *REPORTS,
    )
    (vcpu,) = machine.vcpus
    device = machine.attach(Diary(during=lambda: machine.stop("taken")), pio=0x10)
    gate = machine.attach(Diary(), pio=0x20)
    counts = []

    def pend():
        if len(gate.entries) == 1:
            vcpu.trigger(0x31)
            vcpu.trigger(0x31)  # pending already: once is enough
        counts.append(vcpu.stats.numInterrupts)

    gate.during = pend
    async with deadline():
        assert await machine.run() == Stopped("taken")
    assert counts == [0, 0]
    assert (device.entries, vcpu.stats.numInterrupts) == ([("write", 0, 1, 0x31)], 1)


async def test_interrupt_of_no_vector_is_an_error():
    vcpu = lone_vcpu(halt(), port_out(1, 1))
    for vector in (-1, 256):
        with pytest.raises(ConfigurationError, match=f"interrupt vector {vector}: 0 to 255"):
            await vcpu.interrupt(vector)
    assert await vcpu.run(0) == InterruptedExit(ticks=1)
