"""Generated programs for 64-bit user mode, for tests/soft/test_lockstep_user.py.

Integer, x87, MMX and SSE instructions, strings, and faults that a handler at CPL 0 takes. Each is
a loop that goes on for ever. It is known for each exit which flags are undefined there (SDM vol. 1,
appendix A, and vol. 2, "Flags Affected"), and no instruction takes in what is undefined.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import attrs

__all__ = [
    "DATA",
    "FAULTS",
    "HANDLERS",
    "IDT",
    "STORED",
    "Program",
    "handler_lines",
    "handlers",
    "pool",
    "program",
]

DATA = 0x9000
"""Operands: what they are from the beginning, then what is stored; 4 KiB each."""
STORED = DATA + 0x1000
IDT, HANDLERS, FAULTS = 0x5000, 0x6000, 0x7000
MMIO = 0x4000_0000

CF, PF, AF, ZF, SF, OF = 1, 4, 0x10, 0x40, 0x80, 0x800
ALL = CF | PF | AF | ZF | SF | OF

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13")
"""Not RSP, and R14 and R15, which are the handlers'."""
_NAMES = {
    4: ("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", *(f"r{n}d" for n in range(8, 14))),
    2: ("ax", "bx", "cx", "dx", "si", "di", "bp", *(f"r{n}w" for n in range(8, 14))),
    1: ("al", "bl", "cl", "dl", "sil", "dil", "bpl", *(f"r{n}b" for n in range(8, 14))),
    8: GENERAL,
}
_POINTER = {1: "byte ptr", 2: "word ptr", 4: "dword ptr", 8: "qword ptr"}
_CONDITIONS = {
    name: flags
    for names, flags in (
        ("o no", OF),
        ("b ae", CF),
        ("e ne", ZF),
        ("be a", CF | ZF),
        ("s ns", SF),
        ("p np", PF),
        ("l ge", SF | OF),
        ("le g", ZF | SF | OF),
    )
    for name in names.split()
}


@attrs.frozen
class Program:
    """Its lines, and which flags are undefined behind each exit of one turn of the loop."""

    lines: tuple[str, ...]
    undefined: tuple[int, ...]


def program(seed: int, length: int = 150) -> Program:
    """Program number `seed`."""
    writer = _Writer(random.Random(seed))
    kinds: tuple[tuple[Callable[[], None], float], ...] = (
        (writer.alu, 4),
        (writer.shift, 2),
        (writer.bits, 1),
        (writer.multiply, 1),
        (writer.condition, 2),
        (writer.move, 2),
        (writer.string, 0.5),
        (writer.fault, 0.7),
        (writer.x87, 4),
        (writer.mmx, 0.5),
        (writer.sse_float, 4),
        (writer.sse_integer, 3),
        (writer.control, 0.4),
        (writer.access, 2),
    )
    choices, weights = zip(*kinds, strict=True)
    writer.emit("fninit", "add eax, 1")
    for _ in range(length):
        writer.number.choices(choices, weights)[0]()
    writer.emit("add eax, 1")
    writer.exit("out 0x11, eax")
    return Program(("again: nop", *writer.lines, "jmp again"), tuple(writer.exits))


def pool(seed: int) -> bytes:
    """Operands: 1 KiB of single precision, 1 KiB of double precision, integers, noise."""
    number = random.Random(seed)
    singles = (0.0, -0.0, 1.0, -1.5, 3.0, 1e30, -1e-30, float("inf"), -float("inf"), 1e-45, 2.5e-39)
    doubles = (0.0, -0.0, 1.0, -2.5, 1e300, -1e-300, 5e-324, 3e-310, float("inf"), 3.7, 2**31 + 0.5)
    parts = [struct.pack("<f", number.choice((*singles, number.uniform(-1e6, 1e6))))
             for _ in range(0x100)]  # fmt: skip
    parts[number.randrange(0x100)] = struct.pack("<I", 0xFFC0_0000)  # the default NaN
    parts += [struct.pack("<d", number.choice((*doubles, number.uniform(-1e6, 1e6))))
              for _ in range(0x80)]  # fmt: skip
    parts[0x100 + number.randrange(0x80)] = struct.pack("<Q", 0xFFF8 << 48)
    parts += [struct.pack("<q", number.randint(-9, 9)) for _ in range(32)]
    known = b"".join(parts)
    return known + number.randbytes(0x1000 - len(known))


