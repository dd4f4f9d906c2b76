"""The software CPU: what is its own. What every model must do is in tests/engine."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import threading
from pathlib import Path

import pytest

import kvmaio
from kvmaio import Device, Exited, Halted, Machine, Shutdown
from kvmaio.boot import Flat
from kvmaio.devices import DebugExit
from kvmaio.exits import DebugEventExit, HaltExit, InterruptedExit, IoExit, MmioExit
from kvmaio.soft.cpu import SoftCpu
from kvmaio.timed_cpu import TimedCpu
from kvmaio.trace import Record
from tests.assembler import assemble
from tests.engine.support import deadline

pytestmark = pytest.mark.soft


class Window(Device):
    """Keeps what is written, and answers reads by their offset."""

    size = 0x1000

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("read", offset, size))
        return 0x8877_6655_4433_2211 & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size, value))


def load(machine: Machine, *lines: str, mode: str = "real16") -> None:
    machine.load(Flat(assemble(lines, mode, 0x1000), 0x1000, mode))


# ---- accesses ------------------------------------------------------------------------------------

AT = 0xD000_0000


@pytest.mark.parametrize(
    ("line", "log"),
    [
        ("mov eax, [rbx + 8]", [("read", 8, 4)]),
        ("mov rax, [rbx + 0x31]", [("read", 0x31, 8)]),
        ("mov [rbx + 0x10], ax", [("write", 0x10, 2, 0x99)]),
        ("mov [rbx + 0x13], eax", [("write", 0x13, 4, 0x99)]),
        ("add dword ptr [rbx], 1", [("read", 0, 4), ("write", 0, 4, 0x4433_2212)]),
        ("lock xadd [rbx], al", [("read", 0, 1), ("write", 0, 1, 0xAA)]),
        ("movups [rbx], xmm0", [("write", 0, 8, 0), ("write", 8, 8, 0)]),
        ("movups xmm0, [rbx]", [("read", 0, 8), ("read", 8, 8)]),
        ("push [rbx]", [("read", 0, 8)]),
        ("rep stosw", [("write", 0, 2, 0x99), ("write", 2, 2, 0x99), ("write", 4, 2, 0x99)]),
        ("rep movsb", [("read", 0x800 + i, 1) for i in range(3)]),
    ],
)
async def test_an_instruction_counts_once_however_often_it_accesses(line, log):
    async with Machine(cpu="soft") as machine:
        window = machine.attach(Window(), mmio=AT)
        load(
            machine,
            *(f"mov rbx, {AT}", f"mov rdi, {AT}", f"mov rsi, {AT + 0x800}", "mov ecx, 3"),
            *("mov eax, 0x99", *(["mov edi, 0x5000"] if "movsb" in line else ["nop"])),
            *(line, "hlt"),
            mode="long64",
        )
        async with deadline():
            assert await machine.run() == Halted()
        assert window.log == log
        assert machine.vcpus[0].stats.numInsts == 8


async def test_a_half_entry_completes_the_access_and_no_more():
    async with Machine(cpu="soft") as machine:
        load(machine, "in al, 0x10", "inc bx", "hlt")
        (vcpu,) = machine.vcpus
        async with deadline():
            assert type(await vcpu.run()) is IoExit
            vcpu.model.io_words[1][vcpu.model.page.io.data_offset] = 0x5A
            assert type(await vcpu.run(0)) is InterruptedExit
        context = vcpu.context
        assert (context.rax, context.rbx, context.rip) == (0x5A, 0, 0x1002)


async def test_the_host_changes_code_that_was_executed():
    async with Machine(cpu="soft") as machine:
        load(machine, "mov al, 1", "out 0xf4, al", "jmp $ - 4")
        machine.attach(DebugExit(), pio=0xF4)
        async with deadline():
            assert await machine.run() == Exited(3)
            machine.memory.write(0x1001, b"\x02")
            assert await machine.run() == Exited(5)


async def test_memory_comes_and_goes_where_there_was_mmio():
    async with Machine(cpu="soft", memory="1M") as machine:
        load(machine, "mov eax, [0x200000]", "out 0x10, eax", "jmp 0x1000", mode="prot32")
        (vcpu,) = machine.vcpus
        async with deadline():
            assert type(await vcpu.run()) is MmioExit
            region = machine.memory.add_ram(0x200000, 0x1000)
            machine.memory.write(0x200000, b"RAM!")
            exit_ = await vcpu.run()
            assert isinstance(exit_, IoExit) and exit_.data == b"RAM!"
            machine.memory.remove(region)
            assert type(await vcpu.run()) is MmioExit


# ---- exact counts --------------------------------------------------------------------------------

BUSY = (
    *("mov cx, 9", "again: mov si, 0x2000", "mov di, 0x3000", "mov bp, cx", "mov cx, 5"),
    *("rep movsb", "mov cx, bp", "xor [0x2003], dx", "add dx, [0x3000]", "rol dx, 3"),
    *("in al, 0x10", "add dl, al", "out 0x11, al", "loop again", "hlt"),
)


async def chunked(chunk):
    """Run to the halt in runs of `chunk()` nanoseconds, which are instructions."""
    async with Machine(cpu="soft") as machine:
        load(machine, *BUSY)
        (vcpu,) = machine.vcpus
        exits = 0
        async with deadline(30):
            while type(exit_ := await vcpu.run(chunk())) is not HaltExit:
                if isinstance(exit_, IoExit):
                    exits += 1
                    if not exit_.is_write:
                        vcpu.model.io_words[1][vcpu.model.page.io.data_offset] = exits & 0xFF
        digest = hashlib.sha256(machine.memory.read(0, 0x10000)).hexdigest()
        # The time stamp counter is the wall clock's here.
        return re.sub(r"\w+ TSC\n", "", vcpu.dump()), vcpu.stats.numInsts, exits, digest


async def test_chunks_of_any_size_are_the_same_run():
    numbers = random.Random(6)
    whole = await chunked(lambda: None)
    assert whole[1:3] == (119, 18)
    assert await chunked(lambda: 1) == whole
    assert await chunked(lambda: numbers.randint(1, 9)) == whole


async def test_ticks_are_instructions_by_the_clock():
    async with Machine(cpu="soft", clock_hz=3_000_000_000) as machine:
        load(machine, "again: inc ax", "jmp again")
        (vcpu,) = machine.vcpus
        async with deadline():
            ticks = [(await vcpu.run(1)).ticks for _ in range(9)]
        assert sum(ticks) == 9 and vcpu.stats.numInsts == 27


# ---- exceptions and interrupts -------------------------------------------------------------------


async def test_a_triple_fault_shuts_down():
    async with Machine(cpu="soft") as machine:
        load(machine, "ud2", mode="long64")
        async with deadline():
            assert isinstance(await machine.run(), Shutdown)


async def test_breakpoints():
    async with Machine(cpu="soft") as machine:
        load(machine, "again: inc ax", "inc bx", "jmp again")
        (vcpu,) = machine.vcpus
        assert isinstance(vcpu.model, SoftCpu)
        vcpu.model.set_breakpoints([0x1001])
        async with deadline():
            for turn in (1, 2, 3):
                exit_ = await vcpu.run()
                assert isinstance(exit_, DebugEventExit) and exit_.pc == 0x1001
                assert (vcpu.context.rax, vcpu.context.rbx) == (turn, turn - 1)


# ---- the library ---------------------------------------------------------------------------------


def test_the_stub_names_what_there_is():
    from kvmaio.soft._soft import lib

    stub = Path(kvmaio.__file__).parent / "soft" / "_soft.pyi"
    declared = set(re.findall(r"^    (?:def )?(\w+)[(:]", stub.read_text(), re.MULTILINE))
    assert declared == set(dir(lib))


def test_a_library_that_is_no_unicorn_is_refused(tmp_path):
    from kvmaio.soft._soft import ffi, lib

    message = ffi.new("char[256]")
    if lib.kvmaio_soft_load(b"/nowhere/libunicorn.so.2", message, 256):
        assert b"cannot open" in ffi.string(message)


# ---- simulated time ------------------------------------------------------------------------------


class Pacer(Device):
    """Interrupts the guest each 700 ns; answers reads by the time."""

    size = 1

    def read(self, offset: int, size: int) -> int:
        return self.clock.now_ns & 0xFF

    async def run(self) -> None:
        self.alarm.arm(700)
        async for deadline_ns in self.alarm:
            self.irq.pulse()
            self.alarm.arm(deadline_ns + 700)


INTERRUPTED = (
    *("mov word ptr [0xa0], offset handler", "mov word ptr [0xa2], 0", "sti", "mov cx, 500"),
    *("again: in al, 0x10", "add bl, al", "rol bx, 3", "mul bx", "mov [0x3000], ax"),
    *("loop again", "cli", "hlt", "handler: inc word ptr [0x3002]", "xor bx, [0x3000]", "iret"),
)


async def simulated_run(trace: Path) -> tuple[object, ...]:
    async with Machine(cpu="soft", memory="1M") as machine:
        records: list[Record] = []
        machine.attach(Pacer(), pio=0x10, irq=8)
        machine.load(Flat(assemble(INTERRUPTED, "real16", 0x1000), 0x1000))
        async with deadline(30):
            with machine.trace(records.append), machine.trace(trace):
                assert await machine.run() == Halted()
        (vcpu,) = machine.vcpus
        digest = hashlib.sha256(machine.memory.read(0, 1 << 20)).hexdigest()
        statistics = vcpu.stats.as_dict()
        return digest, vcpu.dump(), statistics, machine.clock.now_ns, records


def simulated(trace: Path) -> tuple[object, ...]:
    result = kvmaio.run(simulated_run(trace), time="simulated")
    return *result, trace.read_bytes()


class Alarmed(Device):
    """Answers reads by the time; 50 us after a write, it interrupts."""

    size = 4

    def read(self, offset: int, size: int) -> int:
        return self.clock.now_ns

    def write(self, offset: int, size: int, value: int) -> None:
        self.alarm.arm(self.clock.now_ns + 50_000)

    async def run(self) -> None:
        async for _ in self.alarm:
            self.irq.pulse()


HALTED_BETWEEN = (
    *("mov word ptr [0xa0], offset handler", "mov word ptr [0xa2], 0", "out 0x10, eax"),
    *("rdtsc", "mov esi, eax", "in eax, 0x10", "mov edi, eax", "sti", "hlt", "cli"),
    *("rdtsc", "mov ebx, eax", "in eax, 0x10", "mov ecx, eax", "hlt", "handler: iret"),
)


def test_the_time_stamp_counter_is_simulated_time_also_while_halted():
    async def run() -> tuple[int, ...]:
        async with Machine(cpu="soft", memory="1M") as machine:
            machine.attach(Alarmed(), pio=0x10, irq=8)
            machine.load(Flat(assemble(HALTED_BETWEEN, "real16", 0x1000), 0x1000))
            async with deadline(30):
                assert await machine.run() == Halted()
            (vcpu,) = machine.vcpus
            # A value that is written stays, and goes on with time.
            assert isinstance(vcpu.model, TimedCpu)
            model = vcpu.model.model
            assert isinstance(model, SoftCpu)
            model.set_msrs({0x10: 1 << 40})
            assert model.read_state().msrs[0x10] == 1 << 40
            await asyncio.sleep(1e-6)
            assert model.read_state().msrs[0x10] == (1 << 40) + 1000
            context = vcpu.context
            return context.rsi, context.rdi, context.rbx, context.rcx

    tsc, time, later_tsc, later_time = first = kvmaio.run(run(), time="simulated")
    assert later_time - time > 49_000
    assert later_tsc - tsc == later_time - time
    assert kvmaio.run(run(), time="simulated") == first


def test_an_instruction_count_is_reached_within_simulated_time():
    async def run(*counts: int) -> tuple[object, ...]:
        seen = []

        async def look(machine: Machine) -> None:
            (vcpu,) = machine.vcpus
            for count in counts:
                await vcpu.at_instruction(count)
                seen.append((count, vcpu.stats.numInsts, vcpu.context.rax))

        async with Machine(cpu="soft", memory="1M") as machine, asyncio.TaskGroup() as group:
            machine.attach(Pacer(), pio=0x10, irq=8)
            load(machine, *["inc ax"] * 2000, "cli", "hlt")
            group.create_task(look(machine))
            async with deadline(30):
                assert await machine.run() == Halted()
            assert seen == [(count, count, count) for count in counts]
            return machine.clock.now_ns, machine.vcpus[0].stats.numInsts

    alone = kvmaio.run(run(), time="simulated")
    assert alone == kvmaio.run(run(1, 2, 3, 699, 701, 1999), time="simulated") == (2002, 2002)


def test_the_same_program_makes_the_same_run(tmp_path):
    """Memory, registers, counts, time, and a trace of all that happens, also as a file."""
    first = simulated(tmp_path / "first.json")
    # A busy host, whose threads take the processor and the GIL away at any moment.
    stop = threading.Event()
    threads = [
        threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)]) for _ in range(3)
    ]
    try:
        for thread in threads:
            thread.start()
        second = simulated(tmp_path / "second.json")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert second == first
    statistics = first[2]
    assert isinstance(statistics, dict) and statistics["numInterrupts"] > 3
    records = first[4]
    assert isinstance(records, list) and len(records) > 1000
