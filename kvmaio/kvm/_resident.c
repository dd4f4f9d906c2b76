#define _GNU_SOURCE
#include "_internal.h"

#include <poll.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>

/* A budget that no exit used is not granted again at once: arming its timer costs as
 * much as an exit. Every RETRY-th time it is tried all the same. */
#define MISSES_ALLOWED 2
#define RETRY 16

enum watching { PARKED, WATCHING, QUIT };

/* ---- entering ------------------------------------------------------------------
 *
 * A kick of any kind (another thread's, the timer's, the watcher's, a signal of
 * the program's) means only: leave the guest and look at everything again. What
 * must not happen is that one is missed. Each has its reason written down before
 * its signal is sent, and `enter` looks at all reasons *after* `kvmaio_here` is
 * set: an earlier signal's reason is seen there, a later signal's handler finds
 * `kvmaio_here` and sets `immediate_exit`, at which KVM looks on every entry.
 */

/* KVM_RUN once; an outcome, or KVMAIO_LATER where it was interrupted. */
static int enter(kvmaio_vcpu *vcpu, int half)
{
	struct kvm_run *page = vcpu->page;
	int64_t started_ns = clock_ns(CLOCK_MONOTONIC);
	if (half)
		page->immediate_exit = 1;
	int error;
	do {
		error = ioctl(vcpu->fd, KVM_RUN, 0) < 0 ? errno : 0;
		vcpu->entries++;
		/* What C answers itself goes straight back in: `immediate_exit` still counts. */
	} while (!error && vcpu->fast && kvmaio_fast_serve(vcpu->fast, page));
	/* First stop the handler, then clear what it may have set. */
	kvmaio_here = NULL;
	atomic_signal_fence(memory_order_seq_cst);
	*(volatile uint8_t *)&page->immediate_exit = 0;
	vcpu->executed_ns += clock_ns(CLOCK_MONOTONIC) - started_ns;
	if (!error)
		return KVMAIO_EXIT;
	if (error != EINTR && error != EAGAIN)
		return -error;
	return half ? KVMAIO_INTERRUPTED : KVMAIO_LATER;
}

static void announce(kvmaio_vcpu *vcpu)
{
	kvmaio_here = vcpu;
	atomic_signal_fence(memory_order_seq_cst);
}

static int is_kicked(kvmaio_vcpu *vcpu)
{
	return atomic_load(&vcpu->kicked) >= vcpu->run_id;
}

static int finish(kvmaio_vcpu *vcpu, int outcome)
{
	if (outcome != KVMAIO_LATER) {
		atomic_store(&vcpu->active, 0);
		vcpu->resident_run = 0;
		vcpu->outcome = outcome;
		atomic_store(&vcpu->ended, vcpu->run_id);
	}
	return outcome;
}

static void grant_budget(kvmaio_resident *resident, int64_t now_ns)
{
	if (resident->budget_end_ns && !resident->hits)
		resident->misses++;
	else if (resident->hits)
		resident->misses = 0;
	resident->hits = 0;
	if (resident->misses < MISSES_ALLOWED || ++resident->tries % RETRY == 0) {
		resident->budget_end_ns = now_ns + resident->budget_ns;
		arm_timer(resident->timer, resident->budget_end_ns);
	} else {
		resident->budget_end_ns = 0;
	}
}

int kvmaio_resident_enter(kvmaio_resident *resident, kvmaio_vcpu *vcpu)
{
	vcpu->run_id++;
	vcpu->executed_ns = 0;
	vcpu->resident_run = 1;
	atomic_store(&vcpu->active, vcpu->run_id);
	if (is_kicked(vcpu)) {
		announce(vcpu);
		return finish(vcpu, enter(vcpu, 1));
	}
	/* Others that have left their guests are served first. */
	if (!resident->budget_end_ns || atomic_load(&resident->hub->arrived))
		return KVMAIO_LATER;
	announce(vcpu);
	if (clock_ns(CLOCK_MONOTONIC) >= resident->budget_end_ns) {
		kvmaio_here = NULL;
		return KVMAIO_LATER;
	}
	int outcome = enter(vcpu, is_kicked(vcpu));
	if (outcome == KVMAIO_EXIT) {
		resident->hits++;
		resident->inlined++;
	}
	return finish(vcpu, outcome);
}

/* ---- waiting --------------------------------------------------------------------
 *
 * Between the loop's poll and KVM_RUN a descriptor may become ready: only the
 * watcher sees that. A Dekker pair again: the loop publishes `current` and then
 * reads `watching`; the watcher takes `watching` back and then reads `current`.
 *
 *   - The watcher fires before the loop has read `watching`: the loop sees that
 *     nobody watches. Had it armed the watcher itself a moment ago, a descriptor
 *     *is* ready: it goes and polls. Else it takes a slice, bounded by the timer,
 *     and arms the watcher only after that: as long as exits come, no thread is
 *     woken on their behalf.
 *   - It fires later: it sees `current` and kicks.
 */

static void *watch(void *argument)
{
	kvmaio_resident *resident = argument;
	struct pollfd fds[] = { { resident->poll_fd, POLLIN, 0 }, { resident->quit_fd, POLLIN, 0 } };
	for (;;) {
		uint32_t state;
		while ((state = atomic_load(&resident->watching)) == PARKED)
			futex_wait(&resident->watching, PARKED, NULL);
		if (state == QUIT)
			return NULL;
		if (poll(fds, 2, -1) < 0 && errno == EINTR)
			continue;
		uint32_t watching = WATCHING;
		atomic_compare_exchange_strong(&resident->watching, &watching, PARKED);
		resident->fired++;
		if (atomic_load(&resident->current)) {
			resident->kicks++;
			kvmaio_send_kick(resident->tid);
		}
	}
}

