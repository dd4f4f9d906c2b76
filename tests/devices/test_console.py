"""Console: expect(), sinks, and connections to the outside on both event loops."""

import asyncio
import fcntl
import os
import re
import select
import socket
import sys
import termios
import threading
from contextlib import asynccontextmanager

import pytest
import uvloop

from kvmaio.devices import DebugConsole, Uart16550
from kvmaio.devices.connections import FdConnection, StreamConnection
from kvmaio.devices.console import ConsoleOutput
from kvmaio.errors import ConfigurationError, ConsoleTimeout
from kvmaio.testing import BusDriver, settle
from tests.leftovers import Held, nothing_left

DATA, FCR, LSR = 0, 2, 5
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


async def open_a_first_stream():
    """With its first stream, uvloop opens descriptors that it keeps for itself."""
    ours, theirs = socket.socketpair()
    with theirs:
        _, writer = await asyncio.open_connection(sock=ours)
        writer.close()
        await writer.wait_closed()


@pytest.fixture(params=LOOPS)
def on_loop(request):
    """Runs a coroutine on each kind of loop and checks that it left nothing open."""

    def run(story):
        async def checked():
            await open_a_first_stream()
            before = Held.now()
            await story
            await settle()
            assert asyncio.all_tasks() == {asyncio.current_task()}
            nothing_left(before)

        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(checked())

    return run


@asynccontextmanager
async def uart_bus():
    async with BusDriver(Uart16550()) as bus:
        await bus.write(FCR, 1, 1)
        try:
            yield bus
        finally:
            await bus.device.disconnect()


async def print_text(bus, text):
    for byte in text:
        await bus.write(DATA, 1, byte)


async def receive(bus, count):
    """`count` bytes as a polling guest gets them."""
    received = bytearray()
    async with asyncio.timeout(10):
        while len(received) < count:
            while await bus.read(LSR) & 1:
                received.append(await bus.read(DATA))
            await asyncio.sleep(0)
    return bytes(received)


async def read_fd(fd, count):
    """`count` bytes from a descriptor; a terminal may hand them out one by one."""
    got = bytearray()
    async with asyncio.timeout(30):
        while len(got) < count:
            if select.select([fd], [], [], 0)[0]:
                got += os.read(fd, count - len(got))
            await asyncio.sleep(0)
    return bytes(got)


async def test_expect_returns_what_came_up_to_and_including_the_text():
    async with uart_bus() as bus:
        await print_text(bus, b"boot\r\nlogin: ")
        assert await bus.device.expect(b"login:") == b"boot\r\nlogin:"
        waiting = asyncio.create_task(bus.device.expect(b"$ "))
        await print_text(bus, b"root\r\n$")
        await settle()
        assert not waiting.done()
        await print_text(bus, b" and more")
        assert await waiting == b" root\r\n$ "
        assert await bus.device.expect(b"more") == b"and more"
        assert bus.device.output == b"boot\r\nlogin: root\r\n$ and more"


async def test_an_expect_that_times_out_has_consumed_nothing():
    async with uart_bus() as bus:
        await print_text(bus, b"almost")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await bus.device.expect(b"there")
        assert await bus.device.expect(b"most") == b"almost"


async def test_expect_and_a_short_history():
    output = ConsoleOutput(history=4)
    waiting = asyncio.create_task(output.expect(b"789"))
    await settle()
    for i in range(10):
        output.write(b"%d" % i)
        await asyncio.sleep(0)
    assert await waiting == b"6789"
    for impossible in (b"", b"12345"):
        with pytest.raises(ConfigurationError, match="cannot expect"):
            await output.expect(impossible)


async def test_expect_takes_text_and_expressions():
    async with uart_bus() as bus:
        await print_text(bus, b"\xff boot\r\nuptime: 12 s, user: J\xc3\xb6rg $ \xe2\x82")
        assert await bus.device.expect("boot", timeout=1) == "\ufffd boot"
        match = await bus.device.expect(re.compile(rb"uptime: (\d+) s"))
        assert match[1] == b"12"
        user = await bus.device.expect(re.compile(r"user: (\w+) "))
        assert user[1] == "Jörg"
        assert await bus.device.expect(b"$") == b"$"  # the position is in bytes
        waiting = asyncio.create_task(bus.device.expect(re.compile("€(.)", re.DOTALL)))
        await print_text(bus, b"\xac")
        await settle()
        assert not waiting.done()
        await print_text(bus, b"\n")
        assert (await waiting)[1] == "\n"


async def test_a_timeout_shows_the_last_lines():
    async with uart_bus() as bus:
        await print_text(bus, b"one\r\n" * 20 + b"panic: \x80\r\n")
        for what in (b"login:", "login:", re.compile("login(:)"), re.compile(rb"login[:]")):
            with pytest.raises(ConsoleTimeout) as raised:
                await bus.device.expect(what, timeout=0.01)
            message = str(raised.value)
            assert "login" in message and message.endswith("one\npanic: \\x80")
            assert message.count("one") == 7
        assert isinstance(raised.value, TimeoutError)
        assert await bus.device.expect("panic", timeout=0) != ""  # nothing was consumed
    with pytest.raises(ConsoleTimeout, match="nothing"):
        await ConsoleOutput().expect("x", timeout=0)


