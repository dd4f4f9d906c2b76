"""Images: what can be loaded into a machine, and how its CPU starts.

==============  ============================================================
module          what lives there
==============  ============================================================
`image`         `Image` and `BootState`: what every kind of image answers
`flat`          `Flat`: bare code in one of four modes
`firmware`      `Firmware`: a BIOS at the reset vector
`elf`           `Elf`: a static executable
`multiboot`     `Multiboot`: a Multiboot 1 kernel, its modules and memory map
`linux`         `LinuxKernel`: a bzImage, its initial ramdisk and command line
`modes`         the registers and tables that each mode starts with
`tables`        descriptors, TSS and page tables as bytes
`faults`        the stub that makes a user64 guest's fault visible
==============  ============================================================

An image is made once, then placed: ``machine.load(Elf("kernel"))``. `detect()`
tells which kind a file is.
"""

from __future__ import annotations

from ..errors import ConfigurationError
from .elf import Elf
from .faults import FaultFrame
from .firmware import Firmware
from .flat import Flat
from .image import BootState, Image
from .linux import LinuxKernel, is_linux
from .multiboot import Multiboot, find_header

__all__ = [
    "BootState",
    "Elf",
    "FaultFrame",
    "Firmware",
    "Flat",
    "Image",
    "LinuxKernel",
    "Multiboot",
    "detect",
]

_KIB = 1 << 10
_LARGEST_FIRMWARE = 16 << 20
_JUMPS = (0xEA, 0xE9, 0xEB)  # far, near, short


def detect(data: bytes) -> str:
    """What kind of image this is: ``"elf"``, ``"multiboot"``, ``"linux"``, ``"firmware"`` or
    ``"flat"``.

    Firmware is a multiple of 64 KiB, at most 16 MiB, with a jump at the reset
    vector (16 bytes before its end). What is nothing else is flat.

    Raises:
        ConfigurationError: it is empty.
    """
    if not data:
        raise ConfigurationError("the image is empty")
    if is_linux(data):
        return "linux"
    if find_header(data) is not None:
        return "multiboot"
    if data.startswith(b"\x7fELF"):
        return "elf"
    if len(data) % (64 * _KIB) == 0 and len(data) <= _LARGEST_FIRMWARE:
        reset = data[-16:].lstrip(b"\x90")  # some firmware has NOPs before the jump
        if reset[:1] and reset[0] in _JUMPS:
            return "firmware"
    return "flat"
