"""The VM: memory slots, interrupt controllers and lines, fast paths, the clock."""

import ctypes
import errno
import os
import struct
import time

import pytest

from kvmaio import ConfigurationError, HostError
from kvmaio.kvm import state
from kvmaio.kvm._native import ffi, lib
from kvmaio.kvm.attributes import DeviceAttributes
from kvmaio.kvm.slots import PRIVATE_PAGES, MemorySlots
from kvmaio.kvm.vm import IrqchipRoute, KvmVm, MsiRoute
from kvmaio.memory import GuestMemory

pytestmark = pytest.mark.kvm

HLT = b"\xf4"


# ---- memory slots ---------------------------------------------------------------------


def test_slots_are_numbered_from_0_and_reused(vm, memory):
    regions = [memory.add_ram(base, 0x1000) for base in (0x100000, 0x200000, 0x300000)]
    assert [vm.slots.number_of(region) for region in regions] == [1, 2, 3]
    memory.remove(regions[1])
    memory.remove(regions[0])
    assert vm.slots.number_of(memory.add_ram(0x400000, 0x1000)) == 1
    assert vm.slots.number_of(memory.add_ram(0x500000, 0x1000)) == 2
    assert vm.slots.number_of(memory.add_ram(0x600000, 0x1000)) == 4
    assert len(vm.slots) == 5


def test_a_slot_of_zero_bytes_is_refused(vm, memory):
    region = memory.add_ram(0x100000, 0x1000)
    object.__setattr__(region, "size", 0)
    with pytest.raises(ConfigurationError, match="zero bytes at 0x100000"):
        vm.slots.add(region)
    object.__setattr__(region, "size", 0x1000)


def test_the_slot_limit_is_honoured(kvm):
    memory = GuestMemory()
    with KvmVm(kvm) as vm:
        assert vm.capability(lib.KVM_CAP_NR_MEMSLOTS) >= 32
        vm.slots = MemorySlots(vm.fd, limit=3)
        vm.attach_memory(memory)
        for n in range(3):
            memory.add_ram(n << 20, 0x1000)
        with pytest.raises(ConfigurationError) as caught:
            memory.add_ram(0x900000, 0x1000)
        assert str(caught.value) == (
            "cannot add RAM at 0x900000..0x900fff: all 3 memory slots of this host's KVM are in "
            "use; use fewer, larger regions"
        )
        assert len(memory.regions) == len(vm.slots) == 3
    memory.close()


def test_a_slot_that_the_host_refuses_is_free_again(vm, memory):
    region = memory.add_ram(0x100000, 0x1000)
    twin = memory.add_ram(0x200000, 0x1000)
    memory.remove(twin)
    object.__setattr__(twin, "base", 0x100000)  # behind the memory's back: it overlaps
    with pytest.raises(HostError, match=r"KVM_SET_USER_MEMORY_REGION \(RAM 0x100000") as caught:
        vm.slots.add(twin)
    assert caught.value.errno == errno.EEXIST
    assert vm.slots.number_of(memory.add_ram(0x300000, 0x1000)) == 2
    assert vm.slots.number_of(region) == 1


def test_a_foreign_region_is_named(vm, memory):
    region = memory.add_ram(0x100000, 0x1000)
    memory.remove(region)
    with pytest.raises(ConfigurationError, match=r"RAM 0x100000\.\.0x100fff is not part"):
        vm.slots.number_of(region)
    with pytest.raises(ConfigurationError, match="memory slot 1 is not in use"):
        vm.slots.region_of(1)


@pytest.mark.parametrize(
    ("base", "size"),
    [
        (PRIVATE_PAGES.start, 0x1000),
        (PRIVATE_PAGES.stop - 0x1000, 0x1000),
        (0xFEF00000, 0x1000000),
    ],
)
def test_tss_address_is_kept_free(vm, memory, base, size):
    """The TSS and identity map pages: KVM's own, whatever the host."""
    with pytest.raises(ConfigurationError, match=r"KVM keeps 0xfeffc000\.\.0xfeffffff for itself"):
        memory.add_ram(base, size)
    assert len(memory.regions) == len(vm.slots) == 1


