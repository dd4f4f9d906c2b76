"""Register descriptions: fields, Markdown tables, and classes out of SystemRDL."""

from __future__ import annotations

import enum
import subprocess

import pytest

from kvmaio import Access, Device, Register
from kvmaio.devices import CountdownTimer, Uart16550
from kvmaio.errors import ConfigurationError
from kvmaio.fields import Field, Fields
from kvmaio.register_table import register_table
from kvmaio.testing import BusDriver
from tests.test_cli import KVMAIO


class Mode(enum.IntEnum):
    SLOW = 0
    FAST = 2


class Control(Fields):
    """What the device does."""

    enable = Field(0, type=bool)
    mode = Field(2, 1, Mode)
    rate = Field(15, 8, doc="in Hz")


class Device1(Device):
    """A device for this test.

    With more text.
    """

    control = Register(0x0, Control, bits=16, reset=0x0104)
    state = Register(0x2, access=Access.R)


def test_fields_are_parts_of_a_number():
    device = Device1()
    assert device.control == 0x0104
    control = device.control
    assert (control.enable, control.mode, control.rate) == (False, Mode.FAST, 1)
    device.control = device.control.replace(enable=True, rate=0xFF, mode=Mode.SLOW)
    assert device.control == 0xFF01
    assert Control(0x2).mode == 1  # which is no Mode
    assert repr(Control(0x105)) == "Control(0x105: rate=1, mode=<Mode.FAST: 2>, enable=True)"
    for wrong in ({"rate": 0x100}, {"rate": -1}, {"fields": 1}):
        with pytest.raises(ConfigurationError):
            device.control.replace(**wrong)
    with pytest.raises(ConfigurationError, match="overlaps"):
        type("Wrong", (Fields,), {"a": Field(3, 1), "b": Field(1)})
    with pytest.raises(ConfigurationError, match="63 down to 0"):
        Field(64)


def test_a_table_as_a_datasheet_has_it():
    assert register_table(Device1).splitlines() == [
        "## Device1",
        "",
        "A device for this test.",
        "",
        "| Offset | Name | Bits | Access | Reset | Notes |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 0x0 | `control` | 16 | read-write | 0x104 |  |",
        "| 0x2 | `state` | 8 | read-only | 0x0 |  |",
        "",
        "### `control`: What the device does",
        "",
        "| Bits | Name | Values |",
        "| --- | --- | --- |",
        "| 15:8 | `rate` | in Hz |",
        "| 2:1 | `mode` | 0x0 `SLOW`, 0x2 `FAST` |",
        "| 0 | `enable` |  |",
    ]


@pytest.mark.parametrize("device", [Uart16550, CountdownTimer])
def test_tables_of_real_devices(device):
    lines = register_table(device).splitlines()
    for register in device.registers:
        row = next(line for line in lines if f" `{register.name}` |" in line)
        assert row.startswith(f"| {register.offset:#x} |") and register.access.value in row


def test_tables_of_banked_registers_and_flags():
    text = register_table(Uart16550)
    assert "| 0x0 | `dll` | 8 | read-write | 0xc | while dlab |" in text
    assert "| 7 | `DLAB` |  |" in text and "### `lcr`: Line control;" in text


