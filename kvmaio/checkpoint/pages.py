"""Guest memory in a checkpoint: its pages without those of zeros, or relative to a base.

Pages are kept in blocks of 64: two bit masks and the pages one after the other.
Blocks never change, so checkpoints of one machine share those that are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import attrs

from ..errors import CheckpointError
from .untouched import untouched_blocks

__all__ = ["BLOCK_SIZE", "PAGES_PER_BLOCK", "PAGE_SIZE", "Block", "MemoryPages"]

PAGE_SIZE = 4096
PAGES_PER_BLOCK = 64  # as many as the bits of a word
BLOCK_SIZE = PAGES_PER_BLOCK * PAGE_SIZE

_ZERO_PAGE = bytes(PAGE_SIZE)
_ZERO_BLOCK = bytes(BLOCK_SIZE)


@attrs.define
class Block:
    """64 pages; bit n of a mask is the block's page n. A value: it never changes.

    Attributes:
        given: the pages that this block tells about; the others are as in the base.
        stored: those of them that are not zeros.
        data: the stored pages, one after the other.
    """

    given: int
    stored: int
    data: bytes
    _digest: bytes | None = attrs.field(default=None, init=False, repr=False, eq=False)

    @property
    def digest(self) -> bytes:
        """SHA-256 of `data`."""
        if self._digest is None:
            self._digest = hashlib.sha256(self.data).digest()
        return self._digest

    def runs(self) -> Iterator[tuple[int, memoryview]]:
        """The stored pages as pieces that belong together: byte offset in the block, content."""
        content, done = memoryview(self.data), 0
        for first, last in _runs(self.stored):
            length = (last - first) * PAGE_SIZE
            yield first * PAGE_SIZE, content[done : done + length]
            done += length

    def page(self, number: int) -> memoryview | None:
        """Page `number` of the block, or None where it is zeros."""
        if not self.stored >> number & 1:
            return None
        start = (self.stored & ((1 << number) - 1)).bit_count() * PAGE_SIZE
        return memoryview(self.data)[start : start + PAGE_SIZE]


_NOTHING = Block(0, 0, b"")


@attrs.frozen
class MemoryPages:
    """The pages of one memory region.

    Attributes:
        size: of the region in bytes, a multiple of 4096.
        blocks: block number -> block. In complete pages, a missing block is all
            zeros; in relative ones it is as in the base.
        relative: these are only the differences from a base.
    """

    size: int
    blocks: dict[int, Block]
    relative: bool = False

    @classmethod
    def capture(
        cls,
        memory: Any,
        *,
        like: MemoryPages | None = None,
        dirty: Iterable[int] | None = None,
        on_block: Callable[[int], object] | None = None,
    ) -> Self:
        """The pages that `memory` holds now.

        Memory that nobody ever touched is found by the kernel's page tables
        where that is certain (private anonymous mappings), so it is neither
        read nor populated.

        Args:
            memory: an mmap, a memoryview or another buffer.
            like: an earlier capture of the same region, whose equal blocks are shared.
            dirty: the numbers of the pages that may have changed since `like`; no
                other block is looked at.
            on_block: called with the offset of each block that is looked at; what it
                raises ends the capture.
        """
        with memoryview(memory) as view, view.cast("B") as data:
            size = len(data)
            if size % PAGE_SIZE:
                raise CheckpointError(f"{size} bytes of memory: not a multiple of {PAGE_SIZE}")
            blocks: dict[int, Block] = {}
            earlier = {} if like is None else like.blocks
            numbers: Iterable[int] = range(-(-size // BLOCK_SIZE))
            if like is not None and (like.size != size or like.relative):
                raise CheckpointError("`like` must be complete pages of the same region")
            if dirty is not None:
                if like is None:
                    raise CheckpointError("dirty pages say nothing without the earlier capture")
                blocks = dict(like.blocks)
                numbers = sorted({page // PAGES_PER_BLOCK for page in dirty})
            elif untouched := untouched_blocks(data, BLOCK_SIZE):
                numbers = (number for number in numbers if number not in untouched)
            for number in numbers:
                start = number * BLOCK_SIZE
                if on_block is not None:
                    on_block(start)
                block = _pack(data[start : start + BLOCK_SIZE].tobytes())
                if block is None:
                    blocks.pop(number, None)
                elif block == (old := earlier.get(number)):
                    blocks[number] = old
                else:
                    blocks[number] = block
        return cls(size, dict(sorted(blocks.items())))

    @property
    def stored_bytes(self) -> int:
        """Bytes of the pages that are kept."""
        return sum(len(block.data) for block in self.blocks.values())

    def page(self, number: int) -> bytes:
        """Page `number`, counted from the region's start; needs complete pages."""
        self._check_complete()
        block = self.blocks.get(number // PAGES_PER_BLOCK, _NOTHING)
        content = block.page(number % PAGES_PER_BLOCK)
        return _ZERO_PAGE if content is None else bytes(content)

    def given_pages(self) -> Iterator[int]:
        """The numbers of the pages that are kept, or that differ from the base, in order."""
        for number, block in self.blocks.items():
            for start, stop in _runs(block.given):
                first = number * PAGES_PER_BLOCK
                yield from range(first + start, first + stop)

    def restore(
        self, memory: Any, *, pages: Iterable[int] | None = None, zeroed: bool = False
    ) -> None:
        """Make `memory`, a writable buffer, what it was; needs complete pages.

        Args:
            pages: only these, for instance those that were written since.
            zeroed: the memory holds zeros only; else pages of zeros are written
                where there is something else.
        """
        self._check_complete()
        with memoryview(memory) as view, view.cast("B") as data:
            if len(data) != self.size:
                raise CheckpointError(
                    f"{len(data):#x} bytes of memory, where the checkpoint has {self.size:#x}"
                )
            if pages is not None:
                for number in pages:
                    block = self.blocks.get(number // PAGES_PER_BLOCK, _NOTHING)
                    start = number * PAGE_SIZE
                    content = block.page(number % PAGES_PER_BLOCK)
                    data[start : start + PAGE_SIZE] = _ZERO_PAGE if content is None else content
                return
            if not zeroed:
                self._write_zeros(data)
            for number, block in self.blocks.items():
                done = 0
                with memoryview(block.data) as content:
                    for first, last in _runs(block.stored):
                        start = number * BLOCK_SIZE + first * PAGE_SIZE
                        length = (last - first) * PAGE_SIZE
                        data[start : start + length] = content[done : done + length]
                        done += length

    def _write_zeros(self, data: memoryview) -> None:
        untouched = untouched_blocks(data, BLOCK_SIZE)
        for number in range(-(-self.size // BLOCK_SIZE)):
            if number in untouched:
                continue
            start = number * BLOCK_SIZE
            there = _pack(data[start : start + BLOCK_SIZE].tobytes())
            if there is None:
                continue
            for first, last in _runs(there.stored & ~self.blocks.get(number, _NOTHING).stored):
                length = (last - first) * PAGE_SIZE
                at = start + first * PAGE_SIZE
                data[at : at + length] = _ZERO_BLOCK[:length]

    def since(self, base: MemoryPages) -> MemoryPages:
        """Only the pages that differ from `base`; both complete and of one size."""
        self._check_complete()
        base._check_complete()
        self._check_size(base)
        blocks = {}
        for number in sorted(self.blocks.keys() | base.blocks.keys()):
            new, old = self.blocks.get(number, _NOTHING), base.blocks.get(number, _NOTHING)
            if new is not old and (changed := _changed(new, old)):
                blocks[number] = _assemble(changed, changed & new.stored, (new, changed))
        return MemoryPages(self.size, blocks, relative=True)

    def on(self, base: MemoryPages) -> MemoryPages:
        """The complete pages that `since(base)` made these of."""
        base._check_complete()
        self._check_size(base)
        if not self.relative:
            raise CheckpointError("these pages are complete; they are relative to nothing")
        blocks = dict(base.blocks)
        for number, block in self.blocks.items():
            old = base.blocks.get(number, _NOTHING)
            stored = old.stored & ~block.given | block.stored
            blocks.pop(number, None)
            if stored:
                blocks[number] = _assemble(
                    stored, stored, (block, block.given), (old, ~block.given)
                )
        return MemoryPages(self.size, dict(sorted(blocks.items())))

    def add(self, number: int, block: Block) -> None:
        """Put a block that was read from a file in its place.

        Raises:
            CheckpointError: it is not what `capture` or `since` would make.
        """
        here = min(PAGES_PER_BLOCK, self.size // PAGE_SIZE - number * PAGES_PER_BLOCK)
        last = next(reversed(self.blocks), -1)
        zeros = (
            number
            for number in range(len(block.data) // PAGE_SIZE)
            if block.data.startswith(_ZERO_PAGE, number * PAGE_SIZE)
        )
        if (
            here <= 0
            or number <= last
            or not 0 < block.given < 1 << here
            or block.stored & ~block.given
            or (block.stored != block.given and not self.relative)
            or len(block.data) != block.stored.bit_count() * PAGE_SIZE
            or next(zeros, None) is not None
        ):
            raise CheckpointError(f"the pages of block {number} are not as kvmaio writes them")
        self.blocks[number] = block

    def _check_complete(self) -> None:
        if self.relative:
            raise CheckpointError("only differences from a base: put them on it with on(base)")

    def _check_size(self, base: MemoryPages) -> None:
        if base.size != self.size:
            raise CheckpointError(
                f"a region of {self.size:#x} bytes cannot be relative to one of {base.size:#x}"
            )


def _pack(raw: bytes) -> Block | None:
    """Up to 64 pages as a block, or None if all are zeros."""
    if _ZERO_BLOCK.startswith(raw):
        return None
    count = len(raw) // PAGE_SIZE
    stored = 0
    for number in range(count):
        if not raw.startswith(_ZERO_PAGE, number * PAGE_SIZE):  # a memcmp, without a copy
            stored |= 1 << number
    if stored.bit_count() == count:
        return Block(stored, stored, raw)
    pieces = [raw[first * PAGE_SIZE : last * PAGE_SIZE] for first, last in _runs(stored)]
    return Block(stored, stored, b"".join(pieces))


def _runs(mask: int) -> Iterator[tuple[int, int]]:
    """The runs of set bits as (first, behind the last), upwards."""
    at = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        length = (~mask & (mask + 1)).bit_length() - 1
        yield at + skip, at + skip + length
        mask >>= length
        at += skip + length


def _changed(new: Block, old: Block) -> int:
    """The pages of two complete blocks that differ."""
    if new == old:
        return 0
    changed = new.stored ^ old.stored
    both = new.stored & old.stored
    for first, last in _runs(both):
        for number in range(first, last):
            if new.page(number) != old.page(number):
                changed |= 1 << number
    return changed


def _assemble(given: int, stored: int, *sources: tuple[Block, int]) -> Block:
    """A block whose stored pages each come from the source whose mask has them."""
    pieces = []
    for first, last in _runs(stored):
        for number in range(first, last):
            block = next(block for block, mask in sources if mask >> number & 1)
            page = block.page(number)
            assert page is not None
            pieces.append(page)
    return Block(given, stored, b"".join(pieces))
