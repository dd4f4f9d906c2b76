"""mkdocs' hooks: the examples as a page of the site, with links to them; docstrings' ``::``."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

EXAMPLES = Path(__file__).parent.parent / "examples"
PAGE = "examples.md"
LINK = re.compile(r"\]\((?:\.\./)+examples(?:/(\w+)\.py)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page that has the examples, each with its file name as the heading."""
    text = "# Examples\n\nEach is a program of its own, in `examples/`, and is tested.\n"
    for path in sorted(EXAMPLES.glob("*.py")):
        text += f"\n## {path.name} {{ #{path.stem} }}\n\n```py\n{path.read_text()}```\n"
    files.append(File.generated(config, PAGE, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links into the repository lead to that page."""
    return LINK.sub(lambda found: f"]({PAGE}{f'#{found[1]}' if found[1] else ''})", markdown)


def on_page_content(html: str, **_: object) -> str:
    """In docstrings, ``::`` announces a code block; in Markdown, nothing has to."""
    return html.replace("<p>::</p>\n", "").replace(
        '::</p>\n<div class="highlight">', ':</p>\n<div class="highlight">'
    )
