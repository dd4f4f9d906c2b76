"""Boot once, checkpoint, and explore: many runs from one moment, one after the other and at once.

The guest is a thermostat. Its self-test takes a while; then it reads the
temperature twice and decides whether to heat. Every variation starts where the
self-test was over: `restore()` puts back what the run before it has changed, and
`fork()` runs copies side by side that share the guest's memory.

    python examples/explore_variations.py
"""

import asyncio

import kvmaio
from kvmaio import Device, EndRun, Machine, Outcome, Register, Stopped
from kvmaio.boot import Flat
from kvmaio.devices import DebugExit

CODE = bytes.fromhex(
    "b9ffff"  #            mov cx, 0xffff
    "49"  #          test: dec cx
    "75fd"  #              jnz test
    "e661"  #              out 0x61, al         # the self-test is over
    "e460"  #              in al, 0x60
    "88c3"  #              mov bl, al
    "e460"  #              in al, 0x60
    "00d8"  #              add al, bl
    "3c26"  #              cmp al, 38           # the mean: 19 degrees
    "b000"  #              mov al, 0
    "7302"  #              jae done
    "b001"  #              mov al, 1
    "e6f4"  #        done: out 0xf4, al
)


class Thermometer(Device):
    """The temperature, and a port by which the guest says that it is up."""

    degrees = Register(0x0, int)
    ready = Register(0x1, int)

    @ready.on_write
    def is_ready(self, value: int) -> None:
        raise EndRun(Stopped("the self-test is over"))


def heats(outcome: Outcome) -> bool:
    assert isinstance(outcome, kvmaio.Exited)
    return outcome.code == 3


async def main() -> None:
    async with Machine(memory="16M") as machine:
        thermometer = machine.attach(Thermometer(), pio=0x60)
        machine.attach(DebugExit(), pio=0xF4)
        machine.load(Flat(CODE, address=0x1000))
        print(await machine.run())
        booted = await machine.checkpoint()

        decisions = {}
        for degrees in range(100):
            await machine.restore(booted)
            thermometer.degrees = degrees
            decisions[degrees] = heats(await machine.run())
        coldest = min(degrees for degrees, heat in decisions.items() if not heat)
        print(f"{len(decisions)} runs from there: it heats below {coldest} degrees")

        await machine.restore(booted)
        copies = await machine.fork(3)
        for copy, degrees in zip(copies, (10, 18, 30), strict=True):
            copy.devices["thermometer0"].degrees = degrees  # type: ignore[attr-defined]
        outcomes = await asyncio.gather(*(copy.run() for copy in copies))
        print("at once, with 10, 18 and 30 degrees:", *map(heats, outcomes))


if __name__ == "__main__":
    kvmaio.run(main())
