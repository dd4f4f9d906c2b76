"""Registers as text: the short form for error messages, the long one for a dump.

Works on the portable `Context` and `CpuState`, whichever CPU model they come
from. A part that the model or the host cannot tell is named as missing.
Sources: SDM vol. 1, 10.5 and 13.4 (FXSAVE and XSAVE areas), vol. 3A, 2.5
(control registers), 11.4 (local APIC); api.rst, KVM_GET_VCPU_EVENTS.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping

from .cpu import CONTROL, GENERAL, SEGMENTS, TABLES, Context, CpuState

__all__ = ["format_context", "format_register", "format_state"]


def format_register(value: int | bytes, bits: int) -> str:
    """A register of 8 to 64 bits as hex, one of 128 to 1024 bits as its bytes, lowest first.

    Raises:
        ValueError: `bits` is no power of two in that range, or the value does not fit.
    """
    if bits not in (8, 16, 32, 64, 128, 256, 512, 1024):
        raise ValueError(f"no register has {bits} bits")
    try:
        if bits <= 64:
            number = value if isinstance(value, int) else int.from_bytes(value, "little")
            number.to_bytes(bits // 8, "little")
            return f"{number:#0{bits // 4 + 2}x}"
        data = value if isinstance(value, bytes) else value.to_bytes(bits // 8, "little")
    except OverflowError:
        raise ValueError(f"{value!r} does not fit in {bits} bits") from None
    if len(data) != bits // 8:
        raise ValueError(f"{len(data)} bytes for a register of {bits} bits")
    return f"[{data.hex(' ')}]"


# ---- the short form ------------------------------------------------------------------


def _bit_names(names: str) -> dict[int, str]:
    """Names from bit 0 on; a dash is a bit without one."""
    return {bit: name for bit, name in enumerate(names.split()) if name != "-"}


_RFLAGS = _bit_names("CF - PF - AF - ZF SF TF IF DF OF - - NT - RF VM AC VIF VIP ID")
_CR0 = _bit_names("PE MP EM TS ET NE - - - - - - - - - - WP - AM - - - - - - - - - - NW CD PG")
_CR4 = _bit_names(
    "VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT UMIP LA57 VMXE SMXE - "
    "FSGSBASE PCIDE OSXSAVE KL SMEP SMAP PKE CET PKS"
)
_EFER = _bit_names("SCE - - - - - - - LME - LMA NXE SVME LMSLE FFXSR TCE")
_FLAGS_OF = {"cr0": _CR0, "cr4": _CR4, "efer": _EFER}


def format_context(context: Context) -> str:
    """The general and the most telling special registers, in nine lines."""
    lines = _rows((name, getattr(context, name)) for name in GENERAL[:-2])
    lines.append(f"{_named(context, 'rip')}  {_rflags(context)}")
    selectors = (f"{name} {getattr(context, name).selector:04x}" for name in SEGMENTS[:6])
    lines.append(f"{'  '.join(selectors)}  cs.base {context.cs.base:#x}  ({_mode(context)})")
    lines += _rows((name, getattr(context, name)) for name in ("cr0", "cr2", "cr3", "cr4"))
    lines.append("  ".join((_named(context, "efer"), *(_table(context, name) for name in TABLES))))
    return "\n".join(lines)


def _named(context: Context, name: str) -> str:
    return f"{name:<3} {format_register(getattr(context, name), 64)}"


def _rows(registers: Iterable[tuple[str, int]]) -> list[str]:
    """Four 64-bit registers a line."""
    cells = [f"{name:<3} {format_register(value, 64)}" for name, value in registers]
    return ["  ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]


def _flags(value: int, names: Mapping[int, str]) -> str:
    return " ".join(name for bit, name in names.items() if value >> bit & 1) or "none"


def _rflags(context: Context) -> str:
    iopl = context.rflags >> 12 & 3
    return f"{_named(context, 'rflags')} ({_flags(context.rflags, _RFLAGS)}, IOPL {iopl})"


def _mode(context: Context) -> str:
    """How the CPU would decode its next instruction."""
    if not context.cr0 & 1:
        return "real mode"
    if context.rflags >> 17 & 1:
        return "virtual-8086 mode"
    if context.efer >> 10 & 1 and context.cs.l:
        width = "64-bit"
    else:
        width = "32-bit" if context.cs.db else "16-bit"
    return f"{width}, CPL {context.ss.dpl}"


def _table(context: Context, name: str) -> str:
    table = getattr(context, name)
    return f"{name} {table.base:#x}+{table.limit:#x}"


# ---- the long form -----------------------------------------------------------------


def format_state(state: CpuState) -> str:
    """All registers, section by section."""
    context = state.context
    sections: dict[str, Iterable[str]] = {
        "integer": _rows((name, getattr(context, name)) for name in GENERAL[:-2]),
        "special": [f"{_named(context, 'rip')}  {_rflags(context)}", _mode(context)],
        "segments": _segments(context),
        "control": _control(context),
        "FPU, SSE and AVX": _xsave(state.xsave),
        "XCRs": [f"xcr{number} {format_register(v, 64)}" for number, v in state.xcrs.items()],
        "debug registers": _debug_registers(state.debug_registers),
        "events": _events(state.events),
        "MP state": [] if state.mp_state is None else [_mp_state(state.mp_state)],
        "local APIC": _lapic(state.lapic),
        "MSRs": _msrs(state.msrs),
    }
    text: list[str] = []
    for title, lines in sections.items():
        found = [f"  {line}" for line in lines]
        text += [f"{title}:", *found] if found else [f"{title}: {_MISSING}"]
    return "\n".join(text)


_MISSING = "not available on this host"


def _segments(context: Context) -> Iterator[str]:
    for name in SEGMENTS:
        s = getattr(context, name)
        bits = " ".join(f"{bit} {getattr(s, bit)}" for bit in ("db", "s", "l", "g", "avl"))
        present = "unusable" if s.unusable else "present" if s.present else "not present"
        yield (
            f"{name:<3} {s.selector:#06x}  base {format_register(s.base, 64)}  "
            f"limit {format_register(s.limit, 32)}  type {s.type:#x} dpl {s.dpl} {bits} {present}"
        )
    for name in TABLES:
        table = getattr(context, name)
        yield (
            f"{name:<10}  base {format_register(table.base, 64)}  "
            f"limit {format_register(table.limit, 16)}"
        )


def _control(context: Context) -> Iterator[str]:
    for name in CONTROL:
        value = getattr(context, name)
        names = _FLAGS_OF.get(name)
        flags = f" ({_flags(value, names)})" if names else ""
        yield f"{name:<9} {format_register(value, 64)}{flags}"


_XSTATE_BV = 512  # offsets in the XSAVE area's standard format
_YMM_UPPER = 576  # CPUID 0xD, sub-leaf 2; the same on every processor so far
_AVX = 2


def _xsave(area: bytes | None) -> Iterator[str]:
    if area is None or len(area) < 512:
        return
    fcw, fsw, ftw, fop, fip, fdp, mxcsr = struct.unpack_from("<HHBxHQQI", area)
    yield (
        f"fcw {format_register(fcw, 16)}  fsw {format_register(fsw, 16)}  "
        f"ftw {format_register(ftw, 8)}  fop {format_register(fop, 16)}  "
        f"mxcsr {format_register(mxcsr, 32)}"
    )
    yield f"fip {format_register(fip, 64)}  fdp {format_register(fdp, 64)}"
    for n in range(8):
        significand, exponent = struct.unpack_from("<QH", area, 32 + 16 * n)
        # FTW of FXSAVE has one bit for each physical register; st(n) is relative to TOP.
        if ftw >> ((fsw >> 11) + n & 7) & 1:
            yield f"st{n} {exponent:#06x}:{significand:016x} = {_x87(exponent, significand)}"
    present = int.from_bytes(area[_XSTATE_BV : _XSTATE_BV + 8], "little")
    has_avx = present >> _AVX & 1 and len(area) >= _YMM_UPPER + 256
    zeros = []
    for n in range(16):
        low = area[160 + 16 * n :][:16]
        high = area[_YMM_UPPER + 16 * n :][:16] if has_avx else bytes(16)
        if any(low) or any(high):
            upper = f"  upper {format_register(high, 128)}" if any(high) else ""
            name = "ymm" if any(high) else "xmm"
            yield f"{f'{name}{n}':<5} {format_register(low, 128)}{upper}"
        else:
            zeros.append(str(n))
    if zeros:
        yield f"ymm {', '.join(zeros)}: 0" if has_avx else f"xmm {', '.join(zeros)}: 0"
    if further := [str(bit) for bit in range(3, 63) if present >> bit & 1]:
        yield f"in use but not shown: XSAVE components {', '.join(further)}"


def _x87(exponent: int, significand: int) -> str:
    """An 80-bit floating-point number in decimal, to a double's precision."""
    sign = "-" if exponent >> 15 else ""
    exponent &= 0x7FFF
    if exponent == 0x7FFF:
        return f"{sign}{'nan' if significand << 1 & (1 << 64) - 1 else 'inf'}"
    power = max(exponent, 1) - 16383  # a denormal's exponent counts as 1
    number = significand / (1 << 63)
    if abs(power) < 1000:
        return f"{sign}{number * 2.0**power:.17g}"
    # Beyond a double's range: all that is left of that is zero.
    return f"{sign}{number:.17g} * 2**{power}" if significand else f"{sign}0"


