"""`Session`: one connection of GDB, packet by packet.

Source: "Debugging with GDB", appendices E.2 to E.10. A packet that is not known gets an empty
reply, by which GDB knows that it has to do without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ..cpu import Context
from ..errors import KvmaioError
from ..linear import read_linear, write_linear
from ..vcpu import VCpu
from ..watchpoints import WatchKind, Watchpoint
from .debugger import Debugger, Stop
from .monitor import monitor
from .packets import INTERRUPT, PACKET_SIZE, PacketStream, escape
from .registers import CpuView, register_set

__all__ = ["Session"]

# Kinds of Z packets.
_EXEC = (0, 1)
_WATCH = {2: WatchKind.WRITE, 3: WatchKind.READ, 4: WatchKind.ACCESS}

_Reply = str | bytes | None
_Handler = Callable[[str], _Reply | Awaitable[_Reply]]


class Session:
    """Answers GDB until it goes."""

    def __init__(self, debugger: Debugger, stream: PacketStream) -> None:
        self._debugger = debugger
        self._machine = debugger.machine
        self._stream = stream
        self._thread = 1  # of Hg; threads are vCPUs, numbered from 1
        self._registers = register_set(Context())  # until the machine has stopped
        self._view: tuple[int, CpuView] | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._last = "T05thread:1;"
        self._over = False
        self._handlers: dict[str, _Handler] = {
            "?": lambda rest: self._last,
            "g": lambda rest: self._registers.read_all(self._look()),
            "G": self._write_registers,
            "p": self._read_register,
            "P": self._write_register,
            "m": self._read_memory,
            "M": self._write_memory,
            "Z": self._insert,
            "z": self._remove,
            "H": self._select,
            "T": self._is_alive,
            "c": lambda rest: self._resume(None),
            "s": lambda rest: self._resume(self._vcpu(self._thread)),
            "D": self._detach,
            "k": self._kill,
            "vKill": self._kill,
            "vCont?": lambda rest: "vCont;c;C;s;S",
            "vCont": self._continue,
            "QStartNoAckMode": self._stop_acknowledging,
            "qSupported": self._supported,
            "qXfer:features:read:target.xml:": self._description,
            "qC": lambda rest: f"QC{self._thread:x}",
            "qAttached": lambda rest: "1",
            "qfThreadInfo": lambda rest: f"m{','.join(f'{n:x}' for n in self._threads())}",
            "qsThreadInfo": lambda rest: "l",
            "qThreadExtraInfo,": self._thread_info,
            "qRcmd,": self._monitor,
        }

    async def serve(self) -> None:
        """Until the connection ends; a GDB that just goes leaves the guest running freely."""
        stop = await self._debugger.attach()
        self._registers = register_set(self._machine.vcpus[0].context)
        self._last = self._stop_reply(stop)
        self._debugger.on_word = self._say
        try:
            while not self._over and (packet := await self._stream.read()) is not None:
                if packet == INTERRUPT:
                    self._debugger.interrupt()
                    continue
                reply = await self._answer(packet)
                if reply is not None:
                    self._stream.send(reply)
        finally:
            if self._resuming is not None:
                self._resuming.cancel()
                await asyncio.wait([self._resuming])
            self._debugger.on_word = None
            self._debugger.detach()

    async def finish(self) -> None:
        """Tell GDB of the stop that it waits for, and end."""
        if self._resuming is not None:
            await asyncio.wait([self._resuming])
        await self._stream.close()

    async def _answer(self, packet: bytes) -> str | bytes | None:
        text = packet.decode("latin-1")  # a byte is a character, as in the memory packets
        name = max((n for n in self._handlers if text.startswith(n)), key=len, default=None)
        if name is None:
            return ""
        try:
            reply = self._handlers[name](text[len(name) :])
            return reply if reply is None or isinstance(reply, str | bytes) else await reply
        except KvmaioError as error:
            return f"E.{error}".replace("\n", " ")
        except (ValueError, IndexError):
            return "E01"  # not as the manual has it

    # ---- what it can ------------------------------------------------------------------

    def _supported(self, rest: str) -> str:
        return (
            f"PacketSize={PACKET_SIZE:x};QStartNoAckMode+;qXfer:features:read+;"
            "vContSupported+;multiprocess-"
        )

    def _stop_acknowledging(self, rest: str) -> None:
        self._stream.send("OK")
        self._stream.acknowledges = False

    def _description(self, rest: str) -> bytes:
        offset, length = (int(part, 16) for part in rest.split(","))
        data = self._registers.description().encode()
        piece = data[offset : offset + length]
        return (b"m" if offset + length < len(data) else b"l") + escape(piece)

    # ---- threads ----------------------------------------------------------------------

    def _threads(self) -> range:
        return range(1, len(self._machine.vcpus) + 1)

    def _vcpu(self, thread: int) -> VCpu:
        return self._machine.vcpus[max(thread, 1) - 1]

    def _select(self, rest: str) -> str:
        thread = int(rest[1:], 16)
        if rest[0] == "g" and thread > 0:
            self._vcpu(thread)
            self._thread = thread
        return "OK"

    def _is_alive(self, rest: str) -> str:
        return "OK" if int(rest, 16) in self._threads() else "E01"

    def _thread_info(self, rest: str) -> str:
        vcpu = self._vcpu(int(rest, 16))
        return f"{vcpu.name}, {'halted' if vcpu.halted else vcpu.state.value}".encode().hex()

    # ---- registers and memory ---------------------------------------------------------

    def _look(self) -> CpuView:
        """The selected vCPU's registers, read once for each stop."""
        if self._view is None or self._view[0] != self._thread:
            vcpu = self._vcpu(self._thread)
            self._view = self._thread, CpuView(vcpu.context, vcpu.read_xsave())
        return self._view[1]

    def _changed(self) -> str:
        view = self._look()
        if view.xsave_changed and view.xsave is not None:
            self._view = None  # also if it is refused
            self._vcpu(self._thread).write_xsave(bytes(view.xsave))
        return "OK"

    def _read_register(self, rest: str) -> str:
        return self._registers.read(int(rest, 16), self._look())

    def _write_register(self, rest: str) -> str:
        number, _, value = rest.partition("=")
        self._registers.write(int(number, 16), self._look(), bytes.fromhex(value))
        return self._changed()

    def _write_registers(self, rest: str) -> str:
        self._registers.write_all(self._look(), bytes.fromhex(rest))
        return self._changed()

    def _read_memory(self, rest: str) -> str:
        address, size = (int(part, 16) for part in rest.split(","))
        context = self._vcpu(self._thread).context
        data = read_linear(self._machine.memory, context, address, min(size, PACKET_SIZE // 2))
        return data.hex() if data or not size else "E14"

    def _write_memory(self, rest: str) -> str:
        where, _, data = rest.partition(":")
        address = int(where.split(",")[0], 16)
        context = self._vcpu(self._thread).context
        write_linear(self._machine.memory, context, address, bytes.fromhex(data))
        return "OK"

    # ---- breakpoints ------------------------------------------------------------------

    def _insert(self, rest: str) -> str:
        kind, address, size = _point(rest)
        if kind in _EXEC:
            self._debugger.breakpoints.add(address)
        elif kind in _WATCH:
            self._debugger.watches.points.add(Watchpoint(address, size, _WATCH[kind]))
        else:
            return ""
        return "OK"

    def _remove(self, rest: str) -> str:
        kind, address, size = _point(rest)
        if kind in _EXEC:
            self._debugger.breakpoints.discard(address)
        elif kind in _WATCH:
            self._debugger.watches.points.discard(Watchpoint(address, size, _WATCH[kind]))
        else:
            return ""
        return "OK"

    # ---- running ----------------------------------------------------------------------

    def _continue(self, rest: str) -> None:
        """``vCont;s:1;c``: an action without a thread is for all that have none of their own."""
        step, alone = None, True
        for action in rest.split(";")[1:]:
            what, _, thread = action.partition(":")
            is_for_all = thread in ("", "-1")
            if what[0] in "sS" and step is None:
                step = self._vcpu(self._thread if is_for_all else int(thread, 16))
            elif is_for_all:
                alone = False
        self._resume(step, alone=alone and step is not None)

    def _resume(self, step: VCpu | None, *, alone: bool = False) -> None:
        self._view = None
        debugger = self._debugger
        if (debugger.breakpoints or debugger.watches.points or step) and (
            blind := debugger.blind_spot()
        ):
            self._say(blind)
            if step is not None:
                self._stream.send(self._last)
                return
        stop = debugger.resume(step, alone=alone)
        self._resuming = asyncio.create_task(self._until(stop), name="gdb waits for a stop")

    async def _until(self, coming: Awaitable[Stop]) -> None:
        stop = await coming
        self._thread = self._machine.vcpus.index(stop.vcpu) + 1
        if stop.text:
            self._say(stop.text)
        self._last = self._stop_reply(stop)
        self._stream.send(self._last)

    def _stop_reply(self, stop: Stop) -> str:
        if stop.is_final:
            return f"W{getattr(stop.ending, 'code', 0):02x}"
        watched = "" if stop.watched is None else f"watch:{stop.watched:x};"
        thread = self._machine.vcpus.index(stop.vcpu) + 1
        return f"T{stop.signal:02x}{watched}thread:{thread:x};"

    def _say(self, text: str) -> None:
        """A line on GDB's console; it takes them only while it waits for a stop."""
        line = f"kvmaio: {text}\n".encode()[: PACKET_SIZE // 2 - 8]
        self._stream.send(f"O{line.hex()}")

    def _detach(self, rest: str) -> str:
        self._over = True
        return "OK"

    def _kill(self, rest: str) -> str | None:
        self._debugger.kill()
        self._over = True
        return "OK" if rest else None

    async def _monitor(self, rest: str) -> str:
        text = await monitor(self._machine, bytes.fromhex(rest).decode(errors="replace"))
        for start in range(0, len(text), PACKET_SIZE // 4):
            self._stream.send(f"O{text[start : start + PACKET_SIZE // 4].encode().hex()}")
        return "OK"


def _point(rest: str) -> tuple[int, int, int]:
    kind, address, size = rest.partition(";")[0].split(",")
    return int(kind), int(address, 16), int(size, 16)
