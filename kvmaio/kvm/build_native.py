"""Builds the C core (cffi API mode): declares what Python sees of it and of <linux/kvm.h>.

The compiler checks every declaration here against the real headers; ``...;``
leaves out fields that Python does not use.
"""

from __future__ import annotations

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
SOURCES = (
    *("_native.c", "_resident.c", "_burst.c", "_fast.c", "_measure.c"),
    *("_run_timer.c", "_counters.c", "_notes.c", "_raw.c"),
)

IOCTLS = """
KVM_GET_API_VERSION KVM_CREATE_VM KVM_CHECK_EXTENSION KVM_GET_VCPU_MMAP_SIZE KVM_GET_SUPPORTED_CPUID
KVM_GET_MSR_INDEX_LIST KVM_SET_USER_MEMORY_REGION KVM_SET_TSS_ADDR KVM_SET_IDENTITY_MAP_ADDR
KVM_CREATE_IRQCHIP KVM_CREATE_PIT2 KVM_GET_PIT2 KVM_SET_PIT2 KVM_GET_IRQCHIP KVM_SET_IRQCHIP
KVM_IRQ_LINE KVM_SET_GSI_ROUTING KVM_IRQFD KVM_IOEVENTFD KVM_SIGNAL_MSI KVM_ENABLE_CAP
KVM_REGISTER_COALESCED_MMIO KVM_UNREGISTER_COALESCED_MMIO KVM_GET_DIRTY_LOG KVM_GET_CLOCK KVM_SET_CLOCK
KVM_CREATE_DEVICE KVM_SET_DEVICE_ATTR KVM_GET_DEVICE_ATTR KVM_HAS_DEVICE_ATTR
KVM_GET_REGS KVM_SET_REGS KVM_GET_SREGS KVM_SET_SREGS KVM_GET_SREGS2 KVM_SET_SREGS2
KVM_GET_FPU KVM_SET_FPU KVM_GET_XSAVE KVM_SET_XSAVE KVM_GET_XSAVE2 KVM_GET_XCRS KVM_SET_XCRS
KVM_GET_DEBUGREGS KVM_SET_DEBUGREGS KVM_GET_VCPU_EVENTS KVM_SET_VCPU_EVENTS
KVM_GET_MP_STATE KVM_SET_MP_STATE KVM_GET_LAPIC KVM_SET_LAPIC KVM_GET_MSRS KVM_SET_MSRS
KVM_SET_CPUID2 KVM_GET_CPUID2 KVM_GET_ONE_REG KVM_SET_ONE_REG KVM_INTERRUPT KVM_NMI
KVM_SET_GUEST_DEBUG KVM_TRANSLATE KVM_GET_TSC_KHZ KVM_SET_TSC_KHZ
PERF_EVENT_IOC_ENABLE PERF_EVENT_IOC_DISABLE PERF_EVENT_IOC_REFRESH PERF_EVENT_IOC_RESET
PERF_EVENT_IOC_PERIOD
""".split()

CAPABILITIES = """
KVM_CAP_NR_VCPUS KVM_CAP_MAX_VCPUS KVM_CAP_NR_MEMSLOTS KVM_CAP_COALESCED_MMIO KVM_CAP_COALESCED_PIO
KVM_CAP_SYNC_REGS KVM_CAP_IMMEDIATE_EXIT KVM_CAP_READONLY_MEM KVM_CAP_SET_TSS_ADDR
KVM_CAP_SET_IDENTITY_MAP_ADDR KVM_CAP_IRQCHIP KVM_CAP_SPLIT_IRQCHIP KVM_CAP_PIT2 KVM_CAP_IRQ_ROUTING
KVM_CAP_IRQFD KVM_CAP_IOEVENTFD KVM_CAP_SIGNAL_MSI KVM_CAP_XSAVE KVM_CAP_XSAVE2 KVM_CAP_XCRS
KVM_CAP_DEBUGREGS KVM_CAP_VCPU_EVENTS KVM_CAP_MP_STATE KVM_CAP_SREGS2 KVM_CAP_ONE_REG
KVM_CAP_DEVICE_CTRL KVM_CAP_USER_NMI KVM_CAP_DIRTY_LOG_RING KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
KVM_CAP_X86_USER_SPACE_MSR KVM_CAP_SET_GUEST_DEBUG KVM_CAP_TSC_CONTROL KVM_CAP_GET_TSC_KHZ
KVM_CAP_ADJUST_CLOCK KVM_CAP_EXIT_HYPERCALL KVM_CAP_USER_MEMORY KVM_CAP_EXT_CPUID
KVM_CAP_ENABLE_CAP_VM KVM_CAP_MAX_VCPU_ID
""".split()

