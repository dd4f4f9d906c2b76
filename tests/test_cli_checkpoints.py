"""``kvmaio run --save`` and ``--from``, as a user has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmaio import Machine
from tests.assembler import assemble
from tests.test_cli import error_line, kvmaio

# Prints a and waits for 2^30 cycles, long enough to be stopped on any host; then b, and ends
# with the code 7.
LETTERS = assemble(
    (
        *("mov dx, 0x3f8", "mov al, 0x61", "out dx, al", "rdtsc", "mov esi, eax"),
        *("add esi, 0x40000000", "wait: rdtsc", "sub eax, esi", "js wait"),
        *("mov dx, 0x3f8", "mov al, 0x62", "out dx, al", "mov al, 3", "out 0xf4, al"),
    ),
    "real16",
    0x1000,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint, taken when the guest had printed its first letter."""
    image = tmp_path / "letters.bin"
    image.write_bytes(LETTERS)
    path = tmp_path / "a.ckpt"
    result = kvmaio("run", str(image), "--until", "a", "--save", str(path), "--memory", "1M")
    assert (result.returncode, result.stdout) == (0, b"a")
    assert error_line(result).startswith(f"kvmaio: saved {path} (0.")
    return path


@pytest.mark.kvm
def test_goes_on_from_there(saved):
    for _ in range(2):
        result = kvmaio("run", "--from", str(saved))
        assert (result.returncode, result.stdout, result.stderr) == (7, b"b", b"")


@pytest.mark.kvm
def test_timeout_saves_too(saved, tmp_path):
    later = tmp_path / "later.ckpt"
    result = kvmaio("run", "--from", str(saved), "--timeout", "0.05", "--save", str(later))
    assert result.returncode == 124
    assert b"saved" in result.stderr
    assert kvmaio("run", "--from", str(later)).stdout == b"b"


@pytest.mark.kvm
def test_place_that_cannot_be_written_is_found_before_the_run(saved, tmp_path):
    (tmp_path / "file").touch()
    for place, hint in {
        tmp_path / "missing" / "where": b"where: No such file or directory [ENOENT]; make its",
        tmp_path / "file" / "b.ckpt": b"a part of the path is a file",
        tmp_path: b"is a directory",
        Path("/proc/b.ckpt"): b"save",
    }.items():
        result = kvmaio("run", "--from", str(saved), "--save", str(place))
        assert (result.returncode, result.stdout) == (2, b"")  # the guest has not run
        assert b"--save" in result.stderr
        assert hint in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "file", "letters.bin"]


@pytest.mark.kvm
def test_usage(saved, tmp_path):
    for arguments, hint in {
        (): b"Name an IMAGE, or a checkpoint with --from",
        ("x.bin", "--from", str(saved)): b"does not exist",
        (str(saved), "--from", str(saved)): b"an IMAGE beside --from",
        ("--from", str(saved), "--memory", "2M"): b"--memory beside --from",
        ("--from", str(saved), "--vcpus", "2"): b"--vcpus beside --from",
        ("--from", str(tmp_path / "none")): b"does not exist",
    }.items():
        result = kvmaio("run", *arguments)
        assert result.returncode == 2, arguments
        assert hint in result.stderr


@pytest.mark.kvm
def test_damaged_and_foreign_files(saved, tmp_path):
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(saved.read_bytes()[:-100])
    result = kvmaio("run", "--from", str(damaged))
    assert (result.returncode, str(damaged) in error_line(result)) == (1, True)


@pytest.mark.kvm
async def test_checkpoint_of_another_program(tmp_path):
    async with Machine(memory="1M") as machine:
        (await machine.checkpoint()).save(tmp_path / "other.ckpt")
    result = kvmaio("run", "--from", str(tmp_path / "other.ckpt"))
    assert result.returncode == 1
    assert "not of a machine that `kvmaio run` builds" in error_line(result)
