"""Guests in simulated time, under KVM and on the software CPU."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import kvmaio
from kvmaio import Device, Halted, Machine, Register, Stopped
from kvmaio import machine as machine_module
from kvmaio.boot import Flat
from kvmaio.devices import Pit8254
from kvmaio.devices.pit8254 import tick_at, time_of_tick
from kvmaio.testing import settle
from kvmaio.timed_cpu import TimedCpu
from tests.assembler import assemble
from tests.simulation.support import MS, PATIENCE, SPINNING, Port, running, simulate

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(120 * PATIENCE)]
BOTH = pytest.mark.kvmaio_cpu("kvm", "soft")

# mov dx, 0x60; mov al, 0x41; out dx, al; hlt
SENDING = bytes.fromhex("ba6000 b041 ee f4")
# The handler of vector 0x25 reads port 0x60, writes what it got to 0x61 and halts for good:
#   mov word ptr [4*0x25], 0x1012; mov word ptr [4*0x25+2], 0; sti; rest: hlt; jmp rest; nop; nop
#   mov dx, 0x60; in al, dx; mov dx, 0x61; out dx, al; hlt
RECEIVING = bytes.fromhex("c70694001210 c70696000000 fb f4 ebfd 9090 ba6000 ec ba6100 ee f4")
# mov rcx, N; again: loop again; mov dx, 0x61; out dx, al; jmp $
COMPUTING = bytes.fromhex("48c7c1 40420f00 e2fe 66ba6100 ee ebfe")
# sti; rest: hlt; jmp rest
HALTING = bytes.fromhex("fbf4ebfd")


def timed(machine, index=0):
    model = machine.vcpus[index].model
    assert isinstance(model, TimedCpu)
    return model


@pytest.mark.timeout(200 * PATIENCE)
@BOTH
@pytest.mark.parametrize("by", ["alarm", "sleep"])
def test_a_device_that_ticks_every_millisecond_under_a_computing_guest(kvmaio_cpu, by):
    class Ticker(Device):
        size = 1

        def __init__(self):
            self.seen = []

        async def run(self):
            await (self.alarms() if by == "alarm" else self.sleeps())

        async def sleeps(self):
            deadline_ns = self.clock.now_ns
            while True:
                await asyncio.sleep(0.001)
                deadline_ns += MS
                self.seen.append((deadline_ns, self.clock.now_ns))

        async def alarms(self):
            self.alarm.arm(self.clock.now_ns + MS)
            async for deadline_ns in self.alarm:
                self.seen.append((deadline_ns, self.clock.now_ns))
                self.alarm.arm(deadline_ns + MS)

    async def main():
        async with Machine(memory="4M", cpu=kvmaio_cpu, clock_hz=50_000_000) as machine:
            ticker = machine.attach(Ticker(), pio=0x10)
            machine.load(Flat(SPINNING, address=0x1000, mode="user64"))
            start_ns = running().time_ns()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2.0):
                    await machine.run()
            stats = machine.vcpus[0].stats
            return ticker.seen, start_ns, running().time_ns(), stats

    seen, start_ns, end_ns, stats = simulate(main())
    deadlines = [start_ns + n * MS for n in range(1, 2001)]
    # The last one and the end of the run are due at the same moment.
    assert seen in ([(ns, ns) for ns in deadlines], [(ns, ns) for ns in deadlines[:-1]])
    assert end_ns == start_ns + 2_000_000_000
    assert stats.ticksLate == 0 and stats.numCycles > 0


@BOTH
def test_ten_seconds_of_a_halted_guest_pass_at_once(kvmaio_cpu):
    async def main():
        async with Machine(memory="1M", cpu=kvmaio_cpu) as machine:
            machine.load(Flat(HALTING, address=0x1000))
            worked, started = time.process_time(), time.monotonic()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(10):
                    await machine.run()
            took = time.monotonic() - started
            return running().time(), time.process_time() - worked, took

    now, worked, took = simulate(main())
    # The wall clock's limit has slack for a busy host: it tells whether anybody has slept.
    assert now == 10.0 and worked < 0.5 * PATIENCE and took < 5 * PATIENCE


def test_a_guest_halted_in_the_kernel_lets_time_reach_the_next_event():
    async def main():
        loop, seen = running(), []
        async with Machine(memory="1M", cpu="kvm", irqchip="kernel") as machine:
            machine.load(Flat(HALTING, address=0x1000))
            for n in (1, 20, 300):
                loop.call_at_ns(n * MS, lambda: seen.append(loop.time_ns()))
            loop.call_at(0.3, machine.stop, "late enough")
            return await machine.run(), seen, machine.vcpus[0].stats.numHalt

    assert simulate(main()) == (Stopped("late enough"), [MS, 20 * MS, 300 * MS], 0)


def test_that_kvms_own_timers_do_not_follow_simulated_time_is_said_once(caplog):
    machine_module._tell_once.cache_clear()

    async def main(irqchip):
        async with Machine(memory="1M", cpu="kvm", irqchip=irqchip):
            pass

    for irqchip in (None, "devices", "kernel", "kernel", "split"):
        simulate(main(irqchip))
    asyncio.run(main("kernel"))
    kernel, split = caplog.messages
    assert kernel.startswith("""simulated time with irqchip="kernel": KVM's own timers count the""")
    assert split.startswith('simulated time with irqchip="split": ')
    assert 'irqchip="devices" follows simulated time' in kernel


