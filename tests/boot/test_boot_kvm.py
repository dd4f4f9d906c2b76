"""Every mode and kind of image, run by KVM to its end; the guests speak through a port."""

import asyncio
from pathlib import Path

import pytest

from kvmaio.boot import Elf, FaultFrame, Firmware, Flat, Image, Multiboot
from kvmaio.device import Device
from kvmaio.exits import Halted, Outcome, Shutdown
from kvmaio.machine import Machine
from tests.assembler import assemble, guest_file
from tests.boot.test_multiboot import header

pytestmark = pytest.mark.kvm

MIB = 1 << 20
KIB = 1 << 10
TIME_LIMIT_S = 20  # two instructions can hang a guest inside the kernel on some hosts

SAY = {
    "real16": ["mov dx, 0x3f8", "push 'A'", "pop ax", "out dx, al", "hlt"],
    "prot32": ["mov edx, 0x3f8", "push 'A'", "pop eax", "out dx, al", "hlt"],
    "long64": ["mov edx, 0x3f8", "push 'A'", "pop rax", "out dx, al", "hlt"],
    "user64": ["mov edx, 0x3f8", "push 'A'", "pop rax", "out dx, al", "hlt"],
}


class Port(Device):
    """Remembers what was written, whatever the size of the access."""

    size = 8

    def __init__(self) -> None:
        self.output = b""

    def write(self, offset: int, size: int, value: int) -> None:
        self.output += value.to_bytes(size, "little")

    def read(self, offset: int, size: int) -> int:
        return 0x5A5A_5A5A_5A5A_5A5A & ((1 << size * 8) - 1)


class Ran:
    """How an image ran: its end, what it said, and its memory."""

    def __init__(self, machine: Machine, image: Image, port: Port) -> None:
        self.machine, self.port = machine, port
        self.state = machine.load(image)
        self.outcome: Outcome | None = None

    @property
    def fault(self) -> FaultFrame | None:
        assert self.state.fault_frame is not None
        return FaultFrame.read(self.machine.memory, self.state.fault_frame)


@pytest.fixture
async def run():
    """Run an image to its end in a machine with a port at 0x3f8 and a window at 0xd0000000."""
    machines = []

    async def run_image(image: Image, memory: str = "4M") -> Ran:
        machine = await Machine(memory=memory, cpu="kvm").__aenter__()
        machines.append(machine)
        port = machine.attach(Port(), pio=0x3F8, mmio=0xD000_0000)
        ran = Ran(machine, image, port)
        async with asyncio.timeout(TIME_LIMIT_S):
            ran.outcome = await machine.run()
        return ran

    yield run_image
    for machine in machines:
        await machine.close()


@pytest.mark.parametrize("mode", SAY)
async def test_flat_image_runs_with_a_stack(run, mode):
    ran = await run(Flat(assemble(SAY[mode], mode), 0x1000, mode))
    assert (ran.outcome, ran.port.output) == (Halted(), b"A")


@pytest.mark.parametrize("mode", ["prot32", "long64", "user64"])
async def test_flat_image_reaches_all_ram_and_the_devices(run, mode):
    wide = "eax" if mode == "prot32" else "rax"
    source = [
        f"mov {wide}, 0x1ff000",  # RAM, far from the image
        f"mov dword ptr [{wide}], 0x12345678",
        f"mov ecx, [{wide}]",
        "mov eax, 0xd0000000",  # a device; writing EAX clears the upper half of RAX
        f"mov [{wide}], ecx",
        f"mov ecx, [{wide}]",
        f"mov [{wide}], cl",
        "hlt",
    ]
    ran = await run(Flat(assemble(source, mode), 0x1000, mode))
    assert (ran.outcome, ran.port.output) == (Halted(), bytes.fromhex("78563412 5a"))


@pytest.mark.parametrize("mode", SAY)
async def test_entry_may_be_inside_the_image(run, mode):
    source = ["ud2", ".align 16", *SAY[mode]]
    image = Flat(assemble(source, mode, 0x8000), 0x8000, mode, entry=0x8010)
    ran = await run(image)
    assert (ran.outcome, ran.port.output) == (Halted(), b"A")


async def test_loading_again_starts_again(run):
    image = Flat(assemble(SAY["user64"], "user64"), 0x1000, "user64")
    ran = await run(image)
    ran.machine.load(image)
    async with asyncio.timeout(TIME_LIMIT_S):
        assert await ran.machine.run() == Halted()
    assert ran.port.output == b"AA"


async def test_long64_may_go_down_to_cpl3_by_its_gdt(run):
    source = [
        "push 0x23",
        "push 0x3000",
        "pushfq",
        "or dword ptr [rsp], 0x3000",  # IOPL 3
        "push 0x2b",
        "lea rax, [rip+user]",
        "push rax",
        "iretq",
        "user: mov eax, cs",
        "and eax, 3",  # the selector itself may be the host's
        "mov [0x2000], eax",
        "ud2",
    ]
    ran = await run(Flat(assemble(source, "long64"), 0x1000, "long64"))
    assert isinstance(ran.outcome, Shutdown)  # there is no IDT
    assert ran.machine.memory.read(0x2000, 1) == b"\x03"


