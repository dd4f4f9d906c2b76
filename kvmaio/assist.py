"""`Assist`: instructions that KVM cannot emulate are executed by the software CPU.

KVM ends an entry with an internal error where its emulator does not know an
instruction; where it emulates all of a guest's kernel (PVM), that is every
floating-point one. The software CPU works on the same memory: it takes the registers,
executes, and hands them back, and the guest goes on under KVM.

Where that happens again and again, the guest stays in software for some more
instructions each time, up to as many as take about as long as the assist itself: so a
stay that was not worth it has cost no more than it could have saved.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple, cast

from .bus import Bus
from .cpu import EntryResult
from .decode import Reason
from .errors import KvmaioError
from .exits import EndRun, Shutdown
from .memory import GuestMemory
from .timed_cpu import TimedCpu

if TYPE_CHECKING:
    from .kvm.cpu import KvmCpu
    from .soft.platform import SoftMachine
    from .vcpu import VCpu

__all__ = ["Assist", "Assisted", "NotAssisted"]

SOON_NS = 300_000
"""Assists that follow one another within this come thick and fast: a switch takes half of it."""

MOST_INSTRUCTIONS = 4096
"""How many of them a stay has at most; and how long it takes, accesses included:"""
MOST_NS = 1_000_000

MOST_PIECES = 1 << 16
"""Accesses of one instruction, whose device has failed."""

_ACCESSES = (Reason.IO, Reason.MMIO)

# What looks at more than registers and memory, by what its bytes contain: IRET (it unblocks
# NMIs); XGETBV, XSAVE and their kind; RDTSCP, SWAPGS; SYSCALL, SYSRET, SYSENTER, SYSEXIT; CPUID.
_looks_at_system = re.compile(rb"\xcf|\x0f[\x01\xae\x05\x07\x34\x35\xa2]").search
_VEX, _LEGACY = b"\xc4\xc5\x62", b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3"


class NotAssisted(KvmaioError):
    """The software CPU cannot execute the instruction either; nothing has changed."""


class Assisted(NamedTuple):
    """What an assist was.

    Attributes:
        address: the linear address of its first instruction.
        bits: 16, 32 or 64, as that one is to be decoded.
        code: its bytes, as far as KVM tells.
        instructions: how many were executed in software, this one included.
    """

    address: int
    bits: int
    code: bytes
    instructions: int


class Assist:
    """Serves one vCPU's emulation failures.

    Attributes:
        instructions: how many the last assist was to execute in software.
        may_stay: more than one? Not where other vCPUs could see that an engine's LOCK
            prefix is atomic to itself alone.
        on_end: told of each that is over, or None.
    """

    def __init__(
        self, vcpu: VCpu, memory: GuestMemory, pio: Bus, mmio: Bus, *, may_stay: bool = True
    ) -> None:
        self.instructions = 1
        self.may_stay = may_stay
        self.on_end: Callable[[Assisted], None] | None = None
        self._vcpu = vcpu
        self._memory = memory
        self._pio = pio
        self._mmio = mmio
        self._soft: SoftMachine | None = None
        self._model: object = None  # whose registers are borrowed
        self._ended_ns = 0
        self._next = 1

    def __call__(self, code: bytes) -> Awaitable[None] | None:
        """Execute what is at the guest's RIP; `code` is its bytes, as far as KVM tells.

        Returns what is to be awaited where it accesses a device.

        Raises:
            NotAssisted: see there.
            EndRun: the guest has shut down.
        """
        now_ns = time.monotonic_ns()
        soon = now_ns - self._ended_ns < SOON_NS
        self.instructions = 1
        self._borrow()
        if soon and self._stays_well():
            self.instructions = self._next = min(self._next * 2, MOST_INSTRUCTIONS)
        else:
            self._next = 1
        self._until_ns = now_ns + MOST_NS
        self._code = code
        self._take()
        handle = self._cpu.handle
        self._began_at = int(handle.ticks)
        handle.keeps_undefined, handle.undefined = True, False
        result = self._cpu.execute(self.instructions)
        if result is EntryResult.EXIT and self._failed:
            if self._is_undefined():
                handle.keeps_undefined = False
                result = self._cpu.execute(1)
            elif not self._executed:
                raise NotAssisted("nor can the software CPU")
        if result is EntryResult.EXIT and not self._failed:
            return self._serve()
        self._end()
        return None

    # ---- the registers, to and fro ------------------------------------------------------

    def _borrow(self) -> None:
        """Have the software CPU, made when it is first needed, for the vCPU's present model."""
        model = self._vcpu.model
        if model is self._model:
            return
        from .kvm.raw import RawRegisters
        from .soft.cpu import SoftCpu
        from .soft.loan import Loan
        from .soft.platform import SoftMachine

        if self._soft is None:
            self._soft = SoftMachine()
            self._soft.attach_memory(self._memory)
            self._cpu = SoftCpu(self._soft, self._vcpu.index, 1_000_000_000)
            self._loan = Loan(self._cpu)
            self._cpu.handle.forgets_handlers = True
        self._model = model
        self._simulated = isinstance(model, TimedCpu)
        kvm = cast("KvmCpu", model.model if isinstance(model, TimedCpu) else model)
        self._raw = RawRegisters(kvm)
        self._next = 1

    def _stays_well(self) -> bool:
        """Does the guest notice nothing of a stay of many instructions?

        It would of one beside KVM's own interrupt controllers, which are out of reach; and
        a debugger, an instruction count or simulated time, which is KVM's, would be missed.
        """
        kvm = self._raw.cpu
        return (
            self.may_stay
            and not (kvm.has_lapic or self._simulated or kvm.is_debugged)
            and self._vcpu.may_go_on
        )

    def _take(self) -> None:
        self._raw.fetch()
        self._at = self._raw.where()
        self._whole = bool(self.instructions > 1 or not self._code or _looks_at_system(self._code))
        # Others could change code, and back, while it is being translated.
        self._cpu.handle.keeps_code = self.may_stay and self.instructions == 1
        self._loan.take(self._raw, whole=self.instructions > 1)
        if self._whole:
            if (cpuid := self._raw.cpu.cpuid) is not self._cpu.cpuid:
                self._cpu.set_cpuid(cpuid)
            self._loan.take_system(self._raw)

    def _give_back(self) -> None:
        self._loan.give_back()
        self._raw.put_back()
        if self._whole:
            self._loan.give_system_back(self._raw)

    def _end(self) -> None:
        """The guest goes on under KVM."""
        self._give_back()
        executed = max(1, self._executed)
        self._vcpu.assist_ends(executed)
        if self.on_end is not None:
            self.on_end(Assisted(*self._at, self._code, executed))
        self._ended_ns = time.monotonic_ns()

    # ---- what came of it ----------------------------------------------------------------

    @property
    def _executed(self) -> int:
        return int(self._cpu.handle.ticks) - self._began_at

    @property
    def _failed(self) -> bool:
        return int(self._cpu.page.exit_reason) == Reason.INTERNAL_ERROR

    def _is_undefined(self) -> bool:
        """Has it met, first thing, an instruction that is a #UD, as far as one can know?

        Such as SSE before the guest has switched it on. What the engine has not got, such
        as AVX, is none; and what is farther on is for KVM to try.
        """
        if self._executed or not self._cpu.handle.undefined:
            return False
        return not is_vector_extension(self._code, self._at[1])

    async def _serve(self) -> None:
        """The software CPU has left the guest: answer, and go on if the stay is not over."""
        cpu, vcpu = self._cpu, self._vcpu
        result = EntryResult.EXIT
        while result is EntryResult.EXIT and cpu.page.exit_reason in _ACCESSES:
            vcpu.lend_registers(cpu)
            try:
                await self._access()
            except BaseException:
                if not vcpu.is_closed:
                    self._abandon()
                raise
            if vcpu.is_closed:
                return
            rest = self.instructions - self._executed
            if rest <= 1 or not vcpu.may_go_on or time.monotonic_ns() >= self._until_ns:
                result = cpu.half_entry()
            else:
                result = cpu.execute(rest)
        vcpu.take_registers_back()
        self._end()
        if result is EntryResult.EXIT:
            self._leave(cpu.page.exit_reason)

    def _leave(self, reason: int) -> None:
        if reason == Reason.HLT:
            self._vcpu.stats.numHalt += 1
            self._vcpu.halt()
        elif reason == Reason.SHUTDOWN:
            raise EndRun(Shutdown(self._vcpu.describe_registers()))
        # Else it has met what it cannot execute: KVM tries.

    async def _access(self) -> None:
        cpu, stats = self._cpu, self._vcpu.stats
        page, words = cpu.page, cpu.io_words
        self._vcpu.access_begins()
        if page.exit_reason == Reason.IO:
            stats.numIO += 1
            port, size = page.io.port, page.io.size
            first = page.io.data_offset // size
            if page.io.direction:
                await self._pio.write(port, size, words[size][first])
                return
            value = await self._pio.read(port, size)
            if not self._vcpu.is_closed:  # a handler may take its time to be cancelled
                words[size][first] = value
            return
        stats.numMMIO += 1
        address, size = page.mmio.phys_addr, page.mmio.len
        if page.mmio.is_write:
            value = cpu.mmio_word[0] & ((1 << 8 * size) - 1)
            await self._mmio.write(address, size, value)
            return
        value = await self._mmio.read(address, size)
        if not self._vcpu.is_closed:
            cpu.mmio_word[0] = value

    def _abandon(self) -> None:
        """A device has failed or ended the run: its access counts as served, as KVM's would."""
        pieces = 0
        while pieces < MOST_PIECES and self._cpu.half_entry() is EntryResult.EXIT:
            pieces += 1
        self._vcpu.take_registers_back()
        self._end()

    def close(self) -> None:
        """Idempotent."""
        soft, self._soft = self._soft, None
        if soft is not None:
            self._cpu.close()
            soft.close()


def is_vector_extension(code: bytes, bits: int) -> bool:
    """Does the instruction have a VEX or EVEX prefix (SDM vol. 2A, 2.3 and 2.7)?"""
    opcode = code.lstrip(_LEGACY)
    if len(opcode) < 2 or opcode[0] not in _VEX:
        return False
    return bits == 64 or opcode[1] >= 0xC0  # else LES, LDS or BOUND
