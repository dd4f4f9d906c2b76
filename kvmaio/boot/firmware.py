"""`Firmware`: a BIOS image at the reset vector."""

from __future__ import annotations

from ..cpu import Context
from ..errors import ConfigurationError
from ..memory import PAGE_SIZE, GuestMemory
from .image import FOUR_GIB, BootState, Source, read_source, require_ram

__all__ = ["Firmware"]

_LARGEST = 16 << 20
_ONE_MIB = 1 << 20
_SHADOW = 128 << 10


class Firmware:
    """Firmware such as SeaBIOS: read-only, ending at 4 GiB; the CPU starts as after reset.

    The last 128 KiB are also in RAM below 1 MiB, at 0xe0000 (all of a smaller
    image, ending at 1 MiB): there a BIOS expects itself, and writes to it.

    Args:
        source: the image or its path; a multiple of 4 KiB, at most 16 MiB.
    """

    def __init__(self, source: Source) -> None:
        self.data = read_source(source, "firmware", _LARGEST)
        if len(self.data) % PAGE_SIZE:
            raise ConfigurationError(
                f"firmware of {len(self.data)} bytes: its size must be a multiple of {PAGE_SIZE}; "
                "is the file complete, and is it firmware?"
            )

    def place(self, memory: GuestMemory) -> BootState:
        """Put the ROM and its copy into `memory`; the engine calls this."""
        shadow = self.data[-_SHADOW:]
        base, shadow_base = FOUR_GIB - len(self.data), _ONE_MIB - len(shadow)
        require_ram(memory, "the firmware's copy below 1 MiB", shadow_base, len(shadow))
        old = memory.region_at(base)
        if old is not None and old.readonly and (old.base, old.size) == (base, len(self.data)):
            memory.write(base, self.data)  # loaded again, after a run for instance
        else:
            memory.add_rom(base, self.data)
        memory.write(shadow_base, shadow)
        return BootState(Context(), platform="pc")
