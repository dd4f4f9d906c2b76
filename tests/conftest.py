"""Fixtures and settings that all tests share."""

from hypothesis import settings

pytest_plugins = ["plugin_summary"]

# The suite's own time limit bounds a test; a deadline per example would fail on emulated hardware.
settings.register_profile("kvmaio", deadline=None)
settings.load_profile("kvmaio")
