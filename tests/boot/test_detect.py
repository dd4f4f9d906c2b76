import os

import pytest

from kvmaio.boot import detect
from kvmaio.errors import ConfigurationError
from tests.assembler import guest_file
from tests.boot.test_linux import bzimage
from tests.boot.test_multiboot import header

KIB = 1 << 10


def firmware(size: int, reset: str) -> bytes:
    return bytes(size - 16) + bytes.fromhex(reset).ljust(16, b"\0")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (guest_file("hello32"), "elf"),
        (guest_file("hello64"), "elf"),
        (guest_file("multiboot32"), "multiboot"),
        (header(1 << 16, 0, 0, 0, 0, 0), "multiboot"),
        (firmware(128 * KIB, "ea5be000f0"), "firmware"),
        (firmware(64 * KIB, "e9fdff"), "firmware"),
        (firmware(16 << 20, "9090e9fdff"), "firmware"),
        (firmware(64 * KIB, "00"), "flat"),
        (firmware(60 * KIB, "ea5be000f0"), "flat"),
        (firmware((16 << 20) + 64 * KIB, "ea5be000f0"), "flat"),
        (b"\x90" * (64 * KIB), "flat"),
        (b"\xf4", "flat"),
        (b"\x7fEL", "flat"),
    ],
)
def test_kind_is_seen(data, kind):
    assert detect(data) == kind


@pytest.mark.parametrize("name", ["bios.bin", "bios-256k.bin"])
def test_seabios_is_firmware(name):
    path = f"/usr/share/seabios/{name}"
    if not os.path.exists(path):
        pytest.skip("SeaBIOS is not installed (package seabios)")
    with open(path, "rb") as file:
        assert detect(file.read()) == "firmware"


def test_linux_is_seen():
    assert detect(bzimage()) == "linux"


def test_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="the image is empty"):
        detect(b"")
