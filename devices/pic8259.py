"""8259A interrupt controller (Intel 231468), and the ELCR beside it (82371SB, 290550)."""

from __future__ import annotations

import functools
from typing import Any

from kvmaio.device import Device
from kvmaio.errors import ConfigurationError
from kvmaio.irq import IrqSink
from kvmaio.registers import Register

__all__ = ["Elcr", "Pic8259"]

LINES = 8
SPURIOUS_LINE = 7  # what is acknowledged when nothing requests
FLOATING_BUS = 0xFF  # the vector when no slave answers

# Writes with A0 = 0: the bits that tell ICW1 and OCW3 from OCW2.
ICW1 = 0x10
OCW3 = 0x08

ICW1_ICW4_NEEDED = 0x01
ICW1_SINGLE = 0x02
ICW1_LEVEL = 0x08

ICW4_AUTO_EOI = 0x02
ICW4_SPECIAL_FULLY_NESTED = 0x10

OCW2_EOI = 0x20
OCW2_SPECIFIC = 0x40
OCW2_ROTATE = 0x80

OCW3_READ_ISR = 0x01
OCW3_READ = 0x02
OCW3_POLL = 0x04
OCW3_SPECIAL_MASK = 0x20
OCW3_SET_SPECIAL_MASK = 0x40

POLL_REQUEST = 0x80

# The lines of each chip that only know edges: timer, keyboard and cascade; RTC and FPU.
ELCR_MASKS = (0xF8, 0xDE)


