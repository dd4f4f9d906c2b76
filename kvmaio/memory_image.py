"""`MemoryImage`: a checkpoint's memory as a file in memory, which machines map copy-on-write.

A machine that has it mapped shares every page that it has not written; and what it
has written is known to the host's page tables, be it by the guest, by a device or
through a view. So going back to the checkpoint drops those pages, and copies nothing.

KVM's dirty log and dirty ring would tell of the guest's own writes alone, and cost
it a fault or an exit for each page.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping

from .checkpoint import Checkpoint, MemoryPages
from .checkpoint.pages import BLOCK_SIZE, PAGE_SIZE
from .errors import HostError
from .memory import GuestMemory, MemoryRegion

__all__ = ["MemoryImage"]

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_ENTRY = 8  # bytes of /proc/self/pagemap for a page
# Of an entry's last byte: 0x80 present, 0x40 swapped, 0x20 of a file (or of shared memory). A
# page that is there and not the file's is one that was written.
_WRITTEN = re.compile(
    b"[%s]+" % b"".join(b"\\x%02x" % b for b in range(256) if b & 0xC0 and not b & 0x20)
)

# <linux/fs.h>: PAGEMAP_SCAN, since Linux 6.7, with the categories of pages that it knows.
_PAGEMAP_SCAN = 0xC0606610
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_SCAN_AT_A_TIME = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)

MANY_RUNS = 4096
"""More runs of written pages than this are dropped faster all at once, unwritten ones too."""


class MemoryImage:
    """The memory of one checkpoint.

    Attributes:
        pages: region base -> complete pages.
    """

    _of: weakref.WeakKeyDictionary[Checkpoint, MemoryImage] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> MemoryImage:
        """The image of `checkpoint`, made once; machines of this process share it.

        Raises:
            HostError: the host has no memory for it.
        """
        image = cls._of.get(checkpoint)
        if image is None:
            image = cls._of[checkpoint] = cls(checkpoint.memory)
        return image

    def __init__(self, memory: Mapping[int, MemoryPages]) -> None:
        self.pages = dict(memory)
        self._offsets: dict[int, int] = {}
        try:
            self._fd = os.memfd_create("kvmaio-checkpoint", os.MFD_CLOEXEC)
        except OSError as error:
            raise HostError("memfd_create", error.errno or 12) from None
        weakref.finalize(self, os.close, self._fd)
        end = 0
        try:
            for base, pages in memory.items():
                self._offsets[base] = end
                for number, block in pages.blocks.items():
                    for start, content in block.runs():
                        _write(self._fd, content, end + number * BLOCK_SIZE + start)
                end += pages.size
            os.ftruncate(self._fd, end)
        except OSError as error:
            raise HostError(
                "pwrite", error.errno or 28, "no room for the checkpoint's memory"
            ) from None

    def serves(self, checkpoint: Checkpoint) -> None:
        """Be the image of `checkpoint` too, if its memory is the same."""
        if checkpoint.memory == self.pages:
            self._of[checkpoint] = self

    def put_into(self, memory: GuestMemory) -> None:
        """Have `memory` hold what the image does: its regions must be the same.

        Views of the memory stay valid, and so do a hypervisor's slots: the
        addresses do not change.

        Raises:
            HostError: the host refused.
        """
        fresh = memory.image is not self
        memory.image = None  # neither, should the host refuse half-way
        for region in memory.regions:
            if fresh:
                self._map(region)
            else:
                _drop_written(region)
        memory.image = self

    def capture(
        self, region: MemoryRegion, *, on_block: Callable[[int], object] | None = None
    ) -> MemoryPages:
        """What a region that has the image mapped holds now; looks at what was written only."""
        like = self.pages.get(region.base)
        if like is None or like.size != region.size:
            return MemoryPages.capture(region.mapping, on_block=on_block)
        dirty = (page for first, last in written_runs(region) for page in range(first, last))
        return MemoryPages.capture(region.mapping, like=like, dirty=dirty, on_block=on_block)

    def _map(self, region: MemoryRegion) -> None:
        address = _address(region)
        result = _libc.mmap(
            address,
            region.size,
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE,
            self._fd,
            self._offsets[region.base],
        )
        if result != address:
            raise HostError("mmap", ctypes.get_errno(), f"of the checkpoint's {region}")


def written_runs(region: MemoryRegion) -> Iterator[tuple[int, int]]:
    """The pages written since the image was mapped or restored, as (first, behind the last)."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        try:
            runs = _scanned(pagemap.fileno(), region)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):  # an older kernel
                raise
        else:
            yield from runs
            return
        pagemap.seek(_address(region) // PAGE_SIZE * _ENTRY)
        entries = pagemap.read(region.size // PAGE_SIZE * _ENTRY)
    for run in _WRITTEN.finditer(entries[_ENTRY - 1 :: _ENTRY]):
        yield run.span()


class _PageRegion(ctypes.Structure):
    """struct page_region"""

    _fields_ = [(name, ctypes.c_uint64) for name in ("start", "end", "categories")]


class _PagemapScan(ctypes.Structure):
    """struct pm_scan_arg"""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages"),
            *("category_inverted", "category_mask", "category_anyof_mask", "return_mask"),
        )
    ]


def _scanned(pagemap: int, region: MemoryRegion) -> list[tuple[int, int]]:
    """The same by PAGEMAP_SCAN, which looks at the page tables and hands out runs only."""
    base = _address(region)
    found = (_PageRegion * _SCAN_AT_A_TIME)()
    scan = _PagemapScan(
        size=ctypes.sizeof(_PagemapScan),
        start=base,
        end=base + region.size,
        vec=ctypes.addressof(found),
        vec_len=_SCAN_AT_A_TIME,
        category_inverted=_IS_FILE,
        category_mask=_IS_FILE,
        category_anyof_mask=_IS_PRESENT | _IS_SWAPPED,
        return_mask=_IS_FILE,
    )
    runs: list[tuple[int, int]] = []
    while scan.start < scan.end:
        count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, scan)
        for run in found[:count]:
            first, behind = (run.start - base) // PAGE_SIZE, (run.end - base) // PAGE_SIZE
            if runs and runs[-1][1] == first:  # cut where the table was full
                first = runs.pop()[0]
            runs.append((first, behind))
        scan.start = scan.walk_end
    return runs


def _drop_written(region: MemoryRegion) -> None:
    runs = list(written_runs(region))
    if len(runs) > MANY_RUNS:
        runs = [(0, region.size // PAGE_SIZE)]
    for first, last in runs:
        region.mapping.madvise(mmap.MADV_DONTNEED, first * PAGE_SIZE, (last - first) * PAGE_SIZE)


def _address(region: MemoryRegion) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(region.mapping))


def _write(fd: int, content: memoryview, at: int) -> None:
    while content:
        done = os.pwrite(fd, content, at)
        content, at = content[done:], at + done
