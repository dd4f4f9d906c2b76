"""Arguments looked at where they are given, for errors that say what was and what is expected."""

from __future__ import annotations

import math
import operator
from typing import Any, NoReturn

from .errors import ConfigurationError

__all__ = ["refuse", "some_text", "some_truth", "speed", "whole"]


def refuse(name: str, value: object, expected: str) -> NoReturn:
    """Raise a ConfigurationError: `expected` is what `name` should have been."""
    raise ConfigurationError(f"{name}={value!r}: {expected}")


def whole(name: str, value: Any) -> int:
    """`value`, a whole number; neither a float nor a truth value is one.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        number = operator.index(value)
    except TypeError:
        refuse(name, value, "a whole number is expected")
    if isinstance(value, bool):
        refuse(name, value, "a whole number is expected")
    return number


def speed(name: str, value: Any) -> float:
    """`value`, a finite number above 0.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        # Not what float() would read out of a text.
        fits = not isinstance(value, bool | str | bytes) and 0 < float(value) < math.inf
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        refuse(name, value, "a finite number above 0")
    return float(value)


def some_text(name: str, value: Any) -> str:
    """`value`, a text.

    Raises:
        ConfigurationError: it is none.
    """
    if not isinstance(value, str):
        refuse(name, value, "a text is expected")
    return value


def some_truth(name: str, value: Any) -> bool:
    """`value`, True or False.

    Raises:
        ConfigurationError: it is neither.
    """
    if not isinstance(value, bool):
        refuse(name, value, "True or False is expected")
    return value
