"""gem5's KVM CPU, section C: exits, a test per row."""

import asyncio
from collections import deque

import pytest

from kvmaio import (
    Access,
    Device,
    EmulationFailure,
    EndRun,
    GuestError,
    Halted,
    Register,
    Shutdown,
    Stopped,
    VCpuState,
    current_vcpu,
)
from kvmaio.cpu import PostedWrites
from kvmaio.decode import Reason
from kvmaio.devices import PciConfigPorts, PseudoOpWindow
from kvmaio.exits import (
    DebugEventExit,
    ExceptionExit,
    FailEntryExit,
    HaltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoapicEoiExit,
    IoExit,
    IrqWindowExit,
    MmioExit,
    MsrExit,
    OtherExit,
    ShutdownExit,
    SystemEventExit,
    UnknownExit,
)
from kvmaio.kvm._native import ffi, lib
from kvmaio.kvm.gate import check
from tests.engine.support import Diary, deadline, host_only, is_pvm, until
from tests.engine.test_section_a import lone_vcpu
from tests.scripted import (
    ScriptedCpu,
    halt,
    mmio_write,
    plain,
    port_in,
    port_out,
    scripted_machine,
)

MMIO = 0x0100_0000  # 16 MiB: just behind RAM
COMPLETION = VCpuState.RUNNING_SERVICE_COMPLETION


# ---- IO -------------------------------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("code", "size", "value"),
    [
        ("mov al, 0x12; out 0x10, al", 1, 0x12),
        ("mov ax, 0x1234; out 0x10, ax", 2, 0x1234),
        ("mov eax, 0x12345678; out 0x10, eax", 4, 0x1234_5678),
    ],
)
async def test_io_writes_of_each_size(boot, code, size, value):
    machine = boot(code, "hlt")
    device = machine.attach(Diary(), pio=0x10)
    async with deadline():
        assert await machine.run() == Halted()
    assert device.entries == [("write", 0, size, value)]
    assert machine.vcpus[0].stats.numIO == 1


@pytest.mark.kvm
@pytest.mark.parametrize(("register", "size"), [("al", 1), ("ax", 2), ("eax", 4)])
async def test_io_reads_of_each_size_leave_the_rest_of_rax(boot, register, size):
    machine = boot("mov eax, 0x11111111", f"in {register}, 0x10", "hlt")
    device = machine.attach(Diary(0xAABB_CCDD), pio=0x10)
    async with deadline():
        assert await machine.run() == Halted()
    mask = (1 << 8 * size) - 1
    assert machine.vcpus[0].context.rax == 0x1111_1111 & ~mask | 0xAABB_CCDD & mask
    assert device.entries == [("read", 0, size)]


@pytest.mark.kvm
async def test_io_goes_to_running_service_completion(boot):
    machine = boot("out 0x10, al", "hlt")
    (vcpu,) = machine.vcpus
    states = []
    machine.attach(Diary(during=lambda: states.append(vcpu.state)), pio=0x10)
    async with deadline():
        await machine.run()
    assert states == [COMPLETION]


@pytest.mark.kvm
async def test_io_rep_insb_with_count_4_is_4_reads_with_the_data_in_order(boot):
    machine = boot("mov dx, 0x10", "mov di, 0x2000", "mov cx, 4", "rep insb", "hlt")
    device = machine.attach(Diary(1, 2, 3, 4, 5), pio=0x10)
    async with deadline():
        assert await machine.run() == Halted()
    assert machine.memory.read(0x2000, 6) == bytes([1, 2, 3, 4, 0, 0])
    assert device.entries == [("read", 0, 1)] * 4


