"""`Elf`: a static ELF executable of 32 or 64 bits (System V ABI, "Object Files").

A file may be damaged or hostile: every number from it is checked before it is
used as a size, an address or a count.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise

import attrs
from elftools.common.utils import struct_parse
from elftools.elf.elffile import ELFFile

from ..errors import ConfigurationError
from ..memory import GuestMemory
from .image import FOUR_GIB, BootState, Source, clear, read_source, require_ram
from .modes import Mode, check_memory, reserved, start

__all__ = ["Elf", "Program", "Segment", "place_segments", "read_elf"]

LARGEST_FILE = 1 << 30
_MAGIC = b"\x7fELF"
_MACHINES = {("EM_386", 32): 32, ("EM_X86_64", 64): 64}
_HEADER_SIZES = {32: 32, 64: 56}
_NO_COUNT = 0xFFFF  # PN_XNUM: the number of program headers did not fit

_WRONG_TYPE = {
    "ET_REL": "it is an object file; link it: ld -static -Ttext=0x100000 FILE",
    "ET_DYN": "it is position-independent or a library; link it with -static -no-pie",
    "ET_CORE": "it is a core dump",
}


@attrs.frozen
class Segment:
    """A piece of a program: `data` at guest-physical `address`, zeros up to `size` bytes."""

    name: str
    address: int
    size: int
    data: memoryview = attrs.field(repr=False)

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.size


@attrs.frozen
class Program:
    """What an ELF file says: word size, physical entry point, what to load."""

    bits: int
    entry: int
    segments: Sequence[Segment]


class Elf:
    """A static executable, placed by its physical addresses (``p_paddr``).

    ELF32 starts like `Flat`'s prot32, ELF64 like its long64 (CPL 0, the first
    4 GiB mapped one to one): there are the stack, the GDT and the state
    described. An entry point given as a virtual address is translated.

    Args:
        source: the file's contents or its path.
    """

    def __init__(self, source: Source) -> None:
        self.program = read_elf(read_source(source, "the ELF file", LARGEST_FILE))

    def place(self, memory: GuestMemory) -> BootState:
        """Put the segments and the mode's tables into `memory`; the engine calls this."""
        mode: Mode = "prot32" if self.program.bits == 32 else "long64"
        check_memory(memory, mode)
        for segment in self.program.segments:
            require_ram(memory, segment.name, segment.address, segment.size, reserve=reserved(mode))
        state = start(memory, mode, self.program.entry)
        place_segments(memory, self.program.segments)
        return state


def read_elf(data: bytes) -> Program:
    """The loadable content of an ELF executable for x86.

    Raises:
        ConfigurationError: not one that can be started, and why.
    """
    if not data.startswith(_MAGIC):
        raise ConfigurationError(f"not an ELF file: it begins with {data[:4].hex(' ')}")
    # Any damage may meet pyelftools, and it raises what the place of the damage suggests.
    try:
        file = ELFFile(io.BytesIO(data))
        bits = _check_header(file)
        headers = _program_headers(file, len(data))
    except ConfigurationError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConfigurationError(f"a damaged ELF file: {text or type(error).__name__}") from error
    content = memoryview(data)  # slices of it are no copies: headers may name the same bytes often
    segments = []
    virtual = []
    for index, header in headers:
        name = f"ELF segment {index}"
        address, size, offset, length = (
            int(header[field]) for field in ("p_paddr", "p_memsz", "p_offset", "p_filesz")
        )
        if length > size:
            raise ConfigurationError(
                f"a damaged ELF file: {name} has {length:#x} bytes in the file, {size:#x} in memory"
            )
        if offset + length > len(data):
            raise ConfigurationError(
                f"the ELF file ends at {len(data):#x}, but {name} goes up to {offset + length:#x}; "
                "is the file complete?"
            )
        if size:
            segments.append(Segment(name, address, size, content[offset : offset + length]))
            virtual.append((int(header["p_vaddr"]), size, address))
    if not segments:
        raise ConfigurationError("the ELF file has nothing to load (no PT_LOAD segment)")
    _refuse_overlap(segments)
    return Program(bits, _physical_entry(int(file.header["e_entry"]), virtual), segments)


def place_segments(memory: GuestMemory, segments: Sequence[Segment]) -> None:
    """Write the segments, which must fit, and zero what the file does not fill (.bss)."""
    for segment in segments:
        memory.write(segment.address, segment.data)
        filled = len(segment.data)
        clear(memory, segment.address + filled, segment.size - filled)


def _check_header(file: ELFFile) -> int:
    """The word size of a file that is a static executable for x86."""
    header = file.header
    machine, kind = header["e_machine"], header["e_type"]
    if not file.little_endian or (machine, file.elfclass) not in _MACHINES:
        raise ConfigurationError(
            f"an ELF{file.elfclass} file for {machine}: it must be ELF32 for EM_386 or ELF64 for "
            "EM_X86_64; was it built for another machine?"
        )
    if kind != "ET_EXEC":
        why = _WRONG_TYPE.get(kind, "only executables can be started")
        raise ConfigurationError(f"an ELF file of type {kind} cannot be started: {why}")
    return _MACHINES[machine, file.elfclass]


def _program_headers(file: ELFFile, file_size: int) -> list[tuple[int, dict[str, int]]]:
    """The PT_LOAD headers with their numbers."""
    offset, count, size = (file.header[field] for field in ("e_phoff", "e_phnum", "e_phentsize"))
    if not count:
        raise ConfigurationError("the ELF file has no program headers, so nothing to load")
    if count == _NO_COUNT:
        raise ConfigurationError("an ELF file with 65535 or more program headers")
    if size != _HEADER_SIZES[file.elfclass] or offset + count * size > file_size:
        raise ConfigurationError(
            f"a damaged ELF file: {count} program headers of {size} bytes at {offset:#x}, in a "
            f"file of {file_size:#x} bytes"
        )
    loadable = []
    for index in range(count):
        header = struct_parse(file.structs.Elf_Phdr, file.stream, stream_pos=offset + index * size)
        if header["p_type"] in ("PT_INTERP", "PT_DYNAMIC"):
            raise ConfigurationError(
                "a dynamically linked ELF file cannot be started; link it with -static -no-pie"
            )
        if header["p_type"] == "PT_LOAD":
            loadable.append((index, header))
    return loadable


def _physical_entry(entry: int, loaded: list[tuple[int, int, int]]) -> int:
    """The entry point, translated if it is a virtual address of (virtual, size, physical)."""
    for virtual, size, physical in loaded:
        if virtual <= entry < virtual + size:
            entry = entry - virtual + physical
            break
    if not any(physical <= entry < physical + size for _, size, physical in loaded):
        raise ConfigurationError(
            f"the ELF file's entry point {entry:#x} is in none of its segments; "
            "does it have a symbol _start, or an ENTRY in the linker script?"
        )
    if entry >= FOUR_GIB:
        raise ConfigurationError(
            f"the ELF file's entry point {entry:#x} is above 4 GiB, where the CPU cannot start"
        )
    return entry


def _refuse_overlap(segments: list[Segment]) -> None:
    """Refuse two segments in one place: one would destroy the other."""
    ordered = sorted(segments, key=lambda segment: segment.address)
    for first, second in pairwise(ordered):
        if second.address < first.end:
            raise ConfigurationError(
                f"{first.name} at {first.address:#x}..{first.end - 1:#x} and {second.name} at "
                f"{second.address:#x}..{second.end - 1:#x} overlap"
            )
