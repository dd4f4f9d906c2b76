"""Pytest plugin: fixtures that start a guest in a line, and the choice of the CPU model.

::

    async def test_guest_prints_a_letter(boot):
        machine = boot("mov dx, 0x3f8", "mov al, 'A'", "out dx, al", "hlt")
        await machine.run()
        assert machine.serial.output == b"A"

The fixtures are asynchronous and need pytest-asyncio. Where the CPU model that
``--kvmaio-cpu`` asks for cannot run, their tests are skipped with the reason.

``@pytest.mark.kvmaio_cpu("kvm", "soft")`` runs a test on each of these models, whatever the
option says. ``@pytest.mark.kvmaio_loop("wall", "simulated")`` runs it once on each of these
loops; it needs pytest-asyncio 1.4.

The report of a failed test shows the machines of its fixtures: the last exits and accesses,
registers and the code at them, consoles and devices.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import pytest

# kvmaio itself is imported where it is used: every pytest session loads this module.
if TYPE_CHECKING:
    from kvmaio.checkpoint import Checkpoint
    from kvmaio.failure_report import FlightRecorder
    from kvmaio.testing import BenchMachine

__all__ = ["Boot", "booted_once"]


class Boot(Protocol):
    """What the fixture `boot` gives."""

    def __call__(
        self, *code: str | bytes, mode: str = "real16", address: int = 0x1000, **machine: Any
    ) -> BenchMachine:
        """An entered machine with `code` loaded, ready for `run()`.

        Args:
            code: lines for GNU as (Intel syntax), or one piece of machine code.
            mode, address: as `kvmaio.boot.Flat`'s.
            machine: arguments for `Machine`, such as ``memory`` and ``vcpus``.
        """


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("kvmaio").addoption(
        "--kvmaio-cpu",
        choices=("auto", "kvm", "soft", "both"),
        default="auto",
        help="the CPU model that the fixtures machine and boot use; both: every test twice",
    )
    parser.getgroup("kvmaio").addoption(
        "--kvmaio-last",
        type=int,
        default=16,
        metavar="N",
        help="how many exits, accesses and so on the report of a failed test shows; "
        "0 records none, which spares a good third of the time of each exit",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "kvmaio_cpu(*models): run on each of these CPU models, kvm or soft"
    )
    config.addinivalue_line(
        "markers", "kvmaio_loop(*times): run on each of these loops, wall or simulated"
    )


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Generator[None]:
    if "kvmaio_cpu" in metafunc.fixturenames:
        marked = _arguments(metafunc, "kvmaio_cpu", ("kvm", "soft"))
        both = metafunc.config.getoption("kvmaio_cpu") == "both"
        if marked or both:
            metafunc.parametrize("kvmaio_cpu", marked or ("kvm", "soft"), indirect=True)
    times = _arguments(metafunc, "kvmaio_loop", ("wall", "simulated"))
    if not times:
        return (yield)
    # Only while pytest-asyncio looks at this test: with such a hook registered, it would
    # parametrise all others too.
    loops = _Loops(times)
    manager = metafunc.config.pluginmanager
    if not hasattr(manager.hook, "pytest_asyncio_loop_factories"):
        pytest.fail("the mark kvmaio_loop needs pytest-asyncio 1.4 or later", pytrace=False)
    manager.register(loops)
    try:
        return (yield)
    finally:
        manager.unregister(loops)


def _arguments(metafunc: pytest.Metafunc, mark: str, possible: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments of the test's `mark`; none if it has no such mark."""
    found = metafunc.definition.get_closest_marker(mark)
    if found is None:
        return ()
    if not found.args or not set(found.args) <= set(possible):
        pytest.fail(
            f"{metafunc.definition.nodeid}: the mark {mark} takes some of {', '.join(possible)}",
            pytrace=False,
        )
    return tuple(found.args)


class _Loops:
    """What pytest-asyncio asks for the loops of one test."""

    def __init__(self, times: tuple[str, ...]) -> None:
        self._times = times

    def pytest_asyncio_loop_factories(
        self,
    ) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
        from kvmaio.simulation import SimulationLoop

        known = {"wall": asyncio.new_event_loop, "simulated": SimulationLoop}
        return {time: known[time] for time in self._times}


