# An ELF32 guest: writes .data to the serial port, then a digit from .bss, and halts.
    .intel_syntax noprefix
    .code32
    .section .text
    .globl _start
_start:
    call print                  # the initial stack works
    mov al, '0'
    add al, [zero]              # '0' only if the loader cleared .bss
    out dx, al
    mov al, 10
    out dx, al
    hlt

print:
    mov edx, 0x3f8
    mov esi, offset message
1:  lodsb
    test al, al
    jz 2f
    out dx, al
    jmp 1b
2:  ret

    .section .data
message:
    .asciz "hello from ELF32, "

    .section .bss
    .skip 0x2345
zero:
    .skip 1
