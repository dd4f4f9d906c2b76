"""``kvmaio registers``: a register table out of a device class or a SystemRDL file."""

from __future__ import annotations

import importlib
import os
import sys

import click

from ..device import Device
from ..register_table import register_table

__all__ = ["registers"]


@click.command(
    epilog="""
\b
Examples:
  kvmaio registers kvmaio.devices:Uart16550
  kvmaio registers timer.rdl > timer.md
"""
)
@click.argument("what", metavar="MODULE:CLASS|FILE.rdl")
def registers(what: str) -> int:
    """Print a device's registers as Markdown tables.

    MODULE is found as Python finds it, also in the current directory.
    """
    if what.endswith(".rdl"):
        from ..rdl import device_class

        if not os.path.exists(what):
            raise click.UsageError(f"there is no file {what}.")
        click.echo(register_table(device_class(what)))
        return 0
    module_name, _, class_name = what.partition(":")
    if not class_name:
        raise click.UsageError(f"{what!r} is neither MODULE:CLASS nor a .rdl file.")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise click.UsageError(f"{module_name}: {error}.") from None
    if not (isinstance(found, type) and issubclass(found, Device)):
        raise click.UsageError(f"{module_name} has no device class {class_name!r}.")
    click.echo(register_table(found))
    return 0
