"""Pit8254: every mode against the datasheet and a clock-by-clock model, reading, port B."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio.devices import Pit8254, SystemPortB
from kvmaio.devices.pit8254 import tick_at, time_of_tick
from kvmaio.devices.pit_counter import PitCounter
from kvmaio.testing import BusDriver, check_round_trips

COUNTER0, COUNTER2, CONTROL = 0, 2, 3
LATCH = 0x00


def control(mode, *, counter=0, width=3, bcd=0):
    return counter << 6 | width << 4 | mode << 1 | bcd


def programmed(mode, count, *, gate=True, width=3, bcd=0):
    counter = PitCounter(gate=gate)
    counter.program(control(mode, width=width, bcd=bcd) & 0x3F)
    write_count(counter, count)
    return counter


def write_count(counter, count):
    counter.write(count & 0xFF)
    counter.write(count >> 8)


def levels(counter, ticks):
    """OUT during each of the next ticks, as text: the datasheet's waveforms."""
    seen = ""
    for _ in range(ticks):
        counter.advance(counter.now + 1)
        seen += "_‾"[counter.output]
    return seen


def values(counter, ticks):
    """The counting element after each of the next ticks."""
    seen = []
    for _ in range(ticks):
        counter.advance(counter.now + 1)
        seen.append(counter.value)
    return seen


def count_of(counter):
    counter.latch_count()
    return counter.read() | counter.read() << 8


# ---- time ---------------------------------------------------------------------------------------


def test_ticks_are_those_of_a_pcs_crystal_and_never_drift():
    day_ns = 86_400 * 10**9
    assert tick_at(day_ns) == day_ns * 105 // 88_000
    assert [time_of_tick(tick) for tick in (0, 1, 2, 21)] == [0, 839, 1677, 17_600]
    for tick in (1, 2, 3, 10**12 + 1):
        assert tick_at(time_of_tick(tick)) == tick == tick_at(time_of_tick(tick) - 1) + 1


# ---- modes: the first tick after the count loads it ---------------------------------------------


def test_mode_0_ends_after_n_and_one_ticks_and_stays():
    assert levels(programmed(0, 4), 9) == "____‾‾‾‾‾"
    assert values(programmed(0, 4), 7) == [4, 3, 2, 1, 0, 0xFFFF, 0xFFFE]


def test_mode_0_gate_stops_it_and_a_new_count_starts_it():
    counter = programmed(0, 3)
    assert levels(counter, 2) == "__"
    counter.set_gate(False)
    assert (levels(counter, 5), counter.value) == ("_____", 2)
    counter.set_gate(True)
    assert levels(counter, 3) == "_‾‾"
    write_count(counter, 2)
    assert not counter.output
    assert levels(counter, 4) == "__‾‾"


def test_mode_0_first_byte_of_a_new_count_stops_it():
    counter = programmed(0, 3)
    levels(counter, 2)
    counter.write(9)
    assert levels(counter, 20) == "_" * 20
    counter.write(0)
    assert levels(counter, 11) == "_________‾‾"


def test_mode_0_a_count_written_with_the_gate_low_is_loaded():
    counter = programmed(0, 3, gate=False)
    assert (levels(counter, 5), counter.value) == ("_____", 3)
    counter.set_gate(True)
    assert levels(counter, 4) == "__‾‾"


def test_mode_1_each_trigger_makes_a_pulse_of_n_ticks():
    counter = programmed(1, 3, gate=False)
    assert levels(counter, 3) == "‾‾‾"
    counter.set_gate(True)
    assert levels(counter, 5) == "___‾‾"
    counter.set_gate(False)
    counter.set_gate(True)
    levels(counter, 2)
    counter.set_gate(False)
    write_count(counter, 2)  # for the next trigger
    assert levels(counter, 3) == "_‾‾"
    counter.set_gate(True)
    assert levels(counter, 4) == "__‾‾"


def test_mode_1_triggered_again_the_pulse_is_longer():
    counter = programmed(1, 4, gate=False)
    counter.set_gate(True)
    levels(counter, 3)
    counter.set_gate(False)
    counter.set_gate(True)
    assert levels(counter, 6) == "____‾‾"


