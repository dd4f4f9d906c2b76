"""Checkpoint and restore: nothing is lost, here, elsewhere, and again."""

from __future__ import annotations

import asyncio
import functools
import operator
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from kvmaio import (
    Checkpoint,
    CheckpointError,
    Device,
    Exited,
    Halted,
    Machine,
    Register,
    Stopped,
    UnmappedAccess,
    VCpuState,
    snapshot,
)
from kvmaio.boot import Flat
from kvmaio.checkpoint import SavedCpu, inspect
from kvmaio.cpu import Context, CpuState, DescriptorTable, Segment
from kvmaio.devices import CountdownTimer, DebugExit
from kvmaio.errors import ConfigurationError
from kvmaio.soundness import MachineEngine, VCpuEngine
from tests.assembler import assemble
from tests.engine.support import Diary, deadline, until

# Those that take a machine of the fixtures; the mark `kvm` does not keep these from running
# without it.
pytestmark = pytest.mark.kvmaio_cpu("kvm", "soft")

IDLE, RUNNING = VCpuState.IDLE, VCpuState.RUNNING
PENDING = VCpuState.RUNNING_MMIO_PENDING

# Counts in memory and tells the port every 64 steps.
COUNTING = (
    *("mov bx, 0x5000", "again: inc word ptr [bx]", "mov ax, [bx]"),
    *("test al, 0x3f", "jnz again", "out 0x60, al", "jmp again"),
)


def counted(machine: Machine) -> int:
    return int.from_bytes(machine.memory.read(0x5000, 2), "little")


@pytest.fixture
async def pair(boot):
    """Two machines of one shape."""

    def make() -> tuple[Machine, Machine]:
        return boot(*COUNTING), boot("hlt")

    return make


@pytest.mark.kvm
async def test_goes_on_in_another_machine(pair):
    one, other = pair()
    for machine in (one, other):
        machine.attach(Diary(), pio=0x60)
    async with deadline():
        run = asyncio.create_task(one.run())
        await until(lambda: counted(one) > 100)
        saved = await one.checkpoint()
        at = counted(one)
        await until(lambda: counted(one) > at + 100)  # it goes on, unharmed
        one.stop()
        await run
        await other.restore(saved)
        assert counted(other) == int.from_bytes(saved.memory[0].page(5)[:2], "little")
        assert other.vcpus[0].state is RUNNING
        assert other.vcpus[0].context.rip == saved.cpus[0].state.context.rip
        before = counted(other)
        run = asyncio.create_task(other.run())
        await until(lambda: counted(other) > before + 100)
        other.stop()
        await run


@pytest.mark.kvmaio_cpu("kvm")
async def test_save_restore_save_is_identical(pair):
    """Bit for bit, as no vCPU is entered between: what drifts is handed out as it was."""
    one, other = pair()
    for machine in (one, other):
        machine.attach(Diary(), pio=0x60)
        machine.attach(CountdownTimer(), mmio=0xD0000000, irq=5)
    async with deadline():
        run = asyncio.create_task(one.run())
        await until(lambda: counted(one) > 100)
        await one.mmio.write(0xD0000000, 4, 1_000_000_000)
        await one.mmio.write(0xD0000004, 4, 3)
        first = await one.checkpoint()
        one.stop()
        await run
        await other.restore(first)
        second = await other.checkpoint()
        assert differing(first, second) == {"machine": ["time_ns"], "vm": ["kvm_clock"]}
        assert second.time_ns >= first.time_ns
        assert second.memory == first.memory


def differing(first: Checkpoint, second: Checkpoint) -> dict[str, list[str]]:
    found = {}
    for name in ("shape", "cpus", "devices", "statistics", "engine"):
        if getattr(first, name) != getattr(second, name):
            found[name] = [name]
    if first.time_ns != second.time_ns:
        found["machine"] = ["time_ns"]
    if vm := [key for key, value in first.vm.items() if second.vm.get(key) != value]:
        found["vm"] = vm
    return found


# Sums without an end, in all the vector or x87 registers of the kind.
AVX_SUMS = (
    *("mov rbx, 0x3000", *(f"vbroadcastsd ymm{n}, [rbx + {8 * n}]" for n in range(16))),
    *("again:", *(f"vaddpd ymm{n}, ymm{n}, ymm{15 - n}" for n in range(8))),
    *("inc qword ptr [0x5000]", "jmp again"),
)
X87_SUMS = (
    *("mov rbx, 0x3000", "fninit", *(f"fld qword ptr [rbx + {8 * n}]" for n in range(1, 7))),
    *(f"movsd xmm{n}, [rbx + {8 * n}]" for n in range(8)),
    *("again:", *(f"fadd st(0), st({n})" for n in range(1, 6)), "addpd xmm1, xmm2"),
    *("inc qword ptr [0x5000]", "jmp again"),
)


