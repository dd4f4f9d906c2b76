import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio.boot import Flat
from kvmaio.boot.faults import STUB, FaultFrame
from kvmaio.cpu import Context, DescriptorTable, Segment
from kvmaio.errors import ConfigurationError
from kvmaio.memory import GuestMemory
from tests.assembler import assemble
from tests.boot.walker import Mapping, gate, ram, segment_at, translate, word

MIB = 1 << 20
KIB = 1 << 10
RESERVED = 128 * KIB
MODES = ("real16", "prot32", "long64", "user64")
PAGED = ("long64", "user64")

NO_LDT = Segment(limit=0, type=2, s=0, present=0, unusable=1)

STUB_SOURCE = """
restartable:
    cmp qword ptr [rsp], 13
    jne again
    test byte ptr [rsp+8], 2
    jnz final
    push rax
    mov rax, [rsp+24]
    cmp byte ptr [rax], 0xf4
    pop rax
    je halt
again:
    add rsp, 16
    lidt [rip+no_idt]
    iretq
halt:
    add rsp, 16
    inc qword ptr [rsp]
    hlt
    iretq
final:
    lidt [rip+no_idt]
    ud2
no_idt:
    .zero 10
"""


def data(selector: int) -> Segment:
    return Segment(limit=0xFFFF_FFFF, selector=selector, type=3, dpl=selector & 3, db=1, g=1)


def test_real16_context_is_plain_real_mode():
    memory = ram(64 * KIB)
    state = Flat(b"\xf4", address=0x1000).place(memory)
    assert state.context == Context(
        rdx=0,
        rip=0x1000,
        rsp=0x7000,
        rflags=2,
        cs=Segment(type=0xB),
        tr=Segment(type=0xB, s=0),
        ldt=NO_LDT,
        gdt=DescriptorTable(0, 0xFFFF),
        idt=DescriptorTable(0, 0x3FF),
        cr0=0x10,
    )
    assert (state.cpuid, state.xcr0, state.platform) == ("emulator-safe", False, "bare")
    assert state.fault_frame is None
    assert memory.read(0, 64 * KIB) == bytes(0x1000) + b"\xf4" + bytes(0xEFFF)


def test_prot32_context_is_flat_without_paging():
    memory = ram(MIB)
    state = Flat(b"\xf4", address=0x1000, mode="prot32", entry=0x1234).place(memory)
    context = state.context
    tables = MIB - 0x1000
    flat_data = data(0x10)
    assert context == Context(
        rdx=0,
        rip=0x1234,
        rsp=tables,
        cs=Segment(limit=0xFFFF_FFFF, selector=0x08, type=0xB, db=1, g=1),
        ds=flat_data,
        es=flat_data,
        fs=flat_data,
        gs=flat_data,
        ss=flat_data,
        tr=Segment(base=tables + 0x40, limit=0x67, selector=0x18, type=0xB, s=0),
        ldt=NO_LDT,
        gdt=DescriptorTable(tables, 0x1F),
        idt=DescriptorTable(0, 0),
        cr0=0x33,
    )
    assert word(memory, tables) == 0
    for segment in (context.cs, context.ds, context.tr):
        assert segment_at(memory, tables, segment.selector, bits=32) == segment
    assert word(memory, context.tr.base + 4, 4) == context.rsp  # ESP0
    assert word(memory, context.tr.base + 8, 4) == 0x10  # SS0
    assert word(memory, context.tr.base + 0x66, 2) == 0x68  # no I/O bitmap


