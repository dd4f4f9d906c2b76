"""State that no processor takes: a guest cannot make it, and a hand-over does not lose it."""

from __future__ import annotations

import asyncio
import struct

import attrs
import pytest

from kvmaio import CheckpointError, Exited, Halted, HostError, Machine, Shutdown
from kvmaio.boot import Flat
from kvmaio.cpu import CpuState
from kvmaio.devices import DebugExit
from kvmaio.soft.cpu import SoftCpu
from tests.assembler import assemble
from tests.engine.support import LAB, deadline, until

# Each loads 0xffffffff into MXCSR; what is at 0x9000 is a valid image of FXSAVE else.
LOADS = {
    "ldmxcsr": ("mov dword ptr [0x9018], -1", "ldmxcsr [0x9018]"),
    "fxrstor": ("fxsave [0x9000]", "mov dword ptr [0x9018], -1", "fxrstor [0x9000]"),
    "xrstor": (
        *("fxsave [0x9000]", "mov dword ptr [0x9018], -1", "mov qword ptr [0x9200], 3"),
        *("mov eax, 3", "xor edx, edx", "xrstor [0x9000]"),
    ),
}
EXIT = ("mov al, 1", "out 0xf4, al")


def load(machine: Machine, *lines: str, mode: str = "user64") -> None:
    machine.attach(DebugExit(), pio=0xF4)
    machine.load(Flat(assemble(lines, mode, 0x1000), 0x1000, mode))


EMULATED = "QEMU's processor takes reserved bits of MXCSR"


@pytest.mark.parametrize("lines", LOADS.values(), ids=LOADS)
async def test_reserved_bits_of_mxcsr_are_a_fault(kvmaio_cpu, lines):
    """Which the stub of `Flat` makes a shutdown."""
    if LAB and kvmaio_cpu != "soft":
        pytest.skip(EMULATED)
    async with Machine(memory="2M", cpu=kvmaio_cpu) as machine, deadline():
        load(machine, *lines, *EXIT)
        assert isinstance(await machine.run(), Shutdown)
    async with Machine(memory="2M", cpu=kvmaio_cpu) as machine, deadline():
        valid = [line.replace(", -1", ", 0xffbf") for line in lines]
        load(machine, *valid, *EXIT)
        assert await machine.run() == Exited(3)


# An IDT whose #GP handler keeps the error code, RIP and MXCSR, and goes on behind.
HANDLED = (
    *("lea rax, [rip + handler]", "mov rdi, 0x80d0", "mov [rdi], ax"),
    *("mov word ptr [rdi + 2], 8", "mov word ptr [rdi + 4], 0x8e00", "shr rax, 16"),
    *("mov [rdi + 6], ax", "mov qword ptr [rdi + 8], 0", "lea r8, [rip + load]"),
    *("mov word ptr [0x8200], 0xff", "mov qword ptr [0x8202], 0x8000", "lidt [0x8200]"),
    *("mov rax, cr4", "or eax, 0x600", "mov cr4, rax", "mov dword ptr [0x9018], 0x5f80"),
    *("ldmxcsr [0x9018]", "mov dword ptr [0x9018], -1", "mov eax, 0x1234", "movd xmm5, eax"),
    *("stc", "load: ldmxcsr [0x9018]", "behind: movd ebx, xmm5", "cli", "hlt"),
    *("handler: stmxcsr [0x901c]", "pop r9", "mov r10, [rsp]", "mov r11, [rsp + 16]"),
    *("lea rax, [rip + behind]", "mov [rsp], rax", "iretq"),
)


@pytest.mark.soft
@pytest.mark.parametrize("ticks", [None, 1])
async def test_the_fault_is_as_if_nothing_had_been_loaded(ticks):
    async with Machine(memory="2M", cpu="soft") as machine, deadline():
        load(machine, *HANDLED, mode="long64")
        (vcpu,) = machine.vcpus
        if ticks is not None:
            while not vcpu.context.r10:
                await vcpu.run(ticks)
        assert await machine.run() == Halted()
        context = vcpu.context
        assert (context.r9, context.r10, context.rbx) == (0, context.r8, 0x1234)
        assert context.r11 & 0x8D5 == 1
        assert machine.memory.read(0x901C, 4) == bytes.fromhex("805f0000")
        # The 20 before it, 3 behind, 7 in the handler; not itself.
        assert vcpu.stats.numInsts == len(HANDLED) - 1


