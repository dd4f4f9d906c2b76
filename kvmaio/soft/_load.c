/* Loading libunicorn, and finding what we use of its inside.
 *
 * Exits that are precise, and cheap, need more than its interface: its registers
 * in place, and its own way out of translated code. Nothing of that is taken on
 * trust: each place is found by writing marks through the interface, and tried
 * on guest code; a library that differs is refused.
 */
#define _GNU_SOURCE
#include "_engine.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

struct library kvmaio_library;

#define CPU_SIZE (128 << 10) /* in which its registers are looked for */
#define STATE_SIZE 7000 /* of its registers, in which fields are looked for */

static int find_functions(void *handle, char *message, size_t size)
{
	const char *missing = NULL;
#define FIND(symbol, name)                                      \
	*(void **)&kvmaio_library.name = dlsym(handle, symbol); \
	if (!kvmaio_library.name)                               \
		missing = symbol;
#define FIND_API(type, name, arguments) FIND(#name, name)
#define FIND_INSIDE(type, name, arguments) FIND(#name "_x86_64", name)
	API(FIND_API)
	INSIDE(FIND_INSIDE)
	if (missing)
		snprintf(message, size, "it has no %s", missing);
	return missing ? -1 : 0;
}

/* Copy what may not be there: the kernel looks for us. */
static size_t copy_carefully(uint8_t *to, const uint8_t *from, size_t size, const int pipe[2])
{
	size_t done = 0;
	while (done < size) {
		ssize_t written = write(pipe[1], from + done, GUEST_PAGE);
		if (written <= 0 || read(pipe[0], to + done, written) != written)
			break;
		done += written;
	}
	return done;
}

static int holds(const uint8_t *block, size_t size, uint64_t word)
{
	for (size_t at = 0; at + 8 <= size; at += 8)
		if (!memcmp(block + at, &word, 8))
			return 1;
	return 0;
}

/* The engine's CPU, and its registers within: told by a mark in RBX and one in RIP. */
static int find_registers(uc_engine *engine)
{
	const uint64_t rbx = 0x5a17c0de11223344, rip = 0x0000123456789abc;
	const uint64_t self = (uintptr_t)engine;
	uc(uc_reg_write, engine, UC_X86_REG_RBX, &rbx);
	uc(uc_reg_write, engine, UC_X86_REG_RIP, &rip);
	int pipe_ends[2], found = -1;
	uint8_t *block = malloc(CPU_SIZE);
	if (!block || pipe2(pipe_ends, O_CLOEXEC) < 0) {
		free(block);
		return -1;
	}
	const uint8_t *place;
	memcpy(&place, (uint8_t *)engine + CPU_OFFSET, 8);
	const size_t size = copy_carefully(block, place, CPU_SIZE, pipe_ends);
	for (size_t at = 0; at + sizeof(struct registers) <= size && found < 0; at += 8) {
		const struct registers *candidate = (void *)(block + at);
		if (candidate->general[RBX] != rbx || candidate->rip != rip)
			continue;
		/* The CPU knows its registers and its engine. */
		if (holds(block, at, (uintptr_t)(place + at)) && holds(block, at, self)) {
			kvmaio_library.state_offset = at;
			found = 0;
		}
	}
	close(pipe_ends[0]);
	close(pipe_ends[1]);
	free(block);
	return found;
}

static uint8_t *state_of(uc_engine *engine)
{
	return *(uint8_t **)((uint8_t *)engine + CPU_OFFSET) +
	       kvmaio_library.state_offset;
}

static void write_mxcsr(uc_engine *engine, uint32_t value)
{
	uc(uc_reg_write, engine, UC_X86_REG_MXCSR, &value);
}

/* MXCSR, and what it switches: see `kvmaio_mxcsr_changed()`. The modes of x87's arithmetic and of
 * SSE's lie alike: flushing tiny inputs to 0 is the byte behind flushing tiny results. */
static const char *find_mxcsr(uc_engine *engine, const uint8_t *state)
{
	static uint8_t before[STATE_SIZE];
	const uint32_t none = 0x1f80, ftz = none | MXCSR_FTZ, daz = none | MXCSR_DAZ;
	write_mxcsr(engine, none);
	memcpy(before, state, sizeof before);
	write_mxcsr(engine, ftz);
	for (size_t at = EFER_OFFSET; at + 4 <= STATE_SIZE; at++) {
		if (!memcmp(before + at, &none, 4) && !memcmp(state + at, &ftz, 4))
			kvmaio_library.mxcsr_offset = at;
		if (before[at] == 0 && state[at] == 1)
			kvmaio_library.x87_flush_offset = at;
	}
	write_mxcsr(engine, daz);
	for (size_t at = EFER_OFFSET; at < STATE_SIZE; at++)
		if (before[at] == 0 && state[at] == 1)
			kvmaio_library.sse_flush_offset = at - 1;
	write_mxcsr(engine, none);
	if (!kvmaio_library.mxcsr_offset || !kvmaio_library.x87_flush_offset ||
	    !kvmaio_library.sse_flush_offset)
		return "MXCSR is elsewhere";
	return NULL;
}

