"""Benchmarks: ``kvmaio bench``, and the figures of ``docs/performance.md``.

=============  ===============================================================
`harness`      interleaved rounds, rows, figures and gates
`guests`       machine code, devices and the raw loop of C
`exits`        exits back to back, by kind of access and of handler
`compute`      guests that mostly compute
`posted`       posted writes and doorbells
`timers`       runs of one millisecond
`kicks`        from a kick until `run()` has come back
`latency`      the loop's other work beside a storm
`scale`        many machines, and two that compete
`machines`     start-up, memory and idle machines
`peers`        QEMU and Unicorn
`soft`         the software CPU
`tracing`      exits with a trace on
`checkpoints`  drains, resets, forks
=============  ===============================================================

A family is an asynchronous generator of rows; `FAMILIES` names them.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import attrs

from ..errors import ConfigurationError, KvmaioError
from ..kvm.host import Kvm, kvm_kind
from ..kvm.promotion import Costs
from . import (
    checkpoints,
    compute,
    exits,
    kicks,
    latency,
    machines,
    peers,
    posted,
    scale,
    soft,
    timers,
    tracing,
)
from .harness import Bench, OtherLoad, Row

__all__ = ["FAMILIES", "LOOPS", "Family", "Report", "measure"]

ROUNDS = 15
QUICK_ROUNDS = 2
FAMILY_LIMIT_S = 120.0
"""A family that takes longer has hung."""


@attrs.frozen
class Family:
    """A group of rows that share a table.

    Attributes:
        title: for the table.
        loop_matters: measure it on each loop; else on the first one only.
    """

    title: str
    measure: Callable[[Bench], AsyncIterator[Row]]
    loop_matters: bool = True


FAMILIES = {
    "exits": Family("Exits back to back, against a loop of C", exits.measure),
    "compute": Family("Guests that compute", compute.measure),
    "posted": Family("Posted writes and doorbells, net of the guest's loop", posted.measure),
    "timers": Family("Runs of 1 ms, at the awaitable", timers.measure),
    "kicks": Family("Kicks, until run() has come back", kicks.measure),
    "latency": Family("The loop while a guest storms", latency.measure),
    "scale": Family("Storming machines with async handlers", scale.measure),
    "machines": Family("Idle machines", machines.measure, loop_matters=False),
    "tracing": Family("Exits with a trace on, async handler", tracing.measure),
    "checkpoints": Family("Drains, resets and forks", checkpoints.measure, loop_matters=False),
    "soft": Family("The software CPU", soft.measure, loop_matters=False),
    "peers": Family("Against others, one byte after another", peers.measure, loop_matters=False),
}


def _new_uvloop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": _new_uvloop,
}


@attrs.define
class Report:
    """What was measured, and where."""

    facts: dict[str, Any]
    rows: list[Row] = attrs.Factory(list)

    @property
    def shortcomings(self) -> list[str]:
        """A line for each gate that was not passed."""
        return [line for row in self.rows for line in row.shortcomings()]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "host": self.facts,
            "rows": [row.as_dict() for row in self.rows],
            "shortcomings": self.shortcomings,
        }


def measure(
    names: Sequence[str] = (),
    *,
    loops: Iterable[str] = ("asyncio",),
    rounds: int | None = None,
    quick: bool = False,
    on_family: Callable[[str, str], None] = lambda name, loop: None,
) -> Report:
    """Measure the families `names` (all, if there are none) on each of `loops`.

    Args:
        on_family: called with a family's name and a loop's before each.

    Raises:
        ConfigurationError: an unknown name.
        HostError: KVM cannot be used.
    """
    for name in names:
        if name not in FAMILIES:
            raise ConfigurationError(f"no benchmark {name!r}; there are {', '.join(FAMILIES)}")
    with Kvm.open() as kvm:
        costs = Costs.measured(kvm)
    load = OtherLoad()
    report = Report(_facts(costs))
    bench = Bench("", costs, rounds or (QUICK_ROUNDS if quick else ROUNDS), quick)
    for name in names or FAMILIES:
        for number, loop in enumerate(loops):
            if number and not FAMILIES[name].loop_matters:
                continue
            on_family(name, loop)
            report.rows += _measure_family(name, attrs.evolve(bench, loop=loop))
    report.facts["other processes"] = f"{load.processors():.1f} processors, on average"
    return report


def _measure_family(name: str, bench: Bench) -> list[Row]:
    rows: list[Row] = []

    async def collect() -> None:
        async with asyncio.timeout(FAMILY_LIMIT_S):
            async for row in FAMILIES[name].measure(bench):
                rows.append(row)

    try:
        with asyncio.Runner(loop_factory=LOOPS[bench.loop]) as runner:
            runner.run(collect())
    except (KvmaioError, OSError, RuntimeError, TimeoutError) as error:
        reason = f"{type(error).__name__}: {error}"
        rows.append(Row(name, "not measured", bench.loop, note=reason, failed=True))
    return rows


def _facts(costs: Costs) -> dict[str, Any]:
    return {
        "KVM": kvm_kind(),
        "kernel": platform.release(),
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "Python": platform.python_version(),
        "uvloop": _version("uvloop"),
        "exit": f"{costs.exit_ns / 1e3:.1f} µs",
        "move": f"{costs.move_ns / 1e3:.1f} µs",
        "budget": f"{costs.budget_ns / 1e3:.0f} µs",
    }


def _processor() -> str:
    with open("/proc/cpuinfo") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
