"""Instruction assist: what KVM's emulator lacks is executed by the software CPU."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvmaio
from kvmaio import Exited, Halted, Machine
from kvmaio.assist import is_vector_extension
from kvmaio.boot import Flat
from kvmaio.cpu import GENERAL
from kvmaio.devices import DebugExit
from kvmaio.errors import EmulationFailure
from kvmaio.trace import AccessRecord, AssistRecord, Record
from kvmaio.vcpu import current_vcpu
from tests.assembler import assemble
from tests.engine.support import Diary, deadline, host_only, until
from tests.soft.test_soft_cpu import Window

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.soft,
    host_only(pvm=True, why="this host's KVM runs these instructions itself"),
]

AT = 0xD000_0000

# x87, SSE, int3 through an IDT, cmpxchg16b, iretq, xgetbv; every result is stored.
KERNEL = (
    # An IDT at 0x8000 with one gate, vector 3, and this handler.
    *("lea rax, [rip + handler]", "mov rdi, 0x8030", "mov [rdi], ax"),
    *("mov word ptr [rdi + 2], 8", "mov word ptr [rdi + 4], 0x8e00", "shr rax, 16"),
    *("mov [rdi + 6], ax", "mov qword ptr [rdi + 8], 0"),
    *("mov word ptr [0x8100], 0x3f", "mov qword ptr [0x8102], 0x8000", "lidt [0x8100]"),
    *("mov rax, cr4", "or eax, 0x40600", "mov cr4, rax"),  # OSFXSR, OSXMMEXCPT, OSXSAVE
    *("mov ecx, 50", "mov rbx, 1", "fninit", "fldpi"),
    *("again: fld1", "faddp", "fst qword ptr [0x9000]", "movq xmm0, rbx", "paddq xmm0, xmm0"),
    *("addsd xmm1, [0x9000]", "movups [0x9010], xmm0", "imul rbx, rbx, 7", "int3"),
    *("mov rax, [0x9020]", "mov rdx, [0x9028]", "mov rsi, rcx", "mov rcx, rbx"),
    *("lock cmpxchg16b [0x9020]", "mov rcx, rsi", "popcnt r9, rbx", "add r8, r9"),
    *("dec ecx", "jnz again"),
    *("xor ecx, ecx", "xgetbv", "mov [0x9040], eax", "movq [0x9048], xmm1"),
    f"mov rdi, {AT}",
    *("movups [rdi], xmm0", "movups xmm2, [rdi + 0x20]", "movups [0x9050], xmm2", "cli", "hlt"),
    *("handler: inc dword ptr [0x9060]", "iretq"),
)


SYSTEM = (
    *("cs", "ds", "es", "fs", "gs", "ss", "tr", "gdt", "idt"),
    *("cr0", "cr2", "cr3", "cr4", "cr8", "efer"),
)
ADJUST = 0x10  # which the last XOR leaves undefined


async def finish(cpu: str, **options: object):
    async with Machine(cpu=cpu, cpuid="host", **options) as machine:  # type: ignore[arg-type]
        window = machine.attach(Window(), mmio=AT)
        machine.load(Flat(assemble(KERNEL, "long64", 0x1000), 0x1000, "long64"))
        async with deadline(30):
            assert await machine.run() == Halted()
        (vcpu,) = machine.vcpus
        state = vcpu.model.read_state()
        assert state.xsave is not None
        context = state.context
        registers: dict[str, Any] = {name: getattr(context, name) for name in (*GENERAL, *SYSTEM)}
        registers["rflags"] &= ~ADJUST
        fpu = (state.xsave[:2], state.xsave[32:416])
        memory = machine.memory.read(0x8000, 0x2000)
        return registers, fpu, memory, window.log, vcpu.stats.numAssists


async def test_a_kernel_ends_as_on_the_software_cpu():
    assisted, soft = await finish("auto"), await finish("soft")
    assert assisted[:4] == soft[:4]
    assert assisted[4] > 0 and soft[4] == 0


async def test_assists_that_come_thick_and_fast_are_longer_and_fewer(monkeypatch):
    adaptive = await finish("auto")
    monkeypatch.setattr("kvmaio.assist.SOON_NS", 0)
    single = await finish("auto")
    assert adaptive[:4] == single[:4]
    assert single[4] > 50 * 8 > adaptive[4]


@pytest.mark.parametrize("options", [{"cpu": "kvm"}, {"assist": False}], ids=str)
async def test_switched_off_it_is_an_error_that_names_the_instruction(options):
    async with Machine(**options) as machine:
        machine.attach(DebugExit(), pio=0xF4)
        machine.load(
            Flat(assemble(("addps xmm0, xmm1", "hlt"), "long64", 0x1000), 0x1000, "long64")
        )
        async with deadline():
            with pytest.raises(
                EmulationFailure, match=r"0f 58 c1.*, addps xmm0, xmm1 .*kvmaio\[soft\]"
            ):
                await machine.run()
        assert machine.vcpus[0].stats.numAssists == 0


# ---- what a stay in software must not change ----------------------------------------------------

SSE = ("mov rax, cr4", "or eax, 0x40600", "mov cr4, rax")
# Assists that come thick and fast, until one executes everything behind them as well.
STAY = ("mov ecx, 40", "warm: addsd xmm1, xmm0", "dec ecx", "jnz warm")


def load(machine: Machine, *lines: str) -> None:
    machine.load(Flat(assemble(lines, "long64", 0x1000), 0x1000, "long64"))


async def both(*lines: str, registers: tuple[str, ...]) -> tuple[list[list[int]], Machine]:
    """The registers at the halt, under KVM with assists and on the software CPU."""
    ends = []
    for cpu in ("soft", "auto"):
        async with Machine(cpu=cpu, memory="2M") as machine, deadline():
            load(machine, *SSE, *STAY, *lines)
            assert await machine.run() == Halted()
            context = machine.vcpus[0].context
            ends.append([getattr(context, name) for name in registers])
    return ends, machine


async def test_a_stay_takes_model_specific_and_debug_registers_to_and_fro():
    ends, machine = await both(
        *("mov ecx, 0xc0000102", "mov eax, 0x1234000", "xor edx, edx", "wrmsr", "swapgs"),
        *("mov eax, 0x5678", "mov dr0, rax", "mov ecx, 4000", "wait: dec ecx", "jnz wait"),
        *("mov ecx, 0xc0000102", "rdmsr", "mov rsi, rax", "mov ecx, 0xc0000101", "rdmsr"),
        *("mov rdi, dr0", "cli", "hlt"),
        registers=("rax", "rsi", "rdi"),
    )
    assert ends == [[0x123_4000, 0, 0x5678]] * 2
    assert 1 <= machine.vcpus[0].stats.numAssists < 40


async def test_a_stay_answers_cpuid_from_the_machines_table():
    async with (
        Machine(memory="2M", cpuid={0: (1, 2, 3, 4), 1: (5, 6, 7, 8)}) as machine,
        deadline(),
    ):
        load(machine, *SSE, *STAY, "mov eax, 1", "cpuid", "cli", "hlt")
        assert await machine.run() == Halted()
        context = machine.vcpus[0].context
        (entry,) = (e for e in machine.vcpus[0].model.cpuid if e.function == 1)  # type: ignore[attr-defined]
        assert (context.rax, context.rbx, context.rdx) == (entry.eax, entry.ebx, entry.edx)


async def test_a_device_that_ends_the_run_in_a_stay_loses_nothing():
    async with Machine(memory="2M") as machine, deadline():
        machine.attach(DebugExit(), pio=0xF4)
        load(
            machine,
            *(*SSE, *STAY, "mov eax, 5", "out 0xf4, al", "inc eax", "addsd xmm1, xmm0"),
            *("out 0xf4, al", "inc eax", "cli", "hlt"),
        )
        assert await machine.run() == Exited(11)
        assert machine.vcpus[0].context.rax == 5
        assert await machine.run() == Exited(13)
        assert await machine.run() == Halted()
        assert machine.vcpus[0].context.rax == 7


async def test_a_handler_sees_and_edits_the_registers_of_a_stay():
    seen: list[int] = []

    def look() -> None:
        context = current_vcpu().context
        seen.append(context.rbx)
        context.rsi = context.rbx + 1

    async with Machine(memory="2M") as machine, deadline():
        diary = machine.attach(Diary(0x33, during=look), pio=0x60)
        load(machine, *SSE, *STAY, "mov ebx, 7", "in al, 0x60", "mov edi, esi", "cli", "hlt")
        assert await machine.run() == Halted()
        context = machine.vcpus[0].context
        assert (seen, context.rax & 0xFF, context.rdi) == ([7], 0x33, 8)
        assert diary.entries == [("read", 0, 1)]


async def test_a_string_is_written_once_in_a_stay():
    async with Machine(memory="2M") as machine, deadline():
        diary = machine.attach(Diary(), pio=0x60)
        machine.memory.write(0x8000, b"software")
        load(
            machine,
            *(*SSE, *STAY, "mov esi, 0x8000", "mov ecx, 8", "mov edx, 0x60", "rep outsb"),
            *("cli", "hlt"),
        )
        assert await machine.run() == Halted()
        assert bytes(entry[3] for entry in diary.entries) == b"software"  # type: ignore[misc]
        assert machine.vcpus[0].context.rsi == 0x8008


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
async def test_beside_kvms_interrupt_controllers_there_are_no_stays(irqchip):
    async with Machine(memory="2M", irqchip=irqchip) as machine, deadline():
        machine.attach(DebugExit(), pio=0xF4)
        load(
            machine,
            *(*SSE, *STAY, "mov rdi, 0xfee00030", "mov eax, [rdi]", "movzx ebx, al"),
            *("out 0xf4, al", "cli", "hlt"),
        )
        assert isinstance(await machine.run(), Exited)
        assert machine.vcpus[0].context.rbx not in (0, 0xFF)
        assert machine.vcpus[0].stats.numAssists == 40


async def test_an_interrupt_ends_a_stay_and_is_taken():
    async with Machine(memory="2M") as machine, deadline():
        vcpu = machine.vcpus[0]
        machine.attach(Diary(during=lambda: vcpu.trigger(0x30)), pio=0x60)
        load(
            machine,
            *("lea rax, [rip + handler]", "mov rdi, 0x8300", "mov [rdi], ax"),
            *("mov word ptr [rdi + 2], 8", "mov word ptr [rdi + 4], 0x8e00", "shr rax, 16"),
            *("mov [rdi + 6], ax", "mov qword ptr [rdi + 8], 0"),
            *("mov word ptr [0x8100], 0x3ff", "mov qword ptr [0x8102], 0x8000", "lidt [0x8100]"),
            *(*SSE, "sti", *STAY, "out 0x60, al", "again: test ebx, ebx", "jz again"),
            *("cli", "hlt", "handler: mov ebx, 1", "iretq"),
        )
        assert await machine.run() == Halted()
        assert vcpu.stats.numInterrupts == 1


# ---- what nobody can execute --------------------------------------------------------------------


async def test_what_the_software_cpu_lacks_too_is_kvms_error():
    async with Machine(memory="2M") as machine, deadline():
        load(machine, "mov ebx, 3", "vaddps ymm0, ymm1, ymm2", "hlt")
        for _ in range(2):
            with pytest.raises(EmulationFailure, match=r"vaddps .*nor can the software CPU") as e:
                await machine.run()
            assert e.value.instruction.startswith(b"\xc5")
        assert machine.vcpus[0].context.rbx == 3
        assert machine.vcpus[0].stats.numAssists == 0


async def test_sse_that_is_switched_off_is_the_guests_fault():
    """Without CR4.OSFXSR it is #UD: with no IDT, a shutdown, as on a processor."""
    async with Machine(memory="2M") as machine, deadline():
        load(machine, *("mov rax, cr4", "and eax, 0xfffff9ff", "mov cr4, rax"), "addps xmm0, xmm1")
        assert isinstance(await machine.run(), kvmaio.Shutdown)


