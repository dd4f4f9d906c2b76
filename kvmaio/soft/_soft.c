/* A CPU's runs: on the loop's thread while exits come thick and fast, else on its own. */
#define _GNU_SOURCE
#include "_engine.h"

#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S 1000000000ll
#define PAGES (2 * GUEST_PAGE) /* the run page, and the data of port I/O behind it */
#define SLICE 20000            /* instructions between two looks at the clock and the turn */
#define GO_ON (-1)

enum command { IDLE, GO, QUIT };

static int64_t now_ns(clockid_t clock)
{
	struct timespec now;
	clock_gettime(clock, &now);
	return now.tv_sec * NS_PER_S + now.tv_nsec;
}

/* Of the slice under way: instructions, up to the one that is being executed, or nanoseconds. */
static uint64_t executed(const struct cpu *cpu)
{
	if (cpu->hooked_for_counting)
		return cpu->slice - cpu->left;
	return now_ns(CLOCK_MONOTONIC) - cpu->slice_began_ns;
}

/* Nanoseconds in periods of the clock. */
static uint64_t periods(const struct cpu *cpu, uint64_t ns)
{
	return (unsigned __int128)ns * cpu->public.clock_hz / NS_PER_S;
}

uint64_t kvmaio_clock(const struct cpu *cpu)
{
	if (cpu->public.by_wall_clock)
		return periods(cpu, now_ns(CLOCK_MONOTONIC));
	return cpu->public.clock;
}

uint64_t kvmaio_clock_inside(const struct cpu *cpu)
{
	const uint64_t ticks = cpu->public.by_wall_clock ? 0 : executed(cpu);
	return kvmaio_clock(cpu) + (cpu->hooked_for_counting ? ticks : periods(cpu, ticks));
}

/* ---- exits ------------------------------------------------------------------------ */

static int exits(struct cpu *cpu, uint32_t reason)
{
	cpu->public.page->exit_reason = reason;
	cpu->public.exits++;
	return KVMAIO_SOFT_EXIT;
}

/* As KVM, where it cannot fetch or emulate an instruction; it reports no bytes. */
static int gave_up(struct cpu *cpu)
{
	struct kvm_run *page = cpu->public.page;
	page->internal.suberror = KVM_INTERNAL_ERROR_EMULATION;
	page->internal.ndata = 0;
	return exits(cpu, KVM_EXIT_INTERNAL_ERROR);
}

/* See `access` of kvmaio_soft. */
static int64_t key_of(const struct access *access)
{
	const int is_pio = access->kind == PORT_READ || access->kind == PORT_WRITE;
	const int is_write = access->kind == PORT_WRITE || access->kind == MEMORY_WRITE;
	const uint32_t size = access->size;
	if (size & (size - 1) || size > 8 || access->address >> 52)
		return -1;
	return (int64_t)(access->address << 6 | size << 2 | is_write << 1 | is_pio);
}

static int exit_for_access(struct cpu *cpu)
{
	struct kvm_run *page = cpu->public.page;
	const struct access *access = &cpu->accesses[cpu->access_count - 1];
	if (access->kind == PORT_READ || access->kind == PORT_WRITE) {
		page->io.direction = access->kind == PORT_WRITE ? KVM_EXIT_IO_OUT : KVM_EXIT_IO_IN;
		page->io.size = access->size;
		page->io.port = access->address;
		page->io.count = 1;
		page->io.data_offset = GUEST_PAGE;
		memcpy((uint8_t *)page + GUEST_PAGE, &access->data, 8);
		cpu->public.access = key_of(access);
		return exits(cpu, KVM_EXIT_IO);
	}
	if (kvmaio_map_mmio(cpu, access->address, access->size) < 0)
		return gave_up(cpu);
	page->mmio.phys_addr = access->address;
	page->mmio.len = access->size;
	page->mmio.is_write = access->kind == MEMORY_WRITE;
	memcpy(page->mmio.data, &access->data, 8);
	cpu->public.access = key_of(access);
	return exits(cpu, KVM_EXIT_MMIO);
}

