# A Multiboot kernel: writes what the loader told it to the serial port, line by line:
# magic ok, boot loader, command line, each module's string and contents, KiB of upper memory
# in hexadecimal digits, and the number of memory ranges. Then it halts.
    .intel_syntax noprefix
    .code32
    .section .multiboot, "a"
    .align 4
    .long 0x1badb002
    .long 3                     # align modules, memory information
    .long -(0x1badb002 + 3)

    .section .text
    .globl _start
_start:
    mov esp, offset stack_top   # nothing else promises a stack
    mov edx, 0x3f8
    cmp eax, 0x2badb002
    jne fail
    mov esi, offset ok
    call line
    mov esi, [ebx + 64]         # boot_loader_name
    call line
    mov esi, [ebx + 16]         # cmdline
    call line

    mov ecx, [ebx + 20]         # mods_count
    mov edi, [ebx + 24]         # mods_addr
1:  test ecx, ecx
    jz 4f
    mov esi, [edi + 8]          # string
    call text
    mov al, '='
    out dx, al
    mov esi, [edi]              # mod_start
2:  cmp esi, [edi + 4]          # mod_end
    je 3f
    lodsb
    out dx, al
    jmp 2b
3:  call newline
    add edi, 16
    dec ecx
    jmp 1b

4:  mov eax, [ebx + 8]          # mem_upper
    mov ecx, 8
5:  rol eax, 4
    mov ebp, eax
    and eax, 15
    cmp al, 10
    jb 6f
    add al, 'a' - '0' - 10
6:  add al, '0'
    out dx, al
    mov eax, ebp
    dec ecx
    jnz 5b
    call newline

    mov eax, '0'
    mov esi, [ebx + 48]         # mmap_addr
    mov edi, [ebx + 44]         # mmap_length
    add edi, esi
7:  cmp esi, edi
    jae 8f
    inc eax
    add esi, [esi]              # size, which does not count itself
    add esi, 4
    jmp 7b
8:  out dx, al
    call newline
    hlt

fail:
    mov al, '!'
    out dx, al
    hlt

line:
    call text
newline:
    mov al, 10
    out dx, al
    ret

text:
    lodsb
    test al, al
    jz 1f
    out dx, al
    jmp text
1:  ret

    .section .data
ok: .asciz "multiboot"

    .section .bss
    .skip 1024
stack_top:
