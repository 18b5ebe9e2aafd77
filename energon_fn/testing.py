"""A test kit for pipelines of your own: do they go on exactly where they were?

::

    from energon_fn.testing import check_resume

    def test_my_pipeline_resumes():
        check_resume(make_loader)  # the function that makes your loader for a WorkerConfig
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
import reprlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from types import GeneratorType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from energon_fn import checkpoint, position, seeds
from energon_fn.datasets import Dataset
from energon_fn.errors import StateError
from energon_fn.guard import describe
from energon_fn.lanes import WorkerConfig
from energon_fn.loader import Loader, get_loader
from energon_fn.stages import Cooker
from energon_fn.task_encoder import METHODS, marks_of, method_of

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
    "differ: the number of threads (workers compute with one), ids, environment variables, devices."
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
        return [make_loader(config) for config in ranks]

    def walk(layout: Layout, length: int, how: str, state: Any = None) -> dict[int, Any]:
        """Walk so far and compare. Gives the states, by the number of batches before them."""
        _stir(next(walks))
        loaders = make(layout)
        done, states = 0, {0: checkpoint.merge(loader.state_dict() for loader in loaders)}
        try:
            for turn, after in _turns(loaders, length, state):
                if not saved:
                    expected.update(copy.deepcopy(turn))  # as it is before anybody changes it
                else:
                    compare(turn, how, state, PROCESSES)
                done += len(turn)
                if after is not None:
                    states[done] = after
        except StateError as error:
            raise AssertionError(f"{how}: {error}") from error
        finally:
            for loader in loaders:
                loader.close()
        return states

    def compare(turn: Turn, how: str, state: Any, otherwise: str) -> None:
        for place, batch in turn:
            was = expected.get(place, batch)  # not all layouts get equally far
            if found := difference(was, batch):
                epoch, lane, number = place
                samples = " / ".join(dict.fromkeys(map(describe, (was, batch))))
                culprit = _culprit(lambda: make((1, 0))[0], place, state, batches) or otherwise
                raise AssertionError(
                    f"{how}, something else comes:\n  {found} (batch {number} of lane {lane} in "
                    f"epoch {epoch})\n  {samples}\n  {culprit}"
                )

    with seeds.untouched():
        for layout in layouts:
            how = f"from the beginning with {_named(layout)}, not {_named(reference)}"
            saved[layout] = walk(layout, batches, how)
            assert expected, "the pipeline gives no batches"
        points = [*range(1, min(11, batches)), *range(11, batches, every)]
        for n, point in enumerate(points):
            here = layouts[n % len(layouts)]
            there = layouts[(n + 1 + n // len(layouts)) % len(layouts)]
            done = max(number for number in saved[here] if number <= point)
            how = f"saved after {done} batches with {_named(here)}, resumed with {_named(there)}"
            walk(there, min(2 * lanes, batches - done), how, saved[here][done])
        done, state = sorted(saved[reference].items())[:2][-1]
        turns, not_tried = _in_new_interpreter(make((1, 0))[0], batches - done, state)
        for turn in turns:
            how = f"saved after {done} batches, resumed in a new interpreter"
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
    if isinstance(was, Image.Image) and isinstance(now, Image.Image):
        kinds = [f"an image {image.mode} of size {image.size}" for image in (was, now)]
        if kinds[0] != kinds[1]:
            return f"{path} is {kinds[1]}, was {kinds[0]}"
        palettes = difference(was.getpalette(), now.getpalette(), f"{path}.getpalette()")
        return palettes or _in_array(np.asarray(was), np.asarray(now), path)
    if type(was) is not type(now):
        return f"{path} is of type {type(now).__name__}, was of type {type(was).__name__}"
    if isinstance(was, torch.Tensor | np.ndarray | np.generic):
        return _in_array(was, now, path)
    pairs: list[tuple[Any, Any, str]] = []
    if isinstance(was, dict):
        if list(was) != list(now):
            return f"{path} has the keys {reprlib.repr(list(now))}, had {reprlib.repr(list(was))}"
        pairs += ((was[key], now[key], f"{path}[{key!r}]") for key in was)
    elif isinstance(was, list | tuple):
        pairs += ((*both, f"{path}[{n}]") for n, both in enumerate(zip(was, now, strict=False)))
    elif (names := _attributes(was)) is not None:
        if names != _attributes(now):
            return f"{path} has the attributes {_attributes(now)}, had {names}"
        pairs += ((getattr(was, name), getattr(now, name), f"{path}.{name}") for name in names)
    else:
        same = was.hex() == now.hex() if isinstance(was, float) else was is now or was == now
        return None if same else f"{path} is {reprlib.repr(now)}, was {reprlib.repr(was)}"
    found = next((found for pair in pairs if (found := difference(*pair))), None)
    if found is None and isinstance(was, list | tuple) and len(was) != len(now):
        return f"{path} has {len(now)} entries, had {len(was)}"
    return found


def _attributes(thing: Any) -> list[str] | None:
    """The attributes to compare; None of what compares itself."""
    equals: object = type(thing).__eq__
    if dataclasses.is_dataclass(thing):
        names = [field.name for field in dataclasses.fields(thing)]
    elif equals is object.__eq__ and hasattr(thing, "__dict__"):
        names = []
    else:
        return None
    return list(dict.fromkeys([*names, *getattr(thing, "__dict__", ())]))


def _in_array(was: Any, now: Any, path: str) -> str | None:
    kinds = [f"{array.dtype} of shape {tuple(array.shape)}" for array in (was, now)]
    if kinds[0] != kinds[1]:
        return f"{path} is {kinds[1]}, was {kinds[0]}"
    flat: list[Any]
    if isinstance(was, torch.Tensor):
        flat = [a.detach().cpu().resolve_conj().resolve_neg().reshape(-1) for a in (was, now)]
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
    """A batch of each rank with its place, and the state if no rank was at its epoch's end before.

    So it goes on, over epochs, until there were ``length`` batches.
    """
    if state is not None:
        for loader in loaders:
            loader.load_state_dict(json.loads(json.dumps(state)))
    done = empty = 0
    while done < length and empty < 2:  # in one epoch, but not in two, there may be none
        empty += 1
        running = [(loader, iter(loader)) for loader in loaders]
        while running and done < length:
            turn: Turn = []
            for loader, iterator in list(running):
                before = loader.state_dict()
                try:
                    batch = next(iterator)
                except StopIteration:
                    running.remove((loader, iterator))
                    continue
                turn.append((_place(before, loader.state_dict()), batch))
                empty = 0
            done += len(turn)
            everybody = turn and len(running) == len(loaders)
            yield turn, checkpoint.merge([a.state_dict() for a in loaders]) if everybody else None


def _place(before: Any, after: Any) -> Place:
    """Of the batch that came between two states of a rank."""
    old = before["lanes"] if before["epoch"] == after["epoch"] else {}
    for lane, at in after["lanes"].items():
        if at not in (None, checkpoint.ENDED, old.get(lane)):
            return after["epoch"], int(lane), checkpoint.batches(at)
    raise AssertionError(f"a batch came, but no lane went on: {before} before, {after} after")


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a user's function: what was given in, and what came out."""

    name: str
    where: object
    given: Any
    results: list[Any]
    hint: str


