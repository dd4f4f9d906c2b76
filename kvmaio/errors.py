"""The exception hierarchy: errors are classed by whose fault they are."""

from __future__ import annotations

import errno as _errno
import os

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "ConsoleTimeout",
    "DrainTimeout",
    "EmulationFailure",
    "GuestError",
    "HostError",
    "KvmaioError",
    "UnmappedAccess",
]


class KvmaioError(Exception):
    """The base of every error that kvmaio raises on purpose."""


class ConfigurationError(KvmaioError, ValueError):
    """The user built an impossible machine, or called something at the wrong time."""


class CheckpointError(KvmaioError):
    """A checkpoint is damaged, foreign, or does not fit the machine."""


class DrainTimeout(KvmaioError, TimeoutError):
    """A machine did not come to rest in time; the message names what is still under way."""


class ConsoleTimeout(KvmaioError, TimeoutError):
    """A guest did not print in time what was expected; the message shows what it printed last."""


class GuestError(KvmaioError):
    """The guest did something that the machine cannot go on from.

    The vCPU that meets the error fills in where it happened.

    Attributes:
        vcpu: the name of the vCPU, such as ``cpu0``; None where no CPU was involved.
        rip: the instruction pointer at the time; on an I/O exit it may already
            point past the instruction, depending on the host.
        address: the guest-physical address or port concerned, if there is one.
        dump: a register dump as text.
        exit: the `kvmaio.exits.VmExit` that could not be served, with its fields.
    """

    def __init__(self, message: str, *, address: int | None = None) -> None:
        super().__init__(message)
        self.vcpu: str | None = None
        self.rip: int | None = None
        self.address = address
        self.dump: str = ""
        self.exit: object | None = None

    def __str__(self) -> str:
        where = "" if self.vcpu is None else f" ({self.vcpu}"
        if where:
            where += ")" if self.rip is None else f", rip {self.rip:#x})"
        return f"{super().__str__()}{where}"


class UnmappedAccess(GuestError):
    """The guest accessed a port or an address at which there is nothing."""

    def __init__(self, bus: str, address: int, size: int, *, value: int | None = None) -> None:
        what = "read" if value is None else f"write of {value:#x}"
        super().__init__(
            f"{what} of {size} byte{'s' if size > 1 else ''} at {bus} {address:#x}, "
            f"where nothing is mapped; attach a device there, or set machine.{bus}.unmapped "
            "to Unmapped.OPEN_BUS",
            address=address,
        )
        self.bus = bus
        self.size = size
        self.value = value


class EmulationFailure(GuestError):
    """KVM met an instruction that it can neither run nor emulate.

    Attributes:
        suberror: KVM's internal error number (1 is an emulation failure).
        data: the raw words that KVM reported.
        instruction: the instruction's bytes where KVM reported them, else empty.
    """

    def __init__(
        self, message: str, *, suberror: int, data: tuple[int, ...], instruction: bytes = b""
    ) -> None:
        super().__init__(message)
        self.suberror = suberror
        self.data = data
        self.instruction = instruction


class HostError(KvmaioError, OSError):
    """The host refused something: the operation's name, the errno and a hint.

    Attributes:
        operation: the ioctl or system call, such as ``KVM_CREATE_VM``.
        errno: its error number.
        hint: what to do about it, or an empty string.
    """

    def __init__(self, operation: str, errno: int, hint: str = "") -> None:
        self.operation = operation
        self.hint = hint
        super().__init__(errno, os.strerror(errno))
        self.errno = errno

    def __str__(self) -> str:
        # errno's name as well as its text: the name is what one searches for.
        name = _errno.errorcode.get(self.errno or 0, str(self.errno))
        text = f"{self.operation}: {os.strerror(self.errno or 0)} [{name}]"
        return f"{text}; {self.hint}" if self.hint else text
