"""IOAPIC (Intel 82093AA, 290566): 24 lines, each sent to local APICs as its entry says."""

from __future__ import annotations

import functools
from typing import Any

from kvmaio.device import Device
from kvmaio.errors import ConfigurationError
from kvmaio.irq import IrqSink
from kvmaio.registers import Register

from .apic_bus import ApicBus, DeliveryMode, InterruptMessage

__all__ = ["IoApic"]

PINS = 24

# The registers behind the window.
ID, VERSION, ARBITRATION, REDIRECTIONS = 0x00, 0x01, 0x02, 0x10
VERSION_82093AA = 0x11
ID_BITS = 0x0F00_0000

# A redirection entry; bits 17 to 55 are reserved.
LOGICAL = 1 << 11
LEVEL = 1 << 15
MASKED = 1 << 16
REMOTE_IRR = 1 << 14
WRITABLE = 0xFF00_0000_0001_AFFF

NOT_SENT = (DeliveryMode.RESERVED, DeliveryMode.START_UP, DeliveryMode.EXTERNAL)


class IoApic(Device):
    """An IOAPIC; on a PC at 0xFEC00000.

    A line that is high asks for an interrupt, whatever the entry's polarity
    bit says: that is about voltages. An edge on a masked pin is lost. A
    message that no local APIC takes is sent again with the next change. Not
    modelled: SMI, and the delivery mode that brings an 8259A's interrupts
    through a pin (a local APIC's LINT0 does).
    """

    size = 0x100

    select = Register(0x00, int, bits=32)
    window = Register(0x10, int, bits=32)

    def __init__(self, bus: ApicBus) -> None:
        self._bus = bus
        bus.sources.append(self)
        self.levels = 0
        self._power_on()

    def _power_on(self) -> None:
        self.id = 0
        self.entries = [MASKED] * PINS

    # The board's side

    def input(self, pin: int) -> IrqSink:
        """The sink that drives a pin, 0 to 23."""
        if not 0 <= pin < PINS:
            raise ConfigurationError(f"{self.name} has pins 0 to {PINS - 1}, no pin {pin}")
        return functools.partial(self.set_pin, pin)

    def set_pin(self, pin: int, level: bool) -> None:
        """Drive a pin."""
        bit = 1 << pin
        rises = level and not self.levels & bit
        self.levels = self.levels | bit if level else self.levels & ~bit
        entry = self.entries[pin]
        if rises and not entry & (LEVEL | MASKED):
            self._send(entry)
        self.update()

    def end_of_interrupt(self, vector: int) -> None:
        """A local APIC has ended a level-triggered interrupt: what is still high asks again."""
        for pin, entry in enumerate(self.entries):
            if entry & REMOTE_IRR and entry & 0xFF == vector:
                self.entries[pin] = entry & ~REMOTE_IRR
        self.update()

    def update(self) -> None:
        for pin, entry in enumerate(self.entries):
            asks = self.levels & 1 << pin and entry & (LEVEL | MASKED | REMOTE_IRR) == LEVEL
            if asks and self._send(entry):
                self.entries[pin] = entry | REMOTE_IRR

    def _send(self, entry: int) -> bool:
        mode = DeliveryMode(entry >> 8 & 7)
        if mode in NOT_SENT:
            return False
        message = InterruptMessage(mode, entry & 0xFF, bool(entry & LEVEL))
        return self._bus.send_to(self._bus.meant(entry >> 56, bool(entry & LOGICAL)), message)

    # The guest's side

    @window.on_read
    def read_window(self) -> int:
        index = self.select & 0xFF
        if index in (ID, ARBITRATION):  # the second follows the first
            return self.id
        if index == VERSION:
            return (PINS - 1) << 16 | VERSION_82093AA
        pin, half = divmod(index - REDIRECTIONS, 2)
        return self.entries[pin] >> 32 * half & 0xFFFF_FFFF if 0 <= pin < PINS else 0

    @window.on_write
    def write_window(self, value: int) -> None:
        index = self.select & 0xFF
        if index == ID:
            self.id = value & ID_BITS
        pin, half = divmod(index - REDIRECTIONS, 2)
        if not 0 <= pin < PINS:
            return
        old = self.entries[pin]
        keep = old & (0xFFFF_FFFF if half else 0xFFFF_FFFF << 32)
        entry = (keep | value << 32 * half) & WRITABLE | old & REMOTE_IRR
        if not entry & LEVEL:
            entry &= ~REMOTE_IRR  # a known way for guests to end an interrupt at this version
        self.entries[pin] = entry

    # Reset and checkpoints

    def reset(self) -> None:
        super().reset()
        self._power_on()  # the pins' levels are those of other devices

    def save(self) -> dict[str, Any]:
        return {"levels": self.levels, "id": self.id, "entries": list(self.entries)}

    def load(self, state: dict[str, Any]) -> None:
        self.levels = state["levels"]
        self.id = state["id"]
        self.entries = list(state["entries"])
