"""The GDB server, with GDB itself in batch mode, and packet by packet where GDB would not do."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import termios
from contextlib import asynccontextmanager

import pytest

import kvmaio.vcpu.vcpu
from kvmaio import Exited, GuestError, Halted, Stopped
from kvmaio.checkpoint import Checkpoint
from kvmaio.errors import ConfigurationError
from kvmaio.gdb.packets import INTERRUPT, PacketStream
from kvmaio.testing import BenchMachine
from tests.engine.support import deadline, host_only, is_pvm
from tests.test_cli import KVMAIO, TIME_LIMIT_S, Terminal

pytestmark = pytest.mark.kvm
needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb (package gdb)")

MODES = ["real16", "prot32", "long64", "user64"]


@pytest.fixture
def steps(mode, kvmaio_cpu):
    """The CPU model can single-step in this mode."""
    if is_pvm and (mode, kvmaio_cpu) == ("user64", "kvm"):
        pytest.skip("PVM runs 64-bit user mode natively, and cannot step there")


COUNTS = (
    *("mov ecx, 3", "mov ebx, 0x2000", "again: inc byte ptr [{b}]", "nop", "dec ecx"),
    *("jnz again", "mov al, 'A'", "mov dx, 0x3f8", "out dx, al", "mov al, 1", "out 0xf4, al"),
)


def counts(boot, mode, **options):
    """A guest that counts to 3 at 0x2000, prints a letter and exits with 3."""
    pointer = {"real16": "bx", "prot32": "ebx"}.get(mode, "rbx")
    lines = [line.format(b=pointer) for line in COUNTS]
    return boot(*lines, mode=mode, memory="2M", **options)


async def gdb(server, *commands):
    """What GDB prints for these commands."""
    arguments = ["-nx", "-batch", "-ex", "set pagination off"]
    for command in (f"target remote {server.host}:{server.port}", *commands):
        arguments += ["-ex", command]
    process = await asyncio.create_subprocess_exec(
        "gdb", *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return output.decode()


def found(text, pattern):
    """All matches of `pattern` in GDB's output."""
    return re.findall(pattern, text, re.MULTILINE)


@needs_gdb
@pytest.mark.parametrize("mode", MODES)
async def test_gdb_looks_and_changes(boot, mode, steps):
    machine = counts(boot, mode)
    async with deadline(40), machine.gdb(port=0) as server:
        running = asyncio.create_task(machine.run())
        text = await gdb(
            server,
            *("stepi", "stepi", "p $pc == 0x1000", "p/x $ebx", "x/i $pc"),
            *("p/x *(unsigned char *)0x2000", "set var *(unsigned char *)0x2000 = 0x40"),
            *("stepi", "p/x *(unsigned char *)0x2000", "set $ecx = 1", "p/x $eflags"),
            *("p $xmm1.uint128", "set $xmm1.uint128 = 77", "p $xmm1.uint128", "p $mxcsr"),
            *("p $st0", "p/x $cr0 & 1", "set $pc = $pc", "info threads", "detach"),
        )
        assert await running == Exited(3), text
    assert found(text, r"^\$\d+ = (.*)$") == [
        *("0", "0x2000", "0x0", "0x41", "0x6" if mode != "user64" else "0x3006"),
        *("0", "77", "8064", "0", "0x0" if mode == "real16" else "0x1"),
    ]
    assert found(text, r"^=> 0x[0-9a-f]+:\s+(\w+)") == ["incb"]
    assert "Thread 1 (cpu0, Running)" in text
    assert machine.memory.read(0x2000, 1) == b"\x41"  # it counted once: ecx was 1
    assert machine.serial.output == b"A"


@needs_gdb
@pytest.mark.parametrize("mode", MODES)
async def test_gdb_stops_at_breakpoints_and_watchpoints(boot, mode, steps):
    machine = counts(boot, mode)
    nop = {"real16": 0x100E, "prot32": 0x100C, "long64": 0x100C}.get(mode, 0x100C)
    async with deadline(40), machine.gdb(port=0) as server:
        running = asyncio.create_task(machine.run())
        text = await gdb(
            server,
            *(f"hbreak *{nop}", "continue", "x/i $pc", "delete"),
            *("watch *(unsigned char *)0x2000", "continue", "delete", f"break *{nop}"),
            *("continue", "delete", "continue"),
        )
        assert await running == Exited(3), text
    assert len(found(text, r"^Breakpoint 1, ")) == 1 and found(text, r"^=> .*\snop") != []
    assert "Old value = 1" in text and "New value = 2" in text
    assert len(found(text, r"^Breakpoint 3, ")) == 1
    assert "[Inferior 1 (Remote target) exited with code 03]" in text


