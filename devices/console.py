"""`Console`: a device that prints, and what it can be connected to."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, overload

from kvmaio.device import Device

from .connections import (
    Connection,
    Receive,
    StreamConnection,
    open_file,
    open_pty,
    open_stdio,
)
from .console_output import HISTORY, ConsoleOutput, Sink

__all__ = ["HISTORY", "Console", "ConsoleOutput", "Sink"]


class Console(Device):
    """A device that prints. Base of `Uart16550` and `DebugConsole`.

    ::

        console.output                        # what the guest printed
        await console.expect("login:", timeout=10)
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

    @overload
    async def expect(self, what: bytes, timeout: float | None = None) -> bytes: ...
    @overload
    async def expect(self, what: str, timeout: float | None = None) -> str: ...
    @overload
    async def expect(
        self, what: re.Pattern[bytes], timeout: float | None = None
    ) -> re.Match[bytes]: ...
    @overload
    async def expect(
        self, what: re.Pattern[str], timeout: float | None = None
    ) -> re.Match[str]: ...
    async def expect(self, what: Any, timeout: float | None = None) -> Any:
        """Wait until the guest prints a text or what an expression matches.

        See `ConsoleOutput.expect()`.
        """
        return await self._console.expect(what, timeout)

    def tail(self) -> str:
        """The last lines that the guest printed."""
        return self._console.tail()

    def forget(self) -> None:
        """Drop what was printed so far, also for `expect()`."""
        self._console.forget()

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
