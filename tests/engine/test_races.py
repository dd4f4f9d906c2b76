"""Randomised races: none lost, none misdirected, nothing left behind.

The guest counts on a port: the device must see 0, 1, 2, 3 and so on without a gap
or a repeat, whatever happens meanwhile. A lost exit stalls it, one served twice
repeats a number, a lost kick hangs the run into its deadline.

KVMAIO_RACES sets how many races there are in all; 100000 is the full number.
"""

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable

import pytest
import uvloop

from kvmaio import Device, Machine, Stopped, VCpuState
from kvmaio.boot import Flat
from kvmaio.errors import ConfigurationError
from kvmaio.exits import InterruptedExit, IoExit
from kvmaio.kvm._native import ffi, lib
from kvmaio.kvm.gate import check
from kvmaio.kvm.host import Kvm
from kvmaio.kvm.state import get_context, set_context
from kvmaio.kvm.vm import KvmVm
from kvmaio.memory import GuestMemory
from tests.assembler import assemble
from tests.engine.support import LAB, deadline, until
from tests.engine.test_section_h import START_OTHERS
from tests.leftovers import Held, nothing_left

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
RACES = int(os.environ.get("KVMAIO_RACES", "100" if LAB else "100000"))

# A word that goes up by one with each OUT; then a read whose answer must be its complement.
COUNT = (
    "again: mov eax, ebx",
    "out 0x10, eax",
    "in eax, 0x10",
    "not eax",
    "cmp eax, ebx",
    "jne wrong",
    "inc ebx",
    "jmp again",
    "wrong: mov al, 1",
    "out 0xf4, al",
)


class Counter(Device):
    """Checks the count; some accesses wait, for a moment or for a future."""

    size = 4

    def __init__(self, random, waits):
        self.random = random
        self.waits = waits
        self.expected = 0
        self.suspensions = 0
        self.inside = 0

    def write(self, offset, size, value):
        assert value == self.expected & 0xFFFF_FFFF, (value, self.expected)
        assert self.inside == 0
        self.inside += 1
        if self.random.random() < self.waits:
            return self._write_later()
        self._written()
        return None

    async def _write_later(self):
        await self._wait()
        self._written()

    def _written(self):
        self.inside -= 1
        self.expected += 1

    def read(self, offset, size):
        if self.random.random() < self.waits:
            return self._read_later()
        return ~(self.expected - 1) & 0xFFFF_FFFF

    async def _read_later(self):
        await self._wait()
        return ~(self.expected - 1) & 0xFFFF_FFFF

    async def _wait(self):
        self.suspensions += 1
        loop = asyncio.get_running_loop()
        match self.random.randrange(3):
            case 0:
                await asyncio.sleep(0)
            case 1:
                await asyncio.sleep(self.random.random() * 2e-4)
            case 2:
                future = loop.create_future()
                loop.call_soon(future.set_result, None)
                await future


class Kicker(threading.Thread):
    """Kicks from another thread, at random moments, until told to stop."""

    def __init__(self, vcpus, seed):
        super().__init__()
        self.vcpus = vcpus
        self.random = random.Random(seed)
        self.ends = threading.Event()
        self.kicks = 0

    def run(self):
        while not self.ends.wait(self.random.random() * 1e-3):
            self.random.choice(self.vcpus).kick()
            self.kicks += 1

    def stop(self):
        self.ends.set()
        self.join()


async def a_moment(random):
    """From no time at all to about as long as an exit takes."""
    for _ in range(random.randrange(4)):
        await asyncio.sleep(0)
    if random.random() < 0.05:
        await asyncio.sleep(random.random() * 5e-4)


