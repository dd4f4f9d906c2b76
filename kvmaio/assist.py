"""`Assist`: instructions that KVM cannot emulate are executed by the software CPU.

KVM ends an entry with an internal error where its emulator does not know an
instruction; where it emulates all of a guest's kernel (PVM), that is every
floating-point one. The software CPU works on the same memory: it takes the registers,
executes, and hands them back, and the guest goes on under KVM.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from .bus import Bus
from .cpu import EntryResult
from .decode import Reason
from .disassembly import disassemble_next
from .errors import EmulationFailure
from .exits import EndRun, Shutdown
from .memory import GuestMemory

if TYPE_CHECKING:
    from .soft.platform import SoftMachine
    from .vcpu import VCpu

__all__ = ["Assist"]

_log = logging.getLogger(__name__)

SOON_NS = 300_000
"""Assists that follow one another within this come thick and fast: a switch takes half of it."""

MOST_INSTRUCTIONS = 4096
"""How long the guest stays in software at most, where they do."""

# Instructions that look at more than registers and memory, by what their bytes contain.
_XCR0 = (b"\x0f\x01\xd0", b"\x0f\x01\xd1", b"\x0f\xae", b"\x0f\xc7")  # XGETBV, XSETBV, XSAVE
_CLOCK = b"\x0f\x01\xf9"  # RDTSCP


class Assist:
    """Serves one vCPU's emulation failures.

    Attributes:
        instructions: how many the last assist was to execute in software.
    """

    def __init__(self, vcpu: VCpu, memory: GuestMemory, pio: Bus, mmio: Bus) -> None:
        self.instructions = 1
        self._vcpu = vcpu
        self._memory = memory
        self._pio = pio
        self._mmio = mmio
        self._soft: SoftMachine | None = None
        self._model: object = None  # whose registers are borrowed
        self._ended_ns = 0

    def __call__(self, code: bytes) -> Awaitable[None] | None:
        """Execute what is at the guest's RIP; `code` is its bytes, as far as KVM tells.

        Returns what is to be awaited where it accesses a device.

        Raises:
            EmulationFailure: the software CPU cannot execute it either.
            EndRun: it has shut the guest down.
        """
        soon = time.monotonic_ns() - self._ended_ns < SOON_NS
        self.instructions = min(self.instructions * 2, MOST_INSTRUCTIONS) if soon else 1
        self._borrow()
        several = self.instructions > 1 or not code
        if _log.isEnabledFor(logging.DEBUG):
            lines = disassemble_next(self._memory, self._vcpu.context, 1)
            _log.debug("%s in software: %s", self._vcpu.name, "; ".join(lines) or code.hex(" "))
        self._raw.fetch()
        self._loan.take(self._raw, whole=several)
        self._with_xcr0 = several or any(part in code for part in _XCR0)
        if self._with_xcr0:
            self._xcr0 = self._cpu.xcr0 = self._raw.xcr0
        if several or _CLOCK in code:
            self._cpu.set_msrs(self._raw.clock)
        if self._cpu.execute(self.instructions) is EntryResult.EXIT:
            return self._serve()
        self._give_back()
        return None

    def _borrow(self) -> None:
        model: Any = self._vcpu.model
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
        self._model = model
        self._raw = RawRegisters(getattr(model, "model", model))  # simulated time's is around it

    def _give_back(self) -> None:
        self._loan.give_back()
        self._raw.put_back()
        if self._with_xcr0 and self._cpu.xcr0 != self._xcr0:
            self._raw.xcr0 = self._cpu.xcr0
        self._ended_ns = time.monotonic_ns()

    async def _serve(self) -> None:
        """The software CPU has left the guest: answer, and complete the instruction."""
        page, words = self._cpu.page, self._cpu.io_words
        result = EntryResult.EXIT
        while result is EntryResult.EXIT and page.exit_reason in (Reason.IO, Reason.MMIO):
            if page.exit_reason == Reason.IO:
                io = page.io
                first = io.data_offset // io.size
                if io.direction:
                    await self._pio.write(io.port, io.size, words[io.size][first])
                else:
                    words[io.size][first] = await self._pio.read(io.port, io.size)
            elif page.mmio.is_write:
                value = self._cpu.mmio_word[0] & ((1 << 8 * page.mmio.len) - 1)
                await self._mmio.write(page.mmio.phys_addr, page.mmio.len, value)
            else:
                answer = await self._mmio.read(page.mmio.phys_addr, page.mmio.len)
                self._cpu.mmio_word[0] = answer
            result = self._cpu.half_entry()
        self._give_back()
        if result is not EntryResult.EXIT:
            return
        if page.exit_reason == Reason.HLT:
            self._vcpu.halt()
        elif page.exit_reason == Reason.SHUTDOWN:
            raise EndRun(Shutdown(self._vcpu.describe_registers()))
        else:
            raise EmulationFailure(
                "neither KVM nor the software CPU can execute this instruction",
                suberror=1,
                data=(),
            )

    def close(self) -> None:
        """Idempotent."""
        soft, self._soft = self._soft, None
        if soft is not None:
            self._cpu.close()
            soft.close()
