"""Everything that asyncio has works on a SimulationLoop, in simulated time."""

import asyncio
import concurrent.futures
import os
import signal
import socket
import sys
import threading
import time
from functools import partial

import pytest

import kvmaio
from tests.simulation.support import PATIENCE, running, simulate

pytestmark = pytest.mark.timeout(60 * PATIENCE)


@pytest.fixture(params=[False, True], ids=["plain", "debug"])
def run(request):
    """`simulate()`, also in asyncio's debug mode."""
    return lambda main, **options: simulate(main, debug=request.param, **options)


def test_sleeps_tasks_queues_and_events(run):
    async def main():
        loop, trace = running(), list[object]()
        queue: asyncio.Queue[int] = asyncio.Queue(1)
        done = asyncio.Event()

        async def produce():
            for n in range(3):
                await asyncio.sleep(0.25)
                await queue.put(n)
            await done.wait()
            trace.append(("done", loop.time()))

        async def consume():
            for _ in range(3):
                trace.append((await queue.get(), loop.time()))
            await asyncio.sleep(1)
            done.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            group.create_task(consume())
        return trace

    assert run(main()) == [(0, 0.25), (1, 0.5), (2, 0.75), ("done", 1.75)]


def test_timeouts(run):
    async def main():
        loop, trace = running(), list[object]()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.5):
                await asyncio.Event().wait()
        trace.append(loop.time())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(10), 1)
        trace.append(loop.time())
        async with asyncio.timeout(1) as limit:
            limit.reschedule(loop.time() + 5)
            await asyncio.sleep(4)
        trace.append(loop.time())
        done, pending = await asyncio.wait([asyncio.ensure_future(asyncio.sleep(9))], timeout=1)
        trace.append((loop.time(), len(done), len(pending)))
        pending.pop().cancel()
        return trace

    assert run(main()) == [2.5, 3.5, 7.5, (8.5, 0, 1)]


def test_server_and_client_in_one_loop(run):
    async def main():
        async def echo(reader, writer):
            writer.write(await reader.readexactly(100_000))
            await writer.drain()
            writer.close()

        # Loopback is a network all the same: what is on its way must not be overtaken.
        async with (
            await asyncio.start_server(echo, "127.0.0.1") as server,
            kvmaio.real_time(),
            asyncio.timeout(10),
        ):
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"x" * 100_000)
            answer = await reader.read(-1)
            writer.close()
            await writer.wait_closed()
        return len(answer)

    assert run(main()) == 100_000


def test_socketpair_streams_without_holding(run):
    async def main():
        ours, theirs = socket.socketpair()
        _, writer = await asyncio.open_connection(sock=ours)
        other_reader, other_writer = await asyncio.open_connection(sock=theirs)
        lines = []
        async with asyncio.timeout(1e-9):
            for n in range(50):
                writer.write(b"%d\n" % n)
                lines.append(await other_reader.readline())
        for end in (writer, other_writer):
            end.close()
            await end.wait_closed()
        return len(lines), running().time_ns()

    assert run(main()) == (50, 0)


def test_arrivals_are_recorded_in_order_with_their_time():
    async def main():
        loop, seen, arrivals = running(), [], []
        pairs = [socket.socketpair() for _ in range(3)]

        def take(n, ours):
            seen.append((n, ours.recv(9)))

        for n, (ours, _) in enumerate(pairs):
            loop.add_reader(ours, partial(take, n, ours))
        loop.arrival_sink = lambda *arrival: arrivals.append(arrival)
        for delay, n in ((0.5, 2), (0.25, 0), (0.75, 1)):
            loop.call_later(delay, pairs[n][1].send, b"x")
        await asyncio.sleep(1)
        loop.arrival_sink = None
        numbers = {ours.fileno(): n for n, (ours, _) in enumerate(pairs)}
        for ours, theirs in pairs:
            loop.remove_reader(ours)
            ours.close()
            theirs.close()
        return seen, [(time_ns, numbers[fd], mask) for time_ns, fd, mask in arrivals]

    seen, arrivals = simulate(main())
    assert seen == [(0, b"x"), (2, b"x"), (1, b"x")]
    assert arrivals == [(250_000_000, 0, 1), (500_000_000, 2, 1), (750_000_000, 1, 1)]


@pytest.mark.parametrize("pace", [None, 1.0])
def test_an_arrival_while_time_follows_the_wall_clock_has_its_time(pace):
    async def main():
        loop, arrivals = running(), []
        ours, theirs = socket.socketpair()
        heard = asyncio.Event()

        def take():
            ours.recv(9)
            heard.set()

        loop.add_reader(ours, take)
        loop.arrival_sink = lambda *arrival: arrivals.append(arrival[:2])
        timer = threading.Timer(0.05, theirs.send, (b"x",))
        timer.start()
        async with kvmaio.real_time(), asyncio.timeout(100):
            await heard.wait()
        loop.remove_reader(ours)
        ours.close()
        theirs.close()
        timer.join()
        return arrivals, loop.time_ns(), ours

    arrivals, now_ns, _ = simulate(main(), pace=pace)
    assert len(arrivals) == 1 and 30_000_000 < arrivals[0][0] <= now_ns


