/* What the files of the software CPU share: Unicorn's inside, and ours. */
#ifndef KVMAIO_ENGINE_H
#define KVMAIO_ENGINE_H

#include "_soft.h"
#include "_unicorn.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define likely(condition) __builtin_expect(!!(condition), 1)
#define unlikely(condition) __builtin_expect(!!(condition), 0)

#define GUEST_PAGE 4096ull
#define PHYSICAL_END (1ull << 52)

/* ---- Unicorn's registers -----------------------------------------------------------
 *
 * The beginning of its CPUX86State, and where further fields are. Checked when
 * the library is loaded: see _load.c.
 */

enum { ES, CS, SS, DS, FS, GS }; /* the engine's order of segments */
enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R11 = 11 };

struct segment {
	uint32_t selector, pad;
	uint64_t base;
	uint32_t limit;
	uint32_t flags; /* the descriptor's second word */
};

struct registers {
	uint64_t general[16], rip, rflags;
	struct flags {
		uint64_t result, source, source2; /* of the last operation, */
		uint32_t operation;               /* which this one was */
		int32_t direction;
	} flags; /* while it executes; else they are in rflags */
	uint32_t hflags, hflags2;
	struct segment segments[6], ldt, tr, gdt, idt;
	uint64_t cr[5];
};

#define DESCRIPTOR_BIG (1u << 22) /* of a segment's flags: 32 bits by default */

#define EFER_OFFSET 592
#define CPU_OFFSET 0x1b8 /* of the pointer to its CPU within uc_engine */

#define HFLAG_INHIBIT_IRQ (1u << 3)
#define HFLAG_CS64 (1u << 15)
#define HFLAG_SMAP (1u << 23)
#define HFLAG2_NMI (1u << 2) /* NMIs are blocked */
#define HFLAG2_OWN_CR8 (1u << 3) /* CR8 is in the CPU, and not in an APIC */

#define RFLAGS_TF 0x100u
#define RFLAGS_IF 0x200u
#define RFLAGS_DF 0x400u
#define RFLAGS_NT 0x4000u
#define RFLAGS_RF 0x10000u
#define RFLAGS_VM 0x20000u
#define RFLAGS_AC 0x40000u
#define CR0_PE 1u
#define CR0_WP (1u << 16)
#define CR0_PG (1u << 31)
#define CR4_PSE (1u << 4)
#define CR4_PAE (1u << 5)
#define CR4_SMAP (1u << 21)
#define MXCSR_RESERVED 0xffff0000u
#define MXCSR_DAZ 0x40u
#define MXCSR_FTZ 0x8000u
#define EFER_SCE 1u
#define EFER_LMA (1u << 10)

/* ---- the library's functions --------------------------------------------------------- */

/* X(type, name, arguments): of its interface, */
#define API(X)                                                                              \
	X(uc_err, uc_open, (int, int, uc_engine **))                                        \
	X(uc_err, uc_close, (uc_engine *))                                                  \
	X(uc_err, uc_ctl, (uc_engine *, int, ...))                                          \
	X(uc_err, uc_hook_add, (uc_engine *, uc_hook *, int, void *, void *, uint64_t,      \
				uint64_t, ...))                                             \
	X(uc_err, uc_hook_del, (uc_engine *, uc_hook))                                      \
	X(uc_err, uc_mem_map_ptr, (uc_engine *, uint64_t, uint64_t, uint32_t, void *))      \
	X(uc_err, uc_mem_unmap, (uc_engine *, uint64_t, uint64_t))                          \
	X(uc_err, uc_mmio_map, (uc_engine *, uint64_t, uint64_t, mmio_read *, void *,       \
				mmio_write *, void *))                                      \
	X(uc_err, uc_mem_protect, (uc_engine *, uint64_t, uint64_t, uint32_t))              \
	X(uc_err, uc_reg_read, (uc_engine *, int, void *))                                  \
	X(uc_err, uc_reg_write, (uc_engine *, int, const void *))                           \
	X(uc_err, uc_emu_start, (uc_engine *, uint64_t, uint64_t, uint64_t, size_t))        \
	X(uc_err, uc_emu_stop, (uc_engine *))

/* and of its inside: leave the translated code for good (never returns), recompute the
 * hidden flags, answer CPUID, set XCR0, forget the translations of some memory. */
#define INSIDE(X)                                                                           \
	X(void, cpu_loop_exit, (void *))                                                    \
	X(void, x86_update_hflags, (void *))                                                \
	X(void, cpu_x86_cpuid, (void *, uint32_t, uint32_t, uint32_t *, uint32_t *,         \
				uint32_t *, uint32_t *))                                    \
	X(void, helper_xsetbv, (void *, uint32_t, uint64_t))                                \
	X(void, helper_write_crN, (void *, int, uint64_t))                                  \
	X(uint64_t, qemu_ram_addr_from_host, (uc_engine *, void *))                         \
	X(void, tb_invalidate_phys_range, (uc_engine *, uint64_t, uint64_t))

