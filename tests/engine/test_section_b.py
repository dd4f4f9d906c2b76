"""gem5's KVM CPU, section B: running and time, a test per row (those about perf aside)."""

import asyncio
import ctypes
import errno
import os
import re
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from kvmaio import Halted, HostError
from kvmaio.exits import InterruptedExit, IoExit
from tests.engine.support import Diary, deadline, until
from tests.engine.test_section_a import SPIN, lone_vcpu
from tests.engine.test_section_h import START_OTHERS
from tests.scripted import INTERRUPTED, port_out

PERIOD_NS = 1  # of the default clock, 1 GHz


@pytest.mark.kvm
async def test_kvm_run_0_completes_a_pending_read_and_nothing_else(boot):
    machine = boot("in al, 0x60", "inc bx", "hlt")
    (vcpu,) = machine.vcpus
    async with deadline():
        assert await vcpu.run() == IoExit(0x60, 1, 1, False, b"", ticks=vcpu.last_exit().ticks)
        page = vcpu.model.page
        vcpu.model.io_words[1][page.io.data_offset] = 0x5A
        exits, halves = vcpu.stats.numVMExits, vcpu.stats.numVMHalfEntries
        assert await vcpu.run(0) == InterruptedExit(ticks=PERIOD_NS)
    context = vcpu.context
    assert (context.rax & 0xFF, context.rip, context.rbx) == (0x5A, 0x1002, 0)
    assert vcpu.stats.numVMExits == exits + 1
    assert vcpu.stats.numVMHalfEntries == halves + 1


@pytest.mark.kvmaio_cpu("kvm")
async def test_kvm_run_n_may_run_more_than_asked(boot):
    machine = boot(*SPIN)
    (vcpu,) = machine.vcpus
    async with deadline():
        exit_ = await vcpu.run(1)
    assert isinstance(exit_, InterruptedExit) and exit_.timer_expired
    assert exit_.ticks > 1  # raised to the timer's resolution


@pytest.mark.kvm
async def test_kvm_run_n_may_run_less_than_asked(boot):
    machine = boot("out 0x10, al", *SPIN)
    (vcpu,) = machine.vcpus
    async with deadline():
        exit_ = await vcpu.run(60_000_000_000)
    assert isinstance(exit_, IoExit) and exit_.ticks < 60_000_000_000


@pytest.mark.kvm
async def test_kvm_run_n_lets_other_tasks_progress(boot):
    machine = boot(*SPIN)
    (vcpu,) = machine.vcpus
    turns = 0

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with deadline():
        task = asyncio.create_task(others())
        exit_ = await vcpu.run(20_000_000)
        task.cancel()
    assert exit_ == InterruptedExit(ticks=exit_.ticks, timer_expired=True)
    assert turns > 0


async def test_accounting_1000_cycles_at_2_ghz_and_factor_2():
    """Scripted: the host time is given. 1000 host cycles take 500 ns."""
    vcpu = lone_vcpu(port_out(0x10, 1), host_factor=2.0)
    vcpu.model.executed_ns = 500
    exit_ = await vcpu.run()
    assert exit_.ticks == 1_000
    assert (vcpu.stats.numCycles, vcpu.stats.numVMExits) == (2_000, 1)
    await vcpu.run(0)
    assert (vcpu.stats.numVMExits, vcpu.stats.numVMHalfEntries) == (2, 1)


async def test_host_factor_2_halves_the_armed_host_time():
    """Scripted: shows the limit that the model gets."""
    vcpu = lone_vcpu(INTERRUPTED, INTERRUPTED, INTERRUPTED, host_factor=2.0)
    await vcpu.run(1_000_000)
    await vcpu.run(10)
    await vcpu.run()
    assert vcpu.model.limits == [500_000, vcpu.model.resolution_ns, None]


