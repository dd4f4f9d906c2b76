"""Drive an awaitable as far as it goes at once, and know whether it really suspended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from types import CoroutineType
from typing import Any, Generic, TypeVar

__all__ = [
    "ENDS_THE_LOOP",
    "Suspended",
    "a_number",
    "check_awaitable",
    "drive",
    "foreign_cancellation",
    "is_own_cancellation",
    "stopped_iteration",
    "waits_for",
]

T = TypeVar("T")

ENDS_THE_LOOP = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What asyncio takes from a task for its own, and what closes a coroutine; everything else that
a device raises is for whoever awaits the run."""


class Suspended(Generic[T]):
    """An awaitable that has been started and is waiting for something: await the rest."""

    __slots__ = ("_rest", "_waiting_for")

    def __init__(
        self, rest: Generator[Any, Any, T] | CoroutineType[Any, Any, T], waiting_for: Any
    ) -> None:
        self._rest = rest
        self._waiting_for = waiting_for

    def __await__(self) -> Generator[Any, Any, T]:
        waiting_for = self._waiting_for
        while True:
            try:
                try:
                    answer = yield waiting_for
                except BaseException as error:  # a cancellation, mostly: the awaitable's to handle
                    waiting_for = self._rest.throw(error)
                else:
                    waiting_for = self._rest.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]


def drive(awaitable: Awaitable[T]) -> T | Suspended[T]:
    """Start `awaitable`: its result if it never suspends, else the rest of it to await.

    Called within a task, the awaitable runs as a part of that task.
    """
    # A coroutine is its own iterator, but for the name; asking it for one takes longer.
    rest: Any = awaitable if isinstance(awaitable, CoroutineType) else _awaited(awaitable)
    try:
        waiting_for = rest.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    return Suspended(rest, waiting_for)


def a_number(value: object) -> int:
    """What a handler of reads gave, if it can be an answer."""
    if not isinstance(value, int):
        raise TypeError(f"a read handler gave {value!r}; it must return the value that is read")
    return value


def check_awaitable(answer: object) -> None:
    """Raise TypeError if what a handler gave cannot be awaited."""
    if not hasattr(answer, "__await__"):
        raise TypeError(f"a handler gave {answer!r}: neither a number nor something to await")


def _awaited(awaitable: Awaitable[Any]) -> Any:
    check_awaitable(awaitable)
    return awaitable.__await__()


def is_own_cancellation() -> bool:
    """Was the present task cancelled, and not just something that it awaited?"""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def waits_for(waiter: asyncio.Task[Any] | None, task: asyncio.Task[Any] | None) -> bool:
    """Is `waiter` the task itself, or waits for it, as far as asyncio tells?

    It does of ``await task``, also through further tasks, and of `asyncio.wait_for`, which makes
    a task of its own until Python 3.11; not of groups, `asyncio.wait` and shields.
    """
    if waiter is None or task is None or waiter is task:
        return waiter is task is not None
    callbacks = [callback for callback, _ in getattr(task, "_callbacks", None) or ()]
    future = getattr(waiter, "_fut_waiter", None)
    while future is not None:
        if future is task:
            return True
        if any(future is each for one in callbacks for each in getattr(one, "args", ())):
            return True
        future = getattr(future, "_fut_waiter", None)
    return False


def stopped_iteration(error: BaseException, who: str) -> BaseException:
    """What to raise for `error` of `who`, out of a coroutine: that cannot pass on StopIteration."""
    stop = error.__cause__ if isinstance(error, RuntimeError) else error  # by one that tried
    if not isinstance(stop, StopIteration):
        return error
    passable = RuntimeError(
        f"{who} raised StopIteration, as next() does at the end; give next() a default, or catch it"
    )
    passable.__cause__ = stop
    return passable


def foreign_cancellation(cancelled: asyncio.CancelledError, who: str) -> RuntimeError:
    """The error to raise where `who` met a cancellation that was not its own.

    Passed on as it is, it would end the task in silence, and whoever counts on
    that task would wait for ever.
    """
    error = RuntimeError(f"{who} ended by a cancellation of something it awaited")
    error.__cause__ = cancelled
    return error
