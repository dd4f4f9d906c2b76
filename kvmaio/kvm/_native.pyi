"""What Python sees of the C core; `build_native.py` declares it, `_native.h` explains it.

A test compares the names here with those of the built module.
"""

from typing import Any, Protocol

class CData:
    """A C structure, array, pointer or number."""

    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...
    def __getitem__(self, index: int | slice) -> Any: ...
    def __setitem__(self, index: int | slice, value: Any) -> None: ...
    def __add__(self, count: int) -> CData: ...
    def __sub__(self, count: int) -> CData: ...
    def __int__(self) -> int: ...
    def __len__(self) -> int: ...

class Buffer:
    """The bytes of a C object; a window, not a copy."""

    def __getitem__(self, index: slice) -> bytes: ...
    def __setitem__(self, index: slice, data: bytes | bytearray | memoryview) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class CType(Protocol):
    kind: str

class FFI:
    NULL: CData

    def new(self, kind: str, initial: Any = ...) -> CData: ...
    def cast(self, kind: str, value: CData | int) -> CData: ...
    def buffer(self, data: CData, size: int = ...) -> Buffer: ...
    def from_buffer(self, data: Any, require_writable: bool = ...) -> CData: ...
    def release(self, data: CData) -> None: ...
    def memmove(self, target: CData, source: CData | bytes, size: int) -> None: ...
    def string(self, data: CData) -> bytes: ...
    def unpack(self, data: CData, length: int) -> Any: ...
    def addressof(self, data: CData, *field_or_index: str | int) -> CData: ...
    def sizeof(self, data: str | CData) -> int: ...
    def offsetof(self, kind: str, field: str) -> int: ...
    def typeof(self, data: str | CData) -> CType: ...

