"""A guest of fifteen bytes of code prints a line on its serial port.

python examples/hello_serial.py
"""

import kvmaio
from kvmaio import Machine
from kvmaio.boot import Flat
from kvmaio.devices import Uart16550

CODE = bytes.fromhex(
    "be0f10"  #        mov si, 0x100f   # where the text is
    "ac"  #      next: lodsb
    "84c0"  #          test al, al
    "7406"  #          jz done
    "baf803"  #        mov dx, 0x3f8
    "ee"  #            out dx, al       # an exit: the UART answers
    "ebf5"  #          jmp next
    "f4"  #      done: hlt
)
TEXT = b"Hello from the guest!\0"


async def main() -> None:
    async with Machine(memory="1M") as machine:
        uart = machine.attach(Uart16550(), pio=0x3F8, irq=4)
        machine.load(Flat(CODE + TEXT, address=0x1000, mode="real16"))
        outcome = await machine.run()
        stats = machine.vcpus[0].stats
    print(f"the guest printed  {uart.output.decode()}")
    print(f"it ended with      {outcome}")
    print(f"it took            {stats.numVMExits} exits: {stats.numIO} I/O, {stats.numHalt} halt")


if __name__ == "__main__":
    kvmaio.run(main())
