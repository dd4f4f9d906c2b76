/* The engine's registers in the kernel's structures, and back. */
#include "_engine.h"

/* kvm_regs has the encoding's order but for these. */
static const int GENERAL[16] = { RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP,
				 8, 9, 10, 11, 12, 13, 14, 15 };

/* The engine keeps the arithmetic flags and DF elsewhere while it executes only. */
uint64_t kvmaio_rflags(struct cpu *cpu)
{
	return cpu->registers->rflags | 2;
}

/* Also recomputes what the engine derives from flags, segments and control registers. */
void kvmaio_set_rflags(struct cpu *cpu, uint64_t value)
{
	struct registers *registers = cpu->registers;
	registers->rflags = value | 2;
	registers->hflags &= ~HFLAG_SMAP;
	if (registers->cr[4] & CR4_SMAP)
		registers->hflags |= HFLAG_SMAP;
	uc(x86_update_hflags, registers);
}

void kvmaio_flush_tlb(struct cpu *cpu)
{
	uc(uc_ctl, cpu->engine, UC_CTL_WRITE(UC_CTL_TLB_FLUSH, 0));
}

void kvmaio_flush_code(struct cpu *cpu)
{
	uc(uc_ctl, cpu->engine, UC_CTL_WRITE(UC_CTL_TB_FLUSH, 0));
	kvmaio_flush_tlb(cpu);
	kvmaio_know_nothing(cpu);
	cpu->repeat_pc = NOWHERE;
}

/* ---- segments --------------------------------------------------------------------- */

static struct kvm_segment segment_out(const struct segment *segment)
{
	const uint32_t flags = segment->flags;
	const int present = flags >> 15 & 1;
	return (struct kvm_segment){
		.base = segment->base,
		.limit = segment->limit,
		.selector = segment->selector,
		.type = flags >> 8 & 15,
		.s = flags >> 12 & 1,
		.dpl = flags >> 13 & 3,
		.present = present,
		.avl = flags >> 20 & 1,
		.l = flags >> 21 & 1,
		.db = flags >> 22 & 1,
		.g = flags >> 23 & 1,
		.unusable = !present,
	};
}

static struct segment segment_in(const struct kvm_segment *segment)
{
	uint32_t flags = segment->dpl << 13;
	if (!segment->unusable)
		flags |= segment->type << 8 | segment->s << 12 | segment->present << 15 |
			 segment->avl << 20 | segment->l << 21 | segment->db << 22 |
			 (uint32_t)segment->g << 23;
	return (struct segment){
		.selector = segment->selector,
		.base = segment->base,
		.limit = segment->limit,
		.flags = flags,
	};
}

/* ---- general and special registers --------------------------------------------------- */

void kvmaio_soft_get(kvmaio_soft *public, struct kvm_regs *regs, struct kvm_sregs *sregs)
{
	struct cpu *cpu = (struct cpu *)public;
	const struct registers *registers = cpu->registers;
	uint64_t *general = (uint64_t *)regs;
	for (int i = 0; i < 16; i++)
		general[i] = registers->general[GENERAL[i]];
	regs->rip = registers->rip;
	if (!(registers->hflags & HFLAG_CS64))
		regs->rip = (uint32_t)regs->rip;
	regs->rflags = kvmaio_rflags(cpu);
	*sregs = (struct kvm_sregs){
		.cs = segment_out(&registers->segments[CS]),
		.ds = segment_out(&registers->segments[DS]),
		.es = segment_out(&registers->segments[ES]),
		.fs = segment_out(&registers->segments[FS]),
		.gs = segment_out(&registers->segments[GS]),
		.ss = segment_out(&registers->segments[SS]),
		.tr = segment_out(&registers->tr),
		.ldt = segment_out(&registers->ldt),
		.gdt = { .base = registers->gdt.base, .limit = registers->gdt.limit },
		.idt = { .base = registers->idt.base, .limit = registers->idt.limit },
		.cr0 = registers->cr[0],
		.cr2 = registers->cr[2],
		.cr3 = registers->cr[3],
		.cr4 = registers->cr[4],
		.cr8 = public->page->cr8,
		.efer = efer(cpu),
		.apic_base = public->page->apic_base,
	};
	if (cpu->interrupt >= 0)
		sregs->interrupt_bitmap[cpu->interrupt / 64] |= 1ull << cpu->interrupt % 64;
}

