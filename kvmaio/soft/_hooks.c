/* What the engine calls while it executes: between instructions, and for what we do ourselves.
 *
 * A stop between two instructions is asked for and comes at once. An access to a
 * device leaves the instruction before anything of it has happened; it starts
 * again when the answer is there. Python is never called from here.
 */
#include "_engine.h"

/* The instruction under way does not count: it is executed later, or the rest of it is. */
void kvmaio_give_back(struct cpu *cpu)
{
	if (cpu->counted) {
		cpu->left++;
		cpu->counted = 0;
	}
	cpu->pc = NOWHERE;
}

/* The instruction under way is not executed after all. */
void kvmaio_undo(struct cpu *cpu)
{
	kvmaio_give_back(cpu);
	kvmaio_forget_hits(cpu);
}

#define OPERATION_NONE 1 /* the flags are in `source` as they are */

/* Leaving an instruction, the engine puts back which operation its flags came from. But port
 * I/O has computed them from that, and left them as they are. */
static void restore_flags(struct cpu *cpu, int is_port)
{
	if (cpu->hooked_for_counting)
		cpu->registers->flags = cpu->flags;
	else if (is_port)
		cpu->registers->flags.operation = OPERATION_NONE;
}

/* ---- between instructions -------------------------------------------------------- */

/* Is there a repeated string instruction? The engine executes it element by element. */
static int repeats(struct cpu *cpu, uint64_t linear)
{
	const int is_64bit = !!(cpu->registers->hflags & HFLAG_CS64);
	const int is_32bit = !!(cpu->registers->segments[CS].flags & DESCRIPTOR_BIG);
	uint8_t code[8] = { 0 };
	int repeated = 0, other_size = 0;
	if (cpu->repeat_pc == linear)
		return cpu->repeat_is;
	cpu->repeat_pc = linear;
	cpu->repeat_is = 0;
	if (kvmaio_linear(cpu, linear, code, sizeof code, 0) < 0)
		return 0;
	for (size_t i = 0; i < sizeof code; i++) {
		const uint8_t byte = code[i];
		switch (byte) {
		case 0xf2:
		case 0xf3:
			repeated = 1;
			continue;
		case 0x67:
			other_size = 1;
			continue;
		case 0x26: case 0x2e: case 0x36: case 0x3e:
		case 0x64: case 0x65: case 0x66:
			continue;
		}
		if ((byte & 0xf0) == 0x40 && is_64bit)
			continue; /* REX */
		cpu->repeat_mask = is_64bit && !other_size		? ~0ull
				   : is_64bit || is_32bit != other_size ? UINT32_MAX
									: UINT16_MAX;
		cpu->repeat_is = repeated && ((byte >= 0x6c && byte <= 0x6f) ||
					      (byte >= 0xa4 && byte <= 0xa7) ||
					      (byte >= 0xaa && byte <= 0xaf));
		return cpu->repeat_is;
	}
	return 0;
}

/* Behind its last element, the engine comes once more to a string that is complete. */
static int is_complete(const struct cpu *cpu)
{
	return !(cpu->registers->general[RCX] & cpu->repeat_mask);
}

static int interrupt_due(const struct cpu *cpu)
{
	if (cpu->nmi_pending && !(cpu->registers->hflags2 & HFLAG2_NMI) &&
	    !(cpu->registers->hflags & HFLAG_INHIBIT_IRQ))
		return 1;
	return (cpu->interrupt >= 0 || cpu->public.page->request_interrupt_window) &&
	       takes_interrupts(cpu);
}

static int is_breakpoint(struct cpu *cpu, uint64_t address)
{
	const uint64_t skip = cpu->skip_breakpoint;
	cpu->skip_breakpoint = NOWHERE;
	if (address == skip)
		return 0;
	for (int i = 0; i < cpu->breakpoint_count; i++)
		if (cpu->breakpoints[i] == address)
			return 1;
	return 0;
}

static int stop_here(struct cpu *cpu, enum stop stop)
{
	cpu->stop = stop;
	uc(uc_emu_stop, cpu->engine);
	return 1;
}