@needs_gdb
async def test_more_breakpoints_than_the_processor_has(boot):
    machine = counts(boot, "prot32")
    async with deadline(40), machine.gdb(port=0) as server:
        running = asyncio.create_task(machine.run())
        breaks = [f"break *{address}" for address in (0x5000, 0x5001, 0x5002, 0x5003, 0x100C)]
        text = await gdb(server, *breaks, "continue", "p/x $pc", "delete", "continue")
        assert await running == Exited(3), text
    assert found(text, r"^\$1 = (.*)$") == ["0x100c"]


@needs_gdb
async def test_gdb_sees_how_a_guest_ends(boot):
    machine = boot("mov ax, 7", "in al, 0x77", "hlt")
    async with deadline(40), machine.gdb(port=0) as server:
        running = asyncio.create_task(machine.run())
        text = await gdb(server, "continue", "p/x $eax", "continue")
        with pytest.raises(GuestError, match="0x77"):
            await running
    assert "SIGABRT" in text and "kvmaio: UnmappedAccess: " in text, text
    assert found(text, r"^\$1 = (.*)$") == ["0x7"]


async def test_where_nothing_can_stop_the_guest_gdb_is_told(boot, kvmaio_cpu):
    if not is_pvm or kvmaio_cpu != "kvm":
        pytest.skip("only PVM in 64-bit user mode can neither step nor stop")
    machine = counts(boot, "user64")
    async with deadline(), machine.gdb(port=0) as server, connected(server) as client:
        running = asyncio.create_task(machine.run())
        client.stream.send("vCont;s:1")
        told = await client.reply()
        assert told[0] == "O" and b"natively" in bytes.fromhex(told[1:])
        assert await client.reply() == "T05thread:1;"
        assert machine.vcpus[0].context.rip == 0x1000  # it has not moved
        client.stream.send("D")
        assert await running == Exited(3)


@needs_gdb
async def test_monitor_commands_and_a_restored_machine(boot, tmp_path, kvmaio_cpu):
    machine = counts(boot, "prot32")
    file = tmp_path / "at.ckpt"
    async with deadline(40), machine.gdb(port=0) as server:
        running = asyncio.create_task(machine.run())
        text = await gdb(
            server,
            *("stepi", "stepi", "stepi", "monitor stats", "monitor devices", "monitor registers"),
            *(f"monitor checkpoint {file}", "monitor what", "kill"),
        )
        assert await running == Stopped("killed by gdb"), text
    assert "cpu0.numVMExits" in text and "(Uart16550) at pio 0x3f8..0x3ff" in text
    assert "segments:" in text and f"saved to {file}" in text
    assert "monitor checkpoint FILE" in text
    async with BenchMachine(memory="2M", cpu=kvmaio_cpu) as restored:
        await restored.restore(Checkpoint.load(file))
        async with deadline(40), restored.gdb(port=0) as server:
            running = asyncio.create_task(restored.run())
            text = await gdb(server, "x/i $pc", "stepi", "p/x $pc", "continue")
            assert await running == Exited(3), text
    assert found(text, r"^=> .*\s(nop)") == ["nop"] and found(text, r"^\$1 = (.*)$") == ["0x100d"]


