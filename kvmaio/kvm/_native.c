#define _GNU_SOURCE
#include "_internal.h"

#include <sched.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define STACK_SIZE (128 * 1024)

enum command { IDLE, GO, QUIT };

/* ---- plain system calls ------------------------------------------------------ */

int kvmaio_ioctl(int fd, unsigned long request, void *argument)
{
	int result;
	do
		result = ioctl(fd, request, argument);
	while (result < 0 && errno == EINTR);
	return result < 0 ? -errno : result;
}

int kvmaio_ioctl_value(int fd, unsigned long request, unsigned long value)
{
	return kvmaio_ioctl(fd, request, (void *)value);
}

/* ---- the kick signal -------------------------------------------------------
 *
 * A vCPU's native thread keeps the signal blocked; KVM_SET_SIGNAL_MASK unblocks
 * it inside KVM_RUN only. A signal that comes earlier stays pending and makes
 * the next KVM_RUN return at once, so there is no moment at which it can be
 * lost, and the handler never runs there.
 *
 * The loop's thread is the program's: its mask is left alone. There the handler
 * runs, and sets `immediate_exit` on the vCPU that this thread is about to
 * enter or is in, which closes the same gap: KVM looks at it on every entry.
 */

_Thread_local kvmaio_vcpu *volatile kvmaio_here __attribute__((tls_model("initial-exec")));

static void on_kick(int signal)
{
	(void)signal;
	kvmaio_vcpu *vcpu = kvmaio_here;
	if (vcpu)
		*(volatile uint8_t *)&vcpu->page->immediate_exit = 1;
}

int kvmaio_init(void)
{
	/* SA_RESTART does not hold KVM_RUN back, which returns EINTR by itself; it spares
	 * the program's other system calls. */
	struct sigaction action = { .sa_handler = on_kick, .sa_flags = SA_RESTART | SA_ONSTACK };
	sigemptyset(&action.sa_mask);
	if (sigaction(KICK_SIGNAL, &action, NULL) < 0)
		return -errno;
	return KICK_SIGNAL;
}

/* A late kick or timer must not end the next run. */
void kvmaio_discard_kicks(void)
{
	sigset_t set;
	const struct timespec at_once = { 0 };
	kick_signal_set(&set);
	while (sigtimedwait(&set, NULL, &at_once) > 0)
		;
}

void kvmaio_send_kick(pid_t tid)
{
	/* Real-time signals queue, and the user's queue may be full for a moment. */
	for (int tries = 0; tries < 1000; tries++) {
		if (!syscall(SYS_tgkill, getpid(), tid, KICK_SIGNAL) || errno != EAGAIN)
			return;
		const struct timespec pause = { .tv_nsec = 100000 };
		nanosleep(&pause, NULL);
	}
}

int kvmaio_set_signal_mask(int vcpu_fd)
{
	struct {
		struct kvm_signal_mask header;
		uint64_t set; /* the kernel's sigset: bit n-1 is signal n */
	} __attribute__((packed)) mask = { .header.len = 8, .set = ~(1ull << (KICK_SIGNAL - 1)) };
	return kvmaio_ioctl(vcpu_fd, KVM_SET_SIGNAL_MASK, &mask);
}

/* ---- the hub ----------------------------------------------------------------
 *
 * Threads push; the loop takes the whole list at once. Only the push onto an
 * empty list writes the eventfd, so a batch costs one wake-up. Nothing is lost:
 * the loop reads the eventfd *before* it takes the list, so a push whose write
 * that read swallowed is in the list taken; any later push found the list
 * empty again and writes anew.
 */

int kvmaio_hub_create(kvmaio_hub **out)
{
	kvmaio_hub *hub = calloc(1, sizeof *hub);
	if (!hub)
		return -ENOMEM;
	cpu_set_t processors;
	if (sched_getaffinity(0, sizeof processors, &processors) == 0)
		hub->spare_processors = CPU_COUNT(&processors) - 1;
	hub->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (hub->fd < 0) {
		int error = errno;
		free(hub);
		return -error;
	}
	*out = hub;
	return 0;
}

void kvmaio_hub_destroy(kvmaio_hub *hub)
{
	close(hub->fd);
	free(hub);
}

static void hub_push(kvmaio_hub *hub, kvmaio_vcpu *vcpu)
{
	kvmaio_vcpu *head = atomic_load(&hub->arrived);
	do
		vcpu->next = head;
	while (!atomic_compare_exchange_weak(&hub->arrived, &head, vcpu));
	/* From here on the vCPU may already be entered again: do not touch it. */
	if (!head) {
		uint64_t one = 1;
		ssize_t written;
		do
			written = write(hub->fd, &one, sizeof one);
		while (written < 0 && errno == EINTR);
	}
}

