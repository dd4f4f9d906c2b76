"""`GuestMemory`: the guest's RAM and ROM, as regions of host memory."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from .arguments import whole
from .errors import ConfigurationError, HostError

if TYPE_CHECKING:
    from .memory_image import MemoryImage

__all__ = ["GuestMemory", "MemoryRegion", "parse_size"]

PAGE_SIZE = 4096
_MAP_NORESERVE = 0x4000  # the mmap module names it only from Python 3.13 on

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int) -> int:
    """``"16M"`` -> bytes. Units K, M, G and T are powers of 1024; an int is bytes.

    Raises:
        ConfigurationError: not a size, or not a positive one.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    elif not isinstance(text, str):
        raise ConfigurationError(f"a size of {text!r}: write it like 64M, or as a number of bytes")
    else:
        stripped = text.strip().upper().removesuffix("IB").removesuffix("B")
        unit = stripped[-1:] if stripped[-1:].isalpha() else ""
        try:
            size = int(stripped.removesuffix(unit), 0) * _UNITS[unit]
        except (ValueError, KeyError):
            raise ConfigurationError(f"{text!r} is no size; write it like 64M or 2G") from None
    if size <= 0:
        raise ConfigurationError(f"a size of {text!r}: it must be greater than 0")
    return size


@attrs.frozen(eq=False)
class MemoryRegion:
    """A contiguous piece of guest-physical memory, backed by host memory."""

    base: int
    size: int
    readonly: bool
    mapping: mmap.mmap

    @property
    def end(self) -> int:
        """The first address behind the region."""
        return self.base + self.size

    def __str__(self) -> str:
        return f"{'ROM' if self.readonly else 'RAM'} {self.base:#x}..{self.end - 1:#x}"


