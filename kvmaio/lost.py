"""What `os.fork` leaves of a machine in the child: an error that says what to do instead.

KVM ties a VM to the address space that created it, the child has none of the vCPUs'
threads, and a lock that one of them held is held for ever.
"""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import ConfigurationError

if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["forbid_in_child"]

_open: weakref.WeakSet[Machine] = weakref.WeakSet()


def forbid_in_child(machine: Machine) -> None:
    """In a child that `os.fork` makes of this process, `machine` is unusable and says so."""
    _open.add(machine)


def _in_child() -> None:
    for machine in list(_open):
        message = (
            f"{machine.name} belongs to the process that this one was forked from: KVM ties a VM "
            "to its process. Make a new machine; restore() a checkpoint of this one there"
        )
        for part in list(_parts(machine)):
            _lose(part, message)
    _open.clear()


os.register_at_fork(after_in_child=_in_child)


def _parts(machine: Machine) -> Iterator[Any]:
    """What leads into the host's part of the machine."""
    yield from (machine, machine.memory, machine.pio, machine.mmio, machine.barrier)
    yield from machine.lines.values()
    yield from machine.vcpus
    yield from (vcpu.model for vcpu in machine.vcpus)


def _lose(part: Any, message: str) -> None:
    """Have whatever is asked of `part` raise; only to close it does nothing.

    A class for it alone rather than a check in each method: none can be forgotten, and none
    costs anything before.
    """
    kind = type(part)

    def refuse(self: Any, name: str) -> Any:
        if name.startswith("__") or name == "close":
            return object.__getattribute__(self, name)
        raise ConfigurationError(message)

    async def close_later(self: Any) -> None:
        pass

    def close(self: Any) -> None:
        pass

    def describe(self: Any) -> str:
        return f"<{kind.__name__} of another process>"

    def refuse_to_change(self: Any, name: str, value: Any) -> NoReturn:
        raise ConfigurationError(message)

    members: dict[str, Any] = {
        "__slots__": (),
        "__getattribute__": refuse,
        "__setattr__": refuse_to_change,
        "__repr__": describe,
    }
    if hasattr(kind, "close"):
        members["close"] = close_later if inspect.iscoroutinefunction(kind.close) else close
    part.__class__ = type(kind.__name__, (kind,), members)
