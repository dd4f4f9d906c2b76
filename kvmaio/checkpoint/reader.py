"""Reading a checkpoint file, which may hold anything."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Self

import zstandard

from ..errors import CheckpointError, HostError
from .layout import (
    CHECKSUM_SIZE,
    CHUNK,
    CHUNK_SIZE,
    END_MARK,
    ENTRY,
    MAGIC,
    MAX_RATIO,
    MEMORY,
    PROLOGUE,
    RECORD,
    SCHEMA,
    SECTION_LIMIT,
    TRAILER_SIZE,
    Entry,
    add_to_checksum,
    digest_of,
    header_size,
)
from .pages import PAGE_SIZE, Block
from .plain import scan
from .progress import Progress, silent

__all__ = ["Reader"]


class Reader:
    """A checkpoint file that is open for reading; a context manager.

    The header is checked on opening, a section when it is read; nothing is
    allocated that the file could not hold.

    Attributes:
        entries: what the header says of the sections, in order.
        size: of the file in bytes.
        digest: the checkpoint's identity.
    """

    def __init__(self, path: str | os.PathLike[str], names: Sequence[str]) -> None:
        """Open `path`, which must have the sections `names`.

        Raises:
            HostError: the host does not let us read it.
            CheckpointError: it is no checkpoint, newer, damaged or cut off.
        """
        self.path = os.fsdecode(path)
        try:
            # Without O_NONBLOCK, opening a FIFO waits for a writer.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise HostError(f"opening {self.path}", error.errno or errno.EIO) from None
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError("no checkpoint: not an ordinary file")
            self.size = status.st_size
            self.entries = self._read_header(names)
            self.digest = self._read_trailer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def plain(self, name: str) -> bytes:
        """The content of a section other than memory, checked to be plain data."""
        entry, offset = self._find(name)
        with _naming(name):
            packed = self._read(offset, entry.packed)
            plain = _unpack(packed, entry.plain)
            del packed
            _compare_checksum(entry, hashlib.sha256(plain).digest())
            values = scan(plain)
            if values != entry.values:
                raise CheckpointError(f"damaged: {values} values, {entry.values} are declared")
        return plain

    def blocks(self, regions: int, progress: Progress = silent) -> Iterator[tuple[int, int, Block]]:
        """Region, number and content of each block of memory, as far as they can be read.

        They are only certain once the iterator has ended without an error.
        """
        entry, offset = self._find(MEMORY)
        with _naming(MEMORY):
            whole, plain_size, count, last = hashlib.sha256(), 0, 0, 0
            for at, plain in self._chunks(offset, offset + entry.packed):
                progress(at - offset, entry.packed)
                plain_size += len(plain)
                if plain_size > entry.plain:
                    raise CheckpointError(f"damaged: more than the declared {entry.plain:,} bytes")
                for region, number, block in _records(plain):
                    if not last <= region < regions:
                        raise CheckpointError(f"damaged: region {region} of {regions}")
                    last = region
                    add_to_checksum(whole, region, number, block)
                    count += 1
                    yield region, number, block
            if (plain_size, count) != (entry.plain, entry.values):
                raise CheckpointError(
                    f"damaged: {plain_size:,} bytes in {count} blocks, "
                    f"{entry.plain:,} in {entry.values} are declared"
                )
            _compare_checksum(entry, whole.digest())

    def _chunks(self, at: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Where each begins, and its content."""
        while at < end:
            if end - at < CHUNK.size:
                raise CheckpointError("damaged: a chunk's beginning is cut off")
            packed_size, plain_size = CHUNK.unpack(self._read(at, CHUNK.size))
            at += CHUNK.size
            if not 0 < packed_size <= end - at:
                raise CheckpointError(
                    f"damaged: a chunk of {packed_size:,} bytes where {end - at:,} are left"
                )
            if plain_size > 2 * CHUNK_SIZE:
                raise CheckpointError(f"damaged: a chunk of {plain_size:,} bytes unpacked")
            _check_packed_size(packed_size, plain_size)
            yield at, _unpack(self._read(at, packed_size), plain_size)
            at += packed_size

    # ---- header and trailer ----------------------------------------------------------

    def _read_header(self, names: Sequence[str]) -> list[Entry]:
        start = os.pread(self._fd, PROLOGUE.size, 0)
        if not MAGIC.startswith(start[: len(MAGIC)]) or not start:
            raise CheckpointError(f"no checkpoint: it begins with {start[:12]!r}")
        if len(start) < PROLOGUE.size:
            raise CheckpointError(f"cut off in its header: {self.size} bytes are left")
        _, schema, count, size = PROLOGUE.unpack(start)
        if schema > SCHEMA:
            raise CheckpointError(
                f"written by a newer kvmaio, in schema {schema}; this one reads {SCHEMA}: "
                "use the newer one"
            )
        with _naming("header"):
            if schema != SCHEMA or count != len(names):
                raise CheckpointError(f"damaged: schema {schema} with {count} sections")
            header = self._read(0, header_size(count))
            content, checksum = header[:-CHECKSUM_SIZE], header[-CHECKSUM_SIZE:]
            if hashlib.sha256(content).digest() != checksum:
                raise CheckpointError("damaged: its checksum is wrong")
            fields = ENTRY.iter_unpack(content[PROLOGUE.size :])
            entries = [_entry(*field) for field in fields]
            if [entry.name for entry in entries] != list(names):
                raise CheckpointError("damaged: other sections than this version has")
            self._check_sizes(entries, size)
        return entries

    def _check_sizes(self, entries: Sequence[Entry], size: int) -> None:
        held = header_size(len(entries)) + sum(e.packed for e in entries) + TRAILER_SIZE
        if held != size:
            raise CheckpointError(f"damaged: sections of {held:,} bytes in a file of {size:,}")
        if size != self.size:
            problem = "cut off" if self.size < size else "something was appended"
            raise CheckpointError(f"{problem}: {self.size:,} bytes, {size:,} are declared")
        for entry in entries:
            limit = entry.packed * MAX_RATIO
            if entry.name != MEMORY:
                limit = min(limit, SECTION_LIMIT)
                _check_packed_size(entry.packed, entry.plain)
            if entry.plain > limit or entry.values > entry.plain:
                raise CheckpointError(
                    f"section {entry.name} declares {entry.values:,} values in {entry.plain:,} "
                    f"bytes, which {entry.packed:,} cannot hold"
                )
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        needed = sum(entry.declared for entry in entries)
        if needed > host:
            raise CheckpointError(
                f"{needed / (1 << 30):.1f} GiB to load, but this host has only "
                f"{host / (1 << 30):.1f} GiB"
            )

    def _read_trailer(self) -> str:
        with _naming("trailer"):
            trailer = self._read(self.size - TRAILER_SIZE, TRAILER_SIZE)
            digest = digest_of(self.entries)
            if trailer != bytes.fromhex(digest) + END_MARK:
                raise CheckpointError("damaged: it belongs to another file or to none")
        return digest

    def _find(self, name: str) -> tuple[Entry, int]:
        offset = header_size(len(self.entries))
        for entry in self.entries:
            if entry.name == name:
                return entry, offset
            offset += entry.packed
        raise KeyError(name)

    def _read(self, offset: int, size: int) -> bytes:
        pieces = []
        try:
            while size and (piece := os.pread(self._fd, size, offset)):
                pieces.append(piece)
                offset, size = offset + len(piece), size - len(piece)
        except OSError as error:
            raise HostError(f"reading {self.path}", error.errno or errno.EIO) from None
        if size:
            raise CheckpointError(f"cut off: {size:,} bytes are missing")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _entry(name: bytes, packed: int, plain: int, values: int, checksum: bytes) -> Entry:
    return Entry(name.rstrip(b"\0").decode("ascii", "replace"), packed, plain, values, checksum)


