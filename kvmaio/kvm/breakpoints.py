"""Execution breakpoints of the host's in a guest's debug registers (KVM_SET_GUEST_DEBUG).

They belong to the host as long as they are set: what the guest writes to its own has no
effect meanwhile. PVM honours them in its emulated modes, that is not in 64-bit user code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigurationError
from ._native import ffi, lib
from .gate import check

__all__ = ["check_breakpoints", "put_breakpoints", "set_debug"]

MOST_BREAKPOINTS = 4

_DR7_FIXED = 0x400  # reserved, always 1 (SDM vol. 3B, 18.2.4)


def check_breakpoints(addresses: Sequence[int]) -> None:
    """Raise ConfigurationError if there are too many."""
    if len(addresses) > MOST_BREAKPOINTS:
        raise ConfigurationError(
            f"{len(addresses)} breakpoints: a processor has {MOST_BREAKPOINTS} for them"
        )


def put_breakpoints(fd: int, addresses: Sequence[int]) -> None:
    """Set the breakpoints of the vCPU with this descriptor, and no single-stepping."""
    debug = ffi.new("struct kvm_guest_debug *")
    if addresses:
        debug.control = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_HW_BP
        dr7 = _DR7_FIXED
        for number, address in enumerate(addresses):
            debug.arch.debugreg[number] = address
            dr7 |= 1 << 2 * number  # enabled; R/W and LEN 0: on execution
        debug.arch.debugreg[7] = dr7
    set_debug(fd, debug)


def set_debug(fd: int, debug: Any) -> None:
    """KVM_SET_GUEST_DEBUG."""
    check(lib.kvmaio_ioctl(fd, lib.KVM_SET_GUEST_DEBUG, debug), "KVM_SET_GUEST_DEBUG")