static void hub_take(kvmaio_hub *hub)
{
	kvmaio_vcpu *newest = atomic_exchange(&hub->arrived, NULL);
	while (newest) {
		kvmaio_vcpu *older = newest->next;
		newest->next = hub->taken;
		hub->taken = newest;
		newest = older;
	}
}

int kvmaio_hub_collect(kvmaio_hub *hub, uint32_t *tags, int capacity)
{
	int count = 0;
	if (!hub->taken) {
		uint64_t value;
		if (read(hub->fd, &value, sizeof value) == sizeof value)
			hub->wakeups++;
		hub_take(hub);
	}
	while (hub->taken && count < capacity) {
		kvmaio_vcpu *vcpu = hub->taken;
		hub->taken = vcpu->next;
		vcpu->next = NULL;
		tags[count++] = vcpu->tag;
	}
	return count;
}

/* ---- running ------------------------------------------------------------------ */

/* The guest's cycles so far; 0 where nobody counts, or the counter has lost its place. */
static uint64_t count_cycles(const kvmaio_vcpu *vcpu)
{
	uint64_t count;
	if (vcpu->cycles_fd < 0 || read(vcpu->cycles_fd, &count, sizeof count) != sizeof count)
		return 0;
	return count;
}

/* One run, on the vCPU's thread.
 *
 * Against lost kicks, a Dekker pair: this thread publishes `active` and then
 * reads `kicked`; the kicker writes `kicked` and then reads `active`. Either
 * the kicker sees the run and signals it, or the run sees the kick. A signal
 * meant for an earlier run only costs a look at `kicked`: hence the run id.
 */
static void execute(kvmaio_vcpu *vcpu)
{
	const uint64_t run_id = vcpu->run_id;
	struct kvm_run *page = vcpu->page;
	int outcome;

	const uint64_t cycles_before = count_cycles(vcpu);
	atomic_store(&vcpu->active, run_id);
	/* A run that was kicked beforehand enters all the same, so that a pending
	 * access gets completed, but executes nothing. */
	int half = vcpu->limit_ns == 0 || atomic_load(&vcpu->kicked) >= run_id;
	int timed = vcpu->limit_ns > 0 && !half;
	int unarmed = timed ? kvmaio_run_timer_arm(&vcpu->timer, vcpu->limit_ns) : 0;
	page->immediate_exit = half;
	/* Behind the arming, which no guest executes. */
	const int64_t worked_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
	const int64_t started_ns = clock_ns(CLOCK_MONOTONIC);
	int64_t entered_ns = started_ns;
	for (;;) {
		if (unarmed) {
			outcome = unarmed;
			break;
		}
		int error = ioctl(vcpu->fd, KVM_RUN, 0) < 0 ? errno : 0;
		vcpu->entries++;
		if (!error) {
			/* A kick or the timer still counts: its signal is pending. */
			if (vcpu->fast && kvmaio_fast_serve(vcpu->fast, page))
				continue;
			outcome = KVMAIO_EXIT;
			break;
		}
		/* exit_reason is stale from here on: errno decides. EAGAIN comes from
		 * an application processor that waited for its start-up IPI. */
		if (error != EINTR && error != EAGAIN) {
			outcome = -error;
			break;
		}
		/* First discard, then look: a signal swallowed here has its reason
		 * written down already; one that comes later stays pending. */
		if (error == EINTR)
			kvmaio_discard_kicks();
		if (half || atomic_load(&vcpu->kicked) >= run_id) {
			outcome = KVMAIO_INTERRUPTED;
			break;
		}
		if (timed && kvmaio_run_timer_expired(&vcpu->timer)) {
			const int64_t now_ns = clock_ns(CLOCK_MONOTONIC);
			if (now_ns - entered_ns >= vcpu->entry_ns) {
				outcome = KVMAIO_TIMER;
				break;
			}
			/* The host kept this thread from KVM_RUN until the time was over, or
			 * nearly: the guest has not been reached, and a run makes progress. */
			kvmaio_run_timer_disarm(&vcpu->timer);
			unarmed = kvmaio_run_timer_arm(&vcpu->timer, 2 * vcpu->entry_ns);
			entered_ns = clock_ns(CLOCK_MONOTONIC);
			continue;
		}
		vcpu->unrequested++;
		entered_ns = clock_ns(CLOCK_MONOTONIC);
	}
	/* Added: a run that has moved here was executed elsewhere before. */
	vcpu->inside_ns += clock_ns(CLOCK_MONOTONIC) - started_ns;
	vcpu->executed_ns += clock_ns(CLOCK_THREAD_CPUTIME_ID) - worked_ns;
	page->immediate_exit = 0;
	atomic_store(&vcpu->active, 0);
	if (timed) {
		kvmaio_run_timer_disarm(&vcpu->timer);
		kvmaio_discard_kicks();
	}
	const uint64_t cycles = count_cycles(vcpu);
	if (vcpu->executed_cycles >= 0)
		vcpu->executed_cycles = cycles ? (int64_t)(cycles - cycles_before) : -1;
	vcpu->outcome = outcome;
	vcpu->access = access_of(vcpu, outcome);
	atomic_store(&vcpu->ended, run_id);
}

