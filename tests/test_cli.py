"""``kvmaio run`` and ``demo`` as a user has them: as a process, by exit status and output."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kvmaio.bench import FAMILIES
from kvmaio.cli import commands
from kvmaio.cli.run import Address
from tests.plugin_summary import kvm_flavour, why_not_soft

KVMAIO = Path(sys.executable).parent / "kvmaio"
SEABIOS = Path("/usr/share/seabios/bios.bin")
MEMTEST = Path("/boot/memtest86+x64.bin")
TIME_LIMIT_S = 250  # for emulated hardware; elsewhere the suite's own limit comes first
NOBODY = 65534

# These say little about the kind of KVM: not under emulated hardware, where a process that
# imports kvmaio takes ten seconds to start.
ONCE = pytest.mark.slow

# Guests, in 16-bit real mode unless said otherwise; "out imm8, al" is e6, to 0xf4 the debug exit.
HALT = b"\xf4"
SPIN = b"\xeb\xfe"
EXIT_0 = b"\xb0\x00\xe6\xf4"  # mov al, 0; out 0xf4, al: status 1
EXIT_5 = b"\xb0\x05\xe6\xf4"  # mov al, 5; out 0xf4, al
READ_0X60 = b"\xe4\x60\xf4"  # in al, 0x60
TRIPLE_FAULT = b"\x0f\x0b"  # ud2, in the modes without an IDT
SSE = b"\x0f\x58\xc1\xf4"  # addps xmm0, xmm1; hlt
#   next: mov dx, 0x3fd; wait: in al, dx; test al, 1; jz wait;
#   mov dx, 0x3f8; in al, dx; out dx, al; cmp al, '!'; jne next; hlt
ECHO = bytes.fromhex("bafd03 ec a801 74fb baf803 ec ee 3c21 75ef f4")


def prints(text: bytes, then: bytes, port: int = 0x3F8) -> bytes:
    """A guest that prints byte by byte: mov dx, port; then mov al, byte; out dx, al for each."""
    letters = b"".join(b"\xb0" + bytes((letter,)) + b"\xee" for letter in text)
    return b"\xba" + port.to_bytes(2, "little") + letters + then


@pytest.fixture
def image(tmp_path):
    """A function that makes an image file of bytes."""

    def make(code: bytes, name: str = "guest.bin") -> str:
        path = tmp_path / name
        path.write_bytes(code)
        return str(path)

    return make


def kvmaio(*arguments: str, stdin: bytes | None = None, **options) -> subprocess.CompletedProcess:
    """Run the command; without `stdin` there is none."""
    source = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(
        [KVMAIO, *arguments], capture_output=True, timeout=TIME_LIMIT_S, **source, **options
    )


def error_line(result: subprocess.CompletedProcess) -> str:
    """The one line on standard error."""
    lines: list[str] = result.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("kvmaio: ")
    return lines[0]


# ---- exit statuses -------------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize("mode", ["real16", "prot32", "long64", "user64"])
def test_halted_guest_exits_0(image, mode):
    result = kvmaio("run", image(HALT), "--mode", mode)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


@pytest.mark.kvm
def test_debug_exit_gives_its_own_code(image):
    assert kvmaio("run", image(EXIT_5)).returncode == 5 << 1 | 1


@pytest.mark.kvm
@pytest.mark.parametrize("mode", ["real16", "user64"])
def test_timeout_of_a_spinning_guest_exits_124(image, mode):
    result = kvmaio("run", image(SPIN), "--mode", mode, "--timeout", "0.3")
    assert result.returncode == 124
    assert error_line(result) == (
        "kvmaio: no end after 0.3 s (cpu0 at rip 0x1000); --timeout gives it longer"
    )


@ONCE
@pytest.mark.kvm
def test_usage_error_exits_2_with_a_hint(image):
    result = kvmaio("run", image(HALT), "--timeot", "3")
    assert result.returncode == 2
    assert b"kvmaio run --help" in result.stderr
    assert b"--timeout" in result.stderr


@ONCE
def test_unknown_options_are_usage_errors(image):
    path = image(HALT)
    for option in ("--balloon=1",):
        result = kvmaio("run", path, option)
        assert (result.returncode, b"No such option" in result.stderr) == (2, True)


@ONCE
@pytest.mark.parametrize(
    "option", ["--timeout=nan", "--timeout=inf", "--timeout=-1", "--timeout=x"]
)
def test_times_that_never_come_are_usage_errors(image, option):
    result = kvmaio("run", image(SPIN), option)
    assert result.returncode == 2
    name, _, value = option.partition("=")
    problem = f"Invalid value for '{name}': '{value}' is no number above 0; write it like 2.5"
    assert problem in result.stderr.decode()


@ONCE
@pytest.mark.parametrize("address", ["1:2:3", "x", "1:", ":70000", "localhost:²"])
def test_addresses_that_cannot_be_are_usage_errors(image, address):
    result = kvmaio("run", image(SPIN), "--gdb", address)
    problem = f"Invalid value for '--gdb': '{address}' is no [HOST:]PORT; write it like 1234"
    assert (result.returncode, problem in result.stderr.decode()) == (2, True)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("1234", ("127.0.0.1", 1234)),
        (":0", ("127.0.0.1", 0)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:80", ("::1", 80)),
        ("fe80::1%eth0:80", ("fe80::1%eth0", 80)),
    ],
)
def test_addresses(text, address):
    assert Address().convert(text, None, None) == address


@ONCE
def test_interrupted_while_modules_are_imported_it_ends_without_a_traceback(tmp_path):
    (tmp_path / "attrs.py").write_text(
        "import time; print('importing', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [KVMAIO, "run", "image"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=TIME_LIMIT_S)
    assert (process.returncode, output, errors) == (-signal.SIGINT, b"", b"")


@ONCE
@pytest.mark.kvm
@pytest.mark.parametrize("time_is", ["wall", "simulated"])
def test_interrupted_while_its_guest_runs_it_exits_130(image, time_is):
    with subprocess.Popen(
        [KVMAIO, "run", image(prints(b"up\n", SPIN)), "--time", time_is],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=TIME_LIMIT_S)
    assert (process.returncode, output, errors.strip()) == (130, b"", b"")


@ONCE
@pytest.mark.kvm
def test_terminated_run_exits_143(image):
    code = prints(b"up\n", SPIN)
    with subprocess.Popen([KVMAIO, "run", image(code)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.terminate()
        assert process.wait(TIME_LIMIT_S) == 128 + signal.SIGTERM


# ---- console -----------------------------------------------------------------------


@pytest.mark.kvm
def test_uart_and_debug_ports_print_to_standard_output_in_order(image):
    code = prints(b"one ", b"") + prints(b"two ", b"", 0x402) + prints(b"three", HALT, 0xE9)
    result = kvmaio("run", image(code))
    assert (result.returncode, result.stdout, result.stderr) == (0, b"one two three", b"")


@ONCE
@pytest.mark.kvm
def test_until_ends_the_run_also_across_writes_and_ports(image):
    code = prints(b"log", b"") + prints(b"in: and more", SPIN, 0x402)
    result = kvmaio("run", image(code), "--until", "login:")
    assert result.returncode == 0
    assert result.stdout.startswith(b"login:")


@ONCE
@pytest.mark.kvm
def test_until_counts_more_than_how_the_guest_ends(image):
    result = kvmaio("run", image(prints(b"done", EXIT_5, 0x402)), "--until", "done")
    assert (result.returncode, result.stdout) == (0, b"done")


@ONCE
@pytest.mark.kvm
def test_until_that_never_comes_leaves_the_guests_status(image):
    assert kvmaio("run", image(prints(b"don", EXIT_5)), "--until", "done").returncode == 11


@ONCE
@pytest.mark.kvm
def test_standard_input_reaches_the_uart_unharmed(image):
    text = b"longer than the sixteen bytes of a FIFO, and to the end!"
    result = kvmaio("run", image(ECHO), stdin=text)
    assert (result.returncode, result.stdout) == (0, text)


@ONCE
@pytest.mark.kvm
def test_no_reader_of_standard_output_ends_the_run(image):
    reader, writer = os.pipe()
    os.close(reader)
    code = prints(b"some text that nobody reads", SPIN)
    result = subprocess.run(
        [KVMAIO, "run", image(code)],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=TIME_LIMIT_S,
    )
    os.close(writer)
    assert result.returncode == 1
    assert error_line(result) == "kvmaio: nobody reads standard output any more"


@ONCE
@pytest.mark.kvm
def test_closed_standard_descriptors_do_no_harm(image):
    command = f"exec {KVMAIO} run {image(prints(b'text', EXIT_5))} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=TIME_LIMIT_S).returncode == 11


@ONCE
@pytest.mark.kvm
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_reader_that_is_stuck_does_not_hold_up_the_end(image, number):
    with stuck_pipe() as (_, writer):
        command = [KVMAIO, "run", image(prints(b"text", SPIN)), "--verbose"]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE
        ) as process:
            assert process.stderr is not None
            process.stderr.readline()  # it is about to run
            time.sleep(0.5)
            process.send_signal(number)
            assert process.wait(TIME_LIMIT_S) == 128 + number


@contextmanager
def stuck_pipe() -> Iterator[tuple[int, int]]:
    """A full pipe that nobody empties: its reading and its writing end."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


