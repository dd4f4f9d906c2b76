"""`TimedCpu`: a CPU model whose runs are given to it by a `SimulationLoop`.

It stands between the vCPU and its model and has the model's own interface: the
vCPU's state machine does not know that time is simulated.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import attrs

from .arrival import Arrival
from .cpu import Context, CpuModel, CpuState, EntryResult, ModelSettings, PostedWrites
from .errors import ConfigurationError, KvmaioError
from .simulation import SimulationLoop
from .stats import CpuStatistics

__all__ = ["TimedCpu"]

MOST_ENTRIES_WITHOUT_PROGRESS = 100_000
"""More than one instruction can legally make: REP OUTS with 65536 elements."""

LONGEST_SLICE_NS = 10_000_000
"""Host time for which the loop looks at nothing else, signals included."""

SLICES_KEPT = 64

MOST_STALLS = 50
"""Slices for which a busy host may not run a guest; then it counts as idle, and time goes on."""


class TimedCpu:
    """See `kvmaio.cpu.CpuModel`, and `kvmaio.simulation.SimulatedGuest`.

    Attributes:
        name: of the vCPU, for messages.
        local_ns: its own time; ahead of the loop's by its debt.
    """

    def __init__(self, model: CpuModel, loop: SimulationLoop, host_factor: float) -> None:
        self.model = model
        self.kind = model.kind
        self.has_lapic = model.has_lapic
        self.counts_instructions = model.counts_instructions
        self.resolution_ns = 1  # the loop splits and adds up as it needs
        self.page: Any = model.page
        self.io_words = model.io_words
        self.mmio_word = model.mmio_word
        self.name = "a vCPU"
        self._stats = CpuStatistics()
        self._flush_soon: Callable[[], None] | None = None
        self._progressed: Callable[[int], None] | None = None
        self.local_ns = loop.time_ns()
        self._loop = loop
        self._thread = threading.get_ident()
        self._factor = host_factor
        self._arrival = Arrival(loop)
        # The entry: begun, run in slices, over, arrived.
        self._inside = False
        self._over = False
        self._slicing = False  # the model is in the guest, or its result not yet taken
        self._has_run = False
        self._result = EntryResult.INTERRUPTED
        self._error: Exception | None = None
        self._end_ns: int | None = None  # of the entry, where it is limited
        self._until_ns = 0  # of the slice
        self._executed_ns = 0
        self._fraction_ns = 0.0  # of guest time, executed and not yet counted
        self._kicked = False
        self._ended_at_ns = -1
        self._stalled = 0  # slices in a row in which next to nothing was executed
        self._entries_without_progress = 0
        self._slices: deque[tuple[int, int]] = deque(maxlen=SLICES_KEPT)  # wall clock, local

    def belongs_to(
        self,
        name: str,
        stats: CpuStatistics,
        flush_soon: Callable[[], None],
        progressed: Callable[[int], None],
    ) -> None:
        """Say whose it is.

        Args:
            flush_soon: has the batched writes served that a slice has left.
            progressed: told after each slice what the entry has executed, in host ns.
        """
        self.name = name
        self._stats = stats
        self._flush_soon = flush_soon
        self._progressed = progressed

    # ---- entering ---------------------------------------------------------------

    def burst(self) -> None:
        return None  # each entry is the loop's to schedule

    def enter(self, limit_ns: int | None) -> EntryResult | None:
        self._executed_ns = 0
        if limit_ns == 0 or self._kicked:
            self._kicked = False
            return self.half_entry()
        self._over = self._has_run = False
        self._inside = True
        self._loop.park(self)
        ticks = None if limit_ns is None else max(1, int(limit_ns * self._factor))
        self._end_ns = None if ticks is None else self.local_ns + ticks
        return None

    async def left(self) -> EntryResult:
        while self._inside:
            await self._arrival
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._result

    @property
    def executed_ns(self) -> int:
        return self._executed_ns

    def half_entry(self) -> EntryResult:
        result = self.model.half_entry()
        self._executed_ns = self.model.executed_ns
        return result

    def kick(self) -> None:
        # The flag before the look: `run_slice` does it the other way round.
        self._kicked = True
        if self._slicing:
            self.model.kick()
        if threading.get_ident() != self._thread and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_look)

    def kick_run(self) -> None:
        if self._inside and not self._over:
            self._kicked = True

    # ---- what the loop calls ------------------------------------------------------

    @property
    def wants_out(self) -> bool:
        return self._kicked

    def interrupted(self) -> int:
        now_ns = self._loop.time_ns()
        self._stats.ticksAhead += self.local_ns - now_ns
        if self._has_run:
            self._end(EntryResult.INTERRUPTED)
            return now_ns
        # An entry completes a pending access, also one that is ended before it has run.
        try:
            self._end(self.half_entry())
        except Exception as error:
            self.give_up(error)
        return self.local_ns if self._result is EntryResult.EXIT else now_ns

    def run_slice(self, until_ns: int) -> None:
        if self._end_ns is not None:
            until_ns = min(until_ns, self._end_ns)
        host_ns = int((until_ns - self.local_ns) / self._factor)
        if host_ns > LONGEST_SLICE_NS:
            host_ns = LONGEST_SLICE_NS
            until_ns = self.local_ns + int(host_ns * self._factor)
        self._until_ns = until_ns
        self._slicing = True
        if self._kicked:
            self._slicing = False
            return
        self._slices.append((time.monotonic_ns(), self.local_ns))
        self._has_run = True
        self.model.begin(max(self.model.resolution_ns, host_ns))

    def end_slice(self) -> bool:
        if not self._slicing:
            return self._over
        try:
            result = self.model.finish()
        except Exception as error:
            self._slicing = False
            self.give_up(error)
            return True
        self._slicing = False
        self._book(self.model.executed_ns)
        if self._progressed is not None:
            self._progressed(self._executed_ns)
        if result is EntryResult.TIMER and self._may_jump():
            self.local_ns = max(self.local_ns, self._until_ns)
        self._stats.ticksOvershot += max(0, self.local_ns - self._until_ns)
        stops = self._kicked or getattr(self.model, "has_reached_count", False)
        if result is EntryResult.EXIT or (result is EntryResult.INTERRUPTED and stops):
            self._end(result)
        elif self._end_ns is not None and self.local_ns >= self._end_ns:
            self._end(EntryResult.TIMER)
        elif self._flush_soon is not None and self.model.has_posted():
            self._flush_soon()
        return self._over

    def _may_jump(self) -> bool:
        """The run timer has expired: is the rest of the slice idle time?

        It is where the guest is halted. A guest that the host kept from running, or that
        ran on a busy host, has the rest still to run, however little it is: a run of less
        than the model can do is a longer one, and the difference debt.
        """
        rest_ns = self._until_ns - self.local_ns
        if rest_ns <= 0 or self.model.is_waiting():
            self._stalled = 0
            return True
        executed_ns = self.model.executed_ns * self._factor
        self._stalled = 0 if executed_ns > rest_ns / 100 else self._stalled + 1
        return self._stalled > MOST_STALLS

    def arrived(self) -> None:
        if self._inside and self._over:
            self._stats.ticksLate += max(0, self._loop.time_ns() - self.local_ns)
            self._inside = False
            self._arrival.set()

    def give_up(self, error: Exception) -> None:
        self._error = error
        self._kicked = False
        self._over = True

    def _book(self, executed_ns: int) -> None:
        self._executed_ns += executed_ns
        guest_ns = executed_ns * self._factor + self._fraction_ns
        self.local_ns += int(guest_ns)
        self._fraction_ns = guest_ns - int(guest_ns)

    def _end(self, result: EntryResult) -> None:
        self._result = result
        self._kicked = False  # the kick was for the entry that is over now
        self._over = True
        if self.local_ns > self._ended_at_ns:
            self._ended_at_ns = self.local_ns
            self._entries_without_progress = 0
            return
        self._entries_without_progress += 1
        if self._entries_without_progress >= MOST_ENTRIES_WITHOUT_PROGRESS:
            self._entries_without_progress = 0
            self.give_up(
                KvmaioError(
                    f"{self.name} left its guest {MOST_ENTRIES_WITHOUT_PROGRESS} times without "
                    f"executing anything: simulated time stands still at {self.local_ns} ns"
                )
            )

    def begin(self, limit_ns: int) -> None:
        raise ConfigurationError("with simulated time, the loop alone runs guests in place")

    def finish(self) -> EntryResult:
        raise ConfigurationError("with simulated time, the loop alone runs guests in place")

    # ---- batched writes --------------------------------------------------------------

    def has_posted(self) -> bool:
        return self.model.has_posted()

    def posted_count(self) -> int:
        return self.model.posted_count()

    def posted(self, most: int | None) -> PostedWrites | None:
        """The model's; its times are by the host's clock, and become guest time."""
        writes = self.model.posted(most)
        if writes is None or not writes.time_ns:
            return writes
        return attrs.evolve(writes, time_ns=self._guest_time(writes.time_ns))

    def _guest_time(self, wall_ns: int) -> int:
        for started_wall_ns, started_ns in reversed(self._slices):
            if wall_ns >= started_wall_ns:
                guest_ns = started_ns + int((wall_ns - started_wall_ns) * self._factor)
                return min(guest_ns, self.local_ns)
        return self._slices[0][1] if self._slices else self.local_ns

    def ring_doorbells(self) -> bool:
        return self.model.ring_doorbells()

    # ---- the rest is the model's -----------------------------------------------------

    @property
    def instructions(self) -> int | None:
        return self.model.instructions

    def recount(self, count: int | None) -> None:
        self.model.recount(count)

    @property
    def settings(self) -> ModelSettings:
        return self.model.settings

    def use_settings(self, settings: ModelSettings) -> None:
        self.model.use_settings(settings)

    def is_waiting(self) -> bool:
        return self.model.is_waiting()

    def has_injected_event(self) -> bool:
        return self.model.has_injected_event()

    def read_context(self) -> Context:
        return self.model.read_context()

    def write_context(self, context: Context) -> None:
        self.model.write_context(context)

    def read_state(self) -> CpuState:
        return self.model.read_state()

    def write_state(self, saved: CpuState) -> None:
        self.model.write_state(saved)

    def interrupt(self, vector: int) -> None:
        self.model.interrupt(vector)

    def nmi(self) -> None:
        self.model.nmi()

    def dump(self) -> str:
        return self.model.dump()

    def close(self) -> None:
        self._loop.remove(self)
        self.model.close()

    def __getattr__(self, name: str) -> Any:
        """Whatever else the model can do, such as counting instructions."""
        return getattr(self.model, name)


def _look() -> None:
    """Nothing: the loop has been woken."""