/* An answer that comes soon is waited for without sleep, as being woken on another processor
 * takes longer than many a handler. Only where each thread that is awake, and the loop's, has
 * a processor, and as long as it pays. */
#define SPIN_NS 60000
#define WASTED_ALLOWED 2
#define SPIN_RETRY 64

static void spin_for_command(kvmaio_vcpu *vcpu)
{
	if (atomic_load(&vcpu->hub->awake) > vcpu->hub->spare_processors)
		return;
	if (vcpu->wasted_spins > WASTED_ALLOWED && ++vcpu->spin_tries % SPIN_RETRY)
		return;
	const int64_t until_ns = clock_ns(CLOCK_MONOTONIC) + SPIN_NS;
	vcpu->wasted_spins++;
	do {
		for (int i = 0; i < 50; i++) {
			if (atomic_load(&vcpu->command) != IDLE) {
				vcpu->wasted_spins = 0;
				return;
			}
			__builtin_ia32_pause();
		}
	} while (clock_ns(CLOCK_MONOTONIC) < until_ns);
}

static uint32_t wait_for_command(kvmaio_vcpu *vcpu, int has_run)
{
	uint32_t command;
	if (has_run)
		spin_for_command(vcpu);
	while ((command = atomic_load(&vcpu->command)) == IDLE) {
		atomic_fetch_sub(&vcpu->hub->awake, 1);
		atomic_store(&vcpu->asleep, 1);
		futex_wait(&vcpu->command, IDLE, NULL);
		atomic_store(&vcpu->asleep, 0);
		atomic_fetch_add(&vcpu->hub->awake, 1);
	}
	return command;
}

static void *thread_main(void *argument)
{
	kvmaio_vcpu *vcpu = argument;
	vcpu->tid = (pid_t)syscall(SYS_gettid);
	atomic_fetch_add(&vcpu->hub->awake, 1);
	atomic_store(&vcpu->command, IDLE);
	futex_wake(&vcpu->command);
	for (int has_run = 0; wait_for_command(vcpu, has_run) == GO; has_run = 1) {
		int in_place = vcpu->in_place;
		execute(vcpu);
		/* Not a plain store: it could overwrite a QUIT. */
		uint32_t go = GO;
		if (!atomic_compare_exchange_strong(&vcpu->command, &go, IDLE))
			break;
		if (in_place)
			futex_wake(&vcpu->command);
		else
			hub_push(vcpu->hub, vcpu);
	}
	kvmaio_run_timer_close(&vcpu->timer);
	atomic_fetch_sub(&vcpu->hub->awake, 1);
	return NULL;
}

/* ---- the vCPU's life ------------------------------------------------------------ */

int kvmaio_vcpu_create(kvmaio_hub *hub, int vm_fd, unsigned long id, size_t page_size, uint32_t tag,
		       kvmaio_vcpu **out)
{
	kvmaio_vcpu *vcpu = aligned_alloc(64, (sizeof *vcpu + 63) & ~63ul);
	if (!vcpu)
		return -ENOMEM;
	memset(vcpu, 0, sizeof *vcpu);
	vcpu->hub = hub;
	vcpu->tag = tag;
	vcpu->page_size = page_size;
	vcpu->timer.counter_fd = vcpu->cycles_fd = -1;
	vcpu->executed_cycles = -1;
	vcpu->fd = kvmaio_ioctl_value(vm_fd, KVM_CREATE_VCPU, id);
	if (vcpu->fd < 0) {
		int error = vcpu->fd;
		free(vcpu);
		return error;
	}
	void *page = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	int error = page == MAP_FAILED ? -errno : kvmaio_set_signal_mask(vcpu->fd);
	if (error) {
		if (page != MAP_FAILED)
			munmap(page, page_size);
		close(vcpu->fd);
		free(vcpu);
		return error;
	}
	vcpu->page = page;
	*out = vcpu;
	return 0;
}