void kvmaio_soft_set(kvmaio_soft *public, const struct kvm_regs *regs, const struct kvm_sregs *sregs)
{
	struct cpu *cpu = (struct cpu *)public;
	struct registers *registers = cpu->registers;
	const uint64_t *general = (const uint64_t *)regs;
	for (int i = 0; i < 16; i++)
		registers->general[GENERAL[i]] = general[i];
	registers->rip = regs->rip;
	registers->segments[CS] = segment_in(&sregs->cs);
	registers->segments[DS] = segment_in(&sregs->ds);
	registers->segments[ES] = segment_in(&sregs->es);
	registers->segments[FS] = segment_in(&sregs->fs);
	registers->segments[GS] = segment_in(&sregs->gs);
	registers->segments[SS] = segment_in(&sregs->ss);
	registers->tr = segment_in(&sregs->tr);
	registers->ldt = segment_in(&sregs->ldt);
	registers->gdt.base = sregs->gdt.base;
	registers->gdt.limit = sregs->gdt.limit;
	registers->idt.base = sregs->idt.base;
	registers->idt.limit = sregs->idt.limit;
	const uint64_t cr0 = sregs->cr0 | 0x10; /* ET is always 1 */
	const int other_paging = registers->cr[0] != cr0 || registers->cr[3] != sregs->cr3 ||
				 registers->cr[4] != sregs->cr4 || efer(cpu) != sregs->efer;
	registers->cr[0] = cr0;
	registers->cr[2] = sregs->cr2;
	registers->cr[3] = sregs->cr3;
	registers->cr[4] = sregs->cr4;
	*field64(cpu, EFER_OFFSET) = sregs->efer;
	public->page->cr8 = sregs->cr8;
	public->page->apic_base = sregs->apic_base;
	kvmaio_set_rflags(cpu, regs->rflags);
	if (other_paging)
		kvmaio_flush_tlb(cpu);
	cpu->pc = NOWHERE;
	public->access = -1;
	kvmaio_forget_accesses(cpu);
	kvmaio_forget_hits(cpu);
}

/* ---- x87 and SSE ------------------------------------------------------------------
 *
 * The FXSAVE64 image: SDM vol. 1, table 10-2.
 */

struct fxsave {
	uint16_t fcw, fsw;
	uint8_t ftw, reserved;
	uint16_t fop;
	uint64_t fip, fdp;
	uint32_t mxcsr, mxcsr_mask;
	uint8_t st[8][16], xmm[16][16];
	uint8_t rest[96];
};

_Static_assert(sizeof(struct fxsave) == 512, "the FXSAVE area has 512 bytes");

static uint64_t get(struct cpu *cpu, int reg)
{
	uint64_t value = 0;
	uc(uc_reg_read, cpu->engine, reg, &value);
	return value;
}

static void put(struct cpu *cpu, int reg, uint64_t value)
{
	uc(uc_reg_write, cpu->engine, reg, &value);
}

/* The engine takes FTZ for x87's, and not for SSE's. */
void kvmaio_mxcsr_changed(struct cpu *cpu)
{
	uint8_t *state = (uint8_t *)cpu->registers;
	cpu->mxcsr = mxcsr(cpu);
	*x87_flush(cpu) = 0;
	state[kvmaio_library.sse_flush_offset] = !!(cpu->mxcsr & MXCSR_FTZ);
}

void kvmaio_set_mxcsr(struct cpu *cpu, uint32_t value)
{
	put(cpu, UC_X86_REG_MXCSR, value & ~MXCSR_RESERVED);
	kvmaio_mxcsr_changed(cpu);
}

void kvmaio_soft_get_fpu(kvmaio_soft *public, uint8_t *area)
{
	struct cpu *cpu = (struct cpu *)public;
	struct fxsave *image = (void *)area;
	memset(image, 0, sizeof *image);
	image->fcw = get(cpu, UC_X86_REG_FPCW);
	image->fsw = get(cpu, UC_X86_REG_FPSW);
	const uint64_t tags = get(cpu, UC_X86_REG_FPTAG);
	for (int i = 0; i < 8; i++)
		if ((tags >> 2 * i & 3) != 3)
			image->ftw |= 1u << i;
	image->fop = get(cpu, UC_X86_REG_FOP);
	image->fip = get(cpu, UC_X86_REG_FIP);
	image->fdp = get(cpu, UC_X86_REG_FDP);
	image->mxcsr = get(cpu, UC_X86_REG_MXCSR) & ~MXCSR_RESERVED;
	image->mxcsr_mask = 0xffff;
	for (int i = 0; i < 8; i++)
		uc(uc_reg_read, cpu->engine, UC_X86_REG_ST0 + i, image->st[i]);
	for (int i = 0; i < 16; i++)
		uc(uc_reg_read, cpu->engine, UC_X86_REG_XMM0 + i, image->xmm[i]);
}