@needs_gdb
def test_the_command_waits_for_gdb(tmp_path):
    guest = tmp_path / "guest.bin"
    guest.write_bytes(bytes.fromhex("b002 e6f4"))  # mov al, 2; out 0xf4, al
    command = [KVMAIO, "run", guest, "--gdb", "0", "--timeout", str(TIME_LIMIT_S)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        where = re.fullmatch(r"kvmaio: waiting for gdb: target remote (.*)\n", line)
        assert where is not None, line
        commands = [f"target remote {where[1]}", "stepi", "p/x $eax", "set $eax = 3", "continue"]
        options = [option for command in commands for option in ("-ex", command)]
        result = subprocess.run(
            ["gdb", "-nx", "-batch", *options], capture_output=True, text=True, timeout=TIME_LIMIT_S
        )
        assert "$1 = 0x2" in result.stdout and "exited with code 07" in result.stdout
        assert process.wait(TIME_LIMIT_S) == 7


def test_ctrl_c_ends_the_wait_for_gdb(tmp_path):
    (tmp_path / "guest.bin").write_bytes(b"\xf4")
    with Terminal("run", str(tmp_path / "guest.bin"), "--gdb", "0") as terminal:
        terminal.expect(b"waiting for gdb")
        os.write(terminal.fd, b"\x03")
        assert terminal.wait() == 130
        assert termios.tcgetattr(terminal.fd) == terminal.before


@pytest.mark.parametrize("where", ["x", "1:2:x", "70000", ""])
def test_impossible_addresses_exit_2(tmp_path, where):
    (tmp_path / "guest.bin").write_bytes(b"\xf4")
    result = subprocess.run(
        [KVMAIO, "run", tmp_path / "guest.bin", "--gdb", where], capture_output=True, timeout=60
    )
    assert result.returncode == 2 and b"[HOST:]PORT" in result.stderr


# ---- packet by packet ----------------------------------------------------------------


class Client:
    """What GDB does, by hand."""

    def __init__(self, reader, writer):
        self.stream = PacketStream(reader, writer)
        self._writer = writer

    async def ask(self, packet):
        self.stream.send(packet)
        return await self.reply()

    async def reply(self):
        payload = await self.stream.read()
        return None if payload is None else payload.decode()

    def interrupt(self):
        self._writer.write(INTERRUPT)


@asynccontextmanager
async def connected(server):
    reader, writer = await asyncio.open_connection(server.host, server.port)
    client = Client(reader, writer)
    try:
        yield client
    finally:
        await client.stream.close()


@pytest.mark.kvmaio_loop("wall", "simulated")
async def test_ctrl_c_stops_a_spinning_guest_and_detach_lets_it_go(boot):
    machine = boot("again: inc ebx", "cmp byte ptr [0x2000], 0", "je again", "hlt")
    async with deadline(), machine.gdb(port=0, wait=False) as server:
        running = asyncio.create_task(machine.run())
        async with connected(server) as client:
            assert (await client.ask("?")).startswith("T02")
            before = machine.vcpus[0].context.rbx
            client.stream.send("vCont;c")
            await asyncio.sleep(0.2)
            client.interrupt()
            assert await client.reply() == "T02thread:1;"
            assert machine.vcpus[0].context.rbx > before and not running.done()
            assert await client.ask("M2000,1:01") == "OK"
            assert await client.ask("D") == "OK"
        assert await running == Halted()


async def test_a_gdb_that_just_goes_leaves_the_guest_running(boot):
    machine = boot("again: inc ebx", "cmp byte ptr [0x2000], 0", "je again", "hlt")
    async with deadline(), machine.gdb(port=0) as server:
        running = asyncio.create_task(machine.run())
        async with connected(server) as client:
            assert await client.ask("Z1,5000,1") == "OK"
            async with connected(server) as second:  # one at a time
                assert await second.reply() is None
            client.stream.send("c")
        while not machine.is_running or not server.is_idle:  # noqa: ASYNC110
            await asyncio.sleep(0)
        machine.memory.write(0x2000, b"\1")
        assert await running == Halted()


async def test_cancelling_run_while_gdb_has_the_guest(boot):
    machine = boot("hlt")
    async with deadline(), machine.gdb(port=0) as server, connected(server) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await machine.run()
        assert await client.ask("?") == "T05thread:1;"
        client.stream.send("c")
        client.interrupt()  # nobody runs it
        assert (await client.reply()).startswith("T02")
        client.stream.send("c")
        running = asyncio.create_task(machine.run())
        assert (await client.reply()).startswith("O")
        assert await client.reply() == "T05thread:1;"
        assert await client.ask("c") == "W00"
        assert await running == Halted()


async def test_vcpus_are_threads(boot):
    machine = boot("again: inc ebx", "jmp again", vcpus=2)
    async with deadline(), machine.gdb(port=0) as server, connected(server) as client:
        running = asyncio.create_task(machine.run())
        assert await client.ask("qfThreadInfo") == "m1,2"
        assert await client.ask("qsThreadInfo") == "l"
        assert bytes.fromhex(await client.ask("qThreadExtraInfo,2")).startswith(b"cpu1, ")
        assert [await client.ask(f"T{n}") for n in (1, 2, 3)] == ["OK", "OK", "E01"]
        machine.vcpus[1].context.rax = 0x1122
        assert await client.ask("Hg2") == "OK"
        assert (await client.ask("p0")).startswith("2211")
        assert await client.ask("vKill;1") == "OK"
        assert await running == Stopped("killed by gdb")


@host_only(pvm=True, why="VMX and SVM do not step beside KVM's own local APICs; GDB is told")
async def test_a_vcpu_steps_alone_or_with_the_others(boot):
    machine = boot("again: inc ebx", "jmp again", vcpus=2)
    other = machine.vcpus[1]
    other.start_up(0x1)  # at the same code
    async with deadline(), machine.gdb(port=0) as server, connected(server) as client:
        running = asyncio.create_task(machine.run())
        for _ in range(4):
            assert await client.ask("vCont;s:1") == "T05thread:1;"
        assert (machine.vcpus[0].context.rbx, other.context.rbx) == (2, 0)
        assert await client.ask("vCont;s:1;c") == "T05thread:1;"
        assert await client.ask("qC") == "QC1"
        client.stream.send("vCont;c")
        await asyncio.sleep(0.2)
        client.interrupt()
        assert (await client.reply()).startswith("T02")
        assert other.context.rbx > 0
        assert await client.ask("vKill;1") == "OK"
        await running


async def test_a_step_that_is_refused_stops_where_it_is(boot, monkeypatch):
    """As beside KVM's own local APICs on VMX and SVM: GDB is told, and nothing runs."""

    def refuse(*_: object) -> None:
        raise ConfigurationError("no steps here")

    machine = boot("again: inc ebx", "jmp again")
    monkeypatch.setattr(kvmaio.vcpu.vcpu, "instruction_stop", refuse)
    async with deadline(), machine.gdb(port=0) as server, connected(server) as client:
        running = asyncio.create_task(machine.run())
        assert "no steps here" in bytes.fromhex((await client.ask("vCont;s:1"))[1:]).decode()
        assert await client.reply() == "T05thread:1;"
        assert machine.vcpus[0].context.rbx == 0
        assert await client.ask("vKill;1") == "OK"
        await running


async def test_what_is_unknown_or_impossible(boot):
    machine = boot("hlt", memory="64K")
    async with deadline(), machine.gdb(port=0) as server, connected(server) as client:
        assert "PacketSize" in await client.ask("qSupported:swbreak+")
        for unknown in ("vMustReplyEmpty", "X1000,0:", "Z5,1000,1", "qTStatus"):
            assert await client.ask(unknown) == ""
        for wrong in ("m1000", "mx,1", "p99", "Hg7", "P1=zz", "G12"):
            assert (await client.ask(wrong)) in ("E01", "OK")
        assert await client.ask("mfff0000,4") == "E14"
        assert (await client.ask("Mfff0000,1:00")).startswith("E.")
        assert await client.ask("QStartNoAckMode") == "OK"


async def test_the_target_description_is_complete_in_pieces(boot):
    machine = boot("hlt")
    async with deadline(), machine.gdb(port=0) as server, connected(server) as client:
        text, reply = "", "m"
        while reply.startswith("m"):
            where = f"{len(text):x},100"
            reply = await client.ask(f"qXfer:features:read:target.xml:{where}")
            text += reply[1:]
        assert text.startswith("<?xml") and text.endswith("</target>")
        registers = len(await client.ask("g")) // 2
        sizes = [int(bits) // 8 for bits in re.findall(r'bitsize="(\d+)"', text)]
        assert registers == sum(sizes)
        everything = await client.ask("g")
        assert await client.ask(f"G{everything}") == "OK"
        assert await client.ask("g") == everything