@pytest.mark.kvm
@pytest.mark.parametrize(
    "sums",
    [
        pytest.param(AVX_SUMS, id="avx", marks=pytest.mark.kvmaio_cpu("kvm")),
        pytest.param(X87_SUMS, id="x87"),
    ],
)
async def test_sections_of_the_files_are_identical(kvmaio_cpu, tmp_path, sums):
    """Save, restore elsewhere, save: all but the clocks, by the checksums in the files.

    The guest computes in registers of the kind that is easily forgotten.
    """
    if sums is AVX_SUMS and kvmaio_cpu == "soft":
        pytest.skip("the software CPU has no AVX")

    def machine() -> Machine:
        machine = Machine(memory="2M", cpu=kvmaio_cpu)
        machine.attach(CountdownTimer(), mmio=0xD0000000, irq=5)
        return machine

    async with deadline(30), machine() as one, machine() as other:
        one.load(Flat(assemble(sums, "user64", 0x1000), 0x1000, "user64"))
        one.memory.write(0x3000, struct.pack("<16d", *(n + 0.5 for n in range(16))))
        run = asyncio.create_task(one.run())
        for number in range(3):
            at = counted(one)
            await until(functools.partial(has_counted_on, one, at))
            (tmp_path / "before").unlink(missing_ok=True)
            first = await one.checkpoint()
            first.save(tmp_path / "before")
            await other.restore(first)
            second = await other.checkpoint()
            second.save(tmp_path / "after")
            before, after = (
                {section.name: section.checksum for section in inspect(tmp_path / name).sections}
                for name in ("before", "after")
            )
            same = {name for name, checksum in before.items() if after[name] == checksum}
            assert same >= {"cpus", "devices", "statistics", "memory"}, number
            assert first.engine == second.engine
            assert differing(first, second).keys() <= {"machine", "vm"}
            assert first.cpus[0].state.xsave is not None
            assert any(first.cpus[0].state.xsave[160:416])  # XMM registers
        one.stop()
        await run


def has_counted_on(machine: Machine, at: int) -> bool:
    return counted(machine) != at


@pytest.mark.kvm
async def test_saving_while_running_is_an_error(pair):
    """capture() of a machine that is not at rest; checkpoint() itself drains."""
    machine, _ = pair()
    machine.attach(Diary(), pio=0x60)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: counted(machine))
        for what in (lambda: snapshot.capture(machine), machine.vcpus[0].save):
            with pytest.raises(ConfigurationError, match="cpu0 must be drained before it is saved"):
                what()
        machine.stop()
        await run
        with pytest.raises(ConfigurationError, match="cpu0 must be drained"):
            snapshot.capture(machine)
        assert (await machine.checkpoint()).memory == (await machine.checkpoint()).memory


@pytest.mark.kvm
@pytest.mark.parametrize("irqchip", [None, "devices", "kernel"])
async def test_restored_into_itself_again_and_again(irqchip, kvmaio_cpu):
    """Reset: memory written by guest, device and view goes back, and so do registers."""
    if (irqchip, kvmaio_cpu) == ("kernel", "soft"):
        pytest.skip("the kernel's interrupt controllers are KVM's")
    lines = ("mov bx, 0x5000", "again: inc word ptr [bx]", "out 0x60, al", "jmp again")
    async with deadline(), Machine(memory="1M", irqchip=irqchip, cpu=kvmaio_cpu) as machine:
        diary = machine.attach(Diary(), pio=0x60)
        machine.load(Flat(assemble(lines, "real16", 0x1000), 0x1000))
        machine.memory.write(0x6000, b"kept")
        saved = await machine.checkpoint()
        view = machine.memory.view(0x7000, 4)
        for _ in range(20):
            run = asyncio.create_task(machine.run())
            await until(diary.reached(len(diary.entries) + 10))
            machine.stop()
            assert await run == Stopped("stopped")
            machine.memory.write(0x6000, b"lost")
            view[:] = b"gone"
            assert counted(machine) > 0
            await machine.restore(saved)
            assert counted(machine) == 0
            assert machine.memory.read(0x6000, 4) == b"kept"
            assert bytes(view) == bytes(4)
            assert machine.vcpus[0].state is IDLE
            assert machine.vcpus[0].context.rip == 0x1000
            assert machine.vcpus[0].stats.numIO == 0
        again = await machine.checkpoint()
        assert again.memory == saved.memory


