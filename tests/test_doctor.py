"""``kvmaio doctor``: facts, their words, and what they lead to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import kvmaio.kvm.host
import kvmaio.soft.loader
from kvmaio import doctor
from kvmaio.cli.doctor import render
from kvmaio.doctor import Capability, Report, Tool
from kvmaio.kvm.promotion import Costs
from kvmaio.trials import Measurement, ModeResult

KVMAIO = Path(sys.executable).parent / "kvmaio"
MODES = ["real16", "prot32", "long64", "user64"]


def words(report: Report) -> str:
    """The rendered report, with its white space evened out."""
    console = Console(width=200)
    with console.capture() as capture:
        for part in render(report):
            console.print(part)
    return " ".join(capture.get().split())


@pytest.mark.kvm
def test_json_has_every_fact_of_this_host():
    result = subprocess.run([KVMAIO, "doctor", "--json"], capture_output=True, timeout=250)
    assert (result.returncode, result.stderr) == (0, b"")
    facts = json.loads(result.stdout)
    assert facts["can_run"] is True
    assert facts["problem"] is None
    assert facts["api_version"] == 12
    assert facts["kind"] in ("VMX", "SVM", "PVM")
    assert [mode["mode"] for mode in facts["modes"]] == MODES
    assert facts["nested"] == kvmaio.kvm.host.is_virtual()
    assert [cost["name"] for cost in facts["costs"]] == ["exit", "device", "kick", "move"]
    assert all(cost["microseconds"] > 0 for cost in facts["costs"][:3])
    assert {"IRQCHIP", "READONLY_MEM"} <= {
        capability["name"] for capability in facts["capabilities"]
    }
    assert {tool["name"] for tool in facts["tools"]} >= {"C core", "uvloop", "GNU as", "SeaBIOS"}


@pytest.mark.kvm
def test_modes_are_found_out_by_trying():
    found = {mode.mode: mode.how for mode in doctor.examine().modes}
    kernel = "emulated" if kvmaio.kvm.host.kvm_kind() == "PVM" else "native"
    assert found == {"real16": kernel, "prot32": kernel, "long64": kernel, "user64": "native"}


@pytest.mark.kvm
def test_text_says_what_emulated_means_where_it_matters():
    report = doctor.examine()
    text = words(report)
    assert text.startswith("yes guests can run here")
    emulates = any(mode.how == "emulated" for mode in report.modes)
    assert ("instructions one by one" in text) == emulates


def test_without_kvm_it_says_what_to_do(monkeypatch):
    reason = "open /dev/kvm: No such file or directory [ENOENT]; there is no KVM here: load kvm_amd"
    monkeypatch.setattr(kvmaio.kvm.host, "usable", lambda: reason)
    monkeypatch.setattr(kvmaio.soft.loader, "why_not", lambda: "install unicorn")
    report = doctor.examine()
    assert (report.can_run, report.modes, report.costs) == (False, [], [])
    text = words(report)
    assert text.startswith(
        f"no no guest can run here. KVM: {reason}. Software CPU: install unicorn"
    )


@pytest.mark.soft
def test_without_kvm_the_software_cpu_runs_guests(monkeypatch):
    monkeypatch.setattr(kvmaio.kvm.host, "usable", lambda: "none here")
    report = doctor.examine()
    assert (report.can_run, report.cpu, report.problem) == (True, "soft", None)
    assert {mode.how for mode in report.modes} == {"in software"}
    assert "the software CPU runs guests" in words(report)


def test_without_its_c_core_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvmaio.kvm.host", None)
    report = doctor.examine()
    assert report.problem is not None
    assert "C core is not built" in report.problem
    assert "install kvmaio with a C compiler" in report.problem


def test_a_move_is_told_with_what_follows():
    dear, cheap = Costs(8_000, 16_000_000), Costs(8_000, 500)
    assert doctor._cost_of_moving(dear).microseconds == 16_000
    assert doctor._cost_of_moving(dear).meaning.endswith("and back, once, at the most")
    assert doctor._cost_of_moving(cheap).meaning.endswith("and back, as often as it pays")


def test_every_lack_has_its_words():
    report = Report(
        kind="VMX",
        nested=True,
        api_version=12,
        max_vcpus=8,
        modes=[
            ModeResult("real16", "boot code", "emulated", 1_500_000),
            ModeResult("user64", "programs", "fails", problem="KVM_RUN: Invalid argument"),
        ],
        costs=[Measurement("kick", None, "leaving", "no result in 2 s")],
        capabilities=[Capability("IRQFD", 0, "interrupts by descriptor")],
        tools=[Tool("uvloop", None, False, "a faster loop", "pip install uvloop")],
    )
    text = words(report)
    for expected in (
        "hardware virtualisation by Intel; nested: this host is itself a virtual machine",
        "real16 emulated, 1.5 M insn/s boot code",
        "user64 fails: KVM_RUN: Invalid argument",
        "kick not measured: no result in 2 s",
        "no IRQFD interrupts by descriptor",
        "missing here comes with a newer kernel",
        "no uvloop (optional) a faster loop: pip install uvloop",
    ):
        assert expected in text
