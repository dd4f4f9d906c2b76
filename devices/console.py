"""Console output: what a guest printed is kept, passed on, and can be waited for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from kvmaio.device import Device
from kvmaio.errors import ConfigurationError

from .connections import (
    Connection,
    Receive,
    StreamConnection,
    open_file,
    open_pty,
    open_stdio,
)

__all__ = ["Console", "ConsoleOutput", "Sink"]

Sink = Callable[[bytes], Awaitable[None] | None]
"""Takes bytes as they are printed; the guest waits for what it returns."""

HISTORY = 16 * 1024 * 1024


class ConsoleOutput:
    """The bytes a guest printed, the sinks that get them, and `expect()`.

    Args:
        history: how many of the last bytes are kept.
    """

    def __init__(self, history: int = HISTORY) -> None:
        if history < 0:
            raise ConfigurationError(f"a history of {history} bytes: it must be 0 or more")
        self.history = history
        self.sinks: list[Sink] = []
        self._kept = bytearray()
        self._position = 0  # where in _kept the next expect() starts
        self._waiting: dict[asyncio.Future[None], bytes] = {}

    @property
    def data(self) -> bytes:
        """A copy of what is kept, oldest first."""
        return bytes(self._kept)

    def write(self, data: bytes) -> Awaitable[None] | None:
        """Take what was printed; None, or what to await before more is printed."""
        old_length = len(self._kept)
        self._kept += data
        for waiter, text in self._waiting.items():
            # Only an end that is new can complete the text.
            start = max(self._position, old_length - len(text) + 1)
            if not waiter.done() and self._kept.find(text, start) >= 0:
                waiter.set_result(None)
        if (excess := len(self._kept) - self.history) > 0:
            del self._kept[:excess]
            self._position = max(0, self._position - excess)
        pending = [waiting for sink in self.sinks if (waiting := sink(data)) is not None]
        if not pending:
            return None
        return pending[0] if len(pending) == 1 else _all(pending)

    async def expect(self, text: bytes) -> bytes:
        """Wait for `text`; return what came since the last expect(), up to and including it.

        What was printed before the call counts too. It waits without limit:
        put an `asyncio.timeout()` around it. A wait that was cancelled has
        consumed nothing.

        Raises:
            ConfigurationError: the text is empty or longer than the history.
        """
        if not 0 < len(text) <= self.history:
            raise ConfigurationError(
                f"cannot expect {len(text)} bytes: it must be 1 to {self.history}, the history"
            )
        while (found := self._kept.find(text, self._position)) < 0:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting[waiter] = text
            try:
                await waiter
            finally:
                del self._waiting[waiter]
        start, self._position = self._position, found + len(text)
        return bytes(self._kept[start : self._position])


class Console(Device):
    """A device that prints. Base of `Uart16550` and `DebugConsole`.

    ::

        console.output                        # what the guest printed
        await console.expect(b"login:")
        await console.connect_stdio()
        path = await console.connect_pty()
        await console.disconnect()

    It may be connected to several peers at once. A slow peer holds up the
    vCPU that prints, and nothing else; no data is lost. What was connected
    stays open until `disconnect()`.

    Args:
        history: how many of the last bytes `output` keeps; 16 MiB by default.
    """

    def __init__(self, *, history: int = HISTORY) -> None:
        self._console = ConsoleOutput(history)
        self.connections: list[Connection] = []

    @property
    def output(self) -> bytes:
        """What the guest printed, as far as the history reaches (a copy)."""
        return self._console.data

    async def expect(self, text: bytes) -> bytes:
        """Wait until the guest prints `text`; see `ConsoleOutput.expect()`."""
        return await self._console.expect(text)

    def emit(self, data: bytes) -> Awaitable[None] | None:
        """For the device: `data` is printed. None, or what the guest has to wait for."""
        return self._console.write(data)

    def add_sink(self, sink: Sink) -> None:
        """Call `sink` with all that is printed from now on."""
        self._console.sinks.append(sink)

    def remove_sink(self, sink: Sink) -> None:
        """Take back `add_sink()`; an unknown sink is ignored."""
        if sink in self._console.sinks:
            self._console.sinks.remove(sink)

    async def connect_stdio(self, *, raw: bool = False) -> None:
        """Connect to standard input and output.

        Args:
            raw: if it is a terminal, pass every key on to the guest (Ctrl-C
                too) until `disconnect()`.
        """
        self._connect(open_stdio(self._receiver(), raw=raw))

    async def connect_file(self, path: str | Path, *, append: bool = False) -> None:
        """Print to a file as well; it is emptied first unless `append`.

        Raises:
            OSError: it cannot be opened, or is a FIFO that nobody reads.
        """
        self._connect(open_file(path, append=append))

    async def connect_socket(self, peer: tuple[str, int] | str | Path | socket.socket) -> None:
        """Connect to ``(host, port)``, to a Unix socket's path, or to a connected socket.

        A socket that is passed in is closed by `disconnect()`.

        Raises:
            OSError: nobody listens there.
        """
        if isinstance(peer, socket.socket):
            reader, writer = await asyncio.open_connection(sock=peer)
        elif isinstance(peer, tuple):
            reader, writer = await asyncio.open_connection(*peer)
        else:
            reader, writer = await asyncio.open_unix_connection(peer)
        self._connect(StreamConnection(reader, writer, self._receiver(), owned=True))

    async def connect_pty(self) -> str:
        """Connect to a new pseudo-terminal; return its path for the other side to open.

        Once its buffer is full the guest waits for somebody to read it.
        """
        connection, path = open_pty(self._receiver())
        self._connect(connection)
        return path

    async def connect_stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Connect to an asyncio stream, as from `asyncio.start_server()`.

        The pair stays the caller's: `disconnect()` does not close it.
        """
        self._connect(StreamConnection(reader, writer, self._receiver(), owned=False))

    async def close(self) -> None:
        await self.disconnect()

    async def disconnect(self) -> None:
        """Pass on what is left, then close everything that the `connect_` methods opened.

        It waits for slow peers; cancelled, it gives up what is left. A console
        without connections is ignored.
        """
        connections, self.connections = self.connections, []
        for connection in connections:
            self.remove_sink(connection.write)
        closing = (connection.close() for connection in connections)
        for result in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    def _connect(self, connection: Connection) -> None:
        self.connections.append(connection)
        self.add_sink(connection.write)

    def _receiver(self) -> Receive | None:
        """What takes a peer's input; None: this device has no input."""
        return None


async def _all(pending: list[Awaitable[None]]) -> None:
    await asyncio.gather(*pending)
