"""Linear addresses, by tables that the boot code builds and by tables made here."""

from __future__ import annotations

import struct

import pytest

from kvmaio.boot import Flat
from kvmaio.cpu import Context
from kvmaio.errors import ConfigurationError
from kvmaio.linear import code_address, code_bits, read_linear, translate, write_linear
from kvmaio.memory import GuestMemory
from tests.boot.walker import ram
from tests.boot.walker import translate as walk


@pytest.mark.parametrize("mode", ["real16", "prot32", "long64", "user64"])
def test_modes_that_boot_sets_up(mode):
    memory = ram(4 << 20)
    context = Flat(b"\x90" * 16, 0x1000, mode).place(memory).context
    assert code_bits(context) == {"real16": 16, "prot32": 32}.get(mode, 64)
    assert code_address(context) == 0x1000
    assert read_linear(memory, context, 0x1000, 16) == b"\x90" * 16
    if mode.endswith("64"):
        for address in (0x1000, 0x3F_FFFF, 0x1234_5678):
            mapping = walk(memory, context.cr3, address)
            assert translate(memory, context, address) == (mapping and mapping.physical)
    else:
        assert translate(memory, context, 0x1234_5678) == 0x1234_5678


def test_real_mode_adds_the_base():
    context = Context(rip=0xFFF0)
    assert (code_bits(context), code_address(context)) == (16, 0xFFFF_FFF0)


def put(memory: GuestMemory, address: int, form: str, *entries: int) -> None:
    memory.write(address, struct.pack(f"<{len(entries)}{form}", *entries))


def test_32_bit_paging_with_large_pages():
    memory = ram(1 << 20)
    put(memory, 0x1000, "I", 0x2001, 0x0040_0081 | 3 << 13)  # a table; 4 MiB, 3 << 32 above
    put(memory, 0x2000 + 4 * 5, "I", 0x7001)
    context = Context(cr0=0x8000_0001, cr3=0x1000, cr4=0x10)
    assert translate(memory, context, 0x5678) == 0x7678
    assert translate(memory, context, 0x6678) is None
    assert translate(memory, context, 0x0040_1234) == 0x3_0040_1234
    context.cr4 = 0  # without PSE that entry leads to a table, where there is no memory
    assert translate(memory, context, 0x0040_1234) is None


def test_pae_paging():
    memory = ram(1 << 20)
    put(memory, 0x1000, "Q", 0x2001)
    put(memory, 0x2000, "Q", 0x3001, 0x20_0081 | 1 << 63)  # a table; 2 MiB, not executable
    put(memory, 0x3000, "Q", 0x7001)
    context = Context(cr0=0x8000_0001, cr3=0x1000, cr4=0x20)
    assert translate(memory, context, 0x0678) == 0x7678
    assert translate(memory, context, 0x20_0678) == 0x20_0678
    assert translate(memory, context, 0x4000_0000) is None


def test_accesses_follow_the_pages():
    memory = ram(1 << 20)
    put(memory, 0x1000, "I", 0x2001)
    put(memory, 0x2000, "I", 0x8001, 0x7001, 0, 0x00F0_0001)
    context = Context(cr0=0x8000_0001, cr3=0x1000)
    write_linear(memory, context, 0xFFE, b"abcd")
    assert memory.read(0x8FFE, 2) + memory.read(0x7000, 2) == b"abcd"
    assert read_linear(memory, context, 0xFFE, 4) == b"abcd"
    assert len(read_linear(memory, context, 0x1000, 9999)) == 4096  # the next page is not there
    assert read_linear(memory, context, 0x3000, 1) == b""  # and this one has no memory
    for address in (0x1FFE, 0x2FFE):
        with pytest.raises(ConfigurationError):
            write_linear(memory, context, address, b"abcd")
    assert memory.read(0x7FFE, 2) == bytes(2)
