"""Instruction assist: what KVM's emulator lacks is executed by the software CPU."""

from __future__ import annotations

import pytest

from kvmaio import Halted, Machine
from kvmaio.boot import Flat
from kvmaio.devices import DebugExit
from kvmaio.errors import EmulationFailure
from tests.assembler import assemble
from tests.engine.support import deadline, host_only
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
        registers = [getattr(context, f"r{name}") for name in ("ax", "bx", "cx", "dx", "sp", "ip")]
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
            with pytest.raises(EmulationFailure, match=r"0f 58 c1"):
                await machine.run()
        assert machine.vcpus[0].stats.numAssists == 0
