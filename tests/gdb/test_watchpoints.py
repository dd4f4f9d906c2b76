"""Watchpoints over GDB's protocol: by the software CPU, and where KVM cannot, through it."""

from __future__ import annotations

import asyncio

import pytest

from kvmaio import Exited, Stopped
from kvmaio.linear import code_address
from kvmaio.platform import can_assist
from tests.engine.support import deadline, host_only
from tests.gdb.test_gdb import connected, found, gdb, needs_gdb

pytestmark = pytest.mark.kvm

MODES = ["real16", "prot32", "long64"]
MOVED = "kvmaio: KVM cannot watch this: the guest goes on in the software CPU"
BACK = "kvmaio: no watchpoints are left: the guest goes on under KVM"

GUEST = (
    *("mov ecx, 3", "again: mov al, [0x2000]", "inc byte ptr [0x2004]", "dec ecx", "jnz again"),
    *("mov al, 1", "out 0xf4, al"),
)
"""Reads 0x2000 and counts at 0x2004, three times each; exits with 3."""


@pytest.fixture
def cpu(kvmaio_cpu):
    """`Machine(cpu=...)` where the software CPU may stand in for KVM."""
    if not can_assist():
        pytest.skip("needs the software CPU: pip install 'kvmaio[soft]'")
    return "auto" if kvmaio_cpu == "kvm" else "soft"


def kind(machine):
    """The CPU model that it runs on."""
    return machine.vcpus[0].model.kind


def told(reply):
    """A line on GDB's console, out of its packet."""
    assert reply[0] == "O", reply
    return bytes.fromhex(reply[1:]).decode()


@needs_gdb
@pytest.mark.parametrize("mode", MODES)
async def test_gdb_watches_reads_writes_and_both(boot, mode, cpu):
    machine = boot(*GUEST, mode=mode, memory="2M", cpu=cpu)
    native = kind(machine)
    read, write = {"real16": (0x1009, 0x100D), "prot32": (0x100A, 0x1010)}.get(
        mode, (0x100C, 0x1013)
    )
    async with deadline(40), machine.gdb(port=0) as server:
        running = asyncio.create_task(machine.run())
        text = await gdb(
            server,
            *("rwatch *(unsigned char *)0x2000", "watch *(unsigned char *)0x2004"),
            *("continue", "p/x $pc", "continue", "p/x $pc", "delete"),
            *("awatch *(unsigned char *)0x2004", "continue", "p/x $pc", "stepi", "delete"),
            "continue",
        )
        assert await running == Exited(3), text
        assert kind(machine) == native  # again
    assert found(text, r"^\$\d+ = (.*)$") == [hex(read), hex(write), hex(write)], text
    assert len(found(text, r"^Hardware read watchpoint 1: ")) == 2
    assert "Old value = 0 '\\000'\nNew value = 1 '\\001'" in text
    assert "Old value = 1 '\\001'\nNew value = 2 '\\002'" in text  # of the access watchpoint
    assert text.count(MOVED) == text.count(BACK) == (native == "kvm")
    assert "[Inferior 1 (Remote target) exited with code 03]" in text


LONG = ("mov ecx, 3000000", "again: mov [0x2004], ecx", "dec ecx", "jnz again", "mov [0x2000], cl")


async def test_watching_takes_no_single_steps(boot, cpu):
    """Nine million instructions, which would be minutes."""
    machine = boot(*LONG, "hlt", mode="prot32", cpu=cpu)
    async with deadline(), machine.gdb(port=0) as server, connected(server) as client:
        running = asyncio.create_task(machine.run())
        assert await client.ask("Z4,2000,1") == "OK"
        assert await client.ask("Z2,3000,1000") == "OK"
        client.stream.send("c")
        if cpu == "auto":
            assert MOVED in told(await client.reply())
        assert await client.reply() == "T05watch:2000;thread:1;"
        assert machine.vcpus[0].context.rcx == 0
        assert await client.ask("vKill;1") == "OK"
        assert await running == Stopped("killed by gdb")


