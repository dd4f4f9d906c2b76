"""The loop's other work while a guest makes exits as fast as it can."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from .exits import WARM_UP_EXITS
from .guests import GUESTS, AsyncDevice, storming
from .harness import Bench, Figure, Gate, Row, figure, quantile

__all__ = ["measure"]

TICK_S = 0.001
GRACE_US = 200


async def measure(bench: Bench) -> AsyncIterator[Row]:
    """`sleep(0)` and a ticker of 1 ms, beside a storm."""
    duration_s = 0.1 if bench.quick else 0.4 * bench.rounds
    budget_us = bench.costs.budget_ns / 1e3
    async with storming(GUESTS["pio write"], AsyncDevice) as storm:
        await storm.run(WARM_UP_EXITS)
        storm.device.left = 1 << 62
        run = asyncio.create_task(storm.machine.run())
        served = storm.device.left
        started = time.perf_counter()
        yields, ticks = await _sleep_zero(duration_s), await _ticker(duration_s)
        exits = (served - storm.device.left) / (time.perf_counter() - started)
        storm.machine.stop()
        await run
        storm.look()
    note = f"{exits / 1e3:.0f}k exits/s meanwhile, {storm.where}"
    gate = Gate(at_most=round(budget_us + GRACE_US))
    for name, late_ns, limit in (("sleep(0)", yields, gate), ("1 ms ticker, late", ticks, None)):
        yield Row(
            "latency",
            name,
            bench.loop,
            (
                figure("median", late_ns, "µs", scale=1e3, gate=limit),
                Figure("p99", quantile(late_ns, 0.99) / 1e3, "µs"),
                Figure("budget", budget_us, "µs"),
            ),
            note,
        )


async def _sleep_zero(duration_s: float) -> list[int]:
    taken = []
    end_ns = time.monotonic_ns() + round(duration_s * 1e9)
    while (before_ns := time.monotonic_ns()) < end_ns:
        await asyncio.sleep(0)
        taken.append(time.monotonic_ns() - before_ns)
    return taken


async def _ticker(duration_s: float) -> list[int]:
    late = []
    end_ns = time.monotonic_ns() + round(duration_s * 1e9)
    while (before_ns := time.monotonic_ns()) < end_ns:
        await asyncio.sleep(TICK_S)
        late.append(time.monotonic_ns() - before_ns - round(TICK_S * 1e9))
    return late
