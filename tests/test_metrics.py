"""Statistics for others: Prometheus over HTTP, and the live view."""

from __future__ import annotations

import asyncio
import os
import subprocess
import termios

import pytest

from kvmaio import Halted
from kvmaio.devices import CountdownTimer
from tests.engine.support import deadline
from tests.test_cli import ECHO, KVMAIO, SPIN, Terminal, prints


async def fetch(port: int) -> str:
    """What a scraper gets."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return text


@pytest.mark.kvm
async def test_prometheus_reads_the_counters(boot):
    parser = pytest.importorskip("prometheus_client.parser")
    from kvmaio.metrics import serve_metrics

    machine, other = boot("mov cx, 5", "next: out 0x80, al", "loop next", "hlt"), boot("hlt")
    machine.attach(CountdownTimer(), pio=0x80)
    other.name = "other"
    async with deadline(), serve_metrics(machine, other, port=0) as port:
        assert await machine.run() == Halted()
        head, _, body = (await fetch(port)).partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 200 OK\r\n")
        assert f"Content-Length: {len(body)}" in head
        samples = {
            (sample.name, sample.labels["machine"]): sample.value
            for family in parser.text_string_to_metric_families(body)
            for sample in family.samples
        }
        assert samples["kvmaio_num_io_total", "machine"] == 5
        assert samples["kvmaio_num_vm_exits_total", "machine"] == 6
        assert samples["kvmaio_num_vm_exits_total", "other"] == 0
        assert samples["kvmaio_guest_time_seconds", "other"] > 0
        known = machine.vcpus[0].stats.numInsts is not None
        assert any("num_insts" in name for name, _ in samples) == known
        # A client that goes at once, and the next one.
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        assert "kvmaio_num_halt_total" in await fetch(port)


@pytest.mark.kvm
def test_the_live_view_shows_rates_and_the_console(tmp_path):
    guest = tmp_path / "guest.bin"
    guest.write_bytes(prints(b"hello there>", ECHO))
    with Terminal("run", str(guest), "--live") as terminal:
        terminal.expect(b"hello there>")
        terminal.expect(b"accesses/s")
        terminal.expect(b"uart")
        os.write(terminal.fd, b"!")
        assert terminal.wait() == 0
        assert b"exits/s" in terminal.shown and b"wall clock" in terminal.shown


@pytest.mark.kvm
def test_ctrl_c_ends_the_live_view_and_restores_the_terminal(tmp_path):
    guest = tmp_path / "guest.bin"
    guest.write_bytes(prints(b">", SPIN))
    with Terminal("run", str(guest), "--live") as terminal:
        terminal.expect(b"accesses/s")
        os.write(terminal.fd, b"\x03")
        terminal.expect(b"\x1b[?25h")  # the cursor is shown again
        assert terminal.wait() == 130
        assert termios.tcgetattr(terminal.fd) == terminal.before


@pytest.mark.kvm
def test_the_live_view_needs_a_terminal(tmp_path):
    (tmp_path / "guest.bin").write_bytes(b"\xf4")
    result = subprocess.run(
        [KVMAIO, "run", tmp_path / "guest.bin", "--live"], capture_output=True, timeout=60
    )
    assert result.returncode == 2 and b"terminal" in result.stderr
