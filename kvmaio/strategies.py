"""Hypothesis strategies: what a guest may do to a device, out of its register declarations.

Needs hypothesis. See `kvmaio.testing.register_accesses()`.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import attrs

from .device import Device
from .fields import Fields
from .registers import Access, Register

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from .testing import BusDriver

__all__ = ["BusAccess", "register_accesses", "register_values"]


@attrs.frozen
class BusAccess:
    """A read or a write of `size` bytes at `offset` into a device's window.

    Attributes:
        value: what is written; None: it is a read.
    """

    offset: int
    size: int
    value: int | None = None

    async def make(self, bus: BusDriver[Any]) -> int | None:
        """Carry it out; what was read, or None."""
        if self.value is None:
            return await bus.read(self.offset, self.size)
        await bus.write(self.offset, self.size, self.value)
        return None


def register_accesses(device: type[Device], *, odd: bool = True) -> SearchStrategy[BusAccess]:
    """Accesses to the registers of `device`: mostly whole ones, with values that mean something.

    Args:
        odd: now and then one that a driver would not make: a part of a register, across
            several, where there is none, or against the access policy.
    """
    from hypothesis import strategies as st

    choices: list[SearchStrategy[BusAccess]] = []
    for register in device.registers:
        if register.access is not Access.W and not register.doorbell:
            choices.append(st.just(BusAccess(register.offset, register.size)))
        if register.access is not Access.R:
            choices.append(
                st.builds(
                    BusAccess,
                    st.just(register.offset),
                    st.just(register.size),
                    register_values(register),
                )
            )
    if odd or not choices:
        last = max(device.size, 1) - 1
        sizes = st.sampled_from((1, 2, 4, 8))
        offsets = st.integers(0, last)
        anything = st.none() | _numbers(64)
        fitting = st.tuples(offsets, sizes).filter(lambda place: sum(place) <= last + 1)
        choices.append(st.builds(_odd, fitting, anything))
    return st.one_of(choices)


def register_values(register: Register[Any]) -> SearchStrategy[int]:
    """Numbers for a register: combinations of its type's names mostly, any others sometimes."""
    from hypothesis import strategies as st

    numbers = _numbers(register.bits)
    kind = register.type
    if not isinstance(kind, type):
        return numbers
    if issubclass(kind, enum.IntFlag):
        flags = st.sets(st.sampled_from([int(member) for member in kind] or [0])).map(_united)
        return st.one_of(flags, numbers).map(lambda value: value & register.mask)
    if issubclass(kind, enum.IntEnum):
        return st.one_of(st.sampled_from([int(member) for member in kind]), numbers)
    if issubclass(kind, Fields):
        parts = [_field_values(field) for field in kind.fields]
        return st.one_of(st.tuples(*parts).map(_united), numbers)
    return numbers


def _numbers(bits: int) -> SearchStrategy[int]:
    """Small numbers, single bits and all ones reach more states than evenly chosen ones."""
    from hypothesis import strategies as st

    most = (1 << bits) - 1
    return st.one_of(
        st.integers(0, min(most, 0x90)),
        st.integers(0, bits - 1).map(lambda bit: 1 << bit),
        st.sampled_from((0, most)),
        st.integers(0, most),
    )


def _field_values(field: Any) -> SearchStrategy[int]:
    from hypothesis import strategies as st

    width = field.high - field.low + 1
    numbers = st.integers(0, (1 << width) - 1)
    if isinstance(field.type, type) and issubclass(field.type, enum.IntEnum):
        numbers = st.one_of(st.sampled_from([int(member) for member in field.type]), numbers)
    return numbers.map(lambda value: value << field.low & field.mask)


def _united(values: Any) -> int:
    result = 0
    for value in values:
        result |= int(value)
    return result


def _odd(place: tuple[int, int], value: int | None) -> BusAccess:
    offset, size = place
    return BusAccess(offset, size, None if value is None else value & ((1 << 8 * size) - 1))
