"""The test kit: it finds what users do wrong, names it, and finds nothing where nothing is."""

import copy
import dataclasses
import itertools
import os
import pickle
import random
import re
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from conftest import jpeg, numbered, shards
from PIL import Image
from test_loader import Drawing, Grouping, Numbers, Packing, Skipping, train, val

from energon_fn import (
    Batch,
    Cooker,
    DefaultTaskEncoder,
    SkipSample,
    WorkerConfig,
    edataclass,
    quarantine,
    stateless,
    testing,
)
from energon_fn.testing import check_resume, difference

FEW: Any = {"batches": 16, "layouts": [(1, 0), (1, 1), (2, 0)]}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No new interpreter, which takes seconds to start."""
    monkeypatch.setattr(testing, "_in_new_interpreter", lambda *args: ([], "only here"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    shards(path, (13, 8), lambda n: {**numbered(n), "jpg": jpeg(n)})
    return path


@edataclass
class Pictures(Batch):
    images: torch.Tensor  # (n, 3, 16, 24)
    originals: list[Image.Image]
    weights: np.ndarray


class Augmenting(DefaultTaskEncoder[Any, Any, Any, Any]):
    """All that a batch may hold, and random numbers drawn as they should be."""

    def batch(self, samples: list[Any]) -> Pictures:
        images = [torch.from_numpy(np.array(sample["jpg"])).permute(2, 0, 1) for sample in samples]
        noisy = torch.stack(images) + torch.rand(len(images), 1, 1, 1)
        weights = np.random.rand(len(images)).astype(np.float16)
        weights[0] = np.nan
        return Pictures.from_samples(
            samples, images=noisy, originals=[s["jpg"] for s in samples], weights=weights
        )


def by(encoder: Any, folder: Path, **options: Any) -> Any:
    """The user's function: it makes a loader for a worker_config."""

    def make_loader(config: WorkerConfig) -> Any:
        own = encoder() if isinstance(encoder, type) else encoder
        return train(folder, config, task_encoder=own, **options)

    return make_loader


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("encoder", [Numbers, Skipping, Drawing, Packing, Grouping])
def test_nothing_is_found_where_nothing_is_wrong(folder: Path, encoder: type) -> None:
    size = 7 if encoder is Packing else None
    told = check_resume(by(encoder, folder, packing_buffer_size=size), **FEW)
    assert told == (
        "16 batches are the same in 3 layouts of 2 lanes and resumed at 11 points, only here"
    )


def test_it_goes_through_all_layouts_and_a_new_interpreter(folder: Path) -> None:
    loads = []

    def make_loader(config: WorkerConfig) -> Any:
        loads.append((config.world_size, config.num_workers))
        return train(folder, config, task_encoder=Augmenting(), image_decode="pilrgb")

    assert check_resume(make_loader) == (
        "40 batches are the same in 5 layouts of 4 lanes and resumed at 16 points, in a new "
        "interpreter too"
    )
    assert set(loads) == {(1, 0), (1, 2), (2, 0), (2, 1), (4, 0)}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "options",
    [
        {"virtual_epoch_length": 5},
        {"repeat": False},
        {"repeat": False, "batch_size": 9},  # as many batches as lanes, or fewer
        {"batch_size": None},
    ],
)
def test_epochs_with_an_end_are_walked_one_after_the_other(
    folder: Path, options: dict[str, Any]
) -> None:
    assert check_resume(by(Numbers, folder, **options), **FEW).startswith("16 batches")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("options", [{}, {"limit": 3}])
def test_validation_passes_too(folder: Path, options: dict[str, Any]) -> None:
    assert check_resume(lambda config: val(folder, config, **options), **FEW)


def test_what_cannot_go_to_a_new_interpreter_is_told(folder: Path) -> None:
    class Local(Numbers):
        pass

    told = check_resume(by(Local, folder), batches=4, layouts=[(1, 0)])
    assert "not in a new interpreter: Can't pickle local object" in told


def test_a_loader_of_another_layout_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="with world_size 2 and made a loader with 1: give it to"):
        check_resume(lambda config: train(folder), layouts=[(2, 0)])


def test_no_batches_are_not_taken_for_the_same_batches(folder: Path) -> None:
    class Nothing(Numbers):
        def encode_sample(self, sample: Any) -> int:
            raise SkipSample

    made = itertools.count()

    def once(config: WorkerConfig) -> Any:
        return val(folder, config, task_encoder=Nothing() if next(made) else Numbers())

    with pytest.raises(AssertionError, match=r"with 1 rank and 1 worker, not .*: no batch comes"):
        check_resume(once, **FEW)
    with pytest.raises(AssertionError, match="no batch comes"):
        check_resume(lambda config: val(folder, config, batch_size=99, batch_drop_last=True))


class Keyed(DefaultTaskEncoder[Any, Any, Any, Any]):
    def encode_sample(self, sample: Any) -> Any:
        return {"__key__": sample["__key__"], "value": self.value(sample)}

    def value(self, sample: Any) -> Any:
        raise NotImplementedError


