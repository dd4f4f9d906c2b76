"""`Tasks`: what of a machine runs as tasks: vCPUs, devices' activities, the delivery of writes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from .device import Device
from .exits import EndRun, Outcome
from .suspension import ENDS_THE_LOOP, foreign_cancellation, is_own_cancellation, waits_for

__all__ = ["SETTLE_LIMIT_S", "Tasks", "wait_uncancelled"]

_log = logging.getLogger(__name__)

SETTLE_LIMIT_S = 10.0
"""Who is kicked, or cancelled, ends within microseconds; this long means that it is stuck."""


class Tasks:
    """The tasks of one machine.

    Args:
        name: the machine's.
        on_end: told by what an activity ended the guest.
        on_failure: told of an activity's error.
    """

    def __init__(
        self,
        name: str,
        on_end: Callable[[Outcome], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._name = name
        self._on_end = on_end
        self._on_failure = on_failure
        self._all: list[asyncio.Task[None]] = []
        self._serving: list[asyncio.Task[None]] = []  # of these, what calls handlers of accesses
        self._activities: dict[str, asyncio.Task[None]] = {}  # device name -> its run()

    @property
    def current_is_own(self) -> bool:
        """Is the present task one of them?"""
        return asyncio.current_task() in self._all

    @property
    def current_serves(self) -> bool:
        """Is the present task one that calls handlers of accesses, or awaited by one?"""
        task = asyncio.current_task()
        return any(waits_for(serving, task) for serving in self._serving)

    @property
    def current_is_activity(self) -> bool:
        """Is the present task a device's `run()`?"""
        return asyncio.current_task() in self._activities.values()

    def serve(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start something that calls handlers of accesses."""
        task = self._spawn(coroutine, name)
        self._serving.append(task)
        return task

    async def serve_once(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Have such a thing done, and wait: it goes on to its end if the wait is cancelled."""
        task = self._spawn(coroutine, name)
        self._serving.append(task)
        task.add_done_callback(self._forget)
        await asyncio.wait([task])

    def start(self, device: Device) -> None:
        """Start the device's own activity, if it has one. Idempotent."""
        if type(device).run is not Device.run and device.name not in self._activities:
            self._activities[device.name] = self._spawn(self._activity(device), device.name)

    async def _activity(self, device: Device) -> None:
        # run() is called here: of a task that is cancelled before its first turn, nothing is left.
        await self.watched(device.run(), f"{device.name}.run()")

    async def watched(self, activity: Awaitable[None], who: str) -> None:
        """Await something that goes on beside the vCPUs; its failure ends the machine."""
        try:
            await activity
        except EndRun as end:
            self._on_end(end.outcome)
        except asyncio.CancelledError as cancelled:
            if is_own_cancellation():
                raise
            self._on_failure(foreign_cancellation(cancelled, who))
        except ENDS_THE_LOOP:
            raise
        except BaseException as error:
            error.add_note(f"in {who}")
            self._on_failure(error)

    async def end_activities(self) -> None:
        """Cancel the devices' activities and wait, come what may, for their ends."""
        activities, self._activities = list(self._activities.values()), {}
        self._all = [task for task in self._all if task not in activities]
        await _end(activities)

    async def end(self) -> None:
        """Cancel all of them and wait, come what may, for their ends."""
        tasks, self._all = self._all, []
        await _end(tasks)

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self._name}.{name}")
        self._all.append(task)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._serving.remove(task)
        if task in self._all:
            self._all.remove(task)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await wait_uncancelled(asyncio.ensure_future(asyncio.wait(tasks, timeout=SETTLE_LIMIT_S)))
    _report(tasks)


def _report(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        if not task.done():
            _log.warning("%s ignores its cancellation", task.get_name())
        elif not task.cancelled():
            task.exception()  # seen


async def wait_uncancelled(future: asyncio.Future[Any]) -> None:
    """Wait for `future` to the end; a cancellation meanwhile is raised afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError as error:
            if future.cancelled():
                break
            cancelled = error
        except BaseException:
            break
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # seen
        raise cancelled
    if not future.cancelled():
        future.result()
