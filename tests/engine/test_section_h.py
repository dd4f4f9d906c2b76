"""gem5's KVM CPU, section H: what x86 adds, a test per row."""

import asyncio

import pytest

from kvmaio import GuestError, Halted, VCpuState
from kvmaio.boot import Flat
from kvmaio.errors import ConfigurationError
from kvmaio.exits import IoExit
from tests.engine.support import Diary, deadline, until
from tests.engine.test_section_a import lone_vcpu
from tests.engine.test_section_d import HANDLERS, REPORTS
from tests.scripted import INTERRUPTED, ScriptedCpu, halt, plain, scripted_machine

IF = 1 << 9

# ---- interrupts before each run ------------------------------------------------------------------


async def test_interrupts_unmaskable_first_and_at_most_one_per_entry():
    """Scripted: shows what the model is told, entry by entry."""
    vcpu = lone_vcpu(*[INTERRUPTED] * 4)
    cpu = vcpu.model
    cpu.page.ready_for_interrupt_injection = 1
    vcpu.context.rflags |= IF
    await vcpu.interrupt(0x31)
    await vcpu.interrupt(0x45)
    await vcpu.nmi()
    windows = []
    for _ in range(4):
        await vcpu.run()
        windows.append(cpu.page.request_interrupt_window)
        cpu.page.if_flag = 1
    told = [call for call in cpu.log if call not in ("write_context", "read_context")]
    assert told == [
        *("nmi", "enter"),
        *("interrupt 0x45", "enter"),  # the highest vector, as a local APIC would
        *("interrupt 0x31", "enter"),
        "enter",
    ]
    assert windows == [1, 1, 0, 0]
    assert vcpu.stats.numInterrupts == 3


async def test_interrupts_not_ready_requests_the_window_and_nothing_clears_it():
    """Scripted: as above."""
    vcpu = lone_vcpu(INTERRUPTED, plain(7), INTERRUPTED)
    cpu = vcpu.model
    vcpu.context.rflags |= IF
    await vcpu.interrupt(0x31)
    await vcpu.run()
    assert (cpu.injected, cpu.page.request_interrupt_window) == ([], 1)
    cpu.page.ready_for_interrupt_injection = cpu.page.if_flag = 1
    await vcpu.run()
    assert (cpu.injected, cpu.page.request_interrupt_window) == ([0x31], 0)


async def test_interrupts_if_is_checked_again():
    """Scripted: the page says ready, but since then somebody has switched interrupts off."""
    vcpu = lone_vcpu(INTERRUPTED, INTERRUPTED)
    cpu = vcpu.model
    await vcpu.run()
    cpu.page.ready_for_interrupt_injection = cpu.page.if_flag = 1
    vcpu.context.rflags &= ~IF
    await vcpu.interrupt(0x31)
    await vcpu.run()
    assert (cpu.injected, cpu.page.request_interrupt_window) == ([], 1)


@pytest.mark.kvm
async def test_interrupts_of_two_vectors_are_both_delivered(boot):
    machine = boot(
        *HANDLERS,
        *("out 0x20, al", "sti", "here: jmp here"),
        *REPORTS,
    )
    (vcpu,) = machine.vcpus
    device = machine.attach(Diary(), pio=0x10)

    def pend():
        for vector in (0x31, 0x32):
            vcpu.trigger(vector)

    machine.attach(Diary(during=pend), pio=0x20)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: len(device.entries) == 2)
        machine.stop()
        await run
    assert [entry[3] for entry in device.entries] == [0x32, 0x31]
    assert vcpu.stats.numInterrupts == 2


@pytest.mark.kvm
async def test_interrupts_switched_on_by_an_edit_wake_a_halted_guest(boot):
    """IF counts as it is now, not as the last exit left it."""
    machine = boot(*HANDLERS, "cli", "hlt", "wait: hlt", "jmp wait", *REPORTS)
    (vcpu,) = machine.vcpus
    device = machine.attach(Diary(), pio=0x10)
    async with deadline():
        assert await machine.run() == Halted()
        vcpu.context.rflags |= IF
        await vcpu.interrupt(0x31)
        run = asyncio.create_task(machine.run())
        await until(lambda: device.entries)
        machine.stop()
        await run
    assert device.entries == [("write", 0, 1, 0x31)]