@ONCE
@pytest.mark.kvm
def test_a_slow_reader_gets_all_of_it(image):
    """Also of a guest that ends with status 1."""
    text = b"0123456789" * 20
    command = f"{KVMAIO} run {image(prints(text, EXIT_0))}; echo $? >&2"
    with (
        stuck_pipe() as (reader, writer),
        subprocess.Popen(
            ["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE
        ) as process,
    ):
        time.sleep(1.5)
        shown = b""
        while not shown.endswith(text):
            shown += os.read(reader, 4096)
        _, errors = process.communicate(timeout=TIME_LIMIT_S)
    assert errors == b"1\n"


@ONCE
@pytest.mark.kvm
def test_full_device_is_one_line(image):
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [KVMAIO, "run", image(prints(b"text", HALT))],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=TIME_LIMIT_S,
        )
    assert result.returncode == 1
    assert error_line(result) == "kvmaio: No space left on device"


# ---- images ------------------------------------------------------------------------


@ONCE
@pytest.mark.kvm
@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_image_may_come_from_standard_input(name):
    result = kvmaio("run", name, "--mode", "real16", stdin=prints(b"piped", HALT))
    assert (result.returncode, result.stdout) == (0, b"piped")


@ONCE
@pytest.mark.kvm
def test_image_may_be_a_fifo(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = [KVMAIO, "run", fifo, "--mode", "real16"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        fifo.write_bytes(prints(b"through a fifo", HALT))
        output, _ = process.communicate(timeout=TIME_LIMIT_S)
    assert (process.returncode, output) == (0, b"through a fifo")


@pytest.mark.kvm
@pytest.mark.skipif(not SEABIOS.exists(), reason=f"no {SEABIOS}: apt-get install seabios")
@pytest.mark.parametrize("vcpus", ["1", "2"])
def test_seabios_runs_to_no_bootable_device(vcpus):
    """With KVM's interrupt controllers, and with kvmaio's; it says the same about both."""
    texts = []
    for irqchip in ("kernel", "devices"):
        result = kvmaio(
            *("run", str(SEABIOS), "--kind", "firmware", "--until", "Retrying in 60 seconds."),
            *("--vcpus", vcpus, "--irqchip", irqchip, "--timeout", "45"),
        )
        assert (result.returncode, result.stderr) == (0, b"")
        assert result.stdout.startswith(b"SeaBIOS (version ")
        assert f"Found {vcpus} cpu(s)".encode() in result.stdout
        assert b"RamSize: 0x04000000" in result.stdout
        assert b"No bootable device" in result.stdout
        texts.append(_seabios_text(result.stdout))
    assert texts[0] == texts[1]


@pytest.mark.soft
@pytest.mark.skipif(not SEABIOS.exists(), reason=f"no {SEABIOS}: apt-get install seabios")
@pytest.mark.parametrize("time", ["wall", "simulated"])
def test_seabios_with_two_software_cpus_that_spin_on_a_lock(time):
    result = kvmaio(
        *("run", str(SEABIOS), "--kind", "firmware", "--until", "No bootable device"),
        *("--cpu", "soft", "--vcpus", "2", "--time", time, "--timeout", "45"),
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"Found 2 cpu(s)" in result.stdout
    # The time stamp counter, measured by the PC's timer: 1 GHz is the clock that is emulated.
    mhz = re.search(rb"CPU Mhz=(\d+)", result.stdout)
    assert mhz is not None and int(mhz[1]) > 0
    assert time == "wall" or int(mhz[1]) in (999, 1000, 1001)


@pytest.mark.soft
@pytest.mark.skipif(not MEMTEST.exists(), reason=f"no {MEMTEST}: apt-get install memtest86+")
def test_memtest86_shows_its_screen_on_the_software_cpu_alone():
    """It measures the time stamp counter by the PC's timer before it draws anything."""
    result = kvmaio(
        *("run", str(MEMTEST), "--append", "console=ttyS0,115200", "--memory", "16M"),
        *("--cpu", "soft", "--until", "Errors: 0", "--timeout", "45"),
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"Memory  :   16MB" in result.stdout


def _seabios_text(output: bytes) -> list[bytes]:
    """Its lines, but for the measured clock, and sorted, as its threads take turns by time."""
    return sorted(line for line in output.splitlines() if not line.startswith(b"CPU Mhz="))


@pytest.mark.kvm
@pytest.mark.skipif(not MEMTEST.exists(), reason=f"no {MEMTEST}: apt-get install memtest86+")
def test_memtest86_shows_its_screen_of_results():
    """A bzImage in 64-bit mode, with the PC's timer; its screen is drawn on the serial port."""
    result = kvmaio(
        *("run", str(MEMTEST), "--append", "console=ttyS0,115200", "--memory", "16M"),
        *("--until", "Errors: 0", "--timeout", "45", "--stats", "json"),
    )
    if why_not_soft() and b"KVM cannot emulate an instruction: bytes 9b" in result.stderr:
        pytest.skip(
            f"this host's KVM cannot emulate FWAIT, and nothing assists it: {why_not_soft()}"
        )
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert b"Memtest86+ v" in result.stdout
    assert b"Memory  :   16MB" in result.stdout
    assists = json.loads(line)["cpu0"]["numAssists"]
    assert assists > 0 or kvm_flavour() != "PVM"


# ---- statistics and verbosity ----------------------------------------------------------


@ONCE
@pytest.mark.kvm
def test_statistics_as_json_are_the_last_line_on_standard_error(image):
    result = kvmaio("run", image(prints(b"abc", HALT)), "--stats", "json")
    stats = json.loads(result.stderr.splitlines()[-1])["cpu0"]
    assert (stats["numIO"], stats["numHalt"], stats["numInsts"]) == (3, 1, None)


@ONCE
@pytest.mark.kvm
@pytest.mark.parametrize("arguments", [("--stats", "{image}"), ("{image}", "--stats", "text")])
def test_statistics_as_text_have_unit_and_description(image, arguments):
    path = image(HALT)
    result = kvmaio("run", *(argument.format(image=path) for argument in arguments))
    assert result.returncode == 0
    row = next(line for line in result.stderr.decode().splitlines() if "numHalt" in line)
    assert row.split() == ["numHalt", "1", "Count", "exits", "for", "HLT"]


@ONCE
@pytest.mark.kvm
def test_verbose_shows_registers_with_an_error(image):
    result = kvmaio("run", image(b"\x66\xb8\x34\x12\x00\x00" + READ_0X60), "--verbose")
    assert result.returncode == 1
    assert b"rax 0x0000000000001234" in result.stderr


# ---- bad input -----------------------------------------------------------------------


BAD_INPUTS: dict[str, tuple[bytes, Sequence[str], int, Sequence[str]]] = {
    "text": (b"This is no image.\n", (), 2, ["is text, not an image", "--mode"]),
    "empty": (b"", (), 2, ["is empty"]),
    "not ELF": (HALT, ("--kind", "elf"), 2, ["not an ELF file"]),
    "not Multiboot": (HALT, ("--kind", "multiboot"), 2, ["not a Multiboot kernel"]),
    "not firmware": (HALT, ("--kind", "firmware"), 2, ["multiple of 4096"]),
    "larger than memory": (
        bytes(1 << 20),
        ("--mode", "prot32", "--memory", "1M"),
        2,
        ["does not fit at 0x1000..0x100fff", "give the machine at least 2M"],
    ),
    "more memory than the host": (
        HALT,
        ("--memory", "1000T"),
        2,
        ["1024000.0 GiB of guest memory", "less memory"],
    ),
    "no size": (HALT, ("--memory", "lots"), 2, ["'lots' is no size", "64M"]),
    "no memory": (HALT, ("--memory", "0"), 2, ["must be greater than 0"]),
    "too many vCPUs": (HALT, ("--vcpus", "100000"), 2, ["100000 vCPUs", "allows"]),
    "address beyond real mode": (HALT, ("--address", "0x20000"), 2, ["must be below 0x10000"]),
    "option of another kind": (HALT, ("--append", "x"), 2, ["--append", "multiboot"]),
    "unmapped read": (
        READ_0X60,
        (),
        1,
        ["read pio 0x60 (1 byte)", "nothing", "cpu0, rip 0x100", "kvmaio run --help"],
    ),
    "unmapped write": (b"\xe7\x60", (), 1, ["wrote 0x0 to pio 0x60 (2 bytes)"]),
    "triple fault": (TRIPLE_FAULT, ("--mode", "long64"), 1, ["triple fault", "--verbose"]),
    "triple fault in user mode": (
        TRIPLE_FAULT,
        ("--mode", "user64"),
        1,
        ["triple fault", "#UD", "rip 0x1000"],
    ),
}


@pytest.mark.kvm
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=ONCE if bad[2] == 2 else ()) for name, bad in BAD_INPUTS.items()],
)
def test_bad_input_is_one_line_that_says_what_to_do(image, name):
    code, options, status, words = BAD_INPUTS[name]
    result = kvmaio("run", image(code), *options, "--timeout", "20")
    line = error_line(result)
    assert [word for word in words if word not in line] == [], line
    assert result.returncode == status


@pytest.mark.kvm
def test_emulation_failure_shows_the_instruction(image):
    """SSE at CPL 0 fails under PVM; elsewhere it runs."""
    result = kvmaio("run", image(SSE), "--mode", "long64", "--cpu", "kvm")
    if not Path("/sys/module/kvm_pvm").exists():
        assert result.returncode == 0
        return
    assert result.returncode == 1
    line = error_line(result)
    assert "KVM cannot emulate an instruction: bytes 0f 58 c1" in line
    assert "(cpu0, rip 0x1000); `kvmaio doctor`" in line


@ONCE
def test_missing_file_and_directory_are_usage_errors(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        result = kvmaio("run", str(path))
        assert result.returncode == 2
        assert str(path).encode() in result.stderr


# Another user may not even be allowed to read Python's own files: so first everything is imported.
AS_NOBODY = f"""
import os, sys
import email.parser  # for importlib.metadata
import kvmaio.cli, kvmaio.demo, kvmaio.kvm.host
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
kvmaio.cli.main(sys.argv[1:])
"""


@ONCE
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("command", ["run - --mode real16 --cpu kvm", "demo", "doctor"])
def test_no_permission_on_dev_kvm_says_what_to_do(command):
    """Or goes on without KVM, where the software CPU is installed."""
    exists = os.path.exists("/dev/kvm")
    if exists and os.stat("/dev/kvm").st_mode & 0o006:
        pytest.skip("everyone may use this /dev/kvm")
    result = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *command.split()],
        input=HALT,
        capture_output=True,
        timeout=TIME_LIMIT_S,
        env=os.environ | {"COLUMNS": "500"},
    )
    if why_not_soft() is None and "kvm" not in command:
        assert result.returncode == 0
        if command == "doctor":
            assert "the software CPU runs guests" in result.stdout.decode()
        return
    assert result.returncode == 1
    text = result.stdout.decode() if command == "doctor" else error_line(result)
    assert "open /dev/kvm: " in text
    if exists:
        assert 'Permission denied [EACCES]; is this user in the group "kvm"?' in text


