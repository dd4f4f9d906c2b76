"""The declared fast paths: faster than exits, and never out of the guest's order."""

from __future__ import annotations

import asyncio
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmaio import ConfigurationError, Device, Halted, Machine, Register, SharedRegister
from kvmaio.boot import Flat
from kvmaio.testing import BusDriver
from tests.engine.support import LAB, deadline, until

pytestmark = pytest.mark.kvm

BASE = 0x300
POSTED, TIMED, BELL, SHARED, PLAIN = range(5)
REGISTERS = {"posted": POSTED, "timed": TIMED, "bell": BELL, "plain": PLAIN}
RESULTS = 0x6000  # where the guest keeps what it read
HLT = b"\xf4"


class Recorder(Device):
    """Writes down what reaches it; `last` follows every write, for the guest to read back."""

    posted = Register(POSTED, int, posted=True)
    timed = Register(TIMED, int, posted="timed")
    bell = Register(BELL, int, doorbell=True)
    last = SharedRegister(SHARED, int, reset=0xFF)
    plain = Register(PLAIN, int)

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.times: list[int] = []

    def _take(self, kind: str, value: int) -> None:
        self.log.append((kind, value))
        self.last = value

    @posted.on_write
    def write_posted(self, value: int) -> None:
        self._take("posted", value)

    @timed.on_write
    async def write_timed(self, value: int) -> None:
        self.times.append(self.write_time_ns)
        if value % 3 == 0:
            await asyncio.sleep(0)  # a handler that suspends keeps its place, too
        self._take("timed", value)

    @plain.on_write
    def write_plain(self, value: int) -> None:
        self._take("plain", value)

    @plain.on_read
    def read_plain(self) -> int:
        self.log.append(("read", self.last))
        return self.last

    async def run(self) -> None:
        async for rings in self.bell:
            self.log.append(("bell", rings))


def out(register: int, value: int) -> bytes:
    """mov dx, BASE + register; mov al, value; out dx, al"""
    return b"\xba" + (BASE + register).to_bytes(2, "little") + bytes((0xB0, value, 0xEE))


def read_and_keep(register: int, address: int) -> bytes:
    """mov dx, BASE + register; in al, dx; mov [address], al"""
    port = (BASE + register).to_bytes(2, "little")
    return b"\xba" + port + b"\xec\xa2" + address.to_bytes(2, "little")


async def run_guest(code: bytes) -> tuple[Recorder, bytes, Machine]:
    async with Machine() as machine:
        device = machine.attach(Recorder(), pio=BASE)
        machine.load(Flat(code, address=0x1000))
        async with deadline(20):
            assert await machine.run() == Halted()
        return device, machine.memory.read(RESULTS, 256), machine


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["posted", "timed", "plain", "bell", "read", "read shared"]),
        st.integers(0, 254),
    ),
    max_size=60,
)


@settings(max_examples=5 if LAB else 80, suppress_health_check=[HealthCheck.too_slow])
@given(OPERATIONS)
def test_nothing_is_reordered(operations):
    """Random interleavings: the device sees the guest's program order."""
    code = b""
    expected_reads: list[int] = []
    last = 0xFF
    for kind, value in operations:
        if kind in ("read", "read shared"):
            register = PLAIN if kind == "read" else SHARED
            code += read_and_keep(register, RESULTS + len(expected_reads))
            expected_reads.append(last)
        else:
            code += out(REGISTERS[kind], value)
            last = last if kind == "bell" else value

    device, results, _ = asyncio.run(run_guest(code + HLT))

    # The guest read what its own earlier writes had led to.
    assert list(results[: len(expected_reads)]) == expected_reads
    # Accesses with a value: all of them, in program order.
    reads = iter(expected_reads)
    program = []
    for kind, value in operations:
        if kind == "read":
            program.append(("read", next(reads)))
        elif kind == "read shared":
            next(reads)
        elif kind != "bell":
            program.append((kind, value))
    assert [entry for entry in device.log if entry[0] != "bell"] == program
    check_bells(operations, device.log)
    assert device.times == sorted(device.times)


def check_bells(operations, log):
    """A ring may come late and merged, but not early, and not behind a later plain access."""
    rung_before = []  # for each access with a value: rings before it in the program
    rung = 0
    for kind, _ in operations:
        if kind == "bell":
            rung += 1
        elif kind != "read shared":
            rung_before.append((kind, rung))
    accesses = iter(rung_before)
    heard = 0
    for kind, value in log:
        if kind == "bell":
            heard += value
        else:
            access, rings = next(accesses)
            assert heard <= rings
            if access in ("plain", "read"):
                assert heard == rings
    assert heard == rung


