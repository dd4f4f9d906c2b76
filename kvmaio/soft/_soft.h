/* The software CPU: Unicorn's x86 engine behind KVM's manners.
 *
 * An entry returns to its caller for every access to a device, with the run
 * page filled as KVM fills it; the answer is taken from the page at the next
 * entry. Conventions as in ../kvm/_native.h: 0 or a count, or -errno; nothing
 * here takes the GIL. Unless a comment says otherwise, a function is called on
 * the loop's thread while the guest is not running.
 */
#ifndef KVMAIO_SOFT_H
#define KVMAIO_SOFT_H

#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>

enum kvmaio_soft_outcome {
	KVMAIO_SOFT_EXIT = 0,        /* the run page describes an exit */
	KVMAIO_SOFT_INTERRUPTED = 1, /* kicked, or a half entry */
	KVMAIO_SOFT_LIMIT = 2,       /* the instructions asked for are executed */
	KVMAIO_SOFT_LATER = 3,       /* the run goes on: on the loop's thread, or on its own */
};

/* ---- libunicorn ----------------------------------------------------------------- */

/* Load the library and find what we need of it, once per process. 0, or -1 with the
 * reason in `message`. It is never unloaded: its translations hold on to it. */
int kvmaio_soft_load(const char *path, char *message, size_t size);

/* ---- what the CPUs of a machine share ---------------------------------------------
 *
 * Guest memory, and the turn: one CPU of a machine executes at a time. An engine's
 * LOCK prefix is atomic to itself alone, and so is its view of translated code.
 */

typedef struct kvmaio_soft_machine kvmaio_soft_machine;

kvmaio_soft_machine *kvmaio_soft_machine_create(void);

/* After its CPUs. */
void kvmaio_soft_machine_destroy(kvmaio_soft_machine *machine);

/* Show memory to all CPUs; whatever is not memory is MMIO. -EINVAL: it overlaps or is not
 * aligned. The CPUs may be running: they are held meanwhile. */
int kvmaio_soft_add_memory(kvmaio_soft_machine *machine, uint64_t base, uint64_t size, void *host,
			   int readonly);
int kvmaio_soft_remove_memory(kvmaio_soft_machine *machine, uint64_t base);

/* Somebody else has written memory: forget what was translated from there. */
void kvmaio_soft_memory_written(kvmaio_soft_machine *machine, uint64_t address, uint64_t size);

/* ---- a CPU ---------------------------------------------------------------------- */

struct kvmaio_soft_cpuid {
	uint32_t function, index, has_index, eax, ebx, ecx, edx;
};

enum kvmaio_soft_access { KVMAIO_SOFT_READ = 1, KVMAIO_SOFT_WRITE = 2 };

struct kvmaio_soft_watchpoint {
	uint64_t address, size; /* linear; 1 byte or more */
	int kinds;              /* of accesses */
};

struct kvmaio_soft_hit {
	uint64_t address; /* the first byte that is watched */
	int kinds;
};

typedef struct kvmaio_soft {
	struct kvm_run *page; /* one page, then one for the data of port I/O */
	int arrived_fd;       /* eventfd: a run on the CPU's own thread is over */
	int64_t inline_ns;    /* how long a run may hold up the loop's thread */
	int64_t turn_ns;      /* how long runs, back to back, may do so */
	int counting;         /* exact instruction counts; may be changed between runs */

	int outcome;          /* of the last run */
	int yielded;          /* LATER, and not even begun: others on the loop have a turn */
	int keeps_undefined;  /* #UD is not delivered, but ends the run as an emulation failure */
	int forgets_handlers; /* another model may have written the code that an exception leads to */
	int keeps_code;       /* translations of code that is as it was are kept: see _memory.c */
	int undefined;        /* the last such failure was a #UD */
	uint64_t run_id;
	int64_t access;       /* that the page holds: address << 6 | size << 2 | is_write << 1 | is_pio;
	                       * -1: none, or no plain one */
	struct {              /* see kvmaio_soft_again() */
		int disturbed;    /* something is to be looked at before the next entry */
		int held;         /* the last call did not enter, because of that */
		int end;          /* what its entry led to, if not to an access */
		uint64_t io, mmio; /* accesses; the loop sets both to 0 */
	} burst;
	int64_t left_ns;      /* when that was left with an access (CLOCK_MONOTONIC), */
	int exit_untold;      /* of which nobody has been told */
	uint64_t began;       /* `ticks` as the last entry began, */
	uint64_t burst_ticks; /* and as the last one by kvmaio_soft_again() ended with an access */
	uint64_t ticks;       /* instructions executed so far; nanoseconds while not counting */
	uint64_t tsc_offset;  /* the time stamp counter is this + its clock's periods: */
	uint64_t clock_hz;    /* of which there are so many in a second, */
	int by_wall_clock;    /* CLOCK_MONOTONIC's, or else */
	uint64_t clock;       /* this many so far: those that are executed, and may be set ahead */
	uint64_t exits, slices, deliveries;
	struct kvmaio_soft_hit *hits; /* watchpoints that ended the last run, and how many */
	int hit_count;
} kvmaio_soft;

/* -EINVAL: the library is not what we know. -ENOMEM: it has no room. */
int kvmaio_soft_create(kvmaio_soft_machine *machine, kvmaio_soft **out);
void kvmaio_soft_destroy(kvmaio_soft *cpu);

/* What CPUID answers; sorted by function and index. Without a call, what the engine has. */
int kvmaio_soft_set_cpuid(kvmaio_soft *cpu, const struct kvmaio_soft_cpuid *entries, int count);
/* What the engine has. */
void kvmaio_soft_own_cpuid(kvmaio_soft *cpu, struct kvmaio_soft_cpuid *entry);

