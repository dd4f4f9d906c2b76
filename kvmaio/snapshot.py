"""A machine's state into a `Checkpoint` and back; the machine is at rest meanwhile.

Both are plain functions without an await, so nothing changes in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from .bus import Unmapped
from .checkpoint import (
    Checkpoint,
    CreatedBy,
    DeviceShape,
    MachineShape,
    MemoryPages,
    RegionShape,
    SavedDevice,
)
from .device import Device
from .errors import CheckpointError, ConfigurationError
from .exits import Exited, Halted, Outcome, Shutdown, Stopped
from .memory import GuestMemory
from .memory_image import MemoryImage
from .stats import Statistics

if TYPE_CHECKING:
    from .machine import Machine

__all__ = [
    "capture",
    "check_fits",
    "load_device",
    "put_back",
    "save_device",
    "shape_of",
]

_OUTCOMES: dict[str, type[Outcome]] = {
    kind.__name__: kind for kind in (Halted, Shutdown, Exited, Stopped)
}


# ---- from the machine --------------------------------------------------------------------


def shape_of(machine: Machine) -> MachineShape:
    """What a machine must have for a checkpoint of this one to fit it."""
    return MachineShape(
        memory=tuple(RegionShape(r.base, r.size, r.readonly) for r in machine.memory.regions),
        vcpus=len(machine.vcpus),
        irqchip=machine.irqchip,
        devices={
            name: DeviceShape(
                type(device).__name__,
                tuple(window.base for window in machine.pio if window.device is device),
                tuple(window.base for window in machine.mmio if window.device is device),
            )
            for name, device in machine.devices.items()
        },
    )


def capture(machine: Machine) -> Checkpoint:
    """The machine's whole state.

    Raises:
        CheckpointError: a device's state is not plain data.
        ConfigurationError: the machine has failed with an error that no `run()` has raised yet.
    """
    from . import __version__

    platform = machine.platform
    checkpoint = Checkpoint(
        shape=shape_of(machine),
        cpus=[vcpu.save() for vcpu in machine.vcpus],
        devices={name: save_device(device) for name, device in machine.devices.items()},
        vm=platform.save(),
        time_ns=machine.clock.now_ns,
        statistics=machine.stats.as_dict(),
        memory=_capture_memory(machine.memory),
        created_by=CreatedBy(__version__, platform.kind, platform.host_kind),
        engine={
            "pio_unmapped": machine.pio.unmapped.value,
            "mmio_unmapped": machine.mmio.unmapped.value,
            "fault_frame": machine.fault_frame,
            "outcome": _plain_outcome(machine.kept_outcome()),
            "lines": {str(number): line.own for number, line in machine.lines.items()},
        },
    )
    if machine.memory.image is not None:
        machine.memory.image.serves(checkpoint)
    return checkpoint


def _capture_memory(memory: GuestMemory) -> dict[int, MemoryPages]:
    image = memory.image
    return {
        region.base: MemoryPages.capture(region.mapping) if image is None else image.capture(region)
        for region in memory.regions
    }


def save_device(device: Device) -> SavedDevice:
    """A device's registers, alarm and interrupt level, and what its `save()` gives.

    Raises:
        CheckpointError: a register holds what is no number.
    """
    registers = {}
    for register in device.registers:
        try:
            registers[register.name] = register.save(device)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{device.name}.{register.name}: {error}") from None
    return SavedDevice(registers, device.alarm.save(), device.save(), device.irq.own)


def _plain_outcome(outcome: Outcome | None) -> dict[str, Any] | None:
    if outcome is None:
        return None
    name = type(outcome).__name__
    if _OUTCOMES.get(name) is not type(outcome):
        raise CheckpointError(f"the outcome {outcome} that is kept is not one of kvmaio's")
    fields = [field.name for field in attrs.fields(type(outcome))]  # type: ignore[arg-type]
    return {"kind": name} | {field: getattr(outcome, field) for field in fields}


# ---- into the machine ----------------------------------------------------------------------


def check_fits(machine: Machine, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of another machine.

    Memory regions that only the checkpoint has, such as its firmware, are added.

    Raises:
        ConfigurationError: the interrupt controllers are KVM's in one of the two only.
        CheckpointError: anything else differs, or the checkpoint is relative to another.
    """
    if checkpoint.base is not None:
        raise CheckpointError("a checkpoint relative to another: make it complete with on(base)")
    saved, present = checkpoint.shape, shape_of(machine)
    if saved.irqchip != present.irqchip and {"kernel", "split"} & {saved.irqchip, present.irqchip}:
        raise ConfigurationError(
            f"the checkpoint is of irqchip={saved.irqchip!r}, the machine has "
            f"{present.irqchip!r}: KVM's interrupt controllers cannot be exchanged for others"
        )
    here = {region.base: region for region in saved.memory}
    missing = [r for r in saved.memory if machine.memory.overlapping(r.base, r.size) is None]
    expected = attrs.evolve(
        present, memory=tuple(sorted((*present.memory, *missing), key=lambda region: region.base))
    )
    if differences := saved.differences(expected):
        raise CheckpointError(
            f"the checkpoint does not fit {machine.name}: " + "; ".join(differences)
        )
    assert len(here) == len(expected.memory)
    for region in missing:
        machine.memory.add_region(region.base, region.size, readonly=region.readonly)