async def test_somebody_elses_timeout_stays_his():
    output = ConsoleOutput()
    with pytest.raises(TimeoutError) as raised:
        async with asyncio.timeout(0.01):
            await output.expect("x", timeout=60)
    assert not isinstance(raised.value, ConsoleTimeout)


async def test_an_expression_is_not_searched_anew_for_each_byte():
    output = ConsoleOutput()
    waiting = asyncio.create_task(output.expect(re.compile(rb"[0-9]{4}x")))
    await settle()
    for _ in range(200_000):
        output.write(b"12345")
    output.write(b"x")
    async with asyncio.timeout(10):
        assert (await waiting)[0] == b"2345x"


async def test_send_takes_text():
    async with uart_bus() as bus:
        sending = asyncio.create_task(bus.device.send("Jörg\r"))
        assert await receive(bus, 6) == "Jörg\r".encode()
        await sending


async def test_plain_sinks_cost_no_coroutine():
    seen: list[bytes] = []
    uart = Uart16550()
    uart.add_sink(seen.append)
    assert uart.write(DATA, 1, 65) is None
    uart.remove_sink(seen.append)
    uart.remove_sink(seen.append)
    assert uart.write(DATA, 1, 66) is None
    assert (seen, uart.output) == ([b"A"], b"AB")


def test_file(on_loop, tmp_path):
    async def story():
        path = tmp_path / "log"
        for append in (False, True, False):
            async with uart_bus() as bus:
                await bus.device.connect_file(path, append=append)
                await print_text(bus, b"hello")
                assert path.read_bytes() == (b"hellohello" if append else b"hello")

    on_loop(story())


def test_a_file_that_cannot_be_opened(on_loop, tmp_path):
    async def story():
        os.mkfifo(tmp_path / "fifo")
        for path in (tmp_path / "no" / "log", tmp_path, tmp_path / "fifo"):
            with pytest.raises(OSError, match=path.name):
                await Uart16550().connect_file(path)

    on_loop(story())


def test_a_full_disk_is_not_hidden(on_loop):
    async def story():
        async with BusDriver(DebugConsole()) as bus:
            await bus.device.connect_file("/dev/full")
            with pytest.raises(OSError, match="No space left"):
                await bus.write(0, 1, 65)
            await bus.device.disconnect()

    on_loop(story())


def test_pty_both_ways(on_loop):
    async def story():
        async with uart_bus() as bus:
            path = await bus.device.connect_pty()
            terminal = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            try:
                await print_text(bus, b"hi\n\x03\xff")
                assert await read_fd(terminal, 5) == b"hi\n\x03\xff"  # raw: nothing translated
                os.write(terminal, b"typed\r")
                assert await receive(bus, 6) == b"typed\r"
                assert bus.device.output == b"hi\n\x03\xff"  # nor echoed
            finally:
                os.close(terminal)

    on_loop(story())


def test_a_pty_that_nobody_reads_holds_the_guest_up_and_loses_nothing(on_loop):
    text = bytes(i % 251 for i in range(100_000))

    async def story():
        async with uart_bus() as bus:
            path = await bus.device.connect_pty()
            writer = asyncio.create_task(print_text(bus, text))
            connection = bus.device.connections[0]
            assert isinstance(connection, FdConnection)
            while not connection._backlog:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await settle()
            assert not writer.done()
            assert len(bus.device.output) < len(text)
            terminal = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            try:
                assert await read_fd(terminal, len(text)) == text
            finally:
                os.close(terminal)
            await writer

    on_loop(story())


def test_giving_up_on_a_stuck_peer_closes_all_the_same(on_loop):
    async def story():
        uart = Uart16550()
        await uart.connect_pty()
        pending = None
        while pending is None:
            pending = uart.write(DATA, 1, 0x55)
        writer = asyncio.ensure_future(pending)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await uart.disconnect()
        writer.cancel()
        await asyncio.wait([writer])
        await uart.disconnect()

    on_loop(story())


async def echo_server(reader, writer):
    while data := await reader.read(4096):
        writer.write(data.upper())
        await writer.drain()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("kind", ["tcp", "unix", "socket"])
def test_socket_both_ways(on_loop, tmp_path, kind):
    async def story():
        if kind == "unix":
            peer = tmp_path / "socket"
            server = await asyncio.start_unix_server(echo_server, peer)
        else:
            server = await asyncio.start_server(echo_server, "127.0.0.1", 0)
            peer = server.sockets[0].getsockname()
            if kind == "socket":
                peer = socket.create_connection(peer)
        async with server:
            async with uart_bus() as bus:
                await bus.device.connect_socket(peer)
                await print_text(bus, b"hello")
                assert await receive(bus, 5) == b"HELLO"
            await settle()

    on_loop(story())