@pytest.mark.kvmaio_loop("wall", "simulated")
async def test_a_step_tells_of_its_access_and_only_then(boot, cpu):
    machine = boot(*GUEST, mode="prot32", cpu=cpu)
    (vcpu,) = machine.vcpus
    async with deadline(), machine.gdb(port=0) as server, connected(server) as client:
        running = asyncio.create_task(machine.run())
        assert await client.ask("Z3,2000,4") == "OK"
        client.stream.send("vCont;s:1")
        if cpu == "auto":
            assert MOVED in told(await client.reply())
        assert await client.reply() == "T05thread:1;"
        assert await client.ask("vCont;s:1") == "T05watch:2000;thread:1;"
        assert code_address(vcpu.context) == 0x100A
        assert await client.ask("vCont;s:1") == "T05thread:1;"
        assert await client.ask("z3,2000,4") == "OK"
        assert await client.ask("vCont;s:1") == "T05thread:1;"
        assert kind(machine) == "soft"  # for one instruction, it does not go back
        client.stream.send("D")
        assert await running == Exited(3)
        assert kind(machine) == ("kvm" if cpu == "auto" else "soft")


async def test_watchpoints_and_breakpoints_go_with_gdb(boot, cpu):
    machine = boot("again: inc byte ptr [0x2004]", "cmp byte ptr [0x2000], 0", "je again", "hlt")
    async with deadline(), machine.gdb(port=0) as server:
        running = asyncio.create_task(machine.run())
        async with connected(server) as client:
            assert await client.ask("Z4,2001,1") == "OK"
            assert await client.ask("Z1,100b,1") == "OK"  # the HLT
            client.stream.send("c")
            await asyncio.sleep(0.1)
        while not server.is_idle:  # noqa: ASYNC110
            await asyncio.sleep(0)
        machine.memory.write(0x2000, b"\1\1")
        await running
    assert code_address(machine.vcpus[0].context) == 0x100C


async def test_the_thread_that_made_the_access_is_told(boot):
    if not can_assist():
        pytest.skip("needs the software CPU: pip install 'kvmaio[soft]'")
    machine = boot("again: jmp again", vcpus=2, cpu="soft", irqchip="devices")
    machine.memory.write(0x3000, bytes.fromhex("fec0 a20020 ebf9"))  # inc al; mov [0x2000], al
    machine.vcpus[1].start_up(0x3)
    async with deadline(), machine.gdb(port=0) as server, connected(server) as client:
        running = asyncio.create_task(machine.run())
        assert await client.ask("Z2,2000,1") == "OK"
        for turn in (1, 2, 3):
            assert await client.ask("vCont;c") == "T05watch:2000;thread:2;"
            assert machine.memory.read(0x2000, 1)[0] == turn
        assert await client.ask("vKill;1") == "OK"
        assert await running == Stopped("killed by gdb")


# ---- where it cannot be had ----------------------------------------------------------------------


@pytest.mark.kvmaio_cpu("kvm")
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"cpu": "kvm"}, 'cpu="auto"'),
        ({"cpu": "auto", "irqchip": "kernel"}, "irqchip='kernel'"),
    ],
)
async def test_gdb_is_told_why_reads_cannot_be_watched(boot, options, why):
    machine = boot(*GUEST, mode="prot32", **options)
    async with deadline(), machine.gdb(port=0) as server, connected(server) as client:
        running = asyncio.create_task(machine.run())
        assert await client.ask("Z3,2000,1") == "OK"
        for _ in range(2):
            client.stream.send("c")
            line = told(await client.reply())
            assert "KVM cannot watch reads" in line and why in line
            assert await client.reply() == "T05thread:1;"
            assert machine.vcpus[0].context.rip == 0x1000  # it has not moved
        assert await client.ask("z3,2000,1") == "OK"
        client.stream.send("D")
        assert await running == Exited(3)


@needs_gdb
@pytest.mark.soft
@pytest.mark.kvmaio_cpu("kvm")
@host_only(pvm=True, why="only PVM in 64-bit user mode can neither step nor stop")
async def test_where_kvm_cannot_step_writes_are_watched_by_the_software_cpu(boot):
    machine = boot(*GUEST, mode="user64", memory="2M", cpu="auto")
    async with deadline(40), machine.gdb(port=0) as server:
        running = asyncio.create_task(machine.run())
        text = await gdb(
            server,
            *("watch *(unsigned char *)0x2004", "continue", "delete", "continue"),
        )
        assert await running == Exited(3), text
        assert kind(machine) == "kvm"
    assert "New value = 1 '\\001'" in text and MOVED in text and BACK in text
