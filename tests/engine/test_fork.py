"""Copies of a running machine in this process, and what os.fork leaves of one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import operator
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import attrs
import pytest

import kvmaio
from kvmaio import Device, Exited, Machine, Stopped
from kvmaio.boot import Flat
from kvmaio.devices import DebugExit
from kvmaio.errors import ConfigurationError
from kvmaio.memory import GuestMemory
from tests.assembler import assemble
from tests.engine.support import deadline, until
from tests.leftovers import Held, no_more_than

pytestmark = [pytest.mark.kvm, pytest.mark.kvmaio_cpu("kvm", "soft")]

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
async def make(kvmaio_cpu) -> AsyncIterator[Callable[..., Awaitable[Machine]]]:
    """Makes an entered machine of this CPU model; it is closed at the end."""
    async with deadline(30), contextlib.AsyncExitStack() as stack:

        async def make(**options: Any) -> Machine:
            machine = Machine(memory="1M", cpu=kvmaio_cpu, name="parent", **options)
            return await stack.enter_async_context(machine)

        yield make


@pytest.fixture
async def machine(make) -> Machine:
    machine: Machine = await make()
    equip(machine)
    return machine


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


async def test_each_is_closed_alone_or_with_the_parent(kvmaio_cpu):
    before = Held.now()
    async with deadline():
        machine = await Machine(memory="1M", cpu=kvmaio_cpu, name="parent").__aenter__()
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


async def test_parent_that_closes_meanwhile_leaves_no_copies(kvmaio_cpu):
    before = Held.now()
    async with deadline():
        machine = await Machine(memory="1M", cpu=kvmaio_cpu, name="parent").__aenter__()
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


class Port(Device):
    """Counts what it is told."""

    size = 1

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> None:
        self.count += 1

    def save(self) -> dict[str, int]:
        return {"count": self.count}

    def load(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Driver(Device):
    """Adds to all ports that it knows of, in whatever way."""

    size = 1

    def __init__(self, *known: Any, **named: Any) -> None:
        self.known = (*known, *named.values())
        self.later: list[Port] = []
        self.by_place: dict[int, Port] = {}
        self.memory: GuestMemory | None = None

    def write(self, offset: int, size: int, value: int) -> None:
        waiting: list[Any] = [*self.known, *self.later, *self.by_place.values()]
        while waiting:
            match waiting.pop():
                case Port() as port:
                    port.add()
                case dict() as mapping:
                    waiting += mapping.values()
                case list() | tuple() | set() as several:
                    waiting += several
                case call:
                    call()
        if self.memory is not None:
            self.memory.write(0x6000, b"device")


KNOWN = {
    "argument": lambda port: Driver(port),
    "keyword": lambda port: Driver(port=port),
    "containers": lambda port: Driver([({"a": port},)]),
    "set": lambda port: Driver({port}),
    "method": lambda port: Driver(port.add),
    "partial": lambda port: Driver(functools.partial(Port.add, port)),
}


@pytest.mark.parametrize("attached", ["earlier", "later"])
@pytest.mark.parametrize("known", KNOWN)
async def test_devices_that_know_each_other(make, known, attached):
    """A copy's devices drive one another, never the original's."""
    machine = await make()
    port = Port()
    driver = KNOWN[known](port)
    places = [(driver, 0x70), (port, 0x71)]
    for device, place in places if attached == "later" else places[::-1]:
        machine.attach(device, pio=place)
    (copy,) = await machine.fork(1)
    await copy.pio.write(0x70, 1, 0)
    assert (port.count, copy.devices["port0"].count) == (0, 1)
    assert list(copy.devices) == list(machine.devices)


async def test_devices_made_known_after_they_were_made(make):
    machine = await make()
    driver, port, other = Driver(), Port(), Port()
    for place, device in enumerate((driver, port, other)):
        machine.attach(device, pio=0x70 + place)
    driver.later.append(port)
    driver.by_place[2] = other
    driver.memory = machine.memory
    (copy,) = await machine.fork(1)
    await copy.pio.write(0x70, 1, 0)
    assert [each.count for each in (port, other)] == [0, 0]
    assert [copy.devices[name].count for name in ("port0", "port1")] == [1, 1]
    assert machine.memory.read(0x6000, 6) == bytes(6)
    assert copy.memory.read(0x6000, 6) == b"device"


async def test_parts_of_the_machine_as_arguments(make):
    machine = await make()
    machine.attach(Driver(functools.partial(machine.irq(5).set, True)), pio=0x70)
    (copy,) = await machine.fork(1)
    await copy.pio.write(0x70, 1, 0)
    assert (machine.irq(5).level, copy.irq(5).level) == (False, True)


async def test_devices_made_of_each_other_are_refused(make):
    machine = await make()
    ring: list[Driver] = []
    ring += (one := Driver(ring), other := Driver(one))
    machine.attach(one, pio=0x70)
    machine.attach(other, pio=0x71)
    before = machine.barrier.is_down
    with pytest.raises(ConfigurationError, match=r"driver\d cannot be copied: it takes a part in"):
        await machine.fork(1)
    assert machine.barrier.is_down is before


async def test_a_reference_that_cannot_be_replaced_is_refused(make):
    @attrs.define
    class Cable:
        end: Port

    machine = await make()
    port = machine.attach(Port(), pio=0x71)
    machine.attach(Driver(Cable(port)), pio=0x70)
    with pytest.raises(ConfigurationError, match="driver0 cannot be copied: known of the copy"):
        await machine.fork(1)


async def test_several_vcpus(make):
    """Each vCPU of a copy goes on where its original was."""
    machine = await make(vcpus=2, irqchip="devices")
    count = ("count: inc word ptr [bx]", "jmp count")
    machine.load(Flat(assemble(("mov bx, 0x5000", *count), "real16", 0x1000), 0x1000))
    machine.memory.write(0x2000, assemble(("mov bx, 0x5100", *count), "real16", 0x2000))
    machine.vcpus[1].init()
    machine.vcpus[1].start_up(2)

    def counts(of: Machine) -> list[int]:
        return [int.from_bytes(of.memory.read(at, 2), "little") for at in (0x5000, 0x5100)]

    run = asyncio.create_task(machine.run())
    await until(lambda: all(counts(machine)))
    copies = await machine.fork(2)
    at = [counts(copy) for copy in copies]
    assert at[0] == at[1]

    def has_gone_on(copy: Machine) -> bool:
        return all(map(operator.ne, counts(copy), at[0]))

    runs = [asyncio.create_task(copy.run()) for copy in copies]
    for copy in copies:
        await until(functools.partial(has_gone_on, copy))
    for each in (machine, *copies):
        each.stop("seen")
    assert await asyncio.gather(run, *runs) == [Stopped("seen")] * 3


async def test_refused_count_leaves_nothing(machine):
    with pytest.raises(ConfigurationError, match="0 copies"):
        await machine.fork(0)
    assert not machine.barrier.is_down


def in_child(what: Callable[[Any], object], of: Any) -> str:
    """What came of it in a child of this process."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(10)  # bounded, whatever happens
        try:
            answer = what(of)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, str(answer).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    message = os.read(read, 1000).decode()
    os.close(read)
    assert status == 0, f"the child was ended by signal {status}"
    return message


