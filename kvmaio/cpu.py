"""`CpuModel`: what runs guest code; `Context` and `CpuState`: what it consists of.

A model is KVM or the software CPU. The state machine in `vcpu/vcpu.py` drives
either through this protocol and knows nothing of what is behind it.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import attrs

if TYPE_CHECKING:
    from .access_burst import AccessBurst

__all__ = [
    "Context",
    "CpuModel",
    "CpuState",
    "DescriptorTable",
    "EntryResult",
    "ModelSettings",
    "PostedWrites",
    "Segment",
    "SystemState",
]


def _tell_owner(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> Any:
    instance._written(attribute.name)
    if isinstance(value, Segment | DescriptorTable):
        # A copy: the value may be shared, and its writes from now on are this register's.
        value = attrs.evolve(value)
        value._written = getattr(instance, attribute.name)._written
    return value


def _nobody(name: str) -> None:
    pass


@attrs.define(on_setattr=_tell_owner)
class Segment:
    """A segment register with its hidden part (kvm_segment; SDM vol. 3A, 3.4.3)."""

    base: int = 0
    limit: int = 0xFFFF
    selector: int = 0
    type: int = 3
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    l: int = 0  # noqa: E741 (the SDM's name)
    g: int = 0
    avl: int = 0
    unusable: int = 0
    _written: Callable[[str], None] = attrs.field(
        default=_nobody, init=False, repr=False, eq=False, on_setattr=attrs.setters.NO_OP
    )


@attrs.define(on_setattr=_tell_owner)
class DescriptorTable:
    """GDTR or IDTR."""

    base: int = 0
    limit: int = 0xFFFF
    _written: Callable[[str], None] = attrs.field(
        default=_nobody, init=False, repr=False, eq=False, on_setattr=attrs.setters.NO_OP
    )


def _segment(**kwargs: int) -> Any:
    return attrs.field(factory=lambda: Segment(**kwargs))


@attrs.define(on_setattr=_tell_owner)
class Context:
    """The registers by name, as plain attributes; by default those after reset.

    Assigning to one (``context.rip = 0x1000``, ``context.cs.base = 0``) marks
    the context as newer than the CPU model's copy, which follows at the next
    entry.
    """

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0x600
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0xFFF0
    rflags: int = 2
    cs: Segment = _segment(base=0xFFFF0000, selector=0xF000, type=0xB)
    ds: Segment = _segment()
    es: Segment = _segment()
    fs: Segment = _segment()
    gs: Segment = _segment()
    ss: Segment = _segment()
    tr: Segment = _segment(type=0xB, s=0)
    ldt: Segment = _segment(type=0x2, s=0)
    gdt: DescriptorTable = attrs.field(factory=DescriptorTable)
    idt: DescriptorTable = attrs.field(factory=DescriptorTable)
    cr0: int = 0x60000010
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int = 0xFEE00900
    _written: Callable[[str], None] = attrs.field(
        default=_nobody, init=False, repr=False, eq=False, on_setattr=attrs.setters.NO_OP
    )

    def notify(self, written: Callable[[str], None]) -> None:
        """Call `written` before each assignment, with the register's name: ``rip``, ``cs.base``."""
        self._written = written
        for name in SEGMENTS + TABLES:
            getattr(self, name)._written = lambda field, part=name: written(f"{part}.{field}")


GENERAL = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
)
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
TABLES = ("gdt", "idt")
CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")


@attrs.define
class CpuState:
    """All state of one vCPU, portable between CPU models.

    The binary parts are the kernel's structures of the same names
    (``Documentation/virt/kvm/api.rst``). None means: this model has no such
    state, or the host cannot tell.
    """

    context: Context
    xsave: bytes | None = None  # kvm_xsave(2): x87, SSE, AVX and further components
    xcrs: dict[int, int] = attrs.field(factory=dict)
    debug_registers: tuple[int, ...] = (0, 0, 0, 0, 0xFFFF0FF0, 0x400)  # dr0..dr3, dr6, dr7
    events: bytes | None = None  # kvm_vcpu_events
    mp_state: int | None = None  # KVM_MP_STATE_*
    lapic: bytes | None = None  # kvm_lapic_state
    msrs: dict[int, int] = attrs.field(factory=dict)


@attrs.frozen
class ModelSettings:
    """What somebody has set on a CPU model, beside the guest's state; another one takes it over.

    Attributes:
        counting: exact instruction counts, of a model that has the choice.
        breakpoints: linear addresses.
    """

    counting: bool = True
    breakpoints: tuple[int, ...] = ()


class SystemState(NamedTuple):
    """What few instructions look at; the parts are those of `CpuState`."""

    msrs: dict[int, int]
    xcrs: dict[int, int]
    debug_registers: tuple[int, ...]
    events: bytes


