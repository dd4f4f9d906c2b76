"""Accesses answered back to back (`vcpu/burst.py`): guest and devices see the same as ever."""

import asyncio
import collections
import contextlib
import json
import sys
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmaio import (
    Device,
    EndRun,
    Exited,
    Machine,
    Register,
    Stopped,
    VCpuState,
    current_vcpu,
    tasks,
)
from kvmaio.boot import Flat
from kvmaio.bus import Target
from kvmaio.devices import DebugExit
from kvmaio.kvm import promotion
from kvmaio.kvm.burst import ResidentBurst
from kvmaio.trace.vcd import VcdTrace
from kvmaio.vcpu import VCpu
from tests.entries import struck
from tests.resident.guests import PATIENCE, cpu_of

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(60 * PATIENCE)]

PORT = 0x10
EXIT = 0xF4
WINDOW = 0xA000  # above the 32 KiB of RAM, and within reach of 16-bit addresses
OUT, IN = bytes((0xE6, PORT)), bytes((0xE4, PORT))  # out 0x10, al; in al, 0x10
STORE, LOAD = b"\xa2\x00\xa0", b"\xa0\x00\xa0"  # mov [0xa000], al; mov al, [0xa000]
COUNT = b"\xfe\xc0"  # inc al
END = bytes((0xE6, EXIT))


def promote(monkeypatch, exits):
    monkeypatch.setattr(promotion, "OFTEN_EXITS", exits)
    monkeypatch.setattr(promotion, "OFTEN_WITHIN_NS", 1 << 62)
    monkeypatch.setattr(promotion, "QUIET_NS", 1 << 62)


@pytest.fixture
def at_once(monkeypatch):
    """The first exit is enough: bursts from the second access on."""
    promote(monkeypatch, 1)


class Diary(Device):
    """Writes down its accesses; `acts[n]()` is done within the n-th, before it is answered."""

    size = 8

    def __init__(self, acts=()):
        self.acts = list(acts)
        self.entries = []

    def read(self, offset, size):
        self.entries.append(("read", offset, size))
        pending = self._act()
        return self._later(pending) if pending is not None else len(self.entries)

    def write(self, offset, size, value):
        self.entries.append(("write", offset, size, value))
        return self._act()

    def _act(self):
        number = len(self.entries) - 1
        act = self.acts[number] if number < len(self.acts) else None
        return act() if act is not None else None

    async def _later(self, pending):
        await pending
        return len(self.entries)


async def ran(code, device, *, mmio=None):
    """Run `code`: the outcome, AL, the statistics, and whether the loop's thread ran it."""
    async with asyncio.timeout(20 * PATIENCE), Machine(memory="32K", cpu="kvm") as machine:
        machine.attach(device, pio=PORT, mmio=mmio)
        machine.attach(DebugExit(), pio=EXIT)
        machine.load(Flat(code, 0x1000))
        vcpu = machine.vcpus[0]
        outcome = await machine.run()
        return outcome, vcpu.context.rax & 0xFF, vcpu.stats.as_dict(), cpu_of(machine).is_resident


# ---- the same with and without ---------------------------------------------------------------

ACCESS = st.sampled_from([OUT, IN, STORE, LOAD, COUNT])


async def sleeps():
    await asyncio.sleep(0)


def kicks():
    current_vcpu().kick()


def looks():
    assert current_vcpu().context.rip >= 0x1000


def edits():
    current_vcpu().context.rbx = 0x1234


def nothing():
    return None


async def returns_at_once():
    pass


ACT = st.sampled_from([nothing, nothing, returns_at_once, sleeps, kicks, looks, edits])


