"""`assemble()`: machine code from assembler text, by GNU as and ld.

For tests, experiments and the pytest plugin's `boot` fixture; kvmaio itself
needs no assembler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from .errors import ConfigurationError

__all__ = ["assemble", "run_tool"]

# mode -> the directive, as's option, ld's emulation
_MODES = {
    "real16": (".code16", "--32", "elf_i386"),
    "prot32": (".code32", "--32", "elf_i386"),
    "long64": (".code64", "--64", "elf_x86_64"),
    "user64": (".code64", "--64", "elf_x86_64"),
}
_TIMEOUT_SECONDS = 60

# One piece, in the order of the source; nothing else (as adds a note on some systems).
_SCRIPT = """SECTIONS {{
    . = {address:#x};
    .all : SUBALIGN(1) {{ *(.text .text.*) *(.rodata .rodata.*) *(.data .data.*) *(.bss COMMON) }}
    /DISCARD/ : {{ *(*) }}
}}
"""


def assemble(*lines: str, mode: str = "real16", address: int = 0x1000) -> bytes:
    """Assemble Intel syntax (no register prefixes) to run at `address`.

    ::

        assemble("mov dx, 0x3f8", "mov al, 'A'", "out dx, al", "hlt")

    Args:
        lines: instructions, labels and directives; a string may hold several lines.
        mode: as `Flat`'s: real16, prot32, long64 or user64.
        address: what the first byte's label is worth.

    Raises:
        ConfigurationError: the source is wrong (the message is the assembler's,
            with the line), or there is no GNU as and ld.
    """
    try:
        directive, width, emulation = _MODES[mode]
    except KeyError:
        modes = ", ".join(_MODES)
        raise ConfigurationError(f"mode {mode!r}: it must be one of {modes}") from None
    source = "\n".join(lines)
    with tempfile.TemporaryDirectory(prefix="kvmaio-") as name:
        folder = Path(name)
        script, linkable, code = folder / "script", folder / "code.o", folder / "code.bin"
        # On one line, so that as counts the source's lines from 2 on.
        text = f".intel_syntax noprefix; {directive}\n{source}\n"
        run_tool(["as", width, "-o", str(linkable), "-"], text=text, source=source)
        script.write_text(_SCRIPT.format(address=address))
        link = ["ld", "-m", emulation, "-T", str(script), "--oformat", "binary", "-e", str(address)]
        run_tool([*link, "-o", str(code), str(linkable)], source=source)
        return code.read_bytes() if code.exists() else b""


def run_tool(command: list[str], *, text: str = "", source: str = "") -> None:
    """Run as or ld; `source` is what an error message quotes its line from.

    Raises:
        ConfigurationError: it failed, or is not installed.
    """
    tool = command[0]
    try:
        result = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
        )
    except FileNotFoundError:
        raise ConfigurationError(
            f"GNU {tool} is not installed: install the package binutils, or give the machine "
            "code as bytes"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConfigurationError(f"{tool} took more than {_TIMEOUT_SECONDS} s") from None
    if result.returncode:
        raise ConfigurationError(_explain(tool, result.stderr, source.splitlines()))


def _explain(tool: str, message: str, lines: list[str]) -> str:
    """The tool's complaints, each with the line that it is about."""
    complaints = []
    for found in re.finditer(r"^(?:\{standard input\}|<stdin>):(\d+): Error: (.*)$", message, re.M):
        number = int(found[1]) - 1
        text = lines[number - 1].strip() if 0 < number <= len(lines) else ""
        complaints.append(f"line {number} ({text}): {found[2]}")
    if not complaints:
        # ld's lines begin with the temporary file's name.
        complaints = [re.sub(r"^.*code\.o:", "", line) for line in message.splitlines()]
    return f"{tool}: " + "; ".join(complaints or ["failed without a message"])
