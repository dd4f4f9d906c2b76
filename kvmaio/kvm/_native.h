/* The C core: mechanism only. Policy, decoding and dispatch are Python.
 *
 * Conventions: opaque objects come in create/destroy pairs; functions return
 * 0 (or a count) on success and -errno on failure; nothing here prints, takes
 * the GIL or calls Python. Unless a comment says otherwise, a function is
 * called on the thread of the event loop that owns the object.
 */
#ifndef KVMAIO_NATIVE_H
#define KVMAIO_NATIVE_H

#include "_fast.h"
#include "_run_timer.h"

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

/* What came of one entry; negative values are -errno of KVM_RUN. */
enum kvmaio_outcome {
	KVMAIO_EXIT = 0,        /* the run page describes an exit */
	KVMAIO_INTERRUPTED = 1, /* kicked, or a half entry: the run page is stale */
	KVMAIO_TIMER = 2,       /* the time limit was reached: the run page is stale */
	KVMAIO_LATER = 3,       /* resident only: the run goes on, the loop has a turn first */
};

/* ---- plain system calls ------------------------------------------------- */

/* Any thread. The ioctl's result, or -errno; EINTR is retried. */
int kvmaio_ioctl(int fd, unsigned long request, void *argument);
int kvmaio_ioctl_value(int fd, unsigned long request, unsigned long value);

/* Prepare the kick signal for this process. Idempotent; call before any vCPU.
 * Returns the signal's number. */
int kvmaio_init(void);

/* ---- the hub: one eventfd and one done-list for all vCPUs of a loop ------ */

struct kvmaio_vcpu;

typedef struct kvmaio_hub {
	int fd;                                /* readable when the list may be non-empty */
	_Atomic(struct kvmaio_vcpu *) arrived; /* pushed by vCPU threads, newest first */
	struct kvmaio_vcpu *taken;             /* the loop's: oldest first */
	uint64_t wakeups;                      /* how often the loop was woken */
	_Atomic int awake;                     /* vCPU threads that are not asleep */
	int spare_processors;                  /* beside the loop's */
} kvmaio_hub;

int kvmaio_hub_create(kvmaio_hub **out);

/* Fill `tags` with the vCPUs that left the guest, in order of arrival; at most
 * `capacity`. Call again while it returns `capacity`. */
int kvmaio_hub_collect(kvmaio_hub *hub, uint32_t *tags, int capacity);

/* Only when no vCPU of this hub is left. */
void kvmaio_hub_destroy(kvmaio_hub *hub);

/* ---- a vCPU and its native thread ---------------------------------------- */

#define KVMAIO_PIO_DATA 4096 /* KVM_PIO_PAGE_OFFSET, which the kernel keeps to itself */

/* Accesses answered back to back: what else there is to do than enter again, and what the entries
 * come to that ended with an access. */
typedef struct kvmaio_burst {
	int disturbed; /* something is to be looked at before the next entry */
	int held;      /* enum kvmaio_held: why the last kvmaio_..._again did not enter */
	int entered;   /* since it began */
	int end;       /* what its entry led to, if not to an access: as kvmaio_resident_enter */
	int noted;     /* the access due is, by `kind` */
	uint64_t io, mmio;   /* accesses; the loop sets this and the next to 0 */
	int64_t executed_ns; /* host time of the entries with them */
	struct kvmaio_notes *notes; /* where answered accesses are noted, or NULL; as `kind` */
	const struct kvmaio_note_kind *kind;
} kvmaio_burst;

enum kvmaio_held {
	KVMAIO_NOT_HELD = 0,
	KVMAIO_HELD = 1,	  /* by `disturbed` */
	KVMAIO_HELD_TO_WRITE = 2, /* notes are to be written first */
};

