"""Declared statistics: each has a name, a unit and a description, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs

__all__ = ["CpuStatistics", "MachineStatistics", "StatisticRow", "Statistics", "stat"]


def stat(unit: str, description: str, default: int | None = 0) -> Any:
    """Declare one counter of a `Statistics` class; `default=None` means unknown."""
    return attrs.field(default=default, metadata={"unit": unit, "description": description})


@attrs.frozen
class StatisticRow:
    """One statistic as a person wants to read it."""

    name: str
    value: int | None
    unit: str
    description: str


@attrs.define
class Statistics:
    """A group of counters. Unknown is None, never 0."""

    def as_dict(self) -> dict[str, int | None]:
        """The counters by name."""
        return {field.name: getattr(self, field.name) for field in attrs.fields(type(self))}

    def rows(self) -> list[StatisticRow]:
        """The counters with their units and descriptions, in declared order."""
        return [
            StatisticRow(
                f.name, getattr(self, f.name), f.metadata["unit"], f.metadata["description"]
            )
            for f in attrs.fields(type(self))
        ]

    def reset(self) -> None:
        """Set every counter back to its declared start."""
        for field in attrs.fields(type(self)):
            setattr(self, field.name, field.default)


@attrs.define
class CpuStatistics(Statistics):
    """What a vCPU counts, under the names that gem5 gives these figures."""

    numInsts: int | None = stat(
        "Count", "guest instructions executed; unknown without a counter", None
    )
    numCycles: int = stat("Cycle", "guest cycles: host cycles x host factor, idle time included")
    numVMExits: int = stat("Count", "entries into the guest that returned, half entries included")
    numVMHalfEntries: int = stat("Count", "entries that only completed a pending access")
    numExitSignal: int = stat("Count", "exits that a kick or a timer caused")
    numMMIO: int = stat("Count", "exits for memory-mapped I/O")
    numCoalescedMMIO: int = stat(
        "Count", "writes that were batched, by KVM or by the C core, memory-mapped or port"
    )
    numIO: int = stat("Count", "exits for port I/O")
    numHalt: int = stat("Count", "exits for HLT")
    numInterrupts: int = stat("Count", "interrupts and NMIs that the engine injected")
    numAssists: int = stat(
        "Count", "emulation failures of KVM's that the software CPU has executed"
    )
    numHypercalls: int = stat("Count", "exits for hypercalls")
    ticksOvershot: int = stat(
        "Tick", "simulated time by which runs passed their ends; the next ones are shorter by it"
    )
    ticksLate: int = stat(
        "Tick", "simulated time by which exits were served after the CPU's own time"
    )
    ticksAhead: int = stat(
        "Tick", "simulated time by which the CPU was ahead of those who interrupted it"
    )
    ctrInsts: int | None = stat(
        "Count", "instructions since the counter was last set up; unknown without one", None
    )
    totalInsts: int | None = stat(
        "Count", "instructions over the whole life of the CPU; unknown without a counter", None
    )
    totalOps: int | None = stat("Count", "micro-operations; unknown under KVM", None)


class Counting(Protocol):
    """A vCPU, as far as its statistics go."""

    @property
    def name(self) -> str:
        """Such as ``cpu0``."""

    @property
    def stats(self) -> CpuStatistics:
        """What it counts."""


class HasParts(Protocol):
    """A machine, as far as its statistics go."""

    @property
    def vcpus(self) -> Sequence[Counting]:
        """Its vCPUs."""

    @property
    def devices(self) -> Mapping[str, object]:
        """Its devices by name."""


class MachineStatistics:
    """The statistics of a machine's components, by component."""

    def __init__(self, machine: HasParts) -> None:
        self._machine = machine

    def as_dict(self) -> dict[str, dict[str, int | None]]:
        """Component -> name -> value, such as ``["cpu0"]["numVMExits"]``."""
        return {name: group.as_dict() for name, group in self.groups().items()}

    def groups(self) -> dict[str, Statistics]:
        """The components that count something: vCPUs, and devices with a `stats`."""
        groups: dict[str, Statistics] = {vcpu.name: vcpu.stats for vcpu in self._machine.vcpus}
        for name, device in self._machine.devices.items():
            stats = getattr(device, "stats", None)
            if isinstance(stats, Statistics):
                groups[name] = stats
        return groups

    def reset(self) -> None:
        """Set every counter back to its start."""
        for group in self.groups().values():
            group.reset()
