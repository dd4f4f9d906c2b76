"""One counter of an 8254 (Intel 231164, "Mode Definitions") as a function of time."""

from __future__ import annotations

import attrs

__all__ = ["PitCounter"]

# The control word without the counter's number, as the status byte gives it back.
BCD = 0x01
LOW_BYTE = 0x10
HIGH_BYTE = 0x20
BOTH_BYTES = 0x30
POWER_ON = BOTH_BYTES  # the datasheet leaves it open; mode 0 is quiet

STATUS_OUTPUT = 0x80
STATUS_NULL_COUNT = 0x40


@attrs.define(kw_only=True)
class PitCounter:
    """A counter at the tick `now`; `advance()` goes on.

    Between two loads of the counting element all there is to know is `count`,
    with which it was loaded, and how many ticks were counted since: OUT, the
    element's value, and the next edge follow.

    Attributes:
        control: the control word's six lower bits.
        gate: the level of GATE.
        written: the last count written (CR), 1 to 65536; None since the control word.
        count: what the counting element was loaded with; 0 if nothing yet.
        counted: ticks counted until `since`.
        since: the tick from which on `counted` goes on, where `is_counting`.
        load_at: the tick at which CR goes into the counting element, or None.
        loads_half: that load comes with the end of half a cycle of mode 3.
        low_byte: the first byte of two, until the second is written.
        reads_high: the next read gives the upper byte.
        latched: a count that waits to be read.
        latched_status: a status that waits to be read.
    """

    control: int = POWER_ON
    gate: bool = False
    now: int = 0
    written: int | None = None
    null_count: bool = True
    count: int = 0
    counted: int = 0
    since: int = 0
    is_counting: bool = False
    load_at: int | None = None
    loads_half: bool = False
    low_byte: int | None = None
    reads_high: bool = False
    latched: int | None = None
    latched_status: int | None = None

    # ---- what it is set to ---------------------------------------------------------------

    @property
    def mode(self) -> int:
        mode = self.control >> 1 & 7
        return mode & 3 if mode > 5 else mode  # bit 2 counts for modes 4 and 5 only

    @property
    def modulus(self) -> int:
        """The counting element has four digits, of 16 or of 10."""
        return 10_000 if self.control & BCD else 0x1_0000

    def power_on(self, now: int) -> None:
        """As after power-on, but for the gate, which is the board's."""
        fresh = PitCounter(gate=self.gate, now=now)
        for field in attrs.fields(PitCounter):
            setattr(self, field.name, getattr(fresh, field.name))

    def program(self, control: int) -> None:
        """A control word: OUT goes to its initial level, and a count is waited for."""
        self.power_on(self.now)
        self.control = control

    # ---- counting ------------------------------------------------------------------------

    def advance(self, tick: int) -> bool:
        """Go on to `tick`; has OUT risen on the way?"""
        rose = False
        while self.load_at is not None and self.load_at <= tick:
            rose |= self._go_on(self.load_at - 1)
            before = self.output
            self._load(self.load_at)
            rose |= self.output and not before
        return self._go_on(tick) or rose

    def _go_on(self, tick: int) -> bool:
        tick = max(tick, self.now)
        before, after = self._elapsed(self.now), self._elapsed(tick)
        self.now = tick
        return self._rises(after) > self._rises(before)

    def _load(self, tick: int) -> None:
        assert self.written is not None
        # Half a cycle of mode 3 ends: what follows a high half is a low one of the new count.
        goes_low = self.loads_half and self.output
        self.count = self.written
        self.counted = -(-self.count // 2) if goes_low else 0
        self.since = self.now = tick
        self.is_counting = self.gate or self.mode in (1, 5)
        self.null_count = False
        self.load_at = None
        self.loads_half = False

    def _elapsed(self, tick: int) -> int:
        return self.counted + (tick - self.since if self.is_counting else 0)

    def _rises(self, elapsed: int) -> int:
        """How often OUT has risen by itself."""
        if not self.count:
            return 0
        match self.mode:
            case 0 | 1:
                return int(elapsed >= self.count)
            case 2 | 3:
                return elapsed // self.count if self._has_cycles else 0
            case _:
                return int(elapsed > self.count)

    @property
    def _has_cycles(self) -> bool:
        """In modes 2 and 3 a count of 1 is illegal: here, OUT then stays high."""
        return self.is_counting and self.count > 1

    @property
    def output(self) -> bool:
        """The level of OUT."""
        if not self.count:
            return self.mode != 0
        elapsed = self._elapsed(self.now)
        match self.mode:
            case 0 | 1:
                return elapsed >= self.count
            case 2:
                return not self._has_cycles or elapsed % self.count != self.count - 1
            case 3:
                return not self._has_cycles or elapsed % self.count < -(-self.count // 2)
            case _:  # low for one tick, even if the gate stops the count just then
                return elapsed != self.count or (not self.is_counting and self.now > self.since)

    def next_change(self) -> int | None:
        """The tick at which OUT may change next if nothing is written; None if it does not."""
        ticks = self._ticks_to_change()
        change = None if ticks is None else self.now + ticks
        if self.load_at is None or (change is not None and change < self.load_at):
            return change
        return self.load_at

    def _ticks_to_change(self) -> int | None:
        if not self.count:
            return None
        elapsed = self._elapsed(self.now)
        match self.mode:
            case 0 | 1:
                rest = self.count - elapsed
                return rest if rest > 0 and self.is_counting else None
            case 2 | 3:
                if not self._has_cycles:
                    return None
                phase = elapsed % self.count
                high = self.count - 1 if self.mode == 2 else -(-self.count // 2)
                return high - phase if phase < high else self.count - phase
            case _:
                if not self.output:
                    return 1
                rest = self.count - elapsed
                return rest if rest > 0 and self.is_counting else None

    def set_gate(self, level: bool) -> None:
        """Drive GATE: it stops modes 0, 2, 3 and 4; its rise triggers 1, 2, 3 and 5."""
        if level == self.gate:
            return
        self.gate = level
        mode = self.mode
        if level and mode in (1, 2, 3, 5):
            if self.written is not None:
                self.load_at, self.loads_half = self.now + 1, False
        elif level:
            self.since, self.is_counting = self.now, bool(self.count)
        elif mode not in (1, 5):
            self.counted = self._elapsed(self.now)
            self.since, self.is_counting = self.now, False
            if mode in (2, 3) and self.count:
                self.load_at = None  # there is no end of a cycle to load at

    # ---- the guest's side ----------------------------------------------------------------

    def write(self, value: int) -> None:
        """A byte of the count."""
        if self.mode == 0:
            self.count = 0  # its first byte stops the counter, and OUT goes low
        width = self.control & BOTH_BYTES
        if width == LOW_BYTE:
            self._write_count(value)
        elif width == HIGH_BYTE:
            self._write_count(value << 8)
        elif self.low_byte is None:
            self.low_byte = value
            if self.mode == 0:
                self.load_at = None
        else:
            low, self.low_byte = self.low_byte, None
            self._write_count(value << 8 | low)

    def _write_count(self, value: int) -> None:
        if self.control & BCD:
            value = sum((value >> 4 * i & 0xF) * 10**i for i in range(4))
        self.written = value % self.modulus or self.modulus
        self.null_count = True
        match self.mode:
            case 0 | 4:
                self.load_at = self.now + 1
            case 2 | 3 if not self.count:
                self.load_at = self.now + 1
            case 2 | 3 if self.load_at is None and self.is_counting:
                self._load_at_end()

    def _load_at_end(self) -> None:
        """In mode 2 with the cycle's end, in mode 3 with half a cycle's."""
        phase = self._elapsed(self.now) % self.count
        half = -(-self.count // 2)
        self.loads_half = self.mode == 3
        end = half if self.loads_half and phase < half else self.count
        self.load_at = self.now + end - phase

    def read(self) -> int:
        """The next byte: of a latched status, of a latched count, or of the count as it is."""
        if self.latched_status is not None:
            status, self.latched_status = self.latched_status, None
            return status
        value = self.value if self.latched is None else self.latched
        width = self.control & BOTH_BYTES
        high = width == HIGH_BYTE or (width == BOTH_BYTES and self.reads_high)
        if width == BOTH_BYTES:
            self.reads_high = not self.reads_high
        if not self.reads_high:
            self.latched = None
        return value >> 8 if high else value & 0xFF

    def latch_count(self) -> None:
        """Keep the count for the next reads; one that is kept already stays."""
        if self.latched is None:
            self.latched = self.value

    def latch_status(self) -> None:
        """Keep the status for the next read; one that is kept already stays."""
        if self.latched_status is None:
            self.latched_status = (
                self.control
                | (STATUS_OUTPUT if self.output else 0)
                | (STATUS_NULL_COUNT if self.null_count else 0)
            )

    @property
    def value(self) -> int:
        """The counting element, as the guest reads it."""
        value = self._element()
        if self.control & BCD:
            value %= 10_000
            return sum(value // 10**i % 10 << 4 * i for i in range(4))
        return value & 0xFFFF

    def _element(self) -> int:
        if not self.count:
            return 0
        elapsed = self._elapsed(self.now)
        match self.mode:
            case 2:
                return self.count - elapsed % self.count
            case 3:  # counts down by two, twice a cycle, from an even number
                half = -(-self.count // 2)
                phase = elapsed % self.count
                return (self.count & ~1) - 2 * (phase if phase < half else phase - half)
            case _:
                return (self.count - elapsed) % self.modulus
