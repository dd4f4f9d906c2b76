"""`lockstep`: two machines with the same program, compared exit by exit.

For CPU models against each other, and for one model's runs of different lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from .cpu import CONTROL, GENERAL, SEGMENTS
from .disassembly import disassemble_next
from .dump import format_context
from .exits import InterruptedExit, IoExit, MmioExit, VmExit
from .machine import Machine

__all__ = ["Difference", "defined_floats", "lockstep"]

OVERFLOW, ADJUST = 1 << 11, 1 << 4
RESUME = 1 << 16
"""RF, which AMD's processors show set where an access has left the guest (APM vol. 2, 8.9.2)."""
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
    undefined: int | Callable[[int], int] = UNDEFINED,
    memory: Sequence[tuple[int, int]] = (),
    floats: Callable[[bytes], object] | None = None,
) -> Difference | None:
    """Run the boot CPUs of both to the end or for so many exits; the first difference, or None.

    No device is asked: reads are answered by a number that follows from the exit's.

    Args:
        chunk: how long `second` runs at a time, in ticks; None is without limit.
        undefined: bits of RFLAGS that may differ; or what tells them by the number of
            exits before, for programs that know what they have executed there.
        memory: address and size of what is compared behind each exit.
        floats: from an XSAVE area (see `VCpu.read_xsave()`) to what of it is compared
            behind each exit, such as `defined_floats`; None is nothing.
    """
    masks = undefined if callable(undefined) else lambda count: undefined
    one, other = _Side(first, lambda: None), _Side(second, chunk)
    for count in range(exits):
        exit_, theirs = await one.next_exit(), await other.next_exit()
        what = None if exit_ == theirs else f"{exit_} and {theirs}"
        if what is None and not isinstance(exit_, IoExit | MmioExit):
            what = _compare(first, second, masks(count), memory, floats)
            return None if what is None else _difference(first, second, count, what)
        if what is None:
            pieces = [await side.answer(exit_, count) for side in (one, other)]
            if not any(pieces):
                what = _compare(first, second, masks(count), memory, floats)
        if what is not None:
            return _difference(first, second, count, what)
    return None


class _Side:
    """One of the machines."""

    def __init__(self, machine: Machine, chunk: Callable[[], int | None]) -> None:
        self._machine = machine
        self._chunk = chunk
        self._piece: VmExit | None = None  # a further access of an instruction not yet over

    async def next_exit(self) -> VmExit:
        exit_, self._piece = self._piece or InterruptedExit(), None
        while isinstance(exit_, InterruptedExit):
            exit_ = await self._machine.vcpus[0].run(self._chunk())
        return attrs.evolve(exit_, ticks=0)

    async def answer(self, exit_: VmExit, count: int) -> bool:
        """Complete the access. True: the instruction has another one."""
        _answer(self._machine, exit_, count)
        piece = await self._machine.vcpus[0].run(0)
        if not isinstance(piece, InterruptedExit):
            self._piece = piece
        return self._piece is not None


def defined_floats(xsave: bytes) -> dict[str, object]:
    """What an XSAVE area has of x87 and SSE state that every CPU model has alike.

    Not: the flags of exceptions, which stay until they are cleared; condition codes; where the
    last x87 instruction and its operand were; what registers hold that are marked empty.
    """
    tags = xsave[4]
    top = xsave[3] >> 3 & 7
    return {
        "FCW": xsave[:2].hex(),
        "top": top,
        "tags": tags,
        "MXCSR": int.from_bytes(xsave[24:28], "little") & ~0x3F,
        **{
            f"ST({i})": xsave[32 + 16 * i : 42 + 16 * i].hex()
            for i in range(8)
            if tags >> (top + i) % 8 & 1
        },
        **{f"XMM{i}": xsave[160 + 16 * i : 176 + 16 * i].hex() for i in range(16)},
    }


def _answer(machine: Machine, exit_: VmExit, count: int) -> None:
    model = machine.vcpus[0].model
    number = (count * 0x9E3779B97F4A7C15) & (1 << 64) - 1
    if isinstance(exit_, IoExit) and not exit_.is_write:
        first = model.page.io.data_offset // exit_.size
        for index in range(first, first + exit_.count):
            model.io_words[exit_.size][index] = number & (1 << 8 * exit_.size) - 1
    elif isinstance(exit_, MmioExit) and not exit_.is_write:
        model.mmio_word[0] = number


def _compare(
    first: Machine,
    second: Machine,
    undefined: int,
    memory: Sequence[tuple[int, int]],
    floats: Callable[[bytes], object] | None,
) -> str | None:
    what = _compare_registers(first, second, undefined)
    for address, size in memory:
        ours, theirs = (machine.memory.read(address, size) for machine in (first, second))
        if what is None and ours != theirs:
            at = next(i for i in range(size) if ours[i] != theirs[i])
            parts = [side[at : at + 16].hex(" ") for side in (ours, theirs)]
            what = f"memory at {address + at:#x}: {parts[0]} and {parts[1]}"
    if what is None and floats is not None:
        one, other = (floats(m.vcpus[0].read_xsave() or b"") for m in (first, second))
        if isinstance(one, dict) and isinstance(other, dict):  # only what differs
            one, other = (
                {
                    key: side.get(key)
                    for key in one.keys() | other.keys()
                    if one.get(key) != other.get(key)
                }
                for side in (one, other)
            )
        if one != other:
            what = f"{one} and {other}"
    return what


def _compare_registers(first: Machine, second: Machine, undefined: int) -> str | None:
    one, other = (machine.vcpus[0].context for machine in (first, second))
    if first.vcpus[0].model.kind != second.vcpus[0].model.kind:
        undefined |= RESUME
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
