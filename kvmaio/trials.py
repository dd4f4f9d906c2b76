"""Small guests that show which modes run here and how, and what exits and kicks cost."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise

import attrs

from .boot import Flat
from .device import Device
from .errors import KvmaioError
from .exits import Halted, IoExit
from .machine import Machine
from .registers import Register

__all__ = ["Measurement", "ModeResult", "try_guests"]

STEP_LIMIT_S = 2.0
"""For one trial; on any healthy host it takes a tenth of that."""

EXITS = 200
KICKS = 20
LOOPS = 20_000
EMULATED_BELOW = 10e6
"""Instructions a second: KVM's emulator makes about 1 million, the slowest processor hundreds."""

_MODES = {
    "real16": "16-bit real mode: boot code, firmware",
    "prot32": "32-bit kernel mode",
    "long64": "64-bit kernel mode",
    "user64": "64-bit user mode",
}


@attrs.frozen
class ModeResult:
    """How a guest mode fares: ``"native"``, ``"emulated"`` by KVM, ``"in software"``, ``"fails"``.

    Attributes:
        rate: guest instructions a second; None where they are too fast to be
            timed in a fraction of a second.
        problem: why it fails.
    """

    mode: str
    purpose: str
    how: str
    rate: float | None = None
    problem: str | None = None


@attrs.frozen
class Measurement:
    """The median of some trials in microseconds; None with a problem."""

    name: str
    microseconds: float | None
    meaning: str
    problem: str | None = None


async def try_guests() -> tuple[list[ModeResult], list[Measurement]]:
    """Try every mode, and measure; what goes wrong is in the results."""
    modes = [await _try_mode(mode, purpose) for mode, purpose in _MODES.items()]
    costs = [
        await _measured("exit", "from the guest to KVM's caller and back", _exit_cost),
        await _measured("device", "the same up to a device in Python and back", _device_cost),
        await _measured("kick", "from kick() until a spinning guest is left", _kick_latency),
    ]
    return modes, costs


async def _try_mode(mode: str, purpose: str) -> ModeResult:
    """Time a countdown loop in `mode`; a first, short one shows what starting takes."""
    try:
        async with asyncio.timeout(STEP_LIMIT_S):
            start_s, cpu = await _countdown(mode, 1)
            taken_s = (await _countdown(mode, LOOPS))[0] - start_s
    except (KvmaioError, TimeoutError) as error:
        return ModeResult(mode, purpose, "fails", problem=str(error) or "it does not end")
    rate = 2 * LOOPS / taken_s if taken_s > 0 else float("inf")
    if cpu == "soft":
        return ModeResult(mode, purpose, "in software")
    if rate < EMULATED_BELOW:
        return ModeResult(mode, purpose, "emulated", round(rate))
    return ModeResult(mode, purpose, "native")


async def _countdown(mode: str, count: int) -> tuple[float, str]:
    """Seconds of CPU time that a guest takes to count down and halt; and on which CPU model."""
    #   mov ecx, count ; again: dec ecx ; jnz again ; hlt
    if mode == "real16":  # where 66 makes the operands 32 bits wide
        code = b"\x66\xb9" + count.to_bytes(4, "little") + bytes.fromhex("66ffc9 75fb f4")
    else:
        code = b"\xb9" + count.to_bytes(4, "little") + bytes.fromhex("ffc9 75fc f4")
    async with Machine(memory="2M") as machine:
        machine.load(Flat(code, address=0x1000, mode=mode))
        exit_ = await machine.vcpus[0].run()
        if await machine.run() != Halted():
            raise KvmaioError(f"a loop ended with {exit_}")
        return exit_.ticks / 1e9, machine.vcpus[0].model.kind


async def _measured(
    name: str, meaning: str, measure: Callable[[], Awaitable[list[float]]]
) -> Measurement:
    try:
        async with asyncio.timeout(STEP_LIMIT_S):
            seconds = await measure()
    except (KvmaioError, TimeoutError) as error:
        return Measurement(name, None, meaning, str(error) or f"no result in {STEP_LIMIT_S:g} s")
    return Measurement(name, round(statistics.median(seconds) * 1e6, 1), meaning)


#   again: in al, 0x50 ; jmp again
_READS = bytes.fromhex("e450 ebfc")
#   again: jmp again
_SPINS = bytes.fromhex("ebfe")


async def _exit_cost() -> list[float]:
    async with Machine(memory="2M") as machine:
        machine.load(Flat(_READS, address=0x1000))
        cpu = machine.vcpus[0]
        began_s = time.perf_counter()
        exits = [await cpu.run() for _ in range(EXITS)]
        assert isinstance(exits[-1], IoExit)
        if cpu.model.kind == "soft":  # its ticks are instructions
            return [(time.perf_counter() - began_s) / EXITS]
        return [exit_.ticks / 1e9 for exit_ in exits[10:]]


class _Stopwatch(Device):
    """Answers at once, and notes when it was asked."""

    value = Register(0x0, int)

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.times: list[float] = []

    @value.on_read
    def note(self) -> int:
        self.times.append(time.perf_counter())
        if len(self.times) > EXITS:
            self.machine.stop()
        return 0


async def _device_cost() -> list[float]:
    async with Machine(memory="2M") as machine:
        watch = machine.attach(_Stopwatch(machine), pio=0x50)
        machine.load(Flat(_READS, address=0x1000))
        await machine.run()
        return [after - before for before, after in pairwise(watch.times)][10:]


async def _kick_latency() -> list[float]:
    async with Machine(memory="2M") as machine:
        machine.load(Flat(_SPINS, address=0x1000, mode="user64"))
        cpu = machine.vcpus[0]
        latencies = []
        for _ in range(KICKS):
            entry = asyncio.create_task(cpu.run())
            await asyncio.sleep(0.002)
            kicked = time.perf_counter()
            cpu.kick()
            await entry
            latencies.append(time.perf_counter() - kicked)
        return latencies
