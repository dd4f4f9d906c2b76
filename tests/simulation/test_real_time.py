"""Simulated time and the wall clock: held, paced, flooded."""

import asyncio
import socket
import threading
import time

import pytest

import kvmaio
from kvmaio.cpu import EntryResult
from tests.simulation.support import (
    PATIENCE,
    ScriptedModel,
    enter_again_and_again,
    running,
    simulate,
    timed,
)

pytestmark = pytest.mark.timeout(60 * PATIENCE)


def test_a_timeout_around_an_executor_job_does_not_fire():
    async def main():
        for _ in range(5):
            async with asyncio.timeout(1 * PATIENCE):
                await asyncio.to_thread(time.sleep, 0.05)
        return running().time()

    assert simulate(main()) >= 0.25


def test_a_timeout_around_a_socket_does_not_fire_inside_real_time():
    async def main():
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        threading.Timer(0.05, theirs.send, (b"x",)).start()
        async with kvmaio.real_time(), asyncio.timeout(1 * PATIENCE):
            data = await running().sock_recv(ours, 10)
        ours.close()
        theirs.close()
        return data

    assert simulate(main()) == b"x"


def test_without_real_time_it_fires_at_once():
    async def main():
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await running().sock_recv(ours, 10)
        ours.close()
        theirs.close()
        return running().time()

    assert simulate(main()) == 3600.0


@pytest.mark.parametrize("has_timer", [True, False])
def test_held_time_follows_the_wall_clock_also_without_a_timer(has_timer):
    async def main():
        timer = running().call_later(1000, print) if has_timer else None
        began_ns, before_ns = time.monotonic_ns(), running().time_ns()
        await asyncio.to_thread(time.sleep, 0.1)
        passed_ns, took_ns = running().time_ns() - before_ns, time.monotonic_ns() - began_ns
        if timer is not None:
            timer.cancel()
        return passed_ns, took_ns

    passed_ns, took_ns = simulate(main())
    assert 80_000_000 < passed_ns <= took_ns


def test_timers_are_exact_while_time_is_held():
    async def main():
        loop, seen = running(), []
        for n in range(1, 40):
            loop.call_at_ns(n * 1_000_000, lambda: seen.append(loop.time_ns()))
        async with kvmaio.real_time():
            began = time.monotonic()
            await asyncio.sleep(0.05)
        return seen, time.monotonic() - began

    seen, took = simulate(main())
    assert seen == [n * 1_000_000 for n in range(1, 40)] and took > 0.03


def test_a_guest_does_not_run_ahead_of_the_wall_clock_while_time_is_held():
    """An idle guest under a host factor of 1000 would outrun any real answer."""

    async def main():
        model = ScriptedModel(lambda limit_ns: (0, EntryResult.TIMER))
        model.waiting = True
        guest = asyncio.create_task(enter_again_and_again(timed(model, 1000.0)[0]))
        async with asyncio.timeout(1 * PATIENCE):
            await asyncio.to_thread(time.sleep, 0.05)
        guest.cancel()

    simulate(main())


def test_pace_holds_time_to_the_wall_clock():
    async def main():
        loop, began = running(), time.monotonic()
        for _ in range(50):
            await asyncio.sleep(0.01)
        return time.monotonic() - began, loop.achieved_pace

    took, achieved = simulate(main(), pace=2.5)
    assert took >= 0.19 and achieved <= 2.55


def test_a_slow_simulation_says_what_it_achieved_and_makes_up_for_little():
    async def main():
        loop = running()
        await asyncio.sleep(0.01)
        time.sleep(0.3)  # noqa: ASYNC251 (a slow callback)
        began = time.monotonic()
        await asyncio.sleep(0.2)
        return time.monotonic() - began, loop.achieved_pace

    took, achieved = simulate(main(), pace=1.0)
    assert took >= 0.18 and achieved < 0.5


def test_sockets_are_live_while_time_is_paced():
    async def main():
        loop, heard = running(), []
        ours, theirs = socket.socketpair()
        loop.add_reader(ours, lambda: heard.append((ours.recv(9), loop.time())))
        threading.Timer(0.05, theirs.send, (b"x",)).start()
        await asyncio.sleep(1)
        loop.remove_reader(ours)
        ours.close()
        theirs.close()
        return heard

    ((data, at),) = simulate(main(), pace=1.0)
    assert data == b"x" and 0.03 < at < 1


def test_a_slow_pace_is_kept_while_time_is_held():
    async def main():
        await asyncio.to_thread(time.sleep, 0.2)
        return running().time(), running().achieved_pace

    passed, achieved = simulate(main(), pace=0.1)
    assert passed < 0.2 * PATIENCE and achieved <= 0.11


@pytest.mark.parametrize("has_guest", [False, True])
def test_an_endless_flood_from_outside_does_not_stop_time(monkeypatch, has_guest):
    monkeypatch.setattr("kvmaio.simulation.FLOOD_POLLS", 50)

    async def main():
        loop = running()
        ours, theirs = socket.socketpair()
        theirs.send(b"x")  # and nobody reads it
        loop.add_reader(ours, lambda: None)
        guest = None
        if has_guest:
            model = ScriptedModel(lambda limit_ns: (limit_ns, EntryResult.TIMER))
            guest = asyncio.create_task(enter_again_and_again(timed(model)[0]))
        await asyncio.sleep(0.01)
        loop.remove_reader(ours)
        ours.close()
        theirs.close()
        if guest is not None:
            guest.cancel()
        return loop.time_ns()

    assert simulate(main()) == 10_000_000
