"""Small datasets, and task encoders that show what was done with them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from energon_fn import (
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    SkipSample,
    TextSample,
    WorkerConfig,
    get_loader,
    get_train_dataset,
    get_val_dataset,
)


class Encoder(DefaultTaskEncoder[Any, Any, Any, Any]):
    """Overrides nothing."""


def here(lanes: int | None = None, **options: Any) -> WorkerConfig:
    """All the work in this process."""
    return WorkerConfig(rank=0, world_size=1, num_workers=0, lanes=lanes, **options)


def val(path: Any, **options: Any) -> Any:
    """The dataset in order, once; sample by sample unless a batch_size is given."""
    defaults = {"batch_size": None, "split_part": "train", "worker_config": here()}
    return get_val_dataset(path, **{**defaults, **options})


def load(path: Any, **options: Any) -> list[Any]:
    return list(get_loader(val(path, **options)))


def train(path: Any, number: int = 40, **options: Any) -> list[Any]:
    """The first batches of endless training."""
    defaults = {"batch_size": 2, "worker_config": here()}
    return list(islice(get_loader(get_train_dataset(path, **{**defaults, **options})), number))


class Numbers(Encoder):
    """Samples are their numbers, batches are lists."""

    def encode_sample(self, sample: Any) -> Any:
        return sample["json"]["n"]

    def batch(self, samples: Any) -> Any:
        return samples


class Halves(Numbers):
    """Packs the even and the odd places of each buffer."""

    def select_samples_to_pack(self, samples: Any) -> Any:
        return [samples[::2], samples[1::2]]

    def pack_selected_samples(self, samples: Any) -> Any:
        return tuple(samples)


class Everything(Encoder):
    """All methods but those that exclude each other; samples are their numbers.

    With a packing buffer of 4 the packs are (0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11).
    """

    def act(self, name: str, result: Any, numbers: list[int]) -> Any:
        """What the method does with these numbers: here, give its result."""
        return result

    def preencode_sample(self, sample: Any) -> Any:
        n = sample["json"]["n"] if isinstance(sample, dict) else sample
        return self.act("preencode_sample", n, [n])

    def postencode_sample(self, sample: Any) -> Any:
        return self.act("postencode_sample", sample, [sample])

    def select_samples_to_pack(self, samples: Any) -> Any:
        return self.act("select_samples_to_pack", [samples[::2], samples[1::2]], samples)

    def pack_selected_samples(self, samples: Any) -> Any:
        return self.act("pack_selected_samples", tuple(samples), samples)

    def batch(self, samples: Any) -> Any:
        return self.act("batch", samples, flat(samples))

    def encode_batch(self, batch_data: Any) -> Any:
        return self.act("encode_batch", batch_data, flat(batch_data))


class Grouped(Everything):
    def batch_group_criterion(self, sample: Any) -> Any:
        return self.act("batch_group_criterion", (0, None), flat([sample]))


class Whole(Everything):
    """With ``encode_sample`` in place of its two halves."""

    preencode_sample = Encoder.preencode_sample
    postencode_sample = Encoder.postencode_sample

    def encode_sample(self, sample: Any) -> Any:
        n = sample["json"]["n"]
        return self.act("encode_sample", n, [n])


def flat(thing: Any) -> list[int]:
    return [n for part in thing for n in flat(part)] if isinstance(thing, list | tuple) else [thing]


def numbers_in(batches: Any) -> Counter[int]:
    return Counter(flat(list(batches)))


def shout(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "txt": raw["txt"].decode().upper()}


def cook_text(sample: CrudeSample) -> TextSample:
    return TextSample.derive_from(sample, text=sample["txt"])


def cook_words(sample: CrudeSample) -> Iterator[TextSample]:
    if sample["json"]["n"] == 2:
        raise SkipSample
    for word in sample["txt"].split():
        yield TextSample.derive_from(sample, text=word)


class Cooking(Encoder):
    cookers = (Cooker(cook_text),)


class CookingWords(Encoder):
    cookers = (Cooker(cook_words),)


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class DrawingBatches(Numbers):
    """Only what is drawn for whole batches."""

    def batch(self, samples: Any) -> Any:
        return drawn()

    def encode_batch(self, batch_data: Any) -> Any:
        return batch_data, drawn()
