"""MC146818A real-time clock with CMOS RAM (Motorola, 1984), as in a PC/AT at 0x70."""

from __future__ import annotations

import enum
from datetime import UTC, date, datetime, timedelta
from typing import Any

from kvmaio.clock import Clock
from kvmaio.device import Device
from kvmaio.memory import parse_size
from kvmaio.registers import Register

__all__ = ["RegisterB", "RegisterC", "RtcMc146818"]

SECOND_NS = 1_000_000_000
CRYSTAL_HZ = 32_768
# UIP is set for tBUC + tUC before the time changes (table 6, 32.768 kHz).
UPDATE_WARNING_NS = 244_000 + 1_984_000
CMOS_SIZE = 128

# Places in the CMOS: the time, its alarm, the four registers.
SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0, 2, 4, 6, 7, 8, 9
CENTURY = 0x32  # not the chip's but every PC's: in RAM, always BCD in practice
ALARM_SECONDS, ALARM_MINUTES, ALARM_HOURS = 1, 3, 5
TIME = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY)
A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
EQUIPMENT = 0x14

PM = 0x80  # in the hours of 12 hour mode
ANY = 0xC0  # an alarm byte from here on matches everything
UIP = 0x80  # register A: update in progress
DIVIDER_RESET = 0x60  # register A, DV bits 11x: the divider stands still
VALID_RAM_AND_TIME = 0x80  # register D: the battery is good
POWER_ON_A = 0x26  # 32.768 kHz, periodic rate 1024 Hz: what a PC's BIOS sets

EPOCH = datetime(1, 1, 1, tzinfo=UTC)
CALENDAR_S = date.max.toordinal() * 86_400  # the years 1 to 9999; then it starts again

MIB = 1 << 20
GIB = 1 << 30
LOW_RAM_END = 3 * GIB  # RAM beyond goes on at 4 GiB


class RegisterB(enum.IntFlag):
    """What is enabled, and how the time is written."""

    DAYLIGHT_SAVING = 0x01
    HOURS_24 = 0x02
    BINARY = 0x04
    SQUARE_WAVE = 0x08
    UPDATE_ENDED = 0x10
    ALARM = 0x20
    PERIODIC = 0x40
    SET = 0x80


class RegisterC(enum.IntFlag):
    """What happened since it was last read; the enable bits of B lie in the same places."""

    UPDATE_ENDED = 0x10
    ALARM = 0x20
    PERIODIC = 0x40
    INTERRUPT = 0x80


EVENTS = RegisterC.UPDATE_ENDED | RegisterC.ALARM | RegisterC.PERIODIC