static int is_kicked(struct cpu *cpu)
{
	if (!cpu->attention.kick)
		return 0;
	cpu->attention.kick = 0; /* before the look: a kick does it the other way round */
	return atomic_load(&cpu->kicked) >= cpu->public.run_id;
}

/* Something wants a look. Nonzero: the instruction is not to be counted. */
static int look(struct cpu *cpu, uint64_t address)
{
	const uint8_t own = cpu->attention.own;
	const int again = address == cpu->pc && repeats(cpu, address);

	if (cpu->restarting) {
		cpu->restarting = 0;
		cpu->used = 0;
		return 0;
	}
	if (own & LOOK_ACCESSES)
		kvmaio_forget_accesses(cpu);
	/* A string may have as many elements as there is memory: others wait for their turn. */
	const int tired = again && !--cpu->elements;
	const int watched = (own & LOOK_WATCHED) && !(again && is_complete(cpu));
	if ((own & LOOK_HALF) || is_kicked(cpu) || tired || watched ||
	    ((own & LOOK_INTERRUPT) && interrupt_due(cpu))) {
		/* Between two elements of a string: it has not been executed yet. */
		if (again)
			kvmaio_give_back(cpu);
		return stop_here(cpu, STOP_BOUNDARY);
	}
	if (again) {
		cpu->flags = cpu->registers->flags;
		return 1; /* counted as a whole, when it began */
	}
	if (!cpu->left)
		return stop_here(cpu, STOP_BOUNDARY);
	if ((own & LOOK_BREAKPOINTS) && is_breakpoint(cpu, address))
		return stop_here(cpu, STOP_BREAKPOINT);
	return 0;
}

/* The instruction before has loaded another MXCSR; with reserved bits, it is to be a #GP, and
 * its run ends here: see `refuse_mxcsr()`. Of a block, nobody knows which instruction it was. */
static int look_at_mxcsr(struct cpu *cpu)
{
	if (!(mxcsr(cpu) & MXCSR_RESERVED))
		kvmaio_mxcsr_changed(cpu);
	else if (cpu->hooked_for_counting)
		return stop_here(cpu, STOP_BOUNDARY);
	else
		kvmaio_set_mxcsr(cpu, mxcsr(cpu));
	return 0;
}

/* Before each instruction while counting, else before each block. */
static void on_step(uc_engine *engine, uint64_t address, uint32_t size, void *user)
{
	struct cpu *cpu = user;
	(void)engine, (void)size;
	if (unlikely((mxcsr(cpu) != cpu->mxcsr) | *x87_flush(cpu)) && look_at_mxcsr(cpu))
		return;
	if (unlikely((address == cpu->pc) | !cpu->left | !!cpu->attention.any) &&
	    look(cpu, address))
		return;
	cpu->pc = address;
	cpu->flags = cpu->registers->flags;
	cpu->left--;
	cpu->counted = 1;
}

/* ---- accesses -------------------------------------------------------------------- */

/* Leave the instruction under way as if it had not begun. */
static void __attribute__((noreturn)) leave(struct cpu *cpu, enum stop stop, int is_port)
{
	kvmaio_undo(cpu);
	restore_flags(cpu, is_port);
	cpu->stop = stop;
	uc(uc_emu_stop, cpu->engine);
	uc(cpu_loop_exit, cpu->engine_cpu);
	__builtin_unreachable();
}

void kvmaio_forget_accesses(struct cpu *cpu)
{
	cpu->access_count = cpu->used = cpu->pending = cpu->restarting = 0;
	cpu->attention.own &= ~LOOK_ACCESSES;
}

/* This access, if it has been answered; else it becomes an exit, and there is no return. */
static struct access *answered(struct cpu *cpu, enum access_kind kind, uint64_t address,
			       uint32_t size, uint64_t data)
{
	const uint64_t rip = cpu->registers->rip;
	if (cpu->access_rip != rip)
		kvmaio_forget_accesses(cpu);
	if (cpu->used < cpu->access_count) {
		struct access *access = &cpu->accesses[cpu->used];
		if (access->kind == kind && access->address == address && access->size == size) {
			cpu->used++;
			return access;
		}
		cpu->access_count = cpu->used; /* it takes another way now */
	}
	if (cpu->access_count == MOST_ACCESSES)
		leave(cpu, STOP_ERROR, 0);
	cpu->accesses[cpu->access_count++] = (struct access){ kind, size, address, data };
	cpu->access_rip = rip;
	cpu->pending = 1;
	cpu->attention.own |= LOOK_ACCESSES;
	leave(cpu, STOP_ACCESS, kind == PORT_READ || kind == PORT_WRITE);
}

