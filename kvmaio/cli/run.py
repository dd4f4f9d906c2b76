"""``kvmaio run``: its options, and one run from the image to the exit status."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from ipaddress import IPv6Address
from typing import Any, Literal

import attrs
import click

from ..boot import FaultFrame, Image
from ..checkpoint import Checkpoint
from ..doctor import why_no_guest
from ..exits import Exited, Halted, Outcome, Shutdown, Stopped
from ..loops import run as run_on_loop
from ..machine import Machine
from .board import build_board
from .console import StandardConsole
from .image import KINDS, PC_KINDS, ImageChoice, read_image
from .live import live
from .repeat import Repeat
from .reports import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TIMEOUT, explain, say, show_statistics
from .resume import BOARD_FROM_CHECKPOINT, check_board, check_can_save, load, save

__all__ = ["run"]

STATISTICS = ("text", "json")
TIMES = ("wall", "simulated")
MODES = ("real16", "prot32", "long64", "user64")


class Number(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since 8.2
    """A whole number, in decimal or, with 0x, in hexadecimal."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(value, 0) if isinstance(value, str) else int(value)
        except ValueError:
            self.fail(f"{value!r} is no number; write it like 4096 or 0x1000", param, ctx)


class Address(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Where to listen: ``1234`` or ``0.0.0.0:1234``; by default only on this computer."""

    name = "address"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        host, _, port = str(value).rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        is_port = port.isascii() and port.isdecimal() and int(port) <= 0xFFFF
        if not is_port or (":" in host and not _is_ipv6(host)):
            self.fail(f"{value!r} is no [HOST:]PORT; write it like 1234", param, ctx)
        return host or "127.0.0.1", int(port)


class Positive(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A finite number above 0, such as ``2.5``."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            self.fail(f"{value!r} is no number above 0; write it like 2.5", param, ctx)
        return number


def _is_ipv6(host: str) -> bool:
    try:
        IPv6Address(host.partition("%")[0])
    except ValueError:
        return False
    return True


class RunCommand(click.Command):
    """Lets ``--stats`` stand alone, also right before the image."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        followers = [*args[1:], ""][: len(args)]
        args = [
            "--stats=text" if arg == "--stats" and follower not in STATISTICS else arg
            for arg, follower in zip(args, followers, strict=True)
        ]
        return super().parse_args(ctx, args)


@attrs.frozen(kw_only=True)
class Options:
    """The options as typed."""

    image: ImageChoice
    from_: Checkpoint | None
    repeat: Repeat
    save: str | None
    memory: str | int
    vcpus: int
    cpu: str
    irqchip: str | None
    timeout: float | None
    until: str | None
    stats: str | None
    trace: str | None
    trace_filter: str | None
    gdb: tuple[str, int] | None
    live: bool
    verbose: bool


@attrs.frozen(kw_only=True)
class Ending:
    """How it ended.

    Attributes:
        status: the exit status.
        message: a line for standard error.
        details: more of it, on request.
        by_itself: nobody ended it from outside; then a slow reader gets all of the output.
        failed: by an error, so that there is nothing to go on with.
    """

    status: int
    message: str | None = None
    details: str = ""
    by_itself: bool = True
    failed: bool = False


@click.command(
    cls=RunCommand,
    epilog="""
\b
Examples:
  kvmaio run /usr/share/seabios/bios.bin --kind firmware --until "No bootable device"
  kvmaio run kernel.elf --until "login:" --save booted.ckpt; kvmaio run --from booted.ckpt
  printf '\\272\\370\\003\\260A\\356\\364' | kvmaio run - --mode real16 --stats
\b
The board: UART at port 0x3f8 (irq 4), debug consoles at 0x402 and 0xe9, debug exit at 0xf4;
for firmware, multiboot and linux also the PC's clock with CMOS RAM, interrupt controllers and PIT.
\b
Exit status: 0 the guest halted or powered off, or --until was seen; the guest's own code if
it used the debug exit; 1 a guest or host error; 2 wrong usage; 124 the timeout; 130 Ctrl-C.
""",
)
@click.argument(
    "image", type=click.Path(exists=True, dir_okay=False, allow_dash=True), required=False
)
@click.option(
    "--kind",
    type=click.Choice(["auto", *KINDS]),
    default="auto",
    show_default=True,
    help="What the image is.",
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    help="Bare machine code (--kind flat), started in this mode.  [default: real16]",
)
@click.option(
    "--address", type=Number(), help="Where bare machine code goes and starts.  [default: 0x1000]"
)
@click.option("--memory", default="64M", show_default=True, help="RAM, such as 512K, 64M or 2G.")
@click.option(
    "--vcpus", type=click.IntRange(min=1), default=1, show_default=True, help="Virtual CPUs."
)
@click.option(
    "--cpu",
    type=click.Choice(["auto", "kvm", "soft"]),
    default="auto",
    show_default=True,
    help="What executes the guest.",
)
@click.option(
    "--irqchip",
    type=click.Choice(["none", "kernel", "split", "devices"]),
    help="Who models interrupt controllers.  "
    "[default for firmware, multiboot and linux: kernel on KVM, else devices]",
)
@click.option("--append", metavar="TEXT", help="The kernel's command line (multiboot, linux).")
@click.option(
    "--initrd",
    type=click.Path(exists=True, dir_okay=False),
    help="The initial ramdisk (linux), or a module (multiboot).",
)
@click.option(
    "--timeout",
    type=Positive(),
    metavar="SECONDS",
    help="End the run after this time (as --time counts it), with exit status 124.",
)
@click.option(
    "--time",
    type=click.Choice(TIMES),
    default="wall",
    show_default=True,
    help="What a second is to devices: the wall clock's, or what the guest has executed.",
)
@click.option(
    "--pace",
    type=click.FloatRange(min=0, min_open=True),
    metavar="FACTOR",
    help="Hold simulated time to this multiple of the wall clock.",
)
@click.option(
    "--save",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Save a checkpoint when the run ends by --until, --timeout or by itself.",
)
@click.option(
    "--from",
    "from_",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Go on from a checkpoint instead of an image.",
)
@click.option("--until", metavar="TEXT", help="End the run once the console shows this text.")
@click.option(
    "--stats",
    type=click.Choice(STATISTICS),
    metavar="[text|json]",
    help="Statistics at the end, on standard error.",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Record what happens: .json for Perfetto, .vcd for waveform viewers.",
)
@click.option(
    "--trace-filter",
    metavar="WORDS",
    help="Record less: kinds and names, such as exit,access,uart*.",
)
@click.option(
    "--gdb",
    type=Address(),
    metavar="[HOST:]PORT",
    help="Wait for GDB there (target remote :PORT) before the first instruction.",
)
@click.option(
    "--record",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Record what is typed, so that the run can be repeated (--cpu soft, --time simulated).",
)
@click.option(
    "--replay",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Repeat a run that was recorded: the same, byte for byte.",
)
@click.option("--live", is_flag=True, help="Show exits and accesses a second while it runs.")
@click.option("--verbose", is_flag=True, help="Say what is done; registers with an error.")
def run(
    image: str | None,
    kind: str,
    mode: str | None,
    address: int | None,
    append: str | None,
    initrd: str | None,
    irqchip: str | None,
    from_: str | None,
    until: str | None,
    time: Literal["wall", "simulated"],
    pace: float | None,
    record: str | None,
    replay: str | None,
    **others: Any,
) -> int:
    """Run IMAGE, a file or a pipe (- is standard input), until its guest ends.

    Or, with --from, go on with the guest of a checkpoint.

    What the guest prints goes to standard output, what is typed goes to its
    serial port; everything else is on standard error. Ctrl-C ends the run.
    """
    if mode is not None and kind not in ("auto", "flat"):
        raise click.UsageError(f"--mode is for bare machine code; it contradicts --kind {kind}.")
    if pace is not None and (time != "simulated" or not math.isfinite(pace)):
        raise click.UsageError("--pace is a finite factor, and for --time simulated.")
    if others["trace_filter"] and not others["trace"]:
        raise click.UsageError("--trace-filter needs --trace FILE.")
    if others["live"] and not sys.stderr.isatty():
        raise click.UsageError("--live needs a terminal, and standard error is none.")
    if until == "":
        raise click.BadParameter("the text is empty", param_hint="--until")
    if from_ is not None:
        _refuse_beside_from()
    elif image is None:
        raise click.UsageError("Name an IMAGE, or a checkpoint with --from.")
    repeat = Repeat.asked_for(record, replay, others["cpu"], time)
    if repeat:
        time, others["cpu"] = "simulated", "soft"
    choice = ImageChoice(
        path=image or "",
        kind=None if kind == "auto" else kind,
        mode=mode,
        address=address,
        append=append,
        initrd=initrd,
    )
    loadable: Image | None = None
    if from_ is None:
        saved = None
        found, loadable = read_image(choice)
        pc = found in PC_KINDS
        irqchip = irqchip or (_pc_irqchip(others["cpu"]) if pc else "none")
    else:
        saved = load(from_)
        pc = check_board(from_, saved)
        shape = saved.shape
        irqchip = shape.irqchip or "none"
        others["vcpus"] = shape.vcpus
        others["memory"] = sum(r.size for r in shape.memory if not r.readonly)
    options = Options(
        image=choice, from_=saved, repeat=repeat, irqchip=irqchip, until=until, **others
    )
    if options.save is not None:
        check_can_save(options.save)
    if (reason := why_no_guest(options.cpu)) is not None:
        say(f"no guest can run here. {reason}. `kvmaio doctor` tells more")
        return EXIT_ERROR
    return run_on_loop(_run(options, pc, loadable), time=time, pace=pace)


def _pc_irqchip(cpu: str) -> str:
    return "kernel" if cpu != "soft" and why_no_guest("kvm") is None else "devices"


def _refuse_beside_from() -> None:
    context = click.get_current_context()
    for name in BOARD_FROM_CHECKPOINT:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            what = "an IMAGE" if name == "image" else f"--{name}"
            raise click.UsageError(f"{what} beside --from: the checkpoint decides that.")


async def _run(options: Options, pc: bool, image: Image | None) -> int:
    machine = Machine(
        memory=options.memory,
        vcpus=options.vcpus,
        cpu=options.cpu,
        irqchip=None if options.irqchip == "none" else options.irqchip,
    )
    repeat = options.repeat
    board = build_board(machine, pc=pc, vcpus=options.vcpus, clock_start=repeat.clock_start)
    console = StandardConsole(
        board.uart,
        board.debug_consoles,
        until=None if options.until is None else os.fsencode(options.until),
        take_input=not options.image.takes_stdin and not repeat.replay,
        stop=machine.stop,
        quiet=options.live and sys.stdout.isatty(),  # the view shows it
        waits=not repeat,
    )
    async with machine, AsyncExitStack() as stack:
        if image is not None:
            machine.load(image)
        elif options.from_ is not None:
            await machine.restore(options.from_)
        if options.trace:
            machine.trace(options.trace, only=options.trace_filter or "")
        if options.verbose:
            what = f"image {options.image.path}" if image is not None else "the checkpoint"
            say(f"{what} on {machine!r}")
        stack.enter_context(repeat.around(machine))
        await console.connect()
        ending = Ending(status=EXIT_INTERRUPTED, by_itself=False)
        try:
            async with _debugged(machine, options):
                view = live(machine, board.consoles) if options.live else nullcontext()
                with console.keyboard(), view, _Terminable() as terminable:
                    ending = await _ending(machine, options, console)
            if options.save and not ending.failed:
                await save(machine, options.save)
            if terminable.signal is not None:
                ending = Ending(status=128 + terminable.signal, by_itself=False)
        finally:
            await console.close(patient=ending.by_itself)
            console.finish_line()
            if ending.message:
                say(ending.message)
            if options.verbose and ending.details:
                click.echo(ending.details, err=True)
            if options.stats:
                show_statistics(machine.stats, options.stats)
    return ending.status


@asynccontextmanager
async def _debugged(machine: Machine, options: Options) -> AsyncIterator[None]:
    if options.gdb is None:
        yield
        return
    host, port = options.gdb
    async with machine.gdb(host, port) as server:
        say(f"waiting for gdb: target remote {server.host}:{server.port}")
        yield


async def _ending(machine: Machine, options: Options, console: StandardConsole) -> Ending:
    """Run the machine; how it ended."""
    try:
        async with asyncio.timeout(options.timeout) as limit:
            outcome = await machine.run()
    except TimeoutError as error:
        if not limit.expired():
            return _failure(error, machine)
        at = ", ".join(f"{cpu.name} at rip {cpu.context.rip:#x}" for cpu in machine.vcpus)
        message = f"no end after {options.timeout:g} s ({at}); --timeout gives it longer"
        return Ending(status=EXIT_TIMEOUT, message=message, details=machine.dump(), by_itself=False)
    except Exception as error:
        return _failure(error, machine)
    if console.was_seen:
        return Ending(status=0)
    if console.is_gone:
        return Ending(status=EXIT_ERROR, message="nobody reads standard output any more")
    return _by_outcome(outcome, machine)


def _by_outcome(outcome: Outcome, machine: Machine) -> Ending:
    match outcome:
        case Halted() | Stopped(reason="powered off"):
            return Ending(status=0)
        case Exited(code):
            return Ending(status=code)
        case Shutdown(dump):
            fault = None
            if machine.fault_frame is not None:
                fault = FaultFrame.read(machine.memory, machine.fault_frame)
            at = f"; the fault was {fault}" if fault else ""
            return Ending(
                status=EXIT_ERROR,
                message=f"the guest shut down: a triple fault{at}; --verbose shows its registers",
                details=dump,
            )
        case _:
            return Ending(status=EXIT_ERROR, message=f"the guest stopped: {outcome}")


def _failure(error: BaseException, machine: Machine) -> Ending:
    status, message = explain(error)
    return Ending(status=status, message=message, details=machine.dump(), failed=True)


class _Terminable:
    """While it is entered, SIGTERM and SIGHUP end the block in good order, as Ctrl-C does.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> _Terminable:
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._terminate, number)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
        if self.signal is None or kind is not asyncio.CancelledError:
            return False
        assert self._task is not None
        return self._task.uncancel() == 0  # nobody else wants it cancelled

    def _terminate(self, number: int) -> None:
        if self.signal is None and self._task is not None:
            self.signal = number
            self._task.cancel()
