"""`Copies`: which part of a copied machine stands for which of the original's.

Devices know one another, and may know the machine's memory, buses and lines, by what they
were made with and by their attributes. A copy that kept one of these references would
drive the original.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, NoneType
from typing import TYPE_CHECKING, Any

import attrs

from .device import Device, replaced
from .errors import ConfigurationError

if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["Copies"]

OWN = frozenset({"name", "irq", "clock", "alarm", "busy_sections", "_arguments"})
"""What every device has of its own: never another part of the machine."""

PLAIN = (bool, int, float, str, bytes, NoneType, FunctionType)
COMPOSED = (dict, list, tuple, set, frozenset, MethodType, functools.partial)


class Copies(Mapping[Any, Any]):
    """Part of the original -> part of the copy, by identity.

    A device's copy is made when it is first asked for: so each finds those that it was made
    with, in whatever order all of them were attached.

    Attributes:
        clones: the devices made so far, by the original's name.
    """

    def __init__(self, original: Machine, copy: Machine) -> None:
        self.clones: dict[str, Device] = {}
        self._in_work: list[Device] = []
        self._devices = {id(device): device for device in original.devices.values()}
        self._parts: dict[int, Any] = {
            id(original): copy,
            id(original.memory): copy.memory,
            id(original.pio): copy.pio,
            id(original.mmio): copy.mmio,
        }
        for number, line in original.lines.items():
            self._parts[id(line)] = copy.irq(number)
        for vcpu, its in zip(original.vcpus, copy.vcpus, strict=True):
            self._parts[id(vcpu)] = its
        for name, device in copy.devices.items():  # its own interrupt controllers
            self._parts[id(original.devices[name])] = device

    def __getitem__(self, part: Any) -> Any:
        known = self._parts.get(id(part))
        if known is None:
            if id(part) not in self._devices:
                raise KeyError(part)
            known = self._parts[id(part)] = self._clone(part)
        return known

    def __iter__(self) -> Iterator[Any]:
        return iter(self._devices.values())

    def __len__(self) -> int:
        return len(self._devices)

    def _clone(self, device: Device) -> Device:
        if any(device is each for each in self._in_work):
            circle = ", ".join(each.name for each in self._in_work)
            raise ConfigurationError(
                f"{device.name} cannot be copied: it takes a part in making what it was made "
                f"with ({circle}). Have its clone() leave that out"
            )
        self._in_work.append(device)
        try:
            clone = self.clones[device.name] = device.clone(self)
        finally:
            self._in_work.pop()
        return clone

    def wire(self) -> None:
        """Have all copies of devices refer to the copies of what the originals refer to.

        Raises:
            ConfigurationError: one still refers to a part of the original machine.
        """
        for device in self._devices.values():
            clone = self.clones.get(device.name)
            if clone is None:
                continue
            for name in vars(clone).keys() - OWN:
                self._replace(clone, name, vars(clone)[name])
            for name in vars(device).keys() - OWN:
                value = vars(device)[name]
                if self._knows(value) and self._is_wiring(value):
                    self._replace(clone, name, value)
            for name in vars(clone).keys() - OWN:
                if self._knows(vars(clone)[name]):
                    raise ConfigurationError(
                        f"{device.name} cannot be copied: {name} of the copy would lead to the "
                        "original machine. Have its clone() make it anew"
                    )

    def _replace(self, clone: Device, name: str, value: Any) -> None:
        """Set an attribute to `value` with the copies in it, if there are any."""
        if (with_copies := replaced(value, self)) is not value:
            setattr(clone, name, with_copies)

    def _knows(self, value: Any) -> bool:
        """Does it lead to a part of the original machine?"""
        return any(self._is_part(each) for each in _within(value))

    def _is_wiring(self, value: Any) -> bool:
        """Is there nothing in it that the copy would share with the original?"""
        return all(
            self._is_part(each) or isinstance(each, PLAIN + COMPOSED) for each in _within(value)
        )

    def _is_part(self, value: Any) -> bool:
        return id(value) in self._parts or id(value) in self._devices


def _within(value: Any) -> Iterator[Any]:
    """`value`, and what it consists of: containers, bound methods, values of attrs."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, dict):
            waiting += (*one.keys(), *one.values())
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += one
        elif isinstance(one, MethodType):
            waiting.append(one.__self__)
        elif isinstance(one, functools.partial):
            waiting += (one.func, one.args, one.keywords)
        elif attrs.has(type(one)):
            waiting += (getattr(one, field.name, None) for field in attrs.fields(type(one)))
