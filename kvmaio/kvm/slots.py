"""`MemorySlots`: the guest's memory as KVM's numbered slots."""

from __future__ import annotations

import errno
import heapq
from typing import TYPE_CHECKING

import attrs

from ..errors import ConfigurationError
from ..memory import MemoryRegion
from ._native import ffi, lib
from .gate import check

if TYPE_CHECKING:
    from ._native import CData

__all__ = ["PRIVATE_PAGES", "MemorySlots"]

# KVM itself maps these (identity map page, three TSS pages) into the guest on some Intel hosts,
# and no slot may lie there: right below the 16 MiB that firmware may need at the top of 4 GiB.
PRIVATE_PAGES = range(0xFEFFC000, 0xFF000000)


@attrs.define
class _Slot:
    region: MemoryRegion
    flags: int
    # Keeps the mapping from being unmapped or resized while the guest can reach it.
    buffer: CData


class MemorySlots:
    """Slots 0, 1, 2 and so on of one VM; a freed number is used again, lowest first.

    Source: api.rst, KVM_SET_USER_MEMORY_REGION.
    """

    def __init__(self, vm_fd: int, limit: int) -> None:
        self._vm_fd = vm_fd
        self._limit = limit
        self._used: dict[int, _Slot] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._used)

    def number_of(self, region: MemoryRegion) -> int:
        """The slot that holds `region`.

        Raises:
            ConfigurationError: none does.
        """
        for number, slot in self._used.items():
            if slot.region is region:
                return number
        raise ConfigurationError(f"{region} is not part of this machine")

    def region_of(self, number: int) -> MemoryRegion:
        """The region in slot `number`.

        Raises:
            ConfigurationError: the slot is free.
        """
        try:
            return self._used[number].region
        except KeyError:
            raise ConfigurationError(f"memory slot {number} is not in use") from None

    def check(self, base: int, size: int, what: str) -> None:
        """Refuse a region that no slot can hold.

        Raises:
            ConfigurationError: it overlaps KVM's private pages, or no slot is left.
        """
        if base < PRIVATE_PAGES.stop and base + size > PRIVATE_PAGES.start:
            raise ConfigurationError(
                f"cannot add {what} at {base:#x}..{base + size - 1:#x}: KVM keeps "
                f"{PRIVATE_PAGES.start:#x}..{PRIVATE_PAGES.stop - 1:#x} for itself; place it "
                "elsewhere (RAM best ends at 0xc0000000 and goes on at 0x100000000)"
            )
        if len(self._used) >= self._limit:
            raise ConfigurationError(
                f"cannot add {what} at {base:#x}..{base + size - 1:#x}: all {self._limit} memory "
                "slots of this host's KVM are in use; use fewer, larger regions"
            )

    def add(self, region: MemoryRegion) -> int:
        """Show `region` to the guest; returns its slot.

        Raises:
            ConfigurationError: empty, in KVM's private pages, or no slot is left.
            HostError: the host refused.
        """
        if region.size <= 0:
            # KVM takes a size of zero as "delete this slot".
            raise ConfigurationError(f"a memory slot of zero bytes at {region.base:#x}")
        self.check(region.base, region.size, "ROM" if region.readonly else "RAM")
        flags = lib.KVM_MEM_READONLY if region.readonly else 0
        buffer = ffi.from_buffer(region.mapping, require_writable=True)
        number = heapq.heappop(self._free) if self._free else len(self._used)
        slot = _Slot(region, flags, buffer)
        try:
            self._set(number, slot)
        except BaseException:
            heapq.heappush(self._free, number)
            raise
        self._used[number] = slot
        return number

    def remove(self, region: MemoryRegion) -> None:
        """Take `region` away from the guest: accesses there become MMIO exits."""
        number = self.number_of(region)
        slot = self._used[number]
        self._set(number, attrs.evolve(slot, flags=0), size=0)
        self._release(number)

    def release_all(self) -> None:
        """Let go of the host memory; the VM must be closed, so that nobody can reach it."""
        for number in list(self._used):
            self._release(number)

    def log_dirty_pages(self, region: MemoryRegion, enabled: bool) -> None:
        """Start or stop recording which pages of `region` the guest writes."""
        number = self.number_of(region)
        slot = self._used[number]
        flag = lib.KVM_MEM_LOG_DIRTY_PAGES
        changed = attrs.evolve(slot, flags=slot.flags | flag if enabled else slot.flags & ~flag)
        if changed.flags != slot.flags:
            self._set(number, changed)
            self._used[number] = changed

    def dirty_log(self, number: int) -> bytes:
        """The pages of a slot that were written since the last call: bit n of the bytes, lowest
        bit first, is page n of 4096 bytes.

        Raises:
            ConfigurationError: the slot is free, or its pages are not recorded.
        """
        region = self.region_of(number)
        pages = region.size // 4096
        bitmap = ffi.new("uint64_t[]", -(-pages // 64))
        log = ffi.new("struct kvm_dirty_log *", {"slot": number, "dirty_bitmap": bitmap})
        result = lib.kvmaio_ioctl(self._vm_fd, lib.KVM_GET_DIRTY_LOG, log)
        if result == -errno.ENOENT:
            raise ConfigurationError(
                f"the dirty pages of {region} are not recorded; call log_dirty_pages() first"
            )
        check(result, "KVM_GET_DIRTY_LOG")
        return bytes(ffi.buffer(bitmap))[: -(-pages // 8)]

    def _set(self, number: int, slot: _Slot, *, size: int | None = None) -> None:
        region = slot.region
        entry = ffi.new(
            "struct kvm_userspace_memory_region *",
            {
                "slot": number,
                "flags": slot.flags,
                "guest_phys_addr": region.base,
                "memory_size": region.size if size is None else size,
                "userspace_addr": int(ffi.cast("uintptr_t", slot.buffer)),
            },
        )
        result = lib.kvmaio_ioctl(self._vm_fd, lib.KVM_SET_USER_MEMORY_REGION, entry)
        check(result, f"KVM_SET_USER_MEMORY_REGION ({region})")

    def _release(self, number: int) -> None:
        slot = self._used.pop(number)
        ffi.release(slot.buffer)
        heapq.heappush(self._free, number)
