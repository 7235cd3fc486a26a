"""A process that dies or hangs ends the run at once, and the error names it.

A collective waits an hour (`rendezvous.TIMEOUT`) for a process that is gone. So every process holds
a connection to rank 0, sends a heartbeat at regular intervals, and exits when one of the others

- has died: the kernel closes its connection at once, however it died;
- has sent no heartbeat for `patience` seconds: it hangs, or its machine or network is gone;
- has reported a failure: after `GRACE` seconds, in which most will fail for the same reason, with
  a better message than ours.

This happens in a thread of its own, which needs the interpreter's lock only for a moment. Long
steps, checkpoints and copies release that lock while they last.
"""

import json
import logging
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from elastic.cluster.place import Place, from_all, from_first, listen
from elastic.cluster.requeue import may_requeue, requeue
from elastic.cluster.signals import EXIT_CODES, AgreedExit
from elastic.console import write_now

log = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds without a heartbeat after which a process counts as hung. Products, backward passes, and
writing and hashing checkpoints let heartbeats through every 0.1 s; copying 1 GB into bytes took
0.7 s."""

GRACE = 8.0
"""Seconds that the others have to exit by themselves after one has failed."""

MOMENT = 0.5
"""Seconds that an error waits for its cause: a collective fails because somebody has died."""

CONNECT_SECONDS = 30.0


@dataclass
class _Peer:
    """A process at the other end of a connection."""

    connection: socket.socket
    last_seen: float
    """When its last message came, on our own clock."""
    rank: int = -1
    """Unknown until it has introduced itself."""
    host: str = ""
    pid: int = 0
    parent: int = 0
    unread: bytes = b""


class Watchdog:
    """Watches over the processes of a run while its block lasts; nothing for a single process.

    A process may leave the block normally at any time. One that leaves it with an error reports it
    to the others, and has `patience` seconds to exit. One that was ended by a signal (SystemExit
    with a code of `EXIT_CODES`) ends the others too: their collectives fail, which becomes the
    same SystemExit. All processes must enter the block, and the process group must exist.
    """

    def __init__(self, place: Place, patience: float = PATIENCE, grace: float = GRACE) -> None:
        self.place, self.patience, self.grace = place, patience, grace
        self._peers: dict[socket.socket, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._sending = threading.Lock()
        self._listener: socket.socket | None = None
        self._token = ""
        self._cause = ""
        self._code = 1
        self._deadline = float("inf")
        self._introduced = 0
        self._finished = False
        self._stop = False
        self._failure_reported = threading.Event()
        self._wake: socket.socket | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Self:
        if self.place.world_size == 1:
            return self
        bell, self._wake = socket.socketpair()  # closing it wakes the thread
        self._selector.register(bell, selectors.EVENT_READ)
        if self.place.rank == 0:
            self._listener = listen(0, self.place.world_size)
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._token = secrets.token_hex(8)
            from_first((self._token, self._listener.getsockname()[1], *_myself()))
        else:
            self._token, port, host, pid = from_first(None)
            self._connect(port, host, pid)
        self._thread.start()
        connected = sum(from_all(self._listener is None and bool(self._peers)))
        while self._listener is not None and self._introduced < connected:
            time.sleep(0.01)  # else the next message might be sent before all are connected
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._thread.is_alive():
            return
        if error is None or isinstance(error, AgreedExit):
            self._finished = True  # first: who receives this may be gone before the next line
            self._send(["done"])
            self._stop = True  # last: the thread closes the connections
            assert self._wake is not None
            self._wake.close()
            self._thread.join(2.0)
            return
        signalled = set(EXIT_CODES.values())
        code = error.code if isinstance(error, SystemExit) else None
        if code not in signalled and self._deadline == float("inf"):
            self._failure_reported.wait(MOMENT)  # who is behind this error, perhaps
        if code not in signalled and self._code in signalled:  # it is not our error
            log.info("%s; leaving too", self._cause)
            self._deadline = time.monotonic() + self.patience
            raise SystemExit(self._code) from error
        if isinstance(error, SystemExit):
            self._code = error.code if isinstance(error.code, int) and error.code else 1
            reason = f"left with exit code {self._code}"
        else:
            lines = str(error).strip().splitlines()
            reason = ": ".join(["failed", type(error).__name__, *lines[:1]])
        # The thread stays, in case this process hangs on its way out.
        self._cause = f"{self._name(self.place.rank, *_myself())} {reason}"
        self._deadline = time.monotonic() + self.patience
        self._send(["failed", self._code, self._cause])

    # The thread

    def _watch(self) -> None:
        beat = self.patience / 10
        next_beat = last = time.monotonic()
        while not self._stop:
            for key, _ in self._selector.select(max(0.0, next_beat - time.monotonic())):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data is not None:
                    self._read(key.data)
            now = time.monotonic()
            if now - last > self.patience / 2:  # it was us who stood still
                for peer in self._peers.values():
                    peer.last_seen = now
            last = now
            if now >= next_beat:
                self._send(["heartbeat"])
                next_beat = now + beat
            for peer in list(self._peers.values()):
                if now - peer.last_seen > self.patience:
                    self._lose(peer, f"sent no heartbeat for {self.patience:g} s")
            if now > self._deadline:
                self._leave()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        self._add(_Peer(connection, time.monotonic()))

    def _add(self, peer: _Peer) -> None:
        peer.connection.settimeout(1.0)
        with self._sending:
            self._peers[peer.connection] = peer
        self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        with self._sending:
            del self._peers[peer.connection]
        peer.connection.close()

    def _read(self, peer: _Peer) -> None:
        """Take what has arrived from a process."""
        try:
            arrived = peer.connection.recv(65536)
        except OSError:
            arrived = b""
        if not arrived:
            self._lose(peer, "died")
            return
        peer.last_seen = time.monotonic()
        *lines, peer.unread = (peer.unread + arrived).split(b"\n")
        for line in lines:
            if peer.connection not in self._peers:
                return
            try:
                self._handle(peer, *json.loads(line))
            except (TypeError, ValueError):  # not a process of this run
                self._drop(peer)
                return

    def _handle(self, peer: _Peer, kind: str, *fields: Any) -> None:
        """Act on one message; ValueError if it is not of this run."""
        if kind == "hello":
            token, rank, host, pid, parent = fields
            if token != self._token:
                raise ValueError(token)
            peer.rank, peer.host, peer.pid, peer.parent = rank, host, pid, parent
            self._introduced += 1
        elif peer.rank < 0:
            raise ValueError(kind)
        elif kind == "done":
            self._drop(peer)
        elif kind == "failed":
            self._drop(peer)
            if not self._cause:
                self._code, self._cause = fields
                self._deadline = time.monotonic() + self.grace
                self._failure_reported.set()
                if self.place.rank == 0:  # only rank 0 is connected to all
                    self._send([kind, *fields])
        elif kind == "lost":
            self._code, self._cause = fields
            self._leave()
        elif kind != "heartbeat":
            raise ValueError(kind)

    def _lose(self, peer: _Peer, how: str) -> None:
        """A process has died or hangs: the run ends, unless it is ending anyway."""
        if peer.rank < 0 or self._finished or self._deadline < float("inf"):
            self._drop(peer)
            return
        self._cause = f"{self._name(peer.rank, peer.host, peer.pid)} {how}"
        self._leave(first_lost=peer.rank == 0)

    def _leave(self, first_lost: bool = False) -> None:
        """End this process now: the main thread may be waiting for a process that is gone.

        Rank 0 tells the others, and ends those of them that it started: one may hang.
        """
        if self.place.rank == 0:
            self._send(["lost", self._code, self._cause])
        # One line per machine is enough.
        if self.place.local_rank == 0 or (first_lost and self.place.rank == 1):
            line = f"error: {self._cause}; stopping. The same command goes on from the last"
            write_now(f"\n{line} checkpoint\n")  # a progress bar may be in the line
        for peer in self._peers.values():
            if (peer.host, peer.parent) == _myself():
                os.kill(peer.pid, signal.SIGKILL)
        if self.place.rank == 0 and self._code == EXIT_CODES[signal.SIGUSR1] and may_requeue():
            try:
                requeue()
            except OSError as error:
                write_now(f"error: {error}\n")
        time.sleep(0.2)  # what is read before we are gone is not lost with us
        os._exit(self._code)

    # Messages

    def _send(self, message: list) -> None:
        """Send a message over every connection; one that is lost is noticed when reading."""
        data = json.dumps(message).encode() + b"\n"
        with self._sending:
            for peer in self._peers.values():
                try:
                    peer.connection.sendall(data)
                except OSError:
                    pass

    def _connect(self, port: int, host: str, pid: int) -> None:
        """Introduce this process to rank 0."""
        address = os.environ["MASTER_ADDR"]
        try:
            connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
        except OSError as error:
            log.warning(
                "rank %d cannot reach %s:%d (%s): its death would go unnoticed",
                self.place.rank,
                address,
                port,
                error,
            )
            return
        self._add(_Peer(connection, time.monotonic(), 0, host, pid))
        self._send(["hello", self._token, self.place.rank, *_myself(), os.getppid()])

    def _name(self, rank: int, host: str, pid: int) -> str:
        return f"rank {rank} of {self.place.world_size} (host {host}, process {pid})"


def _myself() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()
