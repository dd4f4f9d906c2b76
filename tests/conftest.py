"""Fixtures and settings that all tests share."""

import faulthandler
import os
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


# A test's time limit raises an exception in it, once. Where a callback of the loop swallows that,
# or C code never returns, the whole run would hang: then it ends, and says where everyone was.
GRACE_S = 60
STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # the real one: tests have their own


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[STDERR])


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings) -> None:
    faulthandler.dump_traceback_later(
        settings.timeout + GRACE_S, exit=True, file=item.config.stash[STDERR]
    )


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    faulthandler.cancel_dump_traceback_later()
