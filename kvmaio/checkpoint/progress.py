"""How far the work is that takes long: capturing, saving and loading memory."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[int, int], object]
"""Called now and then with how much is done, and of how much; what it raises ends the work."""


def silent(done: int, total: int) -> None:
    """Nobody wants to know."""
