"""`BurstingVCpu`: the part of a `VCpu` that answers accesses which come back to back.

It does what `Entry.begin()` and `Service.begin()` do in turn, for the case that counts: a guest
makes a plain access, a handler answers it, and nothing else has happened. Between two entries
there are then only the lines of `_burst()`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import Any

from ..bus import Bus
from ..cpu import AccessBurst, CpuModel, EntryResult
from ..decode import Reason
from ..stats import CpuStatistics
from ..suspension import Suspended, drive
from .at_rest import RestingVCpu
from .registers_sync import Newer
from .states import COMPLETION, RUNNING, SERVICE, BurstWatch, VCpuOwner

__all__ = ["BurstingVCpu"]

# Looking up an enum's member takes a tenth of a microsecond.
_EXIT = EntryResult.EXIT
_CONTEXT, _MODEL = Newer.CONTEXT, Newer.MODEL
_IO, _MMIO = int(Reason.IO), int(Reason.MMIO)

MOST_KNOWN = 1 << 12
"""So many accesses are remembered: a guest that probes everything must not eat the host."""


class BurstingVCpu(RestingVCpu):
    """What it needs of a `VCpu` stands first.

    Attributes:
        disturbed: something has happened that is looked at between entries: no burst goes on.
    """

    _owner: VCpuOwner
    _stats: CpuStatistics
    _left: Callable[[EntryResult, int, int], None] | None

    def __init__(self, pio: Bus, mmio: Bus) -> None:
        super().__init__()
        self.disturbed = False
        self._bursting: AccessBurst | None = None  # that has more time than is booked
        self._buses = (mmio, pio)
        self._watch: BurstWatch | None = None
        # The key of an access -> what to do about it, in the order in which `_burst()` unpacks it.
        self._known: dict[int, tuple[Any, ...]] = {}
        pio.on_change(self._known.clear)
        mmio.on_change(self._known.clear)

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
        registers, stats, known = self._registers, self._stats, self._known
        following, left = burst.next, self._left
        key, entering = burst.due, False
        watched, entered = None, False
        if self._watch is not None:
            burst.begins()
        self.disturbed = False
        # Before the handler runs, which may suspend the vCPU. And not again for each access: while
        # the guest is inside, nobody looks at this or at `_exit_due`.
        self._state, self._begun = COMPLETION, True
        try:
            while True:
                try:
                    is_write, handler, offset, size, words, mask, update, watched = known[key]
                except KeyError:
                    self._learn(burst, key)
                    continue
                if left is not None and entered:
                    if watched is None:
                        self._entry.executed(burst.executed_ns)
                        left(_EXIT, _IO if key & 1 else _MMIO, self._entry.ticks)
                    elif (arrived := watched.arrived) is not None:
                        arrived()
                if is_write:
                    pending = handler(offset, size, words[0])
                    if pending.__class__ is CoroutineType:  # as `drive()` does, without a call
                        try:
                            pending = Suspended(pending, pending.send(None))
                        except StopIteration:
                            pending = None
                    elif pending is not None:
                        pending = drive(pending)
                    if pending.__class__ is Suspended:
                        if watched is not None:
                            pending = watched.write_goes_on(pending, words[0])
                        return self._finish(_completed(pending, update))
                    if update is not None:
                        update()
                else:
                    value = handler(offset, size)
                    if value.__class__ is CoroutineType:
                        try:
                            value = Suspended(value, value.send(None))
                        except StopIteration as end:
                            value = end.value
                    elif not isinstance(value, int):
                        value = drive(value)
                    if not isinstance(value, int):
                        if watched is not None:
                            value = watched.read_goes_on(value)
                        return self._finish(self._service.store(value, words, 0, mask))
                    words[0] = value & mask
                if watched is not None:
                    told, watched = watched, None
                    if full := told.told():
                        told.write()
                        if full < 0:
                            told.told()
                if self.disturbed or registers.newer is not _MODEL:
                    break
                entering = True
                key = following()
                if key < 0:
                    break
                entering = False
                self._bursting = burst
                stats.numVMExits += 1
                if key & 1:
                    stats.numIO += 1
                else:
                    stats.numMMIO += 1
                entered = True
        except BaseException:
            if watched is not None and not entering:
                watched.failed(words[0] if is_write else None)
            if entering:
                self._exit_due = self._begun = False
                if not burst.is_running():
                    # A signal's handler has raised just as the entry ended: what came is not lost.
                    self._end_burst(burst)
            raise
        finally:
            if self._bursting is not None:
                self._book_burst()
                self._bursting = None
                if self._exit_due and not entering:
                    self._service.reason = _IO if key & 1 else _MMIO
        self._exit_due = self._begun = False
        if self._state is SERVICE:  # idle, and active again
            self._state = RUNNING
        if key < 0 and self._entry.end_burst(burst) is None:
            return self._entry.arrival()
        return None

    def _end_burst(self, burst: AccessBurst) -> None:
        self._book_burst()
        self._bursting = None
        self._entry.end_burst(burst)

    def _book_burst(self) -> None:
        """Bring time and counts up to date: while accesses come, they are only added up."""
        if (burst := self._bursting) is not None:
            self._entry.book_burst(burst)

    def _learn(self, burst: AccessBurst, key: int) -> None:
        address, size, is_write, is_pio = key >> 6, key >> 2 & 15, bool(key & 2), key & 1
        target = self._buses[is_pio].resolve(address, size)
        watched = None if self._watch is None else self._watch(target, key, burst)
        if watched is not None:
            target = watched.target
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[key] = (
            is_write,
            target.write if is_write else target.read,
            target.offset,
            size,
            burst.words(key),
            (1 << 8 * size) - 1,
            target.update if is_write else None,
            watched,
        )

    def _use_model(self, model: CpuModel) -> None:
        super()._use_model(model)
        self._known.clear()  # the words are in the run page of the one before


async def _completed(rest: Suspended[None], update: Callable[[], None] | None) -> None:
    await rest
    if update is not None:
        update()
