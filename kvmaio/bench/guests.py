"""The guests and devices that are measured, and the raw loop that they are measured against."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs

from ..boot import Flat
from ..device import Device
from ..exits import EndRun, Exited
from ..kvm._native import ffi, lib
from ..kvm.cpu import KvmCpu
from ..kvm.gate import check
from ..machine import Machine

__all__ = [
    "ADDRESS",
    "GUESTS",
    "HALTED",
    "PORT",
    "SPIN",
    "AsyncDevice",
    "CountingDevice",
    "Guest",
    "PlainDevice",
    "Raw",
    "Storm",
    "SuspendingDevice",
    "model_of",
    "storming",
    "user_loop",
]

PORT = 0x3F8
ADDRESS = 0xA0000
"""Just above the RAM of the real-mode guests."""

KVM_SET_SIGNAL_MASK = 0x4004_AE8B  # _IOW(KVMIO, 0x8b, struct kvm_signal_mask)

_START = 0x1000


@attrs.frozen
class Guest:
    """Machine code, and where it runs.

    Attributes:
        is_pio: does it access PORT, or ADDRESS?
    """

    name: str
    code: bytes
    mode: str = "real16"
    is_pio: bool = True

    def machine(self) -> Machine:
        """A machine of the least size; not entered yet."""
        return Machine(memory="2M" if self.mode == "user64" else "512K", cpu="kvm")

    def image(self) -> Flat:
        """The code as an image."""
        return Flat(self.code, address=_START, mode=self.mode)


def _guest(name: str, code: str, **options: Any) -> Guest:
    return Guest(name, bytes.fromhex(code), **options)


GUESTS = {
    guest.name: guest
    for guest in (
        # mov dx, 0x3f8; L: out dx, al; jmp L
        _guest("pio write", "baf803 ee ebfd"),
        # the same with in al, dx
        _guest("pio read", "baf803 ec ebfd"),
        # mov ax, 0xa000; mov ds, ax; L: mov [0], al; jmp L
        _guest("mmio write", "b800a0 8ed8 a20000 ebfb", is_pio=False),
        # the same with mov al, [0]
        _guest("mmio read", "b800a0 8ed8 a00000 ebfb", is_pio=False),
        # mov dx, 0x3f8; L: out dx, al; jmp L
        _guest("user64 pio write", "66baf803 ee ebfd", mode="user64"),
        # mov dx, 0x3f8; L: mov cx, 1000; loop $; out dx, al; jmp L
        _guest("compute", "baf803 b9e803 e2fe ee ebf8"),
    )
}

SPIN = _guest("spin", "ebfe")  # jmp $
HALTED = _guest("halted", "fbf4 ebfc")  # L: sti; hlt; jmp L


def user_loop(turns: int) -> Guest:
    """Counts down from `turns` in user mode, then writes to PORT, and again."""
    # mov dx, 0x3f8; L: mov ecx, turns; M: dec ecx; jnz M; out dx, al; jmp L
    count = turns.to_bytes(4, "little").hex()
    return _guest("user64 loop", f"66baf803 b9{count} ffc9 75fc ee ebf4", mode="user64")


class CountingDevice(Device):
    """Ends the run at the last of `left` accesses; subclasses differ in how they do it.

    The handlers count by themselves: a call more would be measured, too.
    """

    size = 8
    left = 0


class PlainDevice(CountingDevice):
    """Its handlers are plain functions."""

    def read(self, offset: int, size: int) -> int:
        self.left -= 1
        if self.left <= 0:
            raise EndRun(Exited(0))
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.left -= 1
        if self.left <= 0:
            raise EndRun(Exited(0))


class AsyncDevice(CountingDevice):
    """Its handlers are coroutines that do not suspend."""

    async def read(self, offset: int, size: int) -> int:
        self.left -= 1
        if self.left <= 0:
            raise EndRun(Exited(0))
        return 0

    async def write(self, offset: int, size: int, value: int) -> None:
        self.left -= 1
        if self.left <= 0:
            raise EndRun(Exited(0))


class SuspendingDevice(AsyncDevice):
    """Its handlers let the loop have a turn."""

    async def read(self, offset: int, size: int) -> int:
        await asyncio.sleep(0)
        return await super().read(offset, size)

    async def write(self, offset: int, size: int, value: int) -> None:
        await asyncio.sleep(0)
        await super().write(offset, size, value)


def model_of(machine: Machine, index: int = 0) -> KvmCpu:
    """The KVM vCPU behind one of the machine's."""
    model = machine.vcpus[index].model
    assert isinstance(model, KvmCpu)
    return model


class Raw:
    """A guest in a loop of C that answers nothing, on the calling thread: the reference."""

    def __init__(self, machine: Machine) -> None:
        self.model = model_of(machine)

    @classmethod
    @asynccontextmanager
    async def opened(cls, guest: Guest) -> AsyncIterator[Raw]:
        """`guest`, never to be entered but by this loop."""
        async with guest.machine() as machine:
            machine.load(guest.image())
            raw = cls(machine)
            raw.model.write_context(machine.vcpus[0].context)
            # As a plain program has it: without the mask for the vCPU's own thread.
            check(lib.kvmaio_ioctl(raw.model.fd, KVM_SET_SIGNAL_MASK, ffi.NULL), "no signal mask")
            yield raw

    def run(self, exits: int) -> float:
        """Nanoseconds an exit."""
        took_ns = lib.kvmaio_raw_loop(self.model.handle, exits)
        return check(took_ns, "KVM_RUN") / exits


@attrs.define
class Storm:
    """A machine whose guest does nothing but access its device.

    Attributes:
        moves: how often its vCPU had moved between threads when its last run ended.
        where: who ran it then, in words.
    """

    machine: Machine
    device: CountingDevice
    moves: int = 0
    where: str = ""

    async def run(self, exits: int) -> float:
        """Nanoseconds an exit."""
        self.device.left = exits
        started_ns = time.perf_counter_ns()
        await self.machine.run()
        took_ns = time.perf_counter_ns() - started_ns
        self.look()
        return took_ns / exits

    def look(self) -> None:
        """Note where its vCPU is."""
        model = model_of(self.machine)
        self.moves = model.moves
        self.where = "on the loop's thread" if model.is_resident else "on a thread of its own"


@asynccontextmanager
async def storming(
    guest: Guest, make_device: Callable[[], CountingDevice] = AsyncDevice
) -> AsyncIterator[Storm]:
    """`guest` with a device of its own, entered and loaded."""
    async with guest.machine() as machine:
        device = make_device()
        if guest.is_pio:
            machine.attach(device, pio=PORT)
        else:
            machine.attach(device, mmio=ADDRESS)
        machine.load(guest.image())
        yield Storm(machine, device)
