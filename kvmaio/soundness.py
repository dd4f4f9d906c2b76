"""Does a checkpoint hold what a machine can be? Asked before a restore changes anything.

A checksum tells of damage, not of sense: the file may be somebody else's work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from .boot.faults import FaultFrame
from .bus import Unmapped
from .checkpoint import Checkpoint
from .checkpoint.parts import MachineShape, from_plain, to_plain
from .clock import Alarm
from .cpu import CONTROL, GENERAL, SEGMENTS, TABLES, CpuState
from .errors import CheckpointError, ConfigurationError
from .exits import Exited, Halted, Outcome, Shutdown, Stopped
from .vcpu.interrupts import Interrupts

__all__ = ["MachineEngine", "VCpuEngine", "check_sound", "kept_outcome", "plain_outcome"]

MOST = 1 << 63
"""No time in nanoseconds, and no count, reaches that."""

STATES = frozenset({0, 1, 2, 3, 4, 9})
"""KVM_MP_STATE_* of x86: runnable, uninitialized, INIT received, halted, SIPI received, AP reset
hold."""

EVENTS_SIZE, LAPIC_SIZE = 64, 1024
"""Of kvm_vcpu_events and kvm_lapic_state."""

XSAVE_SIZE = 576
"""At least: the legacy region and the header (SDM vol. 1, 13.4)."""

_OUTCOMES: dict[str, type[Outcome]] = {
    kind.__name__: kind for kind in (Halted, Shutdown, Exited, Stopped)
}


@attrs.frozen
class MachineEngine:
    """What a machine itself knows."""

    pio_unmapped: str
    mmio_unmapped: str
    fault_frame: int | None
    outcome: dict[str, Any] | None
    lines: dict[str, bool]


@attrs.frozen
class VCpuEngine:
    """What a vCPU knows beside the processor's state."""

    active: bool
    fresh: bool
    halted: bool
    suspended: bool
    awaits_start_up: bool
    was_stepped: bool
    vectors: list[int]
    nmi: bool
    instructions: int | None


def check_sound(checkpoint: Checkpoint) -> None:
    """Refuse what no machine has saved.

    Raises:
        CheckpointError: names the part.
    """
    _within(checkpoint.time_ns, "machine: the time in nanoseconds")
    _check_machine(_typed(checkpoint.engine, MachineEngine, "machine"), checkpoint.shape)
    for index, cpu in enumerate(checkpoint.cpus):
        what = f"cpu {index}"
        engine = _typed(cpu.engine, VCpuEngine, what)
        for vector in engine.vectors:
            try:
                Interrupts().add(vector)
            except ConfigurationError as error:
                raise CheckpointError(f"{what}: {error}") from None
        if engine.instructions is not None:
            _within(engine.instructions, f"{what}: instructions")
        _check_registers(cpu.state, what)
        _check_structures(cpu.state, what)
    for name, device in checkpoint.devices.items():
        try:
            Alarm().load(device.alarm)
        except ConfigurationError as error:
            raise CheckpointError(f"{name}: its alarm: {error}") from None
    for name, counters in checkpoint.statistics.items():
        for field, count in counters.items():
            if count is not None:
                _within(count, f"statistics: {name}.{field}")


def plain_outcome(outcome: Outcome | None) -> dict[str, Any] | None:
    """The outcome that a machine keeps, as plain data.

    Raises:
        CheckpointError: it is of a class of somebody else's.
    """
    if outcome is None:
        return None
    name = type(outcome).__name__
    if _OUTCOMES.get(name) is not type(outcome):
        raise CheckpointError(f"the outcome {outcome} that is kept is not one of kvmaio's")
    plain: dict[str, Any] = to_plain(outcome)
    return {"kind": name} | plain


def kept_outcome(engine: Mapping[str, Any]) -> Outcome | None:
    """And back."""
    if engine["outcome"] is None:
        return None
    plain = dict(engine["outcome"])
    kind = _OUTCOMES.get(plain.pop("kind", ""))
    if kind is None:
        raise CheckpointError(f"the outcome that is kept: {engine['outcome']!r} is none")
    outcome: Outcome = from_plain(plain, kind, "the outcome that is kept")
    return outcome


