"""Instruction events: `await vcpu.at_instruction(n)`, over whatever the CPU model can count with.

A model that can stop after a number of instructions offers an `InstructionStop`.
`InstructionEvents` arms it before each entry of its vCPU, and completes what waits.
"""

from __future__ import annotations

import asyncio
import heapq
from itertools import count as numbers
from typing import Protocol

from ..cpu import EntryResult
from ..errors import ConfigurationError
from ..stats import CpuStatistics

__all__ = ["InstructionEvents", "InstructionStop", "instruction_stop"]


class InstructionStop(Protocol):
    """How a CPU model ends entries at an instruction count.

    A `CpuModel` has it as its `instruction_stop`, made when first looked at.
    """

    counts_always: bool
    """`counted` is since reset. Else it is of entries behind `arm()` only, from 0."""
    lost: bool
    """Nobody knows what `counted` is since the reset, and it is since any moment."""
    loses_interrupts: bool
    """What the handler of an interrupt executes cannot be counted."""
    counted: int

    def refusal(self) -> str | None:
        """Why this model cannot stop at a count at all; None if it can."""

    def arm(self, remaining: int, access_pending: bool) -> bool:
        """Have the next entry end after at most `remaining` (1 or more) instructions.

        It may end before, with INTERRUPTED. Returns True if it is to be a half
        entry instead.

        Raises:
            ConfigurationError: not from here on; why.
        """

    def entered(self, result: EntryResult) -> EntryResult:
        """Count what the entry behind `arm()` executed; what is only the stop's: INTERRUPTED."""

    def disarm(self) -> None:
        """Run freely from the next entry on. Idempotent."""


def instruction_stop(model: object) -> InstructionStop:
    """What `model` stops with.

    Raises:
        ConfigurationError: it cannot; why.
    """
    stop: InstructionStop | None = getattr(model, "instruction_stop", None)
    if stop is None:
        raise ConfigurationError("this CPU model cannot stop at an instruction count")
    if (reason := stop.refusal()) is not None:
        raise ConfigurationError(f"no instruction events here: {reason}")
    return stop


