#define _GNU_SOURCE
#include "_notes.h"
#include "_internal.h"

#include <string.h>

static char *put(char *to, const char *text, size_t length)
{
	memcpy(to, text, length);
	return to + length;
}

#define PUT(to, text) put(to, text, sizeof(text) - 1)

static char *put_number(char *to, uint64_t value, unsigned base)
{
	char digits[24];
	int count = 0;
	do
		digits[count++] = "0123456789abcdef"[value % base];
	while (value /= base);
	while (count)
		*to++ = digits[--count];
	return to;
}

/* Nanoseconds as microseconds, which the format wants, and exactly. */
static char *put_time(char *to, int64_t ns)
{
	if (ns < 0)
		*to++ = '-';
	to = put_number(to, ns < 0 ? -(uint64_t)ns : (uint64_t)ns, 10);
	return PUT(to, "e-3");
}

static char *put_times(char *to, int64_t ts_ns, int64_t dur_ns)
{
	to = put_time(PUT(to, "\"ts\":"), ts_ns);
	to = put_time(PUT(to, ",\"dur\":"), dur_ns);
	return PUT(to, "}");
}

int kvmaio_note(kvmaio_notes *notes, const kvmaio_note_kind *kind, uint64_t value, int64_t left_ns,
		int64_t executed_ns)
{
	const int64_t now_ns = clock_ns(CLOCK_MONOTONIC);
	char *to = notes->text + notes->used;

	if (notes->room - notes->used < notes->longest)
		return -1;
	left_ns += notes->offset_ns;
	if (notes->used)
		to = PUT(to, ",\n");
	if (executed_ns >= 0) {
		/* Executed time is measured by another clock than time: events must not overlap. */
		int64_t begun_ns = left_ns - (int64_t)((double)executed_ns * kind->factor);
		if (begun_ns < *kind->left_ns)
			begun_ns = *kind->left_ns < left_ns ? *kind->left_ns : left_ns;
		*kind->left_ns = left_ns;
		to = put(to, kind->exit, kind->exit_length);
		to = PUT(put_times(to, begun_ns - notes->began_ns, left_ns - begun_ns), ",\n");
	}
	to = put(to, kind->access, kind->access_length);
	to = PUT(put_number(PUT(to, "\"0x"), value, 16), "\"},");
	to = put_times(to, left_ns - notes->began_ns, now_ns + notes->offset_ns - left_ns);
	notes->used = (size_t)(to - notes->text);
	return notes->room - notes->used < notes->longest || now_ns >= notes->due_ns;
}

int kvmaio_note_access(kvmaio_notes *notes, const kvmaio_note_kind *kind, kvmaio_vcpu *vcpu)
{
	const struct kvm_run *page = vcpu->page;
	const int is_pio = vcpu->access & 1, size = vcpu->access >> 2 & 15;
	const int64_t executed_ns = vcpu->exit_untold ? vcpu->executed_ns : -1;
	uint64_t value = 0;
	memcpy(&value, is_pio ? (const uint8_t *)page + KVMAIO_PIO_DATA : page->mmio.data,
	       size > 8 ? 8 : size);
	return kvmaio_note(notes, kind, value, vcpu->left_ns, executed_ns);
}
