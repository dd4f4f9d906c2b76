"""`kvmaio bench`: that it works, and its arithmetic; never its figures."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmaio.bench import FAMILIES, measure
from kvmaio.bench.harness import Bench, Figure, Gate, Row, figure
from kvmaio.cli import commands
from kvmaio.errors import ConfigurationError
from kvmaio.kvm.promotion import Costs


def test_a_gate_tells_what_passes():
    assert Gate(at_most=1.6).holds(1.6) and not Gate(at_most=1.6).holds(1.7)
    assert Gate(at_least=5).holds(5) and not Gate(at_least=5).holds(4.9)
    assert (str(Gate(at_most=1.6)), str(Gate(at_least=5))) == ("≤ 1.6", "≥ 5")


def test_a_figure_is_the_median_with_quartiles():
    taken = figure("cost", [5000, 1000, 3000, 2000, 4000], "µs", scale=1e3)
    assert taken == Figure("cost", 3, "µs", low=2, high=4)


def test_a_row_says_where_it_falls_short():
    row = Row(
        "exits",
        "pio write, async",
        "uvloop",
        (
            Figure("× raw", 1.75, gate=Gate(at_most=1.6)),
            Figure("over raw", 4.0, "µs", gate=Gate(at_most=5)),
        ),
    )
    assert row.shortcomings() == ["exits: pio write, async on uvloop: × raw is 1.75, must be ≤ 1.6"]


def test_a_row_that_failed_says_why():
    row = Row("peers", "QEMU", "", note="TimeoutError: ", failed=True)
    assert row.shortcomings() == ["peers: QEMU: TimeoutError: "]


async def test_references_and_variants_take_turns():
    log = []

    def reference():
        log.append("A")
        return 10.0

    async def first():
        log.append("B")
        return 20.0

    async def second():
        log.append("C")
        return 15.0

    bench = Bench("asyncio", Costs(exit_ns=10_000, move_ns=0), rounds=2)
    samples = await bench.interleaved(reference, {"b": first, "c": second})
    assert "".join(log) == "ABACA" * 3  # the first round warms up
    assert [s.ratio for s in samples["b"]] == [2.0, 2.0]
    assert [s.over for s in samples["c"]] == [5.0, 5.0]


async def test_a_disturbed_round_is_repeated():
    references = iter([10, 10, 10, 30, 10, 10, 10, 10])  # by pairs: round 1 is disturbed
    values = iter([1, 2, 3, 4])

    async def variant():
        return next(values)

    bench = Bench("asyncio", Costs(exit_ns=10_000, move_ns=0), rounds=2)
    samples = await bench.interleaved(lambda: next(references), {"b": variant})
    assert [s.value for s in samples["b"]] == [3, 4]


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigurationError, match="no benchmark 'exit'; there are exits"):
        measure(["exit"])


@pytest.mark.kvm
@pytest.mark.timeout(300)
def test_every_family_can_be_measured(tmp_path: Path):
    result = CliRunner().invoke(commands, ["bench", "--quick", "--json"], standalone_mode=False)
    assert result.exception is None, result.output
    report = json.loads(result.stdout)
    assert {row["family"] for row in report["rows"]} == set(FAMILIES)
    assert [row for row in report["rows"] if row["failed"]] == []
    assert report["host"]["KVM"] in ("PVM", "VMX", "SVM", "unknown")


@pytest.mark.kvm
@pytest.mark.timeout(120)
def test_the_tables_show_every_row():
    result = CliRunner().invoke(commands, ["bench", "timers", "--quick", "--loop", "asyncio"])
    assert result.exception is None, result.output
    assert "vcpu.run(ticks=1_000_000)" in result.stdout
    assert "asyncio.sleep(0.001)" in result.stdout
