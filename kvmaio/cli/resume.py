"""``kvmaio run --from`` and ``--save``: from a checkpoint, and to one at the end."""

from __future__ import annotations

import os

import click

from ..checkpoint import Checkpoint
from ..errors import CheckpointError
from ..machine import Machine
from .reports import say

__all__ = ["BOARD_FROM_CHECKPOINT", "check_board", "save"]

BOARD_FROM_CHECKPOINT = (
    *("image", "kind", "mode", "address", "memory", "vcpus", "irqchip", "append", "initrd"),
)
"""What ``--from`` decides, and therefore cannot be given beside it."""

_OF_EVERY_BOARD = {"uart", "debug402", "debuge9", "debugexit"}


def check_board(path: str, checkpoint: Checkpoint) -> bool:
    """Is it a PC's board? A checkpoint that is of no board of this command is refused."""
    devices = checkpoint.shape.devices.keys()
    if not devices >= _OF_EVERY_BOARD:
        missing = ", ".join(sorted(_OF_EVERY_BOARD - devices))
        raise CheckpointError(
            f"{path}: not of a machine that `kvmaio run` builds (no device {missing}); "
            "restore it with Machine.restore() in Python"
        )
    return "rtc" in devices


async def save(machine: Machine, path: str) -> None:
    """Take a checkpoint of how it is now, and say so."""
    checkpoint = await machine.checkpoint()
    checkpoint.save(path)
    size = os.stat(path).st_size
    say(
        f"saved {click.format_filename(path)} ({size / (1 << 20):.1f} MiB); "
        f"`kvmaio run --from {click.format_filename(path)}` goes on from here"
    )
