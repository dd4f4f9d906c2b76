"""``kvmaio doctor``: the facts of `kvmaio.doctor`, in words or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ..doctor import Report, examine
from ..trials import Measurement, ModeResult

__all__ = ["doctor", "render"]

_KINDS = {
    "VMX": "hardware virtualisation by Intel",
    "SVM": "hardware virtualisation by AMD",
    "PVM": "virtualisation in software, without help by the processor",
    "unknown": "a kind that kvmaio does not know",
}
_EMULATED = (
    '"Emulated" means that KVM interprets these guests\' instructions one by one: right for boot '
    "code and small test guests, too slow for a kernel or for computing, and some instructions "
    "(SSE at kernel level, for instance) cannot be run at all. A host with VMX or SVM runs every "
    "mode natively."
)


@click.command(epilog="Example: kvmaio doctor --json | jq .costs")
@click.option("--json", "as_json", is_flag=True, help="The facts as JSON.")
def doctor(as_json: bool) -> int:
    """What this host can do for guests, and what to do about what it cannot.

    Takes about a second. Exit status: 0 if a guest can run, else 1.
    """
    report = examine()
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        console = Console(highlight=False)
        for part in render(report):
            console.print(part)
    return 0 if report.can_run else 1


def render(report: Report) -> Iterator[RenderableType]:
    """The report, part by part."""
    if report.can_run:
        yield Text.assemble(("yes", "bold green"), "  guests can run here")
    else:
        yield Text.assemble(("no", "bold red"), f"   no guest can run here. {report.problem}")
    yield Text()
    yield _facts(report)
    if report.modes:
        yield _modes(report)
    if any(mode.how == "emulated" for mode in report.modes):
        yield Text(f"{_EMULATED}\n", "dim")
    if report.costs:
        yield _costs(report)
    if report.capabilities:
        yield _capabilities(report)
    yield _tools(report)


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False
    )
    table.show_header = False
    for column in columns:
        table.add_column(column, justify="right" if column == "value" else "left")
    return table


def _facts(report: Report) -> Table:
    table = _table("KVM", "name", "fact")
    if report.choice:
        table.add_row('cpu="auto"', report.choice)
    nested = "; nested: this host is itself a virtual machine" if report.nested else ""
    table.add_row("kind", f"{report.kind}: {_KINDS[report.kind]}{nested}")
    table.add_row("/dev/kvm", report.device)
    table.add_row("you", report.user)
    if report.api_version is not None:
        table.add_row("API version", str(report.api_version))
        table.add_row("vCPUs", f"at most {report.max_vcpus} per machine")
        table.add_row("run timer", report.run_timer)
        table.add_row("instructions", report.instructions)
    return table


def _modes(report: Report) -> Table:
    table = _table("Guest modes, each tried with a small guest", "mode", "how", "purpose")
    styles = {"native": "green", "in software": "green", "emulated": "yellow", "fails": "red"}
    for mode in report.modes:
        table.add_row(mode.mode, Text(_how(mode), styles[mode.how]), mode.purpose)
    return table


def _how(mode: ModeResult) -> str:
    if mode.problem is not None:
        return f"fails: {mode.problem}"
    return mode.how if mode.rate is None else f"{mode.how}, {mode.rate / 1e6:.1f} M insn/s"


def _costs(report: Report) -> Table:
    table = _table("What it costs here (median)", "name", "value", "meaning")
    for cost in report.costs:
        table.add_row(cost.name, _microseconds(cost), cost.meaning)
    return table


def _microseconds(cost: Measurement) -> str:
    if cost.microseconds is None:
        return f"not measured: {cost.problem}"
    return f"{cost.microseconds:,.0f} µs"


def _capabilities(report: Report) -> Table:
    table = _table("Capabilities that matter", "found", "name", "purpose")
    for capability in report.capabilities:
        table.add_row(
            _mark(bool(capability.value), needed=False), capability.name, capability.purpose
        )
    if any(not capability.value for capability in report.capabilities):
        table.caption = "What is missing here comes with a newer kernel or another kind of KVM."
    return table


def _tools(report: Report) -> Table:
    table = _table("Beside KVM", "found", "name", "purpose")
    for tool in report.tools:
        advice = tool.purpose if tool.found else f"{tool.purpose}: {tool.remedy}"
        name = tool.name if tool.needed else f"{tool.name} (optional)"
        table.add_row(_mark(bool(tool.found), needed=tool.needed), name, advice)
    return table


def _mark(found: bool, *, needed: bool) -> Text:
    if found:
        return Text("yes", "green")
    return Text("no", "red" if needed else "yellow")
