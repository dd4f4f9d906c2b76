"""Watchpoints of the software CPU: behind which instruction an entry ends, and with what."""

from __future__ import annotations

import hashlib
import random
import re

import attrs
import pytest

from kvmaio import Device, Machine
from kvmaio.boot import Flat
from kvmaio.errors import ConfigurationError
from kvmaio.exits import DebugEventExit, HaltExit, InterruptedExit, IoExit, MmioExit, VmExit
from kvmaio.soft.cpu import SoftCpu
from kvmaio.vcpu import VCpu
from kvmaio.watchpoints import WatchHit, WatchKind, Watchpoint
from tests.assembler import assemble
from tests.engine.support import deadline
from tests.soft.test_lockstep import load_broad
from tests.soft.test_soft_cpu import BUSY

pytestmark = pytest.mark.soft

READ, WRITE, ACCESS = WatchKind.READ, WatchKind.WRITE, WatchKind.ACCESS
MODES = ["real16", "prot32", "long64"]
AT = 0xD000_0000


def watched(machine: Machine, *lines: str, mode: str, watch: list[Watchpoint]) -> VCpu:
    """A machine's vCPU, at the beginning of this code."""
    machine.load(Flat(assemble(lines, mode, 0x1000), 0x1000, mode))
    (vcpu,) = machine.vcpus
    assert isinstance(vcpu.model, SoftCpu)
    vcpu.model.set_watchpoints(watch)
    return vcpu


async def stops(vcpu: VCpu, ticks: int | None = None) -> list[tuple[int, int, WatchKind]]:
    """Each stop until the halt: how many instructions were executed, the address, the kind."""
    found = []
    async with deadline():
        while type(exit_ := await vcpu.run(ticks)) is not HaltExit:
            if isinstance(exit_, DebugEventExit):
                (hit,) = exit_.watched
                assert vcpu.stats.numInsts is not None
                found.append((int(vcpu.stats.numInsts), hit.address, hit.kind))
            else:
                assert type(exit_) is InterruptedExit
    return found


# ---- which accesses ------------------------------------------------------------------------------


@pytest.mark.parametrize("ticks", [None, 1])
@pytest.mark.parametrize("mode", MODES)
async def test_a_guest_stops_behind_each_access_of_the_kind_that_is_watched(mode, ticks):
    async with Machine(cpu="soft", memory="2M") as machine:
        vcpu = watched(
            machine,
            *("mov eax, [0x2000]", "mov [0x2000], eax", "inc byte ptr [0x2003]"),
            *("nop", "mov [0x2001], al", "hlt"),
            mode=mode,
            watch=[],
        )
        assert isinstance(vcpu.model, SoftCpu)
        seen = {
            READ: [(1, 0x2000, READ), (3, 0x2003, READ)],
            WRITE: [(2, 0x2000, WRITE), (3, 0x2003, WRITE), (5, 0x2001, WRITE)],
            ACCESS: [
                *((1, 0x2000, READ), (2, 0x2000, WRITE), (3, 0x2003, ACCESS)),
                (5, 0x2001, WRITE),
            ],
        }
        for kind, expected in seen.items():
            machine.load(Flat(machine.memory.read(0x1000, 64), 0x1000, mode))
            vcpu.model.set_watchpoints([Watchpoint(0x2000, 4, kind)])
            assert await stops(vcpu, ticks) == expected
            assert vcpu.stats.numInsts == 6


