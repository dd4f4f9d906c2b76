"""Guests of random bytes on the software CPU, for tests/soft/test_hostile.py.

``python -m tests.soft.hostile FIRST COUNT``: guests by number, in all modes. It prints the number
of each before it begins, so that a crash says which guest it was.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time

from kvmaio import Machine
from kvmaio.boot import Flat
from kvmaio.exits import InterruptedExit, IoExit, MmioExit
from kvmaio.soft.cpu import SoftCpu
from kvmaio.vcpu import VCpu

MODES = ("real16", "prot32", "long64", "user64")
EXITS = 60
TICKS = 3000
LONGEST_S = 20.0
"""For one guest: one that takes longer is stuck within an instruction."""

# Prefixes and the first bytes of what changes tables, modes and stacks: plain noise seldom does.
SPICE = (
    *(b"\x0f", b"\x0f\x01", b"\x0f\x00", b"\x0f\x22\xc0", b"\x0f\x22\xd8", b"\x0f\x22\xe0"),
    *(b"\x0f\x30", b"\x0f\xae", b"\x0f\xc7", b"\x0f\x23", b"\x66", b"\x67", b"\xf3", b"\xf2"),
    *(b"\xf0", b"\x48", b"\xcf", b"\xcd", b"\xca", b"\x8e", b"\x9d", b"\xd9", b"\xdd", b"\xdb"),
    *(b"\xf3\xa4", b"\xf3\xab", b"\x6c", b"\xf3\x6f", b"\xc8", b"\x9a", b"\xea", b"\x0f\x05"),
    *(b"\x0f\x34", b"\x0f\x35", b"\x0f\x07", b"\xfb", b"\xf4", b"\xcc", b"\xf1", b"\xe4\x10"),
)


def noise(number: random.Random, size: int) -> bytes:
    """Random bytes; every second piece begins with something of `SPICE`."""
    code = b""
    while len(code) < size:
        if number.random() < 0.5:
            code += number.choice(SPICE)
        code += number.randbytes(number.randint(1, 4))
    return code[:size]


async def one(seed: int) -> None:
    number = random.Random(seed)
    mode = MODES[seed % len(MODES)]
    async with Machine(cpu="soft", memory="4M") as machine:
        (vcpu,) = machine.vcpus
        machine.load(Flat(noise(number, 512), 0x1000, mode))
        context = vcpu.context
        for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"):
            setattr(context, name, number.choice((number.getrandbits(64), number.getrandbits(20))))
        if number.random() < 0.3:
            machine.memory.write(0x10000, number.randbytes(0x1000))
        assert isinstance(vcpu.model, SoftCpu)
        vcpu.model.counting = number.random() < 0.7
        for _ in range(EXITS):
            exit_ = await vcpu.run(number.choice((1, 7, TICKS)))
            answer(vcpu, exit_, number)
            if not isinstance(exit_, InterruptedExit | IoExit | MmioExit):
                if number.random() < 0.2:
                    break
                # Go on elsewhere, in whatever state it has got into.
                vcpu.context.rip = 0x1000 + number.randrange(512)
            if number.random() < 0.1:
                vcpu.model.interrupt(number.randrange(256))
            if number.random() < 0.02:
                region = machine.memory.add_ram(0x40_0000 + (number.randrange(64) << 12), 0x1000)
                await vcpu.run(TICKS)
                machine.memory.remove(region)
        vcpu.dump()


def answer(vcpu: VCpu, exit_: object, number: random.Random) -> None:
    """Give a read something."""
    page = vcpu.model.page
    if isinstance(exit_, MmioExit) and not exit_.is_write:
        vcpu.model.mmio_word[0] = number.getrandbits(64)
    elif isinstance(exit_, IoExit) and not exit_.is_write:
        vcpu.model.io_words[1][page.io.data_offset] = number.getrandbits(8)


def main(first: int, count: int) -> None:
    for seed in range(first, first + count):
        print(seed, flush=True)
        began = time.monotonic()
        asyncio.run(one(seed))
        assert time.monotonic() - began < LONGEST_S, f"guest {seed} takes too long"
    print("done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
