"""`Platform`: what a machine needs of the host, and the choice of it.

KVM is one platform; the software CPU is another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .cpu import CpuModel
from .errors import ConfigurationError
from .memory import GuestMemory

__all__ = ["Platform", "can_assist", "choose", "open_platform"]


class Platform(Protocol):
    """A virtual machine's parts that are the host's business."""

    kind: str

    @property
    def host_kind(self) -> str | None:
        """The host's kind of KVM, such as ``SVM``; None without KVM."""

    def attach_memory(self, memory: GuestMemory) -> None:
        """Show the guest this memory, and follow its changes."""

    def create_cpus(self, count: int) -> list[CpuModel]:
        """Create the CPU models; once."""

    def set_cpuid(self, policy: Any) -> None:
        """Set what CPUID tells, on every CPU; before the first entry."""

    def enable_xcr0(self) -> None:
        """Set XCR0 to what the host offers of x87, SSE and AVX, on every CPU."""

    def irq_sink(self, number: int) -> Callable[[bool], None] | None:
        """What follows interrupt line `number`; None: the engine does."""

    def post(self, address: int, size: int, is_pio: bool, timed: bool) -> None:
        """Batch the guest's writes there, where the host can."""

    def share(self, address: int, size: int, is_pio: bool) -> Any:
        """Answer reads there from the array of one 64-bit word that is returned, or None."""

    def add_doorbell(
        self,
        address: int,
        size: int,
        is_pio: bool,
        ring: Callable[[int], None],
        rung: Callable[[], None],
    ) -> None:
        """Count writes there instead of leaving the guest, where the host can.

        `rung` is called when there are some; delivering them calls `ring` with how many.
        """

    def irqfd(self, number: int) -> int:
        """An eventfd, each write of 1 to which is an edge on interrupt line `number`."""

    def save(self) -> dict[str, bytes | int]:
        """State beside the CPUs' own, for a checkpoint: name -> structure or number."""

    def check_state(self, saved: dict[str, bytes | int]) -> None:
        """Is it what `save()` gives, as far as that can be seen? Changes nothing.

        Raises:
            CheckpointError: it is not.
        """

    def restore_cpuid(self, saved: dict[str, bytes | int]) -> None:
        """Have CPUID tell what it did when `save()` was called; before anything else goes back.

        Raises:
            CheckpointError: it differs, and the guest has run; nothing has changed.
        """

    def restore(self, saved: dict[str, bytes | int]) -> None:
        """Take back the rest of what `save()` gave, here or on another platform; the CPUs come
        later.

        Raises:
            CheckpointError: it cannot be had here.
        """

    def close(self) -> None:
        """Give everything back; the CPU models are closed before."""


def open_platform(cpu: str, irqchip: str | None, clock_hz: int) -> Platform:
    """The platform for ``Machine(cpu=..., irqchip=..., clock_hz=...)``.

    Raises:
        ConfigurationError: there is none here.
        HostError: the model that was asked for cannot be had.
    """
    if cpu == "auto":
        cpu = choose(irqchip)
    if cpu == "soft":
        from .soft.platform import SoftPlatform

        return SoftPlatform(irqchip, clock_hz)
    from .kvm.platform import KvmPlatform

    return KvmPlatform(irqchip)


def choose(irqchip: str | None = None) -> str:
    """The CPU model for ``cpu="auto"``: KVM if it is usable, else the software CPU.

    Raises:
        ConfigurationError: neither is; says what to install.
    """
    from .kvm.host import usable
    from .soft.loader import why_not

    no_kvm = usable()
    if no_kvm is None:
        return "kvm"
    if irqchip in ("kernel", "split"):
        raise ConfigurationError(f'irqchip="{irqchip}" needs KVM, which is not usable: {no_kvm}')
    no_soft = why_not()
    if no_soft is None:
        return "soft"
    raise ConfigurationError(f"no CPU model is usable here. KVM: {no_kvm}. Software CPU: {no_soft}")


def can_assist() -> bool:
    """Is the software CPU here, for what KVM cannot emulate?"""
    from .soft.loader import why_not

    return why_not() is None