@pytest.mark.kvm
@pytest.mark.parametrize(("suffix", "size"), [("b", 1), ("w", 2), ("d", 4)])
async def test_io_rep_outs_advances_the_data_by_its_size(boot, suffix, size):
    machine = boot("mov dx, 0x10", "mov si, 0x2000", "mov cx, 3", f"rep outs{suffix}", "hlt")
    machine.memory.write(0x2000, bytes(range(1, 13)))
    device = machine.attach(Diary(), pio=0x10)
    async with deadline():
        assert await machine.run() == Halted()
    data = [bytes(range(1, 13))[i * size : (i + 1) * size] for i in range(3)]
    assert device.entries == [("write", 0, size, int.from_bytes(d, "little")) for d in data]


@pytest.mark.kvm
@pytest.mark.parametrize("awaits", [False, True], ids=["plain", "suspending"])
async def test_io_rep_insb_across_many_exits(boot, awaits):
    """5000 bytes: more than KVM reads ahead in one exit."""

    class Source(Device):
        size = 1
        given = 0

        def read(self, offset, size):
            self.given += 1
            return self._later(self.given) if awaits and self.given % 100 == 0 else self.given

        async def _later(self, value):
            await asyncio.sleep(0)
            return value

    machine = boot("mov dx, 0x10", "mov di, 0x2000", "mov cx, 5000", "rep insb", "hlt")
    source = machine.attach(Source(), pio=0x10)
    async with deadline(30):
        assert await machine.run() == Halted()
    assert source.given == 5000
    assert machine.memory.read(0x2000, 5001) == bytes(i & 0xFF for i in range(1, 5001)) + b"\0"


# ---- PCI ports --------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_pci_ports_a_byte_read_at_0xcfe_hits_offset_2(boot):
    machine = boot(
        *("mov eax, 0x80000008", "mov dx, 0xcf8", "out dx, eax"),
        *("mov dx, 0xcfe", "in al, dx", "mov bl, al"),
        *("xor eax, eax", "mov dx, 0xcf8", "out dx, eax"),  # bit 31 clear: a plain port
        *("mov dx, 0xcfe", "in al, dx", "hlt"),
    )
    space = bytearray(range(256))
    machine.attach(PciConfigPorts(), pio=0xCF8).add(0, 0, 0, space)
    async with deadline():
        assert await machine.run() == Halted()
    context = machine.vcpus[0].context
    assert (context.rbx & 0xFF, context.rax & 0xFF) == (0x0A, 0xFF)


# ---- MMIO -------------------------------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize("size", [1, 2, 4, 8])
async def test_mmio_each_size(boot, size):
    register = {1: "al", 2: "ax", 4: "eax", 8: "rax"}[size]
    machine = boot(
        f"mov rbx, {MMIO}",
        "mov rax, 0x1122334455667788",
        f"mov [rbx], {register}",
        f"mov {register}, [rbx]",
        "hlt",
        mode="long64",
    )
    device = machine.attach(Diary(0xFFEE_DDCC_BBAA_9988), mmio=MMIO)
    async with deadline():
        assert await machine.run() == Halted()
    mask = (1 << 8 * size) - 1
    written = 0x1122_3344_5566_7788
    read = 0xFFEE_DDCC_BBAA_9988 & mask
    kept = 0 if size >= 4 else written & ~mask  # a 32-bit load clears the upper half
    assert device.entries == [("write", 0, size, written & mask), ("read", 0, size)]
    assert machine.vcpus[0].context.rax == kept | read
    assert machine.vcpus[0].stats.numMMIO == 2


@pytest.mark.kvmaio_cpu("kvm")
async def test_mmio_that_crosses_a_page_is_one_access_per_page(boot):
    machine = boot(f"mov rbx, {MMIO + 0xFFE}", "mov eax, [rbx]", "hlt", mode="long64")

    class Page(Device):
        size = 0x2000

        def read(self, offset, size):
            return int.from_bytes(bytes((offset + i) & 0xFF for i in range(size)), "little")

    machine.attach(Page(), mmio=MMIO)
    async with deadline():
        assert await machine.run() == Halted()
    assert machine.vcpus[0].context.rax == 0x0100_FFFE
    assert machine.vcpus[0].stats.numMMIO == 2