async def one_race(machine, vcpu, counter, random):
    """One thing that happens to a guest that runs; `machine.run()` may be active or not."""
    run = asyncio.create_task(machine.run())
    kind = random.randrange(6)
    if kind in (2, 3, 5):
        # Before that, stop() does nothing; an outcome that was kept ends it at once.
        await until(lambda: machine.is_running or run.done())
    await a_moment(random)
    match kind:
        case 0:
            vcpu.kick()
            await a_moment(random)
            run.cancel()
        case 1:
            run.cancel()
        case 2:
            try:
                vcpu.suspend()
            except ConfigurationError:  # an exit is being served
                assert vcpu.state in (VCpuState.RUNNING_SERVICE, VCpuState.RUNNING_MMIO_PENDING)
            else:
                await a_moment(random)
                if vcpu.state is VCpuState.IDLE:
                    vcpu.activate()
            await a_moment(random)
            machine.stop("race")
        case 3:
            vcpu.wakeup()
            await a_moment(random)
            machine.stop("race")
        case 4:
            machine.stop("race")
            run.cancel()
        case 5:
            goal = counter.expected + random.randrange(3)
            await until(lambda: counter.expected > goal or run.done())
            machine.stop("race")
    try:
        outcome = await run
    except asyncio.CancelledError:
        pass
    else:
        assert outcome == Stopped("race"), outcome
    if vcpu.state is VCpuState.IDLE:
        vcpu.wakeup()


async def load(machine, counters):
    """Have each vCPU count on a port of its own; the others are started by the first, once."""
    if len(counters) == 1:
        machine.load(Flat(assemble(COUNT), 0x1000))
        return
    first = assemble([*START_OTHERS, "xor ebx, ebx", *COUNT], "prot32")
    machine.load(Flat(first, 0x1000, mode="prot32"))
    other = [line.replace("0x10", "0x50") for line in COUNT]
    machine.memory.write(0x8000, assemble(["xor ebx, ebx", *other], "real16", 0x8000))
    async with deadline(20):
        run = asyncio.create_task(machine.run())
        await until(lambda: all(counter.expected for counter in counters))
        machine.stop()
        await run


async def race(cpu, count, seed, *, waits, kicker=False, vcpus=1):
    """So many races that reached the guest, or a handler that waits; those before do not count."""
    rng = random.Random(seed)
    async with Machine(memory="64K" if vcpus == 1 else "1M", cpu=cpu, vcpus=vcpus) as machine:
        counters = [machine.attach(Counter(rng, waits), pio=port) for port in (0x10, 0x50)[:vcpus]]
        await load(machine, counters)
        other = Kicker(machine.vcpus, seed) if kicker else None
        if other is not None:
            other.start()
        reached = 0
        try:
            while reached < count:
                index = rng.randrange(vcpus)
                vcpu, counter = machine.vcpus[index], counters[index]
                before = counter.expected, vcpu.stats.numVMExits, counter.suspensions
                async with deadline(20):
                    await one_race(machine, vcpu, counter, rng)
                assert counter.expected >= before[0]
                after = counter.expected, vcpu.stats.numVMExits, counter.suspensions
                reached += after != before
            # After all of it each guest still counts.
            goals = [counter.expected + 20 for counter in counters]

            def counted():
                return all(c.expected >= goal for c, goal in zip(counters, goals, strict=True))

            async with deadline(20):
                while not counted():  # the first may return an outcome that was kept
                    run = asyncio.create_task(machine.run())
                    await asyncio.sleep(0)
                    await until(lambda: counted() or not machine.is_running)
                    machine.stop("the end")
                    await run
        finally:
            if other is not None:
                other.stop()
        for vcpu, counter in zip(machine.vcpus, counters, strict=True):
            assert (vcpu.inside, counter.inside in (0, 1)) == (False, True)
        return sum(c.expected for c in counters), sum(c.suspensions for c in counters)


