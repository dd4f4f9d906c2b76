"""Debug console port, as Bochs and QEMU have it: each byte written is text."""

from __future__ import annotations

from collections.abc import Awaitable

from kvmaio.registers import Register

from .console import Console

__all__ = ["DebugConsole"]

PRESENT = 0xE9  # what firmware looks for before it prints


class DebugConsole(Console):
    """One port that takes text; usually at 0x402 (SeaBIOS) or 0xE9 (Bochs).

    See `Console` for what can be done with the text.
    """

    # Posted: a write changes nothing that the guest could read, and raises no interrupt.
    data = Register(0x0, int, posted=True)

    @data.on_read
    def tell_presence(self) -> int:
        return PRESENT

    @data.on_write
    def print_byte(self, byte: int) -> Awaitable[None] | None:
        return self.emit(bytes((byte,)))
