"""A machine's state into a `Checkpoint` and back; the machine is at rest meanwhile.

Both are plain functions without an await, so nothing changes in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

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
from .checkpoint.progress import Progress, silent
from .device import Device
from .errors import CheckpointError, ConfigurationError
from .memory import GuestMemory
from .memory_image import MemoryImage
from .soundness import check_sound, kept_outcome, plain_outcome
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


def capture(machine: Machine, progress: Progress = silent) -> Checkpoint:
    """The machine's whole state.

    Args:
        progress: told of the memory; what it raises ends the capture.

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
        memory=_capture_memory(machine.memory, progress),
        created_by=CreatedBy(__version__, platform.kind, platform.host_kind),
        engine={
            "pio_unmapped": machine.pio.unmapped.value,
            "mmio_unmapped": machine.mmio.unmapped.value,
            "fault_frame": machine.fault_frame,
            "outcome": plain_outcome(machine.kept_outcome()),
            "lines": {str(number): line.own for number, line in machine.lines.items()},
        },
    )
    if machine.memory.image is not None:
        machine.memory.image.serves(checkpoint)
    return checkpoint


def _capture_memory(memory: GuestMemory, progress: Progress) -> dict[int, MemoryPages]:
    image, captured, done = memory.image, {}, 0
    total = sum(region.size for region in memory.regions)
    for region in memory.regions:

        def on_block(offset: int, before: int = done) -> None:
            progress(before + offset, total)

        if image is None:
            pages = MemoryPages.capture(region.mapping, on_block=on_block)
        else:
            pages = image.capture(region, on_block=on_block)
        captured[region.base] = pages
        done += region.size
    return captured


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


# ---- into the machine ----------------------------------------------------------------------


def check_fits(machine: Machine, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of another machine; changes nothing.

    Raises:
        ConfigurationError: the interrupt controllers are KVM's in one of the two only.
        CheckpointError: anything else differs, the checkpoint is relative to another, or it
            lacks what a machine puts into it.
    """
    if checkpoint.base is not None:
        raise CheckpointError("a checkpoint relative to another: make it complete with on(base)")
    saved, present = checkpoint.shape, shape_of(machine)
    if saved.irqchip != present.irqchip and {"kernel", "split"} & {saved.irqchip, present.irqchip}:
        raise ConfigurationError(
            f"the checkpoint is of irqchip={saved.irqchip!r}, the machine has "
            f"{present.irqchip!r}: KVM's interrupt controllers cannot be exchanged for others"
        )
    memory = (*present.memory, *_missing_regions(machine, saved))
    expected = attrs.evolve(present, memory=tuple(sorted(memory, key=lambda region: region.base)))
    if differences := saved.differences(expected):
        raise CheckpointError(
            f"the checkpoint does not fit {machine.name}: " + "; ".join(differences)
        )
    for name, device in checkpoint.devices.items():
        _check_registers(machine.devices[name], device)
    check_sound(checkpoint)
    _check_statistics(machine.stats.groups(), checkpoint.statistics)
    machine.platform.check_state(checkpoint.vm)
    for number in map(int, checkpoint.engine["lines"]):  # last: it makes those that are missing
        try:
            machine.irq(number)
        except ConfigurationError as error:
            raise CheckpointError(f"machine: {error}") from None


def _missing_regions(machine: Machine, saved: MachineShape) -> list[RegionShape]:
    """Memory that only the checkpoint has, such as its firmware: it is added."""
    return [r for r in saved.memory if machine.memory.overlapping(r.base, r.size) is None]


def put_back(machine: Machine, checkpoint: Checkpoint) -> None:
    """Have the machine be as it was; `check_fits` has been called, no device activity runs.

    Raises:
        CheckpointError: a device, or KVM, cannot take its state; the machine is as it was.
        HostError: the host refused; the machine is in no defined state.
    """
    engine, devices = checkpoint.engine, checkpoint.devices
    machine.platform.restore_cpuid(checkpoint.vm)
    _check_loads(machine, devices)
    for region in _missing_regions(machine, checkpoint.shape):
        machine.memory.add_region(region.base, region.size, readonly=region.readonly)
    MemoryImage.of(checkpoint).put_into(machine.memory)
    machine.clock.set(checkpoint.time_ns)
    machine.pio.unmapped = Unmapped(engine["pio_unmapped"])
    machine.mmio.unmapped = Unmapped(engine["mmio_unmapped"])
    machine.fault_frame = engine["fault_frame"]
    # The lines first: what their edges do to controllers and vCPUs is then overwritten.
    for number in {*machine.lines, *(int(number) for number in engine["lines"])}:
        machine.irq(number).set(engine["lines"].get(str(number), False))
    for name, saved in devices.items():
        machine.devices[name].irq.set(saved.irq)
    for name, saved in devices.items():
        load_device(machine.devices[name], saved)
    # KVM's interrupt controllers before the local APICs, to which they may deliver meanwhile.
    machine.platform.restore(checkpoint.vm)
    for vcpu, saved_cpu in zip(machine.vcpus, checkpoint.cpus, strict=True):
        vcpu.restore(saved_cpu)
    _put_statistics(machine.stats.groups(), checkpoint.statistics)
    machine.keep_outcome(kept_outcome(engine))
    for device in machine.devices.values():
        device.update()


def _check_loads(machine: Machine, devices: Mapping[str, SavedDevice]) -> None:
    """See whether all devices can take their states; if one cannot, all get theirs back."""
    before = {name: save_device(machine.devices[name]) for name in devices}
    try:
        for name, saved in devices.items():
            _load_state(machine.devices[name], saved)
    except BaseException:
        for name, saved in before.items():
            _load_state(machine.devices[name], saved)
        raise


def _check_registers(device: Device, saved: SavedDevice) -> None:
    names = {register.name for register in device.registers}
    if differing := ", ".join(sorted(names ^ saved.registers.keys())):
        raise CheckpointError(f"{device.name}: a version with other registers: {differing}")


def load_device(device: Device, saved: SavedDevice) -> None:
    """Give a device back what `save_device` took; `update()` is for the caller to call.

    Raises:
        CheckpointError: the state is of another version of the device.
    """
    _check_registers(device, saved)
    _load_state(device, saved)
    device.alarm.load(saved.alarm)


def _load_state(device: Device, saved: SavedDevice) -> None:
    try:
        for register in device.registers:
            register.load(device, saved.registers[register.name])
        device.load(saved.state)
    except Exception as error:  # it may expect anything of a state that was its own
        raise CheckpointError(
            f"{device.name} cannot take its state back: {type(error).__name__}: {error}"
        ) from error


def _check_statistics(
    groups: Mapping[str, Statistics], saved: Mapping[str, Mapping[str, int | None]]
) -> None:
    for name, group in groups.items():
        for field in attrs.fields(type(group)):
            if field.default is not None and saved.get(name, {}).get(field.name, 0) is None:
                raise CheckpointError(f"statistics: {name}.{field.name} cannot be unknown")


def _put_statistics(
    groups: Mapping[str, Statistics], saved: Mapping[str, Mapping[str, int | None]]
) -> None:
    for name, group in groups.items():
        known = group.as_dict().keys()
        for field, value in saved.get(name, {}).items():
            if field in known:
                setattr(group, field, value)
