"""Instruction counts, and what was set on a CPU model, across hand-overs, restores and copies.

A count is right, or unknown.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvmaio import Machine
from kvmaio.boot import Flat
from kvmaio.errors import ConfigurationError
from kvmaio.exits import DebugEventExit, InterruptedExit
from tests.assembler import assemble
from tests.engine.support import deadline, host_only

pytestmark = [pytest.mark.kvm, pytest.mark.soft]

SPIN = assemble(("spin: inc word ptr [0x5000]", "jmp spin"), "real16", 0x1000)


def machine_with(cpu: str) -> Machine:
    return Machine(memory="1M", cpu=cpu)


def load(machine: Machine) -> Any:
    """A guest that goes on for ever; its vCPU."""
    machine.load(Flat(SPIN, 0x1000))
    return machine.vcpus[0]


async def run(vcpu: Any, ticks: int = 200_000) -> None:
    assert type(await vcpu.run(ticks)) is InterruptedExit


async def test_what_kvm_has_executed_is_not_counted_as_nothing():
    async with machine_with("soft") as machine, deadline():
        vcpu = load(machine)
        await run(vcpu)
        assert vcpu.stats.numInsts == 200_000
        await machine.switch_cpu("kvm")
        assert (await machine.checkpoint()).cpus[0].engine["instructions"] == 200_000
        await run(vcpu)
        await machine.switch_cpu("soft")
        assert vcpu.model.instructions is None
        await run(vcpu)
        assert vcpu.stats.numInsts is None
        with pytest.raises(ConfigurationError, match="is unknown: it has run where nobody counted"):
            await vcpu.at_instruction(300_000)
        # From now on there is a count, and it is exact.
        before = vcpu.model.handle.ticks
        event = asyncio.create_task(vcpu.at_instruction(1000, from_now=True))
        await asyncio.sleep(0)
        await run(vcpu)
        await event
        assert vcpu.model.handle.ticks == before + 1000


@pytest.mark.parametrize("way", ["switch", "restore"])
@pytest.mark.parametrize(("first", "second"), [("kvm", "soft"), ("soft", "kvm")])
async def test_before_the_first_run_the_count_is_0(way, first, second):
    async with machine_with(first) as one, deadline():
        vcpu = load(one)
        checkpoint = await one.checkpoint()
        assert checkpoint.cpus[0].engine["instructions"] == 0
        async with machine_with(second) as other:
            if way == "switch":
                await one.switch_cpu(second)
            else:
                await other.restore(checkpoint)
                vcpu = other.vcpus[0]
            assert vcpu.model.kind == second
            assert vcpu.model.instructions == (0 if second == "soft" else None)
            event = asyncio.create_task(vcpu.at_instruction(21))
            await asyncio.sleep(0)
            while not event.done():
                await vcpu.run(100_000)
            assert (vcpu.stats.numInsts, vcpu.context.rip) == (21, 0x1004)


async def test_a_checkpoint_with_an_unknown_count_stays_unknown():
    async with machine_with("kvm") as machine, deadline():
        await run(load(machine))
        checkpoint = await machine.checkpoint()
    assert checkpoint.cpus[0].engine["instructions"] is None
    async with machine_with("soft") as machine, deadline():
        await machine.restore(checkpoint)
        (vcpu,) = machine.vcpus
        assert vcpu.model.instructions is None
        with pytest.raises(ConfigurationError, match="is unknown"):
            await vcpu.at_instruction(50)
        await run(vcpu)
        assert vcpu.stats.numInsts is None
        assert (await machine.checkpoint()).cpus[0].engine["instructions"] is None
        load(machine)  # a reset is a beginning
        await run(vcpu, 7)
        assert vcpu.stats.numInsts == 7


async def test_a_count_that_kvm_does_not_go_on_with_is_unknown():
    async with machine_with("soft") as machine, deadline():
        await run(load(machine))
        checkpoint = await machine.checkpoint()
    async with machine_with("kvm") as machine, deadline():
        await machine.restore(checkpoint)
        (vcpu,) = machine.vcpus
        assert vcpu.stats.numInsts == 200_000
        await run(vcpu)
        assert vcpu.stats.numInsts is None


@pytest.mark.kvmaio_cpu("soft")
async def test_a_time_without_counting_is_not_counted_as_instructions(kvmaio_cpu):
    async with machine_with(kvmaio_cpu) as machine, deadline():
        vcpu = load(machine)
        await run(vcpu, 10)
        vcpu.model.counting = False
        vcpu.model.counting = True
        await run(vcpu, 10)
        assert vcpu.stats.numInsts == 20
        vcpu.model.counting = False
        with pytest.raises(ConfigurationError, match="runs uncounted"):
            await vcpu.at_instruction(30)
        await run(vcpu)
        assert vcpu.stats.numInsts is None
        vcpu.model.counting = True
        await run(vcpu)
        assert vcpu.stats.numInsts is None


async def test_what_was_set_on_the_model_comes_back():
    async with machine_with("soft") as machine, deadline():
        vcpu = load(machine)
        vcpu.model.counting = False
        await run(vcpu)
        (copy,) = await machine.fork(1)
        assert copy.vcpus[0].model.counting is False  # type: ignore[attr-defined]
        await run(copy.vcpus[0])
        assert copy.vcpus[0].stats.numInsts is None
        for cpu in ("kvm", "soft"):
            await machine.switch_cpu(cpu)
        assert vcpu.model.counting is False
        vcpu.model.counting = True
        vcpu.model.set_breakpoints([0x1000])
        for cpu in ("kvm", "soft"):
            await machine.switch_cpu(cpu)
        exit_ = await vcpu.run(1_000_000)
        assert isinstance(exit_, DebugEventExit) and exit_.pc == 0x1000
        (copy,) = await machine.fork(1)
        assert isinstance(await copy.vcpus[0].run(1_000_000), DebugEventExit)


@host_only(pvm=True, why="guest breakpoints do not work on every host")
async def test_breakpoints_hold_for_the_other_model():
    async with machine_with("soft") as machine, deadline():
        vcpu = load(machine)
        vcpu.model.set_breakpoints([0x1004])
        await machine.switch_cpu("kvm")
        exit_ = await vcpu.run(1_000_000)
        assert isinstance(exit_, DebugEventExit) and exit_.pc == 0x1004


async def test_more_breakpoints_than_kvm_has_refuse_the_hand_over():
    async with machine_with("soft") as machine, deadline():
        vcpu = load(machine)
        vcpu.model.set_breakpoints(range(0x1000, 0x1005))
        with pytest.raises(ConfigurationError, match="5 breakpoints: a processor has 4"):
            await machine.switch_cpu("kvm")
        assert vcpu.model.kind == "soft"
        assert isinstance(await vcpu.run(1_000_000), DebugEventExit)