def finished(pending: object) -> object:
    """Its result; of a coroutine, which must not wait, what it returns."""
    if not inspect.iscoroutine(pending):
        return pending
    try:
        pending.send(None)
    except StopIteration as end:
        return end.value
    return "it waits"


USES: dict[str, Callable[[Machine], object]] = {
    "run": lambda machine: finished(machine.run()),
    "drain": lambda machine: finished(machine.drain()),
    "drained": lambda machine: finished(kvmaio.drained(machine).__aenter__()),
    "checkpoint": lambda machine: finished(machine.checkpoint()),
    "fork": lambda machine: finished(machine.fork(1)),
    "switch": lambda machine: finished(machine.switch_cpu("soft")),
    "stop": lambda machine: machine.stop(),
    "resume": lambda machine: machine.resume(),
    "attach": lambda machine: machine.attach(DebugExit(), pio=0x80),
    "line": lambda machine: machine.irq(3).set(True),
    "stats": lambda machine: machine.stats,
    "dump": lambda machine: machine.dump(),
    "hypercall": lambda machine: setattr(machine, "hypercall", None),
}
PARTS: dict[str, tuple[Callable[[Machine], Any], Callable[[Any], object]]] = {
    "memory.read": (lambda machine: machine.memory, lambda memory: memory.read(0, 1)),
    "memory.write": (lambda machine: machine.memory, lambda memory: memory.write(0, b"x")),
    "memory.add_ram": (
        lambda machine: machine.memory,
        lambda memory: memory.add_ram(1 << 30, 4096),
    ),
    "pio": (lambda machine: machine.pio, lambda bus: finished(bus.read(0x60, 1))),
    "line": (lambda machine: machine.irq(3), lambda line: line.set(True)),
    "device": (lambda machine: machine.devices["fate0"], lambda device: device.irq.set(True)),
    "kick": (lambda machine: machine.vcpus[0], lambda vcpu: vcpu.kick()),
    "interrupt": (
        lambda machine: machine.vcpus[0],
        lambda vcpu: finished(vcpu.interrupt(0x30)),
    ),
    "context": (lambda machine: machine.vcpus[0], lambda vcpu: vcpu.context),
    "model": (lambda machine: machine.vcpus[0].model, lambda model: model.kick()),
}