@pytest.mark.kvm
async def test_restore_while_running(pair):
    """run() stays active and goes on from the checkpoint."""
    machine, _ = pair()
    machine.attach(Diary(), pio=0x60)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: counted(machine) > 64)
        saved = await machine.checkpoint()
        at = int.from_bytes(saved.memory[0].page(5)[:2], "little")
        for _ in range(5):
            await until(lambda: counted(machine) > at + 200)
            await machine.restore(saved)
            assert machine.vcpus[0].state is RUNNING
        machine.stop()
        await run


@pytest.mark.kvm
async def test_outcome_that_is_kept_is_in_the_checkpoint(boot):
    go_on = asyncio.Event()

    class SlowExit(DebugExit):
        async def write(self, offset, size, value):
            await go_on.wait()
            return super().write(offset, size, value)

    machine = boot("mov al, 3", "out 0xf8, al", "hlt")
    machine.attach(SlowExit(), pio=0xF8)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.vcpus[0].state is PENDING)
        checkpoint = asyncio.create_task(machine.checkpoint())
        await asyncio.sleep(0)
        go_on.set()
        saved = await checkpoint
        assert await run == Exited(7)
        await machine.restore(saved)
        assert await machine.run() == Exited(7)
        assert await machine.run() == Halted()


@pytest.mark.kvm
async def test_file_of_a_booted_machine_in_another_process(boot, tmp_path):
    machine = boot(*COUNTING)
    machine.attach(Diary(), pio=0x60)
    async with deadline(30):
        run = asyncio.create_task(machine.run())
        await until(lambda: counted(machine) > 100)
        (await machine.checkpoint()).save(tmp_path / "c.kvmaio")
        machine.stop()
        await run
        program = RESTORER.format(
            path=str(tmp_path / "c.kvmaio"),
            devices={name: type(device).__name__ for name, device in machine.devices.items()},
            size=machine.memory.size,
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdout=subprocess.PIPE
        )
        out, _ = await process.communicate()
    assert out == b"went on\n"


RESTORER = """
import asyncio
from kvmaio import Checkpoint, Machine
import kvmaio.devices
from tests.engine.support import Diary

async def main():
    saved = Checkpoint.load({path!r})
    async with Machine(memory={size}) as machine:
        for name, shape in saved.shape.devices.items():
            name_of_class = shape.class_name
            kind = Diary if name_of_class == "Diary" else getattr(kvmaio.devices, name_of_class)
            machine.attach(kind(), pio=shape.pio[0], name=name)
        await machine.restore(saved)
        at = machine.memory.read(0x5000, 2)
        run = asyncio.create_task(machine.run())
        while machine.memory.read(0x5000, 2) == at:
            await asyncio.sleep(0)
        machine.stop()
        await run
        print("went on")

asyncio.run(asyncio.wait_for(main(), 20))
"""


# ---- devices ----------------------------------------------------------------------------


class Ticker(Device):
    """Counts its alarm's deadlines in a register; its own state is in `save()`."""

    ticks = Register(0, int, bits=32)

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.starts = 0

    async def run(self) -> None:
        self.starts += 1
        async for deadline_ns in self.alarm:
            self.ticks += 1
            self.seen.append(deadline_ns)
            self.alarm.arm(deadline_ns + 1_000_000)

    def save(self):
        return {"seen": self.seen}

    def load(self, state):
        self.seen = list(state["seen"])


@pytest.mark.kvm
async def test_device_goes_on_with_its_alarm(boot):
    machine = boot("spin: jmp spin")
    ticker = machine.attach(Ticker(), mmio=0xD0000000)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.vcpus[0].inside)
        ticker.alarm.arm(machine.clock.now_ns + 1_000_000)
        await until(lambda: ticker.ticks == 3)
        saved = await machine.checkpoint()
        at = saved.devices[ticker.name].registers["ticks"]
        await until(lambda: ticker.ticks > at + 5)
        await machine.restore(saved)
        assert len(ticker.seen) == ticker.ticks == at
        await until(lambda: ticker.ticks >= at + 3)
        # By guest time, none is missing and none is twice.
        assert [b - a for a, b in zip(ticker.seen, ticker.seen[1:], strict=False)] == [
            1_000_000
        ] * (len(ticker.seen) - 1)
        assert ticker.starts == 2
        machine.stop()
        await run


