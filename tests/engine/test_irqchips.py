"""irqchip="devices": interrupts from the line to the handler, with every controller a device."""

import asyncio

import pytest

from kvmaio import Device, Exited, Halted, Register, Stopped, VCpuState
from kvmaio.boot import Flat
from kvmaio.devices import Pit8254, SystemPortB
from kvmaio.errors import ConfigurationError
from tests.engine.support import LAB, Diary, deadline, until
from tests.engine.test_section_h import IDT, START_OTHERS, interrupt_gate

pytestmark = pytest.mark.kvm

# Both PICs as a PC's BIOS sets them up: vectors 0x08 and 0x70, nothing masked.
START_PICS = (
    *("mov al, 0x11", "out 0x20, al", "out 0xa0, al"),
    *("mov al, 0x08", "out 0x21, al", "mov al, 0x70", "out 0xa1, al"),
    *("mov al, 4", "out 0x21, al", "mov al, 2", "out 0xa1, al"),
    *("mov al, 1", "out 0x21, al", "out 0xa1, al"),
)
SVR, EOI, TPR = 0xFEE0_00F0, 0xFEE0_00B0, 0xFEE0_0080


def handler16(vector, label):
    return (f"mov word ptr [{vector}*4], offset {label}", f"mov word ptr [{vector}*4+2], 0")


def local_apic(offset_address, value):
    """A write to the local APIC in 32 and 64 bits."""
    return (f"mov ebx, {offset_address}", f"mov dword ptr [ebx], {value}")


def ioapic(index, value):
    return (
        *("mov ebx, 0xfec00000", f"mov dword ptr [ebx], {index}"),
        f"mov dword ptr [ebx+0x10], {value}",
    )


def install(machine, assembler, handlers):
    """64-bit handlers for vectors; each ends its interrupt at the local APIC."""
    for number, (vector, lines) in enumerate(handlers.items()):
        address = 0x7000 + number * 0x100
        machine.memory.write(IDT + vector * 16, interrupt_gate(address))
        code = assembler(*lines, *local_apic(EOI, 0), "iretq", address=address, mode="long64")
        machine.memory.write(address, code)
    context = machine.vcpus[0].context
    context.idt.base, context.idt.limit = IDT, 0xFFF


# ---- 8259A and 8254 -----------------------------------------------------------------------------


async def test_timer_ticks_through_the_8259a_wake_a_halted_guest(boot):
    machine = boot(
        *START_PICS,
        *handler16(8, "tick"),
        *("mov al, 0x34", "out 0x43, al", "mov ax, 2386", "out 0x40, al"),  # 500 Hz
        *("mov al, ah", "out 0x40, al", "mov cx, 5", "sti"),
        *("wait: hlt", "cmp cx, 0", "jg wait", "mov al, 7", "out 0xf4, al"),  # a slow host: below
        *("tick: dec cx", "mov al, 0x20", "out 0x20, al", "iret"),
        irqchip="devices",
    )
    machine.attach(Pit8254(), pio=0x40, irq=0)
    async with deadline():
        assert await machine.run() == Exited(15)
    assert machine.vcpus[0].stats.numInterrupts >= 5
    assert machine.vcpus[0].stats.numHalt >= 1


async def test_the_vector_is_taken_when_the_guest_takes_it(boot):
    """Line 5 asks first, with interrupts off; line 1 comes before they are on, and is higher."""
    machine = boot(
        *START_PICS,
        *(*handler16(9, "line1"), *handler16(13, "line5"), *handler16(0x74, "line12")),
        *("out 0x18, al", "sti", "wait: hlt", "jmp wait"),
        *("line1: mov al, 1", "jmp report"),
        *("line5: mov al, 5", "jmp report"),
        *("line12: mov al, 12", "out 0x10, al", "mov al, 0x20", "out 0xa0, al", "jmp end"),
        *("report: out 0x10, al", "end: mov al, 0x20", "out 0x20, al", "iret"),
        irqchip="devices",
    )
    device = machine.attach(Diary(), pio=0x10)

    def pulse():
        for line in (5, 12, 1):
            machine.irq(line).pulse()

    machine.attach(Diary(during=pulse), pio=0x18)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(device.reached(3))
        machine.stop()
        assert await run == Stopped("stopped")
    assert [entry[3] for entry in device.entries] == [1, 12, 5]


async def test_an_interrupt_that_is_taken_back_is_not_delivered(boot):
    machine = boot(
        *START_PICS,
        *("mov dx, 0x4d0", "mov al, 0x20", "out dx, al"),  # line 5 is level-triggered
        *handler16(13, "line5"),
        *("out 0x18, al", "sti", "nop", "cli", "hlt"),
        *("line5: out 0x10, al", "hlt"),
        irqchip="devices",
    )
    device = machine.attach(Diary(), pio=0x10)
    machine.attach(Diary(during=machine.irq(5).pulse), pio=0x18)
    async with deadline():
        assert await machine.run() == Halted()
    assert device.entries == []
    assert machine.vcpus[0].stats.numInterrupts == 0


