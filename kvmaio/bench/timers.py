"""Run timers: how far beyond its end does a run of one millisecond come back?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from .guests import SPIN
from .harness import Bench, Figure, Gate, Row, figure, quantile

__all__ = ["measure"]

RUN_NS = 1_000_000


async def measure(bench: Bench) -> AsyncIterator[Row]:
    """`vcpu.run(ticks=1_000_000)`, and `asyncio.sleep(0.001)` for comparison."""
    count = 10 if bench.quick else 40 * bench.rounds
    async with SPIN.machine() as machine:
        machine.load(SPIN.image())
        vcpu = machine.vcpus[0]
        await vcpu.run(ticks=RUN_NS)
        overshoots, sleeps = [], []
        for _ in range(count):
            started_ns = time.monotonic_ns()
            await vcpu.run(ticks=RUN_NS)
            overshoots.append(time.monotonic_ns() - started_ns - RUN_NS)
            started_ns = time.monotonic_ns()
            await asyncio.sleep(RUN_NS / 1e9)
            sleeps.append(time.monotonic_ns() - started_ns - RUN_NS)
    yield Row(
        "timers",
        "vcpu.run(ticks=1_000_000)",
        bench.loop,
        _figures(overshoots, Gate(at_most=150), Gate(at_least=0)),
    )
    yield Row("timers", "asyncio.sleep(0.001)", bench.loop, _figures(sleeps, None, None))


def _figures(late_ns: list[int], median: Gate | None, earliest: Gate | None) -> list[Figure]:
    return [
        figure("late", late_ns, "µs", scale=1e3, gate=median),
        Figure("late, p99", quantile(late_ns, 0.99) / 1e3, "µs"),
        Figure("earliest", min(late_ns) / 1e3, "µs", gate=earliest),
    ]