class Pic8259(Device):
    """One 8259A, in the 8086's mode; a PC has a master at port 0x20 and a slave at 0xA0.

    `irq` is the INT output. Whoever answers it calls `acknowledge()`, which is
    the CPU's pair of INTA pulses. An edge is latched until it is acknowledged,
    so that a pulse is not lost; the chip itself would want the line to stay
    high until then. INT stays low until the chip has had its ICWs. Not
    modelled: the MCS-80's mode, buffered mode.

    Attributes:
        levels: the lines' present levels, a bit each.
        level_triggered: the lines that are so by the ELCR; with ICW1's LTIM all are.
        latched: edges that came and were not acknowledged.
        in_service: ISR.
        mask: IMR.
        lowest: the line with the lowest priority; 7 until it is rotated.
    """

    command = Register(0, int)
    data = Register(1, int)

    _STATE = (
        *("levels", "level_triggered", "latched", "in_service", "mask", "lowest"),
        *("is_initialised", "next_icw", "icw1", "icw3", "icw4", "vector_base"),
        *("special_mask", "rotates_on_auto_eoi", "reads_in_service", "is_polled"),
    )

    def __init__(self) -> None:
        self._slaves: dict[int, Pic8259] = {}
        self.levels = 0
        self._power_on()

    def _power_on(self) -> None:
        self.level_triggered = 0
        self.is_initialised = False
        self.icw3 = self.vector_base = 0
        self._begin_initialisation(0)
        self.next_icw = 0

    # The board's side

    def input(self, line: int) -> IrqSink:
        """The sink that drives IR`line`, 0 to 7."""
        if not 0 <= line < LINES:
            raise ConfigurationError(f"{self.name} has IR0 to IR7, no IR{line}")
        return functools.partial(self.set_line, line)

    def set_line(self, line: int, level: bool) -> None:
        """Drive IR`line`."""
        bit = 1 << line
        if level:
            self.latched |= bit & ~self.levels
            self.levels |= bit
        else:
            self.levels &= ~bit
        self.update()

    def cascade(self, line: int, slave: Pic8259) -> None:
        """Connect the INT output of `slave` to IR`line`: this chip is then the master."""
        slave.irq.connect(self.input(line))
        self._slaves[line] = slave

    def acknowledge(self) -> int:
        """The CPU takes the interrupt: its vector, and the line is in service.

        When nothing requests any more, that is the vector of line 7, which is
        then not in service: a spurious interrupt.
        """
        # With the first INTA pulse INT falls; it rises anew for what still waits.
        self.irq.set(False)
        line = self._take()
        if line is None:
            vector = self.vector_base | SPURIOUS_LINE
        elif self._cascaded & 1 << line:
            slave = self._slaves.get(line)
            answers = slave is not None and slave.icw3 & 7 == line
            vector = slave.acknowledge() if slave is not None and answers else FLOATING_BUS
        else:
            vector = self.vector_base | line
        self.update()
        return vector

    def update(self) -> None:
        self.irq.set(self._highest() is not None)

    def reset(self) -> None:
        super().reset()
        self._power_on()  # the lines' levels are those of other devices

    def save(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._STATE}

    def load(self, state: dict[str, Any]) -> None:
        for name in self._STATE:
            setattr(self, name, state[name])

    # The guest's side

    @command.on_read
    def read_command(self) -> int:
        if self.is_polled:
            return self._poll()
        return self.in_service if self.reads_in_service else self.requests

    @command.on_write
    def write_command(self, value: int) -> None:
        if value & ICW1:
            self._begin_initialisation(value)
        elif value & OCW3:
            self._write_ocw3(value)
        else:
            self._write_ocw2(value)

    @data.on_read
    def read_data(self) -> int:
        return self._poll() if self.is_polled else self.mask

    @data.on_write
    def write_data(self, value: int) -> None:
        match self.next_icw:
            case 0:
                self.mask = value
            case 2:
                self.vector_base = value & 0xF8
                self._expect(4 if self.icw1 & ICW1_SINGLE else 3)
            case 3:
                self.icw3 = value
                self._expect(4)
            case 4:
                self.icw4 = value
                self._expect(0)

    @property
    def requests(self) -> int:
        """IRR: edges that are not acknowledged, and level-triggered lines that are high."""
        by_level = 0xFF if self.icw1 & ICW1_LEVEL else self.level_triggered
        return self.latched & ~by_level | self.levels & by_level

    # Initialisation and operation command words

    def _begin_initialisation(self, icw1: int) -> None:
        self.icw1 = icw1
        self.icw4 = 0
        self.latched = 0  # a line that is high must fall and rise again
        self.mask = self.in_service = 0
        self.lowest = 7
        self.special_mask = self.rotates_on_auto_eoi = False
        self.reads_in_service = self.is_polled = False
        self.next_icw = 2

    def _expect(self, icw: int) -> None:
        if icw == 4 and not self.icw1 & ICW1_ICW4_NEEDED:
            icw = 0
        self.next_icw = icw
        self.is_initialised = self.is_initialised or not icw

    def _write_ocw2(self, value: int) -> None:
        rotate = bool(value & OCW2_ROTATE)
        if value & OCW2_EOI:
            line = value & 7 if value & OCW2_SPECIFIC else self._highest_in_service()
            if line is not None:
                self._end(line, rotate=rotate)
        elif value & OCW2_SPECIFIC:
            if rotate:  # "set priority"; without, no operation
                self.lowest = value & 7
        else:
            self.rotates_on_auto_eoi = rotate

    def _write_ocw3(self, value: int) -> None:
        if value & OCW3_SET_SPECIAL_MASK:
            self.special_mask = bool(value & OCW3_SPECIAL_MASK)
        self.is_polled = bool(value & OCW3_POLL)
        if value & OCW3_READ:
            self.reads_in_service = bool(value & OCW3_READ_ISR)

    def _poll(self) -> int:
        """The read after a poll command: an acknowledgement that tells the line."""
        self.is_polled = False
        self.irq.set(False)
        line = self._take()
        self.update()
        return 0 if line is None else POLL_REQUEST | line

    # Priorities

    def _by_priority(self) -> list[int]:
        return [(self.lowest + 1 + i) % LINES for i in range(LINES)]

    @property
    def _cascaded(self) -> int:
        """The lines on which slaves are, as the guest told the master."""
        return self.icw3 if self._slaves and not self.icw1 & ICW1_SINGLE else 0

    def _highest(self) -> int | None:
        """The line to serve next: what is in service holds back itself and what is lower."""
        ready = self.requests & ~self.mask
        if not ready or self.next_icw or not self.is_initialised:
            return None
        holds_back = self.in_service & ~self.mask if self.special_mask else self.in_service
        # A slave may have something more urgent than what of it is in service.
        again = self._cascaded if self.icw4 & ICW4_SPECIAL_FULLY_NESTED else 0
        for line in self._by_priority():
            bit = 1 << line
            if holds_back & bit:
                return line if ready & again & bit else None
            if ready & bit:
                return line
        return None

    def _highest_in_service(self) -> int | None:
        """What a non-specific EOI ends; in special mask mode, none that is masked."""
        ended = self.in_service & ~self.mask if self.special_mask else self.in_service
        return next((line for line in self._by_priority() if ended & 1 << line), None)

    def _take(self) -> int | None:
        """Put the line to serve next in service, or end it at once in automatic EOI mode."""
        line = self._highest()
        if line is not None:
            self.latched &= ~(1 << line)
            self.in_service |= 1 << line
            if self.icw4 & ICW4_AUTO_EOI:
                self._end(line, rotate=self.rotates_on_auto_eoi)
        return line

    def _end(self, line: int, *, rotate: bool) -> None:
        self.in_service &= ~(1 << line)
        if rotate:
            self.lowest = line


class Elcr(Device):
    """The edge/level control registers of both chips, at ports 0x4D0 and 0x4D1.

    They have no state of their own: it is `Pic8259.level_triggered`.
    """

    master = Register(0, int)
    slave = Register(1, int)

    def __init__(self, master: Pic8259, slave: Pic8259) -> None:
        self._chips = (master, slave)

    @master.on_read
    def read_master(self) -> int:
        return self._chips[0].level_triggered

    @slave.on_read
    def read_slave(self) -> int:
        return self._chips[1].level_triggered

    @master.on_write
    def write_master(self, value: int) -> None:
        self._set(0, value)

    @slave.on_write
    def write_slave(self, value: int) -> None:
        self._set(1, value)

    def _set(self, index: int, value: int) -> None:
        chip = self._chips[index]
        chip.level_triggered = value & ELCR_MASKS[index]
        chip.latched &= ~chip.level_triggered
        chip.update()
