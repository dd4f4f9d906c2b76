"""``kvmaio checkpoint info``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvmaio.checkpoint import Checkpoint, DeviceShape, MachineShape, RegionShape, SavedDevice
from kvmaio.cli import main
from tests.checkpoint.samples import checkpoint_of, content

MEMORY = content({1: 100, 30: 4096, 99: 1}, 256)


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.ckpt"
    checkpoint_of(MEMORY).save(path)
    return path


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", "info", *arguments])
    captured = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), captured.out, captured.err


def test_says_what_the_file_holds(sample, capsys):
    status, out, err = command(capsys, str(sample))
    assert (status, err) == (0, "")
    words = " ".join(out.split())
    for part in (
        "format schema 1, ",
        "made by kvmaio 0.1.0 (CPU model kvm, SVM)",
        "guest time 1.500000000 s",
        f"digest {Checkpoint.load(sample).digest}",
        "checked every byte",
        "vCPUs 1",
        "irqchip none",
        "memory RAM 0x0..0xfffff, 1.0 MiB",
        "device uart0: Uart16550 at pio 0x3f8",
        "3 pages",
    ):
        assert part in words
    assert [line.split()[0] for line in out.splitlines() if "…" in line] == [
        *("machine", "cpus", "devices", "vm", "statistics", "memory")
    ]


def test_incremental_checkpoints_name_their_base(sample, tmp_path, capsys):
    path = tmp_path / "changes"
    later = checkpoint_of(content({2: 5}, 256))
    later.since(Checkpoint.load(sample)).save(path)
    status, out, _ = command(capsys, str(path))
    assert status == 0
    assert f"relative to {Checkpoint.load(sample).digest}" in " ".join(out.split())


def test_json(sample, capsys):
    status, out, _ = command(capsys, str(sample), "--json", "--quick")
    facts = json.loads(out)
    assert (status, facts["schema"], facts["stored_pages"]) == (0, 1, 3)
    assert (facts["time_ns"], facts["verified"]) == (1_500_000_000, False)
    assert facts["shape"]["devices"] == {
        "uart0": {"class_name": "Uart16550", "pio": [0x3F8], "mmio": []}
    }
    assert [section["name"] for section in facts["sections"]][-1] == "memory"


def test_damage_is_one_line_and_status_1(sample, capsys):
    data = bytearray(sample.read_bytes())
    data[-50] ^= 1  # in a memory page
    sample.write_bytes(data)
    status, out, err = command(capsys, str(sample))
    assert (status, out) == (1, "")
    assert err.startswith(f"kvmaio: {sample}: section memory: damaged")
    assert err.count("\n") == 1
    assert command(capsys, str(sample), "--quick")[0] == 0


def test_no_file(tmp_path, capsys):
    status, out, err = command(capsys, str(tmp_path / "nothing"))
    assert (status, out) == (1, "")
    assert err == f"kvmaio: opening {tmp_path}/nothing: No such file or directory [ENOENT]\n"


def test_names_cannot_steer_the_terminal(tmp_path, capsys):
    path = tmp_path / "file"
    name = "\x1b[2J[bold]evil"
    checkpoint_of(
        shape=MachineShape((RegionShape(0, 4096),), devices={name: DeviceShape("[red]X")}),
        devices={name: SavedDevice()},
    ).save(path)
    status, out, _ = command(capsys, str(path))
    assert status == 0
    assert "\x1b" not in out
    assert "\\x1b[2J[bold]evil: [red]X on no bus" in out
