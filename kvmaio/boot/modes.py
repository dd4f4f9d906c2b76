"""How a CPU starts in each of the four modes, and the tables in memory that this takes.

The tables lie at the very end of low RAM, and the stack grows down from them:
tables and 60 KiB of stack or more share RAM's last 128 KiB (`RESERVED`), so
that all RAM below is the guest's alone. real16 has no tables.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, assert_never, get_args

from ..cpu import Context, DescriptorTable, Segment
from ..errors import ConfigurationError
from ..memory import GuestMemory
from .faults import ENTRIES_SIZE, STUB, FaultFrame, entries, interrupt_table
from .image import FOUR_GIB, BootState, low_ram
from .tables import (
    PAGE,
    flat_segment,
    global_descriptor_table,
    identity_map,
    no_ldt,
    page_tables_size,
    task_segment,
    task_state32,
    task_state64,
)

__all__ = [
    "Mode",
    "RESERVED",
    "blank_context",
    "check_memory",
    "check_mode",
    "enter_long_mode",
    "enter_protected_mode",
    "prot32_state",
    "reserved",
    "start",
]

Mode: TypeAlias = Literal["real16", "prot32", "long64", "user64"]

RESERVED = 128 << 10  # bytes at the end of low RAM, for tables and the initial stack
_USER64_MINIMUM = 2 << 20

# Control register bits (SDM 2.5) and EFER's (SDM vol. 4, table 2-2).
_CR0_PROTECTED = 0x33  # PE, MP, ET, NE
_CR0_PAGED = _CR0_PROTECTED | 1 << 16 | 1 << 31  # WP, PG
_CR4_LONG = 0x620  # PAE, OSFXSR, OSXMMEXCPT
_CR4_OSXSAVE = 1 << 18
_EFER_LONG = 0x500  # LME, LMA
_IOPL3 = 3 << 12

# Selectors: in prot32, CS and data; in the 64-bit modes also what SYSRET expects.
_CODE = 0x08
_DATA = 0x10
_TASK32 = 0x18
_CODE32 = 0x18
_USER_DATA = 0x23
_USER_CODE = 0x2B
_TASK64 = 0x38


def check_mode(mode: str) -> Mode:
    """`mode`, if it is one.

    Raises:
        ConfigurationError: it is none.
    """
    for known in get_args(Mode):
        if mode == known:
            return known  # type: ignore[no-any-return]
    raise ConfigurationError(f"mode {mode!r}: it must be one of {', '.join(get_args(Mode))}")


def reserved(mode: Mode) -> int:
    """How many bytes at the end of low RAM the engine takes."""
    return 0 if mode == "real16" else RESERVED


def check_memory(memory: GuestMemory, mode: Mode) -> None:
    """Check that `memory` has room for the mode's tables and stack.

    Raises:
        ConfigurationError: it has not; says how much is needed.
    """
    end = low_ram(memory).end
    minimum = _USER64_MINIMUM if mode == "user64" else reserved(mode) + PAGE
    if end < minimum:
        raise ConfigurationError(
            f"mode {mode} needs at least {minimum >> 10} KiB of memory for tables, stack and "
            f"code, but the machine has {end >> 10} KiB"
        )


def start(memory: GuestMemory, mode: Mode, entry: int) -> BootState:
    """Put the mode's tables into `memory`, checked before; the state that starts at `entry`."""
    end = min(low_ram(memory).end, FOUR_GIB)
    match mode:
        case "real16":
            return BootState(_real16(entry))
        case "prot32":
            base = end - PAGE
            tables, context = prot32_state(base, entry)
            memory.write(base, tables)
            return BootState(context)
        case "long64":
            return _long64(memory, end, entry)
        case "user64":
            return _user64(memory, end, entry)
        case _:
            assert_never(mode)


def _real16(entry: int) -> Context:
    data = [Segment() for _ in range(5)]
    context = blank_context(entry, 0x7000, Segment(type=0xB), data)
    context.cr0 = 0x10  # ET; unlike after reset, caches on
    context.tr = task_segment(0, 0, 0xFFFF)
    context.gdt, context.idt = DescriptorTable(), DescriptorTable(limit=0x3FF)
    return context


