"""Accesses of the software CPU back to back (`soft/burst.py`): all is as it is without."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmaio import Device, Exited, Machine, Stopped, current_vcpu
from kvmaio.boot import Flat
from kvmaio.devices import DebugExit
from kvmaio.soft import cpu as soft_cpu
from kvmaio.soft._soft import ffi
from kvmaio.soft.burst import SoftBurst
from kvmaio.soft.cpu import SoftCpu
from kvmaio.vcpu import VCpu
from kvmaio.watchpoints import WatchHit, WatchKind, Watchpoint
from tests.engine.support import deadline
from tests.entries import entered_by, struck

pytestmark = pytest.mark.soft

PORT, EXIT, AT = 0x10, 0xF4, 0xA000
OUT, IN = bytes((0xE6, PORT)), bytes((0xE4, PORT))  # out 0x10, al; in al, 0x10
STORE, LOAD = b"\xa2\x00\xa0", b"\xa0\x00\xa0"  # mov [0xa000], al; mov al, [0xa000]
BOTH = b"\xfe\x06\x00\xa0"  # inc byte [0xa000]: two accesses
UNALIGNED = b"\xa3\x01\xa0"  # mov [0xa001], ax
STRING = b"\xb9\x03\x00\xba\x10\x00\xf3\x6e"  # mov cx, 3; mov dx, 0x10; rep outsb
PLAIN = b"\xa2\x00\x30"  # mov [0x3000], al
COUNT = b"\xfe\xc0"  # inc al
END = bytes((0xE6, EXIT))
WRITES = (OUT + COUNT) * 12 + END


class Diary(Device):
    """Writes down its accesses, and the statistics within them; `acts[n]()` is done within the
    n-th."""

    size = 8

    def __init__(self, acts: Sequence[Callable[[], Any]] = ()) -> None:
        self.acts = acts
        self.entries: list[tuple[object, ...]] = []
        self.stats: list[tuple[int | None, int, int, int, int]] = []

    def read(self, offset: int, size: int) -> Any:
        self.entries.append(("read", offset, size))
        pending = self._act()
        return len(self.entries) if pending is None else self._later(pending)

    def write(self, offset: int, size: int, value: int) -> Any:
        self.entries.append(("write", offset, size, value))
        return self._act()

    def _act(self) -> Any:
        stats = current_vcpu().stats
        self.stats.append(
            (stats.numInsts, stats.numCycles, stats.numVMExits, stats.numIO, stats.numMMIO)
        )
        number = len(self.entries) - 1
        return self.acts[number]() if number < len(self.acts) else None

    async def _later(self, pending: Any) -> int:
        await pending
        return len(self.entries)

    @property
    def written(self) -> list[object]:
        return [entry[3] for entry in self.entries if entry[0] == "write"]


def without_bursts(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(SoftCpu, "burst", lambda cpu: None)


async def ran(
    code: bytes,
    device: Diary,
    *,
    prepare: Callable[[Machine, VCpu], object] = lambda machine, vcpu: None,
    **settings: Any,
) -> tuple[Any, ...]:
    """Run `code`: the outcome, registers, statistics from the first access on."""
    async with deadline(), Machine(cpu="soft", memory="32K", **settings) as machine:
        (vcpu,) = machine.vcpus
        machine.attach(device, pio=PORT, mmio=AT)
        machine.attach(DebugExit(), pio=EXIT)
        machine.load(Flat(code, 0x1000))
        prepare(machine, vcpu)
        outcome = await machine.run()
        context = vcpu.context
        first = device.stats[0][1] if device.stats else vcpu.stats.numCycles
        since = [(n, c - first, *rest) for n, c, *rest in device.stats]  # idle time is the host's
        end = (vcpu.stats.numInsts, vcpu.stats.numCycles - first, vcpu.stats.numVMExits)
        return outcome, context.rip, context.rax, context.rbx, device.entries, since, end


# ---- the same with and without -------------------------------------------------------------------


async def sleeps() -> None:
    await asyncio.sleep(0)


async def returns_at_once() -> None:
    pass


def kicks() -> None:
    current_vcpu().kick()


def looks() -> None:
    assert current_vcpu().context.rip >= 0x1000


def edits() -> None:
    current_vcpu().context.rbx += 0x1234


def nothing() -> None:
    pass


ACCESS = st.sampled_from([OUT, IN, STORE, LOAD, BOTH, UNALIGNED, STRING, PLAIN, COUNT])
ACT = st.sampled_from([nothing, nothing, returns_at_once, sleeps, kicks, looks, edits])


@given(st.lists(ACCESS, min_size=1, max_size=40), st.lists(ACT, max_size=40))
@settings(max_examples=60)
def test_devices_statistics_and_guest_see_the_same(program, acts):
    code = b"".join(program) + END
    bursts = asyncio.run(ran(code, Diary(acts)))
    with pytest.MonkeyPatch.context() as patched:
        without_bursts(patched)
        assert asyncio.run(ran(code, Diary(acts))) == bursts


def test_bursts_are_what_answers_plain_accesses(monkeypatch):
    keys = []

    def noted(handle, enter):
        other = enter(handle)
        keys.append(ffi.cast("kvmaio_soft *", handle).access)
        return other

    entered_by(monkeypatch, SoftBurst, noted)
    monkeypatch.setattr(soft_cpu, "TURN_NS", 1 << 62)  # the first instructions take their time
    asyncio.run(ran((OUT + LOAD) * 3 + END, Diary()))
    out, load = PORT << 6 | 1 << 2 | 3, AT << 6 | 1 << 2
    # The first one comes by an entry of its own; the last one ends the run.
    assert keys == [load, out, load, out, load, EXIT << 6 | 1 << 2 | 3]


@pytest.mark.parametrize("clock_hz", [250_000_000, 1_000_000_000, 3_000_000_000])
async def test_counts_and_time_are_exact_within_handlers(clock_hz):
    device = Diary()
    await ran(WRITES, device, clock_hz=clock_hz)
    first = device.stats[0]
    for n, (instructions, cycles, exits, ports, mmio) in enumerate(device.stats):
        assert instructions == 2 * n
        # A half of two instructions' time is lost in rounding at most.
        assert abs(cycles - first[1] - 2 * n) <= 4 * n + 12
        assert (exits, ports, mmio) == (n + 1, n + 1, 0)


async def test_counting_can_be_switched_within_a_burst():
    def switches(on: bool) -> Callable[[], None]:
        return lambda: setattr(current_vcpu().model, "counting", on)

    device = Diary([nothing] * 3 + [switches(False)] + [nothing] * 3 + [switches(True)])
    outcome, *_, end = await ran(WRITES, device, clock_hz=2_000_000_000)
    assert outcome == Exited(25) and end[0] is None
    assert [entry[0] for entry in device.stats] == [0, 2, 4, 6, *[None] * 8]
    assert device.written == list(range(12))


def told(file: Path, code: bytes, device: Diary) -> list[dict[str, Any]]:
    """Trace a run to a file; what it tells, but for the times."""
    traces: list[Any] = []
    asyncio.run(ran(code, device, prepare=lambda machine, vcpu: traces.append(machine.trace(file))))
    traces[0].close()
    events: list[dict[str, Any]] = json.loads(file.read_text())
    ends = [event["ts"] + event["dur"] for event in events if event.get("name") == "guest"]
    assert ends == sorted(ends)
    for event in events:
        assert event.pop("ts") >= 0 <= event.pop("dur", 0)
    return events


@given(st.lists(ACCESS, min_size=1, max_size=40), st.lists(ACT, max_size=40))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_trace_tells_the_same(tmp_path, program, acts):
    code = b"".join(program) + END
    bursts = told(tmp_path / "run.json", code, Diary(acts))
    with pytest.MonkeyPatch.context() as patched:
        without_bursts(patched)
        assert told(tmp_path / "run.json", code, Diary(acts)) == bursts


# ---- what ends a burst ---------------------------------------------------------------------------


async def test_a_count_armed_by_a_handler_is_kept():
    seen: list[object] = []

    async def waits(vcpu: VCpu) -> None:
        await vcpu.at_instruction(9)
        seen.append((vcpu.stats.numInsts, vcpu.context.rip, len(device.entries)))

    tasks = []

    def arms() -> None:
        tasks.append(asyncio.create_task(waits(current_vcpu())))

    async def arms_and_lets_it_begin() -> None:
        arms()
        await asyncio.sleep(0)

    device = Diary([nothing] * 2 + [arms_and_lets_it_begin])
    outcome, *_ = await ran(WRITES, device)
    assert outcome == Exited(25)
    assert seen == [(9, 0x1000 + 4 * 4 + 2, 5)]


async def test_a_breakpoint_and_a_watchpoint_set_by_a_handler_stop_the_guest():
    stops: list[object] = []

    def sets() -> None:
        model = current_vcpu().model
        assert isinstance(model, SoftCpu)
        model.set_breakpoints([0x1000 + 4 * 4])
        model.set_watchpoints([Watchpoint(0x3000, 1, WatchKind.WRITE)])

    def stopped(vcpu: VCpu) -> None:
        model = vcpu.model
        assert isinstance(model, SoftCpu)
        stops.append((vcpu.context.rip, model.watch_hits, vcpu.stats.numInsts))

    device = Diary([nothing] * 2 + [sets])
    code = (OUT + COUNT) * 6 + PLAIN + (OUT + COUNT) * 6 + END
    outcome, *_ = await ran(code, device, prepare=lambda machine, vcpu: vcpu.on_debug(stopped))
    assert outcome == Exited(25)
    assert stops == [(0x1010, (), 8), (0x101B, (WatchHit(0x3000, WatchKind.WRITE),), 13)]
    assert device.written == list(range(12))


async def test_an_interrupt_from_a_handler_is_delivered_before_the_next_instruction():
    def prepare(machine: Machine, vcpu: VCpu) -> None:
        machine.memory.write(0x2000, b"\x88\xc4\xcf")  # mov ah, al; iret
        machine.memory.write(0x20 * 4, (0x2000).to_bytes(4, "little"))
        device.acts = [nothing] * 5 + [machine.irq(0).pulse]

    device = Diary()
    _, _, rax, *_ = await ran(b"\xfb" + WRITES, device, prepare=prepare)
    assert rax & 0xFFFF == 0x050C
    assert device.written == list(range(12))


FOREVER = OUT + COUNT + b"\xeb\xfa"  # again: out 0x10, al; inc al; jmp again


async def test_others_on_the_loop_have_their_turns(monkeypatch):
    monkeypatch.setattr(soft_cpu, "TURN_NS", 100_000)
    device = Diary()
    async with deadline(), Machine(cpu="soft", memory="32K") as machine:
        machine.attach(device, pio=PORT)
        machine.load(Flat(FOREVER, 0x1000))
        run = asyncio.create_task(machine.run())
        for _ in range(50):
            await asyncio.sleep(0)
            assert device.written == [n & 0xFF for n in range(len(device.written))]
        machine.stop()
        assert await run == Stopped("stopped")
        assert len(device.written) > 50
        assert machine.vcpus[0].stats.numIO == len(device.written)
        # An access counts when it is completed: a kick has done that to the last one, or nobody.
        done = 3 * (len(device.written) - 1)
        assert machine.vcpus[0].stats.numInsts in (done, done + 1)


async def test_kicks_of_another_thread_lose_and_repeat_nothing():
    device = Diary()
    async with deadline(), Machine(cpu="soft", memory="32K") as machine:
        (vcpu,) = machine.vcpus
        machine.attach(device, pio=PORT)
        machine.load(Flat(FOREVER, 0x1000))
        over = threading.Event()

        def kicker() -> None:
            while not over.wait(0.0001):
                vcpu.kick()

        thread = threading.Thread(target=kicker)
        thread.start()
        run = asyncio.create_task(machine.run())
        try:
            while vcpu.stats.numExitSignal < 20:  # noqa: ASYNC110
                await asyncio.sleep(0)
        finally:
            over.set()
            thread.join()
        machine.stop()
        await run
        assert device.written == [n & 0xFF for n in range(len(device.written))]


async def test_a_long_way_to_the_next_access_goes_on_on_a_thread_of_its_own():
    # out 0x10, al; inc al; mov ecx, 3000000; loop here; three times
    code = (OUT + COUNT + b"\x66\xb9\xc0\xc6\x2d\x00\x67\xe2\xfd") * 3 + END
    device = Diary()
    async with deadline(60), Machine(cpu="soft", memory="32K") as machine:
        machine.attach(device, pio=PORT)
        machine.attach(DebugExit(), pio=EXIT)
        machine.load(Flat(code, 0x1000))
        turns = 0
        run = asyncio.create_task(machine.run())
        while not run.done():
            await asyncio.sleep(0)
            turns += 1
        assert run.result() == Exited(7) and turns > 20
        stats = machine.vcpus[0].stats
        assert stats.numInsts == 3 * 3_000_003
    instructions = [entry[0] for entry in device.stats]
    assert instructions == [n * 3_000_003 for n in range(3)]
    cycles = [entry[1] for entry in device.stats]
    assert [b - a for a, b in itertools.pairwise(cycles)] == [3_000_003] * 2


# ---- exceptions as an entry ends -----------------------------------------------------------------


class Struck(Exception):
    """As a signal's handler may raise."""


