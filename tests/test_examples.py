"""The examples: each runs, prints what it promises, and its code is what its comments say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmaio.assembler import assemble
from tests.assembler import have_tools

EXAMPLES = Path(__file__).parent.parent / "examples"
TIME_LIMIT_S = 250
RUN_BY = {"notebook_cells": "run_cells"}
NEEDS = {"debug_with_gdb": "gdb"}
IMPORTS = {"web_service": "aiohttp"}

PROMISED = {
    "hello_serial": r"""
        the guest printed  Hello from the guest!
        it ended with      Halted\(\)
        it took            22 exits: 21 I/O, 1 halt
    """,
    "cosimulate": r"""
        ( \d0 min  (19|20)\.\d degrees
        ){6}Stopped\(reason='an hour is over'\): 360 steps, the heater was on in \d+ of them
        an hour in less than a minute: True
    """,
    "countdown_timer": r"""
        (\d+\.\d\d s  \*
        ){5}Halted\(\): 5 interrupts woke the guest, \d halts
    """,
    "debug_with_gdb": r"""
        .*Breakpoint 1, 0x00001007 in .*
        \$1 = 5
        .*Old value = 0
        New value = 15
        .*=> 0x100c:\thlt *
        .*Halted\(\); the sum is 42
    """,
    "device_that_awaits": r"""
        .*the guest reads; its device asks the service
        tick 1
        .*Halted\(\): the guest read \[20, 21, 22\] degrees
    """,
    "explore_variations": r"""
        Stopped\(reason='the self-test is over'\)
        100 runs from there: it heats below 19 degrees
        at once, with 10, 18 and 30 degrees: True True False
    """,
    "fault_injection": r"""
        Halted\(\): the guest took \[20, 20, 20, 20, 20, 20\]
        2 of 8 readings were wrong
        the first, in the trace: FaultRecord\(.*'sensor', what='temperature: bits 0x40 flipped'\)
    """,
    "notebook_cells": r"""
        the guest prints hello
        accesses for five letters, at least nine: True
        then it prints !
        Stopped\(reason='enough'\)
    """,
    "simulated_time": r"""
         50.0 min  50 litres: the guest opens the valve
         60.0 min  Stopped\(reason='an hour is over'\), and less than a minute went by: True
    """,
    "web_service": r"""
        a web client got \{'fahrenheit': 68\}
        a web client got \{'fahrenheit': 69\}
        a web client got \{'fahrenheit': 71\}
        Stopped\(reason='enough'\)
    """,
    "two_guests_link": r"""
        ( *\d+\.\d{3} ms  (here|there) (sends|gets ) [ABC]
        ){12}the sender: Halted\(\)
        the echoer: Stopped\(reason='the sender is done'\)
    """,
}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PROMISED, *RUN_BY.values()}


@pytest.mark.kvm
@pytest.mark.parametrize("name", PROMISED)
def test_example_prints_what_it_promises(name):
    if name in IMPORTS:
        pytest.importorskip(IMPORTS[name])
    if (tool := NEEDS.get(name)) and shutil.which(tool) is None:
        pytest.skip(f"needs {tool} (package {tool})")
    result = subprocess.run(
        [sys.executable, *(EXAMPLES / f"{each}.py" for each in (RUN_BY.get(name), name) if each)],
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert (result.stderr, result.returncode) == ("", 0)
    promised = "\n".join(line.strip() for line in PROMISED[name].strip().splitlines())
    assert re.fullmatch(promised + "\n", result.stdout, re.DOTALL), result.stdout


@pytest.mark.skipif(not have_tools(), reason="needs GNU as and ld (package binutils)")
@pytest.mark.parametrize("name", PROMISED)
def test_code_is_what_the_comments_say(name):
    """A line is ``"e450"  # label: instruction  # remark``."""
    source = (EXAMPLES / f"{name}.py").read_text()
    listing = re.findall(r'^    "([0-9a-f]+)"  #(.*)$', source, re.MULTILINE)
    code = b"".join(bytes.fromhex(digits) for digits, _ in listing)
    assert code == assemble(*(text.partition("#")[0].strip() for _, text in listing))
