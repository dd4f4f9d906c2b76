"""Builds the software CPU's C module (cffi API mode): declares what Python sees of `_soft.h`.

libunicorn is neither linked nor needed here: it is loaded when a software CPU is made.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
SOURCES = ("_soft.c", "_load.c", "_memory.c", "_hooks.c", "_deliver.c", "_state.c", "_watch.c")

DECLARATIONS = """
#define KVMAIO_SOFT_EXIT ...
#define KVMAIO_SOFT_INTERRUPTED ...
#define KVMAIO_SOFT_LIMIT ...
#define KVMAIO_SOFT_LATER ...
int kvmaio_soft_load(const char *path, char *message, size_t size);
typedef struct kvmaio_soft_machine kvmaio_soft_machine;
kvmaio_soft_machine *kvmaio_soft_machine_create(void);
void kvmaio_soft_machine_destroy(kvmaio_soft_machine *machine);
int kvmaio_soft_add_memory(kvmaio_soft_machine *machine, uint64_t base, uint64_t size, void *host,
                           int readonly);
int kvmaio_soft_remove_memory(kvmaio_soft_machine *machine, uint64_t base);
void kvmaio_soft_memory_written(kvmaio_soft_machine *machine, uint64_t address, uint64_t size);
struct kvmaio_soft_cpuid { uint32_t function, index, has_index, eax, ebx, ecx, edx; };
#define KVMAIO_SOFT_READ ...
#define KVMAIO_SOFT_WRITE ...
struct kvmaio_soft_watchpoint { uint64_t address, size; int kinds; };
struct kvmaio_soft_hit { uint64_t address; int kinds; };
typedef struct kvmaio_soft {
    struct kvm_run *page; int arrived_fd; int64_t inline_ns, turn_ns;
    int counting, outcome, yielded, keeps_undefined, forgets_handlers, keeps_code, undefined;
    uint64_t run_id;
    int64_t access;
    struct { int disturbed, held, end; uint64_t io, mmio; } burst;
    int64_t left_ns;
    int exit_untold;
    uint64_t began, burst_ticks, ticks, tsc_offset, clock_hz;
    int by_wall_clock;
    uint64_t clock, exits, slices, deliveries;
    struct kvmaio_soft_hit *hits;
    int hit_count;
} kvmaio_soft;
int kvmaio_soft_create(kvmaio_soft_machine *machine, kvmaio_soft **out);
void kvmaio_soft_destroy(kvmaio_soft *cpu);
int kvmaio_soft_set_cpuid(kvmaio_soft *cpu, const struct kvmaio_soft_cpuid *entries, int count);
void kvmaio_soft_own_cpuid(kvmaio_soft *cpu, struct kvmaio_soft_cpuid *entry);
int kvmaio_soft_enter(kvmaio_soft *cpu, int64_t limit);
int kvmaio_soft_go_on(kvmaio_soft *cpu);
int kvmaio_soft_again(kvmaio_soft *cpu);
int kvmaio_soft_is_running(const kvmaio_soft *cpu);
int kvmaio_soft_hand_over(kvmaio_soft *cpu);
int64_t kvmaio_soft_part(kvmaio_soft *cpu, int64_t limit);
int kvmaio_soft_run(kvmaio_soft *cpu, int64_t limit);
int kvmaio_soft_half_entry(kvmaio_soft *cpu);
void kvmaio_soft_kick(kvmaio_soft *cpu, uint64_t run_id);
uint64_t kvmaio_soft_current_run(kvmaio_soft *cpu);
int kvmaio_soft_stop(kvmaio_soft *cpu, int64_t timeout_ns);
void kvmaio_soft_get(kvmaio_soft *cpu, struct kvm_regs *regs, struct kvm_sregs *sregs);
void kvmaio_soft_set(kvmaio_soft *cpu, const struct kvm_regs *regs, const struct kvm_sregs *sregs);
void kvmaio_soft_get_fpu(kvmaio_soft *cpu, uint8_t *area);
void kvmaio_soft_set_fpu(kvmaio_soft *cpu, const uint8_t *area);
void kvmaio_soft_set_xsave(kvmaio_soft *cpu, const uint8_t *area);
int kvmaio_soft_get_msr(kvmaio_soft *cpu, uint32_t index, uint64_t *value);
int kvmaio_soft_set_msr(kvmaio_soft *cpu, uint32_t index, uint64_t value);
uint64_t kvmaio_soft_get_xcr0(kvmaio_soft *cpu);
void kvmaio_soft_set_xcr0(kvmaio_soft *cpu, uint64_t value);
void kvmaio_soft_get_debug_registers(kvmaio_soft *cpu, uint64_t *values);
void kvmaio_soft_set_debug_registers(kvmaio_soft *cpu, const uint64_t *values);
void kvmaio_soft_get_events(kvmaio_soft *cpu, struct kvm_vcpu_events *events);
void kvmaio_soft_set_events(kvmaio_soft *cpu, const struct kvm_vcpu_events *events);
void kvmaio_soft_borrow(kvmaio_soft *cpu, const struct kvm_regs *regs,
                        const struct kvm_sregs *sregs, const uint8_t *xsave, int all);
void kvmaio_soft_give_back(kvmaio_soft *cpu, struct kvm_regs *regs, struct kvm_sregs *sregs,
                           uint8_t *xsave);
int kvmaio_soft_has_event(kvmaio_soft *cpu);
void kvmaio_soft_interrupt(kvmaio_soft *cpu, int vector);
void kvmaio_soft_nmi(kvmaio_soft *cpu);
uint64_t kvmaio_soft_translate(kvmaio_soft *cpu, uint64_t linear);
int kvmaio_soft_set_breakpoints(kvmaio_soft *cpu, const uint64_t *addresses, int count);
int kvmaio_soft_set_watchpoints(kvmaio_soft *cpu, const struct kvmaio_soft_watchpoint *watchpoints,
                                int count);
"""


native = runpy.run_path(str(HERE.parent / "kvm" / "build_native.py"))
ffibuilder = FFI()
ffibuilder.cdef(native["STRUCTURES"] + DECLARATIONS)
HEADERS = """
#include <linux/kvm.h>
#include "_soft.h"
"""
ffibuilder.set_source(
    "kvmaio.soft._soft",
    HEADERS,
    sources=[os.path.relpath(HERE / name) for name in SOURCES],
    include_dirs=[str(HERE)],
    depends=[str(path) for path in HERE.glob("_*.h")],
    extra_compile_args=["-O2", "-Wall", "-Wextra"],
    libraries=["pthread", "dl"],
    py_limited_api=True,
)
