"""LocalApic: priorities, the timer, IPIs, LINT0, errors; several on one bus, and with an IOAPIC."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio.devices import ApicBus, IoApic, LocalApic
from kvmaio.devices.apic_bus import DeliveryMode, InterruptMessage
from kvmaio.errors import ConfigurationError
from kvmaio.testing import BusDriver, ManualClock, check_round_trips

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x320, 0x350, 0x360, 0x370
INITIAL, CURRENT, DIVIDE = 0x380, 0x390, 0x3E0
MASKED, PERIODIC = 1 << 16, 1 << 17
DIVIDE_BY_1 = 0xB


class Core:
    """A processor that writes down what happens to it."""

    def __init__(self):
        self.log = []

    def nmi(self):
        self.log.append("nmi")

    def init(self):
        self.log.append("init")

    def start_up(self, vector):
        self.log.append(f"start-up {vector:#x}")


def write(apic, offset, value):
    apic.write(offset, 4, value)
    apic.update()


def bits(apic, bitmap):
    """The vectors in ISR, TMR or IRR, through the registers."""
    words = [apic.read(bitmap + 0x10 * i, 4) for i in range(8)]
    return {32 * i + bit for i, word in enumerate(words) for bit in range(32) if word >> bit & 1}


def enabled(bus=None, index=0):
    apic = LocalApic(index, bus)
    apic.processor = Core()
    write(apic, SVR, 0x1FF)
    return apic


def fixed(apic, vector, *, level=False):
    return apic.receive(InterruptMessage(DeliveryMode.FIXED, vector, level))


def several(count):
    bus = ApicBus()
    return [enabled(bus, index) for index in range(count)]


# ---- registers ----------------------------------------------------------------------------------


async def test_registers_after_reset():
    async with BusDriver(LocalApic(3)) as bus:
        assert await bus.read(ID, 4) == 3 << 24
        assert await bus.read(VERSION, 4) == 0x50014
        assert await bus.read(SVR, 4) == 0xFF
        assert await bus.read(DFR, 4) == 0xFFFF_FFFF
        for entry in range(LVT_TIMER, LVT_ERROR + 0x10, 0x10):
            assert await bus.read(entry, 4) == MASKED
        await bus.write(ID, 4, 0x0523_4567)
        bus.reset()
        assert await bus.read(ID, 4) == 3 << 24


async def test_unwritable_bits_stay():
    async with BusDriver(LocalApic(1)) as bus:
        await bus.write(SVR, 4, 0xFFFF_FFFF)
        for offset, value in (
            (ID, 0xFF00_0000),
            (VERSION, 0x50014),
            (TPR, 0xFF),
            (LDR, 0xFF00_0000),
            (DFR, 0xFFFF_FFFF),
            (SVR, 0x3FF),
            (ICR_HIGH, 0xFF00_0000),
            (LVT_TIMER, 0x300FF),
            (LVT_LINT0, 0x1A7FF),
            (LVT_ERROR, 0x100FF),
            (DIVIDE, 0xB),
        ):
            await bus.write(offset, 4, 0xFFFF_FFFF)
            assert await bus.read(offset, 4) == value, hex(offset)


def test_while_it_is_switched_off_the_local_vector_table_is_masked_and_nothing_is_taken():
    apic = LocalApic(1)
    write(apic, LVT_LINT1, 0x400)
    assert apic.read(LVT_LINT1, 4) == 0x400 | MASKED
    assert not fixed(apic, 0x40)
    write(apic, SVR, 0x1FF)
    write(apic, LVT_LINT1, 0x400)
    assert apic.read(LVT_LINT1, 4) == 0x400
    write(apic, SVR, 0xFF)
    assert apic.read(LVT_LINT1, 4) == 0x400 | MASKED


# ---- priorities ---------------------------------------------------------------------------------


def test_the_highest_vector_goes_first_and_holds_back_its_class():
    apic = enabled()
    for vector in (0x31, 0x45, 0x41, 0x52):
        assert fixed(apic, vector)
    assert bits(apic, IRR) == {0x31, 0x45, 0x41, 0x52}
    assert (apic.acknowledge(), apic.irq.level, apic.read(PPR, 4)) == (0x52, False, 0x50)
    write(apic, EOI, 0)
    assert (apic.acknowledge(), apic.irq.level) == (0x45, False)  # 0x41 is of the same class
    fixed(apic, 0x60)  # higher: interrupts
    assert apic.acknowledge() == 0x60
    assert bits(apic, ISR) == {0x45, 0x60}
    served = []
    while bits(apic, ISR):
        write(apic, EOI, 0)
        if apic.irq.level:
            served.append(apic.acknowledge())
    assert served == [0x41, 0x31]
    assert apic.read(PPR, 4) == 0


def test_task_priority_holds_back_and_cr8_is_its_class():
    apic = enabled()
    write(apic, TPR, 0x48)
    fixed(apic, 0x4F)
    assert (apic.irq.level, apic.read(PPR, 4)) == (False, 0x48)
    apic.take_cr8(4)
    assert apic.read(TPR, 4) == 0x48
    apic.take_cr8(3)
    assert (apic.read(TPR, 4), apic.irq.level) == (0x30, True)


def test_an_acknowledgement_with_nothing_to_take_is_spurious():
    apic = enabled()
    write(apic, SVR, 0x1EF)
    fixed(apic, 0x33)
    write(apic, TPR, 0xF0)
    assert (apic.acknowledge(), bits(apic, ISR)) == (0xEF, set())


def test_an_end_with_nothing_in_service_does_nothing():
    apic = enabled()
    write(apic, EOI, 0)
    assert bits(apic, ISR) == set()


# ---- the timer ----------------------------------------------------------------------------------


async def test_one_shot_timer_rings_once_exactly():
    async with BusDriver(LocalApic()) as bus:
        await bus.write(SVR, 4, 0x1FF)
        await bus.write(LVT_TIMER, 4, 0x40)
        await bus.write(DIVIDE, 4, DIVIDE_BY_1)
        await bus.write(INITIAL, 4, 5_000)
        await bus.advance(2_000)
        assert await bus.read(CURRENT, 4) == 3_000
        await bus.advance(1_000_000)
        assert bus.irq.edges == [(5_000, True)]
        assert (await bus.read(CURRENT, 4), bus.device.acknowledge()) == (0, 0x40)
        await bus.write(EOI, 4, 0)
        await bus.advance(1_000_000)
        assert not bus.irq.level


@pytest.mark.parametrize(
    ("divide", "divisor"),
    [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xA, 128), (0xB, 1)],
)
async def test_periodic_timer_does_not_drift(divide, divisor):
    async with BusDriver(LocalApic()) as bus:
        await bus.write(SVR, 4, 0x1FF)
        await bus.write(LVT_TIMER, 4, 0x40 | PERIODIC)
        await bus.write(DIVIDE, 4, divide)
        await bus.write(INITIAL, 4, 1_000)
        rings = []
        for _ in range(5):
            await bus.advance(1_000 * divisor)
            rings.append(bus.irq.edges[-1])
            assert bus.device.acknowledge() == 0x40
            await bus.write(EOI, 4, 0)
        assert rings == [(1_000 * divisor * i, True) for i in range(1, 6)]
        await bus.advance(300 * divisor)
        assert await bus.read(CURRENT, 4) == 700


async def test_periods_that_nobody_took_come_as_one():
    async with BusDriver(LocalApic()) as bus:
        await bus.write(SVR, 4, 0x1FF)
        await bus.write(LVT_TIMER, 4, 0x40 | PERIODIC)
        await bus.write(DIVIDE, 4, DIVIDE_BY_1)
        await bus.write(INITIAL, 4, 1_000)
        await bus.advance(10_500)
        assert bus.irq.edges == [(1_000, True)]
        bus.device.acknowledge()
        await bus.write(EOI, 4, 0)
        await bus.advance(1_000)
        assert bus.irq.edges == [(1_000, True), (10_500, False), (11_000, True)]


async def test_a_masked_timer_counts_but_does_not_ring_and_zero_stops_it():
    async with BusDriver(LocalApic()) as bus:
        await bus.write(SVR, 4, 0x1FF)
        await bus.write(DIVIDE, 4, DIVIDE_BY_1)
        await bus.write(LVT_TIMER, 4, 0x40 | PERIODIC | MASKED)
        await bus.write(INITIAL, 4, 1_000)
        await bus.advance(1_400)
        assert await bus.read(CURRENT, 4) == 600
        await bus.write(LVT_TIMER, 4, 0x40 | PERIODIC)
        assert bus.irq.edges == []
        await bus.advance(600)
        assert bus.irq.edges == [(2_000, True)]
        bus.device.acknowledge()
        await bus.write(INITIAL, 4, 0)
        await bus.advance(5_000)
        assert (await bus.read(CURRENT, 4), bus.irq.level) == (0, False)


async def test_a_new_divider_keeps_the_count():
    async with BusDriver(LocalApic()) as bus:
        await bus.write(SVR, 4, 0x1FF)
        await bus.write(LVT_TIMER, 4, 0x40)
        await bus.write(DIVIDE, 4, DIVIDE_BY_1)
        await bus.write(INITIAL, 4, 1_000)
        await bus.advance(400)
        await bus.write(DIVIDE, 4, 0x1)
        assert await bus.read(CURRENT, 4) == 600
        await bus.advance(600 * 4)
        assert bus.irq.edges == [(400 + 2_400, True)]


async def test_a_period_of_nothing_does_not_stop_time():
    async with BusDriver(LocalApic()) as bus:
        await bus.write(SVR, 4, 0x1FF)
        await bus.write(LVT_TIMER, 4, 0x40 | PERIODIC)
        await bus.write(DIVIDE, 4, DIVIDE_BY_1)
        await bus.write(INITIAL, 4, 1)
        await bus.advance(5_000)
        assert bus.irq.edges == [(1_000, True)]


# ---- LINT0, LINT1 -------------------------------------------------------------------------------


def test_the_boot_processor_takes_the_8259a_from_the_start_and_others_do_not():
    boot, other = LocalApic(0), LocalApic(1)
    for apic in (boot, other):
        apic.external = lambda: 0x08
        apic.set_pin(0, True)
    assert (boot.irq.level, boot.acknowledge(), other.irq.level) == (True, 0x08, False)
    boot.set_pin(0, False)
    assert not boot.irq.level


def test_external_interrupts_pass_every_priority_and_the_mask_stops_them():
    apic = enabled()
    apic.external = lambda: 0x21
    write(apic, LVT_LINT0, 0x700)
    write(apic, TPR, 0xFF)
    apic.set_pin(0, True)
    assert (apic.irq.level, apic.acknowledge(), bits(apic, ISR)) == (True, 0x21, set())
    write(apic, LVT_LINT0, 0x700 | MASKED)
    assert not apic.irq.level


def test_lint_pins_with_a_vector_and_with_nmi():
    apic = enabled()
    write(apic, LVT_LINT0, 0x61)
    write(apic, LVT_LINT1, 0x400)
    for pin in (0, 1):
        apic.set_pin(pin, True)
        apic.set_pin(pin, True)
    assert (apic.acknowledge(), apic.processor.log) == (0x61, ["nmi"])


# ---- interprocessor interrupts ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shorthand", "receivers"), [(0, [2]), (1, [0]), (2, [0, 1, 2]), (3, [1, 2])]
)
def test_shorthands(shorthand, receivers):
    apics = several(3)
    write(apics[0], ICR_HIGH, 2 << 24)
    write(apics[0], ICR, shorthand << 18 | 0x55)
    assert [i for i, apic in enumerate(apics) if apic.irq.level] == receivers
    assert apics[0].read(ICR, 4) == shorthand << 18 | 0x55


def test_physical_destination_of_all_ones_means_everybody():
    apics = several(3)
    write(apics[1], ICR_HIGH, 0xFF << 24)
    write(apics[1], ICR, 0x55)
    assert [apic.irq.level for apic in apics] == [True] * 3


@pytest.mark.parametrize(
    ("format_", "logical", "destination", "receivers"),
    [
        (0xF, [1, 2, 4], 0x05, [0, 2]),
        (0xF, [1, 2, 4], 0xFF, [0, 1, 2]),
        (0x0, [0x11, 0x12, 0x21], 0x13, [0, 1]),
        (0x0, [0x11, 0x12, 0x21], 0xF1, [0, 2]),
        (0x0, [0x11, 0x12, 0x21], 0x32, []),
    ],
)
def test_logical_destinations_flat_and_in_clusters(format_, logical, destination, receivers):
    apics = several(3)
    for apic, own in zip(apics, logical, strict=True):
        write(apic, DFR, format_ << 28)
        write(apic, LDR, own << 24)
    write(apics[0], ICR_HIGH, destination << 24)
    write(apics[0], ICR, 1 << 11 | 0x55)
    assert [i for i, apic in enumerate(apics) if apic.irq.level] == receivers


def test_lowest_priority_is_for_one():
    apics = several(3)
    for apic, priority in zip(apics, (0x50, 0x20, 0x30), strict=True):
        write(apic, TPR, priority)
    write(apics[0], ICR, 2 << 18 | 1 << 8 | 0x66)
    assert [apic.irq.level for apic in apics] == [False, True, False]


def test_nmi_init_and_start_up():
    apics = several(2)
    target = apics[1]
    write(target, TPR, 0x20)
    write(target, ID, 7 << 24)
    for command in (0x4400, 0x4500, 0x8500, 0x4608):  # the third de-asserts INIT
        write(apics[0], ICR, 3 << 18 | command)
    assert target.processor.log == ["nmi", "init", "start-up 0x8"]
    assert apics[0].processor.log == []
    assert (target.read(TPR, 4), target.read(SVR, 4), target.read(ID, 4)) == (0, 0xFF, 7 << 24)


# ---- errors -------------------------------------------------------------------------------------


def test_illegal_vectors_are_errors_and_the_status_is_latched_by_a_write():
    apic = enabled()
    write(apic, LVT_ERROR, 0xE0)
    write(apic, ICR, 1 << 18 | 0x0F)
    assert (apic.read(ESR, 4), apic.acknowledge()) == (0, 0xE0)
    write(apic, ESR, 0)
    assert apic.read(ESR, 4) == 1 << 5
    write(apic, EOI, 0)
    fixed(apic, 3)
    assert apic.acknowledge() == 0xE0
    write(apic, ESR, 0)
    assert apic.read(ESR, 4) == 1 << 6
    write(apic, ESR, 0)
    assert apic.read(ESR, 4) == 0


# ---- IOAPIC -------------------------------------------------------------------------------------

SELECT, WINDOW = 0x00, 0x10
LEVEL = 1 << 15


def redirect(ioapic, pin, low, high=0):
    for index, value in ((0x11 + 2 * pin, high), (0x10 + 2 * pin, low)):
        ioapic.write(SELECT, 4, index)
        ioapic.write(WINDOW, 4, value)
        ioapic.update()


def entry(ioapic, pin):
    words = []
    for index in (0x10 + 2 * pin, 0x11 + 2 * pin):
        ioapic.write(SELECT, 4, index)
        words.append(ioapic.read(WINDOW, 4))
    return words[0] | words[1] << 32


def board(count=1):
    bus = ApicBus()
    return IoApic(bus), [enabled(bus, index) for index in range(count)]


async def test_ioapic_registers():
    async with BusDriver(IoApic(ApicBus())) as bus:
        seen = {}
        for index in (0, 1, 2, 0x10, 0x11, 0x3F, 0x40, 0xFF):
            await bus.write(SELECT, 4, index)
            await bus.write(WINDOW, 4, 0xFFFF_FFFF)
            seen[index] = await bus.read(WINDOW, 4)
        assert seen == {
            0: 0x0F00_0000,
            1: 0x0017_0011,
            2: 0x0F00_0000,
            0x10: 0x0001_AFFF,
            0x11: 0xFF00_0000,
            0x3F: 0xFF00_0000,
            0x40: 0,
            0xFF: 0,
        }
        bus.reset()
        assert entry(bus.device, 0) == MASKED


def test_ioapic_edge_is_sent_once_and_lost_while_masked():
    ioapic, (apic,) = board()
    ioapic.set_pin(4, True)
    redirect(ioapic, 4, 0x34)
    assert not apic.irq.level
    ioapic.set_pin(4, False)
    ioapic.set_pin(4, True)
    assert (apic.acknowledge(), bits(apic, TMR)) == (0x34, set())
    write(apic, EOI, 0)
    assert not apic.irq.level


def test_ioapic_level_is_sent_again_after_each_end_until_it_falls():
    ioapic, (apic,) = board()
    redirect(ioapic, 20, 0x51 | LEVEL)
    ioapic.set_pin(20, True)
    assert entry(ioapic, 20) == 0x51 | LEVEL | 1 << 14
    assert (apic.acknowledge(), bits(apic, TMR), apic.irq.level) == (0x51, {0x51}, False)
    write(apic, EOI, 0)
    assert apic.acknowledge() == 0x51
    ioapic.set_pin(20, False)
    write(apic, EOI, 0)
    assert (apic.irq.level, entry(ioapic, 20)) == (False, 0x51 | LEVEL)


def test_ioapic_level_waits_for_the_mask_and_an_edge_entry_forgets_what_is_on_its_way():
    ioapic, (apic,) = board()
    redirect(ioapic, 9, 0x51 | LEVEL | MASKED)
    ioapic.set_pin(9, True)
    assert not apic.irq.level
    redirect(ioapic, 9, 0x51 | LEVEL)
    assert apic.irq.level
    redirect(ioapic, 9, 0x51 | MASKED)
    redirect(ioapic, 9, 0x51 | LEVEL | MASKED)
    assert entry(ioapic, 9) == 0x51 | LEVEL | MASKED


def test_ioapic_level_that_nobody_took_is_sent_again():
    ioapic, (apic,) = board()
    write(apic, SVR, 0xFF)
    redirect(ioapic, 9, 0x51 | LEVEL)
    ioapic.set_pin(9, True)
    assert entry(ioapic, 9) == 0x51 | LEVEL
    write(apic, SVR, 0x1FF)
    ioapic.update()
    assert apic.irq.level


def test_ioapic_destinations_and_modes():
    ioapic, apics = board(3)
    for apic, own in zip(apics, (1, 2, 4), strict=True):
        write(apic, LDR, own << 24)
    redirect(ioapic, 0, 0x40, 1 << 24)
    redirect(ioapic, 1, 0x41 | 1 << 11, 6 << 24)
    redirect(ioapic, 2, 0x400, 0)  # NMI
    redirect(ioapic, 3, 0x742, 0)  # ExtINT: not this way
    for pin in range(4):
        ioapic.set_pin(pin, True)
    assert [bits(apic, IRR) for apic in apics] == [set(), {0x40, 0x41}, {0x41}]
    assert [apic.processor.log for apic in apics] == [["nmi"], [], []]


def test_ioapic_has_24_pins():
    with pytest.raises(ConfigurationError, match="no pin 24"):
        IoApic(ApicBus()).input(24)


# ---- whatever a guest does ----------------------------------------------------------------------

WRITABLE = [register.offset for register in LocalApic.registers]
READABLE = [*WRITABLE, *range(ISR, ESR, 0x10)]
which = st.integers(0, 1)
step = st.one_of(
    st.tuples(st.just("write"), which, st.sampled_from(WRITABLE), st.integers(0, (1 << 32) - 1)),
    st.tuples(st.just("write"), which, st.sampled_from(WRITABLE), st.integers(0, 0x300)),
    st.tuples(st.just("on"), which, st.just(0), st.just(0)),
    st.tuples(st.just("timer"), which, st.integers(16, 255), st.integers(0, 0x3000)),
    st.tuples(st.just("redirect"), which, st.integers(0, 23), st.integers(0, 0x1FFFF)),
    st.tuples(st.just("pin"), which, st.integers(0, 23), st.just(0)),
    st.tuples(st.just("lint"), which, st.integers(0, 3), st.just(0)),
    st.tuples(st.just("acknowledge"), which, st.just(0), st.just(0)),
    st.tuples(st.just("end"), which, st.just(0), st.just(0)),
    st.tuples(st.just("advance"), st.just(0), st.integers(0, 20_000), st.just(0)),
)


class Board:
    """Two local APICs and an IOAPIC, by hand."""

    def __init__(self, clock):
        self.clock = clock
        bus = ApicBus()
        self.ioapic = IoApic(bus)
        self.apics = [LocalApic(index, bus) for index in range(2)]
        self.devices = [self.ioapic, *self.apics]
        self.cores = [Core(), Core()]
        for apic, core in zip(self.apics, self.cores, strict=True):
            apic.processor, apic.external = core, lambda: 0x08

    async def play(self, steps):
        seen = []
        for action, which, where, value in steps:
            apic = self.apics[which]
            match action:
                case "write":
                    write(apic, where, value)
                case "on":
                    write(apic, SVR, 0x1FF)
                case "timer":
                    write(apic, LVT_TIMER, where | (PERIODIC if value & 1 else 0))
                    write(apic, INITIAL, value)
                case "redirect":
                    redirect(self.ioapic, where, value, which << 24)
                case "pin":
                    self.ioapic.set_pin(where, bool(which))
                case "lint":
                    apic.set_pin(where & 1, bool(where & 2))
                case "acknowledge" if apic.irq.level:
                    seen.append(apic.acknowledge())
                case "end":
                    write(apic, EOI, 0)
                case "advance":
                    await self.clock.advance(where)
            for one in self.apics:
                one.update()
                seen.append([one.irq.level, *(one.read(offset, 4) for offset in READABLE)])
            seen.append([core.log[-3:] for core in self.cores])
            seen.append([entry(self.ioapic, pin) for pin in range(24)])
        return seen


async def play_twice(before, after):
    clock, other_clock = ManualClock(), ManualClock(123_456_789)
    one, other = Board(clock), Board(other_clock)
    for board_ in (one, other):
        for device in board_.devices:
            device.clock = board_.clock
            device.alarm.use_clock(board_.clock)
    await one.play(before)
    for new, old in zip(other.devices, one.devices, strict=True):
        for register in old.registers:
            register.store(new, getattr(old, register.name))
        new.load(old.save())
        new.update()
        assert new.save() == old.save()
    for core in one.cores:
        core.log.clear()
    assert await other.play(after) == await one.play(after)


@given(before=st.lists(step, max_size=25), after=st.lists(step, max_size=25))
def test_any_access_is_answered_and_a_copy_goes_on_alike(before, after):
    asyncio.run(play_twice(before, after))


async def test_state_is_whole_wherever_it_is_saved():
    async def scenario(bus):
        await bus.write(SVR, 4, 0x1FF)
        await bus.write(TPR, 4, 0x30)
        await bus.write(LVT_TIMER, 4, 0x40 | PERIODIC)
        await bus.write(DIVIDE, 4, DIVIDE_BY_1)
        await bus.write(INITIAL, 4, 1_500)
        await bus.write(ICR, 4, 1 << 18 | 0x0F)
        await bus.advance(4_000)
        await bus.read(CURRENT, 4)
        await bus.write(TPR, 4, 0x50)
        await bus.write(LVT_TIMER, 4, 0x60)
        await bus.advance(4_000)
        await bus.write(ESR, 4, 0)
        assert await bus.read(ESR, 4) == 1 << 5
        assert [await bus.read(IRR + 0x10 * word, 4) for word in (2, 3)] == [1, 1]

    assert await check_round_trips(LocalApic, scenario) > 15
