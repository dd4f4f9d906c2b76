"""Inputs from outside, recorded and played again."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest

from kvmaio import Machine, real_time
from kvmaio.boot import Flat
from kvmaio.devices import Uart16550
from kvmaio.errors import ConfigurationError
from kvmaio.replay import Input, read_inputs, recording, replaying
from kvmaio.trace import Record
from tests.assembler import assemble
from tests.simulation.support import PATIENCE, simulate

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(60 * PATIENCE)]
on_both = pytest.mark.kvmaio_cpu("kvm", "soft")

# Halts; the handler of IRQ 4 (vector 0x24) echoes each byte, and a zero ends it.
ECHO = (
    *("cli", "mov word ptr [0x90], offset handler", "mov word ptr [0x92], 0"),
    *("mov dx, 0x3f9", "mov al, 1", "out dx, al", "mov dx, 0x3fc", "mov al, 8", "out dx, al"),
    *("sti", "wait: hlt", "jmp wait"),
    *("handler: mov dx, 0x3f8", "in al, dx", "test al, al", "jz over", "out dx, al", "iret"),
    *("over: cli", "hlt"),
)


class Timed(Uart16550):
    """Keeps when it got what."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[tuple[int, bytes]] = []

    async def send(self, data: bytes | str) -> None:
        assert isinstance(data, bytes)
        self.got.append((self.clock.now_ns, data))
        await super().send(data)


async def session(
    cpu: str, path: Path, how, pieces: list[bytes]
) -> tuple[Timed, list[Record], int | None]:
    """A guest that echoes what a socket brings, at times that the world decides: the console, the
    trace and the count of instructions.
    """
    records: list[Record] = []
    ours, theirs = socket.socketpair()
    async with Machine(memory="1M", cpu=cpu) as machine:
        uart = machine.attach(Timed(), pio=0x3F8, irq=4)
        machine.load(Flat(assemble(ECHO, "real16", 0x1000), 0x1000))
        with how(machine, path), machine.trace(records.append):
            await uart.connect_socket(ours)
            run = asyncio.create_task(machine.run())
            for piece in pieces:
                async with real_time():
                    await asyncio.sleep(0.003)
                    theirs.sendall(piece)
            async with asyncio.timeout(10), real_time():
                await run
        instructions = machine.vcpus[0].stats.numInsts
    theirs.close()
    return uart, records, instructions


@on_both
def test_the_same_input_at_the_same_times(kvmaio_cpu, tmp_path):
    path = tmp_path / "inputs"
    pieces = [b"a", b"bc", b"d", b"\0"]
    first, trace, count = simulate(session(kvmaio_cpu, path, recording, pieces))
    assert first.output == b"abcd"
    second, again, recount = simulate(session(kvmaio_cpu, path, replaying, [b"noise", b"noise"]))
    assert (second.got, second.output) == (first.got, b"abcd")
    facts, inputs = read_inputs(path)
    assert facts == {}
    assert [(each.time_ns, each.data) for each in inputs] == first.got
    assert {each.device for each in inputs} == {"timed0"}
    if kvmaio_cpu == "soft":  # which is exact: all that is traced, with its times
        assert len(trace) > 20 and again == trace
        assert count is not None and recount == count
        assert all(each.instructions is not None for each in inputs)


def test_facts_are_kept(tmp_path):
    async def main() -> None:
        async with Machine(memory="1M") as machine:
            with recording(machine, tmp_path / "inputs", clock="2020-01-01"):
                pass
            with replaying(machine, tmp_path / "inputs") as facts:
                assert facts == {"clock": "2020-01-01"}

    simulate(main())


async def test_refused_without_simulated_time(tmp_path):
    async with Machine(memory="1M") as machine:
        with (
            pytest.raises(ConfigurationError, match="only simulated time"),
            recording(machine, tmp_path / "inputs"),
        ):
            pass


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "empty"),
        ("no JSON\n", "line 1: Expecting value"),
        ("[]\n", "line 1: .* version"),
        ("\0\xff\n", "line 1: "),
        ("[" * 100_000 + "\n", "line 1: "),
        ('{"kvmaio inputs": 2, "facts": {}}\n', "line 1: .* version"),
        ('{"kvmaio inputs": 1}\n', "line 1: .* no facts"),
        ('{"kvmaio inputs": 1, "facts": [["a", 1]]}\n', "line 1: .* no facts"),
    ],
    ids=str,
)
def test_foreign_files_are_refused(tmp_path, content, why):
    path = tmp_path / "inputs"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=f"is no recording of inputs: .*{why}"):
        read_inputs(path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"time_ns": "x"}, "time_ns is 'x'"),
        ({"time_ns": -5}, "time_ns is -5"),
        ({"time_ns": True}, "time_ns is True"),
        ({"time_ns": 1 << 63}, "time_ns is 92"),
        ({"time_ns": float("nan")}, "time_ns is nan"),
        ({"instructions": "1"}, "instructions is '1'"),
        ({"device": ["x"]}, r"device is \['x'\]"),
        ({"data": 61}, "data is 61"),
        ({"data": "zz"}, "non-hexadecimal"),
        ({"more": 1}, "not an input"),
        (None, "not an input"),
    ],
    ids=str,
)
def test_damaged_inputs_are_refused_with_their_line(tmp_path, change, why):
    good = {"time_ns": 1, "instructions": None, "device": "uart", "data": "61"}
    bad = {} if change is None else good | change
    lines = [{"kvmaio inputs": 1, "facts": {}}, good, bad]
    path = tmp_path / "inputs"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigurationError, match=f"recording of inputs: line 3: .*{why}"):
        read_inputs(path)


def test_unknown_device_is_refused(tmp_path):
    async def main() -> None:
        entry = {"time_ns": 1, "instructions": None, "device": "tty", "data": "00"}
        head = {"kvmaio inputs": 1, "facts": {}}
        (tmp_path / "inputs").write_text(f"{json.dumps(head)}\n{json.dumps(entry)}\n")
        assert read_inputs(tmp_path / "inputs") == ({}, [Input(1, None, "tty", b"\0")])
        async with Machine(memory="1M") as machine:
            with (
                pytest.raises(ConfigurationError, match="inputs for tty, and machine has no"),
                replaying(machine, tmp_path / "inputs"),
            ):
                pass

    simulate(main())