# ---- a terminal ----------------------------------------------------------------------


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments: str, program: str | Path = KVMAIO) -> None:
        pid, self.fd = pty.fork()
        if pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(program, [str(program), *arguments])
        self.pid = pid
        self.before = termios.tcgetattr(self.fd)
        self.shown = b""

    def expect(self, text: bytes) -> None:
        deadline = time.monotonic() + TIME_LIMIT_S
        while text not in self.shown:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, self.shown
            self.shown += os.read(self.fd, 4096)

    def wait(self) -> int:
        deadline = time.monotonic() + TIME_LIMIT_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        raise AssertionError(f"it does not end; shown: {self.shown!r}")

    def drained(self) -> bytes:
        """All that was shown, once the command has ended."""
        while select.select([self.fd], [], [], 0)[0]:
            try:
                self.shown += os.read(self.fd, 4096)
            except OSError:  # nobody has it open any more
                break
        return self.shown

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@pytest.mark.kvm
@pytest.mark.parametrize("mode", ["real16", "user64"])
def test_ctrl_c_ends_a_spinning_guest_and_restores_the_terminal(image, mode):
    #   mov edx, 0x3f8; mov al, '>'; out dx, al; jmp $
    in_64_bits = bytes.fromhex("baf8030000 b03e ee ebfe")
    code = in_64_bits if mode == "user64" else prints(b">", SPIN)
    with Terminal("run", image(code), "--mode", mode) as terminal:
        terminal.expect(b">")
        assert termios.tcgetattr(terminal.fd)[3] & (termios.ECHO | termios.ICANON) == 0
        os.write(terminal.fd, b"\x03")
        assert terminal.wait() == 130
        assert termios.tcgetattr(terminal.fd) == terminal.before


