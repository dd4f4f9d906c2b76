"""`Image`: something that can be placed in guest memory and started; `BootState`: how.

Also what every loader needs: reading a file, and refusing a piece that does
not fit in words that say what, where and what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Protocol, TypeAlias

import attrs

from ..cpu import Context
from ..errors import ConfigurationError
from ..memory import GuestMemory, MemoryRegion

__all__ = [
    "BootState",
    "FOUR_GIB",
    "Image",
    "LOW_END",
    "ONE_MIB",
    "Source",
    "THREE_GIB",
    "clear",
    "low_ram",
    "read_source",
    "require_ram",
    "usable_ram",
]

THREE_GIB = 3 << 30  # where low RAM ends at the latest; the gap to 4 GiB is for devices
FOUR_GIB = 4 << 30
LOW_END = 0xA_0000  # where a PC's memory has its hole for the display and ROMs
ONE_MIB = 1 << 20  # and where that ends
_LARGEST_RAM = 1 << 40  # what advice may still call "more memory"
_CHUNK = 1 << 20

Source: TypeAlias = bytes | bytearray | memoryview | str | os.PathLike[str]
"""The contents of an image file, or its path."""


@attrs.frozen
class BootState:
    """How to start what was placed in memory.

    Attributes:
        context: the boot CPU's registers.
        cpuid: the CPUID policy that suits the image: ``"host"``, or
            ``"emulator-safe"`` for one that hosts may have to emulate.
        xcr0: set XCR0 to what the host offers of x87, SSE and AVX.
        platform: ``"bare"`` (an unmapped access is an error), or ``"pc"`` (open
            bus, and an RTC, a PIT and interrupt controllers are expected).
        fault_frame: the guest-physical address at which a `FaultFrame` tells of
            a fault that shut the guest down; None where there is no such place.
    """

    context: Context
    cpuid: str = "emulator-safe"
    xcr0: bool = False
    platform: str = "bare"
    fault_frame: int | None = None


class Image(Protocol):
    """A program for the guest."""

    def place(self, memory: GuestMemory) -> BootState:
        """Put the image into `memory`, all of it or, if it does not fit, nothing.

        Raises:
            ConfigurationError: it does not fit; the message says what to do.
        """


def read_source(source: Source, what: str, limit: int) -> bytes:
    """The bytes of an image that is given as bytes, or by its path (a pipe is fine).

    Raises:
        ConfigurationError: unreadable, empty, or more than `limit` bytes.
    """
    if isinstance(source, str | os.PathLike):
        name = f"{what} {os.fspath(source)}"
        try:
            with open(source, "rb") as file:
                data = file.read(limit + 1)
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigurationError(f"cannot read {name}: {reason}") from None
    else:
        name = what
        try:
            data = bytes(memoryview(source))  # bytes() alone would take a number for a size
        except TypeError:
            raise ConfigurationError(f"{what} must be a path or bytes, not {source!r}") from None
    if not data:
        raise ConfigurationError(f"{name} is empty")
    if len(data) > limit:
        raise ConfigurationError(f"{name} is larger than the {limit >> 20} MiB that are possible")
    return data


def low_ram(memory: GuestMemory) -> MemoryRegion:
    """The RAM that starts at address 0."""
    region = memory.region_at(0)
    if region is None or region.readonly:
        raise ConfigurationError(
            "the machine has no RAM at address 0; images are started from there"
        )
    return region


def usable_ram(memory: GuestMemory) -> Iterator[tuple[int, int]]:
    """The RAM as (start, end), without a PC's hole between 640 KiB and 1 MiB."""
    for region in memory.regions:
        if region.readonly:
            continue
        low_end, high_start = min(region.end, LOW_END), max(region.base, ONE_MIB)
        if region.base < low_end:
            yield region.base, low_end
        if high_start < region.end:
            yield high_start, region.end


def require_ram(
    memory: GuestMemory, what: str, address: int, size: int, *, reserve: int = 0
) -> None:
    """Check that address..address+size-1 is RAM, and not in low RAM's last `reserve` bytes.

    Raises:
        ConfigurationError: it is not; names `what` and how much memory would do.
    """
    end = address + size
    low = low_ram(memory)
    reserved_from = min(low.end, FOUR_GIB) - reserve
    if address >= 0 and _is_ram(memory, address, end):
        if not reserve or end <= reserved_from or address >= low.end:
            return
        obstacle = f"the engine's tables begin at {reserved_from:#x}"
    else:
        ram = ", ".join(str(region) for region in memory.regions if not region.readonly)
        obstacle = f"the machine has {ram}"
    raise ConfigurationError(
        f"{what} does not fit at {address:#x}..{end - 1:#x}: {obstacle}; {_advice(end, reserve)}"
    )


def _is_ram(memory: GuestMemory, at: int, end: int) -> bool:
    while at < end:
        region = memory.region_at(at)
        if region is None or region.readonly:
            return False
        at = region.end
    return True


def _advice(end: int, reserve: int) -> str:
    if end + reserve <= THREE_GIB:
        need = end + reserve
    elif FOUR_GIB < end <= _LARGEST_RAM:
        need = end - FOUR_GIB + THREE_GIB  # RAM above 3 GiB goes on at 4 GiB
    else:
        return "no memory size reaches there, place or link it lower"
    return f"give the machine at least {-(-need // (1 << 20))}M of memory, or place it lower"


def clear(memory: GuestMemory, address: int, size: int) -> None:
    """Zero a piece of memory; what is zero already is only read.

    An untouched page takes no host memory, and a large .bss shall not either.
    """
    zeros = bytes(_CHUNK)
    for start in range(address, address + size, _CHUNK):
        length = min(_CHUNK, address + size - start)
        if memory.read(start, length) != zeros[:length]:
            memory.write(start, zeros[:length])
