"""Hand-over between KVM and the software CPU, and checkpoints that cross them."""

from __future__ import annotations

import asyncio
import gc
import random
from pathlib import Path
from typing import Any

import pytest

from kvmaio import Checkpoint, Exited, Halted, Machine
from kvmaio.boot import Firmware, Flat
from kvmaio.cli.board import build_board
from kvmaio.cpu import CpuState
from kvmaio.devices import CountdownTimer, DebugExit
from kvmaio.errors import ConfigurationError, EmulationFailure
from kvmaio.exits import InterruptedExit
from kvmaio.kvm.cpuid import CpuidEntry, select
from kvmaio.kvm.vm import KvmVm
from kvmaio.soft.platform import OwnCpuid, SoftMachine
from tests.assembler import assemble
from tests.engine.support import LAB, Diary, deadline, host_only, until
from tests.leftovers import Held, no_more_than

pytestmark = [pytest.mark.kvm, pytest.mark.soft]

HAS_AVX2 = " avx2 " in Path("/proc/cpuinfo").read_text()
SEABIOS = Path("/usr/share/seabios/bios.bin")
OTHER = {"kvm": "soft", "soft": "kvm"}

# Integer code at CPL0, which PVM emulates.
KERNEL = (
    *("mov ecx, 60000", "xor r15, r15", "again: mov rax, rcx", "imul rax, rax, 7919"),
    *("add r15, rax", "ror r15, 5", "adc r15, 3", "mov [0x6000 + rcx * 8], r15"),
    *("lea rdi, [0x100000 + rcx * 8]", "mov rax, r15", "stosq", "dec ecx", "jnz again"),
    *("mov al, 1", "out 0xf4, al"),
)
# x87 and SSE at CPL3, which it runs natively.
USER = (
    *("mov ecx, 6000000", "fninit", "fldpi", "fld1", "again: mov eax, ecx"),
    *("imul rax, rax, 7919", "add r15, rax", "cvtsi2sd xmm1, rax", "sqrtsd xmm2, xmm1"),
    *("addsd xmm3, xmm2", "fadd st, st(1)", "fsqrt", "movq rbx, xmm3", "xor r14, rbx"),
    *("dec ecx", "jnz again", "mov al, 1", "out 0xf4, al"),
)

# The same computation again and again, until somebody writes to 0x9000; R12 counts rounds whose
# result is another one than the first's. So the end does not tell how many rounds there were.
ROUNDS = (
    *("xor r12d, r12d", "xor r13d, r13d", "round: fninit", "fldpi", "fld1", "xor r14d, r14d"),
    *("xor r15d, r15d", "pxor xmm1, xmm1", "pxor xmm3, xmm3", "mov ecx, 20000"),
    *("again: mov eax, ecx", "imul rax, rax, 7919", "add r15, rax", "cvtsi2sd xmm1, rax"),
    *("sqrtsd xmm2, xmm1", "addsd xmm3, xmm2", "fadd st, st(1)", "fsqrt", "movq rbx, xmm3"),
    *("xor r14, rbx", "push r14", "pop qword ptr [0x100000 + rcx * 8]", "dec ecx", "jnz again"),
    *("fst qword ptr [0x9010]", "mov rax, r14", "ror rax, 7", "add rax, r15"),
    *("xor rax, [0x9010]", "test r13, r13", "jnz known", "mov r13, rax", "known: cmp r13, rax"),
    *("je same", "inc r12", "same: cmp byte ptr [0x9000], 0", "je round"),
    *("mov al, 1", "out 0xf4, al"),
)

ARITHMETIC = 0x8D5  # CF, PF, AF, ZF, SF, OF
ROUNDING = 0x20  # the sticky flag of inexact results, which the models find at other times


def defined(state: CpuState) -> dict[str, Any]:
    """What the architecture defines of it, and every KVM tells."""
    context, xsave = state.context, state.xsave
    assert xsave is not None
    found: dict[str, Any] = {
        name: getattr(context, name)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11"),
            *("r12", "r13", "r14", "r15", "rip", "cs", "ds", "es", "fs", "gs", "ss", "tr"),
            *("gdt", "idt", "cr0", "cr2", "cr3", "cr4", "cr8", "efer"),
        )
    }
    found["flags"] = context.rflags & ARITHMETIC  # PVM shows no IOPL
    found["fcw"], found["ftw"] = xsave[:2], xsave[4:5]
    found["top"] = xsave[3] & 0x38
    found["mxcsr"] = int.from_bytes(xsave[24:28], "little") & ~ROUNDING
    found["st"], found["xmm"] = xsave[32:160], xsave[160:416]
    found["dr"] = state.debug_registers[:4]
    return found


