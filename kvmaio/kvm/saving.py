"""A VM's state beside its vCPUs', for checkpoints: interrupt controllers, PIT, clock, CPUID."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ..errors import CheckpointError, ConfigurationError, HostError
from ._native import ffi, lib
from .cpuid import CpuidEntry

if TYPE_CHECKING:
    from .vm import KvmVm


class HasCpuid(Protocol):
    """A CPU model, as far as its CPUID table goes."""

    index: int
    cpuid: tuple[CpuidEntry, ...]

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None: ...


__all__ = ["check_vm_state", "get_cpuid_tables", "get_vm_state", "set_cpuid_tables", "set_vm_state"]

_CHIPS = {
    "kvm_pic_master": lib.KVM_IRQCHIP_PIC_MASTER,
    "kvm_pic_slave": lib.KVM_IRQCHIP_PIC_SLAVE,
    "kvm_ioapic": lib.KVM_IRQCHIP_IOAPIC,
}
_ENTRY = struct.Struct("<7I")  # of CPUID: function, index, flags, eax, ebx, ecx, edx

State = dict[str, bytes | int]


def get_cpuid_tables(cpus: Sequence[HasCpuid]) -> State:
    """Each vCPU's table, by name."""
    return {f"kvm_cpuid{cpu.index}": _pack(cpu.cpuid) for cpu in cpus}


def set_cpuid_tables(cpus: Sequence[HasCpuid], state: State) -> None:
    """Take them back, those that are there.

    Raises:
        CheckpointError: a table is no table, or the guest has run with another one.
    """
    for cpu in cpus:
        table = state.get(f"kvm_cpuid{cpu.index}")
        if isinstance(table, bytes):
            _set_cpuid(cpu, table)


def get_vm_state(vm: KvmVm, cpus: Sequence[HasCpuid]) -> State:
    """By name: the kernel's structures, and each vCPU's CPUID table."""
    state = get_cpuid_tables(cpus)
    if vm.kvm.capability(lib.KVM_CAP_ADJUST_CLOCK):
        state["kvm_clock"] = vm.get_clock()
    if vm.irqchip == "kernel":
        state |= {name: vm.get_irqchip(chip) for name, chip in _CHIPS.items()}
        state["kvm_pit"] = vm.get_pit()
    return state


def check_vm_state(vm: KvmVm, state: State) -> None:
    """Refuse what `set_vm_state` could not take.

    Raises:
        CheckpointError: a structure is missing, or not KVM's.
    """
    clock = state.get("kvm_clock", 0)
    if not isinstance(clock, int) or not 0 <= clock < 1 << 63:
        raise CheckpointError(f"vm: kvm_clock cannot be {clock!r}")
    if vm.irqchip != "kernel":
        return
    for name, chip in _CHIPS.items():
        structure = _structure(state, name)
        if len(structure) != ffi.sizeof("struct kvm_irqchip") or _chip_of(structure) != chip:
            raise CheckpointError(f"vm: {name} is not KVM's")
    if len(_structure(state, "kvm_pit")) != ffi.sizeof("struct kvm_pit_state2"):
        raise CheckpointError("vm: kvm_pit is not KVM's")


def _chip_of(structure: bytes) -> int:
    return int.from_bytes(structure[:4], "little")


def set_vm_state(vm: KvmVm, state: State) -> None:
    """Take back the rest. What another CPU model has saved is not there, and stays as it is.

    Raises:
        CheckpointError: a structure is not KVM's.
        HostError: the host refused.
    """
    try:
        if isinstance(clock := state.get("kvm_clock"), int):
            vm.set_clock(clock)
        if vm.irqchip == "kernel":
            for name in _CHIPS:
                vm.set_irqchip(_structure(state, name))
            vm.set_pit(_structure(state, "kvm_pit"))
    except (ConfigurationError, OverflowError) as error:
        raise CheckpointError(f"vm: {error}") from None


def _structure(state: State, name: str) -> bytes:
    structure = state.get(name)
    if not isinstance(structure, bytes):
        raise CheckpointError(f"vm: {name} is missing")
    return structure


def _set_cpuid(cpu: HasCpuid, table: bytes) -> None:
    if table == _pack(cpu.cpuid):
        return
    if len(table) % _ENTRY.size:
        raise CheckpointError("vm: a CPUID table that is cut off")
    try:
        cpu.set_cpuid([CpuidEntry(*words) for words in _ENTRY.iter_unpack(table)])
    except HostError as error:
        raise CheckpointError(
            "the checkpoint's CPUID differs from this machine's, which KVM fixes when the guest "
            f"is first entered ({error}); restore into a fresh machine"
        ) from None


def _pack(entries: Sequence[CpuidEntry]) -> bytes:
    return b"".join(
        _ENTRY.pack(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in entries
    )
