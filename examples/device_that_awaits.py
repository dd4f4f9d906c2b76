"""A device that asks a network service before it answers its guest.

The service is an asyncio stream server on the loopback interface and takes its
time. While the device awaits it, the guest's vCPU stands still in the middle
of an IN instruction; the loop goes on, as the ticker shows.

    python examples/device_that_awaits.py
"""

import asyncio
import itertools

import kvmaio
from kvmaio import Access, Device, Machine, Register
from kvmaio.boot import Flat
from kvmaio.devices import Uart16550

CODE = bytes.fromhex(
    "b90300"  #        mov cx, 3
    "e450"  #    next: in al, 0x50      # the thermometer; this takes a while
    "baf803"  #        mov dx, 0x3f8
    "ee"  #            out dx, al
    "e2f8"  #          loop next
    "f4"  #            hlt
)


class Thermometer(Device):
    """Reads the temperature from a service, anew for each read by the guest."""

    temperature = Register(0x0, int, Access.R)

    def __init__(self, port: int) -> None:
        self.port = port

    @temperature.on_read
    async def ask_service(self) -> int:
        print("    the guest reads; its device asks the service")
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        line = await reader.readline()
        writer.close()
        await writer.wait_closed()
        return int(line)


async def serve_temperatures() -> asyncio.Server:
    """A service that takes 0.3 s for an answer."""
    temperatures = itertools.count(20)

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        writer.write(b"%d\n" % next(temperatures))
        await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1")


async def tick() -> None:
    for count in itertools.count(1):
        await asyncio.sleep(0.1)
        print(f"tick {count}")


async def main() -> None:
    async with await serve_temperatures() as server, Machine(memory="1M") as machine:
        uart = machine.attach(Uart16550(), pio=0x3F8)
        machine.attach(Thermometer(server.sockets[0].getsockname()[1]), pio=0x50)
        machine.load(Flat(CODE, address=0x1000, mode="real16"))
        ticker = asyncio.create_task(tick())
        outcome = await machine.run()
        ticker.cancel()
    print(f"{outcome}: the guest read {list(uart.output)} degrees")


if __name__ == "__main__":
    kvmaio.run(main())
