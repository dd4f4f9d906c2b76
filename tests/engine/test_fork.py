"""Copies of a running machine in this process, and what os.fork leaves of one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest

from kvmaio import Device, Exited, Machine
from kvmaio.boot import Flat
from kvmaio.devices import DebugExit
from kvmaio.errors import ConfigurationError
from tests.assembler import assemble
from tests.engine.support import deadline, until
from tests.leftovers import Held, no_more_than

pytestmark = pytest.mark.kvm

# Waits until the port gives something else than 0, and ends with it.
WAITING = (
    *("mov byte ptr [0x5000], 0x11", "wait: in al, 0x60", "test al, al", "jz wait"),
    *("mov [0x5000], al", "out 0xf4, al", "hlt"),
)


class Fate(Device):
    """What the guest polls."""

    size = 1

    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.answer = self.polls = 0

    def read(self, offset: int, size: int) -> int:
        self.polls += 1
        return self.answer * self.factor

    def save(self) -> dict[str, int]:
        return {"answer": self.answer, "polls": self.polls}

    def load(self, state: dict[str, int]) -> None:
        self.answer, self.polls = state["answer"], state["polls"]


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    async with deadline(30), Machine(memory="1M", name="parent") as machine:
        equip(machine)
        yield machine


def equip(machine: Machine) -> None:
    machine.attach(Fate(3), pio=0x60)
    machine.attach(DebugExit(), pio=0xF4)
    machine.load(Flat(assemble(WAITING, "real16", 0x1000), 0x1000))


async def test_copies_run_on_their_own(machine):
    fate = machine.devices["fate0"]
    assert isinstance(fate, Fate)
    run = asyncio.create_task(machine.run())
    await until(lambda: fate.polls > 10)
    copies = await machine.fork(4)
    assert [copy.name for copy in copies] == [f"parent.copy{n}" for n in range(4)]
    runs = [asyncio.create_task(copy.run()) for copy in copies]
    for number, copy in enumerate(copies):
        its = copy.devices["fate0"]
        assert isinstance(its, Fate)
        assert its is not fate
        assert its.polls > 10
        its.answer = number + 1
    outcomes = [await each for each in runs]
    assert outcomes == [Exited((3 * n << 1 | 1) & 0xFF) for n in range(1, 5)]
    assert [copy.memory.read(0x5000, 1)[0] for copy in copies] == [3, 6, 9, 12]
    assert machine.memory.read(0x5000, 1)[0] == 0x11  # nobody wrote to the parent's
    fate.answer = 7
    assert await run == Exited(43)


async def test_each_is_closed_alone_or_with_the_parent():
    before = Held.now()
    async with deadline():
        machine = await Machine(memory="1M", name="parent").__aenter__()
        equip(machine)
        one, other = await machine.fork(2)
        async with one:
            assert one.vcpus
        with pytest.raises(ConfigurationError, match=r"parent\.copy0 is closed"):
            await one.run()
        await machine.close()
        with pytest.raises(ConfigurationError, match=r"parent\.copy1 is closed"):
            await other.run()
    del machine, one, other
    no_more_than(before)


async def test_parent_that_closes_meanwhile_leaves_no_copies():
    before = Held.now()
    async with deadline():
        machine = await Machine(memory="1M", name="parent").__aenter__()
        equip(machine)
        fork = asyncio.create_task(machine.fork(3))
        await until(lambda: machine.barrier.is_down)
        await machine.close()
        with pytest.raises(ConfigurationError, match="parent is closed"):
            await fork
    no_more_than(before)


async def test_copies_of_copies(machine):
    (child,) = await machine.fork(1)
    child.memory.write(0x6000, b"child")
    (grandchild,) = await child.fork(1)
    assert grandchild.memory.read(0x6000, 5) == b"child"
    assert machine.memory.read(0x6000, 5) == bytes(5)


async def test_refused_count_leaves_nothing(machine):
    with pytest.raises(ConfigurationError, match="0 copies"):
        await machine.fork(0)
    assert not machine.barrier.is_down


async def test_child_process_has_no_use_of_the_parents_machine(machine):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(10)  # bounded, whatever happens
        try:
            machine.check_open()
        except ConfigurationError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)  # noqa: ASYNC222 (its alarm bounds it)
    message = os.read(read, 1000).decode()
    os.close(read)
    assert message.startswith("parent belongs to the process that this one was forked from")
    fate = machine.devices["fate0"]
    assert isinstance(fate, Fate)
    fate.answer = 1
    assert await machine.run() == Exited(7)  # unharmed
