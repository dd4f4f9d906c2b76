"""Pseudo-operations: calls from the guest to the host through a memory window."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self, TypeVar

from kvmaio.device import Device
from kvmaio.errors import ConfigurationError, GuestError

__all__ = ["M5Op", "Operation", "PseudoOpWindow"]

Operation = Callable[[], int | Awaitable[int | None] | None]
"""Carries a pseudo-op out, plain or `async`; None counts as the result 0."""

H = TypeVar("H", bound=Operation)

STRIDE = 0x100  # the function number is bits 15:8 of the offset; bits 7:0 select nothing
LARGEST = 0x10000


class M5Op(enum.IntEnum):
    """The function numbers of gem5's m5 library (``include/gem5/asm/generic/m5ops.h``)."""

    ARM = 0x00
    QUIESCE = 0x01
    QUIESCE_NS = 0x02
    QUIESCE_CYCLE = 0x03
    QUIESCE_TIME = 0x04
    RPNS = 0x07
    WAKE_CPU = 0x09
    EXIT = 0x21
    FAIL = 0x22
    SUM = 0x23
    INIT_PARAM = 0x30
    LOAD_SYMBOL = 0x31
    RESET_STATS = 0x40
    DUMP_STATS = 0x41
    DUMP_RESET_STATS = 0x42
    CHECKPOINT = 0x43
    WRITE_FILE = 0x4F
    READ_FILE = 0x50
    DEBUG_BREAK = 0x51
    SWITCH_CPU = 0x52
    ADD_SYMBOL = 0x53
    PANIC = 0x54
    WORK_BEGIN = 0x5A
    WORK_END = 0x5B
    DIST_TOGGLE_SYNC = 0x62
    WORKLOAD = 0x70


class PseudoOpWindow(Device):
    """gem5's m5op address window; on x86 it lies at 0xFFFF0000.

    ::

        window = machine.attach(PseudoOpWindow(), mmio=0xFFFF_0000)

        @window.operation(M5Op.SUM)
        def add() -> int:
            context = current_vcpu().context
            return context.rdi + context.rsi

    A guest's read calls the operation and gets its result, a write calls it
    and drops the result. The arguments are where the guest put them: in the
    registers of the vCPU that makes the access. Operations are not part of a
    checkpoint: register them again.

    Args:
        size: the window's length, a multiple of 0x100 up to 0x10000; it takes
            the operations below ``size / 0x100``.
    """

    size = LARGEST

    def __init__(self, size: int = LARGEST) -> None:
        if not 0 < size <= LARGEST or size % STRIDE:
            raise ConfigurationError(
                f"a pseudo-op window of {size:#x} bytes: "
                f"it must be a multiple of {STRIDE:#x} up to {LARGEST:#x}"
            )
        self.size = size
        self._operations: dict[int, Operation] = {}

    def clone(self, copies: Mapping[Any, Any]) -> Self:
        clone = super().clone(copies)
        clone._operations = dict(self._operations)
        return clone

    def operation(self, number: int) -> Callable[[H], H]:
        """Decorator: the function carries out pseudo-op `number`.

        Raises:
            ConfigurationError: the number is taken, or beyond the window.
        """
        if not 0 <= number < self.size // STRIDE:
            raise ConfigurationError(
                f"{describe(number)} is out of reach: a window of {self.size:#x} bytes "
                f"has the pseudo-ops 0 to {self.size // STRIDE - 1:#x}"
            )
        if number in self._operations:
            raise ConfigurationError(f"{describe(number)} is registered already")

        def register(handler: H) -> H:
            self._operations[number] = handler
            return handler

        return register

    def read(self, offset: int, size: int) -> int | Awaitable[int]:
        result = self._call(offset)
        if inspect.isawaitable(result):
            return _number(result)
        return result or 0

    def write(self, offset: int, size: int, value: int) -> Awaitable[None] | None:
        result = self._call(offset)
        return _nothing(result) if inspect.isawaitable(result) else None

    def _call(self, offset: int) -> int | Awaitable[int | None] | None:
        number = offset // STRIDE
        handler = self._operations.get(number)
        if handler is None:
            raise GuestError(
                f"the guest called {describe(number)} of {self.name}, which is not registered; "
                f"add a handler with @window.operation({number:#x})"
            )
        return handler()


def describe(number: int) -> str:
    """A pseudo-op's number with gem5's name for it, if it has one."""
    known = number in M5Op.__members__.values()
    return f"pseudo-op {number:#x}" + (f" ({M5Op(number).name})" if known else "")


async def _number(result: Awaitable[int | None]) -> int:
    return await result or 0


async def _nothing(result: Awaitable[int | None]) -> None:
    await result