def _culprit(make: Callable[[], Loader[Any]], place: Place, state: Any, length: int) -> str | None:
    """Which function does not do the same again, on the ways to ``place`` from two beginnings.

    One way is that of all lanes from the start, the other that of the lane alone from the state.
    """
    epoch, lane, number = place
    lane_state = None
    if state is not None and state["epoch"] == epoch:
        lane_state = checkpoint.tupled(state["lanes"][str(lane)])
    try:
        _stir(-1)
        dataset, first = _spied(make().dataset)
        for turn, _ in _turns([get_loader(dataset)], length):
            if place in dict(turn):
                break
        _stir(-2)
        dataset, again = _spied(make().dataset)
        left = number - checkpoint.batches(lane_state)
        with contextlib.suppress(StateError):  # the replay diverged
            for _ in itertools.islice(dataset.lane_stream(lane, epoch)(lane_state), left):
                pass
        for call in again:
            found = [
                difference(other.results[: len(call.results)], call.results[: len(other.results)])
                for other in first
                if (other.name, other.where) == (call.name, call.where)
                and difference(other.given, call.given) is None
            ]
            if found and all(found):
                told = str(found[0]).replace("batch", "result", 1)
                given, hint = describe(call.given), call.hint
                return f"{call.name} did not do the same again for {given}: {told}\n  {hint}"
    except Exception as error:  # what was found is to be said all the same
        return f"Which function is the cause could not be found out ({error!r}).\n  {CAUSES}"
    return None


def _spied(dataset: Dataset[Any]) -> tuple[Dataset[Any], list[_Call]]:
    """The dataset with a task encoder that notes all calls of the user's functions."""
    calls: list[_Call] = []
    encoder = dataset.task_encoder

    def spy(fn: Callable[..., Any], name: str, hint: str = CAUSES) -> Callable[..., Any]:
        @functools.wraps(fn)  # marks included
        def noted(given: Any, **others: Any) -> Any:
            results: list[Any] = []
            calls.append(_Call(name, position.here.where, copy.deepcopy(given), results, hint))
            try:
                result = fn(given, **others)
            except BaseException as error:
                results.append(type(error))
                raise
            if isinstance(result, GeneratorType):
                return each(result, results)
            results.append(copy.deepcopy(result))
            return result

        return noted

    def each(outputs: Iterator[Any], results: list[Any]) -> Iterator[Any]:
        for output in outputs:
            results.append(copy.deepcopy(output))
            yield output
        results.append("no more")

    spies: dict[str, Any] = {
        name: spy(method, name, CAUSES if marks_of(encoder, name)[0] else STATELESS)
        for name in METHODS
        if (method := method_of(encoder, name)) is not None
    }
    cookers = [
        Cooker(spy(cooker.cook, "cook"), cooker.has_subflavors)
        for cooker in getattr(encoder, "cookers", ())
    ]
    decoder = dataset.decoder and spy(dataset.decoder, "decoder")
    spied: Any = SimpleNamespace(**spies, cookers=cookers)
    return dataclasses.replace(dataset, task_encoder=spied, decoder=decoder), calls


def _in_new_interpreter(
    loader: Loader[Any], length: int, state: Any
) -> tuple[list[Turn], str | None]:
    """The turns from ``state`` on as a new interpreter gives them; or why that was not tried."""
    try:
        data = pickle.dumps((loader.dataset, length, state))
    except Exception as error:
        return [], f"not in a new interpreter: {error}"
    if b"__main__" in data:
        return [], "not in a new interpreter: it would not know what is defined in __main__"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    command = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    command += f"from {__name__} import _answer; _answer()"
    done = subprocess.run(
        [sys.executable, "-c", command],
        input=pickle.dumps(sys.path) + data,
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
    )
    if done.returncode:
        raise AssertionError(f"in a new interpreter it fails:\n{done.stderr.decode()}")
    return pickle.loads(done.stdout), None


def _answer() -> None:
    """What the new interpreter does."""
    output = os.dup(1)
    os.dup2(2, 1)  # what the user's functions print is no answer
    dataset, length, state = pickle.load(sys.stdin.buffer)
    turns = [turn for turn, _ in _turns([get_loader(dataset)], length, state)]
    with os.fdopen(output, "wb") as file:
        pickle.dump(turns, file)