typedef uint64_t mmio_read(uc_engine *, uint64_t, unsigned, void *);
typedef void mmio_write(uc_engine *, uint64_t, unsigned, uint64_t, void *);

struct library {
#define DECLARE(type, name, arguments) type (*name) arguments;
	API(DECLARE)
	INSIDE(DECLARE)
#undef DECLARE
	size_t state_offset; /* of an engine's registers from its CPU */
	size_t xcr0_offset, cr8_offset, fault_offset, debug_offset, mxcsr_offset; /* within these */
	size_t x87_flush_offset, sse_flush_offset; /* of tiny results to 0: a byte each */
	size_t old_exception_offset;
};

extern struct library kvmaio_library;
#define uc(name, ...) kvmaio_library.name(__VA_ARGS__)

/* ---- the machine ---------------------------------------------------------------------- */

#define MOST_REGIONS 64

struct region {
	uint64_t base, size;
	uint8_t *host;
	int readonly;
};

struct chunk {
	uint64_t base, end;
};

struct kvmaio_soft_machine {
	struct region regions[MOST_REGIONS];
	int region_count;
	struct cpu *cpus;
	/* The turn: first come, first served. */
	_Atomic uint32_t next_ticket, serving;
};

void kvmaio_take_turn(kvmaio_soft_machine *machine);
void kvmaio_end_turn(kvmaio_soft_machine *machine);
uint8_t *kvmaio_host_address(kvmaio_soft_machine *machine, uint64_t address, size_t size, int write);

/* ---- a CPU ------------------------------------------------------------------------- */

#define MOST_ACCESSES 160 /* of one instruction: FXRSTOR from a device has the most */
#define MOST_BREAKPOINTS 64
#define MOST_WATCHPOINTS 256
#define MOST_CPUID 256

enum access_kind { PORT_READ, PORT_WRITE, MEMORY_READ, MEMORY_WRITE };

struct access {
	enum access_kind kind;
	uint32_t size;
	uint64_t address, data;
};

#define CODE_KNOWN 16 /* one byte more than the longest instruction */
#define MOST_KNOWN 64

struct known {
	uint64_t physical; /* or NOWHERE */
	uint8_t code[CODE_KNOWN];
};

struct watchpoint {
	uint64_t address, size; /* linear */
	int kinds;              /* KVMAIO_SOFT_READ and _WRITE */
	int hit;                /* which of them the instruction under way has made, first at */
	uint64_t hit_address;
};

/* Why the engine has stopped. */
enum stop { STOP_NOT, STOP_BOUNDARY, STOP_ACCESS, STOP_EXCEPTION, STOP_SYSCALL, STOP_SYSENTER,
	    STOP_BREAKPOINT, STOP_ERROR };

/* What needs a look between two instructions; one word, so that one load sees all. */
union attention {
	struct {
		_Atomic uint8_t kick; /* set from any thread */
		uint8_t own;
	};
	volatile uint16_t any;
};

enum {
	LOOK_ACCESSES = 1,  /* those of the instruction before are to be forgotten */
	LOOK_INTERRUPT = 2, /* an interrupt, an NMI or a window waits for its time */
	LOOK_HALF = 4,      /* the next boundary is the end */
	LOOK_BREAKPOINTS = 8,
	LOOK_WATCHED = 16, /* a watchpoint was hit */
};

struct cpu {
	kvmaio_soft public;
	kvmaio_soft_machine *machine;
	struct cpu *next;
	uc_engine *engine;
	void *engine_cpu;
	struct registers *registers;
	struct chunk *chunks; /* that have become MMIO */
	int chunk_count;
	uc_hook step_hook;
	int hooked_for_counting;

	/* The instruction under way. */
	uint64_t pc;  /* its linear address, or NOWHERE */
	uint64_t left; /* instructions, or blocks, that may still be executed */
	uint64_t slice; /* `left` at the slice's beginning */
	int64_t slice_began_ns;
	uint64_t elements; /* of repeated strings that the slice may still execute */
	struct flags flags; /* when it began */
	uint32_t mxcsr;     /* then, or before it */
	int counted;  /* it was taken from `left`, and is given back if it is not executed */
	union attention attention;
	enum stop stop;
	int vector;
	uint64_t repeat_pc; /* the last address asked about, and whether REP is there */
	int repeat_is;
	uint64_t repeat_mask; /* of its counter, RCX */

	/* Its accesses to devices: an instruction starts again for each, and what has been
	 * answered is remembered. The last one is the exit's while `pending`. */
	struct access accesses[MOST_ACCESSES];
	int access_count, used;
	uint64_t access_rip;
	int pending, restarting;
	struct access *current; /* what the engine is given for the read under way */

