/* A trace's notes of exits and accesses, as text: what it costs to trace a storm. */
#ifndef KVMAIO_NOTES_H
#define KVMAIO_NOTES_H

#include "_native.h"

#include <stddef.h>

#define KVMAIO_NOTE_NUMBERS 256 /* bytes: of all numbers of a note and what stands between */

/* Text that is written later. */
typedef struct kvmaio_notes {
	char *text;
	size_t used, room, longest; /* bytes; the longest note of any kind */
	int64_t offset_ns; /* of guest time from CLOCK_MONOTONIC */
	int64_t began_ns;  /* guest time: what is told is since then */
	int64_t due_ns;	  /* CLOCK_MONOTONIC: a note after this is to be written */
} kvmaio_notes;

/* What is the same in all notes of one kind: JSON objects up to their last argument. */
typedef struct kvmaio_note_kind {
	const char *exit, *access;
	size_t exit_length, access_length;
	int64_t *left_ns; /* when this vCPU left its guest before */
	double factor;	  /* guest time for executed host time */
} kvmaio_note_kind;

/* Append what a vCPU executed until `left_ns` (executed_ns < 0: that is told already), and its
 * access, answered just now. Times are the host's (CLOCK_MONOTONIC).
 * 1: it is time to write, as there may be no room for another one, or this one is late.
 * -1: there was no room, since nobody has written then: once written, note it again. */
int kvmaio_note(kvmaio_notes *notes, const kvmaio_note_kind *kind, uint64_t value, int64_t left_ns,
		int64_t executed_ns);

/* The same for the access that the vCPU's run page holds, with its data. */
int kvmaio_note_access(kvmaio_notes *notes, const kvmaio_note_kind *kind, kvmaio_vcpu *vcpu);

#endif