@pytest.mark.parametrize(
    ("line", "hits"),
    [
        ("mov rax, [0x1ffc]", [(0x2000, READ)]),  # from before it into it
        ("mov rax, [0x1ff8]", []),
        ("mov eax, [0x2004]", []),
        ("mov ax, [0x2003]", [(0x2003, READ)]),  # across its end
        ("movups xmm0, [0x1ff4]", [(0x2000, READ)]),
        ("movups [0x1ff1], xmm0", [(0x2000, WRITE)]),
        ("fld tbyte ptr [0x1ff8]", [(0x2000, READ)]),  # ten bytes
        ("lock xadd [0x2002], al", [(0x2002, ACCESS)]),
        ("xchg [0x2002], al", [(0x2002, ACCESS)]),
        ("lock cmpxchg16b [0x2000]", [(0x2000, ACCESS)]),
        ("push rax", [(0x2000, WRITE)]),
        ("call 1f; 1:", [(0x2000, WRITE)]),
        ("prefetcht0 [0x2000]", []),
        ("lea rax, [0x2000]", []),
        ("fxsave [0x1f00]", [(0x2000, WRITE)]),
    ],
)
async def test_what_an_instruction_accesses(line, hits):
    async with Machine(cpu="soft", memory="2M") as machine:
        vcpu = watched(
            machine,
            *("mov rsp, 0x2008", line, "nop", "hlt"),
            mode="long64",
            watch=[Watchpoint(0x2000, 4, ACCESS)],
        )
        vcpu.context.cr4 |= 1 << 9
        assert await stops(vcpu) == [(2, *hit) for hit in hits]


@pytest.mark.parametrize("mode", MODES)
async def test_across_a_page_only_what_is_accessed_counts(mode):
    """The engine makes two aligned reads of an unaligned one."""
    async with Machine(cpu="soft", memory="2M") as machine:
        vcpu = watched(
            machine,
            *("mov eax, [0x2ffe]", "mov [0x2ffe], eax", "mov eax, [0x2ffd]", "mov [0x2fff], ax"),
            "hlt",
            mode=mode,
            watch=[Watchpoint(a, 1, ACCESS) for a in (0x2FFC, 0x2FFD, 0x3001, 0x3002, 0x3003)],
        )
        assert await stops(vcpu) == [(1, 0x3001, READ), (2, 0x3001, WRITE), (3, 0x2FFD, READ)]


async def test_one_instruction_hits_several_and_an_area_may_be_large():
    async with Machine(cpu="soft", memory="2M") as machine:
        area, byte = Watchpoint(0x10000, 0x20000, WRITE), Watchpoint(0x2000, 1, READ)
        vcpu = watched(
            machine,
            *("mov esi, 0x2000", "mov edi, 0x2ffff", "movsb", "mov [0x30000], al", "hlt"),
            mode="long64",
            watch=[area, byte],
        )
        async with deadline():
            exit_ = await vcpu.run()
            assert isinstance(exit_, DebugEventExit)
            assert exit_.watched == (WatchHit(0x2FFFF, WRITE), WatchHit(0x2000, READ))
            assert type(await vcpu.run()) is HaltExit


# ---- repeated strings ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_a_repeated_string_stops_behind_the_element(mode):
    async with Machine(cpu="soft", memory="2M") as machine:
        vcpu = watched(
            machine,
            *("mov esi, 0x3000", "mov edi, 0x2000", "mov ecx, 5", "rep movsb", "nop", "hlt"),
            mode=mode,
            watch=[Watchpoint(0x2002, 3, WRITE)],
        )
        seen = []
        async with deadline():
            while isinstance(exit_ := await vcpu.run(), DebugEventExit):
                rest = vcpu.context.rcx
                seen.append((exit_.watched[0].address, rest, vcpu.stats.numInsts))
        # Behind the last element, it is over.
        assert seen == [(0x2002, 2, 3), (0x2003, 1, 3), (0x2004, 0, 4)]
        assert type(exit_) is HaltExit and vcpu.stats.numInsts == 6


async def test_a_search_stops_where_it_ends():
    async with Machine(cpu="soft", memory="2M") as machine:
        vcpu = watched(
            machine,
            *("mov edi, 0x2000", "mov ecx, 9", "mov al, 7", "repne scasb", "nop", "hlt"),
            mode="prot32",
            watch=[Watchpoint(0x2003, 1, READ)],
        )
        machine.memory.write(0x2003, b"\7")
        assert await stops(vcpu) == [(4, 0x2003, READ)]
        assert vcpu.context.rcx == 5


