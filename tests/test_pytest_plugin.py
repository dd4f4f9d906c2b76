"""The pytest plugin, as a project that uses kvmaio sees it: in a session of its own."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.assembler import have_tools
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


PAGE = Path(__file__).parent.parent / "docs" / "testing.md"


@pytest.mark.kvm
@pytest.mark.skipif(not have_tools(), reason="needs GNU as and ld (package binutils)")
def test_the_page_about_testing_does_what_it_says(pytester):
    code = "".join(re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    pytester.makepyfile(code)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=code.count("async def test_") + 2 + 1)  # 3 numbers, 2 loops


@pytest.fixture
def run_tests(pytester):
    """A function that runs a test file in a session of its own, and gives its result."""
    pytester.makeini("[pytest]\nasyncio_mode = auto\n")

    def run(source, *options):
        pytester.makepyfile(source)
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)

    return run


FAILS = """
import asyncio
import pytest
from kvmaio.devices import CountdownTimer

async def test_fails(boot):
    machine = boot(bytes.fromhex("b83412 baf803 b041 ee e440 f4"))  # ...; in al, 0x40; hlt
    machine.attach(CountdownTimer(), pio=0x40, name="timer").interval = 0x77
    await machine.run()
    assert machine.serial.output == b"B"

async def test_fails_while_the_guest_runs(boot):
    machine = boot(bytes.fromhex("ebfe"))
    running = asyncio.create_task(machine.run())
    await asyncio.sleep(0.05)
    assert False

async def test_times_out(machine):
    await machine.serial.expect("login:", timeout=0.01)

async def test_is_cancelled(boot):
    running = asyncio.create_task(boot(bytes.fromhex("ebfe")).run())
    asyncio.get_running_loop().call_later(0.05, running.cancel)
    await running

async def test_nothing_is_left():
    import os
    open_files = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            open_files.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass
    assert not [path for path in open_files if "kvm" in path]
    assert len(os.listdir("/proc/self/task")) == 1
    assert asyncio.all_tasks() == {asyncio.current_task()}
"""


@pytest.mark.kvm
def test_a_failure_explains_itself_and_leaves_nothing_behind(run_tests):
    result = run_tests(FAILS)
    result.assert_outcomes(failed=4, passed=1)
    result.stdout.fnmatch_lines(
        [
            "*test_fails *",
            "*- kvmaio -*",
            "<Machine machine: 1 vCPUs, 16 MiB>, running: no",
            "the last 5 records*",
            "*cpu0: exit IO after *",
            "*cpu0: write pio 0x3f8, uart165500.thr: 0x41",
            "*cpu0: read pio 0x40, timer.interval: *",
            "*0.000  cpu0: exit HLT after * µs",
            "cpu0: Idle, halted",
            "  rax 0x00000000000012*",
            "uart165500 printed last:",
            "  A",
            "uart165500: *lsr=0x60*thr_empty_pending=True*",
            "timer: interval=0x77*",
        ]
    )
    result.stdout.fnmatch_lines(
        ["*test_fails_while_the_guest_runs *", "*running: yes", "*no registers: the guest is run*"]
    )
    result.stdout.fnmatch_lines(["*ConsoleTimeout: 'login:' did not come within 0.01 s*"])


@pytest.mark.kvm
@pytest.mark.skipif(find_spec("capstone") is None, reason="capstone is not installed")
def test_a_failure_shows_the_code(run_tests):
    source = """
        import pytest
        async def test_fails(boot):
            await boot(bytes.fromhex("e460 f4"), mode="long64").run()
    """
    result = run_tests(source, "--kvmaio-last=0")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*0x1002: f4 * hlt"])
    assert "records" not in result.stdout.str()


@pytest.mark.kvm
def test_marks_choose_loops_and_cpu_models(run_tests):
    result = run_tests(
        """
        import asyncio
        import pytest
        from kvmaio import SimulationLoop

        @pytest.mark.kvmaio_loop("simulated")
        async def test_simulated(boot):
            loop = asyncio.get_running_loop()
            assert isinstance(loop, SimulationLoop)
            await boot(bytes.fromhex("f4")).run()
            await asyncio.sleep(3600)  # passes at once
            assert loop.time() >= 3600

        @pytest.mark.kvmaio_loop("wall", "simulated")
        async def test_both(machine, request):
            is_simulated = isinstance(asyncio.get_running_loop(), SimulationLoop)
            assert is_simulated == ("simulated" in request.node.name)

        async def test_plain(machine):
            assert not isinstance(asyncio.get_running_loop(), SimulationLoop)

        @pytest.mark.kvmaio_cpu("kvm")
        async def test_on_kvm(machine, kvmaio_cpu):
            assert kvmaio_cpu == "kvm"
        """,
        "--strict-markers",
        "--kvmaio-cpu=both",
        "-k",
        "not soft",
    )
    result.assert_outcomes(passed=5, deselected=4)


def test_wrong_marks_are_errors(run_tests):
    result = run_tests(
        """
        import pytest

        @pytest.mark.kvmaio_loop("simulate")
        async def test_it():
            pass
        """
    )
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*kvmaio_loop takes some of wall, simulated*"])


@pytest.mark.kvm
def test_a_machine_booted_once_and_reset_for_each_test(run_tests):
    result = run_tests(
        """
        import asyncio
        import pytest
        from kvmaio import Device, Register
        from kvmaio.boot import Flat
        from kvmaio.pytest_plugin import booted_once
        from kvmaio.testing import BenchMachine

        pytestmark = pytest.mark.asyncio(loop_scope="module")
        boots = 0

        # mov dx, 0x3f8; mov al, '$'; out dx, al; L: in al, 0x60; test al, al; jz L; out dx, al;
        # inc byte [0x2000]; mov al, [0x2000]; add al, '0'; out dx, al; jmp L
        CODE = bytes.fromhex("baf803 b024 ee e460 84c0 74fa ee fe060020 a00020 0430 ee ebed")

        class Key(Device):
            value = Register(0)

            @value.on_read
            async def wait(self):  # for a while only, or a reset would wait, too
                try:
                    async with asyncio.timeout(0.001):
                        return await self.keys.get()
                except TimeoutError:
                    return 0

        @booted_once
        async def shell(cpu):
            global boots
            boots += 1
            async with BenchMachine(cpu=cpu) as machine:
                key = machine.attach(Key(), pio=0x60, name="key")
                key.keys = asyncio.Queue()
                machine.load(Flat(CODE, 0x1000))
                run = asyncio.create_task(machine.run())
                await machine.serial.expect("$", timeout=10)
                key.keys.put_nowait(ord("x"))
                await machine.serial.expect("x1", timeout=10)
                machine.stop()
                await run
                yield machine

        @pytest.mark.parametrize("number", range(4))
        async def test_counts_from_the_same_number(shell, number):
            assert boots == 1
            assert shell.serial.output == b""
            run = asyncio.create_task(shell.run())
            shell.devices["key"].keys.put_nowait(ord("k"))
            text = await shell.serial.expect("2", timeout=10)
            assert shell.memory.read(0x2000, 1) == b"\\x02"
            if number == 1:
                assert False
            if number == 2:
                run.cancel()

        @pytest.mark.asyncio(loop_scope="function")
        async def test_the_fixtures_still_work(boot):
            await boot(bytes.fromhex("f4")).run()

        async def test_boot_belongs_to_one_loop(boot):
            with pytest.raises(pytest.fail.Exception, match="another event loop"):
                boot(bytes.fromhex("f4"))
        """,
    )
    result.assert_outcomes(passed=5, failed=1)
