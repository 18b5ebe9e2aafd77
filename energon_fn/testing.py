"""A test kit for pipelines of your own: do they go on exactly where they were?

::

    from energon_fn.testing import check_resume

    def test_my_pipeline_resumes():
        check_resume(make_loader)  # the function that makes your loader for a WorkerConfig
"""

from __future__ import annotations

import copy
import dataclasses
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
from energon_fn.errors import StateError
from energon_fn.guard import describe
from energon_fn.lanes import WorkerConfig
from energon_fn.loader import Loader, get_loader
from energon_fn.stages import Cooker
from energon_fn.task_encoder import METHODS, marks_of, method_of

Layout = tuple[int, int]
"""World size, and workers of each rank."""
Place = tuple[int, int, int]
"""Epoch, lane, and the batch's number in that lane, from 1 on."""

CAUSES = (
    "random numbers from elsewhere than the global generators of random, NumPy and torch "
    "(np.random.default_rng() without a seed, say), something that is kept between samples (on the "
    "encoder, in a cache), a sample that is changed in place while somebody else has it, the time"
)
BETWEEN_PROCESSES = (
    "number of threads (workers compute with one), process ids, environment variables, devices"
)
BETWEEN_INTERPRETERS = (
    "the order of a set of strings and hash(), which change from one interpreter to the next: "
    "sort, and use zlib.crc32 or hashlib"
)


