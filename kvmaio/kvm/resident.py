"""`Residents`: the vCPUs that the loop's own thread runs, while the loop has nothing to do.

An exit of such a vCPU costs no change of threads. Within a budget it is answered
and the guest entered again straight from the vCPU's task; then the loop has its
turn, and its wait becomes the guest's run (`_resident.c` has the races).
"""

from __future__ import annotations

import asyncio
import os
import selectors
import time
from collections import deque
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

from ._native import ffi, lib
from .gate import check
from .promotion import Costs

if TYPE_CHECKING:
    from .cpu import KvmCpu
    from .hub import Hub

__all__ = ["Residents", "epoll_of"]

MOST = 2
"""Two share the thread well; more would rather use the other cores, unless they storm."""

SLICE_NS = 200_000
"""A run that nobody watches: so late can the loop be for something that came meanwhile."""

UNWATCHED_SLICE_NS = 500_000
"""The same on loops whose descriptors cannot be watched."""

SLICE_EXITS = 16
"""No slice is shorter than so many exits: on a slow host it would be over before the guest runs."""

LONGEST_WAIT_NS = 25_000_000
"""A signal whose handler is Python's, and that came on another thread or just before the guest
was entered, has nobody to kick for it; `select()` itself has this gap."""

OWED_AFTER_NS = 1_000_000
"""A loop that always has something to do gives the guest a slice this often."""


class Turns(Protocol):
    """How the guests get their turns of the loop's thread."""

    def parked(self) -> None:
        """There is a guest to run."""

    def close(self) -> None:
        """Leave the loop as it was."""


def epoll_of(loop: asyncio.AbstractEventLoop) -> selectors.EpollSelector | None:
    """What the loop waits with, if somebody else can watch that meanwhile."""
    found = getattr(loop, "_selector", None)
    return found if isinstance(found, selectors.EpollSelector) else None


