"""`IrqChips`: a PC's interrupt controllers as device models, wired to the vCPUs.

For ``irqchip="devices"``, on any CPU model without a local APIC of its own::

    line n ─┬─► PIC master and slave (n < 16) ──INTR──► LINT0 of local APIC 0 ─┐
            └─► IOAPIC, pin n ──messages──► local APICs ──────────────────────┴─► INTR of each vCPU
"""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from typing import TYPE_CHECKING

from .device import Device
from .devices import ApicBus, Elcr, IoApic, LocalApic, Pic8259
from .errors import ConfigurationError
from .irq import IrqSink
from .vcpu import VCpu, current_vcpu

if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["IrqChips"]

LINES = 24
PIC_LINES = 16
CASCADE = 2  # of the master: the slave is there, and no line

MASTER_PORT, SLAVE_PORT, ELCR_PORT = 0x20, 0xA0, 0x4D0
IOAPIC_ADDRESS = 0xFEC0_0000
LOCAL_APIC_ADDRESS = 0xFEE0_0000


class IrqChips:
    """The controllers of one machine, attached to it like any device."""

    def __init__(self, machine: Machine) -> None:
        vcpus = machine.vcpus
        if len(vcpus) > 255:
            raise ConfigurationError(
                f'{len(vcpus)} vCPUs, but with irqchip="devices" 255 have a local APIC'
            )
        self._master = machine.attach(Pic8259(), pio=MASTER_PORT, name="pic0")
        self._slave = machine.attach(Pic8259(), pio=SLAVE_PORT, name="pic1")
        self._master.cascade(CASCADE, self._slave)
        machine.attach(Elcr(self._master, self._slave), pio=ELCR_PORT, name="elcr")
        bus = ApicBus()
        self._ioapic = machine.attach(IoApic(bus), mmio=IOAPIC_ADDRESS, name="ioapic")
        apics = [
            machine.attach(LocalApic(vcpu.index, bus), name=f"apic{vcpu.index}") for vcpu in vcpus
        ]
        machine.attach(_ApicWindow(vcpus, apics), mmio=LOCAL_APIC_ADDRESS, name="apics")
        apics[0].external = self._master.acknowledge
        self._master.irq.connect(partial(apics[0].set_pin, 0))
        for vcpu, apic in zip(vcpus, apics, strict=True):
            pin = _Pin(vcpu, apic)
            vcpu.interrupts.source = apic.processor = pin
            apic.irq.connect(pin.changed)
            if vcpu.index:
                vcpu.init()  # an application processor

    def sink(self, line: int) -> IrqSink:
        """What follows an interrupt line.

        Raises:
            ConfigurationError: there is no such line.
        """
        if line >= LINES:
            raise ConfigurationError(f"interrupt line {line}: the IOAPIC has 0 to {LINES - 1}")
        to_ioapic = self._ioapic.input(line)
        if line >= PIC_LINES or line == CASCADE:
            return to_ioapic
        to_pic = (self._slave if line >= 8 else self._master).input(line % 8)

        def to_both(level: bool) -> None:
            to_pic(level)
            to_ioapic(level)

        return to_both


class _Pin:
    """A vCPU's INTR, INIT and NMI; see `InterruptSource` and the local APIC's `Processor`."""

    def __init__(self, vcpu: VCpu, apic: LocalApic) -> None:
        self._vcpu = vcpu
        self._apic = apic

    @property
    def pending(self) -> bool:
        # The guest may have changed CR8 since, and then others are let through.
        self._apic.take_cr8(self._vcpu.model.page.cr8)
        return self._apic.irq.level

    def acknowledge(self) -> int:
        return self._apic.acknowledge()

    def changed(self, level: bool) -> None:
        if level:
            self._vcpu.attend()

    def nmi(self) -> None:
        self._vcpu.interrupts.nmi = True
        self._vcpu.attend()

    def init(self) -> None:
        self._vcpu.receive_init()

    def start_up(self, vector: int) -> None:
        self._vcpu.receive_start_up(vector)


class _ApicWindow(Device):
    """The page in which each vCPU sees its own local APIC; others see the boot processor's."""

    size = LocalApic.size

    def __init__(self, vcpus: list[VCpu], apics: list[LocalApic]) -> None:
        self._vcpus = vcpus
        self._apics = apics

    def read(self, offset: int, size: int) -> int | Awaitable[int]:
        return self._apics[self._look()].read(offset, size)

    def write(self, offset: int, size: int, value: int) -> Awaitable[None] | None:
        index = self._look()
        pending = self._apics[index].write(offset, size, value)
        if pending is not None:
            return self._finish(pending, index)
        self._written(index)
        return None

    async def _finish(self, pending: Awaitable[None], index: int) -> None:
        await pending
        self._written(index)

    def _written(self, index: int) -> None:
        apic, vcpu = self._apics[index], self._vcpus[index]
        apic.update()
        # The task priority's class is CR8, and the other way round.
        if apic.task_priority >> 4 != vcpu.model.page.cr8:
            vcpu.context.cr8 = apic.task_priority >> 4

    def _look(self) -> int:
        """Who looks: the vCPU whose access is served. Its local APIC hears of CR8."""
        try:
            index = current_vcpu().index
        except ConfigurationError:
            return 0
        self._apics[index].take_cr8(self._vcpus[index].model.page.cr8)
        return index
