"""Handlers that are plain, async, and suspending; cancellation, errors, timeouts and close()."""

import asyncio
import gc
import subprocess
import sys
import time
from typing import Any

import pytest

from kvmaio import Device, Exited, Halted, Outcome, Register, Stopped, UnmappedAccess, VCpuState
from kvmaio.boot import Flat
from kvmaio.errors import ConfigurationError, GuestError
from kvmaio.exits import IoExit
from tests.engine.support import LAB, Diary, deadline, until
from tests.engine.test_section_a import SPIN
from tests.engine.test_section_h import START_OTHERS
from tests.leftovers import Held, nothing_left

PENDING = VCpuState.RUNNING_MMIO_PENDING
SHORT_S = 1.0 if LAB else 0.1


class Doubler(Device):
    """Reads give twice what was written; `style` is how the handlers do it."""

    size = 1

    def __init__(self, style):
        self.style = style
        self.value = 0

    def read(self, offset, size):
        return self.value * 2 if self.style == "plain" else self._read()

    def write(self, offset, size, value):
        if self.style == "plain":
            self.value = value
            return None
        return self._write(value)

    async def _read(self):
        await self._pause()
        return self.value * 2

    async def _write(self, value):
        await self._pause()
        self.value = value

    async def _pause(self):
        if self.style == "suspends":
            await asyncio.sleep(0)


@pytest.mark.kvm
@pytest.mark.parametrize("style", ["plain", "async", "suspends"])
async def test_each_style_of_handler(boot, style):
    machine = boot("mov al, 21", "out 0x10, al", "mov al, 0", "in al, 0x10", "hlt")
    machine.attach(Doubler(style), pio=0x10)
    async with deadline():
        assert await machine.run() == Halted()
    assert machine.vcpus[0].context.rax == 42


@pytest.mark.kvm
@pytest.mark.parametrize(("style", "futures"), [("plain", 0), ("async", 0), ("suspends", 0)])
async def test_no_task_and_no_future_unless_it_suspends(boot, monkeypatch, style, futures):
    """sleep(0) needs no Future either; test_a_real_wait_costs_its_own_future counts one."""
    machine = boot(
        *("mov cx, 200", "again: out 0x10, al", "in al, 0x10", "loop again", "hlt"),
    )
    machine.attach(Doubler(style), pio=0x10)
    made = count_tasks_and_futures(monkeypatch)
    async with deadline():
        assert await machine.run() == Halted()
    # The machine's own: its vCPU's task, the wait for the end of run() and of each rest.
    assert len(made) - made.count("timeout") <= 6 + futures


def count_tasks_and_futures(monkeypatch):
    loop = asyncio.get_running_loop()
    made = []
    create_future = loop.create_future

    def count() -> asyncio.Future[Any]:
        made.append("future")
        return create_future()

    monkeypatch.setattr(loop, "create_future", count)

    def factory(loop, coroutine, **arguments):
        made.append("task")
        return asyncio.Task(coroutine, loop=loop, **arguments)

    loop.set_task_factory(factory)
    return made


@pytest.mark.kvm
async def test_a_real_wait_costs_its_own_future(boot, monkeypatch):
    machine = boot("mov cx, 50", "again: out 0x10, al", "loop again", "hlt")
    machine.attach(Diary(during=lambda: asyncio.sleep(0.0001)), pio=0x10)
    made = count_tasks_and_futures(monkeypatch)
    async with deadline():
        assert await machine.run() == Halted()
    assert made.count("task") == 2  # the vCPU's and the serial port's
    assert 50 <= made.count("future") <= 56


@pytest.mark.kvm
async def test_a_slow_device_delays_neither_another_vcpu_nor_a_ticker(boot, assembler):
    """The boot CPU waits for a device of 50 ms; the other counts, and so does a 1 ms ticker."""
    machine = boot(
        *START_OTHERS,
        "await: cmp dword ptr [0x3000], 0",
        "je await",
        *("in al, 0x10", "in al, 0x10", "in al, 0x10"),
        *("mov al, 1", "out 0xf4, al"),
        mode="prot32",
        vcpus=2,
    )
    machine.memory.write(0x8000, assembler("again: inc dword ptr [0x3000]", "jmp again"))
    counter = machine.memory.view(0x3000, 4)
    ticks = 0
    waits = 0

    async def wait():
        """50 ms and, on a loaded host, until the other vCPU has gone on: nothing holds it up."""
        nonlocal waits
        ticked, counted = ticks, bytes(counter)
        await asyncio.sleep(0.05)
        assert ticks > ticked
        await until(lambda: counter != counted)
        waits += 1

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    machine.attach(Diary(during=wait), pio=0x10)
    async with deadline(20):
        ticker = asyncio.create_task(tick())
        outcome = await machine.run()
        ticker.cancel()
    assert outcome == Exited(3)
    assert waits == 3


