"""A vCPU's state beyond its registers, and all of it together (`CpuState`).

The functions take a vCPU's file descriptor. The vCPU must not be running (the
call would wait for it), and no access may be pending (a half entry completes
it). Source: api.rst, section 4; the ioctl behind a function is named like it.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from ..cpu import CpuState
from ..errors import ConfigurationError, HostError
from ._native import ffi, lib
from .context import context_from, fill, get_context, read_context, set_context, store
from .cpuid import CpuidEntry, read_entries, write_entries
from .gate import check
from .host import Kvm
from .msrs import MTRRS, describe_msrs, get_msrs, set_msrs

if TYPE_CHECKING:
    from ._native import CData

__all__ = [
    "context_from",
    "fill",
    "get_context",
    "get_cpuid",
    "get_debug_registers",
    "get_events",
    "get_fpu",
    "get_lapic",
    "get_mp_state",
    "get_msrs",
    "get_one_reg",
    "get_state",
    "get_xcrs",
    "get_xsave",
    "has_injected_event",
    "read_context",
    "set_context",
    "set_cpuid",
    "set_debug_registers",
    "set_events",
    "set_fpu",
    "set_lapic",
    "set_mp_state",
    "set_msrs",
    "set_one_reg",
    "set_state",
    "set_xcrs",
    "set_xsave",
    "xsave_components",
    "xsave_size",
    "store",
]

_log = logging.getLogger(__name__)

XSAVE_SIZE = 4096  # of the classic kvm_xsave
_XSTATE_BV = slice(512, 520)  # in the XSAVE header: which components are not in their initial state


class HasCapabilities(Protocol):
    """`Kvm` or `KvmVm`; a VM's capabilities may differ from the host's."""

    def capability(self, number: int) -> int: ...


# ---- one part at a time ---------------------------------------------------------


def get_cpuid(fd: int) -> tuple[CpuidEntry, ...]:
    """What the vCPU tells its guest; some fields follow the guest's own registers."""
    return read_entries(fd, lib.KVM_GET_CPUID2, "KVM_GET_CPUID2")


def set_cpuid(fd: int, entries: Sequence[CpuidEntry]) -> None:
    """Fix what the vCPU tells its guest; before its first entry, and before other state."""
    write_entries(fd, entries)


def get_fpu(fd: int) -> bytes:
    """kvm_fpu: x87 and SSE. `get_xsave` is the complete one."""
    return _get(fd, "KVM_GET_FPU", lib.KVM_GET_FPU, "struct kvm_fpu *")


def set_fpu(fd: int, fpu: bytes) -> None:
    """Put kvm_fpu; PVM loses part of it, so prefer `set_xsave`."""
    _set(fd, "KVM_SET_FPU", lib.KVM_SET_FPU, "struct kvm_fpu *", fpu)


def xsave_size(vm: HasCapabilities) -> int:
    """Bytes of the XSAVE area, all components included."""
    return max(vm.capability(lib.KVM_CAP_XSAVE2), XSAVE_SIZE)


def get_xsave(vm: HasCapabilities, fd: int) -> bytes:
    """The XSAVE area in its standard (not compacted) format: x87, SSE, AVX and all the others."""
    size = xsave_size(vm)
    area = ffi.new("char[]", size)
    if vm.capability(lib.KVM_CAP_XSAVE2):
        check(lib.kvmaio_ioctl(fd, lib.KVM_GET_XSAVE2, area), "KVM_GET_XSAVE2")
    else:
        check(lib.kvmaio_ioctl(fd, lib.KVM_GET_XSAVE, area), "KVM_GET_XSAVE")
    return bytes(ffi.buffer(area))


def set_xsave(vm: HasCapabilities, fd: int, xsave: bytes) -> None:
    """Put an XSAVE area; a shorter one leaves what follows in its initial state."""
    # KVM reads as many bytes as this host's area has, however long ours is.
    area = ffi.new("char[]", max(len(xsave), xsave_size(vm)))
    ffi.memmove(area, xsave, len(xsave))
    check(lib.kvmaio_ioctl(fd, lib.KVM_SET_XSAVE, area), "KVM_SET_XSAVE")


def get_xcrs(fd: int) -> dict[int, int]:
    """Number -> value of the extended control registers; so far there is XCR0 only."""
    xcrs = ffi.new("struct kvm_xcrs *")
    check(lib.kvmaio_ioctl(fd, lib.KVM_GET_XCRS, xcrs), "KVM_GET_XCRS")
    return {xcrs.xcrs[i].xcr: xcrs.xcrs[i].value for i in range(xcrs.nr_xcrs)}


