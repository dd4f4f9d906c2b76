"""Run timers: what ends a run after a given time, and which of them this host uses.

Three bound a run. The POSIX timer and a counter's overflow signal the vCPU's own
thread (`_run_timer.c` arms them there, just before KVM_RUN); the loop's next
deadline bounds what a resident vCPU executes on the loop's thread.
"""

from __future__ import annotations

import errno
import threading
from functools import cache
from typing import TYPE_CHECKING, Protocol

import attrs

from ..errors import HostError
from ._native import ffi, lib
from .counters import CPU_CYCLES, TASK_CLOCK, Counter, CounterConfig, Event, cycle_counting
from .gate import check

if TYPE_CHECKING:
    from ._native import CData

__all__ = ["CounterTimer", "PosixTimer", "RunTimer", "TimerChoice", "chosen_timer", "use_counter"]

ROUNDS = 31
"""Of measuring a resolution: below 2 ms in all."""

NOMINAL_KHZ = {CPU_CYCLES: 2_000_000, TASK_CLOCK: 1_000_000}
"""Events per millisecond. A processor that is faster than 2 GHz has the rest armed anew."""

NEVER = 1 << 62
"""A period before the first arming; without one an event has no overflows."""


class RunTimer(Protocol):
    """One-shot; made, armed and heard on one thread, which has the kick signal blocked."""

    @property
    def resolution_ns(self) -> int:
        """The shortest time that it can keep: measured here, once per process and kind."""

    def arm(self, limit_ns: int) -> None:
        """Signal once, not before `limit_ns` (above 0) from now. Armed again: only the new one."""

    def disarm(self) -> None:
        """No signal is sent afterwards. One that was sent already may be pending."""

    @property
    def expired(self) -> bool:
        """Has the time passed?"""

    def close(self) -> None:
        """Give it back."""


class _NativeTimer:
    """What both kinds share: the object of `_run_timer.h`."""

    def __init__(self) -> None:
        self._timer = ffi.new("kvmaio_run_timer *")
        self._timer.counter_fd = -1

    def arm(self, limit_ns: int) -> None:
        self.disarm()
        check(lib.kvmaio_run_timer_arm(self._timer, limit_ns), self._operation)

    def disarm(self) -> None:
        lib.kvmaio_run_timer_disarm(self._timer)

    @property
    def expired(self) -> bool:
        return bool(lib.kvmaio_run_timer_expired(self._timer))

    def close(self) -> None:
        lib.kvmaio_run_timer_close(self._timer)

    def measure(self) -> int:
        """The resolution in nanoseconds; takes up to 2 ms."""
        result = lib.kvmaio_run_timer_resolution(self._timer, ROUNDS)
        return check(result, self._operation)

    @property
    def _operation(self) -> str:
        return "timer_create"


class PosixTimer(_NativeTimer):
    """CLOCK_MONOTONIC with SIGEV_THREAD_ID (timer_create(2)): also while the guest halts."""

    @property
    def resolution_ns(self) -> int:
        return _posix_resolution()


class CounterTimer(_NativeTimer):
    """A counter's overflow: period and refresh(1). It stands still while the thread waits."""

    def __init__(self, event: Event) -> None:
        super().__init__()
        self._event = event
        self.counter = open_counter(event, threading.get_native_id())
        self._timer.counter_fd = self.counter.fd
        self._timer.counter_khz = NOMINAL_KHZ[event]

    @property
    def resolution_ns(self) -> int:
        return _counter_resolution(self._event)

    def close(self) -> None:
        super().close()
        self.counter.close()

    @property
    def _operation(self) -> str:
        return f"PERF_EVENT_IOC_REFRESH({self._event.name})"


def open_counter(event: Event, thread: int) -> Counter:
    """A counter whose overflow kicks `thread`; the caller closes it.

    Raises:
        HostError: the host does not count this.
    """
    hardware = event.is_hardware
    config = CounterConfig(
        event,
        sample_period=NEVER,
        wakeup_events=1,
        pinned=True,
        exclude_host=hardware,
        exclude_hv=hardware,
    )
    counter = Counter(config).attach(thread)
    try:
        counter.signals_to(thread, check(lib.kvmaio_init(), "sigaction"))
    except BaseException:
        counter.close()
        raise
    return counter


def use_counter(vcpu: CData, event: Event) -> Counter:
    """Have a counter time the runs on the thread of `vcpu` (a started kvmaio_vcpu, not running).

    The caller closes the counter, when the thread has ended.

    Raises:
        HostError: the host does not count this.
    """
    counter = open_counter(event, vcpu.tid)
    vcpu.timer.counter_khz = NOMINAL_KHZ[event]
    vcpu.timer.counter_fd = counter.fd
    return counter


@cache
def _posix_resolution() -> int:
    check(lib.kvmaio_init(), "sigaction")
    timer = PosixTimer()
    try:
        return timer.measure()
    finally:
        timer.close()


@cache
def _counter_resolution(event: Event) -> int:
    timer = CounterTimer(event)
    try:
        return timer.measure()
    finally:
        timer.close()


@attrs.frozen
class TimerChoice:
    """The run timer of this host's vCPUs.

    Attributes:
        name: in words.
        event: what overflows; None for the POSIX timer.
        resolution_ns: measured.
        reason: why this one, in words.
    """

    name: str
    event: Event | None
    resolution_ns: int
    reason: str


@cache
def chosen_timer() -> TimerChoice:
    """Which one, measured and chosen once per process, in some 2 ms.

    The POSIX timer wherever it can be had, also where cycles can be counted: it is
    the only one that ends a run whose guest halts within KVM, and no less precise. It
    is refused where the user's queue of signals is full (RLIMIT_SIGPENDING).

    Raises:
        HostError: none can be had.
    """
    try:
        resolution_ns = _posix_resolution()
    except HostError as error:
        if error.errno not in (errno.EAGAIN, errno.ENOMEM, errno.ENOSYS):
            raise
        return _counter_choice(error)
    cycles = cycle_counting()
    others = "cycle overflow would do as well" if cycles.available else "cycles cannot be counted"
    return TimerChoice(
        "POSIX timer",
        None,
        resolution_ns,
        f"it ends a run whose guest halts within KVM, too, and is no less precise; {others}",
    )


def _counter_choice(refusal: HostError) -> TimerChoice:
    event = CPU_CYCLES if cycle_counting().available else TASK_CLOCK
    resolution_ns = _counter_resolution(event)
    return TimerChoice(f"{event.name} overflow", event, resolution_ns, f"no POSIX timer: {refusal}")