@pytest.mark.kvm
@pytest.mark.soft
@pytest.mark.skipif(LAB, reason=EMULATED)
async def test_a_guest_under_kvm_with_assists_ends_as_on_a_processor():
    async with Machine(memory="2M", cpu="auto") as machine, deadline():
        load(machine, "mov rax, cr4", "or eax, 0x600", "mov cr4, rax", *LOADS["ldmxcsr"], "hlt",
             mode="long64")  # fmt: skip
        assert isinstance(await machine.run(), Shutdown)


@pytest.mark.soft
async def test_where_instructions_are_not_counted_the_bits_are_dropped():
    async with Machine(memory="2M", cpu="soft") as machine, deadline():
        load(machine, *LOADS["ldmxcsr"], "nop", *EXIT)
        model = machine.vcpus[0].model
        assert isinstance(model, SoftCpu)
        model.counting = False
        assert await machine.run() == Exited(3)
        xsave = model.read_state().xsave
        assert xsave is not None and xsave[24:28] == b"\xff\xff\0\0"


WAITS = (
    *("mov eax, 0x1234", "movd xmm5, eax", "mov byte ptr [0x9011], 1"),
    *("again: cmp byte ptr [0x9010], 0", "je again", "movd ebx, xmm5", "mov [0x9020], ebx"),
    *EXIT,
)


def refused(state: CpuState) -> CpuState:
    assert state.xsave is not None
    return attrs.evolve(state, xsave=state.xsave[:24] + b"\xff" * 4 + state.xsave[28:])


@pytest.mark.kvm
@pytest.mark.soft
async def test_a_hand_over_that_the_host_refuses_leaves_the_model_before(monkeypatch):
    async with Machine(memory="2M", cpu="soft") as machine, deadline():
        load(machine, *WAITS)
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.memory.read(0x9011, 1) == b"\1")
        read_state = SoftCpu.read_state
        monkeypatch.setattr(SoftCpu, "read_state", lambda cpu: refused(read_state(cpu)))
        with pytest.raises(HostError, match=r"KVM_SET_XSAVE: Invalid argument .*MXCSR"):
            await machine.switch_cpu("kvm")
        monkeypatch.undo()
        assert machine.vcpus[0].model.kind == "soft" and not run.done()
        machine.memory.write(0x9010, b"\1")
        assert await run == Exited(3)
        assert machine.memory.read(0x9020, 4) == bytes.fromhex("34120000")


@pytest.mark.kvm
@pytest.mark.soft
async def test_a_restore_that_the_host_refuses_is_an_error(monkeypatch):
    read_state = SoftCpu.read_state
    async with Machine(memory="2M", cpu="soft") as machine, deadline():
        load(machine, *WAITS)
        monkeypatch.setattr(SoftCpu, "read_state", lambda cpu: refused(read_state(cpu)))
        checkpoint = await machine.checkpoint()
    async with Machine(memory="2M", cpu="kvm") as machine:
        machine.attach(DebugExit(), pio=0xF4)
        with pytest.raises(CheckpointError, match="cpu 0: XSAVE"):
            await machine.restore(checkpoint)


# FTZ is SSE's alone: 1e-30 * 1e-10 is a denormal in single precision.
FLUSHES = (
    *("mov dword ptr [0x9000], 0x0da24260", "mov dword ptr [0x9004], 0x2edbe6ff"),
    *("mov dword ptr [0x9008], 0x9f80", "ldmxcsr [0x9008]", "ldmxcsr [0x9008]"),
    *("movss xmm0, [0x9000]", "mulss xmm0, [0x9004]", "movss [0x9010], xmm0"),
    *("fninit", "fld dword ptr [0x9000]", "fmul dword ptr [0x9004]", "fstp dword ptr [0x9014]"),
    *EXIT,
)


async def test_tiny_results_are_flushed_where_mxcsr_says_so(kvmaio_cpu):
    async with Machine(memory="2M", cpu=kvmaio_cpu) as machine, deadline():
        load(machine, *FLUSHES)
        assert await machine.run() == Exited(3)
        sse, x87 = struct.unpack("<2I", machine.memory.read(0x9010, 8))
        assert sse == 0 and 0 < x87 < 0x80_0000
