"""What a trace costs: exits back to back with an async handler, traced and not."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
from collections.abc import AsyncIterator, Callable
from importlib.util import find_spec

from .exits import WARM_UP_EXITS
from .guests import GUESTS, Guest, Raw, storming
from .harness import Bench, Gate, Row, figure

__all__ = ["measure"]

KEPT = Gate(at_least=0.75)
"""A trace to a file may cost a quarter of the exits a second."""


async def measure(bench: Bench) -> AsyncIterator[Row]:
    """A port write with no trace, one to nobody, and one to each kind of file."""
    guest = GUESTS["pio write"]
    with tempfile.TemporaryDirectory(prefix="kvmaio-") as folder:
        variants = {
            "no trace": lambda: _sample(bench, guest, None),
            "to a function": lambda: _sample(bench, guest, lambda record: None),
            "to JSON": lambda: _sample(bench, guest, os.path.join(folder, "run.json")),
        }
        if find_spec("vcd") is not None:
            variants["to VCD"] = lambda: _sample(bench, guest, os.path.join(folder, "run.vcd"))
        async with Raw.opened(guest) as raw:
            samples = await bench.interleaved(lambda: raw.run(bench.exits() // 2), variants)
    untraced = statistics.median(s.ratio for s in samples["no trace"])
    for name, taken in samples.items():
        figures = [
            figure("cost", [s.value for s in taken], "µs", scale=1e3),
            figure("× raw", [s.ratio for s in taken]),
        ]
        if name != "no trace":
            kept = [untraced / s.ratio for s in taken]
            gate = KEPT if name.startswith("to ") and name != "to a function" else None
            figures.append(figure("exits kept", kept, gate=gate))
        yield Row("tracing", f"{guest.name}, {name}", bench.loop, figures)


async def _sample(
    bench: Bench, guest: Guest, sink: str | Callable[[object], object] | None
) -> float:
    async with storming(guest) as storm:
        trace = None if sink is None else storm.machine.trace(sink)
        await storm.run(WARM_UP_EXITS)
        took_ns = await storm.run(bench.exits())
        if trace is not None:
            trace.close()
        await asyncio.sleep(0)
        return took_ns
