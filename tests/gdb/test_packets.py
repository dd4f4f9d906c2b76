"""GDB's packets: bytes in, packets out, and the reverse."""

from __future__ import annotations

import asyncio

import pytest

from kvmaio.gdb.packets import INTERRUPT, PacketStream, escape, unescape


@pytest.fixture
async def connection():
    """A PacketStream, and the other end of its connection."""
    accepted: asyncio.Future = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(
        lambda reader, writer: accepted.set_result((reader, writer)), "127.0.0.1"
    )
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    stream = PacketStream(*await accepted)
    yield stream, reader, writer
    writer.close()
    await stream.close()
    server.close()


async def test_packets_are_acknowledged(connection):
    stream, reader, writer = connection
    writer.write(b"+$g#67+\x03$m1000,4#8e")
    async with asyncio.timeout(10):
        assert [await stream.read() for _ in range(3)] == [b"g", INTERRUPT, b"m1000,4"]
        assert await reader.readexactly(2) == b"++"


async def test_damaged_packets_are_refused_and_lost_ones_sent_again(connection):
    stream, reader, writer = connection
    stream.send("OK")
    async with asyncio.timeout(10):
        assert await reader.readexactly(6) == b"$OK#9a"
        writer.write(b"-$g#00$g#67$cut off$?#3f")
        assert [await stream.read() for _ in range(2)] == [b"g", b"?"]
        assert await reader.readexactly(9) == b"$OK#9a-++"
        writer.close()
        assert await stream.read() is None


async def test_without_acknowledgements_no_checksum_counts(connection):
    stream, _, writer = connection
    stream.acknowledges = False
    writer.write(b"-$g#00")
    async with asyncio.timeout(10):
        assert await stream.read() == b"g"


def test_escapes():
    assert unescape(b"a}\x03}]b") == b"a#}b"
    assert unescape(escape(bytes(range(256)))) == bytes(range(256))
    assert not set(b"#$*") & set(escape(bytes(range(256))))
