"""A guest's driver against a sensor that now and then tells nonsense.

The guest reads a temperature and its checksum (both add up to 0xff). The driver reads again
if they do not fit. A fault flips a bit of every third reading; the guest does not notice.

    python examples/fault_injection.py
"""

import kvmaio
from kvmaio import Access, Device, Machine, Register, faults
from kvmaio.boot import Flat
from kvmaio.devices import Uart16550
from kvmaio.trace import Record

CODE = bytes.fromhex(
    "b90600"  #        mov cx, 6
    "e450"  #    next: in al, 0x50      # the temperature
    "88c4"  #          mov ah, al
    "e451"  #          in al, 0x51      # its checksum
    "00e0"  #          add al, ah
    "3cff"  #          cmp al, 0xff
    "75f4"  #          jne next
    "88e0"  #          mov al, ah
    "baf803"  #        mov dx, 0x3f8
    "ee"  #            out dx, al
    "e2ec"  #          loop next
    "f4"  #            hlt
)


class Sensor(Device):
    temperature = Register(0x0, access=Access.R, reset=20)
    checksum = Register(0x1, access=Access.R, reset=0xFF - 20)


async def main() -> None:
    async with Machine(memory="1M") as machine:
        uart = machine.attach(Uart16550(), pio=0x3F8)
        sensor = machine.attach(Sensor(), pio=0x50, name="sensor")
        machine.load(Flat(CODE, address=0x1000, mode="real16"))
        seen: list[Record] = []
        with (
            machine.trace(seen.append, only="fault"),
            faults.flip_bits(machine, sensor, "temperature", 0x40, faults.every(3)) as fault,
        ):
            outcome = await machine.run()
    print(f"{outcome}: the guest took {list(uart.output)}")
    print(f"{fault.count} of {fault.opportunities} readings were wrong")
    print(f"the first, in the trace: {seen[0]}")


if __name__ == "__main__":
    kvmaio.run(main())