void kvmaio_soft_set_fpu(kvmaio_soft *public, const uint8_t *area)
{
	struct cpu *cpu = (struct cpu *)public;
	const struct fxsave *image = (const void *)area;
	uint64_t tags = 0;
	put(cpu, UC_X86_REG_FPSW, image->fsw); /* first: it says which register is ST(0) */
	for (int i = 0; i < 8; i++)
		uc(uc_reg_write, cpu->engine, UC_X86_REG_ST0 + i, image->st[i]);
	for (int i = 0; i < 16; i++)
		uc(uc_reg_write, cpu->engine, UC_X86_REG_XMM0 + i, image->xmm[i]);
	put(cpu, UC_X86_REG_FPCW, image->fcw);
	kvmaio_set_mxcsr(cpu, image->mxcsr);
	put(cpu, UC_X86_REG_FOP, image->fop);
	put(cpu, UC_X86_REG_FIP, image->fip);
	put(cpu, UC_X86_REG_FDP, image->fdp);
	for (int i = 0; i < 8; i++)
		if (!(image->ftw >> i & 1))
			tags |= 3ull << 2 * i;
	put(cpu, UC_X86_REG_FPTAG, tags);
}

#define INITIAL_FCW 0x37f /* SDM vol. 1, 8.1.5 */
#define XSTATE_BV 512    /* in the XSAVE area */
#define X87 1u
#define SSE 2u
#define MXCSR_OFFSET offsetof(struct fxsave, mxcsr)
#define ST_OFFSET offsetof(struct fxsave, st)
#define XMM_OFFSET offsetof(struct fxsave, xmm)
#define FPU_END offsetof(struct fxsave, rest)

void kvmaio_soft_set_xsave(kvmaio_soft *public, const uint8_t *area)
{
	struct fxsave image = { .fcw = INITIAL_FCW };
	const uint8_t present = area[XSTATE_BV];
	if (present & X87) {
		memcpy(&image, area, MXCSR_OFFSET);
		memcpy(image.st, area + ST_OFFSET, sizeof image.st);
	}
	if (present & SSE)
		memcpy(image.xmm, area + XMM_OFFSET, sizeof image.xmm);
	memcpy(&image.mxcsr, area + MXCSR_OFFSET, sizeof image.mxcsr); /* is there in any case */
	kvmaio_soft_set_fpu(public, (const uint8_t *)&image);
}

void kvmaio_soft_borrow(kvmaio_soft *public, const struct kvm_regs *regs,
			const struct kvm_sregs *sregs, const uint8_t *xsave, int all)
{
	kvmaio_soft_set(public, regs, sregs);
	kvmaio_soft_set_xsave(public, xsave);
	kvmaio_soft_get_fpu(public, ((struct cpu *)public)->borrowed_fpu);
	kvmaio_soft_forget(public, all);
}

void kvmaio_soft_give_back(kvmaio_soft *public, struct kvm_regs *regs, struct kvm_sregs *sregs,
			   uint8_t *xsave)
{
	uint8_t fpu[sizeof(struct fxsave)];
	struct kvm_sregs own;
	kvmaio_soft_get(public, regs, &own);
	memcpy(sregs, &own, offsetof(struct kvm_sregs, interrupt_bitmap));
	kvmaio_soft_get_fpu(public, fpu);
	if (!memcmp(fpu, ((struct cpu *)public)->borrowed_fpu, sizeof fpu))
		return;
	/* The mask behind MXCSR is the host's. */
	memcpy(xsave, fpu, MXCSR_OFFSET + sizeof(uint32_t));
	memcpy(xsave + ST_OFFSET, fpu + ST_OFFSET, FPU_END - ST_OFFSET);
	xsave[XSTATE_BV] |= X87 | SSE;
}

/* ---- the rest ------------------------------------------------------------------------ */

#define MSR_TSC 0x10
#define MSR_APIC_BASE 0x1b

int kvmaio_soft_get_msr(kvmaio_soft *public, uint32_t index, uint64_t *value)
{
	uc_x86_msr msr = { .rid = index };
	if (index == MSR_TSC)
		*value = public->tsc_offset + kvmaio_clock((struct cpu *)public);
	else if (index == MSR_APIC_BASE)
		*value = public->page->apic_base;
	else if (uc(uc_reg_read, ((struct cpu *)public)->engine, UC_X86_REG_MSR, &msr))
		return -EINVAL;
	else
		*value = msr.value;
	return 0;
}

int kvmaio_soft_set_msr(kvmaio_soft *public, uint32_t index, uint64_t value)
{
	const uc_x86_msr msr = { .rid = index, .value = value };
	if (index == MSR_TSC)
		public->tsc_offset = value - kvmaio_clock((struct cpu *)public);
	else if (index == MSR_APIC_BASE)
		public->page->apic_base = value;
	else if (uc(uc_reg_write, ((struct cpu *)public)->engine, UC_X86_REG_MSR, &msr))
		return -EINVAL;
	return 0;
}

