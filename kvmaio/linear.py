"""Linear addresses: where a guest's code is, and what its page tables make of an address.

Works on the portable `Context` and the guest's memory, whichever CPU model runs it. Sources:
SDM vol. 3A, 3.3 and 3.4 (segments), 4.3 to 4.5 (paging modes).
"""

from __future__ import annotations

from collections.abc import Iterator

from .cpu import Context
from .errors import ConfigurationError
from .memory import GuestMemory

__all__ = [
    "code_address",
    "code_bits",
    "read_linear",
    "translate",
    "write_linear",
]

_PE, _PG = 1 << 0, 1 << 31  # CR0
_PSE, _PAE, _LA57 = 1 << 4, 1 << 5, 1 << 12  # CR4
_LMA = 1 << 10  # EFER
_VM = 1 << 17  # RFLAGS
_PRESENT, _LARGE = 1 << 0, 1 << 7  # a page table's entry
_FRAME = 0x000F_FFFF_FFFF_F000


def code_bits(context: Context) -> int:
    """16, 32 or 64: how the CPU would decode its next instruction."""
    if not context.cr0 & _PE or context.rflags & _VM:
        return 16
    if context.efer & _LMA and context.cs.l:
        return 64
    return 32 if context.cs.db else 16


def code_address(context: Context) -> int:
    """The linear address of the next instruction."""
    if code_bits(context) == 64:
        return context.rip
    return (context.cs.base + context.rip) & 0xFFFF_FFFF


def translate(memory: GuestMemory, context: Context, linear: int) -> int | None:
    """The guest-physical address behind `linear`; None where no page is present.

    Rights are not looked at: this is for those who look from outside.
    """
    if not context.cr0 & _PG:
        return linear
    if context.efer & _LMA:
        shifts = (48, 39, 30, 21, 12) if context.cr4 & _LA57 else (39, 30, 21, 12)
        return _walk(memory, context.cr3 & _FRAME, linear, shifts, 9)
    linear &= 0xFFFF_FFFF
    if context.cr4 & _PAE:
        return _walk(memory, context.cr3 & 0xFFFF_FFE0, linear, (30, 21, 12), 9)
    large = bool(context.cr4 & _PSE)
    return _walk(memory, context.cr3 & 0xFFFF_F000, linear, (22, 12), 10, large=large)


def _walk(
    memory: GuestMemory,
    table: int,
    linear: int,
    shifts: tuple[int, ...],
    index_bits: int,
    *,
    large: bool = True,
) -> int | None:
    size = 8 if index_bits == 9 else 4
    for shift in shifts:
        index = linear >> shift & ((1 << index_bits) - 1)
        try:
            entry = int.from_bytes(memory.read(table + index * size, size), "little")
        except ConfigurationError:
            return None  # the table lies where there is no memory
        if not entry & _PRESENT:
            return None
        if shift == 12 or (large and entry & _LARGE and shift <= 30):
            offset = (1 << shift) - 1
            frame = entry & _FRAME & ~offset
            if size == 4 and shift == 22:  # PSE-36: bits 39:32 lie in 20:13
                frame |= (entry >> 13 & 0xFF) << 32
            return frame | linear & offset
        table = entry & _FRAME
    raise AssertionError("the last level has no large pages")


def read_linear(memory: GuestMemory, context: Context, linear: int, size: int) -> bytes:
    """As much of `size` bytes at `linear` as is mapped and has memory behind it."""
    data = b""
    for address, length in _pieces(memory, context, linear, size):
        try:
            data += memory.read(address, length)
        except ConfigurationError:
            break
    return data


def write_linear(memory: GuestMemory, context: Context, linear: int, data: bytes) -> None:
    """Write `data` at `linear`.

    Raises:
        ConfigurationError: a part of it is not mapped, or has no writable memory behind it;
            then nothing is written.
    """
    pieces = list(_pieces(memory, context, linear, len(data)))
    if sum(length for _, length in pieces) < len(data):
        raise ConfigurationError(f"{linear:#x} is not mapped as far as {len(data)} bytes")
    for address, length in pieces:
        memory.read(address, length)  # raises before anything is written
    for address, length in pieces:
        memory.write(address, data[:length])
        data = data[length:]


def _pieces(
    memory: GuestMemory, context: Context, linear: int, size: int
) -> Iterator[tuple[int, int]]:
    """(physical address, length) page by page, as far as pages are present."""
    while size > 0:
        physical = translate(memory, context, linear)
        if physical is None:
            return
        length = min(size, 4096 - linear % 4096)
        yield physical, length
        linear += length
        size -= length
