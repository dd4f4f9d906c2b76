"""Uart16550: what the datasheet promises a guest, driven through the bus."""

import asyncio

import pytest

from kvmaio.devices import Uart16550
from kvmaio.devices.uart16550 import Fcr, Ier, Iir, Lcr, Lsr, Mcr, Msr
from kvmaio.testing import BusDriver, settle

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR, DLL, DLM = IIR, DATA, IER
EMPTY = Lsr.HOLDING_EMPTY | Lsr.TRANSMITTER_EMPTY
FIFOS = 0xC0
OUT2 = Mcr.OUT2
CHARACTER_NS = 10 * 1_000_000_000 // 115_200  # 8N1


async def set_up(bus, *, ier=0, fcr=0, mcr=OUT2):
    """115200 8N1, as a driver does it."""
    await bus.write(LCR, 1, Lcr.DLAB | 3)
    await bus.write(DLL, 1, 1)
    await bus.write(DLM, 1, 0)
    await bus.write(LCR, 1, 3)
    await bus.write(FCR, 1, fcr)
    await bus.write(MCR, 1, mcr)
    await bus.write(IER, 1, ier)


async def test_after_power_on():
    async with BusDriver(Uart16550()) as bus:
        registers = [await bus.read(offset) for offset in range(8)]
        assert registers == [0, 0, Iir.NONE, 0, 0, EMPTY, Msr.CTS | Msr.DSR | Msr.DCD, 0]
        assert bus.irq.edges == []


async def test_what_is_written_to_thr_is_out_at_once():
    async with BusDriver(Uart16550()) as bus:
        for byte in b"Hi\xff":
            await bus.write(DATA, 1, byte)
            assert await bus.read(LSR) == EMPTY
        assert bus.device.output == b"Hi\xff"


async def test_the_divisor_hides_behind_dlab():
    async with BusDriver(Uart16550()) as bus:
        assert bus.device.baud == 9600
        await bus.write(LCR, 1, Lcr.DLAB)
        await bus.write(DLL, 1, 0x80)
        await bus.write(DLM, 1, 0x01)
        assert [await bus.read(DLL), await bus.read(DLM)] == [0x80, 0x01]
        assert bus.device.baud == 300
        await bus.write(LCR, 1, 0)
        assert [await bus.read(DATA), await bus.read(IER)] == [0, 0]
        await bus.write(DATA, 1, ord("A"))
        await bus.write(LCR, 1, Lcr.DLAB)
        assert [await bus.read(DLL), bus.device.output] == [0x80, b"A"]
        await bus.write(DLL, 2, 0)
        assert bus.device.baud == 0


async def test_scratch_register_and_unused_bits():
    async with BusDriver(Uart16550()) as bus:
        for offset, value in ((SCR, 0xA5), (IER, 0xFF), (MCR, 0xEF)):
            await bus.write(offset, 1, value)
        assert [await bus.read(o) for o in (SCR, IER, MCR)] == [0xA5, 0x0F, 0x0F]


@pytest.mark.parametrize(("bits", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
async def test_receiver_interrupts_at_its_trigger_level(bits, level):
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, ier=Ier.RECEIVED_DATA, fcr=Fcr.ENABLE | bits)
        await bus.device.send(bytes(level - 1))
        assert (await bus.read(IIR), bus.irq.level) == (FIFOS | Iir.NONE, False)
        await bus.device.send(b"x")
        assert (await bus.read(IIR), bus.irq.level) == (FIFOS | Iir.RECEIVED_DATA, True)
        await bus.read(DATA)
        assert (await bus.read(IIR), bus.irq.level) == (FIFOS | Iir.NONE, False)


async def test_characters_left_in_the_fifo_time_out_after_four_character_times():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, ier=Ier.RECEIVED_DATA, fcr=Fcr.ENABLE | 0xC0)
        await bus.device.send(b"ab")
        await bus.advance(4 * CHARACTER_NS - 1)
        assert await bus.read(IIR) == FIFOS | Iir.NONE
        await bus.advance(CHARACTER_NS)
        assert await bus.read(IIR) == FIFOS | Iir.CHARACTER_TIMEOUT
        assert await bus.read(DATA) == ord("a")  # which starts the time anew
        assert await bus.read(IIR) == FIFOS | Iir.NONE
        await bus.advance(5 * CHARACTER_NS)
        assert await bus.read(DATA) == ord("b")
        await bus.advance(10 * CHARACTER_NS)
        first = 4 * 10 * 1_000_000_000 // 115_200
        assert [level for _, level in bus.irq.edges] == [True, False, True, False]
        assert abs(bus.irq.edges[0][0] - first) <= 4  # ns: four rounded characters