@pytest.mark.kvm
async def test_guest_time_goes_back_to_the_checkpoints(boot):
    machine = boot("hlt")
    async with deadline():
        saved = await machine.checkpoint()
        await asyncio.sleep(0.05)
        began_ns = time.monotonic_ns()
        await machine.restore(saved)
        since_ns = machine.clock.now_ns - saved.time_ns
        assert 0 <= since_ns <= time.monotonic_ns() - began_ns


# ---- refusals ------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_other_shapes_are_refused_and_change_nothing():
    async with deadline(), Machine(memory="1M") as machine:
        machine.load(Flat(b"\xf4", 0x1000))
        saved = await machine.checkpoint()
        async with Machine(memory="2M") as larger:
            with pytest.raises(
                CheckpointError, match=r"RAM 0x0\.\.0x1fffff, the checkpoint has not"
            ):
                await larger.restore(saved)
        async with Machine(memory="1M", irqchip="kernel") as other:
            with pytest.raises(ConfigurationError, match="irqchip=None, the machine has 'kernel'"):
                await other.restore(saved)
        async with Machine(memory="1M", vcpus=2, irqchip="kernel") as two:
            for_two = await two.checkpoint()
        async with Machine(memory="1M", irqchip="kernel") as one:
            with pytest.raises(CheckpointError, match="the checkpoint has 2 vCPUs"):
                await one.restore(for_two)
            assert one.vcpus[0].state is IDLE


@pytest.mark.kvm
async def test_state_that_a_device_cannot_take_names_it():
    class Fussy(Device):
        size = 1

        def load(self, state):
            self.value = state["value"]

    async with deadline(), Machine(memory="1M") as machine:
        diary = machine.attach(Kept(), pio=0x20)
        machine.attach(Fussy(), pio=0x10)
        saved = await machine.checkpoint()
        diary.state = 1
        machine.memory.write(0x5000, b"new")
        with pytest.raises(CheckpointError, match="fussy0 cannot take its state back: KeyError"):
            await machine.restore(saved)
        assert (diary.state, machine.memory.read(0x5000, 3)) == (1, b"new")  # as it was


class Kept(Device):
    """A register that is kept, and an activity; both can be looked at."""

    size = 1
    state = 0
    active = 0

    async def run(self):
        self.active += 1
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.005)
            self.active -= 1

    def save(self):
        return {"state": self.state}

    def load(self, state):
        self.state = state["state"]


@pytest.mark.kvm
async def test_other_cpuid_is_refused_and_changes_nothing():
    async with deadline(), Machine(memory="1M", cpuid="host") as one:
        one.load(Flat(b"\xf4", 0x1000))
        saved = await one.checkpoint()
    async with deadline(), Machine(memory="1M", cpuid="emulator-safe") as other:
        other.load(Flat(b"\xf4", 0x1000))
        await other.run()
        other.memory.write(0x5000, b"new")
        with pytest.raises(CheckpointError, match="CPUID differs"):
            await other.restore(saved)
        assert other.memory.read(0x5000, 3) == b"new"


@pytest.mark.kvm
async def test_checkpoint_that_no_machine_made_is_refused():
    async with deadline(), Machine(memory="1M") as machine:
        machine.attach(Diary(), pio=0x60)
        saved = await machine.checkpoint()
        parts = {
            name: getattr(saved, name)
            for name in ("shape", "vm", "time_ns", "statistics", "created_by")
        }
        (cpu,), devices = saved.cpus, saved.devices
        odd_vector = attrs.evolve(cpu, engine=cpu.engine | {"vectors": [300]})
        odd_alarm = {"diary0": attrs.evolve(devices["diary0"], alarm={"at": 1})}
        for engine, kind in ((cpu.engine, VCpuEngine), (saved.engine, MachineEngine)):
            assert engine.keys() == {field.name for field in attrs.fields(kind)}
        machine.memory.write(0x5000, b"new")
        for engine, the_cpu, the_devices, complaint in (
            ({}, cpu, devices, "machine: not as a machine saves it: fault_frame, lines,"),
            (saved.engine, SavedCpu(cpu.state), devices, "cpu 0: not as a machine saves it:"),
            (saved.engine | {"outcome": {"kind": "Other"}}, cpu, devices, "the outcome that is"),
            (saved.engine, odd_vector, devices, "cpu 0: interrupt vector 300"),
            (saved.engine, cpu, odd_alarm, "diary0: its alarm: .* is no alarm's state"),
        ):
            odd = Checkpoint(
                memory=saved.memory, cpus=[the_cpu], devices=the_devices, engine=engine, **parts
            )
            with pytest.raises(CheckpointError, match=complaint):
                await machine.restore(odd)
        assert machine.memory.read(0x5000, 3) == b"new"