class EntryResult(enum.Enum):
    """What came of one entry into the guest."""

    EXIT = "exit"
    """The run page describes an exit."""
    INTERRUPTED = "interrupted"
    """A kick or a half entry ended it; the run page is stale."""
    TIMER = "timer"
    """The time limit ended it; the run page is stale."""


@attrs.define(eq=False)
class PostedWrites:
    """Writes to one place, one behind the other, batched as the device needs no exit for them.

    Attributes:
        time_ns: when the guest made the only one (CLOCK_MONOTONIC); 0 where nobody looked.
        values: oldest first. Whoever has them served takes each one away before that.
    """

    address: int
    size: int
    is_pio: bool
    time_ns: int
    values: deque[int]


class CpuModel(Protocol):
    """One vCPU's engine. Unless said otherwise, calls are made on the loop's thread.

    `page` has the layout of the kernel's ``struct kvm_run``; it belongs to the
    model between `enter()` and the result, to the caller otherwise.
    """

    kind: str
    resolution_ns: int
    """The shortest time limit that the model can keep."""
    has_lapic: bool
    """A local APIC of the model's own takes the interrupts, and takes them at any time."""
    counts_instructions: bool
    """It counts them by itself: `instructions` is known, if it was at first."""
    page: Any
    io_words: dict[int, Any]
    """Access size -> the page as an array of words of that size, for port I/O data."""
    mmio_word: Any
    """The page's MMIO data as an array of one 64-bit word."""

    def enter(self, limit_ns: int | None) -> EntryResult | None:
        """Enter the guest, for about `limit_ns` host nanoseconds; 0 is a half entry.

        Returns the result, or None while the guest runs: then await `left()`.

        Raises:
            HostError: the host refused.
        """

    def burst(self) -> AccessBurst | None:
        """The way in for plain accesses back to back; None where there is none at present."""

    async def left(self) -> EntryResult:
        """Wait until the guest has been left. If cancelled, await it again later."""

    def begin(self, limit_ns: int) -> None:
        """Enter the guest for about `limit_ns`; the caller then calls `finish()`."""

    def finish(self) -> EntryResult:
        """Block until the entry that `begin()` began is over."""

    @property
    def instructions(self) -> int | None:
        """Guest instructions since the last reset; None where that is unknown."""

    def recount(self, count: int | None) -> None:
        """The guest is where it had executed `count` instructions, None if that is unknown; 0
        after a reset.
        """

    @property
    def settings(self) -> ModelSettings:
        """What was set on it, or on the model before."""

    def use_settings(self, settings: ModelSettings) -> None:
        """Take over another model's.

        Raises:
            ConfigurationError: it cannot have so many breakpoints.
            HostError: the host can set none.
        """

    def is_waiting(self) -> bool:
        """Does the guest wait inside of the model, halted or for a start-up IPI?"""

    def has_injected_event(self) -> bool:
        """Is an exception, interrupt or NMI injected that the guest has not begun to handle?"""

    @property
    def executed_ns(self) -> int:
        """Host CPU time of the last entry in nanoseconds."""

    def half_entry(self) -> EntryResult:
        """Complete a pending access without executing an instruction, at once."""

    def kick(self) -> None:
        """End the present entry, or the next one if there is none. From any thread."""

    def kick_run(self) -> None:
        """End the present entry; without one, do nothing."""

    def read_context(self) -> Context:
        """Fetch the general and special registers; the guest must not be running."""

    def write_context(self, context: Context) -> None:
        """Push the general and special registers; no access may be pending."""

    def read_state(self) -> CpuState:
        """All state; the guest must not be running, and no access may be pending."""

    def write_state(self, saved: CpuState) -> None:
        """Push all state. What the model has not got is reported once, not lost in silence.

        Raises:
            HostError: the host refused other state; it is in no defined state.
        """

    def wait_for_sipi(self) -> None:
        """Be an application processor that nobody has started; only with `has_lapic`."""

    def start(self) -> None:
        """Be one that a start-up IPI has started; only with `has_lapic`."""

    def interrupt(self, vector: int) -> None:
        """Inject an external interrupt; only when the page says that the guest is ready."""

    def nmi(self) -> None:
        """Make an NMI pending."""

    def has_posted(self) -> bool:
        """Were writes batched, or may doorbells have rung, before the present exit?"""

    def posted_count(self) -> int:
        """How many writes wait."""

    def posted(self, most: int | None) -> PostedWrites | None:
        """The oldest of these writes, `most` of them; the same again while some of those are left.

        None: there are no others, or no more were wanted; all that were given have been served.
        """

    def ring_doorbells(self) -> bool:
        """Deliver the doorbells that rang; did any?"""

    def dump(self) -> str:
        """All registers as text."""

    def close(self) -> None:
        """End the engine's thread and give back what it holds. Idempotent."""
