"""`run()`: run a main coroutine on the loop that fits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

from .errors import ConfigurationError
from .simulation import SimulationLoop

__all__ = ["run"]

T = TypeVar("T")


def run(
    main: Coroutine[Any, Any, T],
    *,
    time: Literal["wall", "simulated"] = "wall",
    pace: float | None = None,
) -> T:
    """Run `main` to its end and return its result.

    Args:
        time: ``"wall"``: guests run freely, a second is a second; on uvloop where it is
            installed, else on asyncio. ``"simulated"``: on a `SimulationLoop`.
        pace: with simulated time, hold it to `pace` x wall clock at most.

    Raises:
        ConfigurationError: an impossible combination.
    """
    try:
        factory = _loop_factory(time, pace)
    except ConfigurationError:
        main.close()
        raise
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def _loop_factory(time: str, pace: float | None) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if time == "simulated":
        SimulationLoop(pace=pace).close()  # refuses an impossible pace before anything starts
        return lambda: SimulationLoop(pace=pace)
    if time != "wall":
        raise ConfigurationError(f'time={time!r}: "wall" or "simulated"')
    if pace is not None:
        raise ConfigurationError(f'pace={pace}: only with time="simulated"')
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
