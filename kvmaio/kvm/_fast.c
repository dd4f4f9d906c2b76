#define _GNU_SOURCE
#include "_fast.h"
#include "_internal.h"

#include <stdlib.h>

int kvmaio_fast_create(struct kvm_run *run_page, uint32_t ring_offset, kvmaio_fast **out)
{
	kvmaio_fast *fast = calloc(1, sizeof *fast);
	if (!fast)
		return -ENOMEM;
	pthread_mutex_init(&fast->lock, NULL);
	if (ring_offset) {
		fast->ring = (void *)((char *)run_page + ring_offset);
		fast->ring_length = (4096 - sizeof *fast->ring) / sizeof fast->ring->coalesced_mmio[0];
	}
	*out = fast;
	return 0;
}

void kvmaio_fast_destroy(kvmaio_fast *fast)
{
	pthread_mutex_destroy(&fast->lock);
	free(fast);
}

int kvmaio_fast_add(kvmaio_fast *fast, uint64_t address, uint32_t size, int is_pio, uint64_t *cell,
		    int stamped)
{
	const uint32_t count = fast->entries, unstamped = !cell && !stamped;
	if ((unstamped ? fast->unstamped : count - fast->unstamped) == KVMAIO_FAST_ENTRIES)
		return -ENOSPC;
	fast->unstamped += unstamped;
	fast->entry[count] = (kvmaio_fast_entry){ address, size, is_pio, cell, stamped };
	__atomic_store_n(&fast->entries, count + 1, __ATOMIC_RELEASE);
	return 0;
}

int kvmaio_fast_add_doorbell(kvmaio_fast *fast, int eventfd)
{
	if (fast->doorbells == KVMAIO_FAST_DOORBELLS)
		return -ENOSPC;
	fast->doorbell[fast->doorbells] = eventfd;
	return (int)fast->doorbells++;
}

/* ---- the queue; with the lock held --------------------------------------------- */

static int queue_is_full(kvmaio_fast *fast)
{
	return fast->head - fast->tail == KVMAIO_FAST_QUEUE;
}

static void queue_push(kvmaio_fast *fast, kvmaio_posted write)
{
	fast->queue[fast->head % KVMAIO_FAST_QUEUE] = write;
	__atomic_store_n(&fast->head, fast->head + 1, __ATOMIC_RELEASE);
}

/* What KVM batched is older than anything that is queued from now on. */
static void move_ring(kvmaio_fast *fast)
{
	struct kvm_coalesced_mmio_ring *ring = fast->ring;
	if (!ring)
		return;
	while (!queue_is_full(fast)) {
		uint32_t first = ring->first;
		if (first == __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE))
			break;
		struct kvm_coalesced_mmio *entry = &ring->coalesced_mmio[first];
		kvmaio_posted write = {
			.address = entry->phys_addr, .size = entry->len, .is_pio = entry->pio
		};
		memcpy(&write.value, entry->data, entry->len < 8 ? entry->len : 8);
		queue_push(fast, write);
		__atomic_store_n(&ring->first, (first + 1) % fast->ring_length, __ATOMIC_RELEASE);
	}
}

static uint32_t ring_count(kvmaio_fast *fast)
{
	const struct kvm_coalesced_mmio_ring *ring = fast->ring;
	if (!ring)
		return 0;
	const uint32_t first = __atomic_load_n(&ring->first, __ATOMIC_ACQUIRE);
	const uint32_t last = __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE);
	return (last + fast->ring_length - first) % fast->ring_length;
}

int kvmaio_fast_waiting(kvmaio_fast *fast)
{
	/* In this order: what moves from the ring to the queue meanwhile counts at least once. */
	const uint32_t tail = __atomic_load_n(&fast->tail, __ATOMIC_ACQUIRE);
	const uint32_t in_ring = ring_count(fast);
	return (int)(in_ring + __atomic_load_n(&fast->head, __ATOMIC_ACQUIRE) - tail);
}

static int follows(const kvmaio_posted *first, const kvmaio_posted *next)
{
	return !first->time_ns && !next->time_ns && first->address == next->address &&
	       first->size == next->size && first->is_pio == next->is_pio;
}

