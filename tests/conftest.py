"""Fixtures and settings that all tests share."""

import signal
from collections.abc import Callable

import pytest
from hypothesis import settings

from tests.assembler import assemble

pytest_plugins = ["plugin_summary", "pytester"]

# Whoever starts the tests in a shell's background has them ignore SIGINT, and so would every
# program that they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The suite's own time limit bounds a test; a deadline per example would fail on emulated hardware.
settings.register_profile("kvmaio", deadline=None)
settings.load_profile("kvmaio")


@pytest.fixture
def kvmaio_assembler() -> Callable[..., bytes]:
    """`boot()` takes guest code from tests/guests, where it is kept."""
    return assemble
