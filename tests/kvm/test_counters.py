"""Performance counters: real ones where this host has them, else a stand-in that says so."""

import errno
import hashlib
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest

from kvmaio import ConfigurationError, HostError
from kvmaio.kvm import counters
from kvmaio.kvm.counters import (
    CONTEXT_SWITCHES,
    CPU_CLOCK,
    CPU_CYCLES,
    INSTRUCTIONS,
    PAGE_FAULTS,
    TASK_CLOCK,
    Counter,
    CounterConfig,
    Event,
    cycle_counting,
    instruction_counting,
)


def why_no_software_events():
    try:
        Counter(CounterConfig(TASK_CLOCK)).attach().close()
    except HostError as error:
        return str(error)
    return None


needs_events = pytest.mark.skipif(
    why_no_software_events() is not None, reason=f"no perf events: {why_no_software_events()}"
)


def id_of(thread: threading.Thread) -> int:
    assert thread.native_id is not None
    return thread.native_id


def work(seconds=0.01):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


# ---- the attribute --------------------------------------------------------------------


def test_attribute_bytes_of_the_cycles():
    config = CounterConfig(
        CPU_CYCLES,
        sample_period=0x1122334455667788,
        wakeup_events=1,
        pinned=True,
        exclude_host=True,
        exclude_hv=True,
    )
    assert config.pack() == bytes.fromhex(
        "00000000 40000000 0000000000000000"  # type, size, config
        "8877665544332211 0000000000000000"  # sample_period, sample_type
        "0000000000000000"  # read_format
        "4500080000000000"  # disabled 0, pinned 2, exclude_hv 6, exclude_host 19
        "01000000 00000000 0000000000000000"  # wakeup_events, bp_type, config1
    )


def test_attribute_bytes_of_a_group_member():
    assert CounterConfig.guest_instructions().pack() == bytes.fromhex(
        "00000000 40000000 0100000000000000"
        "0000000000000000 0000000000000000"
        "0000000000000000"
        "4000080000000000"  # exclude_hv, exclude_host; not disabled: it follows its leader
        "00000000 00000000 0000000000000000"
    )


@pytest.mark.parametrize(
    ("option", "bit"), [("disabled", 0), ("pinned", 2), ("exclude_hv", 6), ("exclude_host", 19)]
)
def test_each_bit(option, bit):
    plain = CounterConfig(TASK_CLOCK, disabled=False).pack()
    with_it = CounterConfig(TASK_CLOCK, **{"disabled": False, option: True}).pack()
    bits = [int.from_bytes(attribute[40:48], "little") for attribute in (plain, with_it)]
    assert bits == [0, 1 << bit]


def test_events_by_type_and_config():
    """include/uapi/linux/perf_event.h"""
    events = [CPU_CYCLES, INSTRUCTIONS, CPU_CLOCK, TASK_CLOCK, PAGE_FAULTS, CONTEXT_SWITCHES]
    numbers = [struct.unpack_from("<I4xQ", CounterConfig(event).pack()) for event in events]
    assert numbers == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]


# ---- counting -------------------------------------------------------------------------


@needs_events
def test_counts_only_while_enabled():
    with Counter(CounterConfig(TASK_CLOCK)).attach() as counter:
        work()
        assert counter.read() == 0
        counter.enable()
        work()
        counter.disable()
        count = counter.read()
        assert count is not None and count > 9_000_000
        work()
        assert counter.read() == count
        counter.reset()
        assert counter.read() == 0


@needs_events
def test_counts_another_thread():
    go, done = threading.Event(), threading.Event()

    def body():
        go.wait()
        work(0.02)
        done.set()

    thread = threading.Thread(target=body)
    thread.start()
    with Counter(CounterConfig(TASK_CLOCK, disabled=False)).attach(id_of(thread)) as counter:
        go.set()
        done.wait()
        count = counter.read()
    thread.join()
    assert count is not None and count >= 19_000_000


@needs_events
def test_a_group_starts_and_stops_as_one():
    with (
        Counter(CounterConfig(TASK_CLOCK)).attach() as leader,
        Counter(CounterConfig(PAGE_FAULTS, disabled=False)).attach(group=leader) as member,
    ):
        # Fresh pages: an allocator could hand out memory that has been touched before.
        with mmap.mmap(-1, 1 << 22) as fresh:
            assert (leader.read(), member.read()) == (0, 0)
            leader.enable()
            fresh.write(b"x" * len(fresh))
            leader.disable()
        faults = member.read()
        assert faults is not None and faults > 0 and leader.read()
        with mmap.mmap(-1, 1 << 22) as uncounted:
            uncounted.write(b"y" * len(uncounted))
        assert member.read() == faults