def _typed(engine: Mapping[str, Any], kind: Any, whose: str) -> Any:
    names = {field.name for field in attrs.fields(kind)}
    if missing := ", ".join(sorted(names - engine.keys())):
        raise CheckpointError(f"{whose}: not as a machine saves it: {missing} is missing")
    return from_plain({name: engine[name] for name in names}, kind, whose)


def _within(value: int, what: str, limit: int = MOST) -> None:
    if not 0 <= value < limit:
        raise CheckpointError(f"{what}: {value} is not between 0 and {limit - 1:#x}")


def _check_machine(engine: MachineEngine, shape: MachineShape) -> None:
    for policy in (engine.pio_unmapped, engine.mmio_unmapped):
        if policy not in {known.value for known in Unmapped}:
            raise CheckpointError(f"machine: unmapped accesses: there is no {policy!r}")
    for number in engine.lines:
        if not (number.isascii() and number.isdecimal() and str(int(number)) == number):
            raise CheckpointError(f"machine: {number!r} is no interrupt line's number")
    at, size = engine.fault_frame, FaultFrame.size()
    if at is not None and not any(r.base <= at <= r.base + r.size - size for r in shape.memory):
        raise CheckpointError(f"machine: the fault frame at {at:#x} is not in memory")
    kept_outcome({"outcome": engine.outcome})


def _check_registers(state: CpuState, what: str) -> None:
    """Their widths are those of KVM's structures; wider values would not fit there."""
    context = state.context
    for name in (*GENERAL, *CONTROL):
        _within(getattr(context, name), f"{what}: {name}", 1 << 64)
    for name in TABLES:
        _within(getattr(context, name).limit, f"{what}: {name}.limit", 1 << 16)
    for name in SEGMENTS:
        widths = {"base": 64, "limit": 32, "selector": 16}
        for part, value in to_plain(getattr(context, name)).items():
            _within(value, f"{what}: {name}.{part}", 1 << widths.get(part, 8))
    paging, protection, not_write, cache_off = (context.cr0 >> bit & 1 for bit in (31, 0, 29, 30))
    if paging > protection or not_write > cache_off or context.cr0 >> 32:
        raise CheckpointError(f"{what}: CR0 cannot be {context.cr0:#x}")
    _within(context.cr8, f"{what}: cr8", 16)


def _check_structures(state: CpuState, what: str) -> None:
    for name, structure, size in (
        ("events", state.events, EVENTS_SIZE),
        ("LAPIC", state.lapic, LAPIC_SIZE),
    ):
        if structure is not None and len(structure) != size:
            raise CheckpointError(f"{what}: {name} of {len(structure)} bytes, not {size}")
    if state.mp_state is not None and state.mp_state not in STATES:
        raise CheckpointError(f"{what}: there is no MP state {state.mp_state}")
    if len(state.debug_registers) != 6:
        raise CheckpointError(f"{what}: {len(state.debug_registers)} debug registers, not 6")
    if state.xcrs.keys() - {0} or not state.xcrs.get(0, 1) & 1:  # SDM vol. 1, 13.3
        raise CheckpointError(f"{what}: extended control registers cannot be {state.xcrs}")
    for index in state.msrs:
        _within(index, f"{what}: the index of an MSR", 1 << 32)
    if state.xsave is not None:
        _check_xsave(state.xsave, what)


def _check_xsave(area: bytes, what: str) -> None:
    """The standard format, whose header is zero but for XSTATE_BV (SDM vol. 1, 13.4.2)."""
    if len(area) < XSAVE_SIZE:
        raise CheckpointError(f"{what}: XSAVE of {len(area)} bytes, not {XSAVE_SIZE} or more")
    if any(area[520:XSAVE_SIZE]) or area[519] & 0x80 or any(area[26:28]):
        raise CheckpointError(f"{what}: XSAVE is no area in the standard format")