typedef struct kvmaio_vcpu {
	int fd;
	struct kvm_run *page; /* the thread's between enter and arrival, else the loop's */
	size_t page_size;
	uint32_t tag; /* what kvmaio_hub_collect reports */

	/* The present request: written by the loop before `command` says GO. */
	uint64_t run_id;
	int64_t limit_ns; /* < 0: none; 0: half entry; else host time in the guest, or left of it */
	int in_place;     /* the loop waits for the result itself: no arrival */

	/* The result: written by the thread before `command` says IDLE. */
	int outcome; /* enum kvmaio_outcome or -errno */
	int64_t executed_ns; /* host CPU time */
	int64_t executed_cycles; /* what cycles_fd counted meanwhile; -1: unknown */
	int64_t inside_ns;   /* time in KVM_RUN, halted or not */
	int64_t longest_ns;  /* of a resident's run: its longest KVM_RUN */
	int64_t left_ns;     /* CLOCK_MONOTONIC: when the loop's thread left the guest */
	uint32_t exit_untold; /* nobody has been told of the exit since: see kvmaio_note_access */

	/* The access that ended the run, where it is one word of 1, 2, 4 or 8 bytes (a port's
	 * at KVMAIO_PIO_DATA in the run page) and no posted write waits; else -1.
	 *
	 *     address << 6 | size << 2 | is_write << 1 | is_pio
	 */
	int64_t access;
	uint64_t entries;    /* KVM_RUN calls so far */
	uint64_t unrequested; /* of these, ended by an EINTR that nobody asked for */

	/* Shared. */
	_Atomic uint32_t command __attribute__((aligned(64)));
	_Atomic uint32_t asleep;
	uint32_t wasted_spins, spin_tries; /* the thread's: in a row; since they did not pay */
	_Atomic uint64_t active; /* the run id inside KVM_RUN, 0 outside */
	_Atomic uint64_t kicked; /* runs up to this id are to end */
	_Atomic uint64_t ended;  /* the last run that ended: a kick is for the one behind it */

	_Atomic(struct kvmaio_resident *) resident; /* whose thread runs it; NULL: its own */
	int resident_run;                 /* a run has begun there and not ended */
	int misses;                       /* its budgets in a row in which none of its exits came */
	unsigned tries;

	kvmaio_fast *fast; /* what C answers itself, or NULL; set while outside of the guest */

	struct kvmaio_vcpu *next; /* in the hub's list */
	kvmaio_hub *hub;
	pthread_t thread;
	pid_t tid;
	int started;
	kvmaio_run_timer timer; /* of its own thread */
	int64_t entry_ns; /* a KVM_RUN that the timer ends before may have executed nothing */
	int cycles_fd; /* counts its guest's cycles on its own thread, the owner's; or -1 */
	kvmaio_burst burst; /* the loop's */
} kvmaio_vcpu;

/* KVM_CREATE_VCPU and its run page; no thread yet. */
int kvmaio_vcpu_create(kvmaio_hub *hub, int vm_fd, unsigned long id, size_t page_size, uint32_t tag,
		       kvmaio_vcpu **out);

/* Start the vCPU's thread: KVM_RUN is only ever called there, since moving a
 * vCPU between threads costs an RCU grace period on many kernels. */
int kvmaio_vcpu_start(kvmaio_vcpu *vcpu);

/* Let the thread enter the guest. The previous run must have arrived.
 * Returns the run's id, from 1 on. */
uint64_t kvmaio_vcpu_enter(kvmaio_vcpu *vcpu, int64_t limit_ns);

/* The same, but the caller itself waits for the end: there is no arrival. */
void kvmaio_vcpu_begin(kvmaio_vcpu *vcpu, int64_t limit_ns);

/* Wait for the end of what kvmaio_vcpu_begin began; the outcome, or -ETIMEDOUT. */
int kvmaio_vcpu_finish(kvmaio_vcpu *vcpu, int64_t timeout_ns);

/* Complete a pending access and wait for that: microseconds, and at most
 * `timeout_ns`. Returns the outcome, or -ETIMEDOUT. Releases nothing: the
 * caller is expected to have released the GIL. */
int kvmaio_vcpu_half_entry(kvmaio_vcpu *vcpu, int64_t timeout_ns);

/* End the run with this id, whether it is under way or still to come; runs
 * with a higher id are not touched. Any thread, while the vCPU exists. */
void kvmaio_vcpu_kick(kvmaio_vcpu *vcpu, uint64_t run_id);

/* The id of the run under way, or of the next one. */
uint64_t kvmaio_vcpu_current_run(kvmaio_vcpu *vcpu);

/* Is a run under way, that is: not yet arrived? */
int kvmaio_vcpu_is_running(kvmaio_vcpu *vcpu);

/* End the thread. Returns -ETIMEDOUT if it does not leave KVM_RUN in time; it
 * is then lost, and so is the vCPU. */
int kvmaio_vcpu_stop(kvmaio_vcpu *vcpu, int64_t timeout_ns);

/* Free a stopped vCPU. It must not be in the hub's list: collect before. */
void kvmaio_vcpu_destroy(kvmaio_vcpu *vcpu);

