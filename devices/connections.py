"""Connections of a console to the outside: file descriptors and asyncio streams.

Nothing is lost and nothing grows: what a slow peer does not take yet makes
`write()` return an awaitable, and the vCPU that printed waits for it. A peer
that goes away is dropped, as when a cable is pulled: the guest goes on.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
import sys
import termios
import tty
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

__all__ = [
    "Connection",
    "FdConnection",
    "Receive",
    "StreamConnection",
    "open_file",
    "open_pty",
    "open_stdio",
]

Receive = Callable[[bytes], Awaitable[None]]
"""Takes what a peer typed; while it waits, no more is read from the peer."""

CHUNK = 4096
MOST_UNSENT = 64 * 1024  # bytes in a stream's buffer before the guest waits
GONE = {errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.EIO, errno.ENOTCONN}


class Connection(Protocol):
    """A peer that takes a console's output and may give it input.

    Attributes:
        is_gone: the peer has closed; what is printed is no longer passed on.
    """

    is_gone: bool

    def write(self, data: bytes) -> Awaitable[None] | None:
        """Pass `data` on; what it returns is to be awaited before more is written."""

    async def close(self) -> None:
        """Pass on what is left, then close everything that was opened.

        It waits for a slow peer; cancelled (`asyncio.timeout()`), it gives up
        what is left and closes nevertheless.
        """


class FdConnection:
    """A connection by file descriptors that do not block.

    Args:
        output: written to.
        input: read from if `receive` is given; may be the same as `output`.
        resources: closed with the connection; holds the descriptors too.
    """

    def __init__(
        self, output: int, input: int | None, receive: Receive | None, resources: ExitStack
    ) -> None:
        self.is_gone = False
        self._output = output
        self._backlog = bytearray()
        self._flushing = asyncio.Lock()
        self._resources = resources
        self._pump: asyncio.Task[None] | None = None
        if receive is not None and input is not None:
            self._pump = asyncio.create_task(_pump(input, receive), name="console input")

    def write(self, data: bytes) -> Awaitable[None] | None:
        if self.is_gone:
            return None
        if not self._backlog:
            data = data[self._try_write(data) :]
            if not data:
                return None
        self._backlog += data
        return self._flush()

    async def close(self) -> None:
        try:
            await _end(self._pump)
            await self._flush()
        finally:
            self.is_gone = True
            self._resources.close()

    async def _flush(self) -> None:
        async with self._flushing:
            while self._backlog:
                del self._backlog[: self._try_write(self._backlog)]
                if self._backlog:
                    await _writable(self._output)

    def _try_write(self, data: bytes | bytearray) -> int:
        """How many bytes are done with: written, or of no use to a peer that is gone."""
        if self.is_gone:
            return len(data)
        try:
            return os.write(self._output, data)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in GONE:
                raise
            self.is_gone = True
            return len(data)


class StreamConnection:
    """A connection by an asyncio stream pair.

    Args:
        owned: close the writer with the connection.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        receive: Receive | None,
        *,
        owned: bool,
    ) -> None:
        self.is_gone = False
        self._writer = writer
        self._owned = owned
        self._pump: asyncio.Task[None] | None = None
        if receive is not None:
            self._pump = asyncio.create_task(_pump(reader, receive), name="console input")

    def write(self, data: bytes) -> Awaitable[None] | None:
        if self.is_gone or self._writer.is_closing():
            self.is_gone = True
            return None
        self._writer.write(data)
        if self._writer.transport.get_write_buffer_size() > MOST_UNSENT:
            return self._drain()
        return None

    async def close(self) -> None:
        try:
            await _end(self._pump)
            await self._drain()
            if self._owned:
                self._writer.close()  # sends what is buffered first
                await self._writer.wait_closed()
        except OSError as error:
            if error.errno not in GONE:
                raise
        except asyncio.CancelledError:
            if self._owned:
                self._writer.transport.abort()
            raise
        finally:
            self.is_gone = True

    async def _drain(self) -> None:
        try:
            await self._writer.drain()
        except ConnectionError:
            self.is_gone = True


def open_stdio(receive: Receive | None, *, raw: bool) -> FdConnection:
    """Standard output and input; `raw` passes every key on, Ctrl-C too."""
    sys.stdout.flush()  # what the program printed before comes first
    with ExitStack() as resources:
        output = _own_description(1, os.O_WRONLY, resources)
        input = _own_description(0, os.O_RDONLY, resources) if receive is not None else None
        if raw and input is not None and os.isatty(input):
            resources.callback(
                termios.tcsetattr, input, termios.TCSADRAIN, termios.tcgetattr(input)
            )
            tty.setraw(input)
        return FdConnection(output, input, receive, resources.pop_all())
    raise AssertionError  # the block always returns; mypy cannot know


def open_file(path: str | Path, *, append: bool) -> FdConnection:
    """A file, a FIFO with a reader, or a character device."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with ExitStack() as resources:
        output = os.open(path, flags | (os.O_APPEND if append else os.O_TRUNC), 0o666)
        resources.callback(os.close, output)
        return FdConnection(output, None, None, resources.pop_all())
    raise AssertionError


def open_pty(receive: Receive | None) -> tuple[FdConnection, str]:
    """A new pseudo-terminal, and the path at which others can open it."""
    with ExitStack() as resources:
        master, slave = os.openpty()
        resources.callback(os.close, master)
        # Held open: without any holder the master would report a hang-up.
        resources.callback(os.close, slave)
        tty.setraw(slave)
        os.set_blocking(master, False)
        path = os.ttyname(slave)
        return FdConnection(master, master, receive, resources.pop_all()), path
    raise AssertionError


def _own_description(fd: int, flags: int, resources: ExitStack) -> int:
    """A descriptor for what `fd` is open on, set not to block where it could.

    O_NONBLOCK belongs to the open file description, which is shared with the
    shell and everyone else who has it; so a fresh one is opened if possible.
    """
    if _can_wait(fd):
        try:
            own = os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            resources.callback(os.close, own)
            return own
        except OSError:
            pass  # a socket, or another user's terminal
    own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    resources.callback(os.close, own)
    if _can_wait(fd) and os.get_blocking(own):
        os.set_blocking(own, False)
        resources.callback(os.set_blocking, own, True)
    return own


def _can_wait(fd: int) -> bool:
    """Can one wait for `fd`? Ordinary files and /dev/null are always ready instead."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)


async def _pump(source: int | asyncio.StreamReader, receive: Receive) -> None:
    while data := await (_read(source) if isinstance(source, int) else _read_stream(source)):
        await receive(data)


async def _read(fd: int) -> bytes:
    """The next bytes, or none at the end."""
    waits = _can_wait(fd)
    while True:
        if waits:
            await _readable(fd)
        try:
            return os.read(fd, CHUNK)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno not in GONE:
                raise
            return b""


async def _read_stream(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(CHUNK)
    except ConnectionError:
        return b""


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(fd, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def _writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(fd, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def _end(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and wait for it; its failure is raised."""
    if task is not None:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
