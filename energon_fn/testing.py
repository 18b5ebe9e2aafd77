"""A test kit for pipelines of your own: do they go on exactly where they were?

::

    from energon_fn.testing import check_resume

    def test_my_pipeline_resumes():
        check_resume(make_loader)  # the function that makes your loader for a WorkerConfig
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import GeneratorType, ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from energon_fn import checkpoint, position, seeds
from energon_fn.errors import StateError
from energon_fn.failures.watch import NEVER, snapshot
from energon_fn.guard import describe, guarded
from energon_fn.lanes import WorkerConfig
from energon_fn.loader import Loader, get_loader
from energon_fn.pipeline import Dataset
from energon_fn.processes.turns import deliveries
from energon_fn.streams import State

Layout = tuple[int, int]
"""World size, and workers of each rank."""
Place = tuple[int, int, int]
"""Epoch, lane, and the batch's number in that lane and epoch, from 1 on."""
Turn = list[tuple[Place, Any]]
"""A batch of each rank, with its place."""

CAUSES = (
    "Usual causes: random numbers from elsewhere than the global generators of random, NumPy and "
    "torch (np.random.default_rng() without a seed, say), something kept between samples (on the "
    "encoder, in a cache), a sample that is changed in place while somebody else has it, the time."
)
STATELESS = (
    "It is marked @stateless, and so not seeded. If it draws random numbers, take the mark away or "
    "write @stateless(restore_seeds=True)."
)
PROCESSES = (
    "Repeated in one process, every function did the same. It is something in which processes "
    "differ: what a class, a module or a cache has kept from before, the number of threads "
    "(workers compute with one), ids, environment variables, devices."
)
INTERPRETERS = (
    "Within one interpreter every function did the same. It is something in which they differ: the "
    "order of a set of strings, or hash() (sort the set; use zlib.crc32 or hashlib), or ids."
)