async def finished(
    lines: tuple[str, ...], mode: str, cpu: str, switches: int = 0, most_ticks: int = 0
) -> tuple[dict[str, Any], bytes]:
    """The end of a run with `switches` changes of the CPU, at any instruction."""
    moments = random.Random(6)
    async with Machine(memory="4M", cpu=cpu) as machine:
        machine.attach(DebugExit(), pio=0xF4)
        machine.load(Flat(assemble(lines, mode, 0x1000), 0x1000, mode))
        (vcpu,) = machine.vcpus
        for _ in range(switches):
            assert type(await vcpu.run(moments.randint(1, most_ticks))) is InterruptedExit
            await machine.switch_cpu(OTHER[vcpu.model.kind])
        assert await machine.run() == Exited(3)
        async with machine.drained():  # which completes the access
            return defined(vcpu.model.read_state()), machine.memory.read(0, machine.memory.size)


@pytest.mark.parametrize(
    ("lines", "mode", "most_ticks"),
    [
        pytest.param(
            *(KERNEL, "long64", 2000),
            marks=host_only(pvm=True, why="natively it is through after a few slices of time"),
        ),
        (USER, "user64", 50_000),
    ],
)
async def test_400_hand_overs_change_nothing(lines, mode, most_ticks):
    async with deadline(50):
        unswitched = await finished(lines, mode, "kvm")
        assert await finished(lines, mode, "soft") == unswitched
        assert await finished(lines, mode, "kvm", 400, most_ticks) == unswitched


async def test_a_run_with_devices_goes_on_with_the_other_model():
    """Each access is answered once, each interrupt taken, whoever executes."""
    lines = (
        *("mov word ptr [0x80], offset handler", "mov word ptr [0x82], 0", "sti"),
        *("mov cx, 3000", "again: in al, 0x60", "add bl, al", "mov al, bl", "out 0x61, al"),
        *("loop again", "cli", "mov ax, [0x5000]", "hlt"),
        *("handler: inc word ptr [0x5000]", "iret"),
    )
    async with deadline(30), Machine(memory="1M", cpu="kvm") as machine:
        (vcpu,) = machine.vcpus
        sent = 0

        def interrupt() -> None:
            nonlocal sent
            if len(diary.entries) % 100 == 0 and not vcpu.interrupts.pending:
                sent += 1
                vcpu.trigger(0x20)

        diary = machine.attach(Diary(*range(1, 3001), during=interrupt), pio=0x60)
        machine.load(Flat(assemble(lines, "real16", 0x1000), 0x1000))
        run = asyncio.create_task(machine.run())
        switches = 0
        while not run.done():
            more = diary.reached(len(diary.entries) + 20)
            await until(lambda: run.done() or more())  # noqa: B023
            if not run.done():
                await machine.switch_cpu(OTHER[vcpu.model.kind])
                switches += 1
        assert await run == Halted()
        total, written = 0, []
        for answer in range(1, 3001):
            total = total + answer & 0xFF
            written.append(total)
        assert [e[3] for e in diary.entries if e[0] == "write"] == written
        assert switches > 20 and vcpu.context.rax == sent > 0


@pytest.mark.skipif(not HAS_AVX2, reason="this processor has no AVX2")
async def test_what_the_other_model_cannot_hold_comes_back():
    lines = (
        *("mov eax, 0x11223344", "movd xmm0, eax", "vpbroadcastd ymm0, xmm0", "in al, 0x60"),
        *("mov ecx, 100", "again: dec ecx", "jnz again", "in al, 0x60"),
        *("vmovdqu [0x9000], ymm0", "out 0x61, al", "jmp $"),
    )
    async with deadline(), Machine(memory="2M", cpu="kvm") as machine:
        diary = machine.attach(Diary(), pio=0x60)
        machine.load(Flat(assemble(lines, "user64", 0x1000), 0x1000, "user64"))
        (vcpu,) = machine.vcpus
        await vcpu.run()
        await machine.switch_cpu("soft")
        await vcpu.run()
        await machine.switch_cpu("kvm")
        run = asyncio.create_task(machine.run())
        await until(lambda: any(e[0] == "write" for e in diary.entries))
        machine.stop()
        await run
        assert machine.memory.read(0x9000, 32) == bytes.fromhex("44332211") * 8
        assert vcpu.model.read_state().xcrs[0] & 4


