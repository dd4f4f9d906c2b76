"""PciConfigPorts: configuration mechanism #1."""

import asyncio

import pytest

from kvmaio.device import Device
from kvmaio.devices import PciConfigPorts
from kvmaio.errors import ConfigurationError
from kvmaio.registers import Register
from kvmaio.testing import BusDriver

ADDRESS, DATA = 0, 4
ENABLE = 1 << 31


def at(bus, device, function, register):
    return ENABLE | bus << 16 | device << 11 | function << 8 | register


def host_bridge():
    """A config space with one 4 KiB memory BAR."""
    config, mask = bytearray(256), bytearray(256)
    config[0:4] = bytes.fromhex("86803712")
    mask[0x10:0x14] = (0xFFFF_F000).to_bytes(4, "little")
    return config, mask


async def test_reads_at_the_byte_offset():
    config, mask = host_bridge()
    device = PciConfigPorts()
    device.add(0, 1, 2, config, mask)
    async with BusDriver(device) as bus:
        await bus.write(ADDRESS, 4, at(0, 1, 2, 0))
        assert await bus.read(DATA, 4) == 0x1237_8086
        assert [await bus.read(DATA + i) for i in range(4)] == [0x86, 0x80, 0x37, 0x12]
        assert await bus.read(DATA + 2, 2) == 0x1237


async def test_bar_probing():
    config, mask = host_bridge()
    device = PciConfigPorts()
    device.add(255, 31, 7, config, mask)
    async with BusDriver(device) as bus:
        await bus.write(ADDRESS, 4, at(255, 31, 7, 0x10))
        await bus.write(DATA, 4, 0xFFFF_FFFF)
        assert await bus.read(DATA, 4) == 0xFFFF_F000
        await bus.write(DATA + 3, 1, 0xFE)
        assert await bus.read(DATA, 4) == 0xFEFF_F000
        await bus.write(ADDRESS, 4, at(255, 31, 7, 0))
        await bus.write(DATA, 4, 0)
        assert await bus.read(DATA, 4) == 0x1237_8086  # read-only


async def test_only_four_byte_accesses_reach_the_address():
    async with BusDriver(PciConfigPorts()) as bus:
        await bus.write(ADDRESS, 4, 0xFFFF_FFFF)
        assert await bus.read(ADDRESS, 4) == 0x80FF_FFFC  # reserved bits read 0
        await bus.write(ADDRESS, 2, 0)
        await bus.write(ADDRESS + 1, 1, 0)
        assert await bus.read(ADDRESS, 4) == 0x80FF_FFFC
        assert [await bus.read(ADDRESS, 2), await bus.read(ADDRESS + 1)] == [0xFFFF, 0xFF]


async def test_absent_functions_and_a_closed_window_read_all_ones():
    config, mask = host_bridge()
    device = PciConfigPorts()
    device.add(0, 0, 0, config, mask)
    async with BusDriver(device) as bus:
        for address in (at(0, 0, 1, 0), at(1, 0, 0, 0), at(0, 0, 0, 0) & ~ENABLE):
            await bus.write(ADDRESS, 4, address)
            await bus.write(DATA, 4, 0)
            seen = [await bus.read(DATA, size) for size in (1, 2, 4)]
            assert seen == [0xFF, 0xFFFF, 0xFFFF_FFFF]
        assert await bus.read(2, 4) == 0xFFFF_FFFF  # across the two registers


class Function(Device):
    """A function as a device: a doorbell that takes its time."""

    size = 256
    bell = Register(0x40, int, bits=32)
    rung = 0

    @bell.on_write
    async def ring(self, value):
        await asyncio.sleep(0)
        self.bell = value

    def update(self):
        self.rung = self.bell


async def test_a_device_as_a_function_is_updated_after_each_write():
    device, function = PciConfigPorts(), Function()
    device.add(0, 2, 0, function)
    async with BusDriver(device) as bus:
        await bus.write(ADDRESS, 4, at(0, 2, 0, 0x40))
        await bus.write(DATA, 4, 0x1234)
        assert (await bus.read(DATA, 4), function.rung) == (0x1234, 0x1234)
        await bus.write(DATA + 1, 1, 0xFF)
        assert (await bus.read(DATA, 4), function.rung) == (0xFF34, 0xFF34)
        await bus.write(ADDRESS, 4, at(0, 2, 0, 0x44))
        await bus.write(DATA, 4, 1)
        assert await bus.read(DATA, 4) == 0


async def test_state_moves_to_the_same_functions_elsewhere():
    spaces = []
    for _ in range(2):
        device = PciConfigPorts()
        config, mask = host_bridge()
        device.add(0, 3, 0, config, mask)
        spaces.append((device, config))
    spaces[0][1][0x10:0x14] = b"abcd"
    spaces[1][0].load(spaces[0][0].save())
    assert spaces[1][1] == spaces[0][1]


def test_impossible_places():
    device = PciConfigPorts()
    device.add(0, 0, 0, bytearray(256))
    with pytest.raises(ConfigurationError, match=r"00:00\.0 is there already"):
        device.add(0, 0, 0, bytearray(256))
    for place in ((256, 0, 0), (0, 32, 0), (0, 0, 8), (0, -1, 0)):
        with pytest.raises(ConfigurationError, match="there is no PCI function"):
            device.add(*place, bytearray(256))
    with pytest.raises(ConfigurationError, match="configuration space of 64 bytes"):
        device.add(0, 1, 0, bytearray(64))
    with pytest.raises(ConfigurationError, match="write mask of 4 bytes"):
        device.add(0, 1, 0, bytearray(256), bytes(4))
