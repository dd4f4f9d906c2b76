"""``kvmaio bench``: the figures of `kvmaio.bench`, as tables or JSON, and the gates."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .progress import stages

if TYPE_CHECKING:
    from ..bench import Report
    from ..bench.harness import Figure, Row

__all__ = ["bench", "render"]

WIDTH = 132
"""Tables that go to a file."""


@click.command(epilog="Example: kvmaio bench exits latency --loop both")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON.")
@click.option("--check", is_flag=True, help="Compare with the gates: 1 if one falls short.")
@click.option(
    "--loop",
    type=click.Choice(("asyncio", "uvloop", "both")),
    help="By default both, where uvloop is installed.",
)
@click.option("--rounds", type=click.IntRange(1, 1000), help="Rounds of each measurement.")
@click.option("--quick", is_flag=True, help="Seconds, not minutes: shows that it works.")
def bench(
    names: tuple[str, ...],
    as_json: bool,
    check: bool,
    loop: str | None,
    rounds: int | None,
    quick: bool,
) -> int:
    """Measure what exits, timers, kicks and machines cost here.

    NAME is one of exits, compute, posted, timers, kicks, latency, scale, machines,
    tracing, checkpoints, soft and peers; by default all of them.

    Each figure is a median of rounds in which a variant and its reference take turns; its
    quartiles stand beside it. Other programs disturb it nevertheless.
    """
    from ..bench import FAMILIES, measure  # here, for it needs the C core, and others do not

    for name in names:
        if name not in FAMILIES:
            raise click.BadParameter(f"{name!r} is none of {', '.join(FAMILIES)}.")
    has_uvloop = find_spec("uvloop") is not None
    if loop == "uvloop" and not has_uvloop:
        raise click.UsageError("uvloop is not installed: pip install uvloop")
    loops = [loop] if loop in ("asyncio", "uvloop") else ["asyncio", "uvloop"][: 1 + has_uvloop]

    with _shown_progress(names or tuple(FAMILIES), loops) as on_family:
        report = measure(names, loops=loops, rounds=rounds, quick=quick, on_family=on_family)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=WIDTH)
        for part in render(report):
            console.print(part)
    if not check:
        return 0
    for line in report.shortcomings:
        click.echo(line, err=True)
    return 1 if report.shortcomings else 0


@contextmanager
def _shown_progress(
    names: Sequence[str], loops: Sequence[str]
) -> Iterator[Callable[[str, str], None]]:
    from ..bench import FAMILIES

    begun = itertools.count()
    with stages(sum(len(loops) if FAMILIES[name].loop_matters else 1 for name in names)) as show:

        def on_family(name: str, loop: str) -> None:
            on = f" ({loop})" if FAMILIES[name].loop_matters else ""
            show(f"{FAMILIES[name].title}{on}", next(begun))

        yield on_family


def render(report: Report) -> Iterator[RenderableType]:
    """The report, part by part."""
    from ..bench import FAMILIES

    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in report.facts.items():
        facts.add_row(Text(name, "bold"), str(fact))
    yield facts
    for name, family in FAMILIES.items():
        rows = [row for row in report.rows if row.family == name]
        while rows:
            # Those with no more figures than the first; others get a table of their own.
            labels = _labels(rows[0])
            fitting = [row for row in rows if set(_labels(row)) <= set(labels)]
            rows = [row for row in rows if row not in fitting]
            yield Text()
            yield _table(family.title, labels, fitting)


def _labels(row: Row) -> tuple[str, ...]:
    return tuple(figure.label for figure in row.figures)


def _table(title: str, labels: Iterable[str], rows: Iterable[Row]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False
    )
    table.add_column("")
    table.add_column("loop")
    for label in labels:
        table.add_column(label, justify="right")
    table.add_column("", style="dim")
    for row in rows:
        by_label = {figure.label: figure for figure in row.figures}
        cells = [_cell(by_label.get(label)) for label in labels]
        table.add_row(row.name, row.loop, *cells, Text(row.note, "red" if row.failed else ""))
    return table


def _cell(figure: Figure | None) -> Text:
    if figure is None:
        return Text("")
    unit = f" {figure.unit}" if figure.unit else ""
    text = Text(f"{_number(figure.value)}{unit}")
    if figure.gate is not None:
        text.stylize("red" if figure.falls_short else "green")
        text.append(f" ({figure.gate})")
    if figure.low is not None and figure.high is not None and figure.low != figure.high:
        text.append(f"\n{_number(figure.low)}–{_number(figure.high)}", "dim")
    return text


def _number(value: float) -> str:
    """Three digits that matter."""
    if value == 0 or abs(value) >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
