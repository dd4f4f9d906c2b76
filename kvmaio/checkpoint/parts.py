"""What a checkpoint holds beside memory, as values; and each as plain data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import attrs
import msgspec

from ..cpu import CpuState
from ..errors import CheckpointError
from .pages import PAGE_SIZE

__all__ = [
    "CreatedBy",
    "DeviceShape",
    "MachineShape",
    "RegionShape",
    "SavedCpu",
    "SavedDevice",
    "check_registers",
    "from_plain",
    "to_plain",
]

ADDRESS_LIMIT = 1 << 52


@attrs.frozen
class RegionShape:
    """A memory region of the machine: `base` and `size` in bytes, multiples of 4096."""

    base: int
    size: int
    readonly: bool = False

    def __str__(self) -> str:
        kind = "ROM" if self.readonly else "RAM"
        return f"{kind} {self.base:#x}..{self.base + self.size - 1:#x}"


@attrs.frozen
class DeviceShape:
    """A device of the machine: its class's name, and where its window begins on each bus."""

    class_name: str
    pio: tuple[int, ...] = ()
    mmio: tuple[int, ...] = ()

    def __str__(self) -> str:
        places = [f"pio {base:#x}" for base in self.pio] + [f"mmio {base:#x}" for base in self.mmio]
        return " ".join((self.class_name, "at" if places else "on no bus", ", ".join(places)))


@attrs.frozen
class MachineShape:
    """What a machine must have for a checkpoint to fit it.

    Attributes:
        memory: the regions, by address.
        vcpus: how many.
        irqchip: ``"kernel"``, ``"split"``, ``"devices"`` or None.
        devices: by name.
    """

    memory: tuple[RegionShape, ...] = ()
    vcpus: int = 1
    irqchip: str | None = None
    devices: dict[str, DeviceShape] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        end = 0
        for region in self.memory:
            if region.base < end or region.size <= 0 or (region.base | region.size) % PAGE_SIZE:
                raise CheckpointError(
                    f"{region} is no memory region: they are ordered, do not overlap, "
                    f"and are multiples of {PAGE_SIZE} bytes"
                )
            end = region.base + region.size
        if end > ADDRESS_LIMIT or self.vcpus < 1:
            raise CheckpointError(f"no machine has {self.vcpus} vCPUs and memory up to {end:#x}")

    def differences(self, machine: MachineShape) -> list[str]:
        """Why a checkpoint of this shape does not fit `machine`, in words; empty if it does."""
        found = []
        if self.vcpus != machine.vcpus:
            found.append(f"the checkpoint has {self.vcpus} vCPUs, the machine {machine.vcpus}")
        if self.irqchip != machine.irqchip:
            found.append(
                f"the checkpoint is of irqchip={self.irqchip!r}, "
                f"the machine has {machine.irqchip!r}"
            )
        found += _only_one(self.memory, machine.memory)
        here = {name: f"device {name}, {shape}" for name, shape in self.devices.items()}
        there = {name: f"device {name}, {shape}" for name, shape in machine.devices.items()}
        return found + _only_one(here.values(), there.values())


def _only_one(saved: Iterable[object], present: Iterable[object]) -> list[str]:
    here, there = [str(one) for one in saved], [str(one) for one in present]
    return [
        *(f"the checkpoint has {one}, the machine has not" for one in here if one not in there),
        *(f"the machine has {one}, the checkpoint has not" for one in there if one not in here),
    ]


@attrs.frozen
class CreatedBy:
    """Who took the checkpoint.

    Attributes:
        kvmaio: its version.
        cpu: the CPU model's kind, such as ``kvm``.
        kvm: the host's kind of KVM, such as ``SVM``; None on the software CPU.
    """

    kvmaio: str = ""
    cpu: str = ""
    kvm: str | None = None


@attrs.define
class SavedCpu:
    """One vCPU: the CPU model's state, and what the engine itself knows, as plain data."""

    state: CpuState
    engine: dict[str, Any] = attrs.field(factory=dict)


@attrs.define
class SavedDevice:
    """One device: its registers by name, its alarm, what its `save()` gave, its line's level."""

    registers: dict[str, Any] = attrs.field(factory=dict)
    alarm: Any = None
    state: dict[str, Any] = attrs.field(factory=dict)
    irq: bool = False


# ---- to plain data and back ------------------------------------------------------------


def to_plain(value: Any) -> Any:
    """An instance of the classes above, or a dict or list of them, as plain data."""
    if attrs.has(type(value)):
        # Names that begin with an underscore are an object's own business, no state.
        return {
            field.name: to_plain(getattr(value, field.name))
            for field in attrs.fields(type(value))
            if not field.name.startswith("_")
        }
    if isinstance(value, dict) and _holds_parts(value.values()):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and _holds_parts(value):
        return [to_plain(item) for item in value]
    return value


def _holds_parts(values: Iterable[object]) -> bool:
    return any(attrs.has(type(value)) for value in values)


def from_plain(value: Any, kind: Any, what: str) -> Any:
    """What `to_plain` made `value` of, an instance of `kind`.

    Raises:
        CheckpointError: it does not hold exactly the fields of `kind` with their types.
    """
    try:
        # Without builtin_types, text would pass for bytes (base64).
        result = msgspec.convert(value, kind, builtin_types=(bytes,))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{what}: {error}") from None
    if to_plain(result) != value:  # a field that this version does not know
        raise CheckpointError(f"{what} is not as this kvmaio writes it")
    return result


def check_registers(state: CpuState, what: str) -> None:
    """Refuse register values that no processor holds."""
    context = to_plain(state.context)
    nested = [part.values() if isinstance(part, dict) else (part,) for part in context.values()]
    others = (
        state.debug_registers,
        state.xcrs,
        state.xcrs.values(),
        state.msrs,
        state.msrs.values(),
    )
    for value in itertools.chain(*nested, *others):
        if not 0 <= value < 1 << 64:
            raise CheckpointError(f"{what}: {value} is no register's value")
