"""Files that are damaged, cut off, foreign, newer or forged: refused, and without much memory."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import zstandard

from kvmaio import CheckpointError, HostError
from kvmaio.checkpoint import Checkpoint, inspect
from kvmaio.checkpoint.layout import CHUNK, RECORD
from kvmaio.checkpoint.pages import PAGE_SIZE
from tests.checkpoint.samples import checkpoint_of, content, forge, with_schema

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.ckpt"
    checkpoint_of(content({1: 100, 30: 4096, 99: 1}, 100)).save(path)
    return path


def refusal(path: Path) -> str:
    """Why `path` is refused, by loading it and by looking into it, which must agree."""
    with pytest.raises(CheckpointError) as loading:
        Checkpoint.load(path)
    with pytest.raises(CheckpointError) as looking:
        inspect(path)
    assert str(loading.value) == str(looking.value)
    start = f"{path}: "
    assert str(loading.value).startswith(start)
    return str(loading.value).removeprefix(start)


# ---- at random -----------------------------------------------------------------------

RANDOM_DAMAGE = """
import random, resource, sys, tracemalloc
from pathlib import Path
from kvmaio import CheckpointError
from kvmaio.checkpoint import Checkpoint, inspect
from tests.checkpoint.samples import checkpoint_of, content

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
MIB = 1 << 20
path = folder / "damaged"
originals = [
    checkpoint_of(content({n: 100, n + 30: 4096, 250: n}, 256) + b"text" * (MIB // 4), time_ns=n)
    for n in range(2)
]
files = []
for original in originals:
    original.save(path)
    files.append(path.read_bytes())
info = inspect(path)
declared = sum(entry.declared for entry in info.sections)

status = dict(line.split(":") for line in open("/proc/self/status"))
limit = int(status["VmSize"].split()[0]) * 1024 + 2 * declared + 16 * MIB
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
generator = random.Random(seed)
refused = equal = peak = 0
for number in range(10_000):
    original, whole = (originals[number % 2], files[number % 2])
    data = bytearray(whole)
    match number % 5:
        case 0 | 1:  # a bit
            at = generator.randrange(len(data) * 8)
            data[at // 8] ^= 1 << at % 8
        case 2:  # cut off
            del data[generator.randrange(len(data)):]
        case 3:  # some of the other file, or of this one from elsewhere
            source = generator.choice(files)
            size = generator.randrange(1, 200)
            at = generator.randrange(len(data))
            start = at if generator.random() < 0.5 else generator.randrange(len(source))
            piece = source[start : start + size]
            data[at : at + generator.choice((0, len(piece)))] = piece
        case 4:  # noise
            at = generator.randrange(len(data))
            data[at : at + generator.randrange(1, 64)] = generator.randbytes(64)
    path.write_bytes(data)
    if number % 20 < 5:  # it makes everything slow; the limit on the process is always there
        tracemalloc.start()
    try:
        loaded = Checkpoint.load(path)
    except CheckpointError:
        refused += 1
    else:
        assert loaded == original, number
        equal += 1
        del loaded
    peak = max(peak, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
assert peak <= 2 * declared + MIB // 4, (peak, declared)
print(refused, equal, peak, declared)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ten_thousand_damages_are_refused_or_do_no_harm(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", RANDOM_DAMAGE, tmp_path, "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.stderr == ""
    refused, equal, peak, declared = map(int, result.stdout.split())
    print(f"refused {refused}, equal {equal}, peak {peak:,} bytes, declared {declared:,}")
    assert refused + equal == 10_000
    assert refused > 9_000


def test_every_truncation_is_refused(sample):
    whole = sample.read_bytes()
    for size in (*range(600), *range(600, len(whole), 97), len(whole) - 1):
        sample.write_bytes(whole[:size])
        assert re.search(r"cut off|no checkpoint", refusal(sample))


def test_a_flip_in_each_section_is_reported_by_its_name(sample):
    whole = sample.read_bytes()
    at = whole.index(b"\x28\xb5\x2f\xfd")  # the first zstd frame
    for entry in inspect(sample).sections:
        data = bytearray(whole)
        data[at + entry.packed - 1] ^= 0x10
        sample.write_bytes(data)
        assert refusal(sample).startswith(f"section {entry.name}: ")
        at += entry.packed
    sample.write_bytes(whole[:-1] + b"x")
    assert refusal(sample).startswith("section trailer: ")
    sample.write_bytes(whole[:30] + b"x" + whole[31:])
    assert refusal(sample).startswith("section header: ")
    sample.write_bytes(whole + b"x")
    assert "something was appended" in refusal(sample)


def test_sections_of_another_checkpoint_are_refused(sample, tmp_path):
    other = tmp_path / "other"
    checkpoint_of(content({1: 100, 30: 4096, 99: 1}, 100), time_ns=1_500_000_001).save(other)
    one, two = sample.read_bytes(), other.read_bytes()
    assert len(one) == len(two)
    start = one.index(b"\x28\xb5\x2f\xfd")
    sample.write_bytes(one[:start] + two[start:])
    assert refusal(sample).startswith("section trailer: damaged")
    sample.write_bytes(one[:start] + two[start:-40] + one[-40:])
    assert refusal(sample).startswith("section machine: damaged: its checksum is ")


# ---- foreign and newer ----------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        gzip.compress(b"x" * 1000),
        zstandard.compress(b"x" * 1000),
        Path(sys.executable).resolve().read_bytes()[:5000],
        b"hello\n",
        b"\x89kvmaio\n\x1a\n\0" + bytes(500),  # line ends were "mended"
    ],
    ids=["empty", "png", "gzip", "zstd", "elf", "text", "text transfer"],
)
def test_foreign_files(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    assert refusal(path).startswith("no checkpoint: it begins with ")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero"), Path("/dev/null")):
        assert refusal(path) == "no checkpoint: not an ordinary file"
    with pytest.raises(HostError, match="No such file"):
        Checkpoint.load(tmp_path / "nothing")


def test_a_newer_schema(sample):
    whole = sample.read_bytes()
    sample.write_bytes(with_schema(whole, 2))
    assert refusal(sample) == (
        "written by a newer kvmaio, in schema 2; this one reads 1: use the newer one"
    )
    sample.write_bytes(with_schema(whole, 0))
    assert refusal(sample).startswith("section header: damaged: schema 0")


# ---- forged ---------------------------------------------------------------------------


def frame(plain: bytes) -> bytes:
    return zstandard.compress(plain)


def hollow_frame(size: int) -> bytes:
    """A zstd frame that says it holds `size` bytes, in RLE blocks of zeros."""
    header = b"\x28\xb5\x2f\xfd" + bytes((0xE0,)) + size.to_bytes(8, "little")
    block, last = (0x1FFFF << 3 | 2).to_bytes(3, "little"), (1 << 3 | 3).to_bytes(3, "little")
    return header + (block + b"\0") * (size >> 17) + last + b"\0"


FORGED = {
    "more plain bytes than anything could hold": (
        {},
        {"devices": {"plain": 1 << 40}},
        "cannot hold",
    ),
    "more than zstd ever packs": ({}, {"vm": {"plain": 1 << 29}}, "cannot hold"),
    "more values than bytes": ({}, {"cpus": {"values": 1 << 50}}, "cannot hold"),
    "memory of a terabyte": ({}, {"memory": {"plain": 1 << 40}}, "cannot hold"),
    "a frame of another size": (
        {"vm": frame(bytes(9999))},
        {"vm": {"plain": 9998}},
        "section vm: damaged: 9,999 bytes packed, 9,998 are declared",
    ),
    "a frame of unknown size": (
        {"vm": zstandard.ZstdCompressor(write_content_size=False).compress(b"\x80")},
        {},
        "section vm: damaged",
    ),
    "a frame that holds less than it says": (
        {"vm": hollow_frame(1 << 20)},
        {"vm": {"plain": 1 << 20}},
        "section vm: damaged",
    ),
    "two frames": (
        {"vm": frame(b"\x80") * 2},
        {"vm": {"plain": 1, "values": 1}},
        "section vm: damaged",
    ),
    "a lot packed into little": (
        {"vm": b"\x50\x2a\x4d\x18" + (5000).to_bytes(4, "little") + bytes(5000) + frame(b"\x80")},
        {"vm": {"plain": 1, "values": 1}},
        "damaged: 1 bytes are packed in 5,018",
    ),
    "a chunk of two gigabytes": (
        {"memory": CHUNK.pack(100, 1 << 31) + bytes(100)},
        {"memory": {"plain": 1000, "values": 1}},
        "section memory: damaged: a chunk of 2,147,483,648 bytes unpacked",
    ),
    "a chunk longer than the file": (
        {"memory": CHUNK.pack(101, 1000) + bytes(100)},
        {"memory": {"plain": 1000, "values": 1}},
        "section memory: damaged: a chunk of 101 bytes where 100 are left",
    ),
}


@pytest.mark.parametrize("forgery", FORGED.values(), ids=FORGED.keys())
def test_forged_headers(sample, forgery):
    payloads, entries, message = forgery
    forge(sample, payloads, **entries)
    assert message in refusal(sample)


def forge_plain(path: Path, name: str, plain: bytes, values: int) -> None:
    """Replace a section's content, with everything else to match."""
    checksum = hashlib.sha256(plain).digest()
    changes = {"plain": len(plain), "values": values, "checksum": checksum}
    forge(path, {name: frame(plain)}, **{name: changes})


def test_forged_content_of_sections(sample):
    whole = sample.read_bytes()
    encode = msgspec.msgpack.encode
    for name, value, values, message in (
        ("devices", {}, 1, "the state of the devices [], where the machine has ['uart0']"),
        ("devices", [1, 2], 3, "devices: "),
        ("vm", {"a": "text"}, 3, "vm: "),
        ("vm", {"a": 1}, 2, "section vm: damaged: 3 values, 2 are declared"),
        ("cpus", [], 1, "the state of 0 vCPUs"),
        ("machine", {"shape": {}}, 3, "machine: "),
        ("statistics", {"cpu0": {"numIO": "3"}}, 5, "statistics: "),
    ):
        sample.write_bytes(whole)
        forge_plain(sample, name, encode(value), values)
        assert message in refusal(sample)
    for plain, values in ((b"\xa1\xff", 1), (b"\x91" * 5000, 5000), (b"\xdd\xff\xff\xff\xff", 1)):
        sample.write_bytes(whole)
        forge_plain(sample, "vm", plain, values)
        refusal(sample)


def test_forged_records_of_memory(sample):
    whole = sample.read_bytes()
    page = b"\1" * PAGE_SIZE
    for records, message in (
        (RECORD.pack(1, 0, 1, 1) + page, "region 1 of 1"),
        (RECORD.pack(0, 5, 1, 1) + page, "block 5"),
        (RECORD.pack(0, 0, 1, 1) + page[1:], "a block's pages are cut off"),
        (RECORD.pack(0, 0, 1, 1)[:9], "a record's beginning is cut off"),
        (RECORD.pack(0, 0, 1, 1) + page, "checksum"),
        (RECORD.pack(0, 0, 3, 1) + page, "block 0"),
    ):
        sample.write_bytes(whole)
        packed = frame(records)
        payload = CHUNK.pack(len(packed), len(records)) + packed
        forge(sample, {"memory": payload}, memory={"plain": len(records), "values": 1})
        assert message in refusal(sample)


BOMB = """
import resource, sys
from pathlib import Path
from kvmaio import CheckpointError
from kvmaio.checkpoint import Checkpoint

status = dict(line.split(":") for line in open("/proc/self/status"))
limit = int(status["VmSize"].split()[0]) * 1024 + (50 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    Checkpoint.load(sys.argv[1])
except CheckpointError as error:
    print(error)
"""


def test_more_than_the_process_may_have_is_refused(tmp_path):
    path = tmp_path / "bomb"
    checkpoint_of(vm={"text": bytes(1 << 27)}).save(path)
    assert path.stat().st_size < 20_000
    result = subprocess.run(
        [sys.executable, "-c", BOMB, path], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stderr == ""
    assert result.stdout == f"{path}: more than this process's memory\n"


def test_many_values_in_few_bytes_are_counted_before_they_are_made(sample):
    forge_plain(sample, "vm", b"\xdd\x00\x80\x00\x00" + b"\x80" * (8 << 20), (8 << 20) + 1)
    assert "more than 1048576 values" in refusal(sample)


def test_more_memory_than_the_host_has_is_refused(sample):
    size = 1 << 44
    packed = random.Random(1).randbytes(100)
    forge(
        sample,
        {"memory": packed * (1 << 14)},
        memory={"plain": min(size, len(packed) << 29), "values": 1},
    )
    assert "this host has only" in refusal(sample)
