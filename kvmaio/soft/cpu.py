"""`SoftCpu`: the CPU model that executes guest code in software, instruction by instruction."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from threading import RLock
from typing import TYPE_CHECKING, Any

from ..arrival import Arrival
from ..cpu import Context, CpuState, EntryResult, ModelSettings, PostedWrites, SystemState
from ..dump import format_state
from ..errors import ConfigurationError, HostError
from ..kvm.context import context_from, store
from ..kvm.cpuid import CpuidEntry
from ..watchpoints import WatchHit, WatchKind, Watchpoint
from ._soft import ffi, lib
from .burst import SoftBurst
from .counting import SoftStop
from .kept import Kept
from .msrs import MSRS

if TYPE_CHECKING:
    from .platform import SoftMachine

__all__ = ["SoftCpu"]

_log = logging.getLogger(__name__)

INLINE_NS = 200_000
"""How long a run holds up the loop's thread before it moves to one of its own."""

TURN_NS = 1_000_000
"""How long runs may follow one another on the loop's thread before others have a turn."""

LEAVE_LIMIT_NS = 10_000_000_000
"""How long a kicked guest may take to stop: it looks before each instruction or block."""

_RESULTS = {
    lib.KVMAIO_SOFT_EXIT: EntryResult.EXIT,
    lib.KVMAIO_SOFT_INTERRUPTED: EntryResult.INTERRUPTED,
    lib.KVMAIO_SOFT_LIMIT: EntryResult.TIMER,
}
_LATER = lib.KVMAIO_SOFT_LATER

_XSAVE_SIZE = 4096
_XSTATE_BV = 512
_X87_SSE = 0b11


