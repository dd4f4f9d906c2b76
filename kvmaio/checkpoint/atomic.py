"""A file that is replaced whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import CheckpointError, HostError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["Output", "check_can_replace", "replacing"]

_HINTS = {
    errno.ENOSPC: "free some space there, or save to another disk",
    errno.EDQUOT: "your quota there is used up; free some space or save elsewhere",
    errno.EFBIG: "files there, or your limit (ulimit -f), are smaller; save elsewhere",
    errno.EACCES: "save to a folder that you may write to",
    errno.EPERM: "save to a folder that you may write to",
    errno.EROFS: "nothing can be written there; save elsewhere",
    errno.ENOENT: "make its folder first",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "name a file in that folder",
    errno.ELOOP: "a symbolic link is in the way; remove it",
}
_NO_LOCKS_HERE = (errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


class Output:
    """The new file while it is written."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = 0

    def write(self, data: ReadableBuffer) -> None:
        """Append all of `data`."""
        with memoryview(data) as view:
            done = 0
            while done < len(view):
                done += os.write(self._fd, view[done:])
            self.size += done

    def write_at(self, offset: int, data: bytes) -> None:
        """Replace what was written at `offset`."""
        while data:
            done = os.pwrite(self._fd, data, offset)
            offset, data = offset + done, data[done:]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Output]:
    """Write a new file; at the end, and only then, it takes the place of what is at `path`.

    Until then it has another name in the same folder, always the same for one
    `path`: what a killed process left is used again, not added to. A new
    file is for its owner only, since guest memory may hold secrets; one that
    replaces another keeps its permissions.

    Raises:
        HostError: the host refused; what was at `path` is unharmed.
        CheckpointError: something that is no file is there, or somebody is saving to it.
    """
    target = os.path.realpath(os.fsdecode(path))
    temporary = _temporary_name(target)
    mode, fd = _begin(target, temporary)
    try:
        try:
            os.fchmod(fd, 0o600)  # it may be what a killed process left
            os.ftruncate(fd, 0)
            yield Output(fd)
            os.fchmod(fd, mode)
            os.fsync(fd)
            os.rename(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(os.path.dirname(target))
    except HostError:
        raise
    except OSError as error:
        raise _refused(target, error) from None
    finally:
        os.close(fd)


def check_can_replace(path: str | os.PathLike[str]) -> None:
    """Find out whether `replacing` would begin at all; what is at `path` stays as it is.

    Raises:
        HostError, CheckpointError: see there.
    """
    target = os.path.realpath(os.fsdecode(path))
    temporary = _temporary_name(target)
    _, fd = _begin(target, temporary)
    with contextlib.suppress(OSError):
        os.unlink(temporary)
    os.close(fd)


def _begin(target: str, temporary: str) -> tuple[int, int]:
    """The mode of the file to be, and the descriptor by which to write it."""
    try:
        return _mode_of_replaced(target), _open_temporary(temporary)
    except OSError as error:
        raise _refused(target, error) from None


def _temporary_name(target: str) -> str:
    folder, name = os.path.split(target)
    if len(os.fsencode(name)) > 200:  # of 255 that a name may have
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return os.path.join(folder, f".{name}.saving")


def _mode_of_replaced(target: str) -> int:
    try:
        found = os.stat(target).st_mode
    except FileNotFoundError:
        return 0o600
    if stat.S_ISDIR(found):
        raise IsADirectoryError(errno.EISDIR, "")
    if not stat.S_ISREG(found):
        raise CheckpointError(f"{target} is no ordinary file; a checkpoint would replace it")
    return found & 0o777


def _open_temporary(temporary: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        fd = os.open(temporary, flags, 0o600)
        try:
            _lock(fd, temporary)
            # Between opening and locking, its writer may have given it its final name.
            with contextlib.suppress(FileNotFoundError):
                here, there = os.fstat(fd), os.stat(temporary, follow_symlinks=False)
                if os.path.samestat(here, there):
                    if not stat.S_ISREG(here.st_mode) or here.st_nlink > 1:
                        raise CheckpointError(f"{temporary} is in the way; remove it")
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int, temporary: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(
            f"somebody else is saving to the same path ({temporary} is locked); wait for them"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have nothing to do for a folder
            raise
    finally:
        os.close(fd)


def _refused(target: str, error: OSError) -> HostError:
    hint = _HINTS.get(error.errno or 0, "save elsewhere")
    return HostError(f"saving {target}", error.errno or errno.EIO, hint)
