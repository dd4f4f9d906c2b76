"""`SoftPlatform`: a machine whose CPUs are software, for `Machine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..cpu import CpuModel
from ..errors import ConfigurationError, HostError
from ..kvm import cpuid
from ..kvm.cpuid import CpuidEntry
from ..kvm.saving import get_cpuid_tables, set_cpuid_tables
from ..memory import GuestMemory, MemoryRegion
from ._soft import ffi, lib
from .cpu import SoftCpu
from .loader import load

if TYPE_CHECKING:
    from ..kvm._native import CData

__all__ = ["SoftMachine", "SoftPlatform"]

_INDEXED_LEAVES = {4: 4, 7: 1, 0xB: 2, 0xD: 3, 0x14: 1}
"""Leaves with sub-leaves, and how many of them are of interest."""

_SIGNIFICANT_INDEX = 1


class SoftMachine:
    """What the software CPUs of a machine share: its memory, and their turns."""

    def __init__(self) -> None:
        self.handle: CData | None = lib.kvmaio_soft_machine_create()
        self._end_watch: Callable[[], None] = lambda: None
        self.born_ns: int | None = None  # when time stamp counters began
        self._views: dict[int, Any] = {}  # base -> what keeps the region's memory in place

    def attach_memory(self, memory: GuestMemory) -> None:
        """Show every region of `memory` to the CPUs, now and as they come and go."""
        self._end_watch = memory.watch(self._added, self._removed, self._written)

    def _added(self, region: MemoryRegion) -> None:
        if self.handle is None:
            return
        view = ffi.from_buffer(region.mapping, require_writable=True)
        error = lib.kvmaio_soft_add_memory(
            self.handle, region.base, region.size, view, region.readonly
        )
        if error:
            raise HostError("uc_mem_map_ptr", -error, str(region))
        self._views[region.base] = view

    def _removed(self, region: MemoryRegion) -> None:
        if self.handle is None:
            return
        error = lib.kvmaio_soft_remove_memory(self.handle, region.base)
        if error:
            raise HostError("uc_mem_unmap", -error, str(region))
        ffi.release(self._views.pop(region.base))

    def _written(self, address: int, size: int) -> None:
        if self.handle is not None:
            lib.kvmaio_soft_memory_written(self.handle, address, size)

    def forget_code(self) -> None:
        """All of memory may be another."""
        self._written(0, 1 << 52)

    def close(self) -> None:
        """After its CPUs. Idempotent."""
        handle, self.handle = self.handle, None
        if handle is not None:
            self._end_watch()
            lib.kvmaio_soft_machine_destroy(handle)
            for view in self._views.values():
                ffi.release(view)
            self._views.clear()


class SoftPlatform:
    """See `kvmaio.platform.Platform`."""

    kind = "soft"
    host_kind = None

    def __init__(self, irqchip: str | None, clock_hz: int) -> None:
        if irqchip in ("kernel", "split"):
            raise ConfigurationError(
                f'irqchip="{irqchip}" is KVM\'s; the software CPU has irqchip=None or "devices"'
            )
        load()
        self._irqchip = irqchip
        self._clock_hz = clock_hz
        self._machine = SoftMachine()
        self._cpus: list[SoftCpu] = []

    def attach_memory(self, memory: GuestMemory) -> None:
        self._machine.attach_memory(memory)

    def create_cpus(self, count: int) -> list[CpuModel]:
        try:
            for index in range(count):
                self._cpus.append(SoftCpu(self._machine, index, self._clock_hz))
        except BaseException:
            for cpu in self._cpus:
                cpu.close()
            raise
        return list(self._cpus)

    def set_cpuid(self, policy: Any) -> None:
        # Nothing here is run by KVM's emulator: what is safe for that is not the question.
        policy = "host" if policy == "emulator-safe" else policy
        for cpu in self._cpus:
            own = OwnCpuid(cpu)
            cpu.set_cpuid(
                cpuid.select(
                    own,
                    policy,
                    cpu.index,
                    len(self._cpus),
                    local_apic=self._irqchip is not None,
                    plain_apic=True,
                )
            )

    def enable_xcr0(self) -> None:
        for cpu in self._cpus:
            cpu.enable_xcr0()

    def irq_sink(self, number: int) -> Callable[[bool], None] | None:
        return None

    def post(self, address: int, size: int, is_pio: bool, timed: bool) -> None:
        """Nothing: each write is an exit, and on time."""

    def share(self, address: int, size: int, is_pio: bool) -> Any:
        return None

    def add_doorbell(
        self,
        address: int,
        size: int,
        is_pio: bool,
        ring: Callable[[int], None],
        rung: Callable[[], None],
    ) -> None:
        """Nothing: each ring is an exit."""

    def irqfd(self, number: int) -> int:
        raise ConfigurationError('an irqfd needs KVM\'s interrupt controller: irqchip="kernel"')

    def save(self) -> dict[str, bytes | int]:
        return get_cpuid_tables(self._cpus)

    def check_state(self, saved: dict[str, bytes | int]) -> None:
        """Nothing: what is KVM's is not looked at here."""

    def restore_cpuid(self, saved: dict[str, bytes | int]) -> None:
        set_cpuid_tables(self._cpus, saved)

    def restore(self, saved: dict[str, bytes | int]) -> None:
        self._machine.forget_code()

    def close(self) -> None:
        self._machine.close()


class OwnCpuid:
    """What the engine itself offers, as a source of `kvmaio.kvm.cpuid.select`."""

    def __init__(self, cpu: SoftCpu) -> None:
        self._cpu = cpu

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        entries = []
        for first in (0, 0x80000000):
            highest = self._cpu.own_cpuid(first, 0)[0]
            for function in range(first, min(highest, first + 0x20) + 1):
                for index in range(_INDEXED_LEAVES.get(function, 1)):
                    values = self._cpu.own_cpuid(function, index)
                    flags = _SIGNIFICANT_INDEX if function in _INDEXED_LEAVES else 0
                    if any(values) or not index:
                        entries.append(CpuidEntry(function, index, flags, *values))
        return tuple(entries)