@needs_events
def test_context_switches():
    with Counter(CounterConfig(CONTEXT_SWITCHES, disabled=False)).attach() as counter:
        before = counter.read()
        for _ in range(10):
            time.sleep(0.001)
        assert before == 0
        count = counter.read()
        assert count is not None and count >= 5  # a sleep that is over at once is none


@needs_events
def test_attaching_twice_is_an_error():
    counter = Counter(CounterConfig(TASK_CLOCK)).attach()
    with counter, pytest.raises(ConfigurationError, match="task-clock is attached already"):
        counter.attach()
    assert not counter.is_attached
    counter.attach()  # after close() it is no longer "twice"
    counter.close()
    counter.close()


@needs_events
def test_what_needs_an_attached_counter():
    loose = Counter(CounterConfig(TASK_CLOCK))
    with pytest.raises(ConfigurationError, match="not attached"):
        loose.read()
    with pytest.raises(ConfigurationError, match="group of task-clock, which is not attached"):
        Counter(CounterConfig(CPU_CLOCK)).attach(group=loose)


@needs_events
def test_close_leaves_no_descriptor():
    before = os.listdir("/proc/self/fd")
    with Counter(CounterConfig(TASK_CLOCK)).attach() as counter:
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1
        assert not os.get_inheritable(counter.fd)
    assert os.listdir("/proc/self/fd") == before


# ---- overflow -------------------------------------------------------------------------


class Overflows:
    """A thread that works, and counts the overflow signals that it gets."""

    def __init__(self, event=TASK_CLOCK, period=2_000_000):
        self.signal = signal.SIGRTMIN + 3
        self.ready, self.stop = threading.Event(), threading.Event()
        self.taken = 0
        self.thread = threading.Thread(target=self._run)
        signal.pthread_sigmask(signal.SIG_BLOCK, {self.signal})  # inherited by the thread
        self.thread.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {self.signal})
        self.ready.wait()
        self.counter = Counter(CounterConfig(event, sample_period=period, wakeup_events=1))
        self.counter.attach(id_of(self.thread))
        self.counter.signals_to(id_of(self.thread), self.signal)

    def _run(self):
        self.ready.set()
        block = bytes(1 << 20)
        while not self.stop.is_set():
            # Work without the GIL. A thread that gives it up for a moment only, and often, takes it
            # back before another one has been woken by that: for minutes, on some hosts.
            hashlib.sha256(block)
            while signal.sigtimedwait({self.signal}, 0) is not None:
                self.taken += 1

    def after(self, seconds):
        time.sleep(seconds)
        return self.taken

    def close(self):
        self.counter.close()
        self.stop.set()
        self.thread.join()


@pytest.fixture
def overflows():
    overflows = Overflows()
    yield overflows
    overflows.close()


@needs_events
def test_overflows_signal_the_thread(overflows):
    """To exactly this thread: a signal that went to another one would end this process."""
    assert overflows.after(0.05) == 0  # still disabled
    overflows.counter.enable()
    assert overflows.after(0.2) >= 5


@needs_events
def test_refresh_1_overflows_once(overflows):
    overflows.counter.refresh(1)
    assert overflows.after(0.2) == 1
    overflows.counter.refresh(1)
    assert overflows.after(0.2) == 2


@needs_events
def test_disabled_it_signals_no_more(overflows):
    overflows.counter.enable()
    assert overflows.after(0.1) > 0
    overflows.counter.disable()
    time.sleep(0.05)
    taken = overflows.taken
    assert overflows.after(0.1) == taken


@needs_events
def test_another_period(overflows):
    overflows.counter.set_period(1_000_000_000_000)
    overflows.counter.refresh(1)
    assert overflows.after(0.1) == 0
    overflows.counter.set_period(1_000_000)  # the one overflow is still to come
    assert overflows.after(0.2) == 1


# ---- refusals -------------------------------------------------------------------------


def test_hardware_cycles_or_the_reason():
    """For real: this machine counts them, or says why not."""
    try:
        counter = Counter(CounterConfig.guest_cycles()).attach()
    except HostError as error:
        refusal = error
    else:
        counter.close()
        pytest.skip("this machine has hardware events")
    assert refusal.hint
    if refusal.errno == errno.ENOENT:
        assert str(refusal).startswith("perf_event_open(cycles): No such file or directory")
        assert "virtual PMU" in refusal.hint


def test_an_event_that_the_kernel_does_not_know():
    with pytest.raises(HostError, match=r"perf_event_open\(nonsense\)") as caught:
        Counter(CounterConfig(Event("nonsense", 1, 0xFFFF))).attach()
    assert caught.value.errno in (errno.ENOENT, errno.EINVAL) and caught.value.hint


