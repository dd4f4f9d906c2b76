"""PCI configuration mechanism #1 (PCI Local Bus Specification 3.0, 3.2.2.3.2)."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, Protocol, Self

from kvmaio.device import Device
from kvmaio.errors import ConfigurationError
from kvmaio.registers import Register

__all__ = ["ConfigSpace", "PciConfigPorts", "PlainConfigSpace"]

ENABLE = 1 << 31
WRITABLE = 0x80FF_FFFC  # bits 30:24 are reserved, bits 1:0 always 0
DATA = 4  # CONFIG_DATA's offset in the window
SPACE_SIZE = 256


class ConfigSpace(Protocol):
    """A function's 256 bytes; any `Device` is one."""

    def read(self, offset: int, size: int) -> int | Awaitable[int]: ...

    def write(self, offset: int, size: int, value: int) -> Awaitable[None] | None: ...


class PlainConfigSpace:
    """Configuration space as bytes, of which a mask says what the guest may change.

    A base address register needs no code: with only the bits above its size
    in the mask, the usual probing by writing all ones works.
    """

    def __init__(self, data: bytearray, write_mask: bytes) -> None:
        for what, given in (("configuration space", data), ("write mask", write_mask)):
            if len(given) != SPACE_SIZE:
                raise ConfigurationError(f"a {what} of {len(given)} bytes: it must be {SPACE_SIZE}")
        self.data = data
        self.write_mask = write_mask

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        for i in range(offset, offset + size):
            mask = self.write_mask[i]
            self.data[i] = self.data[i] & ~mask | value & mask
            value >>= 8


class PciConfigPorts(Device):
    """The ports through which a PC reaches PCI configuration space; at 0xCF8.

    CONFIG_ADDRESS takes 4 byte accesses only; CONFIG_DATA, four ports further,
    is the configuration space at the accessed byte while bit 31 is set.
    Everything else is a plain port with nothing behind it: it reads as all
    ones and ignores writes, as do functions that are absent.
    """

    size = 8
    address = Register(0x0, int, bits=32)  # CONFIG_ADDRESS

    def __init__(self) -> None:
        self.functions: dict[tuple[int, int, int], ConfigSpace] = {}

    def add(
        self,
        bus: int,
        device: int,
        function: int,
        config: bytearray | ConfigSpace,
        write_mask: bytes = bytes(SPACE_SIZE),
    ) -> None:
        """Put a function at `bus` (0 to 255), `device` (0 to 31), `function` (0 to 7).

        Args:
            config: 256 bytes, which stay the caller's to look at; or an object
                with read and write, such as a `Device`, whose update() is
                called after each write.
            write_mask: with bytes, the bits that the guest can change.

        Raises:
            ConfigurationError: such a place does not exist or is taken.
        """
        where = (bus, device, function)
        if not (0 <= bus < 256 and 0 <= device < 32 and 0 <= function < 8):
            raise ConfigurationError(f"there is no PCI function {_text(where)}")
        if where in self.functions:
            raise ConfigurationError(f"PCI function {_text(where)} is there already")
        if isinstance(config, bytearray):
            config = PlainConfigSpace(config, write_mask)
        self.functions[where] = config

    def read(self, offset: int, size: int) -> int | Awaitable[int]:
        if (offset, size) == (0, 4):
            return self.address
        config = self._selected(offset, size)
        if config is None:
            return (1 << 8 * size) - 1
        return config.read(self._register(offset), size)

    def write(self, offset: int, size: int, value: int) -> Awaitable[None] | None:
        if (offset, size) == (0, 4):
            self.address = value & WRITABLE
        elif (config := self._selected(offset, size)) is not None:
            pending = config.write(self._register(offset), size, value)
            if isinstance(config, Device):
                if pending is not None:
                    return _then_update(pending, config)
                config.update()
            return pending
        return None

    def clone(self, copies: Mapping[Any, Any]) -> Self:
        clone = super().clone(copies)
        for where, config in self.functions.items():
            if isinstance(config, PlainConfigSpace):
                config = PlainConfigSpace(bytearray(config.data), config.write_mask)
            clone.functions[where] = config
        return clone

    def save(self) -> dict[str, Any]:
        return {
            _text(where): bytes(config.data)
            for where, config in self.functions.items()
            if isinstance(config, PlainConfigSpace)
        }

    def load(self, state: dict[str, Any]) -> None:
        for where, config in self.functions.items():
            if isinstance(config, PlainConfigSpace):
                config.data[:] = state[_text(where)]

    def _selected(self, offset: int, size: int) -> ConfigSpace | None:
        if offset < DATA or offset + size > DATA + 4 or not self.address & ENABLE:
            return None
        where = (self.address >> 16 & 0xFF, self.address >> 11 & 0x1F, self.address >> 8 & 7)
        return self.functions.get(where)

    def _register(self, offset: int) -> int:
        return (self.address & 0xFC) + offset - DATA


def _text(where: tuple[int, int, int]) -> str:
    return "{:02x}:{:02x}.{:x}".format(*where)


async def _then_update(pending: Awaitable[None], device: Device) -> None:
    await pending
    device.update()