# ---- cancellation -----------------------------------------------------------------------------


class Gate(Device):
    """Its accesses wait until `open()`."""

    size = 1

    def __init__(self):
        self.waiting = 0
        self.served = []
        self.gate = asyncio.Event()

    async def read(self, offset, size):
        self.waiting += 1
        await self.gate.wait()
        self.served.append("read")
        return 0x42


async def run_until(machine, condition):
    """Run until `condition` holds, then cancel the run."""
    run = asyncio.create_task(machine.run())
    await until(condition)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run


@pytest.mark.kvm
async def test_cancelled_while_a_handler_waits_its_answer_is_not_lost(boot):
    machine = boot("in al, 0x10", "hlt")
    (vcpu,) = machine.vcpus
    gate = machine.attach(Gate(), pio=0x10)
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: gate.waiting)
        assert vcpu.state is PENDING
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert (vcpu.state, gate.served, machine.is_running) == (PENDING, [], False)
        assert vcpu.context.rip in (0x1000, 0x1002)
        gate.gate.set()
        await until(lambda: gate.served)
        await until(lambda: vcpu.state is VCpuState.RUNNING_SERVICE_COMPLETION)
        assert vcpu.stats.numVMExits == 1  # nobody entered the guest between the runs
        assert await machine.run() == Halted()
    assert (vcpu.context.rax, gate.served) == (0x42, ["read"])


@pytest.mark.kvm
async def test_run_again_while_the_handler_still_waits(boot):
    machine = boot("in al, 0x10", "hlt")
    (vcpu,) = machine.vcpus
    gate = machine.attach(Gate(), pio=0x10)
    async with deadline():
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await machine.run()
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, gate.gate.set)
        assert await machine.run() == Halted()
    assert (vcpu.context.rax, gate.waiting) == (0x42, 1)


@pytest.mark.kvm
async def test_registers_edited_while_the_handler_waits(boot):
    machine = boot("in al, 0x10", "hlt")
    (vcpu,) = machine.vcpus
    gate = machine.attach(Gate(), pio=0x10)
    async with deadline():
        await run_until(machine, lambda: gate.waiting)
        vcpu.context.rbx = 9
        gate.gate.set()
        assert await machine.run() == Halted()
    assert (vcpu.context.rax, vcpu.context.rbx) == (0x42, 9)


@pytest.mark.kvm
async def test_stepping_and_loading_are_refused_while_the_handler_waits(boot):
    """Its answer would go to a guest that is running, or to another one."""
    machine = boot("in al, 0x10", "hlt")
    (vcpu,) = machine.vcpus
    gate = machine.attach(Gate(), pio=0x10)
    async with deadline():
        await run_until(machine, lambda: gate.waiting)
        with pytest.raises(ConfigurationError, match="a device has not answered"):
            await vcpu.run()
        with pytest.raises(ConfigurationError, match="a device has not answered"):
            vcpu.reset_registers()
        before = machine.memory.read(0x1000, 4)
        with pytest.raises(ConfigurationError, match="a device has not answered"):
            machine.load(Flat(b"\xf4\xf4\xf4\xf4", 0x1000))
        assert machine.memory.read(0x1000, 4) == before


@pytest.mark.kvm
async def test_an_outcome_at_the_moment_of_cancelling_is_kept(boot):
    machine = boot("mov al, 2", "out 0x10, al", "hlt")
    runs: list[asyncio.Task[Outcome]] = []

    def cancel():
        runs[0].cancel()
        machine._end(Stopped("kept"))

    machine.attach(Diary(during=cancel), pio=0x10)
    async with deadline():
        runs.append(asyncio.create_task(machine.run()))
        with pytest.raises(asyncio.CancelledError):
            await runs[0]
        assert await machine.run() == Stopped("kept")
        assert await machine.run() == Halted()


@pytest.mark.kvm
@pytest.mark.parametrize("ending", [Stopped("of the first"), GuestError("of the first")], ids=repr)
async def test_an_ending_kept_is_not_the_next_guests(boot, ending):
    machine = boot("out 0x10, al", "hlt")
    runs: list[asyncio.Task[Outcome]] = []

    def cancel():
        runs[0].cancel()
        machine._end(ending)

    machine.attach(Diary(during=cancel), pio=0x10)
    async with deadline():
        runs.append(asyncio.create_task(machine.run()))
        with pytest.raises(asyncio.CancelledError):
            await runs[0]
        machine.load(Flat(b"\xf4", 0x1000))
        assert await machine.run() == Halted()