def put_back(machine: Machine, checkpoint: Checkpoint) -> None:
    """Have the machine be as it was; `check_fits` has been called, no device activity runs."""
    engine, devices = checkpoint.engine, checkpoint.devices
    MemoryImage.of(checkpoint).put_into(machine.memory)
    machine.clock.set(checkpoint.time_ns)
    machine.pio.unmapped = Unmapped(engine["pio_unmapped"])
    machine.mmio.unmapped = Unmapped(engine["mmio_unmapped"])
    machine.fault_frame = engine["fault_frame"]
    # The lines first: what their edges do to controllers and vCPUs is then overwritten.
    for number, line in machine.lines.items():
        line.set(engine["lines"].get(str(number), False))
    for name, saved in devices.items():
        machine.devices[name].irq.set(saved.irq)
    for name, saved in devices.items():
        load_device(machine.devices[name], saved)
    # KVM's interrupt controllers before the local APICs, to which they may deliver meanwhile.
    machine.platform.restore(checkpoint.vm)
    for vcpu, saved_cpu in zip(machine.vcpus, checkpoint.cpus, strict=True):
        vcpu.restore(saved_cpu)
    _put_statistics(machine.stats.groups(), checkpoint.statistics)
    outcome = engine["outcome"]
    machine.keep_outcome(None if outcome is None else _outcome(dict(outcome)))
    for device in machine.devices.values():
        device.update()


def load_device(device: Device, saved: SavedDevice) -> None:
    """Give a device back what `save_device` took; `update()` is for the caller to call.

    Raises:
        CheckpointError: the state is of another version of the device.
    """
    registers = {register.name: register for register in device.registers}
    if registers.keys() != saved.registers.keys():
        differing = ", ".join(sorted(registers.keys() ^ saved.registers.keys()))
        raise CheckpointError(f"{device.name}: a version with other registers: {differing}")
    for name, value in saved.registers.items():
        registers[name].load(device, value)
    try:
        device.load(saved.state)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{device.name} cannot take its state back: {type(error).__name__}: {error}"
        ) from error
    device.alarm.load(saved.alarm)


def _put_statistics(
    groups: Mapping[str, Statistics], saved: Mapping[str, Mapping[str, int | None]]
) -> None:
    for name, group in groups.items():
        known = group.as_dict().keys()
        for field, value in saved.get(name, {}).items():
            if field in known:
                setattr(group, field, value)


def _outcome(plain: dict[str, Any]) -> Outcome:
    kind = _OUTCOMES.get(str(plain.pop("kind", None)))
    if kind is None:
        raise CheckpointError("the outcome that is kept is not one of kvmaio's")
    try:
        return kind(**plain)
    except TypeError as error:
        raise CheckpointError(f"the outcome that is kept: {error}") from None
