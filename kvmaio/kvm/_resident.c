#define _GNU_SOURCE
#include "_internal.h"

#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>

/* A budget that no exit used is not granted again at once: arming its timer costs as
 * much as an exit. Every RETRY-th time it is tried all the same. */
#define MISSES_ALLOWED 2
#define RETRY 16

/* The clock, which each entry looks at, ends a budget; the timer is only for a guest that
 * does not come out, and so is set a little later, by this share of the budget. Where exits
 * keep coming it is then set anew before it fires: firing costs as much as several exits. */
#define GRACE_SHARE 6

enum watching { PARKED, WATCHING, QUIT };

/* With -DKVMAIO_STRESS (see tests/resident/test_stress.py) a random delay between the steps of
 * each race; nothing otherwise. */
#ifdef KVMAIO_STRESS
static void stress(void)
{
	static _Thread_local uint32_t seed;
	if (!seed)
		seed = (uint32_t)clock_ns(CLOCK_MONOTONIC) | 1;
	seed = seed * 1664525 + 1013904223;
	if (seed >> 24 < 16)
		usleep(seed >> 8 & 0xff);
	else if (seed >> 24 < 64)
		sched_yield();
}
#define STRESS() stress()
#else
#define STRESS() ((void)0)
#endif

/* ---- entering ------------------------------------------------------------------
 *
 * A kick of any kind (another thread's, the timer's, the watcher's, a signal of
 * the program's) means only: leave the guest and look at everything again. What
 * must not happen is that one is missed. Each has its reason written down before
 * its signal is sent, and every reason is looked at *after* `kvmaio_here` is set:
 * an earlier signal's reason is seen there, a later signal's handler finds
 * `kvmaio_here` and sets `immediate_exit`, at which KVM looks on every entry.
 *
 *   who kicks         the reason               looked at by
 *   kvmaio_vcpu_kick  `kicked`                 is_kicked
 *   the timer         the clock, `timer_ns`    is_past
 *   the watcher       `watching` is taken back kvmaio_resident_wait
 *   the program       in Python, out of reach  nobody: see LONGEST_WAIT_NS in resident.py
 *
 * The last row is why no wait is without end. A signal that Python's own handler took
 * between the interpreter's last look and KVM_RUN, or took on another thread, leaves
 * nothing that could be looked at here (unless `signal.set_wakeup_fd` names a descriptor
 * of the loop, which the watcher sees).
 */

enum clocks { COARSE, EXACT };

static void announce(kvmaio_vcpu *vcpu)
{
	STRESS();
	kvmaio_here = vcpu;
	atomic_signal_fence(memory_order_seq_cst);
	STRESS();
}

static void withdraw(void)
{
	kvmaio_here = NULL;
	atomic_signal_fence(memory_order_seq_cst);
}

/* KVM_RUN, announced before; an outcome, or KVMAIO_LATER where it was interrupted.
 * `started_ns` is now. COARSE: the time inside counts as executed. EXACT: only what this thread worked, as a
 * halted guest waits inside of KVM; that clock is a system call, too dear for each exit. */
static int enter_at(kvmaio_vcpu *vcpu, int half, enum clocks clocks, int64_t started_ns)
{
	struct kvm_run *page = vcpu->page;
	int64_t worked_ns = clocks == EXACT ? clock_ns(CLOCK_THREAD_CPUTIME_ID) : 0;
	if (half)
		page->immediate_exit = 1;
	int error;
	do {
		STRESS();
		error = ioctl(vcpu->fd, KVM_RUN, 0) < 0 ? errno : 0;
		vcpu->entries++;
		if (error == EAGAIN) /* an application processor, whose start-up IPI has come */
			vcpu->unrequested++;
		/* What C answers itself goes straight back in: `immediate_exit` still counts. */
	} while (!error && vcpu->fast && kvmaio_fast_serve(vcpu->fast, page));
	STRESS();
	/* First stop the handler, then clear what it may have set. */
	withdraw();
	*(volatile uint8_t *)&page->immediate_exit = 0;
	vcpu->left_ns = clock_ns(CLOCK_MONOTONIC);
	int64_t inside_ns = vcpu->left_ns - started_ns;
	vcpu->inside_ns += inside_ns;
	if (inside_ns > vcpu->longest_ns)
		vcpu->longest_ns = inside_ns;
	vcpu->executed_ns +=
		clocks == EXACT ? clock_ns(CLOCK_THREAD_CPUTIME_ID) - worked_ns : inside_ns;
	if (!error)
		return KVMAIO_EXIT;
	if (error != EINTR && error != EAGAIN)
		return -error;
	return half ? KVMAIO_INTERRUPTED : KVMAIO_LATER;
}

