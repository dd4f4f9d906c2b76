#define _GNU_SOURCE
#include "_internal.h"
#include "_notes.h"

/* Between two accesses of a burst Python does nothing but answer. What is looked at there as well
 * is looked at here: a hundred instructions of C cost less than two of Python's, whose jumps no
 * processor foresees right after an exit. */

/* The access that the run page holds has been answered: may the guest be entered? */
static int is_held(kvmaio_vcpu *vcpu)
{
	kvmaio_burst *burst = &vcpu->burst;
	burst->held = KVMAIO_NOT_HELD;
	if (burst->kind && !burst->noted) {
		const int full = kvmaio_note_access(burst->notes, burst->kind, vcpu);
		burst->noted = full >= 0;
		if (full)
			burst->held = KVMAIO_HELD_TO_WRITE;
	}
	if (!burst->held && burst->disturbed)
		burst->held = KVMAIO_HELD;
	if (!burst->held)
		burst->noted = 0;
	return burst->held;
}

int kvmaio_resident_again(kvmaio_vcpu *vcpu)
{
	kvmaio_burst *burst = &vcpu->burst;
	const int64_t before = vcpu->access;
	if (is_held(vcpu))
		return -1;
	kvmaio_resident *resident = atomic_load(&vcpu->resident);
	burst->end = burst->entered ? kvmaio_resident_go_on(resident, vcpu, -1) :
				      kvmaio_resident_enter(resident, vcpu, -1);
	burst->entered = 1;
	if (burst->end != KVMAIO_EXIT || vcpu->access < 0)
		return -1;
	burst->executed_ns += vcpu->executed_ns;
	*(vcpu->access & 1 ? &burst->io : &burst->mmio) += 1;
	vcpu->exit_untold = 1;
	return vcpu->access == before ? 0 : -1;
}

int kvmaio_vcpu_again(kvmaio_vcpu *vcpu)
{
	if (!is_held(vcpu))
		vcpu->access = -1;
	return -1;
}
