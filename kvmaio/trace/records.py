"""What a trace consists of.

Named tuples, for making one takes a fraction of what a class with attributes does,
and with a trace on two are made at each exit; where a file alone listens, only at those
that are no burst's (`bursts`). Times are guest nanoseconds
(`Machine.clock`). `source` is who the record is about: a vCPU, a device, a line.
"""

from __future__ import annotations

from typing import NamedTuple

from ..exits import VmExit

__all__ = [
    "KINDS",
    "AccessRecord",
    "AlarmRecord",
    "AssistRecord",
    "DrainRecord",
    "ExitRecord",
    "FaultRecord",
    "InterruptRecord",
    "LineRecord",
    "Record",
    "StallRecord",
]


class ExitRecord(NamedTuple):
    """A vCPU left its guest.

    Attributes:
        time_ns: when.
        source: the vCPU.
        reason: the kernel's name, such as ``IO`` or ``HLT``; ``KICK`` and ``TIMER`` where the
            engine ended the entry.
        ticks: guest nanoseconds executed since the entry.
        exit: what the run page tells; None for IO and MMIO, whose accesses follow as records
            of their own, and for KICK and TIMER.
    """

    time_ns: int
    source: str
    reason: str
    ticks: int
    exit: VmExit | None


class AccessRecord(NamedTuple):
    """A device was read or written, by a vCPU or by somebody who used the bus.

    Attributes:
        time_ns: when it began; the record is made when it is over.
        source: the device; ``unmapped`` where there is none.
        vcpu: who made it; None if no vCPU did.
        register: the register's name; None where none is declared.
        bus: ``pio`` or ``mmio``.
        value: None if the read was not answered: the handler raised.
        duration_ns: until the device had answered.
    """

    time_ns: int
    source: str
    vcpu: str | None
    register: str | None
    bus: str
    address: int
    size: int
    is_write: bool
    value: int | None
    duration_ns: int


class StallRecord(NamedTuple):
    """An asynchronous handler suspended, and its vCPU waited for it.

    Attributes:
        time_ns: when it suspended; the record is made when the vCPU goes on.
        source: the vCPU.
        access: what it waited for, in words.
        duration_ns: how long.
    """

    time_ns: int
    source: str
    access: str
    duration_ns: int


class LineRecord(NamedTuple):
    """An interrupt line changed: a device's output (``uart.irq``) or the board's (``irq4``)."""

    time_ns: int
    source: str
    level: bool


class InterruptRecord(NamedTuple):
    """The engine injected an interrupt; `vector` is None for an NMI.

    What KVM's own interrupt controllers deliver is not seen.
    """

    time_ns: int
    source: str
    vector: int | None


class AssistRecord(NamedTuple):
    """The software CPU has executed what KVM could not emulate.

    Attributes:
        time_ns: when it was done.
        source: the vCPU.
        address: the linear address of the instruction.
        code: its bytes, as far as KVM tells.
        instruction: it as text; None without capstone (``kvmaio[disasm]``).
        instructions: how many were executed in software, this one and those behind it.
    """

    time_ns: int
    source: str
    address: int
    code: bytes
    instruction: str | None
    instructions: int


class AlarmRecord(NamedTuple):
    """A device's alarm was armed for `deadline_ns`, or rang, whose deadline that was."""

    time_ns: int
    source: str
    deadline_ns: int
    rang: bool


class DrainRecord(NamedTuple):
    """A step of the drain barrier, such as ``at rest`` or ``goes on``."""

    time_ns: int
    source: str
    step: str


class FaultRecord(NamedTuple):
    """`kvmaio.faults` did something to a device or a line; `what` says what, in words."""

    time_ns: int
    source: str
    what: str


Record = (
    ExitRecord
    | AccessRecord
    | StallRecord
    | LineRecord
    | InterruptRecord
    | AssistRecord
    | AlarmRecord
    | DrainRecord
    | FaultRecord
)

KINDS: dict[str, type[Record]] = {
    "exit": ExitRecord,
    "access": AccessRecord,
    "stall": StallRecord,
    "irq": LineRecord,
    "interrupt": InterruptRecord,
    "assist": AssistRecord,
    "alarm": AlarmRecord,
    "drain": DrainRecord,
    "fault": FaultRecord,
}
"""The kinds by the names that filters use."""
