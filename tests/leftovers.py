"""What this process holds, threads and open files: to see that a test leaves nothing behind."""

from __future__ import annotations

import gc
import os
import time
from contextlib import suppress
from pathlib import Path

import attrs

__all__ = ["Held", "no_more_than", "nothing_left", "open_files", "threads"]

PATIENCE_S = 20


def threads() -> set[str]:
    """This process's threads, without those that KVM and libuv keep for themselves."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has just ended
            if not (task / "comm").read_text().startswith(("kvm-", "libuv-worker")):
                found.add(task.name)
    return found


def open_files() -> set[str]:
    """Open descriptors, with what they lead to: ``5 -> anon_inode:[eventfd]``."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found.add(f"{fd} -> {os.readlink(f'/proc/self/fd/{fd}')}")
    return found


@attrs.frozen
class Held:
    """Threads and files at one moment."""

    threads: set[str]
    files: set[str]

    @classmethod
    def now(cls) -> Held:
        """What is held, without what earlier tests have only dropped: it would go meanwhile."""
        gc.collect()
        return cls(threads(), open_files())

    def new(self) -> set[str]:
        """What there is now and was not then."""
        return (threads() - self.threads) | (open_files() - self.files)

    def more(self) -> dict[str, int]:
        """How much more there is than then, where other ones may have taken their place."""
        more = {
            "threads": len(threads()) - len(self.threads),
            "files": len(open_files()) - len(self.files),
        }
        return {what: count for what, count in more.items() if count > 0}


def nothing_left(before: Held) -> None:
    """All there is was there `before`; a thread that was joined is listed a little longer."""
    _wait_for(before.new)


def no_more_than(before: Held) -> None:
    """As many threads and files as `before`, be they others."""
    _wait_for(before.more)


def _wait_for(left) -> None:
    until = time.monotonic() + PATIENCE_S
    while found := left():
        assert time.monotonic() < until, f"left behind: {found}"
        time.sleep(0.001)
