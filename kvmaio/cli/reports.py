"""What the commands tell on standard error: errors in one line, statistics as a table."""

from __future__ import annotations

import json
import sys

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import ConfigurationError, EmulationFailure, GuestError, KvmaioError, UnmappedAccess
from ..stats import MachineStatistics

__all__ = [
    "EXIT_ERROR",
    "EXIT_INTERRUPTED",
    "EXIT_TIMEOUT",
    "EXIT_USAGE",
    "explain",
    "say",
    "show_statistics",
    "statistics_table",
]

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_TIMEOUT = 124  # as the command timeout has it
EXIT_INTERRUPTED = 130  # 128 + SIGINT


def say(message: str) -> None:
    """One line on standard error."""
    click.echo(f"kvmaio: {' '.join(message.split())}", err=True)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit status for `error`, and what, where and what to do in one line."""
    match error:
        case ConfigurationError():
            return EXIT_USAGE, str(error)
        case UnmappedAccess():
            verb = "read" if error.value is None else f"wrote {error.value:#x} to"
            return EXIT_ERROR, (
                f"the guest {verb} {error.bus} {error.address:#x} ({_bytes(error.size)}), where "
                f"this board has nothing{_where(error)}; `kvmaio run --help` lists what it has"
            )
        case EmulationFailure():
            return EXIT_ERROR, f"{error}; `kvmaio doctor` tells what runs on this host"
        case KvmaioError():
            return EXIT_ERROR, str(error)
        case OSError():
            file = f"{error.filename}: " if error.filename else ""
            return EXIT_ERROR, f"{file}{error.strerror or error}"
        case _:
            notes = " ".join(getattr(error, "__notes__", [])).partition("\n")[0]
            return EXIT_ERROR, f"a bug in kvmaio or a device: {error!r} {notes}"


def _where(error: GuestError) -> str:
    if error.vcpu is None:
        return ""
    return f" ({error.vcpu})" if error.rip is None else f" ({error.vcpu}, rip {error.rip:#x})"


def _bytes(count: int) -> str:
    return "1 byte" if count == 1 else f"{count} bytes"


def show_statistics(stats: MachineStatistics, form: str) -> None:
    """All statistics on standard error: ``"text"`` is a table, ``"json"`` one line of JSON."""
    if form == "json":
        click.echo(json.dumps(stats.as_dict()), err=True)
        return
    console = Console(stderr=True)
    if not sys.stderr.isatty():  # a log's reader has a wider window than rich assumes
        console.width = 120
    console.print(statistics_table(stats))


def statistics_table(stats: MachineStatistics, *, zeros: bool = True) -> Table:
    """Component, name, value, unit, description; without those that are 0 if `zeros` is off."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("component", "statistic", "value", "unit", "what it counts"):
        table.add_column(title, justify="right" if title == "value" else "left", overflow="fold")
    for component, group in stats.groups().items():
        shown = component
        for row in group.rows():
            if not zeros and not row.value:
                continue
            value = Text("unknown", "dim") if row.value is None else Text(f"{row.value:,}")
            table.add_row(shown, row.name, value, row.unit, Text(row.description, "dim"))
            shown = ""
    return table
