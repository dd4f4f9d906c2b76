"""A server for GDB's remote protocol.

============  ==================================================================
`packets`     bytes to packets
`registers`   target descriptions, and registers by GDB's numbers
`debugger`    stops the machine and has it go on: breakpoints, steps, watchpoints
`watches`     watchpoints, and the CPU model that can watch
`session`     one connection: each packet's answer
`monitor`     ``monitor stats|devices|registers|checkpoint FILE``
============  ==================================================================
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..errors import ConfigurationError
from .debugger import Debugger
from .packets import PacketStream
from .session import Session
from .trial import breakpoints_work

if TYPE_CHECKING:
    from ..machine import Machine

__all__ = ["GdbServer"]

_GIVE_UP_S = 1.0
"""How long a GDB that does not read is waited for at the end."""


class GdbServer:
    """Lets one GDB at a time debug a machine; see `Machine.gdb()`.

    Attributes:
        host, port: where it listens; port 0 is replaced by the one that was free.
    """

    def __init__(self, machine: Machine, host: str, port: int, *, wait: bool) -> None:
        self.machine = machine
        self.host = host
        self.port = port
        self._wait = wait
        self._server: asyncio.Server | None = None
        self._stream: PacketStream | None = None
        self._session: Session | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self.machine.debugger is not None:
            raise ConfigurationError(f"{self.machine.name} has a GDB server already")
        works = self.machine.vcpus[0].model.kind != "kvm" or await breakpoints_work()
        self._server = await asyncio.start_server(self._connected, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        self._debugger = Debugger(self.machine, wait=self._wait, hardware_works=works)
        self.machine.debugger = self._debugger
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        self._debugger.close()
        self.machine.debugger = None
        task, stream = self._task, self._stream
        if self._session is not None and task is not None and stream is not None:
            await self._session.finish()
            _, late = await asyncio.wait([task], timeout=_GIVE_UP_S)
            if late:
                stream.abort()
                await asyncio.wait([task])
        if not self._debugger.is_in_use:
            await self._debugger.watches.move_back(self._debugger.say)

    @property
    def is_idle(self) -> bool:
        """Is nobody connected?"""
        return self._session is None

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = PacketStream(reader, writer)
        if self._session is not None:
            await stream.close()  # one at a time
            return
        self._task, self._stream = asyncio.current_task(), stream
        self._session = Session(self._debugger, stream)
        try:
            await self._session.serve()
        finally:
            await stream.close()
            self._session = self._stream = self._task = None
