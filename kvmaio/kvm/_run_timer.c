#define _GNU_SOURCE
#include "_internal.h"

#include <linux/perf_event.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#define MOST_ROUNDS 64

static uint64_t counted(const kvmaio_run_timer *timer)
{
	uint64_t count;
	/* A counter that lost its place reads as nothing: then only the deadline counts. */
	if (read(timer->counter_fd, &count, sizeof count) != sizeof count)
		return UINT64_MAX;
	return count;
}

static int start_counter(kvmaio_run_timer *timer, uint64_t events)
{
	if (!events)
		events = 1;
	if (ioctl(timer->counter_fd, PERF_EVENT_IOC_PERIOD, &events) < 0)
		return -errno;
	/* REFRESH adds to what is allowed already. */
	int error = timer->overflow_left ? ioctl(timer->counter_fd, PERF_EVENT_IOC_ENABLE, 0)
					 : ioctl(timer->counter_fd, PERF_EVENT_IOC_REFRESH, 1);
	timer->overflow_left = 1;
	return error < 0 ? -errno : 0;
}

int kvmaio_run_timer_arm(kvmaio_run_timer *timer, int64_t limit_ns)
{
	if (timer->counter_fd < 0 && !timer->has_posix) {
		int error = create_thread_timer((pid_t)syscall(SYS_gettid), &timer->posix);
		if (error)
			return error;
		timer->has_posix = 1;
	}
	timer->deadline_ns = clock_ns(CLOCK_MONOTONIC) + limit_ns;
	if (timer->counter_fd < 0) {
		arm_timer(timer->posix, timer->deadline_ns);
		return 0;
	}
	uint64_t events = (unsigned __int128)limit_ns * timer->counter_khz / 1000000;
	uint64_t now = counted(timer);
	timer->end_count = now > UINT64_MAX - events ? 0 : now + events;
	return start_counter(timer, events);
}

int kvmaio_run_timer_expired(kvmaio_run_timer *timer)
{
	int64_t left_ns = timer->deadline_ns - clock_ns(CLOCK_MONOTONIC);
	if (timer->counter_fd < 0)
		return left_ns <= 0;
	uint64_t now = counted(timer), left = now < timer->end_count ? timer->end_count - now : 0;
	if (!left && left_ns <= 0)
		return 1;
	if (!left) {
		/* It counts faster than was thought. */
		left = (unsigned __int128)left_ns * timer->counter_khz / 1000000;
		timer->overflow_left = 0;
	}
	ioctl(timer->counter_fd, PERF_EVENT_IOC_DISABLE, 0);
	start_counter(timer, left);
	return 0;
}

void kvmaio_run_timer_disarm(kvmaio_run_timer *timer)
{
	if (timer->counter_fd < 0) {
		if (timer->has_posix)
			disarm_timer(timer->posix);
		return;
	}
	ioctl(timer->counter_fd, PERF_EVENT_IOC_DISABLE, 0);
	/* Where this is wrong by a hair, the next run has a signal too many. */
	if (counted(timer) >= timer->end_count)
		timer->overflow_left = 0;
}

void kvmaio_run_timer_close(kvmaio_run_timer *timer)
{
	if (timer->has_posix)
		timer_delete(timer->posix);
	timer->has_posix = 0;
}

static int by_value(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
	return (x > y) - (x < y);
}

/* A counter of the thread's own time stands still in a wait: so this spins. */
static int64_t one_round(kvmaio_run_timer *timer, const sigset_t *kick)
{
	const struct timespec at_once = { 0 };
	int64_t start_ns = clock_ns(CLOCK_MONOTONIC);
	int error = kvmaio_run_timer_arm(timer, 1);
	while (!error && sigtimedwait(kick, NULL, &at_once) < 0)
		if (clock_ns(CLOCK_MONOTONIC) - start_ns > NS_PER_S)
			error = -ETIMEDOUT;
	int64_t took_ns = clock_ns(CLOCK_MONOTONIC) - start_ns;
	kvmaio_run_timer_disarm(timer);
	return error ? error : took_ns;
}

int64_t kvmaio_run_timer_resolution(kvmaio_run_timer *timer, int rounds)
{
	const struct timespec at_once = { 0 };
	int64_t took[MOST_ROUNDS], error = 0;
	sigset_t kick, before;

	if (rounds < 1 || rounds > MOST_ROUNDS)
		return -EINVAL;
	kick_signal_set(&kick);
	pthread_sigmask(SIG_BLOCK, &kick, &before);
	for (int i = 0; i < rounds && !error; i++)
		if ((took[i] = one_round(timer, &kick)) < 0)
			error = took[i];
	while (sigtimedwait(&kick, NULL, &at_once) > 0)
		;
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (error)
		return error;
	qsort(took, rounds, sizeof *took, by_value);
	return took[rounds / 2];
}
