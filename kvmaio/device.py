"""`Device`: a part of the machine that answers accesses on a bus."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Awaitable, Mapping
from contextlib import AbstractAsyncContextManager
from types import MethodType
from typing import Any, ClassVar, Self

from .busy import BusySections
from .clock import Alarm, Clock, StoppedClock
from .errors import ConfigurationError
from .irq import IrqLine
from .registers import Access, Register

__all__ = ["Device", "replaced"]


class Device:
    """The base of every device model.

    A device knows neither bus nor hypervisor: it has registers, an interrupt
    line, a clock and an alarm, and all of them are there from creation, so a
    subclass's ``__init__`` need not call this one. Device code runs on the
    event loop only and needs no locks.

    Handlers change state and return; waiting happens in `run()`, or in an
    ``async`` handler if the guest is to stall meanwhile; status and interrupt
    are derived in `update()`.

    Attributes:
        size: the length of the window in bytes; by default as far as the
            declared registers reach.
        name: set when the device is attached, such as ``uart165500``.
        irq: the interrupt output.
        clock: guest time, `clock.now_ns`.
        alarm: one deadline; iterate over it in `run()`.
        busy_sections: those of `busy()` that are open.
    """

    size: int = 0
    registers: ClassVar[tuple[Register[Any], ...]] = ()
    _readers: ClassVar[dict[int, tuple[Register[Any], ...]]] = {}
    _writers: ClassVar[dict[int, tuple[Register[Any], ...]]] = {}

    posted_time_ns: int | None = None
    """Set by the bus while a timed posted write is handled, by the loop's time; see
    `write_time_ns`."""

    name: str
    irq: IrqLine
    clock: Clock
    alarm: Alarm
    busy_sections: BusySections
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        declared: dict[str, Register[Any]] = {}
        for base in reversed(cls.__mro__):
            for name, value in vars(base).items():
                if isinstance(value, Register):
                    declared[name] = value
                else:
                    declared.pop(name, None)
        cls.registers = tuple(sorted(declared.values(), key=lambda register: register.offset))
        table = _table(cls)
        cls._readers = _preferring(table, Access.R)
        cls._writers = _preferring(table, Access.W)
        if "size" not in vars(cls):
            cls.size = max(cls.size, max((r.offset + r.size for r in cls.registers), default=0))

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        device = super().__new__(cls)
        device.name = cls.__name__.lower()
        device.irq = IrqLine(f"{device.name}.irq")
        device.clock = StoppedClock()
        device.alarm = Alarm(device.clock)
        device.busy_sections = BusySections(device)
        device._arguments = args, kwargs
        for register in cls.registers:
            register.power_on(device)
        return device

    def __init__(self) -> None:
        pass

    @property
    def write_time_ns(self) -> int:
        """When the guest made the write that is being handled, in guest nanoseconds.

        For a register posted as ``"timed"`` that is earlier than now.
        """
        posted_ns = self.posted_time_ns
        return self.clock.now_ns if posted_ns is None else self.clock.of_loop(posted_ns)

    def read(self, offset: int, size: int) -> int | Awaitable[int]:
        """Answer a read of `size` (1, 2, 4 or 8) bytes at `offset` into the window.

        By default the declared registers answer; a place with no register
        reads as 0. An access that covers several registers, or a part of
        one, is put together in little-endian order.
        """
        register = self._register_at(self._readers, offset)
        if register is not None and register.offset == offset and register.size == size:
            return register.read(self)
        return self._read_pieces(offset, size)

    def write(self, offset: int, size: int, value: int) -> Awaitable[None] | None:
        """Take a write of `size` bytes at `offset`; see `read()`.

        A place with no register ignores writes; a write to a part of a
        register leaves its other bytes as they are.
        """
        register = self._register_at(self._writers, offset)
        if register is not None and register.offset == offset and register.size == size:
            return register.write(self, value)
        return self._write_pieces(offset, size, value)

    def register_exactly_at(
        self, offset: int, size: int, direction: Access
    ) -> Register[Any] | None:
        """The register that an access there means whatever the state, or None."""
        table = self._readers if direction is Access.R else self._writers
        here = table.get(offset, ())
        if not here or any(register.when is not None for register in here):
            return None
        register = here[0]
        return register if (register.offset, register.size) == (offset, size) else None

    def reset(self) -> None:
        """Return to the state after power-on. Extend it for state outside registers."""
        self.alarm.reset()
        for register in self.registers:
            register.power_on(self)

    def update(self) -> None:
        """Derive status and interrupt from state; called after each write, reset and load."""

    async def run(self) -> None:
        """The device's own activity, if it has one.

        Started once by the first `Machine.run()`, it goes on between runs and
        is cancelled when the machine closes. Returning is fine; an exception
        ends the machine. State belongs in attributes: a coroutine cannot be
        checkpointed, and `run()` may be started from any drained state.
        """

    def busy(self, why: str = "at work") -> AbstractAsyncContextManager[None]:
        """``async with self.busy("reading a block"):`` what a checkpoint must not cut in two.

        For activities of `run()` or of tasks of the device's own, whose state is not all in
        attributes meanwhile. A drain waits until they are over, and they wait to begin while
        the machine is drained. Handlers of accesses need none: they are waited for as it is.
        Keep it short: not around a wait for the guest, which runs no more.

        Args:
            why: for the message if it takes too long.
        """
        return self.busy_sections.section(why)

    async def close(self) -> None:
        """Give back what the device has opened; called once when its machine closes."""

    def save(self) -> dict[str, Any]:
        """State outside of registers and alarm, as plain data for a checkpoint."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `save()` gave."""

    def register_name(self, offset: int, is_write: bool) -> str | None:
        """The name of the register that an access at `offset` reaches; None: there is none."""
        register = self._register_at(self._writers if is_write else self._readers, offset)
        return None if register is None else register.name

    def clone(self, copies: Mapping[Any, Any]) -> Self:
        """A device for a copy of the machine (`Machine.fork`), whose state follows by `load()`.

        By default one made with the same arguments. Extend it where a device was equipped
        after it was made; references to the machine's other devices, its memory, buses,
        lines and vCPUs follow by themselves.

        Args:
            copies: part of the machine -> what it is in the copy. An argument that is one,
                or has some in it (`replaced`), is replaced.
        """
        args, kwargs = self._arguments
        return type(self)(
            *(replaced(value, copies) for value in args),
            **{key: replaced(value, copies) for key, value in kwargs.items()},
        )

    def _register_at(
        self, table: dict[int, tuple[Register[Any], ...]], offset: int
    ) -> Register[Any] | None:
        for register in table.get(offset, ()):
            if register.when is None or register.when(self):
                return register
        return None

    async def _read_pieces(self, offset: int, size: int) -> int:
        result = 0
        done = 0
        while done < size:
            register = self._register_at(self._readers, offset + done)
            if register is None:
                done += 1
                continue
            skip = offset + done - register.offset
            length = min(register.size - skip, size - done)
            value = register.read(self)
            if not isinstance(value, int):
                value = await value
            piece = (value >> 8 * skip) & ((1 << 8 * length) - 1)
            result |= piece << 8 * done
            done += length
        return result

    async def _write_pieces(self, offset: int, size: int, value: int) -> None:
        done = 0
        while done < size:
            register = self._register_at(self._writers, offset + done)
            if register is None:
                done += 1
                continue
            skip = offset + done - register.offset
            length = min(register.size - skip, size - done)
            mask = ((1 << 8 * length) - 1) << 8 * skip
            piece = (value >> 8 * done) << 8 * skip & mask
            if length < register.size:
                piece |= int(self.__dict__[register.name]) & ~mask
            pending = register.write(self, piece)
            if pending is not None:
                await pending
            done += length

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


