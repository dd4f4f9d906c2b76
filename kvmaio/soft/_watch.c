/* Watchpoints: which accesses of the guest touch an area that somebody watches.
 *
 * The engine tells of accesses while there are watchpoints, and by physical address;
 * watchpoints are linear. So the question is put the other way round: does a page around
 * the watched area lead to where the access was? A hit is only noted here, and reported
 * between this instruction and the next; an instruction that is left to start again takes
 * its hits with it.
 */
#include "_engine.h"

static int overlap(uint64_t first, uint64_t first_size, uint64_t second, uint64_t second_size)
{
	return first - second < second_size || second - first < first_size;
}

static void note(struct cpu *cpu, struct watchpoint *point, uint64_t linear, int kind)
{
	if (!point->hit)
		point->hit_address = linear - point->address < point->size ? linear : point->address;
	point->hit |= kind;
	cpu->attention.own |= LOOK_WATCHED;
}

void kvmaio_watch_linear(struct cpu *cpu, uint64_t linear, size_t size, int kind)
{
	for (int i = 0; i < cpu->watchpoint_count; i++) {
		struct watchpoint *point = &cpu->watchpoints[i];
		if ((point->kinds & kind) && overlap(linear, size, point->address, point->size))
			note(cpu, point, linear, kind);
	}
}

/* From each linear page where an access that touches `point` may have begun. */
static void look_at(struct cpu *cpu, struct watchpoint *point, uint64_t physical, unsigned size,
		    int kind)
{
	const uint64_t offset = physical % GUEST_PAGE;
	const uint64_t last = (point->address + point->size - 1) & ~(GUEST_PAGE - 1);
	for (uint64_t page = (point->address - (size - 1)) & ~(GUEST_PAGE - 1);;
	     page += GUEST_PAGE) {
		if (overlap(page + offset, size, point->address, point->size) &&
		    kvmaio_soft_translate(&cpu->public, page) == physical - offset) {
			note(cpu, point, page + offset, kind);
			return;
		}
		if (page == last)
			return;
	}
}

static void watch(struct cpu *cpu, uint64_t physical, unsigned size, int kind)
{
	for (int i = 0; i < cpu->watchpoint_count; i++)
		if (cpu->watchpoints[i].kinds & kind)
			look_at(cpu, &cpu->watchpoints[i], physical, size, kind);
}

/* Does the engine read the two aligned words around it, and tell of these as well? */
static int comes_in_pieces(struct cpu *cpu, uint64_t physical, unsigned size)
{
	return physical % size && (physical % GUEST_PAGE + size > GUEST_PAGE ||
				   !kvmaio_host_address(cpu->machine, physical, 1, 0));
}

static void on_read(uc_engine *engine, uc_mem_type type, uint64_t address, int size, int64_t value,
		    void *user)
{
	struct cpu *cpu = user;
	(void)engine, (void)type, (void)value;
	if (cpu->pieces) {
		cpu->pieces--;
		return;
	}
	if (comes_in_pieces(cpu, address, size))
		cpu->pieces = 2;
	watch(cpu, address, size, KVMAIO_SOFT_READ);
}

static void on_write(uc_engine *engine, uc_mem_type type, uint64_t address, int size, int64_t value,
		     void *user)
{
	(void)engine, (void)type, (void)value;
	watch(user, address, size, KVMAIO_SOFT_WRITE);
}

void kvmaio_forget_hits(struct cpu *cpu)
{
	cpu->pieces = 0;
	for (int i = 0; i < cpu->watchpoint_count; i++)
		cpu->watchpoints[i].hit = 0;
	cpu->attention.own &= ~LOOK_WATCHED;
}

int kvmaio_report_hits(struct cpu *cpu)
{
	int count = 0;
	if (likely(!(cpu->attention.own & LOOK_WATCHED)))
		return 0;
	for (int i = 0; i < cpu->watchpoint_count; i++) {
		const struct watchpoint *point = &cpu->watchpoints[i];
		if (point->hit)
			cpu->hits[count++] =
				(struct kvmaio_soft_hit){ point->hit_address, point->hit };
	}
	kvmaio_forget_hits(cpu);
	cpu->public.hits = cpu->hits;
	cpu->public.hit_count = count;
	return count;
}

/* ---- setting them ------------------------------------------------------------------ */

/* While a hook exists, no access takes the engine's short way. */
static int hook(struct cpu *cpu, uc_hook *hook, int wanted, int type, void *callback)
{
	if (!*hook == !wanted)
		return 0;
	/* What is translated takes the other way. */
	kvmaio_flush_code(cpu);
	if (wanted)
		return uc(uc_hook_add, cpu->engine, hook, type, callback, cpu, 1, 0) ? -EINVAL : 0;
	uc(uc_hook_del, cpu->engine, *hook);
	*hook = 0;
	return 0;
}

int kvmaio_soft_set_watchpoints(kvmaio_soft *public,
				const struct kvmaio_soft_watchpoint *watchpoints, int count)
{
	struct cpu *cpu = (struct cpu *)public;
	int kinds = 0;
	if (count < 0 || count > MOST_WATCHPOINTS)
		return -E2BIG;
	kvmaio_forget_hits(cpu);
	public->hit_count = 0;
	for (int i = 0; i < count; i++) {
		cpu->watchpoints[i] = (struct watchpoint){
			.address = watchpoints[i].address,
			.size = watchpoints[i].size,
			.kinds = watchpoints[i].kinds,
		};
		kinds |= watchpoints[i].kinds;
	}
	cpu->watchpoint_count = count;
	int error = hook(cpu, &cpu->read_hook, kinds & KVMAIO_SOFT_READ, UC_HOOK_MEM_READ, on_read);
	return error ? error : hook(cpu, &cpu->write_hook, kinds & KVMAIO_SOFT_WRITE,
				    UC_HOOK_MEM_WRITE, on_write);
}
