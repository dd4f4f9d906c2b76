"""A vCPU's own thread waits for a quick answer without sleep, where that pays (`_native.c`)."""

import asyncio
import os

import pytest

from kvmaio import Device, EndRun, Exited
from kvmaio.kvm import promotion
from tests.resident.guests import PATIENCE, STORMING, cpu_of, machine_with

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(60 * PATIENCE)]

EXITS = 400


class Answering(Device):
    """Ends the run after so many writes, each of which it takes `seconds` for."""

    size = 1

    def __init__(self, exits, seconds):
        self.left, self.seconds = exits, seconds

    async def write(self, offset, size, value):
        if self.seconds:
            await asyncio.sleep(self.seconds)
        self.left -= 1
        if not self.left:
            raise EndRun(Exited(0))


async def spun(exits, seconds):
    """A vCPU's thread that was not moved: its looks that came to nothing, those left out."""
    device = Answering(exits, seconds)
    async with asyncio.timeout(40 * PATIENCE), machine_with(STORMING, device) as machine:
        await machine.run()
        cpu = cpu_of(machine)
        assert not cpu.is_resident
        return cpu.handle.wasted_spins, cpu.handle.spin_tries


@pytest.fixture(autouse=True)
def on_its_own_thread(monkeypatch):
    monkeypatch.setattr(promotion.Promotion, "exits_often", lambda *args, **kwargs: False)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is no second processor")
async def test_an_answer_that_takes_long_is_not_spun_for_again_and_again():
    wasted, left_out = await spun(20, 0.01)
    assert wasted > 2 and left_out >= 10


async def test_on_one_processor_nobody_spins():
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(every)})
    try:
        assert await spun(EXITS, 0) == (0, 0)
    finally:
        os.sched_setaffinity(0, every)
