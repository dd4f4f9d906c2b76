"""Local APIC, the xAPIC of one processor (Intel SDM vol. 3A, chapter 11)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from kvmaio.device import Device
from kvmaio.registers import Access, Register

from .apic_bus import ALL, ApicBus, DeliveryMode, InterruptMessage, Receiver

__all__ = ["LocalApic", "Processor"]

COUNT_NS = 1  # the timer's clock before the divider: 1 GHz, as under KVM
SHORTEST_PERIOD_NS = 1000  # a shorter one would keep the host busy and the guest standing
LOWEST_VECTOR = 16  # those below are the processor's own

VERSION = 0x0005_0014  # 6 entries in the local vector table, version 0x14: integrated

SVR_ENABLE = 1 << 8

# Local vector table.
LVT = ("lvt_timer", "lvt_thermal", "lvt_performance", "lvt_lint0", "lvt_lint1", "lvt_error")
LVT_MASKED = 1 << 16
LVT_PERIODIC = 1 << 17
LVT_WRITABLE = 0x1_A7FF  # of LINT0 and LINT1; the others have fewer bits
LVT_TIMER_WRITABLE = 0x3_00FF
LVT_ERROR_WRITABLE = 0x1_00FF
LVT_OTHER_WRITABLE = 0x1_07FF
VIRTUAL_WIRE = DeliveryMode.EXTERNAL << 8  # LINT0 as a BIOS leaves it: the 8259A's interrupts

# Interrupt command register.
ICR_LOGICAL = 1 << 11
ICR_ASSERT = 1 << 14
ICR_LEVEL = 1 << 15
ICR_WRITABLE = 0xC_CFFF
TO_SELF, TO_ALL, TO_OTHERS = 1, 2, 3  # bits 19:18; with 0, the destination field counts

# Error status register.
SENT_ILLEGAL_VECTOR = 1 << 5
RECEIVED_ILLEGAL_VECTOR = 1 << 6

ISR, TMR, IRR, BITMAPS_END = 0x100, 0x180, 0x200, 0x280


class Processor(Protocol):
    """What a local APIC does to its processor beside interrupts."""

    def nmi(self) -> None:
        """Pend an NMI."""

    def init(self) -> None:
        """INIT."""

    def start_up(self, vector: int) -> None:
        """A start-up IPI; to be ignored unless INIT came before."""


class LocalApic(Device):
    """The local APIC of one processor, which sees it at 0xFEE00000.

    `irq` is the request to the processor's core: an interrupt waits that the
    priorities let through. The core answers with `acknowledge()` when it takes
    it. The core's CR8 is `take_cr8()`'s.

    LINT0 is connected to the 8259A and, on the boot processor, set up from the
    start as a BIOS would do it ("virtual wire"); LINT1 is for NMIs. Not
    modelled: x2APIC, TSC deadline, SMI, the arbitration of old, thermal and
    performance interrupts (their registers are there).

    Args:
        index: the APIC id, 0 to 254; 0 is the boot processor.
        bus: connects the APICs.

    Attributes:
        processor: what INIT, NMI and start-up IPIs go to.
        external: acknowledges an interrupt of the 8259A.
    """

    size = 0x1000

    id = Register(0x20, int, bits=32)
    version = Register(0x30, int, Access.R, bits=32, reset=VERSION)
    task_priority = Register(0x80, int, bits=32)
    priority = Register(0xA0, int, Access.R, bits=32)
    end_of_interrupt = Register(0xB0, int, Access.W, bits=32)
    logical_destination = Register(0xD0, int, bits=32)
    destination_format = Register(0xE0, int, bits=32, reset=0xFFFF_FFFF)
    spurious = Register(0xF0, int, bits=32, reset=0xFF)
    error_status = Register(0x280, int, bits=32)
    command = Register(0x300, int, bits=32)
    command_destination = Register(0x310, int, bits=32)
    lvt_timer = Register(0x320, int, bits=32, reset=LVT_MASKED)
    lvt_thermal = Register(0x330, int, bits=32, reset=LVT_MASKED)
    lvt_performance = Register(0x340, int, bits=32, reset=LVT_MASKED)
    lvt_lint0 = Register(0x350, int, bits=32, reset=LVT_MASKED)
    lvt_lint1 = Register(0x360, int, bits=32, reset=LVT_MASKED)
    lvt_error = Register(0x370, int, bits=32, reset=LVT_MASKED)
    initial_count = Register(0x380, int, bits=32)
    current_count = Register(0x390, int, Access.R, bits=32)
    divide = Register(0x3E0, int, bits=32)

    def __init__(self, index: int = 0, bus: ApicBus | None = None) -> None:
        self._index = index
        self._bus = bus or ApicBus()
        self._bus.apics.append(self)
        self.processor: Processor | None = None
        self.external: Callable[[], int] | None = None
        self._pins = [False, False]
        self._power_on()

    def _power_on(self) -> None:
        self.id = self._index << 24
        if self._index == 0:
            self.lvt_lint0 = VIRTUAL_WIRE
        self._requested = self._in_service = self._by_level = 0  # IRR, ISR, TMR
        self._errors = 0  # not yet in ESR
        self._counts_from_ns: int | None = None  # the timer; None while it stands

    # ---- the core's side -----------------------------------------------------------------

    def acknowledge(self) -> int:
        """The core takes the interrupt: its vector, and it is in service.

        The 8259A's comes first. When nothing is let through any more, that is
        the spurious vector.
        """
        self._catch_up()
        if self._external_waits and self.external is not None:
            return self.external()
        vector = self._deliverable()
        if vector is None:
            return self.spurious & 0xFF
        self._requested &= ~(1 << vector)
        self._in_service |= 1 << vector
        self.update()
        return vector

    def take_cr8(self, cr8: int) -> None:
        """The core's CR8 is the task priority's class."""
        if cr8 != self.task_priority >> 4:
            self.task_priority = cr8 << 4
            self.update()

    def reset_by_init(self) -> None:
        """As after power-on, but for the id (11.4.7.3)."""
        own = self.id
        self.reset()
        self.id = own
        self.update()

    def set_pin(self, number: int, level: bool) -> None:
        """Drive LINT0 or LINT1."""
        rises = level and not self._pins[number]
        self._pins[number] = level
        entry = self.lvt_lint1 if number else self.lvt_lint0
        if rises and not entry & LVT_MASKED:
            mode = DeliveryMode(entry >> 8 & 7)
            if mode is not DeliveryMode.EXTERNAL:
                self.receive(InterruptMessage(mode, entry & 0xFF))
        self.update()

    # ---- the bus's side ------------------------------------------------------------------

    def is_meant(self, destination: int, *, is_logical: bool) -> bool:
        if not is_logical:
            return destination in (ALL, self.id >> 24)
        mine = self.logical_destination >> 24
        if self.destination_format >> 28 == 0xF:
            return bool(mine & destination)  # flat: a bit each
        # Clusters: the upper half is the cluster's number, 15 all of them.
        return destination >> 4 in (mine >> 4, 0xF) and bool(mine & destination & 0xF)

    def receive(self, message: InterruptMessage) -> bool:
        processor = self.processor
        if message.mode in (DeliveryMode.FIXED, DeliveryMode.LOWEST_PRIORITY):
            return self._request(message.vector, is_level=message.is_level)
        if message.mode is DeliveryMode.INIT:
            self.reset_by_init()
        if processor is not None:
            match message.mode:
                case DeliveryMode.NMI:
                    processor.nmi()
                case DeliveryMode.INIT:
                    processor.init()
                case DeliveryMode.START_UP:
                    processor.start_up(message.vector)
        return True

    @property
    def processor_priority(self) -> int:
        highest = max(self._in_service.bit_length() - 1, 0)
        if self.task_priority >> 4 >= highest >> 4:
            return self.task_priority
        return highest & 0xF0

    def _request(self, vector: int, *, is_level: bool = False) -> bool:
        if not self._is_enabled:
            return False
        if vector < LOWEST_VECTOR:
            self._error(RECEIVED_ILLEGAL_VECTOR)
            return True
        bit = 1 << vector
        self._requested |= bit
        self._by_level = self._by_level | bit if is_level else self._by_level & ~bit
        self.update()
        return True

    # ---- requests ------------------------------------------------------------------------

    @property
    def _is_enabled(self) -> bool:
        return bool(self.spurious & SVR_ENABLE)

    @property
    def _external_waits(self) -> bool:
        entry = self.lvt_lint0
        is_external = entry >> 8 & 7 == DeliveryMode.EXTERNAL and not entry & LVT_MASKED
        return is_external and self._pins[0]

    def _deliverable(self) -> int | None:
        """The highest vector that waits, if it is of a higher class than what goes on."""
        vector = self._requested.bit_length() - 1
        if vector < 0 or not self._is_enabled:
            return None
        return vector if vector >> 4 > self.processor_priority >> 4 else None

    def update(self) -> None:
        self._catch_up()
        deadline_ns = self._next_interrupt()
        if deadline_ns is None:
            self.alarm.disarm()
        elif deadline_ns != self.alarm.deadline_ns:
            self.alarm.arm(deadline_ns)
        self.irq.set(self._external_waits or self._deliverable() is not None)

    def _error(self, error: int) -> None:
        is_new = not self._errors & error
        self._errors |= error
        if is_new and not self.lvt_error & LVT_MASKED:
            vector = self.lvt_error & 0xFF
            if vector >= LOWEST_VECTOR:  # else: the error's own vector is an error
                self._request(vector)

    # ---- the guest's side ----------------------------------------------------------------

    def read(self, offset: int, size: int) -> int | Awaitable[int]:
        if ISR <= offset < BITMAPS_END:
            bitmap, at = divmod(offset - ISR, TMR - ISR)
            bits = (self._in_service, self._by_level, self._requested)[bitmap]
            # 32 bits of each 16 bytes are there.
            word, skip = divmod(at, 16)
            return bits >> 32 * word & 0xFFFF_FFFF if skip == 0 else 0
        return super().read(offset, size)

    @id.on_write
    def write_id(self, value: int) -> None:
        self.id = value & 0xFF00_0000

    @task_priority.on_write
    def write_task_priority(self, value: int) -> None:
        self.task_priority = value & 0xFF

    @priority.on_read
    def read_priority(self) -> int:
        return self.processor_priority

    @end_of_interrupt.on_write
    def end_interrupt(self, value: int) -> None:
        vector = self._in_service.bit_length() - 1
        if vector < 0:
            return
        self._in_service &= ~(1 << vector)
        if self._by_level & 1 << vector:
            self._bus.end_of_interrupt(vector)

    @logical_destination.on_write
    def write_logical_destination(self, value: int) -> None:
        self.logical_destination = value & 0xFF00_0000

    @destination_format.on_write
    def write_destination_format(self, value: int) -> None:
        self.destination_format = value | 0x0FFF_FFFF

    @spurious.on_write
    def write_spurious(self, value: int) -> None:
        self._catch_up()
        self.spurious = value & 0x3FF
        if not self._is_enabled:  # then the local vector table is masked (11.4.7.2)
            for name in LVT:
                setattr(self, name, getattr(self, name) | LVT_MASKED)

    @error_status.on_write
    def write_error_status(self, value: int) -> None:
        self.error_status, self._errors = self._errors, 0

    @command_destination.on_write
    def write_command_destination(self, value: int) -> None:
        self.command_destination = value & 0xFF00_0000

    @command.on_write
    def send(self, command: int) -> None:
        self.command = command & ICR_WRITABLE
        mode = DeliveryMode(command >> 8 & 7)
        vector = command & 0xFF
        if mode in (DeliveryMode.RESERVED, DeliveryMode.SMI, DeliveryMode.EXTERNAL):
            return
        if mode is DeliveryMode.INIT and command & ICR_LEVEL and not command & ICR_ASSERT:
            return  # "INIT level de-assert": an order to arbiters that are no more
        is_fixed = mode in (DeliveryMode.FIXED, DeliveryMode.LOWEST_PRIORITY)
        if is_fixed and vector < LOWEST_VECTOR:
            self._error(SENT_ILLEGAL_VECTOR)
            return
        self._bus.send_to(self._receivers(command), InterruptMessage(mode, vector))

    def _receivers(self, command: int) -> list[Receiver]:
        shorthand = command >> 18 & 3
        if shorthand == TO_SELF:
            return [self]
        if shorthand == TO_ALL:
            return self._bus.apics
        if shorthand == TO_OTHERS:
            return [apic for apic in self._bus.apics if apic is not self]
        return self._bus.meant(self.command_destination >> 24, bool(command & ICR_LOGICAL))

    @lvt_timer.on_write
    def write_lvt_timer(self, value: int) -> None:
        self._catch_up()  # what was due was due under the old entry
        self._write_lvt("lvt_timer", value & LVT_TIMER_WRITABLE)

    @lvt_thermal.on_write
    def write_lvt_thermal(self, value: int) -> None:
        self._write_lvt("lvt_thermal", value & LVT_OTHER_WRITABLE)

    @lvt_performance.on_write
    def write_lvt_performance(self, value: int) -> None:
        self._write_lvt("lvt_performance", value & LVT_OTHER_WRITABLE)

    @lvt_lint0.on_write
    def write_lvt_lint0(self, value: int) -> None:
        self._write_lvt("lvt_lint0", value & LVT_WRITABLE)

    @lvt_lint1.on_write
    def write_lvt_lint1(self, value: int) -> None:
        self._write_lvt("lvt_lint1", value & LVT_WRITABLE)

    @lvt_error.on_write
    def write_lvt_error(self, value: int) -> None:
        self._write_lvt("lvt_error", value & LVT_ERROR_WRITABLE)

    def _write_lvt(self, name: str, value: int) -> None:
        setattr(self, name, value if self._is_enabled else value | LVT_MASKED)

    # ---- the timer -----------------------------------------------------------------------

    @initial_count.on_write
    def start_timer(self, count: int) -> None:
        self._catch_up()
        self.initial_count = count
        self._counts_from_ns = self.clock.now_ns if count else None

    @current_count.on_read
    def read_current_count(self) -> int:
        self._catch_up()
        if self._counts_from_ns is None:
            return 0
        elapsed_ns = self.clock.now_ns - self._counts_from_ns
        return self.initial_count - elapsed_ns // self._tick_ns

    @divide.on_write
    def write_divide(self, value: int) -> None:
        count = self.read_current_count()
        self.divide = value & 0xB
        if self._counts_from_ns is not None:
            counted = self.initial_count - count
            self._counts_from_ns = self.clock.now_ns - counted * self._tick_ns

    async def run(self) -> None:
        self.update()
        async for _ in self.alarm:
            self.update()

    @property
    def _tick_ns(self) -> int:
        """Bits 3, 1 and 0: 2, 4, 8, 16, 32, 64, 128, and 1."""
        power = (self.divide >> 1 & 4 | self.divide & 3) + 1
        return COUNT_NS << power % 8

    def _catch_up(self) -> None:
        """Find out whether the timer has run down since the last look."""
        now_ns = self.clock.now_ns
        if self._counts_from_ns is None:
            return
        periods = (now_ns - self._counts_from_ns) // (self.initial_count * self._tick_ns)
        if periods <= 0:
            return
        if self.lvt_timer & LVT_PERIODIC:
            self._counts_from_ns += periods * self.initial_count * self._tick_ns  # no drift
        else:
            self._counts_from_ns = None
        vector = self.lvt_timer & 0xFF
        if not self.lvt_timer & LVT_MASKED and self._is_enabled:
            if vector >= LOWEST_VECTOR:
                self._requested |= 1 << vector
                self._by_level &= ~(1 << vector)
            else:
                self._errors |= RECEIVED_ILLEGAL_VECTOR

    def _next_interrupt(self) -> int | None:
        """When the timer's next interrupt is due.

        None also while the last one waits, as it could not be told from another.
        """
        entry = self.lvt_timer
        vector = entry & 0xFF
        waits = self._requested & 1 << vector
        if self._counts_from_ns is None or entry & LVT_MASKED or waits or vector < LOWEST_VECTOR:
            return None
        period_ns = self.initial_count * self._tick_ns
        if entry & LVT_PERIODIC:
            period_ns *= -(-SHORTEST_PERIOD_NS // period_ns)
        return self._counts_from_ns + period_ns

    # ---- reset and checkpoints -----------------------------------------------------------

    def reset(self) -> None:
        super().reset()
        self._power_on()  # the pins' levels are those of others

    def save(self) -> dict[str, Any]:
        self._catch_up()
        counts_from_ns = self._counts_from_ns
        return {
            "requested": self._requested,
            "in_service": self._in_service,
            "by_level": self._by_level,
            "errors": self._errors,
            "pins": list(self._pins),
            "counted_ns": None if counts_from_ns is None else self.clock.now_ns - counts_from_ns,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._requested = state["requested"]
        self._in_service = state["in_service"]
        self._by_level = state["by_level"]
        self._errors = state["errors"]
        self._pins = list(state["pins"])
        counted_ns = state["counted_ns"]
        self._counts_from_ns = None if counted_ns is None else self.clock.now_ns - counted_ns