@ONCE
@pytest.mark.kvm
def test_keys_reach_the_guest_one_by_one(image):
    with Terminal("run", image(prints(b">", ECHO))) as terminal:
        terminal.expect(b">")
        os.write(terminal.fd, b"x")
        terminal.expect(b">x")  # by the guest's echo: the terminal's is off
        os.write(terminal.fd, b"\r!")
        terminal.expect(b">x\r!")
        assert terminal.wait() == 0
        assert termios.tcgetattr(terminal.fd) == terminal.before


@pytest.mark.kvm
def test_ctrl_c_while_the_guest_sleeps_in_the_kernel(image):
    """With KVM's interrupt controllers HLT makes no exit."""
    with Terminal("run", image(prints(b">", HALT)), "--irqchip", "kernel") as terminal:
        terminal.expect(b">")
        os.write(terminal.fd, b"\x03")
        assert terminal.wait() == 130


@ONCE
def test_an_image_from_the_terminal_is_refused():
    with Terminal("run", "-") as terminal:
        terminal.expect(b"standard input, and that is a terminal")
        assert terminal.wait() == 2


# ---- the other commands ----------------------------------------------------------------


def every_command(group: click.Group = commands, path: tuple[str, ...] = ()) -> list[str]:
    """All commands and groups, as they are typed."""
    found = [" ".join(path)]
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += every_command(command, (*path, name))
        else:
            found.append(" ".join((*path, name)))
    return found


