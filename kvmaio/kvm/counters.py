"""Performance counters (perf_event_open(2)): configuration, groups, periods, overflow signals.

What a host does not offer is no error of kvmaio's: `cycle_counting()` and
`instruction_counting()` say what there is and why, once per process, and
whoever counts falls back: cycles to thread CPU time, instructions to unknown.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import time
from functools import cache
from types import TracebackType
from typing import Self

import attrs

from ..errors import ConfigurationError, HostError
from ._native import ffi, lib
from .gate import check

__all__ = [
    "CONTEXT_SWITCHES",
    "CPU_CLOCK",
    "CPU_CYCLES",
    "INSTRUCTIONS",
    "PAGE_FAULTS",
    "TASK_CLOCK",
    "Counter",
    "CounterConfig",
    "CounterSupport",
    "Event",
    "cycle_counting",
    "host_hz",
    "instruction_counting",
]

_log = logging.getLogger(__name__)


@attrs.frozen
class Event:
    """What is counted: perf_event_attr's `type` and `config`, and its name in perf(1)."""

    name: str
    type: int
    config: int

    @property
    def is_hardware(self) -> bool:
        """Does it need a performance monitoring unit?"""
        return self.type == _HARDWARE


_HARDWARE, _SOFTWARE = 0, 1
CPU_CYCLES = Event("cycles", _HARDWARE, 0)
INSTRUCTIONS = Event("instructions", _HARDWARE, 1)
CPU_CLOCK = Event("cpu-clock", _SOFTWARE, 0)  # nanoseconds
TASK_CLOCK = Event("task-clock", _SOFTWARE, 1)  # nanoseconds that the thread has run
PAGE_FAULTS = Event("page-faults", _SOFTWARE, 2)
CONTEXT_SWITCHES = Event("context-switches", _SOFTWARE, 3)

_BITS = {"disabled": 0, "pinned": 2, "exclude_hv": 6, "exclude_host": 19}
# type, size, config, sample_period, sample_type, read_format, the bits, wakeup_events, bp_type,
# config1: the structure's first published version, which every kernel takes.
_LAYOUT = struct.Struct("<IIQQQQQIIQ")


@attrs.frozen
class CounterConfig:
    """How an event is counted.

    Attributes:
        sample_period: overflow after so many events; 0 counts without overflows.
        wakeup_events: overflows per signal.
        disabled: it begins with `enable()` or `refresh()`; a group's members are
            not disabled themselves, and follow their leader.
        pinned: always on the processor, or in an error state in which the count is
            unknown; for group leaders only.
        exclude_host: only what guests execute; software events count all the same.
        exclude_hv: not what a hypervisor below this host executes.
    """

    event: Event
    sample_period: int = 0
    wakeup_events: int = 0
    disabled: bool = True
    pinned: bool = False
    exclude_host: bool = False
    exclude_hv: bool = False

    def pack(self) -> bytes:
        """The perf_event_attr."""
        bits = sum(getattr(self, name) << position for name, position in _BITS.items())
        return _LAYOUT.pack(
            self.event.type,
            _LAYOUT.size,
            self.event.config,
            self.sample_period,
            0,
            0,
            bits,
            self.wakeup_events,
            0,
            0,
        )

    @classmethod
    def guest_cycles(cls) -> Self:
        """A vCPU's cycles: the pinned leader of its group."""
        return cls(CPU_CYCLES, pinned=True, exclude_host=True, exclude_hv=True)

    @classmethod
    def guest_instructions(cls) -> Self:
        """A vCPU's instructions: a member of the cycles' group."""
        return cls(INSTRUCTIONS, disabled=False, exclude_host=True, exclude_hv=True)


