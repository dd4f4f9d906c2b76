"""NS16550A serial port (National Semiconductor PC16550D, 1995; TI TL16C550C, SLLS177)."""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import Awaitable
from typing import Any

from kvmaio.registers import Access, Register

from .connections import Receive
from .console import HISTORY, Console

__all__ = ["Fcr", "Ier", "Iir", "Lcr", "Lsr", "Mcr", "Msr", "Uart16550"]

FIFO_SIZE = 16
TRIGGER_LEVELS = (1, 4, 8, 14)  # FCR bits 7:6
FASTEST_BAUD = 115_200  # a PC's 1.8432 MHz crystal / 16


class Ier(enum.IntFlag):
    """Interrupt enable."""

    RECEIVED_DATA = 0x01
    TRANSMITTER_EMPTY = 0x02
    LINE_STATUS = 0x04
    MODEM_STATUS = 0x08


class Iir(enum.IntEnum):
    """Interrupt identification, bits 3:0; here in the order of their priority."""

    LINE_STATUS = 0x06
    RECEIVED_DATA = 0x04
    CHARACTER_TIMEOUT = 0x0C
    TRANSMITTER_EMPTY = 0x02
    MODEM_STATUS = 0x00
    NONE = 0x01


IIR_FIFOS_ENABLED = 0xC0


class Fcr(enum.IntFlag):
    """FIFO control; the trigger level is in bits 7:6."""

    ENABLE = 0x01
    CLEAR_RECEIVER = 0x02
    CLEAR_TRANSMITTER = 0x04


class Lcr(enum.IntFlag):
    """Line control; the word length less 5 is in bits 1:0."""

    TWO_STOP_BITS = 0x04
    PARITY = 0x08
    BREAK = 0x40
    DLAB = 0x80


class Mcr(enum.IntFlag):
    """Modem control."""

    DTR = 0x01
    RTS = 0x02
    OUT1 = 0x04
    OUT2 = 0x08
    LOOP = 0x10


class Lsr(enum.IntFlag):
    """Line status."""

    DATA_READY = 0x01
    OVERRUN = 0x02
    PARITY_ERROR = 0x04
    FRAMING_ERROR = 0x08
    BREAK = 0x10
    HOLDING_EMPTY = 0x20
    TRANSMITTER_EMPTY = 0x40
    ERROR_IN_FIFO = 0x80


class Msr(enum.IntFlag):
    """Modem status: four changes since the last read, and the four lines."""

    DCTS = 0x01
    DDSR = 0x02
    TERI = 0x04
    DDCD = 0x08
    CTS = 0x10
    DSR = 0x20
    RI = 0x40
    DCD = 0x80


NO_ERRORS = Lsr(0)
CHARACTER_ERRORS = Lsr.PARITY_ERROR | Lsr.FRAMING_ERROR | Lsr.BREAK
LINE_ERRORS = CHARACTER_ERRORS | Lsr.OVERRUN
CHANGES = Msr.DCTS | Msr.DDSR | Msr.TERI | Msr.DDCD
LOOP = int(Mcr.LOOP)
IDLE = int(Lsr.HOLDING_EMPTY | Lsr.TRANSMITTER_EMPTY)
READY = Msr.CTS | Msr.DSR | Msr.DCD  # a peer that is switched on
# The loopback wiring: an output of MCR -> the line of MSR that follows it.
LOOPBACK = ((Mcr.RTS, Msr.CTS), (Mcr.DTR, Msr.DSR), (Mcr.OUT1, Msr.RI), (Mcr.OUT2, Msr.DCD))


def _dlab(uart: Uart16550) -> bool:
    return bool(int(uart.lcr) & 0x80)


def _no_dlab(uart: Uart16550) -> bool:
    return not int(uart.lcr) & 0x80


