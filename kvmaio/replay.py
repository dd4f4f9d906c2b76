"""Record what comes from outside, with its time, and play it again: the same run, byte for byte.

With simulated time and a CPU that counts instructions, nothing else is left that could
differ from run to run. What the program itself does with a device (`uart.send()`) is not
recorded: it does it again.

::

    async with Machine(cpu="soft") as machine:
        uart = machine.attach(Uart16550(), pio=0x3F8)
        with recording(machine, "session.inputs"):     # or: replaying(machine, ...)
            await uart.connect_stdio()
            await machine.run()
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

import attrs

from .errors import ConfigurationError
from .simulation import SimulationLoop

if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["Input", "read_inputs", "recording", "replaying"]

FORMAT = {"kvmaio inputs": 1}


@attrs.frozen
class Input:
    """Something that came from outside.

    Attributes:
        time_ns: by the machine's clock, when the device got it.
        instructions: what vCPU 0 had executed by then; None where nobody counts.
        device: the name of the device that got it.
        data: the bytes.
    """

    time_ns: int
    instructions: int | None
    device: str
    data: bytes


@contextlib.contextmanager
def recording(
    machine: Machine, path: str | os.PathLike[str], **facts: Any
) -> Iterator[dict[str, Any]]:
    """Write down all that the consoles' connections receive, for as long as the block lasts.

    Args:
        facts: plain data that the replay needs, such as when a real-time clock began;
            given to whoever replays.

    Raises:
        ConfigurationError: time is not simulated, so that nothing could be repeated.
        OSError: the file cannot be written.
    """
    _check_time(machine)
    with open(path, "w", encoding="ascii") as file:
        _write(file, {**FORMAT, "facts": facts})
        with _intakes(machine, lambda name: _Recorder(machine, name, file).take):
            yield facts


@contextlib.contextmanager
def replaying(machine: Machine, path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Have the devices get what was recorded, at the same times; gives the recording's facts.

    What really comes from outside meanwhile is dropped.

    Raises:
        ConfigurationError: time is not simulated; the file is none of `recording()`; or it
            names a device that this machine has not.
    """
    _check_time(machine)
    facts, inputs = read_inputs(path)
    unknown = {each.device for each in inputs} - _consoles(machine).keys()
    if unknown:
        raise ConfigurationError(
            f"{os.fspath(path)} has inputs for {', '.join(sorted(unknown))}, "
            f"and {machine.name} has no such console"
        )
    player = _Player(machine)
    for each in inputs:
        machine.clock.call_at_ns(each.time_ns, lambda each=each: player.play(each))  # type: ignore[misc]
    with _intakes(machine, lambda name: _drop):
        yield facts


def read_inputs(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Input]]:
    """The facts and inputs of a recording.

    Raises:
        ConfigurationError: it is none; says the line.
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        facts: dict[str, Any] = {}
        inputs: list[Input] = []
        number = 0
        for number, line in enumerate(file, 1):
            try:
                if number == 1:
                    facts = _facts(json.loads(line))
                else:
                    inputs.append(_input(json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise _no_recording(path, f"line {number}: {error}") from None
    if not number:
        raise _no_recording(path, "it is empty")
    return facts, inputs


def _no_recording(path: str | os.PathLike[str], why: str) -> ConfigurationError:
    return ConfigurationError(f"{os.fspath(path)} is no recording of inputs: {why}")


def _facts(head: Any) -> dict[str, Any]:
    if not isinstance(head, dict) or {key: head.get(key) for key in FORMAT} != FORMAT:
        raise ValueError("it is not of this version")
    facts = head.get("facts")
    if not isinstance(facts, dict):
        raise ValueError("it has no facts")
    return facts


def _input(entry: Any) -> Input:
    fields = {field.name for field in attrs.fields(Input)}
    if not isinstance(entry, dict) or entry.keys() != fields:
        raise ValueError(f"it is not an input, which has {', '.join(sorted(fields))}")
    time_ns, instructions = entry["time_ns"], entry["instructions"]
    if not _is_count(time_ns):
        raise ValueError(f"time_ns is {time_ns!r}, and no number of nanoseconds")
    if instructions is not None and not _is_count(instructions):
        raise ValueError(f"instructions is {instructions!r}, and no number of them")
    for name in ("device", "data"):
        if not isinstance(entry[name], str):
            raise ValueError(f"{name} is {entry[name]!r}, and no text")
    return Input(time_ns, instructions, entry["device"], bytes.fromhex(entry["data"]))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


class _Recorder:
    """Takes the input of one console."""

    def __init__(self, machine: Machine, name: str, file: TextIO) -> None:
        self._machine = machine
        self._console = _consoles(machine)[name]
        self._name = name
        self._file = file

    async def take(self, data: bytes) -> None:
        """In both runs the device gets it by a timer, at a time of its own."""
        clock, due = self._machine.clock, asyncio.Event()
        time_ns = clock.now_ns + 1
        timer = clock.call_at_ns(time_ns, due.set)
        try:
            await due.wait()
        finally:
            timer.cancel()
        entry = Input(time_ns, self._machine.vcpus[0].stats.numInsts, self._name, data)
        _write(self._file, {**attrs.asdict(entry), "data": data.hex()})
        await self._console.send(data)


class _Player:
    """Gives the consoles what they got then."""

    def __init__(self, machine: Machine) -> None:
        self._consoles = _consoles(machine)
        self._sending: set[asyncio.Task[None]] = set()

    def play(self, each: Input) -> None:
        task = asyncio.get_running_loop().create_task(self._consoles[each.device].send(each.data))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)


@contextlib.contextmanager
def _intakes(machine: Machine, intake_of: Any) -> Iterator[None]:
    consoles = _consoles(machine)
    try:
        for name, console in consoles.items():
            console.intake = intake_of(name)
        yield
    finally:
        for console in consoles.values():
            console.intake = None


async def _drop(data: bytes) -> None:
    pass


def _consoles(machine: Machine) -> dict[str, Any]:
    """The devices whose connections bring input."""
    return {name: each for name, each in machine.devices.items() if hasattr(each, "intake")}


def _check_time(machine: Machine) -> None:
    machine.check_open()
    if not isinstance(asyncio.get_running_loop(), SimulationLoop):
        raise ConfigurationError(
            'only simulated time can be repeated: kvmaio.run(main(), time="simulated")'
        )


def _write(file: TextIO, entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()
