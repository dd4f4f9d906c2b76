"""What a checkpoint file consists of: sections with checksums between a header and a trailer.

All numbers are little-endian, all checksums SHA-256::

    header    magic (12), schema (2), number of sections (2), size of the file (8)
              per section: name (16), packed size (8), plain size (8), values (8), checksum (32)
              checksum of all this (32)
    sections  as the header lists them, without gaps
    trailer   the checkpoint's digest (32), end mark (8)

A section is one zstd frame, except ``memory``: chunks, each a packed size (4),
a plain size (4) and a zstd frame of block records. A checksum is of a
section's plain content, so that it does not depend on the compressor.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs

from .pages import Block, MemoryPages
from .plain import scan

__all__ = [
    "CHECKSUM_SIZE",
    "CHUNK",
    "CHUNK_SIZE",
    "END_MARK",
    "ENTRY",
    "MAGIC",
    "MAX_RATIO",
    "MEMORY",
    "PROLOGUE",
    "RECORD",
    "SCHEMA",
    "SECTION_LIMIT",
    "TRAILER_SIZE",
    "Entry",
    "add_to_checksum",
    "blocks_of",
    "describe",
    "digest_of",
    "header_size",
]

SCHEMA = 1
MEMORY = "memory"

MAGIC = b"\x89kvmaio\r\n\x1a\n\0"  # as PNG's: a transfer that mends line ends breaks it visibly
END_MARK = b"kvmaio.\n"
PROLOGUE = struct.Struct("<12sHHQ")
ENTRY = struct.Struct("<16sQQQ32s")
CHUNK = struct.Struct("<II")
RECORD = struct.Struct("<HIQQ")  # region, block, given, stored; the stored pages follow
CHECKSUM_SIZE = 32
TRAILER_SIZE = CHECKSUM_SIZE + len(END_MARK)

CHUNK_SIZE = 1 << 20
"""A chunk of memory is closed once it holds this much; a block more at the most."""

SECTION_LIMIT = 1 << 30
"""Of the plain size of a section other than memory."""

VALUE_SIZE = 128
"""What a value takes as a Python object, about; counted into the declared size."""

MAX_RATIO = 1 << 15  # zstd's smallest block is 4 bytes, the content of one at most 128 KiB


@attrs.frozen
class Entry:
    """What the header says of one section; sizes in bytes.

    Attributes:
        packed: its size in the file.
        plain: its size unpacked.
        values: how many values it holds; blocks of 64 pages in ``memory``.
        checksum: SHA-256 of its plain content.
    """

    name: str
    packed: int
    plain: int
    values: int
    checksum: bytes

    @property
    def declared(self) -> int:
        """The memory that the section takes once it is loaded, about."""
        return self.plain + VALUE_SIZE * self.values


def digest_of(entries: Sequence[Entry]) -> str:
    """A checkpoint's identity: SHA-256 over what its sections hold, in hexadecimal."""
    whole = hashlib.sha256()
    for entry in entries:
        whole.update(ENTRY.pack(entry.name.encode(), 0, entry.plain, entry.values, entry.checksum))
    return whole.hexdigest()


def describe(
    sections: Mapping[str, bytes],
    memory: Sequence[MemoryPages],
    on_block: Callable[[int], object] = lambda size: None,
) -> list[Entry]:
    """The entries of a checkpoint that is not in a file, so without packed sizes.

    Args:
        on_block: called with the size of each block of memory.
    """
    entries = [
        Entry(name, 0, len(plain), scan(plain), hashlib.sha256(plain).digest())
        for name, plain in sections.items()
    ]
    whole, size, count = hashlib.sha256(), 0, 0
    for region, number, block in blocks_of(memory):
        add_to_checksum(whole, region, number, block)
        size += RECORD.size + len(block.data)
        count += 1
        on_block(len(block.data))
    return [*entries, Entry(MEMORY, 0, size, count, whole.digest())]


def header_size(count: int) -> int:
    return PROLOGUE.size + count * ENTRY.size + CHECKSUM_SIZE


def blocks_of(memory: Sequence[MemoryPages]) -> Iterator[tuple[int, int, Block]]:
    for region, pages in enumerate(memory):
        for number, block in pages.blocks.items():
            yield region, number, block


def add_to_checksum(whole: hashlib._Hash, region: int, number: int, block: Block) -> None:
    # Of the digests of the blocks, which know theirs: a block is hashed once in its life.
    whole.update(RECORD.pack(region, number, block.given, block.stored) + block.digest)