@pytest.mark.parametrize("port", [0, 0x80, 0x3F8, 0x8000, 0xFFF8])
async def test_user64_has_every_port(port):
    source = [f"mov edx, {port}", "mov al, 1", "out dx, al", "in eax, dx", "out dx, eax", "hlt"]
    async with Machine(memory="2M", cpu="kvm") as machine:
        device = machine.attach(Port(), pio=port)
        machine.load(Flat(assemble(source, "user64"), 0x1000, "user64"))
        async with asyncio.timeout(TIME_LIMIT_S):
            assert await machine.run() == Halted()
    assert device.output == b"\x01ZZZZ"


async def test_user64_computes_with_sse(run):
    source = [
        "mov eax, 2",
        "cvtsi2sd xmm0, eax",
        "sqrtsd xmm0, xmm0",
        "movsd [0x2000], xmm0",
        "hlt",
    ]
    ran = await run(Flat(assemble(source, "user64"), 0x1000, "user64"))
    assert ran.outcome == Halted()
    assert ran.machine.memory.read(0x2000, 8) == bytes.fromhex("cd3b7f669ea0f63f")


@pytest.mark.skipif(
    " avx " not in Path("/proc/cpuinfo").read_text(), reason="this host's CPU has no AVX"
)
async def test_user64_computes_with_avx(run):
    source = [
        "vpcmpeqd xmm1, xmm1, xmm1",
        "vinsertf128 ymm1, ymm1, xmm1, 1",
        "vmovups [0x2000], ymm1",
        "hlt",
    ]
    ran = await run(Flat(assemble(source, "user64"), 0x1000, "user64"))
    assert ran.outcome == Halted()
    assert ran.machine.memory.read(0x2000, 33) == b"\xff" * 32 + b"\0"


@pytest.mark.parametrize(
    ("fault", "vectors", "error_code"),
    [
        ("ud2", [6], 0),
        ("xor ecx, ecx\ndiv ecx", [0], 0),
        ("movabs rax, 0x100000000000\nmov rax, [rax]", [14], 4),
        ("movabs rax, 0x100000000000\ncall rax", [14], 4),
        ("movabs rax, 0x800000000000\nmov rax, [rax]", [13], 0),
        ("mov byte ptr [rsp], 1", [14], 7),  # just above the stack are the tables
        ("mov rax, cr3", [13], 0),
        ("int3", [3, 13], None),  # some hosts let it past the gate's DPL
    ],
)
async def test_fault_in_user64_shuts_down_and_tells_why(run, fault, vectors, error_code):
    source = ["mov edx, 0x3f8", "mov al, 'A'", "out dx, al", fault, "mov al, 'B'", "out dx, al"]
    ran = await run(Flat(assemble(source, "user64"), 0x1000, "user64"))
    assert isinstance(ran.outcome, Shutdown)
    assert ran.port.output == b"A"
    assert ran.fault.vector in vectors
    assert error_code is None or ran.fault.error_code == error_code
    assert (ran.fault.cs, ran.fault.ss) == (0x2B, 0x23)
    assert ran.fault.rsp == ran.state.context.rsp or "call" in fault
    assert ran.fault.rip == 0x100000000000 or 0x1000 < ran.fault.rip < 0x1020


async def test_elf32_runs(run):
    ran = await run(Elf(guest_file("hello32")))
    assert (ran.outcome, ran.port.output) == (Halted(), b"hello from ELF32, 0\n")


async def test_elf64_runs(run):
    ran = await run(Elf(guest_file("hello64")))
    assert (ran.outcome, ran.port.output) == (Halted(), b"hello from ELF64, 0\n")


async def test_multiboot_kernel_sees_what_it_was_given(run):
    image = Multiboot(guest_file("multiboot32"), "a=1 b", [(b"one", "first"), (b"two", "second")])
    ran = await run(image, memory="16M")
    assert ran.outcome == Halted()
    assert ran.port.output.decode().splitlines() == [
        "multiboot",
        "kvmaio",
        "a=1 b",
        "first=one",
        "second=two",
        "00003c00",
        "2",
    ]


async def test_multiboot_kernel_without_elf_runs(run):
    head = header(1 << 16, MIB, MIB, 0, 0, MIB + 32)
    code = assemble(["mov esp, 0x8000", *SAY["prot32"]], "prot32", MIB + 32)
    ran = await run(Multiboot(head + code))
    assert (ran.outcome, ran.port.output) == (Halted(), b"A")


async def test_firmware_starts_at_the_reset_vector_and_writes_its_copy(run):
    source = [
        "start: mov dx, 0x3f8",
        "mov ax, 0xf000",
        "mov ds, ax",
        "mov al, [text]",
        "out dx, al",
        "inc byte ptr [text]",  # in the copy, which is RAM
        "mov al, [text]",
        "out dx, al",
        "hlt",
        'text: .ascii "A"',
        ".org 0xfff0",
        "ljmp 0xf000, offset start",
        ".org 0x10000",
    ]
    firmware = Firmware(assemble(source, "real16", 0))
    ran = await run(firmware)
    assert (ran.outcome, ran.port.output) == (Halted(), b"AB")
    assert ran.machine.memory.read((1 << 32) - 64 * KIB, 64 * KIB) == firmware.data