@pytest.mark.parametrize(
    ("code", "bits", "is_one"),
    [
        (b"\xc5\xf4\x58\xc2", 64, True),
        (b"\x66\xc4\xe2\x79\x18\xc0", 64, True),
        (b"\xc5\x06\x00", 16, False),  # LDS
        (b"\xc5\xf8\x77", 32, True),
        (b"\x0f\x58\xc1", 64, False),
        (b"", 64, False),
    ],
)
def test_vector_extensions_by_their_prefix(code, bits, is_one):
    assert is_vector_extension(code, bits) is is_one


# ---- the rest of the engine ----------------------------------------------------------------------


async def test_a_machine_is_drained_and_saved_while_an_assist_waits_for_a_device():
    answered = asyncio.Event()
    async with Machine(memory="2M") as machine, deadline():
        diary = machine.attach(Diary(0x42, during=answered.wait), pio=0x60)
        load(
            machine,
            *(*SSE, *STAY, "in al, 0x60", "mov edi, 5000", "wait: dec edi", "jnz wait"),
            *("addsd xmm1, xmm0", "inc ebx", "cli", "hlt"),
        )
        run = asyncio.create_task(machine.run())
        await until(diary.reached(1))
        draining = asyncio.create_task(machine.drain())
        await asyncio.sleep(0.01)
        assert not draining.done()
        answered.set()
        await draining
        checkpoint = await machine.checkpoint()
        context = machine.vcpus[0].context
        assert (context.rax & 0xFF, context.rbx) == (0x42, 0)
        machine.resume()
        assert await run == Halted()
        end = machine.vcpus[0].model.read_state()
    async with Machine(memory="2M") as machine, deadline():
        machine.attach(Diary(), pio=0x60)
        await machine.restore(checkpoint)
        assert await machine.run() == Halted()
        again = machine.vcpus[0].model.read_state()
        assert (again.context, again.xsave) == (end.context, end.xsave)


