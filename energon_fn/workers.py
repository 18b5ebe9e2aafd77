"""Worker processes: each runs some lanes of a rank and sends their batches in turn.

A worker is told ``(run, epoch, lanes with their states)`` and from then on sends ``(run,
delivery)``, at most ``prefetch`` ahead of what was received. Since every batch comes with its
lane's state, a worker that dies is started again behind the last batch that was received from it,
and nobody notices but the log. The connection is the only tie: when either side is gone, the other
sees it closed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from socket import socket, socketpair
from typing import Any, NamedTuple

import numpy as np
import torch

from energon_fn import position, seeds, wire
from energon_fn.errors import WorkerError, logger
from energon_fn.guard import describe
from energon_fn.streams import State, Stream

Streams = Callable[[int, int], Stream[Any]]
"""``(lane, epoch) -> stream``; it must pickle where workers are spawned and not forked."""

ASKED = None  # the question what a worker is doing


@dataclass(frozen=True)
class Delivery:
    """A lane's next batch and its state after it. At the lane's end both are None."""

    lane: int
    batch: Any = None
    state: State = None
    counts: Mapping[str, float] = field(default_factory=dict)
    """What was counted on the way to it, see :func:`energon_fn.position.count`."""


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
            counts = dict(position.here.counts)
            position.here.counts.clear()
            batch, state = item or (None, None)
            yield Delivery(lane, batch, state, counts)


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


@dataclass(frozen=True)
class PoolOptions:
    """How workers are run; see :func:`~energon_fn.get_loader`."""

    prefetch: int = 2
    """Batches that each worker makes ahead."""
    restarts: int = 3
    """How many deaths in all are made good."""
    context: str | None = None
    """How processes are started."""
    watchdog: float | None = 60
    """Seconds in which a worker must get on with something."""
    fail_on_timeout: bool = False
    """Raise for one that does not, instead of starting it again."""


class Worker(NamedTuple):
    """A worker process, and this side of its connections: one for work, one for questions."""

    process: BaseProcess
    work: socket
    questions: socket
    borrower: wire.Borrower


class Pool:
    """The workers of one rank: ``count`` processes. ``after`` is called when they have ended."""

    def __init__(
        self,
        streams: Streams,
        count: int,
        options: PoolOptions,
        after: Callable[[], object] = lambda: None,
    ):
        self._streams, self._options = streams, options
        self._workers = [_start(streams, options) for _ in range(count)]
        self._restarts = options.restarts
        self._run = 0
        self.close: Callable[[], Any] = weakref.finalize(
            self, _end, self._workers, after, os.getpid()
        )
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
        for number in range(len(self._workers)):
            self._command(number)

    def receive(self) -> Delivery:
        """The next delivery. Raises what the lane's functions raised."""
        while True:
            number = self._worker_of[next(iter(self._lanes))]
            worker = self._workers[number]
            self._wait(number)
            try:
                run, message = worker.borrower.receive(worker.work)
                # Its answer to every message: one more may be made ahead, and in which memory.
                wire.send(worker.work, worker.borrower.give_back())
            except (EOFError, ConnectionError):
                self._restart(number)
                continue
            if run != self._run:
                continue
            if isinstance(message, Exception):
                raise message
            delivery: Delivery = message
            return delivery

    def _wait(self, number: int) -> None:
        """Wait for the worker to send something; if it hangs, end it."""
        worker, seconds, steps = self._workers[number], self._options.watchdog, -1
        while not multiprocessing.connection.wait([worker.work], seconds):
            status = _ask(worker)
            if status.get("steps", steps) != steps:
                steps = status["steps"]
                continue
            report = (
                f"worker {number} (process {worker.process.pid}) has not got on for {seconds} "
                f"seconds. It is in {status.get('stage', 'code that does not answer')} of "
                f"{status.get('item', 'an unknown sample')}:\n{status.get('stack', '')}"
                "watchdog_timeout_seconds sets how long a step may take."
            )
            if self._options.fail_on_timeout:
                raise WorkerError(report)
            logger.error(report)
            worker.process.kill()

    def _command(self, number: int) -> None:
        lanes = {lane: s for lane, s in self._lanes.items() if self._worker_of[lane] == number}
        # As an array, large states go through shared memory: the worker may be waiting for this
        # side to receive, and not read what does not fit into the socket.
        command = np.frombuffer(pickle.dumps((self._run, self._epoch, lanes)), np.uint8)
        with contextlib.suppress(ConnectionError):  # then receiving will fail, and restart it
            wire.Lender().send(self._workers[number].work, *wire.dumps(command))

    def _restart(self, number: int) -> None:
        process = self._workers[number].process
        process.join(5)  # its connection ends a little before it does
        _stop([self._workers[number]])
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        if not self._restarts:
            raise WorkerError(
                f"worker {number} (process {process.pid}) {how} and no restarts are left. What it "
                "printed may say why. If it ran out of memory, take fewer workers or a smaller "
                "prefetch_factor or packing_buffer_size; max_worker_restarts sets how many deaths "
                "are made good."
            )
        self._restarts -= 1
        logger.warning(
            f"worker {number} (process {process.pid}) {how}; it is started again where it was "
            f"({self._restarts} restarts left)"
        )
        self._workers[number] = _start(self._streams, self._options)
        self._command(number)


