"""Drain and checkpoints where time is simulated."""

from __future__ import annotations

import asyncio

import pytest

from kvmaio import Device, Machine, Register, VCpuState
from kvmaio.boot import Flat
from tests.assembler import assemble
from tests.simulation.support import MS, PATIENCE, simulate

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.kvmaio_cpu("kvm", "soft"),
    pytest.mark.timeout(60 * PATIENCE),
]

SPIN = ("again: inc dword ptr [0x5000]", "jmp again")


def machine_for(cpu: str, vcpus: int = 1) -> Machine:
    """Where each instruction is executed one by one, a second has few of them."""
    return Machine(memory="1M", cpu=cpu, vcpus=vcpus, clock_hz=10_000_000)


class Ticker(Device):
    """Counts milliseconds."""

    ticks = Register(0, int, bits=32)

    def __init__(self) -> None:
        self.seen: list[int] = []

    async def run(self) -> None:
        if self.alarm.deadline_ns is None:
            self.alarm.arm(self.clock.now_ns + MS)
        async for deadline_ns in self.alarm:
            self.ticks += 1
            self.seen.append(deadline_ns)
            self.alarm.arm(deadline_ns + MS)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_drain_restore_and_go_on(kvmaio_cpu, vcpus):
    async def main() -> None:
        async with machine_for(kvmaio_cpu, vcpus) as machine:
            ticker = machine.attach(Ticker(), mmio=0xD0000000)
            machine.load(Flat(assemble(SPIN, "real16", 0x1000), 0x1000))
            run = asyncio.create_task(machine.run())
            await asyncio.sleep(0.0105)
            async with machine.drained():
                assert machine.vcpus[0].state is VCpuState.IDLE
                assert ticker.ticks == 10
                saved = await machine.checkpoint()
            await asyncio.sleep(0.005)
            assert ticker.ticks == 15
            await machine.restore(saved)
            assert ticker.ticks == 10
            await asyncio.sleep(0.0051)
            assert ticker.ticks == 15
            # By the machine's clock the second time was the first one again.
            assert ticker.seen[-5:] == ticker.seen[-10:-5]
            machine.stop()
            await run

    simulate(main())


def test_into_a_machine_of_a_younger_loop(kvmaio_cpu):
    """The loop of a fresh process begins at 0; the machine's clock does not."""
    taken = []

    async def first() -> None:
        async with machine_for(kvmaio_cpu) as machine:
            machine.attach(Ticker(), mmio=0xD0000000)
            machine.load(Flat(assemble(SPIN, "real16", 0x1000), 0x1000))
            run = asyncio.create_task(machine.run())
            await asyncio.sleep(1.0005)
            taken.append(await machine.checkpoint())
            machine.stop()
            await run

    async def second() -> None:
        async with machine_for(kvmaio_cpu) as machine:
            ticker = machine.attach(Ticker(), mmio=0xD0000000)
            await machine.restore(taken[0])
            assert ticker.ticks == 1000
            run = asyncio.create_task(machine.run())
            await asyncio.sleep(0.0101)
            assert ticker.seen == [(1001 + n) * MS for n in range(10)]
            machine.stop()
            await run

    simulate(first())
    assert 1000 * MS < taken[0].time_ns < 1001 * MS
    simulate(second())


def test_a_drain_takes_hardly_any_simulated_time(kvmaio_cpu):
    async def main() -> None:
        async with machine_for(kvmaio_cpu) as machine:
            machine.load(Flat(assemble(SPIN, "real16", 0x1000), 0x1000))
            run = asyncio.create_task(machine.run())
            await asyncio.sleep(0.01)
            at = machine.clock.now_ns
            for _ in range(20):
                async with machine.drained():
                    pass
            assert machine.clock.now_ns - at <= 20 * MS
            machine.stop()
            await run

    simulate(main())