def set_xcrs(fd: int, values: Mapping[int, int]) -> None:
    """Put the extended control registers."""
    xcrs = ffi.new("struct kvm_xcrs *", {"nr_xcrs": len(values)})
    for slot, (number, value) in enumerate(values.items()):
        xcrs.xcrs[slot].xcr = number
        xcrs.xcrs[slot].value = value
    check(lib.kvmaio_ioctl(fd, lib.KVM_SET_XCRS, xcrs), "KVM_SET_XCRS")


def get_debug_registers(fd: int) -> tuple[int, ...]:
    """DR0 to DR3, DR6, DR7 as the guest sees them."""
    registers = ffi.new("struct kvm_debugregs *")
    check(lib.kvmaio_ioctl(fd, lib.KVM_GET_DEBUGREGS, registers), "KVM_GET_DEBUGREGS")
    return (*registers.db, registers.dr6, registers.dr7)


def set_debug_registers(fd: int, values: Sequence[int]) -> None:
    """Put DR0 to DR3, DR6, DR7."""
    *addresses, dr6, dr7 = values
    registers = ffi.new("struct kvm_debugregs *", {"db": addresses, "dr6": dr6, "dr7": dr7})
    check(lib.kvmaio_ioctl(fd, lib.KVM_SET_DEBUGREGS, registers), "KVM_SET_DEBUGREGS")


def get_events(fd: int) -> bytes:
    """kvm_vcpu_events: exceptions, interrupts and NMIs on their way, and interrupt shadows."""
    return _get(fd, "KVM_GET_VCPU_EVENTS", lib.KVM_GET_VCPU_EVENTS, "struct kvm_vcpu_events *")


def set_events(fd: int, events: bytes) -> None:
    """Put kvm_vcpu_events."""
    _set(fd, "KVM_SET_VCPU_EVENTS", lib.KVM_SET_VCPU_EVENTS, "struct kvm_vcpu_events *", events)


def has_injected_event(fd: int) -> bool:
    """Is an exception, interrupt or NMI injected, or an NMI about to be?

    As gem5's archIsDrained, but for an NMI that waits for the end of another one's handler:
    that may take any time, and such an NMI is state like any other.
    """
    events = ffi.new("struct kvm_vcpu_events *")
    check(lib.kvmaio_ioctl(fd, lib.KVM_GET_VCPU_EVENTS, events), "KVM_GET_VCPU_EVENTS")
    return bool(
        events.exception.injected
        or events.interrupt.injected
        or events.nmi.injected
        or (events.nmi.pending and not events.nmi.masked)
    )


def get_mp_state(fd: int) -> int:
    """KVM_MP_STATE_*; without an in-kernel local APIC always runnable."""
    state = ffi.new("struct kvm_mp_state *")
    check(lib.kvmaio_ioctl(fd, lib.KVM_GET_MP_STATE, state), "KVM_GET_MP_STATE")
    return int(state.mp_state)


def set_mp_state(fd: int, mp_state: int) -> None:
    """Put KVM_MP_STATE_*."""
    state = ffi.new("struct kvm_mp_state *", {"mp_state": mp_state})
    check(lib.kvmaio_ioctl(fd, lib.KVM_SET_MP_STATE, state), "KVM_SET_MP_STATE")


def get_lapic(fd: int) -> bytes | None:
    """kvm_lapic_state, or None without an in-kernel local APIC."""
    try:
        return _get(fd, "KVM_GET_LAPIC", lib.KVM_GET_LAPIC, "struct kvm_lapic_state *")
    except HostError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return None
        raise


def set_lapic(fd: int, lapic: bytes) -> None:
    """Put kvm_lapic_state."""
    _set(fd, "KVM_SET_LAPIC", lib.KVM_SET_LAPIC, "struct kvm_lapic_state *", lapic)


def get_one_reg(fd: int, register: int) -> int:
    """One register by its KVM_REG_* id, whose bits 55:52 give its size; since Linux 6.18 on x86."""
    value = ffi.new("char[]", _one_reg_size(register))
    entry = _one_reg(register, value)
    result = lib.kvmaio_ioctl(fd, lib.KVM_GET_ONE_REG, entry)
    check(result, f"KVM_GET_ONE_REG (register {register:#x})")
    return int.from_bytes(ffi.buffer(value), "little")


def set_one_reg(fd: int, register: int, value: int) -> None:
    """Put one register by its KVM_REG_* id."""
    data = ffi.new("char[]", value.to_bytes(_one_reg_size(register), "little"))
    entry = _one_reg(register, data)
    result = lib.kvmaio_ioctl(fd, lib.KVM_SET_ONE_REG, entry)
    check(result, f"KVM_SET_ONE_REG (register {register:#x})")


def _one_reg_size(register: int) -> int:
    return 1 << (register >> 52 & 0xF)


def _one_reg(register: int, data: CData) -> CData:
    address = int(ffi.cast("uintptr_t", data))
    return ffi.new("struct kvm_one_reg *", {"id": register, "addr": address})


