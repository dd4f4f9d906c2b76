"""``kvmaio demo``: a guest waits for a device that awaits, while the event loop goes on."""

from __future__ import annotations

import asyncio
from collections import Counter

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.spinner import Spinner
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from .boot import Flat
from .cli.reports import statistics_table
from .device import Device
from .devices import Uart16550
from .loops import run
from .machine import Machine
from .registers import Register
from .vcpu import VCpuState

__all__ = ["SlowTypist", "demo", "show"]

MESSAGE = b"Hello from a guest whose device takes its time."
LETTER_S = 0.055
TICK_S = 0.010

# The guest, and what it was assembled from. 16-bit real mode, at 0x1000.
GUEST = """\
      mov dx, 0x3f8  ; serial port
next: in  al, 0x50   ; the device
      test al, al
      jz  done
      out dx, al
      jmp next
done: hlt"""
CODE = bytes.fromhex(
    "baf803"  # mov dx, 0x3f8
    "e450"  # in al, 0x50
    "84c0"  # test al, al
    "7403"  # jz done
    "ee"  # out dx, al
    "ebf7"  # jmp next
    "f4"  # hlt
)

DEVICE = """\
class SlowTypist(Device):
    letter = Register(0x0, int)

    @letter.on_read
    async def answer(self) -> int:
        await asyncio.sleep(0.055)
        return next(self.letters, 0)"""


class SlowTypist(Device):
    """One read-only register; each read takes a while, and gives the next letter."""

    letter = Register(0x0, int)

    def __init__(self, message: bytes) -> None:
        self.letters = iter(message)

    @letter.on_read
    async def answer(self) -> int:
        await asyncio.sleep(LETTER_S)  # only the guest's vCPU waits here
        return next(self.letters, 0)


class Ticker:
    """Something else on the same loop: counts, and notes in which state the vCPU is.

    Attributes:
        ticks: how often it ran.
        states: how often it found the vCPU in which state.
    """

    def __init__(self) -> None:
        self.ticks = 0
        self.states: Counter[VCpuState] = Counter()

    async def tick(self, machine: Machine) -> None:
        """Run until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.ticks += 1
            self.states[machine.vcpus[0].state] += 1


def show() -> None:
    """Run the demo on the terminal."""
    console = Console(highlight=False)
    run(demo(console))


async def demo(console: Console) -> None:
    """Three seconds of a guest and its device, then what there was to see."""
    console.print(_introduction())
    ticker = Ticker()
    async with Machine(memory="1M", name="demo") as machine:
        uart = machine.attach(Uart16550(), pio=0x3F8, irq=4)
        machine.attach(SlowTypist(MESSAGE), pio=0x50)
        machine.load(Flat(CODE, address=0x1000, mode="real16"))
        scene = _Scene(machine, uart, ticker)
        ticking = asyncio.create_task(ticker.tick(machine))
        try:
            with Live(scene, console=console, refresh_per_second=20):
                outcome = await machine.run()
        finally:
            ticking.cancel()
        waited = ticker.states[VCpuState.RUNNING_MMIO_PENDING]
        console.print(
            f"\nThe run ended with [bold]{outcome}[/]. Of {ticker.ticks} ticks, {waited} found the "
            "vCPU waiting for its device (RunningMMIOPending): it stood still, the loop did not. "
            "No thread was blocked, nothing polled.\n"
        )
        console.print(statistics_table(machine.stats, zeros=False))
    console.print("Next: kvmaio doctor, examples/device_that_awaits.py, docs/writing-a-device.md")


class _Scene:
    """What moves: drawn anew twenty times a second."""

    def __init__(self, machine: Machine, uart: Uart16550, ticker: Ticker) -> None:
        self._machine = machine
        self._uart = uart
        self._ticker = ticker
        self._spinner = Spinner("dots")

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row(Text("  guest", "bold"), Text(self._uart.output.decode(), "green"))
        table.add_row(Text("  vCPU", "bold"), Text(self._machine.vcpus[0].state.value, "yellow"))
        ticks = Table.grid(padding=(0, 1))
        ticks.add_row(self._spinner, f"{self._ticker.ticks} ticks of {TICK_S * 1000:.0f} ms")
        table.add_row(Text("  loop", "bold"), ticks)
        return table


def _introduction() -> Group:
    code = Table.grid(padding=(0, 1), expand=False)
    code.add_row(
        Panel(Syntax(GUEST, "nasm", background_color="default"), title="the guest", expand=False),
        Panel(Syntax(DEVICE, "python", background_color="default"), title="its device"),
    )
    return Group(
        "\nA guest reads a device register again and again. The device's handler is a coroutine "
        "and awaits before it answers: until then the guest's vCPU waits, and nobody else.",
        Padding(code, (1, 0, 1, 0)),
    )
