"""An access to a device, with a record made of it: the one hook on every exit's way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import attrs

from ..bus import Target
from ..suspension import Suspended, a_number, drive
from ..vcpu import serving_vcpu
from .records import AccessRecord, Record

if TYPE_CHECKING:
    from ..device import Device

__all__ = ["TracedTarget", "traced_target"]


@attrs.frozen(eq=False)
class TracedTarget(Target):
    """A target whose accesses become records, and what whoever makes these himself needs.

    Attributes:
        inner: the same without records.
        what: of the accesses: source, register's name, bus, address; None where the name may
            change from one to the next.
        tell: makes a record: when it began, register, is it a write, value.
    """

    inner: Target
    what: Callable[[bool], tuple[str, str | None, str, int]] | None
    tell: Callable[[int, str | None, bool, int | None], None]


def traced_target(
    target: Target,
    emit: Callable[[Record], object],
    now: Callable[[], int],
    source: str,
    device: Device | None,
    bus: str,
    address: int,
    size: int,
) -> TracedTarget:
    """`target` with a record for each access, also for one whose handler raises."""
    mask = (1 << 8 * size) - 1
    name_of, is_fixed = _register_namer(device, target.offset)

    def tell(begun_ns: int, register: str | None, is_write: bool, value: int | None) -> None:
        by = serving_vcpu()
        took_ns = now() - begun_ns
        # A named tuple's own constructor is a function in Python, and takes twice as long.
        fields = (begun_ns, source, by, register, bus, address, size, is_write, value, took_ns)
        emit(_new(AccessRecord, fields))

    def read(offset: int, size: int) -> int | Awaitable[int]:
        begun_ns = now()
        register = name_of(False)
        try:
            value = target.read(offset, size)
            if not isinstance(value, int):
                # As far as it goes at once, which spares a coroutine around the handler's.
                value = drive(value)
                if isinstance(value, Suspended):
                    return finish_read(value, begun_ns, register)
            value = a_number(value) & mask
        except BaseException:
            tell(begun_ns, register, False, None)
            raise
        tell(begun_ns, register, False, value)
        return value

    async def finish_read(rest: Suspended[int], begun_ns: int, register: str | None) -> int:
        value = None
        try:
            value = a_number(await rest) & mask
            return value
        finally:
            tell(begun_ns, register, False, value)

    def write(offset: int, size: int, value: int) -> Awaitable[None] | None:
        begun_ns = now()
        register = name_of(True)
        try:
            pending = target.write(offset, size, value)
            if pending is not None:
                rest = drive(pending)
                if isinstance(rest, Suspended):
                    return finish_write(rest, begun_ns, register, value)
        except BaseException:
            tell(begun_ns, register, True, value)
            raise
        tell(begun_ns, register, True, value)
        return None

    async def finish_write(
        rest: Suspended[None], begun_ns: int, register: str | None, value: int
    ) -> None:
        try:
            await rest
        finally:
            tell(begun_ns, register, True, value)

    def what(is_write: bool) -> tuple[str, str | None, str, int]:
        return source, name_of(is_write), bus, address

    return TracedTarget(
        target.offset,
        read,
        write,
        target.update,
        target,
        what if is_fixed else None,
        tell,
    )


_new = tuple.__new__


def _register_namer(
    device: Device | None, offset: int
) -> tuple[Callable[[bool], str | None], bool]:
    """is_write -> the name of the register at `offset`; and is it always the same?"""
    if device is None:
        return lambda is_write: None, True
    here = [r for r in device.registers if r.offset <= offset < r.offset + r.size]
    if any(register.when is not None for register in here):
        return lambda is_write: device.register_name(offset, is_write), False
    names = {is_write: device.register_name(offset, is_write) for is_write in (False, True)}
    return names.__getitem__, True