int kvmaio_vcpu_start(kvmaio_vcpu *vcpu)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	int error;

	if (vcpu->started)
		return 0;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_SIZE);
	atomic_store(&vcpu->command, GO); /* until the thread says IDLE */
	/* The thread inherits the mask: no signal of the program is ever taken there. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&vcpu->thread, &attributes, thread_main, vcpu);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	if (error)
		return -error;
	vcpu->started = 1;
	while (atomic_load(&vcpu->command) == GO)
		futex_wait(&vcpu->command, GO, NULL);
	return 0;
}

void kvmaio_vcpu_resume(kvmaio_vcpu *vcpu)
{
	vcpu->in_place = 0;
	atomic_store(&vcpu->command, GO);
	if (atomic_load(&vcpu->asleep))
		futex_wake(&vcpu->command);
}

static void submit(kvmaio_vcpu *vcpu, int64_t limit_ns, int in_place)
{
	/* A half entry in place is no run: a kick beforehand is for the run behind it. */
	if (!in_place || limit_ns)
		vcpu->run_id++;
	vcpu->executed_ns = 0;
	vcpu->executed_cycles = 0;
	vcpu->inside_ns = 0;
	vcpu->limit_ns = limit_ns;
	vcpu->in_place = in_place;
	atomic_store(&vcpu->command, GO);
	if (atomic_load(&vcpu->asleep))
		futex_wake(&vcpu->command);
}

uint64_t kvmaio_vcpu_enter(kvmaio_vcpu *vcpu, int64_t limit_ns)
{
	submit(vcpu, limit_ns, 0);
	return vcpu->run_id;
}

void kvmaio_vcpu_begin(kvmaio_vcpu *vcpu, int64_t limit_ns)
{
	submit(vcpu, limit_ns, 1);
}

int kvmaio_vcpu_finish(kvmaio_vcpu *vcpu, int64_t timeout_ns)
{
	int64_t deadline_ns = clock_ns(CLOCK_MONOTONIC) + timeout_ns;
	while (atomic_load(&vcpu->command) == GO) {
		int64_t left_ns = deadline_ns - clock_ns(CLOCK_MONOTONIC);
		if (left_ns <= 0)
			return -ETIMEDOUT;
		struct timespec left = timespec_of(left_ns);
		futex_wait(&vcpu->command, GO, &left);
	}
	return vcpu->outcome;
}

int kvmaio_vcpu_half_entry(kvmaio_vcpu *vcpu, int64_t timeout_ns)
{
	kvmaio_vcpu_begin(vcpu, 0);
	return kvmaio_vcpu_finish(vcpu, timeout_ns);
}

int kvmaio_vcpu_is_running(kvmaio_vcpu *vcpu)
{
	if (vcpu->resident)
		return vcpu->resident_run;
	return atomic_load(&vcpu->command) == GO;
}

uint64_t kvmaio_vcpu_current_run(kvmaio_vcpu *vcpu)
{
	/* One word says it. `run_id` and `command` are two: a run that is submitted between
	 * the looks at them would be missed, and the one behind it kicked. */
	return atomic_load(&vcpu->ended) + 1;
}

static void send_to_runner(kvmaio_vcpu *vcpu)
{
	/* A vCPU may move just now: then it begins there with a look at `kicked`. */
	struct kvmaio_resident *resident = atomic_load(&vcpu->resident);
	kvmaio_send_kick(resident ? resident->tid : vcpu->tid);
}

void kvmaio_vcpu_kick(kvmaio_vcpu *vcpu, uint64_t run_id)
{
	uint64_t kicked = atomic_load(&vcpu->kicked);
	do
		if (kicked >= run_id)
			return; /* one signal a run is enough: they queue */
	while (!atomic_compare_exchange_weak(&vcpu->kicked, &kicked, run_id));
	if (atomic_load(&vcpu->active) == run_id)
		send_to_runner(vcpu);
}

int kvmaio_vcpu_stop(kvmaio_vcpu *vcpu, int64_t timeout_ns)
{
	if (!vcpu->started)
		return 0;
	struct timespec until = timespec_of(clock_ns(CLOCK_REALTIME) + timeout_ns);
	atomic_store(&vcpu->kicked, UINT64_MAX);
	atomic_store(&vcpu->command, QUIT);
	futex_wake(&vcpu->command);
	if (atomic_load(&vcpu->active))
		kvmaio_send_kick(vcpu->tid);
	int error = pthread_timedjoin_np(vcpu->thread, NULL, &until);
	if (error)
		return -error;
	vcpu->started = 0;
	return 0;
}

void kvmaio_vcpu_destroy(kvmaio_vcpu *vcpu)
{
	munmap(vcpu->page, vcpu->page_size);
	close(vcpu->fd);
	free(vcpu);
}