def with_xsave(state: CpuState, at: int, byte: int) -> bytes:
    assert state.xsave is not None
    area = bytearray(state.xsave)
    area[at] = byte
    return bytes(area)


# What is wrong -> what it makes of a checkpoint's parts, and how it is named.
ODD_ENGINES = {
    "machine: unmapped": {"pio_unmapped": "nonsense"},
    "machine: Expected `str`": {"mmio_unmapped": 7},
    "machine: 'x' is no interrupt line's number": {"lines": {"x": True}},
    "machine: '-1' is no interrupt line's number": {"lines": {"-1": True}},
    "machine: interrupt line 999": {"lines": {"999": True}},
    "machine: Expected `object`": {"lines": []},
    "machine: Expected `int | null`": {"fault_frame": "x"},
    "machine: the fault frame at 0xffffff": {"fault_frame": 0xFFFFFF},
    "the outcome that is kept: Expected": {"outcome": {"kind": "Exited", "code": "x"}},
    "the outcome that is kept: .* is none": {"outcome": {"code": 1}},
}
ODD_TIMES = {"machine: the time in nanoseconds: ": (-1, 1 << 63, 1 << 70)}
ODD_STATES: dict[str, Callable[[CpuState], dict[str, Any]]] = {
    "MP state 99": lambda state: {"mp_state": 99},
    "MP state -1": lambda state: {"mp_state": -1},
    "events of 0 bytes": lambda state: {"events": b""},
    "LAPIC of 1 bytes": lambda state: {"lapic": b"x"},
    "XSAVE of 0 bytes": lambda state: {"xsave": b""},
    "XSAVE is no area": lambda state: {"xsave": with_xsave(state, 520, 1)},
    "XSAVE is no area in": lambda state: {"xsave": with_xsave(state, 27, 1)},
    "extended control registers cannot be": lambda state: {"xcrs": {0: 0}},
    "extended control registers cannot": lambda state: {"xcrs": {1: 1}},
    "the index of an MSR": lambda state: {"msrs": {1 << 32: 0}},
    "0 debug registers": lambda state: {"debug_registers": ()},
    "cs.type: 300 is not": lambda state: {"context": Context(cs=Segment(type=300))},
    "idt.limit": lambda state: {"context": Context(idt=DescriptorTable(limit=1 << 16))},
    "CR0 cannot be 0x80000000": lambda state: {"context": Context(cr0=1 << 31)},
    "cr8: 16": lambda state: {"context": Context(cr8=16)},
}
ODD_VCPUS = {
    "cpu 0: Expected `bool`": {"halted": 2},
    "cpu 0: Expected `int`": {"vectors": ["x"]},
    "cpu 0: interrupt vector 256": {"vectors": [256]},
    "cpu 0: instructions: -1": {"instructions": -1},
}
ODD_ALARMS: tuple[Any, ...] = (
    5,
    {"deadline_ns": 1 << 2000, "rung": []},
    {"deadline_ns": None, "rung": ["x"]},
    {"deadline_ns": None, "rung": [1.5]},
)


