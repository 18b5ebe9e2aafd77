"""Worker processes: each runs some lanes of a rank and sends their batches in turn.

A worker is told ``(run, epoch, lanes with their states)`` and from then on sends messages of a run
and some deliveries, at most ``prefetch`` messages ahead of what was received. Since every batch
comes with its lane's state, a worker that dies is started again behind the last batch that was
delivered, and nobody notices but the log. The connection is the only tie: when either side is gone,
the other sees it closed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import traceback
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from socket import socket, socketpair
from typing import Any, NamedTuple

import torch

from energon_fn import position
from energon_fn.errors import WorkerError, logger
from energon_fn.guard import describe
from energon_fn.meters import Meters
from energon_fn.processes import wire
from energon_fn.processes.outbox import Outbox, next_message
from energon_fn.processes.turns import Delivery, Streams, deliveries
from energon_fn.streams import State

ASKED = None  # the question what a worker is doing
ASK_EVERY = 5.0
"""Seconds after which a worker that sends nothing is asked, or a tenth of what a step may take."""
LOOK_EVERY = 0.05
"""Seconds after which a worker that is stuck with a batch is seen to have others to send."""


@dataclass(frozen=True)
class PoolOptions:
    """How workers are run; see :func:`~energon_fn.get_loader`."""

    prefetch: int = 2
    """Batches that each worker makes ahead; small ones in a message count as one."""
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
    came: select.poll
    """Tells whether something came by ``work``."""
    received: deque[tuple[float, wire.Parts]]
    """Deliveries of this run that came and were not asked for yet, and when they were sent."""


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
        self._process = os.getpid()
        self._run = 0
        self._news: defaultdict[str, float] = defaultdict(float)
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
        self._check_process()
        self._run += 1
        self._epoch, self._lanes = epoch, lanes
        self._worker_of = {lane: turn % len(self._workers) for turn, lane in enumerate(lanes)}
        for number in range(len(self._workers)):
            self._command(number)

    def receive(self) -> Delivery:
        """The next delivery. Raises what the lane's functions raised."""
        self._check_process()
        number = self._worker_of[next(iter(self._lanes))]
        while not self._workers[number].received:
            worker = self._workers[number]
            if not self._wait(number):
                self._restart(number)
                continue
            try:
                head, *deliveries = worker.borrower.receive(worker.work)
                # The answer to every message: one more may be sent, and in which memory.
                wire.send(worker.work, worker.borrower.give_back())
            except (EOFError, ConnectionError):
                self._restart(number)
                continue
            run, sent, news = wire.loads(head)
            for name, amount in news.items():
                self._news[name] += amount
            if run == self._run:
                worker.received.extend((sent, parts) for parts in deliveries)
        sent, parts = self._workers[number].received.popleft()
        self._news["queued"] += time.monotonic() - sent
        try:
            delivery: Delivery | Exception = wire.loads(parts)
        except Exception as error:
            raise TypeError(
                f"a batch that worker {number} sent cannot be read: {type(error).__name__}: "
                f"{error}. See that what is in it unpickles (exceptions with arguments of their "
                "own do not, say), or load with num_workers=0."
            ) from error
        if isinstance(delivery, Exception):
            raise delivery
        return delivery

    def news(self) -> Mapping[str, float]:
        """By how much the workers' sums have grown since the last time, as far as they told.

        Also ``queued``: the seconds that batches have waited here to be taken.
        """
        news, self._news = self._news, defaultdict(float)
        return news

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise WorkerError(
                f"this loader's workers are those of process {self._process}, of which this is a "
                "fork: make a loader of its own here (get_loader), or iterate over this one anew"
            )

    def _wait(self, number: int) -> bool:
        """Wait for the worker to send something, or to be dead (False); if it hangs, end it.

        A death is mostly seen by its connection, unless a process that it started still has it.
        """
        worker, seconds, steps, since = self._workers[number], self._options.watchdog, None, 0.0
        look = ASK_EVERY if seconds is None else min(seconds / 10, ASK_EVERY)
        while not worker.came.poll(1000 * look):
            if not worker.process.is_alive():
                return bool(worker.came.poll(0))
            if seconds is None:
                continue
            status, now = _ask(worker), time.monotonic()
            if steps is None or status.get("steps", steps) != steps:
                steps, since = status.get("steps", -1), now
            if now - since < seconds:
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
        return True

    def _command(self, number: int) -> None:
        lanes = {lane: s for lane, s in self._lanes.items() if self._worker_of[lane] == number}
        self._workers[number].received.clear()
        command = wire.dumps((self._run, self._epoch, lanes))
        with contextlib.suppress(ConnectionError):  # then receiving will fail, and restart it
            # With a lender, large states go through shared memory: the worker may be waiting for
            # this side to receive, and not read what does not fit into the socket.
            wire.Lender().send(self._workers[number].work, [command])

    def _restart(self, number: int) -> None:
        process = self._workers[number].process
        process.join(5)  # its connection ends a little before it does
        _stop([self._workers[number]])
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        if not self._restarts:
            context: Any = multiprocessing.get_context(self._options.context)
            method = context.get_start_method()
            guard = (
                f"Workers that come by {method} import the script first, whose loop must be under "
                "`if __name__ == '__main__':`; or give multiprocessing_context=\"fork\". "
            )
            raise WorkerError(
                f"worker {number} (process {process.pid}) {how} and no restarts are left. What it "
                f"printed may say why. {'' if method == 'fork' else guard}If it ran out of memory, "
                "take fewer workers or a smaller prefetch_factor or packing_buffer_size; "
                "max_worker_restarts sets how many deaths are made good."
            )
        self._restarts -= 1
        logger.warning(
            f"worker {number} (process {process.pid}) {how}; it is started again where it was "
            f"({self._restarts} restarts left)"
        )
        self._workers[number] = _start(self._streams, self._options)
        self._command(number)


