"""``kvmaio run --live``: what the machine does, drawn anew four times a second."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..devices import Console as GuestConsole
from ..machine import Machine
from ..trace import AccessRecord, Record, StallRecord
from ..vcpu import VCpu

__all__ = ["LiveView", "live"]

WINDOW_S = 1.0
"""Rates are of this time, about."""
REFRESHES = 4
DEVICES_SHOWN = 8
CPU_RATES = {
    "numVMExits": "exits/s",
    "numIO": "I/O",
    "numMMIO": "MMIO",
    "numCoalescedMMIO": "batched",
    "numHalt": "halts",
    "numInterrupts": "interrupts",
    "numInsts": "instructions/s",
}


class LiveView:
    """Counts accesses by device as a trace sink, and shows rates of what is counted."""

    def __init__(self, machine: Machine, consoles: tuple[GuestConsole, ...]) -> None:
        self._machine = machine
        self._consoles = consoles
        self._accesses: Counter[str] = Counter()
        self._stalled_ns = 0
        self._samples: deque[tuple[float, dict[str, int]]] = deque()
        self._sample()

    def take(self, record: Record) -> None:
        """The trace's sink."""
        if isinstance(record, AccessRecord):
            self._accesses[record.source] += 1
        elif isinstance(record, StallRecord):
            self._stalled_ns += record.duration_ns

    def __rich__(self) -> RenderableType:
        self._sample()
        return Group(self._headline(), self._cpus(), self._devices(), self._console())

    def _headline(self) -> Text:
        factor, stalled = self._rate("time"), self._rate("stalled")
        return Text.assemble(
            (self._machine.name, "bold"),
            f"  guest time {factor / 1e9:.2f} x wall clock",
            f"  waiting for devices {stalled / 1e7:.0f} %",
        )

    def _cpus(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("vCPU")
        table.add_column("state")
        shown = [name for name in CPU_RATES if self._known(name)]
        for name in shown:
            table.add_column(CPU_RATES[name], justify="right")
        for vcpu in self._machine.vcpus:
            rates = (f"{self._rate(f'{vcpu.name}.{name}'):,.0f}" for name in shown)
            state = "halted" if vcpu.halted else vcpu.state.value
            table.add_row(vcpu.name, Text(state, "yellow"), *rates)
        return table

    def _devices(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("device")
        table.add_column("accesses/s", justify="right")
        table.add_column("in all", justify="right")
        for name, count in Counter(dict(self._accesses)).most_common(DEVICES_SHOWN):
            table.add_row(name, f"{self._rate(f'access.{name}'):,.0f}", f"{count:,}")
        return table

    def _console(self) -> Panel:
        lines = [line for console in self._consoles for line in console.tail().splitlines()]
        return Panel(Text("\n".join(lines), "green"), title="console", title_align="left")

    def _known(self, name: str) -> bool:
        return any(getattr(vcpu.stats, name) is not None for vcpu in self._machine.vcpus)

    def _sample(self) -> None:
        now = time.monotonic()
        values = {"time": self._machine.clock.now_ns, "stalled": self._stalled_ns}
        values |= {f"access.{name}": n for name, n in dict(self._accesses).items()}
        for vcpu in self._machine.vcpus:
            values |= _counters(vcpu)
        self._samples.append((now, values))
        while len(self._samples) > 2 and self._samples[1][0] < now - WINDOW_S:
            self._samples.popleft()

    def _rate(self, name: str) -> float:
        """By how much it grew a second, lately."""
        (first_s, first), (last_s, last) = self._samples[0], self._samples[-1]
        return (last.get(name, 0) - first.get(name, 0)) / max(last_s - first_s, 1e-3)


def _counters(vcpu: VCpu) -> dict[str, int]:
    return {f"{vcpu.name}.{name}": getattr(vcpu.stats, name) or 0 for name in CPU_RATES}


@contextmanager
def live(machine: Machine, consoles: tuple[GuestConsole, ...]) -> Iterator[None]:
    """Show a `LiveView` on standard error within the block; its last state stays."""
    view = LiveView(machine, consoles)
    with (
        machine.trace(view.take, only="access,stall"),
        # Drawn from a thread of rich's, by the wall clock: simulated time does not disturb it.
        Live(view, console=Console(stderr=True), refresh_per_second=REFRESHES),
    ):
        yield
