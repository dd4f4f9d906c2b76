"""Checkpoints to test with: plain ones, arbitrary ones, and files with forged headers."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import attrs
from hypothesis import strategies as st

from kvmaio.checkpoint import (
    Checkpoint,
    CreatedBy,
    DeviceShape,
    MachineShape,
    MemoryPages,
    RegionShape,
    SavedCpu,
    SavedDevice,
)
from kvmaio.checkpoint.layout import ENTRY, PROLOGUE, digest_of, header_size
from kvmaio.checkpoint.model import SECTIONS
from kvmaio.checkpoint.pages import PAGE_SIZE
from kvmaio.checkpoint.reader import Reader
from kvmaio.checkpoint.writer import _header
from kvmaio.cpu import Context, CpuState, Segment

NAMES = (*SECTIONS, "memory")


def content(pages: dict[int, int], count: int, *, seed: int = 0) -> bytes:
    """`count` pages: page number -> how many of its bytes are random; the others are zeros."""
    data = bytearray(count * PAGE_SIZE)
    for page, size in pages.items():
        noise = random.Random(f"{seed} {page}").randbytes(size)
        data[page * PAGE_SIZE : page * PAGE_SIZE + size] = noise
    return bytes(data)


def checkpoint_of(memory: bytes = bytes(PAGE_SIZE), /, **changes) -> Checkpoint:
    """A machine of one vCPU and a UART with this RAM; `changes` replace arguments."""
    parts = {
        "shape": MachineShape(
            memory=(RegionShape(0, len(memory)),),
            devices={"uart0": DeviceShape("Uart16550", pio=(0x3F8,))},
        ),
        "cpus": [
            SavedCpu(
                CpuState(
                    Context(rip=0x1000, rax=(1 << 64) - 1, cs=Segment(base=0xF0000)),
                    xsave=bytes(range(256)) * 16,
                    xcrs={0: 7},
                    events=bytes(64),
                    msrs={0x10: 123, 0xC0000080: 0x500},
                ),
                {"state": "Idle", "halted": True, "pending": [0x24]},
            )
        ],
        "devices": {
            "uart0": SavedDevice(
                {"ier": 1, "lcr": 3}, {"deadline_ns": 5}, {"fifo": [(65, 0)], "big": -(1 << 200)}
            )
        },
        "vm": {"pit": bytes(100), "clock": 12345},
        "time_ns": 1_500_000_000,
        "statistics": {"cpu0": {"numIO": 3, "numInsts": None}},
        "memory": {0: MemoryPages.capture(memory)},
        "created_by": CreatedBy("0.1.0", "kvm", "SVM"),
    }
    return Checkpoint(**{**parts, **changes})


# ---- arbitrary ones ------------------------------------------------------------------

words = st.integers(0, (1 << 64) - 1)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40) | st.binary()
)
keys = st.text(max_size=20) | st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(max_size=20)
plain_data = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=6)
    ),
    max_leaves=10,
)
plain_dicts = st.dictionaries(st.text(max_size=10), plain_data, max_size=3)
page_maps = st.dictionaries(st.integers(0, 149), st.integers(1, PAGE_SIZE), max_size=12)


@st.composite
def contexts(draw) -> Context:
    context = Context()
    for name in draw(st.sets(st.sampled_from(["rax", "rip", "cr3", "efer", "rflags"]))):
        setattr(context, name, draw(words))
    context.cs.base = draw(words)
    return context


@st.composite
def checkpoints(draw, memory: bytes | None = None) -> Checkpoint:
    """Any checkpoint of a machine with 150 pages of RAM, 2 of ROM."""
    ram = content(draw(page_maps), 150) if memory is None else memory
    rom = content({0: draw(st.integers(0, PAGE_SIZE))}, 2)
    names = draw(st.sets(st.text(min_size=1, max_size=10), max_size=3))
    vcpus = draw(st.integers(1, 3))
    blobs = st.none() | st.binary(max_size=100)
    return Checkpoint(
        shape=MachineShape(
            memory=(RegionShape(0, len(ram)), RegionShape(0xF0000000, len(rom), readonly=True)),
            vcpus=vcpus,
            irqchip=draw(st.sampled_from([None, "kernel", "split", "devices"])),
            devices={name: DeviceShape(name * 2, pio=(len(name),)) for name in names},
        ),
        cpus=[
            SavedCpu(
                CpuState(
                    draw(contexts()),
                    xsave=draw(blobs),
                    lapic=draw(blobs),
                    mp_state=draw(st.none() | st.integers(0, 10)),
                    msrs=draw(st.dictionaries(st.integers(0, (1 << 32) - 1), words, max_size=5)),
                ),
                draw(plain_dicts),
            )
            for _ in range(vcpus)
        ],
        devices={
            name: SavedDevice(draw(plain_dicts), draw(plain_data), draw(plain_dicts))
            for name in names
        },
        vm=draw(st.dictionaries(st.text(max_size=10), st.binary() | words, max_size=4)),
        time_ns=draw(words),
        statistics={"cpu0": draw(st.dictionaries(st.text(max_size=10), st.none() | words))},
        memory={0: MemoryPages.capture(ram), 0xF0000000: MemoryPages.capture(rom)},
        created_by=CreatedBy("0.1.0", "soft", None),
    )


# ---- forged files --------------------------------------------------------------------


def forge(path: Path, payloads: dict[str, bytes], **entries: dict[str, object]) -> None:
    """Give sections of the file at `path` another packed content, and other header entries.

    All that a forger can make right is right: checksums of the header, sizes, digest.
    """
    with Reader(path, NAMES) as reader:
        found, data = list(reader.entries), path.read_bytes()
    at = header_size(len(found))
    body = b""
    for index, entry in enumerate(found):
        packed = payloads.get(entry.name, data[at : at + entry.packed])
        at += entry.packed
        changes: dict[str, Any] = {"packed": len(packed), **entries.get(entry.name, {})}
        found[index] = attrs.evolve(entry, **changes)
        body += packed
    trailer = bytes.fromhex(digest_of(found)) + data[-8:]
    size = header_size(len(found)) + len(body) + len(trailer)
    path.write_bytes(_header(found, size) + body + trailer)


def with_schema(data: bytes, schema: int) -> bytes:
    """The file's bytes as if another version had written them."""
    header = bytearray(data[: PROLOGUE.size + len(NAMES) * ENTRY.size])
    header[12:14] = schema.to_bytes(2, "little")
    checksum = hashlib.sha256(header).digest()
    return bytes(header) + checksum + data[len(header) + len(checksum) :]
