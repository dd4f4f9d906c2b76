"""Watchpoints: areas of linear memory at whose accesses a guest is to stop; and what hit them.

A CPU model that has them offers ``set_watchpoints(watchpoints)`` and, behind a debug exit,
``watch_hits``. The software CPU does; KVM's debug registers could watch four places, where the
host honours them at all, and none for reads alone.
"""

from __future__ import annotations

import enum

import attrs

__all__ = ["WatchHit", "WatchKind", "Watchpoint"]


class WatchKind(enum.Flag):
    """Which accesses."""

    READ = 1
    WRITE = 2
    ACCESS = READ | WRITE


@attrs.frozen
class Watchpoint:
    """`size` bytes from the linear address `address` on."""

    address: int
    size: int
    kind: WatchKind = WatchKind.WRITE


@attrs.frozen
class WatchHit:
    """An instruction has accessed what a watchpoint watches.

    Attributes:
        address: linear, of the first byte of it that is watched.
        kind: what it did there, as far as that is watched.
    """

    address: int
    kind: WatchKind
