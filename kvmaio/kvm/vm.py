"""`KvmVm`: one virtual machine of the host's KVM, without its vCPUs.

Source: the kernel's ``Documentation/virt/kvm/api.rst``, section 4; the ioctl
behind a method is the one named like it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import attrs

from ..errors import ConfigurationError
from ..memory import GuestMemory, MemoryRegion
from ._native import ffi, lib
from .attributes import DeviceAttributes
from .gate import check
from .host import Kvm
from .slots import PRIVATE_PAGES, MemorySlots

if TYPE_CHECKING:
    from ._native import CData

__all__ = ["IrqchipRoute", "KvmVm", "MsiRoute"]

# The TSS takes three pages behind the identity map's one.
_IDENTITY_MAP_ADDRESS = PRIVATE_PAGES.start
_TSS_ADDRESS = PRIVATE_PAGES.start + 0x1000


@attrs.frozen
class IrqchipRoute:
    """GSI -> a pin of an in-kernel interrupt controller (KVM_IRQCHIP_*)."""

    gsi: int
    chip: int
    pin: int


@attrs.frozen
class MsiRoute:
    """GSI -> a message-signalled interrupt: a 32-bit `data` word to a 64-bit `address`."""

    gsi: int
    address: int
    data: int


class KvmVm:
    """A VM: guest memory, interrupt controllers and lines, fast-path ranges, the clock.

    Attributes:
        fd: its file descriptor; -1 once closed. The VM itself lives until its
            vCPUs are closed, too.
        slots: the guest's memory as KVM sees it.
        irqchip: "kernel", "split" or None.
    """

    def __init__(self, kvm: Kvm) -> None:
        """Create the VM.

        Raises:
            HostError: the host refused.
        """
        self.kvm = kvm
        self.irqchip: str | None = None
        self._has_pit = False
        self._end_watch: Callable[[], None] = lambda: None
        self._end_guard: Callable[[], None] = lambda: None
        self._coalesced: set[tuple[int, int, bool]] = set()
        self._level = ffi.new("struct kvm_irq_level *")
        self.fd = check(lib.kvmaio_ioctl_value(kvm.fd, lib.KVM_CREATE_VM, 0), "KVM_CREATE_VM")
        # 32 slots is what KVM has had since before it could tell.
        self.slots = MemorySlots(self.fd, kvm.capability(lib.KVM_CAP_NR_MEMSLOTS) or 32)
        try:
            address = ffi.new("uint64_t *", _IDENTITY_MAP_ADDRESS)
            if kvm.capability(lib.KVM_CAP_SET_IDENTITY_MAP_ADDR):
                self._ioctl("KVM_SET_IDENTITY_MAP_ADDR", lib.KVM_SET_IDENTITY_MAP_ADDR, address)
            self._ioctl_value("KVM_SET_TSS_ADDR", lib.KVM_SET_TSS_ADDR, _TSS_ADDRESS)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the VM and let go of the guest's memory; its vCPUs come first. Idempotent."""
        if self.fd >= 0:
            self._end_watch()
            self._end_guard()
            os.close(self.fd)
            self.fd = -1
            self.slots.release_all()

    def __enter__(self) -> KvmVm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def capability(self, number: int) -> int:
        """The value of a KVM_CAP_* capability for this VM, which may differ from the host's."""
        return self._ioctl_value("KVM_CHECK_EXTENSION", lib.KVM_CHECK_EXTENSION, number)

    def enable_capability(self, number: int, *arguments: int) -> None:
        """Switch on a KVM_CAP_* capability of the VM, with up to four arguments."""
        entry = ffi.new("struct kvm_enable_cap *", {"cap": number, "args": arguments})
        self._ioctl(f"KVM_ENABLE_CAP (capability {number})", lib.KVM_ENABLE_CAP, entry)

    # ---- memory -----------------------------------------------------------------

    def attach_memory(self, memory: GuestMemory) -> None:
        """Show every region of `memory` to the guest, now and as they come and go.

        Raises:
            ConfigurationError: a region is where KVM keeps its own pages, or too many.
            HostError: the host refused one.
        """
        for region in memory.regions:
            self.slots.check(region.base, region.size, "ROM" if region.readonly else "RAM")
        self._end_guard = memory.guard(self.slots.check)
        self._end_watch = memory.watch(self._added, self._removed)
        self.memory = memory

    # The memory may outlive the VM (take-over by another CPU model): then all this is void.

    def _added(self, region: MemoryRegion) -> None:
        if self.fd >= 0:
            self.slots.add(region)

    def _removed(self, region: MemoryRegion) -> None:
        if self.fd >= 0:
            self.slots.remove(region)

    def dirty_log(self, slot: int) -> bytes:
        """See `MemorySlots.dirty_log`."""
        return self.slots.dirty_log(slot)

    # ---- interrupt controllers ------------------------------------------------------

    def create_irqchip(self) -> None:
        """PIC, IOAPIC and local APICs in the kernel; before the first vCPU.

        Raises:
            ConfigurationError: there is one already.
            HostError: the host refused.
        """
        self._refuse_second_irqchip()
        self._ioctl_value("KVM_CREATE_IRQCHIP", lib.KVM_CREATE_IRQCHIP, 0)
        self.irqchip = "kernel"

    def enable_split_irqchip(self, pins: int = lib.KVM_IOAPIC_NUM_PINS) -> None:
        """Local APICs in the kernel; PIC and an IOAPIC of `pins` are ours. Before the first vCPU.

        Raises:
            ConfigurationError: there is one already.
            HostError: the host refused.
        """
        self._refuse_second_irqchip()
        self.enable_capability(lib.KVM_CAP_SPLIT_IRQCHIP, pins)
        self.irqchip = "split"

    def _refuse_second_irqchip(self) -> None:
        if self.irqchip is not None:
            raise ConfigurationError(
                f"the machine already has an irqchip ({self.irqchip}); it can have one only"
            )

    def create_pit(self, speaker_dummy: bool = True) -> None:
        """The 8254 in the kernel; needs its irqchip.

        Args:
            speaker_dummy: port 0x61 as well, whose timer bit Linux calibrates with.

        Raises:
            ConfigurationError: no in-kernel irqchip, or there is a PIT already.
        """
        if self.irqchip != "kernel":
            raise ConfigurationError('the in-kernel PIT needs irqchip="kernel"')
        if self._has_pit:
            raise ConfigurationError("the machine already has a PIT")
        flags = lib.KVM_PIT_SPEAKER_DUMMY if speaker_dummy else 0
        config = ffi.new("struct kvm_pit_config *", {"flags": flags})
        self._ioctl("KVM_CREATE_PIT2", lib.KVM_CREATE_PIT2, config)
        self._has_pit = True

    def get_irqchip(self, chip: int) -> bytes:
        """State of the PIC master, PIC slave or IOAPIC (KVM_IRQCHIP_*), as kvm_irqchip."""
        state = ffi.new("struct kvm_irqchip *", {"chip_id": chip})
        self._ioctl(f"KVM_GET_IRQCHIP (chip {chip})", lib.KVM_GET_IRQCHIP, state)
        return bytes(ffi.buffer(state))

    def set_irqchip(self, state: bytes) -> None:
        """Put back what `get_irqchip` gave; it says itself which chip it is."""
        self._put("KVM_SET_IRQCHIP", lib.KVM_SET_IRQCHIP, "struct kvm_irqchip *", state)

    def get_pit(self) -> bytes:
        """State of the in-kernel 8254, as kvm_pit_state2."""
        state = ffi.new("struct kvm_pit_state2 *")
        self._ioctl("KVM_GET_PIT2", lib.KVM_GET_PIT2, state)
        return bytes(ffi.buffer(state))

    def set_pit(self, state: bytes) -> None:
        """Put back what `get_pit` gave."""
        self._put("KVM_SET_PIT2", lib.KVM_SET_PIT2, "struct kvm_pit_state2 *", state)

    # ---- interrupt lines -------------------------------------------------------------

    def irq_line(self, gsi: int, level: bool) -> None:
        """Drive an input of the in-kernel irqchip; an edge is a rise and a fall."""
        self._level.irq = gsi
        self._level.level = level
        result = lib.kvmaio_ioctl(self.fd, lib.KVM_IRQ_LINE, self._level)
        if result < 0:
            check(result, f"KVM_IRQ_LINE (GSI {gsi})")

    def set_gsi_routing(self, routes: Iterable[IrqchipRoute | MsiRoute]) -> None:
        """Replace the whole table of what a GSI reaches."""
        entries = []
        for route in routes:
            match route:
                case IrqchipRoute(gsi, chip, pin):
                    target: dict[str, Any] = {"irqchip": {"irqchip": chip, "pin": pin}}
                    kind = lib.KVM_IRQ_ROUTING_IRQCHIP
                case MsiRoute(gsi, address, data):
                    target = {"msi": _msi(address, data)}
                    kind = lib.KVM_IRQ_ROUTING_MSI
            entries.append({"gsi": gsi, "type": kind, "u": target})
        table = ffi.new("struct kvm_irq_routing *", {"nr": len(entries), "entries": entries})
        self._ioctl("KVM_SET_GSI_ROUTING", lib.KVM_SET_GSI_ROUTING, table)

    def signal_msi(self, address: int, data: int) -> bool:
        """Send a message-signalled interrupt; false if no local APIC took it."""
        message = ffi.new("struct kvm_msi *", _msi(address, data))
        result = lib.kvmaio_ioctl(self.fd, lib.KVM_SIGNAL_MSI, message)
        # KVM answers -1, which reads as EPERM, when no APIC matches the destination.
        return result != -errno.EPERM and check(result, "KVM_SIGNAL_MSI") > 0

    def irqfd(self, eventfd: int, gsi: int, deassign: bool = False) -> None:
        """Let writes to `eventfd` pulse `gsi`, without the engine; or end that."""
        flags = lib.KVM_IRQFD_FLAG_DEASSIGN if deassign else 0
        entry = ffi.new("struct kvm_irqfd *", {"fd": eventfd, "gsi": gsi, "flags": flags})
        self._ioctl(f"KVM_IRQFD (GSI {gsi})", lib.KVM_IRQFD, entry)

    # ---- fast paths: writes that need no exit --------------------------------------------

    def ioeventfd(
        self,
        eventfd: int,
        address: int,
        size: int,
        pio: bool = False,
        match: int | None = None,
        deassign: bool = False,
    ) -> None:
        """Turn guest writes to `address` into signals of `eventfd`; or end that.

        Args:
            address: a port if `pio`, else guest-physical.
            size: of the write, 1, 2, 4 or 8 bytes.
            match: only writes of this value; others exit as usual.
        """
        if size not in (1, 2, 4, 8):
            raise ConfigurationError(
                f"an ioeventfd of {size} bytes at {address:#x}: it must be 1, 2, 4 or 8"
            )
        flags = (
            (lib.KVM_IOEVENTFD_FLAG_PIO if pio else 0)
            | (lib.KVM_IOEVENTFD_FLAG_DATAMATCH if match is not None else 0)
            | (lib.KVM_IOEVENTFD_FLAG_DEASSIGN if deassign else 0)
        )
        entry = ffi.new(
            "struct kvm_ioeventfd *",
            {
                "datamatch": match or 0,
                "addr": address,
                "len": size,
                "fd": eventfd,
                "flags": flags,
            },
        )
        where = f"{'pio' if pio else 'mmio'} {address:#x}"
        self._ioctl(f"KVM_IOEVENTFD ({where})", lib.KVM_IOEVENTFD, entry)

    def coalesce(self, address: int, size: int, pio: bool = False) -> None:
        """Batch guest writes to a range: they go to the ring in the run page, not into exits.

        Raises:
            ConfigurationError: empty, or coalesced already, or the host cannot.
        """
        number = lib.KVM_CAP_COALESCED_PIO if pio else lib.KVM_CAP_COALESCED_MMIO
        if not self.kvm.capability(number):
            raise ConfigurationError(
                f"this host's KVM cannot coalesce {'port' if pio else 'MMIO'} writes"
            )
        key = (address, size, pio)
        if size <= 0 or key in self._coalesced:
            problem = "already coalesced" if key in self._coalesced else "empty"
            raise ConfigurationError(f"the range of {size} bytes at {address:#x} is {problem}")
        self._zone("KVM_REGISTER_COALESCED_MMIO", lib.KVM_REGISTER_COALESCED_MMIO, *key)
        self._coalesced.add(key)

    def uncoalesce(self, address: int, size: int, pio: bool = False) -> None:
        """End `coalesce` for the same range; writes in the ring stay there."""
        key = (address, size, pio)
        if key not in self._coalesced:
            raise ConfigurationError(f"the range of {size} bytes at {address:#x} is not coalesced")
        self._zone("KVM_UNREGISTER_COALESCED_MMIO", lib.KVM_UNREGISTER_COALESCED_MMIO, *key)
        # KVM drops every zone that lies within, not only the one named.
        self._coalesced = {
            (base, length, kind)
            for base, length, kind in self._coalesced
            if kind != pio or base < address or base + length > address + size
        }

    def _zone(self, operation: str, request: int, address: int, size: int, pio: bool) -> None:
        zone = ffi.new(
            "struct kvm_coalesced_mmio_zone *", {"addr": address, "size": size, "pio": pio}
        )
        self._ioctl(f"{operation} ({address:#x}, {size} bytes)", request, zone)

    # ---- the clock, and in-kernel devices -------------------------------------------------

    def get_clock(self) -> int:
        """The guest's paravirtual clock in nanoseconds since the VM was made."""
        data = ffi.new("struct kvm_clock_data *")
        self._ioctl("KVM_GET_CLOCK", lib.KVM_GET_CLOCK, data)
        return int(data.clock)

    def set_clock(self, nanoseconds: int) -> None:
        """Set the guest's paravirtual clock."""
        data = ffi.new("struct kvm_clock_data *", {"clock": nanoseconds})
        self._ioctl("KVM_SET_CLOCK", lib.KVM_SET_CLOCK, data)

    def create_device(self, kind: int) -> DeviceAttributes:
        """An in-kernel device (KVM_DEV_TYPE_*); the caller closes it."""
        entry = ffi.new("struct kvm_create_device *", {"type": kind})
        self._ioctl(f"KVM_CREATE_DEVICE (type {kind})", lib.KVM_CREATE_DEVICE, entry)
        return DeviceAttributes(entry.fd, f"device type {kind}")

    # ---- helpers ------------------------------------------------------------------------

    def _ioctl(self, operation: str, request: int, argument: CData) -> int:
        return check(lib.kvmaio_ioctl(self.fd, request, argument), operation)

    def _ioctl_value(self, operation: str, request: int, value: int) -> int:
        return check(lib.kvmaio_ioctl_value(self.fd, request, value), operation)

    def _put(self, operation: str, request: int, kind: str, state: bytes) -> None:
        structure = ffi.new(kind)
        expected = len(ffi.buffer(structure))
        if len(state) != expected:
            raise ConfigurationError(
                f"{operation}: {len(state)} bytes of state, where {expected} are expected"
            )
        ffi.buffer(structure)[:] = state
        self._ioctl(operation, request, structure)


def _msi(address: int, data: int) -> dict[str, int]:
    return {
        "address_lo": address & 0xFFFFFFFF,
        "address_hi": address >> 32,
        "data": data,
    }