@pytest.mark.kvm
async def test_mmio_a_handler_that_suspends_leaves_idle(boot):
    machine = boot(f"mov ebx, {MMIO}", "mov eax, [ebx]", "hlt", mode="prot32")
    (vcpu,) = machine.vcpus
    device = machine.attach(Diary(0x77, during=vcpu.suspend), mmio=MMIO)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: device.entries and vcpu.state is VCpuState.IDLE)
        entries = vcpu.stats.numVMExits
        for _ in range(50):
            await asyncio.sleep(0)
        assert (vcpu.state, vcpu.stats.numVMExits) == (VCpuState.IDLE, entries)
        vcpu.activate()
        assert await run == Halted()
    assert vcpu.context.rax == 0x77


# ---- Pseudo-op --------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_pseudo_op_a_load_returns_the_value_and_edits_reach_the_guest(boot):
    machine = boot(
        "mov rdi, 40",
        "mov rsi, 2",
        "mov rbx, 0xffff2300",
        "mov rax, [rbx]",
        "mov [0x3000], rcx",
        "hlt",
        mode="long64",
    )
    window = machine.attach(PseudoOpWindow(), mmio=0xFFFF_0000)

    @window.operation(0x23)
    def add():
        context = current_vcpu().context
        context.rcx = 0xED17
        return context.rdi + context.rsi

    async with deadline():
        assert await machine.run() == Halted()
    context = machine.vcpus[0].context
    assert (context.rax, context.rcx) == (42, 0xED17)
    assert int.from_bytes(machine.memory.read(0x3000, 8), "little") == 0xED17


@pytest.mark.kvm
async def test_pseudo_op_an_edit_of_the_register_that_the_load_fills(boot):
    """The edit is later than the instruction: it wins, also where it changes nothing."""
    machine = boot("mov rbx, 0xffff2300", "mov rax, [rbx]", "hlt", mode="long64")
    window = machine.attach(PseudoOpWindow(), mmio=0xFFFF_0000)

    @window.operation(0x23)
    async def keep():
        context = current_vcpu().context
        await asyncio.sleep(0)
        context.rax = context.rax
        return 0x1234

    async with deadline():
        assert await machine.run() == Halted()
    assert machine.vcpus[0].context.rax == 0


# ---- HYPERCALL --------------------------------------------------------------------------------


def hypercall(number, *arguments):
    args = list(arguments) + [0] * (6 - len(arguments))
    return plain(Reason.HYPERCALL, hypercall={"nr": number, "args": args, "flags": 1})


@pytest.mark.parametrize("awaits", [False, True], ids=["plain", "async"])
async def test_hypercall_reaches_the_registered_handler(monkeypatch, awaits):
    """Scripted: PVM has no hypercalls for guests; test_hypercall_of_a_guest has one."""
    calls = []

    def plainly(exit_):
        calls.append(exit_)
        return -1

    async def later(exit_):
        await asyncio.sleep(0)
        return plainly(exit_)

    cpu = ScriptedCpu(hypercall(12, 0x1000, 2), halt())
    async with scripted_machine(monkeypatch, cpu) as machine:
        machine.hypercall = later if awaits else plainly
        async with deadline():
            assert await machine.run() == Halted()
        assert calls == [HypercallExit(12, (0x1000, 2, 0, 0, 0, 0), True)]
        assert cpu.page.hypercall.ret == (1 << 64) - 1
        assert machine.vcpus[0].stats.numHypercalls == 1


async def test_hypercall_that_ends_the_run_is_served(monkeypatch):
    """Scripted, as above."""
    cpu = ScriptedCpu(hypercall(1), halt())
    async with scripted_machine(monkeypatch, cpu) as machine:

        def end(exit_):
            raise EndRun(Stopped("by hypercall"))

        machine.hypercall = end
        async with deadline():
            assert await machine.run() == Stopped("by hypercall")
            assert machine.vcpus[0].state is VCpuState.RUNNING
            assert await machine.run() == Halted()