static int enter(kvmaio_vcpu *vcpu, int half, enum clocks clocks)
{
	return enter_at(vcpu, half, clocks, clock_ns(CLOCK_MONOTONIC));
}

static int is_kicked(kvmaio_vcpu *vcpu)
{
	return atomic_load(&vcpu->kicked) >= vcpu->run_id;
}

static void set_timer(kvmaio_resident *resident, int64_t deadline_ns)
{
	resident->timer_ns = deadline_ns;
	arm_timer(resident->timer, deadline_ns);
}

static int is_past(int64_t deadline_ns)
{
	return clock_ns(CLOCK_MONOTONIC) >= deadline_ns;
}

static int finish(kvmaio_vcpu *vcpu, int outcome)
{
	if (outcome != KVMAIO_LATER) {
		atomic_store(&vcpu->active, 0);
		vcpu->resident_run = 0;
		vcpu->outcome = outcome;
		vcpu->access = access_of(vcpu, outcome);
		atomic_store(&vcpu->ended, vcpu->run_id);
	}
	return outcome;
}

static void grant_budget(kvmaio_resident *resident, kvmaio_vcpu *vcpu, int64_t now_ns)
{
	kvmaio_vcpu *before = resident->granted;
	if (before && resident->hits)
		before->misses = 0;
	else if (before && resident->budget_end_ns)
		before->misses++;
	resident->granted = vcpu;
	resident->hits = 0;
	if (vcpu->misses < MISSES_ALLOWED || ++vcpu->tries % RETRY == 0) {
		resident->budget_end_ns = now_ns + resident->budget_ns;
		set_timer(resident, resident->budget_end_ns + resident->budget_ns / GRACE_SHARE);
	} else {
		resident->budget_end_ns = 0;
	}
}

/* Of a thread that runs a loop, or has done; any other's is 0. */
static _Thread_local pid_t own_tid __attribute__((tls_model("initial-exec")));

/* Blocked, kicks could not end KVM_RUN: nothing could. So whenever others on the loop have run,
 * as a program may have blocked all signals meanwhile. Not after each handler of a burst, where it
 * would cost a system call for each exit: a handler must not leave them blocked. */
static void unblock_kicks(void)
{
	sigset_t kick;
	kick_signal_set(&kick);
	pthread_sigmask(SIG_UNBLOCK, &kick, NULL);
}

/* A loop may be stopped and go on in another thread: kicks and the timer follow it. */
static int follow_thread(kvmaio_resident *resident)
{
	pid_t tid = own_tid = (pid_t)syscall(SYS_gettid);
	timer_t timer;

	unblock_kicks();
	if (tid == atomic_load(&resident->tid))
		return 0;
	int error = create_thread_timer(tid, &timer);
	if (error)
		return error;
	if (atomic_load(&resident->tid))
		timer_delete(resident->timer);
	resident->timer = timer;
	resident->timer_ns = 0;
	resident->budget_end_ns = 0;
	/* Before any look at `kicked`: who still reads the old id has written that already. */
	atomic_store(&resident->tid, tid);
	return 0;
}

