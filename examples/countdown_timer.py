"""A guest sets a timer, sleeps, and is woken by its interrupt five times.

While it sleeps in HLT, its vCPU is not in KVM at all: the alarm of the device
model is a timer of the event loop. `kvmaio.devices.CountdownTimer` is a device
to read first; it is about fifty lines.

    python examples/countdown_timer.py
"""

import time

import kvmaio
from kvmaio import Machine
from kvmaio.boot import Flat
from kvmaio.devices import CountdownTimer, Uart16550

# The timer's registers are at 0x40 (interval), 0x44 (control) and 0x48 (status).
# Its interrupt line is 5; without interrupt controllers that is vector 0x25.
CODE = bytes.fromhex(
    "c70694002910"  #       mov word ptr [4*0x25], 0x1029   # the handler: tick
    "c70696000000"  #       mov word ptr [4*0x25+2], 0
    "ba4000"  #             mov dx, 0x40
    "66b800e1f505"  #       mov eax, 100000000              # 0.1 s in nanoseconds
    "66ef"  #               out dx, eax
    "ba4400"  #             mov dx, 0x44
    "66b803000000"  #       mov eax, 3                      # enable, periodic
    "66ef"  #               out dx, eax
    "b90500"  #             mov cx, 5
    "fb"  #                 sti
    "f4"  #           rest: hlt
    "ebfd"  #               jmp rest
    "ba4800"  #       tick: mov dx, 0x48
    "66b801000000"  #       mov eax, 1                      # acknowledge
    "66ef"  #               out dx, eax
    "baf803"  #             mov dx, 0x3f8
    "b02a"  #               mov al, '*'
    "ee"  #                 out dx, al
    "49"  #                 dec cx
    "7401"  #               jz done
    "cf"  #                 iret
    "f4"  #           done: hlt                             # interrupts are off here
)


async def main() -> None:
    async with Machine(memory="1M") as machine:
        uart = machine.attach(Uart16550(), pio=0x3F8)
        machine.attach(CountdownTimer(), pio=0x40, irq=5)
        machine.load(Flat(CODE, address=0x1000, mode="real16"))
        start = time.monotonic()
        uart.add_sink(lambda text: print(f"{time.monotonic() - start:.2f} s  {text.decode()}"))
        outcome = await machine.run()
        stats = machine.vcpus[0].stats
    print(f"{outcome}: {stats.numInterrupts} interrupts woke the guest, {stats.numHalt} halts")


if __name__ == "__main__":
    kvmaio.run(main())