async def test_hypercall_without_a_handler_is_an_error(monkeypatch):
    """Scripted, as above."""
    async with scripted_machine(monkeypatch, ScriptedCpu(hypercall(0x77))) as machine:
        async with deadline():
            with pytest.raises(
                GuestError, match=r"hypercall 0x77.*set machine\.hypercall"
            ) as caught:
                await machine.run()
        assert caught.value.exit == HypercallExit(0x77, (0,) * 6, True)


@pytest.mark.kvm
@host_only(pvm=False, why="VMMCALL spins within KVM under PVM")
async def test_hypercall_of_a_guest(boot):
    """KVM_HC_MAP_GPA_RANGE, the one hypercall that KVM passes on."""
    machine = boot(
        *("mov eax, 12", "mov ebx, 0x4000", "mov ecx, 1", "mov edx, 0", "vmmcall", "hlt"),
        mode="long64",
    )
    vm = machine._platform.vm
    if not vm.capability(lib.KVM_CAP_EXIT_HYPERCALL) & 1 << 12:
        pytest.skip("this host's KVM does not pass KVM_HC_MAP_GPA_RANGE on")
    vm.enable_capability(lib.KVM_CAP_EXIT_HYPERCALL, 1 << 12)
    (vcpu,) = machine.vcpus
    calls = []

    def answer(exit_):
        calls.append((exit_.number, exit_.arguments[:3]))
        vcpu.context.rsi = 9  # completing the call writes RAX: an edit must not undo that
        return 0x5A

    machine.hypercall = answer
    async with deadline():
        assert await machine.run() == Halted()
    assert calls == [(12, (0x4000, 1, 0))]
    assert (vcpu.context.rax, vcpu.context.rsi) == (0x5A, 9)


# ---- HLT, IRQ_WINDOW_OPEN, INTR -----------------------------------------------------------------


@pytest.mark.kvm
async def test_hlt_no_entries_until_wakeup(boot):
    machine = boot("sti", "hlt", "mov al, 1", "out 0xf4, al")
    (vcpu,) = machine.vcpus
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: vcpu.halted)
        stats = vcpu.stats.as_dict()
        assert (vcpu.state, stats["numHalt"]) == (VCpuState.IDLE, 1)
        for _ in range(100):
            await asyncio.sleep(0)
        assert vcpu.stats.as_dict() == stats
        vcpu.wakeup()
        outcome = await run
    assert outcome.code == 3


@pytest.mark.kvm
async def test_irq_window_open_then_injection_on_the_next_entry(boot):
    machine = boot(
        *("mov word ptr [0x30*4], offset handler", "mov word ptr [0x30*4+2], 0"),
        *("out 0x10, al", "mov bx, 1", "sti", "here: jmp here"),
        *("handler: mov cx, bx", "cli", "hlt"),
    )
    (vcpu,) = machine.vcpus
    exits = []
    machine.trace(lambda exit_: exits.append((exit_.reason, vcpu.stats.numInterrupts)), only="exit")

    def pend():
        vcpu.trigger(0x30)

    machine.attach(Diary(during=pend), pio=0x10)
    async with deadline():
        assert await machine.run() == Halted()
    kicked = ("KICK", 0)
    assert [e for e in exits if e != kicked] == [("IO", 0), ("IRQ_WINDOW_OPEN", 0), ("HLT", 1)]
    assert vcpu.context.rcx == 1


@pytest.mark.kvm
async def test_intr_resumes_at_the_same_pc(boot, kvmaio_cpu):
    # PVM emulates each instruction; to the software CPU 200 µs are 200,000 instructions.
    turns = 20_000 if is_pvm and kvmaio_cpu == "kvm" else 5_000_000
    machine = boot(f"mov ecx, {turns}", "again: inc ebx", "dec ecx", "jnz again", "hlt")
    (vcpu,) = machine.vcpus
    interrupted = 0
    async with deadline(30):
        while type(await vcpu.run(200_000)) is InterruptedExit:
            interrupted += 1
            # 0 before the first instruction.
            assert vcpu.context.rbx + vcpu.context.rcx in (0, turns, turns + 1)
    assert interrupted
    assert (vcpu.context.rbx, vcpu.context.rcx) == (turns, 0)


