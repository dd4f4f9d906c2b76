"""Faults: what a guest, or a driver on the bus, gets of a device that misbehaves."""

from __future__ import annotations

import asyncio

import pytest

from kvmaio import Access, Device, Halted, Register, SharedRegister, faults
from kvmaio.devices import CountdownTimer
from kvmaio.errors import ConfigurationError
from kvmaio.irq import IrqLine
from kvmaio.testing import RecordingIrq
from kvmaio.trace import FaultRecord, LineRecord
from tests.engine.support import deadline, until

pytestmark = pytest.mark.kvm


class Sensor(Device):
    """A value of two bytes and a one-byte status; and an interrupt by hand."""

    value = Register(0x0, bits=16)
    status = Register(0x2, reset=0x80)
    later = Register(0x4, access=Access.R, bits=32)

    @later.on_read
    async def answer(self) -> int:
        await asyncio.sleep(0)
        return 0x1234_5678


@pytest.fixture
def sensor(machine):
    return machine.attach(Sensor(), pio=0x60, irq=5, name="sensor")


@pytest.fixture
def told(machine, sensor):
    """What traces hear of faults."""
    records: list = []
    machine.trace(records.append, only="fault")
    return lambda: [record[1:] for record in records if isinstance(record, FaultRecord)]


async def test_flipped_bits(machine, sensor, told):
    sensor.value = 0x1234
    with faults.flip_bits(machine, sensor, "value", 0x8001, when=faults.every(2)) as fault:
        reads = [await machine.pio.read(0x60, 2) for _ in range(4)]
        assert reads == [0x1234, 0x9235, 0x1234, 0x9235]
        await machine.pio.read(0x62, 1)  # another register
        assert (fault.opportunities, fault.count) == (4, 2)
        assert [await machine.pio.read(0x61, 1) for _ in range(2)] == [0x12, 0x92]
        assert [await machine.pio.read(0x60, 4) & 0xFFFFFF for _ in range(2)] == [
            0x801234,
            0x809235,
        ]
    assert await machine.pio.read(0x60, 2) == 0x1234
    assert told() == [("sensor", "value: bits 0x8001 flipped")] * 4


async def test_a_stuck_register(machine, sensor, told):
    with faults.stick(machine, sensor, "status", 0x01) as fault:
        await machine.pio.write(0x62, 1, 0x55)
        await machine.pio.write(0x60, 2, 0xABCD)
        assert await machine.pio.read(0x62, 1) == 0x01
        assert await machine.pio.read(0x60, 4) == 0x01ABCD
    assert (sensor.status, sensor.value, fault.count) == (0x80, 0xABCD, 3)
    assert await machine.pio.read(0x62, 1) == 0x80
    assert told() == [("sensor", "status: stuck at 0x1")] * 3


async def test_short_reads_also_of_async_handlers(machine, sensor):
    with faults.short_reads(machine, sensor, 2):
        assert await machine.pio.read(0x64, 4) == 0xFFFF_5678
        assert await machine.pio.read(0x64, 2) == 0x5678
        with faults.flip_bits(machine, sensor, "later", 1):  # nearer to the guest
            assert await machine.pio.read(0x64, 4) == 0xFFFF_5679


async def test_a_slow_device_holds_up_its_vcpu_only(boot):
    machine = boot("in al, 0x62", "hlt")
    sensor = machine.attach(Sensor(), pio=0x60, name="sensor")
    other = machine.attach(Sensor(), pio=0x70, name="other")
    with faults.slow_device(machine, sensor, 0.05) as fault:
        async with deadline():
            running = asyncio.create_task(machine.run())
            await until(lambda: fault.count)
            assert await machine.pio.read(0x72, 1) == other.status  # which is not slow
            assert not running.done()
            assert await running == Halted()
    assert machine.vcpus[0].context.rax & 0xFF == 0x80 and fault.count == 1


async def test_interrupts_dropped_and_duplicated(machine, sensor, told):
    line = machine.irq(5)
    heard = RecordingIrq(machine.clock)
    line.connect(heard)
    with faults.drop_interrupts(machine, sensor.irq, when=faults.every(2)) as fault:
        for _ in range(4):
            sensor.irq.pulse()
        assert [level for _, level in heard.edges] == [True, False] * 2
        sensor.irq.set(True)
        sensor.irq.set(False)
        sensor.irq.set(True)  # dropped
        assert (heard.level, fault.count) == (False, 3)
    assert heard.level  # the line is high, and the fault is gone
    sensor.irq.set(False)
    heard.edges.clear()
    with faults.duplicate_interrupts(machine, line):
        sensor.irq.pulse()
    assert [level for _, level in heard.edges] == [True, False, True, False]
    assert told() == [("sensor.irq", "interrupt dropped")] * 3 + [("irq5", "interrupt duplicated")]


