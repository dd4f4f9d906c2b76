"""One virtual CPU: its states, its way into the guest and back, and who answers its exits.

====================  ============================================================
`vcpu`                the state machine and run loop; what users see
`states`              the states, and what a vCPU tells those around it
`at_rest`             what can be done with it while nothing runs
`burst`               accesses answered back to back
`entry`               into the guest and back: sync, inject, run, account
`service`             an exit to whoever answers it
`registers_sync`      the engine's copy of the registers, and which one is newer
`interrupts`          what waits to be delivered
`instruction_events`  waiting for an instruction count
====================  ============================================================
"""

from .states import VCpuHooks, VCpuOwner, VCpuState
from .vcpu import VCpu, current_vcpu, serving_vcpu

__all__ = ["VCpu", "VCpuHooks", "VCpuOwner", "VCpuState", "current_vcpu", "serving_vcpu"]
