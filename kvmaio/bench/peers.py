"""Others that do the same, where they are installed: QEMU's debug console, Unicorn's hooks."""

from __future__ import annotations

import asyncio
import importlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from .exits import WARM_UP_EXITS
from .guests import PORT, AsyncDevice, Guest, storming
from .harness import Bench, Gate, Row, Sample, figure, on_one_processor

__all__ = ["measure"]

QEMU = "qemu-system-x86_64"
QEMU_LIMIT_S = 30
FIRMWARE_SIZE = 1 << 16

# mov dx, 0x3f8; L: out dx, al; dec ecx; jmp L
_GUEST = Guest("counting", bytes.fromhex("baf803 ee 6649 ebfb"))


async def measure(bench: Bench) -> AsyncIterator[Row]:
    """A guest that writes one byte after another, under each of them and under kvmaio."""
    if shutil.which(QEMU):
        yield await _qemu(bench)
    else:
        yield Row("peers", "QEMU's debug console", bench.loop, note=f"{QEMU}: not installed")
    try:
        unicorn: Any = importlib.import_module("unicorn")
    except ImportError:
        yield Row("peers", "Unicorn's hooks", bench.loop, note="unicorn: not installed")
    else:
        yield await _unicorn(bench, unicorn)


async def _ours(exits: int) -> float:
    async with storming(_GUEST, AsyncDevice) as storm:
        await storm.run(WARM_UP_EXITS)
        return await storm.run(exits)


def _row(bench: Bench, name: str, samples: list[Sample], gate: Gate | None) -> Row:
    return Row(
        "peers",
        name,
        bench.loop,
        (
            figure("theirs", [s.reference for s in samples], "µs", scale=1e3),
            figure("kvmaio, async handler", [s.value for s in samples], "µs", scale=1e3),
            figure("our speed / theirs", [1 / s.ratio for s in samples], gate=gate),
        ),
    )


async def _qemu(bench: Bench) -> Row:
    # Two lengths, so that start and end of the process cancel out; the longer one
    # long enough that their jitter matters little.
    exits = bench.exits() * (2 if bench.quick else 10)
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="kvmaio-") as folder, on_one_processor():
        few, many = (_write_firmware(Path(folder), count) for count in (1, exits))
        began_s = time.monotonic()
        for _ in range(bench.rounds):
            if samples and time.monotonic() - began_s > QEMU_LIMIT_S:
                break
            start_ns = await _qemu_ns(few)
            whole_ns = await _qemu_ns(many)
            ours_ns = await _ours(exits)
            theirs_ns = (whole_ns - start_ns) / exits
            if theirs_ns > 0:
                samples.append(Sample(ours_ns, theirs_ns))
    if not samples:
        return Row("peers", "QEMU's debug console", bench.loop, note="too short to be measured")
    gate = None if bench.quick else Gate(at_least=0.7)
    return _row(bench, "QEMU's debug console", samples, gate)


def _write_firmware(folder: Path, exits: int) -> Path:
    """A boot ROM that writes `exits` bytes to the debug console and ends QEMU."""
    # L: mov dx, 0xe9; mov ecx, exits; M: out dx, al; dec ecx; jnz M; out 0xf4, al; hlt
    code = (
        bytes.fromhex("bae900 66b9") + exits.to_bytes(4, "little") + bytes.fromhex("ee 6649 75fb")
    )
    code += bytes.fromhex("e6f4 f4")
    # At the reset vector, 16 bytes below the end: jmp to the start.
    reset = b"\xe9" + (0x10000 - 0xFFF3).to_bytes(2, "little")
    path = folder / f"{exits}.bin"
    path.write_bytes(code.ljust(FIRMWARE_SIZE - 16, b"\x90") + reset.ljust(16, b"\x90"))
    return path


async def _qemu_ns(firmware: Path) -> int:
    arguments = (
        *("-accel", "kvm", "-M", "pc", "-m", "8", "-nodefaults", "-display", "none"),
        *("-no-user-config", "-bios", str(firmware)),
        *("-chardev", "null,id=d", "-device", "isa-debugcon,iobase=0xe9,chardev=d"),
        *("-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
    )
    started_ns = time.perf_counter_ns()
    process = await asyncio.create_subprocess_exec(
        QEMU, *arguments, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(QEMU_LIMIT_S):
            _, complaints = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 1:  # isa-debug-exit: 0 << 1 | 1
        raise RuntimeError(f"{QEMU} ended with {process.returncode}: {complaints.decode()}")
    return time.perf_counter_ns() - started_ns


async def _unicorn(bench: Bench, unicorn: Any) -> Row:
    x86 = importlib.import_module("unicorn.x86_const")
    engine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_16)
    engine.mem_map(0, 0x10000)
    engine.mem_write(0x1000, _GUEST.code)
    device = AsyncDevice()
    exits = bench.exits()

    def on_out(uc: Any, port: int, size: int, value: int, _: object) -> None:
        try:
            # As far as a coroutine gets without a loop; ours here never suspends.
            device.write(port - PORT, size, value).send(None)
        except StopIteration:
            return
        except Exception:
            uc.emu_stop()

    engine.hook_add(unicorn.UC_HOOK_INSN, on_out, aux1=x86.UC_X86_INS_OUT)

    def theirs() -> float:
        device.left = exits
        started_ns = time.perf_counter_ns()
        engine.emu_start(0x1000, 0)
        return (time.perf_counter_ns() - started_ns) / exits

    samples = await bench.interleaved(theirs, {"": lambda: _ours(exits)})
    return _row(bench, "Unicorn's hooks", samples[""], None)
