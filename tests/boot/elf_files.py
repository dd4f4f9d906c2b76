"""Builds ELF files from their header fields, right ones and wrong ones; damages others."""

from __future__ import annotations

import struct

import attrs
from hypothesis import strategies as st

__all__ = ["Load", "damage", "elf_file", "flips"]

EM_386, EM_X86_64 = 3, 62
ET_EXEC = 2


@attrs.frozen
class Load:
    """A program header and the bytes it loads; None: as the others suggest."""

    address: int
    data: bytes = b""
    size: int | None = None
    virtual: int | None = None
    type: int = 1  # PT_LOAD
    offset: int | None = None
    length: int | None = None


def elf_file(
    *loads: Load,
    bits: int = 32,
    entry: int | None = None,
    machine: int | None = None,
    kind: int = ET_EXEC,
    count: int | None = None,
    header_size: int | None = None,
    big_endian: bool = False,
) -> bytes:
    """An ELF file; the entry point is by default the first segment's address."""
    order = ">" if big_endian else "<"
    word = "I" if bits == 32 else "Q"
    head, each = (52, 32) if bits == 32 else (64, 56)
    if machine is None:
        machine = EM_386 if bits == 32 else EM_X86_64
    if entry is None:
        entry = loads[0].address if loads else 0
    ident = b"\x7fELF" + bytes([bits // 32, 2 if big_endian else 1, 1]) + bytes(9)
    number = len(loads) if count is None else count
    header = ident + struct.pack(
        f"{order}HHI3{word}IHHHHHH",
        *(kind, machine, 1, entry, head if number else 0, 0, 0),
        *(head, header_size if header_size is not None else each, number, 0, 0, 0),
    )
    headers, contents = b"", b""
    for load in loads:
        offset = head + each * len(loads) + len(contents) if load.offset is None else load.offset
        length = len(load.data) if load.length is None else load.length
        size = length if load.size is None else load.size
        virtual = load.address if load.virtual is None else load.virtual
        if bits == 32:
            fields = (load.type, offset, virtual, load.address, length, size, 7, 0x1000)
            headers += struct.pack(f"{order}8I", *fields)
        else:
            large = (load.type, 7, offset, virtual, load.address, length, size, 0x1000)
            headers += struct.pack(f"{order}II6Q", *large)
        contents += load.data
    return header + headers + contents


def damage(data: bytes, flips: list[tuple[int, int]], length: int) -> bytes:
    """`data` with bytes replaced near its start, where the headers are, and cut short."""
    damaged = bytearray(data)
    for position, value in flips:
        damaged[position % len(damaged)] = value
    return bytes(damaged[:length])


# (position, new value): most in the headers of a small ELF file
flips = st.lists(
    st.tuples(st.one_of(st.integers(0, 0xBF), st.integers(0, 1 << 14)), st.integers(0, 255)),
    max_size=8,
)
