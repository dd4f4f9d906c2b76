"""The console script ``kvmaio``; beside the package, whose import takes a noticeable while.

Until a command can end in good order, Ctrl-C ends the program by the signal, as it does any
other, instead of with a traceback out of some import.
"""

import signal
import sys
from typing import NoReturn

__all__ = ["main"]

INTERRUPTED = 130  # 128 + SIGINT


def main() -> NoReturn:
    """Run the command that the arguments name, and exit with its status."""
    handler = signal.getsignal(signal.SIGINT)
    is_usual = handler is signal.default_int_handler  # not where a shell's background ignores it
    if is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from kvmaio.cli import main as command

    try:
        if is_usual:
            signal.signal(signal.SIGINT, handler)
        command()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        if is_usual:  # nor one out of what the interpreter does at its end
            signal.signal(signal.SIGINT, signal.SIG_DFL)