class Lib:
    # ---- the C core: 0 or a count, or -errno
    def kvmaio_ioctl(self, fd: int, request: int, argument: CData) -> int: ...
    def kvmaio_ioctl_value(self, fd: int, request: int, value: int) -> int: ...
    def kvmaio_init(self) -> int: ...
    def kvmaio_hub_create(self, out: CData) -> int: ...
    def kvmaio_hub_collect(self, hub: CData, tags: CData, capacity: int) -> int: ...
    def kvmaio_hub_destroy(self, hub: CData) -> None: ...
    def kvmaio_vcpu_create(
        self, hub: CData, vm_fd: int, id: int, page_size: int, tag: int, out: CData
    ) -> int: ...
    def kvmaio_vcpu_start(self, vcpu: CData) -> int: ...
    def kvmaio_vcpu_enter(self, vcpu: CData, limit_ns: int) -> int: ...
    def kvmaio_vcpu_begin(self, vcpu: CData, limit_ns: int) -> None: ...
    def kvmaio_vcpu_finish(self, vcpu: CData, timeout_ns: int) -> int: ...
    def kvmaio_vcpu_half_entry(self, vcpu: CData, timeout_ns: int) -> int: ...
    def kvmaio_vcpu_kick(self, vcpu: CData, run_id: int) -> None: ...
    def kvmaio_vcpu_current_run(self, vcpu: CData) -> int: ...
    def kvmaio_vcpu_again(self, vcpu: CData) -> int: ...
    def kvmaio_vcpu_is_running(self, vcpu: CData) -> int: ...
    def kvmaio_vcpu_stop(self, vcpu: CData, timeout_ns: int) -> int: ...
    def kvmaio_vcpu_destroy(self, vcpu: CData) -> None: ...
    def kvmaio_resident_create(
        self, hub: CData, poll_fd: int, budget_ns: int, slice_ns: int, out: CData
    ) -> int: ...
    def kvmaio_resident_destroy(self, resident: CData) -> None: ...
    def kvmaio_resident_adopt(self, resident: CData, vcpu: CData) -> int: ...
    def kvmaio_resident_release(self, vcpu: CData) -> int: ...
    def kvmaio_resident_expire(self, vcpu: CData) -> int: ...
    def kvmaio_resident_enter(self, resident: CData, vcpu: CData, limit_ns: int) -> int: ...
    def kvmaio_resident_again(self, vcpu: CData) -> int: ...
    def kvmaio_resident_wait(self, resident: CData, vcpu: CData, deadline_ns: int) -> int: ...
    def kvmaio_resident_half_entry(self, vcpu: CData) -> int: ...
    def kvmaio_fast_create(self, run_page: CData, ring_offset: int, out: CData) -> int: ...
    def kvmaio_fast_destroy(self, fast: CData) -> None: ...
    def kvmaio_fast_add(
        self, fast: CData, address: int, size: int, is_pio: int, cell: CData, stamped: int
    ) -> int: ...
    def kvmaio_fast_add_doorbell(self, fast: CData, eventfd: int) -> int: ...
    def kvmaio_fast_take(self, fast: CData, first: CData, values: CData, capacity: int) -> int: ...
    def kvmaio_fast_waiting(self, fast: CData) -> int: ...
    def kvmaio_fast_rung(self, fast: CData, counts: CData) -> int: ...
    def kvmaio_perf_open(self, attributes: bytes, tid: int, group_fd: int) -> int: ...
    def kvmaio_run_timer_arm(self, timer: CData, limit_ns: int) -> int: ...
    def kvmaio_run_timer_expired(self, timer: CData) -> int: ...
    def kvmaio_run_timer_disarm(self, timer: CData) -> None: ...
    def kvmaio_run_timer_close(self, timer: CData) -> None: ...
    def kvmaio_run_timer_resolution(self, timer: CData, rounds: int) -> int: ...
    def kvmaio_raw_loop(self, vcpu: CData, exits: int) -> int: ...
    def kvmaio_raw_fetch(self, raw: CData) -> int: ...
    def kvmaio_raw_put_back(self, raw: CData) -> int: ...
    def kvmaio_measure(
        self, kvm_fd: int, page_size: int, exit_ns: CData, move_ns: CData
    ) -> int: ...
    def kvmaio_measure_entry(self, kvm_fd: int, page_size: int) -> int: ...
    def kvmaio_note(
        self, notes: CData, kind: CData, value: int, left_ns: int, executed_ns: int
    ) -> int: ...

    KVMAIO_NOTE_NUMBERS: int
    KVMAIO_HELD_TO_WRITE: int
    KVMAIO_EXIT: int
    KVMAIO_INTERRUPTED: int
    KVMAIO_TIMER: int
    KVMAIO_LATER: int
    KVMAIO_PIO_DATA: int

    # ---- ioctls
    KVM_GET_API_VERSION: int
    KVM_CREATE_VM: int
    KVM_CHECK_EXTENSION: int
    KVM_GET_VCPU_MMAP_SIZE: int
    KVM_GET_SUPPORTED_CPUID: int
    KVM_GET_MSR_INDEX_LIST: int
    KVM_SET_USER_MEMORY_REGION: int
    KVM_SET_TSS_ADDR: int
    KVM_SET_IDENTITY_MAP_ADDR: int
    KVM_CREATE_IRQCHIP: int
    KVM_CREATE_PIT2: int
    KVM_GET_PIT2: int
    KVM_SET_PIT2: int
    KVM_GET_IRQCHIP: int
    KVM_SET_IRQCHIP: int
    KVM_IRQ_LINE: int
    KVM_SET_GSI_ROUTING: int
    KVM_IRQFD: int
    KVM_IOEVENTFD: int
    KVM_SIGNAL_MSI: int
    KVM_ENABLE_CAP: int
    KVM_REGISTER_COALESCED_MMIO: int
    KVM_UNREGISTER_COALESCED_MMIO: int
    KVM_GET_DIRTY_LOG: int
    KVM_GET_CLOCK: int
    KVM_SET_CLOCK: int
    KVM_CREATE_DEVICE: int
    KVM_SET_DEVICE_ATTR: int
    KVM_GET_DEVICE_ATTR: int
    KVM_HAS_DEVICE_ATTR: int
    KVM_GET_REGS: int
    KVM_SET_REGS: int
    KVM_GET_SREGS: int
    KVM_SET_SREGS: int
    KVM_GET_SREGS2: int
    KVM_SET_SREGS2: int
    KVM_GET_FPU: int
    KVM_SET_FPU: int
    KVM_GET_XSAVE: int
    KVM_SET_XSAVE: int
    KVM_GET_XSAVE2: int
    KVM_GET_XCRS: int
    KVM_SET_XCRS: int
    KVM_GET_DEBUGREGS: int
    KVM_SET_DEBUGREGS: int
    KVM_GET_VCPU_EVENTS: int
    KVM_SET_VCPU_EVENTS: int
    KVM_GET_MP_STATE: int
    KVM_SET_MP_STATE: int
    KVM_GET_LAPIC: int
    KVM_SET_LAPIC: int
    KVM_GET_MSRS: int
    KVM_SET_MSRS: int
    KVM_SET_CPUID2: int
    KVM_GET_CPUID2: int
    KVM_GET_ONE_REG: int
    KVM_SET_ONE_REG: int
    KVM_INTERRUPT: int
    KVM_NMI: int
    KVM_SET_GUEST_DEBUG: int
    KVM_TRANSLATE: int
    KVM_GET_TSC_KHZ: int
    KVM_SET_TSC_KHZ: int
    PERF_EVENT_IOC_ENABLE: int
    PERF_EVENT_IOC_DISABLE: int
    PERF_EVENT_IOC_REFRESH: int
    PERF_EVENT_IOC_RESET: int
    PERF_EVENT_IOC_PERIOD: int

    # ---- capabilities
    KVM_CAP_NR_VCPUS: int
    KVM_CAP_MAX_VCPUS: int
    KVM_CAP_NR_MEMSLOTS: int
    KVM_CAP_COALESCED_MMIO: int
    KVM_CAP_COALESCED_PIO: int
    KVM_CAP_SYNC_REGS: int
    KVM_CAP_IMMEDIATE_EXIT: int
    KVM_CAP_READONLY_MEM: int
    KVM_CAP_SET_TSS_ADDR: int
    KVM_CAP_SET_IDENTITY_MAP_ADDR: int
    KVM_CAP_IRQCHIP: int
    KVM_CAP_SPLIT_IRQCHIP: int
    KVM_CAP_PIT2: int
    KVM_CAP_IRQ_ROUTING: int
    KVM_CAP_IRQFD: int
    KVM_CAP_IOEVENTFD: int
    KVM_CAP_SIGNAL_MSI: int
    KVM_CAP_XSAVE: int
    KVM_CAP_XSAVE2: int
    KVM_CAP_XCRS: int
    KVM_CAP_DEBUGREGS: int
    KVM_CAP_VCPU_EVENTS: int
    KVM_CAP_MP_STATE: int
    KVM_CAP_SREGS2: int
    KVM_CAP_ONE_REG: int
    KVM_CAP_DEVICE_CTRL: int
    KVM_CAP_USER_NMI: int
    KVM_CAP_DIRTY_LOG_RING: int
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: int
    KVM_CAP_X86_USER_SPACE_MSR: int
    KVM_CAP_SET_GUEST_DEBUG: int
    KVM_CAP_TSC_CONTROL: int
    KVM_CAP_GET_TSC_KHZ: int
    KVM_CAP_ADJUST_CLOCK: int
    KVM_CAP_EXIT_HYPERCALL: int
    KVM_CAP_USER_MEMORY: int
    KVM_CAP_EXT_CPUID: int
    KVM_CAP_ENABLE_CAP_VM: int
    KVM_CAP_MAX_VCPU_ID: int

    # ---- exit reasons
    KVM_EXIT_UNKNOWN: int
    KVM_EXIT_EXCEPTION: int
    KVM_EXIT_IO: int
    KVM_EXIT_HYPERCALL: int
    KVM_EXIT_DEBUG: int
    KVM_EXIT_HLT: int
    KVM_EXIT_MMIO: int
    KVM_EXIT_IRQ_WINDOW_OPEN: int
    KVM_EXIT_SHUTDOWN: int
    KVM_EXIT_FAIL_ENTRY: int
    KVM_EXIT_INTR: int
    KVM_EXIT_SET_TPR: int
    KVM_EXIT_INTERNAL_ERROR: int
    KVM_EXIT_SYSTEM_EVENT: int
    KVM_EXIT_IOAPIC_EOI: int
    KVM_EXIT_X86_RDMSR: int
    KVM_EXIT_X86_WRMSR: int

    # ---- flags and numbers
    KVM_MEM_LOG_DIRTY_PAGES: int
    KVM_MEM_READONLY: int
    KVM_IOEVENTFD_FLAG_DATAMATCH: int
    KVM_IOEVENTFD_FLAG_PIO: int
    KVM_IOEVENTFD_FLAG_DEASSIGN: int
    KVM_IRQFD_FLAG_DEASSIGN: int
    KVM_PIT_SPEAKER_DUMMY: int
    KVM_IRQ_ROUTING_IRQCHIP: int
    KVM_IRQ_ROUTING_MSI: int
    KVM_IRQCHIP_PIC_MASTER: int
    KVM_IRQCHIP_PIC_SLAVE: int
    KVM_IRQCHIP_IOAPIC: int
    KVM_MP_STATE_RUNNABLE: int
    KVM_MP_STATE_UNINITIALIZED: int
    KVM_MP_STATE_INIT_RECEIVED: int
    KVM_MP_STATE_HALTED: int
    KVM_MP_STATE_SIPI_RECEIVED: int
    KVM_SYNC_X86_REGS: int
    KVM_SYNC_X86_SREGS: int
    KVM_SYNC_X86_EVENTS: int
    KVM_GUESTDBG_ENABLE: int
    KVM_GUESTDBG_SINGLESTEP: int
    KVM_GUESTDBG_USE_SW_BP: int
    KVM_GUESTDBG_USE_HW_BP: int
    KVM_CREATE_DEVICE_TEST: int
    KVM_CPUID_FLAG_SIGNIFCANT_INDEX: int
    KVM_VCPUEVENT_VALID_NMI_PENDING: int
    KVM_VCPUEVENT_VALID_SIPI_VECTOR: int
    KVM_VCPUEVENT_VALID_SHADOW: int
    KVM_VCPUEVENT_VALID_SMM: int
    KVM_VCPUEVENT_VALID_PAYLOAD: int
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT: int
    KVM_SREGS2_FLAGS_PDPTRS_VALID: int
    KVM_IOAPIC_NUM_PINS: int
    KVM_DEV_TYPE_VFIO: int
    KVM_API_VERSION: int

ffi: FFI
lib: Lib
