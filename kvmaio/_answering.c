/* The innermost loop of a burst: a handler answers, the guest is entered again, and the same
 * access comes back (`kvmaio/vcpu/burst.py`).
 *
 * It is in C as right after an exit no jump is foreseen, and each of the interpreter's steps is
 * one. A coroutine is driven here as far as it gets at once, which is to its end unless it really
 * waits; what waits goes back to Python.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <stdint.h>
#include <string.h>

static PyObject *coroutine_type, *a_number;

enum flags { IS_CLOSED, IS_ANSWERED, FLAGS };

typedef struct kvmaio_access {
	PyObject *handler, *offset, *size; /* borrowed, as all here */
	PyObject *failed;                  /* called with an exception and the word written, or None */
	char *flags;                       /* see `answer` */
	uint8_t *data;                     /* the access's word in the run page */
	size_t bytes;
	int is_write;
} kvmaio_access;

/* A handler has raised: `failed` is told, and may raise what tells better. */
static int tell(const kvmaio_access *access, PyObject *word)
{
	PyObject *type, *error, *traceback;
	PyErr_Fetch(&type, &error, &traceback);
	PyErr_NormalizeException(&type, &error, &traceback);
	if (traceback)
		PyException_SetTraceback(error, traceback);
	PyObject *told =
		PyObject_CallFunctionObjArgs(access->failed, error, word ? word : Py_None, NULL);
	if (told) {
		Py_DECREF(told);
		PyErr_Restore(type, error, traceback);
		return -1;
	}
	/* As within an `except`. */
	PyObject *better_type, *better, *better_traceback;
	PyErr_Fetch(&better_type, &better, &better_traceback);
	PyErr_NormalizeException(&better_type, &better, &better_traceback);
	PyObject *context = PyException_GetContext(better);
	if (context || better == error)
		Py_XDECREF(error);
	else
		PyException_SetContext(better, error); /* which it keeps */
	Py_XDECREF(context);
	Py_XDECREF(type);
	Py_XDECREF(traceback);
	PyErr_Restore(better_type, better, better_traceback);
	return -1;
}

/* What a handler of reads gave goes into the run page. */
static int store(const kvmaio_access *access, PyObject *value)
{
	if (!PyLong_Check(value)) { /* raises, unless it passes for one */
		PyObject *number = PyObject_CallFunctionObjArgs(a_number, value, NULL);
		if (!number)
			return -1;
		Py_DECREF(number);
	}
	const uint64_t word = PyLong_AsUnsignedLongLongMask(value);
	if (word == UINT64_MAX && PyErr_Occurred())
		return -1;
	memcpy(access->data, &word, access->bytes);
	return 0;
}

enum answered { FAILED = -1, ANSWERED, WAITS };

/* Call the handler. WAITS: `rest` is what to await, as a tuple. */
static enum answered answer_one(const kvmaio_access *access, PyObject **rest)
{
	PyObject *word = NULL, *answer, *result;
	if (access->is_write) {
		uint64_t value = 0;
		memcpy(&value, access->data, access->bytes);
		word = PyLong_FromUnsignedLongLong(value);
		if (!word)
			return FAILED;
	}
	answer = PyObject_CallFunctionObjArgs(access->handler, access->offset, access->size, word,
					      NULL);
	enum answered answered = ANSWERED;
	if (answer && Py_TYPE(answer) == (PyTypeObject *)coroutine_type) {
		switch (PyIter_Send(answer, Py_None, &result)) {
		case PYGEN_RETURN:
			Py_DECREF(answer);
			answer = result;
			break;
		case PYGEN_NEXT:
			*rest = PyTuple_Pack(2, answer, result);
			Py_DECREF(result);
			answered = *rest ? WAITS : FAILED;
			goto done;
		default:
			Py_CLEAR(answer);
		}
	} else if (answer && (access->is_write ? answer != Py_None : !PyLong_Check(answer))) {
		*rest = PyTuple_Pack(1, answer);
		answered = *rest ? WAITS : FAILED;
		goto done;
	}
	if (!answer || (!access->is_write && !access->flags[IS_CLOSED] && store(access, answer) < 0))
		answered = tell(access, word);
done:
	Py_XDECREF(answer);
	Py_XDECREF(word);
	return answered;
}

