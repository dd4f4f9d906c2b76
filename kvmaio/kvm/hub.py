"""`Hub`: what all KVM machines of one event loop share.

One `/dev/kvm`, one eventfd, one done-list: a batch of vCPUs that left their
guests costs the loop one wake-up. The hub lives as long as a machine uses it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from ._native import ffi, lib
from .gate import check
from .host import Kvm
from .promotion import Costs
from .resident import Residents, epoll_of

if TYPE_CHECKING:
    from .cpu import KvmCpu

__all__ = ["Hub"]

_BATCH = 64
_hubs: dict[int, Hub] = {}


class Hub:
    """Use `Hub.acquire()` and `release()`, in pairs, on the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.kvm = Kvm.open()
        self._users = 0
        self._tags = ffi.new("uint32_t[]", _BATCH)
        self._cpus: dict[int, KvmCpu] = {}
        self._next_tag = 0
        self._arrived: deque[int] = deque()  # collected, and not delivered yet
        try:
            check(lib.kvmaio_init(), "sigaction")
            self.costs = Costs.measured(self.kvm)
            out = ffi.new("kvmaio_hub **")
            check(lib.kvmaio_hub_create(out), "eventfd")
        except BaseException:
            self.kvm.close()
            raise
        self.handle = out[0]
        self._residents: Residents | None = None
        loop.add_reader(self.handle.fd, self._collect)

    @classmethod
    def acquire(cls) -> Hub:
        """The running loop's hub; the first call opens ``/dev/kvm``.

        Raises:
            HostError: ``/dev/kvm`` cannot be used.
        """
        loop = asyncio.get_running_loop()
        hub = _hubs.get(id(loop))
        # An id may come back after a loop that was closed with a machine still open.
        if hub is None or hub.loop is not loop:
            hub = _hubs[id(loop)] = cls(loop)
        hub._users += 1
        return hub

    def release(self) -> None:
        """Give back one `acquire()`; the last one closes everything."""
        self._users -= 1
        if self._users:
            return
        if not self.loop.is_closed():
            self.loop.remove_reader(self.handle.fd)
        if self._residents is not None:
            self._residents.close()
        lib.kvmaio_hub_destroy(self.handle)
        self.kvm.close()
        if _hubs.get(id(self.loop)) is self:
            del _hubs[id(self.loop)]

    @property
    def residents(self) -> Residents:
        """The vCPUs that this loop's thread runs."""
        if self._residents is None:
            self._residents = Residents(self, self.costs)
        return self._residents

    @property
    def sharers(self) -> int:
        """How many vCPUs the loop has."""
        return len(self._cpus)

    def has_others_inside(self, cpu: KvmCpu) -> bool:
        """Are other vCPUs of the loop in their guests, as far as one can see from `cpu`?"""
        return any(other.is_inside and other is not cpu for other in self._cpus.values())

    @property
    def waits_for_guests(self) -> bool:
        """Is a guest's run on the loop's thread the loop's own wait, not a slice between two?"""
        return epoll_of(self.loop) is not None

    def has_room(self) -> bool:
        """May one more vCPU live on this loop's thread, if it exits often?"""
        return self._residents is None or self._residents.has_room()

    @property
    def wakeups(self) -> int:
        """How often the eventfd woke the loop; arrivals in a batch share one."""
        return int(self.handle.wakeups)

    def add(self, cpu: KvmCpu) -> int:
        """Register a vCPU; returns the tag under which it arrives."""
        self._next_tag = (self._next_tag + 1) & 0xFFFFFFFF
        while self._next_tag in self._cpus:
            self._next_tag = (self._next_tag + 1) & 0xFFFFFFFF
        self._cpus[self._next_tag] = cpu
        return self._next_tag

    def remove(self, tag: int) -> None:
        """Take back `add()`; its arrival, if one is still listed, is dropped."""
        self._cpus.pop(tag, None)
        self._take()
        if self._arrived and not self.loop.is_closed():
            # The caller is a task, and an arrival runs its vCPU's task: not from in here.
            self.loop.call_soon(self._deliver)

    def _collect(self) -> None:
        self._take()
        self._deliver()

    def _deliver(self) -> None:
        arrived = self._arrived
        try:
            while arrived:
                cpu = self._cpus.get(arrived.popleft())
                if cpu is not None:
                    cpu.arrived()
        finally:
            if arrived:  # a KeyboardInterrupt ends the loop's run, not the guests'
                self.loop.call_soon(self._deliver)

    def _take(self) -> None:
        count = _BATCH
        while count == _BATCH:
            count = lib.kvmaio_hub_collect(self.handle, self._tags, _BATCH)
            self._arrived.extend(ffi.unpack(self._tags, count))