/* The answer to the last exit is in the page: the instruction may start again. */
static void take_answer(struct cpu *cpu)
{
	if (!cpu->pending)
		return;
	const struct kvm_run *page = cpu->public.page;
	struct access *access = &cpu->accesses[cpu->access_count - 1];
	if (access->kind == PORT_READ)
		memcpy(&access->data, (const uint8_t *)page + GUEST_PAGE, 8);
	else if (access->kind == MEMORY_READ)
		memcpy(&access->data, page->mmio.data, 8);
	if (access->size < 8)
		access->data &= (1ull << 8 * access->size) - 1;
	cpu->pending = 0;
	cpu->restarting = 1;
	cpu->attention.own |= LOOK_ACCESSES;
}

static int stops_for_debugger(struct cpu *cpu)
{
	struct kvm_run *page = cpu->public.page;
	memset(&page->debug, 0, sizeof page->debug);
	page->debug.arch.exception = 1;
	page->debug.arch.pc = cpu->registers->segments[CS].base + cpu->registers->rip;
	return exits(cpu, KVM_EXIT_DEBUG);
}

/* ---- one start of the engine ---------------------------------------------------------- */

static int take_exception(struct cpu *cpu)
{
	uint8_t *state = (uint8_t *)cpu->registers;
	const uint32_t error = *(uint32_t *)(state + kvmaio_library.fault_offset);
	const int is_int = *(int *)(state + kvmaio_library.fault_offset + 4);
	const int vector = cpu->vector;
	const int software = is_int && vector != 6;
	const int is_trap = software || vector == 1 || vector == 3 || vector == 4;
	/* Or the engine takes the next one for a double fault. */
	*(int *)(state + kvmaio_library.old_exception_offset) = -1;
	if (!is_trap)
		kvmaio_undo(cpu);
	const int has_error = !software && (cpu->registers->cr[0] & CR0_PE) &&
			      kvmaio_has_error_code(vector);
	return kvmaio_deliver(cpu, vector, software, has_error, has_error ? error : 0);
}

/* An instruction that is nobody's here may be another model's: it has not begun. */
static int leave_undefined(struct cpu *cpu)
{
	*(int *)((uint8_t *)cpu->registers + kvmaio_library.old_exception_offset) = -1;
	kvmaio_undo(cpu);
	cpu->public.undefined = 1;
	return gave_up(cpu);
}

#define GENERAL_PROTECTION 13

/* LDMXCSR, FXRSTOR and XRSTOR refuse reserved bits (SDM vol. 1, 10.2.3). The engine does not, and
 * no processor would take its state: it is seen when the instruction is over, and what else that
 * has loaded stays. Within a block, nobody knows which one it was. */
static int refuse_mxcsr(struct cpu *cpu)
{
	struct registers *registers = cpu->registers;
	registers->rip = cpu->pc - registers->segments[CS].base;
	if (!(registers->hflags & HFLAG_CS64))
		registers->rip = (uint32_t)registers->rip;
	kvmaio_set_mxcsr(cpu, cpu->mxcsr);
	kvmaio_give_back(cpu);
	/* The next one may have led to a fault, but it is not its turn. */
	*(int *)((uint8_t *)registers + kvmaio_library.old_exception_offset) = -1;
	return kvmaio_deliver(cpu, GENERAL_PROTECTION, 0, !!(registers->cr[0] & CR0_PE), 0);
}

