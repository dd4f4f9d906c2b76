"""PseudoOpWindow: bits 15:8 of the offset choose the operation."""

import asyncio

import pytest

from kvmaio.devices import M5Op, PseudoOpWindow
from kvmaio.errors import ConfigurationError, GuestError
from kvmaio.testing import BusDriver, settle


async def test_a_read_returns_the_result_and_a_write_drops_it():
    window = PseudoOpWindow()
    calls = []

    @window.operation(M5Op.SUM)
    def add():
        calls.append("add")
        return 0x1234_5678_9ABC_DEF0

    @window.operation(0xFF)
    def nothing():
        calls.append("nothing")

    async with BusDriver(window) as bus:
        assert await bus.read(0x2300, 8) == 0x1234_5678_9ABC_DEF0
        assert await bus.read(0x23FC, 4) == 0x9ABC_DEF0  # bits 7:0 select nothing
        await bus.write(0x2300, 8, 99)
        assert await bus.read(0xFF00, 8) == 0
    assert calls == ["add", "add", "add", "nothing"]


async def test_an_async_operation_holds_up_its_caller():
    window = PseudoOpWindow()
    answer = asyncio.get_running_loop().create_future()

    @window.operation(0x50)
    async def read_file():
        return await answer

    async with BusDriver(window) as bus:
        reading = asyncio.create_task(bus.read(0x5000, 8))
        writing = asyncio.create_task(bus.write(0x5000, 8, 0))
        await settle()
        assert (reading.done(), writing.done()) == (False, False)
        answer.set_result(42)
        assert await reading == 42
        await writing


async def test_an_operation_that_nobody_registered_is_the_guests_error():
    async with BusDriver(PseudoOpWindow()) as bus:
        with pytest.raises(GuestError, match=r"pseudo-op 0x21 \(EXIT\) of pseudoopwindow"):
            await bus.read(0x2100, 8)
        with pytest.raises(GuestError, match=r"pseudo-op 0xee of pseudoopwindow"):
            await bus.write(0xEE00, 1, 0)


def test_impossible_registrations():
    window = PseudoOpWindow(size=0x1000)
    window.operation(0x0F)(lambda: None)
    with pytest.raises(ConfigurationError, match="0xf is registered already"):
        window.operation(0x0F)
    with pytest.raises(ConfigurationError, match="the pseudo-ops 0 to 0xf"):
        window.operation(0x10)
    for size in (0, 0x180, 0x20000):
        with pytest.raises(ConfigurationError, match="multiple of 0x100"):
            PseudoOpWindow(size=size)
