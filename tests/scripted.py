"""`ScriptedCpu`: a CPU model that plays given exits and writes down how it is called.

For what no guest on this host can provoke (FAIL_ENTRY, HYPERCALL, UNKNOWN, ...)
and for the order of calls. It is strict where KVM is not: registers pushed while
an access waits for its completion fail the test, and with KVM they lose data.

::

    cpu = ScriptedCpu(port_in(0x60), halt())
    async with scripted_machine(monkeypatch, cpu) as machine:
        await machine.run()
    assert cpu.log == ["write_context", "enter", "enter"]
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import attrs

import kvmaio.machine
from kvmaio import Context, Machine
from kvmaio.cpu import SEGMENTS, TABLES, CpuState, EntryResult, ModelSettings, PostedWrites
from kvmaio.decode import Reason
from kvmaio.kvm._native import ffi

__all__ = [
    "INTERRUPTED",
    "ScriptedCpu",
    "Step",
    "TIMER",
    "halt",
    "mmio_read",
    "mmio_write",
    "plain",
    "port_in",
    "port_out",
    "scripted_machine",
    "snapshot",
]

PAGE = 4096
Step = Callable[["ScriptedCpu"], EntryResult]
"""What one entry does: it fills the run page and says what came of the entry."""


def snapshot(context: Context) -> Context:
    """An independent copy, whose writes nobody watches."""
    parts = {name: attrs.evolve(getattr(context, name)) for name in SEGMENTS + TABLES}
    return attrs.evolve(context, **parts)


def INTERRUPTED(cpu: ScriptedCpu) -> EntryResult:
    """The entry is ended by a kick."""
    return EntryResult.INTERRUPTED


def TIMER(cpu: ScriptedCpu) -> EntryResult:
    """The entry is ended by its time limit."""
    return EntryResult.TIMER


def plain(reason: int, **parts: dict[str, Any]) -> Step:
    """An exit for `reason`; ``plain(9, fail_entry={"cpu": 1})`` fills that part of the page."""

    def step(cpu: ScriptedCpu) -> EntryResult:
        cpu.page.exit_reason = reason
        for part, fields in parts.items():
            for name, value in fields.items():
                setattr(getattr(cpu.page, part), name, value)
        return EntryResult.EXIT

    return step


def halt(if_flag: int = 0) -> Step:
    """HLT, with interrupts on or off."""

    def step(cpu: ScriptedCpu) -> EntryResult:
        cpu.page.exit_reason = Reason.HLT
        cpu.page.if_flag = if_flag
        cpu.registers.rflags = 2 | if_flag << 9
        return EntryResult.EXIT

    return step


def port_out(port: int, *values: int, size: int = 1) -> Step:
    """OUT, or REP OUTS with several values."""

    def step(cpu: ScriptedCpu) -> EntryResult:
        cpu.port(port, size, len(values), direction=1)
        for i, value in enumerate(values):
            cpu.io_words[size][PAGE // size + i] = value
        return EntryResult.EXIT

    return step


def port_in(port: int, *, size: int = 1) -> Step:
    """IN to AL, AX or EAX; the next entry completes it."""

    def complete(registers: Context) -> None:
        mask = (1 << 8 * size) - 1
        data = cpu_of[0].io_words[size][PAGE // size]
        registers.rax = registers.rax & ~mask | int(data) & mask

    cpu_of: list[ScriptedCpu] = []

    def step(cpu: ScriptedCpu) -> EntryResult:
        cpu_of[:] = [cpu]
        cpu.port(port, size, 1, direction=0)
        cpu.completion = complete
        return EntryResult.EXIT

    return step


def mmio_read(address: int, size: int) -> Step:
    """A load into RAX; the next entry completes it."""

    def step(cpu: ScriptedCpu) -> EntryResult:
        cpu.mmio(address, size, is_write=0)

        def complete(registers: Context) -> None:
            registers.rax = int(cpu.mmio_word[0]) & ((1 << 8 * size) - 1)

        cpu.completion = complete
        return EntryResult.EXIT

    return step


def mmio_write(address: int, size: int, value: int) -> Step:
    """A store."""

    def step(cpu: ScriptedCpu) -> EntryResult:
        cpu.mmio(address, size, is_write=1)
        cpu.mmio_word[0] = value
        return EntryResult.EXIT

    return step


class ScriptedCpu:
    """See `kvmaio.cpu.CpuModel`. When the steps are used up, the guest runs until kicked.

    Attributes:
        log: the calls of the engine, in order.
        limits: the time limit of each entry.
        registers: what a real model's registers would be.
        completion: what the next entry does to them first: the rest of a read.
        executed_ns: the host time that each entry is to have taken.
        pieces: what half entries do: the further exits of an access in several pieces.
        injected_for: so many more entries it takes until an injected event is taken.
    """

    kind = "scripted"
    resolution_ns = 50_000
    has_lapic = False
    counts_instructions = False
    settings = ModelSettings()

    def __init__(self, *steps: Step, executed_ns: int = 0) -> None:
        self._memory = ffi.new("char[]", 2 * PAGE)
        self.page = ffi.cast("struct kvm_run *", self._memory)
        raw = ffi.cast("uint8_t *", self.page)
        self.io_words = {
            1: raw,
            2: ffi.cast("uint16_t *", raw),
            4: ffi.cast("uint32_t *", raw),
        }
        self.mmio_word = ffi.cast("uint64_t *", self.page.mmio.data)
        self.steps = deque(steps)
        self.log: list[str] = []
        self.limits: list[int | None] = []
        self.injected: list[int] = []
        self.registers = Context()
        self.completion: Callable[[Context], None] | None = None
        self.executed_ns = executed_ns
        self.batch: deque[PostedWrites] = deque()
        self.pieces: deque[Step] = deque()
        self.injected_for = 0
        self._kicked = False
        self._result: EntryResult | None = None
        self._inside: asyncio.Future[EntryResult] | None = None

    # ---- for steps ---------------------------------------------------------------------

    def port(self, port: int, size: int, count: int, *, direction: int) -> None:
        page = self.page
        page.exit_reason = Reason.IO
        page.io.port, page.io.size, page.io.count = port, size, count
        page.io.direction, page.io.data_offset = direction, PAGE

    def mmio(self, address: int, size: int, *, is_write: int) -> None:
        page = self.page
        page.exit_reason = Reason.MMIO
        page.mmio.phys_addr, page.mmio.len, page.mmio.is_write = address, size, is_write

    # ---- CpuModel ----------------------------------------------------------------------

    def enter(self, limit_ns: int | None) -> EntryResult | None:
        self.log.append("enter")
        self.limits.append(limit_ns)
        self.injected_for = max(0, self.injected_for - 1)
        self._complete()
        if self._kicked or limit_ns == 0:
            self._kicked = False
            return EntryResult.INTERRUPTED
        if self.steps:
            return self.steps.popleft()(self)
        self._inside = asyncio.get_running_loop().create_future()
        return None

    def burst(self) -> None:
        return None

    def begin(self, limit_ns: int) -> None:
        self._result = self.enter(limit_ns)

    def finish(self) -> EntryResult:
        assert self._result is not None, "a guest that runs until it is kicked"
        return self._result

    async def left(self) -> EntryResult:
        assert self._inside is not None
        return await asyncio.shield(self._inside)

    def half_entry(self) -> EntryResult:
        self.log.append("half_entry")
        self._complete()
        return self.pieces.popleft()(self) if self.pieces else EntryResult.INTERRUPTED

    def has_injected_event(self) -> bool:
        return self.injected_for > 0

    def use_settings(self, settings: ModelSettings) -> None:
        self.settings = settings

    def kick(self) -> None:
        self.log.append("kick")
        if self._inside is not None and not self._inside.done():
            self._inside.set_result(EntryResult.INTERRUPTED)
        else:
            self._kicked = True

    def kick_run(self) -> None:
        if self._inside is not None and not self._inside.done():
            self._inside.set_result(EntryResult.INTERRUPTED)

    def read_context(self) -> Context:
        self.log.append("read_context")
        return snapshot(self.registers)

    def write_context(self, context: Context) -> None:
        self.log.append("write_context")
        assert self.completion is None, "registers pushed while an access is pending"
        self.registers = snapshot(context)

    def read_state(self) -> CpuState:
        return CpuState(self.read_context())

    def write_state(self, saved: CpuState) -> None:
        self.write_context(saved.context)

    def wait_for_sipi(self) -> None:
        self.log.append("wait_for_sipi")

    def start(self) -> None:
        self.log.append("start")

    def interrupt(self, vector: int) -> None:
        self.log.append(f"interrupt {vector:#x}")
        self.injected.append(vector)

    def nmi(self) -> None:
        self.log.append("nmi")

    @property
    def instructions(self) -> int | None:
        return None

    def recount(self, count: int | None) -> None:
        pass

    def is_waiting(self) -> bool:
        return False

    def has_posted(self) -> bool:
        return bool(self.batch)

    def posted_count(self) -> int:
        return sum(len(writes.values) for writes in self.batch)

    def posted(self, most: int | None) -> PostedWrites | None:
        while self.batch and not self.batch[0].values:
            self.batch.popleft()
        return self.batch[0] if self.batch else None

    def ring_doorbells(self) -> bool:
        return False

    def dump(self) -> str:
        return "scripted registers"

    def close(self) -> None:
        pass

    def _complete(self) -> None:
        completion, self.completion = self.completion, None
        if completion is not None:
            completion(self.registers)


class ScriptedPlatform:
    """See `kvmaio.platform.Platform`: a host that has nothing but these CPUs."""

    kind = "scripted"
    host_kind = None

    def __init__(self, cpus: tuple[ScriptedCpu, ...]) -> None:
        self._cpus = cpus

    def attach_memory(self, memory: Any) -> None:
        pass

    def create_cpus(self, count: int) -> list[Any]:
        assert count == len(self._cpus)
        return list(self._cpus)

    def set_cpuid(self, policy: Any) -> None:
        pass

    def enable_xcr0(self) -> None:
        pass

    def irq_sink(self, number: int) -> None:
        return None

    def save(self) -> dict[str, bytes | int]:
        return {}

    def check_state(self, saved: dict[str, bytes | int]) -> None:
        pass

    def restore_cpuid(self, saved: dict[str, bytes | int]) -> None:
        pass

    def restore(self, saved: dict[str, bytes | int]) -> None:
        pass

    def close(self) -> None:
        pass


def scripted_machine(monkeypatch: Any, *cpus: ScriptedCpu, **arguments: Any) -> Machine:
    """A machine, to be entered, whose vCPUs are `cpus`."""
    platform = ScriptedPlatform(cpus)
    monkeypatch.setattr(kvmaio.machine, "open_platform", lambda *arguments: platform)
    return Machine(memory="1M", vcpus=len(cpus), **arguments)