# ---- outcomes -----------------------------------------------------------------------------------


@pytest.mark.kvm
async def test_runs_after_each_outcome(boot):
    machine = boot("mov al, 1", "out 0xf4, al", "out 0x10, al", "mov al, 2", "out 0xf4, al", "hlt")
    machine.attach(Diary(during=lambda: machine.stop("enough")), pio=0x10)
    async with deadline():
        assert await machine.run() == Exited(3)
        assert await machine.run() == Stopped("enough")
        assert await machine.run() == Exited(5)
        assert await machine.run() == Halted()
        assert await machine.run() == Halted()


@pytest.mark.kvm
async def test_halted_with_interrupts_on_run_goes_on_waiting(boot):
    machine = boot("sti", "hlt", "hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: vcpu.halted)
        for _ in range(50):
            await asyncio.sleep(0)
        assert not run.done()
        machine.stop("waited long enough")
        assert await run == Stopped("waited long enough")


# ---- errors ------------------------------------------------------------------------------------


class Broken(Device):
    """Fails where it is told to."""

    port = Register(0, int)

    def __init__(self, where):
        self.where = where

    def update(self):
        if self.where == "update":
            raise LookupError("broken on purpose")

    async def run(self):
        if self.where == "run":
            await asyncio.sleep(0.005)
            raise LookupError("broken on purpose")

    @port.on_write
    def write_port(self, value):
        if self.where == "plain handler":
            raise LookupError("broken on purpose")
        return self.later() if self.where in ("async handler", "foreign cancellation") else None

    async def later(self):
        await asyncio.sleep(0)
        if self.where == "foreign cancellation":
            other = asyncio.get_running_loop().create_future()
            other.cancel()
            await other
        raise LookupError("broken on purpose")


@pytest.mark.kvm
@pytest.mark.parametrize("where", ["plain handler", "async handler", "update"])
async def test_an_error_of_a_device_comes_out_of_run_bare_with_a_note(boot, where):
    machine = boot("mov bx, 0x1234", "out 0x10, al", "hlt")
    device = machine.attach(Broken(where), pio=0x10)
    async with deadline():
        with pytest.raises(LookupError, match="broken on purpose") as caught:
            await machine.run()
        (note,) = caught.value.__notes__
        assert "while cpu0 waited for a write to pio 0x10 (1 byte)" in note
        assert "rip" in note and "1234" in note
        # The access was not served: once the device is repaired, it is.
        device.where = None
        assert await machine.run() == Halted()


@pytest.mark.kvm
async def test_an_error_of_a_devices_run_comes_out_of_run_with_a_note(boot):
    machine = boot("mov bx, 0x1234", *SPIN)
    machine.attach(Broken("run"), pio=0x10)
    async with deadline():
        with pytest.raises(LookupError, match="broken on purpose") as caught:
            await machine.run()
    notes = "\n".join(caught.value.__notes__)
    assert "in broken0.run()" in notes
    assert "meanwhile cpu0 was here" in notes and "rip" in notes


@pytest.mark.kvm
@pytest.mark.parametrize("style", ["plain", "async", "suspending", "run()"])
async def test_an_outcome_of_pytest_comes_out_of_run(boot, style):
    """It is no Exception; the machine can be run again afterwards."""

    class Strict(Device):
        size = 1

        def read(self, offset, size):
            if style == "plain":
                pytest.fail("not this register")
            return 0 if style == "run()" else self.later()

        async def later(self):
            if style == "suspending":
                await asyncio.sleep(0)
            pytest.fail("not this register")

        async def run(self):
            if style == "run()":
                pytest.fail("not this register")

    machine = boot("in al, 0x10", *SPIN)
    machine.attach(Strict(), pio=0x10)
    async with deadline():
        with pytest.raises(pytest.fail.Exception, match="not this register") as caught:
            await machine.run()
        assert caught.value.__notes__
        machine.load(Flat(b"\xf4", 0x1000))
        assert await machine.run() == Halted()


@pytest.mark.kvm
async def test_an_error_of_a_devices_run_that_no_run_raises_is_logged(boot, caplog):
    machine = boot("hlt")
    broken = machine.attach(BrokenLater(), pio=0x10)
    async with deadline():
        assert await machine.run() == Halted()
        broken.go.set()
        await until(lambda: machine._ending is not None)
        await machine.close()
    (record,) = caplog.records
    assert "no run() has raised this" in record.getMessage()
    assert "broken later" in str(record.exc_info[1])


class BrokenLater(Device):
    size = 1

    def __init__(self):
        self.go = asyncio.Event()

    async def run(self):
        await self.go.wait()
        raise LookupError("broken later")


@pytest.mark.kvm
async def test_an_unmapped_access_names_it(boot):
    machine = boot("mov al, 7", "out 0x77, al", "hlt")
    async with deadline():
        with pytest.raises(UnmappedAccess) as caught:
            await machine.run()
        error = caught.value
        assert str(error).startswith("write of 0x7 of 1 byte at pio 0x77, where nothing is mapped;")
        assert (error.vcpu, error.address, type(error.exit)) == ("cpu0", 0x77, IoExit)
        late = machine.attach(Diary(), pio=0x77)
        assert await machine.run() == Halted()
    assert late.entries == [("write", 0, 1, 7)]


@pytest.mark.kvm
async def test_a_handler_that_awaits_something_cancelled_ends_the_run(boot):
    """Not the vCPU's task in silence, or run() would wait for ever."""
    machine = boot("out 0x10, al", "hlt")
    machine.attach(Broken("foreign cancellation"), pio=0x10)
    async with deadline():
        with pytest.raises(RuntimeError, match="ended by a cancellation of something") as caught:
            await machine.run()
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)


