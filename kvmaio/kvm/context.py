"""`Context` to and from the kernel's kvm_regs and kvm_sregs.

Source: api.rst, KVM_GET_REGS, KVM_GET_SREGS, KVM_GET_SREGS2. This is on the
path of every exit whose handler looks at the registers, hence whole structures
at a time: field by field through cffi takes five times as long.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

from ..cpu import CONTROL, GENERAL, SEGMENTS, TABLES, Context
from ..errors import ConfigurationError
from ._native import ffi, lib
from .gate import check

if TYPE_CHECKING:
    from ._native import CData

__all__ = ["context_from", "fill", "get_context", "read_context", "set_context", "store"]

# Field -> bits, in the order of kvm_segment, which a byte of padding ends, and of kvm_dtable.
_SEGMENT = {"base": 64, "limit": 32, "selector": 16} | dict.fromkeys(
    ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable"), 8
)
_TABLE = {"base": 64, "limit": 16}

# kvm_regs, and what kvm_sregs and kvm_sregs2 begin with. GENERAL, SEGMENTS, TABLES and CONTROL
# are in the kernel's order.
_REGS = struct.Struct(f"<{len(GENERAL)}Q")
_SREGS = struct.Struct("<" + "QIH9Bx" * len(SEGMENTS) + "QH6x" * len(TABLES) + f"{len(CONTROL)}Q")

_CR0_PE_PG = 1 << 0 | 1 << 31
_CR4_PAE = 1 << 5
_EFER_LMA = 1 << 10


def get_context(fd: int) -> Context:
    """The general and special registers of the vCPU behind `fd`; it must not be running."""
    context = Context()
    read_context(fd, context)
    return context


def read_context(fd: int, into: Context) -> None:
    """Fetch the general and special registers; see `fill`."""
    regs = ffi.new("struct kvm_regs *")
    check(lib.kvmaio_ioctl(fd, lib.KVM_GET_REGS, regs), "KVM_GET_REGS")
    sregs = ffi.new("struct kvm_sregs *")
    check(lib.kvmaio_ioctl(fd, lib.KVM_GET_SREGS, sregs), "KVM_GET_SREGS")
    fill(into, regs, sregs)


def set_context(fd: int, context: Context) -> None:
    """Push the general and special registers; no access may be pending.

    What a context does not carry is kept: a queued interrupt, and a PAE
    guest's loaded page-directory pointers as long as CR3 and the mode stay.

    Raises:
        ConfigurationError: a value is not a number of its register's width.
        HostError: the registers contradict each other.
    """
    regs = ffi.new("struct kvm_regs *")
    sregs = ffi.new("struct kvm_sregs2 *")
    result = lib.kvmaio_ioctl(fd, lib.KVM_GET_SREGS2, sregs)
    if result in (-errno.ENOTTY, -errno.EINVAL):  # Linux before 5.14
        _set_sregs_classic(fd, context, regs)
    else:
        check(result, "KVM_GET_SREGS2")
        before = _paging_of(sregs)
        store(context, regs, sregs)
        if _paging_of(sregs) != before:
            # The pointers belong to the CR3 before: KVM is to load the new ones from memory.
            sregs.flags &= ~lib.KVM_SREGS2_FLAGS_PDPTRS_VALID
        check(lib.kvmaio_ioctl(fd, lib.KVM_SET_SREGS2, sregs), "KVM_SET_SREGS2")
    check(lib.kvmaio_ioctl(fd, lib.KVM_SET_REGS, regs), "KVM_SET_REGS")


def _set_sregs_classic(fd: int, context: Context, regs: CData) -> None:
    sregs = ffi.new("struct kvm_sregs *")
    # Read first: kvm_sregs carries the queued interrupt, too.
    check(lib.kvmaio_ioctl(fd, lib.KVM_GET_SREGS, sregs), "KVM_GET_SREGS")
    store(context, regs, sregs)
    check(lib.kvmaio_ioctl(fd, lib.KVM_SET_SREGS, sregs), "KVM_SET_SREGS")


def _paging_of(sregs: CData) -> tuple[int, ...]:
    return (
        sregs.cr3,
        sregs.cr0 & _CR0_PE_PG,
        sregs.cr4 & _CR4_PAE,
        sregs.efer & _EFER_LMA,
    )


# ---- between a context and the kernel's structures -----------------------------------


def context_from(regs: CData, sregs: CData) -> Context:
    """A new context with what a kvm_regs and a kvm_sregs or kvm_sregs2 hold."""
    context = Context()
    fill(context, regs, sregs)
    return context


def fill(context: Context, regs: CData, sregs: CData) -> None:
    """Bring `context` up to date from kvm_regs and kvm_sregs(2), such as the run page's.

    Its owner is not told: this is what it owns the context for.
    """
    put = object.__setattr__  # not the class's own, which tells the owner
    for name, value in zip(GENERAL, _REGS.unpack_from(_memory(regs)), strict=True):
        put(context, name, value)
    values = iter(_SREGS.unpack_from(_memory(sregs)))
    for name in SEGMENTS:
        segment = getattr(context, name)
        for field in _SEGMENT:
            put(segment, field, next(values))
    for name in TABLES:
        table = getattr(context, name)
        for field in _TABLE:
            put(table, field, next(values))
    for name in CONTROL:
        put(context, name, next(values))


def store(context: Context, regs: CData, sregs: CData) -> None:
    """Write `context` into kvm_regs and kvm_sregs(2); what else there is in them is kept.

    Raises:
        ConfigurationError: a value is not a number of its register's width.
    """
    general = [getattr(context, name) for name in GENERAL]
    special: list[int] = []
    for name in SEGMENTS:
        segment = getattr(context, name)
        special += [getattr(segment, field) for field in _SEGMENT]
    for name in TABLES:
        table = getattr(context, name)
        special += [getattr(table, field) for field in _TABLE]
    special += [getattr(context, name) for name in CONTROL]
    try:
        _REGS.pack_into(_memory(regs), 0, *general)
        _SREGS.pack_into(_memory(sregs), 0, *special)
    except struct.error:
        raise _misfit(context) from None


def _memory(structure: CData) -> Any:
    """The bytes of a structure, given itself or a pointer to it."""
    kind = ffi.typeof(structure).kind
    return ffi.buffer(structure if kind == "pointer" else ffi.addressof(structure))


def _misfit(context: Context) -> ConfigurationError:
    """The error for the first register whose value does not fit."""
    widths = dict.fromkeys((*GENERAL, *CONTROL), 64)
    widths |= {f"{name}.{field}": bits for name in SEGMENTS for field, bits in _SEGMENT.items()}
    widths |= {f"{name}.{field}": bits for name in TABLES for field, bits in _TABLE.items()}
    for register, bits in widths.items():
        part, _, field = register.rpartition(".")
        value = getattr(getattr(context, part) if part else context, field)
        if not isinstance(value, int) or not 0 <= value < 1 << bits:
            return ConfigurationError(
                f"{register} = {value!r}: it must be an unsigned number of {bits} bits"
            )
    return ConfigurationError("a register's value does not fit")
