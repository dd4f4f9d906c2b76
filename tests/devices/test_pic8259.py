"""Pic8259: initialisation, priorities, the ends of interrupts, cascading, ELCR."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio.devices import Elcr, Pic8259
from kvmaio.errors import ConfigurationError
from kvmaio.testing import BusDriver

COMMAND, DATA = 0, 1
EOI, ROTATE_EOI = 0x20, 0xA0
READ_IRR, READ_ISR, POLL = 0x0A, 0x0B, 0x0C
SET_SPECIAL_MASK, CLEAR_SPECIAL_MASK = 0x68, 0x48
MASTER_BASE, SLAVE_BASE = 0x08, 0x70


def initialise(chip, base=MASTER_BASE, *, icw1=0x13, icw3=None, icw4=0x01):
    """The ICWs; by default of a chip that stands alone."""
    chip.write_command(icw1)
    chip.write_data(base)
    if icw3 is not None:
        chip.write_data(icw3)
    if icw1 & 1:
        chip.write_data(icw4)
    chip.update()


def command(chip, value):
    chip.write_command(value)
    chip.update()


def mask(chip, value):
    chip.write_data(value)
    chip.update()


def lone(**icws):
    chip = Pic8259()
    initialise(chip, **icws)
    return chip


def pair(icw4=0x01):
    """Master and slave as a PC has them and its BIOS sets them up."""
    master, slave = Pic8259(), Pic8259()
    master.cascade(2, slave)
    initialise(master, MASTER_BASE, icw1=0x11, icw3=0x04, icw4=icw4)
    initialise(slave, SLAVE_BASE, icw1=0x11, icw3=0x02)
    return master, slave


def pulse(chip, line):
    chip.set_line(line, True)
    chip.set_line(line, False)


def register(chip, which):
    chip.write_command(which)
    return chip.read_command()


# ---- initialisation ------------------------------------------------------------------------------


async def test_all_icws_through_the_bus():
    async with BusDriver(Pic8259()) as bus:
        chip = bus.device
        await bus.write(COMMAND, 1, 0x13)
        await bus.write(DATA, 1, 0x2B)  # its lower three bits are the line's
        await bus.write(DATA, 1, 0x01)
        await bus.write(DATA, 1, 0xFE)
        assert await bus.read(DATA) == 0xFE
        chip.set_line(0, True)
        assert (bus.irq.level, chip.acknowledge(), bus.irq.level) == (True, 0x28, False)


def test_int_stays_low_before_and_during_initialisation():
    chip = Pic8259()
    for line in range(8):
        chip.set_line(line, True)
    assert (chip.irq.level, chip.read_data()) == (False, 0)
    chip.write_command(0x1B)  # level-triggered, so that the lines request already
    for value in (0x20, 0x01):
        chip.update()
        assert not chip.irq.level
        chip.write_data(value)
    chip.update()
    assert chip.irq.level


def test_before_initialisation_the_mask_can_be_probed():
    chip = Pic8259()
    chip.write_data(0xFB)
    assert chip.read_data() == 0xFB


def test_icw1_clears_mask_service_edges_and_rotation():
    chip = lone()
    pulse(chip, 3)
    chip.acknowledge()
    pulse(chip, 4)
    command(chip, 0xC2)  # lowest is 2
    mask(chip, 0x81)
    initialise(chip)
    assert (chip.read_data(), register(chip, READ_IRR), register(chip, READ_ISR)) == (0, 0, 0)
    assert chip.lowest == 7


def test_icw1_without_icw4_ends_with_icw2_or_icw3():
    chip = lone(icw1=0x12)
    chip.write_data(0x55)
    assert chip.read_data() == 0x55
    chip = lone(icw1=0x10, icw3=0x04)
    chip.write_data(0x55)
    assert chip.read_data() == 0x55


def test_an_edge_sensed_line_that_was_high_during_icw1_must_rise_again():
    chip = Pic8259()
    chip.set_line(5, True)
    initialise(chip)
    assert not chip.irq.level
    chip.set_line(5, False)
    chip.set_line(5, True)
    assert chip.irq.level


# ---- edges and levels --------------------------------------------------------------------------


def test_an_edge_requests_once():
    chip = lone()
    chip.set_line(1, True)
    assert chip.acknowledge() == 0x09
    command(chip, EOI)
    assert not chip.irq.level
    chip.set_line(1, False)
    chip.set_line(1, True)
    assert chip.irq.level


def test_a_pulse_is_latched():
    chip = lone()
    pulse(chip, 6)
    assert (register(chip, READ_IRR), chip.acknowledge()) == (0x40, 0x0E)
    assert (register(chip, READ_IRR), register(chip, READ_ISR)) == (0, 0x40)


def test_a_level_requests_until_it_falls():
    chip = lone(icw1=0x1B)
    chip.set_line(1, True)
    assert chip.acknowledge() == 0x09
    assert register(chip, READ_IRR) == 0x02
    command(chip, EOI)
    assert chip.irq.level
    chip.set_line(1, False)
    assert not chip.irq.level


async def test_elcr_chooses_line_by_line_and_spares_those_of_the_board():
    master, slave = pair()
    async with BusDriver(Elcr(master, slave)) as bus:
        await bus.write(0, 2, 0xFFFF)
        assert await bus.read(0, 2) == 0xDEF8
        assert (await bus.read(0), await bus.read(1)) == (0xF8, 0xDE)
        master.set_line(5, True)
        assert master.acknowledge() == 0x0D
        command(master, EOI)
        assert master.irq.level
        await bus.write(0, 1, 0)
        assert not master.irq.level  # to an edge detector, there was none


# ---- priorities ---------------------------------------------------------------------------------


def test_the_lowest_line_goes_first_and_holds_back_the_others():
    chip = lone()
    for line in (6, 4, 2):
        pulse(chip, line)
    assert [chip.acknowledge(), chip.irq.level] == [0x0A, False]
    pulse(chip, 1)  # is higher, and interrupts
    assert [chip.acknowledge(), chip.irq.level] == [0x09, False]
    served = []
    for _ in range(4):
        command(chip, EOI)
        if chip.irq.level:
            served.append(chip.acknowledge())
    assert served == [0x0C, 0x0E]
    assert register(chip, READ_ISR) == 0


def test_masked_lines_wait():
    chip = lone()
    mask(chip, 0x10)
    pulse(chip, 4)
    assert (chip.irq.level, register(chip, READ_IRR)) == (False, 0x10)
    mask(chip, 0)
    assert chip.acknowledge() == 0x0C


@pytest.mark.parametrize("lowest", range(8))
def test_set_priority_rotates_the_order(lowest):
    chip = lone()
    command(chip, 0xC0 | lowest)
    for line in range(8):
        pulse(chip, line)
    order = []
    while chip.irq.level:
        order.append(chip.acknowledge() & 7)
        command(chip, EOI)
    assert order == [(lowest + 1 + i) % 8 for i in range(8)]


def test_rotation_at_the_end_makes_the_served_line_the_lowest():
    chip = lone()
    for line in (2, 3):
        pulse(chip, line)
    chip.acknowledge()
    command(chip, ROTATE_EOI)
    assert chip.lowest == 2
    assert chip.acknowledge() & 7 == 3
    command(chip, 0xE0 | 5)  # specific: of a line that is not in service, but lowest from now on
    assert (chip.lowest, register(chip, READ_ISR)) == (5, 0x08)


def test_specific_end_ends_the_line_that_it_names():
    chip = lone()
    pulse(chip, 5)
    chip.acknowledge()
    pulse(chip, 1)
    chip.acknowledge()
    command(chip, 0x60 | 5)
    assert register(chip, READ_ISR) == 0x02


def test_an_end_with_nothing_in_service_and_a_no_operation_do_nothing():
    chip = lone()
    command(chip, ROTATE_EOI)
    command(chip, 0x40 | 3)
    assert (chip.lowest, register(chip, READ_ISR)) == (7, 0)


def test_automatic_end_with_and_without_rotation():
    chip = lone(icw4=0x03)
    for line in (1, 2):
        pulse(chip, line)
    assert (chip.acknowledge(), register(chip, READ_ISR), chip.lowest) == (0x09, 0, 7)
    command(chip, 0x80)
    assert (chip.acknowledge(), register(chip, READ_ISR), chip.lowest) == (0x0A, 0, 2)
    command(chip, 0x00)
    pulse(chip, 4)
    assert (chip.acknowledge(), chip.lowest) == (0x0C, 2)


def test_special_mask_mode_lets_lower_lines_through():
    chip = lone()
    pulse(chip, 1)
    chip.acknowledge()
    pulse(chip, 4)
    assert not chip.irq.level
    mask(chip, 0x02)
    command(chip, SET_SPECIAL_MASK)
    assert chip.acknowledge() == 0x0C
    command(chip, EOI)  # spares what is masked
    assert register(chip, READ_ISR) == 0x02
    command(chip, EOI)
    assert register(chip, READ_ISR) == 0x02
    pulse(chip, 5)
    assert chip.irq.level
    command(chip, CLEAR_SPECIAL_MASK)
    assert not chip.irq.level
    command(chip, 0x28)  # ESMM off: SMM is not looked at
    assert not chip.special_mask


# ---- reading ------------------------------------------------------------------------------------


def test_the_choice_of_irr_and_isr_is_kept():
    chip = lone()
    pulse(chip, 0)
    chip.acknowledge()
    pulse(chip, 7)
    assert (chip.read_command(), register(chip, READ_ISR), chip.read_command()) == (0x80, 1, 1)
    command(chip, 0x08)  # neither
    assert chip.read_command() == 1
    assert register(chip, READ_IRR) == 0x80


def test_poll_acknowledges_and_tells_the_line_once():
    chip = lone()
    pulse(chip, 3)
    command(chip, POLL)
    assert chip.read_command() == 0x83
    assert (chip.irq.level, register(chip, READ_ISR)) == (False, 0x08)
    command(chip, POLL)
    assert chip.read_data() == 0  # nothing; and the next read is of the mask again
    mask(chip, 0x11)
    assert chip.read_data() == 0x11


# ---- spurious interrupts, and two chips ----------------------------------------------------------


def test_spurious_interrupt_of_a_lone_chip_is_line_7_and_not_in_service():
    chip = lone(icw1=0x1B)
    chip.set_line(3, True)
    chip.set_line(3, False)
    assert (chip.acknowledge(), register(chip, READ_ISR)) == (0x0F, 0)


def test_slave_interrupts_go_through_the_master():
    master, slave = pair()
    pulse(slave, 0)
    assert (master.irq.level, register(master, READ_IRR)) == (True, 0x04)
    assert master.acknowledge() == 0x70
    assert (register(master, READ_ISR), register(slave, READ_ISR)) == (0x04, 0x01)
    pulse(master, 3)
    assert not master.irq.level  # lower than the slave
    command(slave, EOI)
    command(master, EOI)
    assert master.acknowledge() == 0x0B


def test_what_waits_in_the_slave_makes_a_new_edge_for_the_master():
    master, slave = pair()
    for line in (4, 6):
        pulse(slave, line)
    vectors = []
    while master.irq.level:
        vectors.append(master.acknowledge())
        command(slave, EOI)
        command(master, EOI)
    assert vectors == [0x74, 0x76]


def test_a_slave_that_ends_by_itself_makes_new_edges_too():
    master, slave = pair()
    initialise(slave, SLAVE_BASE, icw1=0x11, icw3=0x02, icw4=0x03)
    for line in (4, 6):
        pulse(slave, line)
    vectors = []
    while master.irq.level:
        vectors.append(master.acknowledge())
        command(master, EOI)
    assert vectors == [0x74, 0x76]


def test_spurious_interrupt_of_the_slave_is_line_15_with_the_master_in_service():
    master, slave = pair()
    pulse(slave, 4)
    mask(slave, 0xFF)
    assert master.acknowledge() == 0x77
    assert (register(master, READ_ISR), register(slave, READ_ISR)) == (0x04, 0)


@pytest.mark.parametrize("nested", [False, True])
def test_special_fully_nested_master_takes_a_higher_line_of_a_slave_in_service(nested):
    master, slave = pair(icw4=0x11 if nested else 0x01)
    pulse(slave, 5)
    assert master.acknowledge() == 0x75
    pulse(slave, 1)
    pulse(master, 4)
    assert master.irq.level is nested
    if nested:
        assert master.acknowledge() == 0x71
    assert not master.irq.level  # line 4 is lower than any of the slave


def test_a_slave_that_was_told_another_line_does_not_answer():
    master, slave = pair()
    initialise(slave, SLAVE_BASE, icw1=0x11, icw3=0x05)
    pulse(slave, 0)
    assert master.acknowledge() == 0xFF


def test_there_is_no_ninth_line():
    with pytest.raises(ConfigurationError, match="no IR8"):
        Pic8259().input(8)


# ---- whatever a guest does -----------------------------------------------------------------------

step = st.one_of(
    st.tuples(st.sampled_from(["command", "data", "line"]), st.integers(0, 1), st.integers(0, 255)),
    st.tuples(st.sampled_from(["acknowledge", "reset"]), st.just(0), st.just(0)),
)


def play(chips, steps):
    """What can be seen from outside, step by step."""
    master = chips[0]
    seen = []
    for action, which, value in steps:
        chip = chips[which]
        match action:
            case "command":
                command(chip, value)
            case "data":
                mask(chip, value)
            case "line":
                if (which, value & 7) != (0, 2):  # the slave's
                    chip.set_line(value & 7, bool(value & 8))
            case "acknowledge" if master.irq.level:
                seen.append(master.acknowledge())
            case "reset":
                chip.reset()
                chip.update()
        seen.append([(c.read_data(), c.read_command(), c.irq.level) for c in chips])
    return seen


def copy(chips):
    """The same chips in a fresh board, by save() and load(), in the order of a restore."""
    master, slave = Pic8259(), Pic8259()
    master.cascade(2, slave)
    for new, old in zip((master, slave), chips, strict=True):
        new.load(old.save())
        new.update()
    return master, slave


@given(before=st.lists(step, max_size=30), after=st.lists(step, max_size=30))
def test_any_access_is_answered_and_a_copy_goes_on_alike(before, after):
    chips = pair()
    play(chips, before)
    twins = copy(chips)
    assert [chip.save() for chip in twins] == [chip.save() for chip in chips]
    assert [chip.irq.level for chip in twins] == [chip.irq.level for chip in chips]
    assert play(twins, after) == play(chips, after)


@given(steps=st.lists(step, max_size=60))
def test_int_is_high_exactly_if_the_acknowledgement_finds_something(steps):
    chips = pair()
    play(chips, steps)
    master = chips[0]
    was_high, before = master.irq.level, master.save()
    master.acknowledge()
    if not was_high:
        assert master.save()["in_service"] == before["in_service"]


async def test_reset_through_the_bus_waits_for_new_icws():
    async with BusDriver(Pic8259()) as bus:
        initialise(bus.device)
        bus.device.set_line(0, True)
        assert bus.irq.level
        bus.reset()
        await asyncio.sleep(0)
        assert not bus.irq.level