class Counting(Keyed):
    seen = 0

    def value(self, sample: Any) -> Any:
        self.seen += 1
        return self.seen


class Unseeded(Keyed):
    def value(self, sample: Any) -> Any:
        return torch.tensor([0.5, np.random.default_rng().random()])


class Timed(Keyed):
    def value(self, sample: Any) -> Any:
        return time.time()


class OfASet(Keyed):
    def value(self, sample: Any) -> Any:
        return list({"caption", sample["__key__"], *"aeiou"})


class DrawingStateless(Keyed):
    @stateless
    def encode_sample(self, sample: Any) -> Any:
        return super().encode_sample(sample)

    def value(self, sample: Any) -> Any:
        return np.array([1, random.randrange(10**9)])


class Caching(Keyed):
    def __init__(self) -> None:
        super().__init__()
        self.image = lru_cache(self.image)  # type: ignore[method-assign]

    def image(self, key: str) -> torch.Tensor:
        return torch.ones(2, 2)

    def value(self, sample: Any) -> Any:
        image = self.image(sample["__key__"])
        image[1] += 1  # in the cache, too
        return {"image": image}


class Process(Keyed):
    def value(self, sample: Any) -> Any:
        return os.getpid()


class Late(Numbers):
    """Nothing is wrong before the batch is whole."""

    def batch(self, samples: list[int]) -> Any:
        return {"__keys__": [str(n) for n in samples], "image": Image.new("L", (3, 2), samples[0])}

    def encode_batch(self, batch_data: Any) -> Any:
        batch_data["image"].putpixel((2, 1), np.random.default_rng().integers(256).item())
        return batch_data


class Picky(Keyed):
    """It skips every fifth of the samples that it has seen."""

    seen = 0

    def encode_sample(self, sample: Any) -> Any:
        self.seen += 1
        if self.seen % 5 == 0:
            raise SkipSample
        return {"__key__": sample["__key__"]}


def hasty(raw: Any) -> Any:
    return {"__key__": raw["__key__"], "at": time.perf_counter()}


class Cooking(DefaultTaskEncoder[Any, Any, Any, Any]):
    cookers = (Cooker(hasty),)


def found(make_loader: Any) -> str:
    with pytest.raises(AssertionError) as failure:
        check_resume(make_loader, **FEW)
    return str(failure.value)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("encoder", "where", "who"),
    [
        (Counting, r"batch\['value'\]\[0\] is \d+, was \d+", "encode_sample"),
        (Unseeded, r"batch\['value'\]\[0, 1\] is 0\.\d+, was 0\.\d+", "encode_sample"),
        (Timed, r"batch\['value'\]\[0\] is \d+\.\d+, was \d+", "encode_sample"),
        (DrawingStateless, r"batch\['value'\]\[0\]\[1\] is \d+, was \d+", "encode_sample"),
        (Caching, r"batch\['value'\]\['image'\]\[\d, 1, 0\] is \d\.0, was", "encode_sample"),
        (Late, r"batch\['image'\]\[1, 2\] is \d+, was \d+", "encode_batch"),
        (Picky, r"batch\['__key__'\]\[\d\] is '\d+', was '\d+'", "encode_sample"),
        (Cooking, r"batch\['at'\]\[0\] is \d+\.\d+, was", "cook"),
    ],
)
def test_a_function_that_does_not_do_the_same_again_is_found_and_named(
    folder: Path, encoder: type, where: str, who: str
) -> None:
    said = found(by(encoder, folder))
    assert re.search(
        r"(from the beginning|saved behind batch \d+) with \d ranks? and \d workers?.*\n"
        rf"  {where}.* \(batch \d of lane [01] in epoch 0\)\n"
        r"  samples \d+, \d+, \d+.*\n"
        rf"  {who} did not do the same again for samples? \d+.*: result\[0\].*\n  \S",
        said,
    ), said
    assert ("@stateless" in said) == (encoder is DrawingStateless)
    assert ("Usual causes: " in said) == (encoder is not DrawingStateless)


@pytest.mark.usefixtures("here")
def test_an_encoder_that_all_loaders_share_is_found_too(folder: Path) -> None:
    assert "encode_sample did not do the same again" in found(by(Counting(), folder))


@pytest.mark.usefixtures("here")
def test_a_decoder_of_ones_own_is_looked_at_too(folder: Path) -> None:
    said = found(by(DefaultTaskEncoder, folder, decoder=hasty))
    assert "decode did not do the same again for sample" in said


@pytest.mark.usefixtures("here")
def test_what_cannot_be_copied_is_no_failure_and_nothing_is_written_down(
    folder: Path, tmp_path: Path
) -> None:
    class Locked(Unseeded):
        def encode_sample(self, sample: Any) -> Any:
            return {**super().encode_sample(sample), "lock": threading.Lock()}

        def batch(self, samples: list[Any]) -> Any:
            return super().batch([{**sample, "lock": None} for sample in samples])

    def make_loader(config: WorkerConfig) -> Any:
        told = quarantine(tmp_path / "bad.jsonl")
        config = dataclasses.replace(config, global_error_handler=told)
        return train(folder, config, task_encoder=Locked())

    said = found(make_loader)
    assert "encode_sample did not do the same again for sample" in said
    assert (tmp_path / "bad.jsonl").read_text() == ""


