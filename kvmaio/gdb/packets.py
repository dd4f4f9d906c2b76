"""`PacketStream`: GDB's remote serial protocol, from bytes to packets and back.

Source: "Debugging with GDB", appendix E.1: ``$payload#checksum``, acknowledged by ``+`` or
``-`` until both sides agree not to; a lone 0x03 is Ctrl-C.
"""

from __future__ import annotations

import asyncio
import contextlib

__all__ = ["INTERRUPT", "PACKET_SIZE", "PacketStream", "escape", "unescape"]

PACKET_SIZE = 0x4000
"""Bytes of a packet's payload, at most; gdb is told."""

INTERRUPT = b"\x03"
"""What `read()` returns for Ctrl-C; no packet has such a payload."""

_TO_ESCAPE = frozenset(b"#$}*")


class PacketStream:
    """Packets over a pair of streams.

    Attributes:
        acknowledges: each packet is acknowledged; set to False after QStartNoAckMode.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.acknowledges = True
        self._reader = reader
        self._writer = writer
        self._last = b""

    async def read(self) -> bytes | None:
        """The next packet's payload, or INTERRUPT; None at the end of the connection."""
        try:
            while True:
                byte = await self._reader.readexactly(1)
                if byte == INTERRUPT:
                    return INTERRUPT
                if byte == b"-" and self.acknowledges:
                    self._writer.write(self._last)
                elif byte == b"$" and (payload := await self._rest()) is not None:
                    return payload
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def send(self, payload: bytes | str) -> None:
        """Send a packet."""
        data = payload.encode() if isinstance(payload, str) else payload
        self._last = b"$%b#%02x" % (data, sum(data) & 0xFF)
        self._writer.write(self._last)

    def abort(self) -> None:
        """End the connection at once; `read()` then returns None."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Send what is left, and close the connection."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _rest(self) -> bytes | None:
        """The payload behind a ``$``; None if it is damaged, which gdb is told."""
        data = bytearray()
        while (byte := await self._reader.readexactly(1)) != b"#":
            if byte == b"$":
                data.clear()  # a packet that was cut off; this is the next one
                continue
            data += byte
        checksum = await self._reader.readexactly(2)
        if not self.acknowledges:
            return unescape(data)
        if checksum.lower() != b"%02x" % (sum(data) & 0xFF):
            self._writer.write(b"-")
            return None
        self._writer.write(b"+")
        return unescape(data)


def unescape(data: bytes | bytearray) -> bytes:
    """Undo ``}``, behind which a byte is inverted in bit 5."""
    if b"}" not in data:
        return bytes(data)
    result = bytearray()
    source = iter(data)
    for byte in source:
        result.append(next(source, 0) ^ 0x20 if byte == ord("}") else byte)
    return bytes(result)


def escape(data: bytes) -> bytes:
    """The reverse, for binary data in a reply."""
    result = bytearray()
    for byte in data:
        if byte in _TO_ESCAPE:
            result += bytes((ord("}"), byte ^ 0x20))
        else:
            result.append(byte)
    return bytes(result)
