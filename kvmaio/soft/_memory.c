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

/* ---- regions ---------------------------------------------------------------------
 *
 * What is not memory is an MMIO region to the engine, without any permission: an
 * access then reaches our hook before anything has happened.
 */

kvmaio_soft_machine *kvmaio_soft_machine_create(void)
{
	return calloc(1, sizeof(kvmaio_soft_machine));
}

void kvmaio_soft_machine_destroy(kvmaio_soft_machine *machine)
{
	free(machine);
}

static int map_mmio(struct cpu *cpu, uint64_t base, uint64_t size)
{
	if (!size)
		return 0;
	uc_err error = uc(uc_mmio_map, cpu->engine, base, size, kvmaio_on_mmio_read, cpu,
			  kvmaio_on_mmio_write, cpu);
	if (!error)
		error = uc(uc_mem_protect, cpu->engine, base, size, UC_PROT_NONE);
	return error ? -EINVAL : 0;
}

static int map_region(struct cpu *cpu, const struct region *region)
{
	uint32_t permissions = region->readonly ? UC_PROT_READ | UC_PROT_EXEC : UC_PROT_ALL;
	return uc(uc_mem_map_ptr, cpu->engine, region->base, region->size, permissions,
		  region->host)
		       ? -EINVAL
		       : 0;
}

/* The regions are in order, so that what lies between them is known. */
int kvmaio_map_all(struct cpu *cpu)
{
	uint64_t at = 0;
	int error = 0;
	for (int i = 0; i < cpu->machine->region_count && !error; i++) {
		const struct region *region = &cpu->machine->regions[i];
		error = map_mmio(cpu, at, region->base - at);
		if (!error)
			error = map_region(cpu, region);
		at = region->base + region->size;
	}
	return error ? error : map_mmio(cpu, at, PHYSICAL_END - at);
}

/* The gap around what is to become, or was, region `index`. */
static void gap_around(const kvmaio_soft_machine *machine, int before, int behind, uint64_t *base,
		       uint64_t *end)
{
	*base = before < 0 ? 0 : machine->regions[before].base + machine->regions[before].size;
	*end = behind < machine->region_count ? machine->regions[behind].base : PHYSICAL_END;
}

int kvmaio_soft_add_memory(kvmaio_soft_machine *machine, uint64_t base, uint64_t size, void *host,
			   int readonly)
{
	int at = 0, error = 0;
	uint64_t gap, gap_end;
	if (machine->region_count == MOST_REGIONS)
		return -ENOSPC;
	while (at < machine->region_count && machine->regions[at].base < base)
		at++;
	gap_around(machine, at - 1, at, &gap, &gap_end);
	if (base % GUEST_PAGE || size % GUEST_PAGE || base < gap || base + size > gap_end)
		return -EINVAL;
	kvmaio_take_turn(machine);
	memmove(&machine->regions[at + 1], &machine->regions[at],
		(machine->region_count - at) * sizeof(struct region));
	machine->regions[at] = (struct region){ base, size, host, readonly };
	machine->region_count++;
	for (struct cpu *cpu = machine->cpus; cpu && !error; cpu = cpu->next) {
		if (uc(uc_mem_unmap, cpu->engine, gap, gap_end - gap))
			error = -EINVAL;
		if (!error)
			error = map_mmio(cpu, gap, base - gap);
		if (!error)
			error = map_region(cpu, &machine->regions[at]);
		if (!error)
			error = map_mmio(cpu, base + size, gap_end - base - size);
		cpu->flush = 1;
	}
	kvmaio_end_turn(machine);
	return error;
}

int kvmaio_soft_remove_memory(kvmaio_soft_machine *machine, uint64_t base)
{
	int at = 0, error = 0;
	uint64_t gap, gap_end;
	while (at < machine->region_count && machine->regions[at].base != base)
		at++;
	if (at == machine->region_count)
		return -EINVAL;
	kvmaio_take_turn(machine);
	const struct region gone = machine->regions[at];
	gap_around(machine, at - 1, at + 1, &gap, &gap_end);
	machine->region_count--;
	memmove(&machine->regions[at], &machine->regions[at + 1],
		(machine->region_count - at) * sizeof(struct region));
	for (struct cpu *cpu = machine->cpus; cpu && !error; cpu = cpu->next) {
		/* One region at a time: the engine does not take several away at once. */
		if (gone.base > gap)
			uc(uc_mem_unmap, cpu->engine, gap, gone.base - gap);
		uc(uc_mem_unmap, cpu->engine, gone.base, gone.size);
		if (gap_end > gone.base + gone.size)
			uc(uc_mem_unmap, cpu->engine, gone.base + gone.size,
			   gap_end - gone.base - gone.size);
		error = map_mmio(cpu, gap, gap_end - gap);
		cpu->flush = 1;
	}
	kvmaio_end_turn(machine);
	return error;
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