EXITS = """
KVM_EXIT_UNKNOWN KVM_EXIT_EXCEPTION KVM_EXIT_IO KVM_EXIT_HYPERCALL KVM_EXIT_DEBUG KVM_EXIT_HLT
KVM_EXIT_MMIO KVM_EXIT_IRQ_WINDOW_OPEN KVM_EXIT_SHUTDOWN KVM_EXIT_FAIL_ENTRY KVM_EXIT_INTR
KVM_EXIT_SET_TPR KVM_EXIT_INTERNAL_ERROR KVM_EXIT_SYSTEM_EVENT KVM_EXIT_IOAPIC_EOI
KVM_EXIT_X86_RDMSR KVM_EXIT_X86_WRMSR
""".split()

FLAGS = """
KVM_MEM_LOG_DIRTY_PAGES KVM_MEM_READONLY KVM_IOEVENTFD_FLAG_DATAMATCH KVM_IOEVENTFD_FLAG_PIO
KVM_IOEVENTFD_FLAG_DEASSIGN KVM_IRQFD_FLAG_DEASSIGN KVM_PIT_SPEAKER_DUMMY KVM_IRQ_ROUTING_IRQCHIP
KVM_IRQ_ROUTING_MSI KVM_IRQCHIP_PIC_MASTER KVM_IRQCHIP_PIC_SLAVE KVM_IRQCHIP_IOAPIC
KVM_MP_STATE_RUNNABLE KVM_MP_STATE_UNINITIALIZED KVM_MP_STATE_INIT_RECEIVED KVM_MP_STATE_HALTED
KVM_MP_STATE_SIPI_RECEIVED KVM_SYNC_X86_REGS KVM_SYNC_X86_SREGS KVM_SYNC_X86_EVENTS
KVM_GUESTDBG_ENABLE KVM_GUESTDBG_SINGLESTEP KVM_GUESTDBG_USE_SW_BP KVM_GUESTDBG_USE_HW_BP
KVM_CREATE_DEVICE_TEST KVM_CPUID_FLAG_SIGNIFCANT_INDEX
KVM_VCPUEVENT_VALID_NMI_PENDING KVM_VCPUEVENT_VALID_SIPI_VECTOR KVM_VCPUEVENT_VALID_SHADOW
KVM_VCPUEVENT_VALID_SMM KVM_VCPUEVENT_VALID_PAYLOAD KVM_VCPUEVENT_VALID_TRIPLE_FAULT
KVM_SREGS2_FLAGS_PDPTRS_VALID KVM_IOAPIC_NUM_PINS KVM_DEV_TYPE_VFIO
KVM_API_VERSION
""".split()