def test_mode_2_is_low_for_the_last_tick_of_each_n():
    assert levels(programmed(2, 3), 10) == "‾‾_‾‾_‾‾_‾"
    assert values(programmed(2, 3), 7) == [3, 2, 1, 3, 2, 1, 3]


def test_mode_2_a_new_count_waits_for_the_end_of_the_cycle():
    counter = programmed(2, 4)
    levels(counter, 2)
    write_count(counter, 2)
    assert counter.null_count
    assert levels(counter, 7) == "‾_‾_‾_‾"
    assert not counter.null_count


def test_mode_2_gate_stops_it_high_and_begins_anew():
    counter = programmed(2, 3)
    levels(counter, 3)
    counter.set_gate(False)
    assert counter.output
    assert levels(counter, 4) == "‾‾‾‾"
    counter.set_gate(True)
    assert levels(counter, 5) == "‾‾_‾‾"


@pytest.mark.parametrize(
    ("count", "wave"), [(4, "‾‾__‾‾__‾‾"), (5, "‾‾‾__‾‾‾__"), (2, "‾_‾_‾_‾_‾_"), (3, "‾‾_‾‾_‾‾_‾")]
)
def test_mode_3_is_a_square_wave_half_a_tick_longer_high_if_odd(count, wave):
    assert levels(programmed(3, count), 10) == wave


def test_mode_3_counts_down_by_two():
    assert values(programmed(3, 6), 7) == [6, 4, 2, 6, 4, 2, 6]
    assert values(programmed(3, 5), 6) == [4, 2, 0, 4, 2, 4]


def test_mode_3_a_new_count_waits_for_the_end_of_the_half():
    counter = programmed(3, 8)
    levels(counter, 2)
    write_count(counter, 4)
    assert levels(counter, 8) == "‾‾__‾‾__"
    counter = programmed(3, 4)
    levels(counter, 3)
    write_count(counter, 6)
    assert levels(counter, 8) == "_‾‾‾___‾"


def test_mode_4_strobes_once_after_n_and_one_ticks():
    assert levels(programmed(4, 3), 8) == "‾‾‾_‾‾‾‾"
    counter = programmed(4, 3)
    levels(counter, 2)
    write_count(counter, 2)  # starts anew
    assert levels(counter, 5) == "‾‾_‾‾"


def test_mode_4_gate_stops_the_count_but_not_the_strobe():
    counter = programmed(4, 3)
    levels(counter, 2)
    counter.set_gate(False)
    assert levels(counter, 3) == "‾‾‾"
    counter.set_gate(True)
    assert levels(counter, 2) == "‾_"
    counter.set_gate(False)
    assert (counter.output, levels(counter, 2)) == (False, "‾‾")


def test_mode_5_strobes_n_ticks_after_the_trigger():
    counter = programmed(5, 3, gate=False)
    assert levels(counter, 5) == "‾‾‾‾‾"
    counter.set_gate(True)
    assert levels(counter, 2) == "‾‾"
    counter.set_gate(False)  # only edges count
    counter.set_gate(True)
    assert levels(counter, 6) == "‾‾‾_‾‾"


@pytest.mark.parametrize("mode", [2, 3])
def test_a_count_of_one_is_illegal_and_leaves_out_high(mode):
    counter = programmed(mode, 1)
    assert (levels(counter, 5), counter.next_change()) == ("‾‾‾‾‾", None)
    write_count(counter, 4)
    counter.advance(100)
    assert counter.next_change() is not None


@pytest.mark.parametrize("bcd", [0, 1])
def test_zero_is_the_largest_count(bcd):
    counter = programmed(0, 0, bcd=bcd)
    largest = 10_000 if bcd else 65_536
    counter.advance(largest)
    assert not counter.output
    counter.advance(largest + 1)
    assert counter.output


def test_bcd_counts_and_reads_in_decimal_digits():
    counter = programmed(0, 0x1000, bcd=1)
    counter.advance(1)
    assert count_of(counter) == 0x1000
    counter.advance(2)
    assert count_of(counter) == 0x0999
    counter.advance(1002)
    assert count_of(counter) == 0x9999


