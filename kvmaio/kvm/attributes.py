"""`DeviceAttributes`: what a KVM device, or a vCPU, lets one get and set by group and number."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from ._native import ffi, lib
from .gate import check

if TYPE_CHECKING:
    from ._native import CData

__all__ = ["DeviceAttributes"]


class DeviceAttributes:
    """The attributes behind a file descriptor (api.rst, KVM_SET_DEVICE_ATTR).

    Attributes:
        fd: an in-kernel device's, or a vCPU's.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self._name = name

    def get(self, group: int, attribute: int, size: int = 8) -> bytes:
        """The attribute's value, `size` bytes of it."""
        data = ffi.new("char[]", size)
        self._call("KVM_GET_DEVICE_ATTR", lib.KVM_GET_DEVICE_ATTR, group, attribute, data)
        return bytes(ffi.buffer(data))

    def set(self, group: int, attribute: int, data: bytes = b"") -> None:
        """Give the attribute a value; some are mere commands and take none."""
        buffer = ffi.from_buffer(data) if data else ffi.NULL
        self._call("KVM_SET_DEVICE_ATTR", lib.KVM_SET_DEVICE_ATTR, group, attribute, buffer)

    def has(self, group: int, attribute: int) -> bool:
        """Does this host's KVM know the attribute?"""
        entry = ffi.new("struct kvm_device_attr *", {"group": group, "attr": attribute})
        result = lib.kvmaio_ioctl(self.fd, lib.KVM_HAS_DEVICE_ATTR, entry)
        # ENXIO: no such attribute. The others: what lies behind the fd has none at all.
        if result in (-errno.ENXIO, -errno.ENOTTY, -errno.EPERM):
            return False
        check(result, self._operation("KVM_HAS_DEVICE_ATTR", group, attribute))
        return True

    def close(self) -> None:
        """Give the device up; the VM keeps it until it is closed itself. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _call(self, operation: str, request: int, group: int, attribute: int, data: CData) -> None:
        entry = ffi.new(
            "struct kvm_device_attr *",
            {"group": group, "attr": attribute, "addr": int(ffi.cast("uintptr_t", data))},
        )
        result = lib.kvmaio_ioctl(self.fd, request, entry)
        check(result, self._operation(operation, group, attribute))

    def _operation(self, name: str, group: int, attribute: int) -> str:
        return f"{name} ({self._name}, group {group:#x}, attribute {attribute:#x})"