async def test_traces_tell_of_assists():
    records: list[Record] = []
    async with Machine(memory="2M") as machine, deadline():
        machine.attach(Diary(), pio=0x60)
        load(machine, *SSE, "nop", "addsd xmm1, xmm0", "out 0x60, al", "cli", "hlt")
        with machine.trace(records.append, only="assist,access"):
            assert await machine.run() == Halted()
    assist, access = records
    assert isinstance(assist, AssistRecord) and isinstance(access, AccessRecord)
    at = 0x1000 + len(assemble((*SSE, "nop"), "long64", 0x1000))
    assert (assist.source, assist.address, assist.instructions) == ("cpu0", at, 1)
    assert assist.code.startswith(b"\xf2\x0f\x58\xc8")
    assert assist.instruction == "addsd xmm1, xmm0"


def test_in_simulated_time_each_assist_is_one_instruction():
    async def main() -> tuple[Any, int]:
        async with Machine(memory="2M") as machine:
            load(machine, *SSE, *STAY, "cli", "hlt")
            return await machine.run(), machine.vcpus[0].stats.numAssists

    assert kvmaio.run(main(), time="simulated") == (Halted(), 40)


async def test_instruction_counts_include_assists():
    async with Machine(memory="2M") as machine, deadline():
        load(machine, *("inc ebx", "addsd xmm1, xmm0") * 4, "cli", "hlt")
        machine.vcpus[0].context.cr4 |= 0x600
        event = asyncio.create_task(machine.vcpus[0].at_instruction(5))
        await asyncio.sleep(0)
        run = asyncio.create_task(machine.run())
        await event
        await machine.drain()
        assert machine.vcpus[0].context.rbx == 3
        machine.resume()
        assert await run == Halted()


