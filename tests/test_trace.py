"""Traces: what real guests and devices leave of themselves, in records and in files."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvmaio import Device, Exited, GuestError, Halted, Machine, Register
from kvmaio.boot import Flat
from kvmaio.bus import Bus, Unmapped
from kvmaio.devices import CountdownTimer, DebugExit
from kvmaio.errors import ConfigurationError
from kvmaio.pytest_plugin import why_not_kvm, why_not_soft
from kvmaio.trace import (
    KINDS,
    AccessRecord,
    AlarmRecord,
    ChromeTrace,
    DrainRecord,
    ExitRecord,
    Filter,
    InterruptRecord,
    LineRecord,
    StallRecord,
)
from tests.assembler import assemble
from tests.engine.support import deadline
from tests.test_cli import KVMAIO, SEABIOS, TIME_LIMIT_S

TIMED_GUEST = (
    *("mov word ptr [4*0x25], offset handler", "mov word ptr [4*0x25+2], 0"),
    *("mov eax, 2000000", "mov dx, 0x40", "out dx, eax"),  # 2 ms
    *("mov eax, 1", "mov dx, 0x44", "out dx, eax", "sti", "hlt"),
    *("handler: cli", "mov al, 'A'", "mov dx, 0x3f8", "out dx, al", "hlt"),
)


class Slow(Device):
    """Its one register is answered later."""

    value = Register(0x0)

    @value.on_read
    async def answer(self) -> int:
        await asyncio.sleep(0.002)
        return 7


class Plain(Device):
    """Its one register reads as 0."""

    value = Register(0x0)


@pytest.mark.kvm
async def test_records_tell_what_happened(boot):
    machine = boot(*TIMED_GUEST)
    machine.attach(CountdownTimer(), pio=0x40, irq=5, name="timer")
    records: list = []
    with machine.trace(records.append):
        async with deadline():
            assert await machine.run() == Halted()
    accesses = [r[1:4] + r[4:9] for r in records if isinstance(r, AccessRecord)]
    assert accesses == [
        ("timer", "cpu0", "interval", "pio", 0x40, 4, True, 2_000_000),
        ("timer", "cpu0", "control", "pio", 0x44, 4, True, 1),
        ("uart165500", "cpu0", "thr", "pio", 0x3F8, 1, True, ord("A")),
    ]
    armed, rang = [r for r in records if isinstance(r, AlarmRecord)]
    assert (armed.source, armed.rang, rang.rang) == ("timer", False, True)
    assert armed.deadline_ns == rang.deadline_ns <= rang.time_ns
    lines = [r[1:] for r in records if isinstance(r, LineRecord)]
    assert sorted(lines) == [("irq5", True), ("timer.irq", True)]
    assert [r[1:] for r in records if isinstance(r, InterruptRecord)] == [("cpu0", 0x25)]
    exits = [r.reason for r in records if isinstance(r, ExitRecord) and r.reason != "KICK"]
    assert exits == ["IO", "IO", "HLT", "IO", "HLT"]
    times = [r.time_ns + getattr(r, "duration_ns", 0) for r in records]
    assert times == sorted(times)


@pytest.mark.kvm
async def test_nothing_is_told_after_the_end(boot):
    machine = boot("out 0x80, al", "hlt")
    machine.attach(Slow(), pio=0x80)
    before = vars(machine.vcpus[0]).keys() | vars(machine.vcpus[0]._entry).keys()
    records: list = []
    trace = machine.trace(records.append)
    trace.close()
    trace.close()
    async with deadline():
        await machine.run()
    assert records == []
    assert before == vars(machine.vcpus[0]).keys() | vars(machine.vcpus[0]._entry).keys()


@pytest.mark.kvm
async def test_a_stalled_vcpu_and_whoever_raised(boot):
    machine = boot("in al, 0x80", "in al, 0x90", "hlt")
    machine.attach(Slow(), pio=0x80, name="slow")
    records: list = []
    machine.trace(records.append, only="access,stall")
    async with deadline():
        with pytest.raises(GuestError, match="0x90"):
            await machine.run()
    stall = next(r for r in records if isinstance(r, StallRecord))
    assert stall.access == "a read from pio 0x80 (1 byte)" and stall.duration_ns >= 1_000_000
    answered, refused = (r for r in records if isinstance(r, AccessRecord))
    assert (answered.source, answered.value) == ("slow", 7)
    assert answered.time_ns <= stall.time_ns and answered.duration_ns >= 1_000_000
    assert (refused.source, refused.value, refused.register) == ("unmapped", None, None)


@pytest.mark.kvm
async def test_sinks_get_what_they_want(boot):
    machine = boot("mov al, 1", "out 0xe9, al", "out 0xf4, al")
    machine.attach(Slow(), pio=0xE9, name="probe")
    taken: dict[str, list] = {"": [], "exit": [], "probe": [], "access,debugexit*": []}
    for only, records in taken.items():
        machine.trace(records.append, only=only)
    async with deadline():
        assert await machine.run() == Exited(3)
    counts = {only: [type(r).__name__ for r in records] for only, records in taken.items()}
    access, exit_ = "AccessRecord", "ExitRecord"
    assert counts == {
        "": [exit_, access, exit_, access],
        "exit": [exit_, exit_],
        "probe": [access],
        "access,debugexit*": [access],
    }


@pytest.mark.kvm
async def test_impossible_traces(machine, tmp_path):
    with pytest.raises(ConfigurationError, match=r"'uatr' is no kind .* uart165500"):
        machine.trace(print, only="exit,uatr")
    with pytest.raises(ConfigurationError, match=r"\.json .*\.vcd"):
        machine.trace(tmp_path / "run.txt")
    with pytest.raises(ConfigurationError, match="async with"):
        Machine().trace(print)


def test_a_filter_without_kinds_wants_all():
    assert Filter("uart*").kinds == set(KINDS.values())
    assert Filter(" exit , uart* ").wants(AccessRecord, "uart0") is False


@pytest.mark.kvm
async def test_devices_driven_without_a_cpu_are_traced_too(machine):
    records: list = []
    machine.trace(records.append, only="access")
    await machine.pio.write(0x3FF, 1, 0x5A)
    assert await machine.pio.read(0x3FF, 1) == 0x5A
    assert [(r.vcpu, r.register, r.is_write, r.value) for r in records] == [
        (None, "scr", True, 0x5A),
        (None, "scr", False, 0x5A),
    ]


@pytest.mark.kvm
async def test_a_drain_shows_and_time_may_be_set_back(boot, tmp_path):
    machine = boot("out 0x80, al", "hlt")
    machine.attach(Plain(), pio=0x80, name="plain")
    records: list = []
    machine.trace(records.append, only="drain,access")
    machine.trace(tmp_path / "run.vcd")
    async with deadline():
        async with machine.drained():
            machine.clock.set(machine.clock.now_ns - 10**9)
        await machine.run()
    steps = [(r.source, r.step) for r in records if isinstance(r, DrainRecord)]
    assert steps == [("machine", "at rest"), ("machine", "goes on")]
    assert records[-1].time_ns < records[0].time_ns


@pytest.mark.kvm
@pytest.mark.skipif(why_not_kvm() is not None, reason="it takes KVM as well")
@pytest.mark.skipif(why_not_soft() is not None, reason="the software CPU is not installed")
async def test_a_trace_goes_on_with_another_cpu_model(boot):
    machine = boot("in al, 0x80", "out 0x80, al", "in al, 0x80", "hlt", cpu="kvm", memory="1M")
    plain = machine.attach(Plain(), pio=0x80, name="plain")
    records: list = []
    machine.trace(records.append, only="access,exit")

    async def stop_in_the_middle():
        await machine.vcpus[0].at_instruction(2)
        machine.stop()

    async with deadline():
        stopping = asyncio.create_task(stop_in_the_middle())
        await asyncio.sleep(0)
        await machine.run()
        await stopping
        await machine.switch_cpu("soft")
        plain.value = 5
        assert await machine.run() == Halted()
    accesses = [r for r in records if isinstance(r, AccessRecord)]
    assert [(r.vcpu, r.is_write, r.value) for r in accesses] == [
        *[("cpu0", False, 0), ("cpu0", True, 0), ("cpu0", False, 5)]
    ]
    assert [r.reason for r in records if isinstance(r, ExitRecord)][-2:] == ["IO", "HLT"]


async def test_a_layer_stands_before_the_device_and_the_observer_before_it():
    calls: list[str] = []

    def layer(name):
        def wrap(mapping, address, size, target):
            def read(offset, size):
                calls.append(name)
                return target.read(offset, size) + 1

            return type(target)(target.offset, read, target.write, target.update)

        return wrap

    bus = Bus("pio", 1 << 16)
    bus.map(Plain(), 0x80)
    first = layer("first")
    bus.observe(layer("observer"))
    bus.add_layer(first)
    bus.add_layer(layer("second"))
    assert await bus.read(0x80, 1) == 3
    assert calls == ["observer", "second", "first"]
    bus.remove_layer(first)
    bus.remove_layer(first)
    bus.observe(None)
    calls.clear()
    assert await bus.read(0x80, 1) == 1
    assert calls == ["second"]


# ---- files ---------------------------------------------------------------------------


def check_trace_events(events) -> None:
    """The schema of "Trace Event Format", as far as the phases used go."""
    assert isinstance(events, list) and events
    required: dict[str, dict[str, Any]] = {
        "X": {"dur": (int, float)},
        "i": {"s": str},
        "C": {"args": dict},
        "M": {"args": dict},
    }
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    for event in events:
        assert isinstance(event["name"], str) and event["pid"] == 1
        assert isinstance(event["ts"], int | float) and event["ts"] >= 0
        for key, kind in required[event["ph"]].items():
            assert isinstance(event[key], kind), event
        assert event.get("dur", 0) >= 0 and isinstance(event.get("args", {}), dict)
        if event["ph"] in "Xi":
            assert event["tid"] in named and isinstance(event["cat"], str)
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
        if event["ph"] == "i":
            assert event["s"] in "gpt"
    for track in named:  # complete events of one track lie within each other or apart
        spans = sorted(
            (round(e["ts"] * 1e3), round((e["ts"] + e["dur"]) * 1e3))
            for e in events
            if e["ph"] == "X" and e["tid"] == track and e["cat"] == "exit"
        )
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


@pytest.mark.kvm
@pytest.mark.skipif(not SEABIOS.exists(), reason="needs SeaBIOS (package seabios)")
def test_seabios_boot_as_trace_events(tmp_path):
    file = tmp_path / "run.json"
    result = subprocess.run(
        [KVMAIO, "run", SEABIOS, "--until", "No bootable device", "--trace", file],
        capture_output=True,
        timeout=TIME_LIMIT_S,
    )
    assert result.returncode == 0, result.stderr
    events = json.loads(file.read_text())
    check_trace_events(events)
    tracks = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    assert {"cpu0", "rtc", "debug402"} <= tracks.keys()
    names = {(e["tid"], e["name"]) for e in events}
    assert {(tracks["cpu0"], "guest"), (tracks["rtc"], "write index")} <= names
    printed = "".join(
        chr(int(e["args"]["value"], 0))
        for e in events
        if e.get("tid") == tracks["debug402"] and e["name"] == "write data"
    )
    assert "No bootable device" in printed


@pytest.mark.kvm
async def test_a_waveform_is_read_back(boot, tmp_path):
    vcdvcd = pytest.importorskip("vcdvcd")
    machine = boot(*TIMED_GUEST)
    machine.attach(CountdownTimer(), pio=0x40, irq=5, name="timer")
    file = tmp_path / "run.vcd"
    machine.trace(file)
    async with deadline():
        assert await machine.run() == Halted()
    await machine.close()
    vcd = vcdvcd.VCDVCD(str(file))

    def values(name):
        return [value for _, value in vcd[name].tv]

    assert vcd.timescale["magnitude"] == 1 and vcd.timescale["unit"] == "ns"
    assert values("timer.interval") == ["0", f"{2_000_000:b}"]
    assert values("timer.irq") == values("irq.irq5") == ["0", "1"]
    assert values("uart165500.lsr")[0] == f"{0x60:b}"
    assert [int(v, 2) for v in values("cpu0.exit") if v != "x"] == [2, 5, 2, 5]
    (written, _), (rose, _) = vcd["timer.interval"].tv[1], vcd["timer.irq"].tv[1]
    assert rose - written >= 2_000_000


@pytest.mark.kvm
def test_a_file_is_of_use_even_if_the_process_was_killed(tmp_path):
    file, guest = tmp_path / "run.json", tmp_path / "guest.bin"
    guest.write_bytes(bytes.fromhex("b041 e6e9 ebfa"))  # mov al,'A'; L: out 0xe9,al; jmp L
    process = subprocess.Popen(
        [KVMAIO, "run", guest, "--trace", file], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + TIME_LIMIT_S
        while not (file.exists() and file.stat().st_size > 100_000) and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    text = file.read_text()
    if not text.endswith("]\n"):  # killed within a write; viewers mend this themselves
        text = text[: text.rindex(",\n")] + "]"
    check_trace_events(json.loads(text))
    assert len(text) > 50_000


@pytest.mark.kvm
async def test_whatever_a_kill_leaves_of_a_write_only_the_last_line_is_damaged(machine, tmp_path):
    """A kill may leave any beginning of a write, over the end of what was there."""
    file = tmp_path / "run.json"
    trace = ChromeTrace(file)
    trace.begin(machine)
    begun_ns = machine.clock.now_ns
    trace(LineRecord(begun_ns, "irq1", True))
    trace.write()
    before = file.read_bytes()
    for late_ns in (2000, 3000):
        trace(LineRecord(begun_ns + late_ns, "irq1", False))
    trace.write()
    after = file.read_bytes()
    trace.close()
    whole, earlier = json.loads(after), json.loads(before)
    check_trace_events(whole)
    first = before.rindex(b"\n]\n")  # which the write begins with
    for written in range(first, len(after)):
        left = (after[:written] + before[written:]).decode()
        try:
            events = json.loads(left)
        except json.JSONDecodeError:  # as docs/traces.md says
            events = json.loads(left[: left.rindex(",\n")] + "]")
        assert events == whole[: len(events)] and len(events) >= len(earlier) - 1


@pytest.mark.kvm
def test_a_trace_to_a_pipe(tmp_path):
    guest = tmp_path / "guest.bin"
    guest.write_bytes(bytes.fromhex("b041 e6e9 f4"))
    fifo = tmp_path / "run.json"
    os.mkfifo(fifo)
    with subprocess.Popen([sys.executable, "-c", COPY, fifo], stdout=subprocess.PIPE) as reader:
        subprocess.run(
            [KVMAIO, "run", guest, "--trace", fifo, "--trace-filter", "access"],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=TIME_LIMIT_S,
        )
        events = json.loads(reader.communicate(timeout=TIME_LIMIT_S)[0])
    check_trace_events(events)
    assert [e["name"] for e in events if e["ph"] == "X"] == ["write data"]


COPY = "import sys; sys.stdout.write(open(sys.argv[1]).read())"


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--trace", "run.txt"], b".vcd"),
        (["--trace", "run.json", "--trace-filter", "uatr"], b"parts: cpu0, uart"),
        (["--trace-filter", "exit"], b"--trace"),
    ],
)
def test_wrong_options_exit_2_with_a_hint(tmp_path, options, hint):
    (tmp_path / "guest.bin").write_bytes(b"\xf4")
    result = subprocess.run(
        [KVMAIO, "run", "guest.bin", *options],
        cwd=tmp_path,
        capture_output=True,
        timeout=TIME_LIMIT_S,
    )
    assert result.returncode == 2 and hint in result.stderr, result.stderr
    assert not Path(tmp_path, "run.txt").exists()


# ---- what a burst tells --------------------------------------------------------------

BOTH = pytest.mark.kvmaio_cpu("kvm", "soft")


@asynccontextmanager
async def traced(
    cpu: str, file: Path, *code: str, mmio: Device | None = None, **ports: Device
) -> AsyncIterator[Any]:
    """A machine whose only trace is that to `file`: fixtures listen, too. Devices by ``p80=``."""
    async with deadline(30), Machine(memory="512K", cpu=cpu) as machine:
        machine.attach(DebugExit(), pio=0xF4)
        if mmio is not None:
            machine.attach(mmio, pio=0x80, mmio=0x90000, name="both")
        for port, device in ports.items():
            machine.attach(device, pio=int(port[1:], 16))
        machine.load(Flat(assemble(code, "real16", 0x1000), 0x1000))
        yield machine, machine.trace(file)


@BOTH
async def test_exits_that_come_slowly_are_written_all_the_same(kvmaio_cpu, tmp_path):
    """One that comes 0.2 s after a write leads to the next one, however few there are."""

    class Slowly(Device):
        size = 1

        async def write(self, offset: int, size: int, value: int) -> None:
            await asyncio.sleep(0.05)

    file = tmp_path / "run.json"
    code = ("again: out 0x80, al", "out 0x81, al", "jmp again")
    async with traced(kvmaio_cpu, file, *code, p80=Slowly(), p81=Plain()) as (machine, _):
        run = asyncio.create_task(machine.run())
        while file.read_text().count('"write value"') < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        machine.stop()
        await run


@BOTH
async def test_notes_of_different_lengths_are_all_there(kvmaio_cpu, tmp_path, monkeypatch):
    """A short one may leave room for its like, and none for the long one behind it."""
    monkeypatch.setattr("kvmaio.kvm.notes.ROOM", 3000)  # for a burst to fill it
    long = type("Long", (Device,), {"d" * 600: Register(0x0)})()
    file = tmp_path / "run.json"
    code = (
        *("mov cx, 2000", "again: out 0x80, al", "out 0x81, al", "out 0x80, al", "loop again"),
        "out 0xf4, al",
    )
    async with traced(kvmaio_cpu, file, *code, p80=Plain(), p81=long) as (machine, trace):
        assert isinstance(await machine.run(), Exited)
        assert len(trace.sink._notes._texts) == 3  # with the debug exit's
        trace.close()
    names = [event["name"] for event in json.loads(file.read_text())]
    assert names.count("write value") == 4000
    assert names.count(f"write {'d' * 600}") == 2000
    exits = names.count("guest")
    assert 6001 <= exits == machine.vcpus[0].stats.numVMExits


@BOTH
@pytest.mark.parametrize("suffix", ["json", "vcd"])
async def test_a_handler_may_end_the_trace(kvmaio_cpu, tmp_path, suffix):
    class Ends(Device):
        value = Register(0x0)
        count = 0

        @value.on_write
        def take(self, value: int) -> None:
            self.count += 1
            if self.count == 50:
                trace.close()

    file, device = tmp_path / f"run.{suffix}", Ends()
    code = ("mov cx, 100", "again: out 0x80, al", "loop again", "out 0xf4, al")
    async with traced(kvmaio_cpu, file, *code, p80=device) as (machine, trace):
        assert isinstance(await machine.run(), Exited)
    assert device.count == 100


@BOTH
async def test_a_guest_that_looks_everywhere_does_not_make_the_trace_grow(
    kvmaio_cpu, tmp_path, monkeypatch
):
    monkeypatch.setattr("kvmaio.vcpu.burst.MOST_KNOWN", 64)
    code = (
        *("mov bl, 2", "all: xor dx, dx", "again: out dx, al", "inc dx", "cmp dx, 0xf0"),
        *("jb again", "dec bl", "jnz all", "out 0xf4, al"),
    )
    async with traced(kvmaio_cpu, tmp_path / "run.json", *code) as (machine, trace):
        machine.pio.unmapped = Unmapped.OPEN_BUS
        assert isinstance(await machine.run(), Exited)
        assert 0 < len(trace.sink._notes._texts) <= 65  # one for each kind that is known


@BOTH
async def test_a_waveform_tells_of_an_exit_before_what_its_handler_does(kvmaio_cpu, tmp_path):
    """Also where the accesses are of a burst, whose exits change their kind."""
    vcdvcd = pytest.importorskip("vcdvcd")

    class Toggles(Device):
        size = 1
        level = False

        def write(self, offset: int, size: int, value: int) -> None:
            self.level = not self.level
            self.irq.set(self.level)

    file = tmp_path / "run.vcd"
    code = (
        *("mov ax, 0x9000", "mov ds, ax", "mov cx, 200"),
        *("again: out 0x80, al", "mov [0], al", "loop again", "out 0xf4, al"),
    )
    async with traced(kvmaio_cpu, file, *code, mmio=Toggles()) as (machine, trace):
        assert isinstance(await machine.run(), Exited)
        trace.close()
    vcd = vcdvcd.VCDVCD(str(file))
    lines = [at for at, _ in vcd["both.irq"].tv[1:]]
    exits = [at for at, kind in vcd["cpu0.exit"].tv if kind in ("10", "110")][: len(lines)]
    assert len(exits) == len(lines) == 400
    assert all(left <= rose for left, rose in zip(exits, lines, strict=True))