class GuestMemory:
    """The guest's physical memory.

    Host-side access: `read`, `write` and `view` take guest-physical addresses
    and check bounds. The host may write a ROM; the guest may not.

    Attributes:
        regions: ordered by address, never overlapping.
        image: the `MemoryImage` that lies beneath, or None.
    """

    def __init__(self) -> None:
        self.regions: list[MemoryRegion] = []
        self.image: MemoryImage | None = None
        self._bases: list[int] = []
        self._watchers: list[
            tuple[Callable[[MemoryRegion], None], Callable[[MemoryRegion], None]]
        ] = []
        self._written: list[Callable[[int, int], None]] = []
        self._guards: list[Callable[[int, int, str], None]] = []

    @property
    def size(self) -> int:
        """Bytes of RAM, ROMs not included."""
        return sum(region.size for region in self.regions if not region.readonly)

    def add_ram(self, base: int, size: int) -> MemoryRegion:
        """Add zeroed RAM; pages take host memory only once they are touched.

        Args:
            base, size: in bytes, multiples of 4096.

        Raises:
            ConfigurationError: misaligned, empty, overlapping, or more than the host has.
        """
        return self._add(base, size, readonly=False)

    def add_rom(self, base: int, data: bytes) -> MemoryRegion:
        """Add memory that the guest may read and execute but not write.

        Its size is that of `data`, rounded up to whole pages. A guest's write
        there reaches the `mmio` bus.
        """
        if not data:
            raise ConfigurationError(f"a ROM of zero bytes at {base:#x}")
        region = self._add(base, -(-len(data) // PAGE_SIZE) * PAGE_SIZE, readonly=True)
        region.mapping[: len(data)] = data
        return region

    def add_region(self, base: int, size: int, *, readonly: bool) -> MemoryRegion:
        """Add zeroed RAM or ROM; see `add_ram` and `add_rom`."""
        return self._add(base, size, readonly=readonly)

    def remove(self, region: MemoryRegion) -> None:
        """Take a region away again; views of it stay valid but lead nowhere."""
        index = self.regions.index(region)
        self.image = None
        del self.regions[index], self._bases[index]
        for _, removed in self._watchers:
            removed(region)

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes from guest-physical `address`; regions that touch are one.

        Raises:
            ConfigurationError: part of it is not memory.
        """
        pieces = [
            region.mapping[start : start + length]
            for region, start, length in self._pieces(address, size)
        ]
        return b"".join(pieces)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at guest-physical `address`; see `read()`."""
        data = memoryview(data).cast("B")
        done = 0
        # The pieces are found first, so that a write is done whole or not at all.
        for region, start, length in list(self._pieces(address, len(data))):
            region.mapping[start : start + length] = data[done : done + length]
            done += length
        for written in self._written:
            written(address, done)

    def view(self, address: int, size: int) -> memoryview:
        """A writable window on guest memory; it must lie within one region.

        The guest sees writes at once, and the other way round. But code that the
        software CPU has executed before goes on as it was: change that by `write()`.
        """
        region = self.region_at(address)
        if region is None or address + size > region.end or size < 0:
            raise self._no_memory(address, size)
        start = address - region.base
        return memoryview(region.mapping)[start : start + size]

    def region_at(self, address: int) -> MemoryRegion | None:
        """The region that holds `address`, or None."""
        index = bisect_right(self._bases, address) - 1
        if index >= 0 and address < self.regions[index].end:
            return self.regions[index]
        return None

    def overlapping(self, base: int, size: int) -> MemoryRegion | None:
        """The first region that shares an address with base..base+size-1."""
        return next((r for r in self.regions if base < r.end and r.base < base + size), None)

    def watch(
        self,
        added: Callable[[MemoryRegion], None],
        removed: Callable[[MemoryRegion], None],
        written: Callable[[int, int], None] | None = None,
    ) -> Callable[[], None]:
        """Call `added` for each region there is and will be, `removed` when one goes.

        `written` is called behind each `write()`, with address and size. To call what is
        returned ends it; idempotent.
        """
        for region in self.regions:
            added(region)
        watcher = (added, removed)
        self._watchers.append(watcher)
        if written is not None:
            self._written.append(written)

        def end() -> None:
            if watcher in self._watchers:
                self._watchers.remove(watcher)
                if written is not None:
                    self._written.remove(written)

        return end

    def guard(self, check: Callable[[int, int, str], None]) -> Callable[[], None]:
        """Let `check(base, size, what)`, too, refuse a region by raising ConfigurationError.

        To call what is returned ends it; idempotent.
        """
        self._guards.append(check)

        def end() -> None:
            if check in self._guards:
                self._guards.remove(check)

        return end

    @staticmethod
    def check_host_has(size: int) -> None:
        """Refuse more RAM than the host's own: it would end in the OOM killer, not in an error."""
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if size > host:
            raise ConfigurationError(
                f"{size / (1 << 30):.1f} GiB of guest memory, but this host has only "
                f"{host / (1 << 30):.1f} GiB; give the machine less memory"
            )

    def close(self) -> None:
        """Forget all regions; host memory goes once the last view of it does."""
        self.image = None
        self._watchers.clear()
        self._written.clear()
        self._guards.clear()
        self.regions.clear()
        self._bases.clear()

    def _add(self, base: int, size: int, *, readonly: bool) -> MemoryRegion:
        kind = "ROM" if readonly else "RAM"
        whole("base", base)
        whole("size", size)
        if size <= 0:
            raise ConfigurationError(
                f"{kind} of {size} bytes at {base:#x}: the size must be greater than 0"
            )
        if base % PAGE_SIZE or size % PAGE_SIZE or base < 0:
            raise ConfigurationError(
                f"{kind} of {size:#x} bytes at {base:#x}: "
                f"base and size must be multiples of {PAGE_SIZE}"
            )
        if (other := self.overlapping(base, size)) is not None:
            raise ConfigurationError(
                f"cannot add {kind} at {base:#x}..{base + size - 1:#x}: {other} is already there"
            )
        for check in self._guards:
            check(base, size, kind)
        self.check_host_has(self.size + size)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            mapping = mmap.mmap(-1, size, flags=flags)
        except (OSError, OverflowError) as error:
            raise HostError(
                "mmap", getattr(error, "errno", None) or 12, f"no room for {size:#x} bytes of RAM"
            ) from None
        region = MemoryRegion(base, size, readonly, mapping)
        self.image = None
        index = bisect_right(self._bases, base)
        self.regions.insert(index, region)
        self._bases.insert(index, base)
        try:
            for added, _ in self._watchers:
                added(region)
        except BaseException:
            del self.regions[index], self._bases[index]
            raise
        return region

    def _pieces(self, address: int, size: int) -> list[tuple[MemoryRegion, int, int]]:
        if size < 0:
            raise ConfigurationError(f"an access of {size} bytes at {address:#x}")
        pieces = []
        at, left = address, size
        while left:
            region = self.region_at(at)
            if region is None:
                raise self._no_memory(address, size)
            length = min(left, region.end - at)
            pieces.append((region, at - region.base, length))
            at += length
            left -= length
        return pieces

    def _no_memory(self, address: int, size: int) -> ConfigurationError:
        have = ", ".join(map(str, self.regions)) or "no memory at all"
        return ConfigurationError(
            f"{size} bytes at {address:#x} are not all in memory; the machine has {have}"
        )
