"""``kvmaio checkpoint info``: what a checkpoint file holds, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import attrs
import click
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .progress import working

if TYPE_CHECKING:
    from ..checkpoint import CheckpointInfo

__all__ = ["as_dict", "checkpoint", "render"]


@click.group(epilog="Example: kvmaio checkpoint info booted.ckpt")
def checkpoint() -> None:
    """Look at checkpoint files."""


@checkpoint.command(epilog="Example: kvmaio checkpoint info booted.ckpt")
@click.argument("file", type=click.Path(path_type=str))
@click.option("--quick", is_flag=True, help="Do not check the memory pages.")
@click.option("--json", "as_json", is_flag=True, help="The facts as JSON.")
def info(file: str, quick: bool, as_json: bool) -> int:
    """What a checkpoint file holds, and whether it is whole.

    Exit status: 0, or 1 with one line that says what is wrong with the file.
    """
    from ..checkpoint import inspect  # here, as no other command needs its libraries

    with working(f"checking {click.format_filename(file)}") as progress:
        found = inspect(file, verify=not quick, progress=progress)
    if as_json:
        click.echo(json.dumps(as_dict(found), indent=2))
        return 0
    console = Console(highlight=False)
    for part in render(found):
        console.print(part)
    return 0


def as_dict(info: CheckpointInfo) -> dict[str, object]:
    """The facts as plain data for JSON."""
    facts = attrs.asdict(info)
    for section in facts["sections"]:
        section["checksum"] = section["checksum"].hex()
    return {**facts, "stored_pages": info.stored_pages}


def render(info: CheckpointInfo) -> Iterator[RenderableType]:
    """The facts, part by part."""
    yield _facts(info)
    yield _machine(info)
    yield _sections(info)


def _facts(info: CheckpointInfo) -> Table:
    table = _table("Checkpoint")
    table.add_row("format", f"schema {info.schema}, {_size(info.file_size)}")
    table.add_row("made by", _printable(_maker(info)))
    table.add_row("guest time", f"{info.time_ns / 1e9:.9f} s")
    table.add_row("digest", info.digest)
    if info.base is not None:
        table.add_row("relative to", info.base)
    table.add_row("checked", "every byte" if info.verified else "all but the memory pages")
    return table


def _maker(info: CheckpointInfo) -> str:
    by = info.created_by
    host = "" if by.kvm is None else f", {by.kvm}"
    return f"kvmaio {by.kvmaio or 'of unknown version'} (CPU model {by.cpu or 'unknown'}{host})"


def _machine(info: CheckpointInfo) -> Table:
    shape = info.shape
    table = _table("Machine")
    table.add_row("vCPUs", str(shape.vcpus))
    table.add_row("irqchip", _printable(shape.irqchip or "none"))
    for region in shape.memory:
        table.add_row("memory", f"{region}, {_size(region.size)}")
    for name, device in shape.devices.items():
        table.add_row("device", _printable(f"{name}: {device}"))
    return table


def _sections(info: CheckpointInfo) -> Table:
    table = Table(
        title="Sections",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for title in ("section", "in the file", "unpacked", "holds", "SHA-256"):
        right = title in ("in the file", "unpacked")
        table.add_column(title, justify="right" if right else "left")
    for section in info.sections:
        holds = f"{section.values:,} values"
        if section is info.sections[-1]:
            holds = f"{info.stored_pages:,} pages"
        table.add_row(
            _printable(section.name),
            _size(section.packed),
            _size(section.plain),
            holds,
            Text(f"{section.checksum.hex()[:16]}…", "dim"),
        )
    return table


def _table(title: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False
    )
    table.show_header = False
    table.add_column("name")
    table.add_column("fact", overflow="fold")
    return table


def _printable(text: str) -> Text:
    """Text of a file that anybody may have made: no markup, nothing that steers a terminal."""
    return Text("".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text))


def _size(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