WAITS = (0.0, 0.05, 0.3, 0.9)
PARTS = [
    pytest.param(loop, vcpus, waits, (n + vcpus + (loop == "uvloop")) % 2 == 0)
    for loop in LOOPS
    for vcpus in (1, 2)
    for n, waits in enumerate(WAITS)
]
"""Each kind of loop, number of vCPUs and share of suspending handlers; half of them kicked."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("loop", "vcpus", "waits", "kicked"), PARTS)
def test_races_of_kick_cancel_suspend_stop_and_suspending_devices(
    kvmaio_cpu, loop, vcpus, waits, kicked
):
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(asyncio.sleep(0))  # uvloop keeps a pipe of its first loop for good
    before = Held.now()
    count = RACES // len(PARTS) // 3
    seed = round(waits * 100) + vcpus
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        accesses, suspensions = runner.run(
            race(kvmaio_cpu, count, seed, waits=waits, kicker=kicked, vcpus=vcpus)
        )
    assert accesses > 0
    # A handful of races, as on emulated hardware, may meet no handler that waits.
    assert suspensions > 0 or waits == 0 or count < 1000
    nothing_left(before)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(2))
async def test_races_of_close(kvmaio_cpu, part):
    before = Held.now()
    rng = random.Random(part)
    code = assemble(COUNT)
    for _ in range(RACES // 200):
        async with deadline(20):
            machine = Machine(memory="64K", cpu=kvmaio_cpu)
            await machine.__aenter__()
            machine.attach(Counter(rng, (0.0, 0.5)[part]), pio=0x10)
            machine.load(Flat(code, 0x1000))
            run = asyncio.create_task(machine.run())
            await a_moment(rng)
            others: list[Callable[[], object]] = [
                *(lambda: None, run.cancel),
                *(machine.vcpus[0].kick, machine.stop),
            ]
            rng.choice(others)()
            if rng.random() < 0.5:
                await a_moment(rng)
            await machine.close()
            try:
                outcome = await run
            except asyncio.CancelledError:
                pass
            except ConfigurationError as error:  # run() had not begun
                assert "closed" in str(error)  # noqa: PT017
            else:
                assert outcome in (Stopped("closed"), Stopped("stopped"))
    nothing_left(before)


@pytest.mark.timeout(600)
async def test_races_by_hand_every_access_comes_once(kvmaio_cpu):
    """`VCpu.run()` with limits about as long as an exit takes, kicked from another thread."""
    rng = random.Random(1)
    async with Machine(memory="64K", cpu=kvmaio_cpu) as machine:
        (vcpu,) = machine.vcpus
        machine.load(Flat(assemble(COUNT), 0x1000))
        kicker = Kicker([vcpu], 2)
        kicker.start()
        expected = interrupted = 0
        try:
            async with deadline(300):
                runs = 0
                while runs < RACES * 2 // 5 or not expected:
                    runs += 1
                    exit_ = await vcpu.run(rng.choice((None, 0, 1, 60_000)))
                    match exit_:
                        case IoExit(is_write=True):
                            assert int.from_bytes(exit_.data, "little") == expected
                            expected += 1
                        case IoExit():
                            page = vcpu.model.page
                            answer = ~(expected - 1) & 0xFFFF_FFFF
                            vcpu.model.io_words[4][page.io.data_offset // 4] = answer
                        case InterruptedExit():
                            interrupted += 1
                    if rng.random() < 0.05:
                        assert vcpu.context.rbx in (expected, expected - 1)
                        vcpu.context.rsi = expected
        finally:
            kicker.stop()
    assert expected > 0 and (interrupted > 0 or RACES < 1000)


# ---- the C core by itself ----------------------------------------------------------------------


class Core:
    """A vCPU of the C core, without the engine: its guest spins, or counts on a port."""

    def __init__(self, code):
        self.kvm = Kvm.open()
        self.vm = KvmVm(self.kvm)
        self.memory = GuestMemory()
        self.memory.add_ram(0, 1 << 16)
        self.vm.attach_memory(self.memory)
        self.memory.write(0x1000, code)
        check(lib.kvmaio_init(), "sigaction")
        hub = ffi.new("kvmaio_hub **")
        check(lib.kvmaio_hub_create(hub), "eventfd")
        self.hub = hub[0]
        vcpu = ffi.new("kvmaio_vcpu **")
        size = self.kvm.vcpu_page_size
        check(lib.kvmaio_vcpu_create(self.hub, self.vm.fd, 0, size, 7, vcpu), "KVM_CREATE_VCPU")
        self.vcpu = vcpu[0]
        check(lib.kvmaio_vcpu_start(self.vcpu), "pthread_create")
        context = get_context(self.vcpu.fd)
        context.rip, context.cs.base, context.cs.selector = 0x1000, 0, 0
        set_context(self.vcpu.fd, context)
        self.tags = ffi.new("uint32_t[]", 4)

    def wait(self, limit_s=20):
        """Wait for the run's arrival; its outcome."""
        until_s = time.monotonic() + limit_s * (10 if LAB else 1)
        while lib.kvmaio_hub_collect(self.hub, self.tags, 4) == 0:
            assert time.monotonic() < until_s, "the run does not end: a kick was lost"
            time.sleep(0)
        return self.vcpu.outcome

    def close(self):
        check(lib.kvmaio_vcpu_stop(self.vcpu, 10_000_000_000), "pthread_join")
        lib.kvmaio_vcpu_destroy(self.vcpu)
        lib.kvmaio_hub_destroy(self.hub)
        self.vm.close()
        self.kvm.close()