async def test_400_hand_overs_of_an_active_run_change_nothing():
    """Wherever the guest happens to be; it ends as one that was never handed over."""
    ends, where = [], set()
    async with deadline(50):
        for switches in (0, 400):
            async with Machine(memory="4M", cpu="kvm") as machine:
                machine.attach(DebugExit(), pio=0xF4)
                machine.load(Flat(assemble(ROUNDS, "user64", 0x1000), 0x1000, "user64"))
                (vcpu,) = machine.vcpus
                run = asyncio.create_task(machine.run())
                for number in range(switches):
                    await asyncio.sleep(0.0005)
                    async with machine.drained():
                        where.add((vcpu.context.rip, vcpu.context.rcx))
                        await machine.switch_cpu(OTHER[vcpu.model.kind])
                    assert vcpu.model.kind == ("soft", "kvm")[number % 2] and not run.done()
                machine.memory.write(0x9000, b"\1")
                assert await run == Exited(3)
                async with machine.drained():  # which completes the access
                    end = defined(vcpu.model.read_state())
                    ends.append((end, machine.memory.read(0, machine.memory.size)))
    assert ends[0] == ends[1] and ends[1][0]["r12"] == 0
    assert len(where) > (30 if LAB else 300)  # it has gone on between them


@pytest.mark.skipif(not SEABIOS.exists(), reason=f"no {SEABIOS}: apt-get install seabios")
async def test_seabios_with_another_cpu_every_half_second():
    """The same debug text as without, to the end."""
    texts, switched = [], 0
    async with deadline(55):
        for every_s in (None, 0.5):
            async with Machine(memory="64M", cpu="kvm", irqchip="devices") as machine:
                board = build_board(machine, pc=True, vcpus=1)
                machine.load(Firmware(SEABIOS))
                console = board.debug_consoles[0]
                run = asyncio.create_task(machine.run())
                while b"Retrying in 60 seconds." not in console.output:
                    await asyncio.sleep(every_s or 0.05)
                    if every_s and b"Retrying" not in console.output:
                        await machine.switch_cpu(OTHER[machine.vcpus[0].model.kind])
                        switched += 1
                machine.stop()
                await run
                assert b"No bootable device." in console.output
                lines = console.output.splitlines()
                texts.append(sorted(li for li in lines if not li.startswith(b"CPU Mhz=")))
    assert texts[0] == texts[1]
    assert switched >= 2


async def test_hand_overs_leave_nothing_behind():
    async with deadline(), Machine(memory="1M", cpu="kvm") as machine:
        machine.load(Flat(b"\xf4", 0x1000))
        for cpu in ("soft", "kvm"):
            await machine.switch_cpu(cpu)
        held, alive = Held.now(), _alive()
        for _ in range(5):
            for cpu in ("soft", "kvm"):
                await machine.switch_cpu(cpu)
        no_more_than(held)
        assert _alive() == alive
        assert await machine.run() == Halted()


def _alive() -> tuple[int, int]:
    """How many machines of either kind there are, those of other tests included."""
    gc.collect()
    kinds = [type(thing) for thing in gc.get_objects()]
    return kinds.count(KvmVm), kinds.count(SoftMachine)


@pytest.mark.parametrize("assist", [True, False])
@host_only(pvm=True, why="this host's KVM runs the instruction itself")
async def test_a_copy_is_assisted_as_its_original(assist):
    """Also one made behind a change of the CPU."""
    async with deadline(), Machine(memory="2M", assist=assist) as machine:
        code = assemble(("addps xmm0, xmm1", "cli", "hlt"), "long64", 0x1000)
        machine.load(Flat(code, 0x1000, "long64"))
        await machine.switch_cpu("soft")
        await machine.switch_cpu("kvm")
        (copy,) = await machine.fork(1)
        for each in (machine, copy):
            if assist:
                assert await each.run() == Halted()
            else:
                with pytest.raises(EmulationFailure):
                    await each.run()


# ---- the common subset ---------------------------------------------------------------------------


class Everything:
    """A host that has every feature."""

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        ones = 0xFFFF_FFFF
        leaves = (1, 7, 0x80000001)
        return tuple(CpuidEntry(leaf, 0, 0, 1, ones, ones, ones) for leaf in leaves)


async def test_common_is_what_the_software_cpu_has():
    async with Machine(memory="1M", cpu="soft") as machine:
        source = OwnCpuid(machine.vcpus[0].model)  # type: ignore[arg-type]
        own = {e.function: e for e in source.supported_cpuid() if e.index == 0}
    common = {e.function: e for e in select(Everything(), "common") if e.index == 0}
    for function, register, more in (
        (1, "ecx", 0),
        (1, "edx", 1 << 27),  # self-snoop, which is no instruction
        (7, "ebx", 0),
        (7, "ecx", 0),
        (7, "edx", 0),
        (0x80000001, "ecx", 0),
        (0x80000001, "edx", 0x0183F3FF),  # those of leaf 1 again
    ):
        offered = getattr(common[function], register)
        beyond = offered & ~getattr(own[function], register) & ~more
        assert (hex(function), register, hex(beyond)) == (hex(function), register, "0x0")


