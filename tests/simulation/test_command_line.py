"""``kvmaio run --time simulated``."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.simulation.support import PATIENCE

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(120 * PATIENCE)]

KVMAIO = Path(sys.executable).parent / "kvmaio"
HALTING = bytes.fromhex("fbf4ebfd")  # sti; rest: hlt; jmp rest


def run(code, *arguments):
    return subprocess.run(
        [KVMAIO, "run", "-", "--mode", "real16", *arguments],
        input=code,
        capture_output=True,
        timeout=100 * PATIENCE,
    )


def test_an_hour_of_halt_passes_at_once():
    result = run(HALTING, "--time", "simulated", "--timeout", "3600")
    assert result.returncode == 124
    assert result.stderr.startswith(b"kvmaio: no end after 3600 s")


def test_pace_holds_it_to_the_wall_clock():
    began = time.monotonic()
    result = run(HALTING, "--time", "simulated", "--timeout", "4", "--pace", "2")
    assert result.returncode == 124 and time.monotonic() - began >= 1.9


def test_a_guest_prints_and_halts():
    result = run(bytes.fromhex("b041e6e9f4"), "--time", "simulated")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"A", b"")


def test_a_slow_reader_does_not_make_the_time_limit_jump():
    """The pipe is full for a second; the limit of a simulated minute must not be used up."""
    command = [str(KVMAIO), "run", "-", "--mode", "real16", "--time", "simulated"]
    with subprocess.Popen(
        [*command, "--timeout", "60"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        # 6000 letters and a halt: mov dx, 0x3f8; mov ecx, 6000; again: out dx, al
        # dec ecx; jnz again; hlt
        fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, 4096)
        child.stdin.write(bytes.fromhex("baf803 66b970170000 ee 6649 75fb f4"))
        child.stdin.close()
        time.sleep(1)
        size = 0
        while part := os.read(child.stdout.fileno(), 1 << 16):
            size += len(part)
        assert (size, child.wait()) == (6000, 0)


@pytest.mark.parametrize(
    "arguments",
    [("--pace", "2"), *(("--time", "simulated", "--pace", pace) for pace in ("inf", "nan"))],
)
def test_impossible_paces_are_wrong_usage(arguments):
    result = run(HALTING, *arguments)
    assert result.returncode == 2 and b"--pace is a finite factor" in result.stderr
