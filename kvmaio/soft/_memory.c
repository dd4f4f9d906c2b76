/* Guest memory: what the engines see of it, our own walks through it, and the turn. */
#define _GNU_SOURCE
#include "_engine.h"

#include <linux/futex.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- the turn -------------------------------------------------------------------- */

void kvmaio_take_turn(kvmaio_soft_machine *machine)
{
	uint32_t ticket = atomic_fetch_add(&machine->next_ticket, 1), serving;
	while ((serving = atomic_load(&machine->serving)) != ticket)
		syscall(SYS_futex, &machine->serving, FUTEX_WAIT_PRIVATE, serving, NULL, NULL, 0);
}

void kvmaio_end_turn(kvmaio_soft_machine *machine)
{
	uint32_t now = atomic_fetch_add(&machine->serving, 1) + 1;
	if (atomic_load(&machine->next_ticket) != now)
		syscall(SYS_futex, &machine->serving, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

/* ---- memory and MMIO -------------------------------------------------------------
 *
 * What is not memory is nothing to the engine, until it is accessed. Then the
 * surroundings become MMIO without any permission, so that each access reaches our
 * hook before anything has happened, and may go on once there is an answer.
 */

#define CHUNK (2ull << 20)
#define MOST_CHUNKS 4096 /* a guest that scans for memory begins anew */

kvmaio_soft_machine *kvmaio_soft_machine_create(void)
{
	return calloc(1, sizeof(kvmaio_soft_machine));
}

void kvmaio_soft_machine_destroy(kvmaio_soft_machine *machine)
{
	free(machine);
}

static void drop_chunk(struct cpu *cpu, int index)
{
	const struct chunk *chunk = &cpu->chunks[index];
	uc(uc_mem_unmap, cpu->engine, chunk->base, chunk->end - chunk->base);
	cpu->chunks[index] = cpu->chunks[--cpu->chunk_count];
}

static int map_chunk(struct cpu *cpu, uint64_t address)
{
	const kvmaio_soft_machine *machine = cpu->machine;
	uint64_t base = address & ~(CHUNK - 1), end = base + CHUNK;
	for (int i = 0; i < cpu->chunk_count; i++)
		if (address >= cpu->chunks[i].base && address < cpu->chunks[i].end)
			return 0;
	for (int i = 0; i < machine->region_count; i++) {
		const struct region *region = &machine->regions[i];
		const uint64_t region_end = region->base + region->size;
		if (address >= region->base && address < region_end)
			return 0;
		if (region_end <= address && region_end > base)
			base = region_end;
		if (region->base > address && region->base < end)
			end = region->base;
	}
	if (!cpu->chunks)
		cpu->chunks = malloc(MOST_CHUNKS * sizeof *cpu->chunks);
	if (!cpu->chunks)
		return -ENOMEM;
	while (cpu->chunk_count == MOST_CHUNKS)
		drop_chunk(cpu, 0);
	if (uc(uc_mmio_map, cpu->engine, base, end - base, kvmaio_on_mmio_read, cpu,
	       kvmaio_on_mmio_write, cpu) ||
	    uc(uc_mem_protect, cpu->engine, base, end - base, UC_PROT_NONE))
		return -EINVAL;
	cpu->chunks[cpu->chunk_count++] = (struct chunk){ base, end };
	return 0;
}

int kvmaio_map_mmio(struct cpu *cpu, uint64_t address, uint64_t size)
{
	int error = map_chunk(cpu, address);
	return error ? error : map_chunk(cpu, address + size - 1);
}

static int map_region(struct cpu *cpu, const struct region *region)
{
	const uint32_t permissions = region->readonly ? UC_PROT_READ | UC_PROT_EXEC : UC_PROT_ALL;
	for (int i = cpu->chunk_count - 1; i >= 0; i--)
		if (cpu->chunks[i].base < region->base + region->size &&
		    cpu->chunks[i].end > region->base)
			drop_chunk(cpu, i);
	return uc(uc_mem_map_ptr, cpu->engine, region->base, region->size, permissions,
		  region->host)
		       ? -EINVAL
		       : 0;
}

int kvmaio_map_all(struct cpu *cpu)
{
	int error = 0;
	for (int i = 0; i < cpu->machine->region_count && !error; i++)
		error = map_region(cpu, &cpu->machine->regions[i]);
	return error;
}

int kvmaio_soft_add_memory(kvmaio_soft_machine *machine, uint64_t base, uint64_t size, void *host,
			   int readonly)
{
	int error = 0;
	if (machine->region_count == MOST_REGIONS)
		return -ENOSPC;
	if (base % GUEST_PAGE || size % GUEST_PAGE || base + size > PHYSICAL_END)
		return -EINVAL;
	kvmaio_take_turn(machine);
	struct region *region = &machine->regions[machine->region_count++];
	*region = (struct region){ base, size, host, readonly };
	for (struct cpu *cpu = machine->cpus; cpu && !error; cpu = cpu->next) {
		error = map_region(cpu, region);
		cpu->flush = 1;
	}
	kvmaio_end_turn(machine);
	return error;
}

int kvmaio_soft_remove_memory(kvmaio_soft_machine *machine, uint64_t base)
{
	int at = 0;
	while (at < machine->region_count && machine->regions[at].base != base)
		at++;
	if (at == machine->region_count)
		return -EINVAL;
	kvmaio_take_turn(machine);
	for (struct cpu *cpu = machine->cpus; cpu; cpu = cpu->next) {
		uc(uc_mem_unmap, cpu->engine, base, machine->regions[at].size);
		cpu->flush = 1;
	}
	machine->regions[at] = machine->regions[--machine->region_count];
	kvmaio_end_turn(machine);
	return 0;
}

#define FEW_PAGES (64 * GUEST_PAGE) /* beyond, forgetting everything is cheaper */

void kvmaio_soft_memory_written(kvmaio_soft_machine *machine, uint64_t address, uint64_t size)
{
	if (!size)
		return;
	kvmaio_take_turn(machine);
	uint8_t *host = size > FEW_PAGES ? NULL : kvmaio_host_address(machine, address, size, 0);
	for (struct cpu *cpu = machine->cpus; cpu; cpu = cpu->next) {
		cpu->repeat_pc = NOWHERE;
		if (!host) {
			cpu->flush = 1;
			continue;
		}
		const uint64_t at = uc(qemu_ram_addr_from_host, cpu->engine, host);
		uc(tb_invalidate_phys_range, cpu->engine, at, at + size);
	}
	kvmaio_end_turn(machine);
}

/* ---- walks ------------------------------------------------------------------------- */

uint8_t *kvmaio_host_address(kvmaio_soft_machine *machine, uint64_t address, size_t size, int write)
{
	for (int i = 0; i < machine->region_count; i++) {
		const struct region *region = &machine->regions[i];
		if (address - region->base < region->size &&
		    size <= region->size - (address - region->base))
			return write && region->readonly ? NULL
							 : region->host + (address - region->base);
	}
	return NULL;
}

static uint64_t table_entry(struct cpu *cpu, uint64_t address, size_t size)
{
	uint64_t entry = 0;
	uint8_t *host = kvmaio_host_address(cpu->machine, address, size, 0);
	if (host)
		memcpy(&entry, host, size);
	return entry;
}

#define ENTRY_PRESENT 1u
#define ENTRY_WRITE 2u
#define ENTRY_LARGE 0x80u
#define FAULT_PROTECTION 1u
#define FAULT_WRITE 2u
#define ADDRESS 0xffffffffff000ull

static int fault(struct cpu *cpu, uint64_t linear, uint32_t error)
{
	cpu->fault_error = error;
	cpu->fault_address = linear;
	return -1;
}

/* As the processor itself reads and writes its tables and stacks: a supervisor. */
static int walk(struct cpu *cpu, uint64_t linear, int write, uint64_t *physical)
{
	const uint64_t *cr = cpu->registers->cr;
	const int long_mode = !!(efer(cpu) & EFER_LMA);
	const uint32_t denied = write ? FAULT_WRITE : 0;
	const int pae = long_mode || (cr[4] & CR4_PAE);
	const int width = pae ? 9 : 10;
	const size_t size = pae ? 8 : 4;
	uint64_t table, entry;
	int writable = 1, shift;

	if (!long_mode)
		linear = (uint32_t)linear;
	if (!(cr[0] & CR0_PG)) {
		*physical = linear;
		return 0;
	}
	if (long_mode) {
		table = cr[3] & ADDRESS;
		shift = 39;
	} else if (pae) {
		entry = table_entry(cpu, (cr[3] & 0xffffffe0) + ((linear >> 30 & 3) << 3), 8);
		if (!(entry & ENTRY_PRESENT))
			return fault(cpu, linear, denied);
		table = entry & ADDRESS;
		shift = 21;
	} else {
		table = cr[3] & 0xfffff000;
		shift = 22;
	}
	for (;; shift -= width) {
		const uint64_t index = linear >> shift & ((1u << width) - 1);
		entry = table_entry(cpu, table + index * size, size);
		if (!(entry & ENTRY_PRESENT))
			return fault(cpu, linear, denied);
		writable &= !!(entry & ENTRY_WRITE);
		const int may_be_large = shift <= 30 && (pae || (cr[4] & CR4_PSE));
		if (shift == 12 || (may_be_large && (entry & ENTRY_LARGE)))
			break;
		table = entry & (pae ? ADDRESS : 0xfffff000);
	}
	if (write && !writable && (cr[0] & CR0_WP))
		return fault(cpu, linear, FAULT_PROTECTION | FAULT_WRITE);
	const uint64_t offset = (1ull << shift) - 1;
	*physical = (entry & (pae ? ADDRESS : 0xfffff000) & ~offset) | (linear & offset);
	return 0;
}

int kvmaio_linear(struct cpu *cpu, uint64_t linear, void *data, size_t size, int write)
{
	uint8_t *bytes = data;
	while (size) {
		uint64_t physical;
		size_t part = GUEST_PAGE - linear % GUEST_PAGE;
		if (part > size)
			part = size;
		if (walk(cpu, linear, write, &physical) < 0)
			return -1;
		uint8_t *host = kvmaio_host_address(cpu->machine, physical, part, write);
		if (write && cpu->watchpoint_count)
			kvmaio_watch_linear(cpu, linear, part, KVMAIO_SOFT_WRITE);
		if (host && write)
			memcpy(host, bytes, part);
		else if (host)
			memcpy(bytes, host, part);
		else if (!write)
			memset(bytes, 0xff, part); /* tables in MMIO: nobody answers */
		bytes += part;
		linear += part;
		size -= part;
	}
	return 0;
}

uint64_t kvmaio_soft_translate(kvmaio_soft *public, uint64_t linear)
{
	uint64_t physical;
	return walk((struct cpu *)public, linear, 0, &physical) < 0 ? NOWHERE : physical;
}

/* ---- what another model may have changed -------------------------------------------------
 *
 * A translation is as good as the code it was made from. Where this CPU executes one instruction
 * at a time for another model (`keeps_code`), and nobody else executes meanwhile, each translation
 * begins where we have looked just before, at RIP or at a handler; so one from code that is as it
 * was then is kept: making it takes most of an assist's time. The one exception is what the
 * engine comes to when the instruction is over, and may have translated before it stops there:
 * see kvmaio_look_at_code(). A stay of many instructions translates anywhere: nothing is kept.
 */

static struct known *known(struct cpu *cpu, uint64_t physical)
{
	return &cpu->known[(physical ^ physical >> 12) % MOST_KNOWN];
}

void kvmaio_know_nothing(struct cpu *cpu)
{
	for (int i = 0; i < MOST_KNOWN; i++)
		cpu->known[i].physical = NOWHERE;
}

static uint64_t linear_rip(const struct cpu *cpu)
{
	const struct registers *registers = cpu->registers;
	if (registers->hflags & HFLAG_CS64)
		return registers->rip;
	return (uint32_t)(registers->segments[CS].base + registers->rip);
}

/* The code at RIP, or NULL where there is no memory or another page comes soon. */
static uint8_t *code_here(struct cpu *cpu, uint64_t *physical)
{
	const uint64_t linear = linear_rip(cpu);
	if (linear % GUEST_PAGE > GUEST_PAGE - CODE_KNOWN || walk(cpu, linear, 0, physical) < 0)
		return NULL;
	return kvmaio_host_address(cpu->machine, *physical, CODE_KNOWN, 0);
}

void kvmaio_look_at_code(struct cpu *cpu)
{
	uint64_t physical;
	const uint8_t *code = code_here(cpu, &physical);
	if (!code)
		return;
	struct known *here = known(cpu, physical);
	if (here->physical == physical && memcmp(here->code, code, CODE_KNOWN))
		here->physical = NOWHERE;
}

/* Is the code at RIP as it was when it was last translated? From now on it is known. */
static int is_known(struct cpu *cpu)
{
	uint64_t physical;
	const uint8_t *code = code_here(cpu, &physical);
	if (!code)
		return 0;
	struct known *here = known(cpu, physical);
	if (here->physical == physical && !memcmp(here->code, code, CODE_KNOWN))
		return 1;
	here->physical = physical;
	memcpy(here->code, code, CODE_KNOWN);
	return 0;
}

static void forget_at(struct cpu *cpu, uint64_t linear, unsigned size)
{
	uint64_t physical;
	uint8_t *host;
	if (walk(cpu, linear, 0, &physical) < 0)
		return;
	host = kvmaio_host_address(cpu->machine, physical, 1, 0);
	if (!host)
		return;
	const uint64_t at = uc(qemu_ram_addr_from_host, cpu->engine, host);
	uc(tb_invalidate_phys_range, cpu->engine, at, at + size);
}

void kvmaio_soft_forget(kvmaio_soft *public, int all)
{
	struct cpu *cpu = (struct cpu *)public;
	if (all) {
		kvmaio_flush_code(cpu);
		return;
	}
	if (!public->keeps_code || !is_known(cpu)) {
		const uint64_t linear = linear_rip(cpu);
		const unsigned size = CODE_KNOWN, rest = GUEST_PAGE - linear % GUEST_PAGE;
		forget_at(cpu, linear, size < rest ? size : rest);
		if (rest < size)
			forget_at(cpu, linear + rest, size - rest);
	}
	kvmaio_flush_tlb(cpu);
	cpu->repeat_pc = NOWHERE;
}
