"""`BusySections`: what a device does on its own, and a drain waits for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Protocol

from .suspension import waits_for

__all__ = ["BusySections"]


class Named(Protocol):
    """Whose sections they are: a device."""

    name: str


class BusySections:
    """A device's; a participant of drains (`drain.Participant`)."""

    def __init__(self, device: Named) -> None:
        self._device = device
        self._open: dict[object, tuple[str, asyncio.Task[object] | None]] = {}
        self._shut = False
        self._changed: list[asyncio.Future[None]] = []

    @contextlib.asynccontextmanager
    async def section(self, why: str) -> AsyncIterator[None]:
        """See `Device.busy()`."""
        while self._shut:
            await self._change()
        key = object()
        self._open[key] = (why, asyncio.current_task())
        try:
            yield
        finally:
            del self._open[key]
            self._tell()

    @property
    def is_own(self) -> bool:
        """Is the present task within a section, or awaited by one that is?"""
        task = asyncio.current_task()
        return any(waits_for(owner, task) for _, owner in self._open.values())

    def shut(self, shut: bool) -> None:
        """Have sections that would begin now wait; or no longer."""
        self._shut = shut
        self._tell()

    def begin_drain(self) -> None:
        pass

    def is_drained(self) -> bool:
        return not self._open

    async def settle(self) -> None:
        while self._open:
            await self._change()

    def end_drain(self) -> None:
        pass

    def holding(self) -> str:
        return f"{self._device.name} is busy: {', '.join(why for why, _ in self._open.values())}"

    async def _change(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._changed.append(future)
        try:
            await future
        finally:
            if future in self._changed:
                self._changed.remove(future)

    def _tell(self) -> None:
        for future in tuple(self._changed):
            if not future.done():
                future.set_result(None)
