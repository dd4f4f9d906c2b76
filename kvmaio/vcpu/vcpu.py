"""`VCpu`: the state machine of one virtual CPU and its run loop.

The states and transitions are gem5's (`BaseKvmCPU`)::

                  activate                        exit
       IDLE ─────────────────► RUNNING ─────────────────► RUNNING_SERVICE
        ▲  ◄────────────────────  ▲ │ kick, timer                 │
        │   suspend, halt         │ └──► RUNNING                  │ served
        │                         │                               ▼
        │                         ├───────────────────── (plain exits)
        │                         │ entered
        │   suspend               │
        └──────────── RUNNING_SERVICE_COMPLETION ◄─────── (I/O and MMIO)
                                  │       ▲
                 handler suspends ▼       │ handler answers
                          RUNNING_MMIO_PENDING

This module, with `at_rest` and `burst`, is the only place that changes a vCPU's state.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import attrs

from ..bus import Bus
from ..clock import Clock
from ..cpu import Context, CpuModel, CpuState, EntryResult
from ..decode import decode
from ..errors import ConfigurationError, GuestError
from ..exits import DebugEventExit, EndRun, InterruptedExit, VmExit
from ..stats import CpuStatistics
from ..suspension import (
    ENDS_THE_LOOP,
    Suspended,
    foreign_cancellation,
    is_own_cancellation,
    stopped_iteration,
)
from .at_rest import CLOSED
from .burst import CLOSED_FLAG, BurstingVCpu
from .entry import Entry
from .instruction_events import InstructionEvents, instruction_stop
from .registers_sync import Newer
from .service import HypercallHandler, Service
from .states import (
    COMPLETION,
    IDLE,
    PENDING,
    RUNNING,
    SERVICE,
    VCpuHooks,
    VCpuOwner,
    VCpuState,
)

if TYPE_CHECKING:
    from ..assist import Assist

__all__ = ["VCpu", "VCpuHooks", "VCpuOwner", "VCpuState", "current_vcpu", "serving_vcpu"]

APIC_BASE = 0xFEE0_0800
APIC_BASE_BSP = 1 << 8
"""IA32_APIC_BASE after power-on, and its bit that only the boot processor has (SDM 11.4.4)."""

_current: contextvars.ContextVar[VCpu] = contextvars.ContextVar("kvmaio.current_vcpu")


def current_vcpu() -> VCpu:
    """The vCPU whose access is being served; for device handlers that look at registers.

    Raises:
        ConfigurationError: called from elsewhere.
    """
    try:
        return _current.get()
    except LookupError:
        raise ConfigurationError("no vCPU's access is being served here") from None


_current_name: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "kvmaio.current_vcpu_name", default=None
)
serving_vcpu = _current_name.get
"""The name of the vCPU whose access is being served; None where none is. A function of C's:
with a trace on, each access asks."""


# Looking up an enum's member takes a tenth of a microsecond; these are needed at each exit.
_EXIT = EntryResult.EXIT


class VCpu(BurstingVCpu):
    """One virtual CPU.

    Attributes:
        index: from 0 on; also the KVM vCPU id and the APIC id.
        name: ``cpu0`` and so on.
        state: see the module's drawing.
        halted: it is idle because of HLT.
        awaits_start_up: it is idle because of INIT.
        was_stepped: `run()` has been called.
        is_stepped: `run()` is under way.
        held: a debugger keeps it out of its guest while others run.
    """

    def __init__(
        self,
        index: int,
        model: CpuModel,
        pio: Bus,
        mmio: Bus,
        clock: Clock,
        owner: VCpuOwner,
        *,
        host_factor: float = 1.0,
        clock_hz: int = 1_000_000_000,
    ) -> None:
        super().__init__(pio, mmio)
        self.index = index
        self.name = f"cpu{index}"
        self.model = model
        self._stats = CpuStatistics()
        self.halted = False
        self.awaits_start_up = False
        self.was_stepped = self.is_stepped = False
        self.held = False
        self._state = IDLE
        self._owner = owner
        self._clock = clock
        self._clock_hz = clock_hz
        self._service = Service(self, pio, mmio)
        self._entry = Entry(
            model,
            self.stats,
            host_factor=host_factor,
            clock_hz=clock_hz,
            count_exit=self._service.count,
            on_end=self._entered,
        )
        self._registers = self._entry.registers
        self._registers.on_change = self.disturb
        self.interrupts = self._entry.interrupts
        self._fresh = True  # never activated since reset
        self._suspended = False
        self._idle_since_ns = clock.now_ns
        self._closed = False
        self._allowed = False  # the machine is running
        self._exit_due = False  # the run page holds an exit that is not served yet
        self._begun = False  # a device or handler has been given the exit due
        self._unanswered = False  # it has suspended, and its answer goes to the run page
        self._init_due = False  # INIT came while something was in flight
        self._start_up_due: int | None = None  # and then a start-up IPI
        self._wake = asyncio.Event()
        self._pristine: CpuState | None = None  # as after power-on
        self._left = None

    # ---- what users see -----------------------------------------------------------

    @property
    def state(self) -> VCpuState:
        return self._state

    @property
    def stats(self) -> CpuStatistics:
        """Counters under gem5's names, as of now; look here again for later ones."""
        if self._bursting is not None:
            self._book_burst()
        return self._stats

    @property
    def context(self) -> Context:
        """The registers by name, as plain attributes.

        Raises:
            ConfigurationError: the guest is running.
        """
        return self._registers.get()

    def dump(self) -> str:
        """All registers as text; the guest must not be running."""
        self._entry.push_registers()
        return self.model.dump()

    async def run(self, ticks: int | None = None) -> VmExit:
        """Enter the guest once and say why it was left. The exit is not served.

        The next run goes on behind it: a read then gets what lies in the run
        page. `Machine.run()` serves an exit that is still open.

        Args:
            ticks: guest nanoseconds to run for, about; None is without limit. 0
                is a half entry: it completes a pending access and executes
                nothing. Less than the run timer can keep is raised to that.

        Raises:
            ConfigurationError: the machine is running, or this vCPU is idle.
            HostError: the host refused to run the guest.
        """
        self._owner.check_steppable()
        if self.inside:
            raise ConfigurationError(f"{self.name} is being run already")
        self._must_be_answered("be run by hand")
        self.activate_if_fresh()
        if self._state is IDLE:
            raise ConfigurationError(f"{self.name} is idle; activate() or wakeup() it first")
        limit_ns = self._entry.limit_ns(ticks)
        self._restored = None
        self.was_stepped = True
        self._exit_due = False
        if self._state is SERVICE:
            self._state = RUNNING  # passed over, even if the host then refuses the entry
        self.is_stepped = True
        try:
            result = await self._entry.enter(limit_ns)
            events = self._entry.events
            if events is not None:
                while events.stepping and limit_ns != 0:
                    result = await self._entry.enter(limit_ns)
                if events.fired:
                    await events.let_waiters_run()
        finally:
            self.is_stepped = False
        if result is EntryResult.EXIT:
            return self.last_exit()
        return InterruptedExit(ticks=self._entry.ticks, timer_expired=result is EntryResult.TIMER)

    def kick(self) -> None:
        """End the present entry; if there is none, the next one ends at once. Any thread."""
        self.model.kick()

    def wakeup(self) -> None:
        """Kick; and activate, if idle."""
        self.kick()
        if self._state is IDLE:
            self.activate()

    def activate(self) -> None:
        """Idle to Running. The idle time is added to numCycles.

        Raises:
            ConfigurationError: it is not idle.
        """
        if self._state is not IDLE:
            raise ConfigurationError(f"{self.name} is {self._state.value}, not Idle: it is active")
        if self._resumes:
            raise ConfigurationError(f"{self.name} is drained and will be active: it is already")
        self.awaits_start_up = False
        idle_ns = self._clock.now_ns - self._idle_since_ns
        self.stats.numCycles += idle_ns * self._clock_hz // 1_000_000_000
        self._fresh = self._suspended = self.halted = False
        if self._at_rest:
            self._resumes = True  # with the rest of the machine
        else:
            self._become_active()

    def _become_active(self) -> None:
        self._state = SERVICE if self._exit_due else RUNNING
        self._wake.set()

    def suspend(self) -> None:
        """To Idle, until `activate()` or `wakeup()`; nothing happens if it is idle already.

        An entry that is under way is ended; if it ends with an exit, that is
        served, and the vCPU stays idle.

        Raises:
            ConfigurationError: in RunningService or RunningMMIOPending.
        """
        if self._state is IDLE:
            if self._resumes:
                self._resumes, self._suspended = False, True
            return
        if self._state is not RUNNING and self._state is not COMPLETION:
            raise ConfigurationError(
                f"cannot suspend {self.name} in {self._state.value}; wait until its exit is served"
            )
        self._become_idle()
        self._suspended = True
        self.model.kick_run()

    deallocate = suspend

    async def interrupt(self, vector: int) -> None:
        """Pend an external interrupt; it is injected as soon as the guest takes one.

        Raises:
            ConfigurationError: no vector from 0 to 255.
        """
        self.interrupts.add(vector)
        self.attend()

    async def nmi(self) -> None:
        """Pend a non-maskable interrupt."""
        self.interrupts.nmi = True
        self.attend()

    async def at_instruction(self, count: int, *, from_now: bool = False) -> None:
        """Wait until the guest has executed `count` instructions since its reset.

        Whoever awaits this directly has a turn before the guest goes on: what it
        sees is the guest behind exactly that instruction. An access counts when it
        is completed, HLT when it halts, a REP string instruction once, and the
        delivery of an interrupt not at all. A count that is reached already returns
        at once.

        Under KVM without an instruction counter the guest is single-stepped until
        then, at some 5,000 instructions a second; a kick and an entry that is
        interrupted lose nothing. Exact on PVM in its emulated modes. With VMX and SVM
        the trap flag shows in what the guest pushes of RFLAGS, a page fault's handler
        goes uncounted, and a count between MOV SS and the instruction behind it comes
        one late.

        Args:
            count: from 0.
            from_now: count from the instruction that comes next, not from the reset.

        Raises:
            ConfigurationError: this host or CPU model cannot stop there, or found on the
                way that it cannot; or the count since reset is unknown, as the guest
                has run uncounted.
        """
        events = self._events()
        future = events.add(count, from_now=from_now)
        if not self.inside and (not self._allowed or self._state is IDLE):
            events.complete_due()  # there may be no entry that would
        self.model.kick_run()
        await future

    def _events(self) -> InstructionEvents:
        events = self._entry.events
        if events is None:
            stop = instruction_stop(self.model)
            events = self._entry.events = InstructionEvents(stop, self.stats, fresh=self._fresh)
            self.disturb()
        return events

    def init(self) -> None:
        """INIT: reset the registers and wait for a start-up IPI (SDM vol. 3A, 9.4)."""
        self._must_be_outside("INIT")
        self.reset_registers()
        self.interrupts.clear()
        self._fresh = False  # only the start-up IPI activates it
        self.awaits_start_up = True

    def start_up(self, vector: int) -> None:
        """The start-up IPI: begin in real mode at address ``vector << 12``.

        Raises:
            ConfigurationError: no vector from 0 to 255, or the vCPU is not idle.
        """
        if not 0 <= vector <= 255:
            raise ConfigurationError(f"start-up vector {vector}: 0 to 255 are possible")
        self._must_be_outside("a start-up IPI")
        if self._state is not IDLE:
            raise ConfigurationError(f"a start-up IPI needs {self.name} to wait for it, after INIT")
        context = self.context
        context.cs.selector = vector << 8
        context.cs.base = vector << 12
        context.rip = 0
        if self.model.has_lapic:
            self.model.start()  # or KVM goes on waiting for an IPI of its own local APICs
        self.activate()

    # ---- what the machine uses ------------------------------------------------------

    async def live(self) -> None:
        """The vCPU's one task: rests while it may not run, else enters and serves."""
        _current.set(self)
        _current_name.set(self.name)
        entry, service, owner = self._entry, self._service, self._owner
        while True:
            try:
                while self._allowed:
                    if entry.inside:  # an exception came between its beginning and the wait
                        await entry.arrival()
                    elif entry.events is not None and entry.events.fired:
                        await entry.events.let_waiters_run()
                    elif self._exit_due and (burst := self._possible_burst()) is not None:
                        follows = self._burst(burst)
                        if follows is not None:
                            await follows
                    elif self._exit_due:
                        begin = self._begin_watched if owner.watches_exits else service.begin
                        await self._finish(begin())
                    elif self._state is IDLE:
                        break
                    elif entry.begin(None) is None:
                        await entry.arrival()
                if self._draining:
                    await self._come_to_rest()
            except EndRun as end:
                self._served_by_ending()
                self._owner.ended(self, end.outcome)
                if self._draining and self._exit_due:
                    self._rest_now()  # a shutdown: it stays, and is all there is
            except asyncio.CancelledError as cancelled:
                if is_own_cancellation():
                    raise
                self._fail(foreign_cancellation(cancelled, f"the handler that {self.name} awaits"))
            except ENDS_THE_LOOP:
                raise
            except BaseException as error:  # `pytest.fail()`, too, is to come out of run()
                self._fail(stopped_iteration(error, f"a handler that {self.name} called"))
            await self._rest()

    def allow(self) -> None:
        """Let the run loop run; not while the vCPU is `held`."""
        if self.held:
            return
        self._restored = None
        self._service_failed = False
        self._allowed = True
        self._wake.set()

    def forbid(self) -> None:
        """Have the run loop rest as soon as it can; see `left()`."""
        self._allowed = False
        self.disturb()
        self.model.kick_run()

    async def left(self) -> None:
        """Wait until the guest has been left. A suspended handler is not waited for."""
        await self._entry.left()

    @property
    def can_wake(self) -> bool:
        """Idle, but something may still wake it: it takes interrupts, or was suspended."""
        halted = self.halted and not self._suspended
        return not halted or self.interrupts.nmi or self._entry.takes_interrupts

    def progressed(self, executed_ns: int) -> None:
        """Count what a long entry has executed so far, in host time."""
        self._entry.progressed(executed_ns)

    @property
    def is_closed(self) -> bool:
        """Is the run page gone?"""
        return self._closed

    @property
    def inside(self) -> bool:
        """Is the guest being executed?"""
        return self._entry.inside

    def activate_if_fresh(self) -> None:
        """Activate a vCPU that has not been active since its reset."""
        if self._fresh and not self._at_rest:
            self.activate()

    def reset_registers(self) -> None:
        """Set the registers to what they are after power-on; the vCPU is fresh again."""
        self._must_be_outside("a reset")
        # An application processor with the bit is to KVM the boot processor, and runs at once.
        bootstrap = APIC_BASE_BSP if self.index == 0 else 0
        self.load(Context(apic_base=APIC_BASE | bootstrap))
        if self.index and self.model.has_lapic:
            self.model.wait_for_sipi()  # also one that a guest before this one has started

    def check_loadable(self) -> None:
        """Raise ConfigurationError if its registers cannot be replaced now."""
        self._must_be_outside("a load")
        self._must_be_answered("be loaded or reset")

    def load(self, context: Context) -> None:
        """Take over `context` whole; the vCPU is fresh and idle."""
        self.check_loadable()
        self._resumes = False
        self._restored = None
        self._exit_due = self._begun = False
        self._entry.abandon_access()
        if self._pristine is not None:
            self.model.write_state(self._pristine)  # FPU, MSRs: an earlier guest may have set them
        elif not self.stats.numVMExits:
            self._pristine = self.model.read_state()
        self._registers.replace(context)
        self._become_idle()
        self._fresh = True
        self.halted = self._suspended = self.awaits_start_up = False
        self._init_due, self._start_up_due = False, None
        self._entry.recount(0)

    def last_exit(self) -> VmExit:
        """The exit that the run page holds, as a typed value."""
        self._book_burst()
        exit_ = decode(self.model.page, self.model.io_words, self._entry.ticks)
        if isinstance(exit_, DebugEventExit):
            return attrs.evolve(exit_, watched=getattr(self.model, "watch_hits", ()))
        return exit_

    def describe_registers(self) -> str:
        """The general and special registers as text; the guest must not be running."""
        return self._service.describe_registers()

    @property
    def host_factor(self) -> float:
        """Guest time for executed host time."""
        return self._entry.host_factor

    async def flush_posted(self) -> bool:
        """Serve batched writes and doorbells while no exit comes; were there any?"""
        if not self.model.has_posted():
            return False
        owner = self._owner
        most = None if owner.has_doorbells else self.model.posted_count()
        return await self._service.flush(owner.posted_lock, most)

    def hook(self, hooks: VCpuHooks) -> None:
        """Call `hooks` from now on, and none of those before.

        Without them next to nothing asks for one.
        """
        self._left, self._watch = hooks.left, hooks.bursts
        self._known.clear()
        self.disturb()
        self._entry.on_injection = hooks.injected
        self._service.on_assist = hooks.assisted
        self.__dict__.pop("finish_service", None)
        if (stalls := hooks.stalls) is not None:

            async def finish_service(rest: Suspended[None]) -> None:
                over = stalls(self._service.describe_exit())
                try:
                    await VCpu.finish_service(self, rest)
                finally:
                    over()

            self.finish_service = finish_service  # type: ignore[method-assign]

    def on_hypercall(self, handler: HypercallHandler | None) -> None:
        """Have `handler` answer hypercalls."""
        self._service.hypercall = handler

    @property
    def is_debugged(self) -> bool:
        """Does somebody take its breakpoints?"""
        return self._service.on_debug is not None

    def on_debug(self, handler: Callable[[VCpu], None] | None) -> None:
        """Have `handler` take breakpoints; without one they are errors."""
        self._service.on_debug = handler

    def read_xsave(self) -> bytes | None:
        """The x87, SSE and AVX registers (KVM_GET_XSAVE); None where the model has none."""
        self._must_be_outside("a look at its registers")
        return self.model.read_state().xsave

    def write_xsave(self, xsave: bytes) -> None:
        """Replace what `read_xsave()` gave.

        Raises:
            ConfigurationError: the guest is running, or in the middle of an access.
        """
        self._must_be_outside("a change of its registers")
        if self._registers.access_pending:
            raise ConfigurationError(
                f"{self.name} is in the middle of an access; its vector registers can be set "
                "after the next instruction"
            )
        self._entry.push_registers()
        self._restored = None
        self.model.write_state(attrs.evolve(self.model.read_state(), xsave=xsave))

    def trigger(self, vector: int) -> None:
        """`interrupt()` for callers that are no coroutines."""
        self.interrupts.add(vector)
        self.attend()

    def attend(self) -> None:
        """Something is to be delivered: wake a halted guest, interrupt a running one."""
        self.disturb()
        if self._closed:
            return  # a device's timer may outlive the machine
        if self.halted and self._state is IDLE:
            if self.can_wake and not self._suspended:
                self.activate()
        else:
            self.model.kick_run()

    def receive_init(self) -> None:
        """INIT of an interrupt controller: takes effect as soon as nothing is in flight.

        The boot processor then starts anew, the others wait for a start-up IPI.
        """
        self._init_due, self._start_up_due = True, None
        if self._state is not IDLE:
            self._become_idle()
        self._take_init()

    def receive_start_up(self, vector: int) -> None:
        """A start-up IPI of an interrupt controller; ignored unless INIT came before."""
        if self._init_due or self.awaits_start_up:
            self._start_up_due = vector
            self._take_init()

    def _take_init(self) -> None:
        if self.inside or self._exit_due:
            self.model.kick_run()  # then, once it is out and its exit served
            return
        is_due, vector = self._init_due, self._start_up_due
        if is_due:
            self.init()
            if self.index == 0:
                self.activate()
        self._init_due, self._start_up_due = False, None
        if vector is not None and self.awaits_start_up:
            self.start_up(vector)

    def close(self) -> None:
        """End the model's thread. Idempotent."""
        self._closed = True
        self._flags[CLOSED_FLAG] = 1
        self._tell_drain_waiters()
        self._registers.locked = CLOSED
        if self._entry.events is not None:
            self._entry.events.close()
        self.model.close()
        self._service.close()

    # ---- the end of an entry -----------------------------------------------------------

    def _entered(self, result: EntryResult) -> None:
        """An entry has ended: the state follows from how."""
        if result is _EXIT:
            self._exit_due = True
            self._begun = False
            if self._state is not IDLE:
                self._state = SERVICE
        elif self._state is not IDLE:
            self._state = RUNNING
        if self._left is not None:
            self._left(result, self._service.reason, self._entry.ticks)

    # ---- serving --------------------------------------------------------------------

    def _begin_watched(self) -> Awaitable[None] | None:
        """Serve the exit due, behind batched writes: None when it is done, else what to await."""
        lock = self._owner.posted_lock
        if self.model.has_posted() or lock.locked():
            return self._service.posted_first(lock)
        return self._service.begin()

    async def finish_service(self, rest: Suspended[None]) -> None:
        """Wait for a handler that has suspended."""
        before = self._state
        if before is not IDLE:
            self._state = PENDING
        self._unanswered = True
        try:
            await rest
        finally:
            self._unanswered = False
        if self._state is PENDING:
            self._state = before

    def access_begins(self) -> None:
        """Called by the service: an I/O or MMIO access goes to a device.

        The state changes before the handler runs, so that it may suspend the vCPU.
        """
        self._begun = True
        if self._state is not IDLE:
            self._state = COMPLETION

    def assist_begins(self) -> None:
        """Called by the service: the software CPU takes the model's registers, and edits them."""
        self._entry.push_registers()
        self._registers.entered()

    def assist_ends(self, instructions: int) -> None:
        """Called by the assist: it has put the registers back."""
        self._begun = True
        self.stats.numAssists += 1
        self._registers.entered()
        self._entry.assisted(instructions)

    def lend_registers(self, model: CpuModel) -> None:
        """Called by the assist: `model` has them, and has left the guest for an access."""
        self._entry.lend_registers(model)

    def take_registers_back(self) -> None:
        """Called by the assist: that access is complete, and `model` is up to date."""
        self._entry.take_registers_back()

    @property
    def may_go_on(self) -> bool:
        """May the guest be executed on without an entry that would look at what waits?"""
        return (
            self._allowed
            and self._state is not IDLE
            and self._entry.events is None
            and not self.interrupts.need_attention
            and self._registers.newer is not Newer.CONTEXT
        )

    def assist_with(self, assist: Assist) -> None:
        """Have what KVM cannot emulate executed by `assist`."""
        self._service.assist = assist

    def hypercall_begins(self) -> None:
        """Called by the service: a hypercall goes to its handler."""
        self._begun = True

    def halt(self) -> None:
        """HLT, or the host's wish: to Idle until an interrupt or `wakeup()`.

        The time until then counts as cycles, as does any idle time.
        """
        self.halted = True
        if self._suspended:
            return  # an interrupt does not end that; activate() does
        if self._state is not IDLE:
            self._become_idle()
        if self._has_something_to_take:
            self.activate()
        else:
            self._owner.idle(self)

    @property
    def _has_something_to_take(self) -> bool:
        """Does an interrupt wait that ends a HLT?"""
        return self.interrupts.nmi or (self.interrupts.maskable and self.can_wake)

    def _served_by_ending(self) -> None:
        """An access that ended the run is served; a shutdown stays, and ends the next run too."""
        if self._begun:
            self._exit_due = False
        if self._state is PENDING:
            self._state = SERVICE if self._exit_due else COMPLETION
        elif self._state is SERVICE and not self._exit_due:
            self._state = RUNNING  # a hypercall; an access has left the state before

    def _fail(self, error: BaseException) -> None:
        if self._state is not IDLE and self._exit_due:
            self._state = SERVICE
        self._service_failed = self._exit_due
        self._allowed = False
        self._explain(error)
        if self._draining and not (self._exit_due and self.gives_up_failed):
            self._drain_error = error
            self._tell_drain_waiters()
        self._owner.failed(self, error)

    def _explain(self, error: BaseException) -> None:
        """Attach where it happened: the vCPU, the instruction, the registers."""
        try:
            dump = self.describe_registers()
            rip: int | None = self.context.rip
        except Exception as problem:  # the report must not hide what it reports
            dump, rip = f"(the registers could not be read: {problem})", None
        if isinstance(error, GuestError):
            error.vcpu, error.rip, error.dump = self.name, rip, dump
            error.exit = self.last_exit() if self._exit_due else None
        elif self._exit_due:
            error.add_note(f"while {self.name} waited for {self._service.describe_exit()}\n{dump}")
        else:
            error.add_note(f"while {self.name} entered its guest\n{dump}")

    # ---- resting --------------------------------------------------------------------

    async def _rest(self) -> None:
        if is_own_cancellation():
            raise asyncio.CancelledError  # a handler has taken it for its own
        if self._init_due:
            self._take_init()
        while not self._has_work:
            self._wake.clear()
            await self._wake.wait()

    @property
    def _has_work(self) -> bool:
        if self._draining:
            return not self._at_rest and self._drain_error is None
        return self._allowed and (self._state is not IDLE or self._exit_due)

    def _become_idle(self) -> None:
        self._state = IDLE
        self.disturb()
        self._idle_since_ns = self._clock.now_ns

    def _must_be_outside(self, what: str) -> None:
        if self.inside:
            raise ConfigurationError(f"{what} needs {self.name} to be outside of its guest")

    def _must_be_answered(self, what: str) -> None:
        if self._unanswered:
            raise ConfigurationError(
                f"{self.name} cannot {what}: a device has not answered its access yet"
            )

    def __repr__(self) -> str:
        return f"<VCpu {self.name} {self._state.value}>"