class RtcMc146818(Device):
    """MC146818A clock and 128 bytes of CMOS RAM; at port 0x70, interrupt 8.

    The time runs by the device's clock from `start` on, beginning with the
    first access or run. The weekday follows from the date, daylight saving is
    not modelled, and of the divider settings only reset differs from 32.768
    kHz. Reset leaves time and RAM alone: there is a battery.

    Args:
        memory_size: bytes, or such as ``"64M"``; fills in the bytes by which
            SeaBIOS learns how much RAM there is, laid out as in QEMU.
        start: the time to begin with, UTC where it names no zone; by default
            the host's time.

    Attributes:
        cmos: the RAM, also for the host: ``rtc.cmos[0x5F] = 1``. The bytes of
            the time in it are brought up to date when the guest reads them.
    """

    size = 2
    index = Register(0x0, int)
    data = Register(0x1, int)

    def __init__(
        self, *, memory_size: int | str | None = None, start: datetime | None = None
    ) -> None:
        self.cmos = bytearray(CMOS_SIZE)
        self.cmos[A] = POWER_ON_A
        self.cmos[B] = RegisterB.HOURS_24
        self.cmos[D] = VALID_RAM_AND_TIME
        self.cmos[EQUIPMENT] = 0x02  # a floating-point unit; no floppy, VGA
        if memory_size is not None:
            self._describe_memory(parse_size(memory_size))
        start = start or datetime.now(UTC)
        start = start if start.tzinfo else start.replace(tzinfo=UTC)
        # The time since year 1 is clock.now_ns + _base_ns, or _held_ns with the divider in reset.
        self._base_ns = (start - EPOCH) // timedelta(microseconds=1) * 1000
        self._base_clock: Clock = self.clock
        self._held_ns: int | None = None
        self._checked_ns = self._base_ns  # events up to here are in register C

    @property
    def now(self) -> datetime:
        """The clock's time, UTC."""
        return EPOCH + timedelta(microseconds=self._time_ns() // 1000 % (CALENDAR_S * 10**6))

    # The guest's side

    @index.on_read
    def read_index(self) -> int:
        return 0xFF  # write-only: nothing drives the bus

    @data.on_read
    def read_data(self) -> int:
        place = self._place
        if place in TIME and not self._is_set_by_hand:
            self._latch_time()
        elif place == A:
            return self.cmos[A] | (UIP if self._is_updating() else 0)
        elif place == C:
            self._catch_up()
            flags = self.cmos[C]
            self.cmos[C] = 0
            self.update()
            return flags
        return self.cmos[place]

    @data.on_write
    def write_data(self, value: int) -> None:
        place = self._place
        self._catch_up()  # what happened so far, happened under the old settings
        if place == A:
            self._set_divider(value & ~UIP)
        elif place == B:
            self._set_mode(RegisterB(value))
        elif place in (C, D):
            pass  # read-only
        elif place in TIME and not self._is_set_by_hand:
            self._latch_time()
            self.cmos[place] = value
            self._take_time()
        else:
            self.cmos[place] = value

    async def run(self) -> None:
        self.update()
        async for _ in self.alarm:
            self.update()

    def update(self) -> None:
        self._catch_up()
        flags = self.cmos[C] & EVENTS
        interrupt = bool(flags & self.cmos[B])
        self.cmos[C] = flags | (RegisterC.INTERRUPT if interrupt else 0)
        self.irq.set(interrupt)
        deadline_ns = self._next_interrupt()
        if deadline_ns is None:
            self.alarm.disarm()
        elif deadline_ns != self.alarm.deadline_ns:
            self.alarm.arm(deadline_ns)

    def reset(self) -> None:
        super().reset()
        kept = RegisterB.DAYLIGHT_SAVING | RegisterB.HOURS_24 | RegisterB.BINARY | RegisterB.SET
        self.cmos[B] &= kept
        self.cmos[C] = 0
        self._checked_ns = self._time_ns()

    def save(self) -> dict[str, Any]:
        self.update()  # what has happened by now is noted, however lately somebody has looked
        return {
            "cmos": bytes(self.cmos),
            "base_ns": self._base_ns,
            "held_ns": self._held_ns,
            "checked_ns": self._checked_ns,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.cmos[:] = state["cmos"]
        self._base_clock = self.clock
        self._base_ns = state["base_ns"]
        self._held_ns = state["held_ns"]
        self._checked_ns = state["checked_ns"]

    @property
    def _place(self) -> int:
        return self.index & 0x7F  # bit 7 masks NMI on a PC; that is not the chip's

    # Time

    def _time_ns(self) -> int:
        """Nanoseconds since the year 1."""
        if self._base_clock is not self.clock:
            # Attached since the last look: go on from there by the new clock.
            self._base_ns += self._base_clock.now_ns - self.clock.now_ns
            self._base_clock = self.clock
        if self._held_ns is not None:
            return self._held_ns
        return self.clock.now_ns + self._base_ns

    @property
    def _is_set_by_hand(self) -> bool:
        return bool(self.cmos[B] & RegisterB.SET)

    def _is_updating(self) -> bool:
        stands = self._is_set_by_hand or self._held_ns is not None
        return not stands and self._time_ns() % SECOND_NS >= SECOND_NS - UPDATE_WARNING_NS

    def _set_divider(self, value: int) -> None:
        time_ns = self._time_ns()
        was_held = self._held_ns is not None
        is_held = value & DIVIDER_RESET == DIVIDER_RESET
        if is_held and not was_held:
            self._held_ns = time_ns
        elif was_held and not is_held:
            # The first update comes half a second after the divider is let go.
            self._held_ns = None
            time_ns = time_ns // SECOND_NS * SECOND_NS + SECOND_NS // 2
            self._base_ns = time_ns - self.clock.now_ns
            self._checked_ns = time_ns
        self.cmos[A] = value

    def _set_mode(self, mode: RegisterB) -> None:
        was_set_by_hand = self._is_set_by_hand
        if RegisterB.SET in mode and not was_set_by_hand:
            self._latch_time()
            mode &= ~RegisterB.UPDATE_ENDED
        self.cmos[B] = mode
        if was_set_by_hand and RegisterB.SET not in mode:
            self._take_time()

    def _latch_time(self) -> None:
        """Write the time into its bytes of the CMOS."""
        now = self.now
        hour = now.hour
        if not self.cmos[B] & RegisterB.HOURS_24:
            hour = hour % 12 or 12
        self.cmos[SECONDS] = self._encode(now.second)
        self.cmos[MINUTES] = self._encode(now.minute)
        self.cmos[HOURS] = self._encode(hour)
        if not self.cmos[B] & RegisterB.HOURS_24 and now.hour >= 12:
            self.cmos[HOURS] |= PM
        self.cmos[WEEKDAY] = now.isoweekday() % 7 + 1  # Sunday is 1
        self.cmos[DAY] = self._encode(now.day)
        self.cmos[MONTH] = self._encode(now.month)
        self.cmos[YEAR] = self._encode(now.year % 100)
        self.cmos[CENTURY] = self._encode(now.year // 100)

    def _take_time(self) -> None:
        """Go on from the time in the CMOS; the divider keeps its phase within the second.

        A guest may write anything: a 61st second is the next minute's first.
        """
        year = self._decode(self.cmos[CENTURY]) * 100 + self._decode(self.cmos[YEAR])
        year, month = divmod(year * 12 + self._decode(self.cmos[MONTH]) - 1, 12)
        days = date(min(max(year, 1), 9999), month + 1, 1).toordinal() - 1
        days += self._decode(self.cmos[DAY]) - 1
        minutes = self._hour(self.cmos[HOURS]) * 60 + self._decode(self.cmos[MINUTES])
        seconds = days * 86_400 + minutes * 60 + self._decode(self.cmos[SECONDS])
        old_ns = self._time_ns()
        new_ns = seconds % CALENDAR_S * SECOND_NS + old_ns % SECOND_NS
        self._base_ns += new_ns - old_ns
        if self._held_ns is not None:
            self._held_ns = new_ns
        self._checked_ns = new_ns

    def _encode(self, number: int) -> int:
        if self.cmos[B] & RegisterB.BINARY:
            return number
        return number // 10 << 4 | number % 10

    def _decode(self, byte: int) -> int:
        if self.cmos[B] & RegisterB.BINARY:
            return byte
        return (byte >> 4) * 10 + (byte & 0x0F)

    def _hour(self, byte: int) -> int:
        if self.cmos[B] & RegisterB.HOURS_24:
            return self._decode(byte)
        return self._decode(byte & ~PM) % 12 + (12 if byte & PM else 0)

    # Events: they are found when somebody looks, or when an enabled interrupt is due

    def _catch_up(self) -> None:
        """Note in register C what happened since the last look."""
        now_ns, then_ns = self._time_ns(), self._checked_ns
        if now_ns <= then_ns:
            return
        self._checked_ns = now_ns
        for event in EVENTS:
            if self.cmos[C] & event:
                continue
            next_ns = self._next_event(event, then_ns)
            if next_ns is not None and next_ns <= now_ns:
                self.cmos[C] |= event

    def _next_interrupt(self) -> int | None:
        """When the next interrupt is due, by the device's clock.

        None while one is pending that is not acknowledged: the line cannot rise again.
        """
        wanted = self.cmos[B] & EVENTS
        if not wanted or self.cmos[C] & RegisterC.INTERRUPT or self._held_ns is not None:
            return None
        due = (self._next_event(event, self._checked_ns) for event in EVENTS if wanted & event)
        return min((ns - self._base_ns for ns in due if ns is not None), default=None)

    def _next_event(self, event: RegisterC, after_ns: int) -> int | None:
        """The time (not the clock's) of the first such event after `after_ns`."""
        if self._held_ns is not None:
            return None
        if event is RegisterC.PERIODIC:
            return self._next_period(after_ns)
        if self._is_set_by_hand:
            return None  # no updates, so no alarm either
        if event is RegisterC.UPDATE_ENDED:
            return (after_ns // SECOND_NS + 1) * SECOND_NS
        return self._next_alarm(after_ns)

    def _next_period(self, after_ns: int) -> int | None:
        rate = self.cmos[A] & 0x0F
        if rate == 0:
            return None
        # Rates 1 and 2 are those of 8 and 9, as the divider chain has no further taps.
        cycles = 1 << (rate - 1 if rate > 2 else rate + 6)
        period = after_ns * CRYSTAL_HZ // (cycles * SECOND_NS) + 1
        return -(-period * cycles * SECOND_NS // CRYSTAL_HZ)  # rounded up: never early

    def _next_alarm(self, after_ns: int) -> int | None:
        hour, minute, second = (
            None if byte >= ANY else decode(byte)
            for byte, decode in (
                (self.cmos[ALARM_HOURS], self._hour),
                (self.cmos[ALARM_MINUTES], self._decode),
                (self.cmos[ALARM_SECONDS], self._decode),
            )
        )
        if (hour or 0) > 23 or (minute or 0) > 59 or (second or 0) > 59:
            return None
        first = after_ns // SECOND_NS + 1
        day = first - first % 86_400
        for h in range(first % 86_400 // 3600, 48):
            if hour is not None and h % 24 != hour:
                continue
            for m in range(60) if minute is None else (minute,):
                start = day + h * 3600 + m * 60
                if start + 59 < first:
                    continue
                at = max(start, first) if second is None else start + second
                if at >= first:
                    return at * SECOND_NS
        return None

    def _describe_memory(self, size: int) -> None:
        low = min(size, LOW_RAM_END)
        below_1m = min(low // 1024, 640)
        above_1m = min(max(low - MIB, 0) // 1024, 0xFFFF)  # in KiB
        above_16m = min(max(low - 16 * MIB, 0) // 65_536, 0xFFFF)  # in 64 KiB
        above_4g = (size - low) // 65_536
        self.cmos[0x15:0x17] = below_1m.to_bytes(2, "little")
        self.cmos[0x17:0x19] = above_1m.to_bytes(2, "little")
        self.cmos[0x30:0x32] = above_1m.to_bytes(2, "little")
        self.cmos[0x34:0x36] = above_16m.to_bytes(2, "little")
        self.cmos[0x5B:0x5E] = above_4g.to_bytes(3, "little")
