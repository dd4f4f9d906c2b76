"""`KvmPlatform`: a virtual machine under KVM, for `Machine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cpu import CpuModel
from ..errors import ConfigurationError
from ..memory import GuestMemory
from . import cpuid
from ._native import lib
from .cpu import KvmCpu
from .hub import Hub
from .vm import KvmVm

__all__ = ["KvmPlatform"]

ISA_LINES = 16
GSIS = 24  # the pins of KVM's IOAPIC


class KvmPlatform:
    """See `kvmaio.platform.Platform`."""

    kind = "kvm"

    def __init__(self, irqchip: str | None) -> None:
        self._irqchip = irqchip
        self._cpus: list[KvmCpu] = []
        self.hub = Hub.acquire()
        try:
            self.vm = KvmVm(self.hub.kvm)
        except BaseException:
            self.hub.release()
            raise
        try:
            # Both before the first vCPU: KVM insists.
            if irqchip == "kernel":
                self.vm.create_irqchip()
                self.vm.create_pit()
            elif irqchip == "split":
                self.vm.enable_split_irqchip()
        except BaseException:
            self.close()
            raise

    def attach_memory(self, memory: GuestMemory) -> None:
        self.vm.attach_memory(memory)

    def create_cpus(self, count: int) -> list[CpuModel]:
        most = self.hub.kvm.capability(lib.KVM_CAP_MAX_VCPUS)
        if count > most:
            raise ConfigurationError(f"{count} vCPUs, but this host's KVM allows {most}")
        try:
            for index in range(count):
                self._cpus.append(KvmCpu(self.hub, self.vm, index, self._irqchip is not None))
        except BaseException:
            for cpu in self._cpus:
                cpu.close()
            raise
        return list(self._cpus)

    def set_cpuid(self, policy: Any) -> None:
        for cpu in self._cpus:
            entries = cpuid.select(self.hub.kvm, policy, cpu.index, len(self._cpus))
            cpu.set_cpuid(entries)

    def enable_xcr0(self) -> None:
        for cpu in self._cpus:
            cpu.enable_xcr0()

    def irq_sink(self, number: int) -> Callable[[bool], None] | None:
        if self._irqchip is None:
            return None
        if self._irqchip == "split":
            raise ConfigurationError(
                'interrupt lines need an IOAPIC, and with irqchip="split" there is none; '
                'use irqchip="kernel" or signal MSIs'
            )
        if number >= GSIS:
            raise ConfigurationError(f"interrupt line {number}: KVM's IOAPIC has 0 to {GSIS - 1}")
        return lambda level: self.vm.irq_line(number, level)

    def coalesce(self, address: int, size: int, is_pio: bool) -> None:
        needed = lib.KVM_CAP_COALESCED_PIO if is_pio else lib.KVM_CAP_COALESCED_MMIO
        if self.hub.kvm.capability(needed):  # without it every write is an exit: the same, slower
            self.vm.coalesce(address, size, is_pio)

    def close(self) -> None:
        self.vm.close()
        self.hub.release()
