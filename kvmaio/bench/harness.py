"""How everything is measured: interleaved rounds, medians with their spread, and gates.

A figure by itself says little on a machine that has other things to do. So each
variant is measured between two runs of its reference, in one process, within a
fraction of a second: A-B-A. What counts is the median of the ratios, with the
quartiles beside it. A round whose two A differ by more than a quarter was
disturbed and is repeated, at most as often again as there are rounds; what B was
plays no part in that decision.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs

from ..kvm.promotion import Costs

__all__ = [
    "Bench",
    "Figure",
    "Gate",
    "OtherLoad",
    "Row",
    "Sample",
    "figure",
    "on_one_processor",
    "quantile",
]

DISTURBED = 1.25
"""The two references of a round may differ by this factor."""


@attrs.frozen
class Gate:
    """What a figure must reach; the figures of ``docs/performance.md``."""

    at_most: float | None = None
    at_least: float | None = None

    def holds(self, value: float) -> bool:
        """Does `value` pass?"""
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        return f"≤ {self.at_most:g}" if self.at_most is not None else f"≥ {self.at_least:g}"


@attrs.frozen
class Figure:
    """A median, with its quartiles where it is one of several values.

    Attributes:
        label: a column of the family's table.
        unit: such as ``µs``; empty for a ratio or a count.
    """

    label: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    gate: Gate | None = None

    @property
    def falls_short(self) -> bool:
        """Does it have a gate that it does not pass?"""
        return self.gate is not None and not self.gate.holds(self.value)


@attrs.frozen
class Row:
    """One thing that was measured, on one loop.

    Attributes:
        loop: ``asyncio`` or ``uvloop``; empty where no loop takes part.
        note: what else the reader should know; a reason where there are no figures.
        failed: it could not be measured, and should have been.
    """

    family: str
    name: str
    loop: str
    figures: Sequence[Figure] = ()
    note: str = ""
    failed: bool = False

    def shortcomings(self) -> list[str]:
        """A line for each gate that it falls short of."""
        where = f"{self.family}: {self.name}" + (f" on {self.loop}" if self.loop else "")
        if self.failed:
            return [f"{where}: {self.note}"]
        return [
            f"{where}: {f.label} is {f.value:.3g}{f' {f.unit}' if f.unit else ''}, must be {f.gate}"
            for f in self.figures
            if f.falls_short
        ]

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return {
            "family": self.family,
            "name": self.name,
            "loop": self.loop,
            "note": self.note,
            "failed": self.failed,
            "figures": {
                f.label: {
                    "value": f.value,
                    "unit": f.unit,
                    "low": f.low,
                    "high": f.high,
                    "gate": None if f.gate is None else str(f.gate),
                    "holds": not f.falls_short,
                }
                for f in self.figures
            },
        }


@attrs.frozen
class Sample:
    """What one round gave: a variant's cost, and its reference's just before and after."""

    value: float
    reference: float

    @property
    def ratio(self) -> float:
        """How many times the reference's cost."""
        return self.value / self.reference

    @property
    def over(self) -> float:
        """What it costs more than the reference."""
        return self.value - self.reference


@attrs.frozen
class Bench:
    """How much is to be measured, and on which loop.

    Attributes:
        costs: what the engine measured of this host; scales the samples.
        rounds: undisturbed rounds wanted.
        quick: short samples, for whoever wants to see it run and not its figures.
    """

    loop: str
    costs: Costs
    rounds: int
    quick: bool = False

    @property
    def row_limit_s(self) -> float:
        """After this time for each variant, no further round begins."""
        return 0.3 if self.quick else 0.2 * self.rounds

    @property
    def sample_s(self) -> float:
        """How long one sample takes, about."""
        return 0.008 if self.quick else 0.040

    def exits(self, cost_ns: float | None = None) -> int:
        """How many exits a sample has, at `cost_ns` each."""
        cost_s = (self.costs.exit_ns if cost_ns is None else cost_ns) / 1e9
        return max(10, round(self.sample_s / cost_s))

    async def interleaved(
        self,
        reference: Callable[[], float],
        variants: Mapping[str, Callable[[], Awaitable[float]]],
        limit_s: float | None = None,
    ) -> dict[str, list[Sample]]:
        """Measure each of `variants` between two runs of `reference`, round by round.

        All of them return a cost, in the same unit. The first round warms up.

        Args:
            limit_s: after this time no further round begins; by default `row_limit_s` for each
                variant.
        """
        limit_s = self.row_limit_s * len(variants) if limit_s is None else limit_s
        samples: dict[str, list[Sample]] = {name: [] for name in variants}
        started = time.monotonic()
        for number in range(1 + 2 * self.rounds):
            late = time.monotonic() - started > limit_s
            done = all(len(s) >= self.rounds for s in samples.values())
            if done or (late and all(samples.values())):
                break
            before = reference()
            for name, variant in variants.items():
                value = await variant()
                after = reference()
                fits = max(before, after) <= DISTURBED * min(before, after)
                # The last rounds take what comes, or a busy machine would give nothing.
                wanted = fits or number > self.rounds or self.quick or late
                if number and wanted and len(samples[name]) < self.rounds:
                    samples[name].append(Sample(value, (before + after) / 2))
                before = after
        return samples


def figure(
    label: str,
    values: Sequence[float],
    unit: str = "",
    *,
    scale: float = 1.0,
    gate: Gate | None = None,
) -> Figure:
    """The median of `values`, with its quartiles, divided by `scale`."""
    scaled = [value / scale for value in values]
    return Figure(
        label,
        statistics.median(scaled),
        unit,
        quantile(scaled, 0.25),
        quantile(scaled, 0.75),
        gate,
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie, about."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


@contextmanager
def on_one_processor() -> Iterator[None]:
    """Keep this thread, and the threads and processes that it starts, on one of its processors.

    What else runs on a host may make one of them half as fast again as another for seconds.
    """
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(every)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)


class OtherLoad:
    """How many processors' worth of time other processes used since it was made."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._busy_s = self._busy()

    def processors(self) -> float:
        """The average from then to now."""
        elapsed_s = time.monotonic() - self._since
        return max(0.0, (self._busy() - self._busy_s) / elapsed_s) if elapsed_s else 0.0

    def _busy(self) -> float:
        with open("/proc/stat") as stat:
            ticks = [int(word) for word in stat.readline().split()[1:9]]
        all_s = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # idle and iowait
        own = os.times()
        return all_s - sum(own[:4])
