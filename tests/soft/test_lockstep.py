"""Lockstep: generated programs on the software CPU in pieces, and on KVM."""

from __future__ import annotations

import random

import pytest

from kvmaio import Machine
from kvmaio.boot import Flat
from kvmaio.lockstep import lockstep
from tests.engine.support import deadline

pytestmark = pytest.mark.soft

# ALU operations between two of AX, BX, SI, DI, the stack, IN and OUT; the same bytes in all modes.
_PAIRS = [0xC0 | a << 3 | b for a in (0, 3, 6, 7) for b in (0, 3, 6, 7)]
_ALU = (0x01, 0x09, 0x11, 0x19, 0x21, 0x29, 0x31, 0x39, 0x85, 0x87, 0x89)


def program(seed: int, length: int = 40) -> bytes:
    """A loop of `length` instructions that goes on for ever."""
    number = random.Random(seed)
    code = b""
    for _ in range(length):
        pick = number.random()
        if pick < 0.6:
            code += bytes([number.choice(_ALU), number.choice(_PAIRS)])
        elif pick < 0.7:
            code += bytes([0xD1, number.choice((0xC0, 0xC8, 0xE0, 0xE8, 0xF8)) | 3])
        elif pick < 0.8:
            code += b"\x50\x5b"  # push ax; pop bx
        elif pick < 0.9:
            code += b"\xe5\x10"  # in eax, 0x10
        else:
            code += b"\xe7\x11"  # out 0x11, eax
    return code + b"\xe7\x11\xe9" + ((-(len(code) + 7)) & 0xFFFFFFFF).to_bytes(4, "little")


def image(seed: int, mode: str) -> Flat:
    code = program(seed)
    if mode == "real16":  # a near jump of 16 bits
        code = code[:-5] + b"\xe9" + ((-(len(code) - 5 + 3)) & 0xFFFF).to_bytes(2, "little")
    return Flat(code, 0x1000, mode)


@pytest.mark.parametrize("mode", ["real16", "prot32", "long64"])
async def test_pieces_of_any_length_are_the_same_run(mode):
    lengths = random.Random(1)
    for seed in range(5):
        async with Machine(cpu="soft") as whole, Machine(cpu="soft") as pieces:
            for machine in (whole, pieces):
                machine.load(image(seed, mode))
            async with deadline(30):
                found = await lockstep(
                    whole, pieces, exits=500, chunk=lambda: lengths.randint(1, 9), undefined=0
                )
            assert found is None, found.report
            assert whole.memory.read(0, 0x8000) == pieces.memory.read(0, 0x8000)


@pytest.mark.kvm
@pytest.mark.parametrize("mode", ["real16", "prot32", "long64"])
async def test_kvm_and_the_software_cpu_agree(mode):
    for seed in range(5):
        async with Machine(cpu="kvm") as kvm, Machine(cpu="soft") as soft:
            for machine in (kvm, soft):
                machine.load(image(seed, mode))
            async with deadline(30):
                found = await lockstep(kvm, soft, exits=200)
            assert found is None, f"{mode} {seed}: {found.what} at {found.exit}\n{found.report}"


async def test_a_difference_is_found_and_shown():
    async with Machine(cpu="soft") as one, Machine(cpu="soft") as other:
        for machine in (one, other):
            machine.load(image(1, "long64"))
        other.vcpus[0].context.rsi = 1
        async with deadline():
            found = await lockstep(one, other, exits=50)
    assert found is not None and "rsi" in found.what + found.report
