"""`Checkpoint`: a value, and its way through a file."""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings

from kvmaio import CheckpointError, CpuState, GuestMemory
from kvmaio.checkpoint import (
    Checkpoint,
    DeviceShape,
    MachineShape,
    MemoryPages,
    RegionShape,
    SavedCpu,
    SavedDevice,
)
from kvmaio.checkpoint.pages import PAGE_SIZE
from kvmaio.cpu import Context
from tests.checkpoint.samples import checkpoint_of, checkpoints, content

FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(checkpoints())
def test_a_file_gives_back_an_equal_checkpoint_and_equal_bytes(original):
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        original.save(one)
        loaded = Checkpoint.load(one)
        loaded.save(two)
        assert one.read_bytes() == two.read_bytes()
    assert loaded == original
    assert (loaded.digest, hash(loaded)) == (original.digest, hash(original))
    assert repr((loaded.shape, loaded.cpus, loaded.devices, loaded.vm, loaded.statistics)) == repr(
        (original.shape, original.cpus, original.devices, original.vm, original.statistics)
    )
    assert (loaded.time_ns, loaded.created_by) == (original.time_ns, original.created_by)


@FEW
@given(checkpoints(content({1: 5, 70: 4096}, 150)), checkpoints())
def test_an_incremental_checkpoint_through_a_file(base, later):
    changes = later.since(base)
    assert changes.base == base.digest
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        changes.save(one)
        loaded = Checkpoint.load(one, base=base)
        loaded.since(base).save(two)
        assert one.read_bytes() == two.read_bytes()
        assert Checkpoint.load_relative(one) == changes
    assert loaded == later
    assert loaded.digest == later.digest


def test_what_was_given_and_what_is_got_cannot_change_it():
    state = CpuState(Context(rip=1), msrs={1: 2})
    fifo = [1, 2]
    checkpoint = checkpoint_of(
        cpus=[SavedCpu(state)], devices={"uart0": SavedDevice(state={"fifo": fifo})}
    )
    digest = checkpoint.digest
    state.context.rip = state.msrs[1] = 99
    fifo.append(3)
    checkpoint.cpus[0].state.context.cs.base = 5
    checkpoint.devices["uart0"].state["fifo"].append(4)
    checkpoint.shape.devices.clear()
    assert checkpoint.cpus[0].state == CpuState(Context(rip=1), msrs={1: 2})
    assert checkpoint.devices["uart0"].state == {"fifo": [1, 2]}
    assert list(checkpoint.shape.devices) == ["uart0"]
    assert (
        checkpoint_of(
            cpus=[SavedCpu(CpuState(Context(rip=1), msrs={1: 2}))],
            devices={"uart0": SavedDevice(state={"fifo": [1, 2]})},
        ).digest
        == digest
    )


def test_every_field_counts_for_equality():
    first = checkpoint_of()
    assert first == checkpoint_of()
    assert first != "a checkpoint"
    alternatives: list[dict[str, Any]] = [
        {"time_ns": 5},
        {"vm": {}},
        {"statistics": {}},
        {"created_by": attrs.evolve(first.created_by, kvm="VMX")},
        {"devices": {"uart0": SavedDevice({"ier": 0})}},
    ]
    for changes in alternatives:
        other = checkpoint_of(**changes)
        assert (other == first, other.digest == first.digest) == (False, False)
    other = checkpoint_of(b"\1" * PAGE_SIZE)
    assert (other == first, other.digest == first.digest) == (False, False)


def test_a_machine_of_256_mib_that_is_mostly_zeros(tmp_path):
    size = 256 << 20
    ram = GuestMemory().add_ram(0, size).mapping
    for start in range(0, size, 16 << 20):  # half a MiB in each 16
        ram[start : start + (1 << 19)] = random.Random(start).randbytes(1 << 19)
    marks = [time.perf_counter()]
    pages = MemoryPages.capture(ram)
    marks.append(time.perf_counter())
    checkpoint = checkpoint_of(
        shape=MachineShape((RegionShape(0, size),)), devices={}, memory={0: pages}
    )
    checkpoint.save(tmp_path / "file")
    marks.append(time.perf_counter())
    loaded = Checkpoint.load(tmp_path / "file")
    marks.append(time.perf_counter())
    assert loaded == checkpoint
    assert pages.stored_bytes == 8 << 20
    steps = zip(("capture", "save", "load"), itertools.pairwise(marks), strict=True)
    print(", ".join(f"{name} {(end - start) * 1e3:.0f} ms" for name, (start, end) in steps))


