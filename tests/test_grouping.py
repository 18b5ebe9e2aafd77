"""Batches of samples that go together: the documented examples, on real pictures.

Source: docs/source/advanced/grouping.md of Megatron-Energon.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Hashable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import jpeg, shards

from energon_fn import (
    CaptioningSample,
    DefaultTaskEncoder,
    WorkerConfig,
    get_dataset,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    prepare_dataset,
    write_dataset_yaml,
)
from energon_fn.testing import check_resume

ONE = WorkerConfig(rank=0, world_size=1, num_workers=0)
SIZES = [(24, 40), (30, 30), (56, 24), (16, 520), (24, 24)]  # width, height
PICTURES = 46
SIZE_OF = [SIZES[i] for i in np.random.default_rng(0).integers(0, len(SIZES), PICTURES)]


class ByAspect(DefaultTaskEncoder[Any, Any, Any, Any]):
    def batch_group_criterion(self, sample: CaptioningSample) -> tuple[Hashable, int | None]:
        aspect_ratio = sample.image.shape[2] / sample.image.shape[1]

        # Bin aspect ratios into 3 groups
        if aspect_ratio < 0.8:
            return "portrait", 8
        elif aspect_ratio < 1.2:
            return "square", 8
        else:
            return "landscape", 8


class BySize(DefaultTaskEncoder[Any, Any, Any, Any]):
    def batch_group_criterion(self, sample: CaptioningSample) -> tuple[Hashable, int | None]:
        batch_size = 4 if sample.image.shape[1] < 512 else 2
        return sample.image.shape, batch_size


class Common(DefaultTaskEncoder[Any, Any, Any, Any]):
    def batch_group_criterion(self, sample: CaptioningSample) -> tuple[Hashable, int | None]:
        return sample.image.shape, None


CASES = pytest.mark.parametrize(
    ("encoder", "options"), [(ByAspect, {}), (BySize, {}), (Common, {"batch_size": 3})]
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    names = shards(
        folder,
        (20, 20, 6),
        lambda n: {"jpg": jpeg(n, SIZE_OF[n]), "txt": str(n).encode()},
    )
    prepare_dataset(folder, names, split_parts_ratio=[("train", 1)], shuffle_seed=None, workers=1)
    write_dataset_yaml(folder, "CaptioningSample", {"image": "jpg", "caption": "txt"})
    return folder


def load(folder: Path, encoder: Any, **options: Any) -> list[Any]:
    defaults = {"batch_size": None, "split_part": "train", "worker_config": ONE}
    return list(
        get_loader(get_val_dataset(folder, task_encoder=encoder(), **{**defaults, **options}))
    )


def group_of(encoder: Any, n: int) -> tuple[Hashable, int]:
    """The key and the batch size that the example says of the n-th picture."""
    width, height = SIZE_OF[n]
    if encoder is ByAspect:
        return 0 if width / height < 0.8 else 1 if width / height < 1.2 else 2, 8
    return (width, height), 3 if encoder is Common else 4 if height < 512 else 2


@CASES
def test_the_documented_examples_make_batches_of_one_kind(
    pictures: Path, encoder: Any, options: dict[str, Any]
) -> None:
    batches = [list(map(int, batch.caption)) for batch in load(pictures, encoder, **options)]
    assert sorted(n for batch in batches for n in batch) == list(range(PICTURES))
    assert all(len({group_of(encoder, n) for n in batch}) == 1 for batch in batches)
    sizes = [group_of(encoder, batch[0])[1] for batch in batches]
    full = [len(batch) == size for batch, size in zip(batches, sizes, strict=True)]
    assert full == sorted(full, reverse=True)  # the short ones come last
    short = [group_of(encoder, batch[0]) for batch in batches[sum(full) :]]
    assert len(set(short)) == len(short) > 0  # and there is one of a group
    # A batch is made as soon as it is full, and has its samples in their order.
    assert batches[: sum(full)] == sorted(batches[: sum(full)], key=max)
    assert all(batch == sorted(batch) for batch in batches)
    kept = [
        list(map(int, batch.caption))
        for batch in load(pictures, encoder, **options, batch_drop_last=True)
    ]
    assert kept == batches[: sum(full)]


def test_pictures_of_one_size_are_stacked_without_padding(pictures: Path) -> None:
    for batch in load(pictures, BySize):
        width, height = SIZE_OF[int(batch.caption[0])]
        assert batch.image.shape == (len(batch.caption), 3, height, width)


def test_a_groups_own_size_goes_before_the_common_one(pictures: Path) -> None:
    def captions(**options: Any) -> list[list[str]]:
        return [batch.caption for batch in load(pictures, BySize, **options)]

    assert captions(batch_size=7) == captions()
    with pytest.raises(ValueError, match=r"no batch size for the group .*or set batch_size"):
        load(pictures, Common)


@CASES
@pytest.mark.parametrize("is_train", [True, False])
def test_going_on_behind_every_batch(
    pictures: Path, encoder: Any, options: dict[str, Any], is_train: bool
) -> None:
    dataset = get_dataset(
        pictures,
        split_part="train",
        shuffle=is_train,
        repeat=is_train,
        shuffle_buffer_size=10,
        max_samples_per_sequence=5,
        task_encoder=encoder(),
        worker_config=ONE,
        **{"batch_size": None, **options},
    )
    longest = 20
    whole = [(b.caption, state) for b, state in islice(dataset.lane_stream(0)(None), longest)]
    for k, (_, state) in enumerate(whole, 1):
        rest = islice(dataset.lane_stream(0)(state), longest - k)
        assert [(batch.caption, after) for batch, after in rest] == whole[k:]


def test_groups_resume_in_any_layout(pictures: Path) -> None:
    def make_loader(worker_config: WorkerConfig) -> Any:
        return get_loader(
            get_train_dataset(
                pictures,
                split_part="train",
                batch_size=None,
                shuffle_buffer_size=10,
                task_encoder=BySize(),
                worker_config=worker_config,
            )
        )

    assert "resumed at" in check_resume(
        make_loader, batches=24, layouts=[(1, 0), (1, 2), (2, 0)], every=8
    )


# In the other Python: the documented examples with the published package; prints the captions.
THEIR_SCRIPT = """
import io, json, sys
from contextlib import redirect_stdout
from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_loader, get_val_dataset

