"""From the run page to a typed `VmExit`; the hot path reads the page itself."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from .exits import (
    DebugEventExit,
    ExceptionExit,
    FailEntryExit,
    HaltExit,
    HypercallExit,
    InternalErrorExit,
    InterruptedExit,
    IoapicEoiExit,
    IoExit,
    IrqWindowExit,
    MmioExit,
    MsrExit,
    OtherExit,
    ShutdownExit,
    SystemEventExit,
    UnknownExit,
    VmExit,
)

__all__ = ["Reason", "decode"]


class Reason(enum.IntEnum):
    """KVM_EXIT_* (the kernel's ``include/uapi/linux/kvm.h``)."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    X86_RDMSR = 29
    X86_WRMSR = 30


def _io(page: Any, words: dict[int, Any], ticks: int) -> VmExit:
    io = page.io
    data = b""
    if io.direction:
        first = io.data_offset // io.size
        items = words[io.size][first : first + io.count]
        data = b"".join(int(item).to_bytes(io.size, "little") for item in items)
    return IoExit(io.port, io.size, io.count, bool(io.direction), data, ticks=ticks)


def _mmio(page: Any, words: dict[int, Any], ticks: int) -> VmExit:
    mmio = page.mmio
    data = bytes(list(mmio.data[0 : mmio.len])) if mmio.is_write else b""
    return MmioExit(mmio.phys_addr, mmio.len, bool(mmio.is_write), data, ticks=ticks)


def _hypercall(page: Any, words: dict[int, Any], ticks: int) -> VmExit:
    call = page.hypercall
    return HypercallExit(call.nr, tuple(call.args), bool(call.flags & 1), ticks=ticks)


def _internal_error(page: Any, words: dict[int, Any], ticks: int) -> VmExit:
    internal = page.internal
    return InternalErrorExit(
        internal.suberror, tuple(internal.data[0 : min(internal.ndata, 16)]), ticks=ticks
    )


def _system_event(page: Any, words: dict[int, Any], ticks: int) -> VmExit:
    event = page.system_event
    return SystemEventExit(event.type, tuple(event.data[0 : min(event.ndata, 16)]), ticks=ticks)


def _debug(page: Any, words: dict[int, Any], ticks: int) -> VmExit:
    arch = page.debug.arch
    return DebugEventExit(arch.exception, arch.pc, arch.dr6, arch.dr7, ticks=ticks)


def _msr(page: Any, words: dict[int, Any], ticks: int) -> VmExit:
    msr = page.msr
    is_write = page.exit_reason == Reason.X86_WRMSR
    return MsrExit(msr.index, is_write, msr.data if is_write else 0, msr.reason, ticks=ticks)


_DECODERS: dict[int, Callable[[Any, dict[int, Any], int], VmExit]] = {
    Reason.UNKNOWN: lambda p, w, t: UnknownExit(p.hw.hardware_exit_reason, ticks=t),
    Reason.EXCEPTION: lambda p, w, t: ExceptionExit(p.ex.exception, p.ex.error_code, ticks=t),
    Reason.IO: _io,
    Reason.HYPERCALL: _hypercall,
    Reason.DEBUG: _debug,
    Reason.HLT: lambda p, w, t: HaltExit(ticks=t),
    Reason.MMIO: _mmio,
    Reason.IRQ_WINDOW_OPEN: lambda p, w, t: IrqWindowExit(ticks=t),
    Reason.SHUTDOWN: lambda p, w, t: ShutdownExit(ticks=t),
    Reason.FAIL_ENTRY: lambda p, w, t: FailEntryExit(
        p.fail_entry.hardware_entry_failure_reason, p.fail_entry.cpu, ticks=t
    ),
    Reason.INTR: lambda p, w, t: InterruptedExit(ticks=t),
    Reason.INTERNAL_ERROR: _internal_error,
    Reason.SYSTEM_EVENT: _system_event,
    Reason.IOAPIC_EOI: lambda p, w, t: IoapicEoiExit(p.eoi.vector, ticks=t),
    Reason.X86_RDMSR: _msr,
    Reason.X86_WRMSR: _msr,
}


def decode(page: Any, words: dict[int, Any], ticks: int) -> VmExit:
    """What the run page says.

    Args:
        page: a ``struct kvm_run``.
        words: the page as arrays of words, by their size (`CpuModel.io_words`).
        ticks: guest nanoseconds executed since the entry.
    """
    decoder = _DECODERS.get(page.exit_reason)
    if decoder is None:
        return OtherExit(page.exit_reason, ticks=ticks)
    return decoder(page, words, ticks)
