"""`Tracing`: hooks the parts of a machine while somebody listens.

Nothing on the way of an exit asks whether a trace is on. Hooks are put in when the first
sink comes, anew whenever the sinks or the machine's parts change, and only where a sink's
filter wants to know; they are taken out with the last one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

from ..access_burst import AccessBurst
from ..assist import Assisted
from ..bus import Bus, Mapping, Target
from ..clock import LoopClock
from ..cpu import EntryResult
from ..decode import Reason
from ..disassembly import instruction_name
from ..errors import ConfigurationError
from ..irq import IrqLine
from ..vcpu import VCpu, VCpuHooks
from .accesses import TracedTarget, traced_target
from .bursts import Burstable, BurstAccess, WatchedTarget
from .records import (
    KINDS,
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
    from ..device import Device
    from ..machine import Machine

__all__ = ["Filter", "Sink", "Trace", "TraceFile", "Tracing", "open_trace_file"]

Sink = Callable[[Record], object]
"""Takes the records in the order in which they are made; what it returns is ignored.

It is called in the middle of things, and must not block; what it raises ends the run.
"""


@runtime_checkable
class TraceFile(Protocol):
    """A sink that wants to know the machine first, and is closed at the end."""

    def begin(self, machine: Machine) -> None:
        """The trace begins."""

    def __call__(self, record: Record) -> None:
        """Take a record."""

    def close(self) -> None:
        """The trace is over. Idempotent."""


class Filter:
    """Which records a sink wants, such as ``exit,access,uart*``.

    Words that name kinds (`KINDS`) choose kinds, any others are patterns for sources
    (``uart``, ``cpu0``, ``irq*``). Without kinds it wants all of them, and so with sources.
    """

    def __init__(self, words: str = "") -> None:
        chosen = [word.strip() for word in words.split(",") if word.strip()]
        self.kinds = {KINDS[word] for word in chosen if word in KINDS} or set(KINDS.values())
        self.patterns = [word for word in chosen if word not in KINDS]

    def wants(self, kind: type[Record], source: str) -> bool:
        """Does it?"""
        if kind not in self.kinds:
            return False
        return not self.patterns or any(fnmatchcase(source, p) for p in self.patterns)


class Trace:
    """A trace that goes on until `close()`, or until the ``with`` block ends."""

    def __init__(self, tracing: Tracing, sink: Sink, wanted: Filter) -> None:
        self._tracing = tracing
        self.sink = sink
        # Bound once: to call an object is slower.
        self.take: Sink = sink.__call__ if isinstance(sink, TraceFile) else sink
        self.wanted = wanted

    def close(self) -> None:
        """End it, and close the sink if that is a file. Idempotent."""
        self._tracing.remove(self)
        if isinstance(self.sink, TraceFile):
            self.sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Tracing:
    """One machine's traces."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._traces: list[Trace] = []
        self._line_sinks: list[tuple[IrqLine, Callable[[bool], None]]] = []

    def add(self, sink: Sink, wanted: Filter) -> Trace:
        """Begin a trace."""
        trace = Trace(self, sink, wanted)
        if isinstance(sink, TraceFile):
            sink.begin(self._machine)
        self._traces.append(trace)
        self.refresh()
        return trace

    def check(self, wanted: Filter) -> None:
        """Raise ConfigurationError if a pattern of `wanted` fits no part of the machine."""
        sources = self._sources()
        for pattern in wanted.patterns:
            if not any(fnmatchcase(source, pattern) for source in sources):
                raise ConfigurationError(
                    f"{pattern!r} is no kind of record and no part of {self._machine.name}; "
                    f"kinds: {', '.join(KINDS)}; parts: {', '.join(sources)}"
                )

    def remove(self, trace: Trace) -> None:
        """End a trace; nothing happens if it has ended."""
        if trace in self._traces:
            self._traces.remove(trace)
            self._unhook()
            self.refresh()

    def close(self) -> None:
        """End all of them: the machine closes."""
        for trace in tuple(self._traces):
            trace.close()

    def refresh(self) -> None:
        """The machine has new parts, or there are other sinks."""
        if self._traces:
            self._unhook()
            self._hook()

    # ---- what other parts of the engine tell ------------------------------------------

    def drain(self, step: str) -> None:
        """A step of the drain barrier."""
        if self._traces:
            self._tell(DrainRecord(self._machine.clock.now_ns, self._machine.name, step))

    def fault(self, source: str, what: str) -> None:
        """An injected fault."""
        if self._traces:
            self._tell(FaultRecord(self._machine.clock.now_ns, source, what))

    def _tell(self, record: Record) -> None:
        if (emit := self._emitter(type(record), record.source)) is not None:
            emit(record)

    # ---- hooks ------------------------------------------------------------------------

    def _emitter(self, kind: type[Record], source: str) -> Sink | None:
        """What takes such records: None if nobody wants them."""
        sinks = [trace.take for trace in self._traces if trace.wanted.wants(kind, source)]
        if len(sinks) <= 1:
            return sinks[0] if sinks else None

        def emit(record: Record) -> None:
            for sink in sinks:
                sink(record)

        return emit

    def _file(self) -> Burstable | None:
        """The trace file that is the only sink, and so may have its records together."""
        if len(self._traces) == 1 and isinstance(self._traces[0].sink, TraceFile):
            sink = self._traces[0].sink
            return sink if isinstance(sink, Burstable) else None
        return None

    def _sources(self) -> list[str]:
        machine = self._machine
        lines = (line.name for line in self._lines())
        others = ("unmapped", machine.name)
        return [*(v.name for v in machine.vcpus), *machine.devices, *lines, *others]

    def _lines(self) -> list[IrqLine]:
        outputs = (device.irq for device in self._machine.devices.values())
        return [*self._machine.lines.values(), *outputs]

    def _hook(self) -> None:
        machine = self._machine
        for bus in (machine.pio, machine.mmio):
            bus.observe(self._layer(bus))
        for vcpu in machine.vcpus:
            vcpu.hook(_vcpu_hooks(vcpu, machine.clock, self._emitter, self._file()))
        for device in machine.devices.values():
            self._hook_alarm(device)
        for line in self._lines():
            self._hook_line(line)

    def _unhook(self) -> None:
        machine = self._machine
        for bus in (machine.pio, machine.mmio):
            bus.observe(None)
        for vcpu in machine.vcpus:
            vcpu.hook(VCpuHooks())
        for device in machine.devices.values():
            device.alarm.watcher = None
        for line, sink in self._line_sinks:
            line.disconnect(sink)
        self._line_sinks.clear()

    def _layer(self, bus: Bus) -> Callable[[Mapping | None, int, int, Target], Target]:
        now = self._machine.clock.read_ns

        def observe(mapping: Mapping | None, address: int, size: int, target: Target) -> Target:
            device = None if mapping is None else mapping.device
            source = "unmapped" if device is None else device.name
            emit = self._emitter(AccessRecord, source)
            if emit is None:
                return target
            return traced_target(target, emit, now, source, device, bus.name, address, size)

        return observe

    def _hook_alarm(self, device: Device) -> None:
        emit = self._emitter(AlarmRecord, device.name)
        if emit is not None:
            now, name = self._machine.clock.read_ns, device.name

            def follow(deadline_ns: int, rang: bool) -> None:
                emit(AlarmRecord(now(), name, deadline_ns, rang))

            device.alarm.watcher = follow

    def _hook_line(self, line: IrqLine) -> None:
        emit = self._emitter(LineRecord, line.name)
        if emit is not None:
            now, name = self._machine.clock.read_ns, line.name

            def follow(level: bool) -> None:
                emit(LineRecord(now(), name, level))

            self._line_sinks.append((line, follow))
            line.connect(follow)


