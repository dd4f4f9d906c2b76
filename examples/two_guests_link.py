"""Two guests in one event loop, and an asynchronous link of 5 ms between them.

One guest sends three letters; each travels 5 ms of simulated time, interrupts
the other guest, and its echo travels back. Both machines share the loop's time,
so the round trips can be read off it to the nanosecond; what comes on top of
10 ms is what the guests executed.

    python examples/two_guests_link.py
"""

import asyncio

import kvmaio
from kvmaio import Device, Machine, Register
from kvmaio.boot import Flat

LATENCY_S = 0.005

# Both: the link's data is at port 0x60, its line 5 is vector 0x25.
SENDING = bytes.fromhex(
    "c70694001710"  #       mov word ptr [4*0x25], 0x1017   # the handler: echo
    "c70696000000"  #       mov word ptr [4*0x25+2], 0
    "b90300"  #             mov cx, 3
    "b041"  #               mov al, 'A'
    "fb"  #                 sti
    "e660"  #               out 0x60, al
    "f4"  #           rest: hlt
    "ebfd"  #               jmp rest
    "e460"  #         echo: in al, 0x60
    "fec0"  #               inc al
    "49"  #                 dec cx
    "7403"  #               jz done
    "e660"  #               out 0x60, al                    # the next letter
    "cf"  #                 iret
    "f4"  #           done: hlt                             # interrupts are off here
)
ECHOING = bytes.fromhex(
    "c70694001010"  #       mov word ptr [4*0x25], 0x1010   # the handler: letter
    "c70696000000"  #       mov word ptr [4*0x25+2], 0
    "fb"  #                 sti
    "f4"  #           idle: hlt
    "ebfd"  #               jmp idle
    "e460"  #       letter: in al, 0x60
    "e660"  #               out 0x60, al
    "cf"  #                 iret
)


class LinkEnd(Device):
    """One end of a link: what the guest writes here interrupts the guest over there."""

    data = Register(0x0, int)

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[int] = asyncio.Queue()

    @data.on_write
    def send(self, value: int) -> None:
        print(f"{self.clock.now_ns / 1e6:9.3f} ms  {self.name} sends {chr(value)}")
        self.other.incoming.put_nowait(value)

    async def run(self) -> None:
        while True:
            value = await self.incoming.get()
            await asyncio.sleep(LATENCY_S)
            print(f"{self.clock.now_ns / 1e6:9.3f} ms  {self.name} gets  {chr(value)}")
            self.data = value
            self.irq.set(True)  # an edge
            self.irq.set(False)

    def connect(self, other: "LinkEnd") -> None:
        self.other, other.other = other, self


async def main() -> None:
    async with Machine(memory="1M") as sender, Machine(memory="1M") as echoer:
        here = sender.attach(LinkEnd(), pio=0x60, irq=5, name="here")
        there = echoer.attach(LinkEnd(), pio=0x60, irq=5, name="there")
        here.connect(there)
        sender.load(Flat(SENDING, address=0x1000, mode="real16"))
        echoer.load(Flat(ECHOING, address=0x1000, mode="real16"))
        echoing = asyncio.create_task(echoer.run())
        print(f"the sender: {await sender.run()}")
        echoer.stop("the sender is done")
        print(f"the echoer: {await echoing}")


if __name__ == "__main__":
    kvmaio.run(main(), time="simulated")
