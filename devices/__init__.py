"""Device models, one flat file per part; installed as ``kvmaio.devices``.

Start reading with ``countdown_timer.py``. All are ordinary users of the public
API: `kvmaio.device`, `kvmaio.registers`, and what a device finds in itself.
"""

from .apic_bus import ApicBus
from .console import Console, ConsoleOutput
from .countdown_timer import CountdownTimer
from .debug_console import DebugConsole
from .debug_exit import DebugExit
from .ioapic import IoApic
from .local_apic import LocalApic
from .pci_config_ports import PciConfigPorts, PlainConfigSpace
from .pic8259 import Elcr, Pic8259
from .pit8254 import Pit8254, SystemPortB
from .pseudo_op import M5Op, PseudoOpWindow
from .rtc_mc146818 import RtcMc146818
from .uart16550 import Uart16550

__all__ = [
    "ApicBus",
    "Console",
    "ConsoleOutput",
    "CountdownTimer",
    "DebugConsole",
    "DebugExit",
    "Elcr",
    "IoApic",
    "LocalApic",
    "M5Op",
    "PciConfigPorts",
    "Pic8259",
    "Pit8254",
    "PlainConfigSpace",
    "PseudoOpWindow",
    "RtcMc146818",
    "SystemPortB",
    "Uart16550",
]
