"""`check_round_trips`: is a device's state whole, wherever a checkpoint may be taken?"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import attrs

from .device import Device
from .errors import CheckpointError
from .snapshot import load_device, save_device

if TYPE_CHECKING:
    from .testing import BusDriver

__all__ = ["LostState", "check_round_trips"]


class LostState(AssertionError):
    """A device that was saved and loaded does not behave as the one that was not."""


@attrs.frozen
class _Step:
    """Something the scenario did, and what came of it."""

    what: str
    repeat: Callable[[BusDriver[Any]], Awaitable[int | None]]
    answer: int | None
    irq: bool


class _Recording:
    """Drives a device as `BusDriver` does and keeps each step; time stops at every deadline."""

    def __init__(self, driver: BusDriver[Any]) -> None:
        self._driver = driver
        self.steps: list[_Step] = []

    @property
    def device(self) -> Any:
        """The device."""
        return self._driver.device

    async def read(self, offset: int, size: int = 1) -> int:
        """See `BusDriver.read`."""
        answer = await self._step(
            f"a read of {size} at {offset:#x}", lambda driver: driver.read(offset, size)
        )
        assert answer is not None
        return answer

    async def write(self, offset: int, size: int, value: int) -> None:
        """See `BusDriver.write`."""
        await self._step(
            f"a write of {value:#x} ({size}) at {offset:#x}",
            lambda driver: driver.write(offset, size, value),
        )

    async def advance(self, ns: int) -> None:
        """See `BusDriver.advance`."""
        clock = self._driver.clock
        end_ns = clock.now_ns + ns
        while (deadline_ns := clock.next_ns()) is not None and clock.now_ns < deadline_ns < end_ns:
            await self._advance_to(deadline_ns)
        await self._advance_to(end_ns)

    async def _advance_to(self, ns: int) -> None:
        span_ns = ns - self._driver.clock.now_ns
        await self._step(f"{ns} ns", lambda driver: driver.advance(span_ns))

    async def _step(
        self, what: str, repeat: Callable[[BusDriver[Any]], Awaitable[int | None]]
    ) -> int | None:
        answer = await repeat(self._driver)
        self.steps.append(_Step(what, repeat, answer, self._driver.irq.level))
        return answer


async def check_round_trips(
    make: Callable[[], Device], scenario: Callable[[Any], Awaitable[None]]
) -> int:
    """Play `scenario` with a device that is saved and loaded behind each of its steps in turn.

    Each time, what the saved device gave is loaded into a new one, whose `run()` starts
    from there, and the rest of the scenario must give the same reads and the same
    interrupt level as without. A step is an access, or a span of time up to the next
    deadline; so every place at which `run()` waits is one of them.

    ::

        async def scenario(bus):
            await bus.write(0x0, 4, 1_000_000)
            await bus.advance(2_500_000)
            assert await bus.read(0x8, 4) == 1

        await check_round_trips(CountdownTimer, scenario)

    Args:
        make: makes a device as the machine's author does.
        scenario: takes what has `read`, `write` and `advance` of a `BusDriver`.

    Returns:
        How many round trips there were.

    Raises:
        LostState: a device lost something; the message says after which step it was
            saved, what showed it, and where the states differ.
    """
    from .testing import BusDriver

    async with BusDriver(make()) as driver:
        recording = _Recording(driver)
        await scenario(recording)
    steps = recording.steps
    for count in range(len(steps) + 1):
        await _play(make, steps, count)
    return len(steps) + 1


async def _play(make: Callable[[], Device], steps: list[_Step], saved_after: int) -> None:
    from .testing import BusDriver, ManualClock

    async with BusDriver(make()) as driver:
        for step in steps[:saved_after]:
            await step.repeat(driver)
        saved = save_device(driver.device)
        now_ns = driver.clock.now_ns
    what = "at the start" if not saved_after else f"after {steps[saved_after - 1].what}"
    lost = functools.partial(_lost, driver.device.name, what)
    device = make()
    clock = ManualClock(now_ns)
    device.clock = clock
    device.alarm.use_clock(clock)
    try:
        load_device(device, saved)
    except CheckpointError as error:
        raise lost(f"load() failed: {error}") from error
    device.irq.set(saved.irq)
    device.update()
    if (again := save_device(device)) != saved:
        raise lost(f"saved again it is {again}, not {saved}")
    async with BusDriver(device, clock=clock) as driver:
        for step in steps[saved_after:]:
            answer = await step.repeat(driver)
            if answer != step.answer:
                raise lost(f"{step.what} gives {answer:#x}, not {step.answer:#x}")
            if driver.irq.level != step.irq:
                raise lost(f"behind {step.what} the interrupt is {driver.irq.level}")


def _lost(device: str, when: str, what: str) -> LostState:
    return LostState(f"{device}, saved {when}, has lost state: {what}; see save() and load()")
