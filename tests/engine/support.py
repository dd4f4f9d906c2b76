"""What the engine's tests share: deadlines, waiting for a state, devices that keep a diary."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvmaio import Device

__all__ = [
    "LAB",
    "Diary",
    "deadline",
    "host_only",
    "is_pvm",
    "until",
]

LAB = os.environ.get("SVMLAB") == "1"
"""On emulated hardware, where everything takes longer."""

is_pvm = Path("/sys/module/kvm_pvm").exists()


def host_only(*, pvm: bool, why: str) -> pytest.MarkDecorator:
    """Skip, visibly, on the kind of host that cannot provoke it."""
    return pytest.mark.skipif(is_pvm != pvm, reason=why)


def deadline(seconds: float = 10) -> asyncio.Timeout:
    """No guest may run for ever: every KVM_RUN in a test lies within one of these."""
    return asyncio.timeout(seconds * 10 if LAB else seconds)


async def until(condition: Callable[[], object]) -> None:
    """Let the loop go on until `condition` holds; within a `deadline()`."""
    while not condition():  # noqa: ASYNC110 (an entry has no event to wait for)
        await asyncio.sleep(0)


class Diary(Device):
    """A device that writes down each access; `answers` are what reads get, in turn.

    Attributes:
        entries: ("write", offset, size, value) and ("read", offset, size).
        during: called within each access, before it is answered; plain or async.
    """

    size = 8

    def __init__(self, *answers: int, during: Callable[[], object] | None = None) -> None:
        self.answers = list(answers)
        self.entries: list[tuple[object, ...]] = []
        self.during = during

    def read(self, offset: int, size: int) -> int | Awaitable[int]:
        self.entries.append(("read", offset, size))
        pending = self._during()
        return self._answer() if pending is None else self._later(pending)

    def write(self, offset: int, size: int, value: int) -> Awaitable[None] | None:
        self.entries.append(("write", offset, size, value))
        return self._during()

    def _during(self) -> Awaitable[None] | None:
        pending = self.during() if self.during is not None else None
        return pending if inspect.isawaitable(pending) else None

    def reached(self, count: int) -> Callable[[], bool]:
        """A condition: there are `count` entries."""
        return lambda: len(self.entries) >= count

    def _answer(self) -> int:
        return self.answers.pop(0) if self.answers else 0

    async def _later(self, pending: Awaitable[None]) -> int:
        await pending
        return self._answer()
