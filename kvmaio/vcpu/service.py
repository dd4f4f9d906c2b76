"""`Service`: carries an exit to the device, handler or outcome that answers it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from ..assist import Assist, Assisted, NotAssisted
from ..bus import Bus
from ..cpu import PostedWrites
from ..decode import Reason
from ..disassembly import instruction_name
from ..dump import format_context
from ..errors import EmulationFailure, GuestError
from ..exits import (
    EndRun,
    FailEntryExit,
    HypercallExit,
    InternalErrorExit,
    Shutdown,
    Stopped,
    SystemEventExit,
    reported_code,
)
from ..linear import code_bits
from ..suspension import Suspended, a_number, drive

if TYPE_CHECKING:
    from ..cpu import CpuModel
    from .vcpu import VCpu

__all__ = ["HypercallHandler", "Service"]

HypercallHandler = Callable[[HypercallExit], "int | Awaitable[int]"]
"""Answers a hypercall; the result goes to the guest's RAX."""


class Service:
    """Serves the exits of one vCPU. It sets no state itself: that is the vCPU's."""

    def __init__(self, vcpu: VCpu, pio: Bus, mmio: Bus) -> None:
        self._vcpu = vcpu
        self._stats = vcpu.stats
        self.reason = 0  # of the exit last counted
        self._pio = pio
        self._mmio = mmio
        self.hypercall: HypercallHandler | None = None
        self.assist: Assist | None = None
        self.on_debug: Callable[[VCpu], None] | None = None
        self.use_model(vcpu.model)
        self._others: dict[int, Callable[[], Awaitable[None] | None]] = {
            Reason.HLT: self._halt,
            Reason.IRQ_WINDOW_OPEN: self._nothing,  # the next entry injects
            Reason.INTR: self._nothing,
            Reason.SET_TPR: self._nothing,
            Reason.IOAPIC_EOI: self._nothing,
            Reason.HYPERCALL: self._hypercall,
            Reason.SHUTDOWN: self._shutdown,
            Reason.SYSTEM_EVENT: self._system_event,
            Reason.INTERNAL_ERROR: self._internal_error,
            Reason.FAIL_ENTRY: self._fail_entry,
            Reason.DEBUG: self._debug_event,
        }

    def use_model(self, model: CpuModel) -> None:
        """The exits come from `model` from now on."""
        # References into the run page, made once: making one costs more than a read through it.
        page = model.page
        self._page = page
        self._io = page.io
        self._mmio_part = page.mmio
        self._words = model.io_words
        self._mmio_word = model.mmio_word

    def count(self) -> bool:
        """Count the exit that has just come; must the next entry complete it?"""
        self.reason = reason = self._page.exit_reason
        if reason == _IO:
            self._stats.numIO += 1
        elif reason == _MMIO:
            self._stats.numMMIO += 1
        else:
            return self._count_other(reason)
        return True

    def _count_other(self, reason: int) -> bool:
        if reason == Reason.HLT:
            self._stats.numHalt += 1
        elif reason == Reason.HYPERCALL:
            self._stats.numHypercalls += 1
        return reason in _ALSO_COMPLETED

    def is_final(self) -> bool:
        """Is the exit one that nothing answers, and that the next run would only report again?"""
        if self.reason == Reason.INTERNAL_ERROR and self.assist is not None:
            return bool(self._page.internal.suberror != _EMULATION)
        return self.reason not in _ANSWERED

    def begin(self) -> Awaitable[None] | None:
        """Serve the exit: None when it is served, else what to await.

        Raises:
            GuestError: nothing can answer it.
            EndRun: it ends the run.
        """
        reason = self.reason
        if reason == _IO:
            return self._serve_io()
        if reason == _MMIO:
            return self._serve_mmio()
        return self._others.get(reason, self._unexpected)()

    async def flush(self, lock: asyncio.Lock, most: int | None = None) -> bool:
        """Serve the batched writes in order and undisturbed, then the doorbells; were there any?

        A doorbell means that there is something to look at: it must not come
        before the writes that put it there; that it may come late is its nature.

        Args:
            most: stop behind so many writes: a guest that goes on makes others meanwhile, and each
                of those would be taken by itself. None where there may be doorbells.
        """
        served = 0
        async with lock:
            while True:
                left = None if most is None else max(most - served, 0)
                if (writes := self._vcpu.model.posted(left)) is None:
                    break
                waiting = len(writes.values)
                bus = self._pio if writes.is_pio else self._mmio
                if writes.time_ns:
                    self._stats.numCoalescedMMIO += 1
                    value = writes.values.popleft()
                    await bus.write_stamped(writes.address, writes.size, value, writes.time_ns)
                else:
                    await self._serve_posted(bus, writes)
                served += waiting - len(writes.values)
            if rung := self._vcpu.model.ring_doorbells():
                await asyncio.sleep(0)  # the device's task hears of it before what comes next
        return rung or served > 0

    async def _serve_posted(self, bus: Bus, writes: PostedWrites) -> None:
        size, values, stats = writes.size, writes.values, self._stats
        target = bus.resolve(writes.address, size)
        write, offset, update, changes = target.write, target.offset, target.update, bus.changes
        while values and bus.changes == changes:
            value = values.popleft()
            stats.numCoalescedMMIO += 1
            pending = write(offset, size, value)
            if pending is not None:
                await pending
            if update is not None:
                update()

    async def posted_first(self, lock: asyncio.Lock) -> None:
        """Serve the batched writes that came before the exit, then the exit."""
        await self.flush(lock)
        pending = self.begin()
        if pending is not None:
            rest = drive(pending)
            if isinstance(rest, Suspended):
                await self._vcpu.finish_service(rest)  # a wait of its own, with its own state

    # ---- accesses -----------------------------------------------------------------

    def _serve_io(self) -> Awaitable[None] | None:
        io = self._io
        size = io.size
        words = self._words[size]
        first = io.data_offset // size
        self._vcpu.access_begins()
        if io.count != 1:
            return self._serve_string(io.port, size, io.count, io.direction, words, first)
        if io.direction:
            return self._pio.begin_write(io.port, size, words[first])
        value = self._pio.begin_read(io.port, size)
        if not isinstance(value, int):
            value = drive(value)
            if not isinstance(value, int):
                return self.store(value, words, first, _MASKS[size])
        words[first] = value & _MASKS[size]
        return None

    async def _serve_string(
        self, port: int, size: int, count: int, is_write: int, words: Any, first: int
    ) -> None:
        """REP INS and OUTS: `count` accesses to one port, in the order of the data."""
        for index in range(first, first + count):
            if is_write:
                pending = self._pio.begin_write(port, size, words[index])
                if pending is not None:
                    await pending
            else:
                value = self._pio.begin_read(port, size)
                if not isinstance(value, int):
                    value = a_number(await value)
                if self._vcpu.is_closed:
                    return
                words[index] = value & _MASKS[size]

    def _serve_mmio(self) -> Awaitable[None] | None:
        mmio = self._mmio_part
        size = mmio.len
        self._vcpu.access_begins()
        if mmio.is_write:
            value = self._mmio_word[0] & _MASKS[size]
            return self._mmio.begin_write(mmio.phys_addr, size, value)
        value = self._mmio.begin_read(mmio.phys_addr, size)
        if not isinstance(value, int):
            value = drive(value)
            if not isinstance(value, int):
                return self.store(value, self._mmio_word, 0, _MASKS[size])
        self._mmio_word[0] = value & _MASKS[size]
        return None

    async def store(self, rest: Suspended[int], words: Any, index: int, mask: int) -> None:
        """Wait for the rest of a read handler, and put its answer where the guest finds it."""
        value = a_number(await rest if isinstance(rest, Suspended) else rest)
        if not self._vcpu.is_closed:  # a handler may take its time to be cancelled
            words[index] = value & mask

    # ---- everything else -------------------------------------------------------------

    def _nothing(self) -> None:
        return None

    def _halt(self) -> None:
        self._vcpu.halt()

    def _hypercall(self) -> Awaitable[None] | None:
        exit_ = self._vcpu.last_exit()
        assert isinstance(exit_, HypercallExit)
        if self.hypercall is None:
            raise GuestError(
                f"hypercall {exit_.number:#x}, and nobody answers hypercalls; "
                "set machine.hypercall to a handler"
            )
        self._vcpu.hypercall_begins()
        result = self.hypercall(exit_)
        if isinstance(result, int):
            self._page.hypercall.ret = result & _WORD
            return None
        return self._finish_hypercall(result)

    async def _finish_hypercall(self, result: Awaitable[int]) -> None:
        answer = await result & _WORD
        if not self._vcpu.is_closed:
            self._page.hypercall.ret = answer

    def _shutdown(self) -> None:
        raise EndRun(Shutdown(self.describe_registers()))

    def _system_event(self) -> None:
        exit_ = self._vcpu.last_exit()
        assert isinstance(exit_, SystemEventExit)
        if exit_.type == 1:
            raise EndRun(Stopped("powered off"))
        if exit_.type == 2:
            raise EndRun(Stopped("reset"))
        raise GuestError(f"the guest reported a system event of type {exit_.type} (3 is a crash)")

    def _internal_error(self) -> Awaitable[None] | None:
        internal, is_kvm = self._page.internal, self._vcpu.model.kind == "kvm"
        advice = _NO_ASSIST if is_kvm and internal.suberror == _EMULATION else ""
        if internal.suberror == _EMULATION and is_kvm and self.assist is not None:
            code = reported_code(tuple(internal.data[0 : min(internal.ndata, 4)]))
            self._vcpu.assist_begins()
            try:
                return self.assist(code)
            except NotAssisted as refused:
                advice = f"; {refused}"
        exit_ = self._vcpu.last_exit()
        assert isinstance(exit_, InternalErrorExit)
        who = "KVM" if is_kvm else "the software CPU"
        what = f"{who} cannot emulate an instruction"
        if exit_.suberror != _EMULATION:
            what = f"{who}: internal error"
        code = exit_.instruction
        where = f": bytes {code.hex(' ')}" if code else ""
        if code and (name := instruction_name(code, code_bits(self._vcpu.context))) is not None:
            where += f", {name}"
        raise EmulationFailure(
            f"{what}{where} (suberror {exit_.suberror}){advice}",
            suberror=exit_.suberror,
            data=exit_.data,
            instruction=code,
        )

    def _fail_entry(self) -> None:
        exit_ = self._vcpu.last_exit()
        assert isinstance(exit_, FailEntryExit)
        raise GuestError(
            "the hardware refused to enter the guest, reason "
            f"{exit_.hardware_entry_failure_reason:#x}; its state is impossible, see the dump"
        )

    def _debug_event(self) -> None:
        if self.on_debug is None:
            self._unexpected()
        else:
            self.on_debug(self._vcpu)

    def _unexpected(self) -> None:
        raise GuestError(f"an exit that nothing answers: {self._vcpu.last_exit()}")

    @property
    def on_assist(self) -> Callable[[Assisted], None] | None:
        """What is told of each assist, if somebody is."""
        return None if self.assist is None else self.assist.on_end

    @on_assist.setter
    def on_assist(self, told: Callable[[Assisted], None] | None) -> None:
        if self.assist is not None:
            self.assist.on_end = told

    def close(self) -> None:
        """With the vCPU. Idempotent."""
        if self.assist is not None:
            self.assist.close()

    # ---- reports ---------------------------------------------------------------------

    def describe_registers(self) -> str:
        """A register dump for an error or outcome."""
        return format_context(self._vcpu.context)

    def describe_exit(self) -> str:
        """The exit in words, such as ``a write to pio 0x3f8 (1 byte)``."""
        reason = self._page.exit_reason
        if reason == Reason.IO:
            kind = "a write to" if self._io.direction else "a read from"
            return f"{kind} pio {self._io.port:#x} ({_bytes(self._io.size)})"
        if reason == Reason.MMIO:
            kind = "a write to" if self._mmio_part.is_write else "a read from"
            return f"{kind} mmio {self._mmio_part.phys_addr:#x} ({_bytes(self._mmio_part.len)})"
        return str(self._vcpu.last_exit())


_EMULATION = 1  # KVM_INTERNAL_ERROR_EMULATION
_NO_ASSIST = '; with cpu="auto" and kvmaio[soft] installed, the software CPU executes it'


def _bytes(count: int) -> str:
    return "1 byte" if count == 1 else f"{count} bytes"


_WORD = (1 << 64) - 1
_MASKS = {size: (1 << 8 * size) - 1 for size in range(1, 9)}

# Plain ints: an enum's member costs a look-up on the hot path.
_IO = int(Reason.IO)
_MMIO = int(Reason.MMIO)

_ANSWERED = frozenset(
    {
        *(Reason.IO, Reason.MMIO, Reason.HLT, Reason.HYPERCALL, Reason.SYSTEM_EVENT),
        *(Reason.IRQ_WINDOW_OPEN, Reason.INTR, Reason.SET_TPR, Reason.IOAPIC_EOI),
        Reason.SHUTDOWN,
    }
)
"""With these, something outside of the vCPU follows from the exit."""

# KVM completes these, too, at the next entry: by writing to the registers.
_ALSO_COMPLETED = frozenset({Reason.HYPERCALL, Reason.X86_RDMSR, Reason.X86_WRMSR})
