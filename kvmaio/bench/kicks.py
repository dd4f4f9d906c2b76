"""Kicks: from the call until `run()` has come back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

from ..vcpu import VCpu
from .guests import SPIN
from .harness import Bench, Figure, Row, figure, quantile

__all__ = ["measure"]

PAUSE_S = 0.001
"""The guest runs for so long before it is kicked."""


async def measure(bench: Bench) -> AsyncIterator[Row]:
    """From the loop's own thread and from another."""
    count = 10 if bench.quick else 30 * bench.rounds
    for name, kicker in (("from the loop", _LoopKicker), ("from a thread", _ThreadKicker)):
        async with SPIN.machine() as machine:
            machine.load(SPIN.image())
            late_ns = await _kicked(machine.vcpus[0], kicker, count)
        yield Row(
            "kicks",
            name,
            bench.loop,
            (
                figure("latency", late_ns, "µs", scale=1e3),
                Figure("latency, p99", quantile(late_ns, 0.99) / 1e3, "µs"),
            ),
        )


async def _kicked(
    vcpu: VCpu, make_kicker: Callable[[VCpu], _LoopKicker | _ThreadKicker], count: int
) -> list[int]:
    kicker = make_kicker(vcpu)
    late_ns = []
    for _ in range(count):
        kicker.start()
        await vcpu.run()
        late_ns.append(time.monotonic_ns() - kicker.kicked_ns)
        kicker.join()
    return late_ns


class _LoopKicker:
    kicked_ns = 0

    def __init__(self, vcpu: VCpu) -> None:
        self._vcpu = vcpu

    def start(self) -> None:
        asyncio.get_running_loop().call_later(PAUSE_S, self.kick)

    def kick(self) -> None:
        self.kicked_ns = time.monotonic_ns()
        self._vcpu.kick()

    def join(self) -> None:
        pass


class _ThreadKicker(_LoopKicker):
    def start(self) -> None:
        self._thread = threading.Thread(target=self._wait_and_kick)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _wait_and_kick(self) -> None:
        time.sleep(PAUSE_S)
        self.kick()
