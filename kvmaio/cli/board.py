"""The machine that ``kvmaio run`` builds around an image."""

from __future__ import annotations

from datetime import datetime

import attrs

from ..devices import Console, DebugConsole, DebugExit, Pit8254, RtcMc146818, SystemPortB, Uart16550
from ..machine import Machine

__all__ = ["Board", "build_board"]


CMOS_MORE_CPUS = 0x5F  # where SeaBIOS looks for the number of CPUs less one


@attrs.frozen
class Board:
    """The devices that the command has to do with."""

    uart: Uart16550
    debug_consoles: tuple[DebugConsole, ...]

    @property
    def consoles(self) -> tuple[Console, ...]:
        """All that print."""
        return (self.uart, *self.debug_consoles)


def build_board(
    machine: Machine, *, pc: bool, vcpus: int, clock_start: datetime | None = None
) -> Board:
    """Attach the devices; a PC also gets its clock and, where KVM has none, its timer.

    Args:
        clock_start: when the real-time clock begins; None is now.
    """
    # A split irqchip has no IOAPIC: nothing there takes an interrupt line.
    has_lines = machine.irqchip != "split"
    uart = machine.attach(Uart16550(), pio=0x3F8, irq=4 if has_lines else None, name="uart")
    consoles = tuple(
        machine.attach(DebugConsole(), pio=port, name=f"debug{port:x}") for port in (0x402, 0xE9)
    )
    machine.attach(DebugExit(), pio=0xF4, name="debugexit")
    if pc:
        rtc = RtcMc146818(memory_size=machine.memory.size, start=clock_start)
        rtc.cmos[CMOS_MORE_CPUS] = vcpus - 1
        machine.attach(rtc, pio=0x70, irq=8 if has_lines else None, name="rtc")
        if machine.irqchip != "kernel":
            pit = machine.attach(Pit8254(), pio=0x40, irq=0 if has_lines else None, name="pit")
            machine.attach(SystemPortB(pit), pio=0x61, name="portb")
    return Board(uart, consoles)