@given(st.lists(ACCESS, min_size=1, max_size=40), st.lists(ACT, max_size=40))
@settings(max_examples=60 // PATIENCE, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_devices_and_guest_see_the_same(monkeypatch, program, acts):
    def outcome(exits):
        device = Diary(acts)
        with monkeypatch.context() as patched:
            promote(patched, exits)
            outcome, al, stats, resident = asyncio.run(
                ran(b"".join(program) + END, device, mmio=WINDOW)
            )
        assert resident is (exits == 1)
        counted = {name: stats[name] for name in ("numIO", "numMMIO", "numHalt")}
        return outcome, al, device.entries, counted

    assert outcome(1) == outcome(1 << 30)


# ---- what a trace tells of them --------------------------------------------------------------


def raises():
    raise ZeroDivisionError


async def raises_later():
    await asyncio.sleep(0)
    raise ZeroDivisionError


def stops():
    raise EndRun(Stopped("enough"))


async def takes_time():
    await asyncio.sleep(0.001)


ACT_OR_END = st.one_of(ACT, st.sampled_from([takes_time, raises, raises_later, stops]))


async def told(folder, kind, code, device, *, others):
    """Trace a run to a file; `others` listen, too, or nobody does. What is in the file then?"""
    file = folder / f"run.{kind}"
    async with asyncio.timeout(20 * PATIENCE), Machine(memory="32K", cpu="kvm") as machine:
        machine.attach(device, pio=PORT, mmio=WINDOW, name="diary")
        machine.attach(DebugExit(), pio=EXIT)
        machine.load(Flat(code, 0x1000))
        with machine.trace(file):
            if others:
                machine.trace(lambda record: None)
            with contextlib.suppress(ZeroDivisionError):
                await machine.run()
            watched = [known[-1] is not None for known in machine.vcpus[0]._known.values()]
    assert not watched or watched.count(not others) == len(watched)
    if kind == "vcd":
        vcdvcd = pytest.importorskip("vcdvcd")
        vcd = vcdvcd.VCDVCD(str(file))
        return {name: [value for _, value in vcd[name].tv] for name in vcd.signals}
    events = json.loads(file.read_text())
    ends = [event["ts"] + event["dur"] for event in events if event.get("name") == "guest"]
    assert ends == sorted(ends)
    for event in events:
        assert event["ts"] >= 0 <= event.pop("dur", 0)
        del event["ts"]
    # A kick is a matter of time, and another thread's.
    return [event for event in events if event["args"].get("exit") != "KICK"]


@pytest.mark.parametrize("kind", ["json", "vcd"])
@given(st.lists(ACCESS, min_size=1, max_size=40), st.lists(ACT_OR_END, max_size=40))
@settings(max_examples=40 // PATIENCE, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_tells_the_same_whether_notes_or_records_are_taken(
    tmp_path, at_once, kind, program, acts
):
    code = b"".join(program) + END

    def file(others):
        return asyncio.run(told(tmp_path, kind, code, Diary(acts), others=others))

    assert file(others=False) == file(others=True)


# ---- what ends a burst -----------------------------------------------------------------------


def counted(device):
    return [entry[3] for entry in device.entries if entry[0] == "write"]


WRITES = (OUT + COUNT) * 12 + END


async def test_a_handler_that_stops_the_machine_gets_no_further_access(at_once):
    device = Diary()

    async def stops_at_five():
        async with Machine(memory="32K", cpu="kvm") as machine:
            device.acts = [None] * 5 + [machine.stop]
            machine.attach(device, pio=PORT)
            machine.attach(DebugExit(), pio=EXIT)
            machine.load(Flat(WRITES, 0x1000))
            assert await machine.run() == Stopped("stopped")
            assert counted(device) == list(range(6))
            assert machine.vcpus[0].stats.numIO == 6
            assert await machine.run() == Exited(25)

    async with asyncio.timeout(20 * PATIENCE):
        await stops_at_five()
    assert counted(device) == list(range(12))


async def test_a_handler_that_suspends_the_vcpu_leaves_it_idle(at_once):
    async with asyncio.timeout(20 * PATIENCE), Machine(memory="32K", cpu="kvm") as machine:
        (vcpu,) = machine.vcpus
        device = machine.attach(Diary([None] * 5 + [vcpu.suspend]), pio=PORT)
        machine.attach(DebugExit(), pio=EXIT)
        machine.load(Flat(WRITES, 0x1000))
        run = asyncio.create_task(machine.run())
        while vcpu.state is not VCpuState.IDLE or len(device.entries) < 6:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        assert counted(device) == list(range(6))
        vcpu.activate()
        assert await run == Exited(25)
    assert counted(device) == list(range(12))


async def test_an_interrupt_from_a_handler_is_delivered_before_the_next_instruction(at_once):
    # sti; 12 times: out 0x10, al; inc al; the handler of vector 0x20 sets ah to al
    handler = b"\x88\xc4\xcf"  # mov ah, al; iret
    code = b"\xfb" + WRITES
    async with asyncio.timeout(20 * PATIENCE), Machine(memory="32K", cpu="kvm") as machine:
        (vcpu,) = machine.vcpus
        device = machine.attach(Diary([None] * 5 + [machine.irq(0).pulse]), pio=PORT)
        machine.attach(DebugExit(), pio=EXIT)
        machine.load(Flat(code, 0x1000))
        machine.memory.write(0x2000, handler)
        machine.memory.write(0x20 * 4, (0x2000).to_bytes(4, "little"))
        assert await machine.run() == Exited(25)
        assert vcpu.context.rax & 0xFFFF == 0x050C
        assert vcpu.stats.numInterrupts == 1
    assert counted(device) == list(range(12))


async def test_edits_of_a_handler_reach_the_guest(at_once):
    def edit():
        current_vcpu().context.rax = 0x40

    device = Diary([None] * 5 + [edit])
    outcome, *_ = await ran(WRITES, device)
    assert outcome == Exited(0x47 << 1 | 1)
    assert counted(device) == [*range(6), *range(0x41, 0x47)]


async def test_a_device_that_goes_from_the_bus_is_not_asked_again(at_once):
    other = Diary()
    async with asyncio.timeout(20 * PATIENCE), Machine(memory="32K", cpu="kvm") as machine:

        def exchange():
            machine.pio.unmap(device)
            machine.attach(other, pio=PORT)

        device = machine.attach(Diary([None] * 5 + [exchange]), pio=PORT)
        machine.attach(DebugExit(), pio=EXIT)
        machine.load(Flat(WRITES, 0x1000))
        assert await machine.run() == Exited(25)
    assert (counted(device), counted(other)) == (list(range(6)), list(range(6, 12)))


async def test_a_layer_that_comes_meanwhile_stands_between(at_once):
    def inverted(mapping, address, size, target):
        def write(offset, size, value):
            return target.write(offset, size, value ^ 0xFF)

        return Target(target.offset, target.read, write, target.update)

    async with asyncio.timeout(20 * PATIENCE), Machine(memory="32K", cpu="kvm") as machine:
        acts = [None] * 5 + [lambda: machine.pio.add_layer(inverted)]
        device = machine.attach(Diary(acts), pio=PORT)
        machine.load(Flat((OUT + COUNT) * 12 + b"\xf4", 0x1000))
        await machine.run()
    assert counted(device) == [*range(6), *(0xFF - n for n in range(6, 12))]


# ---- exceptions as an entry ends ------------------------------------------------------------


class Struck(Exception):
    """As a signal's handler may raise."""


@pytest.mark.parametrize("code", [OUT + COUNT, IN + OUT, STORE + COUNT], ids=["out", "in", "mmio"])
@pytest.mark.parametrize("kind", [Struck, KeyboardInterrupt])
def test_an_exception_as_the_guest_comes_out_loses_no_access(monkeypatch, at_once, code, kind):
    """The guest writes down 0, 1, 2, ...: none is missing, and none comes twice."""
    strikes = [False] * 20 + [True] + [False] * 3 + [True] * 2 + [False] * 50 + [True]

    class Numbers(Device):
        size = 1
        number = -1

        def __init__(self):
            self.written = []

        def read(self, offset, size):
            self.number = self.number + 1 & 0xFF
            return self.number

        def write(self, offset, size, value):
            self.written.append(value)

    async def enter():
        machine = await Machine(memory="32K", cpu="kvm").__aenter__()
        device = machine.attach(Numbers(), pio=PORT, mmio=WINDOW)
        machine.load(Flat(code + bytes((0xEB, 256 - len(code) - 2)), 0x1000))
        return machine, device

    async def run_on():
        count = len(device.written) + 60
        runs.append(asyncio.ensure_future(machine.run()))
        async with asyncio.timeout(20 * PATIENCE):
            while not runs[-1].done() and len(device.written) < count:  # noqa: ASYNC110
                await asyncio.sleep(0)
        await stop()

    async def stop():
        machine.stop()
        async with asyncio.timeout(20 * PATIENCE):
            await runs[-1]

    loop = asyncio.new_event_loop()
    machine, device = loop.run_until_complete(enter())
    seen = 0
    runs: list[asyncio.Future[object]] = []
    with struck(monkeypatch, ResidentBurst, strikes, kind):
        for _ in range(9):
            try:
                loop.run_until_complete(run_on())
            except kind:
                seen += 1
                if kind is KeyboardInterrupt:  # it has stopped the loop, and not the run
                    loop.run_until_complete(stop())
    assert seen >= 3 and len(device.written) > 300
    assert device.written == [n & 0xFF for n in range(len(device.written))]
    loop.run_until_complete(machine.close())
    loop.close()


async def test_what_raises_as_an_answer_is_told_has_it_not_answered_twice(
    at_once, monkeypatch, tmp_path
):
    """As by a signal's handler, or a full disk."""
    told = iter([False] * 40 + [True])

    def sample(*_):
        if next(told, False):
            raise Struck

    async with asyncio.timeout(20 * PATIENCE), Machine(memory="32K", cpu="kvm") as machine:

        class Numbers(Device):
            value = Register(0, int)

            def __init__(self):
                self.written = []

            @value.on_write
            async def take(self, value):
                self.written.append(value)
                if len(self.written) % 100 == 0:
                    machine.stop()

        device = machine.attach(Numbers(), pio=PORT)
        machine.load(Flat(OUT + COUNT + b"\xeb\xfa", 0x1000))
        struck = 0
        with machine.trace(tmp_path / "run.vcd"):
            monkeypatch.setattr(VcdTrace, "_sample", sample)
            for _ in range(6):
                try:
                    await machine.run()
                except Struck:
                    struck += 1
    assert struck == 1
    assert device.written == [n & 0xFF for n in range(len(device.written))]


# ---- handlers --------------------------------------------------------------------------------


async def test_update_follows_each_write_also_behind_a_wait(at_once):
    class Updating(Device):
        value = Register(0, int)

        def __init__(self):
            self.log = []

        @value.on_write
        async def later(self, value):
            if value % 3 == 0:
                await asyncio.sleep(0)
            self.value = value

        def update(self):
            self.log.append(self.value)

    device = Updating()
    outcome, *_ = await ran(WRITES, device)
    assert outcome == Exited(25)
    assert device.log[-12:] == list(range(12))


async def test_between_two_exits_nothing_runs_but_the_handler(at_once):
    """No step of the engine's in Python, and so nothing that it could allocate."""
    calls: collections.Counter[Any] = collections.Counter()

    def count(frame, event, of):
        if event == "call":
            calls[frame.f_code] += 1

    class Counts(Device):
        size = 1
        count = 0

        async def write(self, offset, size, value):
            self.count += 1
            if self.count == 1_000:
                sys.setprofile(count)
            elif self.count == 3_000:
                sys.setprofile(None)
                raise EndRun(Exited(0))

    async with asyncio.timeout(20 * PATIENCE), Machine(memory="32K", cpu="kvm") as machine:
        machine.attach(Counts(), pio=PORT)
        machine.load(Flat(OUT + b"\xeb\xfc", 0x1000))
        await machine.run()
    assert calls.pop(Counts.write.__code__) == 2_000
    # What is left are the turns of the loop, after some 100 exits each.
    assert calls.pop(VCpu._answers.__code__) < 200
    assert max(calls.values()) < 400


async def test_statistics_are_exact_within_a_handler(at_once):
    seen = []

    def look():
        stats = current_vcpu().stats
        seen.append((stats.numIO, stats.numVMExits >= stats.numIO))

    await ran(WRITES, Diary([look] * 12))
    assert seen == [(n, True) for n in range(1, 13)]


@pytest.mark.parametrize("style", ["plain", "async", "suspending"])
async def test_an_error_comes_out_with_its_access_and_the_guest_can_go_on(at_once, style):
    def fails():
        raise ZeroDivisionError("the device's own")

    async def fails_later():
        if style == "suspending":
            await asyncio.sleep(0)
        fails()

    act = fails if style == "plain" else fails_later
    async with asyncio.timeout(20 * PATIENCE), Machine(memory="32K", cpu="kvm") as machine:
        device = machine.attach(Diary([None] * 5 + [act]), pio=PORT)
        machine.attach(DebugExit(), pio=EXIT)
        machine.load(Flat(WRITES, 0x1000))
        with pytest.raises(ZeroDivisionError, match="own") as caught:
            await machine.run()
        assert "a write to pio 0x10 (1 byte)" in caught.value.__notes__[0]
        assert await machine.run() == Exited(25)
    # The access that failed is open, and is served again.
    assert counted(device) == [*range(6), *range(5, 12)]


class Words(Device):
    """Answers with numbers at first."""

    size = 1
    count = 0

    def read(self, offset, size):
        self.count += 1
        return self.count if self.count < 5 else "five"


async def test_a_read_handler_that_gives_no_number_is_told_so(at_once):
    with pytest.raises(TypeError, match="handler gave 'five'"):
        await ran(IN * 12 + END, Words())


class Late(Device):
    """Takes its time, also to be cancelled."""

    size = 1

    def __init__(self):
        self.began, self.ends, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def read(self, offset, size):
        self.began.set()
        while not self.ends.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.ends.wait()
        self.ended.set()
        return 0x42

    async def write(self, offset, size, value):
        await self.read(offset, size)


@pytest.mark.parametrize("cpu", ["kvm", pytest.param("soft", marks=pytest.mark.soft)])
@pytest.mark.parametrize("code", [IN, OUT], ids=["in", "out"])
@pytest.mark.parametrize("traced", [False, True], ids=["plain", "traced"])
async def test_a_handler_that_answers_after_close_answers_nobody(
    monkeypatch, at_once, tmp_path, cpu, code, traced
):
    monkeypatch.setattr(tasks, "SETTLE_LIMIT_S", 0.05)
    async with asyncio.timeout(20 * PATIENCE):
        machine = await Machine(memory="32K", cpu=cpu).__aenter__()
        device = machine.attach(Late(), pio=PORT)
        machine.load(Flat(code * 4 + END, 0x1000))
        if traced:
            machine.trace(tmp_path / "run.json")
        run = asyncio.ensure_future(machine.run())
        await device.began.wait()
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
        await machine.close()
        device.ends.set()
        await device.ended.wait()
        for _ in range(10):
            await asyncio.sleep(0)


async def test_statistics_read_by_another_thread_are_booked_once(at_once):
    over = threading.Event()
    machines: list[Machine] = []

    def look():
        while not over.is_set():
            for machine in machines:
                for _ in range(8):
                    assert machine.vcpus[0].stats.numIO >= 0
            over.wait(0.0005)

    count = 2_000 if PATIENCE > 1 else 50_000
    # mov cx, count; again: out 0x10, al; loop again
    code = b"\xb9" + count.to_bytes(2, "little") + OUT + b"\xe2\xfc" + END
    thread = threading.Thread(target=look)
    async with asyncio.timeout(20 * PATIENCE), Machine(memory="32K", cpu="kvm") as machine:
        machine.attach(Quiet(), pio=PORT)
        machine.attach(DebugExit(), pio=EXIT)
        machine.load(Flat(code, 0x1000))
        machines.append(machine)
        thread.start()
        try:
            assert isinstance(await machine.run(), Exited)
        finally:
            over.set()
            thread.join()
        assert machine.vcpus[0].stats.numIO == count + 1


class Quiet(Device):
    size = 1

    def write(self, offset, size, value):
        pass
