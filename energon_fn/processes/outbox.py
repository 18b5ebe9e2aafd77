"""A worker's side of its connection: what it is told, and what it sends.

Batches that are small and made quickly go together in a message: to wake up for each would cost
either side more than to handle it, as whatever else ran meanwhile has taken the caches.
"""

from __future__ import annotations

import math
import os
import pickle
import threading
import time
import traceback
from collections.abc import Iterator
from socket import socket
from typing import Any

from energon_fn import position
from energon_fn.meters import Meters
from energon_fn.processes import wire
from energon_fn.processes.turns import Delivery
from energon_fn.streams import State

MESSAGE_BYTES = 1 << 18
MESSAGE_BATCHES = 16
"""Batches go together in a message up to so many bytes or batches ..."""
TOGETHER = 0.01
"""... and in so many seconds; one that takes longer to make goes at once."""
NEWS_EVERY = 0.05
"""Seconds in which what was counted is told once: with each of many small messages is dear."""


class Outbox:
    """A worker's side of its connection for work: what it is told, and what it sends.

    Its methods are the working thread's, but for :meth:`send_old`.
    """

    def __init__(self, connection: socket, prefetch: int, meters: Meters):
        self._connection, self._prefetch, self._meters = connection, prefetch, meters
        self._came, self._lock = wire.poll(connection), threading.Lock()
        self._lender, self._borrower = wire.Lender(), wire.Borrower()
        self._ahead = 0  # messages that are not answered yet
        self._commands: list[Any] = []
        self._message: list[wire.Parts] = []  # what was put and is not sent yet
        self._told = -math.inf  # when the meters' news were

    def begin(self) -> tuple[int, dict[int, State]]:
        """Wait for a command; gives back the epoch and the lanes with their states."""
        with self._lock:
            while not self._commands:
                self._listen()
            self._run, epoch, lanes = self._commands.pop(0)
            self._message, self._size = [], 0
            self._done = -math.inf  # the first delivery goes at once
        return epoch, lanes

    def put(self, thing: Delivery | Exception) -> bool:
        """Send a delivery or an error, now or with the next ones. False: there is a new command.

        Waits if as much is made as may be.
        """
        now, parts = time.monotonic(), _dumps(thing)
        with self._lock:
            if isinstance(thing, Exception) or thing.state is None:
                self._told = -math.inf  # there may be nothing behind an error or a lane's end
            if not self._message:
                self._since = now
            self._message.append(parts)
            self._size += wire.size(parts)
            while self._came.poll(0):
                self._listen()
            full = self._size >= MESSAGE_BYTES or len(self._message) >= MESSAGE_BATCHES
            if full and self._ahead >= self._prefetch:
                asked = time.monotonic()
                while self._ahead >= self._prefetch and not self._commands:
                    self._listen()
                position.count("idle", time.monotonic() - asked)
            took = now - self._done  # and so long, it seems, the next will take
            if full or now + took > self._since + TOGETHER:
                self._send()
            if self._message:
                parts[1:] = map(bytes, parts[1:])  # the next may be made in the same memory
        self._done = time.monotonic()
        return not self._commands

    def flush(self) -> None:
        """Send what is left, as soon as it may be."""
        with self._lock:
            self._send()
            while self._message and not self._commands:
                self._listen()
                self._send()

    def send_old(self) -> None:
        """Send what should have been sent, while the next takes longer than it seemed."""
        if self._lock.acquire(blocking=False):  # or else the working thread is here itself
            try:
                while self._came.poll(0):
                    self._listen()
                if self._message and time.monotonic() > self._since + TOGETHER:
                    self._send()
            finally:
                self._lock.release()

    def _send(self) -> None:
        """Send what there is, if it may be."""
        if self._message and self._ahead < self._prefetch and not self._commands:
            now, news = time.monotonic(), dict[str, float]()
            if now > self._told + NEWS_EVERY:
                news, self._told = self._meters.news(), now
            head = wire.dumps((self._run, now, news))
            self._lender.send(self._connection, [head, *self._message])
            self._ahead += 1
            self._message, self._size = [], 0

    def _listen(self) -> None:
        """Wait for the other side to say something: an answer or a command."""
        said = wire.loads(*self._borrower.receive(self._connection))
        if isinstance(said, list):
            self._lender.take_back(said)
            self._ahead -= 1
        else:
            self._commands.append(said)


def _dumps(thing: Delivery | Exception) -> wire.Parts:
    try:
        return wire.dumps(thing)
    except Exception as error:
        what = type(getattr(thing, "batch", thing)).__qualname__
        return wire.dumps(TypeError(
            f"a batch of type {what} cannot be sent from a worker: {error}. Define what is in "
            "it (classes, functions) at the top level of a module, or load with num_workers=0."
        ))  # fmt: skip


def next_message(turns: Iterator[Delivery]) -> Delivery | Exception | None:
    try:
        return next(turns, None)
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        try:
            portable: Exception = pickle.loads(pickle.dumps(error))
        except Exception:
            portable = RuntimeError(f"{type(error).__qualname__}: {error}")
        portable.add_note(f"in worker process {os.getpid()}, whose traceback is\n{trace}")
        return portable
