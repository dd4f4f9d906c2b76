"""Pytest plugin: says at the end which CPU models were tested, and what was skipped and why.

A test counts for a CPU model if it passed and was marked `kvm` or `soft` (without the
fixture `kvmaio_cpu`, which chooses the model), was parametrised with `cpu="kvm"` or
`"soft"`, or a fixture recorded it:
`request.node.user_properties.append(("cpu_model", "kvm"))`.

Marked tests are skipped where their CPU model cannot run. `--must-run` makes a
session in which no test passed a failure: a suite that skipped all proves nothing.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

__all__ = ["kvm_flavour", "why_not_kvm", "why_not_soft"]

CPU_MODELS = ("kvm", "soft")


@cache
def why_not_kvm() -> str | None:
    """What keeps the KVM tests from running here, or None."""
    from kvmaio.kvm.host import usable

    return usable()


@cache
def why_not_soft() -> str | None:
    """What keeps the software CPU's tests from running here, or None."""
    try:
        version("unicorn")
    except PackageNotFoundError:
        return "the software CPU is not installed: pip install 'kvmaio[soft]'"
    return None


def kvm_flavour() -> str:
    """Which KVM this host has: tests see different exits on each."""
    flavours = {"kvm_pvm": "PVM", "kvm_amd": "AMD", "kvm_intel": "Intel"}
    loaded = [name for module, name in flavours.items() if Path("/sys/module", module).exists()]
    return "+".join(loaded) or "unknown module"


def describe(cpu_model: str) -> str:
    match cpu_model:
        case "kvm":
            return f"kvm ({kvm_flavour()})"
        case "soft":
            return f"soft (unicorn {version('unicorn')})"
        case _:
            return cpu_model


def declared_models(item: pytest.Item) -> set[str]:
    """The CPU models a test names by marker or by parameter."""
    callspec = getattr(item, "callspec", None)
    parameters = callspec.params.values() if callspec else ()
    named = {marker.name for marker in item.iter_markers()}
    if "kvmaio_cpu" in getattr(item, "fixturenames", ()):
        named.discard("kvm")  # the machine runs on what there is
    named.update(value for value in parameters if isinstance(value, str))
    return named.intersection(CPU_MODELS)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--must-run", action="store_true", help="fail if no test passed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on KVM is found by ``-m kvm``, also where the fixture chooses the CPU model."""
    for item in items:
        if "kvmaio_cpu" in getattr(item, "fixturenames", ()):
            callspec = getattr(item, "callspec", None)
            model = callspec.params.get("kvmaio_cpu") if callspec else None
            if model in ("kvm", None):
                item.add_marker(pytest.mark.kvm)


def pytest_runtest_setup(item: pytest.Item) -> None:
    models = declared_models(item)
    if "kvm" in models and (reason := why_not_kvm()):
        pytest.skip(reason)
    if "soft" in models and (reason := why_not_soft()):
        pytest.skip(reason)
    item.user_properties.extend(("cpu_model", model) for model in sorted(models))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed = reporter.stats.get("passed") if reporter else None
    if session.config.getoption("--must-run") and exitstatus == pytest.ExitCode.OK and not passed:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    stats = terminalreporter.stats
    tested = count_models(stats.get("passed", []))
    skipped = Counter(skip_reason(report) for report in stats.get("skipped", []))
    models = ", ".join(f"{describe(model)} in {tests} tests" for model, tests in tested.items())
    terminalreporter.section("kvmaio")
    terminalreporter.line(f"kvmaio: CPU models tested: {models or 'none'}")
    terminalreporter.line(f"kvmaio: skipped: {skipped.total()}")
    for reason, tests in skipped.most_common():
        terminalreporter.line(f"    {tests} × {reason}")


def count_models(reports: Iterable[pytest.TestReport]) -> dict[str, int]:
    """How many passed tests used each CPU model, in the order of their names."""
    counts = Counter(
        model
        for report in reports
        for model in {value for name, value in report.user_properties if name == "cpu_model"}
    )
    return {str(model): counts[model] for model in sorted(counts, key=str)}


def skip_reason(report: pytest.TestReport) -> str:
    """The reason alone: a skip's longrepr is (path, line, "Skipped: reason")."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
