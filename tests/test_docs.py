"""The pages: their Python blocks run, print what the page says, and their links lead somewhere."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    return FENCED.findall(page.read_text())


def with_python(pages: list[Path]) -> list[Path]:
    return [page for page in pages if any(language == "python" for language, _ in blocks(page))]


@pytest.fixture
def runner():
    """An event loop that goes on from block to block."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.mark.kvm
@pytest.mark.parametrize("page", with_python(PAGES), ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, capsys, runner):
    """Blocks of one page share their names; a text block right after one is what it prints."""
    names: dict[str, object] = {"__name__": page.stem}
    followers = [*blocks(page)[1:], ("", "")]
    for (language, code), (next_language, expected) in zip(blocks(page), followers, strict=True):
        if language != "python":
            continue
        # As a notebook's cells, blocks may await.
        compiled = compile(code, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        pending = eval(compiled, names)
        if inspect.iscoroutine(pending):
            runner.run(pending)
        printed = capsys.readouterr().out
        assert printed == (expected if next_language == "text" else "")
    for name, test in names.items():
        if name.startswith("test_") and inspect.iscoroutinefunction(test):
            asyncio.run(test())
        elif name.startswith("test_") and callable(test):
            test()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    """Paths in backquotes, as `devices/uart16550.py`."""
    paths = re.findall(
        r"`((?:devices|docs|examples|kvmaio|tests|tools)/[\w./-]+)`", page.read_text()
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed: make docs does")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "reference/machine/index.html").read_text()
    assert "Run every vCPU until the guest or somebody else ends the run." in page


def test_every_page_is_in_the_contents():
    listed = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]]
    assert [page for page in pages if page not in listed] == []
