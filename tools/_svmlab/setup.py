"""`svmlab setup`: QEMU, a Debian kernel with its modules, and a static busybox."""

import json
import lzma
import os
import re
import shutil
import tempfile
from pathlib import Path

from .host import KERNELS, LabError, cache_dir, call, find_qemu, kernel_dir, locked, release

__all__ = ["setup"]

# Loaded in this order; what they depend on is found and loaded first.
MODULES = ["virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "kvm", "kvm_amd"]
XZ_MAGIC = b"\xfd7zXZ\0"


def setup(series: str, *, force: bool) -> None:
    """Make `run` possible for one kernel series; does nothing where it already is."""
    if os.uname().machine != "x86_64":
        raise LabError(f"svmlab runs on x86_64 hosts only; this one is {os.uname().machine}")
    cache = cache_dir()
    with locked(cache):
        needs_qemu = find_qemu() is None
        needs_kernel = force or release(series) is None
        if not needs_qemu and not needs_kernel:
            print(f"svmlab: already set up in {cache}")
            return
        if needs_qemu and os.geteuid() != 0:
            raise LabError(
                "QEMU is missing and only root can install it: apt-get install qemu-system-x86"
            )
        if os.geteuid() == 0:
            say("apt-get update")
            call("apt-get", "update", "-q")
        if needs_qemu:
            say("apt-get install qemu-system-x86 (no recommended packages)")
            call("apt-get", "install", "-q", "-y", "--no-install-recommends", "qemu-system-x86")
        if needs_kernel:
            fetch_kernel(series, cache)
    say(f"ready, Linux {release(series)} in {kernel_dir(series)}")


def say(text: str) -> None:
    print(f"svmlab: {text}", flush=True)


def fetch_kernel(series: str, cache: Path) -> None:
    """Fill the series' folder; it appears complete or not at all."""
    with tempfile.TemporaryDirectory(prefix="setup-", dir=cache) as folder:
        scratch = Path(folder)
        package = newest_kernel_package(series)
        kernel = download(package, scratch)
        busybox = download("busybox-static", scratch)
        image = first_file(kernel, "boot/vmlinuz-*", package)
        say("unpacking")
        complete = scratch / "complete"
        (complete / "m").mkdir(parents=True)
        (complete / "vmlinux").write_bytes(bootable(image))
        copy_modules(kernel, complete / "m")
        shutil.copy2(first_file(busybox, "**/bin/busybox", "busybox-static"), complete / "busybox")
        meta = {"release": image.name.removeprefix("vmlinuz-"), "package": package}
        (complete / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(kernel_dir(series), ignore_errors=True)
        complete.rename(kernel_dir(series))


def newest_kernel_package(series: str) -> str:
    listing = call("apt-cache", "depends", KERNELS[series])
    if found := re.search(r"Depends: (linux-image-\S+)", listing):
        return found[1]
    raise LabError(
        f"this machine's package lists have no {KERNELS[series]}; "
        "svmlab fetches its kernels from Debian 12: check the apt sources"
    )


def download(package: str, scratch: Path) -> Path:
    """Fetch and unpack a package without installing it; the unpacked tree."""
    say(f"downloading {package}")
    archive = scratch / package
    archive.mkdir()
    call("apt-get", "download", "-q", package, cwd=archive)
    tree = scratch / f"{package}.tree"
    call("nice", "-n", "19", "dpkg", "-x", str(first_file(archive, "*.deb", package)), str(tree))
    return tree


def first_file(tree: Path, pattern: str, package: str) -> Path:
    for path in tree.glob(pattern):
        if path.is_file():
            return path
    raise LabError(f"{package} holds no {pattern}; has Debian changed the package?")


def bootable(image: Path) -> bytes:
    """The kernel uncompressed where it is xz: unpacking it emulated costs seconds."""
    data = image.read_bytes()
    start = data.find(XZ_MAGIC)
    while start >= 0:
        try:
            kernel = lzma.LZMADecompressor().decompress(data[start:])
        except lzma.LZMAError:
            kernel = b""
        if kernel.startswith(b"\x7fELF"):
            return kernel
        start = data.find(XZ_MAGIC, start + 1)
    return data  # QEMU boots a bzImage just as well


def copy_modules(tree: Path, target: Path) -> None:
    """Copy MODULES and all they depend on, and write their load order."""
    files = {module_name(path): path for path in tree.glob("**/modules/*/kernel/**/*.ko*")}
    builtin = {
        module_name(Path(line))
        for listing in tree.glob("**/modules/*/modules.builtin")
        for line in listing.read_text().split()
    }
    order: list[str] = []

    def add(name: str) -> None:
        if name in order or name in builtin:
            return
        if name not in files:
            raise LabError(f"the kernel package has no module {name}; try another --kernel")
        module = files[name].read_bytes()
        if files[name].suffix == ".xz":
            module = lzma.decompress(module)
        for dependency in dependencies(module):
            add(dependency)
        (target / f"{name}.ko").write_bytes(module)
        order.append(name)

    for name in MODULES:
        add(name)
    (target / "order").write_text("\n".join(order) + "\n")


def module_name(path: Path) -> str:
    """`kernel/arch/x86/kvm/kvm-amd.ko.xz` is the module kvm_amd."""
    return path.name.removesuffix(".xz").removesuffix(".ko").replace("-", "_")


def dependencies(module: bytes) -> list[str]:
    """What a module's .modinfo section says it needs."""
    found = re.search(rb"\0depends=([^\0]+)\0", module)
    return found[1].decode().replace("-", "_").split(",") if found else []
