"""Interrupt lines: a level, the sinks that follow it, and wired-OR inputs."""

from __future__ import annotations

from collections.abc import Callable

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

    __slots__ = ("_own", "_high_inputs", "_sinks", "edges", "level", "name")

    def __init__(self, name: str = "irq") -> None:
        self.name = name
        self.level = False
        self.edges = 0
        self._own = False
        self._high_inputs = 0
        self._sinks: list[IrqSink] = []

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
        if self.level:
            sink(True)

    def disconnect(self, sink: IrqSink) -> None:
        """Take back `connect()`; an unknown sink is ignored."""
        if sink in self._sinks:
            self._sinks.remove(sink)

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
            for sink in tuple(self._sinks):
                sink(now)

    def __repr__(self) -> str:
        return f"<IrqLine {self.name} {'high' if self.level else 'low'}>"
