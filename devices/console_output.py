"""`ConsoleOutput`: the text that a guest printed; it is kept, passed on, and can be waited for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any, overload

from kvmaio.errors import ConfigurationError, ConsoleTimeout

__all__ = ["HISTORY", "ConsoleOutput", "Sink"]

Sink = Callable[[bytes], Awaitable[None] | None]
"""Takes bytes as they are printed; the guest waits for what it returns."""

HISTORY = 16 * 1024 * 1024

LONGEST_MATCH = 64 * 1024
"""An expression is looked for in so many of the last bytes, or a guest that prints much without
a match would be searched from the beginning again and again."""

TAIL_LINES = 8
TAIL_BYTES = 1000


class ConsoleOutput:
    """The bytes a guest printed, the sinks that get them, and `expect()`.

    Args:
        history: how many of the last bytes are kept.
    """

    def __init__(self, history: int = HISTORY) -> None:
        if history < 0:
            raise ConfigurationError(f"a history of {history} bytes: it must be 0 or more")
        self.history = history
        self.sinks: list[Sink] = []
        self._kept = bytearray()
        self._position = 0  # where in _kept the next expect() starts
        self._texts: dict[asyncio.Future[None], bytes] = {}
        self._others: set[asyncio.Future[None]] = set()

    @property
    def data(self) -> bytes:
        """A copy of what is kept, oldest first."""
        return bytes(self._kept)

    def tail(self) -> str:
        """The last lines as text; bytes that are none are escaped."""
        lines = bytes(self._kept[-TAIL_BYTES:]).decode(errors="backslashreplace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])

    def forget(self) -> None:
        """Drop what was printed so far."""
        self._kept.clear()
        self._position = 0

    def write(self, data: bytes) -> Awaitable[None] | None:
        """Take what was printed; None, or what to await before more is printed."""
        old_length = len(self._kept)
        self._kept += data
        for waiter, text in self._texts.items():
            # Only an end that is new can complete the text.
            start = max(self._position, old_length - len(text) + 1)
            if not waiter.done() and self._kept.find(text, start) >= 0:
                waiter.set_result(None)
        for waiter in self._others:
            # It searches when its turn comes, so once for all that is printed until then.
            if not waiter.done():
                waiter.set_result(None)
        if (excess := len(self._kept) - self.history) > 0:
            del self._kept[:excess]
            self._position = max(0, self._position - excess)
        pending = [waiting for sink in self.sinks if (waiting := sink(data)) is not None]
        if not pending:
            return None
        return pending[0] if len(pending) == 1 else _all(pending)

    @overload
    async def expect(self, what: bytes, timeout: float | None = None) -> bytes: ...
    @overload
    async def expect(self, what: str, timeout: float | None = None) -> str: ...
    @overload
    async def expect(
        self, what: re.Pattern[bytes], timeout: float | None = None
    ) -> re.Match[bytes]: ...
    @overload
    async def expect(
        self, what: re.Pattern[str], timeout: float | None = None
    ) -> re.Match[str]: ...
    async def expect(self, what: Any, timeout: float | None = None) -> Any:
        """Wait until the guest prints `what`, a text or a compiled regular expression.

        What was printed before the call counts too, back to the end of what the last
        `expect()` returned. A wait that was cancelled or timed out has consumed nothing.

        Args:
            what: str is compared as UTF-8. An expression matches within the last 64 KiB,
                and as soon as it can: ``[0-9]+`` may match before the number is complete.
            timeout: in seconds of the loop's time; None waits for ever.

        Returns:
            For a text, all that came since the last expect(), up to and including it; for an
            expression, its match.

        Raises:
            ConsoleTimeout: it did not come; the message shows the console's last lines.
            ConfigurationError: the text is empty or longer than the history.
        """
        try:
            async with asyncio.timeout(timeout) as limit:
                if isinstance(what, re.Pattern):
                    return await self._expect_match(what)
                if isinstance(what, str):
                    return (await self._expect_text(what.encode())).decode(errors="replace")
                return await self._expect_text(what)
        except TimeoutError:
            if not limit.expired():
                raise
            wanted = what.pattern if isinstance(what, re.Pattern) else what
            raise ConsoleTimeout(
                f"{wanted!r} did not come within {timeout:g} s; the console's last lines:\n"
                f"{self.tail() or '(nothing)'}"
            ) from None

    async def _expect_text(self, text: bytes) -> bytes:
        if not 0 < len(text) <= self.history:
            raise ConfigurationError(
                f"cannot expect {len(text)} bytes: it must be 1 to {self.history}, the history"
            )
        while (found := self._kept.find(text, self._position)) < 0:
            waiter = asyncio.get_running_loop().create_future()
            self._texts[waiter] = text
            try:
                await waiter
            finally:
                del self._texts[waiter]
        start, self._position = self._position, found + len(text)
        return bytes(self._kept[start : self._position])

    async def _expect_match(self, pattern: re.Pattern[Any]) -> re.Match[Any]:
        while True:
            start = max(self._position, len(self._kept) - LONGEST_MATCH)
            window = bytes(self._kept[start:])
            match: re.Match[Any] | None
            if isinstance(pattern.pattern, bytes):
                match = pattern.search(window)
                end = match.end() if match else 0
            else:
                text = window.decode(errors="surrogateescape")
                match = pattern.search(text)
                end = len(text[: match.end()].encode(errors="surrogateescape")) if match else 0
            if match:
                self._position = start + end
                return match
            waiter = asyncio.get_running_loop().create_future()
            self._others.add(waiter)
            try:
                await waiter
            finally:
                self._others.discard(waiter)


async def _all(pending: list[Awaitable[None]]) -> None:
    await asyncio.gather(*pending)
