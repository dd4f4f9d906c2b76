/* A vCPU's registers as KVM gives them, for another CPU model in this process; `raw.py` uses them.
 * Conventions as in _native.h. */
#ifndef KVMAIO_RAW_H
#define KVMAIO_RAW_H

#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>

typedef struct kvmaio_raw {
	int fd;
	unsigned long get_xsave; /* KVM_GET_XSAVE or KVM_GET_XSAVE2 */
	size_t xsave_size;
	struct kvm_regs regs;
	struct kvm_sregs sregs, sregs_before;
	uint8_t *xsave, *xsave_before; /* of that size */
	const char *operation;         /* the one that failed */
} kvmaio_raw;

/* Have them as they are now; the guest must not be running, no access pending. */
int kvmaio_raw_fetch(kvmaio_raw *raw);
/* Give KVM what has changed since; the general registers in any case. */
int kvmaio_raw_put_back(kvmaio_raw *raw);

#endif
