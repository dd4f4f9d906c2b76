"""Guests for tests of the resident runner, and what these tests share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from kvmaio.boot import Flat
from kvmaio.device import Device
from kvmaio.kvm.cpu import KvmCpu
from kvmaio.machine import Machine

__all__ = [
    "ALTERNATING",
    "COMPUTING",
    "FIRST_EXITS",
    "HALTING",
    "LOOPS",
    "PATIENCE",
    "PORT",
    "SPINNING",
    "STORMING",
    "SVMLAB",
    "Port",
    "cpu_of",
    "machine_with",
    "posix_timers",
    "resident",
    "run_on",
]

SVMLAB = os.environ.get("SVMLAB") == "1"
PATIENCE = 10 if SVMLAB else 1
"""Time limits are multiplied by this: the emulated machine is slow."""

PORT = 0x3F8
T = TypeVar("T")

# All: mov dx, 0x3f8
_DX = "baf803"
# forever: jmp forever
SPINNING = bytes.fromhex("ebfe")
# again: out dx, al; jmp again
STORMING = bytes.fromhex(_DX + "ee ebfd")
FIRST_EXITS = 400
# mov cx, 400; again: out dx, al; loop again; forever: jmp forever
COMPUTING = bytes.fromhex(_DX + "b99001 ee e2fd ebfe")
# again: mov cx, 200; first: out dx, al; loop first; mov cx, 0x4000; second: loop second; jmp again
ALTERNATING = bytes.fromhex(_DX + "b9c800 ee e2fd b90040 e2fe ebf3")
# mov cx, 400; again: out dx, al; loop again; forever: hlt; jmp forever
HALTING = bytes.fromhex(_DX + "b99001 ee e2fd f4 ebfd")

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


class Port(Device):
    """Counts what is written; reads give the count."""

    size = 8

    def __init__(self) -> None:
        self.count = 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.count += 1

    def read(self, offset: int, size: int) -> int:
        return self.count & ((1 << 8 * size) - 1)


def run_on(kind: str, main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on a new loop of this kind."""
    with asyncio.Runner(loop_factory=LOOPS[kind]) as runner:
        return runner.run(main)


@asynccontextmanager
async def machine_with(
    code: bytes, device: Device | None = None, **options: Any
) -> AsyncIterator[Machine]:
    """A small machine with `code` loaded and a port at 0x3f8."""
    async with Machine(memory="512K", cpu="kvm", **options) as machine:
        machine.attach(device or Port(), pio=PORT)
        machine.load(Flat(code, address=0x1000))
        yield machine


def cpu_of(machine: Machine, index: int = 0) -> KvmCpu:
    model = machine.vcpus[index].model
    assert isinstance(model, KvmCpu)
    return model


async def resident(machine: Machine) -> KvmCpu:
    """Wait until the running machine's vCPU lives on the loop's thread."""
    cpu = cpu_of(machine)
    async with asyncio.timeout(20 * PATIENCE):
        while not cpu.is_resident:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    return cpu


def posix_timers() -> str:
    """What POSIX timers this process has; empty also where the kernel does not tell."""
    file = Path("/proc/self/timers")
    return file.read_text() if file.exists() else ""