class Uart16550(Console):
    """NS16550A serial port with FIFOs; see `Console` for what it prints to.

    Transmission takes no time: a byte written to THR is out, and THR empty
    again, at once; only a slow peer can delay it. Reception has no rate
    either, but the character timeout follows the programmed format. The word
    length changes times only, a sent break is not passed on, and DMA mode and
    stick parity have no effect.

    The interrupt goes through OUT2, as on a PC: with OUT2 off, or in
    loopback, which forces the outputs off, IIR tells of interrupts but the
    line stays low.

    Attributes:
        intake: takes what the connections bring, instead of `send()`; see `kvmaio.replay`.
    """

    size = 8

    rbr = Register(0, int, Access.R, when=_no_dlab)
    # Not posted: each write ends in a transmitter-empty interrupt, and in
    # loopback in received data; a guest halted until then would wait for ever
    # if its write sat in a batch.
    thr = Register(0, int, Access.W, when=_no_dlab)
    ier = Register(1, Ier, when=_no_dlab)
    dll = Register(0, int, reset=12, when=_dlab)  # 9600 baud
    dlm = Register(1, int, when=_dlab)
    iir = Register(2, int, Access.R, reset=Iir.NONE)
    fcr = Register(2, Fcr, Access.W)
    lcr = Register(3, Lcr)
    mcr = Register(4, Mcr)
    lsr = Register(5, Lsr, Access.R, reset=Lsr.HOLDING_EMPTY | Lsr.TRANSMITTER_EMPTY)
    msr = Register(6, Msr, Access.R, reset=READY)
    scr = Register(7, int)

    def __init__(self, *, history: int = HISTORY) -> None:
        super().__init__(history=history)
        self._fifo: deque[tuple[int, Lsr]] = deque()  # byte and its errors, oldest first
        self._modem_inputs = READY
        self._line_errors = Lsr(0)
        self._modem_changes = Msr(0)
        self._thr_empty_pending = False  # the interrupt; reading IIR takes it back
        self._timed_out = False
        self._sending = 0  # writes to THR that wait for a peer
        self._room = asyncio.Event()
        self._turn = asyncio.Lock()
        self.intake: Receive | None = None

    # What a user does with it

    @property
    def baud(self) -> int:
        """The programmed rate in bits per second; 0 with a divisor of 0."""
        divisor = self.dlm << 8 | self.dll
        return FASTEST_BAUD // divisor if divisor else 0

    async def send(self, data: bytes | str) -> None:
        """Send `data` into the receiver, waiting whenever it is full; str goes as UTF-8.

        During loopback the receiver is cut off from the line, so it waits
        then too. Several senders take turns. If cancelled, the bytes that
        were taken so far stay in the receiver.
        """
        if isinstance(data, str):
            data = data.encode()
        async with self._turn:
            sent = 0
            while sent < len(data):
                room = 0 if Mcr.LOOP in self.mcr else self._capacity - len(self._fifo)
                if room <= 0:
                    self._room.clear()
                    await self._room.wait()
                    continue
                for byte in data[sent : sent + room]:
                    self._take(byte)
                sent += room
                self.update()

    def receive(self, byte: int, errors: Lsr = NO_ERRORS) -> None:
        """One character arrives whether there is room or not, perhaps with errors.

        Args:
            errors: PARITY_ERROR, FRAMING_ERROR or BREAK.
        """
        if Mcr.LOOP not in self.mcr:
            self._take(byte & 0xFF, errors & CHARACTER_ERRORS)
            self.update()

    def receive_break(self) -> None:
        """The line is held low for longer than a character."""
        self.receive(0, Lsr.BREAK | Lsr.FRAMING_ERROR)

    def set_modem_lines(self, lines: Msr) -> None:
        """The peer drives CTS, DSR, RI and DCD; at first all but RI are on."""
        self._modem_inputs = lines & ~CHANGES
        self.update()

    def _receiver(self) -> Receive:
        return self._incoming

    async def _incoming(self, data: bytes) -> None:
        await (self.send if self.intake is None else self.intake)(data)

    # What the guest does with it

    @rbr.on_read
    def take_received(self) -> int:
        byte = 0
        if self._fifo:
            byte, _ = self._fifo.popleft()
            self._top_changed()
        self._timed_out = False
        self._start_timeout()
        self._room.set()
        self.update()
        return byte

    @thr.on_write
    def transmit(self, byte: int) -> Awaitable[None] | None:
        if self._thr_empty_pending:
            self._thr_empty_pending = False
            if self.irq.level:
                self.update()  # the line falls before it rises again: an edge for the PIC
        if int(self.mcr) & LOOP:
            self._take(byte)
        elif (pending := self.emit(bytes((byte,)))) is not None:
            return self._finish_sending(pending)
        self._thr_empty_pending = True
        return None

    @ier.on_write
    def enable_interrupts(self, ier: Ier) -> None:
        rising = ier & ~self.ier
        self.ier = ier & Ier(0x0F)
        if Ier.TRANSMITTER_EMPTY in rising and not self._sending:
            self._thr_empty_pending = True

    @iir.on_read
    def identify_interrupt(self) -> int:
        iir = self.iir
        if iir & 0x0F == Iir.TRANSMITTER_EMPTY:
            self._thr_empty_pending = False
            self.update()
        return iir

    @fcr.on_write
    def control_fifos(self, fcr: Fcr) -> None:
        # The other bits count only together with ENABLE, and a change of ENABLE clears both.
        if Fcr.ENABLE not in fcr:
            fcr = Fcr(0)
        if Fcr.CLEAR_RECEIVER in fcr or Fcr.ENABLE in fcr ^ self.fcr:
            self._fifo.clear()
            self._timed_out = False
            self.alarm.disarm()
            self._room.set()
        self.fcr = fcr & Fcr(0xF9)  # the two clear bits are commands

    @mcr.on_write
    def control_modem(self, mcr: Mcr) -> None:
        self.mcr = mcr & Mcr(0x1F)
        self._room.set()

    @lsr.on_read
    def read_line_status(self) -> int:
        lsr = self.lsr
        if self._line_errors:
            self._line_errors = Lsr(0)
            self.update()
        return lsr

    @msr.on_read
    def read_modem_status(self) -> int:
        msr = self.msr
        if self._modem_changes:
            self._modem_changes = Msr(0)
            self.update()
        return msr

    # What it does by itself

    async def run(self) -> None:
        async for _ in self.alarm:
            self._timed_out = bool(self._fifo)
            self.update()

    def update(self) -> None:
        # Numbers, not flags, and nothing stored that is the same: this runs with every access.
        lines = self._modem_lines()
        if int(self.msr) != int(lines) | int(self._modem_changes):
            self._modem_changes |= _changes(self.msr, lines)
            self.msr = lines | self._modem_changes
        if (lsr := self._line_status()) != self.lsr:
            self.lsr = Lsr(lsr)
        interrupt = self._interrupt() if self.ier else Iir.NONE
        self.iir = int(interrupt) | (IIR_FIFOS_ENABLED if self._fifos_enabled else 0)
        self.irq.set(
            interrupt is not Iir.NONE and Mcr.OUT2 in self.mcr and Mcr.LOOP not in self.mcr
        )

    def reset(self) -> None:
        super().reset()
        self._fifo.clear()
        self._line_errors = Lsr(0)
        self._modem_changes = Msr(0)
        self.msr = self._modem_inputs
        self._thr_empty_pending = False
        self._timed_out = False
        self._room.set()

    def save(self) -> dict[str, Any]:
        return {
            "fifo": [[byte, int(errors)] for byte, errors in self._fifo],
            "line_errors": int(self._line_errors),
            "modem_changes": int(self._modem_changes),
            "modem_inputs": int(self._modem_inputs),
            "thr_empty_pending": self._thr_empty_pending,
            "timed_out": self._timed_out,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._fifo = deque((byte, Lsr(errors)) for byte, errors in state["fifo"])
        self._line_errors = Lsr(state["line_errors"])
        self._modem_changes = Msr(state["modem_changes"])
        self._modem_inputs = Msr(state["modem_inputs"])
        self._thr_empty_pending = state["thr_empty_pending"]
        self._timed_out = state["timed_out"]
        self._room.set()

    # Derived

    @property
    def _fifos_enabled(self) -> bool:
        return bool(int(self.fcr) & 1)

    @property
    def _capacity(self) -> int:
        return FIFO_SIZE if self._fifos_enabled else 1

    @property
    def _trigger_level(self) -> int:
        return TRIGGER_LEVELS[self.fcr >> 6] if self._fifos_enabled else 1

    @property
    def _character_ns(self) -> int:
        """How long a character takes on the line, in nanoseconds."""
        bits = (
            1 + 5 + (self.lcr & 3) + (Lcr.PARITY in self.lcr) + 1 + (Lcr.TWO_STOP_BITS in self.lcr)
        )
        divisor = self.dlm << 8 | self.dll
        return bits * max(divisor, 1) * 1_000_000_000 // FASTEST_BAUD

    def _interrupt(self) -> Iir:
        """The enabled interrupt of the highest priority."""
        if self._line_errors and Ier.LINE_STATUS in self.ier:
            return Iir.LINE_STATUS
        if self._fifo and Ier.RECEIVED_DATA in self.ier:
            if len(self._fifo) >= self._trigger_level:
                return Iir.RECEIVED_DATA
            if self._timed_out:
                return Iir.CHARACTER_TIMEOUT
        if self._thr_empty_pending and Ier.TRANSMITTER_EMPTY in self.ier:
            return Iir.TRANSMITTER_EMPTY
        if self._modem_changes and Ier.MODEM_STATUS in self.ier:
            return Iir.MODEM_STATUS
        return Iir.NONE

    def _line_status(self) -> int:
        lsr = int(self._line_errors) | (0 if self._sending else IDLE)
        if self._fifo:
            lsr |= Lsr.DATA_READY
        if self._fifos_enabled:
            broken = self._line_errors and CHARACTER_ERRORS & self._line_errors
            if broken or any(errors for _, errors in self._fifo):
                lsr |= Lsr.ERROR_IN_FIFO
        return lsr

    def _modem_lines(self) -> Msr:
        if not int(self.mcr) & LOOP:
            return self._modem_inputs
        lines = Msr(0)
        for output, line in LOOPBACK:
            if output in self.mcr:
                lines |= line
        return lines

    # Steps that several of the above share

    def _take(self, byte: int, errors: Lsr = NO_ERRORS) -> None:
        """A character has come into the shift register."""
        if len(self._fifo) >= self._capacity:
            self._line_errors |= Lsr.OVERRUN
            if self._fifos_enabled:
                return  # the new character is lost; without FIFOs the old one is
            self._fifo.clear()
        self._fifo.append((byte, errors))
        if len(self._fifo) == 1:
            self._top_changed()
        self._start_timeout()

    def _top_changed(self) -> None:
        """A character's errors show in LSR when it becomes the next one to be read."""
        if self._fifo:
            byte, errors = self._fifo[0]
            if errors:
                self._line_errors |= errors
                self._fifo[0] = (byte, Lsr(0))

    def _start_timeout(self) -> None:
        """Characters that wait for four times a character's time are reported."""
        if self._fifo and self._fifos_enabled:
            self.alarm.arm(self.clock.now_ns + 4 * self._character_ns)
        else:
            self.alarm.disarm()

    async def _finish_sending(self, pending: Awaitable[None]) -> None:
        self._sending += 1
        self.update()
        try:
            await pending
        finally:
            self._sending -= 1
            self._thr_empty_pending = self._sending == 0
            self.update()


def _changes(old: Msr, new: Msr) -> Msr:
    """The delta bits for a change of the lines; RI counts when it ends."""
    changes = Msr(int(old ^ new) >> 4 & int(Msr.DCTS | Msr.DDSR | Msr.DDCD))
    if Msr.RI in old and Msr.RI not in new:
        changes |= Msr.TERI
    return changes
