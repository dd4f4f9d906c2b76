"""`Residents`: the vCPUs that the loop's own thread runs, while the loop has nothing to do.

An exit of such a vCPU costs no change of threads. Within a budget it is answered
and the guest entered again straight from the vCPU's task; then the loop has its
turn, and its wait becomes the guest's run (`_resident.c` has the races).
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ._native import ffi, lib
from .gate import check
from .promotion import Costs

if TYPE_CHECKING:
    from .cpu import KvmCpu
    from .hub import Hub

__all__ = ["Residents"]

MOST = 2
"""Two share the thread well; more would rather use the other cores."""

SLICE_NS = 200_000
"""A run that nobody watches: so late can the loop be for something that came meanwhile."""

UNWATCHED_SLICE_NS = 500_000
"""The same on loops whose descriptors cannot be watched."""

OWED_AFTER_NS = 1_000_000
"""A loop that always has something to do gives the guest a slice this often."""


class Turns(Protocol):
    """How the guests get their turns of the loop's thread."""

    def parked(self) -> None:
        """There is a guest to run."""

    def close(self) -> None:
        """Leave the loop as it was."""


class Residents:
    """The resident vCPUs of one loop."""

    def __init__(self, hub: Hub, costs: Costs) -> None:
        self._loop = hub.loop
        found = getattr(hub.loop, "_selector", None)
        selector = found if isinstance(found, selectors.EpollSelector) else None
        self.slice_ns = UNWATCHED_SLICE_NS if selector is None else SLICE_NS
        out = ffi.new("kvmaio_resident **")
        poll_fd = -1 if selector is None else selector.fileno()
        check(
            lib.kvmaio_resident_create(hub.handle, poll_fd, costs.budget_ns, self.slice_ns, out),
            "timer_create",
        )
        self.handle = out[0]
        self.waiting: deque[KvmCpu] = deque()
        self.count = 0
        self._last_turn_ns = 0
        self._turns: Turns
        if selector is None:
            self._turns = SliceTurns(self, hub.loop)
        else:
            self._turns = SelectorTurns(self, hub.loop, selector)

    @property
    def kind(self) -> str:
        """How turns are given, in words."""
        return self._turns.__class__.__doc__ or ""

    def has_room(self) -> bool:
        """May one more move in?"""
        return self.count < MOST

    def move_in(self, cpu: KvmCpu) -> None:
        """From now on the loop's thread runs `cpu`."""
        check(lib.kvmaio_resident_adopt(self.handle, cpu.handle), "KVM_SET_SIGNAL_MASK")
        self.count += 1

    def move_out(self, cpu: KvmCpu) -> None:
        """Back to its native thread; a run that waits goes on there."""
        self.count -= 1
        if cpu in self.waiting:
            self.waiting.remove(cpu)
        check(lib.kvmaio_resident_release(cpu.handle), "KVM_SET_SIGNAL_MASK")

    def forget(self, cpu: KvmCpu, handle: Any) -> None:
        """`cpu` is about to end; it is outside of its guest."""
        self.count -= 1
        if cpu in self.waiting:
            self.waiting.remove(cpu)
        lib.kvmaio_resident_expire(handle)  # or the run would go on on the native thread
        check(lib.kvmaio_resident_release(handle), "KVM_SET_SIGNAL_MASK")

    def park(self, cpu: KvmCpu) -> None:
        """`cpu` waits for the loop's thread to have time for it."""
        self.waiting.append(cpu)
        self._turns.parked()

    def is_owed_a_turn(self) -> bool:
        """Has a loop that is always busy kept the guests waiting long enough?"""
        return time.monotonic_ns() - self._last_turn_ns > OWED_AFTER_NS

    def turn(self, deadline_ns: int) -> KvmCpu | None:
        """Run the guest that waits longest; returns its vCPU if its run ended.

        Args:
            deadline_ns: CLOCK_MONOTONIC; 0 is none.
        """
        cpu = self.waiting[0]
        if len(self.waiting) > 1:
            slice_end_ns = time.monotonic_ns() + self.slice_ns
            deadline_ns = min(deadline_ns, slice_end_ns) if deadline_ns else slice_end_ns
            self.waiting.rotate(-1)
        if cpu.limit_end_ns:
            deadline_ns = min(deadline_ns, cpu.limit_end_ns) if deadline_ns else cpu.limit_end_ns
        outcome = lib.kvmaio_resident_wait(self.handle, cpu.handle, deadline_ns)
        self._last_turn_ns = time.monotonic_ns()
        if outcome == lib.KVMAIO_LATER:
            if cpu.limit_end_ns and self._last_turn_ns >= cpu.limit_end_ns:
                lib.kvmaio_resident_expire(cpu.handle)
            else:
                cpu.still_waiting()
                return None
        self.waiting.remove(cpu)
        return cpu

    def close(self) -> None:
        """Nobody lives here any more."""
        self._turns.close()
        lib.kvmaio_resident_destroy(self.handle)


class SelectorTurns:
    """the selector's wait is the guest's run; a watcher thread ends it"""

    def __init__(
        self,
        residents: Residents,
        loop: asyncio.AbstractEventLoop,
        selector: selectors.EpollSelector,
    ) -> None:
        self._residents = residents
        self._loop = loop
        self._selector: Any = selector
        self._poll: Callable[[float | None], list[tuple[Any, int]]] = selector.select
        # On the instance: this loop's selector only, and `del` restores it.
        self._selector.select = self._select  # type: ignore[method-assign]

    def parked(self) -> None:
        pass  # the loop comes to its selector by itself

    def close(self) -> None:
        del self._selector.select

    def _select(self, timeout: float | None = None) -> list[tuple[Any, int]]:
        residents = self._residents
        if not residents.waiting:
            return self._poll(timeout)
        events = self._poll(0)
        if events or (timeout is not None and timeout <= 0):
            if residents.is_owed_a_turn():
                self._turn(time.monotonic_ns() + residents.slice_ns)
            return events
        deadline_ns = 0 if timeout is None else time.monotonic_ns() + int(timeout * 1e9)
        if self._turn(deadline_ns):
            return events
        return self._poll(0)

    def _turn(self, deadline_ns: int) -> bool:
        cpu = self._residents.turn(deadline_ns)
        if cpu is None:
            return False
        # Not at once: the loop is in its selector, and runs callbacks after that.
        self._loop.call_soon(cpu.arrived)
        return True


class SliceTurns:
    """the guest runs in slices, as callbacks of the loop"""

    def __init__(self, residents: Residents, loop: asyncio.AbstractEventLoop) -> None:
        self._residents = residents
        self._loop = loop
        self._next: asyncio.Handle | None = None

    def parked(self) -> None:
        if self._next is None:
            self._next = self._loop.call_soon(self._turn)

    def close(self) -> None:
        if self._next is not None:
            self._next.cancel()

    def _turn(self) -> None:
        residents = self._residents
        self._next = None
        if not residents.waiting:
            return
        cpu = residents.turn(time.monotonic_ns() + residents.slice_ns)
        if cpu is not None:
            cpu.arrived()
        if residents.waiting and self._next is None:
            self._next = self._loop.call_soon(self._turn)
