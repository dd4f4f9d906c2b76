"""`Entry`: one vCPU's way into its guest and back: sync, inject, run, account.

It knows no states: the vCPU (`vcpu/vcpu.py`) decides when to enter, and hears of each end.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from ..access_burst import AccessBurst
from ..cpu import CpuModel, EntryResult
from ..errors import ConfigurationError
from ..stats import CpuStatistics
from .instruction_events import InstructionEvents
from .interrupts import Interrupts
from .registers_sync import Newer, SyncedContext

__all__ = ["Entry"]

HOST_HZ = 2_000_000_000
"""The host clock that turns measured CPU time into host cycles (gem5's default hostFreq)."""

MAX_ACCESS_PIECES = 1 << 16
"""KVM splits one instruction's access into a few pieces, but REP OUTS into one per element."""

RFLAGS_IF = 1 << 9

DRAIN_STEP_NS = 1_000_000
"""How long a draining guest may run at a time to take an event that is injected (gem5's)."""

# Names of the module's own: an enum's member costs a look-up on the hot path.
_EXIT = EntryResult.EXIT
_CONTEXT = Newer.CONTEXT
_MODEL = Newer.MODEL


class Entry:
    """Enters the guest of one vCPU.

    Attributes:
        registers: the engine's copy of them.
        interrupts: what waits to be delivered.
        events: instruction counts that somebody waits for, or None.
        on_injection: called with each vector that is injected, None for an NMI.
        host_factor: guest time for executed host time.
        inside: the model is in the guest, or its result is not yet taken.
        page_is_stale: the state was replaced, and the run page tells of the one before.
        count_exit: counts the exit that has come; must the next entry complete it?
        on_end: told how each entry ended.
    """

    def __init__(
        self,
        model: CpuModel,
        stats: CpuStatistics,
        *,
        host_factor: float,
        clock_hz: int,
        count_exit: Callable[[], bool],
        on_end: Callable[[EntryResult], None],
    ) -> None:
        self.model = model
        self.stats = stats
        self.registers = SyncedContext(model)
        self.interrupts = Interrupts()
        self.events: InstructionEvents | None = None
        self.on_injection: Callable[[int | None], None] | None = None
        self.inside = False
        self.count_exit = count_exit
        self.on_end = on_end
        self.host_factor = host_factor
        hz = getattr(model, "host_hz", HOST_HZ)  # a model's own clock, where it has one
        self._milli_cycles_per_us = int(hz * host_factor) // 1000
        self._counts = model.counts_instructions
        self._period_ns = max(1, 1_000_000_000 // clock_hz)
        self._executed_ns = 0  # host time of the last entry
        self._booked_cycles = 0  # of the entry under way
        self._was_half = False
        self._injects = True
        self.page_is_stale = False
        self._awaited = False  # somebody waits for the end of the entry
        self._leave_waiters: list[asyncio.Future[None]] = []

    def use_model(self, model: CpuModel) -> None:
        """Enter the guest by `model` from now on, which has been given the registers."""
        self.model = model
        self._counts = model.counts_instructions
        self.registers.use_model(model)
        if self.events is not None:
            self.events.fail(ConfigurationError("another CPU model has taken over meanwhile"))
            self.events = None

    @property
    def ticks(self) -> int:
        """Guest nanoseconds executed by the last entry; a half entry takes one clock period."""
        return self._period_ns if self._was_half else int(self._executed_ns * self.host_factor)

    def limit_ns(self, ticks: int | None) -> int | None:
        """The host time for a run of `ticks` guest nanoseconds: what the run timer can keep."""
        if not ticks:
            return ticks
        if ticks < 0:
            raise ConfigurationError(f"a run of {ticks} ticks: 0 or more")
        return max(self.model.resolution_ns, math.ceil(ticks / self.host_factor))

    # ---- entering -------------------------------------------------------------------

    async def enter(self, limit_ns: int | None) -> EntryResult:
        """One entry, from its beginning to its end."""
        result = self.begin(limit_ns)
        return await self.arrival() if result is None else result

    async def drain(self) -> EntryResult | None:
        """One step towards rest: how it ended, or None if nothing is left to do.

        Completes a pending access; or lets the guest run a little to take an event
        that is injected into it already. Injects nothing new.
        """
        registers = self.registers
        if registers.access_pending:
            if registers.newer is _CONTEXT:
                result = self._push_registers()
                return EntryResult.INTERRUPTED if result is None else result
            result = self.model.half_entry()
            registers.entered()
            return self._account(result, half=True)
        if registers.newer is _CONTEXT:
            registers.push()
        if not self.model.has_injected_event():
            return None
        self.model.page.request_interrupt_window = 1
        self.interrupts.window_requested = True  # an ordinary entry takes it back
        self._injects = False
        try:
            begun = self.begin(DRAIN_STEP_NS)
        finally:
            self._injects = True
        return await self.arrival() if begun is None else begun

    def begin(self, limit_ns: int | None) -> EntryResult | None:
        """Begin an entry: its result if it is over already, else await `arrival()`."""
        registers = self.registers
        if registers.newer is _CONTEXT or self.interrupts.need_attention:
            result = self._prepare()
            if result is not None:
                return result
        if self.events is not None:
            if self.events.fired:
                return EntryResult.INTERRUPTED  # who waited has a turn first
            limit_ns = self.events.before_entry(limit_ns, registers.access_pending)
        self._was_half = limit_ns == 0
        try:
            result = self.model.enter(limit_ns)
        finally:
            # Also when the entry failed: the guest may have run before that. As `entered()` does,
            # without a call.
            registers.newer = _MODEL
            registers.access_pending = False
        return self._begun(result)

    def _begun(self, result: EntryResult | None) -> EntryResult | None:
        if result is None:
            self.inside = True
            self._booked_cycles = 0  # also where the entry before ended by an error
            self.registers.locked = _LOCKED
            return None
        return self._account(result, half=self._was_half)

    def end_burst(self, burst: AccessBurst) -> EntryResult | None:
        """An entry of `burst` did not end with a plain access; as `begin()`."""
        self._was_half = False
        try:
            result = burst.end()
        finally:
            self.registers.entered()
        return self._begun(result)

    def executed(self, last_ns: int) -> None:
        """An entry of a burst has ended with an access: so long was it, in host time."""
        self._executed_ns, self._was_half = last_ns, False

    def book_burst(self, burst: AccessBurst) -> None:
        """Book what its entries that ended with accesses have executed and is not booked yet."""
        self.executed(burst.executed_ns)
        stats = self.stats
        ports, mmio = burst.take_counts()
        stats.numVMExits += ports + mmio
        stats.numIO += ports
        stats.numMMIO += mmio
        stats.numCycles += burst.take_ns() * self._milli_cycles_per_us // 1_000_000
        if self._counts:
            self._book_instructions()

    def progressed(self, executed_ns: int) -> None:
        """Book what the entry under way has come to so far, in host time."""
        cycles = executed_ns * self._milli_cycles_per_us // 1_000_000
        self.stats.numCycles += cycles - self._booked_cycles
        self._booked_cycles = cycles
        if self._counts:
            self._book_instructions()

    def _book_instructions(self) -> None:
        instructions = self.model.instructions
        self.stats.numInsts = self.stats.totalInsts = self.stats.ctrInsts = instructions

    async def arrival(self) -> EntryResult:
        """Wait for the end of the entry that `begin()` began."""
        cancelled: asyncio.CancelledError | None = None
        self._awaited = True
        try:
            while True:
                try:
                    result = await self.model.left()
                    break
                except asyncio.CancelledError as error:
                    # Nobody may walk away from a guest that still runs: end the entry first.
                    cancelled = error
                    self.model.kick_run()
        finally:
            self.inside = self._awaited = False
            self.registers.locked = None
            if self._leave_waiters:
                self._tell_leave_waiters()
        result = self._account(result, half=self._was_half)
        if cancelled is not None:
            raise cancelled
        return result

    async def left(self) -> None:
        """Wait until the guest has been left."""
        while self.inside:
            if not self._awaited:  # an exception kept whoever began the entry from waiting for it
                await self.arrival()
                continue
            waiter = asyncio.get_running_loop().create_future()
            self._leave_waiters.append(waiter)
            await waiter

    def _tell_leave_waiters(self) -> None:
        waiters, self._leave_waiters = self._leave_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # ---- before and after -------------------------------------------------------------

    def _prepare(self) -> EntryResult | None:
        """Sync and inject. A result means that completing an access led to another exit."""
        if self.registers.newer is _CONTEXT and (result := self._push_registers()) is not None:
            return result
        if self.interrupts.need_attention and self._injects:
            self._inject()
        return None

    def _push_registers(self) -> EntryResult | None:
        registers = self.registers
        if registers.access_pending:
            # Completed first, or pushing the registers would lose the data of a pending read.
            result = self.model.half_entry()
            if self.events is not None:
                result = self.events.after_entry(result)
            if result is _EXIT:
                registers.access_continued()
                return self._account(result, half=True, counted=True)
            self._count_half_entry()
            registers.access_pending = False
        registers.push()
        return None

    def _inject(self) -> None:
        """At most one per entry; what the guest cannot take yet asks for a window."""
        interrupts, model = self.interrupts, self.model
        page = model.page
        stale, self.page_is_stale = self.page_is_stale, False
        if stale and not self.registers.access_pending:  # which is of an entry since then
            model.half_entry()  # it then tells whether the guest takes interrupts
            self._count_half_entry()
        page.request_interrupt_window = 0
        interrupts.window_requested = False
        delivered = self.stats.numInterrupts
        if interrupts.nmi:
            interrupts.nmi = False
            model.nmi()
            self._injected(None)
        elif model.has_lapic:  # which queues them itself, and KVM then gives no window
            while interrupts.maskable:
                self._interrupt(interrupts.take())
        elif interrupts.maskable and page.ready_for_interrupt_injection and self.takes_interrupts:
            self._interrupt(interrupts.take())
        if interrupts.maskable:
            page.request_interrupt_window = 1
            interrupts.window_requested = True
        if self.events is not None and self.stats.numInterrupts != delivered:
            self.events.interrupted()

    def _interrupt(self, vector: int) -> None:
        self.model.interrupt(vector)
        self._injected(vector)

    def _injected(self, vector: int | None) -> None:
        self.stats.numInterrupts += 1
        if self.on_injection is not None:
            self.on_injection(vector)

    @property
    def takes_interrupts(self) -> bool:
        """IF; the run page's copy is of the last exit, and somebody may have edited it since."""
        if self.inside or self.registers.newer is Newer.MODEL:
            return bool(self.model.page.if_flag)
        return bool(self.registers.get().rflags & RFLAGS_IF)

    def _account(self, result: EntryResult, *, half: bool, counted: bool = False) -> EntryResult:
        """Book the entry that has just ended; returns its result."""
        if self.events is not None and not counted:
            result = self.events.after_entry(result)
        stats = self.stats
        stats.numVMExits += 1
        self._executed_ns = executed_ns = self.model.executed_ns
        self._was_half = half
        if half:
            stats.numVMHalfEntries += 1
        stats.numCycles += executed_ns * self._milli_cycles_per_us // 1_000_000
        if self._booked_cycles:
            stats.numCycles -= self._booked_cycles
            self._booked_cycles = 0
        if self._counts:
            stats.numInsts = stats.totalInsts = stats.ctrInsts = self.model.instructions
        if result is _EXIT:
            # From now on, served or not: pushing registers first would lose the data of a read.
            self.registers.access_pending = self.count_exit()
        else:
            stats.numExitSignal += 1
        self.on_end(result)
        return result

    def _count_half_entry(self) -> None:
        self.stats.numVMExits += 1
        self.stats.numVMHalfEntries += 1

    def recount(self, count: int | None) -> None:
        """The guest is where it had executed `count` instructions, None if that is unknown; 0
        after a reset.
        """
        self.model.recount(count)
        if self.events is not None:
            self.events.resume_at(count)
        # A count that nobody goes on with is told as unknown by the next entry.
        self._counts = self.model.counts_instructions or (bool(count) and self.events is None)

    # ---- the model's registers ----------------------------------------------------------

    def lend_registers(self, model: CpuModel) -> None:
        """`model` has them now, and is in the middle of an access: edits wait for its end."""
        registers = self.registers
        registers.use_model(model)
        if registers.newer is not _CONTEXT:  # as edited in the access before this one
            registers.newer = _MODEL
        registers.access_pending = True

    def take_registers_back(self) -> None:
        """The access of the model they were lent to is over; what was edited goes to that."""
        registers = self.registers
        registers.access_pending = False
        if registers.newer is _CONTEXT:
            registers.push()
        registers.use_model(self.model)
        registers.entered()

    def assisted(self, instructions: int) -> None:
        """Another model has executed so many of the guest's instructions."""
        if self.events is not None:
            self.events.executed_elsewhere(instructions)

    def abandon_access(self) -> None:
        """Have KVM forget a pending access, or it would write its data into a new state."""
        pieces = 0
        while self.registers.access_pending and pieces < MAX_ACCESS_PIECES:
            self.registers.access_pending = self.model.half_entry() is _EXIT
            self._count_half_entry()
            pieces += 1
        self.registers.access_pending = False

    def push_registers(self) -> None:
        """Bring the model's registers up to date, for somebody who looks at the model."""
        registers = self.registers
        registers.check_accessible()
        if registers.newer is _CONTEXT and not registers.access_pending:
            registers.push()


_LOCKED = "the guest is running; wait for run() to end before looking at its registers"