static int start_engine(struct cpu *cpu)
{
	int error = 0;
	cpu->stop = STOP_NOT;
	uc_err gave = uc(uc_emu_start, cpu->engine, cpu->registers->rip, 0, 0, 0);
	if (unlikely(mxcsr(cpu) & MXCSR_RESERVED)) {
		if (cpu->hooked_for_counting && cpu->pc != NOWHERE)
			return refuse_mxcsr(cpu) < 0 ? exits(cpu, KVM_EXIT_SHUTDOWN) : GO_ON;
		kvmaio_set_mxcsr(cpu, mxcsr(cpu));
	}
	switch (cpu->stop) {
	case STOP_NOT:
		if (gave != UC_ERR_OK)
			return gave_up(cpu);
		cpu->pc = NOWHERE;
		return exits(cpu, KVM_EXIT_HLT);
	case STOP_BOUNDARY:
		return GO_ON;
	case STOP_ACCESS:
		return exit_for_access(cpu);
	case STOP_EXCEPTION:
		if (cpu->vector == 6 && cpu->public.keeps_undefined)
			return leave_undefined(cpu);
		error = take_exception(cpu);
		if (cpu->public.forgets_handlers)
			kvmaio_soft_forget(&cpu->public, 0);
		break;
	case STOP_SYSCALL:
		error = kvmaio_syscall(cpu);
		break;
	case STOP_SYSENTER:
		error = kvmaio_sysenter(cpu);
		break;
	case STOP_BREAKPOINT:
		return stops_for_debugger(cpu);
	case STOP_ERROR:
		kvmaio_undo(cpu);
		return gave_up(cpu);
	}
	return error < 0 ? exits(cpu, KVM_EXIT_SHUTDOWN) : GO_ON;
}

/* Look between instructions whether the time of what waits has come. */
static void watch_for_events(struct cpu *cpu)
{
	cpu->attention.own &= ~LOOK_INTERRUPT;
	if (cpu->nmi_pending || cpu->interrupt >= 0 || cpu->exception.vector >= 0 ||
	    cpu->public.page->request_interrupt_window)
		cpu->attention.own |= LOOK_INTERRUPT;
}

/* What is due between two instructions. */
static int between(struct cpu *cpu)
{
	struct kvm_run *page = cpu->public.page;
	const uint64_t deliveries = cpu->public.deliveries;
	int error = 0;
	if (cpu->restarting) { /* not between: within one */
		watch_for_events(cpu);
		return GO_ON;
	}
	if (cpu->half) /* with a hit, that is for the entry to come */
		return KVMAIO_SOFT_INTERRUPTED;
	if (kvmaio_report_hits(cpu))
		return stops_for_debugger(cpu);
	if (atomic_load(&cpu->kicked) >= cpu->public.run_id)
		return KVMAIO_SOFT_INTERRUPTED;
	if (cpu->remaining >= 0 && (uint64_t)cpu->remaining <= cpu->slice - cpu->left)
		return KVMAIO_SOFT_LIMIT;
	if (cpu->exception.vector >= 0) {
		const int vector = cpu->exception.vector;
		cpu->exception.vector = -1;
		error = kvmaio_deliver(cpu, vector, 0, cpu->exception.has_error,
				       cpu->exception.error);
	} else if (cpu->nmi_pending && !(cpu->registers->hflags2 & HFLAG2_NMI) &&
		   !(cpu->registers->hflags & HFLAG_INHIBIT_IRQ)) {
		cpu->nmi_pending = 0;
		error = kvmaio_deliver(cpu, 2, 0, 0, 0);
		cpu->registers->hflags2 |= HFLAG2_NMI;
	} else if (cpu->interrupt >= 0 && takes_interrupts(cpu)) {
		const int vector = cpu->interrupt;
		cpu->interrupt = -1;
		error = kvmaio_deliver(cpu, vector, 0, 0, 0);
	} else if (cpu->interrupt < 0 && page->request_interrupt_window && takes_interrupts(cpu)) {
		return exits(cpu, KVM_EXIT_IRQ_WINDOW_OPEN);
	}
	if (error < 0)
		return exits(cpu, KVM_EXIT_SHUTDOWN);
	if (cpu->public.deliveries != deliveries && cpu->public.forgets_handlers)
		kvmaio_soft_forget(&cpu->public, 0);
	watch_for_events(cpu);
	return GO_ON;
}

/* Where several CPUs take turns, no two slices are alike: with a loop around a lock that divides
 * them, the others would always find it taken. The lengths follow from the ticks, and so are the
 * same in each run. */
static uint64_t vary(const struct cpu *cpu, uint64_t length)
{
	if (!cpu->machine->cpus->next)
		return length;
	return length - (cpu->public.ticks * 0x9e3779b97f4a7c15ull >> 33) % (length / 2 + 1);
}

