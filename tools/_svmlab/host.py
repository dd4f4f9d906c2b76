"""The host's side: the cache, and commands run on the host."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "KERNELS",
    "LabError",
    "cache_dir",
    "call",
    "find_qemu",
    "kernel_dir",
    "locked",
    "release",
]

# The package that depends on the newest kernel package of each series in Debian 12.
KERNELS = {"6.1": "linux-image-amd64", "6.12": "linux-image-6.12-amd64"}


class LabError(Exception):
    """The lab could not be set up or run; the message says why and what to do."""


def cache_dir() -> Path:
    if own := os.environ.get("SVMLAB_CACHE"):
        return Path(own).absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches, "svmlab").absolute()


def kernel_dir(series: str) -> Path:
    return cache_dir() / f"kernel-{series}"


def release(series: str) -> str | None:
    """The release of the cached kernel of a series; None if it is not set up."""
    meta = kernel_dir(series) / "meta.json"
    return str(json.loads(meta.read_text())["release"]) if meta.exists() else None


def find_qemu() -> str | None:
    return shutil.which("qemu-system-x86_64")


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Keep a second `setup` out of the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def call(*command: str, cwd: Path | None = None, timeout_s: float = 900) -> str:
    """Run a host command; its output, or LabError with its last words."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise LabError(
            f"{command[0]} is not on this machine; svmlab needs a Debian-like host"
        ) from None
    except subprocess.TimeoutExpired:
        raise LabError(
            f"{' '.join(command)} took more than {timeout_s:g} s; is the network reachable?"
        ) from None
    if done.returncode:
        last_words = "\n".join(done.stdout.splitlines()[-8:])
        raise LabError(
            f"{' '.join(command)} failed with exit code {done.returncode}:\n{last_words}"
        )
    return done.stdout
