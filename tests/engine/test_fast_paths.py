"""The declared fast paths: faster than exits, and never out of the guest's order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmaio import (
    ConfigurationError,
    Device,
    EndRun,
    Halted,
    Machine,
    Register,
    SharedRegister,
    Stopped,
    declared_paths,
)
from kvmaio.boot import Flat
from kvmaio.kvm import promotion
from kvmaio.testing import BusDriver
from tests.engine.support import LAB, deadline, until

pytestmark = pytest.mark.kvm

BASE = 0x300
WINDOW = 0xA300  # of MMIO: above the 32 KiB of RAM, and within reach of 16-bit addresses
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


def out(register: int, value: int, *, mmio: bool = False) -> bytes:
    """mov al, value; and mov dx, BASE + register; out dx, al; or mov [WINDOW + register], al"""
    if mmio:
        return bytes((0xB0, value, 0xA2)) + (WINDOW + register).to_bytes(2, "little")
    return b"\xba" + (BASE + register).to_bytes(2, "little") + bytes((0xB0, value, 0xEE))


def read_and_keep(register: int, address: int, *, mmio: bool = False) -> bytes:
    """mov dx, BASE + register; in al, dx; or mov al, [WINDOW + register]; mov [address], al"""
    keep = b"\xa2" + address.to_bytes(2, "little")
    if mmio:
        return b"\xa0" + (WINDOW + register).to_bytes(2, "little") + keep
    return b"\xba" + (BASE + register).to_bytes(2, "little") + b"\xec" + keep


async def run_guest(code: bytes) -> tuple[Recorder, bytes, Machine]:
    async with Machine(memory="32K") as machine:
        device = machine.attach(Recorder(), pio=BASE, mmio=WINDOW)
        machine.load(Flat(code, address=0x1000))
        async with deadline(20):
            assert await machine.run() == Halted()
        return device, machine.memory.read(RESULTS, 256), machine


WRITES = ("posted", "timed", "plain")


def operations(*kinds: str) -> st.SearchStrategy[list[tuple[str, int, bool]]]:
    """Kind, value, and is it MMIO?"""
    return st.lists(
        st.tuples(st.sampled_from(kinds), st.integers(0, 0xFD), st.booleans()), max_size=60
    )


@pytest.fixture(params=["on its own thread", "resident"])
def place(request, monkeypatch):
    """Where the vCPUs run: at which exit a resident one moves to the loop's thread."""
    exits = 1 if request.param == "resident" else 1 << 30
    for name, value in (("OFTEN_EXITS", exits), ("OFTEN_WITHIN_NS", 1 << 62)):
        monkeypatch.setattr(promotion, name, value)
    return request.param