# ---- the others: a typed outcome or error with the fields ----------------------------------------


@pytest.mark.parametrize(
    ("step", "exit_", "message"),
    [
        (plain(0, hw={"hardware_exit_reason": 0x77}), UnknownExit(0x77), "nothing answers"),
        (plain(1, ex={"exception": 6, "error_code": 5}), ExceptionExit(6, 5), "nothing answers"),
        (
            plain(9, fail_entry={"hardware_entry_failure_reason": 0x8000_0021, "cpu": 3}),
            FailEntryExit(0x8000_0021, 3),
            "refused to enter the guest, reason 0x80000021",
        ),
        (plain(24, system_event={"type": 3, "ndata": 0}), SystemEventExit(3, ()), "type 3"),
        (
            plain(29, msr={"index": 0x10A, "reason": 1}),
            MsrExit(0x10A, False, 0, 1),
            "nothing answers",
        ),
        (plain(0x1234), OtherExit(0x1234), "nothing answers"),
    ],
    ids=["UNKNOWN", "EXCEPTION", "FAIL_ENTRY", "SYSTEM_EVENT", "RDMSR", "anything else"],
)
async def test_other_exits_are_errors_with_their_fields_and_a_dump(
    monkeypatch, step, exit_, message
):
    """Scripted: no guest here provokes them. (FAIL_ENTRY: KVM checks the state when it is set.)"""
    async with scripted_machine(monkeypatch, ScriptedCpu(step)) as machine:
        async with deadline():
            with pytest.raises(GuestError, match=message) as caught:
                await machine.run()
        error = caught.value
        assert (error.exit, error.vcpu, error.rip) == (exit_, "cpu0", 0xFFF0)
        assert "rip" in error.dump


@pytest.mark.parametrize(("kind", "reason"), [(1, "powered off"), (2, "reset")])
async def test_system_event_shutdown_and_reset_are_outcomes(monkeypatch, kind, reason):
    """Scripted: x86 guests have no such call without Hyper-V's or Xen's."""
    step = plain(Reason.SYSTEM_EVENT, system_event={"type": kind, "ndata": 0})
    async with scripted_machine(monkeypatch, ScriptedCpu(step)) as machine, deadline():
        assert await machine.run() == Stopped(reason)


@pytest.mark.kvm
async def test_internal_error_of_a_jump_to_nowhere(boot):
    """Executing where there is no memory."""
    machine = boot(f"mov eax, {MMIO}", "jmp rax", mode="long64")
    async with deadline():
        with pytest.raises(GuestError) as caught:
            await machine.run()
    error = caught.value
    assert (error.vcpu, error.rip) == ("cpu0", MMIO)
    assert "rip" in error.dump
    assert isinstance(error.exit, InternalErrorExit)
    assert isinstance(error, EmulationFailure)
    assert error.exit.suberror == error.suberror == 1


@pytest.mark.kvmaio_cpu("kvm")
@host_only(pvm=True, why="only under PVM is kernel code emulated, and SSE beyond the emulator")
async def test_internal_error_of_an_instruction_beyond_the_emulator(boot):
    machine = boot("nop", "addps xmm1, xmm2", "hlt", mode="long64")
    async with deadline():
        with pytest.raises(EmulationFailure) as caught:
            await machine.run()
    error = caught.value
    assert (error.suberror, error.rip, error.vcpu) == (1, 0x1001, "cpu0")
    assert error.instruction[:3] == bytes.fromhex("0f58ca")
    assert "bytes 0f 58 ca" in str(error)


