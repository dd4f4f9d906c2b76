"""The CPL 0 stub under a user64 guest: HLT works, any other fault shuts the guest down.

A user64 guest has no kernel, so a fault in it can only end it. The stub makes
that visible where it belongs: it takes the IDT away and returns to the
instruction, which faults again and shuts the CPU down with all registers as
they were at the fault. Some hosts (SVM) reset the registers at a shutdown;
the frame that the fault pushed stays in memory for those: `FaultFrame`.

HLT, which CPL 3 may not execute, is executed by the stub with interrupts off,
and goes on behind it when the CPU is woken.
"""

from __future__ import annotations

import struct

import attrs

from ..memory import GuestMemory
from .tables import gate64

__all__ = ["ENTRIES_SIZE", "FaultFrame", "STUB", "entries", "interrupt_table"]

VECTORS = 256
_ENTRY_SIZE = 16
ENTRIES_SIZE = VECTORS * _ENTRY_SIZE

# What each of the 256 entries jumps to, with vector and error code on the stack:
#
#   restartable:
#     cmp qword ptr [rsp], 13      # #GP?
#     jne again
#     test byte ptr [rsp+8], 2     # by INT n or INT3: some CPUs are past the instruction then
#     jnz final
#     push rax
#     mov rax, [rsp+24]            # the instruction's address
#     cmp byte ptr [rax], 0xf4     # HLT?
#     pop rax
#     je halt
#   again:
#     add rsp, 16
#     lidt [rip+no_idt]
#     iretq                        # ... and fault again, now without a handler
#   halt:
#     add rsp, 16
#     inc qword ptr [rsp]
#     hlt
#     iretq
#   final:
#     lidt [rip+no_idt]
#     ud2
#   no_idt:
#     .zero 10
STUB = bytes.fromhex(
    "48833c240d7513f644240802752450488b4424188038f458740d4883c4100f011d1600000048cf4883c410"
    "48ff0424f448cf0f011d020000000f0b00000000000000000000"
)
_FINAL = 0x32

_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})
# Returning from these would not fault again: #DB, NMI, #BP and #OF (on hosts that let INT3 and
# INTO past a gate with DPL 0), #DF, #MC and interrupts.
_NOT_RESTARTABLE = frozenset({1, 2, 3, 4, 8, 18, *range(32, VECTORS)})

_NAMES = dict(enumerate(("#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF")))
_NAMES |= dict(enumerate(("#TS", "#NP", "#SS", "#GP", "#PF"), start=10))
_NAMES |= dict(enumerate(("#MF", "#AC", "#MC", "#XM", "#VE", "#CP"), start=16))


def entries(base: int, stub: int) -> bytes:
    """The 256 handlers at `base`: each pushes an error code if the CPU did not, and its vector."""
    code = bytearray()
    for vector in range(VECTORS):
        # push 0, or a NOP of the same length
        code += b"\x66\x90" if vector in _WITH_ERROR_CODE else b"\x6a\x00"
        target = stub + (_FINAL if vector in _NOT_RESTARTABLE else 0)
        here = base + vector * _ENTRY_SIZE
        code += struct.pack("<BI", 0x68, vector)  # push vector
        code += struct.pack("<Bi", 0xE9, target - (here + 12))  # jmp target
        code += b"\xcc" * (_ENTRY_SIZE - 12)
    return bytes(code)


def interrupt_table(handlers: int, selector: int) -> bytes:
    """The IDT: a gate for each of the 256 `entries()` at `handlers`."""
    gates = (gate64(handlers + vector * _ENTRY_SIZE, selector) for vector in range(VECTORS))
    return b"".join(gates)


@attrs.frozen
class FaultFrame:
    """What the last fault of a user64 guest left on the stub's stack.

    A HLT is a fault too: its frame has vector 13.
    """

    vector: int
    error_code: int
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int

    @classmethod
    def read(cls, memory: GuestMemory, address: int) -> FaultFrame | None:
        """The frame at `BootState.fault_frame`; None if there was no fault yet."""
        frame = cls(*struct.unpack("<7Q", memory.read(address, cls.size())))
        return frame if frame.cs else None

    @staticmethod
    def size() -> int:
        """Bytes in memory."""
        return 7 * 8

    def __str__(self) -> str:
        name = _NAMES.get(self.vector, "interrupt" if self.vector >= 32 else "exception")
        return (
            f"{name} (vector {self.vector}, error code {self.error_code:#x}) at rip {self.rip:#x}"
        )