int kvmaio_resident_enter(kvmaio_resident *resident, kvmaio_vcpu *vcpu, int64_t limit_ns)
{
	unblock_kicks();
	return kvmaio_resident_go_on(resident, vcpu, limit_ns);
}

int kvmaio_resident_go_on(kvmaio_resident *resident, kvmaio_vcpu *vcpu, int64_t limit_ns)
{
	/* An exception may have kept the caller from waiting for the run before: go on with it. */
	if (!vcpu->resident_run)
		vcpu->run_id++;
	vcpu->executed_ns = 0;
	vcpu->executed_cycles = -1;
	vcpu->inside_ns = vcpu->longest_ns = 0;
	vcpu->limit_ns = limit_ns;
	vcpu->access = -1;
	vcpu->resident_run = 1;
	atomic_store(&vcpu->active, vcpu->run_id);
	STRESS();
	if (limit_ns == 0 || is_kicked(vcpu)) {
		announce(vcpu);
		return finish(vcpu, enter(vcpu, 1, COARSE));
	}
	/* Others that have left their guests are served first. */
	if (!resident->budget_end_ns || limit_ns > 0 || atomic_load(&resident->hub->arrived) ||
	    own_tid != atomic_load(&resident->tid))
		return KVMAIO_LATER;
	announce(vcpu);
	const int64_t now_ns = clock_ns(CLOCK_MONOTONIC);
	if (now_ns >= resident->budget_end_ns) { /* and so before the timer, too */
		withdraw();
		return KVMAIO_LATER;
	}
	int outcome = enter_at(vcpu, is_kicked(vcpu), COARSE, now_ns);
	if (outcome == KVMAIO_EXIT) {
		resident->hits += vcpu == resident->granted;
		resident->inlined++;
	}
	return finish(vcpu, outcome);
}

/* ---- waiting --------------------------------------------------------------------
 *
 * Between the loop's poll and KVM_RUN a descriptor may become ready: only the
 * watcher sees that. A Dekker pair: the loop publishes `current`, then reads
 * `watching`; the watcher takes `watching` back, then reads `current`. So
 *
 *   - either the loop reads WATCHING, and whatever the watcher finds from then on
 *     ends in a kick; `watching`, looked at again behind announce(), covers a kick
 *     that came before `kvmaio_here` was set;
 *   - or the loop reads PARKED: nobody watches. It takes a slice, which the timer
 *     bounds, and goes to poll. Only after a slice without an exit does it arm the
 *     watcher: as long as exits come, no thread is woken on their behalf. The poll
 *     that follows sees what became ready before; the watcher what does later, if
 *     need be before the next wait begins, which then finds PARKED once more: a
 *     slice and a poll, and never a wait for something that has been already.
 *
 * The watcher stays armed while exits come, and a kick may come late, for a wait that
 * is over: it then costs some later entry a look at everything.
 *
 * The timer is left alone if it fires before this wait's end: too early is a look at
 * everything, and setting it costs as much as an exit on some hosts. Hence the look at
 * `timer_ns`, not at the end of this wait, behind announce(): a timer that has fired
 * already will not fire again.
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
		STRESS();
		if (poll(fds, 2, -1) < 0 && errno == EINTR)
			continue;
		STRESS();
		uint32_t watching = WATCHING;
		atomic_compare_exchange_strong(&resident->watching, &watching, PARKED);
		resident->fired++;
		STRESS();
		if (atomic_load(&resident->current)) {
			resident->kicks++;
			STRESS();
			kvmaio_send_kick(atomic_load(&resident->tid));
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

/* Every run enters at least once, or an access would stay pending: the caller counts on it. */
static int time_is_up(kvmaio_vcpu *vcpu)
{
	if (vcpu->inside_ns)
		return KVMAIO_TIMER;
	announce(vcpu);
	int outcome = enter(vcpu, 1, COARSE);
	return outcome == KVMAIO_INTERRUPTED ? KVMAIO_TIMER : outcome;
}

