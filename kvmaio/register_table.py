"""A device's registers as Markdown, as a datasheet has them: out of the declarations."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Iterator
from typing import Any

from .device import Device
from .fields import Fields
from .registers import Register, SharedRegister

__all__ = ["register_table"]


def register_table(device: type[Device]) -> str:
    """A table of the registers of `device`, and one for each type that has named bits."""
    title = inspect.cleandoc(vars(device).get("__doc__") or "")  # its own, not its base's
    lines = [f"## {device.__name__}", "", *title.partition("\n\n")[0].splitlines(), ""]
    if not device.registers:
        lines += ["It declares no registers; `read()` and `write()` answer for themselves.", ""]
        return "\n".join(lines)
    lines += _table(
        ("Offset", "Name", "Bits", "Access", "Reset", "Notes"),
        (
            (
                hex(register.offset),
                f"`{register.name}`",
                str(register.bits),
                "write: rings" if register.doorbell else register.access.value,
                hex(register.reset),
                ", ".join(_notes(register)),
            )
            for register in device.registers
        ),
    )
    shown: list[Any] = []
    for register in device.registers:
        if register.type not in shown and (rows := list(_bits(register.type))):
            shown.append(register.type)
            names = [f"`{r.name}`" for r in device.registers if r.type is register.type]
            lines += ["", f"### {', '.join(names)}: {_type_title(register.type)}", ""]
            lines += _table(("Bits", "Name", "Values"), rows)
    return "\n".join([*lines, ""])


def _notes(register: Register[Any]) -> Iterator[str]:
    if register.when is not None:
        name = getattr(register.when, "__name__", "a condition")
        yield "while " + name.strip("_").replace("_", " ") if name != "<lambda>" else "banked"
    if register.posted:
        yield "timed posted writes" if register.timed else "posted writes"
    if isinstance(register, SharedRegister):
        yield "reads answered without an exit to Python"
    if register.read_handler is not None:
        yield _first_line(register.read_handler) or "reads are computed"
    if register.write_handler is not None:
        yield _first_line(register.write_handler) or "writes act"


def _first_line(handler: Any) -> str:
    return (inspect.getdoc(handler) or "").partition("\n")[0].rstrip(".")


def _type_title(kind: Any) -> str:
    text = inspect.getdoc(kind) or ""
    # An enum without a docstring has its base class's.
    inherited = any(inspect.getdoc(base) == text for base in kind.__mro__[1:])
    return kind.__name__ if inherited or not text else text.partition("\n")[0].rstrip(".")


def _bits(kind: Any) -> Iterator[tuple[str, str, str]]:
    """(bits, name, values) for each named part of a type; none for a plain number."""
    if not isinstance(kind, type):
        return
    if issubclass(kind, Fields):
        for field in kind.fields:
            yield str(field), f"`{field.name}`", _values(field.type) or field.__doc__ or ""
    elif issubclass(kind, enum.IntFlag):
        for member in kind:
            bits = [bit for bit in range(64) if member.value >> bit & 1]
            yield _span(bits), f"`{member.name}`", ""
    elif issubclass(kind, enum.IntEnum):
        yield "all", "", _values(kind)


def _span(bits: list[int]) -> str:
    return str(bits[0]) if len(bits) == 1 else f"{bits[-1]}:{bits[0]}"


def _values(kind: Any) -> str:
    if not (isinstance(kind, type) and issubclass(kind, enum.IntEnum)):
        return ""
    return ", ".join(f"{member.value:#x} `{member.name}`" for member in kind)


def _table(titles: tuple[str, ...], rows: Any) -> list[str]:
    cells = [titles, tuple("---" for _ in titles), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
