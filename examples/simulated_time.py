"""A pump and its guest's control program, one simulated hour in a moment.

The pump is a device with an asyncio task of its own: it fills a tank at one
litre a minute. The guest polls the level once a simulated minute, sleeping in
HLT in between, and opens the valve at 50 litres. On the event loop of kvmaio's
simulated time, an hour takes as long as its events: every minute is exactly a
minute, and no time is spent waiting.

    python examples/simulated_time.py
"""

import asyncio
import time

import kvmaio
from kvmaio import Access, Device, Machine, Register, SimulationLoop
from kvmaio.boot import Flat

# The level is at port 0x50, the valve at 0x51; line 5 is vector 0x25 without controllers.
CODE = bytes.fromhex(
    "c70694001010"  #       mov word ptr [4*0x25], 0x1010   # the handler: minute
    "c70696000000"  #       mov word ptr [4*0x25+2], 0
    "fb"  #                 sti
    "f4"  #           rest: hlt                             # until the next minute
    "ebfd"  #               jmp rest
    "e450"  #       minute: in al, 0x50
    "3c32"  #               cmp al, 50
    "7204"  #               jb more
    "b001"  #               mov al, 1
    "e651"  #               out 0x51, al                    # enough: open the valve
    "cf"  #           more: iret
)


class Pump(Device):
    """A tank that fills at a litre a minute, and tells the guest of every minute."""

    level = Register(0x0, int, Access.R)  # litres
    valve = Register(0x1, int, Access.W)

    @valve.on_write
    def open_or_close(self, value: int) -> None:
        minutes = self.clock.now_ns / 60e9
        print(f"{minutes:.1f} min  {self.level} litres: the guest opens the valve")
        self.level = 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(60)
            self.level += 1
            self.irq.set(True)  # an edge: the guest looks at the level
            self.irq.set(False)


async def main() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimulationLoop)
    async with Machine(memory="1M") as machine:
        machine.attach(Pump(), pio=0x50, irq=5)
        machine.load(Flat(CODE, address=0x1000, mode="real16"))
        began = time.monotonic()
        loop.call_at(3600, machine.stop, "an hour is over")
        outcome = await machine.run()
        took = time.monotonic() - began
    print(f"{loop.time() / 60:.1f} min  {outcome}, and less than a minute went by: {took < 60}")


if __name__ == "__main__":
    kvmaio.run(main(), time="simulated")
