"""`lockstep`: two machines with the same program, compared exit by exit.

For CPU models against each other, and for one model's runs of different lengths.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from .cpu import CONTROL, GENERAL, SEGMENTS
from .disassembly import disassemble_next
from .dump import format_context
from .exits import InterruptedExit, IoExit, MmioExit, VmExit
from .machine import Machine

__all__ = ["Difference", "lockstep"]

OVERFLOW, ADJUST = 1 << 11, 1 << 4
UNDEFINED = OVERFLOW | ADJUST
"""Flags that logical, shift and multiply instructions leave undefined (SDM vol. 1, appendix A)."""

_COMPARED = tuple(name for name in (*GENERAL, *CONTROL) if name not in ("rflags", "apic_base"))


@attrs.frozen
class Difference:
    """Where two machines parted.

    Attributes:
        exit: how many exits were the same before.
        what: what differs, in words.
        report: registers and the code at them, of both.
    """

    exit: int
    what: str
    report: str = attrs.field(repr=False)


async def lockstep(
    first: Machine,
    second: Machine,
    *,
    exits: int,
    chunk: Callable[[], int | None] = lambda: None,
    undefined: int = UNDEFINED,
) -> Difference | None:
    """Run the boot CPUs of both to the end or for so many exits; the first difference, or None.

    No device is asked: reads are answered by a number that follows from the exit's.

    Args:
        chunk: how long `second` runs at a time, in ticks; None is without limit.
        undefined: bits of RFLAGS that may differ.
    """
    for count in range(exits):
        one = await _next(first, lambda: None)
        other = await _next(second, chunk)
        if (what := _compare_exits(one, other)) is None:
            for machine in (first, second):
                _answer(machine, one, count)
            if not isinstance(one, IoExit | MmioExit):
                what = _compare_registers(first, second, undefined)
                return None if what is None else _difference(first, second, count, what)
            pieces = [await machine.vcpus[0].run(0) for machine in (first, second)]
            if all(isinstance(piece, InterruptedExit) for piece in pieces):
                what = _compare_registers(first, second, undefined)
        if what is not None:
            return _difference(first, second, count, what)
    return None


async def _next(machine: Machine, chunk: Callable[[], int | None]) -> VmExit:
    exit_: VmExit = InterruptedExit()
    while isinstance(exit_, InterruptedExit):
        exit_ = await machine.vcpus[0].run(chunk())
    return attrs.evolve(exit_, ticks=0)


def _answer(machine: Machine, exit_: VmExit, count: int) -> None:
    model = machine.vcpus[0].model
    number = (count * 0x9E3779B97F4A7C15) & (1 << 64) - 1
    if isinstance(exit_, IoExit) and not exit_.is_write:
        first = model.page.io.data_offset // exit_.size
        for index in range(first, first + exit_.count):
            model.io_words[exit_.size][index] = number & (1 << 8 * exit_.size) - 1
    elif isinstance(exit_, MmioExit) and not exit_.is_write:
        model.mmio_word[0] = number


def _compare_exits(one: VmExit, other: VmExit) -> str | None:
    return None if one == other else f"{one} and {other}"


def _compare_registers(first: Machine, second: Machine, undefined: int) -> str | None:
    one, other = (machine.vcpus[0].context for machine in (first, second))
    if (one.rflags ^ other.rflags) & ~undefined:
        return f"rflags {one.rflags:#x} and {other.rflags:#x}"
    for name in _COMPARED:
        if getattr(one, name) != getattr(other, name):
            return f"{name} {getattr(one, name):#x} and {getattr(other, name):#x}"
    for name in SEGMENTS:
        ours, theirs = getattr(one, name), getattr(other, name)
        if (ours.selector, ours.base) != (theirs.selector, theirs.base):
            return f"{name} {ours} and {theirs}"
    return None


def _difference(first: Machine, second: Machine, count: int, what: str) -> Difference:
    parts = []
    for machine in (first, second):
        context = machine.vcpus[0].context
        code = "\n".join(disassemble_next(machine.memory, context, 3))
        parts.append(f"{machine.vcpus[0].model.kind}:\n{format_context(context)}\n{code}")
    return Difference(count, what, "\n\n".join(parts))
