"""Tools for testing devices: time by hand, recorded interrupts, a bus without a CPU.

::

    async with BusDriver(CountdownTimer()) as bus:
        await bus.write(0x0, 4, 1_000_000)
        await bus.write(0x4, 4, Control.ENABLE)
        await bus.advance(1_000_000)
        assert bus.irq.edges == [(1_000_000, True)]
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from itertools import count
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from .bus import Bus
from .clock import Clock
from .device import Device
from .devices import DebugExit, Uart16550
from .lockstep import Difference, defined_floats, lockstep
from .machine import Machine
from .round_trip import LostState, TellsWaits, check_round_trips
from .strategies import BusAccess, register_accesses

__all__ = [
    "BenchMachine",
    "BusAccess",
    "BusDriver",
    "Difference",
    "LostState",
    "ManualClock",
    "RecordingIrq",
    "check_round_trips",
    "defined_floats",
    "lockstep",
    "register_accesses",
    "settle",
]

# A chain of tasks that wake each other may be this long between two moments.
SETTLE_ROUNDS = 16
MOST_CALLBACKS_AT_ONCE = 10_000


async def settle() -> None:
    """Let every task that can go on do so, until each waits for time or input."""
    for _ in range(SETTLE_ROUNDS):
        await asyncio.sleep(0)


class _Call:
    """A callback that is due at some time; `cancel()` calls it off."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """A `Clock` that moves only when told to.

    Attributes:
        now_ns: the present time; it starts at 0.
    """

    def __init__(self, now_ns: int = 0) -> None:
        self.now_ns = now_ns
        self._queue: list[tuple[int, int, _Call]] = []
        self._order = count()  # callbacks due at the same time run in the order of their calls

    def call_at_ns(self, deadline_ns: int, callback: Callable[[], None]) -> _Call:
        """Call `callback` in the `advance()` that reaches `deadline_ns`."""
        call = _Call(callback)
        heapq.heappush(self._queue, (deadline_ns, next(self._order), call))
        return call

    def next_ns(self) -> int | None:
        """The earliest deadline that somebody waits for."""
        return min((at for at, _, call in self._queue if call.callback is not None), default=None)

    def of_loop(self, loop_ns: int) -> int:
        """As it is: no loop moves this clock."""
        return loop_ns

    async def advance(self, ns: int) -> None:
        """Let `ns` nanoseconds pass.

        What is due runs in the order of its deadlines, each seeing `now_ns`
        exactly at its deadline, and tasks run in between; so whatever they
        ask for within the span happens in it too. A deadline in the past is
        due now; `advance(0)` serves those.

        Raises:
            RuntimeError: callbacks go on at one moment without end.
        """
        end_ns = self.now_ns + ns
        at_once = 0
        await settle()
        while self._queue and self._queue[0][0] <= end_ns:
            deadline_ns, _, call = heapq.heappop(self._queue)
            if call.callback is None:
                continue
            at_once = at_once + 1 if deadline_ns <= self.now_ns else 0
            if at_once > MOST_CALLBACKS_AT_ONCE:
                raise RuntimeError(
                    f"time stands still at {self.now_ns} ns: alarms ring without end"
                )
            self.now_ns = max(self.now_ns, deadline_ns)
            call.callback()
            await settle()
        self.now_ns = end_ns


class RecordingIrq:
    """An interrupt sink that keeps each change of the line with its time.

    Attributes:
        edges: (time in nanoseconds, new level), oldest first.
        level: the present level.
    """

    def __init__(self, clock: Clock) -> None:
        self.edges: list[tuple[int, bool]] = []
        self.level = False
        self._clock = clock

    def __call__(self, level: bool) -> None:
        self.level = level
        self.edges.append((self._clock.now_ns, level))


D = TypeVar("D", bound=Device)


class BenchMachine(Machine):
    """A machine with what a guest in a test wants to talk to.

    Takes `Machine`'s arguments.

    Attributes:
        serial: port 0x3f8, interrupt line 4.
        debug_exit: port 0xf4.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # A split irqchip has no lines.
        line = None if self.irqchip == "split" else 4
        self.serial = self.attach(Uart16550(), pio=0x3F8, irq=line)
        self.debug_exit = self.attach(DebugExit(), pio=0xF4)


class BusDriver(Generic[D]):
    """Drives one device as a guest would, at offsets into its window.

    An asynchronous context manager: inside, the device lies at address 0 of a
    bus of its own and its run() is active. A failure of run() is raised by
    the next access or `advance()`, at the latest at the exit.

    Attributes:
        device: the device.
        clock: its time, moved by `advance()`.
        irq: what its interrupt line did.
        on_wait: called whenever run() waits, for whatever it is; or None.
    """

    def __init__(self, device: D, clock: ManualClock | None = None) -> None:
        self.device = device
        self.clock = clock or ManualClock()
        self.irq = RecordingIrq(self.clock)
        self.on_wait: Callable[[], None] | None = None
        self._bus = Bus("bus", max(device.size, 1))
        self._task: asyncio.Task[None] | None = None
        self._reported = False

    async def __aenter__(self) -> Self:
        self._bus.map(self.device, 0)
        self.device.clock = self.clock
        self.device.alarm.use_clock(self.clock)
        self.device.irq.connect(self.irq)
        self._task = asyncio.create_task(self._activity(), name=f"{self.device.name}.run")
        await settle()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])
        self.device.irq.disconnect(self.irq)
        self._bus.unmap(self.device)
        self._check()

    async def read(self, offset: int, size: int = 1) -> int:
        """Read `size` bytes at `offset`."""
        self._check()
        return await self._bus.read(offset, size)

    async def write(self, offset: int, size: int, value: int) -> None:
        """Write `size` bytes at `offset`."""
        self._check()
        await self._bus.write(offset, size, value)

    async def advance(self, ns: int) -> None:
        """Let `ns` nanoseconds pass; see `ManualClock.advance()`."""
        await self.clock.advance(ns)
        self._check()

    def reset(self) -> None:
        """Reset the device as the engine does."""
        self.device.reset()
        self.device.update()

    async def _activity(self) -> None:
        await TellsWaits(self.device.run(), self._waits)

    def _waits(self) -> None:
        if self.on_wait is not None:
            self.on_wait()

    def _check(self) -> None:
        task = self._task
        if task is None or self._reported or not task.done() or task.cancelled():
            return
        if (error := task.exception()) is not None:
            self._reported = True
            raise error