@pytest.fixture
def core(request):
    before = Held.now()
    core = Core(assemble(request.param))
    yield core
    core.close()
    nothing_left(before)


def linger(turns):
    """A few microseconds: shorter than any sleep."""
    for _ in range(turns):
        pass


SPINNING = ("again: jmp again",)
KNOCKING = ("again: out 0x10, al", "jmp again")


@pytest.mark.kvm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("core", [SPINNING], indirect=True, ids=["spinning"])
def test_races_of_the_core_no_kick_is_lost(core):
    """Kicked by its id before, while and about when the run begins: each run ends."""
    rng = random.Random(3)
    for _ in range(RACES // 8):
        if rng.random() < 0.3:
            lib.kvmaio_vcpu_kick(core.vcpu, lib.kvmaio_vcpu_current_run(core.vcpu))
            lib.kvmaio_vcpu_enter(core.vcpu, -1)
        else:
            run = lib.kvmaio_vcpu_enter(core.vcpu, -1)
            linger(rng.randrange(200) if rng.random() < 0.5 else 0)
            lib.kvmaio_vcpu_kick(core.vcpu, run)
        assert core.wait() == lib.KVMAIO_INTERRUPTED


@pytest.mark.kvm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("core", [KNOCKING], indirect=True, ids=["knocking"])
def test_races_of_the_core_a_late_kick_ends_only_its_run(core):
    """Another thread kicks each run by its id, mostly when that is over: no other one ends."""
    latest = 0
    ends = threading.Event()
    asked = set()

    def kick():
        kicked = looks = 0
        while not ends.is_set():
            if latest > kicked:
                kicked = latest
                asked.add(kicked)
                lib.kvmaio_vcpu_kick(core.vcpu, kicked)
            # Now and then long enough for another thread to be woken and take the GIL.
            looks += 1
            time.sleep(0 if looks % 16 else 1e-5)

    thread = threading.Thread(target=kick)
    thread.start()
    try:
        interrupted = set()
        for _ in range(RACES // 8):
            run = lib.kvmaio_vcpu_enter(core.vcpu, -1)
            latest = run
            if core.wait() == lib.KVMAIO_INTERRUPTED:
                interrupted.add(run)
    finally:
        ends.set()
        thread.join()
    assert interrupted <= asked


@pytest.mark.kvm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("core", [SPINNING], indirect=True, ids=["spinning"])
def test_races_of_the_core_a_kick_of_the_present_run_from_another_thread(core):
    """`current_run` and `kick` against the beginning of a run: it must end, by one kick.

    One kick per run: if it names the run behind the one that is just being
    submitted, nothing else ends the spinning guest.
    """
    turn, done = threading.Semaphore(0), threading.Semaphore(0)
    ends = False

    def kick():
        while True:
            turn.acquire()
            if ends:
                return
            lib.kvmaio_vcpu_kick(core.vcpu, lib.kvmaio_vcpu_current_run(core.vcpu))
            done.release()

    thread = threading.Thread(target=kick)
    thread.start()
    rng = random.Random(4)
    try:
        for _ in range(RACES // 16):
            turn.release()
            linger(rng.randrange(300))
            lib.kvmaio_vcpu_enter(core.vcpu, -1)
            assert core.wait() == lib.KVMAIO_INTERRUPTED
            done.acquire()
    finally:
        ends = True
        turn.release()
        thread.join()
