#define _GNU_SOURCE
#include "_internal.h"

#include "_counters.h"

#include <stdlib.h>

#define MOST_ROUNDS 64

int kvmaio_perf_open(const void *attributes, int tid, int group_fd)
{
	long fd = syscall(SYS_perf_event_open, attributes, tid, -1, group_fd, PERF_FLAG_FD_CLOEXEC);
	return fd < 0 ? -errno : (int)fd;
}

static int by_value(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
	return (x > y) - (x < y);
}

int64_t kvmaio_timer_resolution(int rounds)
{
	const struct timespec patience = { .tv_sec = 1 };
	int64_t took[MOST_ROUNDS], error = 0;
	sigset_t kick, before;
	timer_t timer;

	if (rounds < 1 || rounds > MOST_ROUNDS)
		return -EINVAL;
	error = create_thread_timer((pid_t)syscall(SYS_gettid), &timer);
	if (error)
		return error;
	kick_signal_set(&kick);
	pthread_sigmask(SIG_BLOCK, &kick, &before);
	for (int i = 0; i < rounds && !error; i++) {
		int64_t start_ns = clock_ns(CLOCK_MONOTONIC);
		arm_timer(timer, start_ns + 1000);
		if (sigtimedwait(&kick, NULL, &patience) < 0)
			error = -errno;
		took[i] = clock_ns(CLOCK_MONOTONIC) - start_ns;
	}
	timer_delete(timer);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (error)
		return error;
	qsort(took, rounds, sizeof *took, by_value);
	return took[rounds / 2];
}