def replaced(value: Any, copies: Mapping[Any, Any]) -> Any:
    """`value` with what `copies` has in place of what is in it; itself, if that is nothing.

    Looks into lists, tuples, dicts, sets, methods of what was copied, and partial functions.
    """
    each = functools.partial(replaced, copies=copies)
    match value:
        case list() | set() | frozenset() | tuple():
            items = [each(item) for item in value]
            if all(map(operator.is_, value, items)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        case dict():
            keys, values = [each(key) for key in value], [each(item) for item in value.values()]
            if all(map(operator.is_, (*value, *value.values()), (*keys, *values))):
                return value
            copied = copy.copy(value)  # also a defaultdict
            copied.clear()
            copied.update(zip(keys, values, strict=True))
            return copied
        case MethodType():
            owner = each(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        case functools.partial():
            parts = (value.func, value.args, value.keywords)
            function, args, keywords = map(each, parts)
            if all(map(operator.is_, parts, (function, args, keywords))):
                return value
            return functools.partial(function, *args, **keywords)
    try:
        return copies[value]
    except (KeyError, TypeError):  # TypeError: it has no hash
        return value


def _table(cls: type[Device]) -> dict[int, tuple[Register[Any], ...]]:
    """Byte offset -> the registers there.

    Two that are always there may not overlap, unless one is only for reading
    and the other only for writing, as RBR and THR of a UART.
    """
    table: dict[int, tuple[Register[Any], ...]] = {}
    for register in cls.registers:
        for offset in range(register.offset, register.offset + register.size):
            for other in table.get(offset, ()):
                share = {other.access, register.access} == {Access.R, Access.W}
                if other.when is None and register.when is None and not share:
                    raise ConfigurationError(
                        f"{cls.__name__}: {register.name} at {register.offset:#x}.."
                        f"{register.offset + register.size - 1:#x} overlaps {other.name} "
                        f"at {other.offset:#x}..{other.offset + other.size - 1:#x}"
                    )
            table[offset] = (*table.get(offset, ()), register)
    if "size" in vars(cls) and cls.registers:
        last = max(cls.registers, key=lambda r: r.offset + r.size)
        if last.offset + last.size > cls.size:
            raise ConfigurationError(
                f"{cls.__name__}: {last.name} lies beyond the window of {cls.size:#x} bytes"
            )
    return table


def _preferring(
    table: dict[int, tuple[Register[Any], ...]], direction: Access
) -> dict[int, tuple[Register[Any], ...]]:
    """`table` in the order of choice: a register with a predicate hides one without."""
    able = (direction, Access.RW)
    return {
        offset: tuple(sorted(here, key=lambda r: (r.when is None, r.access not in able)))
        for offset, here in table.items()
    }
