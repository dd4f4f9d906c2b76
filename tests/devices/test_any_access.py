"""Whatever a guest does to a device: documented errors only, answers that fit."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio.device import Device
from kvmaio.devices import (
    ApicBus,
    CountdownTimer,
    DebugConsole,
    DebugExit,
    IoApic,
    LocalApic,
    PciConfigPorts,
    Pic8259,
    Pit8254,
    PseudoOpWindow,
    RtcMc146818,
    Uart16550,
)
from kvmaio.errors import GuestError
from kvmaio.exits import EndRun
from kvmaio.testing import BusDriver


def pci():
    device = PciConfigPorts()
    device.add(0, 0, 0, bytearray(256), b"\xff" * 256)
    return device


def pseudo_ops():
    window = PseudoOpWindow()
    window.operation(0)(lambda: -1)
    return window


DEVICES: dict[str, Callable[[], Device]] = {
    "uart": Uart16550,
    "rtc": RtcMc146818,
    "timer": CountdownTimer,
    "console": DebugConsole,
    "exit": DebugExit,
    "pci": pci,
    "pseudo": pseudo_ops,
    "pic": Pic8259,
    "pit": Pit8254,
    "ioapic": lambda: IoApic(ApicBus()),
    "apic": LocalApic,
}

# Small numbers and single bits reach more states than evenly chosen ones.
values = st.one_of(
    st.integers(0, 0x90),
    st.integers(0, 63).map(lambda bit: 1 << bit),
    st.integers(0, (1 << 64) - 1),
)
sizes = st.sampled_from([1, 1, 1, 2, 4, 8])
offsets = st.one_of(st.integers(0, 16), st.integers(0, 0xFFFF))
step = st.one_of(
    st.tuples(st.just("read"), offsets, sizes, st.just(0)),
    st.tuples(st.just("write"), offsets, sizes, values),
    st.tuples(st.just("advance"), st.integers(0, 3_000_000), st.just(0), st.just(0)),
    st.tuples(st.just("input"), st.integers(0, 255), st.just(0), st.just(0)),
    st.tuples(st.just("reset"), st.just(0), st.just(0), st.just(0)),
)


async def play(device, steps):
    allowed = (GuestError, EndRun)
    async with BusDriver(device) as bus:
        for action, offset, size, value in steps:
            offset %= device.size
            try:
                if action == "read":
                    assert 0 <= await bus.read(offset, size) < 1 << 8 * size
                elif action == "write":
                    await bus.write(offset, size, value)
            except allowed:
                pass
            if action == "advance":
                await bus.advance(offset)
            elif action == "input" and isinstance(device, Uart16550):
                device.receive(offset)
            elif action == "reset":
                bus.reset()
            device.update()
            assert bus.irq.level == device.irq.level
            levels = [level for _, level in bus.irq.edges]
            assert levels == [i % 2 == 0 for i in range(len(levels))]
        # What can be saved can be loaded, and means the same.
        state = device.save()
        device.load(state)
        assert device.save() == state


@pytest.mark.parametrize("name", DEVICES)
@given(steps=st.lists(step, max_size=40))
def test_any_access(name, steps):
    asyncio.run(play(DEVICES[name](), steps))