LOCAL_APIC = 0xFEE0_0000
IDT, HANDLER_31, HANDLER_32 = 0x6000, 0x7000, 0x7100


def interrupt_gate(handler):
    """A 64-bit interrupt gate for CPL 0 (SDM vol. 3A, 6.14.1)."""
    return (handler & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (handler >> 16) << 48).to_bytes(
        16, "little"
    )


@pytest.mark.kvmaio_cpu("kvm")
@pytest.mark.parametrize("when", ["before the first entry", "in a handler", "while it halts"])
async def test_interrupts_through_kvms_own_local_apic(boot, assembler, when):
    """KVM gives no interrupt window then, and needs none."""
    machine = boot(
        *(f"mov ebx, {LOCAL_APIC + 0xF0}", "mov dword ptr [rbx], 0x1ff"),  # switch it on
        *("out 0x18, al", "sti", "wait: hlt", "jmp wait"),
        mode="long64",
        irqchip="kernel",
    )
    for vector, handler in ((0x31, HANDLER_31), (0x32, HANDLER_32)):
        machine.memory.write(IDT + vector * 16, interrupt_gate(handler))
        code = assembler(
            *(f"mov al, {vector}", "out 0x10, al"),
            *(f"mov ebx, {LOCAL_APIC + 0xB0}", "mov dword ptr [rbx], 0", "iretq"),  # EOI
            address=handler,
            mode="long64",
        )
        machine.memory.write(handler, code)
    (vcpu,) = machine.vcpus
    vcpu.context.idt.base, vcpu.context.idt.limit = IDT, 0xFFF
    device = machine.attach(Diary(), pio=0x10)
    ready = machine.attach(Diary(), pio=0x18)

    def pend():
        for vector in (0x31, 0x32):
            vcpu.trigger(vector)

    if when == "in a handler":
        ready.during = pend
    async with deadline():
        if when == "before the first entry":
            # The local APIC is still off: KVM drops it, and the guest must not hang for that.
            await vcpu.interrupt(0x31)
        run = asyncio.create_task(machine.run())
        await until(lambda: ready.entries)
        if when != "in a handler":
            pend()
        await until(lambda: len(device.entries) == 2)
        machine.stop()
        await run
    assert [entry[3] for entry in device.entries] == [0x32, 0x31]


# ---- INIT and SIPI ------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_init_and_sipi_start_at_vector_shifted_by_12(boot):
    """By the engine's own hand, as a modelled APIC does it."""
    machine = boot("mov bx, cs", "mov al, 1", "out 0xf4, al", address=0x9000)
    (vcpu,) = machine.vcpus
    vcpu.context.rbx = 0x77
    vcpu.init()
    assert (vcpu.state, vcpu.context.rip, vcpu.context.rbx) == (VCpuState.IDLE, 0xFFF0, 0)
    async with deadline():
        run = asyncio.create_task(machine.run())
        for _ in range(20):
            await asyncio.sleep(0)
        assert (vcpu.state, vcpu.stats.numVMExits) == (VCpuState.IDLE, 0)  # it waits for the SIPI
        vcpu.start_up(9)
        outcome = await run
    assert outcome.code == 3
    assert (vcpu.context.rbx, vcpu.context.cs.base) == (0x900, 0x9000)


@pytest.mark.kvm
async def test_init_and_sipi_by_hand_of_an_application_processor(boot):
    """It has a local APIC of KVM's, which would wait for an IPI of another one."""
    machine = boot("mov al, 1", "out 0xf4, al", address=0x9000, vcpus=2)
    boot_cpu, other = machine.vcpus
    boot_cpu.activate()
    boot_cpu.suspend()
    other.init()
    other.start_up(9)
    async with deadline():
        assert (await machine.run()).code == 3
    assert (boot_cpu.stats.numVMExits, other.context.cs.base) == (0, 0x9000)