@pytest.mark.parametrize(("bits", "mode"), [(6, 2), (7, 3)])
def test_modes_6_and_7_are_2_and_3_but_the_status_gives_back_what_was_written(bits, mode):
    counter = programmed(bits, 7)
    counter.advance(1)
    counter.latch_status()
    assert (counter.mode, counter.read()) == (mode, 0x80 | 0x30 | bits << 1)


# ---- against a model that counts clock by clock -------------------------------------------------


class ClockByClock:
    """The datasheet's text, pulse by pulse, for two-byte binary counts."""

    def __init__(self, mode, gate):
        self.mode, self.gate = mode, gate
        self.written = self.left = 0
        self.element = None
        self.out = mode != 0
        self.triggered = self.strobing = False
        self.null = True

    def write(self, count):
        first, self.written, self.null = self.element is None, count, True
        if self.mode == 0:
            self.out = False
        if self.mode in (0, 4) or (self.mode in (2, 3) and first):
            self.triggered = True  # as far as loading goes

    def set_gate(self, level):
        if level and not self.gate and self.mode in (1, 2, 3, 5) and self.written:
            self.triggered = True
        if not level and self.mode in (2, 3):
            self.out = True
            self.triggered = self.triggered and self.element is None
        self.gate = level

    def load(self):
        self.element, self.triggered, self.null = self.written, False, False

    def clock(self):
        if self.strobing:
            self.out, self.strobing = True, False
        if self.triggered:
            self.load()
            self.out = self.mode not in (0, 1)
            self.left = -(-self.written // 2) if self.mode == 3 else self.written
            return
        if self.element is None or (not self.gate and self.mode not in (1, 5)):
            return
        self.left -= 1
        match self.mode:
            case 0 | 1:
                self.out = self.out or self.left == 0
            case 2:
                if self.left == 0:
                    self.load()
                    self.left = self.written
                self.out = self.left != 1
            case 3:
                if self.left == 0:
                    self.load()
                    self.out = not self.out
                    self.left = -(-self.written // 2) if self.out else self.written // 2
            case 4 | 5:
                if self.left == 0:
                    self.out, self.strobing = False, True


actions = st.lists(
    st.one_of(
        st.tuples(st.just("count"), st.integers(2, 9)),
        st.tuples(st.just("gate"), st.integers(0, 1)),
        st.tuples(st.just("ticks"), st.integers(1, 25)),
    ),
    max_size=25,
)


@given(mode=st.integers(0, 5), gate=st.booleans(), steps=actions)
def test_every_mode_agrees_with_the_model_and_announces_each_change(mode, gate, steps):
    counter, model = PitCounter(gate=gate), ClockByClock(mode, gate)
    counter.program(control(mode))
    for action, value in steps:
        match action:
            case "count":
                write_count(counter, value)
                model.write(value)
            case "gate":
                counter.set_gate(bool(value))
                model.set_gate(bool(value))
            case "ticks":
                for _ in range(value):
                    announced, before = counter.next_change(), counter.output
                    rose = counter.advance(counter.now + 1)
                    model.clock()
                    assert rose == (counter.output and not before)
                    if counter.output != before:
                        assert announced == counter.now
        assert (counter.output, counter.null_count) == (model.out, model.null)


@given(mode=st.integers(0, 5), steps=actions, skip=st.integers(1, 60))
def test_one_long_advance_is_many_short_ones(mode, steps, skip):
    counter, other = PitCounter(gate=True), PitCounter(gate=True)
    for one in (counter, other):
        one.program(control(mode))
    for action, value in steps:
        for one in (counter, other):
            if action == "count":
                write_count(one, value)
            elif action == "gate":
                one.set_gate(bool(value))
        if action == "ticks":
            at_once = counter.advance(counter.now + skip)
            assert at_once is (sum(other.advance(other.now + 1) for _ in range(skip)) > 0)
        assert counter == other


# ---- the guest's side ---------------------------------------------------------------------------


async def test_latched_count_stays_until_it_is_read():
    async with BusDriver(Pit8254()) as bus:
        await bus.write(CONTROL, 1, control(2))
        await bus.write(COUNTER0, 1, 0x34)
        await bus.write(COUNTER0, 1, 0x12)
        await bus.advance(time_of_tick(5))
        await bus.write(CONTROL, 1, LATCH)
        await bus.advance(time_of_tick(100))
        await bus.write(CONTROL, 1, LATCH)  # ignored: it was not read yet
        assert (await bus.read(COUNTER0), await bus.read(COUNTER0)) == (0x30, 0x12)
        low, high = await bus.read(COUNTER0), await bus.read(COUNTER0)  # as it is now
        assert high << 8 | low == 0x1234 - (bus.device.ticks - 1)


@pytest.mark.parametrize(("width", "expected"), [(1, [0x56, 0x55, 0x54]), (2, [0x56, 0x55, 0x55])])
async def test_single_bytes(width, expected):
    """The other byte of the count is 0, and the other byte of the element is not read."""
    async with BusDriver(Pit8254()) as bus:
        await bus.write(CONTROL, 1, control(0, width=width))
        await bus.write(COUNTER0, 1, 0x56)
        seen = []
        for tick in (1, 2, 3):
            await bus.advance(time_of_tick(tick) - bus.clock.now_ns)
            seen.append(await bus.read(COUNTER0))
        assert seen == expected


async def test_read_back_latches_status_and_counts_of_several_counters():
    async with BusDriver(Pit8254()) as bus:
        await bus.write(CONTROL, 1, control(3))
        for byte in (0x00, 0x10):
            await bus.write(COUNTER0, 1, byte)
        await bus.write(CONTROL, 1, 0xE2)  # the status of counter 0, not loaded yet
        await bus.advance(839)
        await bus.write(CONTROL, 1, 0xC2 | 0x08)  # both, of counters 0 and 2; the status is kept
        assert [await bus.read(COUNTER0) for _ in range(3)] == [0xF6, 0x00, 0x10]
        assert [await bus.read(COUNTER2) for _ in range(3)] == [0x70, 0, 0]
        await bus.write(CONTROL, 1, 0xD2)  # the count of counter 0
        await bus.advance(8390)
        assert [await bus.read(COUNTER0) for _ in range(2)] == [0x00, 0x10]


async def test_the_control_word_cannot_be_read():
    async with BusDriver(Pit8254()) as bus:
        assert await bus.read(CONTROL) == 0xFF


async def test_rate_generator_interrupts_exactly_and_without_drift():
    async with BusDriver(Pit8254()) as bus:
        await bus.write(CONTROL, 1, control(2))
        for byte in (1193 & 0xFF, 1193 >> 8):
            await bus.write(COUNTER0, 1, byte)
        await bus.advance(1_000_000_000)
        rises = [time for time, level in bus.irq.edges if level]
    # Loaded with tick 1, it rises with each 1193rd from there.
    assert rises[0] == 0  # OUT is high from the control word on
    assert rises[1:] == [time_of_tick(1 + 1193 * k) for k in range(1, 1001)]
    assert [time for time, level in bus.irq.edges if not level] == [
        time_of_tick(1193 * k) for k in range(1, 1001)
    ]


async def test_one_shot_interrupts_once():
    async with BusDriver(Pit8254()) as bus:
        await bus.write(CONTROL, 1, control(0))
        for byte in (10, 0):
            await bus.write(COUNTER0, 1, byte)
        await bus.advance(10**9)
        assert bus.irq.edges == [(time_of_tick(11), True)]


async def test_edges_that_a_late_host_missed_come_as_one():
    async with BusDriver(Pit8254()) as bus:
        await bus.write(CONTROL, 1, control(3))
        for byte in (100, 0):
            await bus.write(COUNTER0, 1, byte)
        bus.clock.now_ns = time_of_tick(1 + 100 * 7 + 3)  # nobody was woken meanwhile
        await bus.read(COUNTER0)
        assert bus.irq.edges[1:] == [(bus.clock.now_ns, False), (bus.clock.now_ns, True)]
        bus.clock.now_ns = time_of_tick(1 + 100 * 9 + 60)
        await bus.read(COUNTER0)
        assert bus.irq.level is False
        assert len(bus.irq.edges) == 3 + 3


async def test_reset_forgets_the_counters():
    async with BusDriver(Pit8254()) as bus:
        await bus.write(CONTROL, 1, control(2))
        for byte in (100, 0):
            await bus.write(COUNTER0, 1, byte)
        bus.reset()
        assert not bus.irq.level
        await bus.advance(10**9)
        assert len(bus.irq.edges) == 2


# ---- port B -------------------------------------------------------------------------------------


async def test_port_b_gates_counter_2_and_shows_its_output():
    pit = Pit8254()
    async with BusDriver(pit) as bus, BusDriver(SystemPortB(pit), bus.clock) as port:
        await bus.write(CONTROL, 1, control(0, counter=2))
        for byte in (50, 0):
            await bus.write(COUNTER2, 1, byte)
        await bus.advance(1_000_000)
        assert await port.read(0) & 0x2F == 0
        await port.write(0, 1, 0xF1)
        assert await port.read(0) & 0xEF == 0x01
        await bus.advance(time_of_tick(pit.ticks + 50) - bus.clock.now_ns - 1)
        assert await port.read(0) & 0x20 == 0
        await bus.advance(1)
        assert await port.read(0) & 0x20
        port.reset()
        assert await port.read(0) & 0x0F == 0


async def test_port_b_refresh_toggles_every_18_ticks():
    pit = Pit8254()
    async with BusDriver(pit) as bus, BusDriver(SystemPortB(pit), bus.clock) as port:
        seen = []
        for _ in range(6):
            seen.append(await port.read(0))
            await bus.advance(time_of_tick(18))
        assert seen == [0, 0x10] * 3


# ---- whatever a guest does ----------------------------------------------------------------------

step = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 2), st.integers(0, 255)),
    st.tuples(st.just("write"), st.just(3), st.integers(0, 255)),
    st.tuples(st.just("read"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("advance"), st.integers(0, 30_000), st.just(0)),
    st.tuples(st.just("gate"), st.integers(0, 2), st.integers(0, 1)),
)