@pytest.fixture
async def running(make) -> AsyncIterator[Machine]:
    """Its guest never leaves: under the software CPU, its thread is in the memory all the time."""
    machine: Machine = await make()
    machine.attach(Fate(3), pio=0x60, irq=3)
    machine.load(
        Flat(assemble(("spin: inc word ptr [0x5000]", "jmp spin"), "real16", 0x1000), 0x1000)
    )
    run = asyncio.create_task(machine.run())
    await until(lambda: machine.memory.read(0x5000, 2) != bytes(2))
    yield machine
    at = machine.memory.read(0x5000, 2)
    await until(lambda: machine.memory.read(0x5000, 2) != at)  # unharmed
    machine.stop("seen")
    assert await run == Stopped("seen")


async def test_child_process_has_no_use_of_the_parents_machine(running):
    parts = {name: (part(running), use) for name, (part, use) in PARTS.items()}
    for name, (part, use) in ({name: (running, use) for name, use in USES.items()} | parts).items():
        message = in_child(use, part)
        start = "ConfigurationError: parent belongs to the process that this one was forked from"
        assert message.startswith(start), name


async def test_child_process_may_close_it(running):
    for part in (running, running.vcpus[0], running.memory):
        what = in_child(lambda part: finished(part.close()), part)
        assert what == "None"
    assert in_child(repr, running) == "<Machine of another process>"


async def test_child_process_makes_a_machine_of_its_own(running, kvmaio_cpu):
    checkpoint = await running.checkpoint()

    def restored(_: object) -> object:
        async def run() -> object:
            async with Machine(memory="1M", cpu=kvmaio_cpu) as machine:
                machine.attach(Fate(3), pio=0x60, irq=3)
                await machine.restore(checkpoint)
                run = asyncio.create_task(machine.run())
                await asyncio.sleep(0.01)
                machine.stop("the child's own")
                return await run

        asyncio._set_running_loop(None)
        return asyncio.new_event_loop().run_until_complete(run())

    assert in_child(restored, None) == 'Stopped(reason="the child\'s own")'
