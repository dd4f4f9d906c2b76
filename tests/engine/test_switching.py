"""switchOut and takeOverFrom: a machine goes on with another CPU model."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvmaio import Exited, Halted, Machine, Register, SharedRegister
from kvmaio.boot import Flat
from kvmaio.device import Device
from kvmaio.devices import DebugExit
from kvmaio.errors import ConfigurationError
from kvmaio.kvm.cpu import KvmCpu
from tests.assembler import assemble
from tests.engine.support import Diary, deadline, until
from tests.leftovers import Held, no_more_than
from tests.scripted import ScriptedCpu, port_in, scripted_machine

COUNTING = (
    *("mov bx, 0x5000", "again: inc word ptr [bx]", "mov ax, [bx]"),
    *("test al, 0x3f", "jnz again", "in al, 0x60", "test al, al", "jz again"),
    *("mov al, [0x5001]", "out 0xf4, al"),
)


def counted(machine: Machine) -> int:
    return int.from_bytes(machine.memory.read(0x5000, 2), "little")


@pytest.mark.kvm
async def test_goes_on_with_a_new_kvm_and_leaves_nothing_of_the_old():
    async with deadline(30), Machine(memory="1M") as machine:
        diary = machine.attach(Diary(), pio=0x60)
        machine.attach(DebugExit(), pio=0xF4)
        machine.load(Flat(assemble(COUNTING, "real16", 0x1000), 0x1000))
        run = asyncio.create_task(machine.run())
        await until(lambda: counted(machine) > 10)
        held = Held.now()
        for _ in range(10):
            at = counted(machine)
            old = machine.vcpus[0].model
            await machine.switch_cpu("kvm")
            assert machine.vcpus[0].model is not old
            await until(lambda: counted(machine) > at + 100)  # noqa: B023
        no_more_than(held)
        diary.answers = [1]
        assert isinstance(await run, Exited)


@pytest.mark.kvm
async def test_registers_are_there_before_the_first_run():
    async with deadline(), Machine(memory="1M") as machine:
        machine.load(Flat(assemble(("mov eax, 0x12345678", "hlt"), "real16", 0x1000), 0x1000))
        cpu = machine.vcpus[0]
        await cpu.run()
        cpu.context.rbx = 7
        await machine.switch_cpu("kvm")
        assert isinstance(cpu.model, KvmCpu)
        context = cpu.model.read_context()
        assert (context.rax, context.rbx, context.rip) == (0x12345678, 7, 0x1007)


@pytest.mark.kvm
async def test_waiting_interrupts_and_halts_go_over():
    lines = (
        *("mov word ptr [0x80], offset handler", "mov word ptr [0x82], 0", "sti", "hlt"),
        *("cli", "hlt", "handler: mov al, 5", "out 0xf4, al", "iret"),
    )
    async with deadline(), Machine(memory="1M") as machine:
        machine.attach(DebugExit(), pio=0xF4)
        machine.load(Flat(assemble(lines, "real16", 0x1000), 0x1000))
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.vcpus[0].halted)
        async with machine.drained():
            await machine.vcpus[0].interrupt(0x20)
            await machine.switch_cpu("kvm")
        assert await run == Exited(11)


@pytest.mark.kvm
async def test_fast_paths_go_over():
    class Fast(Device):
        posted = Register(0, int, posted=True)
        shared = SharedRegister(1, int)

        def __init__(self) -> None:
            self.seen: list[int] = []

        @posted.on_write
        def take(self, value: int) -> None:
            self.seen.append(value)
            self.shared = value + 1

    lines = ("mov al, 0", "again: out 0x70, al", "in al, 0x71", "cmp al, 200", "jb again", "hlt")
    async with deadline(), Machine(memory="1M") as machine:
        fast = machine.attach(Fast(), pio=0x70)
        machine.load(Flat(assemble(lines, "real16", 0x1000), 0x1000))
        run = asyncio.create_task(machine.run())
        await until(lambda: len(fast.seen) > 5)
        await machine.switch_cpu("kvm")
        await run
        assert fast.seen == list(range(200))


async def test_undrained_vcpu_is_refused(monkeypatch):
    cpu = ScriptedCpu(port_in(0x60))
    async with deadline(), scripted_machine(monkeypatch, cpu) as machine:
        vcpu = machine.vcpus[0]
        with pytest.raises(ConfigurationError, match="must be drained before another model"):
            vcpu.take_over(ScriptedCpu())
        await machine.drain()
        with pytest.raises(ConfigurationError, match="cannot take over from itself"):
            vcpu.take_over(cpu)
        assert vcpu.model is cpu


@pytest.mark.kvm
async def test_kvms_interrupt_controllers_cannot_be_handed_over():
    async with deadline(), Machine(memory="1M", irqchip="kernel") as machine:
        with pytest.raises(ConfigurationError, match='use irqchip="devices"'):
            await machine.switch_cpu("kvm")
        with pytest.raises(ConfigurationError, match="'auto': "):
            await machine.switch_cpu("auto")
        assert not machine.barrier.is_down


@pytest.mark.kvm
async def test_failed_switch_leaves_the_machine_as_it_was(monkeypatch):
    async with deadline(), Machine(memory="1M") as machine:
        machine.load(Flat(assemble(("inc eax", "hlt"), "real16", 0x1000), 0x1000))
        old = machine.vcpus[0].model

        write_state: Any = KvmCpu.write_state

        def refuse(self: Any, saved: Any) -> None:
            if self is not old or not isinstance(old, KvmCpu):
                raise OSError("no")
            write_state(self, saved)

        with monkeypatch.context() as patch:
            patch.setattr(KvmCpu, "write_state", refuse)
            with pytest.raises(OSError, match="no"):
                await machine.switch_cpu("kvm")
        assert machine.vcpus[0].model is old
        assert await machine.run() == Halted()
        assert machine.vcpus[0].context.rax == 1
