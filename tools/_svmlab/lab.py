"""`svmlab run`: one boot of the lab, one command in it."""

import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .host import LabError, find_qemu, kernel_dir, release
from .initramfs import initramfs

__all__ = ["Lab"]

PASSED_ON = re.compile(
    r"PATH|HOME|USER|LANG|LC_\w+|TERM|TZ|VIRTUAL_ENV|PYENV_\w+|PYTHON\w+"
)  # environment variables that go along
KERNEL_TROUBLE = re.compile(r"WARNING:|BUG:|Oops|Kernel panic|kvm.*(unhandled|error)")
KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog tsc=reliable norandmaps "
    "rcupdate.rcu_cpu_stall_suppress=1 random.trust_cpu=on"
)
TIMED_OUT = 124
PR_SET_PDEATHSIG = 1


# A VM that lives as long as the lab. KVM switches branches of the running kernel on with the
# first VM or vCPU and off with the last; where code is changed under the feet of another
# processor, QEMU's emulation now and then runs half of the old: "Oops: int3", or a freeze.
KEEPER = """
import fcntl, os, time
KVM_CREATE_VM, KVM_CREATE_VCPU = 0xAE01, 0xAE41
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
if os.fork() == 0:
    time.sleep(1 << 30)
"""


@dataclass
class Lab:
    """What the lab is to be, and what it is to run."""

    command: list[str]
    project: Path
    writable: list[Path]
    series: str
    timeout_s: float
    boot_timeout_s: float
    processors: int
    memory_mib: int
    cpu_model: str
    module_options: Mapping[str, str]
    variables: Mapping[str, str]
    keep: bool
    verbose: bool
    work: Path = field(init=False)  # this run's folder: control files, console, QEMU's errors

    def run(self) -> int:
        """Boot, run the command, print its output; its exit code, or 124."""
        for folder in (self.project, *self.writable):
            if not folder.is_dir():
                raise LabError(f"{folder} is not a folder")
        qemu = find_qemu()
        if not qemu or not release(self.series):
            raise LabError(f"not set up: first run '{sys.argv[0]} setup --kernel {self.series}'")
        with self.work_folder():
            self.write_control_files()
            with self.qemu([qemu, *self.qemu_arguments()]) as process:
                return self.supervise(process)

    @contextmanager
    def work_folder(self) -> Iterator[None]:
        self.work = Path(tempfile.mkdtemp(prefix="svmlab-"))
        keep = self.keep
        try:
            yield
        except LabError:
            keep = True
            raise
        finally:
            if keep:
                print(f"svmlab: kept {self.work}", file=sys.stderr)
            else:
                shutil.rmtree(self.work, ignore_errors=True)

    # What goes in

    def write_control_files(self) -> None:
        """What init.sh reads, and the archive it comes in."""
        control = self.work / "lab"
        control.mkdir()
        (control / "rw").write_text("".join(octal_escaped(path) + "\n" for path in self.writable))
        (control / "run.sh").write_text(self.script())
        archive = initramfs(kernel_dir(self.series), self.module_options)
        (self.work / "initrd").write_bytes(archive)

    def script(self) -> str:
        inherited = {name: v for name, v in os.environ.items() if PASSED_ON.fullmatch(name)}
        variables = inherited | dict(self.variables) | {"SVMLAB": "1"}
        exports = [f"export {name}={shlex.quote(v)}" for name, v in sorted(variables.items())]
        enter = f"cd {shlex.quote(str(self.project))} || exit 125"
        keeper = f"{shlex.join([sys.executable, '-c', KEEPER])} </dev/null >/dev/null 2>&1"
        return "\n".join([*exports, keeper, enter, f"exec {shlex.join(self.command)}", ""])

    def qemu_arguments(self) -> Iterator[str]:
        yield from ("-name", "svmlab", "-no-user-config", "-nodefaults", "-display", "none")
        yield from ("-no-reboot", "-M", "pc", "-accel", "tcg,thread=multi")
        yield from ("-cpu", self.cpu_model)
        yield from ("-smp", str(self.processors), "-m", str(self.memory_mib))
        yield from ("-kernel", str(kernel_dir(self.series) / "vmlinux"))
        yield from ("-initrd", str(self.work / "initrd"), "-append", KERNEL_COMMAND_LINE)
        yield from ("-serial", f"file:{self.work}/console.log")
        yield from ("-device", "virtio-serial-pci", "-chardev", "stdio,id=out,signal=off")
        yield from ("-device", "virtserialport,chardev=out,name=out")
        yield from shared_folder("root", Path("/"), ",readonly=on")
        yield from shared_folder("lab", self.work / "lab")
        for number, folder in enumerate(self.writable):
            yield from shared_folder(f"rw{number}", folder)

    # What comes out

    @contextmanager
    def qemu(self, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        with open(self.work / "qemu.log", "wb") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # held open: QEMU drops the output port at its end
                stdout=subprocess.PIPE,
                stderr=errors,
                preexec_fn=end_with_parent,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def supervise(self, process: subprocess.Popen[bytes]) -> int:
        """Pass output on and watch the clocks until QEMU ends."""
        reader = threading.Thread(target=pass_output_on, args=[process], daemon=True)
        reader.start()
        started = time.monotonic()
        booted: float | None = None
        while process.poll() is None:
            now = time.monotonic()
            if booted is None and (self.work / "lab/booted").exists():
                booted = now
            if booted is None and now > started + self.boot_timeout_s:
                raise LabError(
                    f"the lab did not boot in {self.boot_timeout_s:g} s (see --boot-timeout); "
                    f"its console ended with\n{last_lines(self.work / 'console.log')}"
                )
            if booted is not None and now > booted + self.timeout_s:
                print(
                    f"svmlab: the command ran past {self.timeout_s:g} s and was ended "
                    "(see --timeout)",
                    file=sys.stderr,
                )
                return TIMED_OUT
            time.sleep(0.05)
        reader.join(5)
        self.report_kernel_trouble()
        if self.verbose and booted is not None:
            boot_s, command_s = booted - started, time.monotonic() - booted
            print(f"svmlab: boot {boot_s:.1f} s, command {command_s:.1f} s", file=sys.stderr)
        return self.exit_code(process)

    def report_kernel_trouble(self) -> None:
        console = self.work / "console.log"
        text = console.read_text(errors="replace") if console.exists() else ""
        for line in text.splitlines():
            if KERNEL_TROUBLE.search(line):
                print("svmlab: the lab's kernel said:", line.strip(), file=sys.stderr)

    def exit_code(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return int((self.work / "lab/rc").read_text())
        except (OSError, ValueError):
            raise LabError(
                f"the lab ended without a result (QEMU's exit code {process.returncode}); "
                f"QEMU said\n{last_lines(self.work / 'qemu.log', 8)}\n"
                f"and the console ended with\n{last_lines(self.work / 'console.log')}"
            ) from None


def octal_escaped(path: Path) -> str:
    return "".join(f"\\0{byte:03o}" for byte in os.fsencode(path))


def shared_folder(tag: str, path: Path, options: str = "") -> Iterator[str]:
    place = str(path).replace(",", ",,")  # QEMU's way to escape a comma
    yield from (
        "-fsdev",
        f"local,id={tag},path={place},security_model=none,multidevs=remap{options}",
        "-device",
        f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
    )


def end_with_parent() -> None:
    """In QEMU's process: a group of its own, and it ends when svmlab ends."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def pass_output_on(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    while data := os.read(process.stdout.fileno(), 65536):
        while data:
            data = data[os.write(1, data) :]


def last_lines(path: Path, count: int = 25) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return "    (none)"
    return "\n".join(f"    {line}" for line in lines[-count:]) or "    (empty)"
