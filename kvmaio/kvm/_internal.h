/* What the C core's files share among themselves. */
#ifndef KVMAIO_INTERNAL_H
#define KVMAIO_INTERNAL_H

#include "_native.h"

#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* glibc keeps the first real-time signals for itself; SIGRTMIN is the first free one. */
#define KICK_SIGNAL SIGRTMIN
#define NS_PER_S 1000000000ll

/* The vCPU that this thread, a loop's, is about to enter or is in. */
extern _Thread_local kvmaio_vcpu *volatile kvmaio_here __attribute__((tls_model("initial-exec")));

void kvmaio_send_kick(pid_t tid);
void kvmaio_discard_kicks(void); /* pending ones, where the signal is blocked */
int kvmaio_set_signal_mask(int vcpu_fd);
/* As kvmaio_resident_enter(), where only a handler of this vCPU's has run meanwhile. */
int kvmaio_resident_go_on(kvmaio_resident *resident, kvmaio_vcpu *vcpu, int64_t limit_ns);
void kvmaio_vcpu_resume(kvmaio_vcpu *vcpu); /* continue the present run on the native thread */

/* See `access` of kvmaio_vcpu. */
static inline int64_t access_of(const kvmaio_vcpu *vcpu, int outcome)
{
	const struct kvm_run *page = vcpu->page;
	uint64_t address;
	uint32_t size;
	int is_write, is_pio = page->exit_reason == KVM_EXIT_IO;
	if (outcome != KVMAIO_EXIT || (vcpu->fast && kvmaio_fast_waiting(vcpu->fast)))
		return -1;
	if (is_pio && page->io.count == 1 && page->io.data_offset == KVMAIO_PIO_DATA) {
		address = page->io.port;
		size = page->io.size;
		is_write = page->io.direction == KVM_EXIT_IO_OUT;
	} else if (page->exit_reason == KVM_EXIT_MMIO && !(page->mmio.phys_addr >> 52)) {
		address = page->mmio.phys_addr;
		size = page->mmio.len;
		is_write = page->mmio.is_write;
	} else {
		return -1;
	}
	if (size & (size - 1) || size > 8)
		return -1;
	return (int64_t)(address << 6 | size << 2 | (is_write ? 2 : 0) | is_pio);
}

static inline int64_t clock_ns(clockid_t clock)
{
	struct timespec now;
	clock_gettime(clock, &now);
	return now.tv_sec * NS_PER_S + now.tv_nsec;
}

static inline struct timespec timespec_of(int64_t ns)
{
	return (struct timespec){ .tv_sec = ns / NS_PER_S, .tv_nsec = ns % NS_PER_S };
}

static inline void kick_signal_set(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, KICK_SIGNAL);
}

static inline void futex_wait(_Atomic uint32_t *word, uint32_t expected,
			      const struct timespec *timeout)
{
	syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, timeout, NULL, 0);
}

static inline void futex_wake(_Atomic uint32_t *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static inline int create_thread_timer(pid_t tid, timer_t *timer)
{
	struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = KICK_SIGNAL };
#ifdef sigev_notify_thread_id
	event.sigev_notify_thread_id = tid;
#else
	event._sigev_un._tid = tid;
#endif
	return timer_create(CLOCK_MONOTONIC, &event, timer) < 0 ? -errno : 0;
}

static inline void arm_timer(timer_t timer, int64_t deadline_ns)
{
	/* An absolute zero would disarm; a past deadline fires at once. */
	struct itimerspec at = { .it_value = timespec_of(deadline_ns > 0 ? deadline_ns : 1) };
	timer_settime(timer, TIMER_ABSTIME, &at, NULL);
}

static inline void disarm_timer(timer_t timer)
{
	const struct itimerspec never = { 0 };
	timer_settime(timer, 0, &never, NULL);
}

#endif
