/* Exceptions and interrupts through the guest's own tables; SYSCALL and SYSENTER.
 *
 * The engine only says that there is one. Sources: SDM vol. 3A, chapter 6 (gates,
 * stacks, error codes, double faults); vol. 2B, SYSCALL and SYSENTER. Hardware
 * task gates are not supported: they end in #GP.
 */
#include "_engine.h"

enum { DE = 0, DB = 1, NMI = 2, UD = 6, DF = 8, TS = 10, NP = 11, STACK = 12, GP = 13, PF = 14,
       AC = 17 };

/* What an attempt changes, until it has succeeded. */
struct frame {
	uint64_t rsp, rip, rflags;
	struct segment cs, ss, data[4];
	int drop_data; /* leaving virtual-8086 mode */
};

struct event {
	int vector, software, has_error;
	uint32_t error;
};

struct failure {
	int vector;
	uint32_t error;
};

int kvmaio_has_error_code(int vector)
{
	return vector == DF || (vector >= TS && vector <= PF) || vector == AC;
}

static int fail(struct failure *failure, int vector, uint32_t error)
{
	*failure = (struct failure){ vector, error };
	return -1;
}

static int fail_page(struct cpu *cpu, struct failure *failure)
{
	return fail(failure, PF, cpu->fault_error);
}

/* ---- descriptors ----------------------------------------------------------------- */

#define DESCRIPTOR_TYPE(word) ((word) >> 8 & 0xf)
#define DESCRIPTOR_DPL(word) ((word) >> 13 & 3)
#define DESCRIPTOR_PRESENT (1u << 15)
#define DESCRIPTOR_NOT_SYSTEM (1u << 12)
#define DESCRIPTOR_CODE (1u << 11)
#define DESCRIPTOR_CONFORMING (1u << 10)
#define DESCRIPTOR_LONG (1u << 21)
#define DESCRIPTOR_PAGES (1u << 23)

/* 0, or the vector to fail with: its error code is the selector. */
static int load_descriptor(struct cpu *cpu, uint32_t selector, struct segment *into)
{
	const struct segment *table =
		selector & 4 ? &cpu->registers->ldt : &cpu->registers->gdt;
	const uint32_t offset = selector & ~7u;
	uint32_t words[2];
	if (offset + 7 > table->limit)
		return GP;
	if (kvmaio_linear(cpu, table->base + offset, words, sizeof words, 0) < 0)
		return PF;
	uint32_t limit = (words[0] & 0xffff) | (words[1] & 0xf0000);
	if (words[1] & DESCRIPTOR_PAGES)
		limit = limit << 12 | 0xfff;
	*into = (struct segment){
		.selector = selector,
		.base = words[0] >> 16 | (words[1] & 0xff) << 16 | (words[1] & 0xff000000),
		.limit = limit,
		.flags = words[1],
	};
	return 0;
}

/* ---- real mode ------------------------------------------------------------------- */

static int deliver_real(struct cpu *cpu, const struct event *event, struct frame *frame,
			struct failure *failure)
{
	const struct segment *idt = &cpu->registers->idt;
	const uint16_t pushed[3] = { frame->rflags, frame->cs.selector, frame->rip };
	uint16_t vector[2];
	if (event->vector * 4u + 3 > idt->limit)
		return fail(failure, GP, 0);
	if (kvmaio_linear(cpu, idt->base + event->vector * 4, vector, sizeof vector, 0) < 0)
		return fail_page(cpu, failure);
	uint16_t sp = frame->rsp;
	for (int i = 0; i < 3; i++) {
		uint16_t word = pushed[i];
		sp -= 2;
		if (kvmaio_linear(cpu, frame->ss.base + sp, &word, 2, 1) < 0)
			return fail_page(cpu, failure);
	}
	frame->rsp = (frame->rsp & ~0xffffull) | sp;
	frame->rip = vector[0];
	frame->cs.selector = vector[1];
	frame->cs.base = vector[1] << 4;
	frame->rflags &= ~(uint64_t)(RFLAGS_IF | RFLAGS_TF | RFLAGS_AC | RFLAGS_RF);
	return 0;
}

/* ---- protected and long mode ----------------------------------------------------- */

struct gate {
	uint64_t offset;
	uint32_t selector;
	int type, ist;
};

