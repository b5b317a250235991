"""Ends a run that has stopped getting on, with the reason, instead of leaving it on the machines until someone looks.

Two things are watched, each by a thread:

* `Watchdog`, in every rank: no step, batch of an evaluation or part of a checkpoint for `train.watchdog_minutes`. The
  stacks of all threads go into run.log and the process ends. The thread needs Python's lock; should something hold
  that for good, another process (`training.backstop`) does the same a little later by SIGALRM. Time in which a run is
  stopped, as by SLURM's suspend, doesn't count.
* `Peers`, over TCP: a rank that is gone. Every rank holds one connection to rank 0. The kernel closes it with the
  process, however that ends, and its keep-alive notices a machine that has vanished. NCCL itself notices neither: the
  others would wait in their next collective until `engine.timeout_minutes`. An error on one rank travels the same way.

Ranks that learn of a loss get `GRACE_S` to end by themselves, with the error of the collective they were in, then
leave. Those that have begun to end get `ENDING_S`: after an error on all ranks one is gone while another still waits
for wandb.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import secrets
import selectors
import socket
import tempfile
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Final, Self

import torch.distributed as dist

from configs.errors import UserError
from training.backstop import Backstop, Clock
from training.distributed import Processes
from training.logging import FINISH_TIMEOUT_S

LOG = logging.getLogger(__name__)
HANG_EXIT_CODE: Final = 70
"""Exit code of a run that the watchdog ended (EX_SOFTWARE)."""
LOST_EXIT_CODE: Final = 69
"""Exit code of the ranks that are left when another is gone or has failed (EX_UNAVAILABLE)."""
COMPILE_S: Final = 3600.0
"""What the watchdog allows for a first step or a first evaluation, which compile, if its own limit is shorter."""
HANG_GRACE_S: Final = 20.0
"""A launcher ends all ranks when the first one leaves: until then all have written their stacks."""
BACKSTOP_S: Final = 60.0
"""How much later than the watchdog the other process acts."""
GRACE_S: Final = 15.0
"""Time for a rank to end by itself once another is lost."""
ENDING_S: Final = FINISH_TIMEOUT_S + 30.0
"""Time for a rank that ends by itself, uploads to wandb included."""
CONNECT_S: Final = 30.0
"""Time for all ranks to reach rank 0 at the start."""


class Watchdog:
    """Ends the process if `beat` isn't called for `minutes`; 0: never. A context manager; beats begin the watch."""

    def __init__(self, minutes: float) -> None:
        self.limit_s = minutes * 60
        self._clock = Clock(min(self.limit_s / 10, 5.0))
        self._deadline = float("inf")
        """By the clock, which is up to a tick slow."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Something got done. Costs a look at the clock."""
        self._deadline = self._clock.seconds + self._clock.tick_s + self.limit_s

    def compiling(self) -> None:
        """What comes next is done for the first time."""
        self._deadline = self._clock.seconds + self._clock.tick_s + max(self.limit_s, COMPILE_S)

    def __enter__(self) -> Self:
        if self.limit_s > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        with Backstop(self.limit_s + HANG_GRACE_S + BACKSTOP_S, self._clock.tick_s) as backstop:
            while not self._ended.wait(self._clock.tick_s):
                backstop.alive()  # comes to an end only if this thread itself can't run
                self._clock.tick()
                if self._clock.seconds > self._deadline:
                    self._bark()

    def _bark(self) -> None:
        """Write the stacks, let the other ranks do so, and leave."""
        LOG.info("stacks of all threads:\n" + stacks())
        LOG.error(
            f"No step for {self.limit_s / 60:g} minutes: the run hangs and is ended. The stacks of all ranks are in "
            "run.log. Start again to go on from the last checkpoint; train.watchdog_minutes sets the limit."
        )
        time.sleep(HANG_GRACE_S)
        os._exit(HANG_EXIT_CODE)


def stacks() -> str:
    """Where each thread of this process is."""
    with tempfile.TemporaryFile("w+") as file:  # faulthandler writes to descriptors only
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


class RankLostError(UserError):
    """Another rank is gone or has failed, so this one can't go on."""

    exit_code = LOST_EXIT_CODE


@dataclass(frozen=True)
class Loss:
    """What ended a rank."""

    rank: int
    host: str
    reason: str

    def __str__(self) -> str:
        return f"Rank {self.rank} on {self.host} {self.reason}. Start again to go on from the last checkpoint."


GONE = "is gone: its process was killed or crashed, or its machine is off"


