/* Performance counters and the run timer's figures; `counters.py` and `run_timer.py` use them. */
#ifndef KVMAIO_COUNTERS_H
#define KVMAIO_COUNTERS_H

#include <linux/perf_event.h>
#include <stdint.h>

/* perf_event_open(2) for one thread (0: the calling one) on any processor; close-on-exec.
 * `attributes` is a perf_event_attr that states its own size; group_fd -1: no group.
 * The descriptor, or -errno. Any thread. */
int kvmaio_perf_open(const void *attributes, int tid, int group_fd);

/* The shortest run that the POSIX timer can time, from arming it to the signal's being taken
 * on this thread: the median of `rounds`. Nanoseconds, or -errno. The kick signal is blocked
 * meanwhile and none is left pending. Takes about 60 us a round. Any thread. */
int64_t kvmaio_timer_resolution(int rounds);

#endif