@pytest.mark.usefixtures("here")
def test_what_differs_between_processes_only_is_told_apart(folder: Path) -> None:
    said = found(by(Process, folder))
    assert "Repeated in one process, every function did the same" in said


def test_what_differs_between_interpreters_only_is_found(folder: Path) -> None:
    said = found(by(OfASet, folder))
    assert "resumed in a new interpreter, something else comes" in said
    assert "the order of a set of strings" in said


@pytest.mark.usefixtures("here")
def test_what_a_class_keeps_is_found_too(folder: Path) -> None:
    class Copying(Numbers):
        """Makes one more of a sample that this process meets for the first time."""

        met: ClassVar[set[int]] = set()

        def encode_sample(self, sample: Any) -> Any:
            n = sample["json"]["n"]
            yield from [n] * (1 if n in self.met else 2)
            self.met.add(n)

    assert "what a class, a module or a cache has kept" in found(by(Copying, folder))


@pytest.mark.usefixtures("here")
def test_a_state_that_cannot_be_replayed_is_found(folder: Path) -> None:
    class Numbering(Counting):
        def encode_sample(self, sample: Any) -> Any:
            return {"__key__": f"{sample['__key__']}/{self.value(sample)}"}

    with pytest.raises(AssertionError) as failure:
        check_resume(by(Numbering, folder), batches=8, layouts=[(1, 0), (1, 1)])
    said = str(failure.value)
    assert re.match(r"saved behind batch \d with .*, resumed with .*:\n  replay diverged in", said)


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = 0


class Pair(NamedTuple):
    a: Any
    b: Any


class Plain:
    def __init__(self, x: Any):
        self.x = x


NAN = float("nan")


@pytest.mark.parametrize(
    "thing",
    [
        {"a": [1, NAN, None], "b": (True, "x", b"y", {1, 2})},
        torch.tensor([NAN, -0.0, 1.0]),
        torch.tensor(3),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]).conj(),
        torch.zeros(2, 3, dtype=torch.bfloat16).T,
        np.array([NAN, 1]),
        np.float32(1.5),
        np.array(["a", "b"]),
        np.array([{"a": 1}, None]),
        np.zeros((2, 0)),
        Image.new("P", (3, 2)),
        Point(Pair([Plain(NAN)], 2), Path("a")),
        print,
        1 + 2j,
    ],
    ids=repr,
)
def test_a_thing_and_its_copy_do_not_differ(thing: Any) -> None:
    assert difference(thing, copy.deepcopy(thing)) is None
    if thing is not print:
        assert difference(thing, pickle.loads(pickle.dumps(thing))) is None


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (1, 2, "batch is 2, was 1"),
        (1, 1.0, "batch is of type float, was of type int"),
        (0.0, -0.0, "batch is -0.0, was 0.0"),
        ([1, [2, 3]], [1, [2, 4]], "batch[1][1] is 4, was 3"),
        ([1, 2], [1], "batch has 1 parts, had 2"),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, "batch has ['b'] where it had ['a']"),
        (Point(1, [2]), Point(1, [3]), "batch.y[0] is 3, was 2"),
        (Pair(1, 2), Pair(1, 3), "batch[1] is 3, was 2"),
        (Plain(1), Plain(2), "batch.x is 2, was 1"),
        (torch.zeros(2), torch.tensor([0.0, -0.0]), "batch[1] is -0.0, was 0.0"),
        (
            torch.zeros(2),
            torch.zeros(2, dtype=torch.float64),
            "batch is torch.float64 of shape (2,), was torch.float32 of shape (2,)",
        ),
        (np.zeros((2, 3)), np.eye(2, 3), "batch[0, 0] is 1.0, was 0.0"),
        (
            np.zeros(2),
            np.zeros((2, 1)),
            "batch is float64 of shape (2, 1), was float64 of shape (2,)",
        ),
        (np.float32(1), np.float32(2), "batch is 2.0, was 1.0"),
        (np.array([{}, {"a": 1}]), np.array([{}, {"a": 2}]), "batch[1]['a'] is 2, was 1"),
        (
            Image.new("L", (2, 1)),
            Image.new("L", (1, 2)),
            "batch's size[0] is 1, was 2",
        ),
        (
            Image.new("RGB", (2, 2)),
            Image.new("RGB", (2, 2), "blue"),
            "batch[0, 0, 2] is 255, was 0",
        ),
    ],
)
def test_the_first_difference_is_named(was: Any, now: Any, said: str) -> None:
    assert difference(was, now) == said


def test_attributes_and_palettes_are_compared_too() -> None:
    more = Point(1)
    more.z = 3  # type: ignore[attr-defined]
    assert difference(Point(1), more) == "batch has 3 parts, had 2"
    image = Image.new("P", (1, 1))
    coloured = image.copy()
    image.putpalette([0, 0, 0]), coloured.putpalette([0, 9, 0])
    assert difference(image, coloured) == "batch.getpalette()[1] is 9, was 0"
