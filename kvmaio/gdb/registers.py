"""The registers as GDB knows them: a target description, and values by register number.

Source: "Debugging with GDB", appendix G.5.5 (i386 features); SDM vol. 1, 10.5.1 (FXSAVE area).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs

from ..cpu import Context
from ..linear import code_bits

__all__ = ["CpuView", "RegisterSet", "register_set"]

# Offsets into the XSAVE area.
_FCW, _FSW, _FTW, _FOP, _FIP, _FDP, _MXCSR, _ST, _XMM = 0, 2, 4, 6, 8, 16, 24, 32, 160
_XSTATE_BV = 512
_X87_AND_SSE = 0b11


class CpuView:
    """One stopped vCPU's registers, to look at and to change.

    Attributes:
        context: the general and special ones.
        xsave: the area with x87 and SSE; None where the CPU model has none.
        xsave_changed: it has been written, and is to be given back to the model.
    """

    def __init__(self, context: Context, xsave: bytes | None) -> None:
        self.context = context
        self.xsave = None if xsave is None else bytearray(xsave)
        self.xsave_changed = False

    def area(self, offset: int, size: int) -> int | None:
        """A number in the XSAVE area; None without one."""
        if self.xsave is None:
            return None
        return int.from_bytes(self.xsave[offset : offset + size], "little")

    def set_area(self, offset: int, size: int, value: int) -> None:
        """Change it; nothing happens without one."""
        if self.xsave is not None:
            self.xsave[offset : offset + size] = value.to_bytes(size, "little")
            if len(self.xsave) > _XSTATE_BV:
                self.xsave[_XSTATE_BV] |= _X87_AND_SSE  # in use from now on
            self.xsave_changed = True


@attrs.frozen
class GdbRegister:
    """A register: its name and type for GDB, and how to get at it.

    Attributes:
        get: its value in a view; None if there is none.
    """

    name: str
    bits: int
    type: str
    get: Callable[[CpuView], int | None]
    set: Callable[[CpuView, int], None]


@attrs.frozen
class RegisterSet:
    """All registers of an architecture, in the order of their numbers.

    Attributes:
        architecture: GDB's name: ``i8086``, ``i386`` or ``i386:x86-64``.
    """

    architecture: str
    features: dict[str, list[GdbRegister]]

    def __iter__(self) -> Iterator[GdbRegister]:
        for registers in self.features.values():
            yield from registers

    def read(self, number: int, view: CpuView) -> str:
        """A register's bytes as hexadecimal digits, ``xx`` where there is no value."""
        register = list(self)[number]
        value = register.get(view)
        size = register.bits // 8
        return "xx" * size if value is None else value.to_bytes(size, "little").hex()

    def write(self, number: int, view: CpuView, data: bytes) -> None:
        """Set a register from its bytes."""
        list(self)[number].set(view, int.from_bytes(data, "little"))

    def read_all(self, view: CpuView) -> str:
        """The payload of ``g``."""
        return "".join(self.read(number, view) for number, _ in enumerate(self))

    def write_all(self, view: CpuView, data: bytes) -> None:
        """The payload of ``G``."""
        for register in self:
            size = register.bits // 8
            if len(data) >= size:
                register.set(view, int.from_bytes(data[:size], "little"))
            data = data[size:]

    def description(self) -> str:
        """The target description in XML."""
        parts = [
            '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd">',
            f'<target version="1.0"><architecture>{self.architecture}</architecture>',
        ]
        for name, registers in self.features.items():
            parts.append(f'<feature name="{name}">{_TYPES.get(name, "")}')
            for r in registers:
                parts.append(f'<reg name="{r.name}" bitsize="{r.bits}" type="{r.type}"/>')
            parts.append("</feature>")
        return "".join([*parts, "</target>"])


def register_set(context: Context) -> RegisterSet:
    """The registers for code as a vCPU with `context` executes it now."""
    bits = code_bits(context)
    names, word = (_NAMES_64, 64) if bits == 64 else (_NAMES_32, 32)
    core = [_general(name, word, bits) for name in names]
    core += [_selector(name) for name in ("cs", "ss", "ds", "es", "fs", "gs")]
    core += [_area(f"st{n}", _ST + 16 * n, 80, "i387_ext") for n in range(8)]
    core += [*_X87]
    xmm = [_area(f"xmm{n}", _XMM + 16 * n, 128, "vec128") for n in range(16 if word == 64 else 8)]
    mxcsr = _area("mxcsr", _MXCSR, 32, "int")
    system = [_plain(name, word) for name in ("cr0", "cr2", "cr3", "cr4", "efer")]
    bases = [_base(name, word) for name in ("cs", "ss", "ds", "es")]
    features = {
        "org.gnu.gdb.i386.core": core,
        "org.gnu.gdb.i386.sse": [*xmm, mxcsr],
    }
    if word == 64:
        features["org.gnu.gdb.i386.segments"] = [_base("fs", 64), _base("gs", 64)]
    else:
        bases += [_base("fs", 32), _base("gs", 32)]
    features["org.kvmaio.system"] = [*system, *bases]
    architecture = {16: "i8086", 32: "i386", 64: "i386:x86-64"}[bits]
    return RegisterSet(architecture, features)


_NAMES_64 = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip eflags".split()
_NAMES_32 = "eax ecx edx ebx esp ebp esi edi eip eflags".split()


