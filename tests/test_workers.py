"""Workers that are killed, exit, fail, or are left: the stream goes on, and nobody stays behind."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from socket import socketpair
from typing import Any

import pytest
import torch
from conftest import shards
from hypothesis import given
from hypothesis import strategies as st

from energon_fn import (
    DefaultTaskEncoder,
    WorkerConfig,
    WorkerError,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    reraise_exception,
)
from energon_fn.processes import workers
from energon_fn.processes.turns import Local, deliveries
from energon_fn.processes.workers import Pool, PoolOptions

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    shards(path, (50, 50))
    return path


class Numbers(DefaultTaskEncoder[Any, Any, Any, Any]):
    def encode_sample(self, sample: Any) -> tuple[int, float]:
        return sample["json"]["n"], random.random()

    def batch(self, samples: list[Any]) -> list[Any]:
        return samples


class Exiting(Numbers):
    """The first process to come to the 30th sample exits, as long as there is a file to remove."""

    def __init__(self, marker: Path):
        self.marker = marker

    def encode_sample(self, sample: Any) -> tuple[int, float]:
        if sample["json"]["n"] == 30 and self.marker.exists():
            self.marker.unlink()
            sys.exit(3)
        return super().encode_sample(sample)


class Dying(Numbers):
    def encode_sample(self, sample: Any) -> tuple[int, float]:
        if sample["json"]["n"] == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_sample(sample)


class SpecialError(Exception):
    def __init__(self, code: int, reason: str):  # does not unpickle by its one message
        super().__init__(f"{reason} ({code})")


class Failing(Numbers):
    error: Exception

    def __init__(self, error: Exception):
        self.error = error

    def encode_sample(self, sample: Any) -> Any:
        if sample["json"]["n"] == 5:
            raise self.error
        return super().encode_sample(sample)


def config(workers: int, lanes: int = 4, **options: Any) -> WorkerConfig:
    return WorkerConfig(rank=0, world_size=1, num_workers=workers, lanes=lanes, **options)


def train(folder: Path, workers: int, encoder: Any = None, **options: Any) -> Any:
    dataset = get_train_dataset(
        folder,
        batch_size=3,
        shuffle_buffer_size=20,
        max_samples_per_sequence=10,
        worker_config=config(workers),
        task_encoder=encoder or Numbers(),
    )
    return get_loader(dataset, **options)


def val(folder: Path, workers: int, encoder: Any, **options: Any) -> Any:
    dataset = get_val_dataset(
        folder,
        batch_size=3,
        split_part="train",
        worker_config=config(workers, **options),
        task_encoder=encoder,
    )
    return get_loader(dataset)


def children() -> set[int]:
    return {child.pid or 0 for child in multiprocessing.active_children()}


def wait_for(condition: Any, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


class Lanes:
    """Streams of so many items each."""

    def __init__(self, *lengths: int):
        self.lengths = lengths

    def __call__(self, lane: int, epoch: int) -> Any:
        return lambda state: ((f"{lane}.{n}", n + 1) for n in range(state or 0, self.lengths[lane]))

    def in_turn(self) -> list[str]:
        """The items in turn, by hand; a lane that has ended is passed over."""
        turns = range(max(self.lengths, default=0))
        lanes = range(len(self.lengths))
        return [f"{lane}.{n}" for n in turns for lane in lanes if n < self.lengths[lane]]


@given(st.lists(st.integers(0, 6), max_size=9))
def test_lanes_have_their_turns_and_end_once(lengths: list[int]) -> None:
    lanes = Lanes(*lengths)
    found = list(deliveries(lanes, 0, dict.fromkeys(range(len(lengths)))))
    assert [item.batch for item in found if item.state is not None] == lanes.in_turn()
    assert sorted(item.lane for item in found if item.state is None) == list(range(len(lengths)))


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("start", [{}, {1: None, 2: 3, 0: 1}])
def test_any_number_of_workers_delivers_the_lanes_in_turn(
    workers: int, start: dict[int, Any]
) -> None:
    streams = Lanes(3, 0, 5, 1, 4)
    lanes = dict(start) or dict.fromkeys(range(5))
    expected = [item.batch for item in deliveries(streams, 0, dict(lanes))]
    runner = Pool(streams, workers, PoolOptions(restarts=0)) if workers else Local(streams)
    runner.start(0, lanes)
    found = []
    while lanes:
        item = runner.receive()
        found.append(item.batch)
        del lanes[item.lane]
        if item.state is not None:
            lanes[item.lane] = item.state
    runner.close()
    assert found == expected


def test_killing_workers_at_random_changes_nothing(folder: Path) -> None:
    whole = list(itertools.islice(train(folder, 0), 150))
    before, chance, found = children(), random.Random(1), []
    loader = train(folder, 2, max_worker_restarts=1000)
    for batch in itertools.islice(loader, 150):
        found.append(batch)
        living = sorted(children() - before)  # that one is gone may be seen some batches later
        if living and chance.random() < 0.15:
            os.kill(chance.choice(living), signal.SIGKILL)
            time.sleep(chance.random() / 50)
    assert found == whole


def test_a_worker_that_exits_is_started_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "marker").touch()
    found = list(val(folder, 2, Exiting(tmp_path / "marker")))
    assert [n for batch in found for n, _ in batch] == list(range(100))
    assert "exited with 3" in caplog.text


def test_deaths_without_end_are_an_error(folder: Path) -> None:
    before = children()
    with pytest.raises(WorkerError, match=r"killed by SIGKILL.*max_worker_restarts"):
        list(val(folder, 2, Dying()))
    assert wait_for(lambda: children() == before)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_arrive_as_what_they_are(folder: Path, workers: int) -> None:
    handled = {"global_error_handler": reraise_exception}
    with pytest.raises(ZeroDivisionError, match="by five") as caught:
        list(val(folder, workers, Failing(ZeroDivisionError("by five")), **handled))
    notes = "".join(caught.value.__notes__)
    assert "encode_sample of sample 00005" in notes
    if workers:
        assert 'test_workers.py", line' in notes
    with pytest.raises((SpecialError, RuntimeError), match=r"odd \(7\)"):
        list(val(folder, workers, Failing(SpecialError(7, "odd")), **handled))
    with pytest.raises(EOFError, match="mine"):  # not to be taken for a connection's end
        list(val(folder, workers, Failing(EOFError("mine")), **handled))


def test_workers_stay_for_the_next_epoch_and_go_with_the_loader(folder: Path) -> None:
    before = children()
    loader = val(folder, 2, Numbers())
    first = list(loader)
    workers = children() - before
    assert len(workers) == 2
    assert list(loader) == first
    assert children() - before == workers
    del loader
    assert wait_for(lambda: children() == before)


def test_an_exception_in_the_training_loop_leaves_no_worker(folder: Path) -> None:
    before = children()

    def training() -> None:
        for _ in train(folder, 2):
            raise RuntimeError("loss is nan")

    with pytest.raises(RuntimeError, match="loss is nan"):
        training()
    assert wait_for(lambda: children() == before)


def test_closing_a_loader_keeps_its_place(folder: Path) -> None:
    whole = list(itertools.islice(train(folder, 0), 20))
    loader, before = train(folder, 2), children()
    found = list(itertools.islice(loader, 7))
    loader.close()
    assert children() == before
    assert found + list(itertools.islice(loader, 13)) == whole


def test_spawned_workers_do_the_same(folder: Path) -> None:
    loader = train(folder, 2, multiprocessing_context="spawn")
    expected = list(itertools.islice(train(folder, 0), 12))
    assert list(itertools.islice(loader, 12)) == expected


class Sleeping(Numbers):
    """Hangs at the 30th sample as long as there is a marker to remove; is slow but gets on."""

    def __init__(self, marker: Path):
        self.marker = marker

    def encode_sample(self, sample: Any) -> tuple[int, float]:
        time.sleep(0.05)
        if sample["json"]["n"] == 30 and self.marker.exists():
            self.marker.unlink()
            time.sleep(600)  # hangs here
        return super().encode_sample(sample)

    def batch(self, samples: list[Any]) -> list[Any]:
        return samples


def test_a_worker_that_hangs_is_asked_why_and_started_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "marker").touch()
    dataset = val(folder, 1, Sleeping(tmp_path / "marker")).dataset
    loader = get_loader(replace(dataset, batch_size=40), watchdog_timeout_seconds=1)
    found = list(loader)  # a batch takes more than a second: slow, but it gets on
    assert sorted(n for batch in found for n, _ in batch) == list(range(100))
    for said in ("encode_sample", "sample 00030", "time.sleep(600)  # hangs here", "restarts left"):
        assert said in caplog.text
    assert "pluggy" not in caplog.text  # of the stack, what is the worker's own
    assert caplog.text.count("has not got on") == 1


def test_a_worker_that_hangs_can_end_the_run_instead(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "marker").touch()
    dataset = val(folder, 2, Sleeping(tmp_path / "marker")).dataset
    loader = get_loader(dataset, watchdog_timeout_seconds=0.5, fail_on_timeout=True)
    before = children()
    with pytest.raises(WorkerError, match="encode_sample of sample 00030"):
        list(loader)
    assert children() <= before


class Forking(Numbers):
    """Dies, and leaves behind a process that has all it had open, as long as there is a marker."""

    def __init__(self, marker: Path):
        self.marker = marker

    def encode_sample(self, sample: Any) -> tuple[int, float]:
        if sample["json"]["n"] == 30 and self.marker.exists():
            self.marker.unlink()
            child = os.fork()
            if not child:
                time.sleep(20)
                os._exit(0)
            self.marker.with_name("child").write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_sample(sample)


def test_a_death_is_seen_though_its_connection_stays_open(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "ASK_EVERY", 0.2)
    (tmp_path / "marker").touch()
    dataset = val(folder, 1, Forking(tmp_path / "marker")).dataset
    found = list(get_loader(dataset, watchdog_timeout_seconds=None))
    assert sorted(n for batch in found for n, _ in batch) == list(range(100))
    child = int((tmp_path / "child").read_text())
    assert alive(child)  # or else the connection was closed after all
    os.kill(child, signal.SIGKILL)


def test_a_loader_is_its_processs_own(folder: Path) -> None:
    batches = iter(train(folder, 1))
    next(batches)
    child = os.fork()
    if not child:
        try:
            next(batches)
        except WorkerError as error:
            os._exit(7 if "of which this is a fork" in str(error) else 2)
        finally:  # whatever else is raised: the tests shall not go on in here
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def sockets(process: int) -> set[str]:
    found = set()
    for file in os.listdir(f"/proc/{process}/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found.add(os.readlink(f"/proc/{process}/fd/{file}"))
    return {name for name in found if name.startswith("socket:")}


def test_workers_started_at_once_do_not_share_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly() -> Any:
        pair = socketpair()
        time.sleep(0.1)
        return pair

    monkeypatch.setattr(workers, "socketpair", slowly)
    own = sockets(os.getpid())
    with ThreadPoolExecutor(2) as threads:
        options = PoolOptions(context="fork")
        pools = list(threads.map(lambda _: Pool(Lanes(1), 1, options), range(2)))
    for pool in pools:  # they have closed what they inherited when they deliver
        pool.start(0, {0: None})
        pool.receive()
    first, second = (sockets(pool._workers[0].process.pid or 0) - own for pool in pools)
    for pool in pools:
        pool.close()
    assert len(first) >= 2
    assert len(second) >= 2
    assert not first & second


class Counting(Numbers):
    def __init__(self, file: Path):
        self.file = file

    def batch(self, samples: list[Any]) -> Iterator[Any]:  # type: ignore[override]
        with self.file.open("a") as file:
            file.write(".")
        yield torch.zeros(200_000)


def test_a_slow_consumer_bounds_what_is_made_ahead(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    loader = iter(train(folder, 2, Counting(made), prefetch_factor=3))
    for received in (1, 2, 3):
        next(loader)
        time.sleep(0.3)
        assert len(made.read_text()) <= 2 * 3 + received + 2


class Small:
    """Lanes of small batches, made in the same memory each; writes a dot for each one made."""

    def __init__(self, file: Path, length: int = 100, size: int = 3, last: Any = None):
        self.file, self.length, self.size, self.last = file, length, size, last

    def __call__(self, lane: int, epoch: int) -> Any:
        def stream(state: Any) -> Iterator[Any]:
            memory = torch.zeros(self.size, dtype=torch.int64)
            for n in range(state[0] if state else 0, self.length):
                with self.file.open("a") as file:
                    file.write(".")
                memory[:] = 1000 * lane + n
                yield memory, (n + 1, f"state {lane}.{n}")
            if self.last:
                self.last()

        return stream

    def made(self) -> int:
        return len(self.file.read_text()) if self.file.exists() else 0


Found = tuple[int, list[int] | None, Any]


def received(runner: Local | Pool, lanes: dict[int, Any]) -> Found:
    """The next delivery, the way of a loader."""
    item = runner.receive()
    del lanes[item.lane]
    if item.state is not None:
        lanes[item.lane] = item.state
    return item.lane, None if item.batch is None else item.batch.tolist(), item.state


def all_of(streams: Small, lanes: int) -> list[Found]:
    runner, left = Local(streams), dict.fromkeys(range(lanes))
    runner.start(0, left)
    found = []
    while left:
        found.append(received(runner, left))
    return found


@contextlib.contextmanager
def pool_with_a_message_begun(
    streams: Small, lanes: int, workers: int, **options: Any
) -> Iterator[tuple[Pool, dict[int, Any], list[Found]]]:
    """A pool, the lanes that are left, and what was delivered until some of a message was."""
    pool = Pool(streams, workers, PoolOptions(prefetch=1, **options))
    left, found = dict.fromkeys(range(lanes)), list[Found]()
    try:
        pool.start(0, left)
        while not pool._workers[0].received:
            # The first goes at once; when more are made before it is asked for, they go together.
            least = len(found) + 5 * workers
            assert wait_for(lambda least=least: streams.made() >= least)
            found += [received(pool, left) for _ in range(workers)]
        yield pool, left, found
    finally:
        pool.close()


@pytest.mark.parametrize(("lanes", "workers"), [(1, 1), (3, 1), (3, 2)])
def test_batches_of_one_message_come_each_with_its_state(
    tmp_path: Path, lanes: int, workers: int
) -> None:
    streams = Small(tmp_path / "made")
    with pool_with_a_message_begun(streams, lanes, workers) as (pool, left, found):
        while left:
            found.append(received(pool, left))
    assert found == all_of(Small(tmp_path / "again"), lanes)


def test_a_worker_killed_in_the_middle_of_its_message_goes_on_behind_what_was_delivered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    streams = Small(tmp_path / "made")
    with pool_with_a_message_begun(streams, 3, 2) as (pool, left, found):
        for worker in pool._workers:
            os.kill(worker.process.pid or 0, signal.SIGKILL)
        while left:
            found.append(received(pool, left))
    assert found == all_of(Small(tmp_path / "again"), 3)
    assert caplog.text.count("killed by SIGKILL") == 2


def test_a_new_start_leaves_the_rest_of_a_message(tmp_path: Path) -> None:
    streams = Small(tmp_path / "made")
    with pool_with_a_message_begun(streams, 2, 1) as (pool, _, _):
        left: dict[int, Any] = {1: (50, ""), 0: (49, "")}
        pool.start(0, left)
        assert [received(pool, left)[1] for _ in range(4)] == [
            [n] * 3 for n in (1050, 49, 1051, 50)
        ]


def fail() -> None:
    raise ZeroDivisionError("behind the others")


def test_an_error_comes_behind_the_batches_before_it(tmp_path: Path) -> None:
    streams = Small(tmp_path / "made", length=9, last=fail)
    with pool_with_a_message_begun(streams, 1, 1) as (pool, left, found):
        while len(found) < 9:
            found.append(received(pool, left))
        with pytest.raises(ZeroDivisionError, match="behind the others"):
            pool.receive()
    assert [batch for _, batch, _ in found] == [[n] * 3 for n in range(9)]


def test_what_is_made_arrives_while_the_next_takes_for_ever(tmp_path: Path) -> None:
    streams = Small(tmp_path / "made", length=9, last=partial(time.sleep, 1000))
    pool = Pool(streams, 1, PoolOptions(watchdog=20, fail_on_timeout=True))
    left = {0: None}
    pool.start(0, left)
    assert [received(pool, left)[1] for _ in range(9)] == [[n] * 3 for n in range(9)]
    pool.close()


@pytest.mark.parametrize(("size", "together"), [(3, 16), (12_000, 3), (50_000, 1)])
def test_a_slow_consumer_bounds_how_many_small_batches_are_made_ahead(
    tmp_path: Path, size: int, together: int
) -> None:
    streams = Small(tmp_path / "made", length=1000, size=size)
    pool, left = Pool(streams, 2, PoolOptions(prefetch=2)), dict.fromkeys(range(4))
    counted, started = Counter[str](), time.monotonic()
    pool.start(0, left)
    for n in range(1, 40):
        item = pool.receive()
        left[item.lane] = left.pop(item.lane) or item.state
        counted.update(pool.news())
        if n % 13 == 0:
            time.sleep(0.2)
        # Two messages on the way, one that waits, and one that is being delivered.
        assert streams.made() <= n + 2 * together * (2 + 2)
    took = time.monotonic() - started
    pool.close()
    assert (counted["idle"] > 0) == (together < 16)
    assert 0 < counted["queued"] < 39 * took


def test_large_states_do_not_make_both_sides_wait_for_each_other() -> None:
    def endless(lane: int, epoch: int) -> Any:
        return lambda state: ((b"x" * 2_000_000, (n, "y" * 1_000_000)) for n in itertools.count())

    pool, left = Pool(endless, 1, PoolOptions(context="fork")), {0: None}
    for _ in range(3):
        pool.start(0, left)
        item = pool.receive()
        left[0] = item.state
        time.sleep(0.2)  # the worker makes what it may
    assert len(item.batch) == 2_000_000
    pool.close()


class Stuck(Numbers):
    """Hangs for good at the 40th sample that a worker comes to."""

    seen = 0

    def encode_sample(self, sample: Any) -> tuple[int, float]:
        self.seen += 1
        if self.seen == 40:
            time.sleep(1000)
        return super().encode_sample(sample)


SCRIPT = """
import os, sys, time
sys.path.insert(0, {here!r})
from test_workers import Stuck, children, train
from pathlib import Path
loader = train(Path({folder!r}), 2, Stuck(), prefetch_factor=30)
for n, batch in enumerate(loader):
    if n == 3:
        print(*children(), flush=True)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nobody_outlives_the_training_process(folder: Path, how: signal.Signals) -> None:
    script = textwrap.dedent(SCRIPT.format(here=str(HERE), folder=str(folder)))
    before = set(os.listdir("/dev/shm"))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as training:
        assert training.stdout is not None
        assert training.stderr is not None
        workers = [int(pid) for pid in training.stdout.readline().split()]
        assert len(workers) == 2
        assert all(map(alive, workers))
        os.kill(training.pid, how)
        training.wait(20)
        said = training.stderr.read()
    assert wait_for(lambda: not any(map(alive, workers)))
    assert set(os.listdir("/dev/shm")) <= before
    if how == signal.SIGINT:
        assert said.rstrip().endswith("KeyboardInterrupt")
        assert said.count("Traceback") == 1