class Residents:
    """The resident vCPUs of one loop."""

    def __init__(self, hub: Hub, costs: Costs) -> None:
        self._loop = hub.loop
        selector = epoll_of(hub.loop)
        shortest_ns = UNWATCHED_SLICE_NS if selector is None else SLICE_NS
        self.slice_ns = max(shortest_ns, SLICE_EXITS * costs.exit_ns)
        out = ffi.new("kvmaio_resident **")
        poll_fd = -1 if selector is None else selector.fileno()
        check(
            lib.kvmaio_resident_create(hub.handle, poll_fd, costs.budget_ns, self.slice_ns, out),
            "timer_create",
        )
        self.handle = out[0]
        self.waiting: deque[KvmCpu] = deque()
        self.count = 0
        self._turn_count = 0
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
        """May one more move in that only exits often?"""
        return self.count < MOST

    def move_in(self, cpu: KvmCpu) -> None:
        """From now on the loop's thread runs `cpu`."""
        check(lib.kvmaio_resident_adopt(self.handle, cpu.handle), "KVM_SET_SIGNAL_MASK")
        self.count += 1

    def move_out(self, cpu: KvmCpu) -> None:
        """Back to its native thread; a run that waits goes on there."""
        check(lib.kvmaio_resident_release(cpu.handle), "KVM_SET_SIGNAL_MASK")
        self._leave(cpu)

    def forget(self, cpu: KvmCpu, handle: Any) -> None:
        """`cpu` is about to end; it is outside of its guest."""
        self._leave(cpu)
        lib.kvmaio_resident_expire(handle)  # or the run would go on on the native thread
        check(lib.kvmaio_resident_release(handle), "KVM_SET_SIGNAL_MASK")

    def _leave(self, cpu: KvmCpu) -> None:
        self.count -= 1
        if cpu in self.waiting:
            self.waiting.remove(cpu)

    def park(self, cpu: KvmCpu) -> None:
        """`cpu` waits for the loop's thread to have time for it."""
        self.waiting.append(cpu)
        self._turns.parked()

    def is_owed_a_turn(self, now_ns: int) -> bool:
        """Has a loop that is always busy kept the guests waiting long enough?"""
        return now_ns - self._last_turn_ns > OWED_AFTER_NS

    def turn(self, now_ns: int, deadline_ns: int) -> KvmCpu | None:
        """Run the guest whose last turn is the longest ago.

        Returns its vCPU if its run ended: `deliver()` it.

        Args:
            deadline_ns: CLOCK_MONOTONIC, as `now_ns` is.
        """
        cpu = self.waiting[0]
        if len(self.waiting) > 1:
            deadline_ns = min(deadline_ns, now_ns + self.slice_ns)
            # Not by their order: a drain again and again has all of them begin to wait anew.
            cpu = min(self.waiting, key=attrgetter("last_turn"))
        self._turn_count += 1
        cpu.last_turn = self._turn_count
        handle = cpu.handle
        before_ns = handle.inside_ns
        outcome = lib.kvmaio_resident_wait(self.handle, handle, deadline_ns)
        if outcome != lib.KVMAIO_LATER:
            self._last_turn_ns = time.monotonic_ns()
            return cpu
        # Less is none: a loop with a timer every few microseconds would starve the guest.
        if handle.inside_ns - before_ns >= self.slice_ns // 2:
            self._last_turn_ns = time.monotonic_ns()
        cpu.still_waiting()
        return None

    def deliver(self, cpu: KvmCpu) -> None:
        """Tell `cpu` that its run has ended; once, even if an exception made it be asked again."""
        if cpu in self.waiting and not lib.kvmaio_vcpu_is_running(cpu.handle):
            self.waiting.remove(cpu)
            cpu.arrived()

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
        self._ours = self._select
        # On the instance: this loop's selector only, and `del` restores it.
        self._selector.select = self._ours  # type: ignore[method-assign]

    def parked(self) -> None:
        pass  # the loop comes to its selector by itself

    def close(self) -> None:
        # Somebody may have put a wrapper of his own around ours: then it stays, and only polls.
        if vars(self._selector).get("select") is self._ours:
            del self._selector.select

    def _select(self, timeout: float | None = None) -> list[tuple[Any, int]]:
        residents = self._residents
        if not residents.waiting:
            return self._poll(timeout)
        events = self._poll(0)
        now_ns = time.monotonic_ns()
        owed_ns = residents.slice_ns if residents.is_owed_a_turn(now_ns) else 0
        if events or (timeout is not None and timeout <= 0):
            if owed_ns:
                self._turn(now_ns, now_ns + owed_ns)
            return events
        wait_ns = LONGEST_WAIT_NS
        if timeout is not None:
            wait_ns = min(wait_ns, max(int(timeout * 1e9), owed_ns))
        if self._turn(now_ns, now_ns + wait_ns):
            return events
        return self._poll(0)

    def _turn(self, now_ns: int, deadline_ns: int) -> bool:
        cpu = self._residents.turn(now_ns, deadline_ns)
        if cpu is None:
            return False
        # Not at once: the loop is in its selector, and runs callbacks after that.
        self._loop.call_soon(self._residents.deliver, cpu)
        return True


class SliceTurns:
    """the guest runs in slices, as callbacks of the loop"""

    def __init__(self, residents: Residents, loop: asyncio.AbstractEventLoop) -> None:
        self._residents = residents
        self._loop = loop
        # Readable while a guest waits. Not call_soon(): a callback that a KeyboardInterrupt kept
        # from running would be gone, and the guest's turns with it.
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_ready = False
        loop.add_reader(self._fd, self._turn)

    def parked(self) -> None:
        if not self._is_ready:
            os.eventfd_write(self._fd, 1)
            self._is_ready = True

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        fd, self._fd = self._fd, -1
        os.close(fd)

    def _turn(self) -> None:
        residents = self._residents
        if residents.waiting:
            now_ns = time.monotonic_ns()
            cpu = residents.turn(now_ns, now_ns + residents.slice_ns)
            if cpu is not None:
                residents.deliver(cpu)
        # The guest's task has run, and may have closed the last machine.
        if not residents.waiting and self._fd >= 0:
            self._is_ready = False  # before the read: once too often readable does no harm
            os.eventfd_read(self._fd)
