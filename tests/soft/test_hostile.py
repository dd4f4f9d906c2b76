"""Whatever a guest executes, the process lives: random bytes as code, in all modes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.soft

GUESTS = int(os.environ.get("KVMAIO_HOSTILE", "60"))
"""2000 is the full number."""


@pytest.mark.timeout(900)
def test_guests_of_random_bytes_do_no_harm():
    # In a process of its own: a crash is to be a failure, and no end of the tests.
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.soft.hostile", "0", str(GUESTS)]
    result = subprocess.run(command, capture_output=True, timeout=880)
    assert result.returncode == 0, (result.stdout[-20:], result.stderr.decode())
    assert result.stdout.endswith(b"done\n")