# ---- devices -------------------------------------------------------------------------------------


class Window(Device):
    """Keeps its accesses, and answers reads with ones."""

    size = 0x1000

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("read", offset, size))
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size))


@pytest.mark.parametrize(
    ("line", "log", "hits"),
    [
        ("mov eax, [rbx]", [("read", 0, 4)], [(0, READ)]),
        ("mov [rbx + 2], al", [("write", 2, 1)], [(2, WRITE)]),
        ("add dword ptr [rbx], 1", [("read", 0, 4), ("write", 0, 4)], [(0, ACCESS)]),
        ("mov eax, [rbx + 5]", [("read", 5, 4)], []),  # of which the engine makes two of eight
        ("mov ax, [rbx + 3]", [("read", 3, 2)], [(3, READ)]),
        ("push [rbx]", [("read", 0, 8)], [(0, READ)]),
        ("in al, 0x10", [], []),
    ],
)
async def test_an_instruction_that_starts_again_is_reported_once(line, log, hits):
    async with Machine(cpu="soft", memory="2M") as machine:
        window = machine.attach(Window(), mmio=AT)
        ports = machine.attach(Window(), pio=0x10)
        vcpu = watched(
            machine,
            *(f"mov rbx, {AT}", "mov rsp, 0x3000", line, "nop", "hlt"),
            mode="long64",
            watch=[Watchpoint(AT, 4, ACCESS)],
        )
        found = []

        def stopped(vcpu: VCpu) -> None:
            exit_ = vcpu.last_exit()
            assert isinstance(exit_, DebugEventExit)
            found.append((vcpu.stats.numInsts, *exit_.watched))

        vcpu.on_debug(stopped)
        async with deadline():
            await machine.run()
        assert found == [(3, WatchHit(AT + offset, kind)) for offset, kind in hits]
        assert window.log == log and len(ports.log) == ("in al" in line)
        assert vcpu.stats.numInsts == 5


async def test_memory_beside_a_device_is_reported_once_although_read_again():
    async with Machine(cpu="soft", memory="2M") as machine:
        window = machine.attach(Window(), mmio=AT)
        vcpu = watched(
            machine,
            *(f"mov edi, {AT}", "mov esi, 0x2000", "mov ecx, 3", "rep movsb", "hlt"),
            mode="prot32",
            watch=[Watchpoint(0x2001, 1, READ)],
        )
        found: list[tuple[VmExit, float | None]] = []
        vcpu.on_debug(lambda vcpu: found.append((vcpu.last_exit(), vcpu.stats.numInsts)))
        async with deadline():
            await machine.run()
        assert [count for _, count in found] == [3]
        assert window.log == [("write", offset, 1) for offset in range(3)]


async def test_a_half_entry_completes_the_access_and_the_next_entry_tells_of_it():
    async with Machine(cpu="soft", memory="2M") as machine:
        line = f"mov [{AT}], al"
        vcpu = watched(machine, line, "hlt", mode="prot32", watch=[Watchpoint(AT, 1)])
        async with deadline():
            assert type(await vcpu.run()) is MmioExit
            assert type(await vcpu.run(0)) is InterruptedExit
            exit_ = await vcpu.run()
            assert isinstance(exit_, DebugEventExit) and exit_.ticks == 0
            assert exit_.watched == (WatchHit(AT, WRITE),) and exit_.pc == vcpu.context.rip
            assert type(await vcpu.run()) is HaltExit


# ---- faults, interrupts, paging ------------------------------------------------------------------