def test_memory_right_around_the_private_pages_is_fine(vm, memory):
    memory.add_ram(PRIVATE_PAGES.start - 0x1000, 0x1000)
    memory.add_rom(PRIVATE_PAGES.stop, bytes(0x1000))
    assert len(vm.slots) == 3


def test_memory_that_was_there_first_is_checked(kvm):
    memory = GuestMemory()
    memory.add_ram(0xFEF00000, 0x100000)
    with KvmVm(kvm) as vm, pytest.raises(ConfigurationError, match="KVM keeps"):
        vm.attach_memory(memory)
    memory.close()


def test_host_memory_is_pinned_while_the_guest_can_reach_it(vm, memory):
    region = memory.add_ram(0x100000, 0x1000)
    with pytest.raises(BufferError):
        region.mapping.close()
    memory.remove(region)
    region.mapping.close()


def test_host_memory_is_released_on_close(kvm):
    memory = GuestMemory()
    region = memory.add_ram(0, 0x1000)
    vm = KvmVm(kvm)
    vm.attach_memory(memory)
    vm.close()
    vm.close()
    region.mapping.close()
    # The memory outlives the VM; what happens to it no longer concerns the VM.
    memory.remove(region)
    memory.add_ram(0, 0x1000)


def test_unmapped_access_is_an_mmio_exit(vcpu, memory):
    # mov ax, 0x2000; mov ds, ax; mov byte [0x10], 0x5a; hlt
    memory.write(0x1000, bytes.fromhex("b80020 8ed8 c60610005a") + HLT)
    vcpu.real16(0x1000)
    assert vcpu.run() == lib.KVM_EXIT_MMIO
    access = vcpu.page.mmio
    assert (access.phys_addr, access.len, access.is_write) == (0x20010, 1, 1)
    assert access.data[0] == 0x5A
    assert vcpu.run() == lib.KVM_EXIT_HLT


def test_a_rom_is_readable_and_its_writes_are_mmio_exits(vcpu, memory):
    memory.add_rom(0x20000, b"\x77")
    # mov ax, 0x2000; mov ds, ax; mov al, [0]; mov [0], al; hlt
    memory.write(0x1000, bytes.fromhex("b80020 8ed8 a00000 a20000") + HLT)
    vcpu.real16(0x1000)
    assert vcpu.run() == lib.KVM_EXIT_MMIO
    assert (vcpu.page.mmio.phys_addr, vcpu.page.mmio.data[0]) == (0x20000, 0x77)
    assert memory.read(0x20000, 1) == b"\x77"


def test_memory_may_come_and_go_between_runs(vcpu, memory):
    region = memory.add_ram(0x20000, 0x1000)
    # mov ax, 0x2000; mov ds, ax; again: inc byte [0]; hlt; jmp again
    memory.write(0x1000, bytes.fromhex("b80020 8ed8 fe060000") + HLT + bytes.fromhex("ebf9"))
    vcpu.real16(0x1000)
    assert vcpu.run() == lib.KVM_EXIT_HLT
    assert memory.read(0x20000, 1) == b"\x01"
    memory.remove(region)
    assert vcpu.run() == lib.KVM_EXIT_MMIO


@pytest.fixture
def gone(memory):
    """A slot at 0x20000 whose host memory nobody can have."""
    region = memory.add_ram(0x20000, 0x1000)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region.mapping))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert libc.mprotect(address, 0x1000, 0) == 0  # PROT_NONE
    yield region
    assert libc.mprotect(address, 0x1000, 3) == 0


def test_efault_when_host_memory_is_gone(vcpu, memory, gone):
    """Provoked from 64-bit CPL3, the one mode that no KVM emulates."""
    memory.write(0x1000, bytes.fromhex("8a042500000200"))  # mov al, [0x20000]
    for table, entry in {0x2000: 0x3007, 0x3000: 0x4007, 0x4000: 0x87}.items():
        memory.write(table, entry.to_bytes(8, "little"))
    context = state.get_context(vcpu.fd)
    context.rip = 0x1000
    context.cr0, context.cr3, context.cr4, context.efer = 0x80000033, 0x2000, 0x20, 0x500
    code, data = {"selector": 0x33, "type": 0xB, "l": 1}, {"selector": 0x2B, "type": 3, "db": 1}
    for name, fields in {"cs": code, "ss": data, "ds": data, "es": data}.items():
        for field, value in {**fields, "base": 0, "limit": 0xFFFFFFFF, "g": 1, "dpl": 3}.items():
            setattr(getattr(context, name), field, value)
    state.set_context(vcpu.fd, context)
    with pytest.raises(HostError) as caught:
        vcpu.run()
    assert (caught.value.operation, caught.value.errno) == ("KVM_RUN", errno.EFAULT)
    assert "memory slot whose host memory is not there" in caught.value.hint


