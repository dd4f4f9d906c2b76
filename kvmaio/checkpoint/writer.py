"""Writing a checkpoint file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence

import attrs
import zstandard

from ..errors import CheckpointError
from .atomic import Output, replacing
from .layout import (
    CHUNK,
    CHUNK_SIZE,
    END_MARK,
    ENTRY,
    MAGIC,
    PROLOGUE,
    RECORD,
    SCHEMA,
    SECTION_LIMIT,
    Entry,
    blocks_of,
    describe,
    digest_of,
    header_size,
)
from .pages import MemoryPages
from .progress import Progress, silent

__all__ = ["write"]

_MEMORY_LEVEL = 1  # half a gigabyte per second; 3 is half as fast and saves hardly a percent


def write(
    path: str | os.PathLike[str],
    sections: Mapping[str, bytes],
    memory: Sequence[MemoryPages],
    progress: Progress = silent,
) -> None:
    """Write a checkpoint file, whole or not at all.

    Args:
        sections: name (at most 16 bytes) -> plain content.
        memory: of each region, in order.
        progress: told of the memory; what it raises leaves at `path` what was there.

    Raises:
        HostError, CheckpointError: see `replacing`; or a section exceeds `SECTION_LIMIT`.
    """
    for name, plain in sections.items():
        if len(plain) > SECTION_LIMIT:
            raise CheckpointError(
                f"section {name} has {len(plain):,} bytes, at most {SECTION_LIMIT:,} are possible"
            )
    total, done = 2 * sum(pages.stored_bytes for pages in memory), 0

    def on_block(size: int) -> None:  # each once to be hashed, and once to be written
        nonlocal done
        done += size
        progress(done, total)

    entries = describe(sections, memory, on_block)
    with replacing(path) as output:
        output.write(bytes(header_size(len(entries))))
        packed = []
        for plain in sections.values():
            start = output.size
            output.write(zstandard.ZstdCompressor().compress(plain))
            packed.append(output.size - start)
        start = output.size
        _write_memory(output, memory, on_block)
        packed.append(output.size - start)
        entries = [
            attrs.evolve(entry, packed=size) for entry, size in zip(entries, packed, strict=True)
        ]
        output.write(bytes.fromhex(digest_of(entries)) + END_MARK)
        output.write_at(0, _header(entries, output.size))


def _header(entries: Sequence[Entry], size: int) -> bytes:
    header = PROLOGUE.pack(MAGIC, SCHEMA, len(entries), size)
    for entry in entries:
        name = entry.name.encode()
        header += ENTRY.pack(name, entry.packed, entry.plain, entry.values, entry.checksum)
    return header + hashlib.sha256(header).digest()


def _write_memory(
    output: Output, memory: Sequence[MemoryPages], on_block: Callable[[int], object]
) -> None:
    compressor = zstandard.ZstdCompressor(level=_MEMORY_LEVEL)
    pieces: list[bytes] = []
    size = 0

    def close_chunk() -> None:
        frame = compressor.compress(b"".join(pieces))
        output.write(CHUNK.pack(len(frame), size))
        output.write(frame)
        pieces.clear()

    for region, number, block in blocks_of(memory):
        pieces += (RECORD.pack(region, number, block.given, block.stored), block.data)
        size += RECORD.size + len(block.data)
        if size >= CHUNK_SIZE:
            close_chunk()
            size = 0
        on_block(len(block.data))
    if pieces:
        close_chunk()
