"""libunicorn: whether it is here, and loading it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..errors import HostError

__all__ = ["load", "why_not"]

INSTALL = "pip install 'kvmaio[soft]'"


def find() -> Path | None:
    """The library within the installed package `unicorn`, which is not imported."""
    spec = find_spec("unicorn")
    if spec is None or spec.origin is None:
        return None
    found = sorted(Path(spec.origin).parent.glob("lib/libunicorn.so*"))
    return found[0] if found else None


def why_not() -> str | None:
    """Why the software CPU cannot be used here, in one line with what to do; None if it can."""
    try:
        load()
    except HostError as error:
        return str(error)
    except ImportError as error:
        return f"its C module is not built ({error}); install kvmaio with a C compiler at hand"
    return None


def load() -> None:
    """Load the library into this process.

    Raises:
        HostError: it is not here, or not one that is known.
    """
    path = find()
    if path is None:
        raise HostError("dlopen libunicorn", 2, f"the software CPU is not installed: {INSTALL}")
    from ._soft import ffi, lib

    message = ffi.new("char[256]")
    if lib.kvmaio_soft_load(str(path).encode(), message, 256) < 0:
        reason = ffi.string(message).decode(errors="replace")
        raise HostError("dlopen libunicorn", 8, f"{path}: {reason}; {INSTALL} has one that fits")
