"""8254 interval timer (Intel 231164), and port B of a PC's system control beside it."""

from __future__ import annotations

from typing import Any

import attrs

from kvmaio.device import Device
from kvmaio.registers import Register

from .pit_counter import PitCounter

__all__ = ["Pit8254", "SystemPortB", "tick_at", "time_of_tick"]

# A PC's timer runs from the colour burst's crystal: 315/88 MHz × 4 / 12 = 105/88 MHz.
# So a tick takes 17600/21 ns, and no tick of any day is a nanosecond off.
TICK_NS = (17_600, 21)

FLOATING_BUS = 0xFF
READ_BACK = 3  # in place of a counter's number

# The read-back command's bits; the first two are active low.
KEEP_COUNT = 0x20
KEEP_STATUS = 0x10


def tick_at(time_ns: int) -> int:
    """The last tick at or before `time_ns`, counted from the timer's beginning."""
    return time_ns * TICK_NS[1] // TICK_NS[0]


def time_of_tick(tick: int) -> int:
    """The first whole nanosecond at which `tick` has come."""
    return -(-tick * TICK_NS[0] // TICK_NS[1])


class Pit8254(Device):
    """8254: three counters at ports 0x40 to 0x42, their control at 0x43.

    `irq` is counter 0's OUT: interrupt line 0 of a PC. The gates of counters 0
    and 1 are high; counter 2's is `set_gate()`'s, which on a PC is `SystemPortB`.

    The counters are functions of time, found when somebody looks; only the
    edges of counter 0 are waited for. Those that a late host has missed come
    as one.
    """

    counter0 = Register(0, int)
    counter1 = Register(1, int)
    counter2 = Register(2, int)
    control = Register(3, int)

    def __init__(self) -> None:
        self._counters = [PitCounter(gate=True), PitCounter(gate=True), PitCounter()]
        self._origin_ns = 0  # the timer's own time is the clock's less this

    # The board's side

    @property
    def ticks(self) -> int:
        """Ticks of 105/88 MHz until now."""
        return tick_at(self.clock.now_ns - self._origin_ns)

    def output(self, counter: int) -> bool:
        """The level of a counter's OUT."""
        self._catch_up()
        return self._counters[counter].output

    def set_gate(self, counter: int, level: bool) -> None:
        """Drive a counter's GATE; its rising edge triggers modes 1, 2, 3 and 5."""
        self._catch_up()
        self._counters[counter].set_gate(level)
        self.update()

    # The guest's side

    @counter0.on_read
    def read_counter0(self) -> int:
        return self._read(0)

    @counter1.on_read
    def read_counter1(self) -> int:
        return self._read(1)

    @counter2.on_read
    def read_counter2(self) -> int:
        return self._read(2)

    @control.on_read
    def read_control(self) -> int:
        return FLOATING_BUS

    @counter0.on_write
    def write_counter0(self, value: int) -> None:
        self._write(0, value)

    @counter1.on_write
    def write_counter1(self, value: int) -> None:
        self._write(1, value)

    @counter2.on_write
    def write_counter2(self, value: int) -> None:
        self._write(2, value)

    @control.on_write
    def write_control(self, value: int) -> None:
        self._catch_up()
        index = value >> 6
        if index != READ_BACK:
            counter = self._counters[index]
            if value & 0x30:
                counter.program(value & 0x3F)
            else:
                counter.latch_count()
            return
        for index, counter in enumerate(self._counters):
            if value & 2 << index:
                if not value & KEEP_STATUS:
                    counter.latch_status()
                if not value & KEEP_COUNT:
                    counter.latch_count()

    def _read(self, index: int) -> int:
        self._catch_up()
        return self._counters[index].read()

    def _write(self, index: int, value: int) -> None:
        self._catch_up()
        self._counters[index].write(value)

    # Time

    async def run(self) -> None:
        self.update()
        async for _ in self.alarm:
            self.update()

    def update(self) -> None:
        self._catch_up()
        tick = self._counters[0].next_change()
        if tick is None:
            self.alarm.disarm()
            return
        deadline_ns = self._origin_ns + time_of_tick(tick)
        if deadline_ns != self.alarm.deadline_ns:
            self.alarm.arm(deadline_ns)

    def _catch_up(self) -> None:
        now = self.ticks
        rose = [counter.advance(now) for counter in self._counters]
        if rose[0]:
            self.irq.set(False)  # also where it was high before
            self.irq.set(True)
        self.irq.set(self._counters[0].output)

    # Reset and checkpoints

    def reset(self) -> None:
        super().reset()
        now = self.ticks
        for counter in self._counters:
            counter.power_on(now)

    def save(self) -> dict[str, Any]:
        now = self.ticks
        counters = [attrs.evolve(counter) for counter in self._counters]
        for counter in counters:
            counter.advance(now)
        if counters[0].next_change() != self._counters[0].next_change():
            counters[0] = self._counters[0]  # an edge that is still to be found, once loaded
        return {
            "time_ns": self.clock.now_ns - self._origin_ns,
            "counters": [attrs.asdict(counter) for counter in counters],
        }

    def load(self, state: dict[str, Any]) -> None:
        self._origin_ns = self.clock.now_ns - state["time_ns"]
        self._counters = [PitCounter(**counter) for counter in state["counters"]]


# Port B: bits 0 to 3 are the guest's, the others tell.
GATE_2 = 0x01
WRITABLE = 0x0F
REFRESH = 0x10
OUT_2 = 0x20

REFRESH_TICKS = 18  # memory is refreshed every 15.1 us, and bit 4 toggles with it


class SystemPortB(Device):
    """Port 0x61 of a PC: the gate and output of counter 2, and the refresh toggle.

    Bit 1 would let the output through to the speaker, bits 2 and 3 switch the
    NMIs for errors of memory and boards off: they can be written, there is no
    such thing. The toggle goes with the time, whatever counter 1 is set to.
    """

    control = Register(0, int)

    def __init__(self, pit: Pit8254) -> None:
        self._pit = pit

    @control.on_read
    def read_control(self) -> int:
        refresh = REFRESH if self._pit.ticks // REFRESH_TICKS % 2 else 0
        return self.control | refresh | (OUT_2 if self._pit.output(2) else 0)

    @control.on_write
    def write_control(self, value: int) -> None:
        self.control = value & WRITABLE
        self._pit.set_gate(2, bool(value & GATE_2))

    def reset(self) -> None:
        super().reset()
        self._pit.set_gate(2, False)
