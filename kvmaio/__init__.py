"""kvmaio: an asyncio co-simulation engine for KVM guests.

How the package is laid out, in the order in which one may want to read it:

==================  ==================================================================
`machine`           the composition root: everything below, wired together
`board`             memory, buses, devices and lines
`device`            the base of device models; `registers`, `irq` and `clock` are its parts
`bus`               from an address to a device
`memory`            the guest's RAM and ROM
`vcpu`              the state machine of a virtual CPU and its run loop
`entry`             into the guest and back: sync, inject, run, account
`service`           from an exit to whoever answers it; `exits` names the reasons
`drain`             everything in flight brought to rest, as a barrier to await
`checkpoint`        a machine's whole state as a value and a file; `snapshot` takes it
`simulation`        the event loop as the simulator's event queue; `clock` reads it
`cpu`, `platform`   what a CPU model and its host part must be able to do
`kvm`               the KVM model; the only user of the C core
`trace`             what happened, as typed records, JSON or a waveform
`gdb`               a server for GDB
`faults`            interrupts and devices that misbehave
`boot`              image loaders
`devices`           device models, one file per part
`bench`, `testing`  what it costs; devices tested without a CPU
`cli`, `doctor`     the command line
==================  ==================================================================
"""

from .bus import Bus, Unmapped
from .checkpoint import Checkpoint
from .cpu import Context, CpuState
from .device import Device
from .doorbell import Doorbell
from .drain import drained
from .errors import (
    CheckpointError,
    ConfigurationError,
    ConsoleTimeout,
    DrainTimeout,
    EmulationFailure,
    GuestError,
    HostError,
    KvmaioError,
    UnmappedAccess,
)
from .exits import EndRun, Exited, Halted, Outcome, Shutdown, Stopped, VmExit
from .fields import Field, Fields
from .irq import IrqLine
from .loops import run
from .machine import Machine
from .memory import GuestMemory
from .registers import Access, Register, SharedRegister
from .simulation import SimulationLoop, real_time
from .vcpu import VCpu, VCpuState, current_vcpu

__all__ = [
    "Access",
    "Bus",
    "Checkpoint",
    "CheckpointError",
    "ConfigurationError",
    "ConsoleTimeout",
    "Context",
    "CpuState",
    "Device",
    "Doorbell",
    "DrainTimeout",
    "EmulationFailure",
    "EndRun",
    "Exited",
    "Field",
    "Fields",
    "GuestError",
    "GuestMemory",
    "Halted",
    "HostError",
    "IrqLine",
    "KvmaioError",
    "Machine",
    "Outcome",
    "Register",
    "SharedRegister",
    "Shutdown",
    "SimulationLoop",
    "Stopped",
    "UnmappedAccess",
    "Unmapped",
    "VCpu",
    "VCpuState",
    "VmExit",
    "current_vcpu",
    "drained",
    "real_time",
    "run",
]

__version__ = "0.1.0"