class Counter:
    """One counter; `attach()` opens it. A context manager that closes it."""

    def __init__(self, config: CounterConfig) -> None:
        self.config = config
        self._fd = -1

    def attach(self, thread: int = 0, group: Counter | None = None) -> Self:
        """Count what `thread` (an id as of gettid(2); 0: the caller) does.

        Args:
            group: the leader of a group to belong to; it counts the same thread.

        Raises:
            ConfigurationError: it is attached already, or the leader is not.
            HostError: the host refused; the message says what to do.
        """
        if self._fd >= 0:
            raise ConfigurationError(f"the counter of {self._name} is attached already")
        if group is not None and group._fd < 0:
            raise ConfigurationError(
                f"{self._name} cannot join the group of {group._name}, which is not attached"
            )
        leader = -1 if group is None else group._fd
        result = _perf_event_open(self.config.pack(), thread, leader)
        if result < 0:
            raise HostError(f"perf_event_open({self._name})", -result, self._hint(-result))
        self._fd = result
        return self

    @property
    def is_attached(self) -> bool:
        """Is it open?"""
        return self._fd >= 0

    @property
    def fd(self) -> int:
        """Its file descriptor.

        Raises:
            ConfigurationError: it is not attached.
        """
        if self._fd < 0:
            raise ConfigurationError(f"the counter of {self._name} is not attached")
        return self._fd

    def enable(self) -> None:
        """Count from now on."""
        self._ioctl("ENABLE", 0)

    def disable(self) -> None:
        """Stop counting; the count stays."""
        self._ioctl("DISABLE", 0)

    def reset(self) -> None:
        """Set the count to 0."""
        self._ioctl("RESET", 0)

    def refresh(self, overflows: int = 1) -> None:
        """Count until so many overflows (above 0), then stop.

        They are added to those of an earlier call that are still to come: after one
        that did not overflow, `enable()` goes on with what is left.
        """
        self._ioctl("REFRESH", overflows)

    def set_period(self, events: int) -> None:
        """Overflow every `events` (above 0), from now on."""
        period = ffi.new("uint64_t *", events)
        check(lib.kvmaio_ioctl(self.fd, lib.PERF_EVENT_IOC_PERIOD, period), "PERF_EVENT_IOC_PERIOD")

    def signals_to(self, thread: int, signal: int) -> None:
        """Send `signal` to `thread` at each overflow (fcntl(2), F_SETSIG, F_SETOWN_EX)."""
        fcntl.fcntl(self.fd, _F_SETOWN_EX, struct.pack("ii", _F_OWNER_TID, thread))
        fcntl.fcntl(self.fd, _F_SETSIG, signal)
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags | os.O_ASYNC)

    def read(self) -> int | None:
        """The count; None where it is unknown: a pinned counter found no place."""
        raw = os.read(self.fd, 8)
        return int.from_bytes(raw, "little") if len(raw) == 8 else None

    def close(self) -> None:
        """Give it back; it may be attached anew. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _name(self) -> str:
        return self.config.event.name

    def _ioctl(self, name: str, value: int) -> None:
        request = getattr(lib, f"PERF_EVENT_IOC_{name}")
        check(lib.kvmaio_ioctl_value(self.fd, request, value), f"PERF_EVENT_IOC_{name}")

    def _hint(self, number: int) -> str:
        if number in (errno.EACCES, errno.EPERM):
            return _no_permission()
        if number == errno.ENOENT and not self.config.event.is_hardware:
            return "this kernel does not know the event"
        return _HINTS.get(number, "")

    def __repr__(self) -> str:
        return f"<Counter {self._name}{'' if self.is_attached else ', not attached'}>"


# fcntl has no names for these before Python 3.13 (asm-generic/fcntl.h).
_F_SETSIG, _F_SETOWN_EX, _F_OWNER_TID = 10, 15, 0
PARANOID = "/proc/sys/kernel/perf_event_paranoid"

_HINTS = {
    errno.ENOENT: (
        "this machine has no such event: it is a virtual machine without a virtual PMU, or its "
        "processor cannot count this"
    ),
    errno.ENOSYS: "this kernel is built without CONFIG_PERF_EVENTS",
    errno.ENODEV: "this processor's performance monitoring unit is not supported by the kernel",
    errno.EOPNOTSUPP: (
        "the hardware cannot count it this way: no overflow interrupt, or no exclude_host"
    ),
    errno.EMFILE: "this process has too many open files; close machines, or raise ulimit -n",
    errno.ENFILE: "the host has too many open files",
    errno.EINVAL: "this kernel or processor does not take the configuration, or not in this group",
    errno.EBUSY: "another user, such as perf(1) or a watchdog, holds the counters exclusively",
    errno.ENOSPC: "all of the processor's counters are in use",
    errno.ESRCH: "there is no such thread any more",
    errno.E2BIG: "the kernel is older than this configuration",
    errno.EINTR: "another user holds the counters: ftrace or uprobes",
}


def _no_permission() -> str:
    try:
        with open(PARANOID) as file:
            level = f"is {file.read().strip()}"
    except OSError:
        level = "cannot be read"
    return (
        f"kernel.perf_event_paranoid {level} (or a container's seccomp filter is in the way): "
        "sudo sysctl kernel.perf_event_paranoid=1, or give the process CAP_PERFMON"
    )


def _perf_event_open(attributes: bytes, thread: int, group: int) -> int:
    """The system call: a descriptor, or -errno. Tests put a stand-in here."""
    return lib.kvmaio_perf_open(attributes, thread, group)


# ---- what this host has ------------------------------------------------------------


@attrs.frozen
class CounterSupport:
    """Can the host count a guest's events?

    Attributes:
        available: yes.
        reason: why not, or how; in words.
    """

    available: bool
    reason: str


@cache
def cycle_counting() -> CounterSupport:
    """Can guest cycles be counted, or is thread CPU time taken? Tried once per process."""
    return _try(CounterConfig.guest_cycles(), "cycles are taken from the threads' CPU time")


@cache
def instruction_counting() -> CounterSupport:
    """Can guest instructions be counted? Tried once per process."""
    config = attrs.evolve(CounterConfig.guest_instructions(), disabled=True, pinned=True)
    return _try(config, "how many instructions a guest executes is unknown")


def _try(config: CounterConfig, otherwise: str) -> CounterSupport:
    try:
        with Counter(config).attach() as counter:
            counter.enable()
            if counter.read() is None:
                raise HostError(f"perf_event_open({config.event.name})", errno.EBUSY, _TAKEN)
    except HostError as error:
        _log.info("%s: %s", otherwise, error)
        return CounterSupport(False, f"{otherwise}: {error}")
    return CounterSupport(True, f"counted by the processor ({config.event.name}, guests only)")


@cache
def host_hz() -> int:
    """What this processor counts in a second of CPU time, at present: measured, in 2 ms.

    Raises:
        HostError: it does not count.
    """
    with Counter(CounterConfig(CPU_CYCLES, pinned=True)).attach() as counter:
        counter.enable()
        start_ns = time.thread_time_ns()
        while (passed_ns := time.thread_time_ns() - start_ns) < 2_000_000:
            pass
        counter.disable()
        count = counter.read()
    if not count:
        raise HostError("perf_event_open(cycles)", errno.EBUSY, _TAKEN)
    return count * 1_000_000_000 // passed_ns


_TAKEN = "all of the processor's counters are pinned by others"
