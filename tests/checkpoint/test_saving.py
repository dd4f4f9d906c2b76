"""Saving: whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvmaio import CheckpointError, HostError
from kvmaio.checkpoint import Checkpoint
from tests.checkpoint.samples import checkpoint_of, content

NOBODY = 65534
ROOT = Path(__file__).parents[2]
SMALL = checkpoint_of()
LARGE = checkpoint_of(content(dict.fromkeys(range(256), 4096), 256))  # 1 MiB that does not pack


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where an old checkpoint is."""
    path = tmp_path / "old.ckpt"
    SMALL.save(path)
    return path


def only_the_old_one_is_there(path: Path) -> bool:
    return os.listdir(path.parent) == [path.name] and Checkpoint.load(path) == SMALL


# The child of a fork saves two checkpoints by turns, and is killed. Each time there must be
# a whole one, and at most one file beside it.
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from kvmaio.checkpoint import Checkpoint
from tests.checkpoint.samples import checkpoint_of, content

path = Path(sys.argv[1])
both = [
    checkpoint_of(content(dict.fromkeys(range(256), 4096), 256, seed=seed)) for seed in range(2)
]
both[0].save(path)
generator = random.Random(2)
interrupted, found = 0, [0, 0]
for kill in range(100):
    child = os.fork()
    if child == 0:
        while True:
            for one in both[::-1]:
                one.save(path)
    time.sleep(generator.uniform(0.001, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found[both.index(Checkpoint.load(path))] += 1
    names = sorted(os.listdir(path.parent))
    assert names in ([path.name], ["." + path.name + ".saving", path.name]), names
    interrupted += len(names) - 1
both[0].save(path)
assert os.listdir(path.parent) == [path.name]
print(interrupted, *found)
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path / "file"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stderr == ""
    interrupted, first, second = map(int, result.stdout.split())
    print(f"{interrupted} of 100 in mid-write; then there were {first} and {second} of the two")
    assert first + second == 100
    assert interrupted > 20


def test_a_new_file_is_its_owners_and_a_replaced_one_keeps_its_permissions(path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    LARGE.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert Checkpoint.load(path) == LARGE


def test_a_link_goes_on_leading_to_the_file(path, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(path.name)
    LARGE.save(link)
    assert link.is_symlink()
    assert Checkpoint.load(path) == LARGE


def test_what_a_killed_process_left_is_used_again(path):
    leftover = path.with_name(f".{path.name}.saving")
    leftover.write_bytes(b"x" * 5_000_000)
    leftover.chmod(0o666)
    LARGE.save(path)
    assert os.listdir(path.parent) == [path.name]
    assert Checkpoint.load(path) == LARGE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_long_names(tmp_path):
    path = tmp_path / ("n" * 255)
    SMALL.save(path)
    assert only_the_old_one_is_there(path)


def test_somebody_else_is_saving_to_the_same_path(path):
    with path.with_name(f".{path.name}.saving").open("wb") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="somebody else is saving to the same path"):
            LARGE.save(path)
    assert Checkpoint.load(path) == SMALL


def refused(path: Path, number: int, hint: str, checkpoint: Checkpoint = LARGE) -> None:
    with pytest.raises(HostError) as caught:
        checkpoint.save(path)
    assert caught.value.errno == number
    assert str(caught.value).startswith(f"saving {os.path.realpath(path)}: ")
    assert hint in str(caught.value)


def test_a_full_disk_leaves_the_old_file(path, monkeypatch):
    real_write, room = os.write, [100_000]

    def write(fd: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "")
        done = real_write(fd, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", write)
    refused(path, errno.ENOSPC, "No space left on device [ENOSPC]; free some space there")
    monkeypatch.undo()
    assert only_the_old_one_is_there(path)


def test_a_limit_on_the_size_of_files_leaves_the_old_file(path):
    # Python ignores SIGXFSZ, so that the write fails.
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        refused(path, errno.EFBIG, "save elsewhere")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert only_the_old_one_is_there(path)


@pytest.mark.parametrize("step", ["fsync", "rename", "fchmod"])
def test_an_error_at_any_step_leaves_the_old_file(path, monkeypatch, step):
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(os, step, fail)
    refused(path, errno.EIO, "save elsewhere")
    monkeypatch.undo()
    assert only_the_old_one_is_there(path)


def test_an_interrupt_leaves_the_old_file(path, monkeypatch):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        LARGE.save(path)
    monkeypatch.undo()
    assert only_the_old_one_is_there(path)


def test_places_where_nothing_can_be_saved(path, tmp_path):
    refused(tmp_path / "no" / "folder", errno.ENOENT, "make its folder first")
    refused(path / "below", errno.ENOTDIR, "a part of the path is a file")
    refused(tmp_path, errno.EISDIR, "name a file in that folder")
    (tmp_path / ".trap.saving").symlink_to(path)
    refused(tmp_path / "trap", errno.ELOOP, "a symbolic link is in the way")
    for target in ("/dev/null", "/dev/full"):
        with pytest.raises(CheckpointError, match="is no ordinary file"):
            SMALL.save(target)
    assert Checkpoint.load(path) == SMALL


def test_a_folder_without_permission(path):
    root = os.geteuid() == 0
    path.parent.chmod(0o500)
    if root:  # whom permissions do not bind
        os.seteuid(NOBODY)
    try:
        refused(path, errno.EACCES, "save to a folder that you may write to")
    finally:
        if root:
            os.seteuid(0)
        path.parent.chmod(0o700)
    assert only_the_old_one_is_there(path)
