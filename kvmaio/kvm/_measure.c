#define _GNU_SOURCE
#include "_internal.h"

#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define EXITS 200
#define MOVES 2
#define TRIALS 9
#define FIRST_TRIAL_NS 2000
#define LONGEST_TRIAL_NS 20000000
#define MEMORY_SIZE (7 * 4096)

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
		munmap(v->memory, MEMORY_SIZE);
}

/* A VM with the guest `code` at address 0, and a vCPU. */
static int set_up(struct victim *v, int kvm_fd, const uint8_t *code, size_t code_size)
{
	struct kvm_userspace_memory_region region = { .memory_size = MEMORY_SIZE };

	v->memory = mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			 -1, 0);
	if (v->memory == MAP_FAILED)
		return -errno;
	memcpy(v->memory, code, code_size);
	region.userspace_addr = (uintptr_t)v->memory;
	if ((v->vm = ioctl(kvm_fd, KVM_CREATE_VM, 0)) < 0)
		return -errno;
	ioctl(v->vm, KVM_SET_TSS_ADDR, 0xfffbd000); /* kvm_intel asks for it, others ignore it */
	if (ioctl(v->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		return -errno;
	if ((v->vcpu = ioctl(v->vm, KVM_CREATE_VCPU, 0)) < 0)
		return -errno;
	v->page = mmap(NULL, v->page_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->vcpu, 0);
	return v->page == MAP_FAILED ? -errno : 0;
}

static int set_registers(struct victim *v, struct kvm_sregs *sregs)
{
	struct kvm_regs regs = { .rip = 0, .rflags = 2 };
	if (ioctl(v->vcpu, KVM_SET_SREGS, sregs) < 0 || ioctl(v->vcpu, KVM_SET_REGS, &regs) < 0)
		return -errno;
	return 0;
}

/* A real-mode guest that does nothing but OUT: "out 0x10, al; jmp $-2". */
static int set_up_exits(struct victim *v, int kvm_fd)
{
	static const uint8_t code[] = { 0xe6, 0x10, 0xeb, 0xfc };
	struct kvm_sregs sregs;
	int error = set_up(v, kvm_fd, code, sizeof code);
	if (error)
		return error;
	if (ioctl(v->vcpu, KVM_GET_SREGS, &sregs) < 0)
		return -errno;
	sregs.cs.base = sregs.cs.selector = 0;
	return set_registers(v, &sregs);
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
	int error = set_up_exits(&v, kvm_fd);
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

/* ---- getting into the guest ------------------------------------------------------ */

enum { COUNTER = 0x1000, TABLES = 0x2000, TASK = 0x5000 };

/* A guest of 64-bit user code, which is the dearest to enter on hosts that run it natively
 * and interpret the rest; it counts: "inc qword ptr [0x1000]; jmp $-8". */
static int set_up_counting(struct victim *v, int kvm_fd)
{
	static const uint8_t code[] = { 0x48, 0xff, 0x04, 0x25, 0, COUNTER >> 8, 0, 0, 0xeb, 0xf6 };
	enum { PRESENT_WRITE_USER = 7, LARGE = 0x80 };
	struct kvm_segment cs = { .selector = 0x2b, .type = 0xb, .s = 1, .dpl = 3, .l = 1,
				  .present = 1, .g = 1, .limit = ~0u };
	struct kvm_segment data = { .selector = 0x23, .type = 3, .s = 1, .dpl = 3, .db = 1,
				    .present = 1, .g = 1, .limit = ~0u };
	struct kvm_segment task = { .selector = 0x38, .type = 0xb, .present = 1, .base = TASK,
				    .limit = 0x67 };
	struct kvm_sregs sregs;
	int error = set_up(v, kvm_fd, code, sizeof code);
	if (error)
		return error;
	uint64_t *tables = (uint64_t *)(v->memory + TABLES);
	tables[0] = (TABLES + 0x1000) | PRESENT_WRITE_USER;
	tables[512] = (TABLES + 0x2000) | PRESENT_WRITE_USER;
	tables[1024] = PRESENT_WRITE_USER | LARGE;
	if (ioctl(v->vcpu, KVM_GET_SREGS, &sregs) < 0)
		return -errno;
	sregs.cs = cs;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.tr = task;
	sregs.cr0 = 0x80010033;
	sregs.cr3 = TABLES;
	sregs.cr4 = 0x620;
	sregs.efer = 0x500;
	return set_registers(v, &sregs);
}

/* One run of `limit_ns`: how long its last KVM_RUN took, 0 if the guest got nowhere; -errno. */
static int64_t trial(struct victim *v, kvmaio_run_timer *timer, int64_t limit_ns)
{
	const volatile uint64_t *counter = (const uint64_t *)(v->memory + COUNTER);
	const uint64_t before = *counter;
	int64_t took_ns;
	int error = -kvmaio_run_timer_arm(timer, limit_ns);
	while (!error) {
		int64_t started_ns = clock_ns(CLOCK_MONOTONIC);
		int failed = ioctl(v->vcpu, KVM_RUN, 0) < 0;
		took_ns = clock_ns(CLOCK_MONOTONIC) - started_ns;
		if (!failed || errno != EINTR) {
			error = failed ? errno : EPROTO; /* this guest has no reason to exit */
			break;
		}
		kvmaio_discard_kicks();
		if (kvmaio_run_timer_expired(timer))
			break;
	}
	kvmaio_run_timer_disarm(timer);
	kvmaio_discard_kicks();
	if (error)
		return -error;
	return *counter == before ? 0 : took_ns;
}

int64_t kvmaio_measure_entry(int kvm_fd, size_t page_size)
{
	struct victim v = { .vm = -1, .vcpu = -1, .page = MAP_FAILED, .page_size = page_size };
	kvmaio_run_timer timer = { .counter_fd = -1 };
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int64_t result = set_up_counting(&v, kvm_fd);
	if (!result)
		result = kvmaio_set_signal_mask(v.vcpu);
	/* Once for KVM's own page tables. */
	int64_t limit_ns = LONGEST_TRIAL_NS / 64;
	while (!result && (limit_ns *= 2) <= LONGEST_TRIAL_NS)
		result = trial(&v, &timer, limit_ns);
	if (!result)
		result = -ETIMEDOUT;
	limit_ns = FIRST_TRIAL_NS;
	for (int trials = 0; result > 0 && trials < TRIALS;) {
		int64_t took_ns = trial(&v, &timer, limit_ns);
		if (took_ns < 0) {
			result = took_ns;
		} else if (took_ns) {
			result = !trials || took_ns < result ? took_ns : result;
			trials++;
		} else {
			trials = 0;
			limit_ns += limit_ns / 4;
			if (limit_ns > LONGEST_TRIAL_NS)
				result = -ETIMEDOUT;
		}
	}
	kvmaio_run_timer_close(&timer);
	tear_down(&v);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return result;
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
