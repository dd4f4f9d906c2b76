"""Get between a burst's entries and the handlers of its accesses, which are C with nothing between.

::

    with struck(monkeypatch, ResidentBurst, [False] * 20 + [True], KeyboardInterrupt):
        ...  # raised just as the guest has come out for the 21st time
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from kvmaio.access_burst import AccessBurst

__all__ = ["Pending", "entered_by", "struck"]

_Again = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_kept: list[Any] = []  # C calls them for as long as it likes


class Pending(int):
    """A number of a signal. Reading `comes` has it come without a step of Python's behind that, in
    which its handler could run already."""

    comes = property(ctypes.pythonapi.PyErr_SetInterruptEx)


def entered_by(
    monkeypatch: Any,
    burst: type[AccessBurst],
    again: Callable[[int, Callable[[int], int]], int],
) -> None:
    """Have `again` called for each entry of such bursts, with a handle's address, and with what
    enters if it is called with that."""
    enter = _Again(burst.again_at)

    @_Again
    def called(handle: int) -> int:
        return again(handle, enter)

    _kept.append(called)
    monkeypatch.setattr(burst, "again_at", ctypes.cast(called, ctypes.c_void_p).value)


@contextmanager
def struck(
    monkeypatch: Any,
    burst: type[AccessBurst],
    strikes: Iterable[bool],
    error: type[BaseException],
) -> Iterator[None]:
    """Have a signal's handler raise `error` as guests come out, before anybody looks at why."""
    number, left = Pending(signal.SIGUSR1), iter(strikes)

    def again(handle: int, enter: Callable[[int], int]) -> int:
        other = enter(handle)
        if next(left, False):
            _ = number.comes
        return other

    def raises(*_: object) -> None:
        raise error

    before = signal.signal(number, raises)
    try:
        with monkeypatch.context() as patched:
            entered_by(patched, burst, again)
            yield
    finally:
        signal.signal(number, before)
