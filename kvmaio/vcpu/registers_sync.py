"""`SyncedContext`: the engine's copy of the registers, and which copy is newer.

gem5 keeps two flags, "context dirty" and "KVM state dirty", and an invariant
that they are never both set. Here one value says it, so that both cannot be.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from ..cpu import SEGMENTS, TABLES, Context, CpuModel
from ..errors import ConfigurationError

__all__ = ["Newer", "SyncedContext"]


class Newer(enum.Enum):
    """Which copy of the registers is the newer one."""

    CONTEXT = "context"
    """The engine's: it is pushed before the next entry (gem5: contextDirty)."""
    NEITHER = "neither"
    MODEL = "model"
    """The CPU model's: it is fetched when somebody looks (gem5: kvmStateDirty)."""


_MODEL = Newer.MODEL  # looking up an enum's member is slow, and this one is needed at each exit


class SyncedContext:
    """A `Context` that is fetched when it is looked at and pushed when it was written.

    While a read access is pending, its result is not in the registers yet, and
    pushing would lose it. What is written meanwhile is kept as an edit, and laid
    over what the completed access left.
    """

    def __init__(self, model: CpuModel) -> None:
        self._model = model
        self._context = Context()
        self._context.notify(self._written)
        self._filling = False
        self._edited: set[str] = set()
        """What was written while an access was pending, by name, such as ``cs.base``."""
        self.newer = Newer.CONTEXT
        self.on_change: Callable[[], None] = lambda: None
        """Called when `newer` has become anything but MODEL."""
        self.locked: str | None = None
        """Why the registers cannot be looked at now, or None."""
        self.access_pending = False
        """An access of the last exit is to be completed by the next entry."""

    def get(self) -> Context:
        """The registers as they are now.

        Raises:
            ConfigurationError: the guest is running.
        """
        self.check_accessible()
        if self.newer is Newer.MODEL:
            self._fetch()
            self.newer = Newer.NEITHER
            self.on_change()
        return self._context

    def check_accessible(self) -> None:
        """Raise ConfigurationError if the registers cannot be looked at now."""
        if self.locked is not None:
            raise ConfigurationError(self.locked)

    def entered(self) -> None:
        """The guest was entered, what was written having been pushed."""
        self.newer = _MODEL
        self.access_pending = False

    def access_continued(self) -> None:
        """Completing the access led to another one, so that edits wait for that too."""
        self.access_pending = False

    def push(self) -> None:
        """Give the model what was written; no access may be pending."""
        if self._edited:
            now = _flat(self._context)
            edits = {name: now[name] for name in self._edited}
            self._edited.clear()
            self._fetch()
            self._apply(edits)
        self._model.write_context(self._context)
        self.newer = Newer.NEITHER
        self.on_change()

    def replace(self, context: Context) -> None:
        """Take over the values of `context`, whatever the model has; no access may be pending."""
        self._edited.clear()
        self._apply(_flat(context))
        self.newer = Newer.CONTEXT
        self.on_change()

    def taken(self, context: Context) -> None:
        """The model has been given all of `context`."""
        self._edited.clear()
        self._apply(_flat(context))
        self.newer = Newer.NEITHER
        self.access_pending = False
        self.on_change()

    def use_model(self, model: CpuModel) -> None:
        """Another model takes over; it has been given the registers."""
        self._model = model

    def _written(self, register: str) -> None:
        if self._filling:
            return
        self.get()  # somebody may have kept a context from before the last run
        if self.access_pending:
            part, _, field = register.rpartition(".")
            if part or field not in SEGMENTS + TABLES:
                self._edited.add(register)
            else:  # a whole segment or table
                self._edited.update(n for n in _flat(self._context) if n.startswith(f"{field}."))
        self.newer = Newer.CONTEXT

    def _fetch(self) -> None:
        self._apply(_flat(self._model.read_context()))

    def _apply(self, edits: dict[str, Any]) -> None:
        self._filling = True
        try:
            for key, value in edits.items():
                part, _, field = key.rpartition(".")
                setattr(getattr(self._context, part) if part else self._context, field, value)
        finally:
            self._filling = False


def _flat(context: Context) -> dict[str, Any]:
    """Every register by name, those of segments and tables as ``cs.base``."""
    flat: dict[str, Any] = {}
    for name in Context.__slots__:
        if name.startswith("_"):
            continue
        value = getattr(context, name)
        if name in SEGMENTS or name in TABLES:
            for field in type(value).__slots__:
                if not field.startswith("_"):
                    flat[f"{name}.{field}"] = getattr(value, field)
        else:
            flat[name] = value
    return flat
