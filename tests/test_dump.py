"""Registers as text: golden strings, and what is said about missing parts."""

import struct

import pytest

from kvmaio.cpu import Context, CpuState
from kvmaio.dump import format_context, format_register, format_state

# ---- section D of the reference, row "Registers" ---------------------------------------


@pytest.mark.parametrize(
    ("value", "bits", "text"),
    [
        (0, 8, "0x00"),
        (0xAB, 8, "0xab"),
        (0x12, 16, "0x0012"),
        (0xDEADBEEF, 32, "0xdeadbeef"),
        (0x1000, 64, "0x0000000000001000"),
        (b"\x78\x56\x34\x12", 32, "0x12345678"),
        (1, 128, "[01 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00]"),
        (bytes(range(16)), 128, "[00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f]"),
        (b"\xff" + bytes(31), 256, "[ff" + " 00" * 31 + "]"),
        (b"\xff" * 64, 512, "[ff" + " ff" * 63 + "]"),
        (1 << 1023, 1024, "[00" + " 00" * 126 + " 80]"),
    ],
)
def test_registers_of_8_to_64_bits_are_hex_and_of_128_to_1024_bytes(value, bits, text):
    assert format_register(value, bits) == text


@pytest.mark.parametrize(
    ("value", "bits", "problem"),
    [
        (0, 80, "no register has 80 bits"),
        (0, 2048, "no register has 2048 bits"),
        (256, 8, "256 does not fit in 8 bits"),
        (-1, 64, "-1 does not fit in 64 bits"),
        (1 << 128, 128, "does not fit in 128 bits"),
        (bytes(15), 128, "15 bytes for a register of 128 bits"),
    ],
)
def test_a_register_that_does_not_fit_is_refused(value, bits, problem):
    with pytest.raises(ValueError, match=problem):
        format_register(value, bits)


# ---- the short form -----------------------------------------------------------------------


def test_the_context_after_reset():
    assert format_context(Context()) == (
        "rax 0x0000000000000000  rbx 0x0000000000000000"
        "  rcx 0x0000000000000000  rdx 0x0000000000000600\n"
        "rsi 0x0000000000000000  rdi 0x0000000000000000"
        "  rsp 0x0000000000000000  rbp 0x0000000000000000\n"
        "r8  0x0000000000000000  r9  0x0000000000000000"
        "  r10 0x0000000000000000  r11 0x0000000000000000\n"
        "r12 0x0000000000000000  r13 0x0000000000000000"
        "  r14 0x0000000000000000  r15 0x0000000000000000\n"
        "rip 0x000000000000fff0  rflags 0x0000000000000002 (none, IOPL 0)\n"
        "cs f000  ds 0000  es 0000  fs 0000  gs 0000  ss 0000  cs.base 0xffff0000  (real mode)\n"
        "cr0 0x0000000060000010  cr2 0x0000000000000000"
        "  cr3 0x0000000000000000  cr4 0x0000000000000000\n"
        "efer 0x0000000000000000  gdt 0x0+0xffff  idt 0x0+0xffff"
    )


def test_flags_and_mode_are_named():
    context = Context(rflags=0x3246, cr0=0x80000011, efer=0xD00, rip=0xFFFFFFFF81000000)
    context.cs.l = 1
    context.ss.dpl = 3
    text = format_context(context)
    assert "rip 0xffffffff81000000  rflags 0x0000000000003246 (PF ZF IF, IOPL 3)" in text
    assert "(64-bit, CPL 3)" in text


@pytest.mark.parametrize(
    ("cr0", "rflags", "efer", "long", "big", "mode"),
    [
        (0, 2, 0, 0, 0, "real mode"),
        (1, 2, 0, 0, 0, "16-bit, CPL 0"),
        (1, 2, 0, 0, 1, "32-bit, CPL 0"),
        (1, 2, 0, 1, 1, "32-bit, CPL 0"),  # L counts in long mode only
        (1, 2, 0x400, 0, 1, "32-bit, CPL 0"),
        (1, 2, 0x400, 1, 0, "64-bit, CPL 0"),
        (1, 0x20002, 0, 0, 0, "virtual-8086 mode"),
    ],
)
def test_the_mode_is_what_the_next_instruction_is_decoded_in(cr0, rflags, efer, long, big, mode):
    context = Context(cr0=cr0, rflags=rflags, efer=efer)
    context.cs.l, context.cs.db = long, big
    assert f"({mode})" in format_context(context)