@pytest.mark.parametrize("schedule", ["parallel", "sequential"])
@BOTH
def test_an_access_happens_at_the_local_time_of_its_vcpu(kvmaio_cpu, schedule):
    """Two machines that both compute, then write: each write at its own time."""

    async def main():
        seen = []
        async with (
            Machine(memory="4M", cpu=kvmaio_cpu, name="a") as a,
            Machine(memory="4M", cpu=kvmaio_cpu, name="b") as b,
        ):
            for machine in (a, b):

                def written(_, machine=machine):
                    seen.append((running().time_ns(), timed(machine).local_ns))
                    if len(seen) == 2:
                        a.stop()
                        b.stop()

                machine.attach(Port(written), pio=0x61)
                machine.load(Flat(COMPUTING, address=0x1000, mode="user64"))
            await asyncio.gather(a.run(), b.run())
            return seen, [m.vcpus[0].stats.ticksLate for m in (a, b)]

    seen, late = simulate(main(), schedule=schedule, quantum_ns=5 * MS)
    assert len(seen) == 2 and seen == sorted(seen)
    assert all(now_ns == local_ns for now_ns, local_ns in seen)
    assert late == [0, 0]


@pytest.mark.parametrize("schedule", ["parallel", "sequential"])
@BOTH
def test_an_interrupt_wakes_a_halted_guest_at_once_and_not_at_the_barrier(kvmaio_cpu, schedule):
    quantum_ns = 1_000 * MS * PATIENCE

    async def main():
        async with (
            Machine(memory="4M", cpu=kvmaio_cpu, name="computing") as computing,
            Machine(memory="1M", cpu=kvmaio_cpu, name="halted") as halted,
        ):
            out = computing.attach(Port(lambda _: halted.irq(5).set(True)), pio=0x61)
            computing.load(Flat(COMPUTING, address=0x1000, mode="user64"))
            halted.attach(Port(), pio=0x60)
            answer = halted.attach(Port(), pio=0x61)
            halted.load(Flat(RECEIVING, address=0x1000))
            run = asyncio.create_task(computing.run())
            outcome = await halted.run()
            computing.stop()
            await run
            return outcome, out.writes[0][0], answer.writes[0][0]

    outcome, raised_ns, answered_ns = simulate(main(), schedule=schedule, quantum_ns=quantum_ns)
    assert outcome == Halted() and raised_ns < answered_ns < quantum_ns