@pytest.mark.kvm
async def test_parts_that_make_no_sense_are_refused_and_change_nothing(boot):
    """Their checksums are right; each is named, and the machine goes on as it was."""
    machine = boot("again: inc word ptr [0x5000]", "jmp again")
    machine.attach(Diary(), pio=0x60)
    machine.irq(3).set(True)
    async with deadline(30):
        run = asyncio.create_task(machine.run())
        await until(lambda: counted(machine))
        async with machine.drained():
            saved = await machine.checkpoint()
            (cpu,), devices = saved.cpus, saved.devices
            odd: list[tuple[str, dict[str, Any]]] = []
            odd += ((name, {"engine": saved.engine | one}) for name, one in ODD_ENGINES.items())
            odd += ((name, {"time_ns": one}) for name, times in ODD_TIMES.items() for one in times)
            for name, evolve in ODD_STATES.items():
                state = attrs.evolve(cpu.state, **evolve(cpu.state))
                odd.append((f"cpu 0: .*{name}", {"cpus": [attrs.evolve(cpu, state=state)]}))
            for name, one in ODD_VCPUS.items():
                odd.append((name, {"cpus": [attrs.evolve(cpu, engine=cpu.engine | one)]}))
            for alarm in ODD_ALARMS:
                the_devices = devices | {"diary0": attrs.evolve(devices["diary0"], alarm=alarm)}
                odd.append(("diary0: its alarm: .* is no alarm's state", {"devices": the_devices}))
            for count in (-1, 1 << 63):
                statistics = saved.statistics | {"cpu0": {"numVMExits": count}}
                odd.append(("statistics: cpu0.numVMExits: ", {"statistics": statistics}))
            unknown = saved.statistics | {"cpu0": {"numVMExits": None}}
            odd.append(("statistics: cpu0.numVMExits cannot", {"statistics": unknown}))
            if machine.platform.kind == "kvm":
                odd.append(("vm: kvm_clock cannot be -1", {"vm": saved.vm | {"kvm_clock": -1}}))
            machine.memory.write(0x6000, b"new")
            before = await machine.checkpoint()
            for complaint, parts in odd:
                with pytest.raises(CheckpointError, match=complaint):
                    await machine.restore(Checkpoint(**parts_of(saved) | parts))
            after = await machine.checkpoint()
            assert (after.memory, after.devices, after.engine) == (
                before.memory,
                before.devices,
                before.engine,
            )
            assert after.cpus[0].engine == before.cpus[0].engine
            assert after.cpus[0].state.context == before.cpus[0].state.context
        at = counted(machine)
        await until(lambda: counted(machine) != at)
        machine.stop("seen")
        assert await run == Stopped("seen")