/* One entry, until `deadline_ns` at the latest. */
static int enter_until(kvmaio_resident *resident, kvmaio_vcpu *vcpu, int64_t deadline_ns)
{
	const int may_watch = resident->poll_fd >= 0;
	const int watched = may_watch && atomic_load(&resident->watching) == WATCHING;
	const int64_t limit_ns = vcpu->limit_ns;
	int64_t now_ns = clock_ns(CLOCK_MONOTONIC);
	const int64_t started_ns = now_ns;
	const int64_t slice_end_ns = now_ns + resident->slice_ns;
	int64_t until_ns = deadline_ns;

	if (!watched && slice_end_ns < until_ns)
		until_ns = slice_end_ns;
	if (limit_ns > 0 && now_ns + limit_ns < until_ns)
		until_ns = now_ns + limit_ns;
	if (now_ns >= until_ns)
		return KVMAIO_LATER;
	if (resident->timer_ns <= now_ns || resident->timer_ns > until_ns)
		set_timer(resident, until_ns);
	announce(vcpu);
	if (is_past(resident->timer_ns) || (watched && atomic_load(&resident->watching) != WATCHING)) {
		withdraw();
	} else {
		int outcome = enter(vcpu, is_kicked(vcpu), EXACT);
		if (outcome != KVMAIO_LATER)
			return outcome;
	}
	now_ns = clock_ns(CLOCK_MONOTONIC);
	if (limit_ns > 0) {
		vcpu->limit_ns -= now_ns - started_ns;
		if (vcpu->limit_ns <= 0) {
			if (vcpu->longest_ns >= vcpu->entry_ns)
				return time_is_up(vcpu);
			/* In pieces too small to get into the guest: a run makes progress. */
			vcpu->limit_ns = 2 * vcpu->entry_ns;
		}
	}
	/* A whole slice without an exit, and time left: from now on somebody watches. */
	if (may_watch && !watched && now_ns >= slice_end_ns && slice_end_ns < deadline_ns) {
		resident->slices++;
		arm_watcher(resident);
	}
	return KVMAIO_LATER;
}

int kvmaio_resident_wait(kvmaio_resident *resident, kvmaio_vcpu *vcpu, int64_t deadline_ns)
{
	/* The run is over, but an exception kept the caller from taking note. */
	if (!vcpu->resident_run)
		return vcpu->outcome;
	int outcome = follow_thread(resident);
	if (outcome)
		return finish(vcpu, outcome);
	resident->waits++;
	atomic_store(&resident->current, vcpu);
	STRESS();
	outcome = enter_until(resident, vcpu, deadline_ns);
	atomic_store(&resident->current, NULL);
	/* A budget that was under way has lost its timer to this wait. */
	if (outcome == KVMAIO_EXIT)
		grant_budget(resident, vcpu, clock_ns(CLOCK_MONOTONIC));
	else
		resident->budget_end_ns = 0;
	return finish(vcpu, outcome);
}

int kvmaio_resident_half_entry(kvmaio_vcpu *vcpu)
{
	/* Without a run id of its own: a kick beforehand is for the run behind it. */
	vcpu->executed_ns = 0;
	vcpu->executed_cycles = -1;
	announce(vcpu);
	const int outcome = enter(vcpu, 1, COARSE);
	vcpu->access = access_of(vcpu, outcome);
	return outcome;
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
	resident->poll_fd = poll_fd;
	resident->budget_ns = budget_ns;
	resident->slice_ns = slice_ns;
	int error = follow_thread(resident);
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
		if (vcpu->resident && vcpu->resident->granted == vcpu)
			vcpu->resident->granted = NULL;
		vcpu->resident_run = 0;
		vcpu->resident = NULL;
		if (goes_on)
			kvmaio_vcpu_resume(vcpu);
	}
	return error;
}
