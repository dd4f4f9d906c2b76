"""Many machines on one loop, and two that compete."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager

from ..boot import Flat
from ..device import Device
from ..machine import Machine
from ..vcpu import current_vcpu
from .guests import GUESTS, PORT, AsyncDevice, Raw, Storm, model_of, storming
from .harness import Bench, Gate, Row, figure

__all__ = ["measure"]

COUNTS = (1, 10, 100, 500)
QUICK_COUNTS = (1, 10)
SETTLE_S = 0.03
SETTLE_EACH_S = 0.001
"""Machines that have just begun to run find their places."""

CROWD_LIMIT_S = 12.0
"""A crowd takes its time to begin and to end, in each round."""

TURNS = 2
"""At least so many has each machine of a crowd while it is measured."""

_GUEST = GUESTS["pio write"]
_NO_END = 1 << 62
_OUT_FOR_EVER = b"\xba" + PORT.to_bytes(2, "little") + b"\xee\xeb\xfd"


async def measure(bench: Bench) -> AsyncIterator[Row]:
    """All of them storm, with async handlers; against raw loops on one and on all processors."""
    async with _all_processors(bench) as raws:
        for count in QUICK_COUNTS if bench.quick else COUNTS:
            yield await _many(bench, raws, count)
        yield await _pair(bench, raws)
        yield await _two_vcpus(bench, raws)


async def _many(bench: Bench, raws: _RawLoops, count: int) -> Row:
    of_one = []
    duration_s = 2 * bench.sample_s
    if not bench.quick:
        duration_s = max(duration_s, TURNS * count * bench.costs.budget_ns / 1e9)
    async with _storms(count) as storms:
        await _rates(storms, duration_s)

        async def sample() -> float:
            one = raws.rate_of_one()
            rate = sum(await _rates(storms, duration_s))
            of_one.append(rate / one)
            return 1e9 / rate

        limit_s = None if bench.quick else CROWD_LIMIT_S
        samples = (await bench.interleaved(raws.cost_of_all, {"": sample}, limit_s))[""]
        residents = sum(model_of(storm.machine).is_resident for storm in storms)
    gate = Gate(at_least=0.3) if count == 100 else None
    return Row(
        "scale",
        f"{count} machine{'s' if count > 1 else ''}",
        bench.loop,
        (
            figure("exits", [1e6 / s.value for s in samples], "k/s"),
            figure("of raw, one processor", of_one),
            figure("of raw, all processors", [1 / s.ratio for s in samples], gate=gate),
        ),
        f"{residents} on the loop's thread",
    )


async def _pair(bench: Bench, raws: _RawLoops) -> Row:
    slower, shares, both = [], [], []
    async with _storms(2) as storms:
        await _rates(storms, 2 * bench.sample_s)
        for _ in range(bench.rounds):
            one = raws.rate_of_one()
            rates = await _rates(storms, 4 * bench.sample_s)
            slower.append(min(rates) / one)
            shares.append(min(rates) / max(rates))
            both.append(sum(rates))
        residents = sum(model_of(storm.machine).is_resident for storm in storms)
    return Row(
        "scale",
        "2 machines that compete",
        bench.loop,
        (
            figure("exits", both, "k/s", scale=1e3),
            figure("slower one, of raw", slower, gate=Gate(at_least=0.2)),
            figure("slower / faster", shares, gate=Gate(at_least=0.33)),
        ),
        f"{residents} on the loop's thread",
    )


class _PerVcpu(Device):
    """Counts each vCPU's writes."""

    size = 1

    def __init__(self) -> None:
        self.writes = [0, 0]

    async def write(self, offset: int, size: int, value: int) -> None:
        self.writes[current_vcpu().index] += 1


async def _two_vcpus(bench: Bench, raws: _RawLoops) -> Row:
    slower, shares, both = [], [], []
    async with Machine(memory="1M", vcpus=2) as machine:
        device = machine.attach(_PerVcpu(), pio=PORT)
        machine.load(Flat(_OUT_FOR_EVER, 0x1000))
        run = asyncio.create_task(machine.run())
        machine.vcpus[1].init()
        machine.vcpus[1].start_up(1)
        await asyncio.sleep(SETTLE_S)
        for _ in range(bench.rounds):
            before, started = list(device.writes), time.perf_counter()
            await asyncio.sleep(4 * bench.sample_s)
            elapsed_s = time.perf_counter() - started
            rates = [(b - a) / elapsed_s for a, b in zip(before, device.writes, strict=True)]
            both.append(sum(rates))
            shares.append(min(rates) / max(rates))
            slower.append(min(rates))
        residents = sum(model_of(machine, n).is_resident for n in range(2))
        machine.stop()
        await run
    one = raws.rate_of_one()  # not while they run: they never let go of the processors
    return Row(
        "scale",
        "2 vCPUs of one machine",
        bench.loop,
        (
            figure("exits", both, "k/s", scale=1e3),
            figure("slower one, of raw", [rate / one for rate in slower], gate=Gate(at_least=0.2)),
            figure("slower / faster", shares, gate=Gate(at_least=0.33)),
        ),
        f"{residents} on the loop's thread",
    )


@asynccontextmanager
async def _storms(count: int) -> AsyncIterator[list[Storm]]:
    async with AsyncExitStack() as stack:
        storms = []
        for _ in range(count):
            storm = await stack.enter_async_context(storming(_GUEST, AsyncDevice))
            storm.device.left = _NO_END
            storms.append(storm)
        yield storms


async def _rates(storms: list[Storm], duration_s: float) -> list[float]:
    """Exits a second of each, while all of them run."""
    runs = [asyncio.create_task(storm.machine.run()) for storm in storms]
    await asyncio.sleep(SETTLE_S + SETTLE_EACH_S * len(storms))
    before = [storm.device.left for storm in storms]
    started = time.perf_counter()
    await asyncio.sleep(duration_s)
    elapsed_s = time.perf_counter() - started
    rates = [(left - s.device.left) / elapsed_s for left, s in zip(before, storms, strict=True)]
    for storm in storms:
        storm.machine.stop()
    await asyncio.gather(*runs)
    return rates


class _RawLoops:
    """A raw loop for each processor, on a thread of its own: a vCPU may not wander."""

    def __init__(self, raws: list[Raw], pools: list[ThreadPoolExecutor], exits: int) -> None:
        self._raws = raws
        self._pools = pools
        self._exits = exits

    def rate_of_one(self) -> float:
        """Exits a second of one loop with the machine to itself."""
        return 1e9 / self._pools[0].submit(self._raws[0].run, self._exits // 2).result()

    def cost_of_all(self) -> float:
        """Nanoseconds for each exit of all of them together."""
        runs = [
            pool.submit(raw.run, self._exits)
            for raw, pool in zip(self._raws, self._pools, strict=True)
        ]
        return 1 / sum(1 / run.result() for run in runs)


@asynccontextmanager
async def _all_processors(bench: Bench) -> AsyncIterator[_RawLoops]:
    async with AsyncExitStack() as stack:
        raws, pools = [], []
        for _ in os.sched_getaffinity(0):
            raws.append(await stack.enter_async_context(Raw.opened(_GUEST)))
            pools.append(stack.enter_context(ThreadPoolExecutor(1)))
        yield _RawLoops(raws, pools, bench.exits())