int kvmaio_fast_take(kvmaio_fast *fast, kvmaio_posted *first, uint64_t *values, int capacity)
{
	int taken = 0;
	pthread_mutex_lock(&fast->lock);
	move_ring(fast);
	if (capacity && fast->head != fast->tail)
		__atomic_store_n(&fast->serving, 1, __ATOMIC_RELEASE);
	for (; taken < capacity && fast->head != fast->tail; taken++) {
		const kvmaio_posted *next = &fast->queue[fast->tail % KVMAIO_FAST_QUEUE];
		if (!taken)
			*first = *next;
		else if (!follows(first, next))
			break;
		values[taken] = next->value;
		__atomic_store_n(&fast->tail, fast->tail + 1, __ATOMIC_RELEASE);
	}
	if (!taken)
		__atomic_store_n(&fast->serving, 0, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&fast->lock);
	return taken;
}

uint32_t kvmaio_fast_rung(kvmaio_fast *fast, uint64_t *counts)
{
	uint32_t rung = 0;
	for (uint32_t i = 0; i < fast->doorbells; i++)
		if (read(fast->doorbell[i], &counts[i], sizeof counts[i]) == sizeof counts[i])
			rung |= 1u << i;
	return rung;
}

/* ---- serving an exit ------------------------------------------------------------- */

static kvmaio_fast_entry *find(kvmaio_fast *fast, uint64_t address, uint32_t size, uint32_t is_pio,
			       int is_write)
{
	uint32_t count = __atomic_load_n(&fast->entries, __ATOMIC_ACQUIRE);
	for (uint32_t i = 0; i < count; i++) {
		kvmaio_fast_entry *entry = &fast->entry[i];
		if (entry->address == address && entry->size == size &&
		    entry->is_pio == is_pio && !entry->cell == is_write)
			return entry;
	}
	return NULL;
}

static int queue_write(kvmaio_fast *fast, kvmaio_fast_entry *entry, const void *data)
{
	kvmaio_posted write = { .address = entry->address,
				.size = entry->size,
				.is_pio = entry->is_pio,
				.time_ns = entry->stamped ? clock_ns(CLOCK_MONOTONIC) : 0 };
	int queued = 0;
	memcpy(&write.value, data, entry->size);
	pthread_mutex_lock(&fast->lock);
	move_ring(fast);
	/* Full: then it is an ordinary exit, before which Python empties the queue. */
	if (!queue_is_full(fast) && !ring_count(fast)) {
		queue_push(fast, write);
		queued = 1;
	}
	pthread_mutex_unlock(&fast->lock);
	return queued;
}

static int answer_read(kvmaio_fast *fast, kvmaio_fast_entry *entry, void *data)
{
	/* A write that waits, or that its device is just having, may be about to change the
	 * cell. In this order: `serving` is set before the queue is seen to be empty. */
	if (kvmaio_fast_waiting(fast) || __atomic_load_n(&fast->serving, __ATOMIC_ACQUIRE))
		return 0;
	uint64_t value = __atomic_load_n(entry->cell, __ATOMIC_ACQUIRE);
	memcpy(data, &value, entry->size);
	return 1;
}

int kvmaio_fast_serve(kvmaio_fast *fast, struct kvm_run *page)
{
	uint64_t address;
	uint32_t size, is_pio;
	int is_write;
	void *data;

	if (page->exit_reason == KVM_EXIT_IO && page->io.count == 1) {
		address = page->io.port;
		size = page->io.size;
		is_pio = 1;
		is_write = page->io.direction == KVM_EXIT_IO_OUT;
		data = (char *)page + page->io.data_offset;
	} else if (page->exit_reason == KVM_EXIT_MMIO) {
		address = page->mmio.phys_addr;
		size = page->mmio.len;
		is_pio = 0;
		is_write = page->mmio.is_write;
		data = page->mmio.data;
	} else {
		return 0;
	}
	kvmaio_fast_entry *entry = find(fast, address, size, is_pio, is_write);
	if (!entry)
		return 0;
	int served = is_write ? queue_write(fast, entry, data) : answer_read(fast, entry, data);
	if (served)
		__atomic_fetch_add(&fast->served, 1, __ATOMIC_RELAXED);
	return served;
}
