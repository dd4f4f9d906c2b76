"""Do breakpoints work under this host's KVM? Nested and emulated ones often ignore them."""

from __future__ import annotations

import asyncio
from typing import Any

from ..boot import Flat
from ..exits import DebugEventExit
from ..machine import Machine

__all__ = ["breakpoints_work"]

_TRIAL_LIMIT_S = 5.0
_known: bool | None = None


async def breakpoints_work() -> bool:
    """Try one, the first time; it takes some milliseconds."""
    global _known
    if _known is None:
        # On a loop of its own: this one's time may be simulated, and be moved by a guest.
        _known = await asyncio.to_thread(asyncio.run, _trial())
    return _known


async def _trial() -> bool:
    async with Machine(memory="64K", cpu="kvm") as machine:
        (vcpu,) = machine.vcpus
        machine.load(Flat(b"\x90\x90\xf4", 0x1000))  # nop; nop; hlt
        model: Any = vcpu.model
        model.set_breakpoints([0x1001])
        async with asyncio.timeout(_TRIAL_LIMIT_S):
            return isinstance(await vcpu.run(), DebugEventExit)