# ---- the long form --------------------------------------------------------------------------


def section(text: str, title: str) -> list[str]:
    """The lines below `title`, or what stands beside it."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{title}:"))
    if beside := lines[start].removeprefix(f"{title}:").strip():
        return [beside]
    found = []
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        found.append(line.strip())
    return found


def test_a_dump_has_every_section():
    titles = [
        line.partition(":")[0]
        for line in format_state(CpuState(Context())).splitlines()
        if not line.startswith(" ")
    ]
    assert titles == [
        *("integer", "special", "segments", "control", "FPU, SSE and AVX", "XCRs"),
        *("debug registers", "events", "MP state", "local APIC", "MSRs"),
    ]


def test_what_is_missing_is_reported_not_fatal():
    text = format_state(CpuState(Context()))
    for title in ("FPU, SSE and AVX", "XCRs", "events", "MP state", "local APIC", "MSRs"):
        assert f"{title}: not available on this host" in text.splitlines()


def test_segments():
    context = Context()
    context.gdt.base, context.gdt.limit = 0x5000, 0x27
    context.ldt.unusable = 1
    context.fs.present = 0
    lines = section(format_state(CpuState(context)), "segments")
    assert lines[0] == (
        "cs  0xf000  base 0x00000000ffff0000  limit 0x0000ffff  "
        "type 0xb dpl 0 db 0 s 1 l 0 g 0 avl 0 present"
    )
    assert lines[3].endswith("not present") and lines[7].endswith("unusable")
    assert lines[8] == "gdt         base 0x0000000000005000  limit 0x0027"
    assert len(lines) == 10


def test_control_registers_name_their_bits():
    context = Context(cr0=0x80000011, cr3=0x2000, cr4=0x20, efer=0x500, apic_base=0xFEE00900)
    assert section(format_state(CpuState(context)), "control") == [
        "cr0       0x0000000080000011 (PE ET PG)",
        "cr2       0x0000000000000000",
        "cr3       0x0000000000002000",
        "cr4       0x0000000000000020 (PAE)",
        "cr8       0x0000000000000000",
        "efer      0x0000000000000500 (LME LMA)",
        "apic_base 0x00000000fee00900",
    ]


def xsave_area(components: int, *, size: int = 4096) -> bytearray:
    area = bytearray(size)
    struct.pack_into("<HHBxHQQI", area, 0, 0x37F, 7 << 11, 1 << 7, 0x1D9, 0x1234, 0x5678, 0x1F80)
    struct.pack_into("<QH", area, 32, 0xC000000000000000, 0x3FFF)  # st0 = 1.5: top is 7
    area[160:176] = bytes(range(16))  # xmm0
    if size >= 592:
        struct.pack_into("<Q", area, 512, components)
        area[576 + 16 : 576 + 32] = bytes(range(16, 32))  # the upper half of ymm1
    return area


def test_fpu_sse_and_avx():
    state = CpuState(Context(), xsave=bytes(xsave_area(0b111)))
    assert section(format_state(state), "FPU, SSE and AVX") == [
        "fcw 0x037f  fsw 0x3800  ftw 0x80  fop 0x01d9  mxcsr 0x00001f80",
        "fip 0x0000000000001234  fdp 0x0000000000005678",
        "st0 0x3fff:c000000000000000 = 1.5",
        "xmm0  [00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f]",
        "ymm1  [00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00]"
        "  upper [10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f]",
        "ymm 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15: 0",
    ]


def test_upper_halves_count_only_where_the_header_says_so():
    for area in (xsave_area(0b011), xsave_area(0b111, size=512)):
        text = format_state(CpuState(Context(), xsave=bytes(area)))
        assert "upper" not in text
        assert "xmm 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15: 0" in text


def test_components_that_are_not_decoded_are_named():
    text = format_state(CpuState(Context(), xsave=bytes(xsave_area(0b1011100011))))
    assert "in use but not shown: XSAVE components 5, 6, 7, 9" in text


@pytest.mark.parametrize(
    ("exponent", "significand", "text"),
    [
        (0, 0, "0"),
        (0x8000, 0, "-0"),
        (0xC000, 0x8000000000000000, "-2"),
        (0x7FFF, 0x8000000000000000, "inf"),
        (0xFFFF, 0x8000000000000000, "-inf"),
        (0x7FFF, 0xC000000000000000, "nan"),
        (0x7FFE, 0x8000000000000000, "1 * 2**16383"),
        (0x0000, 0x4000000000000000, "0.5 * 2**-16382"),
    ],
)
def test_x87_values_in_decimal(exponent, significand, text):
    area = xsave_area(0b1)
    struct.pack_into("<QH", area, 32, significand, exponent)
    lines = section(format_state(CpuState(Context(), xsave=bytes(area))), "FPU, SSE and AVX")
    assert lines[2] == f"st0 {exponent:#06x}:{significand:016x} = {text}"


def test_xcrs_debug_registers_and_mp_state():
    state = CpuState(
        Context(), xcrs={0: 7}, debug_registers=(1, 2, 3, 4, 0xFFFF0FF0, 0x401), mp_state=3
    )
    text = format_state(state)
    assert section(text, "XCRs") == ["xcr0 0x0000000000000007"]
    assert section(text, "debug registers") == [
        "dr0 0x0000000000000001  dr1 0x0000000000000002"
        "  dr2 0x0000000000000003  dr3 0x0000000000000004",
        "dr6 0x00000000ffff0ff0  dr7 0x0000000000000401",
    ]
    assert section(text, "MP state") == ["3 (halted)"]
    assert section(format_state(CpuState(Context(), mp_state=99)), "MP state") == ["99 (unknown)"]


def test_events():
    events = bytearray(64)
    events[0:8] = struct.pack("<4BI", 1, 14, 1, 0, 0x11)  # #PF injected, with error code
    events[8:12] = bytes([1, 0x30, 0, 2])  # interrupt 0x30, shadow after STI
    events[12:16] = bytes([0, 1, 1, 0])
    struct.pack_into("<II", events, 16, 0x9F, 0xD)
    events[24:29] = bytes([0, 1, 0, 1, 1])
    events[55] = 1
    struct.pack_into("<Q", events, 56, 0xDEAD)
    assert section(format_state(CpuState(Context(), events=bytes(events))), "events") == [
        "exception 14 injected, error code 0x11, payload 0xdead",
        "interrupt 0x30 injected",
        "NMI pending, masked",
        "interrupts held back by STI",
        "SMI pending",
        "INIT latched",
        "triple fault pending",
        "flags 0xd, SIPI vector 0x9f",
    ]


def test_no_events():
    assert section(format_state(CpuState(Context(), events=bytes(64))), "events") == [
        "flags 0x0, SIPI vector 0x0"
    ]


def test_local_apic():
    page = bytearray(0x400)
    struct.pack_into("<I", page, 0x20, 2 << 24)
    struct.pack_into("<I", page, 0xF0, 0x1FF)
    struct.pack_into("<I", page, 0x110, 1 << 1)  # in service: 32 + 1
    struct.pack_into("<I", page, 0x200 + 0x70, 1 << 31)  # requested: 224 + 31
    struct.pack_into("<I", page, 0x200, 1 << 4)
    lines = section(format_state(CpuState(Context(), lapic=bytes(page))), "local APIC")
    assert lines[0] == "id 0x2000000  version 0x0  tpr 0x0  ldr 0x0  dfr 0x0  svr 0x1ff"
    assert lines[3] == "in service: 0x21; requested: 0x4, 0xff"


def test_msrs_are_sorted_and_named():
    state = CpuState(Context(), msrs={0xC0000082: 0xFFFF, 0x10: 1, 0x7777: 2})
    assert section(format_state(state), "MSRs") == [
        "0x00000010 0x0000000000000001 TSC",
        "0x00007777 0x0000000000000002",
        "0xc0000082 0x000000000000ffff LSTAR",
    ]