async def test_an_instruction_that_faults_is_reported_when_it_is_executed():
    async with Machine(cpu="soft", memory="1M") as machine:
        vcpu = watched(
            machine,
            *("mov word ptr [0], offset handler", "mov word ptr [2], 0", "mov al, 9"),
            *("div byte ptr [0x2000]", "hlt", "handler: mov byte ptr [0x2000], 3", "iret"),
            mode="real16",
            watch=[Watchpoint(0x2000, 1, READ)],
        )
        assert await stops(vcpu) == [(6, 0x2000, READ)]
        assert vcpu.context.rax == 3


async def test_what_an_interrupt_pushes_is_a_write():
    async with Machine(cpu="soft", memory="1M") as machine:
        vcpu = watched(
            machine,
            *("mov word ptr [0x100], offset handler", "mov word ptr [0x102], 0"),
            *("int 0x40", "hlt", "handler: nop", "iret"),
            mode="real16",
            watch=[Watchpoint(0x6FFE, 2, WRITE)],
        )
        async with deadline():
            exit_ = await vcpu.run()
            assert isinstance(exit_, DebugEventExit) and exit_.watched == (WatchHit(0x6FFE, WRITE),)
            assert machine.memory.read(exit_.pc, 2) == b"\x90\xcf"  # the handler's first
            assert type(await vcpu.run()) is HaltExit


HIGH = 1 << 39


async def test_addresses_are_linear():
    """Two pages that lie apart, and the other way round, in memory."""
    async with Machine(cpu="soft", memory="2M") as machine:
        vcpu = watched(
            machine,
            *(f"mov rbx, {HIGH}", "mov eax, [rbx + 0xffe]", "mov [rbx + 0xffe], eax"),
            *("mov al, [0x5002]", "mov al, [rbx + 2]", "mov al, [rbx + 0x1002]", "hlt"),
            mode="long64",
            watch=[Watchpoint(HIGH + 0x1000, 2, ACCESS), Watchpoint(HIGH + 2, 1, READ)],
        )
        root = vcpu.context.cr3 & ~0xFFF
        for table, index, entry in (
            *((root, 1, 0x8003), (0x8000, 0, 0x9003), (0x9000, 0, 0xA003)),
            *((0xA000, 0, 0x6003), (0xA000, 1, 0x5003)),
        ):
            machine.memory.write(table + 8 * index, entry.to_bytes(8, "little"))
        assert await stops(vcpu) == [
            *((2, HIGH + 0x1000, READ), (3, HIGH + 0x1000, WRITE), (5, HIGH + 2, READ)),
        ]


# ---- determinism ---------------------------------------------------------------------------------


async def busy(chunk: object, watch: list[Watchpoint]) -> tuple[object, int]:
    """A run to the halt in runs of `chunk()` instructions: what is left, and how many stops."""
    async with Machine(cpu="soft") as machine:
        vcpu = watched(machine, *BUSY, mode="real16", watch=watch)
        reads = writes = found = 0
        exit_: VmExit | None = None
        async with deadline(30):
            while type(exit_ := await vcpu.run(chunk())) is not HaltExit:  # type: ignore[operator]
                found += isinstance(exit_, DebugEventExit)
                if isinstance(exit_, IoExit) and exit_.is_write:
                    writes += 1
                elif isinstance(exit_, IoExit):
                    reads += 1
                    vcpu.model.io_words[1][vcpu.model.page.io.data_offset] = reads
        digest = hashlib.sha256(machine.memory.read(0, 0x10000)).hexdigest()
        registers = re.sub(r"\w+ TSC\n", "", vcpu.dump())
        return (registers, vcpu.stats.numInsts, reads, writes, digest), found


async def test_watching_changes_nothing_of_a_run():
    numbers = random.Random(6)
    watch = [Watchpoint(0x2003, 1, ACCESS), Watchpoint(0x3000, 2, WRITE)]
    alone, none = await busy(lambda: None, [])
    assert none == 0
    # Nine times: the copy writes two elements there and reads one, and XOR.
    for chunk in (lambda: None, lambda: 1, lambda: numbers.randint(1, 9)):
        assert await busy(chunk, watch) == (alone, 9 * 4)


