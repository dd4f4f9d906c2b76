"""When a vCPU lives on the loop's thread: measured costs, and the policy that follows."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import Self

import attrs

from ._native import ffi, lib
from .gate import check
from .host import Kvm

__all__ = ["Costs", "Promotion"]


@attrs.frozen
class Costs:
    """What this host's KVM costs, measured once per process on a throw-away VM.

    Attributes:
        exit_ns: one exit and entry, at best.
        move_ns: what KVM_RUN on another thread than last time costs more: next to
            nothing on recent kernels, 16 ms on 6.1 and 6.12 (an RCU grace period).
        entry_ns: the shortest KVM_RUN, ended by a timer, in which a guest gets
            somewhere. A shorter one is over before the guest has been reached.
    """

    exit_ns: int
    move_ns: int
    entry_ns: int = 0

    @classmethod
    def measured(cls, kvm: Kvm) -> Self:
        """The costs on this host; the first call takes 5 to 60 ms, the others nothing."""
        global _measured
        with _measuring:  # loops of two threads may begin together
            if _measured is None:
                out = ffi.new("int64_t[2]")
                check(lib.kvmaio_measure(kvm.fd, kvm.vcpu_page_size, out, out + 1), "KVM_RUN")
                entry_ns = lib.kvmaio_measure_entry(kvm.fd, kvm.vcpu_page_size)
                if entry_ns < 0:  # this KVM runs no such guest: there and back is more than there
                    entry_ns = out[0]
                _measured = (out[0], out[1], entry_ns)
        return cls(*_measured)

    @property
    def shortest_run_ns(self) -> int:
        """What a run takes for its guest to get somewhere, also where its caches are cold."""
        return 2 * self.entry_ns

    @property
    def moves_are_cheap(self) -> bool:
        """Does a move cost no more than ten exits?"""
        return self.move_ns <= 10 * self.exit_ns

    @property
    def budget_ns(self) -> int:
        """How long exits are answered back to back before the loop has its turn."""
        usual_ns = min(max(BUDGET_EXITS * self.exit_ns, 500_000), 1_000_000)
        # Where an exit is slow, so is the loop's turn, most of all on emulated hardware.
        return max(usual_ns, LEAST_EXITS * self.exit_ns)


_measured: tuple[int, int, int] | None = None
_measuring = Lock()

BUDGET_EXITS = 240
"""The time of so many raw exits; with their answers some 150."""
LEAST_EXITS = 60
OFTEN_EXITS = 50
OFTEN_WITHIN_NS = 10_000_000
"""So many exits within so much of the guest's time and its devices' are often ..."""
USUAL_EXIT_NS = 10_000
"""... where an exit costs no more than this; where it does, more time by as much."""
STORM_WITHIN_NS = 1_500_000
"""So many within so much work of the guest's are a storm, for whose guest the changes of threads
would take longer than it does itself ..."""
STORM_EXIT_NS = 60_000
"""... if they also come this fast, all who share the loop taken together: a loop that serves many
on their own threads gets to each of them only now and then."""
LOST_SHARE = 25
"""Where no other vCPU of the loop runs, and more than this part of the time is lost to the changes
of threads, it is better off on the loop's thread, however slowly its exits come ..."""
BUSY_WINDOW_NS = 50_000_000
BUSY_SHARE = 2
BUSY_FOR_NS = 1_000_000_000
"""... unless the loop turns out to be busy with other things: of so much time for which the guest
wanted its thread, it got less than this part. It is then left alone for a while."""
STEP_NS = 5_000_000
OFTEN_STEPS = 10
"""So many runs in a row that a timer ends, none of them longer, are steps: two changes of threads
for each make them late."""
LATE_FACTOR = 2
MOST_LATE = 3
BUSY_STEPS = 1_000
"""So many in a row that take so many times as long as they were to be: the loop is busy with other
things, and its thread is no place for them, nor for so many behind them."""
QUIET_NS = 50_000_000
CERTAIN = 20
"""Where there is no way back in, a guest must have been quiet for so many times as long: an
overloaded host can keep it from running for a while."""
MOVE_EVERY_NS = 200_000_000