def check_resume(
    make_loader: Callable[[WorkerConfig], Loader[Any]],
    *,
    batches: int = 40,
    layouts: Sequence[Layout] = ((1, 0), (1, 2), (2, 0), (2, 1), (4, 0)),
    every: int = 5,
) -> str:
    """Check that a pipeline gives the same batches to the bit, wherever and however it is resumed.

    make_loader: makes dataset, task encoder and loader anew for the ``worker_config`` that it is
    given; it may change what is not its layout (``dataclasses.replace(config, seed_offset=7)``).
    batches: so many are walked, over all ranks. The data should be small enough that this is more
    than an epoch.
    layouts: pairs of world size and workers. In each of them the pipeline is walked from the
    beginning and saved; states go through JSON and are resumed in the next layout. In the end one
    is resumed in a new interpreter. The number of lanes is what all layouts can share.
    every: it is resumed behind each of the first ten batches, then behind every so-many-th.

    Raises AssertionError at the first difference, and says where in the batch it is, in which
    samples, and if it can be told, which function did not do the same again. Otherwise gives back
    in words what was checked.

    >>> import tempfile, time
    >>> from energon_fn import DefaultTaskEncoder, get_train_dataset
    >>> from energon_fn.demo import build_demo
    >>> folder = tempfile.TemporaryDirectory()
    >>> shards = build_demo(folder.name, samples=12, shards=2)
    >>> class Hasty(DefaultTaskEncoder):
    ...     def encode_sample(self, sample):
    ...         return {"__key__": sample["__key__"], "txt": sample["txt"], "made": time.time()}
    >>> def make_loader(worker_config):
    ...     dataset = get_train_dataset(folder.name, batch_size=2, shuffle_buffer_size=10,
    ...                                 worker_config=worker_config, task_encoder=Hasty())
    ...     return get_loader(dataset)
    >>> check_resume(make_loader, batches=10, layouts=[(1, 0), (2, 0)])
    Traceback (most recent call last):
        ...
    AssertionError: walked from the beginning with 2 ranks and 0 workers, not 1 rank and 0 workers:
    the stream is not the same.
      batch 1 of lane 0 in epoch 0: batch['made'][0] is ..., was ...
      samples ...
      encode_sample did not do the same again for the same input, sample ...: ...
      Usual causes: random numbers from elsewhere than ..., the time
    """
    lanes = math.lcm(*(world_size * max(workers, 1) for world_size, workers in layouts))

    def make(layout: Layout) -> list[Loader[Any]]:
        world_size, workers = layout
        ranks = (
            WorkerConfig(rank=rank, world_size=world_size, num_workers=workers, lanes=lanes)
            for rank in range(world_size)
        )
        return [make_loader(config) for config in ranks]

    expected: dict[Place, Any] = {}
    saved: dict[Layout, dict[int, Any]] = {}
    number, reference = 0, layouts[0]

    def walk(layout: Layout, length: int, how: str, state: Any = None) -> dict[int, Any]:
        """Walk that far, compare, and give back the states by the number of batches before."""
        nonlocal number
        number += 1
        _stir(number)
        loaders = make(layout)
        states = {0: checkpoint.merge([loader.state_dict() for loader in loaders])}
        try:
            for done, step, after in _steps(loaders, length, state):
                _compare(expected, step, how, lambda place: _culprit(make, place, state, lanes))
                states[done] = after
        except StateError as error:
            raise AssertionError(f"{how}: {error}") from error
        finally:
            for loader in loaders:
                loader.close()
        return states

    with seeds.untouched():
        _stir(number)
        for done, step, state in _steps(make(reference), batches):
            expected |= {place: copy.deepcopy(batch) for place, batch in step}  # as it is now
            saved.setdefault(reference, {})[done] = state
        assert expected, "the pipeline gives no batches"
        for layout in layouts[1:]:
            how = f"walked from the beginning with {_named(layout)}, not {_named(reference)}"
            saved[layout] = walk(layout, batches, how)
        points = [*range(1, min(11, batches)), *range(11, batches, every)]
        for n, point in enumerate(points):
            here = layouts[n % len(layouts)]
            there = layouts[(n + 1 + n // len(layouts)) % len(layouts)]
            done = max((k for k in saved[here] if k <= point), default=min(saved[here]))
            how = f"saved after {done} batches with {_named(here)}, resumed with {_named(there)}"
            walk(there, min(2 * lanes, batches - done), how, saved[here][done])
        first = min(saved[reference])
        left_out = _in_new_interpreter(
            make((1, 0))[0], expected, saved[reference][first], batches - first
        )
    return (
        f"{len(expected)} batches are the same in {len(layouts)} layouts of {lanes} lanes, and "
        f"resumed at {len(points)} points; "
        + (
            f"not tried in a new interpreter: {left_out}"
            if left_out
            else "in a new interpreter too"
        )
    )


def difference(was: Any, now: Any, path: str = "batch") -> str | None:
    """Where two things differ first, in words, or None: types, shapes, and all values to the bit.

    >>> difference({"a": [1.0, float("nan")]}, {"a": [1.0, float("nan")]})
    >>> difference({"a": torch.tensor([[1, 2], [3, 4]])}, {"a": torch.tensor([[1, 2], [3, 5]])})
    "batch['a'][1, 1] is 5, was 4"
    """
    if isinstance(was, Image.Image) and isinstance(now, Image.Image):
        was, now = ((i.mode, i.size, i.getpalette(), np.asarray(i)) for i in (was, now))
        return difference(was, now, path)
    if type(was) is not type(now):
        return f"{path} is of type {type(now).__name__}, was {type(was).__name__}"
    if isinstance(was, torch.Tensor | np.ndarray | np.generic):
        return _in_array(was, now, path)
    if isinstance(was, dict):
        if list(was) != list(now):
            return f"{path} has the keys {reprlib.repr(list(now))}, had {reprlib.repr(list(was))}"
        pairs = ((was[key], now[key], f"{path}[{key!r}]") for key in was)
    elif isinstance(was, list | tuple):
        if len(was) != len(now):
            return f"{path} has {len(now)} entries, had {len(was)}"
        pairs = ((a, b, f"{path}[{n}]") for n, (a, b) in enumerate(zip(was, now, strict=True)))
    elif (names := _names(was)) is not None:
        if names != _names(now):
            return f"{path} has {_names(now)}, had {names}"
        pairs = ((getattr(was, name), getattr(now, name), f"{path}.{name}") for name in names)
    else:
        same = was.hex() == now.hex() if isinstance(was, float) else was is now or was == now
        return None if same else f"{path} is {reprlib.repr(now)}, was {reprlib.repr(was)}"
    return next((found for pair in pairs if (found := difference(*pair))), None)


def _names(thing: Any) -> list[str] | None:
    """The attributes to compare, or None for what compares itself."""
    fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    if fields or (type(thing).__eq__ is object.__eq__ and hasattr(thing, "__dict__")):
        return list(dict.fromkeys([*(field.name for field in fields), *vars(thing)]))
    return None


def _in_array(was: Any, now: Any, path: str) -> str | None:
    sides = []
    for array in (was, now):
        if isinstance(array, torch.Tensor):
            flat = array.detach().cpu().to_dense().resolve_conj().resolve_neg().reshape(-1)
            raw = flat.contiguous().view(torch.uint8).numpy()
        else:
            flat = np.ascontiguousarray(array).reshape(-1)
            raw = flat.view(np.uint8) if not flat.dtype.hasobject else None
        sides.append((f"{array.dtype} of shape {tuple(array.shape)}", flat, raw))
    (kind, old, bits), (kind_now, new, bits_now) = sides
    if kind != kind_now:
        return f"{path} is {kind_now}, was {kind}"
    if bits is None or bits_now is None:  # objects
        return difference(was.tolist(), now.tolist(), path)
    different = np.flatnonzero(bits != bits_now)
    if not different.size:
        return None
    place = int(different[0]) // (bits.size // len(old))
    index = ", ".join(str(int(i)) for i in np.unravel_index(place, was.shape))
    return f"{path}{index and f'[{index}]'} is {new[place].item()}, was {old[place].item()}"


def _named(layout: Layout) -> str:
    world_size, workers = layout
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    return f"{ranks} and {workers} worker{'s' * (workers != 1)}" + " each" * (
        world_size > 1 < workers
    )


def _stir(number: int) -> None:
    """Other global random numbers for each walk: what is drawn unseeded shall not come again."""
    position.at(("check_resume", number))
    seeds.reseed(0, "check_resume")


def _steps(
    loaders: list[Loader[Any]], length: int, state: Any = None
) -> Iterator[tuple[int, list[tuple[Place, Any]], Any]]:
    """(batches so far, a batch of each rank, merged state) for ``length`` batches and over epochs.

    What comes while some ranks have ended their epoch and others have not is left out.
    """
    if state is not None:
        for loader in loaders:
            loader.load_state_dict(json.loads(json.dumps(state)))
    done, idle = 0, 0
    while done < length and idle < 2:  # in one epoch, but not in two, there may be none
        idle += 1
        iterators = [iter(loader) for loader in loaders]
        while done < length:
            before = [loader.state_dict() for loader in loaders]
            batches = [next(iterator, None) for iterator in iterators]
            if any(batch is None for batch in batches):
                break
            after = [loader.state_dict() for loader in loaders]
            idle, done = 0, done + len(loaders)
            places = map(_place, before, after)
            yield done, list(zip(places, batches, strict=True)), checkpoint.merge(after)
