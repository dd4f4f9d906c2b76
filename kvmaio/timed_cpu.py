"""`TimedCpu`: a CPU model whose runs are given to it by a `SimulationLoop`.

It stands between the vCPU and its model and has the model's own interface: the
vCPU's state machine does not know that time is simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .arrival import Arrival
from .cpu import Context, CpuModel, CpuState, EntryResult, PostedWrite
from .errors import ConfigurationError, KvmaioError
from .simulation import SimulationLoop

__all__ = ["TimedCpu"]

MOST_ENTRIES_WITHOUT_PROGRESS = 10_000


class TimedCpu:
    """See `kvmaio.cpu.CpuModel`, and `kvmaio.simulation.SimulatedGuest`."""

    def __init__(self, model: CpuModel, loop: SimulationLoop, host_factor: float) -> None:
        self.model = model
        self.kind = model.kind
        self.has_lapic = model.has_lapic
        self.resolution_ns = 1  # the loop splits and adds up as it needs
        self.page: Any = model.page
        self.io_words = model.io_words
        self.mmio_word = model.mmio_word
        self.local_ns = loop.time_ns()
        self._loop = loop
        self._factor = host_factor
        self._arrival = Arrival(loop)
        self._inside = False
        self._result: EntryResult = EntryResult.INTERRUPTED
        self._error: Exception | None = None
        self._until_ns = 0  # of the slice under way
        self._end_ns: int | None = None  # of the entry, where it is limited
        self._executed_ns = 0
        self._kicked = False
        self._without_progress = 0

    # ---- entering ---------------------------------------------------------------

    def enter(self, limit_ns: int | None) -> EntryResult | None:
        self._executed_ns = 0
        if limit_ns == 0 or self._kicked:
            self._kicked = False
            return self.half_entry()
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
        self._kicked = True
        self.model.kick_run()
        self._loop.call_soon_threadsafe(_look)

    def kick_run(self) -> None:
        if self._inside:
            self._kicked = True
            self.model.kick_run()

    # ---- what the loop calls ------------------------------------------------------

    @property
    def wants_out(self) -> bool:
        return self._kicked

    def interrupted(self) -> None:
        self._kicked = False
        # An entry completes a pending access, also one that is ended before it has run.
        ran = self._executed_ns > 0
        self._result = EntryResult.INTERRUPTED if ran else self.half_entry()

    def run_slice(self, until_ns: int) -> None:
        if self._end_ns is not None:
            until_ns = min(until_ns, self._end_ns)
        self._until_ns = until_ns
        host_ns = int((until_ns - self.local_ns) / self._factor)
        self.model.begin(max(self.model.resolution_ns, host_ns))

    def end_slice(self) -> bool:
        try:
            result = self.model.finish()
        except Exception as error:
            self._error = error
            return True
        executed_ns = self.model.executed_ns
        self._executed_ns += executed_ns
        self.local_ns += int(executed_ns * self._factor)
        if result is EntryResult.TIMER:
            # The run timer has expired: an idle guest gets to the event all the same.
            self.local_ns = max(self.local_ns, self._until_ns)
            if self._end_ns is None or self.local_ns < self._end_ns:
                return False
        elif not executed_ns and self._stands_still():
            return True
        self._kicked = self._kicked and result is not EntryResult.INTERRUPTED
        self._result = result
        return True

    def arrived(self) -> None:
        self._inside = False
        self._arrival.set()

    def _stands_still(self) -> bool:
        self._without_progress += 1
        if self._without_progress < MOST_ENTRIES_WITHOUT_PROGRESS:
            return False
        self._without_progress = 0
        self._error = KvmaioError(
            f"a vCPU left its guest {MOST_ENTRIES_WITHOUT_PROGRESS} times without executing "
            "anything: simulated time stands still"
        )
        return True

    def begin(self, limit_ns: int) -> None:
        raise ConfigurationError("with simulated time, the loop alone runs guests in place")

    def finish(self) -> EntryResult:
        raise ConfigurationError("with simulated time, the loop alone runs guests in place")

    # ---- the rest is the model's -----------------------------------------------------

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

    def has_posted(self) -> bool:
        return self.model.has_posted()

    def posted(self) -> Iterator[PostedWrite]:
        return self.model.posted()

    def ring_doorbells(self) -> bool:
        return self.model.ring_doorbells()

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