@pytest.mark.kvmaio_cpu("kvm")
async def test_get_host_cycles_time_advances_without_perf(boot):
    machine = boot(*SPIN)
    (vcpu,) = machine.vcpus
    async with deadline():
        exit_ = await vcpu.run(5_000_000)
    assert exit_.ticks > 0
    assert vcpu.stats.numCycles >= exit_.ticks * 2  # at 2 GHz; and the idle time before


@pytest.mark.kvmaio_cpu("kvm")
async def test_ioctl_run_efault_is_a_typed_error(boot):
    """The host takes a page of the guest's memory away."""
    machine = boot("mov ebx, 7", "mov eax, [0x300000]", "hlt", mode="user64", memory="4M")
    (vcpu,) = machine.vcpus
    page = machine.memory.view(0x30_0000, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), 4096, 0):
        pytest.skip(f"mprotect: {os.strerror(ctypes.get_errno())}")
    try:
        async with deadline():
            with pytest.raises(HostError) as caught:
                await machine.run()
    finally:
        libc.mprotect(ctypes.c_void_p(address), 4096, 3)
    error = caught.value
    assert (error.operation, error.errno) == ("KVM_RUN", errno.EFAULT)
    assert "host memory is gone" in str(error)
    assert "rip" in error.__notes__[0]
    # What the guest did before that is not lost.
    assert vcpu.context.rbx == 7
    machine.memory.write(0x30_0000, b"\x55")
    async with deadline():
        assert await machine.run() == Halted()
    assert vcpu.context.rax == 0x55


@pytest.mark.kvmaio_cpu("kvm")
async def test_ioctl_run_eintr_is_normal_and_eagain_of_an_application_processor(boot):
    """The application processor waits for its SIPI, and can be kicked while it does."""
    machine = boot(*SPIN, vcpus=2)
    boot_cpu, other = machine.vcpus
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(lambda: boot_cpu.inside and other.inside)
        other.kick()
        boot_cpu.kick()
        await until(lambda: other.stats.numExitSignal and boot_cpu.stats.numExitSignal)
        machine.stop()
        await run


@pytest.mark.kvmaio_cpu("kvm")
async def test_ioctl_run_eagain_of_an_application_processor_is_entered_again(boot, assembler):
    """KVM_RUN returns it once the SIPI has come: nothing of it shows but in the core's count."""
    machine = boot(*START_OTHERS, *SPIN, mode="prot32", vcpus=2)
    machine.memory.write(0x8000, assembler("mov al, 7", "out 0x10, al", "again: jmp again"))
    device = machine.attach(Diary(), pio=0x10)
    other = machine.vcpus[1]
    async with deadline():
        run = asyncio.create_task(machine.run())
        await until(device.reached(1))
        machine.stop()
        await run
    assert device.entries == [("write", 0, 1, 7)]
    assert other.stats.numIO == 1 and other.stats.numVMExits - other.stats.numExitSignal == 1
    assert other.model.handle.unrequested >= 1


def signals(thread, which):
    """A set of signals of a thread of ours: bit n - 1 is signal n."""
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    (mask,) = re.findall(rf"^{which}:\s*(\w+)", status, re.M)
    return int(mask, 16)


KICK_BIT = 1 << signal.SIGRTMIN - 1


@pytest.mark.kvmaio_cpu("kvm")
async def test_signal_mask_the_vcpu_thread_blocks_the_kick_signal(boot):
    before = set(os.listdir("/proc/self/task"))
    machine = boot("hlt")
    (thread,) = set(os.listdir("/proc/self/task")) - before
    assert signals(thread, "SigBlk") & KICK_BIT
    await machine.close()