property_test = settings(
    max_examples=5 if LAB else 80,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("kinds", [(*WRITES, "bell"), WRITES], ids=["bells", "no bells"])
@property_test
@given(data=st.data())
def test_nothing_is_reordered(place, kinds, data):
    """Random interleavings: the device sees the guest's program order."""
    program = data.draw(operations(*kinds, "read", "read shared"))
    code = b""
    expected_reads: list[int] = []
    last = 0xFF
    for kind, value, mmio in program:
        if kind in ("read", "read shared"):
            register = PLAIN if kind == "read" else SHARED
            code += read_and_keep(register, RESULTS + len(expected_reads), mmio=mmio)
            expected_reads.append(last)
        else:
            code += out(REGISTERS[kind], value, mmio=mmio)
            last = last if kind == "bell" else value

    device, results, _ = asyncio.run(run_guest(code + HLT))

    # The guest read what its own earlier writes had led to.
    assert list(results[: len(expected_reads)]) == expected_reads
    # Accesses with a value: all of them, in program order.
    reads = iter(expected_reads)
    expected = []
    for kind, value, _ in program:
        if kind == "read":
            expected.append(("read", next(reads)))
        elif kind == "read shared":
            next(reads)
        elif kind != "bell":
            expected.append((kind, value))
    assert [entry for entry in device.log if entry[0] != "bell"] == expected
    check_bells([kind for kind, *_ in program], device.log)
    assert device.times == sorted(device.times)


class Pair(Recorder):
    """Two vCPUs write to it; each ends with END or one more."""

    END = 0xFE
    ended = 0

    def _take(self, kind: str, value: int) -> None:
        if value < self.END:
            super()._take(kind, value)
            return
        self.ended += 1
        if self.ended == 2:
            raise EndRun(Stopped("both have ended"))


async def run_two(codes: list[bytes]) -> Pair:
    async with Machine(memory="32K", vcpus=2) as machine:
        device = machine.attach(Pair(), pio=BASE, mmio=WINDOW)
        machine.load(Flat(codes[0], address=0x1000))
        machine.memory.write(0x4000, codes[1])
        machine.vcpus[1].init()
        machine.vcpus[1].start_up(4)
        async with deadline(20):
            assert await machine.run() == Stopped("both have ended")
        return device


@property_test
@given(programs=st.tuples(operations(*WRITES), operations(*WRITES)))
def test_nothing_of_a_vcpu_is_reordered_beside_another(place, programs):
    """The two are told apart by the lowest bit of what they write."""
    marked = [
        [(kind, value & 0xFE | number, mmio) for kind, value, mmio in program]
        for number, program in enumerate(programs)
    ]
    codes = [
        b"".join(out(REGISTERS[kind], value, mmio=mmio) for kind, value, mmio in program)
        + out(PLAIN, Pair.END | number)
        + HLT
        for number, program in enumerate(marked)
    ]
    device = asyncio.run(run_two(codes))
    for number, program in enumerate(marked):
        seen = [entry for entry in device.log if entry[1] & 1 == number]
        assert seen == [(kind, value) for kind, value, _ in program]


def check_bells(kinds, log):
    """A ring may come late and merged, but not early, and not behind a later plain access."""
    rung_before = []  # for each access with a value: rings before it in the program
    rung = 0
    for kind in kinds:
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
    """KVM's ring holds 169, the core's queue 1024: then exits take over, in order."""
    count = 2000
    for register in (POSTED, TIMED):
        # xor bx, bx; loop: mov al, bl; out dx, al; inc bx; cmp bx, count; jne loop; hlt
        code = (
            b"\xba" + (BASE + register).to_bytes(2, "little") + b"\x31\xdb"
            b"\x88\xd8\xee\x43\x81\xfb" + count.to_bytes(2, "little") + b"\x75\xf6\xf4"
        )
        device, _, _ = await run_guest(code)
        assert [value for _, value in device.log] == [n & 0xFF for n in range(count)]


@pytest.mark.parametrize("posted_first", [True, False])
async def test_many_posted_registers_leave_room_for_others(posted_first):
    class Posted(Device):
        value = Register(0, int, posted=True)

    class Shared(Device):
        value = SharedRegister(0, int)

    places = [(Posted, 0x1000), (Shared, 0x2000)]
    async with Machine(cpu="kvm", memory="1M") as machine:
        for kind, first in places if posted_first else reversed(places):
            for port in range(first, first + 64):
                machine.attach(kind(), pio=port)
        machine.attach(Posted(), pio=0x3000)  # slower, and no error
        with pytest.raises(ConfigurationError, match="more than 64 shared and timed registers"):
            machine.attach(Shared(), pio=0x3001)


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


FLAG = 0x5000
WAIT = b"\x80\x3e\x00\x50\x00\x74\xf9"
"""again: cmp byte [FLAG], 0; je again"""


class NoBell(Device):
    """Where there are no doorbells, a flush beside a running guest takes what waits, no more."""

    posted = Register(POSTED, int, posted=True)
    last = SharedRegister(SHARED, int, reset=0xFF)
    then: Callable[[], object] | None = None

    def __init__(self) -> None:
        self.log: list[int] = []

    @posted.on_write
    def write_posted(self, value: int) -> None:
        self.log.append(value)
        self.last = value
        if self.then is not None and len(self.log) == 1:
            self.then()


async def test_shared_reads_come_from_the_cell_again_behind_a_flush_without_an_exit():
    """A posted write, which is served while the guest computes; then 2000 reads."""
    reads = b"\xba" + (BASE + SHARED).to_bytes(2, "little") + b"\xb9\xd0\x07\xec\xe2\xfd"
    async with Machine() as machine:
        device = machine.attach(NoBell(), pio=BASE)
        machine.load(Flat(out(POSTED, 7) + WAIT + reads + HLT, address=0x1000))
        async with deadline(20):
            run = asyncio.create_task(machine.run())
            await until(lambda: device.log)
            machine.memory.write(FLAG, b"\x01")
            assert await run == Halted()
        assert device.log == [7]
        assert machine.vcpus[0].stats.numIO < 10


async def test_a_flush_goes_on_though_a_handler_has_changed_the_bus(monkeypatch):
    monkeypatch.setattr(declared_paths, "FLUSH_S", 3600)
    async with Machine() as machine:
        device = machine.attach(NoBell(), pio=BASE)
        device.then = lambda: machine.attach(NoBell(), pio=BASE + 0x100)
        code = b"".join(out(POSTED, value) for value in range(20)) + b"\xeb\xfe"
        machine.load(Flat(code, address=0x1000))
        (vcpu,) = machine.vcpus
        async with deadline(20):
            run = asyncio.create_task(machine.run())
            await until(lambda: vcpu.model.posted_count() == 20)
            assert await vcpu.flush_posted()
            assert device.log == list(range(20))
            assert vcpu.model.posted_count() == 0
            machine.stop()
            await run
        assert device.log == list(range(20))


@pytest.mark.soft
async def test_a_shared_register_has_a_cell_for_each_window_and_no_others():
    async with Machine(cpu="kvm") as machine:
        device = machine.attach(Recorder(), pio=BASE, mmio=0xD000_0000)
        machine.load(Flat(HLT, address=0x1000))
        async with deadline(20):
            await machine.run()
            for cpu in ("soft", "kvm", "soft", "kvm"):
                await machine.switch_cpu(cpu)
        assert len(vars(device)[SharedRegister._CELLS]["last"]) == 2
