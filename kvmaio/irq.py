"""Interrupt lines: a level, the sinks that follow it, and wired-OR inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["IrqLine", "IrqSink"]

IrqSink = Callable[[bool], None]
"""Called with the new level at each change of a line."""


class IrqLine:
    """An active-high interrupt line.

    The line is high while at least one of its inputs is: `set()` drives the
    line's own input, and every `input()` adds one more, so that devices may
    share a line as on a real board.

    Attributes:
        name: for traces and errors.
        level: the line's present level.
        edges: how often the line went from low to high.
    """

    __slots__ = ("_filters", "_high_inputs", "_own", "_sinks", "_told", "edges", "level", "name")

    def __init__(self, name: str = "irq") -> None:
        self.name = name
        self.level = False
        self.edges = 0
        self._own = False
        self._high_inputs = 0
        self._sinks: list[IrqSink] = []
        self._told = False  # what the sinks heard last
        self._filters: list[Callable[[bool, IrqSink], None]] = []

    def set(self, level: bool) -> None:
        """Drive the line; sinks hear of it only if its level changes."""
        level = bool(level)
        if level != self._own:
            self._own = level
            self._drive(level)

    @property
    def own(self) -> bool:
        """What `set()` last drove; the line is also high while another input is."""
        return self._own

    def pulse(self) -> None:
        """Raise the line and lower it again: one edge."""
        self.set(True)
        self.set(False)

    def connect(self, sink: IrqSink) -> None:
        """Call `sink` at each change, and now if the line is high."""
        self._sinks.append(sink)
        if self._told:
            sink(True)

    def disconnect(self, sink: IrqSink) -> None:
        """Take back `connect()`; an unknown sink is ignored."""
        if sink in self._sinks:
            self._sinks.remove(sink)

    @contextmanager
    def through(self, filter: Callable[[bool, IrqSink], None]) -> Iterator[None]:
        """Within the block, changes go to ``filter(level, deliver)`` first, not to the sinks.

        `deliver` tells them a level, now or later. Afterwards they hear the line's own.
        """
        self._filters.append(filter)
        try:
            yield
        finally:
            self._filters.remove(filter)
            if not self._filters and self._told != self.level:
                self._tell(self.level)

    def input(self) -> IrqSink:
        """Return a further input: a callable that takes this input's level."""
        high = False

        def drive(level: bool) -> None:
            nonlocal high
            if level != high:
                high = level
                self._drive(level)

        return drive

    def _drive(self, level: bool) -> None:
        self._high_inputs += 1 if level else -1
        now = self._high_inputs > 0
        if now != self.level:
            self.level = now
            self.edges += now
            self._pass_on(now, len(self._filters))

    def _pass_on(self, level: bool, filters: int) -> None:
        """To the sinks, through so many filters; the one that came last is the first to see it."""
        filters = min(filters, len(self._filters))  # what was delayed may outlive a filter
        if filters:
            filter = self._filters[filters - 1]
            filter(level, lambda level: self._pass_on(level, filters - 1))
        else:
            self._tell(level)

    def _tell(self, level: bool) -> None:
        self._told = level
        for sink in tuple(self._sinks):
            sink(level)

    def __repr__(self) -> str:
        return f"<IrqLine {self.name} {'high' if self.level else 'low'}>"
