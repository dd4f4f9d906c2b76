"""A machine goes on with another CPU model, on the same memory; it is at rest meanwhile."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from .errors import ConfigurationError

if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["switch_cpu"]

OWN_CHIPS = ("kernel", "split")


def switch_cpu(machine: Machine, cpu: str) -> None:
    """See `Machine.switch_cpu()`."""
    if machine.irqchip in OWN_CHIPS:
        raise ConfigurationError(
            f"{machine.name} has irqchip={machine.irqchip!r}: KVM's interrupt controllers cannot "
            'be handed over; use irqchip="devices"'
        )
    old = machine.platform
    with contextlib.ExitStack() as undo:
        platform = machine.create_platform(cpu)
        undo.callback(platform.close)
        models = machine.create_models(platform)
        for model in models:
            undo.callback(model.close)
        vm = old.save()
        platform.restore_cpuid(vm)
        platform.restore(vm)
        switched_out = []
        for vcpu, model in zip(machine.vcpus, models, strict=True):
            switched_out.append(vcpu.take_over(model))
            undo.callback(vcpu.take_over, switched_out[-1])
        undo.pop_all()
    machine.use_platform(platform)
    for model in switched_out:
        model.close()
    old.close()
