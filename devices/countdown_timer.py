"""Countdown timer: the example to start from when writing a device."""

from __future__ import annotations

import enum

from kvmaio.device import Device
from kvmaio.registers import Register

__all__ = ["Control", "CountdownTimer", "Status"]

# A periodic timer of a few nanoseconds would keep the host busy and the guest standing.
SHORTEST_NS = 1000


class Control(enum.IntFlag):
    """What the guest asks for; a write with ENABLE starts the countdown afresh."""

    ENABLE = 1
    PERIODIC = 2


class Status(enum.IntFlag):
    """What happened; write a one to clear a bit."""

    EXPIRED = 1


class CountdownTimer(Device):
    """One-shot or periodic timer with a write-one-to-clear interrupt.

    An interval below 1 µs counts as 1 µs. A new interval takes effect with
    the next start or, of a periodic timer, with the next period.
    """

    interval = Register(0x0, int, bits=32)  # guest nanoseconds
    control = Register(0x4, Control, bits=32)
    status = Register(0x8, Status, bits=32)

    @control.on_write
    def start_or_stop(self, control: Control) -> None:
        self.control = control
        if Control.ENABLE in control:
            self.alarm.arm(self.clock.now_ns + self.period_ns)
        else:
            self.alarm.disarm()

    @status.on_write
    def acknowledge(self, ones: Status) -> None:
        self.status &= ~ones  # the engine calls update() after every write

    async def run(self) -> None:
        async for deadline_ns in self.alarm:
            self.status |= Status.EXPIRED
            if Control.PERIODIC in self.control:
                self.alarm.arm(deadline_ns + self.period_ns)  # from the deadline: no drift
            self.update()

    def update(self) -> None:
        self.irq.set(Status.EXPIRED in self.status)

    @property
    def period_ns(self) -> int:
        """The interval in force."""
        return max(self.interval, SHORTEST_NS)
