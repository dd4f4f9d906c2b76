"""Memory pages: what is kept, what differs, and that memory comes back as it was."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given

from kvmaio import CheckpointError, GuestMemory
from kvmaio.checkpoint.pages import (
    BLOCK_SIZE,
    PAGE_SIZE,
    PAGES_PER_BLOCK,
    Block,
    MemoryPages,
)
from kvmaio.checkpoint.untouched import untouched_blocks
from tests.checkpoint.samples import content, page_maps

COUNT = 150  # pages: two blocks and a part of a third
SIZE = COUNT * PAGE_SIZE


@given(page_maps)
def test_capture_keeps_the_pages_that_are_not_zeros(pages):
    data = content(pages, COUNT)
    captured = MemoryPages.capture(data)
    kept = [n for n in range(COUNT) if any(data[n * PAGE_SIZE : (n + 1) * PAGE_SIZE])]
    assert list(captured.given_pages()) == kept
    assert captured.stored_bytes == len(kept) * PAGE_SIZE
    assert b"".join(map(captured.page, range(COUNT))) == data


@given(page_maps, page_maps)
def test_restore_makes_any_memory_what_it_was(saved, present):
    memory = bytearray(content(present, COUNT, seed=1))
    MemoryPages.capture(content(saved, COUNT)).restore(memory)
    assert memory == content(saved, COUNT)


@given(page_maps, page_maps)
def test_restore_of_dirty_pages(saved, written):
    before = content(saved, COUNT)
    captured = MemoryPages.capture(before)
    memory = bytearray(before)
    for page in written:
        memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes([page % 256]) * PAGE_SIZE
    captured.restore(memory, pages=written)
    assert memory == before


@given(page_maps, page_maps)
def test_differences_put_on_their_base_are_the_whole(first, second):
    base = MemoryPages.capture(content(first, COUNT))
    later = MemoryPages.capture(content(second, COUNT, seed=1))
    changes = later.since(base)
    assert changes.on(base) == later
    assert list(changes.given_pages()) == [n for n in range(COUNT) if later.page(n) != base.page(n)]
    assert not later.since(later).blocks


@given(page_maps, page_maps)
def test_capture_of_dirty_pages_is_a_capture(first, written):
    memory = bytearray(content(first, COUNT))
    before = MemoryPages.capture(memory)
    for page, value in written.items():
        memory[page * PAGE_SIZE] = value % 256
        memory[(page + 1) * PAGE_SIZE - 1] = 0
    assert MemoryPages.capture(memory, like=before, dirty=written) == MemoryPages.capture(memory)


def test_equal_blocks_are_shared():
    memory = bytearray(content({1: 9, 70: 9}, COUNT))
    first = MemoryPages.capture(memory)
    memory[0] = 1
    for second in (
        MemoryPages.capture(memory, like=first),
        MemoryPages.capture(memory, like=first, dirty=[0]),
    ):
        assert second.blocks[1] is first.blocks[1]
        assert second.blocks[0] is not first.blocks[0]


def test_a_machines_memory_is_neither_held_nor_populated():
    memory = GuestMemory()
    region = memory.add_ram(0, 64 << 20)
    memory.write(33 << 20, b"hello")
    captured = MemoryPages.capture(region.mapping)
    assert list(captured.given_pages()) == [(33 << 20) // PAGE_SIZE]
    with memoryview(region.mapping) as view:
        untouched = untouched_blocks(view, BLOCK_SIZE)
    assert len(untouched) == (64 << 20) // BLOCK_SIZE - 1
    region.mapping.close()  # raises BufferError if there were still a view


def test_memory_around_the_hole_below_4_gib_takes_what_it_holds():
    memory = GuestMemory()
    low, high = memory.add_ram(0, 3 << 30), memory.add_ram(1 << 32, 1 << 30)
    memory.write((1 << 32) + (1 << 29), b"high")
    captured = [MemoryPages.capture(region.mapping) for region in (low, high)]
    assert [pages.stored_bytes for pages in captured] == [0, PAGE_SIZE]
    memory.write((1 << 32) + (1 << 29), bytes(4))
    captured[1].restore(high.mapping)
    assert memory.read((1 << 32) + (1 << 29), 4) == b"high"


def test_only_private_anonymous_memory_is_known_to_be_untouched(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(b"x" * SIZE)
    with file.open("r+b") as opened:
        private = mmap.mmap(opened.fileno(), SIZE, flags=mmap.MAP_PRIVATE)
    shared = mmap.mmap(-1, SIZE)
    with memoryview(private) as one, memoryview(shared) as two, memoryview(bytes(SIZE)) as three:
        assert [untouched_blocks(view, BLOCK_SIZE) for view in (one, two, three)] == [
            frozenset()
        ] * 3
    assert MemoryPages.capture(private).stored_bytes == SIZE
    shared[5] = 1
    assert list(MemoryPages.capture(shared).given_pages()) == [0]


def test_wrong_uses_are_refused():
    whole = MemoryPages.capture(content({3: 5}, COUNT))
    changes = whole.since(whole)
    other = MemoryPages.capture(bytes(PAGE_SIZE))
    for wrong in (
        lambda: changes.page(0),
        lambda: changes.restore(bytearray(SIZE)),
        lambda: changes.since(whole),
        lambda: whole.since(changes),
        lambda: whole.on(whole),
        lambda: changes.on(changes),
        lambda: whole.since(other),
        lambda: whole.restore(bytearray(PAGE_SIZE)),
        lambda: MemoryPages.capture(bytes(100)),
        lambda: MemoryPages.capture(bytes(SIZE), dirty=[1]),
        lambda: MemoryPages.capture(bytes(SIZE), like=other),
    ):
        with pytest.raises(CheckpointError):
            wrong()


PAGE = b"\1" * PAGE_SIZE


@pytest.mark.parametrize(
    ("number", "block"),
    [
        (3, Block(1, 1, PAGE)),  # behind the end
        (2, Block(1 << (COUNT - 2 * PAGES_PER_BLOCK), 1 << 22, PAGE)),  # the same, in the last
        (0, Block(1, 1, PAGE)),  # not after the one before
        (2, Block(0, 0, b"")),  # nothing
        (2, Block(1, 3, PAGE * 2)),  # stored, but not given
        (2, Block(3, 1, PAGE)),  # a hole, where there is no base
        (2, Block(1, 1, PAGE * 2)),  # bytes too many
        (2, Block(1, 1, bytes(PAGE_SIZE))),  # zeros
    ],
)
def test_blocks_that_nobody_makes_are_refused(number, block):
    pages = MemoryPages(SIZE, {})
    pages.add(0, Block(1, 1, PAGE))
    with pytest.raises(CheckpointError, match="not as kvmaio writes them"):
        pages.add(number, block)
