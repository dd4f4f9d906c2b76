"""`Register`: a device register, declared once with its offset, width, policy and reset."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Literal, TypeVar, overload

from .doorbell import Doorbell
from .errors import ConfigurationError

__all__ = ["Access", "Register", "SharedRegister"]

T = TypeVar("T")
H = TypeVar("H", bound=Callable[..., Any])


class Access(enum.Enum):
    """What the guest may do with a register; what it may not is ignored, reads give 0."""

    R = "read-only"
    W = "write-only"
    RW = "read-write"


class Register(Generic[T]):
    """A register of a `Device`, declared as a class attribute.

    ::

        class Timer(Device):
            interval = Register(0x0, int, bits=32)
            status = Register(0x8, Status, Access.R, reset=Status.READY)

            @interval.on_write
            def start(self, interval: int) -> None: ...

    On an instance, the attribute *is* the register's value: ``self.interval``.
    A guest write stores the value there unless an `on_write` handler takes
    it; a guest read returns it unless an `on_read` handler answers. A handler
    is a plain function or a coroutine function; while a coroutine is
    suspended, the vCPU that made the access waits, and nobody else.

    Args:
        offset: in bytes from the start of the device's window.
        type: what the guest's number becomes: int, an IntFlag, an IntEnum or
            any callable that takes an int. A number that it refuses with
            ValueError is passed on as it is: a guest may write anything.
        access: reads of a write-only register give 0, writes to a read-only
            one are ignored.
        bits: the width: 8, 16, 32 or 64.
        reset: the value after power-on and reset.
        posted: a write needs no answer before the guest goes on, so that KVM
            may batch it. Order among all accesses of the guest is kept, and a write
            arrives within 5 ms. ``"timed"``: each also carries the time at which the
            guest made it, `Device.write_time_ns`, at the cost of an exit within C.
        doorbell: writes only ring: their values are not wanted, and the attribute is
            a `Doorbell`, an asynchronous iterator of how often it rang.
        when: a predicate on the device; the register is there only while it
            is true (banked registers, such as those behind a UART's DLAB).

    Raises:
        ConfigurationError: an impossible offset, width or reset value.
    """

    @overload
    def __init__(
        self: Register[Doorbell],
        offset: int,
        type: Callable[[int], int] = int,
        access: Access = Access.RW,
        *,
        bits: int = 8,
        doorbell: Literal[True],
    ) -> None: ...
    @overload
    def __init__(
        self: Register[int],
        offset: int,
        *,
        access: Access = Access.RW,
        bits: int = 8,
        reset: int = 0,
        posted: bool | Literal["timed"] = False,
        when: Callable[[Any], bool] | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        offset: int,
        type: Callable[[int], T],
        access: Access = Access.RW,
        *,
        bits: int = 8,
        reset: int = 0,
        posted: bool | Literal["timed"] = False,
        when: Callable[[Any], bool] | None = None,
    ) -> None: ...
    def __init__(
        self,
        offset: int,
        type: Callable[[int], Any] = int,
        access: Access = Access.RW,
        *,
        bits: int = 8,
        reset: int = 0,
        posted: bool | Literal["timed"] = False,
        doorbell: bool = False,
        when: Callable[[Any], bool] | None = None,
    ) -> None:
        if bits not in (8, 16, 32, 64):
            raise ConfigurationError(
                f"a register of {bits} bits: only 8, 16, 32 and 64 are possible"
            )
        if offset < 0:
            raise ConfigurationError(f"a register at offset {offset}: offsets start at 0")
        if not 0 <= reset < 1 << bits:
            raise ConfigurationError(
                f"reset value {reset:#x} does not fit a register of {bits} bits"
            )
        if (posted or doorbell) and access is Access.R:
            raise ConfigurationError(
                f"a read-only register at {offset:#x} cannot be posted or a doorbell"
            )
        if doorbell and when is not None:
            raise ConfigurationError(f"a doorbell at {offset:#x} cannot be banked (`when`)")
        self.offset = offset
        self.type = type
        self.access = access
        self.bits = bits
        self.size = bits // 8
        self.reset = reset
        self.posted = bool(posted)
        self.timed = posted == "timed"
        self.doorbell = doorbell
        self.when = when
        self.name = f"register_{offset:x}"
        self.mask = (1 << bits) - 1
        self.read_handler: Callable[[Any], int | Awaitable[int]] | None = None
        self.write_handler: Callable[[Any, Any], Awaitable[None] | None] | None = None

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    # Only __get__, no __set__: the value lies in the instance's __dict__ under
    # the register's own name, so a device reads and writes it at full speed.
    @overload
    def __get__(self, instance: None, owner: type) -> Register[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Register[T] | T:
        if instance is None:
            return self
        raise AttributeError(
            f"{owner.__name__}.{self.name} has no value; was Device.__new__ bypassed?"
        )

    def on_read(self, handler: H) -> H:
        """Decorator: the method answers the guest's reads, plain or `async`."""
        self.read_handler = handler
        return handler

    def on_write(self, handler: H) -> H:
        """Decorator: the method takes the guest's writes, plain or `async`."""
        self.write_handler = handler
        return handler

    def power_on(self, device: object) -> None:
        """Give the register its reset value."""
        self.store(device, Doorbell() if self.doorbell else self.typed(self.reset))

    def store(self, device: object, value: Any) -> None:
        """Set the register's value on `device`."""
        device.__dict__[self.name] = value

    def reader(self, device: object) -> Callable[[int, int], int | Awaitable[int]]:
        """`read()` as a function of (offset, size), for accesses that meet the register exactly."""
        return lambda offset, size: self.read(device)

    def writer(self, device: object) -> Callable[[int, int, int], Awaitable[None] | None]:
        """`write()` as a function of (offset, size, value), in as few steps as there can be."""
        handler, mask = self.write_handler, self.mask
        if self.access is Access.R or handler is None or self.type is not int:
            return lambda offset, size, value: self.write(device, value)
        return lambda offset, size, value: handler(device, value & mask)

    def save(self, device: object) -> int:
        """The register's value on `device` for a checkpoint."""
        value = device.__dict__[self.name]
        return value.pending if self.doorbell else int(value)

    def load(self, device: object, value: int) -> None:
        """Take back what `save()` gave."""
        if self.doorbell:
            device.__dict__[self.name].put_back(value)
        else:
            self.store(device, self.typed(value))

    def typed(self, value: int) -> Any:
        """`value` cut to the register's width and converted to its type."""
        value &= self.mask
        if self.type is int:
            return value
        try:
            return self.type(value)
        except ValueError:
            return value

    def read(self, device: object) -> int | Awaitable[int]:
        """The guest reads the whole register."""
        if self.access is Access.W or self.doorbell:
            return 0
        if self.read_handler is not None:
            return self.read_handler(device)
        return int(device.__dict__[self.name])

    def write(self, device: object, value: int) -> Awaitable[None] | None:
        """The guest writes the whole register."""
        if self.access is Access.R:
            return None
        if self.write_handler is not None:
            return self.write_handler(device, self.typed(value))
        if self.doorbell:
            device.__dict__[self.name].ring()
        else:
            self.store(device, self.typed(value))
        return None

    def __repr__(self) -> str:
        return f"<Register {self.name} at {self.offset:#x}, {self.bits} bits, {self.access.value}>"


class SharedRegister(Register[T]):
    """A register whose reads are answered from a cell, without Python where the CPU model can.

    For status registers that a guest polls: the device assigns to the attribute as
    ever, and the assignment updates the cell. So there is no `on_read` handler.
    A read while posted writes of the guest are still on their way waits for these.
    """

    _CELLS = "_shared_cells"

    def __set__(self, instance: object, value: T) -> None:
        self.store(instance, value)

    # With __set__ beside it, __get__ comes before the instance's __dict__.
    @overload
    def __get__(self, instance: None, owner: type) -> SharedRegister[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> SharedRegister[T] | T:
        if instance is None:
            return self
        value: T = instance.__dict__[self.name]
        return value

    def on_read(self, handler: H) -> H:
        raise ConfigurationError(f"{self.name} is a SharedRegister: its reads reach no handler")

    def store(self, device: object, value: Any) -> None:
        device.__dict__[self.name] = value
        for cell in device.__dict__.get(self._CELLS, {}).get(self.name, ()):
            cell[0] = int(value) & self.mask

    def forget_cells(self, device: object) -> None:
        """Take back all `use_cell()`."""
        device.__dict__.get(self._CELLS, {}).pop(self.name, None)

    def use_cell(self, device: object, cell: Any) -> None:
        """Keep `cell`, an array of one 64-bit word, at the register's value from now on; one for
        each window of the device."""
        device.__dict__.setdefault(self._CELLS, {}).setdefault(self.name, []).append(cell)
        self.store(device, device.__dict__[self.name])
