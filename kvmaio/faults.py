"""Faults: context managers that make interrupts and devices misbehave.

::

    with faults.drop_interrupts(machine, timer.irq, when=faults.every(3)) as fault:
        await machine.run()
    assert fault.count == 2

A fault stands between the guest and the device, which knows nothing of it. Each time it
strikes it is counted, and shows in a trace (`kvmaio.trace.FaultRecord`). Where several are
active, the one entered last is the nearest to the guest.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .bus import Layer, Mapping, Target
from .clock import Cancellable
from .device import Device
from .errors import ConfigurationError
from .irq import IrqLine, IrqSink
from .machine import Machine
from .registers import Register, SharedRegister

__all__ = [
    "Fault",
    "When",
    "always",
    "chance",
    "delay_interrupts",
    "drop_interrupts",
    "duplicate_interrupts",
    "every",
    "flip_bits",
    "short_reads",
    "slow_device",
    "stick",
]

When = Callable[[int], bool]
"""Does the fault strike at its n-th opportunity? They count from 1."""


def always(opportunity: int) -> bool:
    """Strike each time."""
    return True


def every(count: int) -> When:
    """Strike at each `count`-th opportunity."""
    return lambda opportunity: opportunity % count == 0


def chance(probability: float, seed: int) -> When:
    """Strike by chance, but the same way with the same seed."""
    source = random.Random(seed)
    return lambda opportunity: source.random() < probability


class Fault:
    """A fault that is active.

    Attributes:
        opportunities: how often it could have struck.
        count: how often it did.
    """

    def __init__(self, machine: Machine, source: str, when: When) -> None:
        self.opportunities = 0
        self.count = 0
        self._tracing = machine.tracing
        self._source = source
        self._when = when

    def strikes(self, what: str) -> bool:
        """Does it now? If so, `what` is told to traces."""
        self.opportunities += 1
        if not self._when(self.opportunities):
            return False
        self.count += 1
        self._tracing.fault(self._source, what)
        return True


# ---- interrupts ----------------------------------------------------------------------


@contextmanager
def delay_interrupts(
    machine: Machine, line: IrqLine, ns: int, when: When = always
) -> Iterator[Fault]:
    """Each rise of `line` comes `ns` guest nanoseconds late, its fall no earlier than that.

    At the end of the block, what is still on its way comes at once.
    """
    fault = Fault(machine, line.name, when)
    waiting: list[Cancellable] = []
    last_due_ns = 0

    def through(level: bool, deliver: IrqSink) -> None:
        nonlocal last_due_ns
        late = level and fault.strikes(f"interrupt delayed by {ns} ns")
        if not late and not waiting:
            deliver(level)
            return

        def arrive() -> None:
            waiting.pop(0)
            deliver(level)

        # Not before what is waiting already: the order of the changes is kept.
        due_ns = machine.clock.now_ns + (ns if late else 0)
        last_due_ns = max(due_ns, last_due_ns) if waiting else due_ns
        waiting.append(machine.clock.call_at_ns(last_due_ns, arrive))

    with line.through(through):
        yield fault
        for call in waiting:
            call.cancel()


@contextmanager
def drop_interrupts(machine: Machine, line: IrqLine, when: When = always) -> Iterator[Fault]:
    """A rise of `line` does not reach anybody, until the next one."""
    fault = Fault(machine, line.name, when)
    dropped = False

    def through(level: bool, deliver: IrqSink) -> None:
        nonlocal dropped
        if level:
            dropped = fault.strikes("interrupt dropped")
        if not dropped:
            deliver(level)

    with line.through(through):
        yield fault


@contextmanager
def duplicate_interrupts(machine: Machine, line: IrqLine, when: When = always) -> Iterator[Fault]:
    """A rise of `line` comes twice: up, down, up."""
    fault = Fault(machine, line.name, when)

    def through(level: bool, deliver: IrqSink) -> None:
        deliver(level)
        if level and fault.strikes("interrupt duplicated"):
            deliver(False)
            deliver(True)

    with line.through(through):
        yield fault


# ---- devices -------------------------------------------------------------------------


@contextmanager
def flip_bits(
    machine: Machine, device: Device, register: str, mask: int, when: When = always
) -> Iterator[Fault]:
    """Reads of `register` come with the bits of `mask` inverted."""
    fault = Fault(machine, device.name, when)
    found = _register(device, register)
    what = f"{register}: bits {mask:#x} flipped"

    def change(offset: int, size: int, value: int) -> int:
        if not _reaches(device, found, offset, size, is_write=False) or not fault.strikes(what):
            return value
        return value ^ _placed(mask & found.mask, found, offset, size)

    with _layer(machine, _on_reads(device, change)):
        yield fault


@contextmanager
def stick(
    machine: Machine, device: Device, register: str, value: int, when: When = always
) -> Iterator[Fault]:
    """`register` reads as `value`, and writes to it are lost."""
    fault = Fault(machine, device.name, when)
    found = _register(device, register)
    what = f"{register}: stuck at {value:#x}"

    def change(offset: int, size: int, answer: int) -> int:
        if not _reaches(device, found, offset, size, is_write=False) or not fault.strikes(what):
            return answer
        mask = _placed(found.mask, found, offset, size)
        return answer & ~mask | _placed(value & found.mask, found, offset, size)

    def lose(target: Target) -> Target:
        def write(offset: int, size: int, value: int) -> Awaitable[None] | None:
            lost = _reaches(device, found, offset, size, is_write=True) and fault.strikes(what)
            return None if lost else target.write(offset, size, value)

        return Target(target.offset, target.read, write, target.update)

    reads = _on_reads(device, change)

    def layer(mapping: Mapping | None, address: int, size: int, target: Target) -> Target:
        target = reads(mapping, address, size, target)
        return lose(target) if mapping is not None and mapping.device is device else target

    with _layer(machine, layer):
        yield fault


@contextmanager
def slow_device(
    machine: Machine, device: Device, seconds: float, when: When = always
) -> Iterator[Fault]:
    """Each access to `device` takes so much longer, by the loop's time; its vCPU waits."""
    fault = Fault(machine, device.name, when)
    what = f"access delayed by {seconds:g} s"

    def layer(mapping: Mapping | None, address: int, size: int, target: Target) -> Target:
        if mapping is None or mapping.device is not device:
            return target

        async def read(offset: int, size: int) -> int:
            if fault.strikes(what):
                await asyncio.sleep(seconds)
            value = target.read(offset, size)
            return value if isinstance(value, int) else await value

        async def write(offset: int, size: int, value: int) -> None:
            if fault.strikes(what):
                await asyncio.sleep(seconds)
            pending = target.write(offset, size, value)
            if pending is not None:
                await pending

        return Target(target.offset, read, write, target.update)

    with _layer(machine, layer):
        yield fault


