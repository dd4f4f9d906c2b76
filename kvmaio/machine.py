"""`Machine`: the composition root. Memory, buses, lines, devices, vCPUs, and their runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from . import snapshot
from .arguments import refuse, some_text, some_truth, speed, whole
from .assist import Assist
from .board import Board
from .boot.faults import FaultFrame
from .boot.image import BootState, Image
from .bus import Unmapped
from .checkpoint import Checkpoint
from .checkpoint.progress import Progress, silent
from .clock import LoopClock
from .device import Device
from .drain import DRAIN_TIMEOUT_S, Barrier, BriefHold, Participant, drained, held
from .errors import ConfigurationError, GuestError, HostError
from .exits import Halted, Outcome, Shutdown, Stopped
from .fork import fork
from .irq import IrqLine
from .lost import forbid_in_child
from .memory import parse_size
from .platform import Platform, can_assist, choose, open_platform
from .simulation import SimulationLoop
from .stats import MachineStatistics
from .switching import switch_cpu
from .tasks import SETTLE_LIMIT_S, Tasks, wait_uncancelled
from .timed_cpu import TimedCpu
from .trace import Filter, Sink, Trace, Tracing, open_trace_file
from .vcpu import VCpu, current_vcpu
from .vcpu.service import HypercallHandler

if TYPE_CHECKING:
    from .cpu import CpuModel
    from .gdb import GdbServer
    from .gdb.debugger import Debugger
    from .irqchips import IrqChips

__all__ = ["Machine"]

D = TypeVar("D", bound=Device)

_log = logging.getLogger(__name__)

FIRST_VECTOR = 0x20
"""Without an interrupt controller, line n injects vector 0x20 + n: the customary set-up."""

_BY_HAND = "drain()"
"""Who holds the barrier after `drain()`, until `resume()`."""

IRQCHIPS = (None, "kernel", "split", "devices")


class Machine(Board):
    """A guest machine; an asynchronous context manager.

    ::

        async with Machine(memory="16M") as machine:
            uart = machine.attach(Uart16550(), pio=0x3F8, irq=4)
            machine.load(Flat(code, address=0x1000))
            outcome = await machine.run()

    Args:
        memory: RAM at address 0, such as ``"64M"`` or a number of bytes. What goes
            beyond 3 GiB is placed from 4 GiB on.
        vcpus: how many virtual CPUs.
        cpu: ``"auto"``, ``"kvm"`` or ``"soft"``.
        irqchip: None (the engine injects interrupts), ``"kernel"`` (PIC, IOAPIC, local
            APICs and PIT in KVM), ``"split"`` (local APICs in KVM) or ``"devices"``
            (PICs, IOAPIC and local APICs as device models; a PIT is yours to attach).
            With more than one vCPU under KVM, None becomes ``"kernel"``.
        host_factor: guest cycles per host cycle; above 1 where the host is faster.
        clock_hz: the guest's clock, in which statistics count cycles.
        cpuid: ``"host"``, ``"emulator-safe"``, ``"common"``, a table, or None for what
            suits the loaded image.
        name: for messages and traces.
        assist: with ``cpu="auto"``, instructions that KVM cannot emulate are executed by the
            software CPU, where that is installed.

    Attributes:
        memory, pio, mmio, devices, lines: see `Board`.
        vcpus: the virtual CPUs; empty until the machine is entered.
        clock: guest time.
        fault_frame: where the loaded image leaves word of a fault, or None.
        barrier: what a drain lowers; for `kvmaio.drained()`.

    Raises:
        ConfigurationError: an impossible machine.
        HostError: on entering, when the host refuses.
    """

    def __init__(
        self,
        memory: str | int = "16M",
        vcpus: int = 1,
        cpu: str = "auto",
        irqchip: str | None = None,
        host_factor: float = 1.0,
        clock_hz: int = 1_000_000_000,
        cpuid: Any = None,
        name: str | None = None,
        assist: bool = True,
    ) -> None:
        if whole("vcpus", vcpus) < 1:
            raise ConfigurationError(f"a machine with {vcpus} vCPUs: at least 1")
        if cpu not in ("auto", "kvm", "soft"):
            raise ConfigurationError(f'cpu={cpu!r}: "auto", "kvm" and "soft" are possible')
        if irqchip not in IRQCHIPS:
            raise ConfigurationError(f"irqchip={irqchip!r}: one of {IRQCHIPS} is possible")
        speed("host_factor", host_factor)
        if not 0 < whole("clock_hz", clock_hz) <= 1_000_000_000_000:
            raise ConfigurationError(f"clock_hz={clock_hz}: must be between 1 and 10^12")
        if not (cpuid is None or isinstance(cpuid, str | Iterable)):
            refuse("cpuid", cpuid, 'a policy such as "host", a table, or None is expected')
        some_truth("assist", assist)
        self.name = "machine" if name is None else some_text("name", name) or "machine"
        self._ram = parse_size(memory)
        super().__init__(self._ram)
        self.vcpus: list[VCpu] = []
        self.stats = MachineStatistics(self)
        self.irqchip = irqchip
        self.watches_exits = self.has_doorbells = False
        self.tracing = Tracing(self)
        self.debugger: Debugger | None = None
        self._cpu = cpu
        self._vcpu_count = vcpus
        self._host_factor = host_factor
        self._clock_hz = clock_hz
        self._cpuid = cpuid
        self._cpuid_in_force: Any = cpuid or "emulator-safe"
        self._assist = assist and cpu == "auto"
        self._hypercall: HypercallHandler | None = None
        self._copies: list[Machine] = []
        self._is_copy = False
        self._platform: Platform | None = None
        self._chips: IrqChips | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self.barrier = Barrier(self)
        self._restoring = asyncio.Lock()
        self._tasks = Tasks(self.name, self._end_by_guest, self._fail_outside)
        self._lives: dict[int, asyncio.Task[None]] = {}  # each vCPU's task
        self._has_run = False
        self.fault_frame: int | None = None
        self._delivers = False
        self._run_active = False
        self._ending: Outcome | BaseException | None = None
        self._unlocated: BaseException | None = None
        self._over = asyncio.Event()

    # ---- life ------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._is_copy and not self._closed:
            self._is_copy = False
            return self
        if self._loop is not None:
            raise ConfigurationError(f"{self.name} was entered before; make a new Machine")
        self._loop = asyncio.get_running_loop()
        self.clock = LoopClock(self._loop)
        self.clock.on_set = self.tracing.refresh
        if self.irqchip is None and self._vcpu_count > 1:
            cpu = choose() if self._cpu == "auto" else self._cpu
            self.irqchip = "kernel" if cpu == "kvm" else "devices"
        if isinstance(self._loop, SimulationLoop) and self.irqchip in ("kernel", "split"):
            _tell_once(
                f'simulated time with irqchip="{self.irqchip}": KVM\'s own timers count the wall '
                "clock, and a guest that halts is waited for in wall clock time; "
                'irqchip="devices" follows simulated time, and lets idle time pass at once'
            )
        platform = self.create_platform(self._cpu)
        try:
            for model in self.create_models(platform):
                self.vcpus.append(self._make_vcpu(model))
            if self.irqchip == "devices":
                from .irqchips import IrqChips  # not above: devices are users of the engine

                self._chips = IrqChips(self)
            self.paths.open(platform, self.vcpus[0].model.ring_doorbells)
            for number, line in self.lines.items():
                line.connect(self._irq_sink(platform, number))
        except BaseException:
            self._close_cpus()
            platform.close()
            self.memory.close()
            self._closed = True
            await self._close_devices()
            raise
        self._platform = platform
        forbid_in_child(self)
        for device in self.devices.values():
            self._give_clock(device)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End everything that belongs to the machine: tasks, threads, descriptors. Idempotent."""
        if self._closed or self._platform is None:
            self._closed = True
            return
        if self._tasks.current_is_own:
            raise ConfigurationError(
                f"{self.name} cannot be closed by its own device, which would wait for itself; "
                "end the run with stop()"
            )
        for copy in self._copies:
            await copy.close()
        self._closed = True
        if isinstance(self._ending, BaseException) and not self._run_active:
            _log.error("%s is closed, and no run() has raised this:", self, exc_info=self._ending)
        self._end(Stopped("closed"))
        try:
            await self._settle()
        finally:
            self.tracing.close()
            for device in self.devices.values():
                device.alarm.disarm()
            try:
                # Before the vCPUs go: what handlers do at their end may still look at one.
                await self._tasks.end()
            finally:
                try:
                    # A vCPU that is stuck in its guest keeps what it runs on: nothing below
                    # may be taken from under it.
                    self._close_cpus()
                    self._platform.close()
                    self.memory.close()
                finally:
                    await self._close_devices()

    async def _close_devices(self) -> None:
        """All of them, also where one fails; the first failure is raised at the end."""
        results = await asyncio.gather(
            *(device.close() for device in self.devices.values()), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _close_cpus(self) -> None:
        """All of them, also where one fails; the last failure is raised at the end."""
        with contextlib.ExitStack() as stack:
            for vcpu in self.vcpus:
                stack.callback(vcpu.close)

    def create_platform(self, cpu: str) -> Platform:
        """A host part for this machine's memory; `use_platform` makes it the machine's."""
        platform = open_platform(cpu, self.irqchip, self._clock_hz)
        try:
            platform.attach_memory(self.memory)
        except BaseException:
            platform.close()
            raise
        return platform

    def create_models(self, platform: Platform) -> list[CpuModel]:
        """A CPU model for each vCPU."""
        models = platform.create_cpus(self._vcpu_count)
        platform.set_cpuid(self._cpuid_in_force)
        loop = self._loop
        if isinstance(loop, SimulationLoop):
            models = [TimedCpu(model, loop, self._host_factor) for model in models]
            for vcpu, model in zip(self.vcpus, models, strict=False):  # they take over
                self._tell_owner(model, vcpu)
        return models

    def use_platform(self, platform: Platform) -> None:
        """Another host part has taken over; the vCPUs have its models."""
        self._platform = platform
        self.paths.open(platform, self.vcpus[0].model.ring_doorbells)

    def _tell_owner(self, model: CpuModel, vcpu: VCpu) -> None:
        if isinstance(model, TimedCpu):
            name, flush_soon = f"{self.name}.{vcpu.name}", self.paths.flush_soon
            model.belongs_to(name, vcpu.stats, flush_soon, vcpu.progressed)

    def _make_vcpu(self, model: CpuModel) -> VCpu:
        vcpu = VCpu(
            len(self.vcpus),
            model,
            self.pio,
            self.mmio,
            self.clock,
            self,
            host_factor=self._host_factor,
            clock_hz=self._clock_hz,
        )
        self._tell_owner(model, vcpu)
        vcpu.on_hypercall(self._hypercall)
        if self._assist and model.kind == "kvm" and can_assist():
            vcpu.assist_with(self._new_assist(vcpu))
        return vcpu

    def _new_assist(self, vcpu: VCpu) -> Assist:
        alone = self._vcpu_count == 1
        return Assist(vcpu, self.memory, self.pio, self.mmio, may_stay=alone)

    # ---- wiring (what is the board's: board.py) ----------------------------------------

    def _attached(self, device: Device) -> None:
        self.watches_exits = bool(self.paths)
        self.has_doorbells = self.paths.any_doorbell
        for vcpu in self.vcpus:
            vcpu.disturb()
        if self._loop is not None:
            self._give_clock(device)
        if self.barrier.is_down:
            _hold_device(device, True)
        self.tracing.refresh()
        if self._has_run:
            self._tasks.start(device)
            self._start_delivery()

    def irq(self, number: int) -> IrqLine:
        is_new = number not in self.lines
        line = super().irq(number)
        if is_new:
            self.tracing.refresh()
        return line

    def _connect(self, number: int, line: IrqLine) -> None:
        if self._platform is not None:
            line.connect(self._irq_sink(self._platform, number))

    def irqfd(self, number: int) -> int:
        """An eventfd, each write of 1 to which (``os.eventfd_write``) is an edge on line `number`.

        From any thread, or another process that is handed the descriptor, without
        a call into the engine. It is closed with the machine. Needs
        ``irqchip="kernel"``.
        """
        return self._opened().irqfd(number)

    @property
    def hypercall(self) -> HypercallHandler | None:
        """The handler of hypercalls: takes a `HypercallExit`, returns what the guest gets."""
        return self._hypercall

    @hypercall.setter
    def hypercall(self, handler: HypercallHandler | None) -> None:
        self._hypercall = handler
        for vcpu in self.vcpus:
            vcpu.on_hypercall(handler)

    def load(self, image: Image) -> BootState:
        """Place `image` in memory and set the boot CPU's registers to its entry.

        Raises:
            ConfigurationError: it does not fit; see the image's class.
        """
        if isinstance(image, type) or not hasattr(image, "place"):
            raise ConfigurationError(
                f"load({image!r:.40}): an image is expected, such as kvmaio.boot.Flat(code, "
                "address=0x1000)"
            )
        platform = self._opened()
        self._check_not_running("load an image")
        for vcpu in self.vcpus:
            vcpu.check_loadable()
        state = image.place(self.memory)
        if isinstance(self._ending, Outcome | GuestError):
            self._ending = None  # it was the previous guest's
        self.fault_frame = state.fault_frame
        if state.platform == "pc":
            self.pio.unmapped = self.mmio.unmapped = Unmapped.OPEN_BUS
        # KVM fixes it at the first entry.
        if self._cpuid is None and not (self._has_run or any(v.was_stepped for v in self.vcpus)):
            self._cpuid_in_force = state.cpuid
            platform.set_cpuid(state.cpuid)
        for vcpu in self.vcpus[1:]:
            if self._chips:
                vcpu.init()
            else:
                vcpu.reset_registers()
        self.vcpus[0].load(state.context)
        if state.xcr0:
            platform.enable_xcr0()
        return state

    # ---- running ---------------------------------------------------------------------

    async def run(self) -> Outcome:
        """Run every vCPU until the guest or somebody else ends the run.

        May be called again after it was cancelled or ended.

        Raises:
            GuestError: the guest did what nothing can answer; the machine can be inspected.
            HostError: the host refused to run the guest.
            ConfigurationError: it is running already, drained by `drain()` or `drained()`, or
                closed.
            Exception: whatever a device raised, with a note that says where.
        """
        if self.debugger is not None:
            return await self.debugger.run(self._run)
        return await self._run()

    async def _run(self) -> Outcome:
        self._opened()
        if asyncio.get_running_loop() is not self._loop:
            raise ConfigurationError(f"{self.name} was entered on another event loop; run it there")
        self._check_not_running("run the machine")
        if not self.barrier.is_brief:
            self._check_not_drained("be run")
        for vcpu in self.vcpus:
            if vcpu.inside and vcpu.is_stepped:
                raise ConfigurationError(f"{vcpu.name} is being run by hand")
        self._start()
        self._run_active = True
        try:
            if self._ending is None:
                self._over.clear()
                if not (self.barrier.is_down or self.barrier.is_moving):  # or it goes on then
                    self._let_go()
                await self._over.wait()
        finally:
            try:
                await self._settle()
            finally:
                self._run_active = False
        ending, self._ending = self._ending, None
        if isinstance(ending, Outcome):
            return ending
        assert ending is not None
        if ending is self._unlocated:
            self._unlocated = None
            for vcpu in self.vcpus:
                ending.add_note(f"meanwhile {vcpu.name} was here\n{vcpu.describe_registers()}")
        raise ending

    def gdb(self, host: str = "127.0.0.1", port: int = 1234, *, wait: bool = True) -> GdbServer:
        """A server that GDB can connect to (``target remote :1234``), within ``async with``.

        ::

            async with machine.gdb(port=1234):
                outcome = await machine.run()

        While GDB has the guest stopped, `run()` just takes its time.

        Args:
            port: 0 takes one that is free; the server's `port` says which.
            wait: the guest waits for GDB before its first instruction.
        """
        from .gdb import GdbServer

        self._opened()
        return GdbServer(self, host, port, wait=wait)

    def stop(self, reason: str = "stopped") -> None:
        """End `run()` with ``Stopped(reason)``; nothing happens if it is not running."""
        if self._run_active:
            self._end(Stopped(reason))

    # ---- checkpoints (what they hold: snapshot.py) -------------------------------------

    async def checkpoint(
        self, timeout: float | None = DRAIN_TIMEOUT_S, *, progress: Progress = silent
    ) -> Checkpoint:
        """The machine's whole state as a value; drains for it unless it is drained already.

        Args:
            progress: called now and then with how much memory is done, and of how much; what
                it raises ends the work. No device answers meanwhile.

        Raises:
            DrainTimeout: it did not come to rest within `timeout` seconds of the loop's time.
            ConfigurationError: called by what the drain would wait for; or the machine has
                failed with an error that no `run()` has raised yet.
            CheckpointError: a device's state is not plain data.
        """
        async with self._drained_for_a_moment(timeout):
            return snapshot.capture(self, progress)

    async def restore(
        self, checkpoint: Checkpoint, timeout: float | None = DRAIN_TIMEOUT_S
    ) -> None:
        """Have the machine be as it was when `checkpoint` was taken, here or elsewhere.

        A machine of the same shape takes it: the same sizes, interrupt controller and
        attached devices; a fresh one needs no `load()`. Into a machine that was restored
        to the same checkpoint before, only what changed since is put back. Devices'
        `run()` is cancelled and begins anew. A `run()` of the machine that is active goes
        on from there. An access whose handler has failed is given up.

        Raises:
            CheckpointError: it does not fit, or a device cannot take its state; the machine is
                as it was.
            ConfigurationError: called by what it would wait for, or it exchanges KVM's
                interrupt controllers for others.
            HostError: the host refused; the machine is in no defined state.
        """
        if self._tasks.current_is_activity:
            raise ConfigurationError(
                f"{self.name} cannot be restored by run() of a device, which that would end"
            )
        for vcpu in self.vcpus:
            vcpu.gives_up_failed = True
        try:
            # One at a time: each ends the devices' activities and begins them anew.
            async with self._drained_for_a_moment(timeout), self._restoring:
                snapshot.check_fits(self, checkpoint)
                try:
                    await self._tasks.end_activities()
                    self._opened()
                    snapshot.put_back(self, checkpoint)
                finally:
                    if self._has_run and not self._closed:
                        for device in self.devices.values():
                            self._tasks.start(device)
        finally:
            for vcpu in self.vcpus:
                vcpu.gives_up_failed = False

    async def switch_cpu(self, cpu: str, timeout: float | None = DRAIN_TIMEOUT_S) -> None:
        """Go on with another CPU model, ``"kvm"`` or ``"soft"``, on the same memory.

        All state goes over (gem5: switchOut, takeOverFrom). What the other model cannot
        hold is kept, reported once, and given back on return. An active `run()` goes on.

        Raises:
            ConfigurationError: no such model here; or the interrupt controllers are KVM's.
            DrainTimeout, HostError: see `drain()`; the machine goes on with the model it has.
        """
        if cpu not in ("kvm", "soft"):
            raise ConfigurationError(f'cpu={cpu!r}: "kvm" and "soft" are possible')
        async with self._drained_for_a_moment(timeout):
            switch_cpu(self, cpu)
            self._cpu = cpu

    async def fork(self, count: int, timeout: float | None = DRAIN_TIMEOUT_S) -> list[Machine]:
        """`count` copies of the machine as it is now, each with its own devices.

        They share its memory until they write to it, may `run()` at once, and are
        closed with this machine at the latest (`async with` closes one earlier).
        Devices are copied by `Device.clone()`; connections, sinks and handlers of theirs
        are not, but the handler of hypercalls is. A line driven by something else than a
        device has nobody to drive it in the copies.

        Raises:
            DrainTimeout, ConfigurationError, CheckpointError: see `checkpoint()`.
            HostError: the host refused a copy; then there are none.
        """
        async with self._drained_for_a_moment(timeout):
            copies = await fork(self, count)
        for copy in copies:
            copy._is_copy = True
        self._copies = [copy for copy in self._copies if not copy._closed] + copies
        return copies

    def like_this(self, name: str) -> Machine:
        """A new machine made with the same arguments but for its name, to be entered."""
        machine = Machine(
            memory=self._ram,
            vcpus=self._vcpu_count,
            cpu=self._cpu,
            irqchip=self.irqchip,
            host_factor=self._host_factor,
            clock_hz=self._clock_hz,
            cpuid=self._cpuid,
            name=name,
        )
        machine._assist = self._assist  # also where switch_cpu() has named a model since
        return machine

    @property
    def platform(self) -> Platform:
        """The host's part of the machine."""
        return self._opened()

    def kept_outcome(self) -> Outcome | None:
        """What ended the guest and no `run()` has returned yet."""
        if isinstance(self._ending, BaseException):
            raise ConfigurationError(
                f"{self.name} has failed and cannot be saved: {self._ending}"
            ) from self._ending
        return self._ending

    def keep_outcome(self, outcome: Outcome | None) -> None:
        """Have the next `run()`, or the active one when the machine goes on, return it."""
        if not (self._run_active and self._over.is_set()):  # which has its end, and goes there
            self._ending = outcome

    # ---- draining ----------------------------------------------------------------------

    async def drain(self, timeout: float | None = DRAIN_TIMEOUT_S) -> None:
        """Bring the machine to rest until `resume()`; see docs/checkpoints.md.

        At rest, every vCPU is Idle, no access, interrupt or batched write is on its way,
        no device is `busy()` and no alarm rings. A `run()` that is active stays so, and
        goes on with `resume()`; what ends the guest meanwhile ends it then.

        Args:
            timeout: in seconds of the loop's time; None waits for ever.

        Raises:
            DrainTimeout: something did not come to rest; the message names it.
            ConfigurationError: called by what it would wait for, or something failed.
        """
        async with self.drained(timeout):
            self.barrier.hold(_BY_HAND)

    def resume(self) -> None:
        """Go on after `drain()`. Alone it enters no guest: an active `run()` does.

        Harmless where nothing is drained; a `drain()` that is still under way is not ended.
        """
        self.barrier.release(_BY_HAND)

    def drained(
        self, timeout: float | None = DRAIN_TIMEOUT_S
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """``async with machine.drained():`` inside, the machine is at rest; see `drain()`."""
        return drained(self, timeout=timeout)

    def _drained_for_a_moment(
        self, timeout: float | None
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """As `drained()`, for what ends by itself: `run()` may begin meanwhile."""
        return held(BriefHold(), [self], timeout)

    def check_open(self) -> None:
        """Raise ConfigurationError if the machine is not entered, or closed."""
        self._opened()

    def check_drainable(self) -> None:
        """Raise ConfigurationError where a drain would wait for itself."""
        self._opened()
        if self._tasks.current_serves:
            raise ConfigurationError(
                f"{self.name} cannot be drained by the handler of an access: the drain would wait "
                "for the handler. Do it in a task: asyncio.create_task(machine.drain())"
            )
        for device in self.devices.values():
            if device.busy_sections.is_own:
                raise ConfigurationError(
                    f"{self.name} cannot be drained within busy() of {device.name}: "
                    "the drain would wait for that"
                )

    def why_it_may_wait_for_itself(self) -> str | None:
        """A task that the handler of an access has started drains: it must not be awaited there."""
        with contextlib.suppress(ConfigurationError):
            vcpu = current_vcpu()
            if vcpu in self.vcpus:
                return (
                    f"the handler of an access of {vcpu.name} has started the task that drains, "
                    "and must not wait for it"
                )
        return None

    def drain_participants(self) -> list[Participant]:
        """All that must come to rest."""
        self._start_cpus()
        return [
            *self.vcpus,
            self.paths.drain(self._flush_for_drain, self.vcpus[0].model.has_posted),
            *(device.busy_sections for device in self.devices.values()),
        ]

    def came_to_rest(self) -> None:
        """All are at rest: nothing may begin by itself from now on."""
        self._hold_devices(True)
        self.tracing.drain("at rest")

    def goes_on(self) -> None:
        """Nobody wants it at rest any more."""
        self.tracing.drain("goes on")
        self._hold_devices(False)
        if not self._run_active or self._closed:
            return
        if self._ending is not None:
            self._over.set()
            return
        self._let_go()

    def _let_go(self) -> None:
        for vcpu in self.vcpus:
            vcpu.activate_if_fresh()
            vcpu.allow()
        self._end_if_halted()

    def _hold_devices(self, held: bool) -> None:
        for device in self.devices.values():
            _hold_device(device, held)

    def _check_not_drained(self, what: str) -> None:
        if self.barrier.is_down or self.barrier.is_moving:
            raise ConfigurationError(f"{self.name} is drained and cannot {what}; resume() it first")

    def trace(self, sink: Sink | str | os.PathLike[str], *, only: str = "") -> Trace:
        """Tell `sink` what happens from now on, until the trace, or the machine, is closed.

        Args:
            sink: a callable that takes each record (`kvmaio.trace.Record`), or the path of a
                ``.json`` or ``.vcd`` file.
            only: what it wants of it, such as ``"exit,access,uart*"``; see `kvmaio.trace.Filter`.

        Raises:
            ConfigurationError: `only` names no kind and no part of this machine, or there is no
                such kind of file.
        """
        self._opened()
        wanted = Filter(only)
        self.tracing.check(wanted)
        return self.tracing.add(sink if callable(sink) else open_trace_file(sink), wanted)

    @property
    def posted_lock(self) -> asyncio.Lock:  # for VCpuOwner
        return self.paths.lock

    @property
    def may_use_software(self) -> bool:
        """May the software CPU stand in for KVM: ``cpu="auto"``, and no ``assist=False``?"""
        return self._assist

    @property
    def is_running(self) -> bool:
        """Is `run()` active?"""
        return self._run_active

    def dump(self) -> str:
        """The registers of every vCPU as text; no `run()` may be active."""
        self._check_not_running("read registers")
        return "\n\n".join(f"{vcpu.name}\n{vcpu.dump()}" for vcpu in self.vcpus)

    # ---- what vCPUs tell (VCpuOwner) -------------------------------------------------

    def check_steppable(self) -> None:
        self._opened()
        self._check_not_running("step a vCPU")
        self._check_not_drained("be stepped")

    def idle(self, vcpu: VCpu) -> None:
        self._end_if_halted()

    def ended(self, vcpu: VCpu, outcome: Outcome) -> None:
        if isinstance(outcome, Shutdown) and self.fault_frame is not None:
            # The registers tell of the shutdown, on some hosts of a reset: this of its cause.
            fault = FaultFrame.read(self.memory, self.fault_frame)
            if fault is not None:
                outcome = Shutdown(f"{fault}\n{outcome.dump}")
        self._end_by_guest(outcome)

    def failed(self, vcpu: VCpu, error: BaseException) -> None:
        self._end(error)

    # ---- inside ----------------------------------------------------------------------

    def _opened(self) -> Platform:
        if self._closed:
            raise ConfigurationError(f"{self.name} is closed")
        if self._platform is None:
            raise ConfigurationError(f'use "async with Machine(...) as {self.name}:" first')
        return self._platform

    def _check_not_running(self, what: str) -> None:
        if self._run_active:
            raise ConfigurationError(f"cannot {what} while {self.name}.run() is active")

    def _start(self) -> None:
        """The vCPUs' tasks; and, once, the devices' own activities."""
        self._start_cpus()
        if self._has_run:
            return
        self._has_run = True
        for device in list(self.devices.values()):
            self._tasks.start(device)
        self._start_delivery()

    def _start_cpus(self) -> None:
        for vcpu in self.vcpus:
            life = self._lives.get(vcpu.index)
            if life is None or life.done():  # a KeyboardInterrupt in it has ended it
                self._lives[vcpu.index] = self._tasks.serve(vcpu.live(), vcpu.name)

    def _start_delivery(self) -> None:
        if self.paths.any_posted and not self._delivers:
            self._delivers = True
            self._tasks.serve(self.paths.deliver(self._flush), "posted")

    async def _flush(self) -> bool:
        """Deliver batched writes and doorbells; were there any, or may there be more?"""
        delivered = True  # if a handler ends it

        async def flush() -> None:
            nonlocal delivered
            delivered = await self.vcpus[0].flush_posted()

        await self._tasks.watched(flush(), "the service of a posted write")
        return delivered

    async def _flush_for_drain(self) -> bool:
        """The same in a task of the machine: a drain that gives up must not cut a handler short,
        and a handler must not drain."""
        delivered = True

        async def flush() -> None:
            nonlocal delivered
            delivered = await self._flush()

        await self._tasks.serve_once(flush(), "posted")
        return delivered

    def _fail_outside(self, error: BaseException) -> None:
        """End by an error that no vCPU was serving; `run()` adds where the guest was."""
        if self._ending is None:
            self._unlocated = error
        self._end(error)

    def _end_by_guest(self, outcome: Outcome) -> None:
        """A vCPU, or a device for it, has met an outcome."""
        if self.barrier.is_moving or self.barrier.is_down:
            # `run()`, now or later, returns it when the machine goes on; a checkpoint holds it.
            self._ending = self._ending or outcome
        else:
            self._end(outcome)

    def _end(self, ending: Outcome | BaseException) -> None:
        """The first end counts; it is kept until a `run()` returns it."""
        if self._ending is None:
            self._ending = ending
        self._over.set()
        for vcpu in self.vcpus:
            vcpu.forbid()

    def _end_if_halted(self) -> None:
        if not self._run_active or self.barrier.is_moving or self.barrier.is_down:
            return  # something may wake one yet; `goes_on` asks again
        halted = [vcpu for vcpu in self.vcpus if not vcpu.awaits_start_up]
        if halted and all(v.halted and not v.can_wake for v in halted):
            self.ended(self.vcpus[0], Halted())

    async def _settle(self) -> None:
        """Wait, come what may, until every vCPU has left its guest."""
        for vcpu in self.vcpus:
            vcpu.forbid()
        if any(vcpu.inside for vcpu in self.vcpus):
            assert self._loop is not None
            await wait_uncancelled(self._loop.create_task(self._all_left()))

    async def _all_left(self) -> None:
        for vcpu in self.vcpus:
            try:
                async with asyncio.timeout(SETTLE_LIMIT_S):
                    await vcpu.left()
            except TimeoutError:
                raise HostError("KVM_RUN", 110, f"{vcpu.name} does not leave its guest") from None

    def _irq_sink(self, platform: Platform, number: int) -> Callable[[bool], None]:
        sink = self._chips.sink(number) if self._chips else platform.irq_sink(number)
        if sink is None:
            vector = FIRST_VECTOR + number
            if vector > 255:
                raise ConfigurationError(
                    f"interrupt line {number}: without an interrupt controller, "
                    f"lines 0 to {255 - FIRST_VECTOR} have a vector"
                )

            def sink(level: bool) -> None:
                if level:
                    self.vcpus[0].trigger(vector)

        def drive(level: bool) -> None:
            if not self._closed:  # a device's timer may outlive the machine
                sink(level)

        return drive

    def _give_clock(self, device: Device) -> None:
        device.clock = self.clock
        device.alarm.use_clock(self.clock)

    def __repr__(self) -> str:
        return f"<Machine {self.name}: {len(self.vcpus)} vCPUs, {self.memory.size >> 20} MiB>"


@cache
def _tell_once(message: str) -> None:
    _log.warning("%s", message)


def _hold_device(device: Device, held: bool) -> None:
    device.busy_sections.shut(held)
    device.alarm.hold(held)