def parts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The arguments to make the same one of."""
    names = "shape cpus devices vm time_ns statistics memory created_by engine".split()
    return {name: getattr(checkpoint, name) for name in names}


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["kvm_ioapic", "kvm_pit"])
async def test_chips_of_kvms_that_make_no_sense(name):
    async with deadline(), Machine(memory="1M", irqchip="kernel") as machine:
        saved = await machine.checkpoint()
        machine.memory.write(0x6000, b"new")
        for odd in (b"", saved.vm["kvm_pic_master"], 7):
            wrong = Checkpoint(**parts_of(saved) | {"vm": saved.vm | {name: odd}})
            with pytest.raises(CheckpointError, match=f"vm: {name} is "):
                await machine.restore(wrong)
        assert machine.memory.read(0x6000, 3) == b"new"


class Strict(Device):
    """Its `load()` fails in a way that nobody has foreseen."""

    size = 1

    def save(self):
        return {"of": {"value": 1}}

    def load(self, state):
        assert state["of"].keys() == {"value"}


@pytest.mark.kvm
async def test_a_device_that_fails_in_any_way_refuses(boot):
    machine = boot("hlt")
    machine.attach(Strict(), pio=0x60)
    saved = await machine.checkpoint()
    machine.memory.write(0x6000, b"new")
    states: tuple[dict[str, Any], ...] = ({"of": 1}, {"of": {}})
    for state in states:
        devices = saved.devices | {"strict0": attrs.evolve(saved.devices["strict0"], state=state)}
        with pytest.raises(CheckpointError, match="strict0 cannot take its state back"):
            await machine.restore(Checkpoint(**parts_of(saved) | {"devices": devices}))
    assert machine.memory.read(0x6000, 3) == b"new"


# ---- what happens meanwhile, or has happened before -----------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize("pending", [False, True], ids=["failed", "fails meanwhile"])
async def test_reset_behind_a_handler_that_has_failed(boot, pending):
    """The access is given up; a drain without a restore would try it again, and refuses."""
    go_on = asyncio.Event()

    async def fail() -> None:
        await go_on.wait()
        raise ZeroDivisionError("the device's own")

    machine = boot("in al, 0x60", "hlt")
    machine.attach(Diary(during=fail), pio=0x60)
    async with deadline():
        saved = await machine.checkpoint()
        for _ in range(3):
            run = asyncio.create_task(machine.run())
            await until(lambda: machine.vcpus[0].state is PENDING)
            if pending:
                restore = asyncio.create_task(machine.restore(saved))
                await until(lambda: machine.barrier.is_moving)
                go_on.set()
                await restore
                with pytest.raises(ZeroDivisionError):
                    await run
            else:
                go_on.set()
                with pytest.raises(ZeroDivisionError):
                    await run
                with pytest.raises(ConfigurationError, match="cannot be drained"):
                    await machine.checkpoint()
                await machine.restore(saved)
            go_on.clear()
            again = await machine.checkpoint()
            assert again.cpus == saved.cpus


@pytest.mark.kvm
async def test_reset_behind_an_access_to_nothing(boot):
    machine = boot("in al, 0x60", "hlt")
    async with deadline():
        saved = await machine.checkpoint()
        for _ in range(3):
            with pytest.raises(UnmappedAccess):
                await machine.run()
            await machine.restore(saved)
        assert machine.vcpus[0].context.rip == saved.cpus[0].state.context.rip


@pytest.mark.kvm
async def test_pieces_of_an_access_behind_a_restore_are_all_served():
    """An interrupt that comes between them, the first one since the restore, takes none away."""

    class TwoPages(Device):
        size = 0x2000

        def __init__(self) -> None:
            self.pieces: list[tuple[int, int]] = []
            self.during: Callable[[], None] = lambda: None

        def read(self, offset: int, size: int) -> int:
            self.pieces.append((offset, size))
            self.during()
            return 0x2211 if offset == 0xFFE else 0x4433

    lines = ("mov ax, 0xd000", "mov ds, ax", "mov eax, [0xffe]", "hlt")
    async with deadline(), Machine(memory=0xD0000) as machine:
        device = machine.attach(TwoPages(), mmio=0xD0000)
        machine.load(Flat(assemble(lines, "real16", 0x1000), 0x1000))
        cpu = machine.vcpus[0]
        await machine.restore(await machine.checkpoint())
        device.during = lambda: cpu.trigger(0x30)
        assert await machine.run() == Halted()
        assert device.pieces == [(0xFFE, 2), (0x1000, 2)]
        assert cpu.context.rax == 0x44332211


@pytest.mark.kvm
async def test_run_that_is_stopped_meanwhile_ends(boot):
    machine = boot("spin: jmp spin")
    async with deadline():
        saved = await machine.checkpoint()
        run = asyncio.create_task(machine.run())
        await until(lambda: machine.vcpus[0].inside)
        async with machine.drained():
            machine.stop("meanwhile")
            await machine.restore(saved)
        assert await run == Stopped("meanwhile")


@pytest.mark.kvm
async def test_each_activity_runs_once(boot):
    """Two restores at a time, and one that is cancelled while an activity takes its time to end."""
    machine = boot("spin: jmp spin")
    device = machine.attach(Kept(), pio=0x60)
    async with deadline():
        saved = await machine.checkpoint()
        run = asyncio.create_task(machine.run())
        await until(lambda: device.active)
        await asyncio.gather(machine.restore(saved), machine.restore(saved))
        await asyncio.sleep(0.02)
        assert device.active == 1
        restore = asyncio.create_task(machine.restore(saved))
        await until(lambda: machine.barrier.is_down)
        await asyncio.sleep(0)
        restore.cancel()
        with pytest.raises(asyncio.CancelledError):
            await restore
        await asyncio.sleep(0.02)
        assert device.active == 1
        machine.stop()
        await run


@pytest.mark.kvm
async def test_line_that_nobody_has_asked_for_yet(boot):
    machine, other = boot("hlt"), boot("hlt")
    machine.irq(5).set(True)
    async with deadline():
        await other.restore(await machine.checkpoint())
        assert other.irq(5).level


@pytest.mark.kvm
async def test_incremental_on_a_base(boot):
    machine = boot(*COUNTING)
    machine.attach(Diary(), pio=0x60)
    async with deadline():
        base = await machine.checkpoint()
        await machine.restore(base)
        run = asyncio.create_task(machine.run())
        await until(lambda: counted(machine) > 100)
        machine.stop()
        await run
        later = await machine.checkpoint()
        change = later.since(base)
        assert [page for pages in change.memory.values() for page in pages.given_pages()] == [5]
        assert change.on(base) == later


# ---- KVM's own interrupt controllers, several vCPUs ---------------------------------------

TICKS = (
    # IRQ 0 of the PIT through the PIC at vector 0x20; the handler counts in memory.
    *("cli", "xor ax, ax", "mov ds, ax", "mov word ptr [0x80], offset handler"),
    *("mov word ptr [0x82], 0", "mov al, 0x11", "out 0x20, al", "mov al, 0x20", "out 0x21, al"),
    *("mov al, 4", "out 0x21, al", "mov al, 1", "out 0x21, al", "mov al, 0xfe", "out 0x21, al"),
    *("mov al, 0x34", "out 0x43, al", "mov al, 0x00", "out 0x40, al", "mov al, 0x08"),
    *("out 0x40, al", "sti", "wait: hlt", "jmp wait"),
    *(
        "handler: inc word ptr [0x5000]",
        "push ax",
        "mov al, 0x20",
        "out 0x20, al",
        "pop ax",
        "iret",
    ),
)


@pytest.mark.kvm
async def test_kernels_pit_and_pic_go_on():
    """A guest that sleeps between the ticks of KVM's own timer, moved from machine to machine."""
    code = assemble(TICKS, "real16", 0x1000)
    saved: Checkpoint | None = None
    async with deadline(30):
        for _ in range(5):
            async with Machine(memory="1M", irqchip="kernel") as machine:
                if saved is None:
                    machine.load(Flat(code, 0x1000))
                else:
                    await machine.restore(saved)
                before = counted(machine)
                run = asyncio.create_task(machine.run())
                await until(lambda: counted(machine) > before + 5)  # noqa: B023
                saved = await machine.checkpoint()
                machine.stop()
                await run