async def test_checkpoints_between_assists_go_on_with_either_model():
    lines = (
        *(*SSE, "mov eax, 3", "cvtsi2sd xmm0, eax", "mov ecx, 60000"),
        *("again: addsd xmm1, xmm0", "sqrtsd xmm2, xmm1", "dec ecx", "jnz again", "cli", "hlt"),
    )
    ends: list[bytes] = []

    def note(machine: Machine) -> None:
        xsave = machine.vcpus[0].model.read_state().xsave
        assert xsave is not None and machine.vcpus[0].context.rcx == 0
        ends.append(xsave[160:208])

    async with deadline(40):
        async with Machine(memory="2M") as machine:
            load(machine, *lines)
            run = asyncio.create_task(machine.run())
            checkpoints = []
            for _ in range(6):
                at = machine.vcpus[0].stats.numAssists
                await until(lambda: machine.vcpus[0].stats.numAssists > at)  # noqa: B023
                checkpoints.append(await machine.checkpoint())
            assert not run.done()
            assert await run == Halted()
            note(machine)
        for checkpoint in checkpoints:
            for cpu in ("auto", "soft"):
                async with Machine(memory="2M", cpu=cpu) as machine:
                    await machine.restore(checkpoint)
                    assert await machine.run() == Halted()
                    note(machine)
    assert len(ends) == 13 and len(set(ends)) == 1


