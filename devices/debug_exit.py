"""Debug exit port: the guest ends the run with a code of its own."""

from __future__ import annotations

from kvmaio.device import Device
from kvmaio.exits import EndRun, Exited
from kvmaio.registers import Access, Register

__all__ = ["DebugExit"]


class DebugExit(Device):
    """One port that ends the run; usually at 0xF4 (QEMU's isa-debug-exit).

    The exit code is ``(value << 1 | 1) & 0xFF``: always odd, so that it cannot
    be taken for success, and the same as that of a test run under QEMU.
    """

    code = Register(0x0, int, Access.W)

    @code.on_write
    def end_run(self, value: int) -> None:
        raise EndRun(Exited((value << 1 | 1) & 0xFF))
