"""`check_round_trips`: it passes whole devices, and finds what a device forgets to save."""

from __future__ import annotations

import asyncio

import pytest

from kvmaio import Device, Register
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