async def test_a_handler_that_kvm_has_rewritten_is_executed_as_it_is_now():
    """An assist that faults goes on with the handler's first instruction."""
    fault = ("addsd xmm1, xmm0",)  # four bytes; #NM, as CR0.TS is set
    async with Machine(memory="2M", irqchip="kernel") as machine, deadline():
        machine.attach(DebugExit(), pio=0xF4)
        load(
            machine,
            *("lea rax, [rip + handler]", "mov rdi, 0x8070", "mov [rdi], ax"),
            *("mov word ptr [rdi + 2], 8", "mov word ptr [rdi + 4], 0x8e00", "shr rax, 16"),
            *("mov [rdi + 6], ax", "mov qword ptr [rdi + 8], 0"),
            *("mov word ptr [0x8100], 0x7f", "mov qword ptr [0x8102], 0x8000", "lidt [0x8100]"),
            *(*SSE, "mov rax, cr0", "or eax, 8", "mov cr0, rax", "xor ebx, ebx"),
            *(*fault, "mov esi, ebx", "mov byte ptr [rip + handler + 1], 2", *fault),
            *(
                "out 0xf4, al",
                "hlt",
                ".skip 64, 0x90",
                "handler: mov bl, 1",
                "add qword ptr [rsp], 4",
                "iretq",
            ),
        )
        assert isinstance(await machine.run(), Exited)
        context = machine.vcpus[0].context
        assert (context.rsi, context.rbx & 0xFF) == (1, 2)


# ---- code that changes between assists -----------------------------------------------------------

UNITS = tuple(
    bytes.fromhex(code)
    for code in (
        *("0f58c190", "0f5cc190", "0f59c190", "0f58ca90"),  # addps, subps, mulps and addps xmm1
        *("90909090", "d9ea9090", "ddd89090"),  # nops; fldl2e; fstp st(0)
    )
)

# Each turn copies the next four units, which lie at 0x9000, to where they are executed.
REWRITING = (
    *("mov rax, cr4", "or eax, 0x40600", "mov cr4, rax", "fninit"),
    *("mov eax, 0x3f800001", "movd xmm0, eax", "mov eax, 0x3f7ffff0", "movd xmm1, eax"),
    *("mov rsi, 0x9000", "mov rcx, [0x8ff8]"),
    *("again: mov rax, [rsi]", "mov rdx, [rsi + 8]"),
    *("mov [rip + spot], rax", "mov [rip + spot + 8], rdx"),
    *("spot: nop", *["nop"] * 15, "add rsi, 16", "dec rcx", "jnz again"),
    *("movups [0x8000], xmm0", "movups [0x8010], xmm1", "fnstsw [0x8020]", "hlt"),
)


async def rewritten(cpu: str, turns: list[list[bytes]]) -> bytes:
    async with Machine(cpu=cpu, memory="2M") as machine:
        machine.load(Flat(assemble(REWRITING, "long64", 0x1000), 0x1000, "long64"))
        machine.memory.write(0x8FF8, len(turns).to_bytes(8, "little"))
        machine.memory.write(0x9000, b"".join(b"".join(units) for units in turns))
        async with deadline(30):
            assert await machine.run() == Halted()
        assert cpu == "soft" or machine.vcpus[0].stats.numAssists  # whatever the units are
        return machine.memory.read(0x8000, 0x22)


FEW_UNITS = st.lists(st.sampled_from(UNITS), min_size=4, max_size=4)


@given(st.lists(FEW_UNITS, min_size=1, max_size=3), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_code_that_changes_and_changes_back_is_executed_as_it_is(kinds, random):
    turns = [random.choice(kinds) for _ in range(40)]
    expected = asyncio.run(rewritten("soft", turns))
    for soon_ns in (0, 300_000):  # one at a time; and stays
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("kvmaio.assist.SOON_NS", soon_ns)
            assert asyncio.run(rewritten("auto", turns)) == expected
