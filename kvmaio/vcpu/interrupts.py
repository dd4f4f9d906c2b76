"""`Interrupts`: what waits to be delivered to one vCPU that has no local APIC of KVM's."""

from __future__ import annotations

from typing import Protocol

from ..errors import ConfigurationError

__all__ = ["InterruptSource", "Interrupts"]


class InterruptSource(Protocol):
    """An interrupt controller at the INTR pin: it keeps the vector until the CPU takes it."""

    @property
    def pending(self) -> bool:
        """The level of the pin."""

    def acknowledge(self) -> int:
        """The CPU's acknowledge cycle: the vector, as it is at this moment."""


class Interrupts:
    """Pending interrupts, by vector; the highest vector goes first, as with a local APIC.

    A vector that is pending already is not pended twice (SDM vol. 3A, 11.8.4).

    Attributes:
        source: what drives the INTR pin, or None; it goes before the vectors.
    """

    __slots__ = ("_vectors", "nmi", "source", "window_requested")

    def __init__(self) -> None:
        self._vectors: set[int] = set()
        self.source: InterruptSource | None = None
        self.nmi = False
        self.window_requested = False

    def add(self, vector: int) -> None:
        """Pend an external interrupt.

        Args:
            vector: 0 to 255; below 16 are the vectors that a PC's BIOS gives its timer and
                keyboard in real mode.
        """
        if not 0 <= vector <= 255:
            raise ConfigurationError(f"interrupt vector {vector}: 0 to 255 are possible")
        self._vectors.add(vector)

    @property
    def maskable(self) -> bool:
        """Is an external interrupt pending?"""
        return bool(self._vectors) or (self.source is not None and self.source.pending)

    @property
    def need_attention(self) -> bool:
        """Is there anything to do before the next entry?"""
        if self._vectors or self.nmi or self.window_requested:
            return True
        return self.source is not None and self.source.pending

    def take(self) -> int:
        """Take the vector to deliver next."""
        if self.source is not None and self.source.pending:
            return self.source.acknowledge()
        vector = max(self._vectors)
        self._vectors.remove(vector)
        return vector

    @property
    def pending(self) -> list[int]:
        """The vectors that wait, in order."""
        return sorted(self._vectors)

    def clear(self) -> None:
        """Forget what is pending here (INIT); the source's is the source's business."""
        self._vectors.clear()
        self.nmi = False