def _start(streams: Streams, options: PoolOptions) -> Worker:
    ours, theirs = zip(*(socketpair() for _ in range(2)), strict=True)
    _ours.update(ours)
    make: Any = multiprocessing.get_context(options.context)
    process: BaseProcess = make.Process(
        target=_work,
        args=(*theirs, streams, options.prefetch),
        name="energon_fn worker",
        daemon=True,
    )
    process.start()
    for connection in theirs:
        connection.close()
    work, questions = ours
    return Worker(process, work, questions, wire.Borrower())


def _end(workers: list[Worker], after: Callable[[], object], process: int) -> None:
    if os.getpid() != process:  # a fork of the training process: they are not its workers
        return
    _stop(workers)
    after()


def _stop(workers: list[Worker]) -> None:
    for worker in workers:
        worker.work.close()
        worker.questions.close()
    for worker in workers:
        worker.process.join(0.05)  # one that waits sees its connection closed, and ends
        worker.process.kill()
        worker.process.join()


def _ask(worker: Worker) -> dict[str, Any]:
    """What a worker is doing; nothing if it does not answer."""
    worker.questions.settimeout(5)
    try:
        wire.send(worker.questions, ASKED)
        answer: dict[str, Any] = wire.receive(worker.questions)
    except (EOFError, OSError):
        return {}
    return answer


def _answer(questions: socket, thread: int) -> None:
    """Tell what this worker is doing in ``thread``, whenever asked."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            wire.receive(questions)
            here = position.here
            stack = "".join(traceback.format_stack(sys._current_frames()[thread]))
            item = here.item if here.stage == "load" else describe(here.item)
            answer = {"steps": here.steps, "stage": here.stage, "item": str(item), "stack": stack}
            wire.send(questions, answer)
    os._exit(0)  # nobody is there any more, whatever the other thread is still busy with


_ours: weakref.WeakSet[socket] = weakref.WeakSet()


def _close_inherited() -> None:
    # A worker that held its siblings' connections open would keep them from seeing the end.
    for connection in list(_ours):
        connection.close()


os.register_at_fork(after_in_child=_close_inherited)


def _work(connection: socket, questions: socket, streams: Streams, prefetch: int) -> None:
    """What a worker process does until its connection is closed."""
    asked = threading.Thread(target=_answer, args=(questions, threading.get_ident()), daemon=True)
    asked.start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        ends, ahead = Ends(connection, wire.Lender(), wire.Borrower()), 0
        command = ends.borrower.receive(connection)
        while True:
            run, epoch, lanes = pickle.loads(command)
            turns = deliveries(streams, epoch, lanes)
            ahead, command = _carry_out(ends, prefetch, ahead, run, turns)


class Ends(NamedTuple):
    """A worker's side of its connection for work."""

    connection: socket
    lender: wire.Lender
    borrower: wire.Borrower


def _carry_out(
    ends: Ends, prefetch: int, ahead: int, run: int, turns: Iterator[Delivery]
) -> tuple[int, Any]:
    """Send all that comes of a command.

    Gives back how many messages are not answered yet, and the next command, which may come before
    all is sent.
    """
    connection, lender, borrower = ends
    while message := _next_message(turns):
        while ahead >= prefetch:
            command = borrower.receive(connection)
            if not isinstance(command, list):
                return ahead, command
            lender.take_back(command)
            ahead -= 1
        try:
            data = wire.dumps((run, message))
        except Exception as error:
            what = type(getattr(message, "batch", message)).__qualname__
            data = wire.dumps((run, TypeError(
                f"a batch of type {what} cannot be sent from a worker: {error}. Define what is in "
                "it (classes, functions) at the top level of a module, or load with num_workers=0."
            )))  # fmt: skip
        lender.send(connection, *data)
        ahead += 1
    while isinstance(command := borrower.receive(connection), list):
        lender.take_back(command)
        ahead -= 1
    return ahead, command


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
