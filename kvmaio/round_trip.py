"""`check_round_trips`: is a device's state whole, wherever a checkpoint may be taken?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any

import attrs

from .checkpoint import SavedDevice
from .checkpoint.parts import from_plain, to_plain
from .checkpoint.plain import decode, encode
from .device import Device
from .errors import CheckpointError
from .snapshot import load_device, save_device

if TYPE_CHECKING:
    from .testing import BusDriver

__all__ = ["LostState", "TellsWaits", "check_round_trips"]

SHORT_S = 0.001
"""A scenario that is away for longer has waited for time, not just for a turn of the loop."""


class LostState(AssertionError):
    """A device that was saved and loaded does not behave as the one that was not."""


class TellsWaits:
    """``await TellsWaits(coroutine, waits)`` is as ``await coroutine``; `waits` is called each time
    that waits for something."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], waits: Callable[[], None]) -> None:
        self._coroutine = coroutine
        self._waits = waits

    def __await__(self) -> Generator[Any, Any, None]:
        coroutine, step = self._coroutine, self._coroutine.send
        argument: Any = None
        while True:
            try:
                awaited = step(argument)
            except StopIteration:
                return
            self._waits()
            try:
                argument = yield awaited
                step = coroutine.send
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as error:
                argument, step = error, coroutine.throw


# ---- the scenario, once ------------------------------------------------------------------


@attrs.frozen
class _Step:
    """Something the scenario did, and what came of it.

    Attributes:
        is_access: in the middle of it no checkpoint is taken; a drain waits for accesses.
    """

    what: str
    repeat: Callable[[BusDriver[Any]], Awaitable[int | None]]
    is_access: bool
    answer: int | None
    irq: bool


class _Recording:
    """Drives a device as `BusDriver` does and keeps each step; time stops at every deadline."""

    def __init__(self, driver: BusDriver[Any]) -> None:
        self._driver = driver
        self._loop = asyncio.get_running_loop()
        self.steps: list[_Step] = []
        self._turned = False  # the loop has, since the last step
        self._waits = 0
        driver.on_wait = self._count_wait
        self._left()

    @property
    def device(self) -> Any:
        """The device."""
        return self._driver.device

    async def read(self, offset: int, size: int = 1) -> int:
        """See `BusDriver.read`."""
        answer = await self._access(
            f"a read of {size} at {offset:#x}", lambda driver: driver.read(offset, size)
        )
        assert answer is not None
        return answer

    async def write(self, offset: int, size: int, value: int) -> None:
        """See `BusDriver.write`."""
        await self._access(
            f"a write of {value:#x} ({size}) at {offset:#x}",
            lambda driver: driver.write(offset, size, value),
        )

    async def advance(self, ns: int) -> None:
        """See `BusDriver.advance`."""
        await self._catch_up()
        clock = self._driver.clock
        end_ns = clock.now_ns + ns
        await self._turn()
        while (deadline_ns := clock.next_ns()) is not None and clock.now_ns < deadline_ns < end_ns:
            await self._advance_to(deadline_ns)
        if clock.now_ns < end_ns:
            await self._advance_to(end_ns)

    async def _turn(self) -> None:
        """What goes on before time does, such as by an event of an access, and may arm an alarm."""
        device, waits = self.device, self._waits
        before = _encoded(device)
        await self._advance_to(self._driver.clock.now_ns)
        if self._waits == waits and _encoded(device) == before:
            self.steps.pop()

    def _count_wait(self) -> None:
        self._waits += 1

    async def _advance_to(self, ns: int) -> None:
        async def advance(driver: BusDriver[Any]) -> None:
            await driver.advance(ns - driver.clock.now_ns)

        await self._step(f"{ns} ns", advance)

    async def _access(
        self, what: str, repeat: Callable[[BusDriver[Any]], Awaitable[int | None]]
    ) -> int | None:
        await self._catch_up()
        return await self._step(what, repeat, is_access=True)

    async def _catch_up(self) -> None:
        """If the scenario has waited by itself, waiting is a step like others."""
        if not self._turned:
            return
        away_s = self._loop.time() - self._left_at

        async def wait(driver: BusDriver[Any]) -> None:
            from .testing import settle

            await settle()
            if away_s > SHORT_S:
                await asyncio.sleep(away_s)

        self.steps.append(
            _Step(f"{away_s:.3g} s of the loop's", wait, False, None, self._driver.irq.level)
        )

    async def _step(
        self,
        what: str,
        repeat: Callable[[BusDriver[Any]], Awaitable[int | None]],
        *,
        is_access: bool = False,
    ) -> int | None:
        answer = await repeat(self._driver)
        self.steps.append(_Step(what, repeat, is_access, answer, self._driver.irq.level))
        self._left()
        return answer

    def _left(self) -> None:
        def turned() -> None:
            if count == len(self.steps):
                self._turned = True

        count = len(self.steps)
        self._turned = False
        self._left_at = self._loop.time()
        self._loop.call_soon(turned)


