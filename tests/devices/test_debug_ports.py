"""DebugExit and DebugConsole: one port each."""

import pytest

from kvmaio.devices import DebugConsole, DebugExit
from kvmaio.errors import ConfigurationError
from kvmaio.exits import EndRun, Exited
from kvmaio.testing import BusDriver


@pytest.mark.parametrize(("value", "code"), [(0, 1), (0x10, 0x21), (0x7F, 0xFF), (0x80, 1)])
async def test_debug_exit_ends_the_run_with_an_odd_code(value, code):
    async with BusDriver(DebugExit()) as bus:
        with pytest.raises(EndRun) as ended:
            await bus.write(0, 1, value)
        assert ended.value.outcome == Exited(code)
        assert await bus.read(0) == 0


async def test_debug_console_keeps_what_is_written_and_tells_that_it_is_there():
    async with BusDriver(DebugConsole()) as bus:
        for byte in b"SeaBIOS\n":
            await bus.write(0, 1, byte)
        assert await bus.read(0) == 0xE9
        assert bus.device.output == b"SeaBIOS\n"
        assert bus.irq.edges == []


async def test_debug_console_has_no_input_to_steal(tmp_path):
    console = DebugConsole()
    await console.connect_file(tmp_path / "log")
    assert console._receiver() is None
    await console.disconnect()


async def test_history_keeps_the_last_bytes_only():
    async with BusDriver(DebugConsole(history=4)) as bus:
        seen = bytearray()
        bus.device.add_sink(seen.extend)
        for byte in b"0123456789":
            await bus.write(0, 1, byte)
        assert (bus.device.output, bytes(seen)) == (b"6789", b"0123456789")


def test_a_history_cannot_be_negative():
    with pytest.raises(ConfigurationError, match="-1 bytes"):
        DebugConsole(history=-1)