def test_to_the_emulator_host_memory_that_is_gone_is_mmio(kvm, vcpu, memory, gone):
    if not kvm.emulates_kernel_code:
        pytest.skip("this KVM emulates no guest code; it reports EFAULT, tested above")
    memory.write(0x1000, bytes.fromhex("b80020 8ed8 a00000") + HLT)
    vcpu.real16(0x1000)
    assert vcpu.run() == lib.KVM_EXIT_MMIO
    assert vcpu.page.mmio.phys_addr == 0x20000


def test_dirty_log_names_the_pages_written_since(vm, vcpu, memory):
    region = memory.regions[0]
    with pytest.raises(ConfigurationError, match=r"RAM 0x0\.\.0xffff are not recorded"):
        vm.dirty_log(0)
    vm.slots.log_dirty_pages(region, True)
    # mov [0x3000], al; mov [0x5008], al; hlt
    memory.write(0x1000, bytes.fromhex("a20030 a20850") + HLT)
    vcpu.real16(0x1000)
    assert vcpu.run() == lib.KVM_EXIT_HLT
    dirty = int.from_bytes(vm.dirty_log(0), "little")
    assert dirty & (1 << 3 | 1 << 5) == (1 << 3 | 1 << 5) and not dirty & 1 << 4
    assert not any(vm.dirty_log(0))
    vm.slots.log_dirty_pages(region, False)
    vm.slots.log_dirty_pages(region, False)
    with pytest.raises(ConfigurationError, match="memory slot 9"):
        vm.dirty_log(9)


# ---- vCPUs ------------------------------------------------------------------------------


def test_vcpu_ids_count_from_0_and_are_unique(vm, make_vcpu):
    for index in range(3):
        make_vcpu(index=index, vcpus=3)
    with pytest.raises(HostError, match="already has a vCPU with that number") as caught:
        make_vcpu(index=1)
    assert caught.value.errno == errno.EEXIST


# ---- coalesced ranges -----------------------------------------------------------------------


def ring_of(vcpu, kvm):
    page = ffi.cast("uint8_t *", vcpu.page) + 4096 * kvm.capability(lib.KVM_CAP_COALESCED_MMIO)
    return ffi.cast("struct kvm_coalesced_mmio_ring *", page)


def test_coalesced_ranges_batch_writes_in_order(kvm, vm, vcpu, memory):
    vm.coalesce(0x20000, 0x10)
    # mov ax, 0x2000; mov ds, ax; mov byte [1], 1; mov byte [2], 2; mov al, [0]; hlt
    memory.write(0x1000, bytes.fromhex("b80020 8ed8 c606010001 c606020002 a00000") + HLT)
    vcpu.real16(0x1000)
    assert vcpu.run() == lib.KVM_EXIT_MMIO and not vcpu.page.mmio.is_write
    ring = ring_of(vcpu, kvm)
    writes = [ring.coalesced_mmio[i] for i in range(ring.first, ring.last)]
    assert [(w.phys_addr, w.len, w.data[0], w.pio) for w in writes] == [
        (0x20001, 1, 1, 0),
        (0x20002, 1, 2, 0),
    ]
    vm.uncoalesce(0x20000, 0x10)
    memory.write(0x1000, bytes.fromhex("b80020 8ed8 c606010001") + HLT)
    vcpu.run()  # completes the read, then HLT
    vcpu.real16(0x1000)
    assert vcpu.run() == lib.KVM_EXIT_MMIO and vcpu.page.mmio.is_write


