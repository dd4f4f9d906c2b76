"""`AccessBurst`: a guest's plain accesses, one after the other, with nothing to look at between."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from .cpu import EntryResult

__all__ = ["AccessBurst", "function_address"]

PIO_DATA = 4096
"""Where a run page has the data of port I/O (KVM_PIO_PAGE_OFFSET)."""

_WORDS = {size: f"uint{8 * size}_t *" for size in (1, 2, 4, 8)}


def function_address(ffi: Any, lib: Any, name: str) -> int:
    """Where a function of the C core is."""
    return int(ffi.cast("intptr_t", ffi.addressof(lib, name)))


class AccessBurst(ABC):
    """A CPU model's way to enter again and again; the vCPU answers (`kvmaio.vcpu.burst`).

    Attributes:
        handle: the model's C structure.
        handle_at: its address.
        again_at: the address of the model's C function, of that structure: where the access due
            has been answered, it enters the guest, without a limit. It gives 0 if the same access
            has come again, else -1: see `is_held`, then `due`, then `end()`.
        takes_notes: accesses can be noted in C (`kvm/_notes.h`): see `note_by()`.
    """

    __slots__ = ("_ffi", "_page", "_state", "handle", "handle_at")

    takes_notes: ClassVar[bool] = False
    again_at: ClassVar[int]
    _again: Callable[[Any], int]

    def __init__(self, handle: Any, page: Any, ffi: Any) -> None:
        self.handle = handle
        self.handle_at = int(ffi.cast("intptr_t", handle))
        self._state = handle.burst
        self._page = page
        self._ffi = ffi

    def begin(self, told: bool) -> None:
        """The first access is due, and all time before has been booked.

        Args:
            told: somebody is told of exits, and has been told of the present one.
        """
        state, handle = self._state, self.handle
        state.disturbed = state.held = state.io = state.mmio = 0
        if told:
            handle.exit_untold = 0
            handle.left_ns = time.monotonic_ns()

    def disturb(self) -> None:
        """Something has happened that is looked at between entries: no `again()` enters."""
        self._state.disturbed = 1

    @property
    def is_held(self) -> bool:
        """The last `again()` did not enter."""
        return bool(self._state.held)

    @property
    def must_write(self) -> bool:
        """That was because there are notes to be written first."""
        return False

    @property
    def due(self) -> int:
        """The access that the run page holds, as
        ``address << 6 | size << 2 | is_write << 1 | is_pio``; -1 where it is no plain one."""
        access: int = self.handle.access
        return access

    def words(self, access: int) -> Any:
        """Where the run page has the data of an access, as an array of one word of its size."""
        is_pio, size = access & 1, access >> 2 & 15
        cast = self._ffi.cast
        start = cast("uint8_t *", self._page) + PIO_DATA if is_pio else self._page.mmio.data
        return cast(_WORDS[size], start)

    def address_of(self, words: Any) -> int:
        """The address of what `words()` gave."""
        return int(self._ffi.cast("intptr_t", words))

    def again(self) -> int:
        """What `again_at` does."""
        return self._again(self.handle)

    def exit(self) -> tuple[int, int]:
        """When the guest was left (CLOCK_MONOTONIC), and what it had executed, in nanoseconds of
        the host: -1 where somebody has been told of that. Until the next entry."""
        handle = self.handle
        return handle.left_ns, self.executed_ns if handle.exit_untold else -1

    def exit_told(self) -> bool:
        """Somebody is told of the exit now; had nobody been?"""
        untold, self.handle.exit_untold = self.handle.exit_untold, 0
        return bool(untold)

    def note_by(self, note: Any) -> None:
        """Have `again()` note the accesses to come, until told otherwise; None: it does not."""
        assert note is None, "see takes_notes"

    def take_counts(self) -> tuple[int, int]:
        """How many accesses to ports and to memory have come by `again()` since this was called."""
        state = self._state
        counts = state.io, state.mmio
        state.io = state.mmio = 0
        return counts

    @abstractmethod
    def take_ns(self) -> int:
        """The host time executed since this was last called, of the entries with an access."""

    @property
    @abstractmethod
    def executed_ns(self) -> int:
        """Host time of the last entry."""

    @abstractmethod
    def is_running(self) -> bool:
        """Is the last entry still under way?"""

    @abstractmethod
    def end(self) -> EntryResult | None:
        """What the last entry led to, if not to a plain access; as `CpuModel.enter()`."""
