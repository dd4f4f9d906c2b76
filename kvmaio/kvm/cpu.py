"""`KvmCpu`: the CPU model that runs guest code under KVM."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import RLock
from typing import TYPE_CHECKING, Any

from ..arrival import Arrival
from ..cpu import Context, CpuState, EntryResult, ModelSettings, PostedWrites
from ..dump import format_state
from ..errors import ConfigurationError, HostError
from . import state
from ._native import ffi, lib
from .breakpoints import check_breakpoints, put_breakpoints
from .burst import NativeBurst, ResidentBurst
from .context import context_from, get_context, set_context
from .counters import Counter, CounterConfig, cycle_counting, host_hz
from .cpuid import CpuidEntry
from .gate import check
from .hub import Hub
from .promotion import Promotion
from .resident import Residents
from .run_timer import chosen_timer, use_counter
from .stepping import SingleStepper
from .vm import KvmVm

if TYPE_CHECKING:
    from .fast import FastPaths

__all__ = ["KvmCpu"]

_log = logging.getLogger(__name__)

HALF_ENTRY_LIMIT_NS = 5_000_000_000
"""A half entry takes microseconds; a host that is this slow is stuck."""

MSI_ADDRESS = 0xFEE00000
"""Fixed delivery to one local APIC, whose id goes into bits 19:12 (SDM vol. 3A, 11.11.1)."""

LEAVE_LIMIT_NS = 10_000_000_000
"""How long a kicked guest may take to leave KVM_RUN."""

_RESULTS = {
    lib.KVMAIO_EXIT: EntryResult.EXIT,
    lib.KVMAIO_INTERRUPTED: EntryResult.INTERRUPTED,
    lib.KVMAIO_TIMER: EntryResult.TIMER,
}
_LATER = lib.KVMAIO_LATER
_EXIT_CODE, _EXIT = lib.KVMAIO_EXIT, EntryResult.EXIT

_SYNCED = lib.KVM_SYNC_X86_REGS | lib.KVM_SYNC_X86_SREGS
_SYNC_FOR = 64
"""Entries for which KVM goes on copying registers to the run page after they were last wanted."""


class KvmCpu:
    """One KVM vCPU; see `kvmaio.cpu.CpuModel`.

    KVM_RUN is called on the vCPU's native thread or, while it is resident, on the
    loop's, half entries included, and never here and there: moving a vCPU
    between threads costs 16 ms on kernels 6.1 and 6.12.
    """

    kind = "kvm"
    counts_instructions = False

    def __init__(self, hub: Hub, vm: KvmVm, index: int, has_lapic: bool) -> None:
        self._hub = hub
        self._vm = vm
        self._kvm = hub.kvm
        self.index = index
        self.has_lapic = has_lapic
        timer = chosen_timer()
        self.resolution_ns = timer.resolution_ns + hub.costs.shortest_run_ns
        self._timer_counter: Counter | None = None
        self._cycles: Counter | None = None
        self._tag = hub.add(self)
        out = ffi.new("kvmaio_vcpu **")
        try:
            check(
                lib.kvmaio_vcpu_create(
                    hub.handle, vm.fd, index, hub.kvm.vcpu_page_size, self._tag, out
                ),
                "KVM_CREATE_VCPU",
            )
            self.handle = out[0]
            try:
                check(lib.kvmaio_vcpu_start(self.handle), "pthread_create")
                if timer.event is not None:
                    self._timer_counter = use_counter(self.handle, timer.event)
                if cycle_counting().available:
                    self._count_cycles(CounterConfig.guest_cycles())
            except BaseException:
                lib.kvmaio_vcpu_stop(self.handle, LEAVE_LIMIT_NS)
                lib.kvmaio_vcpu_destroy(self.handle)
                raise
        except BaseException:
            hub.remove(self._tag)
            raise
        self.handle.entry_ns = hub.costs.entry_ns
        self.fd: int = self.handle.fd
        self.page: Any = self.handle.page
        raw = ffi.cast("uint8_t *", self.page)
        self.io_words = {
            1: raw,
            2: ffi.cast("uint16_t *", raw),
            4: ffi.cast("uint32_t *", raw),
        }
        self.mmio_word = ffi.cast("uint64_t *", self.page.mmio.data)
        self.cpuid: tuple[CpuidEntry, ...] = ()
        self.fast: FastPaths | None = None
        self._suspended_fast: Any = None
        self._stop: SingleStepper | None = None
        self._breakpoints: tuple[int, ...] = ()
        self._others_counting = True  # of the model before, for the one behind
        self._arrival = Arrival(hub.loop)
        self._inside = False
        self._promotion = Promotion(hub.costs)
        self._residents: Residents | None = None
        self._burst = NativeBurst(self)
        self.last_turn = 0  # of the loop's thread: `Residents` counts them
        self._began_limit_ns = 0
        self._sync_left = 0
        self._page_has_registers = False
        # Kicks come from any thread, and must not meet close(); from a signal's handler, too.
        self._lock = RLock()

    # ---- entering -------------------------------------------------------------

    def enter(self, limit_ns: int | None) -> EntryResult | None:
        if self._sync_left or self._page_has_registers:
            self._before_entry()
        host_ns = -1 if limit_ns is None else limit_ns
        if limit_ns is not None:
            self._choose_thread(limit_ns)
        elif self._residents is None and self._may_move_in():
            self._move_in()
        residents = self._residents
        if residents is None:
            self._inside = True
            lib.kvmaio_vcpu_enter(self.handle, host_ns)
            return None
        outcome = lib.kvmaio_resident_enter(residents.handle, self.handle, host_ns)
        if outcome == _EXIT_CODE and not self._sync_left:
            return _EXIT  # as `_result` does, without a call
        if outcome != _LATER:
            return self._result(outcome)
        self._park(residents)
        return None

    def burst(self) -> NativeBurst | None:
        return None if self._sync_left or self._page_has_registers else self._burst

    def burst_ended(self, outcome: int) -> EntryResult | None:
        """How the entry ended, or None if it goes on: see `ResidentBurst`."""
        residents = self._residents
        if outcome != _LATER:
            return self._result(outcome)
        assert residents is not None
        self._park(residents)
        return None

    @property
    def is_inside(self) -> bool:
        """Is a run under way?"""
        return self._inside

    async def left(self) -> EntryResult:
        while self._inside:
            await self._arrival
        self._promotion.left()
        return self._result(self.handle.outcome)

    def arrived(self) -> None:
        """Called by the hub or the residents: the guest has been left."""
        if self._residents is not None:
            self._promotion.has_waited(self.handle.inside_ns)
        self._inside = False
        self._arrival.set()

    @property
    def executed_ns(self) -> int:
        executed_ns: int = self.handle.executed_ns
        if self._cycles is not None and (cycles := self.handle.executed_cycles) >= 0:
            return int(cycles) * 1_000_000_000 // host_hz()  # only of its own thread
        return executed_ns

    def _count_cycles(self, config: CounterConfig) -> None:
        try:
            host_hz()
            self._cycles = Counter(config).attach(self.handle.tid)
        except HostError as error:  # too many are in use by now: CPU time will do
            _log.info("cycles are taken from the threads' CPU time: %s", error)
        else:
            self._cycles.enable()
            self.handle.cycles_fd = self._cycles.fd

    def half_entry(self) -> EntryResult:
        self._before_entry()
        if self._residents is not None:
            return self._result(lib.kvmaio_resident_half_entry(self.handle))
        return self._result(lib.kvmaio_vcpu_half_entry(self.handle, HALF_ENTRY_LIMIT_NS))

    def begin(self, limit_ns: int) -> None:
        self._before_entry()
        self._began_limit_ns = limit_ns
        lib.kvmaio_vcpu_begin(self.handle, limit_ns)

    def finish(self) -> EntryResult:
        timeout_ns = self._began_limit_ns + LEAVE_LIMIT_NS
        return self._result(lib.kvmaio_vcpu_finish(self.handle, timeout_ns))

    @property
    def instructions(self) -> int | None:
        return None  # `kvmaio.vcpu.instruction_events` counts, where somebody waits

    def recount(self, count: int | None) -> None:
        pass

    @property
    def settings(self) -> ModelSettings:
        return ModelSettings(self._others_counting, self._breakpoints)

    def use_settings(self, settings: ModelSettings) -> None:
        self._others_counting = settings.counting
        if settings.breakpoints != self._breakpoints:
            self.set_breakpoints(settings.breakpoints)

    def is_waiting(self) -> bool:
        return self.has_lapic and state.get_mp_state(self.fd) != lib.KVM_MP_STATE_RUNNABLE

    def has_injected_event(self) -> bool:
        return state.has_injected_event(self.fd)

    def kick(self) -> None:
        with self._lock:
            if self.handle is not None:
                run = lib.kvmaio_vcpu_current_run(self.handle)
                lib.kvmaio_vcpu_kick(self.handle, run)

    def kick_run(self) -> None:
        """End the entry that is under way; without one, do nothing."""
        if self._inside:
            lib.kvmaio_vcpu_kick(self.handle, self.handle.run_id)

    def _before_entry(self) -> None:
        if self._sync_left:
            self._sync_left -= 1
        elif self._page_has_registers:
            self.page.kvm_valid_regs = 0
            self._page_has_registers = False

    def _result(self, outcome: int) -> EntryResult:
        if outcome < 0:
            raise HostError("KVM_RUN", -outcome, _HINTS.get(-outcome, ""))
        if self._sync_left:
            self._page_has_registers = True
        return _RESULTS[outcome]

    # ---- residence ----------------------------------------------------------------

    @property
    def is_resident(self) -> bool:
        """Does the loop's thread run it?"""
        return self._residents is not None

    @property
    def moves(self) -> int:
        """How often it has moved between its own thread and the loop's."""
        return self._promotion.moves

    def _park(self, residents: Residents) -> None:
        self._inside = True
        self._promotion.waits(self.handle.inside_ns)
        residents.park(self)

    def still_waiting(self) -> None:
        """Called between waits on the loop's thread: a quiet guest moves back out."""
        residents = self._residents
        assert residents is not None
        promotion, handle = self._promotion, self.handle
        promotion.has_waited(handle.inside_ns)
        is_quiet = promotion.is_quiet(handle.inside_ns, residents.count)
        if is_quiet or promotion.loses_here(self._is_alone):
            self._move_out()

    def _may_move_in(self) -> bool:
        hub, promotion, handle = self._hub, self._promotion, self.handle
        has_room = hub.has_room()
        if not has_room and not hub.costs.moves_are_cheap:
            return False
        # Beside a local APIC of KVM's, a guest that halts waits within KVM: that is no work.
        worked_ns = None if self.has_lapic else handle.executed_ns
        if not promotion.exits_often(handle.inside_ns, worked_ns, hub.sharers, self._is_alone):
            return False
        return has_room or promotion.storms

    def _is_alone(self) -> bool:
        return not self._hub.has_others_inside(self)

    def _choose_thread(self, limit_ns: int) -> None:
        """Runs of some time, one after the other and of this vCPU alone, are steps."""
        if self._residents is not None:
            if self._promotion.stepped_enough(limit_ns, alone=self._hub.sharers == 1):
                self._move_out()
        elif limit_ns and self._hub.sharers == 1 and self._hub.waits_for_guests:
            timed_out = self.handle.outcome == lib.KVMAIO_TIMER
            if self._promotion.steps(limit_ns, timed_out):
                self._move_in()

    def _move_in(self) -> None:
        try:
            residents = self._hub.residents
            residents.move_in(self)
        except HostError as error:  # no timer to be had: it stays where it is
            _log.info("no guest on the loop's thread: %s", error)
            self._promotion.give_up()
            return
        self._residents = residents
        self._burst = ResidentBurst(self)
        self._promotion.moved()

    def _move_out(self) -> None:
        residents = self._residents
        if residents is not None:
            residents.move_out(self)
            self._residents, self._burst = None, NativeBurst(self)
            self._promotion.moved()

    # ---- state ------------------------------------------------------------------

    def read_context(self) -> Context:
        self._sync_left = _SYNC_FOR
        if self._page_has_registers:
            registers = self.page.s.regs
            return context_from(registers.regs, registers.sregs)
        # Whoever reads once reads again: have KVM copy them along for a while.
        self.page.kvm_valid_regs = _SYNCED
        return get_context(self.fd)

    def write_context(self, context: Context) -> None:
        set_context(self.fd, context)
        self.page.cr8 = context.cr8  # KVM takes CR8 from the run page at each entry
        self._page_has_registers = False

    def read_state(self) -> CpuState:
        return state.get_state(self._kvm, self._vm, self.fd)

    def write_state(self, saved: CpuState) -> None:
        state.set_state(self._kvm, self._vm, self.fd, saved)
        self.page.cr8 = saved.context.cr8
        self._page_has_registers = False

    @property
    def xsave_size(self) -> int:
        """Bytes of the XSAVE area."""
        return state.xsave_size(self._vm)

    @property
    def get_xsave(self) -> int:
        """The request that fetches it."""
        two: int = lib.KVM_GET_XSAVE2
        return two if self._vm.capability(lib.KVM_CAP_XSAVE2) else int(lib.KVM_GET_XSAVE)

    def registers_changed(self, cr8: int) -> None:
        """Somebody has given KVM other registers."""
        self.page.cr8 = cr8
        self._page_has_registers = False

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """Say what the guest's CPUID instruction tells; before the first entry."""
        state.set_cpuid(self.fd, entries)
        self.cpuid = tuple(entries)

    def enable_xcr0(self) -> None:
        """Set XCR0 to what the host offers of x87, SSE and AVX (SDM vol. 1, 13.3)."""
        offered = state.xsave_components(self._kvm)
        state.set_xcrs(self.fd, {0: offered & _X87_SSE_AVX})

    def wait_for_sipi(self) -> None:
        """Enter no guest code until the local APIC has had INIT and SIPI."""
        state.set_mp_state(self.fd, lib.KVM_MP_STATE_UNINITIALIZED)

    def start(self) -> None:
        """Enter guest code, as after a start-up IPI."""
        state.set_mp_state(self.fd, lib.KVM_MP_STATE_RUNNABLE)

    def interrupt(self, vector: int) -> None:
        if self.has_lapic:
            # KVM_INTERRUPT is refused beside KVM's own local APIC: go through that, as an MSI.
            self._vm.signal_msi(MSI_ADDRESS | self.index << 12, vector)
            return
        request = ffi.new("struct kvm_interrupt *", {"irq": vector})
        check(lib.kvmaio_ioctl(self.fd, lib.KVM_INTERRUPT, request), "KVM_INTERRUPT")

    def nmi(self) -> None:
        check(lib.kvmaio_ioctl_value(self.fd, lib.KVM_NMI, 0), "KVM_NMI")

    # ---- batched writes -----------------------------------------------------------

    def has_posted(self) -> bool:
        return self.fast is not None and self.fast.has_posted()

    def posted_count(self) -> int:
        return 0 if self.fast is None else self.fast.posted_count()

    def posted(self, most: int | None) -> PostedWrites | None:
        return None if self.fast is None else self.fast.posted(most)

    def ring_doorbells(self) -> bool:
        return self.fast is not None and self.fast.ring_doorbells()

    def suspend_fast_paths(self, suspend: bool) -> None:
        """Have every access come as an exit of its own; or no longer."""
        handle = self.handle
        if suspend and handle.fast != ffi.NULL:
            self._suspended_fast, handle.fast = handle.fast, ffi.NULL
        elif not suspend and self._suspended_fast is not None:
            handle.fast, self._suspended_fast = self._suspended_fast, None

    # ---- breakpoints and single steps ------------------------------------------------

    def set_breakpoints(self, addresses: Sequence[int]) -> None:
        """Have entries end with KVM_EXIT_DEBUG before the instructions at these linear addresses.

        They replace those set before. An entry at such an address may end at once.

        Raises:
            ConfigurationError: more than four.
        """
        check_breakpoints(addresses)
        self._breakpoints = tuple(addresses)
        if self._stop is None or not self._stop.is_on:
            self.apply_breakpoints()

    def apply_breakpoints(self) -> None:
        """Tell KVM of them, in place of single-stepping."""
        put_breakpoints(self.fd, self._breakpoints)

    @property
    def instruction_stop(self) -> SingleStepper:
        """What ends entries at an instruction count; see `kvmaio.vcpu.instruction_events`."""
        if self._stop is None:
            self._stop = SingleStepper(self)
        return self._stop

    @property
    def emulates_kernel_code(self) -> bool:
        """Is all but 64-bit CPL3 code run by KVM's instruction emulator?"""
        return self._kvm.emulates_kernel_code

    @property
    def is_debugged(self) -> bool:
        """Is it to stop at breakpoints, or single-stepped?"""
        return bool(self._breakpoints) or (self._stop is not None and self._stop.is_on)

    @property
    def can_debug(self) -> bool:
        """Can the host single-step the guest?"""
        return bool(self._kvm.capability(lib.KVM_CAP_SET_GUEST_DEBUG))

    def read_memory(self, address: int, size: int) -> bytes:
        """What lies at a guest-physical address; nothing where there is no memory."""
        try:
            return self._vm.memory.read(address, size)
        except ConfigurationError:
            return b""

    # ---- the end --------------------------------------------------------------------

    def dump(self) -> str:
        return format_state(self.read_state())

    def close(self) -> None:
        with self._lock:
            handle, self.handle = self.handle, None
        if handle is None:
            return
        if self._residents is not None:
            self._residents.forget(self, handle)
            self._residents = None
        check(lib.kvmaio_vcpu_stop(handle, LEAVE_LIMIT_NS), "pthread_join", _STUCK)
        self._hub.remove(self._tag)
        for counter in (self._timer_counter, self._cycles):
            if counter is not None:
                counter.close()
        lib.kvmaio_vcpu_destroy(handle)
        self.page = self.fast = None


_X87_SSE_AVX = 0b111

_STUCK = "the guest does not leave KVM_RUN; its thread is left behind"

_HINTS = {
    14: "a memory slot's host memory is gone (was it unmapped?)",
    22: "KVM refuses the vCPU's state; see the register dump",
}
