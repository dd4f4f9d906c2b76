"""Exits back to back: what a handler in Python costs over a loop of C that answers nothing."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager

from ..exits import EndRun
from .guests import (
    ADDRESS,
    GUESTS,
    PORT,
    AsyncDevice,
    CountingDevice,
    Guest,
    PlainDevice,
    Raw,
    Storm,
    SuspendingDevice,
    storming,
)
from .harness import Bench, Figure, Gate, Row, Sample, figure

__all__ = ["measure"]

WARM_UP_EXITS = 200
"""Enough for a vCPU to move to the loop's thread."""

KINDS = ("pio write", "pio read", "mmio write", "mmio read")

_DEVICES: dict[str, type[CountingDevice]] = {
    "async": AsyncDevice,
    "plain": PlainDevice,
    "suspending": SuspendingDevice,
}

SLOW_EXIT_NS = 50_000
"""Where a raw exit costs this much, the processor with its virtualisation is emulated."""


async def measure(bench: Bench) -> AsyncIterator[Row]:
    """Each kind of access, each kind of handler, and run_in_executor for each exit."""
    for name in KINDS:
        async for row in _measure_kind(bench, GUESTS[name]):
            yield row


async def _measure_kind(bench: Bench, guest: Guest) -> AsyncIterator[Row]:
    storms: dict[str, Storm] = {}
    worked: dict[str, list[float]] = {}

    def raw_sample() -> float:
        exits = bench.exits() // 2
        with _processor_time(worked, "raw", exits):
            return raw.run(exits)

    async def sample(handler: str) -> float:
        # A new machine each time: no more than a few vCPUs live on the loop's thread at once.
        async with storming(guest, _DEVICES[handler]) as storm:
            await storm.run(WARM_UP_EXITS)
            storms[handler] = storm
            exits = bench.exits() // (4 if handler == "suspending" else 1)
            with _processor_time(worked, handler, exits):
                return await storm.run(exits)

    async def executor_sample() -> float:
        exits = bench.exits() // 16
        with _processor_time(worked, "run_in_executor", exits):
            return await executor.run(exits)

    async with Raw.opened(guest) as raw, _executor_storm(guest) as executor:
        samples = await bench.interleaved(
            raw_sample,
            {
                "async": lambda: sample("async"),
                "plain": lambda: sample("plain"),
                "suspending": lambda: sample("suspending"),
                "run_in_executor": executor_sample,
            },
        )
    executor_ratio = statistics.median(s.ratio for s in samples["run_in_executor"])
    raw_worked = statistics.median(worked["raw"])
    for handler, taken in samples.items():
        of_raw = figure("× its work", worked[handler], scale=raw_worked)
        yield _row(bench, guest, handler, taken, storms.get(handler), executor_ratio, of_raw)


@contextmanager
def _processor_time(into: dict[str, list[float]], name: str, exits: int) -> Iterator[None]:
    """Note the processor time of each exit: hardly disturbed by whoever else uses the machine."""
    before_ns = time.process_time_ns()
    yield
    into.setdefault(name, []).append((time.process_time_ns() - before_ns) / exits)


def _row(
    bench: Bench,
    guest: Guest,
    handler: str,
    samples: list[Sample],
    storm: Storm | None,
    executor_ratio: float,
    worked: Figure,
) -> Row:
    gated = handler == "async"
    slow = bench.costs.exit_ns > SLOW_EXIT_NS
    figures = [
        figure("raw", [s.reference for s in samples], "µs", scale=1e3),
        figure("cost", [s.value for s in samples], "µs", scale=1e3),
        figure(
            "× raw",
            [s.ratio for s in samples],
            gate=Gate(at_most=3.0 if slow else 1.6) if gated else None,
        ),
        figure(
            "over raw",
            [s.over for s in samples],
            "µs",
            scale=1e3,
            gate=Gate(at_most=5.0) if gated and not slow else None,
        ),
    ]
    figures.append(worked)
    note = ""
    if storm is not None:
        figures.append(
            figure(
                "executor / this",
                [executor_ratio / s.ratio for s in samples],
                gate=Gate(at_least=5.0) if gated else None,
            )
        )
        figures.append(figure("moves", [storm.moves], gate=Gate(at_most=2) if gated else None))
        note = storm.where
    return Row("exits", f"{guest.name}, {handler}", bench.loop, figures, note)


class _ExecutorStorm:
    """What a program without kvmaio's engine would write: a thread pool for each exit."""

    def __init__(self, raw: Raw, guest: Guest, pool: ThreadPoolExecutor) -> None:
        self._raw = raw
        self._guest = guest
        self._pool = pool
        self._device = AsyncDevice()

    async def run(self, exits: int) -> float:
        """Nanoseconds an exit."""
        self._device.left = exits
        serve = self._serve_io if self._guest.is_pio else self._serve_mmio
        loop = asyncio.get_running_loop()
        started_ns = time.perf_counter_ns()
        try:
            while True:
                await loop.run_in_executor(self._pool, self._raw.run, 1)
                await serve()
        except EndRun:
            return (time.perf_counter_ns() - started_ns) / exits

    async def _serve_io(self) -> None:
        io, words = self._raw.model.page.io, self._raw.model.io_words
        index = io.data_offset // io.size
        if io.direction:
            await self._device.write(io.port - PORT, io.size, words[io.size][index])
        else:
            words[io.size][index] = await self._device.read(io.port - PORT, io.size)

    async def _serve_mmio(self) -> None:
        mmio, word = self._raw.model.page.mmio, self._raw.model.mmio_word
        offset = mmio.phys_addr - ADDRESS
        if mmio.is_write:
            await self._device.write(offset, mmio.len, word[0] & ((1 << 8 * mmio.len) - 1))
        else:
            word[0] = await self._device.read(offset, mmio.len)


@asynccontextmanager
async def _executor_storm(guest: Guest) -> AsyncIterator[_ExecutorStorm]:
    async with Raw.opened(guest) as raw:
        with ThreadPoolExecutor(1) as pool:  # one thread: a vCPU may not wander
            yield _ExecutorStorm(raw, guest, pool)
