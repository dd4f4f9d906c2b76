"""`check_round_trips`: it passes whole devices, and finds what a device forgets to save."""

from __future__ import annotations

import asyncio

import pytest

from kvmaio import CheckpointError, Device, Register
from kvmaio.devices import CountdownTimer, RtcMc146818, Uart16550
from kvmaio.testing import LostState, check_round_trips


async def test_countdown_timer():
    async def scenario(bus):
        await bus.write(0x0, 4, 1_000_000)
        await bus.write(0x4, 4, 3)
        await bus.advance(2_500_000)
        assert await bus.read(0x8, 4) == 1
        await bus.write(0x8, 4, 1)
        await bus.advance(600_000)
        assert await bus.read(0x8, 4) == 1

    assert await check_round_trips(CountdownTimer, scenario) == 11


async def test_rtc():
    async def scenario(bus):
        for index, value in ((0x0A, 0x26), (0x0B, 0x72)):
            await bus.write(0, 1, index)
            await bus.write(1, 1, value)
        for _ in range(3):
            await bus.advance(400_000_000)
            await bus.write(0, 1, 0x0C)
            await bus.read(1)

    def rtc() -> RtcMc146818:
        from datetime import datetime

        return RtcMc146818(start=datetime(2020, 2, 29, 23, 59, 59))

    assert await check_round_trips(rtc, scenario) > 10


async def test_uart():
    async def scenario(bus):
        await bus.write(2, 1, 0xC7)
        await bus.write(4, 1, 0x10)  # loopback: what is sent comes back
        for letter in b"abc":
            await bus.write(0, 1, letter)
        await bus.write(1, 1, 0x0F)
        for _ in range(3):
            assert await bus.read(5) & 1
            await bus.read(2)
            await bus.read(0)
        assert not await bus.read(5) & 1

    await check_round_trips(Uart16550, scenario)


class Forgetful(Device):
    """Counts in an attribute that `save()` does not know; `style` is where it shows."""

    count_register = Register(0, int)

    def __init__(self) -> None:
        self.count = 0

    @count_register.on_read
    def read_count(self) -> int:
        return self.count

    @count_register.on_write
    def add(self, value: int) -> None:
        self.count += value


async def test_state_that_is_not_saved():
    async def scenario(bus):
        await bus.write(0, 1, 5)
        await bus.write(0, 1, 2)
        assert await bus.read(0) == 7

    with pytest.raises(LostState) as caught:
        await check_round_trips(Forgetful, scenario)
    assert str(caught.value) == (
        "forgetful, saved after a write of 0x5 (1) at 0x0, has lost state: "
        "a read of 1 at 0x0 gives 0x2, not 0x7; see save() and load()"
    )


class StuckInItsCoroutine(Device):
    """Its state is in the local variables of `run()`, and gone with them."""

    ticks = Register(0, int)

    async def run(self) -> None:
        for number in range(100):
            self.alarm.arm(self.clock.now_ns + 1000)
            await anext(self.alarm)
            self.ticks = number + 1


async def test_state_in_a_coroutine():
    async def scenario(bus):
        await bus.advance(3_500)
        assert await bus.read(0) == 3

    with pytest.raises(LostState, match=r"saved after 500|saved after 1000 ns"):
        await check_round_trips(StuckInItsCoroutine, scenario)


class Doubler(Device):
    """Doubles what it is given, a millisecond later; `forgets` what it is at by then."""

    value = Register(0, int)
    result = Register(1, int)
    forgets = True

    def __init__(self) -> None:
        self.given = asyncio.Event()
        self.is_due = False

    @value.on_write
    def take(self, value: int) -> None:
        self.value = value
        self.is_due = True
        self.given.set()

    async def run(self) -> None:
        if self.is_due:
            self.given.set()
        while True:
            await self.given.wait()
            self.given.clear()
            if self.forgets:
                self.is_due = False
            self.alarm.arm(self.clock.now_ns + 1_000_000)
            await anext(self.alarm)
            self.is_due = False
            self.result = 2 * self.value

    def save(self) -> dict[str, bool]:
        return {"is_due": self.is_due}

    def load(self, state: dict[str, bool]) -> None:
        self.is_due = state["is_due"]


