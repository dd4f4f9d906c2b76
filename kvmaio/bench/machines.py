"""What a machine costs that does nothing: to make, to keep, to end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from .guests import HALTED
from .harness import Bench, Figure, Gate, Row, figure

__all__ = ["measure"]

MACHINES = 100
QUICK_MACHINES = 10
SETTLE_S = 1.5
"""More than enough for all of them to halt."""

IDLE_S = 1.0


async def measure(bench: Bench) -> AsyncIterator[Row]:
    """Start-up, the memory of each machine, and what halted ones do to the processor."""
    yield await _start_up(bench)
    yield await _halted(bench)


async def _start_up(bench: Bench) -> Row:
    enter_s, exit_s = [], []
    for _ in range(3 if bench.quick else 5 * bench.rounds):
        machine = HALTED.machine()
        started = time.perf_counter()
        await machine.__aenter__()
        machine.load(HALTED.image())
        entered = time.perf_counter()
        await machine.close()
        enter_s.append(entered - started)
        exit_s.append(time.perf_counter() - entered)
    return Row(
        "machines",
        "start-up",
        bench.loop,
        (
            figure("enter and load", enter_s, "ms", scale=1e-3),
            figure("close", exit_s, "ms", scale=1e-3),
        ),
    )


async def _halted(bench: Bench) -> Row:
    count = QUICK_MACHINES if bench.quick else MACHINES
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(HALTED.machine())  # what all of them share
        first.load(HALTED.image())
        resident_before, available_before = _resident_bytes(), _available_bytes()
        machines = []
        for _ in range(count):
            machine = await stack.enter_async_context(HALTED.machine())
            machine.load(HALTED.image())
            machines.append(machine)
        runs = [asyncio.create_task(machine.run()) for machine in machines]
        await asyncio.sleep(0.2 if bench.quick else SETTLE_S)
        running = sum(not machine.vcpus[0].halted for machine in machines)
        resident, available = _resident_bytes(), _available_bytes()
        cpu_s, started = time.process_time(), time.monotonic()
        await asyncio.sleep(0.1 if bench.quick else IDLE_S)
        cpu = (time.process_time() - cpu_s) / (time.monotonic() - started)
        for machine in machines:
            machine.stop()
        await asyncio.gather(*runs)
    each = (resident - resident_before) / count / (1 << 20)
    of_host = (available_before - available) / count / (1 << 20)
    return Row(
        "machines",
        f"{count} halted machines",
        bench.loop,
        (
            Figure("memory each", each, "MiB", gate=Gate(at_most=0.5)),
            Figure("with the kernel's", of_host, "MiB"),
            Figure("processor", 100 * cpu, "%", gate=None if bench.quick else Gate(at_most=1.0)),
        ),
        f"{running} of them do not halt" if running else "touched guest RAM included",
        failed=running > 0,
    )


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _available_bytes() -> int:
    with open("/proc/meminfo") as meminfo:
        fields = dict(line.split(":", 1) for line in meminfo)
    return int(fields["MemAvailable"].split()[0]) * 1024