@contextlib.contextmanager
def _naming(part: str) -> Iterator[None]:
    """Let errors say which part they are about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"section {part}: {error}") from None


def _check_packed_size(packed: int, plain: int) -> None:
    if packed > plain + plain // 128 + 1024:  # zstd never makes so much of so little
        raise CheckpointError(f"damaged: {plain:,} bytes are packed in {packed:,}")


def _unpack(packed: bytes, size: int) -> bytes:
    """The content of one zstd frame, which must have `size` bytes."""
    try:
        declared = zstandard.frame_content_size(packed)
        if declared != size:
            raise CheckpointError(f"damaged: {declared:,} bytes packed, {size:,} are declared")
        plain = zstandard.ZstdDecompressor().decompress(
            packed, max_output_size=size, read_across_frames=False, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise CheckpointError(f"damaged: {error}") from None
    if len(plain) != size:
        raise CheckpointError(f"damaged: {len(plain):,} bytes unpacked, {size:,} are declared")
    return plain


def _compare_checksum(entry: Entry, found: bytes) -> None:
    if found != entry.checksum:
        raise CheckpointError(
            f"damaged: its checksum is {found.hex()[:16]}, {entry.checksum.hex()[:16]} is declared"
        )


def _records(plain: bytes) -> Iterator[tuple[int, int, Block]]:
    at = 0
    while at < len(plain):
        if len(plain) - at < RECORD.size:
            raise CheckpointError("damaged: a record's beginning is cut off")
        region, number, given, stored = RECORD.unpack_from(plain, at)
        at += RECORD.size
        size = stored.bit_count() * PAGE_SIZE
        if len(plain) - at < size:
            raise CheckpointError("damaged: a block's pages are cut off")
        yield region, number, Block(given, stored, plain[at : at + size])
        at += size
