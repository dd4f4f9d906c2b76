"""The lab's first file system: busybox, the modules, and init.sh."""

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["initramfs"]

INIT = Path(__file__).with_name("init.sh")
FOLDERS = ("bin", "dev", "proc", "sys", "tmp", "m", "lab", "lower", "upper", "new")

Entry = tuple[str, int, bytes]  # name, mode, content


def initramfs(kernel: Path, module_options: Mapping[str, str]) -> bytes:
    """The archive for a cached kernel; options by the name of the module."""
    files = {
        "init": INIT.read_bytes(),
        "bin/busybox": (kernel / "busybox").read_bytes(),
        **{f"m/{path.name}": path.read_bytes() for path in sorted((kernel / "m").iterdir())},
        **{f"m/{name}.opts": text.encode() for name, text in module_options.items() if text},
    }
    return cpio(
        [
            *((name, stat.S_IFDIR | 0o755, b"") for name in FOLDERS),
            *((name, stat.S_IFREG | 0o755, content) for name, content in files.items()),
        ]
    )


def cpio(entries: Iterable[Entry]) -> bytes:
    """A "newc" archive (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)."""
    archive = bytearray()
    for inode, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        path = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device, device of the node, name size, check
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + path
        archive += b"\0" * (-len(archive) % 4) + content
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive)
