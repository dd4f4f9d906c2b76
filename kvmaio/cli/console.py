"""The guest's consoles on standard output, and the keyboard or a pipe as their input."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import stat
import sys
import termios
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

from ..devices import Console, Uart16550
from ..simulation import real_time

__all__ = ["StandardConsole"]

STDIN = 0
_GIVE_UP_S = 0.5


class StandardConsole:
    """Connects a UART and other consoles to standard output; looks for a text in what they print.

    Attributes:
        was_seen: the text has been printed.
        is_gone: nobody reads standard output any more.
        ends_line: the last byte printed was a newline, or nothing was printed.
    """

    def __init__(
        self,
        uart: Uart16550,
        others: Sequence[Console],
        *,
        until: bytes | None,
        take_input: bool,
        stop: Callable[[], None],
        quiet: bool = False,
        waits: bool = True,
    ) -> None:
        """A console for a run.

        Args:
            quiet: standard output gets nothing; somebody else shows what is printed.
            waits: a guest waits while standard output is slow.
        """
        self.was_seen = False
        self.is_gone = False
        self.ends_line = True
        self._uart = uart
        self._all = (uart, *others)
        # The one that is connected: only the UART has an input.
        self._owner = uart if take_input and _is_input(STDIN) else others[0]
        self._until = until
        self._tail = b""
        self._stop = stop
        self._quiet = quiet
        self._waits = waits
        self._writing: set[asyncio.Future[None]] = set()

    async def connect(self) -> None:
        """From now on, what the guest prints is passed on."""
        await self._owner.connect_stdio()
        self._stdout = self._owner.connections[-1]
        self._owner.remove_sink(self._stdout.write)  # ours does that, for all of them
        for console in self._all:
            console.add_sink(self._print)

    async def close(self, *, patient: bool) -> None:
        """Pass on what is left; a stuck reader is waited for only if `patient`."""
        for console in self._all:
            console.remove_sink(self._print)
        try:
            async with real_time(), asyncio.timeout(None if patient else _GIVE_UP_S):
                await self._owner.disconnect()
        except TimeoutError:
            pass

    @contextmanager
    def keyboard(self) -> Iterator[None]:
        """A terminal passes each key on at once and unseen; Ctrl-C still is ours."""
        if self._owner is not self._uart or not os.isatty(STDIN):
            yield
            return
        before = termios.tcgetattr(STDIN)
        keys = _each_key(before)
        loop = asyncio.get_running_loop()
        termios.tcsetattr(STDIN, termios.TCSANOW, keys)
        # After Ctrl-Z and fg, the shell has set the terminal back.
        loop.add_signal_handler(signal.SIGCONT, termios.tcsetattr, STDIN, termios.TCSANOW, keys)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGCONT)
            termios.tcsetattr(STDIN, termios.TCSANOW, before)

    def finish_line(self) -> None:
        """Begin a new line if what follows would else stand behind the guest's last one."""
        if not self.ends_line and sys.stdout.isatty() and sys.stderr.isatty():
            sys.stderr.write("\n")
        self.ends_line = True

    def _print(self, data: bytes) -> Awaitable[None] | None:
        self.ends_line = data.endswith(b"\n")
        pending = None if self._quiet else self._stdout.write(data)
        if self._until is not None and not self.was_seen:
            text = self._tail + data
            self.was_seen = self._until in text
            # A match may begin here and end in what is printed next.
            self._tail = text[max(0, len(text) - len(self._until) + 1) :]
        self.is_gone = self._stdout.is_gone
        if self.was_seen or self.is_gone:
            self._stop()
        if pending is None:
            return None
        if self._waits:
            return _in_real_time(pending)
        writing = asyncio.ensure_future(pending)
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        return None


async def _in_real_time(pending: Awaitable[None]) -> None:
    async with real_time():  # simulated time does not jump while the reader is slow
        await pending


def _is_input(fd: int) -> bool:
    """Is `fd` open, with something to say, and ours to read?"""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    if os.isatty(fd):
        # A job in the background would be stopped if it touched the terminal.
        return os.tcgetpgrp(fd) == os.getpgrp()
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISREG(mode)


def _each_key(before: list[int | list[bytes | int]]) -> list[int | list[bytes | int]]:
    """Terminal attributes as `before`, but no echo, no line editing, and Enter is CR."""
    after = copy.deepcopy(before)
    assert isinstance(after[0], int) and isinstance(after[3], int) and isinstance(after[6], list)
    after[0] &= ~termios.ICRNL
    after[3] &= ~(termios.ECHO | termios.ICANON)
    after[6][termios.VMIN], after[6][termios.VTIME] = 1, 0
    return after
