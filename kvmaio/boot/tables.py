"""The tables that x86 wants in memory: descriptors, TSS and page tables (SDM vol. 3A).

Every builder returns the bytes for a given guest-physical address; nothing
here touches guest memory.
"""

from __future__ import annotations

import struct

from ..cpu import Segment

__all__ = [
    "PAGE",
    "descriptor",
    "flat_segment",
    "gate64",
    "global_descriptor_table",
    "identity_map",
    "no_ldt",
    "page_tables_size",
    "task_segment",
    "task_state32",
    "task_state64",
]

PAGE = 0x1000
_LARGE_PAGE = 0x20_0000
_ENTRIES = 512

# Page table entries, with accessed and dirty set: the CPU need not write to the tables.
_TABLE = 0x27  # present, writable, user
_USER = 0x67
_SUPERVISOR = 0x63
_LARGE = 0x80


def flat_segment(selector: int, *, code: bool, bits: int) -> Segment:
    """All 4 GiB, for code or data of 32 or 64 bits; DPL is the selector's RPL."""
    return Segment(
        limit=0xFFFF_FFFF,
        selector=selector,
        type=0xB if code else 0x3,  # accessed: the CPU need not write to the GDT
        dpl=selector & 3,
        db=int(not (code and bits == 64)),
        l=int(code and bits == 64),
        g=1,
    )


def task_segment(selector: int, base: int, limit: int) -> Segment:
    """A busy TSS of 32 or 64 bits: what TR holds once it is loaded."""
    return Segment(base=base, limit=limit, selector=selector, type=0xB, s=0)


def no_ldt() -> Segment:
    """LDTR as LLDT 0 leaves it."""
    return Segment(limit=0, type=2, s=0, present=0, unusable=1)


def descriptor(segment: Segment) -> int:
    """A segment as the 8 bytes in a GDT (SDM 3.4.5); of a 64-bit TSS, the lower half."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    return (
        limit & 0xFFFF
        | (segment.base & 0xFF_FFFF) << 16
        | segment.type << 40
        | segment.s << 44
        | segment.dpl << 45
        | segment.present << 47
        | (limit >> 16) << 48
        | segment.avl << 52
        | segment.l << 53
        | segment.db << 54
        | segment.g << 55
        | (segment.base >> 24 & 0xFF) << 56
    )


def global_descriptor_table(*segments: Segment, task: Segment, bits: int) -> bytes:
    """A GDT with each segment, and the TSS, at its own selector."""
    size = (task.selector & ~7) + bits // 4
    table = bytearray(size)
    for segment in (*segments, task):
        struct.pack_into("<Q", table, segment.selector & ~7, descriptor(segment))
    if bits == 64:
        struct.pack_into("<Q", table, (task.selector & ~7) + 8, task.base >> 32)
    return bytes(table)


def gate64(handler: int, selector: int, *, stack: int = 0) -> bytes:
    """A 64-bit interrupt gate (SDM 6.14.1) with DPL 0: INT n from CPL 3 is a #GP."""
    kind = 0x8E
    low, middle, high = handler & 0xFFFF, handler >> 16 & 0xFFFF, handler >> 32
    return struct.pack("<HHBBHII", low, selector, stack, kind, middle, high, 0)


def task_state32(stack: int, selector: int) -> bytes:
    """A 32-bit TSS (SDM 7.2.1) with the CPL 0 stack and no I/O bitmap: 104 bytes."""
    state = bytearray(0x68)
    struct.pack_into("<II", state, 4, stack, selector)
    struct.pack_into("<H", state, 0x66, len(state))
    return bytes(state)


def task_state64(stack: int, *, all_ports: bool = False) -> bytes:
    """A 64-bit TSS (SDM 7.7) with the CPL 0 stack: 104 bytes.

    With `all_ports` the I/O bitmap follows, zeroed, and the whole is 3 pages.
    """
    state = bytearray(0x68)
    struct.pack_into("<Q", state, 4, stack)
    struct.pack_into("<H", state, 0x66, len(state))
    if not all_ports:
        return bytes(state)
    # No byte of ones at the end (SDM vol. 1, 19.5.2): a word at port 0xffff is open as well.
    return bytes(state).ljust(3 * PAGE, b"\0")


def page_tables_size(hidden: int = 0) -> int:
    """How many bytes `identity_map()` takes if it hides `hidden` bytes or less, at most 2 MiB."""
    return (6 + (2 if hidden else 0)) * PAGE


def identity_map(base: int, *, hide: tuple[int, int] | None = None) -> bytes:
    """Page tables at `base`, the PML4 first: 4 GiB mapped one to one by pages of 2 MiB.

    All is writable and open to CPL 3, but for the addresses ``hide[0]`` to
    ``hide[1]`` - 1: only CPL 0 reaches those, and pages of 4 KiB lie around them.
    """
    directories = base + 2 * PAGE
    small = base + 6 * PAGE
    top = [base + PAGE | _TABLE]
    pointers = [directories + i * PAGE | _TABLE for i in range(4)]
    large = [i * _LARGE_PAGE | _USER | _LARGE for i in range(4 * _ENTRIES)]
    pages: list[int] = []
    if hide is not None:
        first, last = hide[0] // _LARGE_PAGE, (hide[1] - 1) // _LARGE_PAGE
        for i in range(first, last + 1):
            large[i] = small + len(pages) * 8 | _TABLE
            addresses = range(i * _LARGE_PAGE, (i + 1) * _LARGE_PAGE, PAGE)
            pages += [a | (_SUPERVISOR if hide[0] <= a < hide[1] else _USER) for a in addresses]
    tables = b"".join(_table(entries) for entries in (top, pointers, large, pages))
    return tables.ljust(page_tables_size(1 if hide else 0), b"\0")


def _table(entries: list[int]) -> bytes:
    data = struct.pack(f"<{len(entries)}Q", *entries)
    return data.ljust(-(-len(data) // PAGE) * PAGE, b"\0")