# `unsigned long long`, not uint64_t: it is what the kernel's __u64 is.
STRUCTURES = """
struct kvm_userspace_memory_region { uint32_t slot, flags; unsigned long long guest_phys_addr, memory_size, userspace_addr; };
struct kvm_coalesced_mmio_zone { unsigned long long addr; uint32_t size, pio; ...; };
struct kvm_coalesced_mmio { unsigned long long phys_addr; uint32_t len, pio; uint8_t data[8]; };
struct kvm_coalesced_mmio_ring { uint32_t first, last; struct kvm_coalesced_mmio coalesced_mmio[]; };
struct kvm_irq_level { uint32_t irq, level; ...; };
struct kvm_pit_config { uint32_t flags; ...; };
struct kvm_pit_state2 { ...; };
struct kvm_irqchip { uint32_t chip_id; ...; };
struct kvm_irqfd { uint32_t fd, gsi, flags, resamplefd; ...; };
struct kvm_ioeventfd { unsigned long long datamatch, addr; uint32_t len; int32_t fd; uint32_t flags; ...; };
struct kvm_msi { uint32_t address_lo, address_hi, data, flags; ...; };
struct kvm_enable_cap { uint32_t cap, flags; unsigned long long args[4]; ...; };
struct kvm_clock_data { unsigned long long clock; uint32_t flags; ...; };
struct kvm_create_device { uint32_t type, fd, flags; };
struct kvm_device_attr { uint32_t flags, group; unsigned long long attr, addr; };
struct kvm_signal_mask { uint32_t len; ...; };
struct kvm_dirty_log { uint32_t slot; void *dirty_bitmap; ...; };

struct kvm_irq_routing_irqchip { uint32_t irqchip, pin; };
struct kvm_irq_routing_msi { uint32_t address_lo, address_hi, data, pad; };
struct kvm_irq_routing_entry {
    uint32_t gsi, type, flags, pad;
    union { struct kvm_irq_routing_irqchip irqchip; struct kvm_irq_routing_msi msi; uint32_t pad[8]; } u;
    ...;
};
struct kvm_irq_routing { uint32_t nr, flags; struct kvm_irq_routing_entry entries[]; };

struct kvm_regs { unsigned long long rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags; };
struct kvm_segment {
    unsigned long long base; uint32_t limit; uint16_t selector;
    uint8_t type, present, dpl, db, s, l, g, avl, unusable, padding;
};
struct kvm_dtable { unsigned long long base; uint16_t limit, padding[3]; };
struct kvm_sregs {
    struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt; struct kvm_dtable gdt, idt;
    unsigned long long cr0, cr2, cr3, cr4, cr8, efer, apic_base, interrupt_bitmap[4];
};
struct kvm_sregs2 {
    struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt; struct kvm_dtable gdt, idt;
    unsigned long long cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags, pdptrs[4];
};
struct kvm_fpu { ...; };
struct kvm_xsave { uint32_t region[1024]; ...; };
struct kvm_xcr { uint32_t xcr; unsigned long long value; ...; };
struct kvm_xcrs { uint32_t nr_xcrs, flags; struct kvm_xcr xcrs[16]; ...; };
struct kvm_debugregs { unsigned long long db[4], dr6, dr7, flags; ...; };
struct kvm_vcpu_events {
    struct { uint8_t injected, nr, has_error_code, pending; uint32_t error_code; } exception;
    struct { uint8_t injected, nr, soft, shadow; } interrupt;
    struct { uint8_t injected, pending, masked, pad; } nmi;
    uint32_t sipi_vector, flags;
    struct { uint8_t smm, pending, smm_inside_nmi, latched_init; } smi;
    struct { uint8_t pending; } triple_fault;
    uint8_t reserved[26], exception_has_payload;
    unsigned long long exception_payload;
};
struct kvm_mp_state { uint32_t mp_state; };
struct kvm_lapic_state { char regs[0x400]; };
struct kvm_msr_entry { uint32_t index; unsigned long long data; ...; };
struct kvm_msrs { uint32_t nmsrs; struct kvm_msr_entry entries[]; ...; };
struct kvm_msr_list { uint32_t nmsrs; uint32_t indices[]; };
struct kvm_cpuid_entry2 { uint32_t function, index, flags, eax, ebx, ecx, edx; ...; };
struct kvm_cpuid2 { uint32_t nent; struct kvm_cpuid_entry2 entries[]; ...; };
struct kvm_one_reg { unsigned long long id, addr; };
struct kvm_interrupt { uint32_t irq; };
struct kvm_translation { unsigned long long linear_address, physical_address; uint8_t valid, writeable, usermode; ...; };
struct kvm_guest_debug_arch { unsigned long long debugreg[8]; };
struct kvm_guest_debug { uint32_t control, pad; struct kvm_guest_debug_arch arch; };
struct kvm_debug_exit_arch { uint32_t exception, pad; unsigned long long pc, dr6, dr7; };
struct kvm_sync_regs { struct kvm_regs regs; struct kvm_sregs sregs; struct kvm_vcpu_events events; };

struct kvm_run {
    uint8_t request_interrupt_window, immediate_exit, padding1[6];
    uint32_t exit_reason;
    uint8_t ready_for_interrupt_injection, if_flag;
    uint16_t flags;
    unsigned long long cr8, apic_base;
    union {
        struct { unsigned long long hardware_exit_reason; } hw;
        struct { unsigned long long hardware_entry_failure_reason; uint32_t cpu; } fail_entry;
        struct { uint32_t exception, error_code; } ex;
        struct { uint8_t direction, size; uint16_t port; uint32_t count; unsigned long long data_offset; } io;
        struct { struct kvm_debug_exit_arch arch; } debug;
        struct { unsigned long long phys_addr; uint8_t data[8]; uint32_t len; uint8_t is_write; } mmio;
        struct { unsigned long long nr, args[6], ret; unsigned long long flags; } hypercall;
        struct { uint32_t suberror, ndata; unsigned long long data[16]; } internal;
        struct { uint32_t type, ndata; unsigned long long data[16]; } system_event;
        struct { uint8_t vector; } eoi;
        struct { uint8_t error, pad[7]; uint32_t reason, index; unsigned long long data; } msr;
        char padding[256];
    };
    unsigned long long kvm_valid_regs, kvm_dirty_regs;
    union { struct kvm_sync_regs regs; char padding[2048]; } s;
};
"""

