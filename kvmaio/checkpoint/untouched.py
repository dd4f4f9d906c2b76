"""Which parts of a mapping nobody ever touched, by the kernel's page tables.

Reading such a page shows zeros but costs a page fault: a quarter of a second
for 256 MiB. The kernel knows better.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["untouched_blocks"]

_PAGE = 4096
_ENTRY = 8
_PRESENT_OR_SWAPPED = 0x40  # of an entry's last byte: bit 63 is "present", bit 62 "swapped"


def untouched_blocks(data: memoryview, block_size: int) -> frozenset[int]:
    """The numbers of the blocks in `data` that were never touched, so are zeros.

    Empty where that is not certain: memory that is shared, or of a file, or
    not aligned to pages. Memory that a userfaultfd fills on demand must not be
    asked about.

    Args:
        block_size: in bytes, a multiple of 4096.
    """
    if not data or os.sysconf("SC_PAGE_SIZE") != _PAGE:
        return frozenset()
    try:
        start = ctypes.addressof(ctypes.c_char.from_buffer(data))
    except TypeError:  # read-only, so not a guest's RAM
        return frozenset()
    try:
        if start % _PAGE or not _is_private_anonymous(start, start + len(data)):
            return frozenset()
        return _absent(start, len(data), block_size)
    except OSError:  # no /proc here
        return frozenset()


def _is_private_anonymous(start: int, end: int) -> bool:
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:  # ordered: start-end perms offset device inode name
            span, permissions, _, _, inode = line.split(maxsplit=5)[:5]
            first, last = (int(address, 16) for address in span.split(b"-"))
            if last <= start:
                continue
            if first > start or permissions[3:] != b"p" or inode != b"0":
                return False
            start = last
            if start >= end:
                return True
    return False


def _absent(start: int, size: int, block_size: int) -> frozenset[int]:
    entries_per_block = block_size // _PAGE
    absent = set()
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(start // _PAGE * _ENTRY)
        for number in range(-(-size // block_size)):
            if number % 128 == 0:  # 64 KiB of entries for 128 blocks of 64 pages
                entries = pagemap.read(128 * entries_per_block * _ENTRY)
                last_bytes = entries[_ENTRY - 1 :: _ENTRY]
            first = number % 128 * entries_per_block
            here = min(entries_per_block, size // _PAGE - number * entries_per_block)
            flags = last_bytes[first : first + here]
            if len(flags) == here and max(flags) < _PRESENT_OR_SWAPPED:
                absent.add(number)
    return frozenset(absent)