def test_coalesced_ports(kvm, vm, vcpu, memory):
    if not kvm.capability(lib.KVM_CAP_COALESCED_PIO):
        pytest.skip("this KVM does not coalesce port writes")
    vm.coalesce(0x70, 1, pio=True)
    memory.write(0x1000, bytes.fromhex("b05a e670 e471") + HLT)  # out 0x70; in 0x71
    vcpu.real16(0x1000)
    assert vcpu.run() == lib.KVM_EXIT_IO and vcpu.page.io.port == 0x71
    write = ring_of(vcpu, kvm).coalesced_mmio[0]
    assert (write.phys_addr, write.len, write.data[0], write.pio) == (0x70, 1, 0x5A, 1)


def test_coalesced_ranges_are_checked(vm):
    vm.coalesce(0xD0000000, 0x1000)
    with pytest.raises(ConfigurationError, match="4096 bytes at 0xd0000000 is already coalesced"):
        vm.coalesce(0xD0000000, 0x1000)
    with pytest.raises(ConfigurationError, match="0 bytes at 0xd0000000 is empty"):
        vm.coalesce(0xD0000000, 0)
    with pytest.raises(ConfigurationError, match="16 bytes at 0xd0000000 is not coalesced"):
        vm.uncoalesce(0xD0000000, 16)
    vm.uncoalesce(0xD0000000, 0x1000)
    vm.coalesce(0xD0000000, 0x1000)


def test_uncoalescing_a_range_ends_those_within_it(vm):
    vm.coalesce(0xD0000000, 0x1000)
    vm.coalesce(0xD0000100, 0x10)
    vm.coalesce(0xD0002000, 0x10)
    vm.uncoalesce(0xD0000000, 0x1000)
    with pytest.raises(ConfigurationError, match="not coalesced"):
        vm.uncoalesce(0xD0000100, 0x10)
    vm.uncoalesce(0xD0002000, 0x10)


# ---- eventfds --------------------------------------------------------------------------------


@pytest.fixture
def eventfd():
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def test_ioeventfd_takes_matching_writes_only(vm, vcpu, memory, eventfd):
    vm.ioeventfd(eventfd, 0x80, 1, pio=True, match=5)
    memory.write(0x1000, bytes.fromhex("b005 e680 b006 e680") + HLT)
    vcpu.real16(0x1000)
    assert vcpu.run() == lib.KVM_EXIT_IO and vcpu.page.io.port == 0x80
    assert os.eventfd_read(eventfd) == 1
    vm.ioeventfd(eventfd, 0x80, 1, pio=True, match=5, deassign=True)


def test_ioeventfd_on_mmio(vm, vcpu, memory, eventfd):
    vm.ioeventfd(eventfd, 0x20010, 1)
    memory.write(0x1000, bytes.fromhex("b80020 8ed8 c60610005a c60610005b") + HLT)
    vcpu.real16(0x1000)
    assert vcpu.run() == lib.KVM_EXIT_HLT
    assert os.eventfd_read(eventfd) == 2


def test_ioeventfd_errors(vm, eventfd):
    with pytest.raises(ConfigurationError, match="ioeventfd of 3 bytes at 0x10"):
        vm.ioeventfd(eventfd, 0x10, 3)
    vm.ioeventfd(eventfd, 0x10, 2, pio=True)
    with pytest.raises(HostError, match=r"KVM_IOEVENTFD \(pio 0x10\).*already bound") as caught:
        vm.ioeventfd(eventfd, 0x10, 2, pio=True)
    assert caught.value.errno == errno.EEXIST
    vm.ioeventfd(eventfd, 0x10, 2, pio=True, deassign=True)
    with pytest.raises(HostError, match="no such eventfd"):
        vm.ioeventfd(eventfd, 0x10, 2, pio=True, deassign=True)


def pic_requests(vm: KvmVm) -> int:
    """The master PIC's interrupt request register (kvm_pic_state behind 8 bytes of header)."""
    return vm.get_irqchip(lib.KVM_IRQCHIP_PIC_MASTER)[9]


def test_irqfd_pulses_the_line(vm, eventfd):
    vm.create_irqchip()
    vm.irqfd(eventfd, 5)
    os.eventfd_write(eventfd, 1)
    deadline = time.monotonic() + 30
    while not pic_requests(vm) and time.monotonic() < deadline:
        time.sleep(0.001)  # the kernel does it on a thread of its own
    assert pic_requests(vm) == 1 << 5
    with pytest.raises(HostError, match=r"KVM_IRQFD \(GSI 5\).*already bound"):
        vm.irqfd(eventfd, 5)
    vm.irqfd(eventfd, 5, deassign=True)


