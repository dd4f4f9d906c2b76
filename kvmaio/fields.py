"""`Fields`: a register's value as a number with named fields; types for `Register`.

::

    class Control(Fields):
        enable = Field(0)
        mode = Field(2, 1, Mode)  # bits 2:1

    control = Register(0x4, Control, bits=32)

    if self.control.enable: ...
    self.control = self.control.replace(mode=Mode.FAST)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

from .errors import ConfigurationError

__all__ = ["Field", "Fields"]


class Field:
    """Bits `high` down to `low` of a register, converted to `type`.

    Args:
        low: by default the same as `high`: a single bit.
        type: what the field's number becomes; a number that it refuses with ValueError
            stays one.
    """

    def __init__(
        self, high: int, low: int | None = None, type: Callable[[int], Any] = int, doc: str = ""
    ) -> None:
        self.high = high
        self.low = high if low is None else low
        self.type = type
        self.__doc__ = doc
        self.name = ""
        if not 0 <= self.low <= self.high <= 63:
            raise ConfigurationError(f"a field of the bits {high}:{low}: 63 down to 0 are possible")
        self.mask = ((1 << (self.high - self.low + 1)) - 1) << self.low

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, value: Fields | None, owner: type) -> Any:
        if value is None:
            return self
        number = (int(value) & self.mask) >> self.low
        try:
            return self.type(number)
        except ValueError:
            return number

    def __str__(self) -> str:
        return str(self.high) if self.high == self.low else f"{self.high}:{self.low}"


class Fields(int):
    """A number with fields; immutable, as every number."""

    fields: ClassVar[tuple[Field, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        found = [value for value in vars(cls).values() if isinstance(value, Field)]
        cls.fields = tuple(sorted(found, key=lambda field: -field.high))
        for upper, lower in zip(cls.fields, cls.fields[1:], strict=False):
            if upper.low <= lower.high:
                raise ConfigurationError(
                    f"{cls.__name__}: {upper.name} at {upper} overlaps {lower.name} at {lower}"
                )

    def replace(self, **values: int) -> Self:
        """The same with other values of some fields.

        Raises:
            ConfigurationError: there is no such field, or the value does not fit.
        """
        number = int(self)
        for name, value in values.items():
            field = getattr(type(self), name, None)
            if not isinstance(field, Field):
                raise ConfigurationError(f"{type(self).__name__} has no field {name!r}")
            placed = int(value) << field.low
            if placed & ~field.mask or int(value) < 0:
                raise ConfigurationError(f"{value} does not fit {name}, bits {field}")
            number = number & ~field.mask | placed
        return type(self)(number)

    def __repr__(self) -> str:
        shown = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in self.fields)
        return f"{type(self).__name__}({int(self):#x}: {shown})"
