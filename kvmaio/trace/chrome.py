"""`ChromeTrace`: trace-event JSON, which Perfetto and ``chrome://tracing`` open.

Source: "Trace Event Format" (Google), the JSON array form: complete events (``X``),
instants (``i``), counters (``C``) and metadata (``M``), times in microseconds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..kvm.notes import Notes
from .bursts import BurstAccess, Taker
from .records import (
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
    from ..machine import Machine

__all__ = ["ChromeTrace"]

MOST_UNWRITTEN = 128
UNWRITTEN_FOR_S = 0.2
"""Records are written once there are so many, or when one comes after this time. Together, for
Python does a thing many times in a row much faster than once in a while between exits."""

_PID = 1
_monotonic = time.monotonic


class ChromeTrace:
    """A trace file in trace-event JSON; see `kvmaio.trace.TraceFile`.

    One track for each vCPU (what it executed, its stalls and interrupts), each device
    (its accesses, with values) and each interrupt line. Memory does not grow with the
    trace. A file is valid JSON after each write; only a process that is killed within one
    leaves a last event cut short, which viewers ignore. A pipe gets its closing bracket at
    the end, and viewers can do without.

    Args:
        path: the file; it is emptied first.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (until close)
        self._seekable = self._file.seekable()
        self._end = 0  # where the closing bracket goes
        self._records: list[Record | bytes] = []  # or events of bursts, which are written already
        self._notes = Notes()
        self._waiting = self._notes.handle
        self._events: list[bytes] = []  # tracks that the next event needs
        self._written_at = _monotonic()
        self._began_ns = 0
        self._tracks: dict[str, int] = {}
        self._prefixes: dict[tuple[object, ...], str] = {}
        self._formats: dict[type, Callable[[Any], str]] = {
            ExitRecord: self._exit,
            AccessRecord: self._access,
            StallRecord: self._stall,
            LineRecord: self._line,
            InterruptRecord: self._interrupt,
            AssistRecord: self._assist,
            AlarmRecord: self._alarm,
            DrainRecord: self._drain,
            FaultRecord: self._fault,
        }

    def begin(self, machine: Machine) -> None:
        self._began_ns = machine.clock.now_ns
        self._notes.begin(self._began_ns)
        self._events.append(_metadata("process_name", 0, machine.name))
        for source in (*(vcpu.name for vcpu in machine.vcpus), *machine.devices):
            self._track(source)
        self.write()

    def __call__(self, record: Record) -> None:
        records = self._records
        if self._waiting.used:
            self._take_notes()
        records.append(record)
        if len(records) >= MOST_UNWRITTEN or _monotonic() - self._written_at > UNWRITTEN_FOR_S:
            self.write()

    def taker(self, access: BurstAccess) -> Taker | None:
        """See `kvmaio.trace.bursts.Burstable`."""
        exit_prefix = self._exit_prefix(access.vcpu, access.reason)
        access_prefix = self._access_prefix(
            *(access.source, access.vcpu, access.register, access.bus),
            *(access.address, access.size, access.is_write),
        )
        texts = exit_prefix.encode(), access_prefix.encode()
        noter = self._notes.noter(
            *(access.burst, access.key, access.vcpu, texts, access.offset_ns, access.host_factor)
        )
        return None if noter is None else Taker(*noter)

    def close(self) -> None:
        if not self._file.closed:
            self.write(last=True)
            self._file.close()

    # ---- events, each as text -------------------------------------------------------------

    # What is the same in each is made once, and times are written as 123e-3: with json.dumps(),
    # or with a division, a trace would take half of the exits a second.

    def _exit(self, record: ExitRecord) -> str:
        time_ns, source, reason, ticks, exit_ = record
        prefix = self._prefixes.get((source, reason)) if exit_ is None else None
        if prefix is None:
            if exit_ is None:
                prefix = self._exit_prefix(source, reason)
                self._keep((source, reason), prefix)
            else:
                arguments = {"exit": reason, "is": str(exit_)}
                prefix = self._prefix("guest", "exit", source, arguments) + "},"
        begun_ns = self._begun_ns(source, time_ns, ticks)
        return f'{prefix}"ts":{begun_ns - self._began_ns}e-3,"dur":{time_ns - begun_ns}e-3}}'

    def _begun_ns(self, vcpu: str, left_ns: int, ticks: int) -> int:
        # Executed time is measured by another clock than time: events must not overlap.
        last = self._notes.left(vcpu)
        begun_ns, before_ns = left_ns - ticks, last[0]
        last[0] = left_ns
        return begun_ns if begun_ns >= before_ns else min(before_ns, left_ns)

    def _exit_prefix(self, vcpu: str, reason: str) -> str:
        return self._prefix("guest", "exit", vcpu, {"exit": reason}) + "},"

    def _access(self, record: AccessRecord) -> str:
        what = record[1:8]  # all but times and value
        prefix = self._prefixes.get(what)
        if prefix is None:
            prefix = self._access_prefix(*what)
            self._keep(what, prefix)
        value = record[8]  # by number: by name takes a call
        shown = "null" if value is None else f'"{value:#x}"'
        return f'{prefix}{shown}}},"ts":{record[0] - self._began_ns}e-3,"dur":{record[9]}e-3}}'

    def _access_prefix(
        self,
        source: str,
        vcpu: str | None,
        register: str | None,
        bus: str,
        address: int,
        size: int,
        is_write: bool,
    ) -> str:
        name = f"{'write' if is_write else 'read'} {register or hex(address)}"
        arguments = {"by": vcpu, bus: hex(address), "size": size}
        return self._prefix(name, "access", source, arguments) + ',"value":'

    def _stall(self, record: StallRecord) -> str:
        prefix = self._prefix("stall", "stall", record.source, {"for": record.access})
        return f'{prefix}}},"ts":{self._ts(record)},"dur":{record.duration_ns}e-3}}'

    def _line(self, record: LineRecord) -> str:
        # Counters belong to the process; their name is their track.
        prefix = self._prefix(record.source, "irq", None, {"level": int(record.level)}, "C")
        return f'{prefix}}},"ts":{self._ts(record)}}}'

    def _interrupt(self, record: InterruptRecord) -> str:
        what = "NMI" if record.vector is None else f"interrupt {record.vector:#x}"
        return self._instant(record, "interrupt", what)

    def _alarm(self, record: AlarmRecord) -> str:
        deadline_us = (record.deadline_ns - self._began_ns) / 1e3
        return self._instant(record, "alarm", "alarm" if record.rang else "arm", us=deadline_us)

    def _assist(self, record: AssistRecord) -> str:
        name = f"assist: {record.instruction or record.code.hex(' ')}"
        return self._instant(
            record, "assist", name, at=hex(record.address), instructions=record.instructions
        )

    def _drain(self, record: DrainRecord) -> str:
        return self._instant(record, "drain", record.step)

    def _fault(self, record: FaultRecord) -> str:
        return self._instant(record, "fault", record.what)

    def _instant(self, record: Record, kind: str, name: str, **arguments: Any) -> str:
        prefix = self._prefix(name, kind, record.source, arguments, "i")
        return f'{prefix}}},"s":"t","ts":{self._ts(record)}}}'

    def _event(self, record: Record) -> bytes:
        return self._formats[type(record)](record).encode()

    # ---- parts --------------------------------------------------------------------------

    def _ts(self, record: Record) -> str:
        return f"{record.time_ns - self._began_ns}e-3"

    def _prefix(
        self, name: str, kind: str, source: str | None, arguments: dict[str, Any], phase: str = "X"
    ) -> str:
        """An event up to its last argument."""
        track = "" if source is None else f',"tid":{self._track(source)}'
        return (
            f'{{"name":{json.dumps(name)},"cat":"{kind}","ph":"{phase}","pid":{_PID}{track},'
            f'"args":{json.dumps(arguments)[:-1]}'
        )

    def _keep(self, key: tuple[object, ...], prefix: str) -> None:
        # Not too many: a guest names addresses as it likes.
        if len(self._prefixes) >= 1 << 12:
            self._prefixes.clear()
        self._prefixes[key] = prefix

    def _track(self, source: str) -> int:
        track = self._tracks.get(source)
        if track is None:
            track = self._tracks[source] = len(self._tracks) + 1
            self._events.append(_metadata("thread_name", track, source))
        return track

    def _take_notes(self) -> None:
        due_ns = int((_monotonic() + UNWRITTEN_FOR_S) * 1e9)
        self._records.append(self._notes.take(due_ns))

    def write(self, *, last: bool = False) -> None:
        """Write what has been taken so far; `last`: it is the end."""
        if self._file.closed:  # by the handler whose access is being told
            return
        events = self._events
        if self._waiting.used:
            self._take_notes()
        for record in self._records:
            events.append(record if isinstance(record, bytes) else self._event(record))
        data = b",\n".join(events)
        events.clear()
        self._records.clear()
        self._written_at = _monotonic()
        if data:
            data = (b",\n" if self._end else b"[\n") + data
        elif not self._end:
            data = b"["
        if self._seekable:
            self._file.seek(self._end)
        _write_all(self._file, data + b"\n]\n" if self._seekable or last else data)
        self._end += len(data)


def _write_all(file: Any, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _metadata(what: str, track: int, name: str) -> bytes:
    return (
        f'{{"name":"{what}","ph":"M","pid":{_PID},"tid":{track},"ts":0,'
        f'"args":{{"name":{json.dumps(name)}}}}}'
    ).encode()