static void arm_watcher(kvmaio_resident *resident)
{
	uint32_t parked = PARKED;
	resident->armed++;
	if (atomic_compare_exchange_strong(&resident->watching, &parked, WATCHING))
		futex_wake(&resident->watching);
}

int kvmaio_resident_wait(kvmaio_resident *resident, kvmaio_vcpu *vcpu, int64_t deadline_ns)
{
	const int may_watch = resident->poll_fd >= 0;
	int armed_now = 0;
	int outcome;

	resident->waits++;
	for (;;) {
		atomic_store(&resident->current, vcpu);
		int watched = may_watch && atomic_load(&resident->watching) == WATCHING;
		int64_t now_ns = clock_ns(CLOCK_MONOTONIC);
		int64_t until_ns = deadline_ns;
		if (!watched) {
			outcome = KVMAIO_LATER;
			if (armed_now)
				break; /* it fired already: poll */
			int64_t slice_end_ns = now_ns + resident->slice_ns;
			if (!until_ns || slice_end_ns < until_ns)
				until_ns = slice_end_ns;
		}
		if (until_ns) {
			outcome = KVMAIO_LATER;
			if (now_ns >= until_ns)
				break;
			arm_timer(resident->timer, until_ns);
		}
		announce(vcpu);
		/* The timer's reason is the clock; looked at after announcing. */
		if (until_ns && clock_ns(CLOCK_MONOTONIC) >= until_ns) {
			kvmaio_here = NULL;
			break;
		}
		/* The watcher's is `watching`. */
		if (watched && atomic_load(&resident->watching) != WATCHING) {
			kvmaio_here = NULL;
			outcome = KVMAIO_LATER;
			break;
		}
		outcome = enter(vcpu, is_kicked(vcpu));
		if (outcome != KVMAIO_LATER)
			break;
		now_ns = clock_ns(CLOCK_MONOTONIC);
		if (deadline_ns && now_ns >= deadline_ns)
			break;
		if (watched || !may_watch || now_ns < until_ns)
			break; /* the watcher, a signal, or a kick: look at everything */
		/* A whole slice without an exit: from now on somebody watches. */
		resident->slices++;
		arm_watcher(resident);
		armed_now = 1;
	}
	atomic_store(&resident->current, NULL);
	/* A budget that was under way has lost its timer to this wait. */
	if (outcome == KVMAIO_EXIT)
		grant_budget(resident, clock_ns(CLOCK_MONOTONIC));
	else
		resident->budget_end_ns = 0;
	return finish(vcpu, outcome);
}

int kvmaio_resident_half_entry(kvmaio_vcpu *vcpu)
{
	/* Without a run id of its own: a kick beforehand is for the run behind it. */
	vcpu->executed_ns = 0;
	announce(vcpu);
	return enter(vcpu, 1);
}

int kvmaio_resident_expire(kvmaio_vcpu *vcpu)
{
	return finish(vcpu, KVMAIO_TIMER);
}

/* ---- life ------------------------------------------------------------------------ */

int kvmaio_resident_create(kvmaio_hub *hub, int poll_fd, int64_t budget_ns, int64_t slice_ns,
			   kvmaio_resident **out)
{
	kvmaio_resident *resident = aligned_alloc(64, (sizeof *resident + 63) & ~63ul);
	if (!resident)
		return -ENOMEM;
	memset(resident, 0, sizeof *resident);
	resident->hub = hub;
	resident->tid = (pid_t)syscall(SYS_gettid);
	resident->poll_fd = poll_fd;
	resident->budget_ns = budget_ns;
	resident->slice_ns = slice_ns;
	int error = create_thread_timer(resident->tid, &resident->timer);
	if (error)
		goto failed;
	if (poll_fd >= 0) {
		resident->quit_fd = eventfd(0, EFD_CLOEXEC);
		if (resident->quit_fd < 0) {
			error = -errno;
			goto failed_timer;
		}
		sigset_t all, before;
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &before);
		error = -pthread_create(&resident->watcher, NULL, watch, resident);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
		if (error) {
			close(resident->quit_fd);
			goto failed_timer;
		}
	}
	*out = resident;
	return 0;

failed_timer:
	timer_delete(resident->timer);
failed:
	free(resident);
	return error;
}

void kvmaio_resident_destroy(kvmaio_resident *resident)
{
	if (resident->poll_fd >= 0) {
		uint64_t one = 1;
		atomic_store(&resident->watching, QUIT);
		while (write(resident->quit_fd, &one, sizeof one) < 0 && errno == EINTR)
			;
		futex_wake(&resident->watching);
		pthread_join(resident->watcher, NULL);
		close(resident->quit_fd);
	}
	timer_delete(resident->timer);
	free(resident);
}

int kvmaio_resident_adopt(kvmaio_resident *resident, kvmaio_vcpu *vcpu)
{
	/* On this thread KVM_RUN ends for every signal that the program takes. */
	int error = ioctl(vcpu->fd, KVM_SET_SIGNAL_MASK, NULL) < 0 ? -errno : 0;
	if (!error) {
		vcpu->resident_run = 0;
		vcpu->resident = resident;
	}
	return error;
}

int kvmaio_resident_release(kvmaio_vcpu *vcpu)
{
	int error = kvmaio_set_signal_mask(vcpu->fd);
	if (!error) {
		int goes_on = vcpu->resident_run;
		vcpu->resident_run = 0;
		vcpu->resident = NULL;
		if (goes_on)
			kvmaio_vcpu_resume(vcpu);
	}
	return error;
}