static uint32_t on_in(uc_engine *engine, uint32_t port, int size, void *user)
{
	(void)engine;
	return answered(user, PORT_READ, port & 0xffff, size, 0)->data;
}

static void on_out(uc_engine *engine, uint32_t port, int size, uint32_t value, void *user)
{
	(void)engine;
	answered(user, PORT_WRITE, port & 0xffff, size, value);
}

/* The engine asks about an unaligned access as a whole, then about its pieces. */
static int is_piece(const struct cpu *cpu, enum access_kind kind, uint64_t address, uint32_t size)
{
	if (!cpu->used || cpu->access_rip != cpu->registers->rip)
		return 0;
	const struct access *whole = &cpu->accesses[cpu->used - 1];
	return whole->kind == kind && size < whole->size &&
	       address - whole->address < whole->size && whole->address % whole->size;
}

bool kvmaio_on_memory(uc_engine *engine, uc_mem_type type, uint64_t address, int size,
		      int64_t value, void *user)
{
	struct cpu *cpu = user;
	(void)engine;
	switch (type) {
	case UC_MEM_READ_PROT:
	case UC_MEM_READ_UNMAPPED:
		if (!is_piece(cpu, MEMORY_READ, address, size))
			cpu->current = answered(cpu, MEMORY_READ, address, size, 0);
		return true;
	case UC_MEM_WRITE_PROT:
	case UC_MEM_WRITE_UNMAPPED:
		if (size < 8)
			value &= (1ll << 8 * size) - 1;
		if (!is_piece(cpu, MEMORY_WRITE, address, size))
			answered(cpu, MEMORY_WRITE, address, size, value);
		return true;
	default: /* code where there is no memory */
		cpu->stop = STOP_ERROR;
		return false;
	}
}

uint64_t kvmaio_on_mmio_read(uc_engine *engine, uint64_t offset, unsigned size, void *user)
{
	const struct access *access = ((struct cpu *)user)->current;
	uint64_t value = ~0ull;
	(void)engine;
	if (!access)
		return value;
	/* `offset` is into a region, which begins with a page; an unaligned access comes as
	 * the aligned ones around it. */
	for (unsigned i = 0; i < size && i < 8; i++) {
		const uint64_t byte = (offset + i - access->address) % GUEST_PAGE;
		if (byte < access->size) {
			value &= ~(0xffull << 8 * i);
			value |= (access->data >> 8 * byte & 0xff) << 8 * i;
		}
	}
	return value;
}

void kvmaio_on_mmio_write(uc_engine *engine, uint64_t offset, unsigned size, uint64_t value,
			  void *user)
{
	/* The device has had it. */
	(void)engine, (void)offset, (void)size, (void)value, (void)user;
}

/* ---- instructions of our own ----------------------------------------------------- */

#define SINGLE_STEP 1 /* the only exception behind an instruction that changes flags */

static void on_exception(uc_engine *engine, uint32_t vector, void *user)
{
	struct cpu *cpu = user;
	(void)engine;
	cpu->vector = (int)vector;
	if (vector != SINGLE_STEP)
		restore_flags(cpu, 0);
	stop_here(cpu, STOP_EXCEPTION);
}

static bool on_invalid(uc_engine *engine, void *user)
{
	struct cpu *cpu = user;
	(void)engine;
	cpu->vector = 6;
	restore_flags(cpu, 0);
	cpu->stop = STOP_EXCEPTION;
	return false;
}

static void on_syscall(uc_engine *engine, void *user)
{
	(void)engine;
	stop_here(user, STOP_SYSCALL);
}

static void on_sysenter(uc_engine *engine, void *user)
{
	(void)engine;
	stop_here(user, STOP_SYSENTER);
}

