"""What a checkpoint file says of itself, without a checkpoint being made of it."""

from __future__ import annotations

import os

import attrs

from ..errors import CheckpointError
from .layout import MEMORY, RECORD, SCHEMA, Entry
from .model import SECTIONS, Head, check_sections
from .pages import PAGE_SIZE, Block, MemoryPages
from .parts import CreatedBy, MachineShape
from .progress import Progress, silent
from .reader import Reader

__all__ = ["CheckpointInfo", "inspect"]


@attrs.frozen
class CheckpointInfo:
    """What a checkpoint file says of itself.

    Attributes:
        schema: the version of the format.
        file_size: in bytes.
        digest: the checkpoint's identity.
        base: that of the checkpoint that it is relative to, or None.
        created_by: versions and kinds.
        time_ns: simulated time in nanoseconds.
        shape: what a machine must have for the checkpoint to fit it.
        sections: their names, sizes and checksums, in order.
        verified: whether memory pages were checked, too.
    """

    schema: int
    file_size: int
    digest: str
    base: str | None
    created_by: CreatedBy
    time_ns: int
    shape: MachineShape
    sections: tuple[Entry, ...]
    verified: bool

    @property
    def stored_pages(self) -> int:
        """How many pages of memory the file holds; those of zeros are left out."""
        memory = self.sections[-1]
        return (memory.plain - RECORD.size * memory.values) // PAGE_SIZE


def inspect(
    path: str | os.PathLike[str], *, verify: bool = True, progress: Progress = silent
) -> CheckpointInfo:
    """What the checkpoint file at `path` says of itself; no memory page is kept.

    Args:
        verify: check every byte of the file; else memory pages are not read.
        progress: as for `Checkpoint.load`.

    Raises:
        CheckpointError, HostError: as `Checkpoint.load`.
    """
    try:
        with Reader(path, (*SECTIONS, MEMORY)) as reader:
            head = check_sections({name: reader.plain(name) for name in SECTIONS})
            if verify:
                _verify_memory(reader, head, progress)
            return CheckpointInfo(
                SCHEMA,
                reader.size,
                reader.digest,
                head.base,
                head.created_by,
                head.time_ns,
                head.shape,
                tuple(reader.entries),
                verify,
            )
    except CheckpointError as error:
        raise CheckpointError(f"{os.fsdecode(path)}: {error}") from None


def _verify_memory(reader: Reader, head: Head, progress: Progress) -> None:
    relative = head.base is not None
    memory = [MemoryPages(region.size, {}, relative) for region in head.shape.memory]
    for region, number, block in reader.blocks(len(memory), progress):
        memory[region].add(number, block)
        memory[region].blocks[number] = Block(0, 0, b"")  # its number is all that is needed
