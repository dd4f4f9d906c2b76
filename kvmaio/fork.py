"""Copies of a machine in this process, on copy-on-write memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from . import snapshot
from .cloning import Copies
from .errors import ConfigurationError
from .memory_image import MemoryImage

if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["fork"]


async def fork(machine: Machine, count: int) -> list[Machine]:
    """`count` copies of `machine`, which is at rest; see `Machine.fork()`."""
    if count < 1:
        raise ConfigurationError(f"{count} copies of a machine: at least 1")
    checkpoint = snapshot.capture(machine)
    MemoryImage.of(checkpoint).put_into(machine.memory)  # it shares its memory with the copies
    copies: list[Machine] = []
    try:
        for number in range(count):
            copy = machine.like_this(f"{machine.name}.copy{number}")
            await copy.__aenter__()
            copies.append(copy)
            await _equip(copy, machine)
            copy.hypercall = machine.hypercall
            await copy.restore(checkpoint)
            for original, vcpu in zip(machine.vcpus, copy.vcpus, strict=True):
                settings = original.model.settings
                if original.is_debugged:  # whoever answers its breakpoints is not copied
                    settings = attrs.evolve(settings, breakpoints=())
                vcpu.model.use_settings(settings)
            machine.check_open()  # nobody would close the copies with it
    except BaseException:
        for copy in copies:
            await copy.close()
        raise
    finally:
        del checkpoint  # an error's traceback would keep it, and so the file of its memory
    return copies


async def _equip(copy: Machine, original: Machine) -> None:
    """Give `copy` its own devices, at the same places and in the same order."""
    parts = Copies(original, copy)
    try:
        for name, device in original.devices.items():
            if name in copy.devices:  # the machine's own interrupt controllers
                continue
            place = {
                bus.name: window.base
                for bus in (original.pio, original.mmio)
                for window in bus
                if window.device is device
            }
            copy.attach(parts[device], irq=original.wiring[name], name=name, **place)
        parts.wire()
    except BaseException:
        for name, clone in parts.clones.items():
            if name not in copy.devices:
                await clone.close()
        raise
