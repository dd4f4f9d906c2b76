"""`/dev/kvm`: capabilities, which KVM it is, and what is said when it cannot be used."""

import ast
import errno
import os
from pathlib import Path

import pytest

import kvmaio.kvm
from kvmaio import HostError
from kvmaio.kvm import host
from kvmaio.kvm._native import ffi, lib
from kvmaio.kvm.host import Kvm, check, kvm_kind, usable

# ---- section G of the reference ----------------------------------------------------


@pytest.mark.kvm
def test_api_version_is_12(kvm):
    assert lib.kvmaio_ioctl_value(kvm.fd, lib.KVM_GET_API_VERSION, 0) == 12


@pytest.mark.kvm
def test_vcpu_mmap_size_holds_the_run_page_and_the_coalesced_ring(kvm):
    ring_page = kvm.capability(lib.KVM_CAP_COALESCED_MMIO)
    assert kvm.vcpu_page_size >= (ring_page + 1) * 4096
    assert ffi.sizeof("struct kvm_run") <= 4096


@pytest.mark.kvm
def test_capability_queries_are_asked_once(kvm, monkeypatch):
    value = kvm.capability(lib.KVM_CAP_NR_MEMSLOTS)
    assert value >= 32
    monkeypatch.setattr(host, "lib", None)
    assert kvm.capability(lib.KVM_CAP_NR_MEMSLOTS) == value


@pytest.mark.kvm
def test_an_unknown_capability_is_zero(kvm):
    assert kvm.capability(0x7FFF) == 0


@pytest.mark.kvm
def test_supported_cpuid_and_msr_indices(kvm):
    functions = {entry.function for entry in kvm.supported_cpuid()}
    assert {0, 1, 0x80000000, 0x80000001} <= functions
    assert 0xC0000081 in kvm.msr_indices()  # STAR: in every list
    assert kvm.msr_indices() is kvm.msr_indices()


@pytest.mark.kvm
def test_close_is_idempotent(kvm):
    other = Kvm.open()
    other.close()
    other.close()
    assert other.fd == -1


# ---- which KVM ----------------------------------------------------------------------


def fake_host(tmp_path: Path, modules: tuple[str, ...], flags: str) -> tuple[Path, Path]:
    for name in modules:
        (tmp_path / "module" / name).mkdir(parents=True)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n")
    return tmp_path / "module", cpuinfo


@pytest.mark.parametrize(
    ("modules", "flags", "kind"),
    [
        (("kvm", "kvm_intel"), "vmx", "VMX"),
        (("kvm", "kvm_amd"), "svm", "SVM"),
        (("kvm", "kvm_pvm"), "", "PVM"),
        # Built into the kernel, both are listed: the processor tells.
        (("kvm", "kvm_intel", "kvm_amd"), "svm", "SVM"),
        (("kvm", "kvm_intel", "kvm_amd"), "vmx", "VMX"),
        # On a processor without either, PVM is the only one that can have come up.
        (("kvm", "kvm_intel", "kvm_amd", "kvm_pvm"), "", "PVM"),
        (("kvm", "kvm_amd", "kvm_pvm"), "svm", "unknown"),
        (("kvm",), "", "unknown"),
        ((), "vmx", "unknown"),
    ],
)
def test_the_kind_is_what_the_modules_say(tmp_path, modules, flags, kind):
    assert kvm_kind(*fake_host(tmp_path, modules, flags)) == kind


def test_the_kind_without_sysfs_is_unknown(tmp_path):
    assert kvm_kind(tmp_path / "none", tmp_path / "nothing") == "unknown"


@pytest.mark.kvm
def test_only_pvm_emulates_kernel_code(kvm):
    assert kvm.kind in ("VMX", "SVM", "PVM", "unknown")
    assert kvm.emulates_kernel_code is (kvm.kind == "PVM")


# ---- why it cannot be used -----------------------------------------------------------


@pytest.mark.kvm
def test_a_usable_device_leaves_nothing_open(kvm):
    before = os.listdir("/proc/self/fd")
    assert usable() is None
    assert os.listdir("/proc/self/fd") == before


