"""What the software CPU keeps aside of KVM's state: all of it comes back, and losses are told."""

from __future__ import annotations

import logging

import pytest

from kvmaio import Machine
from kvmaio.boot import Flat
from kvmaio.cpu import Context, CpuState
from kvmaio.soft import cpu as soft_cpu
from kvmaio.soft.kept import Kept
from tests.engine.support import deadline

pytestmark = pytest.mark.soft

AVX, PKRU = 1 << 2, 1 << 9


def state(components: int = 0, contents: dict[int, int] | None = None, **msrs: int) -> CpuState:
    area = bytearray(4096)
    area[512:520] = (components | 3).to_bytes(8, "little")
    for offset, value in (contents or {}).items():
        area[offset] = value
    return CpuState(
        Context(),
        xsave=bytes(area),
        msrs={int(name[1:], 16): value for name, value in msrs.items()},
    )


@pytest.mark.parametrize(
    ("saved", "report"),
    [
        (state(), ""),
        (state(AVX | PKRU), ""),
        (state(AVX | PKRU, {600: 1}), "XSAVE components 2"),
        (state(AVX | PKRU, {2688: 1}), "XSAVE components 9"),
        (state(AVX | PKRU, {600: 1, 2432: 1}), "XSAVE components 2, 9"),
        # A component that is not marked is in its initial state, whatever lies there.
        (state(PKRU, {600: 1}), ""),
        (state(_ce=5, _10a=7, _1a0=1, _4b564d05=1, _3b=0, _277=9), ""),
        (state(_1a0=0x1801, _40000010=7, _40000020=7, _40000022=7), ""),
        (state(_1a0=0, _3b=5, _4b564d05=3), "MSRs 0x3b, 0x4b564d05"),
        (state(PKRU, {2688: 1}, _3b=5), "XSAVE components 9; MSRs 0x3b"),
    ],
)
def test_what_is_as_after_a_reset_needs_no_report(saved, report):
    kept = Kept()
    assert kept.keep(saved) == report
    back = kept.give_back(CpuState(Context(), xsave=bytes(512) + b"\x03" + bytes(3583)))
    assert saved.xsave is not None and back.xsave is not None
    if saved.xsave[512] & AVX or saved.xsave[513]:
        assert back.xsave[512:] == saved.xsave[512:]
    assert back.msrs == {index: value for index, value in saved.msrs.items() if index != 0x277}


@pytest.mark.kvm
async def test_a_plain_guest_crosses_without_a_word(caplog, monkeypatch):
    monkeypatch.setattr(soft_cpu, "_reported", set())
    with caplog.at_level(logging.WARNING):
        async with Machine(memory="1M", cpu="kvm") as machine, deadline():
            machine.load(Flat(b"\xeb\xfe", 0x1000))
            await machine.vcpus[0].run(100_000)
            for cpu in ("soft", "kvm"):
                await machine.switch_cpu(cpu)
                await machine.vcpus[0].run(100_000)
    assert [record.getMessage() for record in caplog.records] == []
