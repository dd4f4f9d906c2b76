"""GDB's ``monitor`` commands: what the protocol has no packets for."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from ..errors import KvmaioError
from ..failure_report import describe_device

if TYPE_CHECKING:
    from ..machine import Machine

__all__ = ["monitor"]

HELP = """\
monitor stats             the statistics that are not 0
monitor devices           the devices, where they are and their registers
monitor registers         all registers of every vCPU
monitor checkpoint FILE   save the machine's state
"""


async def monitor(machine: Machine, line: str) -> str:
    """Carry out a command; what it has to say."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        return f"{error}\n"
    match words:
        case ["stats"]:
            return _stats(machine)
        case ["devices"]:
            return _devices(machine)
        case ["registers"]:
            return f"{machine.dump()}\n"
        case ["checkpoint", path]:
            try:
                (await machine.checkpoint()).save(path)
            except (KvmaioError, OSError) as error:
                return f"not saved: {error}\n"
            return f"saved to {path}\n"
        case _:
            return HELP


def _stats(machine: Machine) -> str:
    lines = []
    for component, group in machine.stats.groups().items():
        for row in group.rows():
            if row.value:
                lines.append(f"{component}.{row.name:<20} {row.value:>16} {row.unit}\n")
    return "".join(lines) or "nothing has been counted yet\n"


def _devices(machine: Machine) -> str:
    lines = []
    for name, device in machine.devices.items():
        places = [
            f"{bus.name} {mapping.base:#x}..{mapping.last:#x}"
            for bus in (machine.pio, machine.mmio)
            for mapping in bus
            if mapping.device is device
        ]
        lines.append(f"{name} ({type(device).__name__}) at {', '.join(places) or 'no address'}\n")
        lines += [f"  {line}\n" for line in describe_device(device)]
    return "".join(lines) or "no devices\n"