static int load_gate(struct cpu *cpu, const struct event *event, struct gate *gate,
		     struct failure *failure)
{
	const struct segment *idt = &cpu->registers->idt;
	const int long_mode = !!(efer(cpu) & EFER_LMA);
	const uint32_t size = long_mode ? 16 : 8, cpl = cpu->registers->hflags & 3;
	/* Bit 1: an IDT's entry; bit 0: not the program itself. */
	const uint32_t error = event->vector * 8 + 2 + !event->software;
	uint32_t words[4] = { 0 };
	if (event->vector * size + size - 1 > idt->limit)
		return fail(failure, GP, error);
	if (kvmaio_linear(cpu, idt->base + event->vector * size, words, size, 0) < 0)
		return fail_page(cpu, failure);
	gate->type = words[1] >> 8 & 0x1f;
	const int is_32bit = gate->type == 14 || gate->type == 15;
	const int is_16bit = gate->type == 6 || gate->type == 7;
	if (!is_32bit && (long_mode || !is_16bit))
		return fail(failure, GP, error);
	if (event->software && DESCRIPTOR_DPL(words[1]) < cpl)
		return fail(failure, GP, error);
	if (!(words[1] & DESCRIPTOR_PRESENT))
		return fail(failure, NP, error);
	gate->selector = words[0] >> 16;
	gate->offset = (words[0] & 0xffff) | (is_32bit ? words[1] & 0xffff0000 : 0);
	if (long_mode)
		gate->offset |= (uint64_t)words[2] << 32;
	gate->ist = long_mode ? words[1] & 7 : 0;
	return 0;
}

/* The stack of a more privileged level, from the TSS. */
static int inner_stack(struct cpu *cpu, uint32_t level, int external, struct frame *frame,
		       uint64_t *rsp, struct failure *failure)
{
	const struct segment *tr = &cpu->registers->tr;
	const int is_32bit = tr->flags >> 11 & 1;
	const uint32_t size = is_32bit ? 4 : 2, offset = is_32bit ? 4 + 8 * level : 2 + 4 * level;
	uint32_t pointer = 0, selector = 0;
	if (offset + size + 1 > tr->limit)
		return fail(failure, TS, (tr->selector & ~3u) + external);
	if (kvmaio_linear(cpu, tr->base + offset, &pointer, size, 0) < 0 ||
	    kvmaio_linear(cpu, tr->base + offset + size, &selector, 2, 0) < 0)
		return fail_page(cpu, failure);
	struct segment stack;
	const int problem = selector & ~3u ? load_descriptor(cpu, selector, &stack) : GP;
	if (problem == PF)
		return fail_page(cpu, failure);
	const uint32_t writable_data = DESCRIPTOR_NOT_SYSTEM | 0x200;
	if (problem || (selector & 3) != level || DESCRIPTOR_DPL(stack.flags) != level ||
	    (stack.flags & (writable_data | DESCRIPTOR_CODE)) != writable_data)
		return fail(failure, TS, (selector & ~3u) + external);
	if (!(stack.flags & DESCRIPTOR_PRESENT))
		return fail(failure, STACK, (selector & ~3u) + external);
	frame->ss = stack;
	*rsp = pointer;
	return 0;
}

static int push_legacy(struct cpu *cpu, const struct event *event, const struct gate *gate,
		       uint32_t level, int inner, struct frame *frame, struct failure *failure)
{
	const struct registers *before = cpu->registers;
	const uint32_t width = gate->type >= 8 ? 4 : 2;
	uint64_t rsp = frame->rsp;
	uint32_t words[10];
	int count = 0;
	if (inner && inner_stack(cpu, level, !event->software, frame, &rsp, failure) < 0)
		return -1;
	if (inner && (frame->rflags & RFLAGS_VM)) {
		words[count++] = before->segments[GS].selector;
		words[count++] = before->segments[FS].selector;
		words[count++] = before->segments[DS].selector;
		words[count++] = before->segments[ES].selector;
		frame->drop_data = 1;
	}
	if (inner) {
		words[count++] = before->segments[SS].selector;
		words[count++] = frame->rsp;
	}
	words[count++] = frame->rflags;
	words[count++] = frame->cs.selector;
	words[count++] = frame->rip;
	if (event->has_error)
		words[count++] = event->error;
	const uint64_t mask = frame->ss.flags & DESCRIPTOR_BIG ? 0xffffffff : 0xffff;
	for (int i = 0; i < count; i++) {
		rsp = (rsp & ~mask) | ((rsp - width) & mask);
		if (kvmaio_linear(cpu, (uint32_t)(frame->ss.base + (rsp & mask)), &words[i], width,
				  1) < 0)
			return fail_page(cpu, failure);
	}
	frame->rsp = rsp;
	return 0;
}

