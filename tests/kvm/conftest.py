"""Bare VMs and vCPUs, without the engine: what `kvmaio.kvm` itself offers."""

import select

import pytest

from kvmaio.kvm import cpuid, state
from kvmaio.kvm._native import ffi, lib
from kvmaio.kvm.host import Kvm, check, usable
from kvmaio.kvm.vm import KvmVm
from kvmaio.memory import GuestMemory
from tests.leftovers import Held, nothing_left

SECOND_NS = 1_000_000_000


class BareVcpu:
    """A vCPU of the C core; `run()` enters the guest and waits for what comes of it."""

    def __init__(self, kvm: Kvm, vm: KvmVm, index: int = 0, policy: str = "host", vcpus: int = 1):
        self.kvm = kvm
        self.vm = vm
        check(lib.kvmaio_init(), "sigaction")
        out = ffi.new("kvmaio_hub **")
        check(lib.kvmaio_hub_create(out), "eventfd")
        self.hub = out[0]
        vcpu = ffi.new("kvmaio_vcpu **")
        result = lib.kvmaio_vcpu_create(self.hub, vm.fd, index, kvm.vcpu_page_size, index, vcpu)
        if result < 0:
            lib.kvmaio_hub_destroy(self.hub)
        check(result, "KVM_CREATE_VCPU")
        self.handle = vcpu[0]
        self.fd = self.handle.fd
        self.page = self.handle.page
        self.set_cpuid(policy, index, vcpus)

    def set_cpuid(self, policy, index=0, vcpus=1):
        state.set_cpuid(self.fd, cpuid.select(self.kvm, policy, index, vcpus))

    def real16(self, address: int, **registers: int) -> None:
        """Point the vCPU at `address`, with flat 64-KiB segments at 0."""
        context = state.get_context(self.fd)
        context.cs.base = context.cs.selector = 0
        context.rip = address
        context.rsp = 0x7000
        for name, value in registers.items():
            setattr(context, name, value)
        state.set_context(self.fd, context)

    def run(self, limit_ns: int = 30 * SECOND_NS) -> int:
        """Enter once; the outcome, or the exit reason of KVM's."""
        check(lib.kvmaio_vcpu_start(self.handle), "pthread_create")
        lib.kvmaio_vcpu_enter(self.handle, limit_ns)
        assert select.select([self.hub.fd], [], [], 2 * limit_ns / SECOND_NS)[0], "no arrival"
        assert lib.kvmaio_hub_collect(self.hub, ffi.new("uint32_t[]", 1), 1) == 1
        outcome = int(self.handle.outcome)
        check(outcome, "KVM_RUN")
        return int(self.page.exit_reason) if outcome == lib.KVMAIO_EXIT else -1

    def close(self) -> None:
        check(lib.kvmaio_vcpu_stop(self.handle, 5 * SECOND_NS), "pthread_join")
        lib.kvmaio_vcpu_destroy(self.handle)
        lib.kvmaio_hub_destroy(self.hub)


@pytest.fixture
def kvm():
    if reason := usable():
        pytest.skip(reason)
    before = Held.now()
    with Kvm.open() as kvm:
        yield kvm
    nothing_left(before)


@pytest.fixture
def memory():
    memory = GuestMemory()
    memory.add_ram(0, 0x10000)
    yield memory
    memory.close()


@pytest.fixture
def vm(kvm, memory):
    with KvmVm(kvm) as vm:
        vm.attach_memory(memory)
        yield vm


@pytest.fixture
def make_vcpu(kvm, vm):
    """A vCPU of `vm`, or of another one; closed before the VM."""
    made: list[BareVcpu] = []

    def make(vm: KvmVm = vm, index: int = 0, **options) -> BareVcpu:
        made.append(BareVcpu(kvm, vm, index, **options))
        return made[-1]

    yield make
    for vcpu in made:
        vcpu.close()


@pytest.fixture
def vcpu(make_vcpu):
    return make_vcpu()


@pytest.fixture
def second_vm(kvm):
    """Another VM with memory of its own, to restore state into."""
    memory = GuestMemory()
    memory.add_ram(0, 0x10000)
    with KvmVm(kvm) as vm:
        vm.attach_memory(memory)
        yield vm
    memory.close()


@pytest.fixture
def kvmaio_cpu(request: pytest.FixtureRequest) -> str:
    """The machines of these tests run under KVM, whatever there is beside it."""
    if (reason := usable()) is not None:
        pytest.skip(reason)
    request.node.user_properties.append(("cpu_model", "kvm"))
    return "kvm"
