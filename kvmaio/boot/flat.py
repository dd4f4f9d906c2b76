"""`Flat`: bare machine code at an address, started in one of four modes."""

from __future__ import annotations

from ..arguments import whole
from ..errors import ConfigurationError
from ..memory import GuestMemory
from .image import FOUR_GIB, BootState, require_ram
from .modes import check_memory, check_mode, reserved, start

__all__ = ["Flat"]

_REAL_MODE_END = 0x10000


class Flat:
    """Code without a format.

    ========  =====================================================================
    mode      starts as
    ========  =====================================================================
    real16    16-bit real mode, all segments 0, SP 0x7000
    prot32    32-bit CPL 0, segments of 4 GiB (CS 0x08, the others 0x10), no paging
    long64    64-bit CPL 0, the first 4 GiB mapped one to one (CS 0x08, data 0x10)
    user64    64-bit CPL 3, the first 4 GiB mapped one to one (CS 0x2b, data 0x23),
              every I/O port open; at least 2 MiB of memory
    ========  =====================================================================

    Interrupts are off, there is no IDT (a fault shuts the guest down), all
    other registers are 0. RSP points to a stack of at least 64 KiB that lies,
    with the engine's tables, in the last 128 KiB of RAM (of RAM below 3 GiB):
    all RAM below that, from address 0 on, is the guest's.

    The GDT of the 64-bit modes has 64-bit code and data at 0x08 and 0x10, 32-bit
    code at 0x18, CPL 3 data and 64-bit code at 0x23 and 0x2b, a TSS at 0x38.

    In user64, HLT halts. A fault, or an interrupt, shuts the guest down; the
    tables are out of the guest's reach.

    Args:
        data: the code.
        address: where it goes in guest-physical memory; in real16 below 64 KiB.
        mode: see above.
        entry: the address of the first instruction; by default `address`.
    """

    def __init__(
        self,
        data: bytes | bytearray | memoryview,
        address: int,
        mode: str = "real16",
        entry: int | None = None,
    ) -> None:
        try:
            self.data = bytes(memoryview(data))
        except TypeError:
            raise ConfigurationError(
                f"a flat image must be bytes, not {type(data).__name__}; see kvmaio.assembler"
            ) from None
        self.address = whole("address", address)
        self.mode = check_mode(mode)
        self.entry = self.address if entry is None else whole("entry", entry)
        if not self.data:
            raise ConfigurationError("the flat image is empty")
        limit, why = FOUR_GIB, "the mode reaches only the first 4 GiB"
        if self.mode == "real16":
            limit, why = _REAL_MODE_END, "CS is 0 in real mode"
        for name, value in (("address", self.address), ("entry", self.entry)):
            if not 0 <= value < limit:
                raise ConfigurationError(
                    f"a flat {mode} image with {name} {value:#x}: it must be below {limit:#x}, "
                    f"because {why}"
                )

    def place(self, memory: GuestMemory) -> BootState:
        """Put code and tables into `memory`; the engine calls this."""
        keep = reserved(self.mode)
        check_memory(memory, self.mode)
        what = f"a flat image of {len(self.data)} bytes"
        require_ram(memory, what, self.address, len(self.data), reserve=keep)
        require_ram(memory, "the entry point", self.entry, 1)
        state = start(memory, self.mode, self.entry)
        memory.write(self.address, self.data)
        return state
