"""Fixtures of the engine's tests."""

from collections.abc import Callable

import pytest

from tests.assembler import assemble


@pytest.fixture
def assembler() -> Callable[..., bytes]:
    """Machine code of lines for real16, such as what an application processor starts with."""
    return lambda *lines, address=0x8000, mode="real16": assemble(lines, mode, address)
