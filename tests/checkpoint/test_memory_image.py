"""Which pages of a machine were written since its checkpoint, as the host's page tables tell."""

from __future__ import annotations

import errno
import fcntl
import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmaio import Machine, memory_image
from kvmaio.boot import Flat
from kvmaio.memory_image import written_runs

PAGE = 4096
PAGES = 512


@pytest.fixture(params=["scanned", "read", "scanned in pieces"])
def way(request, monkeypatch):
    """PAGEMAP_SCAN, or the entries that older kernels have."""
    if request.param == "read":

        def refuses(*_: Any) -> int:
            raise OSError(errno.ENOTTY, "not known")

        monkeypatch.setattr(fcntl, "ioctl", refuses)
    elif request.param == "scanned in pieces":
        monkeypatch.setattr(memory_image, "_SCAN_AT_A_TIME", 3)
    return request.param


def pages_of(runs):
    return [page for first, behind in runs for page in range(first, behind)]


@given(st.sets(st.integers(0, PAGES - 1)), st.sets(st.integers(0, PAGES - 1)))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_written_pages_are_known_and_read_ones_are_not_among_them(way, written, read):
    async with Machine(memory=PAGES * PAGE, cpu="soft") as machine:
        machine.load(Flat(b"\xf4", 0))
        machine.memory.write(0, bytes(range(256)) * 16 * PAGES)
        saved = await machine.checkpoint()
        await machine.restore(saved)
        (region,) = machine.memory.regions
        assert list(written_runs(region)) == []
        for page in read:
            machine.memory.read(page * PAGE, 1)
        for page in written:
            machine.memory.write(page * PAGE + 7, b"x")
        runs = list(written_runs(region))
        assert pages_of(runs) == sorted(written)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(runs))
        await machine.restore(saved)
        assert list(written_runs(region)) == []