@pytest.mark.parametrize("schedule", ["parallel", "sequential"])
@BOTH
def test_a_message_between_guests_arrives_its_latency_later(kvmaio_cpu, schedule):
    """Through an asynchronous link, by the clocks of both machines."""
    latency_s = 0.005

    class Sender(Device):
        size = 1

        def __init__(self, wire):
            self.wire = wire

        def write(self, offset, size, value):
            self.wire.put_nowait((self.clock.now_ns, value))

    class Receiver(Device):
        size = 1
        data = Register(0, int)

        def __init__(self, wire):
            self.wire = wire
            self.received = []

        async def run(self):
            while True:
                sent_ns, self.data = await self.wire.get()
                await asyncio.sleep(latency_s)
                self.received.append((sent_ns, self.clock.now_ns, self.data))
                self.irq.set(True)

    async def main():
        wire: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        async with (
            Machine(memory="1M", cpu=kvmaio_cpu, name="a") as a,
            Machine(memory="1M", cpu=kvmaio_cpu, name="b") as b,
        ):
            a.attach(Sender(wire), pio=0x60)
            a.load(Flat(SENDING, address=0x1000))
            receiver = b.attach(Receiver(wire), pio=0x60, irq=5)
            out = b.attach(Port(), pio=0x61)
            b.load(Flat(RECEIVING, address=0x1000))
            await asyncio.gather(a.run(), b.run())
            sent_local_ns, got_local_ns = timed(a).local_ns, timed(b).local_ns
            return receiver.received, out.writes, sent_local_ns, got_local_ns

    ((sent_ns, arrived_ns, value),), writes, sent_local_ns, got_local_ns = simulate(
        main(), schedule=schedule
    )
    assert arrived_ns == sent_ns + 5 * MS and value == 0x41
    assert sent_ns <= sent_local_ns < arrived_ns  # A's own time, a halt later
    ((got_ns, got),) = writes
    assert got == 0x41 and arrived_ns < got_ns <= got_local_ns
    if kvmaio_cpu == "soft":  # one instruction each nanosecond; an access is not one yet
        assert (sent_ns, got_ns - arrived_ns) == (2, 3)


@BOTH
def test_statistics_go_on_while_an_entry_does(kvmaio_cpu):
    """Nothing ends the entry for 30 ms: no exit, no kick."""

    async def main():
        loop, seen = running(), []
        async with Machine(memory="4M", cpu=kvmaio_cpu, host_factor=0.5) as machine:
            machine.load(Flat(SPINNING, address=0x1000, mode="user64"))
            (vcpu,) = machine.vcpus
            task = asyncio.create_task(machine.run())
            for _ in range(3):
                await asyncio.sleep(0.01)
                stats = vcpu.stats
                seen.append((loop.time_ns(), stats.numVMExits, stats.numCycles, stats.numInsts))
            machine.stop()
            await task
            return seen, (vcpu.stats.numCycles, vcpu.stats.numInsts)

    seen, at_the_end = simulate(main())
    assert [exits for _, exits, _, _ in seen] == [0, 0, 0]
    for n, (now_ns, _, cycles, instructions) in enumerate(seen, 1):
        assert now_ns == 10 * MS * n
        if kvmaio_cpu == "soft":
            assert (cycles, instructions) == (now_ns, 2 * now_ns)
        else:  # taken from CPU time at 2 GHz
            assert cycles >= 2 * 10 * MS * n and instructions is None
    assert at_the_end == seen[-1][2:]


def test_overshoot_is_carried_as_debt():
    """Events every 10 us, less than a run can be: the guest pauses, they do not move."""

    async def main():
        loop, seen = running(), []
        async with Machine(memory="4M", cpu="kvm") as machine:
            machine.load(Flat(SPINNING, address=0x1000, mode="user64"))
            start_ns = loop.time_ns()
            for n in range(1, 1001):
                loop.call_at_ns(start_ns + n * 10_000, lambda: seen.append(loop.time_ns()))
            loop.call_at_ns(start_ns + 10 * MS, machine.stop)
            await machine.run()
            return seen, start_ns, machine.vcpus[0].stats.ticksOvershot

    seen, start_ns, overshot = simulate(main())
    assert seen == [start_ns + n * 10_000 for n in range(1, 1001)] and overshot > 0


@pytest.mark.parametrize("apart_ns", [5_000, 10_000])
@BOTH
def test_a_guest_gets_its_share_however_close_events_are(kvmaio_cpu, apart_ns):
    """What one run does beyond the next event is debt: in all, it has what it was charged."""
    code = assemble(("count: inc rbx", "jmp count"), "user64")

    async def main():
        loop = running()
        async with Machine(memory="4M", cpu=kvmaio_cpu) as machine:
            machine.load(Flat(code, address=0x1000, mode="user64"))
            (vcpu,) = machine.vcpus
            await vcpu.run(1 * MS)
            counted = vcpu.context.rbx
            end_ns = loop.time_ns() + 20 * MS

            def tick():
                if loop.time_ns() < end_ns:
                    loop.call_at_ns(loop.time_ns() + apart_ns, tick)
                else:
                    machine.stop()

            tick()
            await machine.run()
            return vcpu.context.rbx - counted

    assert simulate(main()) > 10_000  # a fully native guest does that in some 10 us


