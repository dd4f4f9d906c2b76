/* What we use of libunicorn's interface, version 2.1: kvmaio is built without it.
 *
 * The numbers are those of its bindings (unicorn_const.py, x86_const.py).
 */
#ifndef KVMAIO_UNICORN_H
#define KVMAIO_UNICORN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct uc_struct uc_engine;
typedef size_t uc_hook;
typedef int uc_err;
typedef int uc_mem_type;

#define UC_ERR_OK 0
#define UC_ARCH_X86 4
#define UC_MODE_64 8

#define UC_PROT_NONE 0
#define UC_PROT_READ 1
#define UC_PROT_WRITE 2
#define UC_PROT_EXEC 4
#define UC_PROT_ALL 7

#define UC_HOOK_INTR (1 << 0)
#define UC_HOOK_INSN (1 << 1)
#define UC_HOOK_CODE (1 << 2)
#define UC_HOOK_BLOCK (1 << 3)
#define UC_HOOK_MEM_UNMAPPED (7 << 4)
#define UC_HOOK_MEM_PROT (7 << 7)
#define UC_HOOK_MEM_READ (1 << 10)
#define UC_HOOK_MEM_WRITE (1 << 11)
#define UC_HOOK_INSN_INVALID (1 << 14)

#define UC_MEM_READ_UNMAPPED 19
#define UC_MEM_WRITE_UNMAPPED 20
#define UC_MEM_WRITE_PROT 22
#define UC_MEM_READ_PROT 23

#define UC_CTL_WRITE(control, arguments) ((control) | (arguments) << 26 | 1 << 30)
#define UC_CTL_UC_USE_EXITS 4
#define UC_CTL_TB_FLUSH 10
#define UC_CTL_TLB_FLUSH 11

enum {
	UC_X86_REG_FPSW = 31,
	UC_X86_REG_RBX = 37,
	UC_X86_REG_RIP = 41,
	UC_X86_REG_CR2 = 52,
	UC_X86_REG_DR1 = 67,
	UC_X86_REG_ST0 = 114,
	UC_X86_REG_XMM0 = 122,
	UC_X86_REG_GDTR = 243,
	UC_X86_REG_FPCW = 246,
	UC_X86_REG_FPTAG = 247,
	UC_X86_REG_MSR = 248,
	UC_X86_REG_MXCSR = 249,
	UC_X86_REG_RFLAGS = 253,
	UC_X86_REG_FIP = 254,
	UC_X86_REG_FDP = 256,
	UC_X86_REG_FOP = 258,
};

enum {
	UC_X86_INS_CPUID = 113,
	UC_X86_INS_IN = 218,
	UC_X86_INS_OUT = 500,
	UC_X86_INS_RDTSC = 608,
	UC_X86_INS_RDTSCP = 609,
	UC_X86_INS_SYSCALL = 699,
	UC_X86_INS_SYSENTER = 700,
};

typedef struct {
	uint16_t selector;
	uint64_t base;
	uint32_t limit, flags;
} uc_x86_mmr;

typedef struct {
	uint32_t rid;
	uint64_t value;
} uc_x86_msr;

#endif
