"""A device's test does not know its loop; and without a guest, every run is the same."""

import asyncio
import os
import subprocess
import sys

import pytest

from kvmaio import Halted, Machine
from kvmaio.boot import Flat
from kvmaio.bus import Bus
from kvmaio.clock import LoopClock
from kvmaio.devices import CountdownTimer
from kvmaio.devices.countdown_timer import Control, Status
from kvmaio.testing import RecordingIrq
from tests.simulation.support import LOOPS, MS, PATIENCE, Port

pytestmark = pytest.mark.timeout(60 * PATIENCE)

# Vector 0x25's handler acknowledges, writes to port 0x50 and returns until CX is 0:
#   mov word ptr [4*0x25], 0x1029; mov word ptr [4*0x25+2], 0
#   mov dx, 0x40; mov eax, 10000000; out dx, eax       interval: 10 ms
#   mov dx, 0x44; mov eax, 3; out dx, eax              enable, periodic
#   mov cx, 3; sti; rest: hlt; jmp rest
#   mov dx, 0x48; mov eax, 1; out dx, eax; mov dx, 0x50; out dx, al
#   dec cx; jz done; iret; done: hlt
GUEST = bytes.fromhex(
    "c70694002910 c70696000000 ba4000 66b880969800 66ef ba4400 66b803000000 66ef"
    "b90300 fb f4 ebfd ba4800 66b801000000 66ef ba5000 ee 49 7401 cf f4"
)


@pytest.fixture(params=LOOPS)
def run(request):
    """Runs a coroutine on each kind of loop."""

    def run(main):
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            return runner.run(main)

    return run


def test_countdown_timer_on_a_bus(run):
    async def main():
        clock = LoopClock(asyncio.get_running_loop())
        timer, bus = CountdownTimer(), Bus("bus", 16)
        irq = RecordingIrq(clock)
        bus.map(timer, 0)
        timer.clock = clock
        timer.alarm.use_clock(clock)
        timer.irq.connect(irq)
        activity = asyncio.create_task(timer.run())
        started_ns = clock.now_ns
        await bus.write(0x0, 4, 20 * MS)
        await bus.write(0x4, 4, Control.ENABLE | Control.PERIODIC)
        for _ in range(3):
            async with asyncio.timeout(10 * PATIENCE):
                while not irq.level:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            assert await bus.read(0x8, 4) == Status.EXPIRED
            await bus.write(0x8, 4, Status.EXPIRED)
        activity.cancel()
        assert [level for _, level in irq.edges] == [True, False] * 3
        for n, (at_ns, _) in enumerate(irq.edges[::2], 1):
            assert at_ns >= started_ns + n * 20 * MS

    run(main())


@pytest.mark.kvm
@pytest.mark.kvmaio_cpu("kvm", "soft")
def test_countdown_timer_wakes_a_guest(kvmaio_cpu, run):
    async def main():
        async with Machine(memory="1M", cpu=kvmaio_cpu) as machine:
            machine.attach(CountdownTimer(), pio=0x40, irq=5)
            port = machine.attach(Port(), pio=0x50)
            machine.load(Flat(GUEST, address=0x1000))
            started_ns = machine.clock.now_ns
            async with asyncio.timeout(30 * PATIENCE):
                outcome = await machine.run()
            return outcome, [at_ns - started_ns for at_ns, _ in port.writes]

    outcome, times = run(main())
    assert outcome == Halted() and len(times) == 3
    assert all(ns >= n * 10 * MS for n, ns in enumerate(times, 1))


TRACED = """
import asyncio, random
import kvmaio
from kvmaio.clock import LoopClock
from kvmaio.devices import CountdownTimer
from kvmaio.testing import BusDriver

async def drive(name, seed, trace):
    loop, choice = asyncio.get_running_loop(), random.Random(seed)
    async with BusDriver(CountdownTimer()) as bus:
        for _ in range(12):
            await asyncio.sleep(choice.choice((0, 1e-6, 0.001, 0.25)))
            await bus.write(0x0, 4, choice.randrange(5000))
            await bus.write(0x4, 4, choice.randrange(4))
            await bus.advance(choice.randrange(20_000))
            trace.append((loop.time_ns(), name, await bus.read(0x8, 4), bus.irq.edges[-2:]))
            await bus.write(0x8, 4, 1)

async def listen(queue, trace):
    while True:
        item = await queue.get()
        trace.append((asyncio.get_running_loop().time_ns(), item))

async def alarm(n, trace):
    loop = asyncio.get_running_loop()
    timer = CountdownTimer()
    timer.clock = LoopClock(loop)
    timer.alarm.use_clock(timer.clock)
    timer.irq.connect(lambda level: trace.append((loop.time_ns(), f"irq{n}", level)))
    activity = asyncio.create_task(timer.run())
    for offset, value in ((0, 100_000 + n % 3), (4, 3)):
        timer.write(offset, 4, value)
        timer.update()
    while True:
        await asyncio.sleep(0.002)
        timer.write(8, 4, 1)
        timer.update()

async def main():
    trace, queue = [], asyncio.Queue()
    background = {asyncio.create_task(listen(queue, trace))}
    background |= {asyncio.create_task(alarm(n, trace)) for n in range(5)}
    async with asyncio.TaskGroup() as group:
        for seed, name in enumerate("abcd"):
            group.create_task(drive(name, seed, trace))
        for n in range(100):
            await asyncio.sleep(0.003)
            queue.put_nowait(n)
    for task in background:
        task.cancel()
    for entry in trace:
        print(entry)

kvmaio.run(main(), time="simulated")
"""

BUSY = "while True: pass"


def test_the_same_program_twice_gives_the_same_trace_byte_for_byte():
    def trace(hash_seed):
        result = subprocess.run(
            [sys.executable, "-c", TRACED],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            timeout=50 * PATIENCE,
        )
        assert result.stderr == b""
        return result.stdout

    quiet = trace("1")
    load = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    try:
        under_load = trace("2")
    finally:
        for process in load:
            process.kill()
            process.wait()
    assert len(quiet) > 5_000
    assert quiet == under_load