# ---- local APIC and IOAPIC ----------------------------------------------------------------------


async def test_timer_of_the_local_apic(boot, assembler):
    machine = boot(
        *local_apic(SVR, 0x1FF),
        *local_apic(0xFEE0_03E0, 0xB),
        *local_apic(0xFEE0_0320, 0x20040),  # periodic, vector 0x40
        *local_apic(0xFEE0_0380, 50_000_000 if LAB else 1_000_000),  # 1 ms, or what the lab can do
        *("sti", "wait: hlt", "cmp byte ptr [0x3000], 4", "jb wait", "mov al, 3", "out 0xf4, al"),
        mode="long64",
        irqchip="devices",
    )
    install(machine, assembler, {0x40: ("inc byte ptr [0x3000]",)})
    async with deadline():
        assert await machine.run() == Exited(7)


class Level(Device):
    """Holds its line until it was written to `count` times."""

    acknowledge = Register(0, int)

    def __init__(self, count):
        self.count = count

    @acknowledge.on_write
    def one(self, value):
        self.count -= 1

    def update(self):
        self.irq.set(self.count > 0)


async def test_level_line_through_the_ioapic_asks_until_it_falls(boot, assembler):
    machine = boot(
        *local_apic(SVR, 0x1FF),
        *ioapic(0x10 + 2 * 20 + 1, 0),
        *ioapic(0x10 + 2 * 20, 0x8051),  # level-triggered, vector 0x51
        *("out 0x18, al", "sti", "wait: hlt", "jmp wait"),
        mode="long64",
        irqchip="devices",
    )
    device = machine.attach(Level(3), pio=0x10, irq=20)
    machine.attach(Diary(during=device.update), pio=0x18)
    install(machine, assembler, {0x51: ("out 0x10, al",)})
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: device.count == 0 and machine.vcpus[0].halted)
        machine.stop()
        await run
    assert machine.vcpus[0].stats.numInterrupts == 3


async def test_task_priority_is_cr8_and_the_other_way_round(boot, assembler):
    machine = boot(
        *local_apic(SVR, 0x1FF),
        *("mov eax, 6", "mov cr8, rax", f"mov ebx, {TPR}", "mov eax, [rbx]", "out 0x10, al"),
        *local_apic(TPR, 0x50),
        *("mov rax, cr8", "out 0x10, al", "sti"),
        *local_apic(0xFEE0_0300, 0x4005F),  # to itself: held back
        *("mov al, 0x11", "out 0x10, al", "xor eax, eax", "mov cr8, rax", "mov al, 0x22"),
        *("out 0x10, al", "cli", "hlt"),
        mode="long64",
        irqchip="devices",
    )
    install(machine, assembler, {0x5F: ("push rax", "mov al, 0x5f", "out 0x10, al", "pop rax")})
    device = machine.attach(Diary(), pio=0x10)
    async with deadline():
        assert await machine.run() == Halted()
    written = [entry[3] for entry in device.entries]
    assert written[:3] == [0x60, 5, 0x11]
    # Where lowering CR8 is no exit (PVM), it comes behind the next one.
    assert sorted(written[3:]) == [0x22, 0x5F]


# ---- several vCPUs ------------------------------------------------------------------------------

# An application processor in real mode with 4 GiB of data, as a BIOS has it.
BIG_REAL = (
    *("lgdt [0x8100]", "mov eax, cr0", "or al, 1", "mov cr0, eax", "mov bx, 8"),
    *("mov ds, bx", "and al, 0xfe", "mov cr0, eax"),
)
# Behind GDTR's six bytes lies entry 1; of entry 0 nobody reads anything.
GDT_REGISTER = (0x0F).to_bytes(2, "little") + (0x8106 - 8).to_bytes(4, "little")
FLAT_DATA = bytes.fromhex("ffff0000 0092cf00")


