"""A guest in kvmaio and a plant in another simulator, in step over a socket.

The other simulator is a process of its own: a room with a heater, which knows
nothing of kvmaio. It takes lines of JSON, "the heater is on; go on to this time",
and answers with the temperature by then. The guest is the thermostat. Its device
exchanges a step with the plant every ten seconds of guest time; no side ever runs
ahead of the other by more than that, and an hour is over in a second.

    python examples/cosimulate.py
"""

import asyncio
import json
import socket
import subprocess
import sys
import time

import kvmaio
from kvmaio import Access, Device, Machine, Register
from kvmaio.boot import Flat

STEP_NS = 10 * 10**9
STEPS = 360

CODE = bytes.fromhex(
    "c70694001010"  #         mov word ptr [4*0x25], 0x1010   # line 5: the handler
    "c70696000000"  #         mov word ptr [4*0x25+2], 0
    "fb"  #             idle: sti
    "f4"  #                   hlt
    "ebfc"  #                 jmp idle
    "e460"  #         sample: in al, 0x60                     # degrees
    "3c14"  #                 cmp al, 20
    "b001"  #                 mov al, 1
    "7202"  #                 jb set
    "b000"  #                 mov al, 0
    "e661"  #            set: out 0x61, al                    # the heater
    "cf"  #                   iret
)


class Plant(Device):
    """The other simulator's end in the machine: what it told last, and what it is to be told."""

    degrees = Register(0x0, int, Access.R)
    heater = Register(0x1, int)

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.steps = self.heated = 0

    async def run(self) -> None:
        self.alarm.arm(self.clock.now_ns + STEP_NS)
        async for deadline_ns in self.alarm:
            # The plant takes as long as it takes: meanwhile, time must not jump.
            async with kvmaio.real_time():
                request = {"heater": self.heater, "until_ns": deadline_ns}
                self.writer.write(json.dumps(request).encode() + b"\n")
                answer = json.loads(await self.reader.readline())
            self.steps += 1
            self.heated += request["heater"]
            if self.steps % 60 == 0:
                minutes = deadline_ns // (60 * 10**9)
                print(f"{minutes:3} min  {answer['degrees']:4.1f} degrees")
            self.degrees = int(answer["degrees"])
            self.irq.set(True)  # an edge
            self.irq.set(False)
            self.alarm.arm(deadline_ns + STEP_NS)  # from the deadline: no drift


async def main(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began_s = time.monotonic()
    async with Machine(memory="64K") as machine:
        plant = machine.attach(Plant(reader, writer), pio=0x60, irq=5)
        machine.load(Flat(CODE, address=0x1000, mode="real16"))
        asyncio.get_running_loop().call_later(STEPS * 10 + 1, machine.stop, "an hour is over")
        outcome = await machine.run()
    took_s = time.monotonic() - began_s
    print(f"{outcome}: {plant.steps} steps, the heater was on in {plant.heated} of them")
    print(f"an hour in less than a minute: {took_s < 60}")
    writer.close()


def simulate_a_room() -> None:
    """The other simulator. Any will do that can be told to go on until a time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    degrees, now_ns = 15.0, 0
    with connection, connection.makefile("rw") as stream:
        for line in stream:
            request = json.loads(line)
            while now_ns < request["until_ns"]:
                degrees += 0.02 * request["heater"] - 0.0005 * (degrees - 5)
                now_ns += 10**9
            print(json.dumps({"degrees": degrees}), file=stream, flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["room"]:
        simulate_a_room()
    else:
        room = subprocess.Popen([sys.executable, __file__, "room"], stdout=subprocess.PIPE)
        assert room.stdout is not None
        with room:
            kvmaio.run(main(int(room.stdout.readline())), time="simulated")