async def test_without_fifos_there_is_no_timeout_and_room_for_one():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, ier=Ier.RECEIVED_DATA)
        bus.device.receive(1)
        assert await bus.read(IIR) == Iir.RECEIVED_DATA
        bus.device.receive(2)
        assert await bus.read(LSR) == EMPTY | Lsr.DATA_READY | Lsr.OVERRUN
        assert [await bus.read(DATA), await bus.read(LSR)] == [2, EMPTY]
        await bus.advance(10**9)
        assert await bus.read(IIR) == Iir.NONE


async def test_overrun_of_the_fifo_loses_the_newest_and_keeps_the_rest():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, fcr=Fcr.ENABLE)
        for byte in range(17):
            bus.device.receive(byte)
        assert await bus.read(LSR) == EMPTY | Lsr.DATA_READY | Lsr.OVERRUN
        assert await bus.read(LSR) == EMPTY | Lsr.DATA_READY
        assert [await bus.read(DATA) for _ in range(16)] == list(range(16))
        assert await bus.read(LSR) == EMPTY


async def test_thr_empty_interrupt():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, ier=Ier.TRANSMITTER_EMPTY)
        assert bus.irq.level  # enabling it with THR empty raises it
        assert await bus.read(IIR) == Iir.TRANSMITTER_EMPTY
        # Reading IIR takes it back.
        assert (await bus.read(IIR), bus.irq.level) == (Iir.NONE, False)
        await bus.write(DATA, 1, 1)
        assert bus.irq.level
        await bus.write(DATA, 1, 2)  # falls and rises: an edge for each byte
        assert [level for _, level in bus.irq.edges] == [True, False, True, False, True]
        await bus.write(IER, 1, 0)
        assert (await bus.read(IIR), bus.irq.level) == (Iir.NONE, False)
        await bus.write(IER, 1, Ier.TRANSMITTER_EMPTY)
        assert await bus.read(IIR) == Iir.TRANSMITTER_EMPTY


async def test_reading_iir_takes_back_only_what_it_reports():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, ier=Ier.TRANSMITTER_EMPTY | Ier.RECEIVED_DATA)
        bus.device.receive(7)
        assert [await bus.read(IIR) for _ in range(2)] == [Iir.RECEIVED_DATA] * 2
        await bus.read(DATA)
        assert await bus.read(IIR) == Iir.TRANSMITTER_EMPTY


async def test_interrupts_in_the_order_of_their_priority():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, ier=0x0F, fcr=Fcr.ENABLE)
        bus.device.set_modem_lines(Msr.CTS)
        bus.device.receive_break()
        seen = [await bus.read(IIR)]
        await bus.read(LSR)
        seen.append(await bus.read(IIR))
        await bus.read(DATA)
        seen += [await bus.read(IIR), await bus.read(IIR)]
        await bus.read(MSR)
        seen.append(await bus.read(IIR))
        assert [iir & 0x0F for iir in seen] == [
            Iir.LINE_STATUS,
            Iir.RECEIVED_DATA,
            Iir.TRANSMITTER_EMPTY,
            Iir.MODEM_STATUS,
            Iir.NONE,
        ]


async def test_a_break_shows_when_its_character_is_next():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, ier=Ier.LINE_STATUS, fcr=Fcr.ENABLE)
        bus.device.receive(ord("a"))
        bus.device.receive_break()
        ready = EMPTY | Lsr.DATA_READY
        assert (await bus.read(LSR), bus.irq.level) == (ready | Lsr.ERROR_IN_FIFO, False)
        assert await bus.read(DATA) == ord("a")
        assert bus.irq.level
        broken = ready | Lsr.ERROR_IN_FIFO | Lsr.BREAK | Lsr.FRAMING_ERROR
        assert [await bus.read(LSR), await bus.read(LSR)] == [broken, ready]
        assert (bus.irq.level, await bus.read(DATA), await bus.read(LSR)) == (False, 0, EMPTY)


async def test_out2_gates_the_line_but_not_iir():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, ier=Ier.RECEIVED_DATA, mcr=0)
        bus.device.receive(1)
        assert (await bus.read(IIR), bus.irq.level) == (Iir.RECEIVED_DATA, False)
        await bus.write(MCR, 1, OUT2)
        await bus.write(MCR, 1, 0)
        assert bus.irq.edges == [(0, True), (0, False)]


async def test_loopback_brings_back_data_and_modem_lines():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, ier=Ier.RECEIVED_DATA, mcr=Mcr.LOOP)
        await bus.read(MSR)
        lines = []
        for output in (Mcr.RTS, Mcr.DTR, Mcr.OUT1, Mcr.OUT2, Mcr(0)):
            await bus.write(MCR, 1, Mcr.LOOP | output)
            lines.append(await bus.read(MSR))
        assert lines == [
            Msr.CTS | Msr.DCTS,
            Msr.DSR | Msr.DDSR | Msr.DCTS,
            Msr.RI | Msr.DDSR,
            Msr.DCD | Msr.DDCD | Msr.TERI,
            Msr.DDCD,
        ]
        await bus.write(MCR, 1, Mcr.LOOP | OUT2)  # inside, OUT2 drives DCD and not the gate
        await bus.write(DATA, 1, 0x5A)
        bus.device.receive(0xFF)  # the line is cut off
        assert await bus.read(IIR) == Iir.RECEIVED_DATA
        assert (await bus.read(DATA), await bus.read(DATA)) == (0x5A, 0)
        assert (bus.device.output, bus.irq.edges) == (b"", [])


