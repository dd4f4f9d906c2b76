"""`Watches`: a debugged machine's watchpoints, and the CPU model that can watch.

=======================================  ====================================================
the machine runs on                      who watches
=======================================  ====================================================
the software CPU                         it does, without single steps
KVM, writes only                         single steps, and the memory compared after each
KVM, reads; or where it cannot step      the software CPU, on which the machine goes on while
                                         there are watchpoints
=======================================  ====================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, KvmaioError
from ..platform import can_assist
from ..switching import OWN_CHIPS
from ..watchpoints import WatchKind, Watchpoint

if TYPE_CHECKING:
    from ..machine import Machine

__all__ = ["Watches"]

_MOVED = "KVM cannot watch this: the guest goes on in the software CPU while there are watchpoints"
_BACK = "no watchpoints are left: the guest goes on under KVM"


class Watches:
    """One machine's.

    Attributes:
        points: what is watched.
    """

    def __init__(self, machine: Machine) -> None:
        self.points: set[Watchpoint] = set()
        self._machine = machine
        self._moved = False  # to the software CPU, from KVM
        self._are_set = False

    @property
    def by_model(self) -> bool:
        """Does the CPU model watch by itself?"""
        return hasattr(self._machine.vcpus[0].model, "set_watchpoints")

    def set(self) -> None:
        """Have the CPU models watch, those that can.

        Raises:
            ConfigurationError: there are too many.
        """
        if self.points and self.by_model:
            self._tell_models(sorted(self.points, key=lambda point: (point.address, point.size)))

    def unset(self) -> None:
        """Have nobody watch any more. Idempotent."""
        if self._are_set:
            self._tell_models([])

    def _tell_models(self, points: list[Watchpoint]) -> None:
        self._are_set = bool(points)
        for vcpu in self._machine.vcpus:
            if not vcpu.is_closed:
                model: Any = vcpu.model
                model.set_watchpoints(points)

    def move_refusal(self) -> str | None:
        """Why the machine cannot go on in the software CPU; None if it can."""
        machine = self._machine
        if machine.irqchip in OWN_CHIPS:
            return (
                f"this machine's interrupt controllers are KVM's (irqchip={machine.irqchip!r}), "
                'which cannot be handed over; irqchip="devices" can'
            )
        if not machine.may_use_software:
            return 'this machine is not to use it; cpu="auto" is'
        if not can_assist():
            return "it is not installed: pip install 'kvmaio[soft]'"
        return None

    async def settle(
        self, tell: Callable[[str], None], *, cannot_step: bool, stepping: bool
    ) -> None:
        """Move the machine to the CPU model that is to watch, and back when nothing is watched.

        Args:
            tell: takes a line for the user.
            cannot_step: KVM can neither step nor stop where the guest is.
            stepping: it is for one instruction, for which moving back does not pay: GDB takes
                its watchpoints away to step over a breakpoint.

        Raises:
            ConfigurationError: nothing here can watch; why.
        """
        if not self.by_model:
            self._moved = False
            reads = any(WatchKind.READ in point.kind for point in self.points)
            if not reads and not (self.points and cannot_step):
                return
            if (reason := self.move_refusal()) is None:
                await self._machine.switch_cpu("soft")
                self._moved = True
                tell(_MOVED)
            elif reads:
                raise ConfigurationError(
                    f"KVM cannot watch reads. The software CPU can, but {reason}"
                )
        elif self._moved and not self.points and not stepping:
            await self.move_back(tell)

    async def move_back(self, tell: Callable[[str], None]) -> None:
        """To KVM, if the machine came from there. One that cannot go back stays where it is."""
        if not self._moved:
            return
        self._moved = False
        if not self.by_model:
            return
        try:
            await self._machine.switch_cpu("kvm")
        except KvmaioError as error:
            tell(f"the guest stays in the software CPU: {error}")
        else:
            tell(_BACK)