@pytest.mark.parametrize("command", every_command())
def test_help_has_an_example_and_a_wrong_option_a_hint(command):
    helped = CliRunner().invoke(commands, [*command.split(), "--help"], prog_name="kvmaio")
    assert helped.exit_code == 0
    assert re.search(rf"Example(s:\n|:) +kvmaio {command}", helped.output)
    wrong = CliRunner().invoke(commands, [*command.split(), "--hlp"], prog_name="kvmaio")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert f"Try '{' '.join(('kvmaio', *command.split()))} --help'" in wrong.stderr
    assert re.search(r"No such option '--hlp'\..*'--help'", wrong.stderr)


def test_wrong_names_get_a_hint():
    for arguments, hint in {
        ("rnu",): "Did you mean 'run'?",
        ("checkpoint", "inf"): "Did you mean 'info'?",
        ("bench", "exit"): "'exit' is none of exits, compute,",
        ("registers", "nowhere:Uart"): "No module named 'nowhere'",
        ("run", "--timeot", "3", "x.bin"): "'--timeout'",
    }.items():
        result = CliRunner().invoke(commands, arguments)
        assert (result.exit_code, hint in result.stderr) == (2, True), result.stderr


def test_the_help_of_bench_names_every_benchmark():
    text = CliRunner().invoke(commands, ["bench", "--help"]).output
    assert [name for name in FAMILIES if not re.search(rf"\b{name}\b", text)] == []


@ONCE
def test_version():
    assert kvmaio("--version").stdout.startswith(b"kvmaio 0.")


@pytest.mark.kvm
def test_demo_shows_that_the_loop_goes_on_while_the_guest_waits():
    result = kvmaio("demo", env=os.environ | {"COLUMNS": "200"})
    text = result.stdout.decode()
    assert (result.returncode, result.stderr) == (0, b"")
    assert "Hello from a guest whose device takes its time." in text
    assert "RunningMMIOPending" in text
    assert "numIO" in text