async def test_a_planned_hand_over_keeps_what_cpuid_says():
    async with deadline(), Machine(memory="1M", cpu="kvm", cpuid="common") as machine:
        table = machine.vcpus[0].model.cpuid  # type: ignore[attr-defined]
        for cpu in ("soft", "kvm", "soft"):
            await machine.switch_cpu(cpu)
            assert machine.vcpus[0].model.cpuid == table  # type: ignore[attr-defined]


# ---- checkpoints across models -------------------------------------------------------------------


def machine_for(cpu: str, **options: Any) -> Machine:
    return Machine(memory="4M", cpu=cpu, **options)


def attach(machine: Machine) -> CountdownTimer:
    machine.attach(DebugExit(), pio=0xF4)
    machine.attach(Diary(), pio=0x60)
    return machine.attach(CountdownTimer(), mmio=0xD000_0000, irq=5)


@pytest.mark.parametrize(("first", "second"), [("kvm", "soft"), ("soft", "kvm")])
@pytest.mark.parametrize(("lines", "mode"), [(KERNEL, "long64"), (USER, "user64")])
async def test_a_checkpoint_goes_on_with_the_other_model(first, second, lines, mode, tmp_path):
    """And back: the second one's checkpoint, in turn, with the first."""
    async with deadline(50):
        unswitched = await finished(lines, mode, first)
        async with machine_for(first) as machine:
            attach(machine)
            machine.load(Flat(assemble(lines, mode, 0x1000), 0x1000, mode))
            assert type(await machine.vcpus[0].run(20_000)) is InterruptedExit
            checkpoint = await machine.checkpoint()
            table = machine.vcpus[0].model.cpuid  # type: ignore[attr-defined]
            before = machine.vcpus[0].model.read_state()
        for cpu in (second, first):
            checkpoint.save(tmp_path / cpu)
            async with machine_for(cpu) as machine:
                attach(machine)
                await machine.restore(Checkpoint.load(tmp_path / cpu))
                (vcpu,) = machine.vcpus
                assert vcpu.model.cpuid == table  # type: ignore[attr-defined]
                assert type(await vcpu.run(20_000)) is InterruptedExit
                checkpoint = await machine.checkpoint()
        async with machine_for(first) as machine:
            attach(machine)
            await machine.restore(checkpoint)
            (vcpu,) = machine.vcpus
            after = vcpu.model.read_state()
            assert after.xcrs == before.xcrs
            for index in (0xC0000081, 0xC0000082, 0x174, 0x277):
                assert after.msrs[index] == before.msrs[index]
            assert await machine.run() == Exited(3)
            async with machine.drained():
                end = defined(vcpu.model.read_state())
                assert (end, machine.memory.read(0, machine.memory.size)) == unswitched


async def test_devices_and_interrupt_controllers_cross_models():
    """A timer that is armed under one model rings under the other."""
    lines = (
        *("mov al, 0x11", "out 0x20, al", "mov al, 0x20", "out 0x21, al", "mov al, 4"),
        *("out 0x21, al", "mov al, 1", "out 0x21, al", "mov al, 0xdf", "out 0x21, al"),
        *("mov word ptr [0x94], offset handler", "mov word ptr [0x96], 0", "out 0x60, al"),
        *("sti", "again: hlt", "jmp again", "handler: mov al, 5", "out 0xf4, al"),
    )
    for first, second in (("kvm", "soft"), ("soft", "kvm")):
        options = {"irqchip": "devices"}
        async with deadline():
            async with machine_for(first, **options) as machine:
                timer = attach(machine)
                machine.load(Flat(assemble(lines, "real16", 0x1000), 0x1000))
                run = asyncio.create_task(machine.run())
                vcpu = machine.vcpus[0]
                await until(lambda: vcpu.halted)  # noqa: B023
                await machine.mmio.write(0xD000_0000, 4, 50_000_000)
                await machine.mmio.write(0xD000_0004, 4, 1)
                async with machine.drained():
                    checkpoint = await machine.checkpoint()
                    assert timer.alarm.deadline_ns is not None
                machine.stop()
                await run
            async with machine_for(second, **options) as machine:
                timer = attach(machine)
                await machine.restore(checkpoint)
                assert timer.alarm.deadline_ns is not None and machine.vcpus[0].halted
                assert await machine.run() == Exited(11)


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
async def test_kvms_interrupt_controllers_cannot_cross(irqchip):
    async with deadline():
        async with Machine(memory="1M", cpu="kvm", irqchip=irqchip) as machine:
            machine.load(Flat(b"\xf4", 0x1000))
            with pytest.raises(ConfigurationError, match='use irqchip="devices"'):
                await machine.switch_cpu("soft")
            checkpoint = await machine.checkpoint()
        async with Machine(memory="1M", cpu="soft", irqchip="devices") as machine:
            with pytest.raises(ConfigurationError, match="cannot be exchanged for others"):
                await machine.restore(checkpoint)