def _vcpu_hooks(
    vcpu: VCpu,
    clock: LoopClock,
    emitter: Callable[[type[Record], str], Sink | None],
    file: Burstable | None,
) -> VCpuHooks:
    """What tells of one vCPU, as far as somebody wants to know."""
    name, now = vcpu.name, clock.read_ns
    emit_exit = emitter(ExitRecord, name)
    emit_stall = emitter(StallRecord, name)
    emit_interrupt = emitter(InterruptRecord, name)
    emit_assist = emitter(AssistRecord, name)

    def left(result: EntryResult, reason: int, ticks: int) -> None:
        assert emit_exit is not None
        exit_ = None
        if result is _EXIT:
            reason_name = _TOLD_BY_ACCESSES.get(reason)
            if reason_name is None:
                reason_name = _REASONS.get(reason) or str(reason)
                exit_ = vcpu.last_exit()
        else:
            reason_name = "TIMER" if result is EntryResult.TIMER else "KICK"
        emit_exit(tuple.__new__(ExitRecord, (now(), name, reason_name, ticks, exit_)))

    def stalls(access: str) -> Callable[[], None]:
        begun_ns = now()

        def over() -> None:
            assert emit_stall is not None
            emit_stall(StallRecord(begun_ns, name, access, now() - begun_ns))

        return over

    def injected(vector: int | None) -> None:
        assert emit_interrupt is not None
        emit_interrupt(InterruptRecord(now(), name, vector))

    def assisted(assist: Assisted) -> None:
        assert emit_assist is not None
        address, bits, code, instructions = assist
        text = instruction_name(code, bits)
        emit_assist(AssistRecord(now(), name, address, code, text, instructions))

    def bursts(target: Target, key: int, burst: AccessBurst) -> WatchedTarget | None:
        assert file is not None
        is_write = bool(key & 2)
        if not isinstance(target, TracedTarget) or target.what is None:
            return None
        what = target.what(is_write)
        reason = "IO" if key & 1 else "MMIO"

        def left(left_ns: int, executed_ns: int) -> None:
            assert emit_exit is not None
            ticks = int(executed_ns * vcpu.host_factor)
            emit_exit(ExitRecord(left_ns, name, reason, ticks, None))

        access = BurstAccess(
            *(burst, name, reason, *what, key >> 2 & 15, is_write, key),
            *(clock.of_loop(0), vcpu.host_factor),
        )
        taker = file.taker(access)
        return None if taker is None else WatchedTarget(target, access, taker, file, left)

    return VCpuHooks(
        left if emit_exit is not None else None,
        stalls if emit_stall is not None else None,
        injected if emit_interrupt is not None else None,
        assisted if emit_assist is not None else None,
        bursts if emit_exit is not None and file is not None else None,
    )


_EXIT = EntryResult.EXIT
_REASONS = {int(reason): reason.name for reason in Reason}
_TOLD_BY_ACCESSES = {int(reason): reason.name for reason in (Reason.IO, Reason.MMIO)}


def open_trace_file(path: str | os.PathLike[str]) -> TraceFile:
    """The sink for a file: ``.json`` (trace events) or ``.vcd`` (waveform; extra ``trace``).

    Raises:
        ConfigurationError: another suffix, or a package is missing.
        OSError: the file cannot be written.
    """
    suffix = Path(path).suffix
    if suffix == ".json":
        from .chrome import ChromeTrace

        return ChromeTrace(path)
    if suffix == ".vcd":
        from .vcd import VcdTrace

        return VcdTrace(path)
    raise ConfigurationError(
        f"{os.fspath(path)}: a trace is written to a .json file (Perfetto, chrome://tracing) or a "
        ".vcd file (waveform viewers)"
    )