CORE = """
#define KVMAIO_EXIT ...
#define KVMAIO_INTERRUPTED ...
#define KVMAIO_TIMER ...
#define KVMAIO_LATER ...
#define KVMAIO_PIO_DATA ...
typedef struct kvmaio_hub { int fd; uint64_t wakeups; ...; } kvmaio_hub;
typedef struct kvmaio_posted {
    uint64_t address, value; int64_t time_ns; uint32_t size, is_pio;
} kvmaio_posted;
typedef struct kvmaio_fast { uint64_t served; ...; } kvmaio_fast;
int kvmaio_fast_create(struct kvm_run *run_page, uint32_t ring_offset, kvmaio_fast **out);
void kvmaio_fast_destroy(kvmaio_fast *fast);
int kvmaio_fast_add(kvmaio_fast *fast, uint64_t address, uint32_t size, int is_pio, uint64_t *cell,
                    int stamped);
int kvmaio_fast_add_doorbell(kvmaio_fast *fast, int eventfd);
int kvmaio_fast_take(kvmaio_fast *fast, kvmaio_posted *first, uint64_t *values, int capacity);
int kvmaio_fast_waiting(kvmaio_fast *fast);
uint32_t kvmaio_fast_rung(kvmaio_fast *fast, uint64_t *counts);
typedef struct kvmaio_run_timer { int counter_fd; uint64_t counter_khz; ...; } kvmaio_run_timer;
#define KVMAIO_NOTE_NUMBERS ...
typedef struct kvmaio_notes {
    char *text; size_t used, room, longest; int64_t offset_ns, began_ns, due_ns;
} kvmaio_notes;
typedef struct kvmaio_note_kind {
    const char *exit, *access; size_t exit_length, access_length; int64_t *left_ns; double factor;
} kvmaio_note_kind;
#define KVMAIO_HELD_TO_WRITE ...
typedef struct kvmaio_burst {
    int disturbed, held, entered, end, noted; uint64_t io, mmio; int64_t executed_ns;
    kvmaio_notes *notes; const kvmaio_note_kind *kind;
} kvmaio_burst;
typedef struct kvmaio_vcpu {
    kvmaio_run_timer timer; int64_t entry_ns;
    kvmaio_fast *fast; int fd; struct kvm_run *page; size_t page_size; int outcome;
    int64_t executed_ns, executed_cycles, inside_ns, left_ns, access;
    int cycles_fd; uint32_t exit_untold; kvmaio_burst burst;
    uint64_t run_id, entries, unrequested; uint32_t wasted_spins, spin_tries; int tid; int started;
    ...;
} kvmaio_vcpu;
int kvmaio_ioctl(int fd, unsigned long request, void *argument);
int kvmaio_ioctl_value(int fd, unsigned long request, unsigned long value);
int kvmaio_init(void);
int kvmaio_hub_create(kvmaio_hub **out);
int kvmaio_hub_collect(kvmaio_hub *hub, uint32_t *tags, int capacity);
void kvmaio_hub_destroy(kvmaio_hub *hub);
int kvmaio_vcpu_create(kvmaio_hub *hub, int vm_fd, unsigned long id, size_t page_size, uint32_t tag,
                       kvmaio_vcpu **out);
int kvmaio_vcpu_start(kvmaio_vcpu *vcpu);
uint64_t kvmaio_vcpu_enter(kvmaio_vcpu *vcpu, int64_t limit_ns);
void kvmaio_vcpu_begin(kvmaio_vcpu *vcpu, int64_t limit_ns);
int kvmaio_vcpu_finish(kvmaio_vcpu *vcpu, int64_t timeout_ns);
int kvmaio_vcpu_half_entry(kvmaio_vcpu *vcpu, int64_t timeout_ns);
void kvmaio_vcpu_kick(kvmaio_vcpu *vcpu, uint64_t run_id);
uint64_t kvmaio_vcpu_current_run(kvmaio_vcpu *vcpu);
int kvmaio_vcpu_again(kvmaio_vcpu *vcpu);
int kvmaio_vcpu_is_running(kvmaio_vcpu *vcpu);
int kvmaio_vcpu_stop(kvmaio_vcpu *vcpu, int64_t timeout_ns);
void kvmaio_vcpu_destroy(kvmaio_vcpu *vcpu);
typedef struct kvmaio_resident {
    int64_t budget_ns, slice_ns; uint64_t waits, inlined, armed, fired, kicks, slices; ...;
} kvmaio_resident;
int kvmaio_resident_create(kvmaio_hub *hub, int poll_fd, int64_t budget_ns, int64_t slice_ns,
                           kvmaio_resident **out);
void kvmaio_resident_destroy(kvmaio_resident *resident);
int kvmaio_resident_adopt(kvmaio_resident *resident, kvmaio_vcpu *vcpu);
int kvmaio_resident_release(kvmaio_vcpu *vcpu);
int kvmaio_resident_expire(kvmaio_vcpu *vcpu);
int kvmaio_resident_enter(kvmaio_resident *resident, kvmaio_vcpu *vcpu, int64_t limit_ns);
int kvmaio_resident_again(kvmaio_vcpu *vcpu);
int kvmaio_resident_wait(kvmaio_resident *resident, kvmaio_vcpu *vcpu, int64_t deadline_ns);
int kvmaio_resident_half_entry(kvmaio_vcpu *vcpu);
int64_t kvmaio_raw_loop(kvmaio_vcpu *vcpu, int exits);
int kvmaio_perf_open(const void *attributes, int tid, int group_fd);
int kvmaio_run_timer_arm(kvmaio_run_timer *timer, int64_t limit_ns);
int kvmaio_run_timer_expired(kvmaio_run_timer *timer);
void kvmaio_run_timer_disarm(kvmaio_run_timer *timer);
void kvmaio_run_timer_close(kvmaio_run_timer *timer);
int64_t kvmaio_run_timer_resolution(kvmaio_run_timer *timer, int rounds);
typedef struct kvmaio_raw {
    int fd; unsigned long get_xsave; size_t xsave_size;
    struct kvm_regs regs; struct kvm_sregs sregs, sregs_before;
    uint8_t *xsave, *xsave_before; const char *operation;
} kvmaio_raw;
int kvmaio_raw_fetch(kvmaio_raw *raw);
int kvmaio_raw_put_back(kvmaio_raw *raw);
int kvmaio_measure(int kvm_fd, size_t page_size, int64_t *exit_ns, int64_t *move_ns);
int64_t kvmaio_measure_entry(int kvm_fd, size_t page_size);
int kvmaio_note(kvmaio_notes *notes, const kvmaio_note_kind *kind, uint64_t value, int64_t left_ns,
                int64_t executed_ns);
"""

ffibuilder = FFI()
ffibuilder.cdef(
    "\n".join(f"#define {name} ..." for name in (*IOCTLS, *CAPABILITIES, *EXITS, *FLAGS))
    + STRUCTURES
    + CORE
)
ffibuilder.set_source(
    "kvmaio.kvm._native",
    "\n".join(f'#include "{name}.h"' for name in ("_native", "_counters", "_notes", "_raw")),
    sources=[os.path.relpath(HERE / name) for name in SOURCES],
    include_dirs=[str(HERE)],
    depends=[str(path) for path in HERE.glob("_*.h")],
    extra_compile_args=["-O2", "-fvisibility=hidden", "-Wall", "-Wextra"],
    libraries=["pthread", "rt"],
    py_limited_api=True,
)
