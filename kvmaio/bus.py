"""`Bus`: an address space that resolves an access to a device and carries it out."""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator

import attrs

from .arguments import whole
from .device import Device
from .errors import ConfigurationError, UnmappedAccess
from .registers import Access

__all__ = ["Bus", "Layer", "Mapping", "Target", "Unmapped"]

MAX_ACCESS = 8  # bytes: the widest single access of a CPU


class Unmapped(enum.Enum):
    """What an access to a place with no device does."""

    ERROR = "error"
    OPEN_BUS = "open bus"
    """Reads give all ones and writes are ignored, as on a PC: firmware probes."""


@attrs.frozen(eq=False)
class Mapping:
    """A device's window on a bus."""

    base: int
    size: int
    device: Device

    @property
    def last(self) -> int:
        """The window's last address."""
        return self.base + self.size - 1

    def __str__(self) -> str:
        return f"{self.device.name} at {self.base:#x}..{self.last:#x}"


@attrs.frozen(eq=False)
class Target:
    """An access, resolved: what the hot path needs and nothing else.

    Attributes:
        offset: into the window; the first argument of `read` and `write`.
        update: called after a write; None where the device does not define it.
    """

    offset: int
    read: Callable[[int, int], int | Awaitable[int]]
    write: Callable[[int, int, int], Awaitable[None] | None]
    update: Callable[[], None] | None


Layer = Callable[["Mapping | None", int, int, Target], Target]
"""Puts itself between the bus and a device: takes the window (None: there is none), address and
size of an access, and the target so far; returns the target to use. Asked once per address and
size, not per access."""