class Peers:
    """Watches the other ranks while the block runs. Collective to enter; with one process it does nothing.

    An error of a collective that leaves the block because a rank is lost becomes a `RankLostError` that names it.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.lost: Loss | None = None
        self.told = False
        """Whether the user is told why this rank ends."""
        self._ending_since_s: float | None = None
        self._exit_code = LOST_EXIT_CODE
        self._news = threading.Event()
        self._lines: dict[int, _Line] = {}
        self._lock = threading.Lock()

    def ending(self) -> None:
        """This rank has begun to end by itself."""
        self._ending_since_s = time.monotonic()

    def __enter__(self) -> Self:
        if self.processes.world_size > 1:
            self._connect()
            threading.Thread(target=self._watch, name="peers", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._lines:
            return
        lost = None
        if error is not None and of_collective(error):
            self._news.wait(GRACE_S / 3)  # the connection may close a moment after the collective's
            lost = self.lost
        self._say_goodbye(None if lost else error)
        if lost is not None:
            self.told = True
            raise RankLostError(str(lost)) from error
        if isinstance(error, Exception):  # its own: should the process not come to its end, this is what ended it
            self.told = True
            self._exit_code = error.exit_code if isinstance(error, UserError) else 1

    def _connect(self) -> None:
        """A line from every rank to rank 0, which proves with a secret that it is one of ours."""
        own = self.processes
        server = socket.create_server(("", 0), backlog=own.world_size) if own.is_main else None
        place = (own.host, server.getsockname()[1], secrets.token_hex(16)) if server is not None else None
        address, port, secret = own.broadcast(place)  # type: ignore[misc]
        trouble = None
        try:
            if server is not None:
                self._lines = accept_all(server, own.world_size, secret)
            else:
                line = _Line(socket.create_connection((address, port), timeout=CONNECT_S), 0, address)
                line.send({"secret": secret, "rank": own.rank, "host": socket.gethostname()})
                self._lines = {0: line}
        except OSError as error:
            trouble = f"{address}:{port}: {error.strerror or error}"
        finally:
            if server is not None:
                server.close()
        troubles = [text for text in own.gather(trouble) if text is not None]
        if troubles:  # of use, not of need
            LOG.warning(f"a rank that dies will be noticed late: ranks can't connect ({troubles[0]})")
            for open_line in self._lines.values():
                open_line.close()
            self._lines = {}

    def _watch(self) -> None:
        """Read all lines until each has ended; the first loss is passed on."""
        with selectors.DefaultSelector() as selector:
            for line in self._lines.values():
                selector.register(line.socket, selectors.EVENT_READ, line)
            while selector.get_map():
                for key, _ in selector.select():
                    loss = key.data.receive()
                    if loss is not None:
                        self._note(loss)
                    if key.data.ended:
                        selector.unregister(key.fileobj)

    def _note(self, loss: Loss) -> None:
        with self._lock:
            if self.lost is not None or loss.rank == self.processes.rank:
                return
            self.lost = loss
            self._news.set()
            for line in self._lines.values():  # from rank 0 to the others; a rank other than 0 has only told rank 0
                if self.processes.is_main and line.rank != loss.rank:
                    line.send({"loss": asdict(loss)})
        threading.Thread(target=self._leave_in_time, args=(loss,), name="peers-grace", daemon=True).start()

    def _leave_in_time(self, loss: Loss) -> None:
        """End a process that a collective holds."""
        time.sleep(GRACE_S * (1 if loss.reason == GONE else 3))  # what has failed on one rank is failing here too
        if self._ending_since_s is not None:
            time.sleep(max(self._ending_since_s + ENDING_S - time.monotonic(), 0.0))
        if not self.told:
            LOG.error(str(loss))
        os._exit(self._exit_code)

    def _say_goodbye(self, error: BaseException | None) -> None:
        """Tell the others how this rank ends, so that they don't take it for a crash."""
        with self._lock:
            message: dict[str, Any] = {"bye": True}
            if error is not None and not isinstance(error, SystemExit | KeyboardInterrupt):
                what = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
                reason = f"has failed: {what.removeprefix('configs.errors.')}".rstrip(".")
                message["loss"] = asdict(Loss(self.processes.rank, socket.gethostname(), reason))
            for line in self._lines.values():
                line.send(message)
                line.close()


class _Line:
    """One connection; messages are JSON, one a line."""

    def __init__(self, connection: socket.socket, rank: int, host: str) -> None:
        self.socket = connection
        self.rank = rank
        self.host = host
        self.ended = False
        self._partial = b""
        connection.settimeout(CONNECT_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):  # Linux; elsewhere the system's own, slower values
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: dict[str, Any]) -> None:
        """Send, unless the other end is gone, which `receive` sees as well."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            LOG.info(f"rank {self.rank} on {self.host} can't be told: {error}")

    def receive(self) -> Loss | None:
        """Read what has come: a loss, or the end of the line, which without a goodbye is one."""
        try:
            data = self.socket.recv(65536)
        except OSError:  # reset, timed out by the keep-alive, or closed on this side
            data = b""
        *lines, self._partial = (self._partial + data).split(b"\n")
        loss = None
        for message in (json.loads(line) for line in lines):
            self.ended = self.ended or "bye" in message
            loss = Loss(**message["loss"]) if "loss" in message else loss
        if not data and not self.ended:
            self.ended = True
            if self.socket.fileno() != -1:
                loss = Loss(self.rank, self.host, GONE)
        return loss

    def close(self) -> None:
        """Close the connection, what was sent before it included."""
        self.socket.close()


def accept_all(server: socket.socket, world_size: int, secret: str) -> dict[int, _Line]:
    """Rank 0's lines to all others, by rank. Raises OSError (TimeoutError) if one doesn't come."""
    lines: dict[int, _Line] = {}
    deadline = time.monotonic() + CONNECT_S
    while len(lines) < world_size - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        connection, address = server.accept()
        connection.settimeout(5)
        try:
            with connection.makefile("rb") as file:
                hello = json.loads(file.readline(1000) or b"{}")
        except (OSError, ValueError):  # not one of ours
            hello = {}
        if not secrets.compare_digest(str(hello.get("secret", "")), secret):
            LOG.warning(f"a connection from {address[0]} that is no rank of this run was turned away")
            connection.close()
            continue
        lines[int(hello["rank"])] = _Line(connection, int(hello["rank"]), str(hello["host"]))
    return lines


def of_collective(error: BaseException) -> bool:
    """Whether the error, or what led to it, looks like a collective's whose other end is gone."""
    text = str(error)
    if isinstance(error, dist.DistError) or any(sign in text for sign in ("gloo", "NCCL", "Connection")):
        return True
    return error.__cause__ is not None and of_collective(error.__cause__)


__all__ = ["HANG_EXIT_CODE", "LOST_EXIT_CODE", "Peers", "RankLostError", "Watchdog", "of_collective"]