FORKING = """
import os, sys
sys.path.insert(0, {here!r})
from test_workers import alive, children, train, wait_for
from pathlib import Path
loader = train(Path({folder!r}), 2, max_worker_restarts=0)
batches = iter(loader)
print(next(batches))
workers = children()
for end in (sys.exit, os._exit):
    child = os.fork()
    if not child:
        end(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not wait_for(lambda: not all(map(alive, workers)), 0.3)
for _ in range(19):
    print(next(batches))
assert children() == workers and len(workers) == 2
"""


def test_a_fork_of_the_training_process_ends_without_a_word_and_alone(folder: Path) -> None:
    script = textwrap.dedent(FORKING.format(here=str(HERE), folder=str(folder)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    whole = list(itertools.islice(train(folder, 0), 20))
    assert done.stdout.splitlines() == list(map(str, whole))


def test_saving_and_resuming_again_and_again_leaves_nothing_behind(folder: Path) -> None:
    def round_trip(state: Any) -> Any:
        loader = train(folder, 2)
        if state is not None:
            loader.load_state_dict(state)
        for _ in itertools.islice(loader, 3):
            state = loader.state_dict()
        return state

    def held() -> tuple[int, int, int]:
        gc.collect()
        descriptors = len(os.listdir("/proc/self/fd"))
        return descriptors, len(children()), len(gc.get_objects())

    state = None
    for _ in range(5):
        state = round_trip(state)
    before, memory = held(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(60):
        state = round_trip(state)
    after = held()
    assert after[:2] == before[:2]
    assert after[2] < before[2] + 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 20_000  # kB