@BOTH
def test_real_sockets_threads_and_kicks_are_live_while_a_guest_runs(kvmaio_cpu):
    async def main():
        async with Machine(memory="4M", cpu=kvmaio_cpu) as machine:
            machine.load(Flat(SPINNING, address=0x1000, mode="user64"))

            async def echo(reader, writer):
                writer.write(await reader.readline())
                writer.close()

            async def ask(port):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"hello\n")
                line = await reader.readline()
                writer.close()
                await writer.wait_closed()
                return line

            run = asyncio.create_task(machine.run())
            async with await asyncio.start_server(echo, "127.0.0.1") as server:
                line = await ask(server.sockets[0].getsockname()[1])
                vcpu = machine.vcpus[0]
                before = vcpu.stats.numExitSignal
                await asyncio.to_thread(vcpu.kick)
                while vcpu.stats.numExitSignal == before:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                child = await asyncio.create_subprocess_exec("/bin/echo", "x", stdout=-1)
                output, _ = await child.communicate()
            machine.stop()
            return line, output, await run, vcpu.stats.numExitSignal - before

    line, output, outcome, signals = simulate(main(), quantum_ns=1_000_000 * MS)
    assert (line, output, outcome) == (b"hello\n", b"x\n", Stopped("stopped"))
    assert 1 <= signals <= 2  # the kick, and the stop


def test_a_timeout_around_real_io_does_not_fire_while_a_guest_idles_in_the_kernel():
    async def main():
        async with Machine(memory="1M", cpu="kvm", irqchip="kernel", host_factor=100.0) as machine:
            machine.load(Flat(HALTING, address=0x1000))
            run = asyncio.create_task(machine.run())
            await settle()
            async with asyncio.timeout(2 * PATIENCE):
                await asyncio.to_thread(time.sleep, 0.1)
            machine.stop()
            await run

    simulate(main())


@BOTH
def test_run_by_hand_takes_the_time_that_it_says(kvmaio_cpu):
    async def main():
        async with Machine(memory="4M", cpu=kvmaio_cpu) as machine:
            machine.load(Flat(SPINNING, address=0x1000, mode="user64"))
            vcpu, loop = machine.vcpus[0], running()
            before_ns = loop.time_ns()
            exit_ = await vcpu.run(ticks=3 * MS)
            half = await vcpu.run(ticks=0)
            return exit_, half, loop.time_ns() - before_ns

    exit_, half, took_ns = simulate(main())
    assert exit_.timer_expired and took_ns >= 3 * MS
    assert kvmaio_cpu == "kvm" or (exit_.ticks, took_ns) == (3 * MS, 3 * MS)
    assert not half.timer_expired and half.ticks > 0


@BOTH
def test_a_cancelled_run_can_go_on(kvmaio_cpu):
    async def main():
        async with Machine(memory="4M", cpu=kvmaio_cpu) as machine:
            port = machine.attach(Port(lambda _: machine.stop()), pio=0x61)
            machine.load(Flat(COMPUTING, address=0x1000, mode="user64"))
            cancelled = 0
            while True:
                try:
                    async with asyncio.timeout(0.0001):
                        await machine.run()
                    break
                except TimeoutError:
                    cancelled += 1
            return cancelled, len(port.writes)

    cancelled, writes = simulate(main())
    assert cancelled > 0 and writes == 1