def handlers(memory_write: Callable[[int, bytes], None], code: bytes) -> None:
    """Put the handlers' `code`, in pieces of 64 bytes, one for each vector, and their gates."""
    memory_write(HANDLERS, code)
    for vector in range(32):
        kind = 0xEE if vector == 3 else 0x8E  # an interrupt gate; INT3's is the program's, too
        offset = HANDLERS + 64 * vector
        gate = struct.pack("<HHBBHII", offset & 0xFFFF, 8, 0, kind, offset >> 16, 0, 0)
        memory_write(IDT + 16 * vector, gate)


def handler_lines() -> tuple[str, ...]:
    """Each counts its fault, keeps the error code and CR2, and goes on where R15 says."""
    lines: list[str] = []
    for vector in range(32):
        lines += [".balign 64"]
        if vector in (8, 10, 11, 12, 13, 14, 17):
            lines += [f"pop qword ptr [{FAULTS + 0x100 + 8 * vector}]"]
        if vector == 14:
            lines += ["mov r14, cr2", f"mov [{FAULTS + 0x300}], r14"]
        lines += [f"inc qword ptr [{FAULTS + 8 * vector}]", "mov [rsp], r15", "iretq"]
    return tuple(lines)


class _Writer:
    """Writes instructions; keeps track of which flags are undefined, and of the x87 stack."""

    def __init__(self, number: random.Random) -> None:
        self.number = number
        self.lines: list[str] = []
        self.exits: list[int] = []
        self.undefined = 0
        self.depth = 0
        self.daz = number.random() < 0.5  # MIN and MAX do without it
        self._labels = 0

    def emit(self, *lines: str, sets: int = 0, spoils: int = 0) -> None:
        self.lines += lines
        self.undefined = self.undefined & ~sets | spoils

    def exit(self, line: str, *, sets: int = 0) -> None:
        self.emit(line, sets=sets)
        self.exits.append(self.undefined)

    # ---- operands --------------------------------------------------------------------

    def size(self) -> int:
        return self.number.choice((1, 2, 4, 4, 8, 8))

    def register(self, size: int) -> str:
        return self.number.choice(_NAMES[size])

    def read_at(self, size: int, align: int = 1) -> str:
        base = self.number.choice((DATA, STORED))
        offset = self.number.randrange(0, 0x1000 - size) // align * align
        return f"[{base + offset:#x}]"

    def write_at(self, size: int, align: int = 1) -> str:
        offset = self.number.randrange(0, 0x1000 - size) // align * align
        return f"[{STORED + offset:#x}]"

    def source(self, size: int) -> str:
        pick = self.number.random()
        if pick < 0.5:
            return self.register(size)
        if pick < 0.75:
            return f"{_POINTER[size]} {self.read_at(size)}"
        return str(self.number.choice((0, 1, -1, 2, 7, 127, self.number.randrange(-128, 128))))

    # ---- integer -----------------------------------------------------------------------

    def alu(self) -> None:
        size = self.size()
        operation = self.number.choice(
            "add sub cmp adc sbb and or xor test inc dec neg not xadd cmpxchg".split()
        )
        if operation in ("adc", "sbb") and self.undefined & CF:
            operation = "add"
        in_memory = self.number.random() < 0.3
        target = f"{_POINTER[size]} {self.write_at(size)}" if in_memory else self.register(size)
        if operation in ("inc", "dec"):
            self.emit(f"{operation} {target}", sets=ALL & ~CF)
        elif operation == "neg":
            self.emit(f"neg {target}", sets=ALL)
        elif operation == "not":
            self.emit(f"not {target}")
        elif operation in ("xadd", "cmpxchg"):
            if operation == "cmpxchg" and size == 4:
                in_memory, target = True, f"dword ptr {self.write_at(4)}"
            lock = "lock " if in_memory and self.number.random() < 0.5 else ""
            self.emit(f"{lock}{operation} {target}, {self.register(size)}", sets=ALL)
        else:
            source = self.source(size)
            if in_memory and "[" in source:
                source = self.register(size)
            if operation == "test" and "[" in source:
                source = self.register(size)
            logical = operation in ("and", "or", "xor", "test")
            self.emit(
                f"{operation} {target}, {source}",
                sets=ALL & ~AF if logical else ALL,
                spoils=AF if logical else 0,
            )

    def shift(self) -> None:
        size = self.size()
        operation = self.number.choice(
            ("shl", "shr", "sar", "rol", "ror", "rcl", "rcr", "shld", "shrd")
        )
        if operation in ("rcl", "rcr") and self.undefined & CF:
            operation = "rol"
        if operation in ("shld", "shrd"):
            size = max(size, 2)
        count = self.number.choice((1, 1, self.number.randrange(1, 8 * size)))
        target = self.register(size)
        beyond = OF if count > 1 else 0
        if operation in ("rol", "ror", "rcl", "rcr"):
            self.emit(f"{operation} {target}, {count}", sets=CF | OF, spoils=beyond)
        elif operation in ("shld", "shrd"):
            self.emit(f"{operation} {target}, {self.register(size)}, {count}",
                      sets=ALL, spoils=AF | beyond)  # fmt: skip
        elif self.number.random() < 0.3:  # by CL, which may be 0: then nothing changes
            size = max(size, 4)
            self.emit(f"{operation} {self.register(size)}, cl", spoils=AF | OF)
        else:
            self.emit(f"{operation} {target}, {count}", sets=ALL, spoils=AF | beyond)

    def bits(self) -> None:
        size = self.number.choice((4, 8))
        operation = self.number.choice(("bt", "bts", "btr", "btc", "bsf", "bsr", "popcnt", "bswap"))
        target, other = self.register(size), self.register(size)
        if operation in ("bt", "bts", "btr", "btc"):
            self.emit(f"{operation} {target}, {other}", sets=CF, spoils=OF | SF | AF | PF)
        elif operation in ("bsf", "bsr"):  # of 0 the result is undefined
            self.emit(f"or {other}, 0x10", f"{operation} {target}, {other}",
                      sets=ZF, spoils=ALL & ~ZF)  # fmt: skip
        elif operation == "popcnt":
            self.emit(f"popcnt {target}, {other}", sets=ALL)
        else:
            self.emit(f"bswap {target}")

    def multiply(self) -> None:
        size = self.size()
        spoilt = SF | ZF | AF | PF
        pick = self.number.randrange(4)
        if pick == 0:
            size = max(size, 2)
            self.emit(
                f"imul {self.register(size)}, {self.register(size)}", sets=CF | OF, spoils=spoilt
            )
        elif pick == 1:
            operation = self.number.choice(("mul", "imul"))
            self.emit(f"{operation} {self.register(size)}", sets=CF | OF, spoils=spoilt)
        else:  # may be #DE
            operation = self.number.choice(("div", "idiv"))
            divisor = self.register(size)
            clear = ("xor edx, edx", "movzx eax, ax") if pick == 2 else ()
            self.guarded(*clear, f"{operation} {divisor}", spoils=ALL)

    def condition(self) -> None:
        usable = [name for name, flags in _CONDITIONS.items() if not flags & self.undefined]
        if not usable:
            return self.emit(f"cmp {self.register(4)}, {self.register(4)}", sets=ALL)
        name = self.number.choice(usable)
        pick = self.number.randrange(4)
        if pick == 0:
            self.emit(f"set{name} {self.register(1)}")
        elif pick == 1:
            size = self.number.choice((2, 4, 8))
            self.emit(f"cmov{name} {self.register(size)}, {self.register(size)}")
        elif pick == 2:
            label = self.label()
            target = self.register(8)
            self.emit(f"j{name} {label}", f"lea {target}, [{target} + 3]", f"{label}:")
        elif not self.undefined & (SF | ZF | AF | PF | CF):
            self.emit("lahf")
        else:
            self.emit("sahf", sets=SF | ZF | AF | PF | CF)
        return None

    def move(self) -> None:
        size = self.size()
        a, b = self.register(8), self.register(8)
        line = self.number.choice(
            (
                f"mov {_POINTER[size]} {self.write_at(size)}, {self.register(size)}",
                f"mov {self.register(size)}, {self.read_at(size)}",
                f"movzx {self.register(4)}, {self.register(1)}",
                f"movsx {a}, {self.register(2)}",
                f"movsxd {a}, {self.register(4)}",
                f"lea {a}, [{b} + 4 * {self.number.choice(GENERAL)} - 9]",
                f"xchg {self.register(size)}, {_POINTER[size]} {self.write_at(size)}",
                f"push {a}\npop {b}",
                f"mov {a}, {self.number.getrandbits(63):#x}",
                *("cbw", "cwde", "cdqe", "cwd", "cdq", "cqo", "stc", "clc", "cmc"),
            )
        )
        flags = CF if line in ("stc", "clc") else 0
        if line == "cmc" and self.undefined & CF:
            line = "nop"
        self.emit(line, sets=flags)

    def string(self) -> None:
        suffix = self.number.choice("bwdq")
        count = self.number.randrange(1, 30)
        self.emit(
            f"mov esi, {DATA + self.number.randrange(0x800):#x}",
            f"mov edi, {STORED + self.number.randrange(0x800):#x}",
            f"mov ecx, {count}",
        )
        operation = self.number.choice(("movs", "stos", "lods", "cmps", "scas"))
        if operation in ("cmps", "scas"):
            self.emit(f"{self.number.choice(('repe', 'repne'))} {operation}{suffix}", sets=ALL)
        else:
            self.emit(f"rep {operation}{suffix}")

    # ---- faults ------------------------------------------------------------------------

    def label(self) -> str:
        self._labels += 1
        return f"l{self._labels}"

    def guarded(self, *lines: str, spoils: int = 0) -> None:
        """The last of them may fault; the handler then goes on behind it."""
        label = self.label()
        self.emit(f"lea r15, [rip + {label}]", *lines, f"{label}:", spoils=spoils)

    def fault(self) -> None:
        self.guarded(
            *self.number.choice(
                (
                    ("ud2",),
                    ("int3",),
                    ("mov cr0, rax",),
                    (
                        "mov r14, 0x700000000",
                        f"{self.number.choice(('mov rax', 'add rax'))}, [r14]",
                    ),
                    ("mov r14, 0x700000ffd", "mov [r14], rax"),
                    ("mov r14, 0x8000000000000000", "mov eax, [r14]"),
                    ("push 0", "popfq", "div ah", "xor eax, eax", "div al"),
                )
            ),
            spoils=ALL,
        )

    # ---- x87 and MMX ---------------------------------------------------------------------

    def x87(self) -> None:
        if self.depth < 2 or (self.depth < 6 and self.number.random() < 0.3):
            self.depth += 1
            size = self.number.choice((4, 8))
            integer = self.number.choice((2, 4, 8))
            return self.emit(
                self.number.choice(
                    (
                        *("fld1", "fldz"),
                        f"fld {_POINTER[size]} {self.read_at(size)}",
                        f"fld {_POINTER[size]} {self.read_at(size)}",
                        f"fild {_POINTER[integer]} {self.read_at(integer)}",
                        f"fld st({self.number.randrange(self.depth - 1)})"
                        if self.depth > 1
                        else "fld1",
                    )
                )
            )
        i = self.number.randrange(1, self.depth)
        size = self.number.choice((4, 8))
        pick = self.number.random()
        if pick < 0.35:
            operation = self.number.choice(("fadd", "fsub", "fsubr", "fmul", "fdiv", "fdivr"))
            operands = self.number.choice(
                (f"st, st({i})", f"st({i}), st", f"{_POINTER[size]} {self.read_at(size)}")
            )
            self.emit(f"{operation} {operands}")
        elif pick < 0.5:
            operation = self.number.choice(
                ("fchs", "fabs", "fsqrt", "frndint", f"fxch st({i})", f"fxch st({i})")
            )
            self.emit(operation)
        elif pick < 0.6:
            compare = self.number.choice((f"fcom st({i})", f"fucom st({i})", "ftst", "fxam"))
            mask = 0x4700 if compare == "fxam" else 0x4500
            self.emit(compare, "fnstsw ax", f"and eax, {mask}", sets=ALL & ~AF, spoils=AF)
        elif pick < 0.7:
            operation = self.number.choice(("fcomi", "fucomi"))
            self.emit(f"{operation} st, st({i})", sets=CF | PF | ZF, spoils=OF | SF | AF)
        elif pick < 0.75:
            usable = [n for n, f in (("b", CF), ("e", ZF), ("be", CF | ZF), ("u", PF),
                                     ("nb", CF), ("ne", ZF), ("nbe", CF | ZF), ("nu", PF))
                      if not f & self.undefined]  # fmt: skip
            if usable:
                self.emit(f"fcmov{self.number.choice(usable)} st, st({i})")
        elif pick < 0.85:
            self.emit(f"fst {_POINTER[size]} {self.write_at(size)}")
        else:
            self.depth -= 1
            integer = self.number.choice((2, 4, 8))
            self.emit(
                self.number.choice(
                    (
                        f"fstp {_POINTER[size]} {self.write_at(size)}",
                        f"fistp {_POINTER[integer]} {self.write_at(integer)}",
                        f"fstp tbyte ptr {self.write_at(10)}",
                        f"faddp st({i}), st",
                        f"fmulp st({i}), st",
                        f"fdivrp st({i}), st",
                        "fstp st(0)",
                    )
                )
            )
        return None

    def mmx(self) -> None:
        """A few instructions, and the x87 stack is empty behind them."""
        if self.depth:
            return
        operation = self.number.choice(
            (
                "paddd psubw pmullw pmaddwd pcmpgtb packsswb punpcklbw pxor psllq pavgb "
                "pmaxsw psadbw pshufb phaddw"
            ).split()
        )
        self.emit(
            f"movq mm0, {self.read_at(8)}",
            f"movq mm1, {self.register(8)}",
            f"{operation} mm0, mm1",
            f"movq {self.register(8)}, mm0",
            "emms",
        )

    # ---- SSE -----------------------------------------------------------------------------
    #
    # XMM0 to 3 hold single, XMM4 to 7 double precision, the others anything: so of NaNs there is
    # one kind only. Of two, the software CPU takes the wrong one.

    def single(self) -> str:
        return f"xmm{self.number.randrange(4)}"

    def double(self) -> str:
        return f"xmm{self.number.randrange(4, 8)}"

    def xmm(self) -> str:
        return f"xmm{self.number.randrange(8, 16)}"

    def any_xmm(self) -> str:
        return f"xmm{self.number.randrange(16)}"

    def xmm_source(self) -> str:
        return self.any_xmm() if self.number.random() < 0.6 else self.read_at(16, 16)

    def float_source(self, kind: str) -> str:
        """A register or memory, for an instruction that ends so."""
        offset = self.number.randrange(0, 0x400, 16)
        size = {"ss": 4, "sd": 8}.get(kind)
        at = f"[{DATA + offset + (0x400 if kind[1] == 'd' else 0):#x}]"
        if self.number.random() < 0.3:
            return at if size is None else f"{_POINTER[size]} {at}"
        return self.single() if kind[1] == "s" else self.double()

    def sse_float(self) -> None:
        n = self.number
        kind = n.choice(("ps", "pd", "ss", "sd"))
        register = self.single if kind[1] == "s" else self.double
        source = self.float_source(kind)
        pick = n.random()
        if pick < 0.45:
            operation = n.choice(
                ("add", "sub", "mul", "div", "sqrt", "min", "max")[: 5 if self.daz else 7]
            )
            self.emit(f"{operation}{kind} {register()}, {source}")
        elif pick < 0.55:
            to = self.xmm()
            self.emit(f"movaps {to}, {register()}", f"cmp{kind} {to}, {source}, {n.randrange(8)}")
        elif pick < 0.65:
            operation = n.choice(("comis", "ucomis"))
            self.emit(f"{operation}{kind[1]} {register()}, {register()}", sets=ALL)
        elif pick < 0.85:
            wide = n.choice((4, 8))
            self.emit(
                n.choice(
                    (
                        f"cvtsi2ss {self.single()}, {self.register(wide)}",
                        f"cvtsi2sd {self.double()}, {self.register(wide)}",
                        f"cvtss2si {self.register(wide)}, {self.any_xmm()}",
                        f"cvttsd2si {self.register(wide)}, {self.any_xmm()}",
                        f"cvtsd2si {self.register(wide)}, {self.any_xmm()}",
                        f"cvttss2si {self.register(wide)}, {self.any_xmm()}",
                        f"cvtss2sd {self.double()}, {self.single()}",
                        f"cvtsd2ss {self.single()}, {self.double()}",
                        f"cvtps2pd {self.double()}, {self.single()}",
                        f"cvtpd2ps {self.single()}, {self.double()}",
                        f"cvtdq2ps {self.single()}, {self.xmm_source()}",
                        f"cvtdq2pd {self.double()}, {self.any_xmm()}",
                        f"cvtps2dq {self.xmm()}, {self.xmm_source()}",
                        f"cvttps2dq {self.xmm()}, {self.xmm_source()}",
                        f"cvtpd2dq {self.xmm()}, {self.xmm_source()}",
                        f"cvttpd2dq {self.xmm()}, {self.xmm_source()}",
                    )
                )
            )
        else:
            single, double = self.float_source("ps"), self.float_source("pd")
            self.emit(
                n.choice(
                    (
                        f"shufps {self.single()}, {single}, {n.randrange(256)}",
                        f"shufpd {self.double()}, {double}, {n.randrange(4)}",
                        f"unpcklps {self.single()}, {single}",
                        f"unpckhpd {self.double()}, {double}",
                        f"andnps {self.xmm()}, {self.xmm_source()}",
                        f"xorpd {self.xmm()}, {self.xmm_source()}",
                        f"movmskps {self.register(4)}, {self.any_xmm()}",
                        f"movmskpd {self.register(4)}, {self.any_xmm()}",
                        f"haddps {self.single()}, {single}",
                        f"addsubpd {self.double()}, {double}",
                        f"roundsd {self.double()}, {self.double()}, {n.randrange(8)}",
                        f"roundps {self.single()}, {single}, {n.randrange(8)}",
                        f"insertps {self.single()}, {self.single()}, {n.randrange(256)}",
                        f"movddup {self.double()}, {self.double()}",
                        f"movshdup {self.single()}, {single}",
                    )
                )
            )

    def sse_integer(self) -> None:
        n = self.number
        pick = n.random()
        if pick < 0.5:
            operation = n.choice(
                (
                    "paddb paddw paddd paddq paddsb paddusw psubb psubd psubq psubsw pmullw "
                    "pmulhw pmulhuw pmuludq pmaddwd psadbw pavgw pmaxub pminsw pcmpeqb "
                    "pcmpgtd pand pandn por pxor packsswb packuswb packssdw punpcklbw "
                    "punpckhwd punpckldq punpckhqdq psllw psrld psraw psrlq pshufb phaddd "
                    "phsubw pmaddubsw pmulhrsw psignd pabsw pmulld pmuldq pminud pmaxsb "
                    "pcmpeqq pcmpgtq packusdw"
                ).split()
            )
            to, source = self.xmm(), self.xmm_source()
            if to == source:  # where PHADD and PHSUB read what they have just written
                to = f"xmm{8 + (int(to[3:]) - 7) % 8}"
            return self.emit(f"{operation} {to}, {source}")
        if pick < 0.6:
            return self.emit(f"ptest {self.xmm()}, {self.xmm_source()}", sets=ALL)
        size = n.choice((4, 8))
        letter = {4: "d", 8: "q"}[size]
        return self.emit(
            n.choice(
                (
                    f"mov{letter} {self.xmm()}, {self.register(size)}",
                    f"mov{letter} {self.register(size)}, {self.xmm()}",
                    f"movups {self.write_at(16)}, {self.any_xmm()}",
                    f"movaps {self.write_at(16, 16)}, {self.any_xmm()}",
                    f"movdqu {self.xmm()}, {self.read_at(16)}",
                    f"movdqa {self.xmm()}, {self.read_at(16, 16)}",
                    f"movhps {self.xmm()}, {self.read_at(8)}",
                    f"movaps {self.xmm()}, {self.any_xmm()}",
                    f"movlpd {self.write_at(8)}, {self.xmm()}",
                    f"movss {self.xmm()}, dword ptr {self.read_at(4)}",
                    f"movsd {self.xmm()}, {self.xmm()}",
                    f"pshufd {self.xmm()}, {self.xmm_source()}, {n.randrange(256)}",
                    f"pshuflw {self.xmm()}, {self.xmm_source()}, {n.randrange(256)}",
                    f"pslldq {self.xmm()}, {n.randrange(18)}",
                    f"psrad {self.xmm()}, {n.randrange(40)}",
                    f"psllq {self.xmm()}, {n.randrange(70)}",
                    f"palignr {self.xmm()}, {self.xmm_source()}, {n.randrange(34)}",
                    f"pblendw {self.xmm()}, {self.xmm_source()}, {n.randrange(256)}",
                    f"pinsrw {self.xmm()}, {self.register(4)}, {n.randrange(8)}",
                    f"pextrw {self.register(4)}, {self.xmm()}, {n.randrange(8)}",
                    f"pextr{letter} {self.register(size)}, {self.xmm()}, {n.randrange(16 // size)}",
                    f"pmovmskb {self.register(4)}, {self.xmm()}",
                    f"pmovzxbw {self.xmm()}, {self.xmm()}",
                    f"pmovsxdq {self.xmm()}, {self.xmm()}",
                )
            )
        )

    def control(self) -> None:
        """Rounding, precision, denormals; MXCSR and the control word as they are stored."""
        n, at = self.number, self.write_at(4)
        if n.random() < 0.5:
            word = 0x7F | n.choice((0, 2, 3, 3)) << 8 | n.randrange(4) << 10
            self.emit(f"mov word ptr {at}, {word:#x}", f"fldcw {at}", f"fnstcw {at}")
        else:
            word = 0x1F80 | n.randrange(4) << 13 | n.choice((0, 0, 0x8000))
            word |= n.choice((0, 0x40)) if self.daz else 0
            self.emit(f"mov dword ptr {at}, {word:#x}", f"ldmxcsr {at}")

    # ---- exits ---------------------------------------------------------------------------

    def access(self) -> None:
        pick = self.number.randrange(6)
        if pick < 2:
            self.exit(self.number.choice(("in eax, 0x10", "in al, 0x12", "in ax, 0x14")))
        elif pick < 4:
            self.exit(self.number.choice(("out 0x11, eax", "out 0x13, al", "out 0x15, ax")))
        else:
            size = self.number.choice((1, 2, 4, 8))
            at = f"{_POINTER[size]} [{MMIO + 8 * self.number.randrange(16):#x}]"
            register = self.register(size)
            self.exit(f"mov {register}, {at}" if pick == 4 else f"mov {at}, {register}")
