"""`Checkpoint`: a machine's whole state as a value."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import attrs

from ..errors import CheckpointError
from .layout import MEMORY, describe, digest_of
from .pages import MemoryPages
from .parts import (
    CreatedBy,
    MachineShape,
    SavedCpu,
    SavedDevice,
    check_registers,
    from_plain,
    to_plain,
)
from .plain import decode, encode
from .progress import Progress, silent
from .reader import Reader
from .writer import write

__all__ = ["SECTIONS", "Checkpoint", "Head", "check_sections"]

SECTIONS = ("machine", "cpus", "devices", "vm", "statistics")
"""The sections of plain data, in the order of the file."""

Statistics = dict[str, dict[str, int | None]]


@attrs.frozen
class Head:
    """The section ``machine``."""

    shape: MachineShape
    time_ns: int
    base: str | None
    created_by: CreatedBy
    engine: dict[str, Any]


class Checkpoint:
    """A machine's whole state: a value that nothing can change.

    It keeps its parts encoded, so what the attributes give are fresh copies:
    neither whoever built it nor whoever restores from it can alter it by way
    of an object that both know. Dicts come back ordered by key, not by insertion.

    Two checkpoints are equal exactly if their files would be (written by one
    version of zstd); the file does not say when it was written.

    Attributes:
        time_ns: simulated time in nanoseconds.
        base: None, or the `digest` of the checkpoint that this one is relative
            to: made by `since()`, and good only for `save()` and `on()`.
        memory: region base -> its pages.
    """

    __slots__ = ("__weakref__", "_digest", "_head", "_sections", "memory")

    memory: Mapping[int, MemoryPages]

    def __init__(
        self,
        *,
        shape: MachineShape,
        cpus: Sequence[SavedCpu],
        devices: Mapping[str, SavedDevice],
        vm: Mapping[str, bytes | int],
        time_ns: int,
        statistics: Mapping[str, Mapping[str, int | None]],
        memory: Mapping[int, MemoryPages],
        created_by: CreatedBy,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        """A complete checkpoint.

        Args:
            shape: what a machine must have for the checkpoint to fit it.
            cpus: one for each vCPU of `shape`.
            devices: name -> state, for each device of `shape`.
            vm: what is in the kernel beside vCPUs: name -> structure or number.
            time_ns: simulated time in nanoseconds.
            statistics: component -> name -> count, None if unknown.
            memory: region base -> complete pages, for each region of `shape`.
            created_by: versions and kinds.
            engine: what the machine itself knows, as plain data.

        Raises:
            CheckpointError: something is not plain data, or the parts do not fit together.
        """
        head = Head(shape, time_ns, None, created_by, dict(engine or {}))
        self._set(
            {
                "machine": encode(to_plain(head), "machine"),
                "cpus": encode([to_plain(cpu) for cpu in cpus], "cpus"),
                "devices": encode(to_plain(dict(devices)), "devices"),
                "vm": encode(dict(vm), "vm"),
                "statistics": encode({n: dict(s) for n, s in statistics.items()}, "statistics"),
            },
            dict(sorted(memory.items())),
        )

    def _set(self, sections: dict[str, bytes], memory: dict[int, MemoryPages]) -> None:
        self._sections = sections
        self._head = check_sections(sections)
        self._digest: str | None = None
        self.memory = MappingProxyType(memory)
        regions = [(region.base, region.size) for region in self._head.shape.memory]
        if regions != [(base, pages.size) for base, pages in memory.items()]:
            raise CheckpointError("the memory is not that of the machine's regions")
        if any(pages.relative != (self.base is not None) for pages in memory.values()):
            raise CheckpointError("pages relative to a base in a complete checkpoint, or reversed")

    @classmethod
    def _of(cls, sections: dict[str, bytes], memory: dict[int, MemoryPages]) -> Self:
        checkpoint = cls.__new__(cls)
        checkpoint._set(sections, memory)
        return checkpoint

    # ---- parts -----------------------------------------------------------------------

    @property
    def shape(self) -> MachineShape:
        """What a machine must have for the checkpoint to fit it."""
        devices = dict(self._head.shape.devices)
        return attrs.evolve(self._head.shape, devices=devices)

    @property
    def time_ns(self) -> int:
        return self._head.time_ns

    @property
    def base(self) -> str | None:
        return self._head.base

    @property
    def created_by(self) -> CreatedBy:
        """Who took it: versions and kinds."""
        return self._head.created_by

    @property
    def engine(self) -> dict[str, Any]:
        """What the machine itself knows, as plain data."""
        head: Head = from_plain(decode(self._sections["machine"]), Head, "machine")
        return head.engine

    @property
    def cpus(self) -> list[SavedCpu]:
        """The vCPUs in their order."""
        return _cpus_of(self._sections)

    @property
    def devices(self) -> dict[str, SavedDevice]:
        """The devices by name."""
        return _devices_of(self._sections)

    @property
    def vm(self) -> dict[str, bytes | int]:
        """What is in the kernel beside vCPUs: interrupt controllers, PIT, clock."""
        vm: dict[str, bytes | int] = decode(self._sections["vm"])
        return vm

    @property
    def statistics(self) -> Statistics:
        """Component -> name -> count; None is unknown."""
        statistics: Statistics = decode(self._sections["statistics"])
        return statistics

    @property
    def digest(self) -> str:
        """The checkpoint's identity: SHA-256 over all it holds, in hexadecimal."""
        if self._digest is None:
            self._digest = digest_of(describe(self._sections, list(self.memory.values())))
        return self._digest

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Checkpoint):
            return NotImplemented
        return self._sections == other._sections and self.memory == other.memory

    def __hash__(self) -> int:
        return hash(tuple(self._sections.values()))

    def __repr__(self) -> str:
        stored = sum(pages.stored_bytes for pages in self.memory.values())
        kind = "" if self.base is None else f" relative to {self.base[:16]}"
        return (
            f"<Checkpoint at {self.time_ns} ns: {len(self._head.shape.devices)} devices, "
            f"{self._head.shape.vcpus} vCPUs, {stored / (1 << 20):.1f} MiB stored{kind}>"
        )

    # ---- incremental -----------------------------------------------------------------

    def since(self, base: Checkpoint) -> Checkpoint:
        """The same checkpoint with only those pages that differ from `base`.

        Both must be complete and of a machine with the same memory. What is
        not memory is kept whole: it is a few kilobytes.

        Raises:
            CheckpointError: they are not.
        """
        self._check_complete("made relative to another")
        base._check_complete("a base")
        if self.memory.keys() != base.memory.keys():
            raise CheckpointError("the base is of a machine with other memory")
        memory = {at: pages.since(base.memory[at]) for at, pages in self.memory.items()}
        return self._with(base.digest, memory)

    def on(self, base: Checkpoint) -> Checkpoint:
        """The complete checkpoint of which `since(base)` made this one.

        Raises:
            CheckpointError: this one is complete, or `base` is not its base.
        """
        if self.base is None:
            raise CheckpointError("the checkpoint is complete, so it has no base")
        base._check_complete("a base")
        if base.digest != self.base:
            raise CheckpointError(
                f"the checkpoint is relative to {self.base[:16]}, not to {base.digest[:16]}"
            )
        memory = {at: pages.on(base.memory[at]) for at, pages in self.memory.items()}
        return self._with(None, memory)

    def _check_complete(self, what: str) -> None:
        if self.base is not None:
            raise CheckpointError(
                f"a checkpoint relative to {self.base[:16]} cannot be {what}; "
                "make it complete with on(base)"
            )

    def _with(self, base: str | None, memory: dict[int, MemoryPages]) -> Checkpoint:
        head = encode(to_plain(attrs.evolve(self._head, base=base)), "machine")
        return Checkpoint._of({**self._sections, "machine": head}, memory)

    # ---- files -----------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, progress: Progress = silent) -> None:
        """Write it to a file, whole or not at all: a crash leaves what was there before.

        Args:
            progress: called now and then with how much is done, and of how much; what it
                raises ends the work, and leaves what was there before.

        Raises:
            HostError: the host refused (no space, no permission); what was there is unharmed.
            CheckpointError: something that is no file is there, or somebody is saving to it.
        """
        write(path, self._sections, list(self.memory.values()), progress)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        base: Checkpoint | None = None,
        *,
        progress: Progress = silent,
    ) -> Checkpoint:
        """The checkpoint in a file, complete.

        Args:
            base: for a file of an incremental checkpoint, what it is relative to.
            progress: called now and then with how much is done, and of how much; what it
                raises ends the work.

        Raises:
            CheckpointError: the file is damaged, cut off, foreign or newer, needs another
                base, or is larger than memory.
            HostError: there is no such file, or it may not be read.
        """
        checkpoint = cls.load_relative(path, progress=progress)
        if checkpoint.base is None:
            if base is not None:
                raise CheckpointError(f"{_text(path)}: complete; it is relative to no base")
            return checkpoint
        if base is None:
            raise CheckpointError(
                f"{_text(path)}: relative to checkpoint {checkpoint.base[:16]}: "
                "load that first, and give it as base="
            )
        try:
            return checkpoint.on(base)
        except CheckpointError as error:
            raise CheckpointError(f"{_text(path)}: {error}") from None

    @classmethod
    def load_relative(cls, path: str | os.PathLike[str], *, progress: Progress = silent) -> Self:
        """The checkpoint in a file as it is there: with a `base` if it was saved so."""
        try:
            with Reader(path, (*SECTIONS, MEMORY)) as reader:
                sections = {name: reader.plain(name) for name in SECTIONS}
                head = check_sections(sections)
                memory = _read_memory(reader, head, progress)
                checkpoint = cls._of(sections, memory)
                checkpoint._digest = reader.digest
                return checkpoint
        except CheckpointError as error:
            raise CheckpointError(f"{_text(path)}: {error}") from None
        except MemoryError:
            raise CheckpointError(f"{_text(path)}: more than this process's memory") from None


