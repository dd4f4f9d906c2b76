"""What tests of simulated time share: loops, guests, and a CPU model by script."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from kvmaio.cpu import EntryResult
from kvmaio.device import Device
from kvmaio.simulation import SimulationLoop
from kvmaio.stats import CpuStatistics
from kvmaio.timed_cpu import TimedCpu

__all__ = [
    "LOOPS",
    "MS",
    "PATIENCE",
    "SPINNING",
    "Port",
    "ScriptedModel",
    "enter_again_and_again",
    "running",
    "simulate",
    "timed",
]

PATIENCE = 10 if os.environ.get("SVMLAB") == "1" else 1
MS = 1_000_000
T = TypeVar("T")

SPINNING = bytes.fromhex("ebfe")  # forever: jmp forever

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
    "simulated": SimulationLoop,
}


def simulate(main: Coroutine[Any, Any, T], *, debug: bool = False, **options: Any) -> T:
    """Run `main` on a new SimulationLoop."""
    with asyncio.Runner(loop_factory=lambda: SimulationLoop(**options), debug=debug) as runner:
        return runner.run(main)


def running() -> SimulationLoop:
    """The running loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimulationLoop)
    return loop


class Port(Device):
    """Keeps when it was written, and what."""

    size = 1

    def __init__(self, written: Callable[[int], None] = lambda value: None) -> None:
        self.writes: list[tuple[int, int]] = []
        self.written = written

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((self.clock.now_ns, value))
        self.written(value)


class ScriptedModel:
    """A CPU model that executes what `step` says, without a host.

    Args:
        step: from the limit of a run in ns to what it executed, and how it ended.
    """

    kind = "scripted"
    has_lapic = counts_instructions = False
    resolution_ns = 1
    page = io_words = mmio_word = None

    def __init__(self, step: Callable[[int], tuple[int, EntryResult]]) -> None:
        self.step = step
        self.executed_ns = 0
        self.log: list[str] = []
        self.kicks = 0
        self.waiting = False
        self.name = ""

    def begin(self, limit_ns: int) -> None:
        self.log.append("begin")
        self.limit_ns = limit_ns

    def finish(self) -> EntryResult:
        self.log.append("finish")
        self.executed_ns, result = self.step(self.limit_ns)
        return result

    def half_entry(self) -> EntryResult:
        self.executed_ns = 0
        return EntryResult.INTERRUPTED

    def is_waiting(self) -> bool:
        return self.waiting

    def kick(self) -> None:
        self.kicks += 1

    def has_posted(self) -> bool:
        return False

    def close(self) -> None:
        pass


def timed(
    model: Any, host_factor: float = 1.0, name: str = "machine.cpu0"
) -> tuple[TimedCpu, CpuStatistics]:
    """`model` on the running loop."""
    cpu = TimedCpu(model, running(), host_factor)
    stats = CpuStatistics()
    cpu.belongs_to(name, stats, lambda: None, lambda executed_ns: None)
    return cpu, stats


async def enter_again_and_again(
    cpu: TimedCpu, ended: Callable[[int, EntryResult], object] = lambda local_ns, result: None
) -> None:
    """A vCPU's task, reduced to its entries."""
    while True:
        if (result := cpu.enter(None)) is None:
            result = await cpu.left()
        ended(cpu.local_ns, result)
