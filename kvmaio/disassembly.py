"""Guest code as text; needs capstone (``kvmaio[disasm]``), and says so where it is missing."""

from __future__ import annotations

from typing import Any

from .cpu import Context
from .linear import code_address, code_bits, read_linear
from .memory import GuestMemory

__all__ = ["disassemble", "disassemble_next", "instruction_name"]

LONGEST = 15
"""Bytes of one instruction (SDM vol. 2A, 2.3.11)."""


def disassemble(code: bytes, address: int, bits: int, *, most: int = 1 << 30) -> list[str]:
    """A line for each instruction of `code`, which lies at `address`.

    Args:
        bits: 16, 32 or 64.
        most: how many instructions at most.
    """
    engine = _engine(bits)
    if engine is None:
        return [f"{address:#x}: {code[:LONGEST].hex(' ')}  (kvmaio[disasm] would name it)"]
    lines = []
    for at, size, name, operands in engine.disasm_lite(code, address, most):
        raw = code[at - address : at - address + size].hex(" ")
        lines.append(f"{at:#x}: {raw:<24} {name} {operands}".rstrip())
    return lines or [f"{address:#x}: {code[:LONGEST].hex(' ')}  (no instruction)"]


def disassemble_next(memory: GuestMemory, context: Context, count: int = 5) -> list[str]:
    """The next `count` instructions of a vCPU; nothing where no memory is."""
    address = code_address(context)
    code = read_linear(memory, context, address, LONGEST * count)
    return disassemble(code, address, code_bits(context), most=count) if code else []


def instruction_name(code: bytes, bits: int) -> str | None:
    """The first instruction of `code` as text, such as ``addps xmm0, xmm1``; None if unknown.

    Args:
        bits: 16, 32 or 64.
    """
    engine = _engine(bits)
    if engine is None:
        return None
    for _, _, name, operands in engine.disasm_lite(code, 0, 1):
        return f"{name} {operands}".rstrip()
    return None


def _engine(bits: int) -> Any:
    """Capstone's disassembler; None where that is not installed."""
    try:
        import capstone
    except ImportError:
        return None
    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    return capstone.Cs(capstone.CS_ARCH_X86, modes[bits])
