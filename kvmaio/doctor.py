"""What this host can do for kvmaio, as facts: found out by looking, trying and measuring.

`examine()` takes less than a second: it opens KVM, starts a throw-away machine in each
guest mode and times a few exits and kicks. Nothing of the host is changed.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from .loops import run
from .trials import Measurement, ModeResult, try_guests

if TYPE_CHECKING:
    from .kvm.promotion import Costs

__all__ = ["Capability", "Report", "Tool", "examine", "why_no_guest"]

DEVICE = "/dev/kvm"
SEABIOS = "/usr/share/seabios/bios.bin"

# name, what it is good for; each is asked of KVM by its number in the C core.
_CAPABILITIES = (
    ("IRQCHIP", "interrupt controllers in the kernel: firmware and several vCPUs need them"),
    ("PIT2", "the PC's timer in the kernel: firmware needs it"),
    ("SPLIT_IRQCHIP", "local APICs in the kernel, the rest as device models"),
    ("IRQFD", "a file descriptor raises an interrupt"),
    ("IOEVENTFD", "a guest's write rings a file descriptor, without an exit"),
    ("COALESCED_MMIO", "KVM batches memory-mapped writes that need no answer"),
    ("COALESCED_PIO", "KVM batches port writes that need no answer"),
    ("READONLY_MEM", "ROM: firmware needs it"),
    ("SYNC_REGS", "registers without a system call"),
    ("XSAVE2", "the whole floating-point and vector state"),
    ("SET_GUEST_DEBUG", "breakpoints and single steps"),
)


@attrs.frozen
class Capability:
    """One KVM_CAP_*: its value, 0 where it is missing."""

    name: str
    value: int
    purpose: str


@attrs.frozen
class Tool:
    """Something beside KVM: is it here, and what to do if not."""

    name: str
    found: str | None
    needed: bool
    purpose: str
    remedy: str


@attrs.define
class Report:
    """All the facts.

    Attributes:
        problem: why no guest can run, in one line with what to do; None if one can.
        cpu: what ``cpu="auto"`` is here, ``kvm`` or ``soft``.
        choice: why that, and what follows from it.
        kind: ``VMX``, ``SVM``, ``PVM`` or ``unknown``.
        nested: this host is itself a virtual machine.
        run_timer: what ends a timed run, and why that.
        instructions: whether a guest's instructions can be counted.
    """

    problem: str | None = None
    cpu: str = ""
    choice: str = ""
    kind: str = "unknown"
    nested: bool = False
    api_version: int | None = None
    max_vcpus: int | None = None
    device: str = ""
    user: str = ""
    run_timer: str = ""
    instructions: str = ""
    modes: list[ModeResult] = attrs.Factory(list)
    costs: list[Measurement] = attrs.Factory(list)
    capabilities: list[Capability] = attrs.Factory(list)
    tools: list[Tool] = attrs.Factory(list)

    @property
    def can_run(self) -> bool:
        """Can any guest run here?"""
        return self.problem is None and any(mode.how != "fails" for mode in self.modes)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"can_run": self.can_run, **attrs.asdict(self)}


def why_no_guest(cpu: str = "auto") -> str | None:
    """Why no guest can run here on `cpu`, in one line with what to do; None if one can."""
    try:
        from .kvm.host import usable
        from .soft.loader import why_not
    except ImportError as error:
        return f"kvmaio's C core is not built ({error}); install kvmaio with a C compiler at hand"
    no_kvm = usable() if cpu != "soft" else None
    if no_kvm is None and cpu != "soft":
        return None
    no_soft = why_not() if cpu != "kvm" else None
    if no_soft is None and cpu != "kvm":
        return None
    if cpu == "auto":
        return f"KVM: {no_kvm}. Software CPU: {no_soft}"
    return no_kvm or no_soft


def _choice(no_kvm: str | None, no_soft: str | None) -> tuple[str, str]:
    """Which CPU model ``cpu="auto"`` is here, and in words why and what follows."""
    if no_kvm is None and no_soft is None:
        return "kvm", (
            "KVM runs guests; an instruction that it cannot emulate is executed by the software CPU"
        )
    if no_kvm is None:
        return "kvm", (
            "KVM runs guests; where it cannot emulate an instruction, the guest ends "
            f"(software CPU: {no_soft})"
        )
    if no_soft is None:
        return "soft", (
            "the software CPU runs guests, since KVM is not usable: some 10 to 100 million "
            "instructions a second, exactly counted, one vCPU at a time, without AVX; no "
            'irqchip="kernel" or "split"'
        )
    return "", "none"


def examine() -> Report:
    """Look at the host. Raises nothing: what goes wrong is in the report."""
    report = Report(kind=_kind(), device=_describe_device(), user=_describe_user(), tools=_tools())
    report.problem = why_no_guest()
    if report.problem is not None:
        return report
    from .kvm.host import usable
    from .soft.loader import why_not

    report.cpu, report.choice = _choice(usable(), why_not())
    if report.cpu == "kvm":
        _look_at_kvm(report)
    report.modes, costs = run(try_guests())
    report.costs = [*costs, *report.costs]
    if not report.can_run:
        report.problem = f"no guest runs: {report.modes[0].problem}"
    return report


def _look_at_kvm(report: Report) -> None:
    from .kvm._native import lib
    from .kvm.counters import instruction_counting
    from .kvm.host import Kvm, is_virtual
    from .kvm.promotion import Costs
    from .kvm.run_timer import chosen_timer

    timer = chosen_timer()
    report.instructions = instruction_counting().reason
    report.nested = is_virtual()
    with Kvm.open() as kvm:
        shortest_ns = timer.resolution_ns + Costs.measured(kvm).shortest_run_ns
        report.run_timer = f"{timer.name}, from {shortest_ns / 1e3:.0f} µs on: {timer.reason}"
        report.api_version = lib.KVM_API_VERSION
        report.max_vcpus = kvm.capability(lib.KVM_CAP_MAX_VCPUS)
        report.capabilities = [
            Capability(name, kvm.capability(number), purpose)
            for name, purpose in _CAPABILITIES
            if (number := getattr(lib, f"KVM_CAP_{name}", None)) is not None
        ]
        report.costs.append(_cost_of_moving(Costs.measured(kvm)))


def _cost_of_moving(costs: Costs) -> Measurement:
    often = "as often as it pays" if costs.moves_are_cheap else "once, at the most"
    return Measurement(
        "move",
        round(costs.move_ns / 1e3, 1),
        "by how much an exit is dearer once a vCPU goes on in another thread; so one that exits "
        f"often moves to the event loop's thread, and back, {often}",
    )


# ---- looking -----------------------------------------------------------------------


def _describe_device() -> str:
    try:
        status = os.stat(DEVICE)
    except OSError as error:
        return f"{DEVICE}: {error.strerror}"
    owner = _name(pwd.getpwuid, status.st_uid)
    group = _name(grp.getgrgid, status.st_gid)
    return f"{stat.filemode(status.st_mode)} {owner}:{group}"


def _kind() -> str:
    try:
        from .kvm.host import kvm_kind
    except ImportError:
        return "unknown"
    return kvm_kind()


def _describe_user() -> str:
    groups = sorted(_name(grp.getgrgid, gid) for gid in {os.getegid(), *os.getgroups()})
    return f"{_name(pwd.getpwuid, os.geteuid())} (in {', '.join(groups)})"


def _name(lookup: Callable[[int], Any], number: int) -> str:
    try:
        return str(lookup(number)[0])
    except KeyError:
        return str(number)


def _tools() -> list[Tool]:
    return [
        Tool(
            "C core",
            _built_core(),
            True,
            "threads, KVM_RUN and kicks",
            "install kvmaio with a C compiler at hand: pip install -e .",
        ),
        Tool(
            "unicorn",
            _version("unicorn"),
            False,
            "the software CPU: guests without KVM, and what KVM cannot emulate",
            "pip install 'kvmaio[soft]'",
        ),
        Tool("uvloop", _version("uvloop"), False, "a faster event loop", "pip install uvloop"),
        Tool(
            "GNU as",
            shutil.which("as"),
            False,
            "assembler text in your own tests",
            "apt-get install binutils",
        ),
        Tool(
            "SeaBIOS",
            SEABIOS if Path(SEABIOS).exists() else None,
            False,
            "firmware to try: kvmaio run " + SEABIOS,
            "apt-get install seabios",
        ),
    ]


def _built_core() -> str | None:
    return next((p.name for p in Path(__file__).parent.glob("kvm/_native*.so")), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
