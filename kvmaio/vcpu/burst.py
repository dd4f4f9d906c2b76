"""`BurstingVCpu`: the part of a `VCpu` that answers accesses which come back to back.

It does what `Entry.begin()` and `Service.begin()` do in turn, for the case that counts: a guest
makes a plain access, a handler answers it, and nothing else has happened. Where the same access
comes again and again, the only steps of Python's between two entries are then the handler's
(`_answering.c`). Each counts: right after an exit a processor foresees no jump, and each is one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from threading import get_ident
from typing import Any

from .._answering import answer
from ..access_burst import AccessBurst
from ..bus import Bus
from ..cpu import CpuModel, EntryResult
from ..decode import Reason
from ..stats import CpuStatistics
from ..suspension import Suspended, a_number, check_awaitable
from .at_rest import RestingVCpu
from .registers_sync import Newer
from .states import COMPLETION, RUNNING, SERVICE, BurstWatch, VCpuOwner, WatchedAccess

__all__ = ["BurstingVCpu"]

# Looking up an enum's member takes a tenth of a microsecond.
_EXIT = EntryResult.EXIT
_CONTEXT, _MODEL = Newer.CONTEXT, Newer.MODEL
_IO, _MMIO = int(Reason.IO), int(Reason.MMIO)

CLOSED_FLAG, _ANSWERED_FLAG = 0, 1  # the flags of `answer()`

MOST_KNOWN = 1 << 12
"""So many accesses are remembered: a guest that probes everything must not eat the host."""


class BurstingVCpu(RestingVCpu):
    """What it needs of a `VCpu` stands first."""

    _owner: VCpuOwner
    _stats: CpuStatistics
    _left: Callable[[EntryResult, int, int], None] | None

    def __init__(self, pio: Bus, mmio: Bus) -> None:
        super().__init__()
        self._bursting: AccessBurst | None = None
        self._burst_thread = 0
        self._flags = bytearray(2)  # of `answer()`: `_closed`, and an answer is told
        self._handler_failed = False  # and not something else, between a handler and the next
        self._buses = (mmio, pio)
        self._watch: BurstWatch | None = None
        self._watched: WatchedAccess | None = None  # the present access
        # The key of an access -> what to do about it, in the order in which `_answers()` unpacks.
        self._known: dict[int, tuple[Any, ...]] = {}
        for bus in (pio, mmio):
            bus.on_change(self._forget_known)

    def disturb(self) -> None:
        """Something has happened that is looked at between entries: no burst goes on."""
        if self._bursting is not None:
            self._bursting.disturb()

    def _possible_burst(self) -> AccessBurst | None:
        """The model's way to serve accesses back to back, if one is due and nothing else."""
        if (
            self._state is not SERVICE
            or self._entry.events is not None
            or self._registers.newer is _CONTEXT
            or self.interrupts.need_attention
            # Its pin follows CR8, which a guest may change without an exit.
            or self.interrupts.source is not None
        ):
            return None
        owner = self._owner
        if owner.watches_exits and (
            owner.has_doorbells or owner.posted_lock.locked() or self.model.has_posted()
        ):
            return None
        burst = self.model.burst()
        return burst if burst is not None and burst.due >= 0 else None

    def _burst(self, burst: AccessBurst) -> Awaitable[object] | None:
        """Serve the access due, enter, and so on until something else comes.

        Returns what to await then, if anything.
        """
        answers: Any = self._answers(burst)
        burst.begin(told=self._left is not None)
        self._handler_failed, self._flags[_ANSWERED_FLAG] = False, 0
        self._burst_thread = get_ident()
        try:
            self._bursting = burst
            if self._registers.newer is not _MODEL:
                burst.disturb()
            # Before the handler runs, which may suspend the vCPU. And not again for each access:
            # while the guest is inside, nobody looks at this or at `_exit_due`.
            self._state, self._begun = COMPLETION, True
            waiting_for = answers.send(None)
        except StopIteration:
            self._exit_due = self._begun = False
        except BaseException:
            self._end_broken_burst(burst)
            raise
        else:
            burst.disturb()  # it ends there
            self._leave_burst(burst)
            if self._watched is not None:
                self._watched.suspends()
            return self._finish(Suspended(answers, waiting_for))
        self._leave_burst(burst)
        if self._state is SERVICE:  # idle, and active again
            self._state = RUNNING
        if not burst.is_held and self._entry.end_burst(burst) is None:
            return self._entry.arrival()
        return None

    async def _answers(self, burst: AccessBurst) -> None:
        """Answer the access due and those behind it; a step of its own only where a handler waits.

        It changes no state, as it may be on its way out of a wait.
        """
        known, again, handle = self._known, burst.again_at, burst.handle_at
        failed, flags = self._fails, self._flags
        while (key := burst.due) >= 0:
            try:
                handler, is_write, offset, size, words, data, told, watched = known[key]
            except KeyError:
                self._learn(burst, key)
                continue
            self._watched = watched
            if watched is not None:
                burst.note_by(watched.note)
                if watched.arrived is not None:
                    watched.arrived()
            elif self._watch is not None:
                burst.note_by(None)
            due = True
            while rest := answer(
                again, handle, handler, is_write, offset, size, data, told, failed, flags, due
            ):
                try:
                    value = await _awaitable(rest, is_write)
                    if flags[CLOSED_FLAG]:
                        return  # meanwhile: the handler has taken its time
                    if not is_write:
                        words[0] = a_number(value) & ((1 << 8 * size) - 1)
                except BaseException as error:
                    failed(error, words[0] if is_write and not flags[CLOSED_FLAG] else None)
                    raise
                due = False
            if flags[CLOSED_FLAG]:
                return
            while burst.must_write:
                watched.write()
                burst.again()
            if burst.is_held:
                return

    def _fails(self, error: BaseException, word: int | None) -> None:
        """A handler has raised."""
        self._handler_failed = True
        if self._watched is not None and not self._closed:
            self._watched.failed(word)

    def _leave_burst(self, burst: AccessBurst) -> None:
        try:
            self._book_burst()
        finally:
            self._bursting = None
        if self._exit_due:
            self._service.reason = _IO if burst.due & 1 else _MMIO

    def _end_broken_burst(self, burst: AccessBurst) -> None:
        """An exception came. What the guest has done is not lost, and not done twice."""
        is_answered = self._flags[_ANSWERED_FLAG]  # who is told of that has raised
        self._flags[_ANSWERED_FLAG] = 0
        is_over = is_answered or burst.is_held
        is_due = not is_over and burst.due >= 0 and not burst.is_running()
        if not is_due:
            self._exit_due = self._begun = False
        elif not self._handler_failed:  # a signal's handler has, just as the access came
            self._begun = False
            if self._state is COMPLETION:
                self._state = SERVICE
        self._leave_burst(burst)
        if not (is_due or is_over or burst.is_running()):
            self._entry.end_burst(burst)

    def _book_burst(self) -> None:
        """Bring time and counts up to date: while accesses come, they are only added up.

        By the thread that adds them up; who looks from another one sees them a little later.
        """
        if (burst := self._bursting) is not None and self._burst_thread == get_ident():
            self._entry.book_burst(burst)

    def _learn(self, burst: AccessBurst, key: int) -> None:
        address, size, is_write, is_pio = key >> 6, key >> 2 & 15, bool(key & 2), key & 1
        target = self._buses[is_pio].resolve(address, size)
        watched = None if self._watch is None else self._watch(target, key, burst)
        if watched is not None:
            target = watched.target
        handler: Callable[..., Any] = target.write if is_write else target.read
        if is_write and target.update is not None:
            handler = _updating(handler, target.update)
        if watched is None and self._left is not None:
            handler = self._teller(handler, burst, _IO if is_pio else _MMIO)
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        told = None
        if watched is not None and watched.told is not None:
            told = _writing(watched, watched.told)
        words = burst.words(key)
        data = burst.address_of(words)
        self._known[key] = handler, is_write, target.offset, size, words, data, told, watched

    def _teller(
        self, handler: Callable[..., Any], burst: AccessBurst, reason: int
    ) -> Callable[..., Any]:
        """`handler`, and before it somebody is told of the exit."""

        def tell_and_handle(*access: int) -> Any:
            if burst.exit_told() and self._left is not None:
                self._entry.executed(burst.executed_ns)
                self._left(_EXIT, reason, self._entry.ticks)
            return handler(*access)

        return tell_and_handle

    def _forget_known(self) -> None:
        self._known.clear()
        self.disturb()

    def _use_model(self, model: CpuModel) -> None:
        super()._use_model(model)
        self._known.clear()  # the words are in the run page of the one before


def _updating(write: Callable[..., Any], update: Callable[[], None]) -> Callable[..., Any]:
    """`write`, and `update` behind it."""

    async def waits(pending: Awaitable[None]) -> None:
        await pending
        update()

    def write_and_update(*access: int) -> Any:
        pending = write(*access)
        if pending is not None:
            check_awaitable(pending)
            return waits(pending)
        update()
        return None

    return write_and_update


def _awaitable(rest: tuple[Any, ...], is_write: bool) -> Awaitable[Any]:
    """What to await of what `answer()` gave."""
    if len(rest) == 2:
        return Suspended(*rest)
    awaitable = rest[0]
    if is_write or hasattr(awaitable, "__await__"):
        check_awaitable(awaitable)
    else:
        a_number(awaitable)
    return awaitable  # type: ignore[no-any-return]


def _writing(watched: WatchedAccess, told: Callable[[], int]) -> Callable[[], None]:
    """`told`, and behind it what is to be written then is."""

    def tell() -> None:
        if full := told():
            watched.write()
            if full < 0:  # there was no room for this one
                told()

    return tell
