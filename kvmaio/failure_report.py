"""`FlightRecorder`: what a failed test wants to know of its machine, as text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .disassembly import disassemble_next
from .dump import format_context
from .errors import KvmaioError
from .exits import HaltExit
from .trace.records import (
    AccessRecord,
    AlarmRecord,
    AssistRecord,
    DrainRecord,
    ExitRecord,
    FaultRecord,
    InterruptRecord,
    LineRecord,
    Record,
    StallRecord,
)

if TYPE_CHECKING:
    from .device import Device
    from .machine import Machine

__all__ = ["FlightRecorder", "describe_device", "describe_record"]


class FlightRecorder:
    """Keeps the last records of a machine, and tells of its state.

    Args:
        kept: how many records; 0 traces nothing.
    """

    def __init__(self, machine: Machine, kept: int) -> None:
        self._machine = machine
        self._records: deque[Record] = deque(maxlen=kept)
        self._trace = machine.trace(self._records.append) if kept else None

    def close(self) -> None:
        """Record no more. Idempotent."""
        if self._trace is not None:
            self._trace.close()

    def describe(self) -> str:
        """The last records, the vCPUs, the consoles' last lines, the devices' states."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        machine = self._machine
        yield f"{machine!r}, running: {'yes' if machine.is_running else 'no'}"
        if self._records:
            yield f"the last {len(self._records)} records, times in ms before the last one:"
            last_ns = self._records[-1].time_ns
            for record in self._records:
                yield f"  {(record.time_ns - last_ns) / 1e6:9.3f}  {describe_record(record)}"
        for vcpu in machine.vcpus:
            yield f"{vcpu.name}: {vcpu.state.value}{', halted' if vcpu.halted else ''}"
            try:
                context = vcpu.context
                yield from (f"  {line}" for line in format_context(context).splitlines())
                code = disassemble_next(machine.memory, context)
                yield from (f"  {line}" for line in code)
            except KvmaioError as error:
                yield f"  no registers: {error}"
        for device in machine.devices.values():
            yield from describe_device(device)


def describe_device(device: Device) -> Iterator[str]:
    """What a console printed last, registers and other state."""
    tail = getattr(device, "tail", None)
    if callable(tail) and (text := tail()):
        yield f"{device.name} printed last:"
        yield from (f"  {line}" for line in text.splitlines())
    states = [*_registers(device), *_others(device)]
    if states:
        yield f"{device.name}: {', '.join(states)}"


def _registers(device: Device) -> Iterator[str]:
    for register in device.registers:
        if not register.doorbell:
            value = device.__dict__.get(register.name)
            yield f"{register.name}={int(value):#x}" if value is not None else register.name


def _others(device: Device) -> Iterator[str]:
    if device.irq.level:
        yield "irq high"
    if device.alarm.deadline_ns is not None:
        yield f"alarm at {device.alarm.deadline_ns} ns"
    try:
        saved: dict[str, Any] = device.save()
    except Exception as problem:  # the report must not hide what it reports
        yield f"save() raised {problem!r}"
    else:
        yield from (f"{key}={_short(value)}" for key, value in saved.items())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe_record(record: Record) -> str:
    """A record in a line."""
    match record:
        case ExitRecord(source=cpu, reason=reason, ticks=ticks, exit=exit_):
            what = "" if exit_ is None or isinstance(exit_, HaltExit) else f" {exit_}"
            return f"{cpu}: exit {reason} after {ticks / 1e3:.1f} µs{what}"
        case AccessRecord(source=device, register=register, bus=bus, address=address):
            place = f"{bus} {address:#x}, {device}{'.' + register if register else ''}"
            value = "no answer" if record.value is None else f"{record.value:#x}"
            verb = "write" if record.is_write else "read"
            return f"{record.vcpu or 'host'}: {verb} {place}: {value}"
        case StallRecord(source=cpu, access=access, duration_ns=duration_ns):
            return f"{cpu}: waited {duration_ns / 1e6:.3f} ms for {access}"
        case LineRecord(source=line, level=level):
            return f"{line}: {'high' if level else 'low'}"
        case InterruptRecord(source=cpu, vector=vector):
            return f"{cpu}: {'NMI' if vector is None else f'interrupt {vector:#x}'} injected"
        case AssistRecord(source=cpu, address=address, instructions=count):
            what = record.instruction or record.code.hex(" ")
            return f"{cpu}: {what} at {address:#x} in software, {count} instructions in all"
        case AlarmRecord(source=device, deadline_ns=deadline_ns, rang=rang):
            return f"{device}: alarm {'rings' if rang else f'armed for {deadline_ns} ns'}"
        case DrainRecord(source=machine, step=step):
            return f"{machine}: {step}"
        case FaultRecord(source=who, what=what):
            return f"{who}: fault: {what}"