_recorders = pytest.StashKey[list[Any]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.when != "teardown":
        for recorder in item.stash.get(_recorders, []):
            report.sections.append(("kvmaio", recorder.describe()))
    return report


def _record(request: pytest.FixtureRequest, machine: BenchMachine) -> FlightRecorder:
    """Have the machine's last doings in the report if the test fails."""
    from kvmaio.failure_report import FlightRecorder

    recorder = FlightRecorder(machine, request.config.getoption("kvmaio_last"))
    request.node.stash.setdefault(_recorders, []).append(recorder)
    return recorder


@pytest.fixture
def kvmaio_cpu(request: pytest.FixtureRequest) -> str:
    """The CPU model of this test's machines, ``"kvm"`` or ``"soft"``; skips where it cannot run."""
    wanted: str = getattr(request, "param", None) or request.config.getoption("kvmaio_cpu")
    reasons = []
    for model, why_not in (("kvm", why_not_kvm), ("soft", why_not_soft)):
        if wanted in ("auto", model):
            if (reason := why_not()) is None:
                request.node.user_properties.append(("cpu_model", model))
                return model
            reasons.append(reason)
    pytest.skip("; ".join(reasons))


def why_not_kvm() -> str | None:
    """What keeps KVM from running guests here, or None."""
    from kvmaio.kvm.host import usable

    return usable()


def why_not_soft() -> str | None:
    """What keeps the software CPU from running guests here, or None."""
    if find_spec("kvmaio.soft") is None:
        return "this version of kvmaio has no software CPU"
    if find_spec("unicorn") is None:
        return "the software CPU is not installed: pip install 'kvmaio[soft]'"
    return None


@pytest.fixture
def kvmaio_assembler() -> Callable[..., bytes]:
    """Turns source lines into machine code; override it to keep code that needs no GNU as."""
    from kvmaio.assembler import assemble

    return lambda lines, mode, address: assemble(*lines, mode=mode, address=address)


try:
    from pytest_asyncio import fixture as async_fixture
except (
    ImportError
):  # pytest then says, where they are used, that it cannot do asynchronous fixtures
    async_fixture = pytest.fixture  # type: ignore[assignment]


@async_fixture
async def machine(kvmaio_cpu: str, request: pytest.FixtureRequest) -> AsyncIterator[BenchMachine]:
    """An entered machine of 16 MiB with a serial port and a debug exit; closed at the end."""
    from kvmaio.testing import BenchMachine

    async with BenchMachine(cpu=kvmaio_cpu) as machine:
        _record(request, machine)
        yield machine


@async_fixture
async def boot(
    kvmaio_cpu: str, kvmaio_assembler: Callable[..., bytes], request: pytest.FixtureRequest
) -> AsyncIterator[Boot]:
    """A function that boots a guest: `Boot`. Its machines are closed at the end."""
    from kvmaio.boot import Flat
    from kvmaio.suspension import Suspended, drive
    from kvmaio.testing import BenchMachine

    closing = AsyncExitStack()
    loop = asyncio.get_running_loop()

    def boot(
        *code: str | bytes, mode: str = "real16", address: int = 0x1000, **options: Any
    ) -> BenchMachine:
        if asyncio.get_running_loop() is not loop:
            pytest.fail("the test runs on another event loop than its fixture boot (loop_scope)")
        lines = [piece for piece in code if isinstance(piece, str)]
        pieces = [piece for piece in code if isinstance(piece, bytes)]
        if (lines and pieces) or not code:
            pytest.fail("boot() takes lines of assembler, or machine code as bytes")
        image = kvmaio_assembler(lines, mode, address) if lines else b"".join(pieces)
        machine = BenchMachine(**{"cpu": kvmaio_cpu} | options)
        # Entering awaits nothing; only so can a plain function do it.
        entered = drive(machine.__aenter__())
        assert not isinstance(entered, Suspended)
        closing.push_async_callback(machine.close)
        _record(request, machine)
        machine.load(Flat(image, address, mode))
        return machine

    async with closing:
        yield boot


# ---- booted once ---------------------------------------------------------------------


def booted_once(prepare: Callable[[str], AsyncIterator[BenchMachine]]) -> Any:
    """Make a fixture of `prepare`: a machine that is booted once a module, and reset for each test.

    ::

        pytestmark = pytest.mark.asyncio(loop_scope="module")

        @booted_once
        async def shell(cpu):
            async with BenchMachine(cpu=cpu) as machine:
                machine.load(Firmware("shell.bin"))
                run = asyncio.create_task(machine.run())
                await machine.serial.expect("$ ", timeout=10)
                machine.stop()
                await run
                yield machine

        async def test_echo(shell):
            ...

    Each test gets the machine as it was at the ``yield``, by `Machine.restore()`, which puts
    back what the test before has changed; consoles begin empty. The tests must share the
    module's event loop, as above.
    """

    @async_fixture(name=prepare.__name__, loop_scope="module")
    async def booted(
        _kvmaio_booted: _Booted, kvmaio_cpu: str, request: pytest.FixtureRequest
    ) -> AsyncIterator[BenchMachine]:
        machine = await _kvmaio_booted.get(prepare, kvmaio_cpu)
        recorder = _record(request, machine)
        try:
            yield machine
        finally:
            recorder.close()
            await _kvmaio_booted.reset(machine)

    return booted


class _Booted:
    """The machines of one module that are booted once, and how they are to be again."""

    def __init__(self, closing: AsyncExitStack) -> None:
        self._closing = closing
        self._machines: dict[tuple[object, str], BenchMachine] = {}
        self._checkpoints: dict[BenchMachine, Checkpoint] = {}

    async def get(
        self, prepare: Callable[[str], AsyncIterator[BenchMachine]], cpu: str
    ) -> BenchMachine:
        machine = self._machines.get((prepare, cpu))
        if machine is None:
            machine = await self._closing.enter_async_context(asynccontextmanager(prepare)(cpu))
            self._checkpoints[machine] = await machine.checkpoint()
            await self.reset(machine)  # also before the first test: all are to be alike
            self._machines[prepare, cpu] = machine
        return machine

    async def reset(self, machine: BenchMachine) -> None:
        from kvmaio.devices import Console

        machine.stop("the test is over")
        while machine.is_running:  # noqa: ASYNC110 (run() has no event for others)
            await asyncio.sleep(0)
        await machine.restore(self._checkpoints[machine])
        for device in machine.devices.values():
            if isinstance(device, Console):
                device.forget()


@async_fixture(scope="module", loop_scope="module")
async def _kvmaio_booted() -> AsyncIterator[_Booted]:
    async with AsyncExitStack() as closing:
        yield _Booted(closing)
