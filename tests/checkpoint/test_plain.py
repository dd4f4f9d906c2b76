"""Plain data as bytes: what comes back, what is refused, and that there is one way only."""

from __future__ import annotations

import contextlib
import enum
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmaio import CheckpointError
from kvmaio.checkpoint.plain import MAX_DEPTH, MAX_VALUES, decode, encode, scan
from tests.checkpoint.samples import plain_data


def same(one: object, other: object) -> bool:
    """Equal, of equal types, and NaN equal to itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return one == other


@given(plain_data)
def test_comes_back_with_its_types(value):
    data = encode(value, "test")
    assert same(decode(data), value)
    assert encode(decode(data), "test") == data
    assert scan(data) >= 1


@given(st.dictionaries(st.text() | st.integers(-(1 << 63), (1 << 64) - 1), st.integers()))
def test_order_of_insertion_leaves_no_trace(value):
    assert encode(value, "x") == encode(dict(reversed(value.items())), "x")


def test_members_of_enumerations_become_what_they_are_made_of():
    class Bits(enum.IntFlag):
        A = 1
        B = 2

    class Name(enum.StrEnum):
        ONE = "one"

    assert decode(encode([Bits.A | Bits.B, Name.ONE, {Bits.A: bytearray(b"x")}], "x")) == [
        3,
        "one",
        {1: b"x"},
    ]
    assert type(decode(encode(Bits.A, "x"))) is int


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [0, {1}]}, "uart0['a'][1]: a set is not plain data"),
        ({"a": object()}, "uart0['a']: a object is not plain data"),
        ({(1, 2): 3}, "uart0: (1, 2) as a dict's key"),
        ({1.5: 3}, "uart0: 1.5 as a dict's key"),
        ({1 << 64: 3}, "as a dict's key; str, int (64 bits)"),
        ("\ud800", "uart0 cannot be written as plain data"),
    ],
)
def test_what_is_not_plain_is_refused_by_its_place(value, message):
    with pytest.raises(CheckpointError) as caught:
        encode(value, "uart0")
    assert message in str(caught.value)


def test_what_contains_itself_is_refused():
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="nest deeper"):
        encode(loop, "x")


def test_depth_limit_is_that_of_reading():
    value: object = 1
    for level in range(MAX_DEPTH):
        value = [value] if level % 2 else (value,)
    assert decode(encode(value, "x")) == value
    scan(encode(value, "x"))
    with pytest.raises(CheckpointError, match="nest deeper"):
        encode([value], "x")


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\xc1", b"\x01\x02", b"\xa2a", b"\x92\x01", b"\x81", b"\x81\x01"),
        *(
            b"\xcc\x01",
            b"\xcd\x00\xff",
            b"\xd0\x01",
            b"\xd9\x01a",
            b"\xc5\x00\x01a",
        ),  # not shortest
        *(b"\xdc\x00\x01\x01", b"\xde\x00\x01\x01\x01"),
        *(b"\x82\x02\x01\x01\x01", b"\x82\x01\x01\x01\x01"),  # keys out of order, twice
        *(b"\x81\x90\x01", b"\x81\xcb" + bytes(8) + b"\x01"),  # keys that are none
        *(
            b"\xd4\x05\x00",
            b"\xd4\x01\x00",
            b"\xd4\x02\x01",
            b"\xd5\x02\x90\x90",
            b"\xc7\x01\x02\x90",
        ),
        *(b"\xca\x00\x00\x00\x00", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"),
        *(
            b"\xc6\xff\xff\xff\xff",
            b"\x91" * 100_000,
            b"\xdd\x00\x20\x00\x00" + b"\xc0" * (1 << 21),
        ),
    ],
    ids=lambda data: data[:8].hex(),
)
def test_bytes_of_another_kind_are_refused(data):
    with pytest.raises(CheckpointError):
        scan(data)


@given(st.binary(max_size=60))
def test_what_scan_lets_through_is_what_encode_makes(data):
    try:
        scan(data)
    except CheckpointError:
        return
    try:
        value = decode(data)
    except CheckpointError:
        return  # text that is not UTF-8
    assert encode(value, "x") == data


@given(st.binary(max_size=60))
def test_decoding_anything_raises_nothing_else(data):
    with contextlib.suppress(CheckpointError):
        decode(data)


def test_too_many_values_are_refused():
    data = msgspec.msgpack.encode([None] * MAX_VALUES)
    with pytest.raises(CheckpointError, match="more than 1048576 values"):
        scan(data)