def test_long64_context_is_cpl0_with_paging():
    memory = ram(4 * MIB)
    state = Flat(b"\xf4", address=0x20_0000, mode="long64").place(memory)
    context = state.context
    tables = 4 * MIB - 7 * 4 * KIB
    gdt = tables + 6 * 4 * KIB
    flat_data = data(0x10)
    assert context == Context(
        rdx=0,
        rip=0x20_0000,
        rsp=tables,
        cs=Segment(limit=0xFFFF_FFFF, selector=0x08, type=0xB, l=1, g=1),
        ds=flat_data,
        es=flat_data,
        fs=flat_data,
        gs=flat_data,
        ss=flat_data,
        tr=Segment(base=gdt + 0x80, limit=0x67, selector=0x38, type=0xB, s=0),
        ldt=NO_LDT,
        gdt=DescriptorTable(gdt, 0x47),
        idt=DescriptorTable(0, 0),
        cr0=0x8001_0033,
        cr3=tables,
        cr4=0x620,
        efer=0x500,
    )
    assert (state.cpuid, state.xcr0, state.platform) == ("emulator-safe", False, "bare")
    assert state.fault_frame is None


def test_user64_context_is_cpl3_with_all_ports():
    memory = ram(4 * MIB)
    state = Flat(b"\xf4", address=0x1000, mode="user64").place(memory)
    context = state.context
    tables = 4 * MIB - 14 * 4 * KIB
    gdt = tables + 8 * 4 * KIB
    user_data = data(0x23)
    assert context == Context(
        rdx=0,
        rip=0x1000,
        rsp=tables,
        rflags=0x3002,
        cs=Segment(limit=0xFFFF_FFFF, selector=0x2B, type=0xB, dpl=3, l=1, g=1),
        ds=user_data,
        es=user_data,
        fs=user_data,
        gs=user_data,
        ss=user_data,
        tr=Segment(base=gdt + 0x3000, limit=0x2FFF, selector=0x38, type=0xB, s=0),
        ldt=NO_LDT,
        gdt=DescriptorTable(gdt, 0x47),
        idt=DescriptorTable(gdt + 0x1000, 0xFFF),
        cr0=0x8001_0033,
        cr3=tables,
        cr4=0x4_0620,
        efer=0x500,
    )
    assert (state.cpuid, state.xcr0, state.platform) == ("host", True, "bare")
    task = context.tr.base
    assert word(memory, task + 4) == gdt + 0x1000  # RSP0
    assert word(memory, task + 0x66, 2) == 0x68
    assert memory.read(task + 0x68, 0x2000) == bytes(0x2000)
    assert state.fault_frame == gdt + 0x1000 - 7 * 8
    assert FaultFrame.read(memory, state.fault_frame) is None


@pytest.mark.parametrize("mode", PAGED)
def test_gdt_of_the_64_bit_modes_has_every_segment(mode):
    memory = ram(4 * MIB)
    context = Flat(b"\xf4", 0x1000, mode).place(memory).context
    kernel_code = Segment(limit=0xFFFF_FFFF, selector=0x08, type=0xB, l=1, g=1)
    expected = {
        0x08: kernel_code,
        0x10: data(0x10),
        0x18: Segment(limit=0xFFFF_FFFF, selector=0x18, type=0xB, db=1, g=1),
        0x23: data(0x23),
        0x2B: Segment(limit=0xFFFF_FFFF, selector=0x2B, type=0xB, dpl=3, l=1, g=1),
        0x38: context.tr,
    }
    assert word(memory, context.gdt.base) == 0
    for selector, segment in expected.items():
        assert segment_at(memory, context.gdt.base, selector) == segment


@pytest.mark.parametrize("size", [2 * MIB, 4 * MIB, 2 * MIB + 4 * KIB, 2 * MIB + 32 * KIB])
@pytest.mark.parametrize("mode", PAGED)
def test_first_4_gib_are_mapped_one_to_one(mode, size):
    memory = ram(size)
    context = Flat(b"\xf4", 0x1000, mode).place(memory).context
    tables = context.cr3
    for address in (0, 0x1234, tables - 1, size, 0x1FF_FFF, 0x40_0000, 0xC000_0000, 0xFFFF_FFFF):
        hidden = mode == "user64" and tables <= address < size
        expected = Mapping(address, writable=True, user=not hidden)
        assert translate(memory, context.cr3, address) == expected
    for address in range(tables, size, 4 * KIB):
        expected = Mapping(address, writable=True, user=mode == "long64")
        assert translate(memory, context.cr3, address) == expected
    assert translate(memory, context.cr3, 1 << 32) is None
    assert translate(memory, context.cr3, 1 << 39) is None