class Bus:
    """One address space: port I/O (``pio``) or memory-mapped I/O (``mmio``).

    Devices can be driven through it without any CPU::

        await machine.pio.write(0x3F8, 1, 0x41)

    Attributes:
        name: ``pio`` or ``mmio``.
        limit: the number of addresses.
        unmapped: what happens where there is no device.
        changes: how often what `resolve()` has given has become untrue.
    """

    def __init__(self, name: str, limit: int, unmapped: Unmapped = Unmapped.ERROR) -> None:
        self.name = name
        self.limit = limit
        self.unmapped = unmapped
        self.changes = 0
        self._mappings: list[Mapping] = []
        self._bases: list[int] = []
        # (address << 4 | size) -> target: filled as accesses come, emptied by map and unmap.
        self._targets: dict[int, Target] = {}
        self._layers: list[Layer] = []
        self._observer: Layer | None = None
        self._on_change: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self._mappings)

    def map(self, device: Device, base: int) -> Mapping:
        """Give `device` the addresses from `base` on, as many as its `size`.

        Raises:
            ConfigurationError: no size, out of range, or somebody is there already.
        """
        size = whole("size", device.size)
        whole("base", base)
        if size <= 0:
            raise ConfigurationError(
                f"cannot map {device.name} at {self.name} {base:#x}: its size is {size}"
            )
        if base < 0 or base + size > self.limit:
            raise ConfigurationError(
                f"cannot map {device.name} at {self.name} {base:#x}..{base + size - 1:#x}: "
                f"the bus ends at {self.limit - 1:#x}"
            )
        mapping = Mapping(base, size, device)
        if (other := self.overlapping(base, size)) is not None:
            raise ConfigurationError(
                f"cannot map {mapping}: {other.device.name} already occupies "
                f"{other.base:#x}..{other.last:#x}"
            )
        index = bisect_right(self._bases, base)
        self._mappings.insert(index, mapping)
        self._bases.insert(index, base)
        self._forget_targets()
        return mapping

    def unmap(self, device: Device) -> None:
        """Take back every window of `device`; a stranger is ignored."""
        self._mappings = [m for m in self._mappings if m.device is not device]
        self._bases = [m.base for m in self._mappings]
        self._forget_targets()

    def add_layer(self, layer: Layer) -> None:
        """Have `layer` stand between the guests and the devices, before those that do already."""
        self._layers.append(layer)
        self._forget_targets()

    def remove_layer(self, layer: Layer) -> None:
        """Take back `add_layer()`; an unknown layer is ignored."""
        if layer in self._layers:
            self._layers.remove(layer)
            self._forget_targets()

    def observe(self, observer: Layer | None) -> None:
        """Have `observer` stand before all layers, in place of another one."""
        self._observer = observer
        self._forget_targets()

    def on_change(self, told: Callable[[], None]) -> None:
        """Call `told` whenever what `resolve()` has given is no longer true."""
        self._on_change.append(told)

    def _forget_targets(self) -> None:
        self._targets.clear()
        self.changes += 1
        for told in self._on_change:
            told()

    def overlapping(self, base: int, size: int) -> Mapping | None:
        """The first window that shares an address with base..base+size-1."""
        return next((m for m in self._mappings if base <= m.last and m.base < base + size), None)

    def find(self, address: int) -> Mapping | None:
        """The window that holds `address`, or None."""
        index = bisect_right(self._bases, address) - 1
        if index >= 0 and address <= self._mappings[index].last:
            return self._mappings[index]
        return None

    async def read(self, address: int, size: int) -> int:
        """Read `size` (1, 2, 4 or 8) bytes.

        Raises:
            UnmappedAccess: nothing is there and `unmapped` is ERROR.
            ConfigurationError: an impossible size.
        """
        _check_size(self.name, address, size)
        value = self.begin_read(address, size)
        if not isinstance(value, int):
            value = await value
        return value & ((1 << 8 * size) - 1)

    async def write(self, address: int, size: int, value: int) -> None:
        """Write the low `size` bytes of `value`; see `read()`."""
        _check_size(self.name, address, size)
        pending = self.begin_write(address, size, value & ((1 << 8 * size) - 1))
        if pending is not None:
            await pending

    def begin_read(self, address: int, size: int) -> int | Awaitable[int]:
        """Start a read: the value, or an awaitable of it where the handler is async.

        The value is the handler's: whoever starts the read cuts it to its `size`. This
        and `begin_write()` are the one way from an access to a device; they are split
        from `read()` and `write()` so that a plain handler costs no coroutine.
        """
        target = self._targets.get(address << 4 | size) or self._resolve(address, size)
        return target.read(target.offset, size)

    def begin_write(self, address: int, size: int, value: int) -> Awaitable[None] | None:
        """Start a write: None when it is done, else what to await."""
        target = self._targets.get(address << 4 | size) or self._resolve(address, size)
        pending = target.write(target.offset, size, value)
        if target.update is None:
            return pending
        if pending is None:
            target.update()
            return None
        return _finish_write(pending, target.update)

    async def write_stamped(self, address: int, size: int, value: int, time_ns: int) -> None:
        """A write that the guest made at `time_ns`: `Device.write_time_ns` says so meanwhile."""
        mapping = self.find(address)
        if mapping is None:
            await self.write(address, size, value)
            return
        mapping.device.posted_time_ns = time_ns
        try:
            await self.write(address, size, value)
        finally:
            mapping.device.posted_time_ns = None

    def resolve(self, address: int, size: int) -> Target:
        """Who answers an access of `size` bytes at `address`; until the bus changes."""
        return self._targets.get(address << 4 | size) or self._resolve(address, size)

    def _resolve(self, address: int, size: int) -> Target:
        mapping = self.find(address)
        if mapping is not None and address + size - 1 <= mapping.last:
            device = mapping.device
            update = device.update if type(device).update is not Device.update else None
            offset = address - mapping.base
            read, write = _reader(device, offset, size), _writer(device, offset, size)
            target = Target(offset, read, write, update)
            target = self._layered(mapping, address, size, target)
        elif mapping is None and self.overlapping(address, size) is None:
            target = self._layered(None, address, size, self._unmapped_target(address))
        else:
            target = self._split_target(address)  # whose pieces have the layers
        # Bounded by the guest's imagination: an open bus probed everywhere must not eat the host.
        if len(self._targets) >= 1 << 14:
            self._forget_targets()
        self._targets[address << 4 | size] = target
        return target

    def _layered(self, mapping: Mapping | None, address: int, size: int, target: Target) -> Target:
        for layer in self._layers:
            target = layer(mapping, address, size, target)
        return target if self._observer is None else self._observer(mapping, address, size, target)

    def _unmapped_target(self, address: int) -> Target:
        def read(offset: int, size: int) -> int:
            if self.unmapped is Unmapped.ERROR:
                raise UnmappedAccess(self.name, address, size)
            return -1

        def write(offset: int, size: int, value: int) -> None:
            if self.unmapped is Unmapped.ERROR:
                raise UnmappedAccess(self.name, address, size, value=value)

        return Target(0, read, write, None)

    def _split_target(self, address: int) -> Target:
        """An access that no single window holds becomes byte accesses, as on an 8-bit bus."""

        async def read(offset: int, size: int) -> int:
            return sum([await self.read(address + i, 1) << 8 * i for i in range(size)])

        async def write(offset: int, size: int, value: int) -> None:
            for i in range(size):
                await self.write(address + i, 1, value >> 8 * i)

        return Target(0, read, write, None)


def _reader(device: Device, offset: int, size: int) -> Callable[[int, int], int | Awaitable[int]]:
    """`device.read`, or straight to the register where that would only find it."""
    if getattr(device.read, "__func__", None) is Device.read:
        register = device.register_exactly_at(offset, size, Access.R)
        if register is not None:
            return register.reader(device)
    return device.read


def _writer(
    device: Device, offset: int, size: int
) -> Callable[[int, int, int], Awaitable[None] | None]:
    """`device.write`, or straight to the register where that would only find it."""
    if getattr(device.write, "__func__", None) is Device.write:
        register = device.register_exactly_at(offset, size, Access.W)
        if register is not None:
            return register.writer(device)
    return device.write


def _check_size(bus: str, address: int, size: int) -> None:
    if not 0 < size <= MAX_ACCESS:
        raise ConfigurationError(
            f"an access of {size} bytes at {bus} {address:#x}: 1 to {MAX_ACCESS} only"
        )


async def _finish_write(pending: Awaitable[None], update: Callable[[], None]) -> None:
    await pending
    update()
