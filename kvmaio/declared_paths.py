"""`DeclaredPaths`: the registers of a machine that are served faster than by an exit.

Devices declare them (``posted``, ``doorbell``, `SharedRegister`); the platform does
what it can; and here, what it batched is delivered even if no exit comes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import attrs

from .device import Device
from .platform import Platform
from .registers import Register, SharedRegister
from .simulation import SimulationLoop

__all__ = ["DeclaredPaths"]

FLUSH_S = 0.005
"""A batched write reaches its device within this time, even if the guest makes no exit; with
simulated time, by the end of the slice in which it was made."""


@attrs.frozen(eq=False)
class _Declared:
    device: Device
    register: Register[Any]
    address: int
    is_pio: bool

    def ring(self, count: int) -> None:
        self.device.__dict__[self.register.name].ring(count)


class BatchedWrites:
    """Writes and doorbells on their way to devices, as a participant of a drain."""

    def __init__(
        self,
        lock: asyncio.Lock,
        flush: Callable[[], Awaitable[bool]],
        may_have_any: Callable[[], bool],
    ) -> None:
        self._lock = lock
        self._flush = flush
        self._may_have_any = may_have_any
        self._clean = False  # the last flush has found none; nobody makes any, the vCPUs at rest

    def begin_drain(self) -> None:
        self._clean = False

    def is_drained(self) -> bool:
        return (self._clean or not self._may_have_any()) and not self._lock.locked()

    async def settle(self) -> None:
        async with self._lock:  # somebody else is serving them
            pass
        self._clean = not await self._flush()

    def end_drain(self) -> None:
        pass

    def holding(self) -> str:
        return "posted writes or doorbells are being served"


class DeclaredPaths:
    """One machine's.

    Attributes:
        lock: held while batched writes are being served, so that what comes
            later stays behind them.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self._declared: list[_Declared] = []
        self._platform: Platform | None = None
        self._ring_doorbells: Callable[[], bool] | None = None
        self._flush_now = asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._declared)

    @property
    def any_posted(self) -> bool:
        """Does any device have a posted register, so that `deliver()` must run?"""
        return any(declared.register.posted for declared in self._declared)

    @property
    def any_doorbell(self) -> bool:
        """Does any device have a doorbell, to be looked for before each exit is served?"""
        return any(declared.register.doorbell for declared in self._declared)

    def declare(self, device: Device, base: int | None, *, is_pio: bool) -> None:
        """Take up the registers of `device`, whose window starts at `base`."""
        if base is None:
            return
        for register in device.registers:
            if register.posted or register.doorbell or isinstance(register, SharedRegister):
                declared = _Declared(device, register, base + register.offset, is_pio)
                self._declared.append(declared)
                if self._platform is not None:
                    self._take(self._platform, declared)

    def open(self, platform: Platform, ring_doorbells: Callable[[], bool]) -> None:
        """The machine's platform is there: tell it of all registers, and from now on."""
        self._platform = platform
        self._ring_doorbells = ring_doorbells
        for declared in self._declared:
            if isinstance(declared.register, SharedRegister):
                declared.register.forget_cells(declared.device)  # another platform's
        for declared in self._declared:
            self._take(platform, declared)

    def flush_soon(self) -> None:
        """There may be batched writes: have `deliver()` serve them now."""
        self._flush_now.set()

    async def deliver(self, flush: Callable[[], Awaitable[object]]) -> None:
        """Call `flush` again and again; for ever."""
        simulated = isinstance(asyncio.get_running_loop(), SimulationLoop)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if simulated else FLUSH_S):
                    await self._flush_now.wait()
            self._flush_now.clear()
            await flush()

    def drain(
        self, flush: Callable[[], Awaitable[bool]], may_have_any: Callable[[], bool]
    ) -> BatchedWrites:
        """What the batched writes are to a drain (`drain.Participant`)."""
        return BatchedWrites(self.lock, flush, may_have_any)

    def _take(self, platform: Platform, declared: _Declared) -> None:
        register, place = declared.register, (declared.address, declared.register.size)
        if isinstance(register, SharedRegister):
            cell = platform.share(*place, declared.is_pio)
            if cell is not None:
                register.use_cell(declared.device, cell)
        if register.doorbell:
            platform.add_doorbell(*place, declared.is_pio, declared.ring, self._rung)
        elif register.posted:
            platform.post(*place, declared.is_pio, register.timed)

    def _rung(self) -> None:
        """The loop has seen that a doorbell rang."""
        if self.lock.locked():
            return  # writes are being served, and the doorbells come after them
        if self.any_posted:
            self._flush_now.set()  # earlier writes go first
        elif self._ring_doorbells is not None:
            self._ring_doorbells()
