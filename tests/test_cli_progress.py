"""Progress of long work, and Ctrl-C in every command: a terminal's view of them."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import kvmaio
from kvmaio import Checkpoint, Machine
from kvmaio.boot import Flat
from kvmaio.checkpoint import inspect
from kvmaio.cli.board import build_board
from tests.test_cli import KVMAIO, SPIN, TIME_LIMIT_S, Terminal, prints

CTRL_C = b"\x03"
SHOW_CURSOR, HIDE_CURSOR = b"\x1b[?25h", b"\x1b[?25l"
STORED = 96 << 20


async def save_large(path: Path) -> None:
    """The checkpoint of a board whose memory takes a while to hash and to write."""
    async with Machine(memory="128M") as machine:
        build_board(machine, pc=False, vcpus=1)
        machine.load(Flat(prints(b">", SPIN), address=0x1000))
        machine.memory.write(1 << 20, random.Random(0).randbytes(STORED))
        (await machine.checkpoint()).save(path)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("large") / "large.ckpt"
    kvmaio.run(save_large(path))
    return path


# ---- what is told --------------------------------------------------------------------


@pytest.mark.kvm
async def test_long_work_tells_how_far_it_is(tmp_path):
    told: dict[str, list[tuple[int, int]]] = {name: [] for name in "take save load check".split()}

    def teller(name):
        return lambda *so_far: told[name].append(so_far)

    file = tmp_path / "a.ckpt"
    async with Machine(memory="4M") as machine:
        machine.memory.write(0, random.Random(0).randbytes(3 << 20))
        taken = await machine.checkpoint(progress=teller("take"))
    taken.save(file, progress=teller("save"))
    assert Checkpoint.load(file, progress=teller("load")) == taken
    inspect(file, progress=teller("check"))
    for reports in told.values():
        done, totals = [done for done, _ in reports], {total for _, total in reports}
        assert len(done) >= 3 and done == sorted(done) and len(totals) == 1
        assert 0.6 * max(totals) <= done[-1] <= max(totals)


class EnoughError(Exception):
    """What a listener raises."""


@pytest.mark.kvm
async def test_a_listener_can_end_the_work(tmp_path):
    def enough(done, total):
        if done > total / 3:
            raise EnoughError

    file = tmp_path / "a.ckpt"
    file.write_bytes(b"what was there")
    async with Machine(memory="4M") as machine:
        machine.memory.write(0, random.Random(0).randbytes(4 << 20))
        with pytest.raises(EnoughError):
            await machine.checkpoint(progress=enough)
        taken = await machine.checkpoint()
    with pytest.raises(EnoughError):
        taken.save(file, progress=enough)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a.ckpt": b"what was there"
    }
    taken.save(file)
    for read in (Checkpoint.load, inspect):
        with pytest.raises(EnoughError):
            read(file, progress=enough)


# ---- what is shown -------------------------------------------------------------------

SHOWS = """
from kvmaio.cli import progress
progress.SHOWN_AFTER_S = 0
with progress.working("baking") as report:
    report(1, 4)
with progress.stages(3) as show:
    show("kneading", 1)
print("ready")
"""


def test_a_terminal_shows_how_far_it_is_and_nothing_else_does():
    with Terminal("-c", SHOWS, program=sys.executable) as terminal:
        terminal.expect(b"ready")
        assert terminal.wait() == 0
        shown = re.sub(rb"\x1b\[[\d;?]*[a-zA-Z]", b"", terminal.shown)
        assert re.search(rb"baking .* 25%", shown) and b"1 of 3  kneading" in shown
        assert terminal.shown.rfind(SHOW_CURSOR) > terminal.shown.rfind(HIDE_CURSOR)
    for environment in (os.environ, os.environ | {"FORCE_COLOR": "1"}):
        result = subprocess.run(
            [sys.executable, "-c", SHOWS], capture_output=True, timeout=60, env=environment
        )
        assert (result.stdout, result.stderr) == (b"ready\n", b"")


# As the command, but it shows what takes a fraction of a second, too.
COMMAND = """
from kvmaio.cli import main, progress
progress.SHOWN_AFTER_S = 0
main()
"""

# What is typed, and what is on the terminal when Ctrl-C comes.
INTERRUPTED = {
    "run": (("run", "GUEST"), b">"),
    "run --live": (("run", "GUEST", "--live"), b"exits/s"),
    "run --gdb": (("run", "GUEST", "--gdb", "0"), b"waiting for gdb"),
    "run --from": (("run", "--from", "LARGE"), b"loading"),
    "run --save": (("run", "--from", "LARGE", "--timeout", "0.1", "--save", "NEW"), b"saving"),
    "checkpoint info": (("checkpoint", "info", "LARGE"), b"checking"),
    "bench": (("bench", "exits", "--quick"), b"0 of"),
    "demo": (("demo",), b"guest"),
}


@pytest.mark.slow
@pytest.mark.kvm
@pytest.mark.parametrize("name", INTERRUPTED)
def test_ctrl_c_ends_it_within_a_second_and_restores_the_terminal(name, large, tmp_path):
    words, ready = INTERRUPTED[name]
    guest = tmp_path / "guest.bin"
    guest.write_bytes(prints(b">", SPIN))
    new = tmp_path / "new.ckpt"
    files = {"GUEST": str(guest), "LARGE": str(large), "NEW": str(new)}
    took_s: list[float] = []
    while not took_s or (took_s[-1] >= 1 and len(took_s) < 3):  # others use this host, too
        command = ["-c", COMMAND, *(files.get(word, word) for word in words)]
        with Terminal(*command, program=sys.executable) as terminal:
            terminal.expect(ready)
            begun_s = time.monotonic()
            os.write(terminal.fd, CTRL_C)
            status = terminal.wait()
            took_s.append(time.monotonic() - begun_s)
            assert status == 130, terminal.shown
            assert termios.tcgetattr(terminal.fd) == terminal.before
            shown = terminal.drained()
            assert shown.rfind(SHOW_CURSOR) >= shown.rfind(HIDE_CURSOR)
    assert min(took_s) < 1
    assert list(tmp_path.glob("*.ckpt")) + list(tmp_path.glob(".*")) == []


@pytest.mark.slow
@pytest.mark.kvm
def test_an_interrupted_save_says_so(large, tmp_path):
    """Also by SIGINT alone, without a terminal."""
    new = tmp_path / "new.ckpt"
    command = [KVMAIO, "run", "--from", large, "--timeout", "0.1", "--save", new]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        end = time.monotonic() + TIME_LIMIT_S
        while not list(tmp_path.glob(".*.saving")) and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=TIME_LIMIT_S)
    assert (process.returncode, told.strip()) == (130, f"kvmaio: {new} is not saved".encode())
    assert list(tmp_path.iterdir()) == []