async def play(bus, steps):
    """What can be seen from outside; times are from the beginning of this play."""
    seen, start_ns, pit = [], bus.clock.now_ns, bus.device
    edges = len(bus.irq.edges)
    for action, where, value in steps:
        match action:
            case "write":
                await bus.write(where, 1, value)
            case "read":
                seen.append(await bus.read(where))
                assert 0 <= seen[-1] <= 0xFF
            case "advance":
                await bus.advance(where)
            case "gate":
                pit.set_gate(where, bool(value))
        seen.append([pit.output(index) for index in range(3)])
        assert bus.irq.level == pit.output(0)
    return seen, [(time - start_ns, level) for time, level in bus.irq.edges[edges:]]


async def play_twice(before, after):
    async with BusDriver(Pit8254()) as bus:
        await play(bus, before)
        state = bus.device.save()
        fresh = Pit8254()
        async with BusDriver(fresh) as other:
            await other.advance(987_654_321)  # the other host's clock is another one
            fresh.load(state)
            fresh.update()
            assert fresh.save() == state
            assert await play(other, after) == await play(bus, after)


@given(before=st.lists(step, max_size=25), after=st.lists(step, max_size=25))
def test_any_access_is_answered_and_a_copy_goes_on_alike(before, after):
    asyncio.run(play_twice(before, after))


async def test_state_is_whole_wherever_it_is_saved():
    async def scenario(bus):
        for value in (control(3), control(2, counter=1), control(4, counter=2)):
            await bus.write(CONTROL, 1, value)
        for counter in range(3):
            await bus.write(counter, 1, 60)
            await bus.advance(2_000)
            await bus.write(counter, 1, 0)
        await bus.advance(100_000)
        await bus.write(CONTROL, 1, 0xC6)  # status and count of counters 0 and 1
        for counter in (0, 1, 0, 1):
            await bus.read(counter)
        await bus.write(COUNTER0, 1, 40)
        await bus.write(COUNTER0, 1, 0)
        await bus.advance(100_000)

    assert await check_round_trips(Pit8254, scenario) > 20
