"""Checkpoints at moments that nobody has chosen."""

from __future__ import annotations

import asyncio
import os
import random
import re
import struct
import sys
from pathlib import Path

import pytest

from kvmaio import Checkpoint, Exited, Machine
from kvmaio.boot import Firmware, Flat
from kvmaio.cli.board import build_board
from kvmaio.devices import DebugExit
from tests.assembler import assemble
from tests.engine.support import deadline, until

pytestmark = pytest.mark.kvm

SEABIOS = Path("/usr/share/seabios/bios.bin")
END = "No bootable device"
MOMENTS = (15, 0.01, 0.4), (5, 0.4, 5.0)
"""How many, from and to which second: the first part is all work, the second all waiting."""

# ---- AVX --------------------------------------------------------------------------------

SWITCHES = 200
# Sums in all four lanes of a ymm register, upper halves included, until the host says stop; the
# other registers are the summands, so that losing any of them shows.
AVX = (
    *("mov rbx, 0x3000", "xor ecx, ecx"),
    *(f"vbroadcastsd ymm{n}, [rbx + {8 * n}]" for n in range(1, 16)),
    *("vmovupd ymm1, [rbx + 0x80]", "vxorpd ymm0, ymm0, ymm0"),
    "again:",
    *(f"vaddpd ymm0, ymm0, ymm{n}" for n in range(1, 16)),
    *("inc rcx", "cmp byte ptr [rbx + 0x200], 0", "je again"),
    *("vmovupd [rbx + 0x100], ymm0", "mov [rbx + 0x120], rcx", "mov al, 1", "out 0xf4, al", "hlt"),
)
LANES = (1.0, 2.0, 3.0, 4.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_guest_computing_in_avx_registers_at_200_moments():
    code = assemble(AVX, "user64", 0x1000)
    async with deadline(120):
        saved = None
        moments = random.Random(7)
        for _ in range(SWITCHES):
            async with avx_machine(code, saved) as machine:
                run = asyncio.create_task(machine.run())
                await until(lambda: machine.vcpus[0].inside)
                await asyncio.sleep(moments.uniform(0, 0.004))
                saved = await machine.checkpoint()
                machine.stop()
                await run
        async with avx_machine(code, saved) as machine:
            machine.memory.write(0x3200, b"\1")
            assert await machine.run() == Exited(3)
            *result, rounds = struct.unpack("<4dQ", machine.memory.read(0x3100, 40))
    assert rounds > SWITCHES
    assert result == [rounds * (lane + sum(range(2, 16))) for lane in LANES]


class avx_machine:
    """A machine with the AVX guest, from its start or from a checkpoint."""

    def __init__(self, code: bytes, saved: Checkpoint | None) -> None:
        self.machine = Machine(memory="2M")
        self.code, self.saved = code, saved

    async def __aenter__(self) -> Machine:
        machine = await self.machine.__aenter__()
        machine.attach(DebugExit(), pio=0xF4)
        if self.saved is not None:
            await machine.restore(self.saved)
            return machine
        machine.load(Flat(self.code, 0x1000, "user64"))
        machine.memory.write(0x3000, struct.pack("<16d", *map(float, range(16))))
        machine.memory.write(0x3080, struct.pack("<4d", *LANES))
        return machine

    async def __aexit__(self, *_: object) -> None:
        await self.machine.close()


# ---- SeaBIOS ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not SEABIOS.exists(), reason="SeaBIOS is not installed (package seabios)")
async def test_seabios_at_20_moments_of_its_boot(tmp_path):
    """Restored in fresh processes, each ends with the same text in total."""
    chosen = random.Random(20)
    moments = sorted(chosen.uniform(*span) for count, *span in MOMENTS for _ in range(count))
    before: list[bytes] = []
    async with deadline(300):
        async with Machine(memory="64M", irqchip="kernel") as machine:
            board = build_board(machine, pc=True, vcpus=1)
            console = board.debug_consoles[0]
            machine.load(Firmware(SEABIOS))
            started = asyncio.get_running_loop().time()
            run = asyncio.create_task(machine.run())
            for number, moment in enumerate(moments):
                await asyncio.sleep(started + moment - asyncio.get_running_loop().time())
                saved = await machine.checkpoint()
                before.append(console.output)
                saved.save(tmp_path / f"{number}")
            await console.expect(END.encode())
            whole = console.output
            machine.stop()
            await run
        assert len(set(before)) > 3, "moments of the boot, and not all of them behind it"
        limit = asyncio.Semaphore(max(2, os.cpu_count() or 2))
        after = await asyncio.gather(
            *(resumed(tmp_path / f"{number}", limit) for number in range(len(moments)))
        )
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        assert ending(one + other) == ending(whole), f"moment {number}: {moments[number]:.3f} s"


def ending(text: bytes) -> str:
    """Up to the end that is waited for; the frequency is measured anew at each boot."""
    found = text.decode("latin-1")
    return re.sub(r"CPU Mhz=\d+", "CPU Mhz", found[: found.index(END) + len(END)])


async def resumed(path: Path, limit: asyncio.Semaphore) -> bytes:
    """What is still printed from there on, by a process of its own."""
    async with limit:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from kvmaio.cli import main; main()", "run"),
            *("--from", str(path), "--until", END, "--timeout", "60"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
    return out