static int push_long(struct cpu *cpu, const struct event *event, const struct gate *gate,
		     uint32_t level, int inner, struct frame *frame, struct failure *failure)
{
	const struct segment *tr = &cpu->registers->tr;
	uint64_t rsp = frame->rsp;
	if (gate->ist || inner) {
		const uint32_t offset = gate->ist ? 36u + 8 * (gate->ist - 1) : 4 + 8 * level;
		if (offset + 7 > tr->limit)
			return fail(failure, TS, (tr->selector & ~3u) + !event->software);
		if (kvmaio_linear(cpu, tr->base + offset, &rsp, 8, 0) < 0)
			return fail_page(cpu, failure);
	}
	const uint64_t words[6] = { event->error,  frame->rip, frame->cs.selector,
				    frame->rflags, frame->rsp, frame->ss.selector };
	const int first = !event->has_error;
	const size_t size = (6 - first) * 8;
	rsp = (rsp & ~15ull) - size;
	uint64_t pushed[6];
	memcpy(pushed, words + first, size);
	if (kvmaio_linear(cpu, rsp, pushed, size, 1) < 0)
		return fail_page(cpu, failure);
	frame->rsp = rsp;
	if (inner) /* a null selector, as IRETQ takes it back */
		frame->ss = (struct segment){ .selector = level, .flags = level << 13 };
	return 0;
}

static int deliver_protected(struct cpu *cpu, const struct event *event, struct frame *frame,
			     struct failure *failure)
{
	const int long_mode = !!(efer(cpu) & EFER_LMA), external = !event->software;
	const uint32_t cpl = cpu->registers->hflags & 3;
	struct gate gate;
	struct segment code;
	if (load_gate(cpu, event, &gate, failure) < 0)
		return -1;
	const uint32_t selector = gate.selector & ~3u;
	if (!selector)
		return fail(failure, GP, external);
	const int problem = load_descriptor(cpu, gate.selector, &code);
	if (problem == PF)
		return fail_page(cpu, failure);
	const uint32_t is_code = DESCRIPTOR_NOT_SYSTEM | DESCRIPTOR_CODE;
	if (problem || (code.flags & is_code) != is_code || DESCRIPTOR_DPL(code.flags) > cpl)
		return fail(failure, GP, selector + external);
	if (long_mode && !(code.flags & DESCRIPTOR_LONG))
		return fail(failure, GP, selector + external);
	if (!(code.flags & DESCRIPTOR_PRESENT))
		return fail(failure, NP, selector + external);
	const int conforming = !!(code.flags & DESCRIPTOR_CONFORMING);
	const uint32_t level = conforming ? cpl : DESCRIPTOR_DPL(code.flags);
	const int inner = level < cpl;
	if ((frame->rflags & RFLAGS_VM) && level)
		return fail(failure, GP, selector + external);
	if ((long_mode ? push_long : push_legacy)(cpu, event, &gate, level, inner, frame, failure) < 0)
		return -1;
	frame->cs = code;
	frame->cs.selector = selector | level;
	frame->rip = gate.offset;
	frame->rflags &= ~(uint64_t)(RFLAGS_TF | RFLAGS_VM | RFLAGS_RF | RFLAGS_NT);
	if (!(gate.type & 1))
		frame->rflags &= ~(uint64_t)RFLAGS_IF;
	return 0;
}

/* ---- delivering ------------------------------------------------------------------- */

static int attempt(struct cpu *cpu, const struct event *event, struct failure *failure)
{
	struct registers *registers = cpu->registers;
	struct frame frame = {
		.rsp = registers->general[RSP],
		.rip = registers->rip,
		.rflags = kvmaio_rflags(cpu),
		.cs = registers->segments[CS],
		.ss = registers->segments[SS],
	};
	const int protected = registers->cr[0] & CR0_PE;
	if ((protected ? deliver_protected : deliver_real)(cpu, event, &frame, failure) < 0)
		return -1;
	if (frame.drop_data) {
		memset(&registers->segments[ES], 0, sizeof(struct segment));
		memset(&registers->segments[DS], 0, 3 * sizeof(struct segment));
	}
	registers->general[RSP] = frame.rsp;
	registers->rip = frame.rip;
	registers->segments[CS] = frame.cs;
	registers->segments[SS] = frame.ss;
	registers->hflags &= ~HFLAG_INHIBIT_IRQ;
	kvmaio_set_rflags(cpu, frame.rflags);
	return 0;
}

