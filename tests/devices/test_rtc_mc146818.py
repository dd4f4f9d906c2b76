"""RtcMc146818: time, update cycle, the three interrupts, and a PC's CMOS layout."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio.devices import RtcMc146818
from kvmaio.testing import BusDriver, ManualClock

MS = 1_000_000
SECOND = 1_000_000_000
UIP, SET, PIE, AIE, UIE, BINARY, HOURS_24 = 0x80, 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10
START = datetime(1999, 12, 31, 23, 59, 58, tzinfo=UTC)  # a Friday
TIME = (0x32, 9, 8, 7, 6, 4, 2, 0)  # century, year, month, day, weekday, hours, minutes, seconds


async def get(bus, place):
    await bus.write(0, 1, place)
    return await bus.read(1)


async def put(bus, place, value):
    await bus.write(0, 1, place)
    await bus.write(1, 1, value)


async def read_time(bus):
    return [await get(bus, place) for place in TIME]


def rtc(start=START, **options):
    return BusDriver(RtcMc146818(start=start, **options))


async def test_time_runs_from_its_start_over_the_millennium_in_bcd():
    async with rtc() as bus:
        assert await read_time(bus) == [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x58]
        await bus.advance(1_999 * MS)
        assert await get(bus, 0) == 0x59
        await bus.advance(1 * MS)
        assert await read_time(bus) == [0x20, 0x00, 0x01, 0x01, 7, 0x00, 0x00, 0x00]
        assert bus.device.now == datetime(2000, 1, 1, tzinfo=UTC)


async def test_binary_and_twelve_hours():
    async with rtc() as bus:
        await put(bus, 0x0B, BINARY)
        assert await read_time(bus) == [19, 99, 12, 31, 6, 0x80 | 11, 59, 58]
        await bus.advance(2 * SECOND)
        assert await get(bus, 4) == 12  # midnight
        await bus.advance(12 * 3600 * SECOND)
        assert await get(bus, 4) == 0x80 | 12  # noon
        await put(bus, 0x0B, 0)
        assert await get(bus, 4) == 0x92


async def test_start_in_another_zone_and_without_one():
    two_hours_east = timezone(timedelta(hours=2))
    for start in (datetime(2024, 2, 29, 14, tzinfo=two_hours_east), datetime(2024, 2, 29, 12)):
        async with rtc(start) as bus:
            assert (await read_time(bus))[5:] == [0x12, 0, 0]


async def test_without_a_start_it_shows_the_hosts_time():
    async with BusDriver(RtcMc146818()) as bus:
        assert abs(bus.device.now - datetime.now(UTC)) < timedelta(minutes=1)


async def test_the_time_begins_when_it_is_attached_whatever_the_clock_says():
    async with BusDriver(RtcMc146818(start=START), clock=ManualClock(10**15)) as bus:
        await bus.advance(SECOND)
        assert bus.device.now == START + timedelta(seconds=1)


async def test_setting_the_time_with_set_keeps_it_still_meanwhile():
    async with rtc() as bus:
        await bus.advance(300 * MS)
        await put(bus, 0x0B, SET | HOURS_24)
        await bus.advance(10 * SECOND)
        assert await get(bus, 0) == 0x58
        for place, value in zip(TIME, (0x20, 0x24, 0x02, 0x28, 1, 0x23, 0x59, 0x59), strict=True):
            await put(bus, place, value)
        assert await get(bus, 0) == 0x59
        await put(bus, 0x0B, HOURS_24)
        await bus.advance(700 * MS)  # the divider kept its phase
        assert await read_time(bus) == [0x20, 0x24, 0x02, 0x29, 5, 0, 0, 0]


async def test_setting_a_byte_of_the_running_time():
    async with rtc() as bus:
        await put(bus, 2, 0x10)
        await bus.advance(2 * SECOND)
        assert await read_time(bus) == [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x11, 0x00]


async def test_divider_reset_stops_the_time_and_starts_half_a_second_before_an_update():
    async with rtc() as bus:
        await put(bus, 0x0A, 0x70)
        await bus.advance(100 * SECOND)
        assert (await get(bus, 0), await get(bus, 0x0C)) == (0x58, 0)
        await put(bus, 0x0A, 0x26)
        await bus.advance(499 * MS)
        assert await get(bus, 0) == 0x58
        await bus.advance(1 * MS)
        assert await get(bus, 0) == 0x59


async def test_update_in_progress_warns_before_the_time_changes():
    async with rtc() as bus:
        seen = []
        await bus.advance(SECOND - 2_228_001)
        for step in (1, 2_227_999, 1):
            seen.append((await get(bus, 0x0A), await get(bus, 0)))
            await bus.advance(step)
        seen.append((await get(bus, 0x0A), await get(bus, 0)))
        assert seen == [(0x26, 0x58), (0xA6, 0x58), (0xA6, 0x58), (0x26, 0x59)]
        await bus.advance(SECOND - 1000)
        await put(bus, 0x0B, SET | HOURS_24)
        assert await get(bus, 0x0A) == 0x26


async def test_update_ended_interrupt_each_second_once_acknowledged():
    async with rtc() as bus:
        await put(bus, 0x0B, UIE | HOURS_24)
        await bus.advance(1_500 * MS)
        assert await get(bus, 0x0C) & (IRQF | AF | UF) == IRQF | UF
        assert await get(bus, 0x0C) == 0
        await bus.advance(SECOND)
        await bus.advance(SECOND)  # not acknowledged: no second edge
        assert bus.irq.edges == [
            (SECOND, True), (1_500 * MS, False), (2 * SECOND, True),
        ]  # fmt: skip


async def test_alarm_at_a_time_and_every_minute():
    async with rtc() as bus:
        for place, value in ((5, 0x00), (3, 0x01), (1, 0x30)):
            await put(bus, place, value)
        await put(bus, 0x0B, AIE | HOURS_24)
        await bus.advance(200 * SECOND)
        assert bus.irq.edges == [(92 * SECOND, True)]
        assert await get(bus, 0x0C) & AF
        await put(bus, 5, 0xC0)
        await put(bus, 3, 0xFF)
        await bus.advance(12 * SECOND)  # 0:03:30
        assert (bus.irq.edges[2:], await get(bus, 0x0C) & AF) == ([(212 * SECOND, True)], AF)
        await bus.advance(60 * SECOND)
        assert bus.irq.edges[4:] == [(272 * SECOND, True)]


async def test_an_alarm_that_has_passed_today_rings_tomorrow():
    async with rtc(datetime(2024, 5, 5, 12, 0, 0)) as bus:
        for place, value in ((5, 0x11), (3, 0x59), (1, 0xC0)):
            await put(bus, place, value)
        await put(bus, 0x0B, AIE | HOURS_24)
        await bus.advance(86_400 * SECOND)
        assert bus.irq.edges == [((86_400 - 60) * SECOND, True)]


async def test_an_impossible_alarm_never_rings():
    async with rtc() as bus:
        await put(bus, 5, 0x77)
        await put(bus, 0x0B, AIE | HOURS_24)
        await bus.advance(3 * 86_400 * SECOND)
        assert bus.irq.edges == []


@pytest.mark.parametrize(
    ("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (10, 64), (15, 2)]
)
async def test_periodic_interrupt_does_not_drift(rate, hertz):
    async with rtc() as bus:
        await put(bus, 0x0A, 0x20 | rate)
        await put(bus, 0x0B, PIE | HOURS_24)
        for _ in range(16):
            while not bus.irq.level:
                await bus.advance(-(-SECOND // hertz))
            assert await get(bus, 0x0C) & (IRQF | PF) == IRQF | PF
        rises = [ns for ns, level in bus.irq.edges if level]
        assert all(-(-ns * hertz // SECOND) * SECOND // hertz - ns in (0, -1) or
                   (ns * hertz) % SECOND < hertz for ns in rises)  # fmt: skip
        assert rises[0] == -(-SECOND // hertz)


async def test_rate_zero_is_no_periodic_interrupt():
    async with rtc() as bus:
        await put(bus, 0x0A, 0x20)
        await put(bus, 0x0B, PIE | HOURS_24)
        await bus.advance(SECOND)
        assert (bus.irq.edges, await get(bus, 0x0C)) == ([], UF)


async def test_flags_can_be_polled_with_interrupts_off():
    async with rtc() as bus:
        await put(bus, 0x0A, 0x2F)
        await bus.advance(499 * MS)
        assert await get(bus, 0x0C) == 0
        await bus.advance(1 * MS)
        assert await get(bus, 0x0C) == PF
        await bus.advance(500 * MS)
        assert await get(bus, 0x0C) == PF | UF
        assert bus.irq.edges == []


async def test_enabling_an_interrupt_whose_flag_is_up_raises_it_at_once():
    async with rtc() as bus:
        await bus.advance(SECOND)
        await put(bus, 0x0B, UIE | HOURS_24)
        assert bus.irq.edges == [(SECOND, True)]


async def test_set_clears_the_update_interrupt():
    async with rtc() as bus:
        await put(bus, 0x0B, SET | UIE | HOURS_24)
        assert await get(bus, 0x0B) == SET | HOURS_24


async def test_registers_c_and_d_are_read_only_and_the_nmi_bit_is_not_the_chips():
    async with rtc() as bus:
        await put(bus, 0x8D, 0)
        await put(bus, 0x0C, 0xFF)
        await put(bus, 0x80 | 0x40, 0x5A)
        state = [await get(bus, 0x0D), await get(bus, 0x0C), await get(bus, 0x40)]
        assert (state, bus.device.cmos[0x40]) == ([0x80, 0, 0x5A], 0x5A)
        assert await bus.read(0) == 0xFF


async def test_reset_turns_interrupts_off_and_leaves_time_and_ram():
    async with rtc() as bus:
        await put(bus, 0x0B, PIE | AIE | UIE | HOURS_24 | BINARY)
        await put(bus, 0x50, 7)
        await bus.advance(2 * SECOND)
        bus.reset()
        assert not bus.irq.level
        assert [await get(bus, p) for p in (0x0B, 0x0C, 0x50, 9)] == [HOURS_24 | BINARY, 0, 7, 0]


@pytest.mark.parametrize(
    ("size", "base", "above_1m", "above_16m", "above_4g"),
    [
        ("512K", 512, 0, 0, 0),
        ("1M", 640, 0, 0, 0),
        ("16M", 640, 15 * 1024, 0, 0),
        (64 << 20, 640, 63 * 1024, 48 * 16, 0),
        ("5G", 640, 0xFFFF, (3072 - 16) * 16, 2 * 16384),
    ],
)
def test_memory_size_as_seabios_reads_it(size, base, above_1m, above_16m, above_4g):
    cmos = RtcMc146818(memory_size=size).cmos

    def word(*places):
        return int.from_bytes(bytes(cmos[place] for place in places), "little")

    assert [word(0x15, 0x16), word(0x17, 0x18), word(0x30, 0x31)] == [base, above_1m, above_1m]
    assert [word(0x34, 0x35), word(0x5B, 0x5C, 0x5D)] == [above_16m, above_4g]


async def test_state_moves_to_another_rtc():
    async with rtc() as old:
        await put(old, 0x0B, UIE | HOURS_24)
        await old.advance(300 * MS)
        state = old.device.save()
    async with BusDriver(RtcMc146818(), clock=ManualClock(300 * MS)) as new:
        new.device.load(state)
        new.device.update()
        await new.advance(SECOND)
        assert new.irq.edges == [(SECOND, True)]
        assert new.device.now == START + timedelta(milliseconds=1300)


@given(st.lists(st.integers(0, 255), min_size=8, max_size=8), st.sampled_from([0, 2, 4, 6]))
def test_any_time_that_a_guest_writes_becomes_a_time(values, mode):
    device = RtcMc146818(start=START)

    def put(place, value):
        device.write(0, 1, place)
        device.write(1, 1, value)
        device.update()

    put(0x0B, SET | mode)
    for place, value in zip(TIME, values, strict=True):
        put(place, value)
    put(0x0B, mode)
    for place in TIME:
        device.write(0, 1, place)
        assert device.read(1, 1) in range(256)
    assert 1 <= device.now.year <= 9999