@pytest.mark.kvm
async def test_shutdown_by_a_triple_fault(boot):
    machine = boot("mov ebx, 0x1234", "ud2", mode="long64")
    async with deadline():
        outcome = await machine.run()
        assert isinstance(outcome, Shutdown)
        assert "rip" in outcome.dump
        assert type(await machine.run()) is Shutdown  # it stays


@pytest.mark.kvmaio_cpu("kvm")
async def test_debug_event_of_a_single_step(boot):
    machine = boot("inc bx", "inc cx", "hlt")
    (vcpu,) = machine.vcpus
    await vcpu.run(0)  # pushes the registers: KVM steps from where RIP is when it is told to
    request = ffi.new("struct kvm_guest_debug *")
    request.control = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP
    check(lib.kvmaio_ioctl(vcpu.model.fd, lib.KVM_SET_GUEST_DEBUG, request), "KVM_SET_GUEST_DEBUG")
    async with deadline():
        exit_ = await vcpu.run()
        assert isinstance(exit_, DebugEventExit)
        assert (exit_.exception, exit_.pc, vcpu.context.rbx) == (1, 0x1001, 1)
        with pytest.raises(GuestError, match="nothing answers") as caught:
            await machine.run()
    assert isinstance(caught.value.exit, DebugEventExit)


# ---- Coalesced MMIO ---------------------------------------------------------------------------


class Posted(Device):
    """A write-only port for batches, and a register that is read."""

    data = Register(0x0, int, Access.W, bits=32, posted=True)
    status = Register(0x8, int, Access.R, bits=32)

    def __init__(self):
        self.entries = []

    @data.on_write
    def take(self, value):
        self.entries.append(("write", value))

    @status.on_read
    def look(self):
        self.entries.append(("read",))
        return len(self.entries)


@pytest.mark.kvmaio_cpu("kvm")
async def test_coalesced_mmio_is_flushed_in_order_before_the_exit_it_precedes(boot):
    machine = boot(
        *(f"mov ebx, {MMIO}", "mov ecx, 5", "again: mov [ebx], ecx", "loop again"),
        *("mov eax, [ebx+8]", "hlt"),
        mode="prot32",
    )
    device = machine.attach(Posted(), mmio=MMIO)
    async with deadline():
        assert await machine.run() == Halted()
    stats = machine.vcpus[0].stats
    assert device.entries == [*(("write", n) for n in (5, 4, 3, 2, 1)), ("read",)]
    assert (stats.numMMIO, stats.numCoalescedMMIO) == (1, 5)
    assert machine.vcpus[0].context.rax == 6


@pytest.mark.kvmaio_cpu("kvm")
async def test_coalesced_mmio_a_full_ring_keeps_the_order(boot):
    """500 writes, and a ring of 169: the write that finds it full is an exit of its own."""
    machine = boot(
        *(f"mov ebx, {MMIO}", "mov ecx, 500", "again: mov [ebx], ecx", "loop again", "hlt"),
        mode="prot32",
    )
    device = machine.attach(Posted(), mmio=MMIO)
    async with deadline():
        assert await machine.run() == Halted()
    stats = machine.vcpus[0].stats
    assert device.entries == [("write", n) for n in range(500, 0, -1)]
    assert stats.numMMIO + stats.numCoalescedMMIO == 500
    assert stats.numCoalescedMMIO > 300


@pytest.mark.kvm
async def test_coalesced_mmio_reaches_its_device_without_any_exit(boot):
    machine = boot(f"mov ebx, {MMIO}", "mov [ebx], ebx", "here: jmp here", mode="prot32")
    device = machine.attach(Posted(), mmio=MMIO)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: device.entries)
        machine.stop()
        await run
    assert device.entries == [("write", MMIO)]