def prot32_state(base: int, entry: int) -> tuple[bytes, Context]:
    """The GDT and TSS that belong at `base`, less than a page; the state at `entry`.

    Flat segments of 4 GiB (CS 0x08, the others 0x10), no paging, no IDT, and
    the stack below `base`.
    """
    code, data = flat_segment(_CODE, code=True, bits=32), flat_segment(_DATA, code=False, bits=32)
    state = task_state32(base, _DATA)
    task = task_segment(_TASK32, base + 0x40, len(state) - 1)
    table = global_descriptor_table(code, data, task=task, bits=32)
    context = blank_context(
        entry, base, code, [flat_segment(_DATA, code=False, bits=32) for _ in "desfg"]
    )
    enter_protected_mode(context)
    context.tr = task
    context.gdt = DescriptorTable(base, len(table) - 1)
    return table.ljust(0x40, b"\0") + state, context


def _long64(memory: GuestMemory, end: int, entry: int) -> BootState:
    base = end - page_tables_size() - PAGE
    segments = base + page_tables_size()
    state = task_state64(base)
    task = task_segment(_TASK64, segments + 0x80, len(state) - 1)
    table = _table64(task)
    memory.write(base, identity_map(base) + table.ljust(0x80, b"\0") + state)

    code = flat_segment(_CODE, code=True, bits=64)
    data = [flat_segment(_DATA, code=False, bits=64) for _ in range(5)]
    context = blank_context(entry, base, code, data)
    enter_long_mode(context, base)
    context.tr = task
    context.gdt = DescriptorTable(segments, len(table) - 1)
    return BootState(context)


def _user64(memory: GuestMemory, end: int, entry: int) -> BootState:
    # Page tables, then a page of GDT, stub and the stub's stack; the IDT; its
    # handlers; three pages of TSS. The guest's own stack is below all that.
    base = end - page_tables_size(RESERVED) - 6 * PAGE
    segments = base + page_tables_size(RESERVED)
    stub, stub_stack = segments + 0x80, segments + PAGE
    vectors = segments + PAGE
    handlers = vectors + PAGE
    state = task_state64(stub_stack, all_ports=True)
    task = task_segment(_TASK64, handlers + ENTRIES_SIZE, len(state) - 1)
    table = _table64(task)
    pages = [
        identity_map(base, hide=(base, end)),
        (table.ljust(stub - segments, b"\0") + STUB).ljust(PAGE, b"\0"),
        interrupt_table(handlers, _CODE),
        entries(handlers, stub),
        state,
    ]
    memory.write(base, b"".join(pages))

    code = flat_segment(_USER_CODE, code=True, bits=64)
    data = [flat_segment(_USER_DATA, code=False, bits=64) for _ in range(5)]
    context = blank_context(entry, base, code, data)
    enter_long_mode(context, base)
    context.cr4 |= _CR4_OSXSAVE
    context.rflags |= _IOPL3
    context.tr = task
    context.gdt = DescriptorTable(segments, len(table) - 1)
    context.idt = DescriptorTable(vectors, PAGE - 1)
    frame = stub_stack - FaultFrame.size()
    return BootState(context, cpuid="host", xcr0=True, fault_frame=frame)


def _table64(task: Segment) -> bytes:
    return global_descriptor_table(
        flat_segment(_CODE, code=True, bits=64),
        flat_segment(_DATA, code=False, bits=64),
        flat_segment(_CODE32, code=True, bits=32),
        flat_segment(_USER_DATA, code=False, bits=64),
        flat_segment(_USER_CODE, code=True, bits=64),
        task=task,
        bits=64,
    )


def enter_protected_mode(context: Context) -> None:
    """Switch protected mode on, without paging."""
    context.cr0 = _CR0_PROTECTED


def enter_long_mode(context: Context, page_tables: int) -> None:
    """Switch long mode on."""
    context.cr0, context.cr4, context.efer = _CR0_PAGED, _CR4_LONG, _EFER_LONG
    context.cr3 = page_tables


def blank_context(entry: int, stack: int, code: Segment, data: list[Segment]) -> Context:
    """What all modes have in common: other registers 0, interrupts off, no IDT."""
    context = Context(rip=entry, rsp=stack, rdx=0, cs=code, cr0=0, ldt=no_ldt())
    context.ds, context.es, context.fs, context.gs, context.ss = data
    context.idt = DescriptorTable(limit=0)
    return context
