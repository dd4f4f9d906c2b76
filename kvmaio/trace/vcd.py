"""`VcdTrace`: registers and interrupt lines as a waveform (IEEE 1364, 18), for GTKWave and such."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import attrs

from ..decode import Reason
from ..errors import ConfigurationError
from .bursts import BurstAccess, Taker
from .records import AccessRecord, AlarmRecord, ExitRecord, LineRecord, Record, StallRecord

if TYPE_CHECKING:
    from ..device import Device
    from ..machine import Machine
    from ..registers import Register

__all__ = ["VcdTrace"]


class VcdTrace:
    """A trace file in VCD; see `kvmaio.trace.TraceFile`. Needs pyvcd (``kvmaio[trace]``).

    The signals, in nanoseconds since the trace began:

    ====================  ==========================================================
    ``uart.lcr``          each declared register, as it is after each access to its
                          device, alarm and change of its line
    ``uart.irq``          the device's interrupt output; and ``irq.irq4``, the board's
    ``uart.alarm``        an event: the alarm rang
    ``cpu0.exit``         the reason of the last exit, a KVM_EXIT_* number
    ====================  ==========================================================

    What is attached after the beginning does not show: a VCD file declares its signals
    first. A register whose reads are computed shows what is stored of it.

    Args:
        path: the file; it is emptied first.

    Raises:
        ConfigurationError: pyvcd is missing.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            from vcd import VCDWriter
        except ImportError:
            raise ConfigurationError(
                "a .vcd trace needs pyvcd: pip install 'kvmaio[trace]'; a .json trace needs nothing"
            ) from None
        self._file = open(path, "w")  # noqa: SIM115 (until close)
        self._writer = VCDWriter(self._file, timescale="1 ns", date="", version="kvmaio")
        self._began_ns = 0
        self._last_ns = 0
        self._exits: dict[str, Any] = {}
        self._alarms: dict[str, Any] = {}
        self._lines: dict[str, Any] = {}
        self._registers: dict[str, list[_Signal]] = {}
        self._last_exits: dict[str, int | str] = {}

    def begin(self, machine: Machine) -> None:
        self._began_ns = machine.clock.now_ns
        register_var = self._writer.register_var
        for vcpu in machine.vcpus:
            self._exits[vcpu.name] = register_var(vcpu.name, "exit", "reg", size=8)
        for line in machine.lines.values():
            variable = register_var("irq", line.name, "wire", size=1, init=int(line.level))
            self._lines[line.name] = variable
        for device in machine.devices.values():
            self._declare(device)

    def __call__(self, record: Record) -> None:
        if self._file.closed:  # by the handler whose access this is
            return
        time_ns, source = record.time_ns, record.source
        if isinstance(record, AccessRecord | StallRecord):
            time_ns += record.duration_ns
        time_ns = self._at(time_ns)
        match record:
            case ExitRecord(reason=reason):
                number = int(Reason[reason]) if reason in Reason.__members__ else "x"
                self._exit(source, time_ns, number)
            case AccessRecord():
                self._sample(source, time_ns)
            case LineRecord():
                if (variable := self._lines.get(source)) is not None:
                    self._writer.change(variable, time_ns, int(record.level))
                self._sample(source.removesuffix(".irq"), time_ns)
            case AlarmRecord(rang=True):
                if (variable := self._alarms.get(source)) is not None:
                    self._writer.change(variable, time_ns, True)
                self._sample(source, time_ns)
            case _:
                pass

    def taker(self, access: BurstAccess) -> Taker:
        """See `kvmaio.trace.bursts.Burstable`."""
        source, offset_ns = access.source, access.offset_ns
        vcpu, number = access.vcpu, int(Reason[access.reason])
        last_exits = self._last_exits

        def told() -> int:
            if not self._file.closed:
                self._sample(source, self._at(time.monotonic_ns() + offset_ns))
            return 0

        def arrived() -> None:
            if last_exits.get(vcpu) != number:
                self._exit(vcpu, self._at(time.monotonic_ns() + offset_ns), number)

        return Taker(told=told if self._registers.get(source) else None, arrived=arrived)

    def write(self) -> None:
        """Nothing waits: pyvcd writes as it goes."""

    def close(self) -> None:
        if not self._file.closed:
            self._writer.close()
            self._file.close()

    def _at(self, time_ns: int) -> int:
        time_ns -= self._began_ns
        if time_ns < self._last_ns:  # a checkpoint was restored: the waveform goes on
            self._began_ns -= self._last_ns - time_ns
            time_ns = self._last_ns
        self._last_ns = time_ns
        return time_ns

    def _exit(self, vcpu: str, time_ns: int, number: int | str) -> None:
        self._writer.change(self._exits[vcpu], time_ns, number)
        self._last_exits[vcpu] = number

    def _declare(self, device: Device) -> None:
        register_var = self._writer.register_var
        name = device.name
        self._lines[device.irq.name] = register_var(
            name, "irq", "wire", size=1, init=int(device.irq.level)
        )
        self._alarms[name] = register_var(name, "alarm", "event")
        self._registers[name] = [
            _Signal(
                device,
                register,
                register_var(name, register.name, "reg", size=register.bits, init=value),
                value,
            )
            for register in device.registers
            if not register.doorbell
            for value in [_value(device, register)]
        ]

    def _sample(self, source: str, time_ns: int) -> None:
        for signal in self._registers.get(source, ()):
            value = _value(signal.device, signal.register)
            if value != signal.value:  # pyvcd looks, too, but takes a microsecond for it
                self._writer.change(signal.variable, time_ns, value)
                signal.value = value


@attrs.define
class _Signal:
    """A register, and what was last told of it."""

    device: Device
    register: Register[Any]
    variable: Any
    value: int


def _value(device: Device, register: Register[Any]) -> int:
    return int(device.__dict__[register.name]) & register.mask
