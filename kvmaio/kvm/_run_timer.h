/* The run timer: ends a run after a given time by the kick signal to the running thread. */
#ifndef KVMAIO_RUN_TIMER_H
#define KVMAIO_RUN_TIMER_H

#include <stdint.h>
#include <time.h>

/* Zeroed with counter_fd = -1 it is the POSIX timer, created when first armed. With
 * counter_fd, of a counter that signals the same thread, it is that counter's overflow. */
typedef struct kvmaio_run_timer {
	int counter_fd;        /* the owner's, who closes it; or -1 */
	uint64_t counter_khz;  /* its events per millisecond of the limit */
	int64_t deadline_ns;   /* CLOCK_MONOTONIC: never before */
	uint64_t end_count;    /* the counter's: never before */
	int overflow_left;     /* one that was allowed has not come yet */
	int has_posix;
	timer_t posix;
} kvmaio_run_timer;

/* All: on the thread that runs, whose signals these are, and not from elsewhere. */

/* Signal once, `limit_ns` (above 0) from now at the earliest. 0 or -errno. */
int kvmaio_run_timer_arm(kvmaio_run_timer *timer, int64_t limit_ns);

/* Has the time passed? If not, a signal that came all the same was early, and the rest
 * is armed anew where it would not come by itself. */
int kvmaio_run_timer_expired(kvmaio_run_timer *timer);

/* No signal is sent afterwards; one that was sent may be pending. */
void kvmaio_run_timer_disarm(kvmaio_run_timer *timer);

/* Give back the POSIX timer, if there is one. */
void kvmaio_run_timer_close(kvmaio_run_timer *timer);

/* From arming for 1 ns to the signal's being taken: the median of `rounds` (1 to 64), on the
 * calling thread, or -errno. The kick signal is blocked meanwhile, and none is left. */
int64_t kvmaio_run_timer_resolution(kvmaio_run_timer *timer, int rounds);

#endif