/* ---- a resident vCPU: run by the loop's own thread ---------------------------
 *
 * A vCPU that exits often lives on the loop's thread: an exit then costs no
 * change of threads. The loop's wait is the guest's run. The vCPU's native
 * thread stays parked meanwhile. All functions: the loop's thread only.
 */

typedef struct kvmaio_resident {
	kvmaio_hub *hub;
	_Atomic pid_t tid; /* the thread that runs the loop, at whom kicks are aimed */
	timer_t timer;
	int64_t timer_ns; /* when it fires, or fired */

	int64_t budget_ns;     /* exits are answered back to back for so long */
	int64_t budget_end_ns; /* of the present budget; 0: none */
	int64_t slice_ns;      /* a run without a watcher */
	kvmaio_vcpu *granted;  /* whose exit the present budget was for, or NULL */
	int hits;              /* its exits since then */

	/* The watcher: polls the loop's descriptors while the guest runs. */
	int poll_fd; /* the loop's epoll descriptor, or -1: no watcher */
	int quit_fd;
	pthread_t watcher;
	_Atomic(kvmaio_vcpu *) current __attribute__((aligned(64)));
	_Atomic uint32_t watching __attribute__((aligned(64)));

	uint64_t waits, inlined, armed, fired, kicks, slices;
} kvmaio_resident;

/* poll_fd: the loop's epoll descriptor, or -1 to run in slices without a watcher. */
int kvmaio_resident_create(kvmaio_hub *hub, int poll_fd, int64_t budget_ns, int64_t slice_ns,
			   kvmaio_resident **out);

/* No vCPU may be adopted any more. */
void kvmaio_resident_destroy(kvmaio_resident *resident);

/* Take a vCPU whose last run has arrived onto the loop's thread. */
int kvmaio_resident_adopt(kvmaio_resident *resident, kvmaio_vcpu *vcpu);

/* Give it back to its native thread; a run that has not ended goes on there, under
 * the same id, so that no kick meant for it is lost. */
int kvmaio_resident_release(kvmaio_vcpu *vcpu);

/* Begin a run, limited as by kvmaio_vcpu_enter; within the budget, enter the guest
 * at once. KVMAIO_LATER: no budget, or it is used up, or others wait, or there is a
 * limit: call kvmaio_resident_wait when the loop has nothing else to do. */
int kvmaio_resident_enter(kvmaio_resident *resident, kvmaio_vcpu *vcpu, int64_t limit_ns);

/* The same without a limit, behind an access that has been answered: 0 if the same access has come
 * again, else -1: if `burst.held` is 0, `access` tells what has come, and if that is -1,
 * `burst.end`. */
int kvmaio_resident_again(kvmaio_vcpu *vcpu);

/* The same for a vCPU on its own thread, which may be entered then: `access` is -1. */
int kvmaio_vcpu_again(kvmaio_vcpu *vcpu);

/* The loop has nothing to do before `deadline_ns` (CLOCK_MONOTONIC): run the
 * guest until it exits, its limit is reached, a descriptor of the loop is ready,
 * a signal comes, or the deadline. KVMAIO_LATER in the last three cases, and at
 * any other time: look at everything, and call again. A run that is over keeps
 * its outcome: it may be asked for again. */
int kvmaio_resident_wait(kvmaio_resident *resident, kvmaio_vcpu *vcpu, int64_t deadline_ns);

/* A half entry on this thread; the outcome. */
int kvmaio_resident_half_entry(kvmaio_vcpu *vcpu);

/* End a run without entering the guest any more. */
int kvmaio_resident_expire(kvmaio_vcpu *vcpu);

/* ---- measuring -------------------------------------------------------------- */

/* On a throw-away VM: what one exit costs, and what KVM_RUN on another thread
 * than last time costs more. Any thread; takes 5 to 60 ms. */
int kvmaio_measure(int kvm_fd, size_t page_size, int64_t *exit_ns, int64_t *move_ns);

/* The same for getting into the guest: the shortest KVM_RUN, ended by a timer, in which
 * the guest still got somewhere. Nanoseconds, or -errno; takes some 5 ms. */
int64_t kvmaio_measure_entry(int kvm_fd, size_t page_size);

/* The measure of all things: KVM_RUN in a loop of C that answers nothing, on the
 * calling thread, until `exits` exits have come. Nanoseconds, or -errno. The
 * vCPU must not be running and must never have been entered elsewhere. */
int64_t kvmaio_raw_loop(kvmaio_vcpu *vcpu, int exits);

#endif
