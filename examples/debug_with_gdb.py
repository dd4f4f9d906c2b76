"""A guest debugged by GDB, which runs beside it on the same event loop.

The guest adds up the numbers from 5 down to 1, with a bug. GDB watches the sum and mends it.

    python examples/debug_with_gdb.py
"""

import asyncio
import subprocess

import kvmaio
from kvmaio import Machine
from kvmaio.boot import Flat

CODE = bytes.fromhex(
    "31c0"  #            xor ax, ax
    "b90500"  #          mov cx, 5
    "01c8"  #      next: add ax, cx
    "e2fc"  #            loop next
    "a30020"  #          mov [0x2000], ax
    "f4"  #              hlt
)
SCRIPT = """
    target remote HOST:PORT
    break *0x1007
    continue
    print $ax
    delete
    watch *(short *)0x2000
    continue
    set var *(short *)0x2000 = 42
    x/i $pc
    detach
"""


async def gdb(host: str, port: int) -> str:
    """Run GDB in batch mode; what it printed."""
    script = SCRIPT.replace("HOST", host).replace("PORT", str(port))
    arguments = [part for line in script.split("\n") if line for part in ("-ex", line.strip())]
    process = await asyncio.create_subprocess_exec(
        *("gdb", "-nx", "-batch", *arguments), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    output, _ = await process.communicate()
    return output.decode()


async def main() -> None:
    async with Machine(memory="64K") as machine:
        machine.load(Flat(CODE, address=0x1000, mode="real16"))
        async with machine.gdb(port=0) as server, asyncio.TaskGroup() as group:
            run = group.create_task(machine.run())
            transcript = group.create_task(gdb(server.host, server.port))
        print("".join(line + "\n" for line in transcript.result().splitlines() if line))
        result = int.from_bytes(machine.memory.read(0x2000, 2), "little")
        print(f"{run.result()}; the sum is {result}")


if __name__ == "__main__":
    kvmaio.run(main())