def _debug_registers(values: tuple[int, ...]) -> list[str]:
    names = ("dr0", "dr1", "dr2", "dr3", "dr6", "dr7")
    return _rows(zip(names, values, strict=False))


_EVENTS_SIZE = 64  # of kvm_vcpu_events


def _events(events: bytes | None) -> Iterator[str]:
    if events is None or len(events) < _EVENTS_SIZE:
        return
    exception, interrupt, nmi = events[0:8], events[8:12], events[12:16]
    injected, number, has_code, pending, code = struct.unpack("<4BI", exception)
    irq_injected, irq, soft, shadow = interrupt
    sipi_vector, flags, smm, smi_pending, _, latched_init, triple_fault = struct.unpack_from(
        "<II5B", events, 16
    )
    has_payload, payload = struct.unpack_from("<BQ", events, 55)
    if injected or pending:
        how = "injected" if injected else "pending"
        error = f", error code {code:#x}" if has_code else ""
        extra = f", payload {payload:#x}" if has_payload else ""
        yield f"exception {number} {how}{error}{extra}"
    if irq_injected:
        yield f"{'software ' if soft else ''}interrupt {irq:#x} injected"
    if any(nmi):
        states = ("injected", "pending", "masked", "reserved")
        yield f"NMI {', '.join(name for name, on in zip(states, nmi, strict=True) if on)}"
    if shadow:
        yield f"interrupts held back by {_flags(shadow, {0: 'MOV SS', 1: 'STI'})}"
    if smm or smi_pending:
        yield f"SMI {'in progress' if smm else 'pending'}"
    if latched_init:
        yield "INIT latched"
    if triple_fault:
        yield "triple fault pending"
    yield f"flags {flags:#x}, SIPI vector {sipi_vector:#x}"


