/* The declared fast paths of one VM: accesses that no Python answers.
 *
 *   posted write   KVM batches it in its ring (no exit). Where that is full, C
 *                  empties it into the queue; where the write's time matters,
 *                  each is an exit that C takes off, stamped
 *   shared read    C answers it from a cell that the device keeps up to date
 *   doorbell       KVM counts it in an eventfd (no exit)
 *
 * Order is kept: KVM's ring is moved behind what is queued here before anything
 * younger is queued, and a shared read is left to Python while writes wait.
 */
#ifndef KVMAIO_FAST_H
#define KVMAIO_FAST_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>

#define KVMAIO_FAST_ENTRIES 64 /* of posted writes without a time, and of all others */
#define KVMAIO_FAST_DOORBELLS 32
#define KVMAIO_FAST_QUEUE 1024 /* a power of two; six of KVM's rings */

typedef struct kvmaio_posted {
	uint64_t address, value;
	int64_t time_ns; /* CLOCK_MONOTONIC; 0: not known */
	uint32_t size, is_pio;
} kvmaio_posted;

typedef struct kvmaio_fast_entry {
	uint64_t address;
	uint32_t size, is_pio;
	uint64_t *cell; /* NULL: a posted write */
	int stamped;    /* with its time */
} kvmaio_fast_entry;

typedef struct kvmaio_fast {
	pthread_mutex_t lock; /* the queue: several vCPUs may come at a time */
	struct kvm_coalesced_mmio_ring *ring;
	uint32_t ring_length;
	uint32_t head, tail; /* of the queue, free running */
	uint32_t serving;    /* a write was taken, and its device has not had it yet */
	kvmaio_posted queue[KVMAIO_FAST_QUEUE];
	uint32_t entries; /* atomic: grows only */
	uint32_t unstamped;
	kvmaio_fast_entry entry[2 * KVMAIO_FAST_ENTRIES];
	uint32_t doorbells;
	int doorbell[KVMAIO_FAST_DOORBELLS];
	uint64_t served; /* exits answered in C */
} kvmaio_fast;

/* `run_page`: any vCPU's of the VM; `ring_offset`: its ring's, in bytes. */
int kvmaio_fast_create(struct kvm_run *run_page, uint32_t ring_offset, kvmaio_fast **out);

/* No vCPU of the VM may be running any more. */
void kvmaio_fast_destroy(kvmaio_fast *fast);

/* Loop's thread, also while vCPUs run. `cell` NULL: take writes there, and stamp them
 * if they are to be `stamped`; else answer reads from it. -ENOSPC: there are too many. */
int kvmaio_fast_add(kvmaio_fast *fast, uint64_t address, uint32_t size, int is_pio, uint64_t *cell,
		    int stamped);

/* Loop's thread. The eventfd must be non-blocking. Its index, or -ENOSPC. */
int kvmaio_fast_add_doorbell(kvmaio_fast *fast, int eventfd);

/* Loop's thread. Move KVM's ring into the queue and take the oldest: those to one place that
 * follow one another, at most `capacity`, but a stamped one alone. How many; `first` says where
 * to and when. The next call, which may be for none, says that the devices have had these. */
int kvmaio_fast_take(kvmaio_fast *fast, kvmaio_posted *first, uint64_t *values, int capacity);

/* Any thread; a glance: how many posted writes wait. */
int kvmaio_fast_waiting(kvmaio_fast *fast);

/* Loop's thread. Bit i of the result: doorbell i has rung; counts[i] times. */
uint32_t kvmaio_fast_rung(kvmaio_fast *fast, uint64_t *counts);

/* The thread that KVM_RUN returned on: 1 where the exit is answered. */
int kvmaio_fast_serve(kvmaio_fast *fast, struct kvm_run *page);

#endif