@pytest.mark.kvmaio_loop("simulated")
async def test_interrupts_delayed(machine, sensor):
    heard = RecordingIrq(machine.clock)
    machine.irq(5).connect(heard)
    with faults.delay_interrupts(machine, sensor.irq, 1_000_000, when=faults.every(2)):
        start_ns = machine.clock.now_ns
        sensor.irq.pulse()
        await asyncio.sleep(0.01)
        sensor.irq.set(True)
        await asyncio.sleep(0.0004)
        sensor.irq.set(False)  # waits behind the rise
        assert heard.edges[-1] == (start_ns, False)
        await asyncio.sleep(0.01)
        sensor.irq.set(True)
        sensor.irq.set(False)
        sensor.irq.set(True)  # delayed, and cut short by the end of the block
    late_ns = start_ns + 11_000_000
    assert heard.edges[:5] == [
        *[(start_ns, True), (start_ns, False)],
        *[(late_ns, True), (late_ns, False)],
        (start_ns + 20_400_000, True),
    ]
    assert heard.level
    await asyncio.sleep(0.01)
    assert heard.level and len(heard.edges) == 7


async def test_a_guest_misses_an_interrupt(boot):
    machine = boot(
        *("mov word ptr [4*0x25], offset handler", "mov word ptr [4*0x25+2], 0"),
        *("mov eax, 1000000", "mov dx, 0x40", "out dx, eax"),  # 1 ms
        *("mov eax, 3", "mov dx, 0x44", "out dx, eax"),  # enabled, periodic
        *("next: sti", "hlt", "cli", "cmp bx, 2", "jb next", "hlt"),
        *("handler: inc bx", "mov eax, 1", "mov dx, 0x48", "out dx, eax", "iret"),
    )
    timer = machine.attach(CountdownTimer(), pio=0x40, irq=5, name="timer")
    records: list = []
    machine.trace(records.append, only="fault,irq")
    with faults.drop_interrupts(machine, machine.irq(5), when=lambda n: n == 1) as fault:
        async with deadline():
            running = asyncio.create_task(machine.run())
            await until(lambda: fault.count)
            timer.irq.set(False)  # somebody looks after it: level-triggered, it would stay high
            timer.status = type(timer.status)(0)
            assert await running == Halted()
    assert machine.vcpus[0].context.rbx & 0xFFFF == 2
    irqs = [r.level for r in records if isinstance(r, LineRecord) and r.source == "irq5"]
    # One was dropped; a further tick may come before the machine stops.
    assert irqs.count(True) == timer.irq.edges - 1 >= 2


async def test_what_cannot_be_at_fault(machine, sensor):
    class Shared(Device):
        ready: SharedRegister[int] = SharedRegister(0x0)

    shared = machine.attach(Shared(), pio=0x70)
    with pytest.raises(ConfigurationError, match=r"'x'; there are: value, status, later"):
        faults.flip_bits(machine, sensor, "x", 1).__enter__()
    with pytest.raises(ConfigurationError, match="SharedRegister"):
        faults.stick(machine, shared, "ready", 1).__enter__()


def test_chance_is_the_same_with_the_same_seed():
    first, second, third = (faults.chance(0.5, seed) for seed in (1, 1, 2))
    strikes = [[when(n) for n in range(64)] for when in (first, second, third)]
    assert strikes[0] == strikes[1] != strikes[2]
    assert 16 < sum(strikes[0]) < 48


def test_filters_of_a_line_stand_one_before_another():
    line, heard = IrqLine(), list[bool]()
    order: list[str] = []
    line.connect(heard.append)
    kept: list = []

    def inner(level, deliver):
        order.append("inner")
        kept.append(deliver)

    def outer(level, deliver):
        order.append("outer")
        deliver(level)

    with line.through(inner):
        with line.through(outer):
            line.set(True)
        assert order == ["outer", "inner"] and heard == []
        late: list = []
        line.connect(late.append)
        assert late == []  # nobody has heard of it yet
    assert heard == late == [True]
    kept[0](False)  # what was delayed and nobody called off
    assert heard == [True, False]
