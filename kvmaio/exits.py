"""Why a CPU left the guest (`VmExit`), and how a run of the machine ended (`Outcome`).

One frozen class per reason. The names and fields are those of the kernel's
``Documentation/virt/kvm/api.rst``, section "The kvm_run structure".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import attrs

from .watchpoints import WatchHit

__all__ = [
    "DebugEventExit",
    "EndRun",
    "ExceptionExit",
    "Exited",
    "FailEntryExit",
    "HaltExit",
    "Halted",
    "HypercallExit",
    "InternalErrorExit",
    "InterruptedExit",
    "IoExit",
    "IoapicEoiExit",
    "IrqWindowExit",
    "MmioExit",
    "MsrExit",
    "OtherExit",
    "Outcome",
    "Shutdown",
    "ShutdownExit",
    "Stopped",
    "SystemEventExit",
    "UnknownExit",
    "VmExit",
    "reported_code",
]


@attrs.frozen(kw_only=True)
class VmExit:
    """The guest was left.

    Attributes:
        ticks: guest nanoseconds executed since the entry.
    """

    ticks: int = 0


@attrs.frozen
class IoExit(VmExit):
    """Port I/O. `count` accesses of `size` bytes to one port; REP INS and OUTS have count > 1.

    `data` holds what the guest wrote; for a read it is empty, and the answer
    is due before the next entry.
    """

    port: int
    size: int
    count: int
    is_write: bool
    data: bytes


@attrs.frozen
class MmioExit(VmExit):
    """An access to an address without memory; `size` is 1, 2, 4 or 8 bytes."""

    address: int
    size: int
    is_write: bool
    data: bytes


@attrs.frozen
class HypercallExit(VmExit):
    """The guest asked its hypervisor for service `number` with six arguments."""

    number: int
    arguments: tuple[int, ...]
    is_64bit: bool


@attrs.frozen
class HaltExit(VmExit):
    """The guest executed HLT."""


@attrs.frozen
class IrqWindowExit(VmExit):
    """The guest can take an interrupt now."""


@attrs.frozen
class InterruptedExit(VmExit):
    """A kick, the run timer or a stop ended the run (KVM_EXIT_INTR).

    Attributes:
        timer_expired: the run's time was up.
    """

    timer_expired: bool = False


@attrs.frozen
class ShutdownExit(VmExit):
    """The CPU shut down: a triple fault."""


@attrs.frozen
class UnknownExit(VmExit):
    """KVM_EXIT_UNKNOWN: the hardware gave a reason that KVM does not know."""

    hardware_exit_reason: int


@attrs.frozen
class ExceptionExit(VmExit):
    """KVM_EXIT_EXCEPTION."""

    exception: int
    error_code: int


@attrs.frozen
class FailEntryExit(VmExit):
    """KVM_EXIT_FAIL_ENTRY: the CPU refused to enter, mostly for impossible state."""

    hardware_entry_failure_reason: int
    cpu: int


def reported_code(data: Sequence[int]) -> bytes:
    """An instruction that KVM cannot emulate, from the data it reports with suberror 1."""
    # data[0] flags, bit 0: data[1] byte 0 is a length, 15 bytes of code follow.
    if len(data) < 3 or not data[0] & 1:
        return b""
    words = data[1:4]
    raw = struct.pack(f"<{len(words)}Q", *words)
    return raw[1 : 1 + min(raw[0], 15)]


@attrs.frozen
class InternalErrorExit(VmExit):
    """KVM_EXIT_INTERNAL_ERROR; suberror 1 is an instruction that KVM cannot emulate."""

    suberror: int
    data: tuple[int, ...]

    @property
    def instruction(self) -> bytes:
        """The instruction's bytes, where KVM reports them; else empty."""
        return reported_code(self.data) if self.suberror == 1 else b""


@attrs.frozen
class SystemEventExit(VmExit):
    """KVM_EXIT_SYSTEM_EVENT: 1 shutdown, 2 reset, 3 crash."""

    type: int
    data: tuple[int, ...]


@attrs.frozen
class DebugEventExit(VmExit):
    """KVM_EXIT_DEBUG: a breakpoint, watchpoint or single step of the host's.

    Attributes:
        watched: the watchpoints that were hit, where the CPU model has them.
    """

    exception: int
    pc: int
    dr6: int
    dr7: int
    watched: tuple[WatchHit, ...] = ()


@attrs.frozen
class MsrExit(VmExit):
    """KVM_EXIT_X86_RDMSR and KVM_EXIT_X86_WRMSR, where they were asked for."""

    index: int
    is_write: bool
    data: int
    reason: int


@attrs.frozen
class IoapicEoiExit(VmExit):
    """KVM_EXIT_IOAPIC_EOI: the end of a level-triggered interrupt, for a split irqchip."""

    vector: int


@attrs.frozen
class OtherExit(VmExit):
    """Any other reason, by its KVM_EXIT_* number."""

    reason: int


class Outcome:
    """How a run of the machine ended: `Halted`, `Shutdown`, `Exited` or `Stopped`."""


@attrs.frozen
class Halted(Outcome):
    """Every vCPU is halted and nothing can wake it: interrupts are off."""


@attrs.frozen
class Shutdown(Outcome):
    """A vCPU shut down (a triple fault); `dump` shows its registers."""

    dump: str = attrs.field(repr=False)


@attrs.frozen
class Exited(Outcome):
    """The guest ended the run through a device, with this exit code."""

    code: int


@attrs.frozen
class Stopped(Outcome):
    """`Machine.stop()` ended the run, or the guest powered itself off."""

    reason: str


class EndRun(Exception):
    """Raised by a device's handler to end the run with an outcome.

    The access counts as served; the machine can be inspected and run again.
    """

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome
