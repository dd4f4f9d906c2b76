"""From a file or pipe to something that a machine can load."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import attrs

from ..boot import Elf, Firmware, Flat, Image, LinuxKernel, Multiboot, detect
from ..boot.elf import LARGEST_FILE
from ..boot.image import read_source
from ..errors import ConfigurationError

__all__ = ["KINDS", "PC_KINDS", "ImageChoice", "read_image"]

KINDS = ("flat", "firmware", "elf", "multiboot", "linux")
PC_KINDS = ("firmware", "multiboot", "linux")
"""Kinds that expect a PC around them."""

STDIN = 0
_DEFAULT_ADDRESS = 0x1000
_DEFAULT_MODE = "real16"
_TEXT_SAMPLE = 4096


@attrs.frozen(kw_only=True)
class ImageChoice:
    """What the command line says about the image; None is "not said"."""

    path: str
    kind: str | None
    mode: str | None
    address: int | None
    append: str | None
    initrd: str | None

    @property
    def takes_stdin(self) -> bool:
        """Is standard input the image, and so not the guest's keyboard?"""
        if self.path == "-":
            return True
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(STDIN))
        except OSError:
            return False


def read_image(choice: ImageChoice) -> tuple[str, Image]:
    """The image's kind and the image.

    Raises:
        ConfigurationError: unreadable, not an image, or an option that does not fit its kind.
    """
    if choice.takes_stdin and sys.stdin is not None and sys.stdin.isatty():
        raise ConfigurationError(
            "the image is to come from standard input, and that is a terminal; "
            "give a file, or pipe the image in"
        )
    data = _read(choice.path)
    kind = choice.kind or ("flat" if choice.mode else _detect(choice.path, data))
    _check_fits(choice, kind)
    make: dict[str, Callable[[], Image]] = {
        "firmware": lambda: Firmware(data),
        "elf": lambda: Elf(data),
        "multiboot": lambda: Multiboot(
            data, choice.append or "", [choice.initrd] if choice.initrd else ()
        ),
        "linux": lambda: LinuxKernel(data, choice.initrd, choice.append or ""),
        "flat": lambda: Flat(
            data,
            _DEFAULT_ADDRESS if choice.address is None else choice.address,
            choice.mode or _DEFAULT_MODE,  # type: ignore[arg-type, unused-ignore]
        ),
    }
    return kind, make[kind]()


def _read(path: str) -> bytes:
    if path != "-":
        return read_source(path, "image", LARGEST_FILE)
    # Not by opening /dev/stdin: a pipe made by another user refuses that.
    with os.fdopen(STDIN, "rb", closefd=False) as stdin:
        data = stdin.read(LARGEST_FILE + 1)
    return read_source(data, "the image from standard input", LARGEST_FILE)


def _detect(path: str, data: bytes) -> str:
    kind = detect(data)
    if kind == "flat" and _is_text(data):
        raise ConfigurationError(
            f"{path} is text, not an image (ELF, Multiboot, Linux or firmware); "
            "if it is bare machine code all the same, say so with --mode"
        )
    return kind


def _is_text(data: bytes) -> bool:
    """Machine code is hardly ever printable from end to end."""
    sample = data[:_TEXT_SAMPLE]
    return all(byte >= 0x80 or 0x20 <= byte < 0x7F or byte in b"\t\n\r\f" for byte in sample) and (
        _decodes(sample)
    )


def _decodes(sample: bytes) -> bool:
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        return error.start >= _TEXT_SAMPLE - 3  # a character cut in two by the sample's end
    return True


def _check_fits(choice: ImageChoice, kind: str) -> None:
    """Refuse options that this kind of image has no use for: silence would mislead."""
    wanted_by = {
        "--mode": (choice.mode, ("flat",)),
        "--address": (choice.address, ("flat",)),
        "--append": (choice.append, ("multiboot", "linux")),
        "--initrd": (choice.initrd, ("multiboot", "linux")),
    }
    for option, (value, needed) in wanted_by.items():
        if value is not None and kind not in needed:
            found = "" if choice.kind else f" (and {choice.path} was taken for {kind})"
            raise ConfigurationError(
                f"{option} belongs to images of kind {' or '.join(needed)}, not {kind}{found}; "
                f"leave it out, or say --kind {needed[0]}"
            )
