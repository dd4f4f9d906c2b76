"""Device models, one flat file per part; installed as ``kvmaio.devices``.

Start reading with ``countdown_timer.py``. All are ordinary users of the public
API: `kvmaio.device`, `kvmaio.registers`, and what a device finds in itself.
"""

from .console import Console, ConsoleOutput
from .countdown_timer import CountdownTimer
from .debug_console import DebugConsole
from .debug_exit import DebugExit
from .pci_config_ports import PciConfigPorts, PlainConfigSpace
from .pseudo_op import M5Op, PseudoOpWindow
from .rtc_mc146818 import RtcMc146818
from .uart16550 import Uart16550

__all__ = [
    "Console",
    "ConsoleOutput",
    "CountdownTimer",
    "DebugConsole",
    "DebugExit",
    "M5Op",
    "PciConfigPorts",
    "PlainConfigSpace",
    "PseudoOpWindow",
    "RtcMc146818",
    "Uart16550",
]