# ---- where it may be saved ---------------------------------------------------------------


@attrs.frozen
class _Point:
    """A moment at which a checkpoint may be taken.

    Attributes:
        when: in words.
        next_step: the step that is under way, or comes next.
        now_ns: the time.
        saved: what was saved, encoded as in a checkpoint.
    """

    when: str
    next_step: int
    now_ns: int
    saved: bytes


class _Saving:
    """Finds the points while it plays the steps."""

    def __init__(self, make: Callable[[], Device], steps: list[_Step]) -> None:
        from .testing import BusDriver

        self._steps = steps
        self._driver = BusDriver(make())
        self._driver.on_wait = self._waits
        self._at = -1  # the step that is under way
        self._waited = False  # the last point is of a wait, and nothing has gone on since
        self.points: list[_Point] = []

    async def play(self) -> list[_Point]:
        """All steps; the points are found."""
        async with self._driver as driver:
            self._reached("at the start", 0)
            for number, step in enumerate(self._steps):
                self._at, self._waited = number, False
                answer = await step.repeat(driver)
                if (answer, driver.irq.level) != (step.answer, step.irq):
                    raise LostState(
                        f"{driver.device.name} does not repeat {step.what}, or its save() changes "
                        f"it: {answer} and interrupt {driver.irq.level}, "
                        f"not {step.answer} and {step.irq}"
                    )
                self._reached(f"after {step.what}", number + 1)
            self._driver.on_wait = None
        return self.points

    def _waits(self) -> None:
        if self._at < 0:
            self._add("at the start, where run() waits", 0)
        elif not (step := self._steps[self._at]).is_access:
            self._add(f"where run() waits on the way to {step.what}", self._at)
        self._waited = True

    def _reached(self, when: str, next_step: int) -> None:
        """A step has ended. If all that it did was to have `run()` wait, it is the same point."""
        if self._waited and self.points:
            last = self.points.pop()
            if (last.now_ns, last.saved) != (self._driver.clock.now_ns, self._save()):
                self.points.append(last)
        self._waited = False
        self._add(when, next_step)

    def _add(self, when: str, next_step: int) -> None:
        if self._driver.device.busy_sections.is_drained():
            self.points.append(_Point(when, next_step, self._driver.clock.now_ns, self._save()))

    def _save(self) -> bytes:
        return _encoded(self._driver.device)


def _encoded(device: Device) -> bytes:
    return encode(to_plain(save_device(device)), device.name)


# ---- and whether it can be loaded there ----------------------------------------------------


async def check_round_trips(
    make: Callable[[], Device], scenario: Callable[[Any], Awaitable[None]]
) -> int:
    """Play `scenario` with a device that is saved and loaded wherever a checkpoint may be taken.

    That is behind each step, which is an access, or a span of time up to the next deadline;
    and wherever `run()` waits meanwhile, for whatever it is, outside of `busy()` sections.
    Each time, what the saved device gave is loaded into a new one, whose `run()` starts
    from there, and the rest of the scenario must give the same reads and the same
    interrupt level as without.

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
        LostState: a device lost something; the message says where it was saved, what
            showed it, and where the states differ.
        CheckpointError: what `save()` gives is not plain data.
    """
    from .testing import BusDriver

    async with BusDriver(make()) as driver:
        recording = _Recording(driver)
        await scenario(recording)
    points = await _Saving(make, recording.steps).play()
    for point in points:
        await _go_on(make, recording.steps, point)
    return len(points)


async def _go_on(make: Callable[[], Device], steps: list[_Step], point: _Point) -> None:
    """Load what was saved at `point` into a new device, and play the rest with that."""
    from .testing import BusDriver, ManualClock

    device = make()
    clock = ManualClock(point.now_ns)
    device.clock = clock
    device.alarm.use_clock(clock)

    def lost(what: str) -> LostState:
        return LostState(
            f"{device.name}, saved {point.when}, has lost state: {what}; see save() and load()"
        )

    saved: SavedDevice = from_plain(decode(point.saved), SavedDevice, device.name)
    try:
        load_device(device, saved)
    except CheckpointError as error:
        raise lost(f"load() failed: {error}") from error
    device.irq.set(saved.irq)
    device.update()
    if _encoded(device) != point.saved:
        raise lost(f"saved again it is {save_device(device)}, not {saved}")
    async with BusDriver(device, clock=clock) as driver:
        for step in steps[point.next_step :]:
            answer = await step.repeat(driver)
            if answer != step.answer:
                raise lost(f"{step.what} gives {answer:#x}, not {step.answer:#x}")
            if driver.irq.level != step.irq:
                raise lost(f"behind {step.what} the interrupt is {driver.irq.level}")
