"""Fixtures of the engine's tests."""

import os
from collections.abc import Callable

import pytest

from kvmaio.kvm import promotion
from tests.assembler import assemble


@pytest.fixture(autouse=True)
def where_guests_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """With KVMAIO_RESIDENT=1, on the loop's thread from their first exit on: the same must hold."""
    if os.environ.get("KVMAIO_RESIDENT"):
        monkeypatch.setattr(promotion, "OFTEN_EXITS", 1)
        monkeypatch.setattr(promotion, "OFTEN_WITHIN_NS", 1 << 62)
        monkeypatch.setattr(promotion, "QUIET_NS", 1 << 62)


@pytest.fixture
def assembler() -> Callable[..., bytes]:
    """Machine code of lines for real16, such as what an application processor starts with."""
    return lambda *lines, address=0x8000, mode="real16": assemble(lines, mode, address)