static const char *find_fields(uc_engine *engine)
{
	uint8_t *state = state_of(engine);
	struct registers *registers = (void *)state;
	const uint64_t mark = 0x1122334455667788, cr2 = 0x0badcafe0badf00d, none = 0;
	const uc_x86_mmr gdt = { .base = 0x00aa55aa12345678, .limit = 0xabcd };

	uc(uc_reg_write, engine, UC_X86_REG_GDTR, &gdt);
	uc(uc_reg_write, engine, UC_X86_REG_CR2, &cr2);
	if (registers->gdt.base != gdt.base || registers->gdt.limit != gdt.limit ||
	    registers->cr[2] != cr2)
		return "its segments are elsewhere";
	if (!(*(uint64_t *)(state + EFER_OFFSET) & EFER_LMA) || !(registers->hflags & HFLAG_CS64))
		return "its mode is elsewhere";

	uc(uc_reg_write, engine, UC_X86_REG_DR1, &mark);
	for (size_t at = EFER_OFFSET; at < STATE_SIZE && !kvmaio_library.debug_offset; at += 8)
		if (!memcmp(state + at, &mark, 8))
			kvmaio_library.debug_offset = at - 8;
	if (!kvmaio_library.debug_offset)
		return "its debug registers are elsewhere";
	uc(uc_reg_write, engine, UC_X86_REG_DR1, &none);
	/* error_code, exception_is_int, exception_next_eip; dr[8]; four pointers; old_exception */
	kvmaio_library.fault_offset = kvmaio_library.debug_offset - 16;
	kvmaio_library.old_exception_offset = kvmaio_library.debug_offset + 64 + 32;

	static uint64_t before[STATE_SIZE / 8];
	registers->hflags2 |= HFLAG2_OWN_CR8;
	uc(helper_write_crN, state, 8, 5);
	memcpy(before, state, sizeof before);
	uc(helper_write_crN, state, 8, 10);
	for (size_t at = EFER_OFFSET; at < STATE_SIZE; at++)
		if (((uint8_t *)before)[at] == 5 && state[at] == 10)
			kvmaio_library.cr8_offset = at;
	if (!kvmaio_library.cr8_offset)
		return "CR8 is elsewhere";
	registers->cr[4] |= 1u << 18; /* OSXSAVE, or it would fault */
	uc(helper_xsetbv, state, 0, 1);
	memcpy(before, state, sizeof before);
	uc(helper_xsetbv, state, 0, 3);
	for (size_t at = EFER_OFFSET; at < STATE_SIZE; at += 8)
		if (before[at / 8] == 1 && *(uint64_t *)(state + at) == 3)
			kvmaio_library.xcr0_offset = at;
	registers->cr[4] &= ~(1ull << 18);
	if (!kvmaio_library.xcr0_offset)
		return "XCR0 is elsewhere";
	return find_mxcsr(engine, state);
}

/* ---- on guest code ---------------------------------------------------------------- */

#define CODE 0x1000

struct trial {
	int vector, is_int;
	uint64_t next_rip, out_rip;
};

static void trial_interrupt(uc_engine *engine, uint32_t vector, void *user)
{
	struct trial *trial = user;
	const uint8_t *state = state_of(engine);
	trial->vector = vector;
	trial->is_int = *(const int *)(state + kvmaio_library.fault_offset + 4);
	trial->next_rip = *(const uint64_t *)(state + kvmaio_library.fault_offset + 8);
	uc(uc_emu_stop, engine);
}

static void trial_out(uc_engine *engine, uint32_t port, int size, uint32_t value, void *user)
{
	(void)port, (void)size, (void)value;
	((struct trial *)user)->out_rip = ((struct registers *)state_of(engine))->rip;
	uc(uc_emu_stop, engine);
	uc(cpu_loop_exit, *(void **)((uint8_t *)engine + CPU_OFFSET));
}

static const char *try_code(uc_engine *engine)
{
	/* inc eax; int 0x55 -- inc eax; out 0x80, al; inc eax */
	static const uint8_t code[] = { 0xff, 0xc0, 0xcd, 0x55, 0xff, 0xc0, 0xe6, 0x80, 0xff, 0xc0 };
	static uint8_t page[GUEST_PAGE] __attribute__((aligned(GUEST_PAGE)));
	struct trial trial = { .vector = -1 };
	struct registers *registers = (void *)state_of(engine);
	uc_hook hook;

	memcpy(page, code, sizeof code);
	if (uc(uc_mem_map_ptr, engine, CODE, GUEST_PAGE, UC_PROT_ALL, page) ||
	    uc(uc_hook_add, engine, &hook, UC_HOOK_INTR, trial_interrupt, &trial, 1, 0) ||
	    uc(uc_hook_add, engine, &hook, UC_HOOK_INSN, trial_out, &trial, 1, 0, UC_X86_INS_OUT))
		return "it takes no hooks";
	registers->general[RAX] = 0;
	uc(uc_emu_start, engine, CODE, 0, 0, 0);
	if (trial.vector != 0x55 || trial.is_int != 1 || trial.next_rip != CODE + 4)
		return "it reports interrupts otherwise";
	uc(uc_emu_start, engine, CODE + 4, 0, 0, 0);
	if (trial.out_rip != CODE + 6 || registers->rip != CODE + 6 || registers->general[RAX] != 2)
		return "an instruction cannot be left";
	return NULL;
}

int kvmaio_soft_load(const char *path, char *message, size_t size)
{
	static int loaded;
	uc_engine *engine;
	if (loaded)
		return 0;
	void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!handle) {
		snprintf(message, size, "%s", dlerror());
		return -1;
	}
	if (find_functions(handle, message, size) < 0)
		return -1;
	if (uc(uc_open, UC_ARCH_X86, UC_MODE_64, &engine) != UC_ERR_OK) {
		snprintf(message, size, "it opens no engine");
		return -1;
	}
	uc(uc_ctl, engine, UC_CTL_WRITE(UC_CTL_UC_USE_EXITS, 1), 1);
	const char *problem = find_registers(engine) < 0 ? "its registers are elsewhere" : NULL;
	if (!problem)
		problem = find_fields(engine);
	if (!problem)
		problem = try_code(engine);
	uc(uc_close, engine);
	if (problem) {
		snprintf(message, size, "%s", problem);
		return -1;
	}
	loaded = 1;
	return 0;
}
