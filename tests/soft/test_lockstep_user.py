"""Lockstep of KVM and the software CPU in 64-bit user mode, which every KVM runs natively.

Registers, memory, x87 and SSE state, and all flags that are defined, behind each exit.
"""

from __future__ import annotations

import os

import pytest

from kvmaio import Machine
from kvmaio.boot import Flat
from kvmaio.cpu import DescriptorTable
from kvmaio.lockstep import defined_floats, lockstep
from tests.assembler import assemble
from tests.engine.support import LAB, deadline
from tests.soft.programs import (
    DATA,
    FAULTS,
    HANDLERS,
    IDT,
    handler_lines,
    handlers,
    pool,
    program,
)

pytestmark = [pytest.mark.kvm, pytest.mark.soft]

EXITS = int(os.environ.get("KVMAIO_LOCKSTEP_USER", "1000" if LAB else "2500"))
"""In all; of one program:"""
EACH = 500

IOPL = 0x3000  # which PVM does not show
COMPARED = ((DATA, 0x2000), (FAULTS, 0x400))


async def compare(seed: int, exits: int) -> None:
    """Program `seed` on KVM, and on the software CPU from KVM's checkpoint."""
    found = program(seed)
    async with Machine(memory="2M", cpu="kvm") as kvm, Machine(memory="2M", cpu="soft") as soft:
        kvm.load(Flat(assemble(found.lines, "user64", 0x10000), 0x10000, "user64"))
        handlers(kvm.memory.write, assemble(handler_lines(), "user64", HANDLERS))
        kvm.memory.write(DATA, pool(seed))
        kvm.vcpus[0].context.idt = DescriptorTable(base=IDT, limit=0x1FF)
        await soft.restore(await kvm.checkpoint())
        count = len(found.undefined)
        async with deadline(120):
            difference = await lockstep(
                kvm,
                soft,
                exits=exits,
                undefined=lambda n: found.undefined[n % count] | IOPL,
                memory=COMPARED,
                floats=defined_floats,
            )
    assert difference is None, (
        f"program {seed}: {difference.what} at {difference.exit}\n{difference.report}"
    )


@pytest.mark.timeout((60 + EXITS // 100) * (10 if LAB else 1))
async def test_kvm_and_the_software_cpu_agree_in_user_mode():
    for seed in range(max(1, EXITS // EACH)):
        await compare(seed, EACH)
