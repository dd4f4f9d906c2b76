"""Reads page tables, descriptors and gates the way the CPU does, independently of the builders."""

from __future__ import annotations

import struct

import attrs

from kvmaio.cpu import Segment
from kvmaio.memory import GuestMemory

__all__ = ["Mapping", "gate", "ram", "segment_at", "translate", "word"]


def ram(size: int) -> GuestMemory:
    """Memory with `size` bytes of RAM from 0 on."""
    memory = GuestMemory()
    memory.add_ram(0, size)
    return memory


def word(memory: GuestMemory, address: int, size: int = 8) -> int:
    return int.from_bytes(memory.read(address, size), "little")


@attrs.frozen
class Mapping:
    """Where a linear address leads; `user`: CPL 3 may go there."""

    physical: int
    writable: bool
    user: bool


def translate(memory: GuestMemory, cr3: int, linear: int) -> Mapping | None:
    """Walk 4-level page tables (SDM 4.5)."""
    table, writable, user = cr3, True, True
    for shift in (39, 30, 21, 12):
        entry = word(memory, table + (linear >> shift & 0x1FF) * 8)
        if not entry & 1:
            return None
        writable, user = writable and bool(entry & 2), user and bool(entry & 4)
        table = entry & 0x000F_FFFF_FFFF_F000
        if shift == 12 or (shift < 39 and entry & 0x80):
            offset = (1 << shift) - 1
            assert table & offset == 0, "a page must lie at a multiple of its size"
            return Mapping(table | linear & offset, writable, user)
    raise AssertionError("unreachable")


def segment_at(memory: GuestMemory, table: int, selector: int, *, bits: int = 64) -> Segment:
    """The segment that loading `selector` from the GDT at `table` gives (SDM 3.4.5)."""
    low, high = struct.unpack("<II", memory.read(table + (selector & ~7), 8))
    s = high >> 12 & 1
    base = low >> 16 | (high & 0xFF) << 16 | high & 0xFF00_0000
    if not s and bits == 64:
        base |= word(memory, table + (selector & ~7) + 8, 4) << 32
    limit = low & 0xFFFF | high & 0xF_0000
    g = high >> 23 & 1
    return Segment(
        base=base,
        limit=limit << 12 | 0xFFF if g else limit,
        selector=selector,
        type=high >> 8 & 15,
        s=s,
        dpl=high >> 13 & 3,
        present=high >> 15 & 1,
        avl=high >> 20 & 1,
        l=high >> 21 & 1,
        db=high >> 22 & 1,
        g=g,
    )


def gate(memory: GuestMemory, table: int, vector: int) -> tuple[int, int, int]:
    """A 64-bit IDT entry as (handler, selector, attributes) (SDM 6.14.1)."""
    low, selector, ist, kind, middle, high, zero = struct.unpack(
        "<HHBBHII", memory.read(table + vector * 16, 16)
    )
    assert (ist, zero) == (0, 0)
    return low | middle << 16 | high << 32, selector, kind