async def test_coalesced_writes_then_the_exit_when_a_handler_suspends(monkeypatch):
    """Scripted: the batch is served whole, in order, before its exit."""
    order, states = [], []

    class Slow(Device):
        size = 16

        async def write(self, offset, size, value):
            await asyncio.sleep(0)
            order.append(value)
            states.append(machine.vcpus[0].state)

    def batch_then_exit(cpu):
        cpu.batch.append(PostedWrites(MMIO, 4, False, 0, deque((1, 2))))
        cpu.batch.append(PostedWrites(MMIO, 4, False, 0, deque((3,))))
        return mmio_write(MMIO, 4, 4)(cpu)

    async with scripted_machine(monkeypatch, ScriptedCpu(batch_then_exit, halt())) as machine:
        machine.attach(Slow(), mmio=MMIO)
        machine.watches_exits = True
        async with deadline():
            assert await machine.run() == Halted()
        assert order == [1, 2, 3, 4]
        assert states == [VCpuState.RUNNING_MMIO_PENDING] * 4


# ---- Timing MMIO ------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_timing_mmio_the_vcpu_is_not_entered_until_the_device_answers(boot):
    machine = boot(f"mov ebx, {MMIO}", "mov eax, [ebx]", "hlt", mode="prot32")
    (vcpu,) = machine.vcpus
    seen = []

    async def wait():
        seen.append((vcpu.state, vcpu.stats.numVMExits))
        await asyncio.sleep(0.001)
        seen.append((vcpu.state, vcpu.stats.numVMExits))

    machine.attach(Diary(0x55, during=wait), mmio=MMIO)
    async with deadline():
        assert await machine.run() == Halted()
    exits = seen[0][1]
    assert seen == [(COMPLETION, exits), (VCpuState.RUNNING_MMIO_PENDING, exits)]
    assert vcpu.context.rax == 0x55


# ---- every VmExit type from a page ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "exit_"),
    [
        (plain(0, hw={"hardware_exit_reason": 7}), UnknownExit(7)),
        (plain(1, ex={"exception": 13, "error_code": 8}), ExceptionExit(13, 8)),
        (port_out(0x70, 1, 2, size=2), IoExit(0x70, 2, 2, True, b"\1\0\2\0")),
        (port_in(0x71, size=4), IoExit(0x71, 4, 1, False, b"")),
        (hypercall(3, 1, 2), HypercallExit(3, (1, 2, 0, 0, 0, 0), True)),
        (halt(), HaltExit()),
        (mmio_write(MMIO, 2, 0x1234), MmioExit(MMIO, 2, True, b"\x34\x12")),
        (plain(7), IrqWindowExit()),
        (plain(8), ShutdownExit()),
        (
            plain(9, fail_entry={"hardware_entry_failure_reason": 5, "cpu": 1}),
            FailEntryExit(5, 1),
        ),
        (plain(10), InterruptedExit()),
        (
            plain(17, internal={"suberror": 4, "ndata": 2, "data": [1, 2]}),
            InternalErrorExit(4, (1, 2)),
        ),
        (
            plain(24, system_event={"type": 1, "ndata": 1, "data": [9]}),
            SystemEventExit(1, (9,)),
        ),
        (plain(26, eoi={"vector": 0x31}), IoapicEoiExit(0x31)),
        (plain(29, msr={"index": 5, "reason": 1}), MsrExit(5, False, 0, 1)),
        (plain(30, msr={"index": 5, "reason": 2, "data": 8}), MsrExit(5, True, 8, 2)),
        (plain(999), OtherExit(999)),
    ],
    ids=lambda value: type(value).__name__ if not callable(value) else "",
)
async def test_every_exit_is_decoded_from_the_page(step, exit_):
    """Scripted: most of them no guest here provokes."""
    vcpu = lone_vcpu(step)
    assert await vcpu.run() == exit_


def test_the_instruction_of_an_emulation_failure():
    code = bytes.fromhex("0f28ca") + bytes(12)
    words = [int.from_bytes((bytes([3]) + code)[i : i + 8], "little") for i in (0, 8)]
    assert InternalErrorExit(1, (1, *words)).instruction == bytes.fromhex("0f28ca")
    assert InternalErrorExit(1, (0, *words)).instruction == b""
    assert InternalErrorExit(3, (1, *words)).instruction == b""
