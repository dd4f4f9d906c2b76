"""`Doorbell`: what a register declared with ``doorbell=True`` is on a device."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

__all__ = ["Doorbell"]


class Doorbell:
    """An asynchronous iterator over rings: it gives how many came since it was last asked.

    ::

        class Queue(Device):
            notify = Register(0x10, bits=32, doorbell=True)

            async def run(self) -> None:
                async for rings in self.notify:
                    self.process_descriptors()

    Under KVM a ring costs the guest no exit (ioeventfd, api.rst 4.59), so it comes a
    little later than the write, but never before an earlier write of the guest, nor
    after a later read.

    Attributes:
        pending: rings that nobody has been told of yet.
    """

    __slots__ = ("_waiter", "pending")

    def __init__(self) -> None:
        self.pending = 0
        self._waiter: asyncio.Future[None] | None = None

    def ring(self, count: int = 1) -> None:
        """It was written to, `count` times."""
        self.pending += count
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def put_back(self, pending: int) -> None:
        """As in a checkpoint: so many rings wait."""
        self.pending = 0
        if pending:
            self.ring(pending)

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        while not self.pending:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        rings, self.pending = self.pending, 0
        return rings

    def __int__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return f"<Doorbell, {self.pending} pending>"
