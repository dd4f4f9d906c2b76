"""`FastPaths`: the accesses of one VM that need no Python, or not at once (`_fast.h`)."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from typing import Any

from ..cpu import PostedWrites
from ..errors import ConfigurationError
from ._native import ffi, lib
from .cpu import KvmCpu
from .gate import check
from .vm import KvmVm

__all__ = ["FastPaths"]

MOST_DOORBELLS = 32

BATCH = 256
"""Posted writes taken from C at a time."""


class FastPaths:
    """What devices declared as posted, shared or doorbell, told to KVM and to the C core."""

    def __init__(self, vm: KvmVm, cpus: list[KvmCpu], loop: asyncio.AbstractEventLoop) -> None:
        self._vm = vm
        self._cpus = cpus
        self._loop = loop
        out = ffi.new("kvmaio_fast **")
        ring_page = vm.capability(lib.KVM_CAP_COALESCED_MMIO)
        check(lib.kvmaio_fast_create(cpus[0].page, ring_page * 4096, out), "calloc")
        self._handle = out[0]
        self._first = ffi.new("kvmaio_posted *")
        self._values = ffi.new("uint64_t[]", BATCH)
        self._taken: PostedWrites | None = None  # their device has not had all of them yet
        self._counts = ffi.new("uint64_t[]", MOST_DOORBELLS)
        self._cells: list[Any] = []
        self._rings: list[tuple[int, Callable[[int], None]]] = []
        for cpu in cpus:
            cpu.fast = self

    # ---- declaring --------------------------------------------------------------

    def post(self, address: int, size: int, is_pio: bool, timed: bool) -> None:
        """Batch writes there; `timed` ones are exits, taken and stamped by C."""
        if timed:
            self._add(address, size, is_pio, ffi.NULL, stamped=True)
            return
        needed = lib.KVM_CAP_COALESCED_PIO if is_pio else lib.KVM_CAP_COALESCED_MMIO
        if self._vm.capability(needed):  # without it every write is an exit: the same, slower
            self._vm.coalesce(address, size, is_pio)
            # So that the one that finds KVM's ring full need not wait for Python; beyond 64
            # registers it does.
            lib.kvmaio_fast_add(self._handle, address, size, is_pio, ffi.NULL, False)
            self._tell_cpus()

    def share(self, address: int, size: int, is_pio: bool) -> Any:
        """Answer reads there from a cell, which is returned: an array of one 64-bit word."""
        cell = ffi.new("uint64_t[1]")
        self._cells.append(cell)
        self._add(address, size, is_pio, cell)
        return cell

    def add_doorbell(
        self, address: int, size: int, is_pio: bool, ring: Callable[[int], None], rung: Any
    ) -> None:
        """Have writes there counted; `rung()` is called by the loop when there are some."""
        if len(self._rings) == MOST_DOORBELLS:
            raise ConfigurationError(f"more than {MOST_DOORBELLS} doorbells in one machine")
        eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._vm.ioeventfd(eventfd, address, size, is_pio)
            check(lib.kvmaio_fast_add_doorbell(self._handle, eventfd), "doorbell")
        except BaseException:
            os.close(eventfd)
            raise
        self._rings.append((eventfd, ring))
        self._loop.add_reader(eventfd, rung)

    def _add(self, address: int, size: int, is_pio: bool, cell: Any, stamped: bool = False) -> None:
        result = lib.kvmaio_fast_add(self._handle, address, size, is_pio, cell, stamped)
        if result < 0:
            raise ConfigurationError("more than 64 shared and timed registers in one machine")
        self._tell_cpus()

    def _tell_cpus(self) -> None:
        for cpu in self._cpus:
            cpu.handle.fast = self._handle

    # ---- serving ----------------------------------------------------------------

    def has_posted(self) -> bool:
        """Do writes or rings wait?"""
        return bool(self._rings) or self.posted_count() > 0

    def posted_count(self) -> int:
        """How many writes wait."""
        taken = 0 if self._taken is None else len(self._taken.values)
        return taken + lib.kvmaio_fast_waiting(self._handle)

    def posted(self, most: int | None) -> PostedWrites | None:
        """See `kvmaio.cpu.CpuModel`."""
        taken = self._taken
        if self._handle is None:  # a handler may outlive the machine
            return None
        if taken is None or not taken.values:
            first, values = self._first, self._values
            wanted = BATCH if most is None else min(most, BATCH)
            count = lib.kvmaio_fast_take(self._handle, first, values, wanted)
            if not count:
                return None
            taken = self._taken = PostedWrites(
                *(first.address, first.size, bool(first.is_pio), first.time_ns),
                deque(ffi.unpack(values, count)),
            )
        return taken

    def ring_doorbells(self) -> bool:
        """Deliver what the doorbells counted; was there anything?"""
        if not self._rings:
            return False
        rung = lib.kvmaio_fast_rung(self._handle, self._counts)
        for index, (_, ring) in enumerate(self._rings):
            if rung >> index & 1:
                ring(self._counts[index])
        return bool(rung)

    @property
    def served(self) -> int:
        """Exits that C answered."""
        return int(self._handle.served)

    def close(self) -> None:
        """After the vCPUs' threads have ended."""
        for eventfd, _ in self._rings:
            if not self._loop.is_closed():
                self._loop.remove_reader(eventfd)
            os.close(eventfd)
        self._rings.clear()
        self._taken = None
        lib.kvmaio_fast_destroy(self._handle)
        self._handle = None
