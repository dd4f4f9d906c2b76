"""`Board`: memory, buses, devices and interrupt lines, wired together; no CPU yet."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

from .arguments import some_text, whole
from .bus import Bus
from .declared_paths import DeclaredPaths
from .device import Device
from .errors import ConfigurationError
from .irq import IrqLine
from .memory import GuestMemory

__all__ = ["Board"]

D = TypeVar("D", bound=Device)

LOW_RAM = 3 << 30
"""RAM above 3 GiB goes on at 4 GiB: what lies between belongs to devices and firmware."""


class Board:
    """What a `Machine` is soldered together from.

    Args:
        ram: bytes at address 0; what goes beyond 3 GiB is placed from 4 GiB on.

    Attributes:
        memory: the guest's physical memory.
        pio, mmio: the two buses.
        devices: by name.
        lines: the interrupt lines by number, as far as somebody asked for them.
        wiring: device name -> the number of the line that it drives, or None.
        paths: the devices' registers that are served faster than by an exit.
    """

    def __init__(self, ram: int) -> None:
        self.memory = GuestMemory()
        self.pio = Bus("pio", 1 << 16)
        self.mmio = Bus("mmio", 1 << 52)
        self.devices: dict[str, Device] = {}
        self.lines: dict[int, IrqLine] = {}
        self.wiring: dict[str, int | None] = {}
        self.paths = DeclaredPaths()
        self._names: Counter[str] = Counter()
        self._build_ram(ram)

    def attach(
        self,
        device: D,
        *,
        pio: int | None = None,
        mmio: int | None = None,
        irq: int | None = None,
        name: str | None = None,
    ) -> D:
        """Give `device` its addresses, its interrupt line and its clock; returns it.

        Args:
            pio, mmio: the first port or address.
            irq: the interrupt line that it drives; lines are shared (wired OR).
            name: by default its class's name and a number, such as ``debugexit0``.

        Raises:
            ConfigurationError: the addresses are taken, or the name is.
        """
        _check_is_device(device)
        for bus, base in (("pio", pio), ("mmio", mmio), ("irq", irq)):
            if base is not None:
                whole(bus, base)
        if name is not None:
            some_text("name", name)
        base_name = type(device).__name__.lower()
        device.name = name or f"{base_name}{self._names[base_name]}"
        if device.name in self.devices:
            raise ConfigurationError(f"there is a device {device.name} already; give it a name")
        if any(device is other for other in self.devices.values()):
            raise ConfigurationError(f"{device.name} is attached already")
        if mmio is not None and (region := self.memory.overlapping(mmio, device.size)):
            raise ConfigurationError(
                f"cannot map {device.name} at mmio {mmio:#x}..{mmio + device.size - 1:#x}: "
                f"{region} is already there"
            )
        line = None if irq is None else self.irq(irq)
        try:
            if pio is not None:
                self.pio.map(device, pio)
            if mmio is not None:
                self.mmio.map(device, mmio)
        except ConfigurationError:
            self.pio.unmap(device)
            raise
        self._names[base_name] += 1
        self.devices[device.name] = device
        self.wiring[device.name] = irq
        device.irq.name = f"{device.name}.irq"
        if line is not None:
            device.irq.connect(line.input())
        self.paths.declare(device, pio, is_pio=True)
        self.paths.declare(device, mmio, is_pio=False)
        self._attached(device)
        return device

    def irq(self, number: int) -> IrqLine:
        """Interrupt line `number` (a GSI where the irqchip is KVM's)."""
        line = self.lines.get(number)
        if line is None:
            if whole("irq", number) < 0:
                raise ConfigurationError(f"interrupt line {number}: lines are numbered from 0")
            line = IrqLine(f"irq{number}")
            self._connect(number, line)
            self.lines[number] = line
        return line

    # ---- what a machine adds -----------------------------------------------------------

    def _attached(self, device: Device) -> None:
        """A device has got its place."""

    def _connect(self, number: int, line: IrqLine) -> None:
        """A line is asked for the first time: connect it to who follows it.

        Raises:
            ConfigurationError: there is no such line on this machine.
        """

    # ---- inside ------------------------------------------------------------------------

    def _build_ram(self, size: int) -> None:
        size = -(-size // 4096) * 4096
        self.memory.guard(self._refuse_memory_over_devices)
        self.memory.check_host_has(size)
        self.memory.add_ram(0, min(size, LOW_RAM))
        if size > LOW_RAM:
            self.memory.add_ram(1 << 32, size - LOW_RAM)

    def _refuse_memory_over_devices(self, base: int, size: int, what: str) -> None:
        if (window := self.mmio.overlapping(base, size)) is not None:
            raise ConfigurationError(
                f"cannot add {what} at {base:#x}..{base + size - 1:#x}: {window} is already there"
            )


def _check_is_device(given: object) -> None:
    if isinstance(given, Device):
        return
    advice = f"; attach {given.__name__}()" if isinstance(given, type) else ""
    raise ConfigurationError(f"attach({given!r}): a Device is expected{advice}")
