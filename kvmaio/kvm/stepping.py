"""`SingleStepper`: counts a guest's instructions one by one (KVM_SET_GUEST_DEBUG).

What KVM really does, seen under PVM (its instruction emulator) and under kvm_amd:

=====================  ================================  ================================
the instruction        PVM, emulated modes               kvm_amd
=====================  ================================  ================================
a plain one            KVM_EXIT_DEBUG behind it          the same
OUT                    its exit, RIP behind it; no       its exit, RIP at it; DEBUG when
                       DEBUG of its own                  the next entry completes it
IN, MMIO read          its exit, RIP at it; DEBUG when   the same
                       the next entry completes it
MMIO write             its exit, RIP behind it; no       the same, and stepping is off
                       DEBUG of its own                  from then on
HLT                    DEBUG, and the halt is lost       its exit; stepping is off
REP, no exit           DEBUG with the same RIP, then     DEBUG once per iteration
                       one behind it
STI, MOV SS            DEBUG behind it                   MOV SS: DEBUG behind the *next*
                                                         one; STI too under emulation
INT n, an interrupt    DEBUG in the handler              the handler runs freely; DEBUG
                                                         after its IRET
64-bit CPL3            stepping breaks the guest         as any
=====================  ================================  ================================

Hence: stepping is switched on anew before every entry; an exit's access is
completed by a half entry of its own; an instruction counts when RIP has left it;
a REP string instruction counts once, and an I/O instruction like any other; a
halt that KVM lost is given back; and what would run uncounted is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cpu import Context, EntryResult
from ..errors import ConfigurationError
from ._native import ffi, lib
from .breakpoints import set_debug
from .gate import check

if TYPE_CHECKING:
    from .cpu import KvmCpu

__all__ = ["SingleStepper"]

_EFER_LMA = 1 << 10
_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_STRINGS = frozenset(b"\x6c\x6d\x6e\x6f\xa4\xa5\xa6\xa7\xaa\xab\xac\xad\xae\xaf")
_HLT, _STI, _POP_SS, _MOV_SS = 0xF4, 0xFB, 0x17, 0x8E
_TRAPS = {0xCC: "INT3", 0xCD: "INT n", 0xCE: "INTO", 0xF1: "INT1"}
_TRAPS_0F = {0x05: "SYSCALL", 0x34: "SYSENTER"}


class SingleStepper:
    """One KVM vCPU's `kvmaio.vcpu.instruction_events.InstructionStop`: exact, one entry each."""

    counts_always = lost = False

    def __init__(self, cpu: KvmCpu) -> None:
        self._cpu = cpu
        self._emulated = cpu.emulates_kernel_code
        self.loses_interrupts = not self._emulated
        self.counted = 0
        self._debug = ffi.new("struct kvm_guest_debug *")
        self.is_on = False
        self._at = 0  # linear address of the instruction that is being stepped
        self._shadow_end: int | None = None  # it holds off the trap, and ends here
        self._in_access = False  # its exit has come, and it is not completed

    def refusal(self) -> str | None:
        if not self._cpu.can_debug:
            return "this host's KVM lacks KVM_CAP_SET_GUEST_DEBUG, and it counts no instructions"
        if self._cpu.has_lapic and self.loses_interrupts:
            return (
                "the processor does not single-step into handlers of interrupts, and KVM's own "
                'interrupt controllers deliver them unseen; irqchip="kernel" and "split" exclude it'
            )
        return None

    def arm(self, remaining: int, access_pending: bool) -> bool:
        if not access_pending:
            self._look()
        # Each time: an emulated instruction or a halt leaves the trap flag behind cleared.
        self._switch(lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP)
        return access_pending

    def entered(self, result: EntryResult) -> EntryResult:
        page = self._cpu.page
        in_access, self._in_access = self._in_access, False
        if result is EntryResult.EXIT:
            if page.exit_reason == lib.KVM_EXIT_DEBUG:
                return self._stepped(page.debug.arch.pc)
            if page.exit_reason == lib.KVM_EXIT_HLT:
                self.counted += 1 if self._shadow_end is None else 2
            else:
                self._in_access = True
        elif in_access and self._address(self._cpu.read_context()) != self._at:
            self.counted += 1
        return result

    def disarm(self) -> None:
        if self.is_on:
            self._switch(0)

    def _look(self) -> None:
        """At the instruction to come: where it is, and whether it can be stepped."""
        context = self._cpu.read_context()
        self._at = self._address(context)
        self._shadow_end = None
        if self._emulated:
            if context.efer & _EFER_LMA and context.cs.l and context.cs.dpl == 3:
                raise ConfigurationError(
                    "the guest is in 64-bit user mode, which this host's KVM (PVM) runs natively "
                    "but cannot single-step, and it counts no instructions"
                )
            return
        code = self._code(self._at)
        prefixes = len(code) - len(code.lstrip(bytes(_PREFIXES)))
        opcode, operand = code[prefixes : prefixes + 1], code[prefixes + 1 : prefixes + 2]
        if not opcode or not operand:
            return
        trap = _TRAPS_0F.get(operand[0]) if opcode[0] == 0x0F else _TRAPS.get(opcode[0])
        if trap is not None:
            raise ConfigurationError(
                f"the guest is at {trap} ({self._at:#x}), and this host's KVM cannot single-step "
                "into its handler"
            )
        if opcode[0] in (_STI, _POP_SS):
            self._shadow_end = self._at + prefixes + 1
        elif opcode[0] == _MOV_SS and operand[0] & 0xF8 == 0xD0:
            self._shadow_end = self._at + prefixes + 2
        elif opcode[0] == _MOV_SS and operand[0] & 0x38 == 0x10:
            raise ConfigurationError(
                f"the guest loads SS from memory ({self._at:#x}), and whether the instruction "
                "behind it was executed with it, single-stepping does not tell"
            )

    def _stepped(self, address: int) -> EntryResult:
        if address == self._at and self._is_repeated_string():
            return EntryResult.INTERRUPTED  # it goes on
        held_off = self._shadow_end is not None and address != self._shadow_end
        self.counted += 2 if held_off else 1
        if (
            address == self._at + 1
            and not self._cpu.has_lapic
            and self._code(self._at)[:1] == bytes((_HLT,))
        ):
            self._cpu.page.exit_reason = lib.KVM_EXIT_HLT
            return EntryResult.EXIT
        return EntryResult.INTERRUPTED

    def _is_repeated_string(self) -> bool:
        code = self._code(self._at)
        opcode = code.lstrip(bytes(_PREFIXES))
        prefixes = code[: len(code) - len(opcode)]
        if opcode and 0x40 <= opcode[0] <= 0x4F:  # perhaps REX
            opcode = opcode[1:]
        return (
            bool(set(prefixes) & set(b"\xf2\xf3")) and opcode[:1] != b"" and opcode[0] in _STRINGS
        )

    def _code(self, address: int) -> bytes:
        """The instruction's bytes as far as its page goes; none where there is no memory."""
        place = ffi.new("struct kvm_translation *", {"linear_address": address})
        check(lib.kvmaio_ioctl(self._cpu.fd, lib.KVM_TRANSLATE, place), "KVM_TRANSLATE")
        if not place.valid:
            return b""
        return self._cpu.read_memory(place.physical_address, min(15, 4096 - address % 4096))

    @staticmethod
    def _address(context: Context) -> int:
        long_mode = context.efer & _EFER_LMA and context.cs.l
        return context.rip if long_mode else (context.cs.base + context.rip) & 0xFFFFFFFF

    def _switch(self, control: int) -> None:
        self.is_on = bool(control)
        if self.is_on:
            self._debug.control = control
            set_debug(self._cpu.fd, self._debug)
        else:
            self._cpu.apply_breakpoints()  # which single-stepping has put aside
        # What C answers itself would be followed by instructions that nobody counts.
        self._cpu.suspend_fast_paths(self.is_on)