AREAS = [(0x2000, 3), (0x2006, 1), (0x3002, 5), (0x6FE0, 24), (0x4000_0002, 2)]
"""Strings, where they come from and go to; the stack; a device."""


async def generated(seed: int, mode: str, watch: list[Watchpoint]) -> tuple[object, int]:
    """900 instructions one by one, and what is left; each write must be seen that shows."""
    async with Machine(cpu="soft") as machine:
        load_broad(machine, seed, mode)
        (vcpu,) = machine.vcpus
        assert isinstance(vcpu.model, SoftCpu)
        vcpu.model.set_watchpoints(watch)
        log: list[VmExit] = []
        hits = 0
        before = [machine.memory.read(*area) for area in AREAS[:-1]]
        async with deadline(30):
            while vcpu.stats.numInsts != 900:
                exit_ = await vcpu.run(1)
                if isinstance(exit_, IoExit | MmioExit):
                    log.append(attrs.evolve(exit_, ticks=0))
                    if isinstance(exit_, MmioExit):
                        vcpu.model.mmio_word[0] = len(log) * 0x79B9
                    else:
                        place = vcpu.model.page.io.data_offset // 4
                        vcpu.model.io_words[4][place] = len(log) * 0x9E37
                after = [machine.memory.read(*area) for area in AREAS[:-1]]
                if watch and after != before:
                    assert isinstance(exit_, DebugEventExit)
                    assert any(WRITE in hit.kind for hit in exit_.watched)
                before = after
                hits += isinstance(exit_, DebugEventExit)
        digest = hashlib.sha256(machine.memory.read(0, 0x10000)).hexdigest()
        return (re.sub(r"\w+ TSC\n", "", vcpu.dump()), log, digest), hits


@pytest.mark.parametrize("mode", MODES)
async def test_generated_programs_run_the_same_watched_or_not(mode):
    """With strings, faults, INT, x87, SSE and devices."""
    for seed in range(6):
        alone, none = await generated(seed, mode, [])
        for kind in (WRITE, ACCESS):
            watch = [Watchpoint(*area, kind) for area in AREAS]
            same, hits = await generated(seed, mode, watch)
            assert same == alone and hits > none == 0


async def test_watchpoints_are_exact_without_counting_and_gone_when_they_are_taken_away():
    async with Machine(cpu="soft", memory="2M") as machine:
        vcpu = watched(
            machine,
            *("again: mov [0x2000], al", "nop", "nop", "jmp again"),
            mode="prot32",
            watch=[Watchpoint(0x2000, 1)],
        )
        assert isinstance(vcpu.model, SoftCpu)
        vcpu.model.counting = False
        async with deadline():
            for _ in range(3):
                exit_ = await vcpu.run()
                assert isinstance(exit_, DebugEventExit) and exit_.pc == 0x1005
            vcpu.model.set_watchpoints([])
            assert type(await vcpu.run(100_000)) is InterruptedExit


async def test_how_many_there_may_be():
    async with Machine(cpu="soft", memory="2M") as machine:
        most = [Watchpoint(0x4000 + 8 * n, 4) for n in range(256)]
        vcpu = watched(machine, "mov [0x47f8], eax", "hlt", mode="prot32", watch=most)
        assert await stops(vcpu) == [(1, 0x47F8, WRITE)]
        assert isinstance(vcpu.model, SoftCpu)
        with pytest.raises(ConfigurationError, match="257 watchpoints are too many"):
            vcpu.model.set_watchpoints([*most, Watchpoint(0, 1)])
        for nothing in (Watchpoint(0x2000, 0), Watchpoint(0x2000, 4, WatchKind(0))):
            with pytest.raises(ConfigurationError, match="nothing to watch"):
                vcpu.model.set_watchpoints([nothing])
