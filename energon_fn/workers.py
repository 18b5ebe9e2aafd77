"""Worker processes: each runs some lanes of a rank and sends their batches in turn.

A worker is told ``(run, epoch, lanes with their states)`` and from then on sends ``(run, delivery)``,
at most ``prefetch`` ahead of what was received. Since every batch comes with its lane's state, a
worker that dies is started again behind the last batch that was received from it, and nobody
notices but the log. The connection is the only tie: when either side is gone, the other sees it
closed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from socket import socket, socketpair
from typing import Any

import torch

from energon_fn import seeds, wire
from energon_fn.errors import WorkerError, logger
from energon_fn.streams import State, Stream

Streams = Callable[[int, int], Stream[Any]]
"""``(lane, epoch) -> stream``; it must pickle where workers are spawned and not forked."""

READY = None  # what the receiver answers to every message: one more may be made ahead


@dataclass(frozen=True)
class Delivery:
    """A lane's next batch and its state after it. At the lane's end both are None."""

    lane: int
    batch: Any = None
    state: State = None


def deliveries(streams: Streams, epoch: int, lanes: dict[int, State]) -> Iterator[Delivery]:
    """The batches of the lanes in turn, the first lane first; of a lane that ends, its end, once.

    >>> def count(lane, epoch):
    ...     return lambda state: ((n, n + 1) for n in range(state or 0, lane + 1))
    >>> [(d.lane, d.batch) for d in deliveries(count, epoch=0, lanes={0: None, 1: None})]
    [(0, 0), (1, 0), (0, None), (1, 1), (1, None)]
    """
    running = {lane: streams(lane, epoch)(state) for lane, state in lanes.items()}
    while running:
        for lane, stream in list(running.items()):
            item = next(stream, None)
            if item is None:
                del running[lane]
            yield Delivery(lane, *item or ())


class Local:
    """Runs the lanes in this process; like a :class:`Pool` of no workers."""

    def __init__(self, streams: Streams):
        self._streams = streams

    def start(self, epoch: int, lanes: dict[int, State]) -> None:
        self._turns = deliveries(self._streams, epoch, lanes)

    def receive(self) -> Delivery:
        with seeds.untouched():  # this process has random numbers of its own
            return next(self._turns)

    def close(self) -> None:
        """Nothing to end."""


class Pool:
    """The workers of one rank.

    count: how many. prefetch: batches that each makes ahead. restarts: how many deaths in all are
    made good before :class:`~energon_fn.WorkerError` is raised. context: how processes are started,
    ``"fork"`` or ``"spawn"``; None takes Python's default.
    """

    def __init__(
        self, streams: Streams, count: int, *, prefetch: int, restarts: int, context: str | None
    ):
        self._make: Callable[[], tuple[BaseProcess, socket]] = lambda: _start(streams, prefetch, context)
        self._workers = [self._make() for _ in range(count)]
        self._restarts = restarts
        self._run = 0
        self.close: Callable[[], Any] = weakref.finalize(self, _stop, self._workers)
        """End the workers; this also happens when the pool, or the process, goes."""

    def start(self, epoch: int, lanes: dict[int, State]) -> None:
        """Have the workers run ``lanes`` from their states on.

        lanes: those that have not ended, the one whose turn is next coming first. The caller keeps
        it so, since a worker that dies is started again from it. What the workers were at before
        is left, and what they had made ahead is lost.
        """
        self._run += 1
        self._epoch, self._lanes = epoch, lanes
        self._worker_of = {lane: turn % len(self._workers) for turn, lane in enumerate(lanes)}
        for worker in range(len(self._workers)):
            self._command(worker)

    def receive(self) -> Delivery:
        """The next delivery. Raises what the lane's functions raised."""
        while True:
            worker = self._worker_of[next(iter(self._lanes))]
            connection = self._workers[worker][1]
            try:
                run, message = wire.receive(connection)
                wire.send(connection, READY)
            except (EOFError, ConnectionError):
                self._restart(worker)
                continue
            if run != self._run:
                continue
            if isinstance(message, Exception):
                raise message
            delivery: Delivery = message
            return delivery

    def _command(self, worker: int) -> None:
        lanes = {lane: s for lane, s in self._lanes.items() if self._worker_of[lane] == worker}
        with contextlib.suppress(ConnectionError):  # then receiving will fail, and restart it
            wire.send(self._workers[worker][1], (self._run, self._epoch, lanes))

    def _restart(self, worker: int) -> None:
        process, connection = self._workers[worker]
        connection.close()
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        if not self._restarts:
            raise WorkerError(
                f"worker {worker} (process {process.pid}) {how} and no restarts are left. If it "
                "ran out of memory, take fewer workers or a smaller prefetch_factor or "
                "packing_buffer_size; max_worker_restarts sets how many deaths are made good."
            )
        self._restarts -= 1
        logger.warning(
            f"worker {worker} (process {process.pid}) {how}; it is started again where it was "
            f"({self._restarts} restarts left)"
        )
        self._workers[worker] = self._make()
        self._command(worker)


def _start(streams: Streams, prefetch: int, context: str | None) -> tuple[BaseProcess, socket]:
    ours, theirs = socketpair()
    _ours.add(ours)
    make: Any = multiprocessing.get_context(context)
    process: BaseProcess = make.Process(
        target=_work, args=(theirs, streams, prefetch), name="energon_fn worker", daemon=True
    )
    process.start()
    theirs.close()
    return process, ours


def _stop(workers: list[tuple[BaseProcess, socket]]) -> None:
    for process, connection in workers:
        connection.close()
        process.terminate()
    for process, _ in workers:
        process.join()


_ours: weakref.WeakSet[socket] = weakref.WeakSet()


def _close_inherited() -> None:
    # A worker that held its siblings' connections open would keep them from seeing the end.
    for connection in list(_ours):
        connection.close()


os.register_at_fork(after_in_child=_close_inherited)


def _work(connection: socket, streams: Streams, prefetch: int) -> None:
    """What a worker process does until its connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        command = wire.receive(connection)
        while True:
            command = _carry_out(connection, prefetch, streams, *command)


def _carry_out(
    connection: socket,
    prefetch: int,
    streams: Streams,
    run: int,
    epoch: int,
    lanes: dict[int, State],
) -> Any:
    """Send all that comes of a command; give back the next one, which may come before that."""
    turns, ahead = deliveries(streams, epoch, lanes), 0
    while message := _next_message(turns):
        while ahead >= prefetch:
            if (command := wire.receive(connection)) is not READY:
                return command
            ahead -= 1
        try:
            data = wire.dumps((run, message))
        except Exception as error:
            what = type(getattr(message, "batch", message)).__qualname__
            data = wire.dumps((run, TypeError(
                f"a batch of type {what} cannot be sent from a worker: {error}. Define what is in "
                "it (classes, functions) at the top level of a module, or load with num_workers=0."
            )))  # fmt: skip
        wire.send_dumped(connection, *data)
        ahead += 1
    while (command := wire.receive(connection)) is READY:
        pass
    return command


def _next_message(turns: Iterator[Delivery]) -> Delivery | Exception | None:
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
