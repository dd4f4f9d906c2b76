"""Guests that mostly compute: the engine should be out of their way."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import attrs

from ..device import Device
from .guests import (
    GUESTS,
    PORT,
    AsyncDevice,
    Raw,
    Storm,
    model_of,
    storming,
    user_loop,
)
from .harness import Bench, Gate, Row, Sample, figure, on_one_processor

__all__ = ["measure"]

WARM_UP_EXITS = 120
"""Enough for a vCPU to find its place."""

TICK_NS = 1_000_000
TIMER_PORT = PORT + 0x100
COMPUTE_EXIT_NS = 1_200_000
"""About, where real mode is emulated; elsewhere the samples are just shorter."""

TRIAL_TURNS = 1_000_000
NATIVE_NS = 40_000_000
"""One run of the loop: long enough that its start and end hardly matter."""


async def measure(bench: Bench) -> AsyncIterator[Row]:
    """1000 instructions between exits; 64-bit user mode, storming and computing."""
    yield await _against_raw(bench, "compute", COMPUTE_EXIT_NS, fraction=0.85)
    yield await _against_raw(bench, "user64 pio write", 4 * bench.costs.exit_ns)
    yield await _against_native(bench)


async def _against_raw(bench: Bench, name: str, exit_ns: int, fraction: float | None = None) -> Row:
    guest = GUESTS[name]
    exits = bench.exits(exit_ns)
    async with Raw.opened(guest) as raw, storming(guest) as storm:
        raw.run(max(exits // 4, 5))
        await storm.run(max(exits, WARM_UP_EXITS))
        with _on_one_processor(storm, lambda: raw.run(max(exits // 2, 5))) as reference:
            samples = await bench.interleaved(reference, {name: lambda: storm.run(exits)})
        title = "real16, 1000 loop instructions an exit" if name == "compute" else name
        return _row(bench, title, samples[name], fraction, storm.moves, storm.where)


async def _against_native(bench: Bench) -> Row:
    """The guest's loop, in the guest and in this process, both of about the same length."""
    trial_ns = min(_native_loop(TRIAL_TURNS)() for _ in range(3))
    turns = round(TRIAL_TURNS * (NATIVE_NS / (4 if bench.quick else 1)) / trial_ns)
    async with storming(user_loop(turns), AsyncDevice) as storm:
        ticker = storm.machine.attach(_Ticker(), pio=TIMER_PORT)
        await storm.run(1)
        with _on_one_processor(storm, _native_loop(turns)) as native:
            bench = attrs.evolve(bench, rounds=2 * bench.rounds)
            samples = await bench.interleaved(native, {"user64": lambda: storm.run(1)})
        note = f"{ticker.ticks} ticks of a 1 ms device timer meanwhile"
        return _row(bench, "user64 loop against native", samples["user64"], 0.95, storm.moves, note)


@contextmanager
def _on_one_processor(
    storm: Storm, reference: Callable[[], float]
) -> Iterator[Callable[[], float]]:
    """`reference`, on the processor that the guest has. The loop has the others, if it does not
    run the guest itself."""
    model, every = model_of(storm.machine), os.sched_getaffinity(0)
    with on_one_processor():
        one = os.sched_getaffinity(0)
        os.sched_setaffinity(model.handle.tid, one)  # the vCPU's own thread

        def on_it() -> float:
            os.sched_setaffinity(0, one)
            cost = reference()
            if not model.is_resident:
                os.sched_setaffinity(0, every - one or one)
            return cost

        yield on_it


def _row(
    bench: Bench,
    name: str,
    samples: list[Sample],
    fraction: float | None,
    moves: int,
    note: str,
) -> Row:
    return Row(
        "compute",
        name,
        bench.loop,
        (
            figure("reference", [s.reference for s in samples], "µs", scale=1e3),
            figure("cost", [s.value for s in samples], "µs", scale=1e3),
            figure(
                "speed / reference",
                [1 / s.ratio for s in samples],
                gate=None if fraction is None else Gate(at_least=fraction),
            ),
            figure("moves", [moves]),
        ),
        note,
    )


class _Ticker(Device):
    """A device timer of 1 ms."""

    size = 1
    ticks = 0

    async def run(self) -> None:
        self.alarm.arm(self.clock.now_ns + TICK_NS)
        async for deadline_ns in self.alarm:
            self.ticks += 1
            # From the deadline, so that it does not drift, but between runs it may be late.
            self.alarm.arm(max(deadline_ns + TICK_NS, self.clock.now_ns))


def _native_loop(turns: int) -> Callable[[], float]:
    """The guest's loop as a function of this process; nanoseconds a call."""
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    # mov ecx, turns; L: dec ecx; jnz L; ret
    memory.write(b"\xb9" + turns.to_bytes(4, "little") + b"\xff\xc9\x75\xfc\xc3")
    window = ctypes.c_char.from_buffer(memory)
    function = ctypes.CFUNCTYPE(None)(ctypes.addressof(window))

    def run() -> float:
        assert window is not None  # it keeps the memory
        started_ns = time.perf_counter_ns()
        function()
        return float(time.perf_counter_ns() - started_ns)

    return run
