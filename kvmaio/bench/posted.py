"""Declared fast paths: posted writes, which KVM batches, and doorbells, which it counts."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from ..device import Device
from ..exits import EndRun, Exited
from ..machine import Machine
from ..registers import Register
from .guests import GUESTS, PORT, Guest, Raw
from .harness import Bench, Gate, Row, figure

__all__ = ["measure"]

WRITES = 1000
"""Fast writes between two exits."""

END_PORT = 0x80

# mov dx, 0x3f8; L: mov cx, 1000; M: out dx, al; loop M; out 0x80, al; jmp L
_WRITING = Guest("writing", bytes.fromhex("baf803 b9e803 ee e2fd e680 ebf6"))
# the same with nop: what the guest's own loop costs, most of all where it is emulated
_IDLING = Guest("idling", bytes.fromhex("baf803 b9e803 90 e2fd e680 ebf6"))


class _Posted(Device):
    count = 0
    data = Register(0, int, posted=True)

    @data.on_write
    def take(self, value: int) -> None:
        self.count += 1


class _Doorbell(Device):
    count = 0
    bell: Any = Register(0, doorbell=True)

    async def run(self) -> None:
        async for rings in self.bell:
            self.count += rings


class _End(Device):
    """A plain port, behind each WRITES writes."""

    size = 1
    left = 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.left -= 1
        if self.left <= 0:
            raise EndRun(Exited(0))


async def measure(bench: Bench) -> AsyncIterator[Row]:
    """What a write costs on each path, net of the guest's own loop, in raw exits."""
    yield await _measure(bench, "posted write", _Posted(), Gate(at_most=0.15))
    yield await _measure(bench, "doorbell", _Doorbell(), Gate(at_most=0.6))


async def _measure(bench: Bench, name: str, device: _Posted | _Doorbell, gate: Gate) -> Row:
    batches = 1 if bench.quick else 5
    async with (
        Raw.opened(GUESTS["pio write"]) as raw,
        _IDLING.machine() as idling,
        _WRITING.machine() as writing,
    ):
        writing.attach(device, pio=PORT)
        idle_end = idling.attach(_End(), pio=END_PORT)
        end = writing.attach(_End(), pio=END_PORT)
        idling.load(_IDLING.image())
        writing.load(_WRITING.image())
        for machine, last in ((idling, idle_end), (writing, end)):
            await _run(machine, last, 60)  # they find their places
        totals: list[float] = []

        async def net() -> float:
            idle_ns = await _run(idling, idle_end, batches)
            total_ns = await _run(writing, end, batches)
            totals.append(total_ns)
            return total_ns - idle_ns

        samples = (await bench.interleaved(lambda: raw.run(bench.exits() // 2), {name: net}))[name]
        writes = (len(totals) * batches + 60) * WRITES
    return Row(
        "posted",
        name,
        bench.loop,
        (
            figure("raw exit", [s.reference for s in samples], "µs", scale=1e3),
            figure("net cost", [s.value for s in samples], "µs", scale=1e3),
            figure("× raw exit", [s.ratio for s in samples], gate=gate),
            figure("with its loop", totals, "µs", scale=1e3),
        ),
        f"{device.count} of {writes} writes seen by the device",
        failed=device.count < writes,
    )


async def _run(machine: Machine, end: _End, batches: int) -> float:
    """Nanoseconds for each of the WRITES writes, or turns of the loop."""
    end.left = batches
    started_ns = time.perf_counter_ns()
    await machine.run()
    return (time.perf_counter_ns() - started_ns) / (batches * WRITES)
