"""Drains, checkpoints, restores and switches at random moments: nothing lost, nothing left over.

The guest and the device of test_races.py, whose count is part of the device's state: a
restore takes both back together, so a lost or repeated access shows at once.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from kvmaio import Checkpoint, Machine, Stopped
from kvmaio.boot import Flat
from kvmaio.devices import DebugExit
from kvmaio.errors import DrainTimeout
from tests.assembler import assemble
from tests.engine.support import LAB, deadline, until
from tests.engine.test_races import COUNT, RACES, Counter
from tests.leftovers import Held, no_more_than
from tests.plugin_summary import why_not_soft

pytestmark = [pytest.mark.kvm, pytest.mark.slow, pytest.mark.timeout(600)]

OPERATIONS = max(20, RACES // 10)


class SavedCounter(Counter):
    """Its count goes into checkpoints."""

    def save(self) -> dict[str, int]:
        return {"expected": self.expected}

    def load(self, state: dict[str, int]) -> None:
        self.expected = state["expected"]


@pytest.mark.parametrize("waits", [False, True], ids=["plain", "waiting"])
@pytest.mark.parametrize("irqchip", [None, "kernel"])
async def test_random_moments(waits, irqchip):
    chosen = random.Random(f"{waits} {irqchip}")
    before = Held.now()
    done: dict[str, int] = {}
    async with deadline(300), Machine(memory="1M", irqchip=irqchip) as machine:
        device = machine.attach(SavedCounter(chosen, waits), pio=0x10)
        machine.attach(DebugExit(), pio=0xF4)
        machine.load(Flat(assemble(COUNT, "real16", 0x1000), 0x1000))
        operations = [drain, cancel, checkpoint, restore, time_out, stop_and_run]
        if irqchip is None:
            operations.append(switch)
        state: dict[str, Any] = {
            "machine": machine,
            "saved": await machine.checkpoint(),
            "run": asyncio.create_task(machine.run()),
            "random": chosen,
        }
        for _ in range(OPERATIONS // 4):
            await asyncio.sleep(chosen.choice((0, 0, 0.0002, 0.001)))
            operation = chosen.choice(operations)
            await operation(state)
            done[operation.__name__] = done.get(operation.__name__, 0) + 1
            assert not state["run"].done(), state["run"]
        at = device.expected
        await until(lambda: device.expected != at)  # it is alive
        machine.stop("over")
        assert await state["run"] == Stopped("over")
    assert len(done) == len(operations) or LAB
    state.clear()  # a checkpoint that was restored keeps its image for the next time
    no_more_than(before)


async def drain(state: dict[str, Any]) -> None:
    machine: Machine = state["machine"]
    async with machine.drained():
        assert not machine.vcpus[0].inside
        await asyncio.sleep(0)


async def cancel(state: dict[str, Any]) -> None:
    drain = asyncio.create_task(state["machine"].drain())
    for _ in range(state["random"].randrange(6)):
        await asyncio.sleep(0)
    drain.cancel()
    await asyncio.wait([drain])
    state["machine"].resume()  # if it was through already


async def time_out(state: dict[str, Any]) -> None:
    try:
        async with state["machine"].drained(timeout=state["random"].choice((0, 0.00005, 0.0005))):
            pass
    except DrainTimeout:
        pass


async def checkpoint(state: dict[str, Any]) -> None:
    state["saved"] = await state["machine"].checkpoint()


async def restore(state: dict[str, Any]) -> None:
    saved: Checkpoint = state["saved"]
    await state["machine"].restore(saved)


async def switch(state: dict[str, Any]) -> None:
    models = ("kvm", "soft") if why_not_soft() is None else ("kvm",)
    await state["machine"].switch_cpu(state["random"].choice(models))


async def stop_and_run(state: dict[str, Any]) -> None:
    machine: Machine = state["machine"]
    machine.stop("for a moment")
    assert await state["run"] == Stopped("for a moment")
    state["run"] = asyncio.create_task(machine.run())
    await asyncio.sleep(0)
