#include "_raw.h"
#include "_native.h"

#include <string.h>

static int told(kvmaio_raw *raw, const char *operation, unsigned long request, void *argument)
{
	raw->operation = operation;
	return kvmaio_ioctl(raw->fd, request, argument);
}

int kvmaio_raw_fetch(kvmaio_raw *raw)
{
	int error = told(raw, "KVM_GET_REGS", KVM_GET_REGS, &raw->regs);
	if (error >= 0)
		error = told(raw, "KVM_GET_SREGS", KVM_GET_SREGS, &raw->sregs);
	if (error >= 0)
		error = told(raw, "KVM_GET_XSAVE", raw->get_xsave, raw->xsave);
	raw->sregs_before = raw->sregs;
	memcpy(raw->xsave_before, raw->xsave, raw->xsave_size);
	return error;
}

int kvmaio_raw_put_back(kvmaio_raw *raw)
{
	int error = 0;
	if (memcmp(&raw->sregs, &raw->sregs_before, sizeof raw->sregs))
		error = told(raw, "KVM_SET_SREGS", KVM_SET_SREGS, &raw->sregs);
	if (error >= 0 && memcmp(raw->xsave, raw->xsave_before, raw->xsave_size))
		error = told(raw, "KVM_SET_XSAVE", KVM_SET_XSAVE, raw->xsave);
	if (error >= 0)
		error = told(raw, "KVM_SET_REGS", KVM_SET_REGS, &raw->regs);
	return error;
}
