"""The pages: their blocks run and do what the page says, and their links lead somewhere.

Sybil finds the blocks: each is a test, in the order of its page. Those of one page share their
names, one event loop and one folder.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from tests.boot.elf_files import Load, elf_file

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
OUTPUT = re.compile(r"\s*^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIME_LIMIT_S = 250

SHOWN = {"text", "console"}
"""Blocks in these languages are drawings, transcripts and outputs; all others run."""
RUN_ELSEWHERE = {"py", "ini"}
"""By test_tutorial.py and test_pytest_plugin.py."""
TUTORIAL = ROOT / "docs/tutorial.md"  # test_tutorial.py
INTERACTIVE = {"gdb": "needs somebody at a keyboard; tests/gdb have GDB in batch mode"}


# ---- blocks --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runners() -> Iterator[dict[str, asyncio.Runner]]:
    """For each page an event loop, which goes on from block to block."""
    runners: dict[str, asyncio.Runner] = {}
    yield runners
    for runner in runners.values():
        runner.close()


def run_python(example: Example, runner: asyncio.Runner) -> None:
    """Run a block, which may await as a notebook's cells may, and then the tests it defines."""
    names = example.namespace
    before = dict(names)
    source = "\n" * (example.line + example.parsed.line_offset) + example.parsed
    code = compile(source, example.path, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    pending = eval(code, names)
    if inspect.iscoroutine(pending):
        runner.run(pending)
    for name, test in list(names.items()):
        if not name.startswith("test_") or before.get(name) is test:
            continue
        if inspect.iscoroutinefunction(test):
            asyncio.run(test())
        else:
            test()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the commands of the pages take."""
    folder: Path = tmp_path_factory.mktemp("workshop")
    end = bytes.fromhex("b000 e6f4")  # mov al, 0; out 0xf4, al
    multiboot = struct.pack("<III", 0x1BADB002, 0, -0x1BADB002 & 0xFFFFFFFF)
    kernel = elf_file(Load(0x100000, multiboot + end), entry=0x10000C)
    (folder / "kernel.elf").write_bytes(kernel)
    (folder / "guest.bin").write_bytes(bytes.fromhex("b041 e6e9 f4"))  # mov al,'A'; out; hlt
    return folder


def why_not(script: str) -> str | None:
    """Why a script cannot run here, or None."""
    for word in re.findall(r"[\w./+-]+", re.sub(r"#.*", "", script)):
        if word in INTERACTIVE:
            return INTERACTIVE[word]
        if word.startswith("/usr/") and not os.path.exists(word):
            return f"needs {word}"
        if word == "vmlinuz":
            return "needs a Linux kernel"
        if word == "jq" and shutil.which(word) is None:
            return "needs jq (package jq)"
    return None


def run_shell(script: str, folder: Path) -> None:
    """Run a script with this environment's commands."""
    result = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=folder,
        capture_output=True,
        timeout=TIME_LIMIT_S,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert result.returncode == 0, result.stderr.decode()


def leave(example: Example) -> None:
    """The tests run the blocks, with their fixtures."""


PAGES_IN_BLOCKS = Sybil(
    parsers=[SkipParser(), CodeBlockParser("python", leave), CodeBlockParser("sh", leave)]
)


def blocks(language: str) -> list[Any]:
    """The blocks in a language; `<!-- skip: next "why" -->` before one skips it."""
    found = []
    for page in (page for page in PAGES if page != TUTORIAL):
        document = PAGES_IN_BLOCKS.parse(page)
        for example in document.examples():
            marks = []
            try:
                example.evaluate()  # which a skip is evaluated for
            except SkipTest as skip:
                marks.append(pytest.mark.skip(reason=str(skip)))
            if document.text.startswith(f"```{language}\n", example.region.start):
                name = f"{page.relative_to(ROOT)}:{example.line}"
                found.append(pytest.param(example, id=name, marks=marks))
    return found


@pytest.mark.kvm
@pytest.mark.parametrize("example", blocks("python"))
def test_python(example, runners, capsys):
    """What a block prints is the text block right after it."""
    page = Path(example.path).stem
    example.namespace.setdefault("__name__", page)
    if page not in runners:
        runners[page] = asyncio.Runner()
    run_python(example, runners[page])
    promised = OUTPUT.match(example.document.text, example.region.end)
    assert capsys.readouterr().out == (promised[1] if promised else "")


@pytest.mark.slow
@pytest.mark.kvm
@pytest.mark.parametrize("example", blocks("sh"))
def test_shell(example, workshop):
    if (reason := why_not(example.parsed)) is not None:
        pytest.skip(reason)
    run_shell(example.parsed, workshop)


def test_every_block_runs_or_is_only_shown():
    languages = {
        language
        for page in PAGES
        for language in re.findall(r"^```(\w+)", page.read_text(), re.MULTILINE)
    }
    assert languages == {"python", "sh", *SHOWN, *RUN_ELSEWHERE}


# ---- links ---------------------------------------------------------------------------


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


# ---- the site ------------------------------------------------------------------------


PUBLIC = "kvmaio devices boot checkpoint faults gdb metrics pytest_plugin strategies testing trace"


def undocumented(inventory: Path) -> list[str]:
    """Public classes and functions that the reference lacks, by the site's own inventory."""
    *_, packed = inventory.read_bytes().split(b"\n", 4)
    documented = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    names = []
    for name in PUBLIC.split():
        module = importlib.import_module("kvmaio" if name == "kvmaio" else f"kvmaio.{name}")
        for public in (getattr(module, each) for each in module.__all__):
            if inspect.isclass(public) or inspect.isfunction(public):
                names.append(f"{public.__module__}.{public.__qualname__}")
    return [name for name in names if name not in documented]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed: make docs does")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "reference/machine/index.html").read_text()
    assert "Run every vCPU until the guest or somebody else ends the run." in page
    assert undocumented(tmp_path / "objects.inv") == []
    examples = (tmp_path / "examples/index.html").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert f'<h2 id="{path.stem}">' in examples
    assert '<a href="../examples/#two_guests_link">' in (tmp_path / "time/index.html").read_text()


def test_every_page_is_in_the_contents():
    listed = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]]
    assert [page for page in pages if page not in listed] == []
