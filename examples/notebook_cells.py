# %% [markdown]
# # A guest between the cells
#
# Cells as editors and Jupyter know them: VS Code, Spyder and PyCharm run this file cell by cell,
# jupytext makes a notebook of it. All of it at once, without any of them:
#
#     python examples/run_cells.py examples/notebook_cells.py

# %% A machine that lives as long as the notebook
import asyncio

from kvmaio import Device, Machine, Register
from kvmaio.boot import Flat
from kvmaio.devices import Uart16550

CODE = bytes.fromhex(
    "baf803"  #   next: mov dx, 0x3f8
    "e460"  #           in al, 0x60      # the guest waits here for the next cell
    "ee"  #             out dx, al
    "ebf8"  #           jmp next
)

machine = await Machine(memory="1M").__aenter__()
uart = machine.attach(Uart16550(), pio=0x3F8, irq=4)


# %% A device, made up on the spot
class Keyboard(Device):
    key = Register(0x0)

    def __init__(self) -> None:
        self.keys: asyncio.Queue[int] = asyncio.Queue()

    @key.on_read
    async def wait(self) -> int:
        return await self.keys.get()


keyboard = machine.attach(Keyboard(), pio=0x60)

# %% Start the guest: it goes on while nobody evaluates anything
machine.load(Flat(CODE, address=0x1000, mode="real16"))
run = asyncio.create_task(machine.run())

# %% Talk to it, and look at it
for letter in b"hello":
    keyboard.keys.put_nowait(letter)
print("the guest prints", await uart.expect("hello", timeout=10))

# %% Look at it, while it waits in the middle of an IN: two exits for each letter
print("accesses for five letters, at least nine:", machine.vcpus[0].stats.numIO >= 9)

# %% Go on talking
keyboard.keys.put_nowait(ord("!"))
print("then it prints", await uart.expect("!", timeout=10))

# %% The end
machine.stop("enough")
print(await run)
await machine.close()