@pytest.mark.parametrize("code", [OUT + COUNT, IN + OUT, STORE + COUNT], ids=["out", "in", "mmio"])
@pytest.mark.parametrize("turn_ns", [1, 20_000, 1 << 62])
async def test_an_exception_as_the_guest_comes_out_loses_nothing(monkeypatch, code, turn_ns):
    """The guest writes down 0, 1, 2, ...: none is missing, and none comes twice."""
    monkeypatch.setattr(soft_cpu, "TURN_NS", turn_ns)
    strikes = [False] * 20 + [True] + [False] * 3 + [True] * 2 + [False] * 50 + [True] * 3

    class Numbers(Diary):
        def read(self, offset: int, size: int) -> int:
            return len(self.entries) & 0xFF

        def write(self, offset: int, size: int, value: int) -> Any:
            result = super().write(offset, size, value)
            if len(self.entries) % 60 == 0:
                machine.stop()
            return result

    device = Numbers()
    seen = 0
    async with Machine(cpu="soft", memory="32K") as machine:
        machine.attach(device, pio=PORT, mmio=AT)
        machine.load(Flat(code + bytes((0xEB, 256 - len(code) - 2)), 0x1000))
        with struck(monkeypatch, SoftBurst, strikes, Struck):
            for _ in range(12):
                try:
                    async with deadline():
                        await machine.run()
                except Struck:
                    seen += 1
        stats = machine.vcpus[0].stats
        assert seen >= (3 if turn_ns > 1 else 0) and len(device.written) > 300
        assert device.written == [n & 0xFF for n in range(len(device.written))]
        assert stats.numIO + stats.numMMIO >= len(device.written)
        # The last write is not completed yet, but the IN before it is.
        done = 3 * (len(device.written) - 1) + (code.startswith(IN))
        assert stats.numInsts == done
        # Nor is any time lost or booked twice, idle time of the host apart.
    cycles = [entry[1] for entry in device.stats]
    instructions = [int(entry[0] or 0) for entry in device.stats]
    assert all(b - a >= 0 for a, b in itertools.pairwise(cycles))
    assert instructions == [3 * n + code.startswith(IN) for n in range(len(instructions))]
    assert cycles[-1] - cycles[0] == instructions[-1] - instructions[0]
