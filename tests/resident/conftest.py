"""Fixtures for tests of the resident runner."""

import pytest

from kvmaio.kvm import promotion
from tests.resident.guests import LOOPS

NEVER_NS = 1 << 62


@pytest.fixture(params=LOOPS)
def loop_kind(request):
    """asyncio's loop, whose descriptors are watched, and uvloop's, with slices."""
    return request.param


@pytest.fixture
def eager(monkeypatch):
    """Every guest that exits at all moves in, however slow the host, and stays."""
    monkeypatch.setattr(promotion, "OFTEN_WITHIN_NS", NEVER_NS)
    monkeypatch.setattr(promotion, "QUIET_NS", NEVER_NS)
