"""The bus between IOAPICs and local APICs: who is meant by a message (SDM vol. 3A, 11.6)."""

from __future__ import annotations

import enum
from typing import Protocol

import attrs

__all__ = ["ALL", "ApicBus", "DeliveryMode", "InterruptMessage", "LevelSource", "Receiver"]

ALL = 0xFF
"""The physical destination that means everybody."""


class DeliveryMode(enum.IntEnum):
    """What a message does to its receiver; 3 is reserved."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    RESERVED = 3
    NMI = 4
    INIT = 5
    START_UP = 6
    EXTERNAL = 7


@attrs.frozen
class InterruptMessage:
    """What is sent: of level-triggered ones, the end is told to the IOAPICs."""

    mode: DeliveryMode
    vector: int = 0
    is_level: bool = False


class Receiver(Protocol):
    """A local APIC, as the bus knows it."""

    def is_meant(self, destination: int, *, is_logical: bool) -> bool:
        """Is it one of those that the destination means?"""

    def receive(self, message: InterruptMessage) -> bool:
        """Take a message; False if it is not taken and should be sent again."""

    @property
    def processor_priority(self) -> int:
        """PPR: the lowest takes what is for one of several."""


class LevelSource(Protocol):
    """An IOAPIC, as the bus knows it."""

    def end_of_interrupt(self, vector: int) -> None:
        """A level-triggered interrupt's handler is done."""


class ApicBus:
    """Carries messages at once and loses none.

    Attributes:
        apics: the local APICs.
        sources: who hears of the ends of level-triggered interrupts.
    """

    def __init__(self) -> None:
        self.apics: list[Receiver] = []
        self.sources: list[LevelSource] = []

    def meant(self, destination: int, is_logical: bool) -> list[Receiver]:
        """Those whom the destination means."""
        return [a for a in self.apics if a.is_meant(destination, is_logical=is_logical)]

    def send_to(self, receivers: list[Receiver], message: InterruptMessage) -> bool:
        """Send to these; with lowest priority, to one of them. False if nobody has taken it."""
        if message.mode is DeliveryMode.LOWEST_PRIORITY and receivers:
            receivers = [min(receivers, key=lambda apic: apic.processor_priority)]
        taken = [apic.receive(message) for apic in receivers]
        return any(taken)

    def end_of_interrupt(self, vector: int) -> None:
        """Tell the IOAPICs."""
        for source in self.sources:
            source.end_of_interrupt(vector)