def test_an_external_client_while_devices_tick():
    """The other end is a thread; the server's side is held to the wall clock."""

    async def main():
        answers = []

        def client(port):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                for n in range(20):
                    connection.sendall(b"%d\n" % n)
                    answers.append(connection.recv(100))

        async def echo(reader, writer):
            while line := await reader.readline():
                writer.write(line)
            writer.close()

        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        ticker = asyncio.create_task(tick())
        async with await asyncio.start_server(echo, "127.0.0.1") as server:
            port = server.sockets[0].getsockname()[1]
            async with asyncio.timeout(600):
                await asyncio.to_thread(client, port)
        ticker.cancel()
        return answers, ticks, running().time()

    answers, ticks, now = simulate(main())
    assert answers == [b"%d\n" % n for n in range(20)]
    assert ticks == int(now * 1000 + 1e-6) or ticks == int(now * 1000 + 1e-6) - 1


def test_subprocesses(run):
    program = "import sys, time; time.sleep(0.05); print(sys.stdin.read().upper())"

    async def main():
        async with asyncio.timeout(50):  # simulated, and held meanwhile
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", program, stdin=-1, stdout=-1
            )
            output, _ = await child.communicate(b"text")
            waited = await asyncio.create_subprocess_exec(
                sys.executable, "-c", "raise SystemExit(3)"
            )
            status = await waited.wait()
            killed = await asyncio.create_subprocess_shell("sleep 1000")
            killed.kill()
            signalled = await killed.wait()
            gone = await asyncio.create_subprocess_exec("/bin/true")
            await asyncio.to_thread(time.sleep, 0.05)
            quick = await gone.wait()
        with pytest.raises(FileNotFoundError):
            await asyncio.create_subprocess_exec("/no/such/program")
        return output, status, signalled, quick, child.returncode, len(asyncio.all_tasks())

    assert run(main()) == (b"TEXT\n", 3, -signal.SIGKILL, 0, 0, 1)


def test_nothing_holds_time_when_it_is_over(run):
    async def main():
        loop = running()
        child = await asyncio.create_subprocess_exec("/bin/true")
        await child.wait()
        await asyncio.to_thread(time.sleep, 0)
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(None, lambda: 1 // 0)
        job = asyncio.ensure_future(asyncio.to_thread(time.sleep, 0.01))
        await asyncio.sleep(0)
        job.cancel()
        await asyncio.wait([job])
        with pytest.raises(FileNotFoundError):
            await asyncio.create_subprocess_exec("/no/such/program")
        with pytest.raises(OSError, match=r"refused|Connect call failed"):
            await asyncio.open_connection("127.0.0.1", 1)
        async with kvmaio.real_time(), kvmaio.real_time():
            pass
        await asyncio.sleep(0)
        before = time.monotonic()
        await asyncio.sleep(1e6)
        return loop._holders, time.monotonic() - before

    holders, took = run(main())
    assert holders == 0 and took < 10 * PATIENCE


def test_executors(run):
    async def main():
        loop = running()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            a = await loop.run_in_executor(pool, lambda: 1)
        b = await asyncio.to_thread(lambda: 2)
        info = await loop.getaddrinfo("localhost", 80)
        await loop.shutdown_default_executor()
        return a, b, bool(info)

    assert run(main()) == (1, 2, True)


def test_other_threads_reach_an_idle_loop(run):
    async def main():
        loop, heard = running(), asyncio.Event()
        thread = threading.Timer(0.02, lambda: loop.call_soon_threadsafe(heard.set))
        thread.start()
        await heard.wait()  # without any timer: nothing to jump to

        async def answer():
            return 42

        future = None

        def ask():
            nonlocal future
            future = asyncio.run_coroutine_threadsafe(answer(), loop).result()

        await asyncio.to_thread(ask)
        thread.join()
        return future, loop.time_ns() >= 0

    assert run(main()) == (42, True)


def test_signals(run):
    async def main():
        loop, heard = running(), asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, heard.set)
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        await heard.wait()
        assert loop.remove_signal_handler(signal.SIGUSR1)
        return True

    assert run(main())


@pytest.mark.parametrize("waiting", ["idle", "held", "paced"])
def test_sigint_is_a_keyboard_interrupt(waiting):
    async def main():
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        if waiting == "held":
            async with kvmaio.real_time():
                await asyncio.sleep(1000)
        await (asyncio.sleep(1000) if waiting == "paced" else asyncio.Event().wait())

    with pytest.raises(KeyboardInterrupt):
        simulate(main(), pace=1.0 if waiting == "paced" else None)


def test_async_generators_are_shut_down(run):
    closed = []

    async def numbers():
        try:
            yield 1
        finally:
            await asyncio.sleep(5)
            closed.append(running().time())

    async def main():
        kept.append(numbers())
        await anext(kept[0])

    kept: list = []
    run(main())
    assert closed == [5.0]


def test_kvmaio_run():
    async def main():
        await asyncio.sleep(1000)
        return type(asyncio.get_running_loop()).__name__

    assert kvmaio.run(main(), time="simulated") == "SimulationLoop"