static int slice(struct cpu *cpu)
{
	int outcome;
	if (atomic_exchange(&cpu->flush, 0))
		kvmaio_flush_code(cpu);
	cpu->slice = cpu->half ? 1 : vary(cpu, SLICE);
	if (cpu->remaining >= 0 && (uint64_t)cpu->remaining < cpu->slice)
		cpu->slice = cpu->remaining;
	cpu->left = cpu->slice;
	cpu->elements = SLICE;
	if (!cpu->hooked_for_counting)
		cpu->slice_began_ns = now_ns(CLOCK_MONOTONIC);
	do {
		outcome = between(cpu);
		if (outcome == GO_ON)
			outcome = start_engine(cpu);
	} while (outcome == GO_ON && (cpu->left || cpu->half) && cpu->elements);
	cpu->counted = 0; /* nothing of it is given back any more */
	const uint64_t ticks = executed(cpu);
	cpu->public.ticks += ticks;
	cpu->public.clock += cpu->hooked_for_counting ? ticks : periods(cpu, ticks);
	if (cpu->remaining >= 0)
		cpu->remaining -= cpu->slice - cpu->left;
	cpu->public.slices++;
	return outcome;
}

/* ---- runs --------------------------------------------------------------------------- */

static void prepare(struct cpu *cpu)
{
	cpu->public.hit_count = 0;
	cpu->public.access = -1;
	take_answer(cpu);
	*cr8(cpu) = cpu->public.page->cr8 & 15; /* as KVM does, at each entry */
	/* Where a stop must be exact, every instruction is looked at. */
	const int exact = cpu->public.counting || cpu->remaining >= 0 || cpu->watchpoint_count ||
			  (cpu->half && cpu->restarting);
	if (exact || !cpu->half)
		kvmaio_hook_steps(cpu, exact);
	cpu->attention.own &= LOOK_ACCESSES | LOOK_WATCHED;
	if (cpu->half)
		cpu->attention.own |= LOOK_HALF;
	if (cpu->breakpoint_count) {
		cpu->attention.own |= LOOK_BREAKPOINTS;
		cpu->skip_breakpoint = cpu->registers->segments[CS].base + cpu->registers->rip;
	}
}

static void tell_page(struct cpu *cpu)
{
	struct kvm_run *page = cpu->public.page;
	page->cr8 = *cr8(cpu);
	page->if_flag = !!(cpu->registers->rflags & RFLAGS_IF);
	page->ready_for_interrupt_injection = takes_interrupts(cpu) && cpu->interrupt < 0;
}

/* Execute until the run is over, or `until_ns` on the clock; 0 is never. */
static int execute(struct cpu *cpu, int64_t until_ns)
{
	int outcome = GO_ON;
	while (outcome == GO_ON) {
		kvmaio_take_turn(cpu->machine);
		outcome = slice(cpu);
		kvmaio_end_turn(cpu->machine);
		if (outcome == GO_ON && until_ns && now_ns(CLOCK_MONOTONIC) >= until_ns)
			return KVMAIO_SOFT_LATER;
	}
	tell_page(cpu);
	if (cpu->public.keeps_code)
		kvmaio_look_at_code(cpu);
	cpu->public.outcome = outcome;
	return outcome;
}

static int run_until(struct cpu *cpu, int64_t until_ns)
{
	int outcome = execute(cpu, until_ns);
	cpu->public.yielded = 0;
	if (outcome == KVMAIO_SOFT_LATER)
		cpu->turn_end_ns = 0;
	else
		atomic_store(&cpu->ended, cpu->public.run_id);
	return outcome;
}

static void begin(struct cpu *cpu, int64_t limit)
{
	/* An exception may have kept the caller from waiting for the run before: go on with it. */
	if (!kvmaio_soft_is_running(&cpu->public)) {
		cpu->public.run_id++;
		cpu->public.began = cpu->public.ticks;
	}
	cpu->attention.kick = 0;
	/* The flag before the look: a kick does it the other way round. */
	cpu->half = limit == 0 || atomic_load(&cpu->kicked) >= cpu->public.run_id;
	cpu->remaining = cpu->half ? -1 : limit;
	prepare(cpu);
}

