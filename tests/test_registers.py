"""Register: what a declaration promises, and which are refused."""

import enum

import pytest

from kvmaio.device import Device
from kvmaio.errors import ConfigurationError
from kvmaio.registers import Access, Register


class Bits(enum.IntFlag):
    LOW = 1
    HIGH = 0x80


class Mode(enum.IntEnum):
    OFF = 0
    ON = 1


class Sample(Device):
    plain = Register(0x0, int, bits=16, reset=0x1234)
    flags = Register(0x2, Bits, reset=Bits.HIGH)
    mode = Register(0x3, Mode)
    status = Register(0x4, int, Access.R, reset=7)
    command = Register(0x5, int, Access.W)


def test_an_attribute_is_the_value_and_on_the_class_the_register():
    device = Sample()
    assert (device.plain, device.flags, device.mode) == (0x1234, Bits.HIGH, Mode.OFF)
    assert [type(v) for v in (device.plain, device.flags, device.mode)] == [int, Bits, Mode]
    assert repr(Sample.plain) == "<Register plain at 0x0, 16 bits, read-write>"
    device.plain = 1
    assert (device.read(0, 2), Sample().plain) == (1, 0x1234)


def test_writes_are_cut_to_the_width_and_converted():
    device = Sample()
    device.write(0x2, 1, 0x381)
    device.write(0x3, 1, 1)
    assert (device.flags, device.mode, type(device.mode)) == (Bits.LOW | Bits.HIGH, Mode.ON, Mode)


def test_a_number_that_the_type_refuses_is_passed_on():
    device = Sample()
    device.write(0x3, 1, 0x55)
    assert (device.mode, device.read(0x3, 1)) == (0x55, 0x55)


def test_access_policies():
    device = Sample()
    device.write(0x4, 1, 99)
    device.write(0x5, 1, 99)
    assert (device.read(0x4, 1), device.status) == (7, 7)
    assert (device.read(0x5, 1), device.command) == (0, 99)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 12}, "a register of 12 bits: only 8, 16, 32 and 64"),
        ({"offset": -4}, "a register at offset -4: offsets start at 0"),
        ({"reset": 0x100}, "reset value 0x100 does not fit a register of 8 bits"),
        ({"reset": -1}, "reset value -0x1 does not fit"),
        ({"access": Access.R, "posted": True}, "read-only register at 0x0 cannot be posted"),
        ({"access": Access.R, "doorbell": True}, "cannot be posted or a doorbell"),
    ],
)
def test_impossible_declarations(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Register(**{"offset": 0, **arguments})


def test_a_value_that_was_never_made_says_so():
    device = object.__new__(Sample)
    with pytest.raises(AttributeError, match=r"Sample\.plain has no value"):
        _ = device.plain