def test_chains_of_increments(tmp_path):
    whole = [checkpoint_of(content({n: 100, 7: n + 1}, 100)) for n in range(4)]
    whole[0].save(tmp_path / "0")
    for n in range(1, 4):
        whole[n].since(whole[n - 1]).save(tmp_path / str(n))
    loaded = None
    for n in range(4):
        loaded = Checkpoint.load(tmp_path / str(n), base=loaded)
        assert loaded == whole[n]


def test_the_wrong_base_is_refused(tmp_path):
    base, other, later = (checkpoint_of(content({n: 100}, 100)) for n in range(3))
    path = tmp_path / "changes"
    later.since(base).save(path)
    base.save(tmp_path / "base")
    for wrong, message in (
        (lambda: Checkpoint.load(path), f"relative to checkpoint {base.digest[:16]}: load that"),
        (lambda: Checkpoint.load(path, base=other), f"not to {other.digest[:16]}"),
        (lambda: Checkpoint.load(path, base=later.since(base)), "cannot be a base"),
        (lambda: Checkpoint.load(tmp_path / "base", base=base), "relative to no base"),
        (lambda: base.on(base), "complete"),
        (lambda: later.since(base).since(base), "made relative to another"),
        (lambda: later.since(checkpoint_of()), "cannot be relative to one of 0x1000"),
    ):
        with pytest.raises(CheckpointError) as caught:
            wrong()
        assert message in str(caught.value)


def test_parts_that_do_not_fit_together_are_refused():
    for changes, message in (
        ({"cpus": []}, "the state of 0 vCPUs, of 1 in all"),
        ({"devices": {}}, "the state of the devices [], where the machine has ['uart0']"),
        ({"memory": {}}, "not that of the machine's regions"),
        ({"memory": {0: MemoryPages.capture(bytes(8192))}}, "not that of the machine's regions"),
        ({"memory": {0: MemoryPages(4096, {}, relative=True)}}, "relative"),
        ({"vm": {"pit": "text"}}, "vm: "),
        ({"time_ns": None}, "machine: "),
        ({"cpus": [SavedCpu(CpuState(Context(rip=-1)))]}, "cpu 0: -1 is no register's value"),
        ({"cpus": [SavedCpu(CpuState(Context()), {"x": {1}})]}, "cpus[0]['engine']['x']: a set"),
        ({"devices": {"uart0": SavedDevice(state={"x": {1}})}}, "devices['uart0']['state']['x']"),
    ):
        with pytest.raises(CheckpointError) as caught:
            checkpoint_of(**changes)
        assert message in str(caught.value)


def test_impossible_machines_are_refused():
    for memory in (
        (RegionShape(0, 0),),
        (RegionShape(1, 4096),),
        (RegionShape(4096, 4096), RegionShape(0, 4096)),
        (RegionShape(0, 8192), RegionShape(4096, 4096)),
        (RegionShape(1 << 60, 4096),),
    ):
        with pytest.raises(CheckpointError):
            MachineShape(memory)


def test_differences_of_shape_in_words():
    uart = DeviceShape("Uart16550", pio=(0x3F8,))
    saved = MachineShape((RegionShape(0, 4096),), 2, "kernel", {"uart0": uart})
    assert saved.differences(saved) == []
    present = MachineShape(
        (RegionShape(0, 8192),), 1, None, {"uart0": attrs.evolve(uart, pio=(0x2F8,))}
    )
    assert saved.differences(present) == [
        "the checkpoint has 2 vCPUs, the machine 1",
        "the checkpoint is of irqchip='kernel', the machine has None",
        "the checkpoint has RAM 0x0..0xfff, the machine has not",
        "the machine has RAM 0x0..0x1fff, the checkpoint has not",
        "the checkpoint has device uart0, Uart16550 at pio 0x3f8, the machine has not",
        "the machine has device uart0, Uart16550 at pio 0x2f8, the checkpoint has not",
    ]


def test_repr_says_what_matters():
    first, second = checkpoint_of(bytes(1 << 20)), checkpoint_of(b"\1" * (1 << 20))
    assert repr(second) == ("<Checkpoint at 1500000000 ns: 1 devices, 1 vCPUs, 1.0 MiB stored>")
    assert repr(second.since(first)).endswith(f" relative to {first.digest[:16]}>")