# In-kernel timers count on while nobody enters a vCPU; see docs/checkpoints.md.
DRIFTS = {"kvm_clock", "kvm_pit"}
APIC_CURRENT_COUNT = slice(0x390, 0x394)


@pytest.mark.kvm
async def test_round_trip_with_kernel_irqchip_is_identical_but_for_its_timers():
    code = assemble(TICKS, "real16", 0x1000)
    async with deadline(), Machine(memory="1M", irqchip="kernel", vcpus=2) as machine:
        machine.load(Flat(code, 0x1000))
        run = asyncio.create_task(machine.run())
        await until(lambda: counted(machine) > 5)
        first = await machine.checkpoint()
        machine.stop()
        await run
        async with Machine(memory="1M", irqchip="kernel", vcpus=2) as other:
            await other.restore(first)
            second = await other.checkpoint()
        drifting = differing(first, second)
        assert set(drifting.pop("vm", [])) <= DRIFTS | {"kvm_pic_master"}  # a tick may have come
        assert drifting.pop("machine") == ["time_ns"]
        assert drifting.pop("cpus", None) is None or [without_timer(cpu) for cpu in first.cpus] == [
            without_timer(cpu) for cpu in second.cpus
        ]
        assert drifting == {}


def without_timer(saved: SavedCpu) -> SavedCpu:
    lapic = saved.state.lapic
    assert lapic is not None
    page = bytearray(lapic)
    page[APIC_CURRENT_COUNT] = bytes(4)
    return attrs.evolve(saved, state=attrs.evolve(saved.state, lapic=bytes(page)))


# Each of the vCPUs counts in a word of its own, by its APIC id.
EACH_COUNTS = (
    *("mov eax, 1", "cpuid", "shr ebx, 24", "shl bx, 2", "add bx, 0x5000"),
    *("again: inc dword ptr [bx]", "mov eax, [bx]", "test al, 0x7f", "jnz again"),
    *("out 0x60, al", "jmp again"),
)


@pytest.mark.kvm
async def test_four_vcpus_go_on_elsewhere():
    code = assemble(EACH_COUNTS, "real16", 0x1000)

    def counts(machine: Machine) -> list[int]:
        return [int.from_bytes(machine.memory.read(0x5000 + 4 * n, 4), "little") for n in range(4)]

    saved: Checkpoint | None = None
    async with deadline(30):
        for _ in range(5):
            async with Machine(memory="1M", vcpus=4) as machine:
                machine.attach(Diary(), pio=0x60)
                if saved is None:
                    machine.load(Flat(code, 0x1000))
                else:
                    await machine.restore(saved)
                run = asyncio.create_task(machine.run())
                if saved is None:
                    for vcpu in machine.vcpus[1:]:
                        vcpu.init()
                        vcpu.start_up(1)
                before = counts(machine)
                wanted = [count + 100 for count in before]
                await until(
                    lambda: all(map(operator.gt, counts(machine), wanted))  # noqa: B023
                )
                saved = await machine.checkpoint()
                machine.stop()
                await run
