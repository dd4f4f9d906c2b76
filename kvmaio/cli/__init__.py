"""The command line: ``kvmaio run``, ``demo``, ``doctor`` and ``bench``.

============  ==================================================================
`run`         the options of ``kvmaio run``, and one run from start to exit status
`board`       the machine that ``run`` builds
`image`       from a file or pipe to an image, by its kind
`console`     the guest's consoles on standard output and input
`live`        rates while the machine runs
`registers`   a device's registers as Markdown
`progress`    how far loading, saving and measuring are
`reports`     errors in one line, statistics as a table
`doctor`      the facts of `kvmaio.doctor` as text or JSON
`bench`       the figures of `kvmaio.bench` as tables or JSON
============  ==================================================================

Each command returns its exit status; `main()` turns what it raises into one.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from .. import __version__
from ..doctor import why_no_guest
from ..errors import KvmaioError
from .bench import bench
from .checkpoint import checkpoint
from .doctor import doctor
from .registers import registers
from .reports import EXIT_INTERRUPTED, explain, say
from .run import run

__all__ = ["commands", "main"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: kvmaio run /usr/share/seabios/bios.bin --kind firmware --until 'No bootable'",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def commands() -> None:
    """Run KVM guests whose devices are asyncio code."""


@commands.command(epilog="Example: kvmaio demo")
def demo() -> int:
    """A guest and an async device: three seconds, and nothing else needed."""
    from ..demo import show

    if (reason := why_no_guest()) is not None:
        say(f"no guest can run here. {reason}. `kvmaio doctor` tells more")
        return 1
    show()
    return 0


commands.add_command(run)
commands.add_command(doctor)
commands.add_command(bench)
commands.add_command(checkpoint)
commands.add_command(registers)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: runs a command and exits with its status."""
    _occupy_standard_descriptors()
    try:
        status = commands.main(arguments, prog_name="kvmaio", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        status = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout as it exits
        status = 1
    except Exception as error:
        status, message = explain(error)
        say(message)
        if "--verbose" in sys.argv and not isinstance(error, KvmaioError):
            traceback.print_exc()
    sys.exit(status)


def _occupy_standard_descriptors() -> None:
    """Put /dev/null where 0, 1 or 2 is closed: else /dev/kvm could become standard output."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        fd = os.dup(fd)
    os.close(fd)
    # Python has none either where it found the descriptor closed.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