def _general(name: str, word: int, code: int) -> GdbRegister:
    mask = (1 << word) - 1
    if name == "eflags":
        return GdbRegister(
            name,
            32,
            "i386_eflags",
            lambda view: view.context.rflags & 0xFFFF_FFFF,
            lambda view, value: setattr(view.context, "rflags", value),
        )
    if name == "eip" and code == 16:
        return GdbRegister(name, 32, "code_ptr", _linear_ip, _set_linear_ip)
    ours = f"r{name[1:]}"
    kind = {"rip": "code_ptr", "rsp": "data_ptr"}.get(ours, f"int{word}")
    return GdbRegister(
        name,
        word,
        kind,
        lambda view: getattr(view.context, ours) & mask,
        lambda view, value: setattr(view.context, ours, value & mask),
    )


def _linear_ip(view: CpuView) -> int:
    # GDB knows no segments: what it compares with breakpoints and disassembles is linear.
    return (view.context.cs.base + view.context.rip) & 0xFFFF_FFFF


def _set_linear_ip(view: CpuView, value: int) -> None:
    view.context.rip = value - view.context.cs.base & 0xFFFF


def _selector(name: str) -> GdbRegister:
    return GdbRegister(
        name,
        32,
        "int32",
        lambda view: getattr(view.context, name).selector,
        lambda view, value: _set_selector(view, name, value & 0xFFFF),
    )


def _set_selector(view: CpuView, name: str, value: int) -> None:
    segment = getattr(view.context, name)
    if segment.selector != value:
        segment.selector = value
        if not view.context.cr0 & 1:
            segment.base = value << 4  # as loading it does in real mode


def _plain(name: str, bits: int) -> GdbRegister:
    mask = (1 << bits) - 1
    return GdbRegister(
        name,
        bits,
        f"int{bits}",
        lambda view: getattr(view.context, name) & mask,
        lambda view, value: setattr(view.context, name, value),
    )


def _base(name: str, bits: int) -> GdbRegister:
    mask = (1 << bits) - 1
    return GdbRegister(
        f"{name}_base",
        bits,
        f"int{bits}",
        lambda view: getattr(view.context, name).base & mask,
        lambda view, value: setattr(getattr(view.context, name), "base", value),
    )


def _area(name: str, offset: int, bits: int, kind: str) -> GdbRegister:
    size = bits // 8
    return GdbRegister(
        name,
        bits,
        kind,
        lambda view: view.area(offset, size),
        lambda view, value: view.set_area(offset, size, value),
    )


def _x87(name: str, offset: int, size: int) -> GdbRegister:
    """A part of the x87 state, which GDB has as 32 bits; it lies in `size` bytes."""
    mask = (1 << 8 * size) - 1
    return GdbRegister(
        name,
        32,
        "int",
        lambda view: view.area(offset, size),
        lambda view, value: view.set_area(offset, size, value & mask),
    )


def _tags(view: CpuView) -> int | None:
    """The tag word of FSAVE: FXSAVE has only one bit for each register, "not empty"."""
    used, status = view.area(_FTW, 1), view.area(_FSW, 2)
    if used is None or status is None:
        return None
    tags = 0
    for physical in range(8):
        if not used >> physical & 1:
            tag = 3
        else:
            value = view.area(_ST + 16 * (physical - (status >> 11) & 7), 10) or 0
            exponent, significand = value >> 64 & 0x7FFF, value & (1 << 64) - 1
            if exponent == 0 and significand == 0:
                tag = 1
            else:
                tag = 0 if significand >> 63 and exponent != 0x7FFF else 2
        tags |= tag << 2 * physical
    return tags


def _set_tags(view: CpuView, tags: int) -> None:
    used = sum(1 << n for n in range(8) if tags >> 2 * n & 3 != 3)
    view.set_area(_FTW, 1, used)


_X87 = (
    _x87("fctrl", _FCW, 2),
    _x87("fstat", _FSW, 2),
    GdbRegister("ftag", 32, "int", _tags, _set_tags),
    _x87("fiseg", _FIP + 4, 2),
    _x87("fioff", _FIP, 4),
    _x87("foseg", _FDP + 4, 2),
    _x87("fooff", _FDP, 4),
    _x87("fop", _FOP, 2),
)

_FLAG_NAMES = "CF:0 PF:2 AF:4 ZF:6 SF:7 TF:8 IF:9 DF:10 OF:11 NT:14 RF:16 VM:17 AC:18 ID:21"
_FLAGS = "".join(
    f'<field name="{name}" start="{bit}" end="{bit}"/>'
    for name, bit in (pair.split(":") for pair in _FLAG_NAMES.split())
)
_VECTORS = (
    *(("v4_float", "ieee_single", 4), ("v2_double", "ieee_double", 2), ("v16_int8", "int8", 16)),
    *(("v8_int16", "int16", 8), ("v4_int32", "int32", 4), ("v2_int64", "int64", 2)),
)
_TYPES = {
    "org.gnu.gdb.i386.core": f'<flags id="i386_eflags" size="4">{_FLAGS}</flags>',
    "org.gnu.gdb.i386.sse": "".join(
        f'<vector id="{name}" type="{kind}" count="{count}"/>' for name, kind, count in _VECTORS
    )
    + '<union id="vec128">'
    + "".join(f'<field name="{name}" type="{name}"/>' for name, _, _ in _VECTORS)
    + '<field name="uint128" type="uint128"/></union>',
}
