"""A device in front of a web service, and a web service in front of a guest.

The guest converts temperatures. Where it gets them is a web service: its device
fetches JSON over HTTP while the guest stands still in the middle of an IN
instruction. And the guest's own results are served over HTTP by the same loop,
with `aiohttp` (pip install aiohttp), on the loopback interface.

    python examples/web_service.py
"""

import asyncio
import itertools

import aiohttp
from aiohttp import web

import kvmaio
from kvmaio import Access, Device, Machine, Register
from kvmaio.boot import Flat

CODE = bytes.fromhex(
    "e450"  #      next: in al, 0x50      # degrees Celsius; this takes a while
    "b309"  #            mov bl, 9        # Fahrenheit: x 9 / 5 + 32
    "f6e3"  #            mul bl
    "b305"  #            mov bl, 5
    "f6f3"  #            div bl
    "0420"  #            add al, 32
    "e651"  #            out 0x51, al
    "ebf0"  #            jmp next
)


class WeatherStation(Device):
    """Reads come from the service at `url`; what the guest writes is kept."""

    celsius = Register(0x0, int, Access.R)
    fahrenheit = Register(0x1, int)

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url
        self.results: asyncio.Queue[int] = asyncio.Queue(maxsize=1)

    @celsius.on_read
    async def fetch(self) -> int:
        async with self.session.get(self.url) as response:
            answer = await response.json()
        return int(answer["celsius"])

    @fahrenheit.on_write
    async def take(self, value: int) -> None:
        await self.results.put(value)  # the guest waits until somebody has asked


async def main() -> None:
    temperatures = itertools.count(20)

    async def sensor(_: web.Request) -> web.Response:
        await asyncio.sleep(0.05)
        return web.json_response({"celsius": next(temperatures)})

    async def converted(_: web.Request) -> web.Response:
        return web.json_response({"fahrenheit": await station.results.get()})

    application = web.Application()
    application.add_routes([web.get("/sensor", sensor), web.get("/converted", converted)])
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        async with aiohttp.ClientSession() as session, Machine(memory="1M") as machine:
            station = WeatherStation(session, f"http://{host}:{port}/sensor")
            machine.attach(station, pio=0x50)
            machine.load(Flat(CODE, address=0x1000))
            run = asyncio.create_task(machine.run())
            for _ in range(3):
                async with session.get(f"http://{host}:{port}/converted") as response:
                    print("a web client got", await response.json())
            machine.stop("enough")
            print(await run)
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    kvmaio.run(main())
