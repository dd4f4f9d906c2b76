"""Statistics for Prometheus; needs prometheus-client (``kvmaio[metrics]``).

::

    async with serve_metrics(machine, port=9464):
        await machine.run()

Each counter of `kvmaio.stats` is one of Prometheus', with the labels ``machine`` and
``component``: ``numVMExits`` is ``kvmaio_num_vm_exits_total``. What is unknown is not there.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError

if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["MachineCollector", "serve_metrics"]

_LONGEST_REQUEST_S = 10.0


class MachineCollector:
    """What Prometheus' registries collect from: ``REGISTRY.register(MachineCollector(machine))``.

    Raises:
        ConfigurationError: prometheus-client is missing.
    """

    def __init__(self, *machines: Machine) -> None:
        try:
            import prometheus_client.core as core
        except ImportError:
            raise ConfigurationError(
                "metrics need prometheus-client: pip install 'kvmaio[metrics]'"
            ) from None
        self._core: Any = core
        self._machines = machines

    def collect(self) -> Iterator[Any]:
        """The metrics as they are now."""
        time = self._core.GaugeMetricFamily(
            "kvmaio_guest_time_seconds", "guest time, by the machine's clock", labels=["machine"]
        )
        counters: dict[str, Any] = {}
        for machine in self._machines:
            time.add_metric([machine.name], machine.clock.now_ns / 1e9)
            for component, group in machine.stats.groups().items():
                for row in group.rows():
                    if row.value is None:
                        continue
                    name = f"kvmaio_{_snake(row.name)}"
                    if name not in counters:
                        counters[name] = self._core.CounterMetricFamily(
                            name,
                            f"{row.description} ({row.unit})",
                            labels=["machine", "component"],
                        )
                    counters[name].add_metric([machine.name, component], row.value)
        yield time
        yield from counters.values()


@asynccontextmanager
async def serve_metrics(
    *machines: Machine, host: str = "127.0.0.1", port: int = 9464
) -> AsyncIterator[int]:
    """Answer Prometheus over HTTP, from the event loop; gives the port.

    Args:
        port: 0 takes one that is free.
    """
    collector = MachineCollector(*machines)
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    registry.register(collector)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_LONGEST_REQUEST_S):
                while (await reader.readline()).strip():
                    pass  # whatever is asked for, there is only this
                body = prometheus_client.generate_latest(registry)
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\n"
                    b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body)
                )
                await writer.drain()
        except (TimeoutError, ConnectionError, ValueError):
            pass  # it is gone, or no client of ours
        finally:
            writer.close()

    server = await asyncio.start_server(answer, host, port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def _snake(name: str) -> str:
    """``numVMExits`` -> ``num_vm_exits``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