# ---- interrupt controllers and lines ------------------------------------------------------------


def test_irqchip_twice_is_an_error(vm):
    vm.create_irqchip()
    with pytest.raises(ConfigurationError, match=r"already has an irqchip \(kernel\)"):
        vm.create_irqchip()
    with pytest.raises(ConfigurationError, match="already has an irqchip"):
        vm.enable_split_irqchip()


def test_irqchip_after_a_vcpu_is_refused_with_a_hint(vm, vcpu):
    with pytest.raises(HostError, match=r"KVM_CREATE_IRQCHIP.*before the first vCPU") as caught:
        vm.create_irqchip()
    assert caught.value.errno == errno.EINVAL
    assert vm.irqchip is None


def test_irq_lines_reach_the_pic(vm):
    vm.create_irqchip()
    assert pic_requests(vm) == 0
    vm.irq_line(4, True)
    vm.irq_line(4, False)
    assert pic_requests(vm) == 1 << 4


def test_irq_line_without_irqchip(vm):
    with pytest.raises(HostError, match=r"KVM_IRQ_LINE \(GSI 4\).*no in-kernel int") as caught:
        vm.irq_line(4, True)
    assert caught.value.errno == errno.ENXIO


@pytest.mark.parametrize("chip", ["PIC_MASTER", "PIC_SLAVE", "IOAPIC"])
def test_irqchip_state_round_trip(vm, second_vm, chip):
    number = getattr(lib, f"KVM_IRQCHIP_{chip}")
    vm.create_irqchip()
    second_vm.create_irqchip()
    for gsi in (4, 12, 20):
        vm.irq_line(gsi, True)
    saved = vm.get_irqchip(number)
    assert saved != second_vm.get_irqchip(number)
    second_vm.set_irqchip(saved)
    assert second_vm.get_irqchip(number) == saved
    with pytest.raises(ConfigurationError, match="KVM_SET_IRQCHIP: 3 bytes of state, where 520"):
        vm.set_irqchip(b"abc")


def test_pit_needs_the_irqchip_and_exists_once(vm):
    with pytest.raises(ConfigurationError, match='needs irqchip="kernel"'):
        vm.create_pit()
    vm.create_irqchip()
    vm.create_pit()
    with pytest.raises(ConfigurationError, match="already has a PIT"):
        vm.create_pit()


def test_pit_state_round_trip(vm, second_vm):
    for each in (vm, second_vm):
        each.create_irqchip()
        each.create_pit()
    state = bytearray(vm.get_pit())
    struct.pack_into("<I", state, 0, 0x4321)  # channel 0's count
    second_vm.set_pit(bytes(state))
    assert second_vm.get_pit()[:4] == state[:4]


def test_split_irqchip_has_local_apics_but_no_ioapic(vm, make_vcpu):
    vm.enable_split_irqchip(24)
    assert vm.irqchip == "split"
    assert state.get_lapic(make_vcpu().fd) is not None
    with pytest.raises(HostError, match=r"KVM_GET_IRQCHIP \(chip 2\)") as caught:
        vm.get_irqchip(lib.KVM_IRQCHIP_IOAPIC)
    assert caught.value.errno == errno.ENXIO
    with pytest.raises(ConfigurationError, match='needs irqchip="kernel"'):
        vm.create_pit()


def enable_apic(vcpu) -> None:
    lapic = bytearray(state.get_lapic(vcpu.fd) or b"")
    struct.pack_into("<I", lapic, 0xF0, 0x1FF)  # SVR: enabled
    state.set_lapic(vcpu.fd, bytes(lapic))


def requested_vectors(vcpu) -> set[int]:
    lapic = state.get_lapic(vcpu.fd) or b""
    words = [int.from_bytes(lapic[0x200 + 16 * i :][:4], "little") for i in range(8)]
    return {32 * i + bit for i in range(8) for bit in range(32) if words[i] >> bit & 1}


