"""`run()`: run a main coroutine on the loop that fits."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

from .errors import ConfigurationError

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
            installed, else on asyncio.
        pace: only with simulated time.

    Raises:
        ConfigurationError: an impossible combination.
    """
    if time != "wall" or pace is not None:
        main.close()
        raise ConfigurationError(
            f'time={time!r}, pace={pace!r}: this version of kvmaio has time="wall" only'
        )
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