def _get(fd: int, operation: str, request: int, kind: str) -> bytes:
    structure = ffi.new(kind)
    check(lib.kvmaio_ioctl(fd, request, structure), operation)
    return bytes(ffi.buffer(structure))


def _set(fd: int, operation: str, request: int, kind: str, data: bytes) -> None:
    structure = ffi.new(kind)
    buffer = ffi.buffer(structure)
    if len(data) != len(buffer):
        raise ConfigurationError(
            f"{operation}: {len(data)} bytes of state, where {len(buffer)} are expected"
        )
    buffer[:] = data
    check(lib.kvmaio_ioctl(fd, request, structure), operation)


# ---- all of it --------------------------------------------------------------------


def get_state(kvm: Kvm, vm: HasCapabilities, fd: int) -> CpuState:
    """All state of the vCPU. What this host's KVM cannot tell is None or empty."""
    state = CpuState(context=get_context(fd))
    # Before the events: reading it lets KVM act on an INIT or SIPI that is on its way.
    state.mp_state = get_mp_state(fd)
    if vm.capability(lib.KVM_CAP_XSAVE):
        state.xsave = get_xsave(vm, fd)
    if vm.capability(lib.KVM_CAP_XCRS):
        state.xcrs = get_xcrs(fd)
    if vm.capability(lib.KVM_CAP_DEBUGREGS):
        state.debug_registers = get_debug_registers(fd)
    state.lapic = get_lapic(fd)
    state.msrs = get_msrs(fd, dict.fromkeys((*kvm.msr_indices(), *MTRRS)))
    state.events = get_events(fd)
    return state


def set_state(
    kvm: Kvm,
    vm: HasCapabilities,
    fd: int,
    state: CpuState,
    *,
    cpuid: Sequence[CpuidEntry] | None = None,
) -> tuple[str, ...]:
    """Put all state of the vCPU. What this host has not got, single MSRs and components of the
    XSAVE area, is left out: returned, and logged once as one line.

    Args:
        cpuid: the table, for a vCPU that has not got it yet.

    Raises:
        HostError: the host refused anything else; some of the state may have been put.
    """
    refused: list[str] = []
    # The order matters.
    # CPUID first: it decides which bits of CR4, EFER, XCR0 and which MSRs exist.
    if cpuid is not None:
        set_cpuid(fd, cpuid)
    # The registers before the MSRs and the LAPIC: EFER and the APIC base are among them, and KVM
    # takes a LAPIC's state in the format (xAPIC, x2APIC) that the APIC base says.
    set_context(fd, state.context)
    set_debug_registers(fd, state.debug_registers)
    # XCR0 before the components that it enables.
    if state.xcrs:
        set_xcrs(fd, state.xcrs)
    if state.xsave is not None:
        _put_xsave(kvm, vm, fd, state.xsave, refused)
    # The MSRs behind the LAPIC: its timer must be in deadline mode before it takes a deadline.
    if state.lapic is not None:
        set_lapic(fd, state.lapic)
    if missing := set_msrs(fd, state.msrs):
        refused.append(describe_msrs(missing, len(state.msrs)))
    if state.mp_state is not None and state.mp_state != get_mp_state(fd):
        set_mp_state(fd, state.mp_state)
    # Events last: KVM_SET_REGS drops a pending exception, and a LAPIC or an MP state may
    # change what is on its way.
    if state.events is not None:
        set_events(fd, state.events)
    _report(refused)
    return tuple(refused)


def _put_xsave(kvm: Kvm, vm: HasCapabilities, fd: int, xsave: bytes, refused: list[str]) -> None:
    """Put what this host has of an XSAVE area from another one."""
    present = int.from_bytes(xsave[_XSTATE_BV], "little")
    supported = xsave_components(kvm)
    if lost := present & ~supported:
        names = ", ".join(str(bit) for bit in range(64) if lost >> bit & 1)
        refused.append(f"XSAVE components {names}")
        xsave = b"".join((xsave[:512], (present & supported).to_bytes(8, "little"), xsave[520:]))
    set_xsave(vm, fd, xsave)


def xsave_components(kvm: Kvm) -> int:
    """The components that the host's KVM knows: CPUID 0xD, EDX:EAX; always x87 and SSE."""
    for entry in kvm.supported_cpuid():
        if entry.function == 0xD and entry.index == 0:
            return entry.eax | entry.edx << 32 | 0b11
    return 0b11


_reported: set[tuple[str, ...]] = set()


def _report(refused: Sequence[str]) -> None:
    # One summary, and the same one only once: a machine may be restored a thousand times.
    key = tuple(refused)
    if key and key not in _reported:
        _reported.add(key)
        _log.warning("this host refused part of a vCPU's state: %s", "; ".join(key))