async def test_two_vcpus_and_an_ipi(boot, assembler):
    machine = boot(
        *START_OTHERS,
        *("up: cmp byte ptr [0x3000], 1", "jne up"),
        *local_apic(0xFEE0_0310, 1 << 24),
        *local_apic(0xFEE0_0300, 0x4050),  # fixed, vector 0x50, to the other
        *("done: cmp byte ptr [0x3004], 1", "jne done", "mov al, 2", "out 0xf4, al"),
        mode="long64",
        vcpus=2,
        irqchip="devices",
    )
    machine.memory.write(0x8100, GDT_REGISTER + FLAT_DATA)
    code = assembler(
        "jmp 0:start",  # it starts at 0x800:0, and the handler's address is of segment 0
        *("start:", *BIG_REAL),
        *("mov word ptr [0x50*4], offset ipi", "mov word ptr [0x50*4+2], 0"),
        *local_apic(SVR, 0x1FF),
        *("mov sp, 0x6ff0", "sti", "mov byte ptr [0x3000], 1", "wait: hlt", "jmp wait"),
        *("ipi: inc byte ptr [0x3004]", *local_apic(EOI, 0), "iret"),
    )
    machine.memory.write(0x8000, code)
    async with deadline(30):
        assert await machine.run() == Exited(5)
    assert machine.vcpus[1].stats.numInterrupts == 1


@pytest.mark.parametrize("vcpus", [2, 4])
async def test_application_processors_wait_for_the_start_up_ipi(boot, assembler, vcpus):
    machine = boot(
        *START_OTHERS,
        *(f"await: cmp dword ptr [0x3000], {vcpus - 1}", "jne await", "mov al, 5"),
        "out 0xf4, al",
        mode="prot32",
        vcpus=vcpus,
        irqchip="devices",
    )
    machine.memory.write(
        0x8000, assembler("mov ax, cs", "mov [0x3010], ax", "lock inc dword ptr [0x3000]", "hlt")
    )
    async with deadline(30):
        assert await machine.run() == Exited(11)
        assert machine.memory.read(0x3010, 2) == b"\x00\x08"
        # A second load has them wait again.
        machine.load(Flat(assembler("hlt", address=0x5000), 0x5000))
        assert await machine.run() == Halted()
    assert all(vcpu.awaits_start_up for vcpu in machine.vcpus[1:])


@pytest.mark.parametrize("doing", ["spinning", "halted", "in an access", "writing"])
async def test_init_finds_its_target_whatever_it_is_doing(boot, assembler, doing):
    """The second start-up IPI leads to another place."""
    machine = boot(
        *START_OTHERS,
        *("first: cmp byte ptr [0x3000], 1", "jne first", "out 0x18, al"),
        *local_apic(0xFEE0_0300, 0xC4500),
        *local_apic(0xFEE0_0300, 0xC4609),
        *("second: cmp byte ptr [0x3000], 2", "jne second", "mov al, 5", "out 0xf4, al"),
        mode="prot32",
        vcpus=2,
        irqchip="devices",
    )
    other = machine.vcpus[1]
    answered = asyncio.Event()
    rest = {
        "spinning": ("here: jmp here",),
        "halted": ("cli", "hlt"),
        "in an access": ("in al, 0x10",),
        "writing": ("again: out 0x10, al", "jmp again"),
    }[doing]
    machine.memory.write(0x8000, assembler("mov byte ptr [0x3000], 1", *rest))
    machine.memory.write(0x9000, assembler("mov byte ptr [0x3000], 2", "hlt", address=0x9000))
    machine.attach(Diary(0x77, during=answered.wait if doing == "in an access" else None), pio=0x10)

    async def until_it_is_there():
        expected = VCpuState.RUNNING_MMIO_PENDING
        if doing == "in an access":
            await until(lambda: other.state is expected)
            asyncio.get_running_loop().call_later(0.05, answered.set)
        elif doing == "halted":
            await until(lambda: other.halted)

    machine.attach(Diary(during=until_it_is_there), pio=0x18)
    async with deadline(30):
        assert await machine.run() == Exited(11)
    assert (other.context.cs.base, other.context.rax & 0xFF) == (0x9000, 0)


async def test_init_of_the_boot_processor_starts_it_anew(boot, assembler):
    """At the reset vector, where there is no memory: the guest jumps from there."""
    machine = boot(*local_apic(0xFEE0_0300, 0x44500), "hlt", mode="prot32", irqchip="devices")
    machine.memory.add_rom(0xFFFF_F000, bytes(0xFF0) + bytes.fromhex("b00ae6f4").ljust(16, b"\x90"))
    async with deadline():
        assert await machine.run() == Exited(21)


# ---- wiring -------------------------------------------------------------------------------------


async def test_there_are_24_lines(boot):
    machine = boot("hlt", irqchip="devices")
    with pytest.raises(ConfigurationError, match="interrupt line 24: the IOAPIC has 0 to 23"):
        machine.irq(24)
    machine.irq(23).pulse()
    machine.irq(2).pulse()
    assert await machine.pio.read(0x20, 1) == 0


async def test_the_host_sees_the_boot_processors_local_apic(boot):
    machine = boot("hlt", vcpus=2, irqchip="devices")
    assert await machine.mmio.read(0xFEE0_0020, 4) == 0
    await machine.mmio.write(0xFEE0_00F0, 1, 0x55)
    assert await machine.mmio.read(0xFEE0_00F0, 4) == 0x55