async def test_a_posted_write_costs_no_exit_and_arrives_though_no_exit_comes():
    """out; jmp $: the write reaches the device while the guest spins."""
    async with Machine() as machine:
        device = machine.attach(Recorder(), pio=BASE)
        machine.load(Flat(out(POSTED, 0x41) + b"\xeb\xfe", address=0x1000))
        async with deadline(20):
            running = asyncio.create_task(machine.run())
            await until(lambda: device.log)
            machine.stop()
            await running
        assert device.log == [("posted", 0x41)]
        stats = machine.vcpus[0].stats
        assert (stats.numIO, stats.numCoalescedMMIO) == (0, 1)


async def test_more_posted_writes_than_any_ring_holds():
    """KVM's ring holds 169, the core's queue 512: then exits take over, in order."""
    count = 2000
    for register in (POSTED, TIMED):
        # xor bx, bx; loop: mov al, bl; out dx, al; inc bx; cmp bx, count; jne loop; hlt
        code = (
            b"\xba" + (BASE + register).to_bytes(2, "little") + b"\x31\xdb"
            b"\x88\xd8\xee\x43\x81\xfb" + count.to_bytes(2, "little") + b"\x75\xf6\xf4"
        )
        device, _, _ = await run_guest(code)
        assert [value for _, value in device.log] == [n & 0xFF for n in range(count)]


async def test_shared_reads_reach_no_python():
    code = b"".join(read_and_keep(SHARED, RESULTS + i) for i in range(50)) + HLT
    device, results, machine = await run_guest(code)
    assert results[:50] == b"\xff" * 50
    assert device.log == []
    assert machine.vcpus[0].stats.numIO == 0


async def test_a_guest_that_polls_sees_the_device_change_its_shared_register():
    """wait: in al, dx; cmp al, 7; jne wait; hlt"""
    port = (BASE + SHARED).to_bytes(2, "little")
    async with Machine() as machine:
        device = machine.attach(Recorder(), pio=BASE)
        machine.load(Flat(b"\xba" + port + b"\xec\x3c\x07\x75\xfb\xf4", address=0x1000))
        asyncio.get_running_loop().call_later(0.02, setattr, device, "last", 7)
        async with deadline(20):
            assert await machine.run() == Halted()


async def test_the_same_device_without_a_cpu():
    async with BusDriver(Recorder()) as bus:
        for register, value in ((POSTED, 1), (TIMED, 2), (BELL, 3), (PLAIN, 4)):
            await bus.write(register, 1, value)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert await bus.read(SHARED, 1) == 4
        assert bus.device.log == [("posted", 1), ("timed", 2), ("bell", 1), ("plain", 4)]


class Port(Device):
    """Tells that it was written to."""

    size = 1

    def __init__(self) -> None:
        self.written = asyncio.Event()

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.set()


async def test_an_irqfd_raises_a_line_from_another_thread():
    """With the PIC programmed by the guest, an eventfd write arrives as interrupt 0x24."""
    handler = b"\xb0\x20\xe6\x20\xe6\xf4\xcf"  # end of interrupt; out 0xf4, al; iret
    program_pic = b"".join(
        bytes((0xB0, value, 0xE6, port))
        for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xEF))
    )
    code = program_pic + b"\xe6\x80\xfb\xf4\xeb\xfd"  # out 0x80, al; sti; hlt; jmp to the hlt
    async with Machine(irqchip="kernel") as machine:
        ready = machine.attach(Port(), pio=0x80)
        done = machine.attach(Port(), pio=0xF4)
        machine.load(Flat(code, address=0x1000))
        machine.memory.write(0x2000, handler)
        machine.memory.write(0x24 * 4, (0x2000).to_bytes(4, "little"))
        irqfd = machine.irqfd(4)
        async with deadline(20):
            running = asyncio.create_task(machine.run())
            await ready.written.wait()
            await asyncio.to_thread(os.eventfd_write, irqfd, 1)
            await done.written.wait()
            machine.stop()
            await running


async def test_an_irqfd_needs_kvms_interrupt_controller():
    async with Machine() as machine:
        with pytest.raises(ConfigurationError, match='irqchip="kernel"'):
            machine.irqfd(4)
