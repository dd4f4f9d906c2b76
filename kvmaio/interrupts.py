"""`Interrupts`: what waits to be delivered to one vCPU that has no local APIC of KVM's."""

from __future__ import annotations

from .errors import ConfigurationError

__all__ = ["Interrupts"]


class Interrupts:
    """Pending interrupts, by vector; the highest vector goes first, as with a local APIC.

    A vector that is pending already is not pended twice (SDM vol. 3A, 11.8.4).
    """

    __slots__ = ("_vectors", "nmi", "window_requested")

    def __init__(self) -> None:
        self._vectors: set[int] = set()
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
        return bool(self._vectors)

    @property
    def need_attention(self) -> bool:
        """Is there anything to do before the next entry?"""
        return bool(self._vectors) or self.nmi or self.window_requested

    def take(self) -> int:
        """Take the vector to deliver next."""
        vector = max(self._vectors)
        self._vectors.remove(vector)
        return vector

    @property
    def pending(self) -> list[int]:
        """The vectors that wait, in order."""
        return sorted(self._vectors)

    def clear(self) -> None:
        """Forget everything (INIT)."""
        self._vectors.clear()
        self.nmi = False