/* ---- running ----------------------------------------------------------------------- */

/* Run on the calling thread, for `limit` instructions (< 0: no limit; 0: a half entry).
 * LATER: others are to have a turn; kvmaio_soft_go_on() or kvmaio_soft_hand_over() then. */
int kvmaio_soft_enter(kvmaio_soft *cpu, int64_t limit);
int kvmaio_soft_go_on(kvmaio_soft *cpu);
/* kvmaio_soft_enter() without a limit, behind an access that has been answered; as
 * kvmaio_resident_again() of ../kvm/_native.h. */
int kvmaio_soft_again(kvmaio_soft *cpu);
/* The run goes on on the CPU's own thread; `arrived_fd` tells of its end. */
int kvmaio_soft_hand_over(kvmaio_soft *cpu);

/* How much of `limit` instructions to run before the others have a turn: varied, or CPUs in a
 * loop around a lock may stay in step. All of it where there are no others. */
int64_t kvmaio_soft_part(kvmaio_soft *cpu, int64_t limit);

/* Run on the calling thread until it is over, however long that takes. */
int kvmaio_soft_run(kvmaio_soft *cpu, int64_t limit);

/* Complete a pending access, no more. No run: a kick is for the run behind it. */
int kvmaio_soft_half_entry(kvmaio_soft *cpu);

/* Is a run under way, or was begun and is to go on? */
int kvmaio_soft_is_running(const kvmaio_soft *cpu);

/* End the run with this id, under way or still to come. Any thread; a signal's handler. */
void kvmaio_soft_kick(kvmaio_soft *cpu, uint64_t run_id);
/* The id of the run under way, or of the next one. Any thread. */
uint64_t kvmaio_soft_current_run(kvmaio_soft *cpu);

/* End the thread, if there is one. */
int kvmaio_soft_stop(kvmaio_soft *cpu, int64_t timeout_ns);

/* ---- state ------------------------------------------------------------------------ */

void kvmaio_soft_get(kvmaio_soft *cpu, struct kvm_regs *regs, struct kvm_sregs *sregs);
/* A pending access is forgotten. */
void kvmaio_soft_set(kvmaio_soft *cpu, const struct kvm_regs *regs, const struct kvm_sregs *sregs);
/* x87 and SSE, as FXSAVE64 writes them (512 bytes). */
void kvmaio_soft_get_fpu(kvmaio_soft *cpu, uint8_t *area);
void kvmaio_soft_set_fpu(kvmaio_soft *cpu, const uint8_t *area);
/* The same from an XSAVE area; a component that is not marked present is in its initial state. */
void kvmaio_soft_set_xsave(kvmaio_soft *cpu, const uint8_t *area);
int kvmaio_soft_get_msr(kvmaio_soft *cpu, uint32_t index, uint64_t *value);
int kvmaio_soft_set_msr(kvmaio_soft *cpu, uint32_t index, uint64_t value);
uint64_t kvmaio_soft_get_xcr0(kvmaio_soft *cpu);
void kvmaio_soft_set_xcr0(kvmaio_soft *cpu, uint64_t value);
void kvmaio_soft_get_debug_registers(kvmaio_soft *cpu, uint64_t values[6]);
void kvmaio_soft_set_debug_registers(kvmaio_soft *cpu, const uint64_t values[6]);
void kvmaio_soft_get_events(kvmaio_soft *cpu, struct kvm_vcpu_events *events);
void kvmaio_soft_set_events(kvmaio_soft *cpu, const struct kvm_vcpu_events *events);

/* Memory and page tables have been another CPU model's: forget what was made of them, at RIP
 * or everywhere. */
void kvmaio_soft_forget(kvmaio_soft *cpu, int all);

/* Take over another CPU model's registers, and forget as above; and put them back where they lie:
 * of `sregs`, the registers; of the XSAVE area, x87 and SSE, where anything of them has changed. */
void kvmaio_soft_borrow(kvmaio_soft *cpu, const struct kvm_regs *regs,
			const struct kvm_sregs *sregs, const uint8_t *xsave, int all);
void kvmaio_soft_give_back(kvmaio_soft *cpu, struct kvm_regs *regs, struct kvm_sregs *sregs,
			   uint8_t *xsave);

/* Is something to be delivered that is in the CPU already? */
int kvmaio_soft_has_event(kvmaio_soft *cpu);

/* Deliver an external interrupt as soon as the guest takes one. */
void kvmaio_soft_interrupt(kvmaio_soft *cpu, int vector);
void kvmaio_soft_nmi(kvmaio_soft *cpu);

/* The physical address behind a linear one, or UINT64_MAX. */
uint64_t kvmaio_soft_translate(kvmaio_soft *cpu, uint64_t linear);

/* ---- debugging --------------------------------------------------------------------- */

/* Linear addresses at which a run ends with KVM_EXIT_DEBUG before the instruction there,
 * but for the one that the run begins with. Needs `counting`. */
int kvmaio_soft_set_breakpoints(kvmaio_soft *cpu, const uint64_t *addresses, int count);

/* Areas at whose accesses a run ends with KVM_EXIT_DEBUG, behind the instruction; of a repeated
 * string, behind the element. The hits are then in `hits`. Each instruction is looked at while
 * there are any. -E2BIG: too many. */
int kvmaio_soft_set_watchpoints(kvmaio_soft *cpu, const struct kvmaio_soft_watchpoint *watchpoints,
				int count);

#endif