	/* The run. */
	int64_t remaining; /* instructions; < 0: no limit */
	int half;
	int64_t turn_end_ns;
	_Atomic uint64_t kicked; /* runs up to this id are to end */
	_Atomic uint64_t ended;

	int interrupt;   /* the vector to deliver, or -1 */
	int nmi_pending;
	struct {
		int vector, has_error; /* -1: none */
		uint32_t error;
	} exception; /* one that another CPU model had not delivered yet */
	_Atomic int flush; /* memory was written from outside */
	uint32_t fault_error; /* of our own walks, with its address */
	uint64_t fault_address;

	struct kvmaio_soft_cpuid cpuid[MOST_CPUID];
	int cpuid_count;
	uint64_t breakpoints[MOST_BREAKPOINTS];
	int breakpoint_count;
	uint64_t skip_breakpoint;
	struct watchpoint watchpoints[MOST_WATCHPOINTS];
	struct kvmaio_soft_hit hits[MOST_WATCHPOINTS]; /* as reported */
	int watchpoint_count;
	int pieces; /* of an unaligned read, which are still to come */
	uc_hook read_hook, write_hook;

	uint8_t borrowed_fpu[512]; /* as it was taken over */
	struct known known[MOST_KNOWN]; /* code whose translations are kept; see _memory.c */

	pthread_t thread;
	int started;
	_Atomic uint32_t command __attribute__((aligned(64)));
};

#define NOWHERE (~0ull)

static inline uint64_t *field64(const struct cpu *cpu, size_t offset)
{
	return (uint64_t *)((uint8_t *)cpu->registers + offset);
}

static inline uint8_t *cr8(const struct cpu *cpu)
{
	return (uint8_t *)cpu->registers + kvmaio_library.cr8_offset;
}

static inline uint64_t efer(const struct cpu *cpu)
{
	return *field64(cpu, EFER_OFFSET);
}

static inline uint32_t mxcsr(const struct cpu *cpu)
{
	return *(const uint32_t *)((const uint8_t *)cpu->registers + kvmaio_library.mxcsr_offset);
}

/* Does x87's arithmetic flush tiny results to 0? It never should. */
static inline uint8_t *x87_flush(const struct cpu *cpu)
{
	return (uint8_t *)cpu->registers + kvmaio_library.x87_flush_offset;
}

/* Does the guest take an external interrupt now? */
static inline int takes_interrupts(const struct cpu *cpu)
{
	return (cpu->registers->rflags & RFLAGS_IF) && !(cpu->registers->hflags & HFLAG_INHIBIT_IRQ);
}

/* What the time stamp counter counts: between slices, and within one. */
uint64_t kvmaio_clock(const struct cpu *cpu);
uint64_t kvmaio_clock_inside(const struct cpu *cpu);

/* _state.c */
uint64_t kvmaio_rflags(struct cpu *cpu);
void kvmaio_set_rflags(struct cpu *cpu, uint64_t value);
void kvmaio_flush_tlb(struct cpu *cpu);
void kvmaio_flush_code(struct cpu *cpu);
void kvmaio_forget_accesses(struct cpu *cpu);
void kvmaio_set_mxcsr(struct cpu *cpu, uint32_t value);
void kvmaio_mxcsr_changed(struct cpu *cpu);

/* _memory.c */
int kvmaio_linear(struct cpu *cpu, uint64_t linear, void *data, size_t size, int write);
int kvmaio_map_all(struct cpu *cpu);
void kvmaio_know_nothing(struct cpu *cpu);
/* The engine has stopped here: what it may have translated is of the code as it is now. */
void kvmaio_look_at_code(struct cpu *cpu);
int kvmaio_map_mmio(struct cpu *cpu, uint64_t address, uint64_t size);

/* _deliver.c: 0, or -1 for a triple fault. */
int kvmaio_deliver(struct cpu *cpu, int vector, int software, int has_error, uint32_t error);
int kvmaio_syscall(struct cpu *cpu);
int kvmaio_sysenter(struct cpu *cpu);
int kvmaio_has_error_code(int vector);

/* _hooks.c */
void kvmaio_give_back(struct cpu *cpu);
void kvmaio_undo(struct cpu *cpu);
int kvmaio_add_hooks(struct cpu *cpu);
int kvmaio_hook_steps(struct cpu *cpu, int counting);
bool kvmaio_on_memory(uc_engine *engine, uc_mem_type type, uint64_t address, int size,
		      int64_t value, void *user);
uint64_t kvmaio_on_mmio_read(uc_engine *engine, uint64_t offset, unsigned size, void *user);
void kvmaio_on_mmio_write(uc_engine *engine, uint64_t offset, unsigned size, uint64_t value,
			  void *user);

/* _watch.c: an access by linear address; how many hits there are to report. */
void kvmaio_watch_linear(struct cpu *cpu, uint64_t linear, size_t size, int kind);
void kvmaio_forget_hits(struct cpu *cpu);
int kvmaio_report_hits(struct cpu *cpu);

#endif
