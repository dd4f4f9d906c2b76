"""Checkpoints: a machine's whole state, as a value and as a file.

==============  ======================================================================
`model`         `Checkpoint`: the value
`parts`         what it holds beside memory: shape, vCPUs, devices
`pages`         memory: pages without those of zeros, or relative to a base
`untouched`     which parts of a mapping nobody ever touched
`plain`         plain data as bytes, in one way only
`layout`        what a file consists of; `writer` and `reader` for it
`atomic`        a file that is replaced whole or not at all
`inspection`    what a file says of itself
`progress`      how far saving and loading are
==============  ======================================================================

Nothing here needs a machine: the engine makes checkpoints and restores from them.
"""

from .inspection import CheckpointInfo, inspect
from .model import Checkpoint
from .pages import MemoryPages
from .parts import CreatedBy, DeviceShape, MachineShape, RegionShape, SavedCpu, SavedDevice

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "CreatedBy",
    "DeviceShape",
    "MachineShape",
    "MemoryPages",
    "RegionShape",
    "SavedCpu",
    "SavedDevice",
    "inspect",
]
