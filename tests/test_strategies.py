"""Hypothesis strategies for register accesses: in range, meaningful, and able to find bugs."""

from __future__ import annotations

import asyncio
import enum

import pytest
from hypothesis import find, given
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from kvmaio import Access, Device, Register
from kvmaio.devices import CountdownTimer, Uart16550
from kvmaio.fields import Field, Fields
from kvmaio.testing import BusAccess, BusDriver, register_accesses


class Mode(enum.IntEnum):
    OFF = 0
    FAST = 0x77


class Flags(enum.IntFlag):
    A = 0x100
    B = 0x4000


class Control(Fields):
    go = Field(31)
    mode = Field(20, 12, Mode)


class Part(Device):
    mode = Register(0x0, Mode)
    flags = Register(0x2, Flags, bits=16)
    control = Register(0x4, Control, bits=32)
    state = Register(0x8, access=Access.R)
    key = Register(0xA, access=Access.W)


@given(register_accesses(Part, odd=False))
def test_plain_accesses_are_what_the_declarations_allow(access):
    register = next(r for r in Part.registers if r.offset == access.offset)
    assert access.size == register.size
    if access.value is None:
        assert register.access is not Access.W
    else:
        assert register.access is not Access.R and 0 <= access.value <= register.mask


@pytest.mark.parametrize(
    "wanted",
    [
        BusAccess(0x0, 1, Mode.FAST),
        BusAccess(0x2, 2, 0x4100),
        BusAccess(0x4, 4, 1 << 31 | Mode.FAST << 12),
        BusAccess(0x8, 1),
        BusAccess(0xA, 1, 0xFF),
    ],
)
def test_named_values_come_up(wanted):
    assert find(register_accesses(Part), lambda access: access == wanted) == wanted


@pytest.mark.parametrize("device", [Part, Uart16550, CountdownTimer])
def test_odd_accesses_lie_within_the_window(device):
    @given(register_accesses(device))
    def check(access):
        assert access.offset >= 0 and access.offset + access.size <= device.size
        assert access.value is None or 0 <= access.value < 1 << 8 * access.size

    check()
    partial = find(register_accesses(Part), lambda a: a.offset == 0x5 and a.size == 1)
    assert partial.size == 1
    with pytest.raises(NoSuchExample):
        find(register_accesses(Part, odd=False), lambda a: a.offset == 0x5)


class Forgetful(Device):
    """A device with a bug: its interrupt stays low if it is armed by a single write."""

    armed = Register(0x0, Flags, bits=16)

    def update(self) -> None:
        self.irq.set(self.armed == Flags.A)


def test_they_find_a_bug():
    async def play(accesses):
        async with BusDriver(Forgetful()) as bus:
            for access in accesses:
                await access.make(bus)
            return bool(Flags.A in Flags(bus.device.armed)) == bus.irq.level

    accesses = st.lists(register_accesses(Forgetful))
    found = find(accesses, lambda accesses: not asyncio.run(play(accesses)))
    assert found == [BusAccess(0, 2, 0x4100)] or len(found) == 1
