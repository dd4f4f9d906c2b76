#define _GNU_SOURCE
#include "_internal.h"

#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define EXITS 200
#define MOVES 2

struct victim {
	int vm, vcpu;
	struct kvm_run *page;
	uint8_t *memory;
	size_t page_size;
};

static void tear_down(struct victim *v)
{
	if (v->page != MAP_FAILED)
		munmap(v->page, v->page_size);
	if (v->vcpu >= 0)
		close(v->vcpu);
	if (v->vm >= 0)
		close(v->vm);
	if (v->memory != MAP_FAILED)
		munmap(v->memory, 4096);
}

/* A real-mode guest that does nothing but OUT: "out 0x10, al; jmp $-2". */
static int set_up(struct victim *v, int kvm_fd)
{
	static const uint8_t code[] = { 0xe6, 0x10, 0xeb, 0xfc };
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rip = 0, .rflags = 2 };
	struct kvm_userspace_memory_region region = { .memory_size = 4096 };

	v->memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (v->memory == MAP_FAILED)
		return -errno;
	memcpy(v->memory, code, sizeof code);
	region.userspace_addr = (uintptr_t)v->memory;
	if ((v->vm = ioctl(kvm_fd, KVM_CREATE_VM, 0)) < 0)
		return -errno;
	ioctl(v->vm, KVM_SET_TSS_ADDR, 0xfffbd000); /* kvm_intel asks for it, others ignore it */
	if (ioctl(v->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		return -errno;
	if ((v->vcpu = ioctl(v->vm, KVM_CREATE_VCPU, 0)) < 0)
		return -errno;
	v->page = mmap(NULL, v->page_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->vcpu, 0);
	if (v->page == MAP_FAILED)
		return -errno;
	if (ioctl(v->vcpu, KVM_GET_SREGS, &sregs) < 0)
		return -errno;
	sregs.cs.base = sregs.cs.selector = 0;
	if (ioctl(v->vcpu, KVM_SET_SREGS, &sregs) < 0 || ioctl(v->vcpu, KVM_SET_REGS, &regs) < 0)
		return -errno;
	return 0;
}

/* The shortest KVM_RUN of `count`, in nanoseconds: the others were disturbed. */
static int64_t shortest_exit(struct victim *v, int count)
{
	int64_t best = INT64_MAX;
	for (int i = 0; i < count; i++) {
		int64_t before;
		int error;
		do {
			before = clock_ns(CLOCK_MONOTONIC);
			error = ioctl(v->vcpu, KVM_RUN, 0) < 0 ? errno : 0;
		} while (error == EINTR); /* unrequested, as happens: signals are blocked */
		if (error)
			return -error;
		int64_t took = clock_ns(CLOCK_MONOTONIC) - before;
		if (took < best)
			best = took;
	}
	return best;
}

struct visit {
	struct victim *victim;
	int64_t first_ns;
};

static void *visit(void *argument)
{
	struct visit *visit = argument;
	visit->first_ns = shortest_exit(visit->victim, 1);
	return NULL;
}

int kvmaio_measure(int kvm_fd, size_t page_size, int64_t *exit_ns, int64_t *move_ns)
{
	struct victim v = { .vm = -1, .vcpu = -1, .page = MAP_FAILED, .page_size = page_size };
	sigset_t all, before;
	/* A signal would end KVM_RUN without an exit, and KVM_CREATE_VM with EINTR. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int error = set_up(&v, kvm_fd);
	int64_t exit = error ? 0 : shortest_exit(&v, EXITS);
	int64_t move = INT64_MAX;

	if (!error && exit < 0)
		error = (int)exit;
	for (int i = 0; i < MOVES && !error; i++) {
		struct visit there = { &v, 0 };
		pthread_t thread;
		error = -pthread_create(&thread, NULL, visit, &there);
		if (error)
			break;
		pthread_join(thread, NULL);
		int64_t back = shortest_exit(&v, 1);
		int64_t cheapest = there.first_ns < back ? there.first_ns : back;
		if (cheapest < 0)
			error = (int)cheapest;
		else if (cheapest < move)
			move = cheapest;
	}
	tear_down(&v);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (error)
		return error;
	*exit_ns = exit;
	*move_ns = move > exit ? move - exit : 0;
	return 0;
}

int64_t kvmaio_raw_loop(kvmaio_vcpu *vcpu, int exits)
{
	int64_t before = clock_ns(CLOCK_MONOTONIC);
	while (exits > 0) {
		if (!ioctl(vcpu->fd, KVM_RUN, 0))
			exits--;
		else if (errno != EINTR)
			return -errno;
	}
	return clock_ns(CLOCK_MONOTONIC) - before;
}