static int is_contributory(int vector)
{
	return vector == DE || (vector >= TS && vector <= GP);
}

int kvmaio_deliver(struct cpu *cpu, int vector, int software, int has_error, uint32_t error)
{
	struct event event = { vector, software, has_error, error };
	struct failure failure;
	cpu->public.deliveries++;
	cpu->pc = NOWHERE;
	kvmaio_forget_accesses(cpu);
	for (int tries = 0; tries < 4; tries++) {
		if (attempt(cpu, &event, &failure) == 0)
			return 0;
		if (event.vector == DF && !event.software)
			return -1;
		if (failure.vector == PF)
			cpu->registers->cr[2] = cpu->fault_address;
		/* SDM vol. 3A, table 6-5. */
		const int second = is_contributory(failure.vector);
		const int is_double =
			!event.software &&
			((is_contributory(event.vector) && second) ||
			 (event.vector == PF && (second || failure.vector == PF)));
		if (is_double)
			event = (struct event){ DF, 0, 1, 0 };
		else
			event = (struct event){ failure.vector, 0,
						kvmaio_has_error_code(failure.vector),
						failure.error };
		if (!(cpu->registers->cr[0] & CR0_PE))
			event.has_error = 0;
	}
	return -1;
}

/* ---- system calls ----------------------------------------------------------------- */

#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_CSTAR 0xc0000083
#define MSR_SFMASK 0xc0000084
#define MSR_SYSENTER_CS 0x174
#define MSR_SYSENTER_ESP 0x175
#define MSR_SYSENTER_EIP 0x176

static uint64_t msr(struct cpu *cpu, uint32_t index)
{
	uint64_t value = 0;
	kvmaio_soft_get_msr(&cpu->public, index, &value);
	return value;
}

/* Flat segments of level 0, as both instructions load them. */
static void enter_kernel(struct cpu *cpu, uint32_t selector, int long_mode)
{
	const uint32_t code = 0x00809b00 | (long_mode ? DESCRIPTOR_LONG : DESCRIPTOR_BIG);
	cpu->registers->segments[CS] =
		(struct segment){ .selector = selector, .limit = 0xffffffff, .flags = code };
	cpu->registers->segments[SS] = (struct segment){
		.selector = selector + 8, .limit = 0xffffffff, .flags = 0x00c09300
	};
	cpu->pc = NOWHERE;
}

/* RIP is behind the instruction already. */
int kvmaio_syscall(struct cpu *cpu)
{
	struct registers *registers = cpu->registers;
	const int long_mode = !!(efer(cpu) & EFER_LMA);
	const int from_64bit = !!(registers->hflags & HFLAG_CS64);
	uint64_t rflags = kvmaio_rflags(cpu);
	if (!(efer(cpu) & EFER_SCE)) {
		registers->rip -= 2;
		return kvmaio_deliver(cpu, UD, 0, 0, 0);
	}
	const uint64_t star = msr(cpu, MSR_STAR);
	enter_kernel(cpu, star >> 32 & 0xfffc, long_mode);
	if (long_mode) {
		registers->general[RCX] = registers->rip;
		registers->general[R11] = rflags & ~(uint64_t)RFLAGS_RF;
		registers->rip = msr(cpu, from_64bit ? MSR_LSTAR : MSR_CSTAR);
		rflags &= ~(msr(cpu, MSR_SFMASK) | RFLAGS_RF);
	} else {
		registers->general[RCX] = (uint32_t)registers->rip;
		registers->rip = (uint32_t)star;
		rflags &= ~(uint64_t)(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF);
	}
	kvmaio_set_rflags(cpu, rflags);
	return 0;
}

int kvmaio_sysenter(struct cpu *cpu)
{
	struct registers *registers = cpu->registers;
	const uint32_t selector = msr(cpu, MSR_SYSENTER_CS) & 0xfffc;
	const uint64_t rflags = kvmaio_rflags(cpu);
	if (!selector || !(registers->cr[0] & CR0_PE)) {
		registers->rip -= 2;
		return kvmaio_deliver(cpu, GP, 0, !!(registers->cr[0] & CR0_PE), 0);
	}
	enter_kernel(cpu, selector, !!(efer(cpu) & EFER_LMA));
	registers->general[RSP] = msr(cpu, MSR_SYSENTER_ESP);
	registers->rip = msr(cpu, MSR_SYSENTER_EIP);
	kvmaio_set_rflags(cpu, rflags & ~(uint64_t)(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF));
	return 0;
}
