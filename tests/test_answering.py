"""`kvmaio._answering.answer()`: the innermost loop of a burst, without a vCPU."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import Mock

import pytest

from kvmaio._answering import answer
from tests.entries import Pending

CLOSED, ANSWERED = 0, 1

_Again = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class Guest:
    """Makes the same access `count` times, of the next of `words` if it writes."""

    def __init__(self, count: int, words: tuple[int, ...] = (), size: int = 1) -> None:
        self.count, self.words, self.size = count, iter(words), size
        self.data = ctypes.create_string_buffer(8)
        self.read: list[int] = []
        self.failures: list[tuple[BaseException, int | None]] = []
        self.told: list[int] = []
        self.flags = bytearray(2)
        self.again = _Again(lambda handle: self._again())
        self._write()

    @property
    def word(self) -> int:
        return int.from_bytes(self.data.raw[: self.size], "little")

    def _write(self) -> None:
        word = next(self.words, None)
        if word is not None:
            self.data.raw = word.to_bytes(self.size, "little")

    def _again(self) -> int:
        self.read.append(self.word)
        self.count -= 1
        self._write()
        return 0 if self.count else -1

    def failed(self, error: BaseException, word: int | None) -> None:
        self.failures.append((error, word))

    def answer(
        self, handler: Callable[..., Any], is_write: bool, due: bool = True, **how: Any
    ) -> Any:
        where = ctypes.cast(self.again, ctypes.c_void_p).value or 0
        told, failed = how.get("told"), how.get("failed", self.failed)
        data = ctypes.addressof(self.data)
        rest = (data, told, failed, self.flags, due)
        return answer(where, 0, handler, is_write, 3, self.size, *rest)


def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def as_coroutine(function: Callable[..., Any]) -> Callable[..., Any]:
    async def handler(*access: int) -> Any:
        return function(*access)

    return handler


kinds = pytest.mark.parametrize("made", [plainly, as_coroutine])


@kinds
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_writes_reach_the_handler_in_order_until_something_else_comes(made, size):
    words = (1, 2, 0, (1 << 8 * size) - 1, 1 << 8 * size - 1)
    seen = []
    guest = Guest(len(words), words, size)
    assert guest.answer(made(lambda *access: seen.append(access)), True) is None
    assert seen == [(3, size, word) for word in words]
    assert (guest.count, guest.failures) == (0, [])


@kinds
@pytest.mark.parametrize(
    ("answers", "size", "read"),
    [
        ((1, 2, 3), 1, [1, 2, 3]),
        ((0x1FF, -1, True), 1, [0xFF, 0xFF, 1]),
        (((1 << 64) - 1, -2, 1 << 70), 8, [(1 << 64) - 1, (1 << 64) - 2, 0]),
    ],
)
def test_reads_are_answered_with_as_much_as_fits(made, answers, size, read):
    given = iter(answers)
    guest = Guest(len(answers), size=size)
    assert guest.answer(made(lambda *access: next(given)), False) is None
    assert guest.read == read


class Index:
    def __index__(self) -> int:
        return 7


@pytest.mark.parametrize("given", ["five", None, 5.0, Index()])
def test_an_answer_that_is_no_number_is_the_handlers_failure(given):
    guest = Guest(1)
    with pytest.raises(TypeError, match=r"a read handler gave .*; it must return the value"):
        guest.answer(as_coroutine(lambda *access: given), False)
    assert ([word for _, word in guest.failures], guest.count) == ([None], 1)


def test_what_only_passes_for_a_number_is_an_error_too():
    guest = Guest(1)
    with pytest.raises(TypeError, match="integer"):
        guest.answer(as_coroutine(lambda *access: Mock(spec=int)), False)
    assert (len(guest.failures), guest.count) == (1, 1)


@kinds
@pytest.mark.parametrize("is_write", [True, False])
def test_a_handler_that_raises_is_told_and_nothing_is_entered(made, is_write):
    def fails(*access: int) -> None:
        raise ZeroDivisionError("its own")

    guest = Guest(2, (0x55,))
    with pytest.raises(ZeroDivisionError, match="its own") as caught:
        guest.answer(made(fails), is_write)
    assert guest.failures == [(caught.value, 0x55 if is_write else None)]
    assert guest.count == 2


def test_who_is_told_of_a_failure_may_raise_what_tells_better():
    def better(error: BaseException, word: int | None) -> None:
        raise LookupError("better")

    def fails(*access: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(LookupError, match="better") as caught:
        Guest(1).answer(fails, True, failed=better)
    assert isinstance(caught.value.__context__, ZeroDivisionError)


def test_what_waits_comes_back_with_what_it_waits_for():
    waited_for: asyncio.Future[None] = asyncio.Future(loop=(loop := asyncio.new_event_loop()))

    async def waits(*access: int) -> int:
        await waited_for
        return 5

    guest = Guest(2)
    coroutine, waiting_for = guest.answer(waits, False)
    assert waiting_for is waited_for
    waited_for.set_result(None)
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)
    assert (end.value.value, guest.count) == (5, 2)
    loop.close()


@pytest.mark.parametrize(("is_write", "given"), [(True, 5), (False, "five"), (False, None)])
def test_what_cannot_be_judged_here_comes_back_unstarted(is_write, given):
    guest = Guest(1)
    assert guest.answer(lambda *access: given, is_write) == (given,)
    assert guest.count == 1


def test_behind_an_answer_that_was_awaited_it_goes_on_with_an_entry():
    seen: list[int] = []
    guest = Guest(3, (1, 2, 3))
    told: list[int] = []
    guest.answer(lambda *access: seen.append(access[2]), True, False, told=lambda: told.append(1))
    assert (seen, len(told)) == ([2, 3], 3)


def test_each_answer_is_told_before_the_entry():
    order: list[str] = []
    guest = Guest(2)
    guest.answer(lambda *access: order.append("handler"), True, told=lambda: order.append("told"))
    assert order == ["handler", "told"] * 2


@kinds
@pytest.mark.parametrize("is_write", [True, False])
def test_a_run_page_that_has_gone_is_left_alone(made, is_write):
    guest = Guest(5)
    guest.data.raw = b"\x11" * 8

    def closes(*access: int) -> Any:
        guest.flags[CLOSED] = 1
        return None if is_write else 0x22

    assert guest.answer(made(closes), is_write) is None
    assert (guest.count, guest.word) == (5, 0x11)


def test_who_is_told_may_see_the_run_page_go():
    guest = Guest(5)

    def told() -> None:
        guest.flags[CLOSED] = 1

    assert guest.answer(lambda *access: None, True, told=told) is None
    assert guest.count == 5


def test_a_signal_that_closes_has_no_handler_called():
    guest, seen = Guest(5), []

    def closes(*_: object) -> None:
        guest.flags[CLOSED] = 1

    def again(handle: int) -> int:
        _ = pending.comes
        return 0

    pending = Pending(signal.SIGUSR1)
    before = signal.signal(pending, closes)
    try:
        guest.again = _Again(again)
        guest.answer(lambda *access: seen.append(access), True, due=False)
    finally:
        signal.signal(pending, before)
    assert seen == []


def test_an_access_is_answered_also_where_who_is_told_of_that_raises():
    guest = Guest(5)
    with pytest.raises(ZeroDivisionError):
        guest.answer(lambda *access: None, True, told=lambda: 1 // 0)
    assert (guest.flags[ANSWERED], guest.failures, guest.count) == (1, [], 5)


def test_its_arguments_are_looked_at():
    with pytest.raises(TypeError, match="11 arguments"):
        answer(1, 2)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        answer("x", 0, print, True, 0, 1, 0, None, print, bytearray(2), True)  # type: ignore[arg-type]


async def _fails_later(*access: int) -> None:
    raise ZeroDivisionError


class _Waits:
    def __await__(self) -> Any:
        yield None


async def _waits(*access: int) -> None:
    waiting: Awaitable[None] = _Waits()
    await waiting


LEFT_OVER = {
    "plain": (lambda *access: None, True),
    "async": (as_coroutine(lambda *access: None), True),
    "read": (lambda *access: 0x1234_5678_9ABC, False),
    "async read": (as_coroutine(lambda *access: 0x1234_5678_9ABC), False),
    "no number": (as_coroutine(lambda *access: "five"), False),
    "fails": (lambda *access: 1 // 0, True),
    "fails later": (_fails_later, True),
    "waits": (_waits, True),
    "unstarted": (lambda *access: [], True),
}


@pytest.mark.parametrize("kind", LEFT_OVER)
def test_nothing_is_left_over(kind):
    """A reference too many, or too few, in C."""
    handler, is_write = LEFT_OVER[kind]
    guest = Guest(1, size=8)

    def go() -> None:
        for _ in range(1_000):
            guest.count = 3
            guest.read.clear()
            try:
                rest = guest.answer(handler, is_write, failed=lambda error, word: None)
            except (ZeroDivisionError, TypeError):
                continue
            if rest is not None and len(rest) == 2:
                rest[0].close()

    go()
    gc.collect()
    before = sys.getallocatedblocks()
    go()
    gc.collect()
    assert sys.getallocatedblocks() - before < 100
