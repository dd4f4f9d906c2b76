"""``kvmaio run --from`` and ``--save``: from a checkpoint, and to one at the end."""

from __future__ import annotations

import asyncio
import os

import click

from ..checkpoint import Checkpoint
from ..checkpoint.atomic import check_can_replace
from ..errors import CheckpointError, KvmaioError
from ..machine import Machine
from .progress import working
from .reports import say

__all__ = ["BOARD_FROM_CHECKPOINT", "check_board", "check_can_save", "load", "save"]

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


def load(path: str) -> Checkpoint:
    """The checkpoint in a file."""
    with working(f"loading {click.format_filename(path)}") as progress:
        return Checkpoint.load(path, progress=progress)


def check_can_save(path: str) -> None:
    """Refuse, before the run, a place where its end could not be saved."""
    try:
        check_can_replace(path)
    except KvmaioError as error:
        raise click.BadParameter(str(error), param_hint="--save") from None


async def save(machine: Machine, path: str) -> None:
    """Take a checkpoint of how it is now, and say so."""
    try:
        with working("taking a checkpoint", _end_if_cancelled) as progress:
            checkpoint = await machine.checkpoint(progress=progress)
        with working(f"saving {click.format_filename(path)}", _end_if_cancelled) as progress:
            checkpoint.save(path, progress=progress)
    except asyncio.CancelledError:
        say(f"{click.format_filename(path)} is not saved")
        raise
    size = os.stat(path).st_size
    say(
        f"saved {click.format_filename(path)} ({size / (1 << 20):.1f} MiB); "
        f"`kvmaio run --from {click.format_filename(path)}` goes on from here"
    )


def _end_if_cancelled() -> None:
    # Ctrl-C cancels the task, which learns of it only at an await; and here is none.
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
