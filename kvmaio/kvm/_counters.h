/* Performance counters; `counters.py` uses them. */
#ifndef KVMAIO_COUNTERS_H
#define KVMAIO_COUNTERS_H

#include <linux/perf_event.h>
#include <stdint.h>

/* perf_event_open(2) for one thread (0: the calling one) on any processor; close-on-exec.
 * `attributes` is a perf_event_attr that states its own size; group_fd -1: no group.
 * The descriptor, or -errno. Any thread. */
int kvmaio_perf_open(const void *attributes, int tid, int group_fd);

#endif