static int on_rdtsc(uc_engine *engine, void *user)
{
	struct cpu *cpu = user;
	const uint64_t now = cpu->public.tsc_offset + kvmaio_clock_inside(cpu);
	(void)engine;
	cpu->registers->general[RAX] = (uint32_t)now;
	cpu->registers->general[RDX] = now >> 32;
	return 1;
}

#define MSR_TSC_AUX 0xc0000103

static int on_rdtscp(uc_engine *engine, void *user)
{
	uint64_t aux = 0;
	kvmaio_soft_get_msr(user, MSR_TSC_AUX, &aux);
	((struct cpu *)user)->registers->general[RCX] = (uint32_t)aux;
	return on_rdtsc(engine, user);
}

static const struct kvmaio_soft_cpuid *find_cpuid(const struct cpu *cpu, uint32_t function,
						  uint32_t index)
{
	for (int i = 0; i < cpu->cpuid_count; i++) {
		const struct kvmaio_soft_cpuid *entry = &cpu->cpuid[i];
		if (entry->function == function && (!entry->has_index || entry->index == index))
			return entry;
	}
	return NULL;
}

#define CR4_OSXSAVE (1u << 18)
#define CPUID1_ECX_OSXSAVE (1u << 27)

static int on_cpuid(uc_engine *engine, void *user)
{
	struct cpu *cpu = user;
	uint64_t *general = cpu->registers->general;
	const uint32_t function = general[RAX];
	struct kvmaio_soft_cpuid answer = { 0 };
	(void)engine;
	if (!cpu->cpuid_count)
		return 0;
	const struct kvmaio_soft_cpuid *entry = find_cpuid(cpu, function, general[RCX]);
	if (entry)
		answer = *entry;
	if (function == 1) { /* it mirrors CR4 */
		answer.ecx &= ~CPUID1_ECX_OSXSAVE;
		if (cpu->registers->cr[4] & CR4_OSXSAVE)
			answer.ecx |= CPUID1_ECX_OSXSAVE;
	}
	general[RAX] = answer.eax;
	general[RBX] = answer.ebx;
	general[RCX] = answer.ecx;
	general[RDX] = answer.edx;
	return 1;
}

/* ---- setting up ------------------------------------------------------------------ */

int kvmaio_hook_steps(struct cpu *cpu, int counting)
{
	if (cpu->step_hook && cpu->hooked_for_counting == counting)
		return 0;
	if (cpu->step_hook)
		uc(uc_hook_del, cpu->engine, cpu->step_hook);
	cpu->hooked_for_counting = counting;
	/* What is translated has the other calls in it. */
	kvmaio_flush_code(cpu);
	return uc(uc_hook_add, cpu->engine, &cpu->step_hook, counting ? UC_HOOK_CODE : UC_HOOK_BLOCK,
		  on_step, cpu, 1, 0);
}

int kvmaio_add_hooks(struct cpu *cpu)
{
	uc_engine *engine = cpu->engine;
	uc_hook hook;
	int error = 0;
#define ON(kind, callback, ...) \
	error |= uc(uc_hook_add, engine, &hook, kind, callback, cpu, 1, 0, ##__VA_ARGS__)
	ON(UC_HOOK_INTR, on_exception);
	ON(UC_HOOK_INSN_INVALID, on_invalid);
	ON(UC_HOOK_MEM_UNMAPPED | UC_HOOK_MEM_PROT, kvmaio_on_memory);
	ON(UC_HOOK_INSN, on_in, UC_X86_INS_IN);
	ON(UC_HOOK_INSN, on_out, UC_X86_INS_OUT);
	ON(UC_HOOK_INSN, on_syscall, UC_X86_INS_SYSCALL);
	ON(UC_HOOK_INSN, on_sysenter, UC_X86_INS_SYSENTER);
	ON(UC_HOOK_INSN, on_rdtsc, UC_X86_INS_RDTSC);
	ON(UC_HOOK_INSN, on_rdtscp, UC_X86_INS_RDTSCP);
	ON(UC_HOOK_INSN, on_cpuid, UC_X86_INS_CPUID);
#undef ON
	return error ? -EINVAL : 0;
}