@contextmanager
def short_reads(
    machine: Machine, device: Device, size: int, when: When = always
) -> Iterator[Fault]:
    """Reads wider than `size` bytes get only so many; the others are ones, as on an open bus."""
    fault = Fault(machine, device.name, when)

    def change(offset: int, wanted: int, value: int) -> int:
        if wanted <= size or not fault.strikes(f"{size} of {wanted} bytes read"):
            return value
        return value & ((1 << 8 * size) - 1) | -1 << 8 * size

    with _layer(machine, _on_reads(device, change)):
        yield fault


# ---- inside --------------------------------------------------------------------------


@contextmanager
def _layer(machine: Machine, layer: Layer) -> Iterator[None]:
    for bus in (machine.pio, machine.mmio):
        bus.add_layer(layer)
    try:
        yield
    finally:
        for bus in (machine.pio, machine.mmio):
            bus.remove_layer(layer)


def _on_reads(device: Device, change: Callable[[int, int, int], int]) -> Layer:
    """A layer that has the answers of `device` go through ``change(offset, size, value)``."""

    def layer(mapping: Mapping | None, address: int, size: int, target: Target) -> Target:
        if mapping is None or mapping.device is not device:
            return target

        def read(offset: int, size: int) -> int | Awaitable[int]:
            value = target.read(offset, size)
            if isinstance(value, int):
                return change(offset, size, value)
            return finish(value, offset, size)

        async def finish(value: Awaitable[int], offset: int, size: int) -> int:
            return change(offset, size, await value)

        return Target(target.offset, read, target.write, target.update)

    return layer


def _register(device: Device, name: str) -> Register[Any]:
    for register in device.registers:
        if register.name == name:
            if isinstance(register, SharedRegister):
                raise ConfigurationError(
                    f"{device.name}.{name} is a SharedRegister: its reads come by no fault"
                )
            return register
    names = ", ".join(register.name for register in device.registers) or "none"
    raise ConfigurationError(f"{device.name} has no register {name!r}; there are: {names}")


def _reaches(
    device: Device, register: Register[Any], offset: int, size: int, *, is_write: bool
) -> bool:
    """Is `register` in reach of the access, and not hidden by another one just now?"""
    if offset >= register.offset + register.size or register.offset >= offset + size:
        return False
    return device.register_name(register.offset, is_write) == register.name


def _placed(bits: int, register: Register[Any], offset: int, size: int) -> int:
    """Bits of `register`, where they lie in an access of `size` bytes at `offset`."""
    shift = 8 * (register.offset - offset)
    bits = bits << shift if shift >= 0 else bits >> -shift
    return bits & ((1 << 8 * size) - 1)
