"""Lockstep: generated programs on the software CPU in pieces, and on KVM."""

from __future__ import annotations

import os
import random

import pytest

from kvmaio import Machine
from kvmaio.boot import Flat
from kvmaio.cpu import DescriptorTable
from kvmaio.exits import IoExit, MmioExit
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


# ---- more kinds of instructions, with faults that the guest itself handles -----------------------

EXITS = int(os.environ.get("KVMAIO_LOCKSTEP", "3000"))
"""In each mode; 350000 makes a million in all."""

_IDT, _SKIP, _BACK = 0x5000, 0x6800, 0x6900
_HANDLERS = {  # for faults: behind their instruction, which has two bytes; for INT
    "real16": (b"\x55\x89\xe5\x83\x46\x02\x02\x5d\xcf", b"\xcf"),
    "prot32": (b"\x83\x04\x24\x02\xcf", b"\xcf"),
    "long64": (b"\x48\x83\x04\x24\x02\x48\xcf", b"\x48\xcf"),
}
_DIVIDE = (b"\xf7\xe3", b"\xf7\xeb", b"\xf7\xf3", b"\xf7\xfb")  # mul, imul, div, idiv
_STRINGS = (  # rep movs, stos, lods, cmps and scas
    *(b"\xf3\xa4", b"\xf3\xa5", b"\xf3\xaa", b"\xf3\xab"),
    *(b"\xf3\xac", b"\xf3\xa6", b"\xf2\xae"),
)
_X87 = (b"\xdb\xe3", b"\xd9\xe8\xd8\xc0", b"\xd9\xeb\xd9\xfa", b"\xdf\xe0")
_SSE = (
    *(b"\x66\x0f\x6e\xc0", b"\x66\x0f\x7e\xc3", b"\x0f\x58\xc1", b"\x66\x0f\xd4\xc8"),
    *(b"\x0f\x28\xc8", b"\x66\x0f\xef\xc1", b"\x66\x0f\x70\xc0\x1b"),
)
_MMIO = (b"\x8b\x04\x25\0\0\0\x40", b"\x89\x04\x25\x04\0\0\x40", b"\x01\x04\x25\0\0\0\x40")


def broad(seed: int, mode: str, *, x87: bool, length: int = 60) -> bytes:
    """As `program()`, with strings, divisions, INT, x87, and SSE and MMIO where they are easy."""
    number = random.Random(seed)
    word = 2 if mode == "real16" else 4
    kinds = [_DIVIDE, (b"\xcd\x40",), _STRINGS]
    if x87:
        kinds.append(_X87)
    if mode == "long64":
        kinds.append(_SSE)
    if mode != "real16":
        kinds.append(_MMIO)
    code = b""
    for _ in range(length):
        if number.random() < 0.5:
            code += bytes([number.choice(_ALU), number.choice(_PAIRS)])
        elif number.random() < 0.3:
            code += number.choice((b"\xe5\x10", b"\xe7\x11"))
        else:
            kind = number.choice(kinds)
            if kind is _STRINGS:
                for opcode, value in ((0xBE, 0x2000), (0xBF, 0x3000), (0xB9, number.randrange(9))):
                    code += bytes([opcode]) + value.to_bytes(word, "little")
            code += number.choice(kind)
    code += b"\xe7\x11\xe9"
    return code + (-(len(code) + word) & (1 << 8 * word) - 1).to_bytes(word, "little")


def load_broad(machine: Machine, seed: int, mode: str, *, x87: bool = True) -> None:
    """Load it, with handlers for all vectors."""
    machine.load(Flat(broad(seed, mode, x87=x87), 0x1000, mode))
    machine.memory.write(_SKIP, _HANDLERS[mode][0])
    machine.memory.write(_BACK, _HANDLERS[mode][1])
    for vector in range(256):
        handler = _BACK if vector == 0x40 else _SKIP
        if mode == "real16":
            machine.memory.write(vector * 4, handler.to_bytes(4, "little"))
        else:  # an interrupt gate (SDM vol. 3A, 6.11 and 6.14.1)
            gate = handler.to_bytes(2, "little") + b"\x08\0\0\x8e\0\0"
            size = 16 if mode == "long64" else 8
            machine.memory.write(_IDT + vector * size, gate)
    if mode != "real16":
        machine.vcpus[0].context.idt = DescriptorTable(base=_IDT, limit=0xFFF)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["real16", "prot32", "long64"])
async def test_pieces_of_programs_with_faults_strings_and_floats_are_the_same_run(mode):
    lengths = random.Random(2)
    each = 1000
    for seed in range(EXITS // each):
        async with Machine(cpu="soft") as whole, Machine(cpu="soft") as pieces:
            for machine in (whole, pieces):
                load_broad(machine, seed, mode)
            async with deadline(60):
                found = await lockstep(
                    whole, pieces, exits=each, chunk=lambda: lengths.randint(1, 40), undefined=0
                )
            assert found is None, f"{mode} {seed}: {found.what} at {found.exit}\n{found.report}"
            assert whole.memory.read(0, 0x8000) == pieces.memory.read(0, 0x8000)
            # It has not ended before.
            assert isinstance(await whole.vcpus[0].run(), IoExit | MmioExit), f"{mode} {seed}"


# ---- against KVM --------------------------------------------------------------------------------


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


_BY_DIVISION = 0x8D5  # the arithmetic flags (SDM vol. 2A, DIV), which go on into ADC and SBB


@pytest.mark.kvm
async def test_kvm_and_the_software_cpu_agree_about_faults_and_strings():
    """In real mode: KVM's emulator has no IRET in others."""
    for seed in range(5):
        async with Machine(cpu="kvm", assist=False) as kvm, Machine(cpu="soft") as soft:
            for machine in (kvm, soft):
                load_broad(machine, seed, "real16", x87=False)
            async with deadline(30):
                found = await lockstep(kvm, soft, exits=200, undefined=_BY_DIVISION)
            assert found is None, f"{seed}: {found.what} at {found.exit}\n{found.report}"


async def test_a_difference_is_found_and_shown():
    async with Machine(cpu="soft") as one, Machine(cpu="soft") as other:
        for machine in (one, other):
            machine.load(image(1, "long64"))
        other.vcpus[0].context.rsi = 1
        async with deadline():
            found = await lockstep(one, other, exits=50)
    assert found is not None and "rsi" in found.what + found.report