class SoftCpu:
    """One software CPU; see `kvmaio.cpu.CpuModel`.

    Its time is what it executes: an instruction takes one period of `clock_hz`.
    Runs begin on the loop's thread, since an exit then costs no change of threads; a
    long one goes on on a thread of its own.

    Attributes:
        index: from 0 on; also the APIC id.
        instruction_stop: ends entries at an instruction count.
    """

    kind = "soft"
    has_lapic = False
    counts_instructions = True

    def __init__(self, machine: SoftMachine, index: int, clock_hz: int) -> None:
        self.index = index
        self.host_hz = clock_hz
        self.resolution_ns = max(1, math.ceil(1_000_000_000 / clock_hz))
        self._machine = machine
        self._loop = asyncio.get_running_loop()
        out = ffi.new("kvmaio_soft **")
        assert machine.handle is not None
        error = lib.kvmaio_soft_create(machine.handle, out)
        if error:
            raise HostError("uc_open", -error, "the software CPU could not be made")
        self.handle = out[0]
        self.handle.inline_ns = INLINE_NS
        self.handle.turn_ns = TURN_NS
        self.handle.clock_hz = clock_hz
        # A loop with a time of its own, as for `kvmaio.clock.LoopClock`.
        self._simulated_ns: Callable[[], int] | None = getattr(self._loop, "time_ns", None)
        self.handle.by_wall_clock = self._simulated_ns is None
        self._start_tsc()
        self.page: Any = self.handle.page
        raw = ffi.cast("uint8_t *", self.page)
        self.io_words = {
            1: raw,
            2: ffi.cast("uint16_t *", raw),
            4: ffi.cast("uint32_t *", raw),
        }
        self.mmio_word = ffi.cast("uint64_t *", self.page.mmio.data)
        self.instruction_stop = SoftStop(self)
        self.cpuid: tuple[CpuidEntry, ...] = ()
        lib.kvmaio_soft_set_fpu(self.handle, _INITIAL_FPU)
        self._kept = Kept()
        self._arrival = Arrival(self._loop)
        self._inside = False
        self._began = 0  # the limit of what `begin()` began
        self._is_part = False
        self._counted_until: int | None = None  # its ticks, where it does not count since then
        self._breakpoints: tuple[int, ...] = ()
        self._ticks_are_ns = clock_hz == 1_000_000_000
        self._burst = SoftBurst(self)
        self._fd = self.handle.arrived_fd
        self._loop.add_reader(self._fd, self._arrived)
        self.xcr0 = 1  # x87 alone, as after reset
        # Kicks come from any thread, and must not meet close(); from a signal's handler, too.
        self._lock = RLock()

    # ---- the time stamp counter -------------------------------------------------

    def _start_tsc(self) -> None:
        """From 0 on, in step with the machine's other CPUs."""
        machine = self._machine
        if machine.born_ns is None:
            machine.born_ns = (self._simulated_ns or time.monotonic_ns)()
        self._see_time()
        self.handle.tsc_offset = -(machine.born_ns * self.host_hz // 1_000_000_000) % (1 << 64)

    def _see_time(self) -> None:
        """Set the clock ahead to simulated time, which goes on while nothing is executed."""
        if self._simulated_ns is not None:
            now = self._simulated_ns() * self.host_hz // 1_000_000_000
            self.handle.clock = max(self.handle.clock, now)

    # ---- entering -------------------------------------------------------------

    def enter(self, limit_ns: int | None) -> EntryResult | None:
        return self.outcome_of(lib.kvmaio_soft_enter(self.handle, self._limit(limit_ns)))

    def outcome_of(self, outcome: int) -> EntryResult | None:
        """The result of an entry that has just come back, or None if it goes on: as `enter()`."""
        if outcome != _LATER:
            return _RESULTS[outcome]
        self._inside = True
        if self.handle.yielded:
            self._loop.call_soon(self._go_on)
        else:
            self._hand_over()
        return None

    def burst(self) -> SoftBurst | None:
        limited = self.instruction_stop.until is not None
        return None if limited else self._burst

    def _go_on(self) -> None:
        if self.handle is None:
            return
        if lib.kvmaio_soft_go_on(self.handle) == _LATER:
            self._hand_over()
        else:
            self._inside = False
            self._arrival.set()

    def _hand_over(self) -> None:
        error = lib.kvmaio_soft_hand_over(self.handle)
        if error:
            self._inside = False
            raise HostError("pthread_create", -error, "the software CPU's thread")

    def _arrived(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        if self._inside:
            self._inside = False
            self._arrival.set()

    async def left(self) -> EntryResult:
        while self._inside:
            await self._arrival
        return _RESULTS[self.handle.outcome]

    def _limit(self, limit_ns: int | None) -> int:
        """How many instructions take `limit_ns`, the last of which may pass it; -1: no limit."""
        until = self.instruction_stop.until
        if limit_ns == 0:
            return 0
        if limit_ns is None and until is None:
            return -1
        ticks = int(self.handle.ticks)
        if limit_ns is not None:
            end = max(ticks + 1, self._count_at(self._time_ns(ticks) + limit_ns))
            until = end if until is None else min(end, until)
        assert until is not None
        return until - ticks

    def _time_ns(self, ticks: int) -> int:
        return int(ticks) * 1_000_000_000 // self.host_hz

    def _count_at(self, time_ns: int) -> int:
        return -(-time_ns * self.host_hz // 1_000_000_000)

    @property
    def executed_ns(self) -> int:
        """What the last entry executed, in the time of `clock_hz`; exact in the long run."""
        return self.elapsed_ns(self.handle.began, self.handle.ticks)

    def elapsed_ns(self, began: int, ended: int) -> int:
        """The time between two values of `ticks`, as they are counted at present."""
        if self._ticks_are_ns:
            return ended - began
        return self._time_ns(ended) - self._time_ns(began)

    def half_entry(self) -> EntryResult:
        return _RESULTS[lib.kvmaio_soft_half_entry(self.handle)]

    def begin(self, limit_ns: int) -> None:
        # Nothing yet: CPUs of one machine take turns anyway, and so their order is fixed.
        self._see_time()
        limit = self._limit(limit_ns)
        # Where there are others, a part first, and at the next time the rest.
        self._is_part = not self._is_part
        self._began = lib.kvmaio_soft_part(self.handle, limit) if self._is_part else limit

    def finish(self) -> EntryResult:
        result = _RESULTS[lib.kvmaio_soft_run(self.handle, self._began)]
        # By the count, not by the time: the slice ends the entry.
        if result is EntryResult.TIMER and self.has_reached_count:
            return EntryResult.INTERRUPTED
        return result

    @property
    def has_reached_count(self) -> bool:
        """Has the entry executed what `instruction_stop` is armed for?"""
        until = self.instruction_stop.until
        return until is not None and int(self.handle.ticks) >= until

    def is_waiting(self) -> bool:
        return False

    def kick(self) -> None:
        with self._lock:
            if self.handle is not None:
                lib.kvmaio_soft_kick(self.handle, lib.kvmaio_soft_current_run(self.handle))

    def kick_run(self) -> None:
        if self._inside:
            lib.kvmaio_soft_kick(self.handle, self.handle.run_id)

    def execute(self, instructions: int) -> EntryResult:
        """At most so many instructions, on this thread; TIMER if it was all of them."""
        return _RESULTS[lib.kvmaio_soft_run(self.handle, instructions)]

    # ---- counting ---------------------------------------------------------------

    @property
    def instructions(self) -> int | None:
        return None if self.instruction_stop.lost else self.instruction_stop.counted

    def recount(self, count: int | None) -> None:
        self.instruction_stop.reset(count)

    @property
    def counting(self) -> bool:
        """Exact instruction counts. Without, it is faster, and its time is the host's."""
        return bool(self.handle.counting)

    @counting.setter
    def counting(self, on: bool) -> None:
        ticks = int(self.handle.ticks)
        if on and self._counted_until not in (None, ticks):
            self.instruction_stop.reset(None)
        if on:
            self._counted_until = None
        elif self._counted_until is None:
            self._counted_until = ticks
        self._burst.settle()
        self.handle.counting = on
        self._ticks_are_ns = not on or self.host_hz == 1_000_000_000

    @property
    def settings(self) -> ModelSettings:
        return ModelSettings(self.counting, self._breakpoints)

    def use_settings(self, settings: ModelSettings) -> None:
        self.counting = settings.counting
        self.set_breakpoints(settings.breakpoints)

    # ---- state ------------------------------------------------------------------

    def read_context(self) -> Context:
        regs, sregs = ffi.new("struct kvm_regs *"), ffi.new("struct kvm_sregs *")
        lib.kvmaio_soft_get(self.handle, regs, sregs)
        return context_from(regs, sregs)

    def write_context(self, context: Context) -> None:
        regs, sregs = ffi.new("struct kvm_regs *"), ffi.new("struct kvm_sregs *")
        store(context, regs, sregs)
        lib.kvmaio_soft_set(self.handle, regs, sregs)

    def read_state(self) -> CpuState:
        msrs, xcrs, debug_registers, events = self.system()
        state = CpuState(
            context=self.read_context(),
            xsave=self._read_xsave(),
            xcrs=xcrs,
            debug_registers=debug_registers,
            events=events,
            mp_state=0,
            msrs=msrs,
        )
        return self._kept.give_back(state)

    def system(self) -> SystemState:
        """What there is beside the context and the vector registers."""
        events = ffi.new("struct kvm_vcpu_events *")
        lib.kvmaio_soft_get_events(self.handle, events)
        debug = ffi.new("uint64_t[6]")
        lib.kvmaio_soft_get_debug_registers(self.handle, debug)
        return SystemState(
            self._read_msrs(), {0: self.xcr0}, tuple(debug), bytes(ffi.buffer(events))
        )

    def _read_xsave(self) -> bytes:
        area = ffi.new("uint8_t[]", _XSAVE_SIZE)
        lib.kvmaio_soft_get_fpu(self.handle, area)
        area[_XSTATE_BV] = _X87_SSE
        return bytes(ffi.buffer(area))

    def _read_msrs(self) -> dict[int, int]:
        value = ffi.new("uint64_t *")
        msrs = {}
        self._see_time()
        for index in MSRS:
            if lib.kvmaio_soft_get_msr(self.handle, index, value) == 0:
                msrs[index] = int(value[0])
        return msrs

    def has_injected_event(self) -> bool:
        return bool(lib.kvmaio_soft_has_event(self.handle))

    def write_state(self, saved: CpuState) -> None:
        # Segments after the MSRs: among those are the bases of FS and GS, and EFER.
        self.set_msrs(saved.msrs)
        self.write_context(saved.context)
        if saved.xsave is not None:
            self.write_xsave(saved.xsave)
        if 0 in saved.xcrs:
            self.xcr0 = saved.xcrs[0] & _X87_SSE or 1
        self.set_debug_registers(saved.debug_registers)
        if saved.events is not None:
            self.set_events(saved.events)
        report = self._kept.keep(saved)
        if (
            report and report not in _reported
        ):  # once: a machine may be handed over a thousand times
            _reported.add(report)
            _log.warning("the software CPU keeps aside what it cannot hold: %s", report)

    def set_debug_registers(self, values: Sequence[int]) -> None:
        """Put DR0 to DR3, DR6, DR7."""
        lib.kvmaio_soft_set_debug_registers(self.handle, ffi.new("uint64_t[6]", values))

    def set_events(self, events: bytes) -> None:
        """Put kvm_vcpu_events.

        Raises:
            ConfigurationError: it is of another size.
        """
        structure = ffi.new("struct kvm_vcpu_events *")
        buffer = ffi.buffer(structure)
        if len(events) != len(buffer):
            raise ConfigurationError(
                f"{len(events)} bytes of events, where {len(buffer)} are expected"
            )
        buffer[:] = events
        lib.kvmaio_soft_set_events(self.handle, structure)

    def write_xsave(self, xsave: bytes) -> None:
        """x87 and SSE; a component that is not marked present is in its initial state."""
        lib.kvmaio_soft_set_xsave(self.handle, xsave.ljust(_XSAVE_SIZE, b"\0"))

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """Say what the guest's CPUID instruction tells."""
        self.cpuid = tuple(entries)
        table = ffi.new("struct kvmaio_soft_cpuid[]", len(entries))
        for slot, entry in enumerate(entries):
            table[slot].function, table[slot].index = entry.function, entry.index
            table[slot].has_index = entry.flags & 1
            for name in ("eax", "ebx", "ecx", "edx"):
                setattr(table[slot], name, getattr(entry, name))
        if lib.kvmaio_soft_set_cpuid(self.handle, table, len(entries)):
            raise ConfigurationError(f"{len(entries)} CPUID entries are too many")

    def own_cpuid(self, function: int, index: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX and EDX as the engine itself would answer."""
        entry = ffi.new("struct kvmaio_soft_cpuid *", {"function": function, "index": index})
        lib.kvmaio_soft_own_cpuid(self.handle, entry)
        return entry.eax, entry.ebx, entry.ecx, entry.edx

    @property
    def xcr0(self) -> int:
        """Which components XSAVE saves."""
        return int(lib.kvmaio_soft_get_xcr0(self.handle))

    @xcr0.setter
    def xcr0(self, value: int) -> None:
        lib.kvmaio_soft_set_xcr0(self.handle, value)

    def enable_xcr0(self) -> None:
        """Set XCR0 to x87 and SSE: there is no AVX."""
        self.xcr0 = _X87_SSE

    def set_msrs(self, msrs: Mapping[int, int]) -> None:
        """Put MSRs, those that there are."""
        self._see_time()
        for index, value in msrs.items():
            if index in MSRS:
                lib.kvmaio_soft_set_msr(self.handle, index, value)

    def wait_for_sipi(self) -> None:
        """Nothing: only a model with a local APIC of its own is asked to."""

    def start(self) -> None:
        """Nothing, as above."""

    def interrupt(self, vector: int) -> None:
        lib.kvmaio_soft_interrupt(self.handle, vector)

    def nmi(self) -> None:
        lib.kvmaio_soft_nmi(self.handle)

    def translate(self, linear: int) -> int | None:
        """The guest-physical address behind a linear one, or None where there is none."""
        physical: int = lib.kvmaio_soft_translate(self.handle, linear)
        return None if physical == (1 << 64) - 1 else physical

    # ---- debugging -----------------------------------------------------------------

    def set_breakpoints(self, addresses: Sequence[int]) -> None:
        """Linear addresses where an entry ends with a `DebugEventExit`, before the instruction."""
        table = ffi.new("uint64_t[]", list(addresses))
        if lib.kvmaio_soft_set_breakpoints(self.handle, table, len(addresses)):
            raise ConfigurationError(f"{len(addresses)} breakpoints are too many")
        self._breakpoints = tuple(addresses)

    def set_watchpoints(self, watchpoints: Sequence[Watchpoint]) -> None:
        """Areas at whose accesses an entry ends with a `DebugEventExit`, behind the instruction.

        A repeated string instruction is left behind the element. An access by another
        linear address of the same memory counts. Memory accesses take about twice as long
        while there are any.

        Raises:
            ConfigurationError: too many, or an area that is empty.
        """
        table = ffi.new("struct kvmaio_soft_watchpoint[]", len(watchpoints))
        for slot, point in zip(table, watchpoints, strict=True):
            if not 0 < point.size < 1 << 64 or not point.kind:
                raise ConfigurationError(f"nothing to watch: {point}")
            slot.address = point.address % (1 << 64)
            slot.size, slot.kinds = point.size, point.kind.value
        error = lib.kvmaio_soft_set_watchpoints(self.handle, table, len(watchpoints))
        if error == -errno.E2BIG:
            raise ConfigurationError(f"{len(watchpoints)} watchpoints are too many")
        if error:
            raise HostError("uc_hook_add", -error, "the accesses cannot be watched")

    @property
    def watch_hits(self) -> tuple[WatchHit, ...]:
        """The watchpoints whose hits ended the last entry."""
        handle = self.handle
        hits = handle.hits[0 : handle.hit_count] if handle.hit_count else ()
        return tuple(WatchHit(int(hit.address), WatchKind(hit.kinds)) for hit in hits)

    # ---- what KVM batches, and this model does not ------------------------------------

    def has_posted(self) -> bool:
        return False

    def posted_count(self) -> int:
        return 0

    def posted(self, most: int | None) -> PostedWrites | None:
        return None

    def ring_doorbells(self) -> bool:
        return False

    # ---- the end --------------------------------------------------------------------

    def dump(self) -> str:
        return format_state(self.read_state())

    def close(self) -> None:
        with self._lock:
            handle, self.handle = self.handle, None
        if handle is None:
            return
        error = lib.kvmaio_soft_stop(handle, LEAVE_LIMIT_NS)
        if error:
            raise HostError("pthread_join", -error, "the software CPU does not stop")
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        lib.kvmaio_soft_destroy(handle)
        self.page = None


_reported: set[str] = set()

# FCW and MXCSR after reset (SDM vol. 1, 8.1.5 and 10.2.3.1).
_INITIAL_FPU = struct.pack("<H22xI484x", 0x37F, 0x1F80)
