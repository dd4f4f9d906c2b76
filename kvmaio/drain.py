"""Drain: bring everything that is in flight to rest, as a barrier that can be awaited.

Not one barrier but rounds: those who come to rest disturb one another (a write
that ends here begins an activity there), so everyone is asked again until all
say in the same round that they are at rest. gem5's drain manager does the same.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterable
from typing import Protocol

from .errors import ConfigurationError, DrainTimeout

__all__ = [
    "DRAIN_TIMEOUT_S",
    "Barrier",
    "BriefHold",
    "Drainable",
    "Participant",
    "drained",
    "held",
]

DRAIN_TIMEOUT_S = 10.0
"""A device that awaits a network may hold a drain for long; this long without being told to is
taken for a mistake. By the loop's time."""


class Participant(Protocol):
    """Something that must come to rest: a vCPU, a device, the batched writes."""

    def begin_drain(self) -> None:
        """Head for rest. Once per barrier."""

    def is_drained(self) -> bool:
        """Asked in each round: at rest? If it was and has been disturbed, it heads there anew.

        Raises:
            Exception: it never will be.
        """

    async def settle(self) -> None:
        """Wait until it may be worth asking again."""

    def end_drain(self) -> None:
        """Go on as before; also while still on the way to rest."""

    def holding(self) -> str:
        """What it still does, in words that name it."""


class Drainable(Protocol):
    """What a drain needs of a machine."""

    name: str

    @property
    def barrier(self) -> Barrier:
        """Its own."""

    def check_open(self) -> None:
        """Raise ConfigurationError if it is closed."""

    def check_drainable(self) -> None:
        """Raise ConfigurationError where the drain would wait for itself."""

    def why_it_may_wait_for_itself(self) -> str | None:
        """For who drains and has waited long: what it may have overlooked; None if nothing."""

    def drain_participants(self) -> list[Participant]:
        """All that must come to rest."""

    def came_to_rest(self) -> None:
        """All are at rest."""

    def goes_on(self) -> None:
        """Nobody wants it at rest any more."""


class BriefHold:
    """Holds a barrier for an operation of the engine's, which ends by itself: a `run()` that
    begins meanwhile takes its time, and need not be refused."""


class Barrier:
    """One machine's drain: who holds it down, and whether it is there.

    Attributes:
        is_down: everything is at rest, and stays so until nobody holds the barrier.
        is_moving: somebody waits for that.
        rounds: how often the last drain asked everyone.
    """

    def __init__(self, machine: Drainable) -> None:
        self.machine = machine
        self.is_down = False
        self.is_moving = False
        self.rounds = 0
        self._holders: list[object] = []
        self._lock = asyncio.Lock()

    @property
    def is_brief(self) -> bool:
        """Is it held for operations that end by themselves only?"""
        return all(isinstance(holder, BriefHold) for holder in self._holders)

    def hold(self, holder: object) -> None:
        """Keep the barrier down for `holder`. Idempotent."""
        if holder not in self._holders:
            self._holders.append(holder)

    def release(self, holder: object) -> None:
        """Let the machine go on, unless somebody else holds it."""
        if holder in self._holders:
            self._holders.remove(holder)
            if not self._holders and self.is_down:
                self.is_down = False
                self._end()

    @contextlib.asynccontextmanager
    async def moving(self) -> AsyncIterator[list[Participant]]:
        """Its participants, on their way to rest; one drain at a time."""
        async with self._lock:
            self.machine.check_open()
            participants = [] if self.is_down else self.machine.drain_participants()
            self.is_moving = not self.is_down
            try:
                for participant in participants:
                    participant.begin_drain()
                yield participants
                if not self.is_down:
                    self.is_down = True
                    self.machine.came_to_rest()
            finally:
                self.is_moving = False
                if not self.is_down:
                    self._end()

    def _end(self) -> None:
        for participant in self.machine.drain_participants():
            participant.end_drain()
        self.machine.goes_on()


async def lower(barriers: Iterable[Barrier], holder: object, timeout: float | None) -> None:
    """Bring all machines to rest together, and hold them there for `holder`, a new one.

    If that fails or is cancelled, all go on as before.
    """
    ordered = sorted(set(barriers), key=id)  # or two drains of the same machines wait crosswise
    for barrier in ordered:  # before waiting for another drain, which may wait for who asks here
        barrier.machine.check_drainable()
    for barrier in ordered:
        barrier.hold(holder)
    still = "another drain of it is under way"
    try:
        async with asyncio.timeout(timeout) as limit, contextlib.AsyncExitStack() as stack:
            asked: list[Participant] = []
            for barrier in ordered:
                asked += await stack.enter_async_context(barrier.moving())
            try:
                rounds = await _rounds(asked)
            except asyncio.CancelledError:
                still = "; ".join(one.holding() for one in asked if not one.is_drained())
                raise
            for barrier in ordered:
                barrier.rounds = rounds
                barrier.machine.check_open()
    except BaseException as error:
        for barrier in ordered:
            barrier.release(holder)
        hints = filter(None, (each.machine.why_it_may_wait_for_itself() for each in ordered))
        if isinstance(error, TimeoutError) and limit.expired():
            names = " and ".join(barrier.machine.name for barrier in ordered)
            message = "; ".join((f"{names} not at rest within {timeout:g} s: {still}", *hints))
            raise DrainTimeout(message) from None
        if isinstance(error, asyncio.CancelledError):
            for hint in hints:  # whoever has cancelled it may show it
                error.add_note(f"{still}; {hint}")
        raise


async def _rounds(participants: Collection[Participant]) -> int:
    """Ask everyone until all are at rest in one round; how many rounds did it take?"""
    rounds = 1
    while waiting := [one for one in participants if not one.is_drained()]:
        for participant in waiting:
            await participant.settle()
        rounds += 1
    return rounds


@contextlib.asynccontextmanager
async def drained(
    *machines: Drainable, timeout: float | None = DRAIN_TIMEOUT_S
) -> AsyncIterator[None]:
    """Inside, all `machines` are at rest together; afterwards they go on as before.

    ::

        async with kvmaio.drained(a, b):
            one, other = await a.checkpoint(), await b.checkpoint()

    Raises:
        DrainTimeout: something did not come to rest; the message names it.
        ConfigurationError: called where that would wait for itself.
    """
    if not machines:
        raise ConfigurationError("drained() of no machine")
    async with held(object(), machines, timeout):
        yield


@contextlib.asynccontextmanager
async def held(
    holder: object, machines: Collection[Drainable], timeout: float | None
) -> AsyncIterator[None]:
    """`drained()` for `holder`, a new one."""
    barriers = [machine.barrier for machine in machines]
    await lower(barriers, holder, timeout)
    try:
        yield
    finally:
        for barrier in barriers:
            barrier.release(holder)
