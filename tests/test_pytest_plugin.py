"""The pytest plugin, as a project that uses kvmaio sees it: in a session of its own."""

import subprocess
import sys

import pytest

from tests.engine.support import LAB

GUEST = """
import pytest

@pytest.mark.asyncio
async def test_guest_prints_a_letter(boot, request):
    machine = boot(bytes.fromhex("baf803 b041 ee f4"))
    await machine.run()
    assert machine.serial.output == b"A"
    models = [value for name, value in request.node.user_properties if name == "cpu_model"]
    assert models in (["kvm"], ["soft"])

@pytest.mark.asyncio
async def test_guest_exits_with_a_code(boot):
    outcome = await boot(bytes.fromhex("b002 e6f4"), memory="1M").run()
    assert outcome.code == 5

@pytest.mark.asyncio
async def test_an_entered_machine(machine):
    assert machine.memory.size == 16 << 20 and len(machine.vcpus) == 1

@pytest.mark.asyncio
async def test_bytes_and_text_do_not_mix(boot):
    with pytest.raises(pytest.fail.Exception, match="lines of assembler, or machine code"):
        boot(b"x", "hlt")
"""


def session(folder, *options):
    """The last lines of a pytest session over GUEST."""
    (folder / "test_guest.py").write_text(GUEST)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *options]
    limit_s = 500 if LAB else 50
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit_s)
    return result.stdout + result.stderr


@pytest.mark.kvm
def test_fixtures_run_guests(tmp_path):
    assert "4 passed" in session(tmp_path)


def test_a_cpu_model_that_is_not_there_skips_with_the_reason(tmp_path):
    text = session(tmp_path, "--kvmaio-cpu=soft")
    assert "4 skipped" in text or "passed" in text
    if "skipped" in text:
        assert "software CPU" in text


@pytest.mark.kvm
def test_both_runs_every_test_twice(tmp_path):
    text = session(tmp_path, "--kvmaio-cpu=both")
    assert "4 passed, 4 skipped" in text or "8 passed" in text