INTERRUPTED = """
import asyncio, kvmaio
from kvmaio import Machine
from kvmaio.boot import Flat

async def main():
    async with Machine(memory="4M", cpu="kvm") as machine:
        machine.load(Flat(bytes.fromhex("ebfe"), address=0x1000, mode="user64"))
        print("running", flush=True)
        await machine.run()

try:
    kvmaio.run(main(), time="simulated")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_sigint_is_a_keyboard_interrupt_while_guests_run():
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"running\n"
        time.sleep(0.1)
        os.kill(child.pid, signal.SIGINT)
        output, errors = child.communicate(timeout=20 * PATIENCE)
    assert (output, errors, child.returncode) == (b"interrupted\n", b"", 0)


def test_exceptions_out_of_the_wait_lose_no_guest():
    """As a second Ctrl-C is: raised anywhere, here in the middle of a slice."""

    async def main():
        async with Machine(memory="4M", cpu="kvm") as machine:
            machine.load(Flat(SPINNING, address=0x1000, mode="user64"))
            asyncio.get_running_loop().call_later(0.02, machine.stop)
            return await machine.run()

    loop = kvmaio.SimulationLoop()
    before = signal.signal(signal.SIGALRM, _interrupt)
    try:
        task = loop.create_task(main())
        interrupts = 0
        while not task.done():
            signal.setitimer(signal.ITIMER_REAL, 0.003)
            try:
                loop.run_until_complete(task)
            except _Interrupted:
                interrupts += 1
        assert task.result() == Stopped("stopped")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        loop.close()


class _Interrupted(BaseException):
    pass


def _interrupt(number, frame):
    # Only in the loop's own wait, where a guest may be under way.
    while frame is not None:
        if frame.f_code.co_name == "finish":
            raise _Interrupted
        frame = frame.f_back
    signal.setitimer(signal.ITIMER_REAL, 0.0005)


@BOTH
def test_no_thread_is_left(kvmaio_cpu):
    before = threading.active_count(), len(os.listdir("/proc/self/task"))

    async def main():
        async with Machine(memory="4M", cpu=kvmaio_cpu) as machine:
            machine.load(Flat(SPINNING, address=0x1000, mode="user64"))
            asyncio.get_running_loop().call_later(0.01, machine.stop)
            await machine.run()

    simulate(main())
    assert (threading.active_count(), len(os.listdir("/proc/self/task"))) == before


# mov ebx, 0xfee00300; then INIT (0xc4500) and SIPI (0xc4608) twice, each with mov [ebx], ...
# and mov ecx, 1000; pause: loop pause in between; await: cmp dword ptr [0x3000], N; jne await
# mov al, 5; out 0x50, al; jmp $ (0x61 is KVM's own, beside its PIT)
STARTING = (
    "bb0003e0fe c70300450c00 b9e8030000 e2fe c70308460c00 b9e8030000 e2fe c70308460c00"
    "833d00300000{others:02x} 75f7 b005 e650 ebfe"
)
STARTED = bytes.fromhex("66f0ff060030 f4 ebfd")  # lock inc dword ptr [0x3000]; rest: hlt; jmp rest


@pytest.mark.parametrize("schedule", ["parallel", "sequential"])
@pytest.mark.parametrize("vcpus", [2, 4])
@BOTH
def test_application_processors_come_up(kvmaio_cpu, schedule, vcpus):
    async def main():
        async with Machine(memory="1M", cpu=kvmaio_cpu, vcpus=vcpus) as machine:
            port = machine.attach(Port(lambda _: machine.stop()), pio=0x50)
            code = bytes.fromhex(STARTING.format(others=vcpus - 1))
            machine.load(Flat(code, address=0x1000, mode="prot32"))
            machine.memory.write(0x8000, STARTED)
            async with asyncio.timeout(60):
                outcome = await machine.run()
            return outcome, [value for _, value in port.writes]

    assert simulate(main(), schedule=schedule) == (Stopped("stopped"), [5])


@pytest.mark.timeout(120 * PATIENCE)
@BOTH
def test_the_pcs_timer_ticks_exactly_and_idle_time_passes_at_once(kvmaio_cpu):
    """100 seconds of a guest that halts from tick to tick, each an interrupt by an 8259A."""
    code = assemble(
        (
            *("mov al, 0x13", "out 0x20, al", "mov al, 8", "out 0x21, al"),
            *("mov al, 1", "out 0x21, al", "mov word ptr [8*4], offset tick"),
            *("mov word ptr [8*4+2], 0", "mov al, 0x34", "out 0x43, al"),
            *("xor al, al", "out 0x40, al", "out 0x40, al", "sti", "wait: hlt", "jmp wait"),
            *("tick: mov al, 0x20", "out 0x20, al", "out 0x60, al", "iret"),
        ),
        "real16",
    )

    async def main():
        async with Machine(memory="1M", cpu=kvmaio_cpu, irqchip="devices") as machine:
            pit = machine.attach(Pit8254(), pio=0x40, irq=0)
            port = machine.attach(Port(), pio=0x60)
            edges = []
            pit.irq.connect(lambda level: edges.append(machine.clock.now_ns) if level else None)
            machine.load(Flat(code, address=0x1000))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(100.0):
                    await machine.run()
            return edges[1:], len(port.writes)  # without that of the control word

    edges, ticks = simulate(main())
    assert (len(edges), ticks) == (1_820, 1_821)  # at 18.2 Hz, and that of the control word
    # Exactly 65536 ticks of 105/88 MHz apart, rounded up to whole nanoseconds.
    first = tick_at(edges[0])
    assert edges == [time_of_tick(first + 65_536 * n) for n in range(len(edges))]
