"""docs/tutorial.md, as its reader does it: each file written, each command run, in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
TIME_LIMIT_S = 250

blocks = RawFencedCodeBlockLexer(
    re.compile(r'(?P<language>\w+)(?: title="(?P<title>[\w.]+)")?$\n', re.MULTILINE)
)


class Reader:
    """Does what the page says, in a folder.

    Attributes:
        did: the files written and the commands run.
        printed: by the last command.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.did: list[str] = []
        self.printed = ""

    def read(self, language: str, title: str | None, text: str) -> None:
        match language:
            case "py" | "ini":
                assert title is not None
                (self.folder / title).write_text(text)
                self.did.append(title)
            case "sh":
                self.run(text)
            case "text":
                assert self.printed == text
            case _:
                assert language == "console"  # installing, which has happened here

    def run(self, command: str) -> None:
        here = Path(sys.executable).parent
        result = subprocess.run(
            ["bash", "-e", "-c", command],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            env=os.environ | {"PATH": f"{here}:{os.environ['PATH']}"},
        )
        assert result.returncode == 0, result.stdout + result.stderr
        self.printed = result.stdout
        self.did.append(command.strip())


@pytest.mark.slow
@pytest.mark.kvm
def test_the_tutorial_does_what_it_says(tmp_path):
    reader = Reader(tmp_path)

    def evaluate(example: Example) -> None:
        block = example.parsed
        reader.read(block["language"], block["title"], str(block["source"]))

    def parse(document: Document) -> list[Region]:
        return [Region(r.start, r.end, r.lexemes, evaluate) for r in blocks(document)]

    for example in Sybil(parsers=[parse]).parse(PAGE).examples():
        example.evaluate()
    assert reader.did == [
        "kvmaio doctor",
        *("guest.py", "python guest.py", "dice.py", "python dice.py"),
        *("throw.py", "python throw.py", "pytest.ini", "test_dice.py", "pytest -q test_dice.py"),
        *("forgotten.py", "python forgotten.py"),
    ]