@pytest.mark.kvm
async def test_sipi_needs_a_vector_and_a_vcpu_that_waits(boot):
    machine = boot("hlt")
    (vcpu,) = machine.vcpus
    with pytest.raises(ConfigurationError, match="start-up vector 256: 0 to 255"):
        vcpu.start_up(256)
    vcpu.activate()
    before = vcpu.context.rip
    with pytest.raises(ConfigurationError, match="needs cpu0 to wait for it"):
        vcpu.start_up(1)
    assert vcpu.context.rip == before


# INIT, then two SIPIs with vector 8, through the local APIC's command register.
START_OTHERS = (
    "mov ebx, 0xfee00300",
    "mov dword ptr [ebx], 0x000c4500",  # INIT to all but self
    "mov ecx, 1000",
    "pause1: loop pause1",
    "mov dword ptr [ebx], 0x000c4608",  # SIPI to all but self, vector 8
    "mov ecx, 1000",
    "pause2: loop pause2",
    "mov dword ptr [ebx], 0x000c4608",
)


@pytest.mark.kvm
@pytest.mark.parametrize("mode", ["prot32", "long64"])
@pytest.mark.parametrize("vcpus", [2, 4])
async def test_an_application_processor_starts_at_vector_shifted_by_12(
    boot, vcpus, mode, assembler
):
    """Each counts itself in at 0x3000 with a locked increment; the boot CPU waits for all."""
    machine = boot(
        *START_OTHERS,
        f"await: cmp dword ptr [0x3000], {vcpus - 1}",
        "jne await",
        "mov al, 5",
        "out 0xf4, al",
        mode=mode,
        vcpus=vcpus,
    )
    machine.memory.write(
        0x8000, assembler("mov ax, cs", "mov [0x3010], ax", "lock inc dword ptr [0x3000]", "hlt")
    )
    async with deadline(30):
        outcome = await machine.run()
    assert outcome.code == 11
    assert machine.memory.read(0x3010, 2) == b"\x00\x08"
    assert int.from_bytes(machine.memory.read(0x3000, 4), "little") == vcpus - 1


@pytest.mark.kvm
async def test_application_processors_wait_again_after_a_second_load(boot, assembler):
    machine = boot(
        *START_OTHERS,
        *("await: cmp dword ptr [0x3000], 1", "jne await", "mov al, 5", "out 0xf4, al"),
        mode="prot32",
        vcpus=2,
    )
    machine.memory.write(0x8000, assembler("lock inc dword ptr [0x3000]", "hlt"))
    again = assembler("mov al, 6", "out 0xf4, al", mode="prot32", address=0x5000)
    async with deadline(30):
        assert (await machine.run()).code == 11
        machine.load(Flat(again, 0x5000, "prot32"))
        assert (await machine.run()).code == 13


# ---- CR8 and the APIC base ----------------------------------------------------------------------


@pytest.mark.kvm
async def test_cr8_and_apic_base_are_carried_in_and_out(boot, kvmaio_cpu):
    machine = boot(
        *("mov rax, cr8", "out 0x10, al", "mov eax, 3", "mov cr8, rax", "out 0x10, al"),
        *("mov ecx, 0x1b", "rdmsr", "hlt"),
        mode="long64",
    )
    (vcpu,) = machine.vcpus
    device = machine.attach(Diary(), pio=0x10)
    vcpu.context.cr8 = 9
    async with deadline():
        assert type(await vcpu.run()) is IoExit
        assert vcpu.context.cr8 == 9
        assert await machine.run() == Halted()
    assert device.entries == [("write", 0, 1, 9), ("write", 0, 1, 3)]
    assert vcpu.context.cr8 == 3
    assert vcpu.context.apic_base & 0xFFFF_F000 == 0xFEE0_0000
    if kvmaio_cpu == "kvm":  # the software CPU's RDMSR knows of no APIC
        assert vcpu.context.rax & 0xFFFF_F000 == 0xFEE0_0000


