"""Traces: what happens in a machine, as typed records to a sink.

=============  =================================================================
`records`      one class for each kind of record
`tracing`      hooks a machine's parts while somebody listens; nothing else pays
`accesses`     a record for each access to a device
`bursts`       one note in place of records, for a file, where accesses come in a row
`chrome`       a sink: trace-event JSON, for Perfetto and ``chrome://tracing``
`vcd`          a sink: registers and interrupt lines as a waveform
=============  =================================================================

::

    with machine.trace("run.json"):
        await machine.run()

    last = collections.deque(maxlen=100)
    with machine.trace(last.append, only="exit,access"):
        await machine.run()

A register whose reads the C core answers itself (`SharedRegister`) does not show
its reads; a batched write shows when it reaches its device.
"""

from .chrome import ChromeTrace
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
from .tracing import Filter, Sink, Trace, TraceFile, Tracing, open_trace_file
from .vcd import VcdTrace

__all__ = [
    "KINDS",
    "AccessRecord",
    "AlarmRecord",
    "AssistRecord",
    "ChromeTrace",
    "DrainRecord",
    "ExitRecord",
    "FaultRecord",
    "Filter",
    "InterruptRecord",
    "LineRecord",
    "Record",
    "Sink",
    "StallRecord",
    "Trace",
    "TraceFile",
    "Tracing",
    "VcdTrace",
    "open_trace_file",
]
