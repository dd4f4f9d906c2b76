"""`Debugger`: stops a machine, looks at it, and has it go on; knows nothing of the protocol.

All-stop: while it is stopped, no vCPU is in its guest and no exit is being served, but
devices and the rest of the event loop go on. It stands in for `Machine.run()`: whoever
awaits that sees nothing of the stops.

========================  ===========================================================
breakpoint                the CPU model's own, as many as it has and where they work
more of them, or none     single steps, and the address compared after each
watchpoint                the CPU model's own; writes also by single steps (`watches`)
single step               `VCpu.at_instruction()`
========================  ===========================================================

Single steps make some 5,000 to 20,000 instructions a second under KVM. Where the host's KVM
can do neither, GDB is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import attrs

from ..errors import ConfigurationError, KvmaioError
from ..exits import DebugEventExit, Exited, Halted, Outcome, Stopped
from ..linear import code_address, code_bits, read_linear
from ..simulation import real_time
from ..watchpoints import Watchpoint
from .watches import Watches

if TYPE_CHECKING:
    from ..machine import Machine
    from ..vcpu import VCpu

__all__ = ["SIGABRT", "SIGINT", "SIGKILL", "SIGTRAP", "Debugger", "Stop"]

SIGINT, SIGTRAP, SIGABRT, SIGKILL = 2, 5, 6, 9

_OURS = Stopped("stopped by gdb")
_KILLED = Stopped("killed by gdb")
_ENDED = "the program that runs this machine has ended the run"
_SHOWN = Stopped("over")


@attrs.frozen
class Stop:
    """Why the machine has stopped.

    Attributes:
        signal: as GDB numbers them.
        vcpu: who stopped it.
        watched: the address of a watchpoint that was hit.
        text: something the user should read.
        ending: the run is over with this; nothing is left to continue if `is_final`.
    """

    signal: int
    vcpu: VCpu
    watched: int | None = None
    text: str | None = None
    ending: Outcome | BaseException | None = None

    @property
    def is_final(self) -> bool:
        """Has the guest gone?"""
        return isinstance(self.ending, Exited | Stopped)


class Debugger:
    """One machine's.

    Attributes:
        attached: somebody debugs it; else it runs freely.
        breakpoints: linear addresses.
        watches: its watchpoints.
        on_word: takes a line for the user while the guest runs, or None.
        is_in_use: somebody awaits `run()`.
    """

    def __init__(self, machine: Machine, *, wait: bool, hardware_works: bool) -> None:
        self.machine = machine
        self.attached = wait
        self.breakpoints: set[int] = set()
        self.watches = Watches(machine)
        self.on_word: Callable[[str], None] | None = None
        self._seen: dict[Watchpoint, bytes] = {}  # what there was, for single steps
        self._hardware_works = hardware_works
        self._armed = False  # it is set up what is to stop the run that is active
        self._breaks = False  # the CPU models have breakpoints for it
        self._last: Stop | None = None
        self._hit: Stop | None = None
        self._is_running = self.is_in_use = False
        self._go: _Go | None = None
        self._changed = asyncio.Event()
        self._killed = False

    # ---- what the session does ---------------------------------------------------------

    async def attach(self) -> Stop:
        """Stop the machine."""
        self.attached = True
        if self._is_running:
            self.interrupt()
        while self._is_running:
            await self._change()
        return self._last or Stop(SIGTRAP, self.machine.vcpus[0])

    def resume(self, step: VCpu | None = None, *, alone: bool = False) -> Awaitable[Stop]:
        """Go on, or only by one instruction of `step`; await the next stop.

        Args:
            alone: the other vCPUs stay where they are.
        """
        go = self._go = _Go(step, alone)
        self._notify()
        return self._stop_of(go)

    async def _stop_of(self, go: _Go) -> Stop:
        try:
            while go.stop is None:
                await self._change()
        finally:
            if self._go is go:
                self._go = None
        return go.stop

    def interrupt(self) -> None:
        """Have it stop soon."""
        if self._is_running:
            self._stop(Stop(SIGINT, self.machine.vcpus[0]))
        else:  # nobody has called run() yet
            self._tell(Stop(SIGINT, self.machine.vcpus[0]))

    def detach(self) -> None:
        """Run freely from now on."""
        self.attached = False
        self.breakpoints.clear()
        self.watches.points.clear()
        if self._is_running and self._armed:
            self._stop(Stop(SIGTRAP, self.machine.vcpus[0]))  # and on, without breakpoints
        self._notify()

    def kill(self) -> None:
        """End the run."""
        self._killed = True
        if self._is_running:
            self._stop(Stop(SIGTRAP, self.machine.vcpus[0]))
        self.detach()

    def close(self) -> None:
        """The server ends; a GDB that waits for a stop gets one."""
        self.detach()
        if self._go is not None:
            self._tell(Stop(SIGINT, self.machine.vcpus[0], text=_ENDED))

    # ---- in place of Machine.run() -----------------------------------------------------

    async def run(self, run: Callable[[], Awaitable[Outcome]]) -> Outcome:
        """Call `run`, perhaps again and again, until the guest's own end."""
        self.is_in_use = True
        try:
            while True:
                async with real_time():  # simulated time does not jump while somebody looks
                    while self.attached and self._go is None:
                        await self._change()
                ending = self._shown_ending()
                if ending is None:
                    ending = await self._run_once(run)
                if isinstance(ending, BaseException):
                    raise ending
                if ending is not None:
                    return ending
        finally:
            self.is_in_use = False
            if self._go is not None and self._go.stop is None:
                self._tell(Stop(SIGINT, self.machine.vcpus[0], text=_ENDED))

    def _shown_ending(self) -> Outcome | BaseException | None:
        """The guest's end, if it was shown already and is not to be put off any more."""
        if self._killed:
            self._killed = False
            return _KILLED
        last, self._last = self._last, None
        if last is None or last.ending is None:
            return None
        self._tell(Stop(SIGTRAP, last.vcpu, ending=_SHOWN))
        return last.ending

    async def _run_once(
        self, run: Callable[[], Awaitable[Outcome]]
    ) -> Outcome | BaseException | None:
        """One run, until a stop; the guest's end if nobody is to see it first."""
        go = self._go
        self._hit = self._last = None
        self._is_running = True
        steppers: list[asyncio.Task[None]] = []
        try:
            for vcpu in self.machine.vcpus:
                vcpu.held = go is not None and go.alone and vcpu is not go.step
            try:
                steppers = await self._set_up(None if go is None else go.step)
            except KvmaioError as error:
                if not self.attached:
                    raise
                self._stop(Stop(SIGTRAP, self.machine.vcpus[0], text=str(error)))
            # A step that is refused has stopped already: stop() would not reach a run to come.
            ending: Outcome | BaseException = _OURS if self._hit is not None else await run()
        except Exception as error:
            ending = error
        finally:
            self._is_running = False
            for vcpu in self.machine.vcpus:
                vcpu.held = False
            await self._disarm(steppers)
            self._notify()
        hit = self._take_hit()
        if hit is not None and (ending == _OURS or isinstance(ending, Halted)):
            stop = hit  # a step onto HLT stops behind it; that the guest halts comes next
        else:
            stop = self._ended(ending)
        if not self.attached:
            return stop.ending
        # Not a final one: run() may be called again, and the guest be there again.
        self._last = None if stop.is_final else stop
        self._tell(stop)
        return stop.ending if stop.is_final else None

    def _take_hit(self) -> Stop | None:
        hit, self._hit = self._hit, None
        return hit

    def _ended(self, ending: Outcome | BaseException) -> Stop:
        vcpu = self.machine.vcpus[0]
        if isinstance(ending, Outcome):
            return Stop(SIGTRAP, vcpu, text=f"{ending}; continue ends the run", ending=ending)
        name = getattr(ending, "vcpu", None)
        vcpu = next((v for v in self.machine.vcpus if v.name == name), vcpu)
        text = f"{type(ending).__name__}: {ending}; continue ends the run"
        return Stop(SIGABRT, vcpu, text=text, ending=ending)

    # ---- breakpoints and steps ---------------------------------------------------------

    async def _set_up(self, step: VCpu | None) -> list[asyncio.Task[None]]:
        """Go to where it can be watched, and set what is to stop the machine."""
        self._armed = True  # a GDB that goes meanwhile has it all begin anew
        blind = bool(self.watches.points) and self._native() is not None
        await self.watches.settle(self.say, cannot_step=blind, stepping=step is not None)
        return await self._arm(step)

    async def _arm(self, step: VCpu | None) -> list[asyncio.Task[None]]:
        """Set what is to stop the machine; the tasks that single-step."""
        addresses = sorted(self.breakpoints)
        self._armed = bool(addresses or self.watches.points or step)
        self._breaks = bool(addresses)
        self.watches.set()
        compares = bool(self.watches.points) and not self.watches.by_model
        self._seen.clear()
        steppers = []
        for vcpu in self.machine.vcpus:
            vcpu.on_debug(self._debug_exit)
            once = vcpu is step
            if compares:
                self._seen = {point: self._memory(vcpu, point) for point in self.watches.points}
            if once or compares or not self._set_breakpoints(vcpu, addresses):
                steppers.append(asyncio.create_task(self._step(vcpu, once), name="gdb steps"))
        if steppers:
            await asyncio.sleep(0)  # they wait for their instructions before the guest begins
        return steppers

    def _set_breakpoints(self, vcpu: VCpu, addresses: list[int]) -> bool:
        """Have the CPU model itself stop there; False if it cannot."""
        if not addresses:
            return True
        model: Any = vcpu.model
        if model.kind == "kvm" and not self._hardware_works:
            return False
        try:
            model.set_breakpoints(addresses)
        except ConfigurationError:
            return False  # too many
        return True

    async def _disarm(self, steppers: list[asyncio.Task[None]]) -> None:
        for stepper in steppers:
            stepper.cancel()
        if steppers:
            await asyncio.wait(steppers)
        for vcpu in self.machine.vcpus:
            vcpu.on_debug(None)
            if self._breaks and not vcpu.is_closed:  # also if GDB has gone since
                model: Any = vcpu.model
                model.set_breakpoints(())
        self.watches.unset()

    async def _step(self, vcpu: VCpu, once: bool) -> None:
        try:
            while True:
                await vcpu.at_instruction(1, from_now=True)
                if getattr(vcpu.model, "watch_hits", ()):
                    return  # the debug exit tells that comes with them
                stop = self._look(vcpu)
                if stop is not None or once:
                    self._stop(stop or Stop(SIGTRAP, vcpu))
                    return
        except ConfigurationError as error:
            self._stop(Stop(SIGTRAP, vcpu, text=f"cannot go on by single steps: {error}"))

    def _look(self, vcpu: VCpu) -> Stop | None:
        """Is this a place to stop at?"""
        for point, before in self._seen.items():
            if self._memory(vcpu, point) != before:
                return Stop(SIGTRAP, vcpu, watched=point.address)
        if code_address(vcpu.context) in self.breakpoints:
            return Stop(SIGTRAP, vcpu)
        return None

    def _memory(self, vcpu: VCpu, point: Watchpoint) -> bytes:
        return read_linear(self.machine.memory, vcpu.context, point.address, point.size)

    def _debug_exit(self, vcpu: VCpu) -> None:
        exit_ = vcpu.last_exit()
        if isinstance(exit_, DebugEventExit) and exit_.watched:
            self._stop(Stop(SIGTRAP, vcpu, watched=exit_.watched[0].address))
        elif not self.watches.by_model or code_address(vcpu.context) in self.breakpoints:
            self._stop(Stop(SIGTRAP, vcpu))
        # Else what stopped it has been taken away since.

    def _stop(self, stop: Stop) -> None:
        """End the run; the first stop counts."""
        if self._hit is None:
            self._hit = stop
        self.machine.stop(_OURS.reason)

    # ---- who waits for whom ------------------------------------------------------------

    def _tell(self, stop: Stop) -> None:
        if self._go is not None:
            self._go.stop = stop
            self._go = None
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _change(self) -> None:
        await self._changed.wait()

    def say(self, text: str) -> None:
        """Tell the user, if there is one."""
        if self.on_word is not None:
            self.on_word(text)

    def blind_spot(self) -> str | None:
        """Why GDB would not get its stops where the guest is now; None if it does."""
        if self.watches.points and self.watches.move_refusal() is None:
            return None
        return self._native()

    def _native(self) -> str | None:
        """Why this host's KVM can neither stop nor step the guest where it is; None if it can."""
        for vcpu in self.machine.vcpus:
            model: Any = vcpu.model
            context = vcpu.context
            native = getattr(model, "emulates_kernel_code", False) and code_bits(context) == 64
            if native and context.cs.dpl == 3:
                return (
                    "this host's KVM (PVM) runs 64-bit user code natively, where neither "
                    'breakpoints nor steps work; cpu="soft" has both'
                )
        return None


@attrs.define
class _Go:
    """A wish to go on, and the stop that came of it."""

    step: VCpu | None
    alone: bool
    stop: Stop | None = None