# ---- State pushed --------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_state_pushed_carries_everything(boot):
    """Out of one vCPU in mid-run and into another: AVX upper halves and debug registers too."""
    source = boot(
        *("mov rax, 0x0123456789abcdef", "movq xmm1, rax", "mov eax, 1", "out 0x10, al"),
        *("movq rbx, xmm1", "hlt"),
        mode="user64",
    )
    target = boot(
        *("mov rax, 0", "movq xmm1, rax", "mov eax, 1", "out 0x10, al"),
        *("movq rbx, xmm1", "hlt"),
        mode="user64",
    )
    for machine in (source, target):
        machine.attach(Diary(), pio=0x10)
    async with deadline():
        (a,), (b,) = source.vcpus, target.vcpus
        assert type(await a.run()) is IoExit
        await a.run(0)
        state = a.model.read_state()
        assert type(await b.run()) is IoExit
        await b.run(0)
        state.debug_registers = (0x1111, 0x2222, 0x3333, 0x4444, 0xFFFF0FF0, 0x400)
        b.model.write_state(state)
        taken = b.model.read_state()
        assert (taken.context.rip, taken.context.rax) == (state.context.rip, 1)
        assert taken.xsave == state.xsave
        assert taken.xcrs == state.xcrs
        assert taken.debug_registers == state.debug_registers
        assert taken.events == state.events


@pytest.mark.kvm
async def test_set_msrs_that_is_refused_in_part_is_reported_once(boot, caplog):
    machine = boot("hlt")
    (vcpu,) = machine.vcpus
    state = vcpu.model.read_state()
    state.msrs |= {0x4B56_4DFE: 1, 0x4B56_4DFF: 1}  # nobody's
    vcpu.model.write_state(state)
    (record,) = caplog.records
    assert "0x4b564dfe" in record.getMessage() and "0x4b564dff" in record.getMessage()


@pytest.mark.kvm
async def test_dump_names_every_part(boot):
    machine = boot("hlt", mode="long64")
    async with deadline():
        await machine.run()
    text = machine.dump().lower()
    for part in ("rip", "cr3", "xcr0", "dr7", "msr", "mxcsr", "events"):
        assert part in text, part
    assert text.startswith("cpu0\n")


async def test_dump_after_an_error_of_a_scripted_cpu(monkeypatch):
    """Scripted: a model whose registers cannot be read does not hide the error itself."""

    def broken():
        raise OSError("no registers")

    cpu = ScriptedCpu(plain(999), halt())
    async with scripted_machine(monkeypatch, cpu) as machine:
        monkeypatch.setattr(cpu, "read_context", broken)
        async with deadline():
            with pytest.raises(GuestError, match="an exit that nothing answers") as caught:
                await machine.run()
        assert "the registers could not be read: no registers" in caught.value.dump


@pytest.mark.kvm
async def test_application_processors_that_ran_wait_for_a_sipi_after_a_second_load(boot, assembler):
    """The first guest leaves them spinning; the second has not started them."""
    machine = boot(
        *START_OTHERS,
        *("await: cmp dword ptr [0x3000], 1", "jb await", "mov al, 5", "out 0xf4, al"),
        mode="prot32",
        vcpus=2,
    )
    machine.memory.write(0x8000, assembler("again: lock inc dword ptr [0x3000]", "jmp again"))
    again = assembler(
        *("mov ecx, 3000", "pause: loop pause", "mov al, 6", "out 0xf4, al"),
        mode="prot32",
        address=0x5000,
    )
    async with deadline(30):
        assert (await machine.run()).code == 11
        machine.load(Flat(again, 0x5000, "prot32"))
        assert (await machine.run()).code == 13
    assert machine.vcpus[1].context.rip == 0xFFF0