class InstructionEvents:
    """What waits for instruction counts of one vCPU.

    Attributes:
        fired: an event has completed, and who waited has not had a turn yet.
        stepping: the last entry ended only because the model stops early.
    """

    def __init__(self, stop: InstructionStop, stats: CpuStatistics, *, fresh: bool) -> None:
        """`fresh`: the guest has executed nothing since its reset."""
        self._stop = stop
        self._stats = stats
        # (the stop's own count, order, future, is it one since the reset)
        self._waiting: list[tuple[int, int, asyncio.Future[None], bool]] = []
        self._order = numbers()
        self._armed = False
        self._since_reset: int | None = None  # the count at `counted` 0; None: unknown
        self.fired = self.stepping = False
        if fresh or (stop.counts_always and not stop.lost):
            self.reset()

    def reset(self) -> None:
        """The guest starts anew: from 0."""
        self._since_reset = 0 if self._stop.counts_always else -self._stop.counted
        self._tell()

    def resume_at(self, count: int | None) -> None:
        """The guest has been restored to where it had executed `count` instructions."""
        before = self._since_reset
        self._since_reset = None if count is None else count - self._stop.counted
        self._move(before)
        self._tell()

    @property
    def count(self) -> int | None:
        """Instructions executed since the reset; None if somebody ran them uncounted."""
        if self._since_reset is None or self._stop.lost:
            return None
        return self._stop.counted + self._since_reset

    @property
    def pending(self) -> bool:
        """Does anybody wait?"""
        while self._waiting and self._waiting[0][2].done():
            heapq.heappop(self._waiting)
        return bool(self._waiting)

    def add(self, count: int, *, from_now: bool) -> asyncio.Future[None]:
        """A future for the count.

        Raises:
            ConfigurationError: negative, or the count since reset is unknown; or the model
                cannot stop at present.
        """
        if (reason := self._stop.refusal()) is not None:
            raise ConfigurationError(f"no instruction events here: {reason}")
        if count < 0:
            raise ConfigurationError(f"instruction {count}: counted from 0")
        target = self._stop.counted + count
        if not from_now:
            if self._since_reset is None or self._stop.lost:
                raise ConfigurationError(_UNKNOWN)
            target = count - self._since_reset
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (target, next(self._order), future, not from_now))
        return future

    def before_entry(self, limit_ns: int | None, access_pending: bool) -> int | None:
        """Arm the stop; returns the limit that the entry is to have: 0 if an event is due."""
        self.stepping = False
        if limit_ns == 0 and not self._armed and not self.pending:
            return limit_ns  # executes nothing
        if not self.pending:
            self._run_freely()
            return limit_ns
        remaining = self._waiting[0][0] - self._stop.counted
        try:
            half = self._stop.arm(max(1, remaining), access_pending)
        except ConfigurationError as error:
            self.fail(error)
            return limit_ns
        self._armed = True
        return 0 if half or remaining <= 0 else limit_ns

    def after_entry(self, result: EntryResult) -> EntryResult:
        """Count, and complete what is due; what only the stop ended is INTERRUPTED."""
        if not self._armed:
            return result
        try:
            taken = self._stop.entered(result)
        except ConfigurationError as error:
            self.fail(error)
            return EntryResult.INTERRUPTED
        self._tell()
        if self.complete_due():
            self.fired = True
        self.stepping = taken is not result and not self.fired
        return taken

    def executed_elsewhere(self, count: int) -> None:
        """Another model has executed `count` instructions meanwhile."""
        if self._armed:
            self._stop.counted += count
            self._tell()
            if self.complete_due():
                self.fired = True

    def complete_due(self) -> bool:
        """Complete what is reached; was anything?"""
        before = len(self._waiting)
        while self.pending and self._waiting[0][0] <= self._stop.counted:
            heapq.heappop(self._waiting)[2].set_result(None)
        return len(self._waiting) < before

    def interrupted(self) -> None:
        """An interrupt goes to the guest with the next entry."""
        if self._stop.loses_interrupts and self.pending:
            self.fail(
                ConfigurationError(
                    "an interrupt was delivered before the instruction was reached, and this "
                    "host's KVM cannot single-step into its handler: the count is lost"
                )
            )

    def fail(self, error: ConfigurationError) -> None:
        """Nothing that waits can be reached any more."""
        while self.pending:
            heapq.heappop(self._waiting)[2].set_exception(error)
        self.fired = True
        self._run_freely()

    async def let_waiters_run(self) -> None:
        """Give those whose event has come a turn before the guest goes on."""
        self.fired = False
        await asyncio.sleep(0)

    def close(self) -> None:
        """The vCPU ends; what waits is cancelled."""
        while self.pending:
            heapq.heappop(self._waiting)[2].cancel()

    def _move(self, before: int | None) -> None:
        """What is `_since_reset` was `before`: who waits for a count since then still does."""
        if before is None or self._since_reset == before:
            return
        waiting, self._waiting = self._waiting, []
        for target, order, future, since_reset in waiting:
            if not since_reset or future.done():
                moved = target
            elif self._since_reset is None:
                future.set_exception(ConfigurationError(_UNKNOWN))
                continue
            else:
                moved = target + before - self._since_reset
            heapq.heappush(self._waiting, (moved, order, future, since_reset))

    def _run_freely(self) -> None:
        self._stop.disarm()
        self._armed = False
        if not self._stop.counts_always:
            self._since_reset = None
        self._tell()

    def _tell(self) -> None:
        count = self.count
        self._stats.numInsts = self._stats.totalInsts = count
        self._stats.ctrInsts = None if count is None else self._stop.counted


_UNKNOWN = (
    "how many instructions this vCPU has executed is unknown: it has run where nobody counted "
    "(KVM counts only while it single-steps). Ask before the first run, or with from_now=True"
)