def test_every_vector_has_a_handler_out_of_the_guests_reach():
    memory = ram(2 * MIB)
    context = Flat(b"\xf4", 0x1000, "user64").place(memory).context
    with_error_code = {8, 10, 11, 12, 13, 14, 17, 21, 29, 30}
    final = {1, 2, 3, 4, 8, 18, *range(32, 256)}
    for vector in range(256):
        handler, selector, attributes = gate(memory, context.idt.base, vector)
        assert (selector, attributes) == (0x08, 0x8E)
        assert translate(memory, context.cr3, handler) == Mapping(handler, True, user=False)
        code = memory.read(handler, 12)
        assert code[:2] == (b"\x66\x90" if vector in with_error_code else b"\x6a\x00")
        assert code[2] == 0x68 and int.from_bytes(code[3:7], "little") == vector
        assert code[7] == 0xE9
        target = handler + 12 + int.from_bytes(code[8:12], "little", signed=True)
        first = memory.read(target, 2)
        assert first == (b"\x0f\x01" if vector in final else b"\x48\x83"), "lidt, or the comparison"


def test_stub_is_what_its_source_says():
    assert assemble(STUB_SOURCE, "user64") == STUB


def test_fault_frame_reads_what_the_cpu_pushes():
    memory = ram(2 * MIB)
    frame = FaultFrame(14, 6, 0x1009, 0x2B, 0x13002, 0x1F_2000, 0x23)
    words = (14, 6, 0x1009, 0x2B, 0x13002, 0x1F_2000, 0x23)
    memory.write(0x5000, b"".join(value.to_bytes(8, "little") for value in words))
    assert FaultFrame.read(memory, 0x5000) == frame
    assert str(frame) == "#PF (vector 14, error code 0x6) at rip 0x1009"


@given(
    mode=st.sampled_from(MODES),
    pages=st.integers(512, 1024),
    address=st.integers(0, 0xFFFF),
    code=st.binary(min_size=1, max_size=300),
)
def test_nothing_below_the_last_128_kib_is_touched(mode, pages, address, code):
    size = pages * 4 * KIB
    memory = ram(size)
    memory.write(0, b"\xaa" * size)
    Flat(code, address, mode).place(memory)
    expected = bytearray(b"\xaa" * (size - RESERVED))
    expected[address : address + len(code)] = code
    assert memory.read(0, size - RESERVED) == expected


@pytest.mark.parametrize("mode", MODES)
def test_loading_again_gives_the_same(mode):
    memory = ram(2 * MIB)
    image = Flat(b"\xf4", 0x1000, mode)
    first = image.place(memory)
    before = memory.read(0, 2 * MIB)
    first.context.rax = 5  # the engine may change what it was given
    memory.write(2 * MIB - 0x2000, b"\xff" * 0x2000)  # into the TSS and the tables
    second = image.place(memory)
    assert second.context.rax == 0
    if mode == "user64":  # in the others, part of this is not the engine's
        assert memory.read(0, 2 * MIB) == before


@pytest.mark.parametrize("mode", ["prot32", "long64", "user64"])
def test_ram_above_4_gib_is_left_alone(mode):
    memory = ram(2 * MIB)
    memory.add_ram(1 << 32, 2 * MIB)
    context = Flat(b"\xf4", 0x1000, mode).place(memory).context
    assert 2 * MIB - RESERVED < context.rsp < 2 * MIB
    assert memory.read(1 << 32, 2 * MIB) == bytes(2 * MIB)


def test_real16_image_may_fill_all_ram():
    memory = ram(128 * KIB)
    Flat(b"\xf4" * 0x1F000, 0x1000).place(memory)
    assert memory.read(0x1000, 0x1F000) == b"\xf4" * 0x1F000


def test_an_image_up_to_the_tables_fits_and_one_byte_more_does_not():
    memory = ram(2 * MIB)
    largest = 2 * MIB - RESERVED
    Flat(bytes(largest), 0, "user64").place(memory)
    with pytest.raises(ConfigurationError) as error:
        Flat(bytes(largest + 1), 0, "user64").place(memory)
    assert str(error.value) == (
        "a flat image of 1966081 bytes does not fit at 0x0..0x1e0000: the engine's tables begin "
        "at 0x1e0000; give the machine at least 3M of memory, or place it lower"
    )


@pytest.mark.parametrize(
    ("image", "size", "message"),
    [
        (
            Flat(bytes(0x2000), 0xF000),
            64 * KIB,
            "a flat image of 8192 bytes does not fit at 0xf000..0x10fff: the machine has "
            "RAM 0x0..0xffff; give the machine at least 1M of memory, or place it lower",
        ),
        (
            Flat(b"\xf4", 0xD000_0000, "prot32"),
            MIB,
            "a flat image of 1 bytes does not fit at 0xd0000000..0xd0000000: the machine has "
            "RAM 0x0..0xfffff; no memory size reaches there, place or link it lower",
        ),
        (
            Flat(b"\xf4", 0x1000, "long64", entry=0x8000_0000),
            MIB,
            "the entry point does not fit at 0x80000000..0x80000000: the machine has "
            "RAM 0x0..0xfffff; give the machine at least 2049M of memory, or place it lower",
        ),
        (
            Flat(b"\xf4", 0x1000, "user64"),
            MIB,
            "mode user64 needs at least 2048 KiB of memory for tables, stack and code, but the "
            "machine has 1024 KiB",
        ),
        (
            Flat(b"\xf4", 0x1000, "prot32"),
            64 * KIB,
            "mode prot32 needs at least 132 KiB of memory for tables, stack and code, but the "
            "machine has 64 KiB",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(image, size, message):
    memory = ram(size)
    with pytest.raises(ConfigurationError) as error:
        image.place(memory)
    assert str(error.value) == message
    assert memory.read(0, size) == bytes(size)


def test_memory_without_ram_at_0_is_refused():
    memory = GuestMemory()
    with pytest.raises(ConfigurationError, match="no RAM at address 0"):
        Flat(b"\xf4", 0x1000).place(memory)
    memory.add_rom(0, b"\xf4")
    with pytest.raises(ConfigurationError, match="no RAM at address 0"):
        Flat(b"\xf4", 0x1000).place(memory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((b"", 0x1000), "the flat image is empty"),
        ((b"\xf4", 0x10000), "address 0x10000: it must be below 0x10000, because CS is 0 in real"),
        ((b"\xf4", 0x1000, "real16", 0x12345), "entry 0x12345: it must be below 0x10000"),
        ((b"\xf4", 1 << 32, "long64"), "address 0x100000000: it must be below 0x100000000"),
        ((b"\xf4", -1, "prot32"), "address -0x1: it must be below"),
        ((b"\xf4", 0x1000, "real32"), "mode 'real32': it must be one of real16, prot32, long64,"),
        (("hlt", 0x1000), "a flat image must be bytes, not str; see kvmaio.assembler"),
        ((5, 0x1000), "a flat image must be bytes, not int"),
        ((b"\xf4", 1.5), "address=1.5: a whole number is expected"),
        ((b"\xf4", "0x1000"), "address='0x1000': a whole number is expected"),
        ((b"\xf4", 0x1000, "real16", 1.5), "entry=1.5: a whole number is expected"),
        ((b"\xf4", 0x1000, 16), "mode 16: it must be one of real16, prot32, long64, user64"),
    ],
)
def test_an_impossible_image_is_refused(arguments, message):
    with pytest.raises(ConfigurationError) as error:
        Flat(*arguments)
    assert message in str(error.value)
