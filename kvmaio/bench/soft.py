"""The software CPU: how fast it executes, leaves its guest, and assists KVM."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from ..boot import Flat
from ..device import Device
from ..exits import Exited
from ..kvm.host import kvm_kind
from ..machine import Machine
from ..soft.loader import why_not
from .guests import AsyncDevice
from .harness import Bench, Gate, Row, figure

__all__ = ["measure"]

PORT, END = 0x80, 0xF4
TURNS = 2_000_000
EXITS = 50_000
ASSISTS = 500

# mov rax, [0x5000]; add rax, rcx; mov [0x5000], rax; imul rbx, rax; xor rdx, rbx; shr rdx, 3
_WORK = bytes.fromhex("488b042500500000 4801c8 4889042500500000 480fafd8 4831da 48c1ea03")
_OUT = b"\xe6\x80"  # out 0x80, al
_IN = b"\xe4\x80"  # in al, 0x80
_SSE = bytes.fromhex("0f58c1 90909090")  # addps xmm0, xmm1; nops


def _loop(body: bytes, turns: int) -> bytes:
    """mov ecx, turns; again: body; dec ecx; jnz again; out 0xf4, al"""
    back = (-(len(body) + 4)) & 0xFF
    return b"\xb9" + turns.to_bytes(4, "little") + body + bytes([0xFF, 0xC9, 0x75, back, 0xE6, END])


async def measure(bench: Bench) -> AsyncIterator[Row]:
    """Instructions with and without exact counts, exits to async handlers, assists."""
    if (reason := why_not()) is not None:
        yield Row("soft", "the software CPU", bench.loop, note=reason)
        return
    yield await _speed(bench, "counted exactly", counting=True, at_least=15)
    yield await _speed(bench, "uncounted", counting=False, at_least=60)
    yield await _exits(bench, "writes to an async handler", _OUT)
    yield await _exits(bench, "reads from an async handler", _IN)
    if kvm_kind() == "PVM":  # elsewhere KVM needs no help
        yield await _assists(bench)


async def _seconds(machine: Machine, code: bytes) -> float:
    machine.load(Flat(code, 0x1000, "long64"))
    started = time.perf_counter()
    outcome = await machine.run()
    assert isinstance(outcome, Exited)
    return time.perf_counter() - started


class _End(Device):
    size = 1

    def write(self, offset: int, size: int, value: int) -> None:
        from ..exits import EndRun

        raise EndRun(Exited(0))


async def _speed(bench: Bench, name: str, *, counting: bool, at_least: float) -> Row:
    turns = TURNS // (4 if bench.quick else 1)
    async with Machine(cpu="soft") as machine:
        machine.attach(_End(), pio=END)
        machine.vcpus[0].model.counting = counting  # type: ignore[attr-defined]
        seconds = [await _seconds(machine, _loop(_WORK, turns)) for _ in range(bench.rounds)]
    rates = [8 * turns / s / 1e6 for s in seconds]
    gate = Gate(at_least=at_least)
    return Row(
        "soft", name, bench.loop, (figure("M insn/s", rates, gate=gate),), "8 kinds in a loop"
    )


async def _exits(bench: Bench, name: str, body: bytes) -> Row:
    exits = EXITS // (4 if bench.quick else 1)
    async with Machine(cpu="soft") as machine:
        machine.attach(_End(), pio=END)
        machine.attach(AsyncDevice(), pio=PORT).left = 1 << 60
        seconds = [await _seconds(machine, _loop(body, exits)) for _ in range(bench.rounds)]
    rates = [exits / s / 1e3 for s in seconds]
    return Row("soft", name, bench.loop, (figure("k exits/s", rates, gate=Gate(at_least=200)),))


async def _assists(bench: Bench) -> Row:
    # One at a time: the loop around them is too short for KVM to get a word in otherwise.
    from .. import assist

    before, assist.SOON_NS = assist.SOON_NS, 0
    try:
        async with Machine() as machine:
            machine.attach(_End(), pio=END)
            code = _loop(_SSE, ASSISTS)
            seconds = [await _seconds(machine, code) for _ in range(bench.rounds)]
    finally:
        assist.SOON_NS = before
    each = [s / ASSISTS for s in seconds]
    gate = Gate(at_most=150)
    note = "with KVM's part: 7 instructions emulated, an exit and an entry"
    return Row(
        "soft", "assist", bench.loop, (figure("each", each, "µs", scale=1e-6, gate=gate),), note
    )
