#define _GNU_SOURCE
#include "_internal.h"

#include "_counters.h"

int kvmaio_perf_open(const void *attributes, int tid, int group_fd)
{
	long fd = syscall(SYS_perf_event_open, attributes, tid, -1, group_fd, PERF_FLAG_FD_CLOEXEC);
	return fd < 0 ? -errno : (int)fd;
}