int kvmaio_soft_enter(kvmaio_soft *public, int64_t limit)
{
	struct cpu *cpu = (struct cpu *)public;
	const int64_t now = now_ns(CLOCK_MONOTONIC);
	begin(cpu, limit);
	if (cpu->turn_end_ns && now >= cpu->turn_end_ns) {
		cpu->turn_end_ns = 0;
		public->yielded = 1;
		return KVMAIO_SOFT_LATER;
	}
	if (!cpu->turn_end_ns)
		cpu->turn_end_ns = now + public->turn_ns;
	return run_until(cpu, now + public->inline_ns);
}

int kvmaio_soft_go_on(kvmaio_soft *public)
{
	struct cpu *cpu = (struct cpu *)public;
	const int64_t now = now_ns(CLOCK_MONOTONIC);
	cpu->turn_end_ns = now + public->turn_ns;
	return run_until(cpu, now + public->inline_ns);
}

int kvmaio_soft_again(kvmaio_soft *public)
{
	const int64_t before = public->access;
	public->burst.held = public->burst.disturbed;
	if (public->burst.held)
		return -1;
	public->burst.end = kvmaio_soft_enter(public, -1);
	if (public->burst.end != KVMAIO_SOFT_EXIT || public->access < 0)
		return -1;
	*(public->access & 1 ? &public->burst.io : &public->burst.mmio) += 1;
	public->burst_ticks = public->ticks;
	public->left_ns = now_ns(CLOCK_MONOTONIC);
	public->exit_untold = 1;
	return public->access == before ? 0 : -1;
}

int kvmaio_soft_is_running(const kvmaio_soft *public)
{
	return atomic_load(&((const struct cpu *)public)->ended) != public->run_id;
}

int64_t kvmaio_soft_part(kvmaio_soft *public, int64_t limit)
{
	return limit > 1 ? (int64_t)vary((struct cpu *)public, limit) : limit;
}

int kvmaio_soft_run(kvmaio_soft *public, int64_t limit)
{
	begin((struct cpu *)public, limit);
	return run_until((struct cpu *)public, 0);
}

int kvmaio_soft_half_entry(kvmaio_soft *public)
{
	struct cpu *cpu = (struct cpu *)public;
	cpu->half = 1;
	cpu->remaining = -1;
	public->began = public->ticks;
	prepare(cpu);
	return execute(cpu, 0);
}

/* ---- kicks ---------------------------------------------------------------------------- */

void kvmaio_soft_kick(kvmaio_soft *public, uint64_t run_id)
{
	struct cpu *cpu = (struct cpu *)public;
	uint64_t kicked = atomic_load(&cpu->kicked);
	do
		if (kicked >= run_id)
			return;
	while (!atomic_compare_exchange_weak(&cpu->kicked, &kicked, run_id));
	cpu->attention.kick = 1;
}

uint64_t kvmaio_soft_current_run(kvmaio_soft *public)
{
	return atomic_load(&((struct cpu *)public)->ended) + 1;
}

/* ---- the CPU's own thread --------------------------------------------------------------- */

static void futex(_Atomic uint32_t *word, int operation, uint32_t value)
{
	syscall(SYS_futex, word, operation, value, NULL, NULL, 0);
}

static void *thread_main(void *argument)
{
	struct cpu *cpu = argument;
	uint32_t command;
	for (;;) {
		while ((command = atomic_load(&cpu->command)) == IDLE)
			futex(&cpu->command, FUTEX_WAIT_PRIVATE, IDLE);
		if (command == QUIT)
			return NULL;
		run_until(cpu, 0);
		uint32_t go = GO; /* not a plain store: it could overwrite a QUIT */
		atomic_compare_exchange_strong(&cpu->command, &go, IDLE);
		const uint64_t one = 1;
		ssize_t written;
		do
			written = write(cpu->public.arrived_fd, &one, sizeof one);
		while (written < 0 && errno == EINTR);
	}
}