async def test_modem_lines_from_outside():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, ier=Ier.MODEM_STATUS)
        bus.device.set_modem_lines(Msr.CTS | Msr.DSR | Msr.DCD | Msr.RI)
        assert bus.irq.edges == []  # a ring counts when it ends
        bus.device.set_modem_lines(Msr.DSR)
        assert bus.irq.edges == [(0, True)]
        assert await bus.read(MSR) == Msr.DSR | Msr.DCTS | Msr.TERI | Msr.DDCD
        assert (await bus.read(MSR), bus.irq.level) == (Msr.DSR, False)


async def test_fifo_control():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, fcr=Fcr.ENABLE)
        await bus.device.send(b"abc")
        await bus.write(FCR, 1, Fcr.ENABLE | Fcr.CLEAR_RECEIVER | 0x80)
        assert (await bus.read(LSR), await bus.read(IIR)) == (EMPTY, FIFOS | Iir.NONE)
        await bus.device.send(b"abc")
        await bus.write(FCR, 1, 0xC0)  # without ENABLE: off, emptied, no trigger level
        assert (await bus.read(LSR), await bus.read(IIR)) == (EMPTY, Iir.NONE)


async def test_send_waits_while_the_receiver_is_full():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, fcr=Fcr.ENABLE)
        text = bytes(range(40))
        async with asyncio.TaskGroup() as tasks:
            sender = tasks.create_task(bus.device.send(text))
            await settle()
            received: list[int] = []
            while len(received) < 39:
                assert not sender.done() or len(received) >= 24
                received.append(await bus.read(DATA))
                await settle()
            assert sender.done()
        received.append(await bus.read(DATA))
        assert (bytes(received), await bus.read(LSR)) == (text, EMPTY)


async def test_send_waits_for_the_end_of_loopback():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, mcr=Mcr.LOOP)
        sender = asyncio.create_task(bus.device.send(b"x"))
        await settle()
        assert (sender.done(), await bus.read(LSR)) == (False, EMPTY)
        await bus.write(MCR, 1, 0)
        await sender
        assert await bus.read(DATA) == ord("x")


async def test_a_slow_sink_holds_up_the_writer_and_lsr_tells():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, ier=Ier.TRANSMITTER_EMPTY)
        await bus.read(IIR)
        ready = asyncio.Event()

        async def sink(data):
            await ready.wait()

        bus.device.add_sink(sink)
        writer = asyncio.create_task(bus.write(DATA, 1, ord("A")))
        await settle()
        assert (writer.done(), await bus.read(LSR), bus.irq.level) == (False, 0, False)
        ready.set()
        await writer
        assert (await bus.read(LSR), bus.irq.level) == (EMPTY, True)


async def test_a_cancelled_write_leaves_a_usable_transmitter():
    async with BusDriver(Uart16550()) as bus:
        blocked = asyncio.get_running_loop().create_future()
        bus.device.add_sink(lambda data: blocked)
        writer = asyncio.create_task(bus.write(DATA, 1, 1))
        await settle()
        writer.cancel()
        await asyncio.wait([writer])
        assert (writer.cancelled(), await bus.read(LSR)) == (True, EMPTY)


async def test_reset_empties_and_silences_it():
    async with BusDriver(Uart16550()) as bus:
        await set_up(bus, ier=0x0F, fcr=Fcr.ENABLE)
        await bus.device.send(b"abc")
        bus.reset()
        state = [await bus.read(offset) for offset in (DATA, IER, IIR, MCR, LSR)]
        assert (state, bus.irq.level) == ([0, 0, Iir.NONE, 0, EMPTY], False)
        await bus.advance(10**9)
        assert await bus.read(IIR) == Iir.NONE


async def test_state_moves_to_another_uart():
    async with BusDriver(Uart16550()) as old, BusDriver(Uart16550()) as new:
        await set_up(old, ier=0x0F, fcr=Fcr.ENABLE | 0x80)
        await old.device.send(b"ab")
        old.device.receive_break()
        for register in Uart16550.registers:
            new.device.__dict__[register.name] = old.device.__dict__[register.name]
        new.device.load(old.device.save())
        new.device.update()
        seen = []
        for bus in (old, new):
            reads = [await bus.read(o) for o in (IIR, LSR, DATA, DATA, LSR, IIR, MSR)]
            seen.append((reads, bus.irq.level))
        assert seen[0] == seen[1]
        assert seen[0][0][2:4] == list(b"ab")
