"""The command line of svmlab; what it means is in the package's docstring."""

import argparse
import re
import signal
import sys
from pathlib import Path
from types import FrameType

from . import __doc__ as manual
from .host import KERNELS, LabError, cache_dir, call, find_qemu, release
from .lab import Lab
from .setup import setup

__all__ = ["main"]

LAB_FAILED = 125


def main() -> int:
    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, leave)
    arguments = parser().parse_args()
    try:
        match arguments.action:
            case "setup":
                setup(arguments.kernel, force=arguments.force)
                return 0
            case "run":
                return lab(arguments).run()
            case _:
                print_info()
                return 0
    except LabError as error:
        print(f"svmlab: {error}", file=sys.stderr)
        return LAB_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def leave(signal_number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that QEMU is ended and the run's folder removed."""
    sys.exit(128 + signal_number)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="svmlab",
        usage="svmlab setup|run|info [options]; svmlab --help prints the manual",
        description=manual,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = top.add_subparsers(prog="svmlab", dest="action", required=True)

    setup = actions.add_parser("setup")
    setup.add_argument("--kernel", choices=KERNELS, default="6.1")
    setup.add_argument("--force", action="store_true")

    run = actions.add_parser("run")
    run.add_argument("--project", type=Path, default=Path())
    run.add_argument("--rw", type=Path, action="append", default=[])
    run.add_argument("--timeout", type=float, default=600)
    run.add_argument("--boot-timeout", type=float, default=120)
    run.add_argument("--smp", type=int, default=2)
    run.add_argument("--mem", type=int, default=2048)
    run.add_argument("--kernel", choices=KERNELS, default="6.1")
    run.add_argument("--cpu", default="max,la57=off")
    run.add_argument("--kvm", default="")
    run.add_argument("--kvm-amd", default="")
    run.add_argument("--env", type=variable, action="append", default=[])
    run.add_argument("--keep", action="store_true")
    run.add_argument("-v", "--verbose", action="store_true")
    run.add_argument("command", nargs="+")

    actions.add_parser("info")
    return top


def variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise argparse.ArgumentTypeError(f"wants NAME=VALUE, not {text!r}")
    return name, value


def lab(arguments: argparse.Namespace) -> Lab:
    return Lab(
        command=arguments.command,
        project=arguments.project.resolve(),
        writable=[folder.resolve() for folder in arguments.rw],
        series=arguments.kernel,
        timeout_s=arguments.timeout,
        boot_timeout_s=arguments.boot_timeout,
        processors=arguments.smp,
        memory_mib=arguments.mem,
        cpu_model=arguments.cpu,
        module_options={"kvm": arguments.kvm, "kvm_amd": arguments.kvm_amd},
        variables=dict(arguments.env),
        keep=arguments.keep,
        verbose=arguments.verbose,
    )


def print_info() -> None:
    print("cache:", cache_dir())
    qemu = find_qemu()
    print("qemu:", call(qemu, "--version").splitlines()[0] if qemu else "missing")
    for series in KERNELS:
        print(f"kernel {series}:", release(series) or "not set up")