def check_resume(
    make_loader: Callable[[WorkerConfig], Loader[Any]],
    *,
    batches: int = 40,
    layouts: Sequence[Layout] = ((1, 0), (1, 2), (2, 0), (2, 1), (4, 0)),
    every: int = 5,
) -> str:
    """Check that a pipeline gives the same batches, to the bit, wherever and however it is resumed.

    make_loader: makes dataset, task encoder and loader anew with the ``worker_config`` that it is
    given, whose rank, workers and lanes it must keep.
    batches: so many are walked, over all ranks. Let the data be so little that this is more than an
    epoch, or what is kept from one to the next is not found.
    layouts: pairs of world size and workers. The pipeline is walked and saved in each of them, and
    each state goes through JSON and is resumed in another; at last one is in a new interpreter.
    There are as many lanes as all layouts can share.
    every: it is resumed behind each of the first ten batches, then behind every so-many-th.

    Raises AssertionError at the first difference. It says where in the batch that is, of which
    samples, and if it can be told, which function did not do the same again. If there is none,
    what was checked is given back in words.

    >>> import tempfile, time
    >>> from energon_fn import DefaultTaskEncoder, get_train_dataset
    >>> from energon_fn.demo import build_demo
    >>> folder = tempfile.TemporaryDirectory()
    >>> shards = build_demo(folder.name, samples=12, shards=2)
    >>> class Timed(DefaultTaskEncoder):
    ...     def encode_sample(self, sample):
    ...         return {"__key__": sample["__key__"], "made": time.time()}
    >>> def make_loader(worker_config):
    ...     dataset = get_train_dataset(folder.name, batch_size=2, shuffle_buffer_size=10,
    ...                                 worker_config=worker_config, task_encoder=Timed())
    ...     return get_loader(dataset)
    >>> check_resume(make_loader, batches=10, layouts=[(1, 0), (2, 0)])
    Traceback (most recent call last):
        ...
    AssertionError: from the beginning with 2 ranks and 0 workers each, not 1 rank and 0 workers,
    something else comes:
      batch['made'][0] is ..., was ... (batch 1 of lane 0 in epoch 0)
      samples ...
      encode_sample did not do the same again for sample ...: result[0]['made'] is ..., was ...
      Usual causes: random numbers from elsewhere than ..., the time.
    """
    lanes = math.lcm(*(world_size * max(workers, 1) for world_size, workers in layouts))
    expected: dict[Place, Any] = {}
    saved: dict[Layout, dict[int, Any]] = {}
    reference, walks = layouts[0], itertools.count()

    def make(layout: Layout) -> list[Loader[Any]]:
        world_size, workers = layout
        ranks = (
            WorkerConfig(rank=rank, world_size=world_size, num_workers=workers, lanes=lanes)
            for rank in range(world_size)
        )
        return [_checked(make_loader(config), config) for config in ranks]

    def walk(layout: Layout, length: int, how: str, state: Any = None) -> dict[int, Any]:
        """Walk so far and compare. Gives the states, by the number of batches before them."""
        _stir(next(walks))
        loaders = make(layout)
        done, states = 0, {0: checkpoint.merge(loader.state_dict() for loader in loaders)}
        try:
            for turn, after in _turns(loaders, length, state):
                if not saved:
                    expected.update(snapshot(turn))  # as it is before anybody changes it
                else:
                    compare(turn, how, state, PROCESSES)
                done += len(turn)
                if after is not None:
                    states[done] = after
        except StateError as error:
            raise AssertionError(f"{how}:\n  {error}") from error
        finally:
            for loader in loaders:
                loader.close()
        assert done, f"{how}: no batch comes"
        return states

    def compare(turn: Turn, how: str, state: Any, otherwise: str) -> None:
        for place, batch in turn:
            was = expected.get(place, batch)  # not all layouts get equally far
            if found := difference(was, batch):
                epoch, lane, number = place
                samples = " / ".join(dict.fromkeys(map(describe, (was, batch))))
                culprit = _culprit(lambda: make((1, 0))[0], place, state) or otherwise
                raise AssertionError(
                    f"{how}, something else comes:\n  {found} (batch {number} of lane {lane} in "
                    f"epoch {epoch})\n  {samples}\n  {culprit}"
                )

    with seeds.untouched():
        for layout in layouts:
            how = f"from the beginning with {_named(layout)}, not {_named(reference)}"
            saved[layout] = walk(layout, batches, how)
        points = [*range(1, min(11, batches)), *range(11, batches, every)]
        for n, point in enumerate(points):
            here = layouts[n % len(layouts)]
            there = layouts[(n + 1 + n // len(layouts)) % len(layouts)]
            done = max(number for number in saved[here] if number <= point)
            how = f"saved behind batch {done} with {_named(here)}, resumed with {_named(there)}"
            walk(there, min(2 * lanes, batches - done), how, saved[here][done])
        done, state = sorted(saved[reference].items())[:2][-1]
        turns, not_tried = _in_new_interpreter(make((1, 0))[0], batches - done, state)
        for turn in turns:
            how = f"saved behind batch {done}, resumed in a new interpreter"
            compare(turn, how, state, INTERPRETERS)
    return (
        f"{len(expected)} batches are the same in {len(layouts)} layouts of {lanes} lanes and "
        f"resumed at {len(points)} points, {not_tried or 'in a new interpreter too'}"
    )


def difference(was: Any, now: Any, path: str = "batch") -> str | None:
    """Where two things differ first, in words, or None: types, shapes, and all values to the bit.

    >>> difference({"a": [1.0, float("nan")]}, {"a": [1.0, float("nan")]})
    >>> difference({"a": torch.tensor([[1, 2], [3, 4]])}, {"a": torch.tensor([[1, 2], [3, 5]])})
    "batch['a'][1, 1] is 5, was 4"
    """
    if was is now:
        return None
    if type(was) is not type(now) and not isinstance(was, Image.Image):
        return f"{path} is of type {type(now).__name__}, was of type {type(was).__name__}"
    if isinstance(was, torch.Tensor | np.ndarray | np.generic):
        return _in_array(was, now, path)
    parts, parts_now = _parts(was), _parts(now)
    if parts is None or parts_now is None:
        same = was.hex() == now.hex() if isinstance(was, float) else was == now
        return None if same else f"{path} is {reprlib.repr(now)}, was {reprlib.repr(was)}"
    for (name, part), (name_now, part_now) in zip(parts, parts_now, strict=False):
        if name != name_now:
            return f"{path} has {name_now} where it had {name}"
        if found := difference(part, part_now, path + name):
            return found
    if len(parts) != len(parts_now):
        return f"{path} has {len(parts_now)} parts, had {len(parts)}"
    return None


def _parts(thing: Any) -> list[tuple[str, Any]] | None:
    """What it is made of, each with the way to it; None of what compares itself."""
    if isinstance(thing, dict):
        return [(f"[{key!r}]", part) for key, part in thing.items()]
    if isinstance(thing, list | tuple):
        return [(f"[{n}]", part) for n, part in enumerate(thing)]
    equals: object = type(thing).__eq__
    if isinstance(thing, Image.Image):
        kind = [("'s mode", thing.mode), ("'s size", thing.size)]
        return [*kind, (".getpalette()", thing.getpalette()), ("", np.asarray(thing))]
    if dataclasses.is_dataclass(thing):
        names = [field.name for field in dataclasses.fields(thing)]
    elif equals is object.__eq__ and not callable(thing):
        names = []
    else:
        return None
    names += getattr(thing, "__dict__", ())
    return [(f".{name}", getattr(thing, name)) for name in dict.fromkeys(names)]


def _in_array(was: Any, now: Any, path: str) -> str | None:
    kind, kind_now = (f"{array.dtype} of shape {tuple(array.shape)}" for array in (was, now))
    if kind != kind_now:
        return f"{path} is {kind_now}, was {kind}"
    flat: list[Any]
    if isinstance(was, torch.Tensor):
        flat = [
            array.detach().cpu().resolve_conj().resolve_neg().reshape(-1) for array in (was, now)
        ]
        raw = [array.contiguous().view(torch.uint8).numpy() for array in flat]
    elif was.dtype.hasobject:
        return difference(was.tolist(), now.tolist(), path)
    else:
        flat = [np.ascontiguousarray(array).reshape(-1) for array in (was, now)]
        raw = [array.view(np.uint8) for array in flat]
    different = np.flatnonzero(raw[0] != raw[1])
    if not different.size:
        return None
    place = int(different[0]) * len(flat[0]) // raw[0].size
    index = [int(i) for i in np.unravel_index(place, was.shape)]
    return f"{path}{index or ''} is {flat[1][place].item()}, was {flat[0][place].item()}"


def _checked(loader: Loader[Any], config: WorkerConfig) -> Loader[Any]:
    for name in ("rank", "world_size", "num_workers", "lane_count"):
        if (own := getattr(loader.dataset.worker_config, name)) != getattr(config, name):
            raise ValueError(
                f"make_loader was given a WorkerConfig with {name} {getattr(config, name)} and "
                f"made a loader with {own}: give it to the dataset, get_train_dataset(..., "
                "worker_config=worker_config) say"
            )
    return loader


def _named(layout: Layout) -> str:
    world_size, workers = layout
    named = f"{world_size} rank{'s' * (world_size > 1)} and {workers} worker{'s' * (workers != 1)}"
    return f"{named} each" if world_size > 1 else named


def _stir(number: int) -> None:
    """Other global random numbers in each walk: what is drawn unseeded shall not come again."""
    position.at(("check_resume", number))
    seeds.reseed(0, "check_resume")


def _turns(
    loaders: list[Loader[Any]], length: int, state: Any = None
) -> Iterator[tuple[Turn, Any]]:
    """A batch of each rank with its place, and the state unless some rank's epoch has ended before.

    So it goes on, over epochs, until there were ``length`` batches.
    """
    if state is not None:
        for loader in loaders:
            loader.load_state_dict(json.loads(json.dumps(state)))
    done = empty = 0
    while done < length and empty < 2:  # in one epoch, but not in two, there may be none
        empty += 1
        running = {loader: iter(loader) for loader in loaders}
        while running and done < length:
            turn: Turn = []
            for loader, iterator in list(running.items()):
                before = loader.state_dict()
                for batch in iterator:
                    turn.append((_place(before, loader.state_dict()), batch))
                    break
                else:
                    del running[loader]
            done, empty = done + len(turn), 0 if turn else empty
            whole = len(turn) == len(loaders)
            yield turn, checkpoint.merge(rank.state_dict() for rank in loaders) if whole else None


def _place(before: Any, after: Any) -> Place:
    """Of the batch that came between two states of a rank: that of the lane which went on."""
    old = before["lanes"] if before["epoch"] == after["epoch"] else {}
    lane, state = next(
        (lane, state)
        for lane, state in after["lanes"].items()
        if state not in (None, checkpoint.ENDED, old.get(lane))
    )
    return after["epoch"], int(lane), checkpoint.batches(state)


Call = tuple[str, object, bool, Any, list[Any]]
"""A stage, where in the streams it was called, if it is seeded, with what, what came of it."""


def _culprit(make: Callable[[], Loader[Any]], place: Place, state: Any) -> str | None:
    """Which function does not do the same again, on the ways to ``place`` from two beginnings.

    One way is that of all lanes from the start, the other that of the lane alone from the state.
    """
    epoch, lane, _ = place
    begin = None
    if state is not None and state["epoch"] == epoch:
        begin = checkpoint.tupled(state["lanes"][str(lane)])
    try:
        _stir(-1)
        dataset = make().dataset
        lanes = dict.fromkeys(dataset.worker_config.rank_lanes)
        first = _calls(dataset, dict.fromkeys(range(epoch + 1), lanes), place)
        _stir(-2)
        again = _calls(make().dataset, {epoch: {lane: begin}}, place)
        for name, where, seeded, given, results in again:
            found = [
                difference(before[: len(results)], results[: len(before)], "result")
                for same_name, same_where, _, same_given, before in first
                if (name, where) == (same_name, same_where) and not difference(same_given, given)
            ]
            if found and all(found):
                who = f"{name} did not do the same again for {describe(given)}"
                return f"{who}: {found[0]}\n  {CAUSES if seeded else STATELESS}"
    except Exception as error:  # what was found is to be said all the same
        return f"Which function is the cause could not be found out ({error!r}).\n  {CAUSES}"
    return None


def _calls(
    dataset: Dataset[Any], begin: Mapping[int, dict[int, State]], place: Place
) -> list[Call]:
    """The calls of the user's functions before the batch at ``place``, from these states by epoch.

    The dataset's error handler is told nothing.
    """
    calls: list[Call] = []

    def guard(
        fn: Callable[[Any], Any], stage: str, *, seed: int | None, **_: Any
    ) -> Callable[[Any], Any]:
        def noted(given: Any) -> Any:
            results: list[Any] = []
            seeded = seed is not None or stage == "decode"
            calls.append((stage, position.here.where, seeded, snapshot(given), results))
            try:
                result = fn(given)
            except BaseException as error:
                results.append(type(error))
                raise
            if isinstance(result, GeneratorType):
                return each(result, results)
            results.append(snapshot(result))
            return result

        return guarded(noted, stage, seed=seed, handler=lambda *error: None, tolerance=NEVER)

    def each(outputs: Iterator[Any], results: list[Any]) -> Iterator[Any]:
        for output in outputs:
            results.append(snapshot(output))
            yield output
        results.append("no more")

    streams = functools.partial(dataclasses.replace(dataset, threads=0).lane_stream, guarded=guard)
    with contextlib.suppress(StateError):  # the replay diverged
        for epoch, lanes in begin.items():
            # What only a limit ends would go on; a lane's end is a delivery as well.
            most = None if dataset.virtual else dataset.length and dataset.length + len(lanes)
            for delivery in itertools.islice(deliveries(streams, epoch, lanes), most):
                if (epoch, delivery.lane, checkpoint.batches(delivery.state)) == place:
                    return calls
    return calls


def _in_new_interpreter(
    loader: Loader[Any], length: int, state: Any
) -> tuple[list[Turn], str | None]:
    """The turns from ``state`` on that a worker in a new interpreter gives; or why it could not."""
    config = dataclasses.replace(loader.dataset.worker_config, num_workers=1)
    dataset = dataclasses.replace(loader.dataset, worker_config=config)
    main, hash_seed = sys.modules["__main__"], os.environ.get("PYTHONHASHSEED")
    sys.modules["__main__"] = ModuleType("__main__")  # a script would run there once more
    os.environ["PYTHONHASHSEED"] = "2" if hash_seed == "1" else "1"
    try:
        try:
            pickle.dumps(dataset.lane_stream)
        except Exception as error:
            return [], f"not in a new interpreter: {error}"
        worker = get_loader(dataset, multiprocessing_context="spawn", max_worker_restarts=0)
        return [turn for turn, _ in _turns([worker], length, state)], None
    finally:
        sys.modules["__main__"] = main
        del os.environ["PYTHONHASHSEED"]
        if hash_seed is not None:
            os.environ["PYTHONHASHSEED"] = hash_seed
