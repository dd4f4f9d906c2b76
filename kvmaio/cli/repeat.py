"""``kvmaio run --record`` and ``--replay``: a run that repeats itself, byte for byte."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any

import attrs
import click

from ..errors import ConfigurationError
from ..machine import Machine
from ..replay import read_inputs, recording, replaying

__all__ = ["Repeat"]

CLOCK_STARTED = "clock_started"


@attrs.frozen
class Repeat:
    """What the options ask for.

    Attributes:
        record, replay: the files, one of them or none.
        clock_start: when the guest's real-time clock begins; None is now.
    """

    record: str | None
    replay: str | None
    clock_start: datetime | None

    @classmethod
    def asked_for(cls, record: str | None, replay: str | None, cpu: str, time: str) -> Repeat:
        """From the options.

        Raises:
            click.UsageError: they contradict each other.
            ConfigurationError: what is to be replayed is no recording.
        """
        if record is None and replay is None:
            return cls(None, None, None)
        if record is not None and replay is not None:
            raise click.UsageError("--record and --replay: one of the two.")
        option = "--record" if record is not None else "--replay"
        if cpu == "kvm":
            raise click.UsageError(f"{option} needs --cpu soft: KVM's runs cannot be repeated.")
        source = click.get_current_context().get_parameter_source("time")
        if time == "wall" and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option} is for --time simulated.")
        if replay is None:
            return cls(record, None, datetime.now(UTC).replace(microsecond=0))
        facts, _ = read_inputs(replay)
        return cls(None, replay, _clock_start(facts.get(CLOCK_STARTED), replay))

    def __bool__(self) -> bool:
        return self.record is not None or self.replay is not None

    def around(self, machine: Machine) -> AbstractContextManager[Any]:
        """Within it, the machine's inputs are recorded or replayed."""
        if self.record is not None:
            assert self.clock_start is not None
            return recording(machine, self.record, **{CLOCK_STARTED: self.clock_start.isoformat()})
        return nullcontext() if self.replay is None else replaying(machine, self.replay)


def _clock_start(started: object, path: str) -> datetime | None:
    if started is None:
        return None
    try:
        if not isinstance(started, str):
            raise ValueError("no text")
        start = datetime.fromisoformat(started)
        if start.tzinfo is None:
            raise ValueError("without a time zone")
    except ValueError as error:
        raise ConfigurationError(
            f"{path} is no recording of inputs: line 1: {CLOCK_STARTED} is {started!r}: {error}"
        ) from None
    return start