def check_sections(sections: Mapping[str, bytes]) -> Head:
    """The head, once all sections are found to hold what they should and to fit together.

    Raises:
        CheckpointError: they do not.
    """
    head: Head = from_plain(decode(sections["machine"]), Head, "machine")
    cpus, devices = _cpus_of(sections), _devices_of(sections)
    for index, cpu in enumerate(cpus):
        check_registers(cpu.state, f"cpu {index}")
    from_plain(decode(sections["vm"]), dict[str, bytes | int], "vm")
    from_plain(decode(sections["statistics"]), Statistics, "statistics")
    if len(cpus) != head.shape.vcpus:
        raise CheckpointError(f"the state of {len(cpus)} vCPUs, of {head.shape.vcpus} in all")
    if devices.keys() != head.shape.devices.keys():
        raise CheckpointError(
            f"the state of the devices {list(devices)}, "
            f"where the machine has {list(head.shape.devices)}"
        )
    return head


def _cpus_of(sections: Mapping[str, bytes]) -> list[SavedCpu]:
    cpus: list[SavedCpu] = from_plain(decode(sections["cpus"]), list[SavedCpu], "cpus")
    return cpus


def _devices_of(sections: Mapping[str, bytes]) -> dict[str, SavedDevice]:
    plain = decode(sections["devices"])
    devices: dict[str, SavedDevice] = from_plain(plain, dict[str, SavedDevice], "devices")
    return devices


def _read_memory(reader: Reader, head: Head, progress: Progress) -> dict[int, MemoryPages]:
    regions, relative = head.shape.memory, head.base is not None
    memory = [MemoryPages(region.size, {}, relative) for region in regions]
    for region, number, block in reader.blocks(len(memory), progress):
        memory[region].add(number, block)
    return {region.base: pages for region, pages in zip(regions, memory, strict=True)}


def _text(path: str | os.PathLike[str]) -> str:
    return os.fsdecode(path)
