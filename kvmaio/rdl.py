"""Device classes out of SystemRDL 2.0 (Accellera); needs systemrdl-compiler (``kvmaio[rdl]``).

::

    class Timer(device_class("timer.rdl")):
        async def run(self) -> None: ...

What is taken over: offsets, widths (8 to 64 bits), software access, reset values, fields with
their enumerations (`Fields`), and the side effects woclr, woset, wot, wzc, wzs, wzt, wclr,
wset, rclr and rset. Registers of arrays and register files get the names of both:
``channel[1].control`` is ``channel1_control``. What hardware does is the subclass's business.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from typing import Any

import attrs

from .device import Device
from .errors import ConfigurationError
from .fields import Field, Fields
from .registers import Access, Register

__all__ = ["device_class"]

_WRITES: dict[str, Callable[[int, int], int]] = {
    "woclr": lambda old, value: old & ~value,
    "woset": lambda old, value: old | value,
    "wot": lambda old, value: old ^ value,
    "wzc": lambda old, value: old & value,
    "wzs": lambda old, value: old | ~value,
    "wzt": lambda old, value: ~(old ^ value),
    "wclr": lambda old, value: 0,
    "wset": lambda old, value: -1,
}
_READS: dict[str, Callable[[int], int]] = {"rclr": lambda old: 0, "rset": lambda old: -1}


def device_class(path: str | os.PathLike[str], top: str | None = None) -> type[Device]:
    """The device that an ``addrmap`` of a SystemRDL file describes.

    Args:
        top: the addrmap's name; by default the last one of the file.

    Raises:
        ConfigurationError: the compiler refuses the file, it holds what a device cannot have,
            or systemrdl-compiler is missing.
    """
    try:
        from systemrdl.compiler import RDLCompiler
        from systemrdl.messages import RDLCompileError
        from systemrdl.node import AddrmapNode, FieldNode, MemNode, RegNode
    except ImportError:
        raise ConfigurationError(
            "SystemRDL needs systemrdl-compiler: pip install 'kvmaio[rdl]'"
        ) from None
    messages = _Messages()
    compiler = RDLCompiler(message_printer=messages)
    try:
        compiler.compile_file(os.fspath(path))
        node = compiler.elaborate(top).top
    except RDLCompileError as error:
        what = "; ".join(messages.texts) or str(error)
        raise ConfigurationError(f"{os.fspath(path)}: {what}") from None
    assert isinstance(node, AddrmapNode)
    members: dict[str, Any] = {"__doc__": _text(node), "size": node.size}
    for child in node.descendants(unroll=True):
        if isinstance(child, MemNode):
            raise ConfigurationError(f"{child.get_path()} is a memory; a device has registers only")
        if isinstance(child, RegNode):
            name = _name(child, node)
            members[name] = _register(child, name, node, FieldNode)
    return type(_camel(node.inst_name), (Device,), members)


class _Messages:
    """Collects what the compiler says, in place of printing it."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def print_message(self, severity: Any, text: str, src_ref: Any) -> None:
        self.texts.append(text)


@attrs.frozen
class _Effect:
    """What a software access does to some bits of a register."""

    mask: int
    on_write: str | None
    on_read: str | None
    is_writable: bool


def _register(node: Any, name: str, top: Any, field_type: type) -> Register[Any]:
    bits = node.get_property("regwidth")
    reset, fields, effects = 0, {}, []
    for field in node.fields():
        described = _field(field)
        fields[field.inst_name] = described
        value = field.get_property("reset")
        if isinstance(value, field_type):
            raise ConfigurationError(f"{field.get_path()}: its reset value is another field's")
        reset |= (value or 0) << field.low & described.mask
        on_write, on_read = field.get_property("onwrite"), field.get_property("onread")
        effects.append(
            _Effect(
                described.mask,
                on_write.name if on_write else None,
                on_read.name if on_read else None,
                field.is_sw_writable,
            )
        )
    kind = type(_camel(name), (Fields,), {"__doc__": _text(node), **fields})
    readable, writable = node.has_sw_readable, node.has_sw_writable  # or the compiler refuses it
    access = Access.RW if readable and writable else Access.R if readable else Access.W
    offset = node.absolute_address - top.absolute_address
    register: Register[Any] = Register(offset, kind, access, bits=bits, reset=reset)
    _add_handlers(register, name, effects, node.get_path())
    return register


def _field(field: Any) -> Field:
    encode = field.get_property("encode")
    kind: Callable[[int], Any] = int
    if encode is not None:
        values = {member.name.upper(): member.value for member in encode}
        make: Any = enum.IntEnum  # mypy wants to see the name
        kind = make(_camel(field.inst_name), values)
    elif field.width == 1:
        kind = bool
    return Field(field.high, field.low, kind, _text(field))


def _add_handlers(register: Register[Any], name: str, effects: list[_Effect], path: str) -> None:
    """Handlers for what is more than storing the value; none if nothing is."""
    known = {None, *_WRITES}
    for effect in effects:
        if effect.on_write not in known or effect.on_read not in {None, *_READS}:
            raise ConfigurationError(
                f"{path}: {effect.on_write or effect.on_read} is not supported"
            )
    if any(not e.is_writable or e.on_write for e in effects) and register.access is not Access.R:

        def write(device: Device, value: Any) -> None:
            old = int(getattr(device, name))
            new = 0
            for effect in effects:
                if not effect.is_writable:
                    result = old
                elif effect.on_write is None:
                    result = int(value)
                else:
                    result = _WRITES[effect.on_write](old, int(value))
                new |= result & effect.mask
            setattr(device, name, register.typed(new))

        write.__doc__ = "Some bits are read-only, or writes to them act."
        register.on_write(write)
    if any(effect.on_read for effect in effects):

        def read(device: Device) -> int:
            old = int(getattr(device, name))
            new = old
            for effect in effects:
                if effect.on_read:
                    new = new & ~effect.mask | _READS[effect.on_read](old) & effect.mask
            setattr(device, name, register.typed(new))
            return old

        read.__doc__ = "Reads act."
        register.on_read(read)


def _name(node: Any, top: Any) -> str:
    """The path from `top`, as an identifier."""
    path = node.get_path()[len(top.get_path()) + 1 :]
    return str(path.replace("[", "").replace("]", "").replace(".", "_"))


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _text(node: Any) -> str:
    return str(node.get_property("desc") or node.get_property("name") or "")