def test_signal_msi_says_whether_an_apic_took_it(vm, make_vcpu):
    vm.create_irqchip()
    assert not vm.signal_msi(0xFEE00000, 0x41)  # no vCPU yet
    vcpu = make_vcpu()
    enable_apic(vcpu)
    assert vm.signal_msi(0xFEE00000, 0x41)
    assert requested_vectors(vcpu) == {0x41}


def test_gsi_routing_to_pins_and_messages(vm, make_vcpu):
    vm.create_irqchip()
    vcpu = make_vcpu()
    enable_apic(vcpu)
    vm.set_gsi_routing(
        [
            IrqchipRoute(4, lib.KVM_IRQCHIP_PIC_MASTER, 6),
            MsiRoute(30, 0xFEE00000, 0x55),
        ]
    )
    vm.irq_line(4, True)
    assert pic_requests(vm) == 1 << 6
    vm.irq_line(30, True)
    assert requested_vectors(vcpu) == {0x55}
    vm.set_gsi_routing([])
    with pytest.raises(HostError, match=r"KVM_SET_GSI_ROUTING.*out of range") as caught:
        vm.set_gsi_routing([IrqchipRoute(4, lib.KVM_IRQCHIP_IOAPIC, 99)])
    assert caught.value.errno == errno.EINVAL


# ---- the clock, capabilities, devices --------------------------------------------------


def test_the_clock_goes_on_from_what_was_set(vm):
    vm.set_clock(5_000_000_000)
    assert 5_000_000_000 <= vm.get_clock() < 65_000_000_000
    assert vm.get_clock() >= 5_000_000_000


def test_an_impossible_capability_is_named(vm):
    with pytest.raises(HostError, match=r"KVM_ENABLE_CAP \(capability 32767\)"):
        vm.enable_capability(0x7FFF, 1)


def test_device_attributes_get_set_has(kvm, vcpu):
    """On the vCPU's TSC offset (api.rst, KVM_VCPU_TSC_CTRL): group 0, attribute 0."""
    attributes = DeviceAttributes(vcpu.fd, "vcpu0")
    if not attributes.has(0, 0):
        pytest.skip("this KVM does not tell the TSC offset")
    assert len(attributes.get(0, 0)) == 8
    attributes.set(0, 0, (12345).to_bytes(8, "little"))
    # PVM has no TSC offset: it takes any, and tells 0.
    kept = 0 if kvm.kind == "PVM" else 12345
    assert int.from_bytes(attributes.get(0, 0), "little") == kept
    assert not attributes.has(0, 77)


def test_device_attribute_errors_name_errno_group_and_attribute(vcpu):
    attributes = DeviceAttributes(vcpu.fd, "vcpu0")
    with pytest.raises(HostError) as caught:
        attributes.get(0x33, 0x77)
    error = caught.value
    assert error.errno == errno.ENXIO
    assert str(error).startswith("KVM_GET_DEVICE_ATTR (vcpu0, group 0x33, attribute 0x77): ")
    with pytest.raises(HostError, match=r"KVM_SET_DEVICE_ATTR .*group 0x33, attribute 0x77"):
        attributes.set(0x33, 0x77)


def test_create_device(vm):
    try:
        device = vm.create_device(lib.KVM_DEV_TYPE_VFIO)
    except HostError as error:
        pytest.skip(f"this KVM has no VFIO device to create ({error})")
    assert device.has(1, 1)  # KVM_DEV_VFIO_GROUP, KVM_DEV_VFIO_GROUP_ADD
    assert not device.has(1, 77)
    with pytest.raises(HostError, match=r"KVM_SET_DEVICE_ATTR \(device type 4, group 0x1,"):
        device.set(1, 77)
    device.close()
    device.close()


def test_create_device_of_no_type(vm):
    with pytest.raises(
        HostError, match=r"KVM_CREATE_DEVICE \(type 999\).*no such device"
    ) as caught:
        vm.create_device(999)
    assert caught.value.errno == errno.ENODEV


def test_a_refused_vm_leaves_nothing_open(kvm, monkeypatch):
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr("kvmaio.kvm.vm._TSS_ADDRESS", 1 << 40)
    with pytest.raises(HostError, match="KVM_SET_TSS_ADDR"):
        KvmVm(kvm)
    assert os.listdir("/proc/self/fd") == before