static int start_thread(struct cpu *cpu)
{
	sigset_t all, before;
	/* The thread inherits the mask: no signal of the program is ever taken there. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int error = pthread_create(&cpu->thread, NULL, thread_main, cpu);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	cpu->started = !error;
	return -error;
}

int kvmaio_soft_hand_over(kvmaio_soft *public)
{
	struct cpu *cpu = (struct cpu *)public;
	int error = cpu->started ? 0 : start_thread(cpu);
	if (!error) {
		atomic_store(&cpu->command, GO);
		futex(&cpu->command, FUTEX_WAKE_PRIVATE, INT32_MAX);
	}
	return error;
}

int kvmaio_soft_stop(kvmaio_soft *public, int64_t timeout_ns)
{
	struct cpu *cpu = (struct cpu *)public;
	if (!cpu->started)
		return 0;
	const int64_t until = now_ns(CLOCK_REALTIME) + timeout_ns;
	const struct timespec at = { .tv_sec = until / NS_PER_S, .tv_nsec = until % NS_PER_S };
	kvmaio_soft_kick(public, UINT64_MAX);
	atomic_store(&cpu->command, QUIT);
	futex(&cpu->command, FUTEX_WAKE_PRIVATE, INT32_MAX);
	int error = pthread_timedjoin_np(cpu->thread, NULL, &at);
	cpu->started = !!error;
	return -error;
}

/* ---- the CPU's life ----------------------------------------------------------------------- */

static int open_engine(struct cpu *cpu)
{
	uint64_t rip = 0;
	if (uc(uc_open, UC_ARCH_X86, UC_MODE_64, &cpu->engine))
		return -ENOMEM;
	/* With an empty list of exits: else an address would be one. */
	uc(uc_ctl, cpu->engine, UC_CTL_WRITE(UC_CTL_UC_USE_EXITS, 1), 1);
	uc(uc_reg_write, cpu->engine, UC_X86_REG_RIP, &rip); /* it makes its CPU only now */
	cpu->engine_cpu = *(void **)((uint8_t *)cpu->engine + CPU_OFFSET);
	if (!cpu->engine_cpu)
		return -EINVAL;
	cpu->registers = (void *)((uint8_t *)cpu->engine_cpu + kvmaio_library.state_offset);
	cpu->registers->hflags2 |= HFLAG2_OWN_CR8;
	kvmaio_mxcsr_changed(cpu);
	int error = kvmaio_map_all(cpu);
	if (!error)
		error = kvmaio_add_hooks(cpu);
	return error;
}

int kvmaio_soft_create(kvmaio_soft_machine *machine, kvmaio_soft **out)
{
	struct cpu *cpu = aligned_alloc(64, (sizeof *cpu + 63) & ~63ul);
	if (!cpu)
		return -ENOMEM;
	memset(cpu, 0, sizeof *cpu);
	cpu->machine = machine;
	cpu->public.counting = 1;
	cpu->public.arrived_fd = -1;
	cpu->public.access = -1;
	kvmaio_know_nothing(cpu);
	cpu->pc = cpu->repeat_pc = cpu->skip_breakpoint = NOWHERE;
	cpu->interrupt = cpu->exception.vector = -1;
	int error = open_engine(cpu);
	void *page = MAP_FAILED;
	if (!error) {
		page = mmap(NULL, PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		cpu->public.arrived_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (page == MAP_FAILED || cpu->public.arrived_fd < 0)
			error = -errno;
	}
	cpu->public.page = page == MAP_FAILED ? NULL : page;
	cpu->next = machine->cpus;
	machine->cpus = cpu;
	if (error)
		kvmaio_soft_destroy(&cpu->public);
	else
		*out = &cpu->public;
	return error;
}

void kvmaio_soft_destroy(kvmaio_soft *public)
{
	struct cpu *cpu = (struct cpu *)public;
	struct cpu **link = &cpu->machine->cpus;
	while (*link && *link != cpu)
		link = &(*link)->next;
	if (*link)
		*link = cpu->next;
	if (cpu->engine)
		uc(uc_close, cpu->engine);
	if (public->page)
		munmap(public->page, PAGES);
	if (public->arrived_fd >= 0)
		close(public->arrived_fd);
	free(cpu->chunks);
	free(cpu);
}
