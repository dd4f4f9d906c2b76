"""`Notes`: what a burst's exits and accesses are as text, made by the C core (`_notes.h`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ._native import ffi, lib

if TYPE_CHECKING:
    from ..access_burst import AccessBurst

__all__ = ["Notes"]

ROOM = 1 << 15
"""Bytes of text, some 90 exits with their accesses, until it is to be written."""


class Notes:
    """Text that grows until it is taken.

    Attributes:
        handle: a ``kvmaio_notes``.
    """

    def __init__(self) -> None:
        self._text = ffi.new("char[]", ROOM)
        self.handle = ffi.new("kvmaio_notes *", {"text": self._text, "room": ROOM})
        # A kind lives as long as who notes by it, and so must its texts, which only C points to.
        self._texts: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._left: dict[str, Any] = {}

    def begin(self, began_ns: int) -> None:
        """Times are told since then, in guest nanoseconds."""
        self.handle.began_ns = began_ns

    def left(self, vcpu: str) -> Any:
        """Where it stands when this vCPU left its guest before, in guest nanoseconds: an array of
        one number."""
        if vcpu not in self._left:
            self._left[vcpu] = ffi.new("int64_t[1]", [self.handle.began_ns])
        return self._left[vcpu]

    def noter(
        self,
        burst: AccessBurst,
        key: int,
        vcpu: str,
        texts: tuple[bytes, bytes],
        offset_ns: int,
        factor: float,
    ) -> tuple[Any, Callable[[], int] | None] | None:
        """What notes accesses of a kind; see `kvmaio_note()`.

        Args:
            key: of the accesses, as `kvmaio.access_burst.AccessBurst.due`.
            texts: the events of an exit and an access, up to what differs.
            offset_ns: of guest time from CLOCK_MONOTONIC.
            factor: guest time for executed host time.

        Returns:
            For `AccessBurst.note_by()`; or None and what to call. None alone where the texts are
            so long that two notes would fill the room.
        """
        length = sum(map(len, texts)) + lib.KVMAIO_NOTE_NUMBERS
        if 2 * length > ROOM:
            return None
        self.handle.longest = max(self.handle.longest, length)
        exit_text, access_text = (ffi.new("char[]", text) for text in texts)
        kind = ffi.new(
            "kvmaio_note_kind *",
            {
                "exit": exit_text,
                "exit_length": len(texts[0]),
                "access": access_text,
                "access_length": len(texts[1]),
                "left_ns": self.left(vcpu),
                "factor": factor,
            },
        )
        self._texts[kind] = exit_text, access_text
        self.handle.offset_ns = offset_ns
        if burst.takes_notes:
            return (self.handle, kind), None
        note, handle, words, exit_of = lib.kvmaio_note, self.handle, burst.words(key), burst.exit
        return None, lambda: note(handle, kind, words[0], *exit_of())

    def take(self, due_ns: int) -> bytes:
        """The text so far; the next is to be taken at `due_ns` (CLOCK_MONOTONIC) at the latest."""
        handle = self.handle
        text: bytes = ffi.buffer(self._text, handle.used)[:]
        handle.used, handle.due_ns = 0, due_ns
        return text
