"""`assemble()` for tests: machine code that is kept beside its source, so no test needs `as`.

The code of every guest is in ``guests/assembled.json``. A test with new or
changed guest code needs GNU as once::

    KVMAIO_UPDATE_GUESTS=1 make test PYTEST=tests/test_mine.py

`guest_file()` does the same for whole ELF files: ``guests/NAME.s`` beside
``guests/NAME.elf``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import pytest

import kvmaio.assembler
from kvmaio.assembler import run_tool

__all__ = ["GUESTS", "Guest", "assemble", "cached_guests", "guest_file", "have_tools", "link"]

GUESTS = Path(__file__).parent / "guests"
CACHE = GUESTS / "assembled.json"
NO_TOOLS = "guest code that is not in tests/guests yet needs GNU as and ld (package binutils)"


class Guest(TypedDict):
    """A cached guest: what it was assembled from, and the code in hexadecimal digits."""

    source: str
    mode: str
    address: int
    code: str


def have_tools() -> bool:
    """Whether GNU as and ld are here."""
    return shutil.which("as") is not None and shutil.which("ld") is not None


def updating() -> bool:
    """Whether this run may change tests/guests."""
    return os.environ.get("KVMAIO_UPDATE_GUESTS") == "1"


def cached_guests() -> dict[str, Guest]:
    """The cache: key -> guest."""
    try:
        guests: dict[str, Guest] = json.loads(CACHE.read_text())
    except FileNotFoundError:
        return {}
    return guests


def assemble(lines: str | Iterable[str], mode: str = "real16", address: int = 0x1000) -> bytes:
    """Machine code for `lines` at `address`; see `kvmaio.assembler.assemble()`.

    Skips the test if the code is not cached and there is no assembler.
    """
    source = lines if isinstance(lines, str) else "\n".join(lines)
    key = hashlib.sha256(json.dumps([source, mode, address]).encode()).hexdigest()[:24]
    if (guest := cached_guests().get(key)) is not None:
        return bytes.fromhex(guest["code"])
    if not have_tools():
        pytest.skip(NO_TOOLS)
    code = kvmaio.assembler.assemble(source, mode=mode, address=address)
    if updating():
        _store(key, Guest(source=source, mode=mode, address=address, code=code.hex()))
    return code


def guest_file(name: str) -> bytes:
    """The ELF file ``guests/NAME.elf``, linked anew from ``NAME.s`` while updating."""
    file = GUESTS / f"{name}.elf"
    if updating() and have_tools():
        file.write_bytes(link(name))
    return file.read_bytes()


def link(name: str) -> bytes:
    """Link ``guests/NAME.s`` by the linker script ``guests/guest.ld``.

    The word size is in the name: ``hello32`` or ``hello64``.
    """
    width = "64" if name.endswith("64") else "32"
    emulation = "elf_x86_64" if width == "64" else "elf_i386"
    with tempfile.TemporaryDirectory(prefix="kvmaio-") as folder:
        linkable, file = Path(folder, "guest.o"), Path(folder, "guest.elf")
        source, script = str(GUESTS / f"{name}.s"), str(GUESTS / "guest.ld")
        run_tool(["as", f"--{width}", "-o", str(linkable), source])
        options = ["-m", emulation, "-static", "--build-id=none", "-s", "-z", "max-page-size=4096"]
        run_tool(["ld", *options, "-T", script, "-o", str(file), str(linkable)])
        return file.read_bytes()


def _store(key: str, guest: Guest) -> None:
    GUESTS.mkdir(exist_ok=True)
    with open(CACHE, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several test runs may update at once
        guests = cached_guests() if file.tell() else {}
        guests[key] = guest
        text = json.dumps(dict(sorted(guests.items())), indent=1) + "\n"
        file.truncate(0)
        file.write(text)
