"""`RestingVCpu`: the part of a `VCpu` that comes to rest, and what can be done with it there.

It is drained (gem5: drain, tryDrain, drainResume), saved, restored, and handed to
another CPU model (gem5: switchOut, takeOverFrom).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable

import attrs

from ..checkpoint import SavedCpu
from ..cpu import CpuModel, CpuState
from ..errors import ConfigurationError
from ..suspension import Suspended, drive
from .entry import Entry
from .instruction_events import InstructionEvents
from .interrupts import Interrupts
from .registers_sync import SyncedContext
from .service import Service
from .states import IDLE, RUNNING, SERVICE, VCpuState

__all__ = ["CLOSED", "RestingVCpu"]

CLOSED = "the machine is closed, and its registers are gone"


class RestingVCpu:
    """Participates in drains (`drain.Participant`); what it needs of a `VCpu` stands first.

    Attributes:
        gives_up_failed: a drain leaves an exit alone whose service has failed, for a restore
            is to follow.
    """

    name: str
    model: CpuModel
    interrupts: Interrupts
    halted: bool
    awaits_start_up: bool
    was_stepped: bool
    _state: VCpuState
    _entry: Entry
    _registers: SyncedContext
    _service: Service
    _wake: asyncio.Event
    _fresh: bool
    _suspended: bool
    _closed: bool
    _allowed: bool
    _exit_due: bool
    _begun: bool
    _unanswered: bool
    _init_due: bool
    _start_up_due: int | None

    def __init__(self) -> None:
        # On the way to rest, or there; and what becomes of it then.
        self._draining = self._at_rest = False
        self._resumes = False  # drained while it was active
        self._drain_error: BaseException | None = None
        self._service_failed = False  # of the exit due
        self.gives_up_failed = False
        self._drain_waiters: list[asyncio.Future[None]] = []
        self._restored: CpuState | None = None  # and not entered since

    def activate(self) -> None:
        """See `VCpu`."""
        raise NotImplementedError

    def disturb(self) -> None:
        """See `BurstingVCpu`."""
        raise NotImplementedError

    async def finish_service(self, rest: Suspended[None]) -> None:
        """See `VCpu`."""
        raise NotImplementedError

    def _become_active(self) -> None:
        raise NotImplementedError

    def _become_idle(self) -> None:
        raise NotImplementedError

    def _begin_watched(self) -> Awaitable[None] | None:
        raise NotImplementedError

    def _take_init(self) -> None:
        raise NotImplementedError

    def _events(self) -> InstructionEvents:
        raise NotImplementedError

    @property
    def _has_work(self) -> bool:
        raise NotImplementedError

    @property
    def _has_something_to_take(self) -> bool:
        raise NotImplementedError

    # ---- draining ----------------------------------------------------------------------

    def begin_drain(self) -> None:
        self._draining = True
        self._drain_error = None
        self._allowed = False
        self.disturb()
        self.model.kick_run()
        self._wake.set()

    def is_drained(self) -> bool:
        if self._closed:
            raise ConfigurationError(CLOSED)
        if self._drain_error is not None:
            raise ConfigurationError(f"{self.name} cannot be drained: {self._drain_error}") from (
                self._drain_error
            )
        return self._at_rest

    async def settle(self) -> None:
        while self._draining and self._has_work and not self._closed:
            future = asyncio.get_running_loop().create_future()
            self._drain_waiters.append(future)
            await future

    def end_drain(self) -> None:
        self._draining = False
        if self._at_rest:
            self._at_rest = False
            if self._resumes:
                self._resumes = False
                self._become_active()
            elif self.halted and not self._suspended and self._has_something_to_take:
                self.activate()  # it came while everything was at rest
        self._tell_drain_waiters()

    def holding(self) -> str:
        if self._unanswered:
            return f"{self.name} waits for {self._service.describe_exit()} ({self._state.value})"
        what = "an injected event is not taken" if not self._exit_due else "an exit is due"
        return f"{self.name} is {self._state.value}: {what}"

    async def _come_to_rest(self) -> None:
        """Serve and complete what is in flight; injects nothing new and runs on only for that."""
        entry = self._entry
        while self._draining and not self._at_rest:
            if entry.inside:
                await entry.left()  # it is being run by hand
            elif entry.events is not None and entry.events.fired:
                await entry.events.let_waiters_run()
            elif self._exit_due and not self._stays_due:
                await self._finish(self._begin_watched())
            elif self._exit_due or await entry.drain() is None:
                self._rest_now()
            else:
                self._restored = None

    async def _finish(self, pending: Awaitable[None] | None) -> None:
        """Wait for whoever serves the exit due, if that is not done; then it is served."""
        if pending is not None:
            rest = drive(pending)
            if isinstance(rest, Suspended):
                await self.finish_service(rest)
        self._exit_due = False
        if self._state is SERVICE:
            self._state = RUNNING

    @property
    def _stays_due(self) -> bool:
        """Is nothing to be done about the exit due?"""
        return self._service.is_final() or (self._service_failed and self.gives_up_failed)

    def _rest_now(self) -> None:
        self._registers.get()
        self._resumes = self._state is not IDLE
        self._state = IDLE
        self._at_rest = True
        if self._init_due:
            self._take_init()
        self._tell_drain_waiters()

    def _tell_drain_waiters(self) -> None:
        waiters, self._drain_waiters = self._drain_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # ---- at rest -----------------------------------------------------------------------

    def save(self) -> SavedCpu:
        """All state, at rest. What was restored and not entered since is given as it was.

        The processor's clocks go on, and KVM hands some values back in another form.

        Raises:
            ConfigurationError: it is not at rest, or in the middle of an access that could not
                be served.
        """
        if not self._at_rest:
            raise ConfigurationError(f"{self.name} must be drained before it is saved")
        if self._exit_due and not self._service.is_final():
            raise ConfigurationError(
                f"{self.name} cannot be saved: {self._service.describe_exit()} could not be served"
            )
        registers = attrs.evolve(self._registers.get())
        self._entry.push_registers()
        state = self.model.read_state()
        if self._restored is not None:
            fresh = state
            state = attrs.evolve(self._restored, context=registers)
            if self.model.has_lapic:  # lines and other vCPUs may have reached it
                state = attrs.evolve(
                    state, lapic=fresh.lapic, events=fresh.events, mp_state=fresh.mp_state
                )
        engine = {
            "active": self._resumes,
            "fresh": self._fresh,
            "halted": self.halted,
            "suspended": self._suspended,
            "awaits_start_up": self.awaits_start_up,
            "was_stepped": self.was_stepped,
            "vectors": self.interrupts.pending,
            "nmi": self.interrupts.nmi,
            "instructions": self._instructions(),
        }
        return SavedCpu(state, engine)

    def _instructions(self) -> int | None:
        """How many the guest has executed since its reset, if anybody knows."""
        if self._fresh:
            return 0
        events = self._entry.events
        return self.model.instructions if events is None else events.count

    def restore(self, saved: SavedCpu) -> None:
        """Take back what `save()` gave, at rest; see `drain`."""
        engine = saved.engine
        self._init_due, self._start_up_due = False, None
        self._exit_due = self._begun = False
        self._drain_error = None
        self._entry.abandon_access()
        self.model.write_state(saved.state)
        self._registers.taken(saved.state.context)
        self._entry.page_is_stale = True
        self._restored = saved.state
        self._become_idle()
        self._resumes = bool(engine["active"])
        self._fresh = bool(engine["fresh"])
        self.halted = bool(engine["halted"])
        self._suspended = bool(engine["suspended"])
        self.awaits_start_up = bool(engine["awaits_start_up"])
        self.was_stepped = self.was_stepped or bool(engine["was_stepped"])
        self.interrupts.clear()
        for vector in engine["vectors"]:
            self.interrupts.add(vector)
        self.interrupts.nmi = bool(engine["nmi"])
        count = 0 if self._fresh else engine["instructions"]
        if count and not self.model.counts_instructions:
            with contextlib.suppress(ConfigurationError):  # a host that cannot count
                self._events()  # which knows it until the guest runs uncounted
        self._entry.recount(count)

    def take_over(self, model: CpuModel) -> CpuModel:
        """Go on with `model` (gem5: switchOut, takeOverFrom); the other one, to be closed.

        All state goes over at once; what `model` cannot hold it reports.

        Raises:
            ConfigurationError: not at rest, or `model` is the present one, or cannot have the
                breakpoints.
            HostError: the host refused some of the state.
        """
        if not self._at_rest:
            raise ConfigurationError(f"{self.name} must be drained before another model takes over")
        if model is self.model:
            raise ConfigurationError(f"{self.name} cannot take over from itself")
        saved, switched_out = self.save(), self.model
        try:
            self._use_model(model)
            model.use_settings(switched_out.settings)
            self.restore(saved)
        except BaseException:
            self._use_model(switched_out)
            self.restore(saved)
            raise
        return switched_out

    def _use_model(self, model: CpuModel) -> None:
        self.model = model
        self._entry.use_model(model)
        self._service.use_model(model)