@needs_events
def test_too_many_open_files_for_real():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        with pytest.raises(HostError, match=r"EMFILE.*ulimit -n"):
            Counter(CounterConfig(TASK_CLOCK)).attach()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@needs_events
def test_a_thread_that_is_gone_for_real():
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    while os.path.exists(f"/proc/self/task/{thread.native_id}"):
        time.sleep(0.001)  # join() returns a little before the thread is gone
    with pytest.raises(HostError, match=r"ESRCH.*no such thread"):
        Counter(CounterConfig(TASK_CLOCK)).attach(id_of(thread))


@needs_events
def test_a_group_of_another_thread_for_real():
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        leader = Counter(CounterConfig(TASK_CLOCK)).attach()
        with leader, pytest.raises(HostError, match=r"EINVAL.*not in this group"):
            Counter(CounterConfig(CPU_CLOCK)).attach(id_of(thread), group=leader)
    finally:
        done.set()
        thread.join()


AS_NOBODY = """
import os, sys
from kvmaio import HostError
from kvmaio.kvm.counters import Counter, CounterConfig, CPU_CLOCK
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    Counter(CounterConfig(CPU_CLOCK)).attach(1)
except HostError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@needs_events
def test_without_permission_for_real():
    """Another user's process (init) may not be counted, however paranoid the host is."""
    run = subprocess.run(
        [sys.executable, "-c", AS_NOBODY], capture_output=True, text=True, timeout=50, check=True
    )
    assert "perf_event_open(cpu-clock): Permission denied [EACCES]" in run.stdout
    assert "perf_event_paranoid" in run.stdout and "CAP_PERFMON" in run.stdout


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "perf_event_paranoid"),
        (errno.EPERM, "perf_event_paranoid"),
        (errno.ENOENT, "no such event"),
        (errno.ENOSYS, "CONFIG_PERF_EVENTS"),
        (errno.ENODEV, "not supported"),
        (errno.EOPNOTSUPP, "exclude_host"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EINVAL, "configuration"),
        (errno.EBUSY, "exclusively"),
        (errno.ENOSPC, "in use"),
        (errno.E2BIG, "older"),
    ],
)
def test_every_errno_says_what_to_do(monkeypatch, number, advice):
    """A stand-in at the system call: most of these cannot be provoked here."""
    monkeypatch.setattr(counters, "_perf_event_open", lambda *call: -number)
    counter = Counter(CounterConfig(INSTRUCTIONS))
    with pytest.raises(HostError) as caught:
        counter.attach()
    assert caught.value.errno == number
    assert errno.errorcode[number] in str(caught.value) and advice in str(caught.value)
    assert not counter.is_attached


# ---- what there is --------------------------------------------------------------------


@pytest.fixture
def ask_again():
    cycle_counting.cache_clear()
    instruction_counting.cache_clear()
    yield
    cycle_counting.cache_clear()
    instruction_counting.cache_clear()


@pytest.mark.usefixtures("ask_again")
def test_the_host_is_asked_once_and_the_fallback_reported_once(monkeypatch, caplog):
    """A stand-in at the system call: a host without a PMU."""
    calls = []

    def refuse(attributes, thread, group):
        calls.append(attributes)
        return -errno.ENOENT

    monkeypatch.setattr(counters, "_perf_event_open", refuse)
    caplog.set_level("INFO")
    answers = [cycle_counting() for _ in range(3)] + [instruction_counting() for _ in range(3)]
    assert len(calls) == len(caplog.records) == 2
    assert [answer.available for answer in answers] == [False] * 6
    assert answers[0].reason.startswith("cycles are taken from the threads' CPU time: perf_event_")
    assert answers[3].reason.startswith("how many instructions a guest executes is unknown: perf")


@needs_events
@pytest.mark.usefixtures("ask_again")
def test_a_host_that_counts(monkeypatch):
    """A stand-in at the system call: a software event in the place of the PMU's."""
    real = counters._perf_event_open
    task_clock = CounterConfig(TASK_CLOCK).pack()
    monkeypatch.setattr(counters, "_perf_event_open", lambda _, *rest: real(task_clock, *rest))
    assert cycle_counting().available and instruction_counting().available
    assert instruction_counting().reason == ("counted by the processor (instructions, guests only)")


@pytest.mark.usefixtures("ask_again")
def test_a_pinned_counter_without_a_place_is_unknown(monkeypatch):
    """A stand-in: such a counter reads as the end of the file (perf_event_open(2), "pinned")."""
    monkeypatch.setattr(
        counters, "_perf_event_open", lambda *call: os.open("/dev/null", os.O_RDONLY)
    )
    with Counter(CounterConfig.guest_cycles()).attach() as counter:
        assert counter.read() is None