def _start(streams: Streams, options: PoolOptions) -> Worker:
    make: Any = multiprocessing.get_context(options.context)
    with _starting:  # one that is started meanwhile would have the other ends, too
        ours, theirs = zip(*(socketpair() for _ in range(2)), strict=True)
        _ours.update(ours)
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
    return Worker(process, work, questions, wire.Borrower(), wire.poll(work), deque())


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
    try:
        worker.questions.settimeout(5)
        wire.send(worker.questions, ASKED)
        answer: dict[str, Any] = wire.receive(worker.questions)
    except (EOFError, OSError):
        return {}
    return answer


def _attend(questions: socket, thread: int, outbox: Outbox) -> None:
    """Tell what this worker does in ``thread``, whenever asked; see that it sends what it has."""
    came = wire.poll(questions)
    with contextlib.suppress(EOFError, OSError):
        while True:
            while not came.poll(1000 * LOOK_EVERY):
                outbox.send_old()
            wire.receive(questions)
            here, item = position.here, "what cannot be told"
            with contextlib.suppress(Exception):  # a user's sample may be anything
                item = str(here.item if here.stage == "load" else describe(here.item))
            frames = traceback.extract_stack(sys._current_frames()[thread])
            names = [frame.name for frame in frames]  # those of the training script come first
            own = frames[names.index(_work.__name__) :] if _work.__name__ in names else frames
            stack = "".join(traceback.format_list(own))
            steps = here.meters.calls
            answer = {"steps": steps, "stage": here.stage, "item": item, "stack": stack}
            wire.send(questions, answer)
    os._exit(0)  # nobody is there any more, whatever the other thread is still busy with


_ours: weakref.WeakSet[socket] = weakref.WeakSet()
_starting = threading.Lock()


def _close_inherited() -> None:
    # A worker that held its siblings' connections open would keep them from seeing the end.
    global _starting
    _starting = threading.Lock()  # held by whoever forked
    for connection in list(_ours):
        connection.close()
    # Nor are its parent's children its own, which multiprocessing would end together with it.
    getattr(multiprocessing.process, "_children", set()).clear()


os.register_at_fork(after_in_child=_close_inherited)


def _work(connection: socket, questions: socket, streams: Streams, prefetch: int) -> None:
    """What a worker process does until its connection is closed."""
    # Its own from here on, also before the first command: a fork has its parent's.
    meters = position.here.meters = Meters()
    outbox = Outbox(connection, prefetch, meters)
    attended = questions, threading.get_ident(), outbox
    threading.Thread(target=_attend, args=attended, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            epoch, lanes = outbox.begin()
            turns = deliveries(streams, epoch, lanes, meters)
            while (message := next_message(turns)) and outbox.put(message):
                del message  # before the next is made
            outbox.flush()