@pytest.mark.kvm
async def test_a_devices_run_that_awaits_something_cancelled_ends_the_run(boot):
    class Follower(Device):
        size = 1

        async def run(self):
            other = asyncio.get_running_loop().create_future()
            other.cancel()
            await other

    machine = boot(*SPIN)
    machine.attach(Follower(), pio=0x10)
    async with deadline():
        with pytest.raises(RuntimeError, match=r"follower0\.run\(\) ended by a cancellation"):
            await machine.run()


@pytest.mark.kvm
async def test_a_timeout_within_a_handler(boot):
    class Patient(Device):
        size = 1

        async def read(self, offset, size):
            try:
                async with asyncio.timeout(0.01):
                    await asyncio.Event().wait()
            except TimeoutError:
                return 0x77
            return 0

    machine = boot("in al, 0x10", "mov bl, al", "in al, 0x10", "hlt")
    machine.attach(Patient(), pio=0x10)
    async with deadline():
        assert await machine.run() == Halted()
    assert (machine.vcpus[0].context.rax, machine.vcpus[0].context.rbx) == (0x77, 0x77)


# ---- timeouts around run() -----------------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize("mode", ["real16", "prot32", "long64", "user64"])
async def test_a_timeout_around_run_of_a_guest_that_spins_for_ever(boot, mode):
    register = "rbx" if mode in ("long64", "user64") else "ebx"
    machine = boot(f"again: inc {register}", "jmp again", mode=mode)
    (vcpu,) = machine.vcpus
    seen = []
    async with deadline():
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(SHORT_S):
                    await machine.run()
            assert time.monotonic() - started < 50 * SHORT_S  # well before anything else ends it
            assert (vcpu.inside, machine.is_running) == (False, False)
            assert vcpu.context.rip >= 0x1000 and "rip" in machine.dump()
            seen.append(vcpu.context.rbx)
    assert 0 < seen[0] < seen[1]
    machine.memory.write(0x1000, b"\xf4" * 16)
    async with deadline():
        assert await machine.run() == Halted()


# ---- close() -----------------------------------------------------------------------------------


async def close_when(machine, reached):
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(reached)
        await machine.close()
        return await run


@pytest.mark.kvm
@pytest.mark.parametrize("state", ["fresh", "running", "pending", "halted", "suspended", "stepped"])
async def test_close_in_each_state_leaves_no_thread_and_no_file(boot, state):
    before = Held.now()
    code = {"pending": "in al, 0x10", "halted": "sti; hlt", "stepped": "out 0x11, al"}
    machine = boot(code.get(state, "nop"), *SPIN)
    (vcpu,) = machine.vcpus
    gate = machine.attach(Gate(), pio=0x10)
    match state:
        case "fresh":
            await machine.close()
        case "running":
            assert await close_when(machine, lambda: vcpu.inside) == Stopped("closed")
        case "pending":
            assert await close_when(machine, lambda: gate.waiting) == Stopped("closed")
        case "halted":
            assert await close_when(machine, lambda: vcpu.halted) == Stopped("closed")
        case "suspended":

            def suspended():
                if vcpu.inside:
                    vcpu.suspend()
                return vcpu.stats.numExitSignal

            assert await close_when(machine, suspended) == Stopped("closed")
        case "stepped":
            async with deadline():
                assert type(await vcpu.run()) is IoExit
                await machine.close()
    await machine.close()  # again: nothing
    nothing_left(before)
    with pytest.raises(ConfigurationError, match="is closed"):
        await machine.run()