uint64_t kvmaio_soft_get_xcr0(kvmaio_soft *public)
{
	return *field64((struct cpu *)public, kvmaio_library.xcr0_offset);
}

void kvmaio_soft_set_xcr0(kvmaio_soft *public, uint64_t value)
{
	*field64((struct cpu *)public, kvmaio_library.xcr0_offset) = value;
}

static const int DEBUG[6] = { 0, 1, 2, 3, 6, 7 };

void kvmaio_soft_get_debug_registers(kvmaio_soft *public, uint64_t values[6])
{
	const uint64_t *registers = field64((struct cpu *)public, kvmaio_library.debug_offset);
	for (int i = 0; i < 6; i++)
		values[i] = registers[DEBUG[i]];
}

void kvmaio_soft_set_debug_registers(kvmaio_soft *public, const uint64_t values[6])
{
	uint64_t *registers = field64((struct cpu *)public, kvmaio_library.debug_offset);
	for (int i = 0; i < 6; i++)
		registers[DEBUG[i]] = values[i];
}

#define SHADOW_STI 2 /* KVM_X86_SHADOW_INT_STI */

void kvmaio_soft_get_events(kvmaio_soft *public, struct kvm_vcpu_events *events)
{
	const struct cpu *cpu = (struct cpu *)public;
	memset(events, 0, sizeof *events);
	if (cpu->exception.vector >= 0) {
		events->exception.injected = 1;
		events->exception.nr = cpu->exception.vector;
		events->exception.has_error_code = cpu->exception.has_error;
		events->exception.error_code = cpu->exception.error;
	}
	if (cpu->interrupt >= 0) {
		events->interrupt.injected = 1;
		events->interrupt.nr = cpu->interrupt;
	}
	if (cpu->registers->hflags & HFLAG_INHIBIT_IRQ)
		events->interrupt.shadow = SHADOW_STI;
	events->nmi.pending = cpu->nmi_pending;
	events->nmi.masked = !!(cpu->registers->hflags2 & HFLAG2_NMI);
	events->flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
}

void kvmaio_soft_set_events(kvmaio_soft *public, const struct kvm_vcpu_events *events)
{
	struct cpu *cpu = (struct cpu *)public;
	const int exception = events->exception.injected || events->exception.pending;
	cpu->exception.vector = exception ? events->exception.nr : -1;
	cpu->exception.has_error = events->exception.has_error_code;
	cpu->exception.error = events->exception.error_code;
	cpu->interrupt = events->interrupt.injected ? events->interrupt.nr : -1;
	cpu->nmi_pending = events->nmi.injected;
	if (events->flags & KVM_VCPUEVENT_VALID_NMI_PENDING)
		cpu->nmi_pending |= events->nmi.pending;
	cpu->registers->hflags2 &= ~HFLAG2_NMI;
	if (events->nmi.masked && !events->nmi.injected)
		cpu->registers->hflags2 |= HFLAG2_NMI;
	cpu->registers->hflags &= ~HFLAG_INHIBIT_IRQ;
	if ((events->flags & KVM_VCPUEVENT_VALID_SHADOW) && events->interrupt.shadow)
		cpu->registers->hflags |= HFLAG_INHIBIT_IRQ;
}

int kvmaio_soft_has_event(kvmaio_soft *public)
{
	const struct cpu *cpu = (struct cpu *)public;
	return cpu->exception.vector >= 0 || cpu->interrupt >= 0;
}

void kvmaio_soft_interrupt(kvmaio_soft *public, int vector)
{
	((struct cpu *)public)->interrupt = vector;
}

void kvmaio_soft_nmi(kvmaio_soft *public)
{
	((struct cpu *)public)->nmi_pending = 1;
}

void kvmaio_soft_own_cpuid(kvmaio_soft *public, struct kvmaio_soft_cpuid *entry)
{
	uc(cpu_x86_cpuid, ((struct cpu *)public)->registers, entry->function, entry->index,
	   &entry->eax, &entry->ebx, &entry->ecx, &entry->edx);
}

int kvmaio_soft_set_cpuid(kvmaio_soft *public, const struct kvmaio_soft_cpuid *entries, int count)
{
	struct cpu *cpu = (struct cpu *)public;
	if (count < 0 || count > MOST_CPUID)
		return -E2BIG;
	memcpy(cpu->cpuid, entries, count * sizeof *entries);
	cpu->cpuid_count = count;
	return 0;
}

int kvmaio_soft_set_breakpoints(kvmaio_soft *public, const uint64_t *addresses, int count)
{
	struct cpu *cpu = (struct cpu *)public;
	if (count < 0 || count > MOST_BREAKPOINTS)
		return -E2BIG;
	memcpy(cpu->breakpoints, addresses, count * sizeof *addresses);
	cpu->breakpoint_count = count;
	return 0;
}
