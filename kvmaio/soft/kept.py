"""`Kept`: the state of another CPU model that the software CPU cannot hold."""

from __future__ import annotations

import attrs

from ..cpu import CpuState
from .msrs import MSRS, is_as_after_reset

__all__ = ["Kept"]

_LEGACY = 576  # the XSAVE area's x87 and SSE part, and its header
_AVX, _AVX_END = 2, 832  # a component, and where what follows it begins
_XSTATE_BV = slice(512, 520)
_X87_SSE = 0b11


class Kept:
    """What was written to the CPU and is not in it; `give_back()` puts it into what is read.

    YMM and further vector state, XCR0's bits for it, MSRs, the local APIC of KVM's.
    """

    def __init__(self) -> None:
        self._xsave: bytes | None = None
        self._components = 0
        self._xcr0 = 0
        self._msrs: dict[int, int] = {}
        self._lapic: bytes | None = None

    def keep(self, state: CpuState) -> str:
        """Remember it; returns in words what of it is not as after a reset, or nothing."""
        self._xsave, self._components = None, 0
        if state.xsave is not None:
            present = int.from_bytes(state.xsave[_XSTATE_BV], "little")
            self._components = present & ~_X87_SSE
            if self._components:
                self._xsave = state.xsave
        self._xcr0 = state.xcrs.get(0, 0) & ~_X87_SSE
        self._msrs = {index: value for index, value in state.msrs.items() if index not in MSRS}
        self._lapic = state.lapic
        return self._describe()

    def _describe(self) -> str:
        parts = []
        if components := self._significant():
            names = [str(bit) for bit in range(2, 64) if components >> bit & 1]
            parts.append(f"XSAVE components {', '.join(names)}")
        if self._lapic is not None:
            parts.append("the local APIC")
        names = [
            f"{index:#x}"
            for index, value in sorted(self._msrs.items())
            if not is_as_after_reset(index, value)
        ]
        if names:
            parts.append(f"MSRs {', '.join(names)}")
        return "; ".join(parts)

    def _significant(self) -> int:
        """The components with something in them: they may be marked, and be all zeros, which is
        their initial state (SDM vol. 1, 13.6). Behind AVX's, places differ between processors.
        """
        if self._xsave is None:
            return 0
        components = self._components
        if not any(self._xsave[_LEGACY:_AVX_END]):
            components &= ~(1 << _AVX)
        if not any(self._xsave[_AVX_END:]):
            components &= 1 << _AVX
        return components

    def give_back(self, state: CpuState) -> CpuState:
        """`state` with what was kept."""
        xsave = state.xsave
        if self._xsave is not None and xsave is not None:
            present = int.from_bytes(xsave[_XSTATE_BV], "little") | self._components
            header = present.to_bytes(8, "little") + self._xsave[520:_LEGACY]
            xsave = xsave[:512] + header + self._xsave[_LEGACY:]
        xcrs = dict(state.xcrs)
        if 0 in xcrs:
            xcrs[0] |= self._xcr0
        return attrs.evolve(
            state, xsave=xsave, xcrs=xcrs, msrs=self._msrs | state.msrs, lapic=self._lapic
        )