@pytest.mark.kvm
async def test_close_while_a_vcpu_is_run_by_hand(boot):
    machine = boot(*SPIN)
    (vcpu,) = machine.vcpus
    async with deadline():
        run = asyncio.create_task(vcpu.run())
        await until(lambda: vcpu.inside)
        await machine.close()
        assert (await run).ticks >= 0


@pytest.mark.kvm
async def test_close_by_a_device_is_refused(boot):
    """It would wait for itself."""
    machine = boot("out 0x10, al", "hlt")
    machine.attach(Diary(during=machine.close), pio=0x10)
    async with deadline():
        with pytest.raises(ConfigurationError, match="cannot be closed by its own device"):
            await machine.run()


@pytest.mark.kvm
async def test_close_an_interrupt_after_it_is_nothing(boot):
    machine = boot("sti", "hlt", "hlt")
    (vcpu,) = machine.vcpus
    line = machine.irq(5)
    assert await close_when(machine, lambda: vcpu.halted) == Stopped("closed")
    line.pulse()
    vcpu.kick()
    await vcpu.nmi()


ANSWERS_WHEN_CANCELLED = """
import asyncio
from kvmaio import Device, Machine
from kvmaio.boot import Flat

class Stubborn(Device):
    size = 1
    async def read(self, offset, size):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return 0x42
    async def write(self, offset, size, value):
        pass

async def main():
    for _ in range(20):
        async with Machine(memory="1M") as machine:
            machine.attach(Stubborn(), pio=0x10)
            machine.load(Flat(bytes.fromhex("e410f4"), 0x1000))
            run = asyncio.create_task(machine.run())
            while machine.vcpus[0].state.name != "RUNNING_MMIO_PENDING":
                await asyncio.sleep(0)
        print(await run)

asyncio.run(main())
"""


@pytest.mark.kvm
def test_close_a_handler_that_answers_its_cancellation_writes_to_nothing_that_is_gone():
    """In a process of its own: a run page that is gone would take the process with it."""
    command = [sys.executable, "-c", ANSWERS_WHEN_CANCELLED]
    limit_s = 500 if LAB else 50
    result = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "Stopped(reason='closed')\n" * 20


@pytest.mark.kvm
async def test_close_many_machines_leave_nothing(boot):
    before = Held.now()
    for _ in range(10):
        machine = boot("out 0x10, al", "hlt", vcpus=2)
        device = machine.attach(Diary(), pio=0x10)
        async with deadline():
            run = asyncio.create_task(machine.run())
            await until(device.reached(1))
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            await machine.close()
        nothing_left(before)
    gc.collect()


@pytest.mark.kvmaio_cpu("kvm", "soft")
@pytest.mark.parametrize("style", ["plain", "async", "suspending"])
@pytest.mark.parametrize("access", ["in al, 0x10", "out 0x10, al", "rep outsb"])
async def test_a_handler_that_ends_by_stop_iteration_is_told_so(boot, style, access):
    """As next() of a script of answers that is too short does."""

    class Exhausted(Device):
        size = 1
        answers = iter(())

        def read(self, offset, size):
            return next(self.answers) if style == "plain" else self.later()

        def write(self, offset, size, value):
            return next(self.answers) if style == "plain" else self.later()

        async def later(self):
            if style == "suspending":
                await asyncio.sleep(0)
            return next(self.answers)

    machine = boot("mov dx, 0x10", "mov cx, 2", access, "hlt")
    machine.attach(Exhausted(), pio=0x10)
    async with deadline():
        with pytest.raises(RuntimeError, match="a handler that cpu0 called raised Stop") as caught:
            await machine.run()
    direction = "read from" if access.startswith("in") else "write to"
    (note,) = caught.value.__notes__
    assert f"while cpu0 waited for a {direction} pio 0x10" in note and "rip" in note
    assert isinstance(caught.value.__cause__, StopIteration)


@pytest.mark.kvm
@pytest.mark.parametrize("style", ["plain", "async", "suspending"])
async def test_read_handler_that_returns_nothing_is_told_so(boot, style):
    class Forgetful(Device):
        size = 1

        def read(self, offset, size):
            return None if style == "plain" else self.later()

        async def later(self):
            if style == "suspending":
                await asyncio.sleep(0)

    machine = boot("in al, 0x10", "hlt")
    machine.attach(Forgetful(), pio=0x10)
    async with deadline():
        with pytest.raises(TypeError, match="handler gave None") as caught:
            await machine.run()
    assert "a read from pio 0x10" in caught.value.__notes__[0]
