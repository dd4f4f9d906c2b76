"""`KvmPlatform`: a virtual machine under KVM, for `Machine`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ..cpu import CpuModel
from ..errors import ConfigurationError
from ..memory import GuestMemory
from . import cpuid
from ._native import lib
from .cpu import KvmCpu
from .fast import FastPaths
from .hub import Hub
from .saving import check_vm_state, get_vm_state, set_cpuid_tables, set_vm_state
from .vm import KvmVm

__all__ = ["KvmPlatform"]

GSIS = 24  # the pins of KVM's IOAPIC


class KvmPlatform:
    """See `kvmaio.platform.Platform`."""

    kind = "kvm"

    def __init__(self, irqchip: str | None) -> None:
        self._irqchip = irqchip
        self._has_lapic = irqchip in ("kernel", "split")  # KVM's own
        self._cpus: list[KvmCpu] = []
        self._fast: FastPaths | None = None
        self._irqfds: list[int] = []
        self.hub = Hub.acquire()
        self.host_kind = self.hub.kvm.kind
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
                self._cpus.append(KvmCpu(self.hub, self.vm, index, self._has_lapic))
        except BaseException:
            for cpu in self._cpus:
                cpu.close()
            raise
        return list(self._cpus)

    def set_cpuid(self, policy: Any) -> None:
        for cpu in self._cpus:
            entries = cpuid.select(
                self.hub.kvm,
                policy,
                cpu.index,
                len(self._cpus),
                local_apic=self._irqchip is not None,
                plain_apic=not self._has_lapic,
            )
            cpu.set_cpuid(entries)

    def enable_xcr0(self) -> None:
        for cpu in self._cpus:
            cpu.enable_xcr0()

    def irq_sink(self, number: int) -> Callable[[bool], None] | None:
        if self._irqchip in (None, "devices"):
            return None
        if self._irqchip == "split":
            raise ConfigurationError(
                'interrupt lines need an IOAPIC, and with irqchip="split" there is none; '
                'use irqchip="kernel" or signal MSIs'
            )
        self._check_line(number)
        return lambda level: self.vm.irq_line(number, level)

    def post(self, address: int, size: int, is_pio: bool, timed: bool) -> None:
        self._fast_paths().post(address, size, is_pio, timed)

    def share(self, address: int, size: int, is_pio: bool) -> Any:
        return self._fast_paths().share(address, size, is_pio)

    def add_doorbell(
        self,
        address: int,
        size: int,
        is_pio: bool,
        ring: Callable[[int], None],
        rung: Callable[[], None],
    ) -> None:
        self._fast_paths().add_doorbell(address, size, is_pio, ring, rung)

    def _fast_paths(self) -> FastPaths:
        if self._fast is None:
            self._fast = FastPaths(self.vm, self._cpus, self.hub.loop)
        return self._fast

    def irqfd(self, number: int) -> int:
        if self._irqchip != "kernel":
            raise ConfigurationError('an irqfd needs KVM\'s interrupt controller: irqchip="kernel"')
        self._check_line(number)
        eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.vm.irqfd(eventfd, number)
        except BaseException:
            os.close(eventfd)
            raise
        self._irqfds.append(eventfd)
        return eventfd

    def _check_line(self, number: int) -> None:
        if not 0 <= number < GSIS:
            raise ConfigurationError(f"interrupt line {number}: KVM's IOAPIC has 0 to {GSIS - 1}")

    def save(self) -> dict[str, bytes | int]:
        return get_vm_state(self.vm, self._cpus)

    def check_state(self, saved: dict[str, bytes | int]) -> None:
        check_vm_state(self.vm, saved)

    def restore_cpuid(self, saved: dict[str, bytes | int]) -> None:
        set_cpuid_tables(self._cpus, saved)

    def restore(self, saved: dict[str, bytes | int]) -> None:
        set_vm_state(self.vm, saved)

    def close(self) -> None:
        if self._fast is not None:
            self._fast.close()
            self._fast = None
        for eventfd in self._irqfds:
            os.close(eventfd)
        self._irqfds.clear()
        self.vm.close()
        self.hub.release()
