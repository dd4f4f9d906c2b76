"""Drains, resets and forks."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from ..boot import Flat
from ..checkpoint import Checkpoint
from ..machine import Machine
from ..memory_image import MemoryImage
from .guests import PORT, AsyncDevice
from .harness import Bench, Figure, Gate, Row, figure

__all__ = ["measure"]

MIB = 1 << 20
MACHINE = 256 * MIB
DIRTIED = MIB
FORKED = 64 * MIB
FORKS = 50
QUICK_SHARE = 16
"""A quick run has this share of the memory."""

# inc eax; test al, 0x3f; jnz again; mov dx, PORT; out dx, al; jmp again
_COMPUTES_AND_EXITS = b"\x66\x40\xa8\x3f\x75\xfa\xba" + PORT.to_bytes(2, "little") + b"\xee\xeb\xf4"

_HALTS = b"\xf4"


async def measure(bench: Bench) -> AsyncIterator[Row]:
    """Each against what it spares, where it spares something."""
    yield await _drain(bench)
    yield await _reset(bench)
    yield await _forks(bench)


async def _drain(bench: Bench) -> Row:
    """Four vCPUs that compute and exit, brought to rest at random moments."""
    samples, chosen = [], random.Random(1)
    async with Machine(memory="1M", vcpus=4) as machine:
        device = machine.attach(AsyncDevice(), pio=PORT)
        device.left = 1 << 62
        machine.load(Flat(_COMPUTES_AND_EXITS, 0x1000))
        run = asyncio.create_task(machine.run())
        for vcpu in machine.vcpus[1:]:
            vcpu.init()
            vcpu.start_up(1)
        for _ in range(5 if bench.quick else 20 * bench.rounds):
            await asyncio.sleep(chosen.uniform(0.001, 0.005))
            started = time.perf_counter()
            async with machine.drained():
                samples.append(time.perf_counter() - started)
        machine.stop()
        await run
    gate = Gate(at_most=10)
    return Row(
        "checkpoints",
        "drain of 4 vCPUs that compute and exit",
        bench.loop,
        (figure("time", samples, "ms", scale=1e-3, gate=gate),),
    )


async def _reset(bench: Bench) -> Row:
    """Back to a checkpoint in the same machine; and all of it into a fresh one."""
    size = MACHINE // QUICK_SHARE if bench.quick else MACHINE
    resets, fulls, ratios = [], [], []
    async with Machine(memory=size) as machine:
        machine.load(Flat(_HALTS, 0x1000))
        for start in range(MIB, size - MIB, MIB):  # all of it is in use
            machine.memory.write(start, os.urandom(4096) * 256)
        saved = await machine.checkpoint()
        await machine.restore(saved)
        pages = range(MIB, size - MIB, (size - 2 * MIB) // (DIRTIED // 4096) // 4096 * 4096)
        for _ in range(2 if bench.quick else 2 * bench.rounds):
            full_s = await _full_restore(await machine.checkpoint(), size)
            for page in pages:
                machine.memory.write(page, b"dirty")
            await machine.run()
            started = time.perf_counter()
            await machine.restore(saved)
            resets.append(time.perf_counter() - started)
            fulls.append(full_s)
            ratios.append(full_s / resets[-1])
    return Row(
        "checkpoints",
        f"reset of {size // MIB} MiB, 1 MiB dirtied",
        bench.loop,
        (
            figure("time", resets, "ms", scale=1e-3, gate=None if bench.quick else Gate(at_most=5)),
            figure("full restore", fulls, "ms", scale=1e-3),
            figure("faster by", ratios, gate=None if bench.quick else Gate(at_least=20)),
        ),
        "all of the memory in use",
    )


async def _full_restore(saved: Checkpoint, size: int) -> float:
    """Into a fresh machine, as in a process that has no image of the memory yet."""
    async with Machine(memory=size) as machine:
        started = time.perf_counter()
        image = MemoryImage(saved.memory)
        image.serves(saved)
        await machine.restore(saved)
        return time.perf_counter() - started


async def _forks(bench: Bench) -> Row:
    """What a copy takes of the host's memory before it writes anything."""
    size, count = (FORKED // QUICK_SHARE, 5) if bench.quick else (FORKED, FORKS)
    async with AsyncExitStack() as stack:
        machine = await stack.enter_async_context(Machine(memory=size))
        machine.load(Flat(_HALTS, 0x1000))
        for start in range(MIB, size, MIB):
            machine.memory.write(start, os.urandom(4096) * 256)
        await machine.fork(1)  # the image that all of them share
        before, started = _private_bytes(), time.perf_counter()
        copies = await machine.fork(count)
        each_s = (time.perf_counter() - started) / count
        runs = await asyncio.gather(*(copy.run() for copy in copies))
        each = (_private_bytes() - before) / count / MIB
    return Row(
        "checkpoints",
        f"{count} forks of {size // MIB} MiB",
        bench.loop,
        (
            Figure("time", each_s * 1e3, "ms"),
            Figure("memory each", each, "MiB", gate=None if bench.quick else Gate(at_most=1)),
        ),
        f"{len(runs)} of them ran to their end",
    )


def _private_bytes() -> int:
    """Of this process's memory, what it shares with nobody, the image included."""
    with open("/proc/self/smaps_rollup") as rollup:
        fields = dict(line.split(":", 1) for line in rollup if ":" in line)
    return int(fields["Anonymous"].split()[0]) * 1024