def test_a_socket_where_nobody_listens(on_loop, tmp_path):
    async def story():
        with pytest.raises(OSError, match="such file"):
            await Uart16550().connect_socket(tmp_path / "nobody")

    on_loop(story())


def test_a_slow_socket_gets_everything_and_memory_stays_bounded(on_loop):
    text = bytes(i % 251 for i in range(2_000_000))
    got = bytearray()
    start = threading.Event()

    def slow_reader(end):
        start.wait(30)
        while data := end.recv(65536):
            got.extend(data)

    async def story():
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=slow_reader, args=(theirs,))
        thread.start()
        console = DebugConsole()
        await console.connect_socket(ours)
        connection = console.connections[0]
        assert isinstance(connection, StreamConnection)
        transport = connection._writer.transport
        most = 0
        for at in range(0, len(text), 1000):
            if (pending := console.emit(text[at : at + 1000])) is not None:
                most = max(most, transport.get_write_buffer_size())
                start.set()
                await pending
        await console.disconnect()
        await asyncio.to_thread(thread.join)
        theirs.close()
        assert got == text
        assert 0 < most < 200_000
        await asyncio.get_running_loop().shutdown_default_executor()

    on_loop(story())


def test_a_peer_that_goes_away_is_a_pulled_cable(on_loop):
    async def story():
        ours, theirs = socket.socketpair()
        async with uart_bus() as bus:
            await bus.device.connect_socket(ours)
            await bus.device.connect_pty()
            await print_text(bus, b"x")
            theirs.close()
            text = b"y" * 3000
            async with asyncio.timeout(10):
                while not bus.device.connections[0].is_gone:
                    await print_text(bus, b"y")
                    await asyncio.sleep(0)
            await print_text(bus, text)
            assert bus.device.output.endswith(text)

    on_loop(story())


def test_stream_pair_stays_the_callers(on_loop):
    async def story():
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=ours)
        async with uart_bus() as bus:
            await bus.device.connect_stream(reader, writer)
            await print_text(bus, b"out")
            theirs.send(b"in")
            assert await receive(bus, 2) == b"in"
        writer.write(b"!")
        await writer.drain()
        await settle()
        assert theirs.recv(10) == b"out!"
        writer.close()
        await writer.wait_closed()
        theirs.close()

    on_loop(story())


@asynccontextmanager
async def standard_descriptors(stdin, stdout):
    """Put other files in the places 0 and 1, as a shell does."""
    sys.stdout.flush()
    saved = os.dup(0), os.dup(1)
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    try:
        yield
    finally:
        for fd, place in zip(saved, (0, 1), strict=True):
            os.dup2(fd, place)
            os.close(fd)


@pytest.mark.parametrize("kind", ["pipe", "socket", "pty"])
def test_stdio_both_ways_without_touching_the_shells_flags(on_loop, kind):
    async def story():
        if kind == "pipe":
            stdin, typing = os.pipe()
            reading, stdout = os.pipe()
        elif kind == "socket":
            stdin, typing = (s.detach() for s in socket.socketpair())
            reading, stdout = (s.detach() for s in socket.socketpair())
        else:
            typing, stdin = os.openpty()
            reading, stdout = os.dup(typing), os.dup(stdin)
        settings = termios.tcgetattr(stdin) if kind == "pty" else None
        try:
            async with standard_descriptors(stdin, stdout):
                async with uart_bus() as bus:
                    await bus.device.connect_stdio(raw=True)
                    await print_text(bus, b"out\n")
                    assert await read_fd(reading, 4) == b"out\n"
                    os.write(typing, b"\x03key")
                    assert await receive(bus, 4) == b"\x03key"
                    if kind != "socket":  # a socket has but one description
                        assert os.get_blocking(0) and os.get_blocking(1)
                assert os.get_blocking(0) and os.get_blocking(1)
                if settings is not None:
                    assert termios.tcgetattr(0) == settings
        finally:
            for fd in (stdin, typing, reading, stdout):
                os.close(fd)

    on_loop(story())


def test_stdio_on_ordinary_files(on_loop, tmp_path):
    async def story():
        (tmp_path / "in").write_bytes(bytes(range(200)))
        stdin = os.open(tmp_path / "in", os.O_RDONLY)
        stdout = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
        os.write(stdout, b"before, ")
        async with standard_descriptors(stdin, stdout), uart_bus() as bus:
            await bus.device.connect_stdio()
            await print_text(bus, b"after")
            assert await receive(bus, 200) == bytes(range(200))
        assert fcntl.fcntl(stdin, fcntl.F_GETFL) & os.O_NONBLOCK == 0
        os.close(stdin)
        os.close(stdout)
        assert (tmp_path / "out").read_bytes() == b"before, after"

    on_loop(story())


def test_stdio_with_nothing_to_read(on_loop):
    async def story():
        null = os.open(os.devnull, os.O_RDWR)
        async with standard_descriptors(null, null), uart_bus() as bus:
            await bus.device.connect_stdio(raw=True)
            await print_text(bus, b"gone")
            await settle()
            assert bus.device.output == b"gone"
        os.close(null)

    on_loop(story())
