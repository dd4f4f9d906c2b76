"""``kvmaio run --record`` and ``--replay``: the same run, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from kvmaio.replay import read_inputs
from tests.assembler import assemble
from tests.simulation.test_replay import ECHO
from tests.test_cli import KVMAIO, TIME_LIMIT_S, error_line, kvmaio

pytestmark = pytest.mark.soft


@pytest.fixture
def echo(tmp_path: Path) -> str:
    """A guest that echoes what it gets until a zero."""
    path = tmp_path / "echo.bin"
    path.write_bytes(assemble(ECHO, "real16", 0x1000))
    return str(path)


def played(arguments: list[str], trace: Path, pieces: list[bytes]) -> tuple[object, ...]:
    """Type each of `pieces` once the one before is echoed; what came of it, to the last record."""
    process = subprocess.Popen(
        [KVMAIO, "run", *arguments, "--stats", "json", "--trace", str(trace)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    echoed = b""
    for piece in pieces:
        process.stdin.write(piece)
        process.stdin.flush()
        expected = len(echoed) + len(piece.rstrip(b"\0"))
        while len(echoed) < expected and (data := os.read(process.stdout.fileno(), 100)):
            echoed += data
    out, errors = process.communicate(timeout=TIME_LIMIT_S)
    return process.returncode, echoed + out, errors, trace.read_bytes()


def test_a_session_repeats_itself(echo, tmp_path):
    inputs = tmp_path / "inputs"
    first = played([echo, "--record", str(inputs)], tmp_path / "1.json", [b"he", b"llo\n", b"\0"])
    assert first[:2] == (0, b"hello\n")
    for number in (2, 3):
        again = played([echo, "--replay", str(inputs)], tmp_path / f"{number}.json", [])
        assert again == first
    _, found = read_inputs(inputs)
    assert b"".join(each.data for each in found) == b"hello\n\0"
    assert found[-1].instructions


def test_usage(echo, tmp_path):
    inputs = tmp_path / "inputs"
    inputs.write_text("nothing\n")
    for arguments, hint in {
        ("--record", "f", "--replay", str(inputs)): b"one of the two",
        ("--record", "f", "--cpu", "kvm"): b"needs --cpu soft",
        ("--record", "f", "--time", "wall"): b"is for --time simulated",
    }.items():
        result = kvmaio("run", echo, *arguments)
        assert (result.returncode, hint in result.stderr) == (2, True), result.stderr
    result = kvmaio("run", echo, "--replay", str(inputs))
    assert result.returncode == 2
    assert "is no recording of inputs" in error_line(result)


@pytest.mark.parametrize(
    ("started", "why"),
    [("garbage", "Invalid isoformat"), (5, "no text"), ("2026-01-01T00:00:00", "time zone")],
    ids=str,
)
def test_a_clock_that_began_at_no_time_is_refused(echo, tmp_path, started, why):
    inputs = tmp_path / "inputs"
    inputs.write_text(json.dumps({"kvmaio inputs": 1, "facts": {"clock_started": started}}) + "\n")
    result = kvmaio("run", echo, "--replay", str(inputs))
    assert result.returncode == 2
    line = error_line(result)
    assert "is no recording of inputs: line 1: clock_started is" in line and why in line


def test_a_damaged_input_is_refused(echo, tmp_path):
    inputs = tmp_path / "inputs"
    entry = {"time_ns": "x", "instructions": 1, "device": "uart", "data": "61"}
    head = {"kvmaio inputs": 1, "facts": {}}
    inputs.write_text(f"{json.dumps(head)}\n{json.dumps(entry)}\n")
    result = kvmaio("run", echo, "--replay", str(inputs))
    assert result.returncode == 2
    assert "is no recording of inputs: line 2: time_ns is 'x'" in error_line(result)
