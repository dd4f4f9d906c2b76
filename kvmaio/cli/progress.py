"""How far long work is, on standard error while that is a terminal; else nothing is shown."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn

from ..checkpoint.progress import Progress as Report

__all__ = ["stages", "working"]

SHOWN_AFTER_S = 0.3
"""Work that is done sooner shows nothing: it would only flicker."""
REFRESHES = 8


@contextmanager
def working(what: str, check: Callable[[], object] = lambda: None) -> Iterator[Report]:
    """A bar for what reports how far it is; gone, with the cursor back, at the end of the block.

    Args:
        check: called with each report; what it raises ends the work.
    """
    bar = _bar(TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    if bar is None:
        yield lambda done, total: check()
        return
    task = bar.add_task(what, total=None)
    due_s = time.monotonic() + SHOWN_AFTER_S

    def report(done: int, total: int) -> None:
        nonlocal due_s
        check()
        if time.monotonic() >= due_s:
            due_s = time.monotonic() + 1 / REFRESHES
            with _uninterrupted():
                bar.start()
                bar.update(task, completed=done, total=total, refresh=True)

    try:
        yield report
    finally:
        with _uninterrupted():
            bar.stop()


@contextmanager
def stages(count: int) -> Iterator[Callable[[str, int], None]]:
    """A bar for work in stages: call what it gives with the stage's name and how many are done."""
    bar = _bar(BarColumn(), TextColumn("{task.completed} of {task.total}  {task.description}"))
    if bar is None:
        yield lambda name, done: None
        return
    task = bar.add_task("", total=count)

    def show(name: str, done: int) -> None:
        with _uninterrupted():
            bar.start()
            bar.update(task, description=name, completed=done, refresh=True)

    try:
        yield show
    finally:
        with _uninterrupted():
            bar.stop()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    # A KeyboardInterrupt within rich leaves the cursor hidden: Ctrl-C waits until it has drawn.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _bar(*columns: ProgressColumn) -> Progress | None:
    console = Console(stderr=True)
    if not (sys.stderr.isatty() and console.is_interactive):
        return None
    # Drawn when there is news, by no thread: that would disturb what is measured meanwhile.
    return Progress(*columns, console=console, auto_refresh=False, transient=True)