async def test_cpuid_tells_of_a_plain_local_apic(boot):
    machine = boot(
        *("mov eax, 1", "cpuid", "mov [0x3000], ecx", "mov [0x3004], edx", "hlt"),
        irqchip="devices",
    )
    async with deadline():
        await machine.run()
    ecx = int.from_bytes(machine.memory.read(0x3000, 4), "little")
    edx = int.from_bytes(machine.memory.read(0x3004, 4), "little")
    assert (edx >> 9 & 1, ecx >> 21 & 1, ecx >> 24 & 1) == (1, 0, 0)


# ---- checkpoints ----------------------------------------------------------------------------

TICKS = 40


def ticking(boot):
    """Counts timer ticks at 0x3000, then exits."""
    machine = boot(
        *START_PICS,
        *handler16(8, "tick"),
        *("mov al, 0x34", "out 0x43, al", "mov ax, 1193", "out 0x40, al"),  # 1 kHz
        *("mov al, ah", "out 0x40, al", "sti"),
        *("wait: hlt", f"cmp byte ptr [0x3000], {TICKS}", "jb wait", "mov al, 7", "out 0xf4, al"),
        *("tick: inc byte ptr [0x3000]", "mov al, 0x20", "out 0x20, al", "iret"),
        irqchip="devices",
        vcpus=2,
    )
    pit = machine.attach(Pit8254(), pio=0x40, irq=0)
    machine.attach(SystemPortB(pit), pio=0x61)
    return machine


async def test_a_checkpoint_goes_on_in_a_fresh_machine(boot, assembler):
    machine = ticking(boot)

    def ticks(of):
        return of.memory.read(0x3000, 1)[0]

    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: ticks(machine) >= 5)
        saved = await machine.checkpoint()
        assert await run == Exited(15)
        fresh = ticking(boot)
        await fresh.restore(saved)
        assert 5 <= ticks(fresh) < TICKS
        assert fresh.vcpus[1].awaits_start_up
        assert await fresh.run() == Exited(15)
        assert ticks(fresh) >= TICKS  # on a slow host, further ones come before the end


async def test_a_copy_has_controllers_of_its_own(boot):
    machine = ticking(boot)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.memory.read(0x3000, 1)[0] >= 5)
        (copy,) = await machine.fork(1)
        assert await copy.run() == await run == Exited(15)
        for name in ("pic0", "ioapic", "apic1", "pit82540"):
            assert copy.devices[name] is not machine.devices[name]
        await copy.pio.write(0x43, 1, 0xB0)  # counter 2 in mode 0: OUT is low
        seen = [await one.pio.read(0x61, 1) & 0x20 for one in (copy, machine)]
        await copy.pio.write(0x43, 1, 0xB6)  # in mode 3: high
        seen += [await one.pio.read(0x61, 1) & 0x20 for one in (copy, machine)]
        assert seen == [0, 0, 0x20, 0]


@pytest.mark.parametrize("answer_first", [False, True])
async def test_init_that_waits_for_an_access_is_taken_before_rest(boot, assembler, answer_first):
    """A drain, and so a checkpoint, finds the target of INIT and start-up IPI started."""
    machine = boot(
        *START_OTHERS,
        *("first: cmp byte ptr [0x3000], 1", "jne first", "out 0x18, al"),
        *local_apic(0xFEE0_0300, 0xC4500),
        *local_apic(0xFEE0_0300, 0xC4609),
        *("out 0x28, al", "second: cmp byte ptr [0x3000], 2", "jne second"),
        *("mov al, 5", "out 0xf4, al"),
        mode="prot32",
        vcpus=2,
        irqchip="devices",
    )
    other = machine.vcpus[1]
    answered = asyncio.Event()
    machine.memory.write(0x8000, assembler("mov byte ptr [0x3000], 1", "in al, 0x10"))
    machine.memory.write(0x9000, assembler("mov byte ptr [0x3000], 2", "hlt", address=0x9000))
    machine.attach(Diary(0x77, during=answered.wait), pio=0x10)

    async def until_it_is_there():
        await until(lambda: other.state is VCpuState.RUNNING_MMIO_PENDING)

    machine.attach(Diary(during=until_it_is_there), pio=0x18)
    sent = machine.attach(Diary(), pio=0x28)
    async with deadline(30):
        run = asyncio.create_task(machine.run())
        await until(sent.reached(1))
        if answer_first:
            answered.set()
        drain = asyncio.create_task(machine.drain())
        await asyncio.sleep(0)
        answered.set()
        await drain
        assert (other.context.cs.base, other.context.rip) in {(0x9000, 0), (0x9000, 6)}
        machine.resume()
        assert await run == Exited(11)
