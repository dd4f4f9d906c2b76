"""`Arrival`: a wait that can be used again and again without a Future each time.

A vCPU's task waits for the end of every run of the guest, tens of thousands of
times a second. An `asyncio.Future` per wait, and the trip of its callback
through the loop's queue, would cost as much as the exit itself.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Generator
from typing import Any, Literal

__all__ = ["Arrival"]


class Arrival:
    """One waiting task, woken by `set()` and again and again.

    It has the part of a Future's interface that `asyncio.Task` uses on what a
    coroutine yields. `set()` runs the waiting task at once, within the call:
    so it may only be called from a callback of the loop, not from a task.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_cancelled",
        "_context",
        "_loop",
        "_ready",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._asyncio_future_blocking = False
        self._loop = loop
        self._ready = False
        self._cancelled = False
        self._callback: Callable[[Any], object] | None = None
        self._context: contextvars.Context | None = None

    def set(self) -> None:
        """It has come: run the waiting task now, or let the next wait pass."""
        self._ready = True
        self._wake()

    def __await__(self) -> Generator[Arrival, None, None]:
        while not self._ready:
            self._asyncio_future_blocking = True
            yield self
        self._ready = False

    # ---- what asyncio.Task asks of a future ---------------------------------

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(
        self, callback: Callable[[Any], object], *, context: contextvars.Context | None = None
    ) -> None:
        if self._callback is not None:
            raise RuntimeError("two tasks wait for one arrival")
        self._callback = callback
        self._context = context
        if self._ready:
            self._loop.call_soon(self._wake)

    def cancel(self, msg: object = None) -> Literal[True]:
        self._cancelled = True
        self._loop.call_soon(self._wake)
        return True

    def result(self) -> None:
        if self._cancelled:
            self._cancelled = False
            raise asyncio.CancelledError

    def _wake(self) -> None:
        callback, context = self._callback, self._context
        if callback is not None:
            self._callback = self._context = None
            if context is None:
                callback(self)
            else:
                context.run(callback, self)