def test_no_device(tmp_path):
    reason = usable(str(tmp_path / "kvm"))
    assert reason is not None
    assert reason.startswith(f"open {tmp_path}/kvm: No such file or directory [ENOENT]; ")
    assert "kvm_intel or kvm_amd" in reason and 'cpu="soft"' in reason and "\n" not in reason


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "kvm").write_bytes(b"")
    assert usable(str(tmp_path / "kvm")) == f"{tmp_path}/kvm is not a device"


def test_another_device_in_its_place():
    reason = usable("/dev/null")
    assert reason == (
        "KVM_GET_API_VERSION: Inappropriate ioctl for device [ENOTTY]; this is not KVM's device"
    )


@pytest.mark.kvm
def test_no_permission_names_the_group(monkeypatch):
    def refuse(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    reason = usable()
    assert reason is not None
    assert 'is this user in the group "kvm"?' in reason and "[EACCES]" in reason


@pytest.mark.kvm
def test_a_missing_capability_is_named(kvm, monkeypatch):
    monkeypatch.setitem(host._REQUIRED, "KVM_CAP_SYNC_REGS", 0x7FFF)
    with pytest.raises(HostError, match=r"lacks KVM_CAP_SYNC_REGS; Linux 4\.17") as caught:
        Kvm.open()
    assert caught.value.errno == errno.ENOTSUP


@pytest.mark.kvm
def test_a_foreign_api_version_is_refused(kvm, monkeypatch):
    class Newer:
        KVM_API_VERSION = 13

        def __getattr__(self, name):
            return getattr(lib, name)

    monkeypatch.setattr(host, "lib", Newer())
    with pytest.raises(HostError, match="version 12, and only 13 is known"):
        Kvm.open()


# ---- the gate --------------------------------------------------------------------------


def test_the_gate_passes_results_on():
    assert check(0, "KVM_RUN") == 0
    assert check(7, "KVM_CREATE_VM") == 7


def test_the_gate_names_operation_errno_and_hint():
    with pytest.raises(HostError) as caught:
        check(-errno.EBUSY, "KVM_CREATE_VM")
    error = caught.value
    assert (error.operation, error.errno) == ("KVM_CREATE_VM", errno.EBUSY)
    assert "VirtualBox" in error.hint
    assert str(error).startswith("KVM_CREATE_VM: Device or resource busy [EBUSY]; another")


def test_the_gate_finds_the_hint_of_an_operation_with_details():
    with pytest.raises(HostError, match="already has a vCPU with that number"):
        check(-errno.EEXIST, "KVM_CREATE_VCPU (cpu3)")


def test_a_hint_given_wins_and_an_unknown_error_has_none():
    with pytest.raises(HostError) as caught:
        check(-errno.EINVAL, "KVM_CREATE_VCPU", "say this")
    assert caught.value.hint == "say this"
    with pytest.raises(HostError) as caught:
        check(-errno.ELOOP, "KVM_GET_REGS")
    assert str(caught.value) == "KVM_GET_REGS: Too many levels of symbolic links [ELOOP]"


@pytest.mark.kvm
def test_a_bad_pointer_is_efault(vcpu):
    with pytest.raises(HostError) as caught:
        check(lib.kvmaio_ioctl(vcpu.fd, lib.KVM_GET_REGS, ffi.cast("void *", 8)), "KVM_GET_REGS")
    assert (caught.value.operation, caught.value.errno) == ("KVM_GET_REGS", errno.EFAULT)


# ---- types -------------------------------------------------------------------------------


def test_the_stub_names_what_the_built_module_has():
    stub = Path(kvmaio.kvm.__file__).with_name("_native.pyi")
    (body,) = (
        node.body
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Lib"
    )
    declared = {
        node.name if isinstance(node, ast.FunctionDef) else ast.unparse(node.target)
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AnnAssign)
    }
    assert declared ^ set(dir(lib)) == set(), "_native.pyi and build_native.py differ"