@pytest.mark.skipif(
    "KVMAIO_RESIDENT" in os.environ, reason="a guest on the loop's thread parks no thread"
)
@pytest.mark.kvmaio_cpu("kvm")
async def test_signal_mask_a_kick_of_a_parked_thread_runs_no_handler(boot):
    """It stays pending there, and costs the next entry a look: the guest runs all the same."""
    machine = boot("again: out 0x10, al", "jmp again")
    (vcpu,) = machine.vcpus
    handle = vcpu.model.handle
    libc = ctypes.CDLL(None, use_errno=True)
    async with deadline():
        await vcpu.run()
        for _ in range(20):
            assert libc.tgkill(os.getpid(), handle.tid, signal.SIGRTMIN) == 0
            await asyncio.sleep(0.001)
            assert signals(handle.tid, "SigPnd") & KICK_BIT  # nobody has taken it
            assert handle.page.immediate_exit == 0  # which is what the handler would set
            assert type(await vcpu.run()) is IoExit
            assert not signals(handle.tid, "SigPnd") & KICK_BIT


@pytest.mark.kvm
async def test_discard_pending_signal_a_late_timer_does_not_abort_the_next_entry(boot):
    machine = boot("again: out 0x10, al", "jmp again")
    (vcpu,) = machine.vcpus
    async with deadline(20):
        for _ in range(300):
            await vcpu.run(1)  # the timer is due at about the time of the exit
            assert type(await vcpu.run()) is IoExit


@pytest.mark.kvmaio_cpu("kvm")
@pytest.mark.parametrize("mode", ["prot32", "user64"])
async def test_discard_pending_signal_with_limits_around_the_time_of_the_exit(boot, mode):
    """Now the timer is first, now the exit; neither ends the entry behind it."""
    machine = boot(
        *("again: mov ecx, [0x3000]", "count: dec ecx", "jnz count", "out 0x10, al", "jmp again"),
        mode=mode,
    )
    (vcpu,) = machine.vcpus
    took_ns, count = 0, 50
    outcomes: Counter[bool] = Counter()
    async with deadline(40):
        while took_ns < 3 * vcpu.model.resolution_ns:
            count *= 2
            machine.memory.write(0x3000, count.to_bytes(4, "little"))
            await vcpu.run()
            took_ns = min([(await vcpu.run()).ticks for _ in range(5)])
        limit_ns = float(took_ns)  # follows what the way to the exit takes
        for n in range(300):
            exit_ = await vcpu.run(int(limit_ns * (0.75 + n % 11 / 20)))
            limit_ns *= 0.95 if type(exit_) is IoExit else 1.05
            outcomes[type(exit_) is IoExit] += 1
            if type(exit_) is not IoExit:
                assert exit_.timer_expired
                assert type(await vcpu.run()) is IoExit
    assert outcomes[True] > 10 and outcomes[False] > 10


async def end_by_kick(vcpu):
    """Enter a spinning guest, and kick it."""
    run = asyncio.create_task(vcpu.run())
    await until(partial(getattr, vcpu, "inside"))
    await asyncio.sleep(0.001)
    vcpu.kick()
    assert type(await run) is InterruptedExit


@pytest.mark.soft
@pytest.mark.kvmaio_cpu("kvm")
async def test_startup_thread_kicks_arrive_after_a_drain_and_after_a_hand_over(boot):
    machine = boot(*SPIN)
    (vcpu,) = machine.vcpus
    async with deadline(20):
        await end_by_kick(vcpu)
        await machine.drain()
        machine.resume()
        await end_by_kick(vcpu)
        run = asyncio.create_task(machine.run())
        await until(partial(getattr, vcpu, "inside"))
        async with machine.drained():
            pass
        before = vcpu.stats.numExitSignal
        vcpu.kick()
        await until(lambda: vcpu.stats.numExitSignal > before)
        machine.stop()
        await run
        for cpu in ("soft", "kvm"):
            thread = getattr(vcpu.model, "handle", None)
            await machine.switch_cpu(cpu)
            assert vcpu.model.handle != thread
            await end_by_kick(vcpu)


@pytest.mark.kvm
async def test_startup_thread_a_new_thread_gets_kicks(boot):
    for _ in range(2):
        machine = boot(*SPIN)
        (vcpu,) = machine.vcpus
        async with deadline():
            run = asyncio.create_task(vcpu.run())
            await until(partial(getattr, vcpu, "inside"))
            vcpu.kick()
            assert type(await run) is InterruptedExit
        await machine.close()
