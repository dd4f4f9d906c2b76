"""Fixtures and settings that all tests share."""

from collections.abc import Callable

import pytest
from hypothesis import settings

from tests.assembler import assemble

pytest_plugins = ["plugin_summary"]

# The suite's own time limit bounds a test; a deadline per example would fail on emulated hardware.
settings.register_profile("kvmaio", deadline=None)
settings.load_profile("kvmaio")


@pytest.fixture
def kvmaio_assembler() -> Callable[..., bytes]:
    """`boot()` takes guest code from tests/guests, where it is kept."""
    return assemble