class Promotion:
    """The policy for one vCPU: it moves in when it exits often, and out when it hardly does.

    Or when it runs alone, in steps, or so that changes of threads take much of its time.

    The first move in comes at once, and so does the first one out. After these,
    moves are for hosts on which they are cheap, and even there at most one
    every 200 ms.

    Attributes:
        moves: how many there have been.
        storms: its last exits, when there were enough of them, came as a storm.
    """

    __slots__ = (
        "_busy_ns",
        "_company_moves_out",
        "_costs",
        "_count",
        "_is_impossible",
        "_last_move_ns",
        "_late",
        "_left_ns",
        "_not_before_ns",
        "_since_ns",
        "_slow_exit_ns",
        "_step_began_ns",
        "_step_limit_ns",
        "_steps",
        "_waited_inside_ns",
        "_waited_ns",
        "_waits_inside_ns",
        "_waits_since_ns",
        "_worked_ns",
        "moves",
        "storms",
    )

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._slow_exit_ns = max(costs.exit_ns, USUAL_EXIT_NS)
        self._count = 0
        self._busy_ns = 0
        self._worked_ns = 0
        self._is_impossible = False
        # In a row, while it is negative: so many are still to pass without a look at them.
        self._steps = self._late = 0
        self._company_moves_out = False  # it is on the loop's thread only as it is alone
        # How long it has wanted the loop's thread lately, and has had it; and of the present wait.
        self._waited_ns = self._waited_inside_ns = 0
        self._waits_since_ns = self._waits_inside_ns = 0
        self._not_before_ns = 0
        self._step_began_ns = self._step_limit_ns = 0
        self._since_ns = 0
        self._left_ns = 0
        self._last_move_ns = 0
        self.moves = 0
        self.storms = False

    def left(self) -> None:
        """The guest was left; now its exit is served, until it is entered again."""
        self._left_ns = time.monotonic_ns()

    def exits_often(
        self,
        inside_ns: int,
        worked_ns: int | None = None,
        sharers: int = 1,
        is_alone: Callable[[], bool] | None = None,
    ) -> bool:
        """Called once per entry on the native thread: should it move in?

        The time in the guest and that of its devices count. What the changes of threads
        take does not: where they are slow, moving in pays most.

        Args:
            inside_ns: how long it was in its guest before the last exit.
            worked_ns: how much of that the guest was executed; None if that is unknown. The rest
                it has waited, for a processor or within KVM.
            sharers: how many vCPUs the loop has.
            is_alone: is no other of them in its guest? One that is alone may also move in for
                what the changes of threads take.
        """
        now_ns = time.monotonic_ns()
        if not self._count:
            self._since_ns = now_ns
        self._count += 1
        self._busy_ns += inside_ns
        self._worked_ns += inside_ns if worked_ns is None else worked_ns
        if self._left_ns:
            self._busy_ns += now_ns - self._left_ns
            self._left_ns = 0
        if self._count < OFTEN_EXITS:
            return False
        often = self._busy_ns * USUAL_EXIT_NS < OFTEN_WITHIN_NS * self._slow_exit_ns
        most_ns = OFTEN_EXITS * STORM_EXIT_NS * sharers
        self.storms = (
            self._worked_ns * USUAL_EXIT_NS < STORM_WITHIN_NS * self._slow_exit_ns
            and (now_ns - self._since_ns) * USUAL_EXIT_NS < most_ns * self._slow_exit_ns
        )
        wall_ns = now_ns - self._since_ns
        loses = (
            is_alone is not None
            and self._costs.moves_are_cheap
            and (wall_ns - self._busy_ns) * LOST_SHARE > wall_ns
            and now_ns > self._not_before_ns
            and is_alone()
        )
        self._count = self._busy_ns = self._worked_ns = 0
        if not (often or self.storms or loses) or not self._may_move(now_ns):
            return False
        self._company_moves_out = not (often or self.storms)
        self._waited_ns = self._waited_inside_ns = 0
        return True

    def waits(self, inside_ns: int) -> None:
        """Its run wants the loop's thread from now on, having had it for so much."""
        if self._company_moves_out:
            self._waits_since_ns, self._waits_inside_ns = time.monotonic_ns(), inside_ns

    def has_waited(self, inside_ns: int) -> None:
        """It has had the thread for so much of its run; it has more to go, or that was all."""
        if self._company_moves_out:
            now_ns = time.monotonic_ns()
            self._waited_ns += now_ns - self._waits_since_ns
            self._waited_inside_ns += inside_ns - self._waits_inside_ns
            self._waits_since_ns, self._waits_inside_ns = now_ns, inside_ns

    def loses_here(self, is_alone: Callable[[], bool]) -> bool:
        """Called between waits on the loop's thread: should it move out?

        If it is there for what it would lose elsewhere, and is not alone any more, or the loop
        has so much else to do that it loses more here.

        Args:
            is_alone: as of `exits_often()`.
        """
        if not self._company_moves_out:
            return False
        now_ns, is_busy = time.monotonic_ns(), False
        if self._waited_ns > BUSY_WINDOW_NS:
            is_busy = self._waited_inside_ns * BUSY_SHARE < self._waited_ns
            self._waited_ns = self._waited_inside_ns = 0
        if (not is_busy and is_alone()) or not self._may_move(now_ns):
            return False
        self._not_before_ns = now_ns + BUSY_FOR_NS
        return True

    def steps(self, limit_ns: int, timed_out: bool) -> bool:
        """Called once per entry with a limit, on the native thread: should it move in?

        Args:
            limit_ns: how long the run is to be.
            timed_out: the one before ended by its time.
        """
        self._steps = self._steps + 1 if timed_out and limit_ns <= STEP_NS else min(self._steps, 0)
        self._late = 0
        if not self._is_stepped() or not self._may_move(self._step_begins(limit_ns)):
            return False
        self._company_moves_out = False
        return True

    def stepped_enough(self, limit_ns: int, alone: bool) -> bool:
        """Called once per entry with a limit, on the loop's thread: should it move out?

        If it is there for its steps, and that thread has others to run, or has so much else to do
        that they come late.

        Args:
            limit_ns: how long the run is to be.
            alone: the loop has no other vCPU.
        """
        is_late = self._left_ns - self._step_began_ns > LATE_FACTOR * self._step_limit_ns
        self._late = self._late + 1 if is_late else 0
        now_ns = self._step_begins(limit_ns)
        is_busy = self._late >= MOST_LATE
        is_over = is_busy or not alone or limit_ns > STEP_NS
        if not is_over or not self._is_stepped() or not self._may_move(now_ns):
            return False
        self._steps = -BUSY_STEPS if is_busy else 0
        return True

    def _step_begins(self, limit_ns: int) -> int:
        self._step_began_ns, self._step_limit_ns = time.monotonic_ns(), max(limit_ns, 1_000_000)
        return self._step_began_ns

    def _is_stepped(self) -> bool:
        return self._steps >= OFTEN_STEPS and self._costs.moves_are_cheap

    def is_quiet(self, inside_ns: int, crowd: int = 1) -> bool:
        """Called between waits on the loop's thread: should it move out?

        Args:
            inside_ns: how long it has been in its guest without an exit. Not how long ago
                the last exit was: a loop that was busy with something else is no reason.
            crowd: how many live on the loop's thread: in company, less patience is due.
        """
        return inside_ns > self.quiet_ns // crowd and self._may_move(time.monotonic_ns())

    @property
    def quiet_ns(self) -> int:
        """So long in the guest without an exit is quiet."""
        return QUIET_NS if self._costs.moves_are_cheap else QUIET_NS * CERTAIN

    def moved(self) -> None:
        """It has moved, in or out."""
        self.moves += 1
        self._last_move_ns = time.monotonic_ns()
        self._count = self._busy_ns = self._worked_ns = self._left_ns = 0

    def give_up(self) -> None:
        """The loop's thread cannot have it."""
        self._is_impossible = True

    def _may_move(self, now_ns: int) -> bool:
        if self._is_impossible:
            return False
        if self.moves < 2:
            return True
        return self._costs.moves_are_cheap and now_ns - self._last_move_ns > MOVE_EVERY_NS