async def doubling(bus):
    await bus.write(0, 1, 5)
    await bus.advance(10_000_000)
    assert await bus.read(1) == 10


async def test_alarm_that_run_arms_after_an_access():
    """It is armed within the step in which it rings."""
    with pytest.raises(LostState, match=r"saved after 0 ns, .* at 0x1 gives 0x0, not 0xa"):
        await check_round_trips(Doubler, doubling)


async def test_alarm_that_run_arms_after_an_access_and_keeps():
    class Whole(Doubler):
        forgets = False

    # At the start; after the write; armed; rung; 10 ms; after the read.
    assert await check_round_trips(Whole, doubling) == 6


class Pausing(Device):
    """Counts the writes, and holds one in a local variable while it waits for something else."""

    count = Register(0, int)

    def __init__(self) -> None:
        self.waiting = 0

    @count.on_write
    def add(self, value: int) -> None:
        self.waiting += 1

    async def pause(self) -> None:
        await asyncio.sleep(0)

    async def run(self) -> None:
        while True:
            while self.waiting:
                taken, self.waiting = self.waiting, 0
                await self.pause()
                self.count += taken
            self.alarm.arm(self.clock.now_ns + 1000)
            await anext(self.alarm)

    def save(self) -> dict[str, int]:
        return {"waiting": self.waiting}

    def load(self, state: dict[str, int]) -> None:
        self.waiting = state["waiting"]


async def counting(bus):
    await bus.write(0, 1, 0)
    await bus.advance(10_000)
    assert await bus.read(0) == 1


async def test_state_lost_while_run_waits_for_a_turn_only():
    with pytest.raises(LostState, match=r"saved where run\(\) waits on the way to 1000 ns"):
        await check_round_trips(Pausing, counting)


async def test_busy_sections_are_no_points():
    class Careful(Pausing):
        async def run(self) -> None:
            while True:
                if self.waiting:
                    async with self.busy("counting"):
                        taken, self.waiting = self.waiting, 0
                        await self.pause()
                        self.count += taken
                self.alarm.arm(self.clock.now_ns + 1000)
                await anext(self.alarm)

    assert await check_round_trips(Careful, counting) > 10


async def test_state_lost_while_the_scenario_waits():
    """A device by the loop's time, and a scenario that does the same."""

    class Sleeping(Pausing):
        async def pause(self) -> None:
            await asyncio.sleep(0.002)

    async def scenario(bus):
        await bus.write(0, 1, 0)
        await bus.advance(1000)
        await asyncio.sleep(0.02)
        assert await bus.read(0) == 1

    with pytest.raises(LostState, match="has lost state: a read of 1 at 0x0 gives 0x0, not 0x1"):
        await check_round_trips(Sleeping, scenario)


async def test_save_that_changes_the_device():
    class Reading(Forgetful):
        def save(self):
            self.count += 1
            return {"count": self.count}

        def load(self, state):
            self.count = state["count"]

    async def scenario(bus):
        await bus.write(0, 1, 5)
        await bus.read(0)

    with pytest.raises(LostState, match=r"reading does not repeat a read .*, or its save"):
        await check_round_trips(Reading, scenario)


async def test_state_that_is_not_plain():
    class Odd(Forgetful):
        def save(self):
            return {"count": object()}

    async def scenario(bus):
        await bus.read(0)

    with pytest.raises(CheckpointError, match="odd"):
        await check_round_trips(Odd, scenario)


class Unlevelled(Device):
    """Raises its interrupt by hand: the level is saved all the same."""

    trigger = Register(0, int)

    @trigger.on_write
    def drive(self, value: int) -> None:
        self.irq.set(bool(value))


async def test_interrupt_level_is_state():
    async def scenario(bus):
        await bus.write(0, 1, 1)
        await bus.advance(10)
        await bus.write(0, 1, 0)

    assert await check_round_trips(Unlevelled, scenario) == 4


async def test_load_that_fails():
    class Broken(Forgetful):
        def load(self, state):
            raise KeyError("count")

    async def scenario(bus):
        await asyncio.sleep(0)

    with pytest.raises(LostState, match=r"at the start, has lost state: load.. failed: broken"):
        await check_round_trips(Broken, scenario)
