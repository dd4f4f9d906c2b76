"""Plain data as bytes, in one way only: equal values give equal bytes.

The encoding is MessagePack with three additions: the shortest form of each
value is the only one, maps are ordered by their encoded keys, and there are
two extension types, for integers beyond 64 bits (1: signed, little-endian)
and for tuples (2: the encoded array).
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from ..errors import CheckpointError

__all__ = ["MAX_DEPTH", "MAX_VALUES", "decode", "encode", "scan"]

MAX_DEPTH = 32
"""So deep may containers nest."""

MAX_VALUES = 1 << 20
"""So many values, containers and keys included, may one section hold: as Python objects they
take up to a hundred times their encoded size, unlike a block of bytes."""

_BIG_INTEGER = 1
_TUPLE = 2

_to_bytes = msgspec.msgpack.Encoder().encode


def encode(value: object, what: str) -> bytes:
    """`value` as bytes.

    Plain data is None, bool, int, float, str, bytes (also bytearray and
    memoryview, which become bytes), list, tuple, and dict with keys that are
    str, int, bytes, bool or None. Members of an IntEnum, IntFlag or StrEnum
    become what they are made of.

    Args:
        what: named in errors, such as ``devices``.

    Raises:
        CheckpointError: not plain data (the message says where), too deep or too much of it.
    """
    try:
        return _to_bytes(_plain(value, MAX_DEPTH))
    except _NotPlain as error:
        raise CheckpointError(f"{what}{error.path}: {error}") from None
    except (ValueError, OverflowError) as error:  # a lone surrogate, 4 GiB of bytes in one piece
        raise CheckpointError(f"{what} cannot be written as plain data: {error}") from None


def decode(data: bytes) -> Any:
    """The value that `encode` made `data` of; bytes from elsewhere go through `scan` first.

    Raises:
        CheckpointError: these bytes are nothing that `encode` made.
    """
    try:
        return _decoder.decode(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"no plain data: {error}") from None


class _NotPlain(Exception):
    path = ""


def _plain(value: object, depth: int) -> object:
    """A copy of what msgspec is to encode: plain types only, maps in their order."""
    match value:
        case None | bool():
            return value
        case int():
            if -(1 << 63) <= value < 1 << 64:
                return int(value)
            size = (value.bit_length() + 8) // 8
            return msgspec.msgpack.Ext(_BIG_INTEGER, value.to_bytes(size, "little", signed=True))
        case float():
            return float(value)
        case str():
            return str.__str__(value)
        case bytes() | bytearray() | memoryview():
            return bytes(value)
    if depth == 0:
        raise _NotPlain(f"containers nest deeper than {MAX_DEPTH}; a checkpoint is plain data")
    match value:
        case list():
            return [_item(item, index, depth) for index, item in enumerate(value)]
        case tuple():
            items = [_item(item, index, depth) for index, item in enumerate(value)]
            return msgspec.msgpack.Ext(_TUPLE, _to_bytes(items))
        case dict():
            pairs = [(_key(key), _item(item, key, depth)) for key, item in value.items()]
            return dict(sorted(pairs, key=lambda pair: _to_bytes(pair[0])))
    raise _NotPlain(
        f"a {type(value).__qualname__} is not plain data; "
        "save numbers, text, bytes, lists, tuples and dicts of them"
    )


def _item(value: object, index: object, depth: int) -> object:
    try:
        return _plain(value, depth - 1)
    except _NotPlain as error:
        error.path = f"[{index!r}]{error.path}"
        raise


def _key(key: object) -> object:
    plain = _plain(key, 0) if isinstance(key, str | int | bytes | None) else None
    if isinstance(plain, msgspec.msgpack.Ext) or (plain is None and key is not None):
        raise _NotPlain(f"{key!r} as a dict's key; str, int (64 bits) and bytes are possible")
    return plain


def _extension(code: int, data: memoryview) -> object:
    if code == _BIG_INTEGER:
        return int.from_bytes(data, "little", signed=True)
    if code == _TUPLE:
        return tuple(_decoder.decode(data))
    raise ValueError(f"unknown extension type {code}")


_decoder = msgspec.msgpack.Decoder(ext_hook=_extension)


# ---- checking bytes from elsewhere ---------------------------------------------------

# First byte -> form of the number that follows, and the least that needs this form.
_UNSIGNED = {
    0xCC: (">B", 1 << 7),
    0xCD: (">H", 1 << 8),
    0xCE: (">I", 1 << 16),
    0xCF: (">Q", 1 << 32),
}
# The same, with the number below which this form is needed.
_NEGATIVE = {
    0xD0: (">b", -32),
    0xD1: (">h", -1 << 7),
    0xD2: (">i", -1 << 15),
    0xD3: (">q", -1 << 31),
}
# First byte -> kind of value, form of the size that follows, the least size that needs it.
_SIZED = {
    0xC4: ("bin", ">B", 0),
    0xC5: ("bin", ">H", 1 << 8),
    0xC6: ("bin", ">I", 1 << 16),
    0xC7: ("ext", ">B", 0),
    0xC8: ("ext", ">H", 1 << 8),
    0xC9: ("ext", ">I", 1 << 16),
    0xD9: ("str", ">B", 32),
    0xDA: ("str", ">H", 1 << 8),
    0xDB: ("str", ">I", 1 << 16),
    0xDC: ("list", ">H", 16),
    0xDD: ("list", ">I", 1 << 16),
    0xDE: ("dict", ">H", 16),
    0xDF: ("dict", ">I", 1 << 16),
}
_FIXED_EXTENSION = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_FIXED_SIZES = frozenset(_FIXED_EXTENSION.values())


def scan(data: bytes) -> int:
    """How many values `data` holds, having checked that it is what `encode` would make.

    Takes no memory to speak of, whatever the bytes say.

    Raises:
        CheckpointError: something else, or more than `MAX_VALUES`.
    """
    scanner = _Scanner(data)
    try:
        scanner.value(MAX_DEPTH)
    except (struct.error, IndexError):
        raise CheckpointError("no plain data: it ends in the middle of a value") from None
    if scanner.at != len(data):
        raise CheckpointError(f"no plain data: {len(data) - scanner.at} bytes too many")
    return scanner.values


class _Scanner:
    def __init__(self, data: bytes | memoryview) -> None:
        self.data = data
        self.at = 0
        self.values = 0

    def value(self, depth: int, *, is_key: bool = False) -> None:
        """Step over one value."""
        self.values += 1
        if self.values > MAX_VALUES:
            raise CheckpointError(f"no plain data: more than {MAX_VALUES} values in one section")
        first = self.data[self.at]
        start = self.at
        self.at += 1
        if first <= 0x7F or first >= 0xE0 or first in (0xC0, 0xC2, 0xC3):
            return
        if first in _UNSIGNED:
            form, least = _UNSIGNED[first]
            self._require(self._number(form) >= least, start)
        elif first in _NEGATIVE:
            form, below = _NEGATIVE[first]
            self._require(self._number(form) < below, start)
        elif first == 0xCB and not is_key:
            self._skip(8)
        else:
            kind, count = self._size(first, start)
            if kind in ("str", "bin"):
                self._skip(count)
            else:
                self._require(depth > 0 and not is_key, start)
                self._container(kind, count, depth, start)

    def _container(self, kind: str, count: int, depth: int, start: int) -> None:
        if kind == "list":
            for _ in range(count):
                self.value(depth - 1)
        elif kind == "dict":
            last = b""
            for _ in range(count):
                key_at = self.at
                self.value(0, is_key=True)
                key = bytes(self.data[key_at : self.at])
                self._require(key > last, key_at)
                last = key
                self.value(depth - 1)
        else:
            code = self.data[self.at]
            self.at += 1
            content = memoryview(self.data)[self.at : self.at + count]
            self._skip(count)
            if code == _BIG_INTEGER:
                number = int.from_bytes(content, "little", signed=True)
                shortest = len(content) == (number.bit_length() + 8) // 8
                self._require(shortest and not -(1 << 63) <= number < 1 << 64, start)
            else:
                self._require(code == _TUPLE, start)
                self._tuple(content, depth, start)

    def _tuple(self, content: memoryview, depth: int, start: int) -> None:
        self._require(bool(content) and (content[0] >> 4 == 9 or content[0] in (0xDC, 0xDD)), start)
        inner = _Scanner(content)
        inner.values = self.values - 1  # the tuple was counted, and its array will be
        inner.value(depth)
        self._require(inner.at == len(content), start)
        self.values = inner.values

    def _size(self, first: int, start: int) -> tuple[str, int]:
        if 0xA0 <= first <= 0xBF:
            return "str", first & 0x1F
        if 0x90 <= first <= 0x9F:
            return "list", first & 0xF
        if 0x80 <= first <= 0x8F:
            return "dict", first & 0xF
        if first in _FIXED_EXTENSION:
            return "ext", _FIXED_EXTENSION[first]
        self._require(first in _SIZED, start)
        kind, form, least = _SIZED[first]
        size = self._number(form)
        self._require(size >= least, start)
        self._require(kind != "ext" or size not in _FIXED_SIZES, start)
        return kind, size

    def _number(self, form: str) -> int:
        (number,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return int(number)

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise IndexError

    def _require(self, condition: bool, at: int) -> None:
        if not condition:
            raise CheckpointError(f"no plain data as kvmaio writes it: byte {at} is unexpected")