_MP_STATES = (
    *("runnable", "uninitialized", "INIT received", "halted", "SIPI received"),
    *("stopped", "check stop", "operating", "load", "AP reset hold", "suspended"),
)


def _mp_state(mp_state: int) -> str:
    name = _MP_STATES[mp_state] if mp_state < len(_MP_STATES) else "unknown"
    return f"{mp_state} ({name})"


def _lapic(page: bytes | None) -> Iterator[str]:
    if page is None or len(page) < 0x400:
        return

    def register(offset: int) -> int:
        return int.from_bytes(page[offset : offset + 4], "little")

    def vectors(offset: int) -> str:
        # 256 bits, 32 in each 16-byte step.
        found = [
            f"{32 * i + bit:#x}"
            for i in range(8)
            for bit in range(32)
            if register(offset + 16 * i) >> bit & 1
        ]
        return ", ".join(found) or "none"

    named = {"id": 0x20, "version": 0x30, "tpr": 0x80, "ldr": 0xD0, "dfr": 0xE0, "svr": 0xF0}
    timer = {"lvt timer": 0x320, "initial count": 0x380, "count": 0x390, "divide": 0x3E0}
    lines = {"lvt lint0": 0x350, "lvt lint1": 0x360, "lvt error": 0x370, "icr": 0x300}
    for group in (named, timer, lines):
        yield "  ".join(f"{name} {register(offset):#x}" for name, offset in group.items())
    yield f"in service: {vectors(0x100)}; requested: {vectors(0x200)}"


_MSR_NAMES = {
    int(index, 16): name
    for index, name in (
        pair.split(":")
        for pair in """
        10:TSC 11:KVM_WALL_CLOCK 12:KVM_SYSTEM_TIME 1b:APIC_BASE 3a:FEATURE_CONTROL 3b:TSC_ADJUST
        48:SPEC_CTRL 8b:BIOS_SIGN_ID 10a:ARCH_CAPABILITIES 122:TSX_CTRL 140:MISC_FEATURES_ENABLES
        174:SYSENTER_CS 175:SYSENTER_ESP 176:SYSENTER_EIP 179:MCG_CAP 17a:MCG_STATUS 17b:MCG_CTL
        1a0:MISC_ENABLE 277:PAT 2ff:MTRR_DEF_TYPE 345:PERF_CAPABILITIES 4d0:MCG_EXT_CTL
        6e0:TSC_DEADLINE da0:XSS 4b564d00:KVM_WALL_CLOCK_NEW 4b564d01:KVM_SYSTEM_TIME_NEW
        4b564d02:KVM_ASYNC_PF_EN 4b564d03:KVM_STEAL_TIME 4b564d04:KVM_PV_EOI_EN
        4b564d05:KVM_POLL_CONTROL 4b564d06:KVM_ASYNC_PF_INT c0000080:EFER c0000081:STAR
        c0000082:LSTAR c0000083:CSTAR c0000084:SFMASK c0000100:FS_BASE c0000101:GS_BASE
        c0000102:KERNEL_GS_BASE c0000103:TSC_AUX c0000104:TSC_RATIO c001001f:NB_CFG c0010015:HWCR
        c0010117:VM_HSAVE_PA c001011f:VIRT_SPEC_CTRL c0011029:DE_CFG
        """.split()
    )
}


def _msrs(msrs: Mapping[int, int]) -> Iterator[str]:
    for index, value in sorted(msrs.items()):
        name = _MSR_NAMES.get(index, "")
        yield f"{format_register(index, 32)} {format_register(value, 64)} {name}".rstrip()