def test_the_command_prints_tables(tmp_path):
    source = "from kvmaio import *\nclass Mine(Device):\n    a = Register(4)"
    (tmp_path / "mine.py").write_text(source)
    for what, expected in (
        ("kvmaio.devices:DebugExit", "| 0x0 | `code` |"),
        ("mine:Mine", "| 0x4 | `a` |"),
    ):
        result = subprocess.run(
            [KVMAIO, "registers", what], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0 and expected in result.stdout, result.stderr
    for wrong in ("mine", "mine:Other", "nothing:At", "none.rdl"):
        result = subprocess.run(
            [KVMAIO, "registers", wrong], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 2 and result.stderr.count("\n") <= 4, result.stderr


# ---- SystemRDL -----------------------------------------------------------------------

RDL = """
addrmap timer {
    desc = "A timer of two channels.";
    default regwidth = 32;
    enum mode_e { once = 0; periodic = 1 { desc = "again and again"; }; };
    regfile channel {
        reg { desc = "How it runs.";
              field { sw = rw; hw = r; desc = "go"; } enable = 0;
              field { encode = mode_e; } mode[2:1] = 1;
              field { sw = r; hw = w; } busy[31:31] = 1; } control @ 0x0;
        reg { field { sw = rw; hw = rw; onwrite = woclr; } expired = 0;
              field { sw = rw; onread = rclr; } count[15:8] = 7; } status @ 0x4;
    };
    channel ch[2] @ 0x0 += 0x10;
    reg { regwidth = 16; field { sw = w; hw = r; } key[15:0] = 0; } unlock @ 0x20;
};
"""


@pytest.fixture
def rdl(tmp_path):
    """A function from SystemRDL to a device class."""
    pytest.importorskip("systemrdl", reason="systemrdl-compiler is not installed")
    from kvmaio.rdl import device_class

    def load(text, top=None):
        file = tmp_path / "device.rdl"
        file.write_text(text)
        return device_class(file, top)

    return load


async def test_a_device_class_from_systemrdl(rdl):
    timer = rdl(RDL)
    assert (timer.__name__, timer.__doc__) == ("Timer", "A timer of two channels.")
    assert [(r.name, r.offset, r.bits, r.access, r.reset) for r in timer.registers] == [
        ("ch0_control", 0x00, 32, Access.RW, 0x8000_0002),
        ("ch0_status", 0x04, 32, Access.RW, 0x700),
        ("ch1_control", 0x10, 32, Access.RW, 0x8000_0002),
        ("ch1_status", 0x14, 32, Access.RW, 0x700),
        ("unlock", 0x20, 16, Access.W, 0),
    ]
    async with BusDriver(timer()) as bus:
        await bus.write(0x10, 4, 0x1)
        control = bus.device.ch1_control
        assert (control.enable, control.mode.name, control.busy) == (True, "ONCE", True)
        bus.device.ch0_status = bus.device.ch0_status.replace(expired=1)
        assert await bus.read(0x4, 4) == 0x701
        assert await bus.read(0x4, 4) == 0x001  # the count is cleared by reading
        await bus.write(0x4, 4, 0x300)
        assert (bus.device.ch0_status.expired, bus.device.ch0_status.count) == (True, 3)
        await bus.write(0x4, 4, 0x1)
        assert bus.device.ch0_status == 0
        assert await bus.read(0x20, 2) == 0
        bus.reset()
        assert bus.device.ch0_status == 0x700
    assert "| 2:1 | `mode` | 0x0 `ONCE`, 0x1 `PERIODIC` |" in register_table(timer)


async def test_a_subclass_adds_what_hardware_does(rdl):
    base = rdl(RDL)

    class Timer(base):  # type: ignore[misc, valid-type]
        def update(self):
            self.irq.set(bool(self.ch0_status.expired))

    async with BusDriver(Timer()) as bus:
        bus.device.ch0_status = bus.device.ch0_status.replace(expired=1)
        bus.device.update()
        await bus.write(0x4, 4, 1)
        assert [level for _, level in bus.irq.edges] == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("addrmap a { nonsense", "device.rdl: "),
        ("addrmap a { external mem { mementries = 4; memwidth = 32; } m @ 0; };", "is a memory"),
        ("addrmap a { reg { regwidth = 128; field {} f = 0; } one @ 0; };", "128 bits"),
        ("addrmap a { reg { field { sw = na; hw = rw; } f = 0; } one @ 0; };", "not accessible"),
        (
            "addrmap a { external reg { field { onwrite = wuser; } f = 0; } one @ 0; };",
            "wuser is not supported",
        ),
    ],
)
def test_what_a_device_cannot_have(rdl, text, message):
    with pytest.raises(ConfigurationError, match=message):
        rdl(text)