PyDoc_STRVAR(answer_doc,
"answer(again, handle, handler, is_write, offset, size, data, told, failed, flags, due)\n--\n\n"
"Answer the access that is due, enter again, and so on while it is this one.\n\n"
"Returns None where it is not any more. Else the handler's answer is to be awaited: an awaitable\n"
"in a tuple, with what it waits for if it has been started. Then go on with `due` False.\n\n"
"Args:\n"
"    again, handle: addresses of the CPU model's function and its argument, see `AccessBurst`.\n"
"    data: address of the access's word.\n"
"    told: called when an access has been answered; None: nothing is.\n"
"    failed: called with what a handler has raised, and the word that was written, or None.\n"
"    flags: a bytearray of two: 1 as soon as there is no run page any more; and 1 while `told`\n"
"        runs, so that who sees it raise knows that the access has been answered.\n");

static PyObject *answer(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
	(void)module;
	if (count != 11) {
		PyErr_SetString(PyExc_TypeError, "answer() takes 11 arguments");
		return NULL;
	}
	int (*const again)(void *) = (int (*)(void *))PyLong_AsVoidPtr(args[0]);
	void *const handle = PyLong_AsVoidPtr(args[1]);
	PyObject *const told = args[7], *rest = NULL;
	const kvmaio_access access = {
		.handler = args[2], .is_write = args[3] == Py_True, .offset = args[4],
		.size = args[5], .bytes = PyLong_AsSize_t(args[5]),
		.data = PyLong_AsVoidPtr(args[6]), .failed = args[8],
		.flags = PyByteArray_AsString(args[9]),
	};
	if (PyErr_Occurred())
		return NULL;
	if (PyByteArray_Size(args[9]) != FLAGS) {
		PyErr_SetString(PyExc_ValueError, "two flags");
		return NULL;
	}
	for (int due = args[10] == Py_True;; due = 1) {
		if (due) {
			/* A signal's handler that raises: the access stays due. */
			if (PyErr_CheckSignals() < 0)
				return NULL;
			if (access.flags[IS_CLOSED])
				Py_RETURN_NONE;
			switch (answer_one(&access, &rest)) {
			case FAILED:
				return NULL;
			case WAITS:
				return rest;
			default:
				break;
			}
		}
		if (access.flags[IS_CLOSED])
			Py_RETURN_NONE;
		if (told != Py_None) {
			access.flags[IS_ANSWERED] = 1;
			PyObject *nothing = PyObject_CallFunctionObjArgs(told, NULL);
			if (!nothing)
				return NULL;
			Py_DECREF(nothing);
			access.flags[IS_ANSWERED] = 0;
			if (access.flags[IS_CLOSED])
				Py_RETURN_NONE;
		}
		int other;
		Py_BEGIN_ALLOW_THREADS
		other = again(handle);
		Py_END_ALLOW_THREADS
		if (other)
			Py_RETURN_NONE;
	}
}

static PyObject *attribute_of(const char *module, const char *name)
{
	PyObject *imported = PyImport_ImportModule(module), *attribute = NULL;
	if (imported)
		attribute = PyObject_GetAttrString(imported, name);
	Py_XDECREF(imported);
	return attribute;
}

static PyMethodDef methods[] = {
	{ "answer", (PyCFunction)(void (*)(void))answer, METH_FASTCALL, answer_doc },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT, .m_name = "kvmaio._answering", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__answering(void)
{
	if (!coroutine_type)
		coroutine_type = attribute_of("types", "CoroutineType");
	if (!a_number)
		a_number = attribute_of("kvmaio.suspension", "a_number");
	return coroutine_type && a_number ? PyModule_Create(&definition) : NULL;
}