class ByAspect(DefaultTaskEncoder):
    def batch_group_criterion(self, sample):
        ratio = sample.image.shape[2] / sample.image.shape[1]
        return "portrait" if ratio < 0.8 else "square" if ratio < 1.2 else "landscape", 8

class BySize(DefaultTaskEncoder):
    def batch_group_criterion(self, sample):
        return sample.image.shape, 4 if sample.image.shape[1] < 512 else 2

class Common(DefaultTaskEncoder):
    def batch_group_criterion(self, sample):
        return sample.image.shape, None

with redirect_stdout(io.StringIO()):
    found = [
        [batch.caption for batch in get_loader(get_val_dataset(
            sys.argv[1], split_part="train", task_encoder=encoder(), batch_size=size,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0)))]
        for encoder, size in ((ByAspect, None), (BySize, None), (Common, 3))]
print(json.dumps(found))
"""


def test_the_published_package_makes_the_same_batches(
    pictures: Path, published_python: str
) -> None:
    command = [published_python, "-W", "ignore", "-c", THEIR_SCRIPT, str(pictures)]
    theirs = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    for found, (encoder, size) in zip(
        theirs, [(ByAspect, None), (BySize, None), (Common, 3)], strict=True
    ):
        ours = [batch.caption for batch in load(pictures, encoder, batch_size=size)]
        full = len(load(pictures, encoder, batch_size=size, batch_drop_last=True))
        assert ours[:full] == found[:full]
        assert sorted(ours) == sorted(found)  # short ones in the order of their oldest sample
