"""What functions draw depends on the sample, or the place in the lane, alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from encoders import DrawingBatches, Encoder, Everything, drawn, here, load, val

from energon_fn import (
    AugmentTaskEncoder,
    Cooker,
    get_loader,
    get_train_dataset,
    seeds,
    stateless,
)


class DrawingSamples(Encoder):
    """Numbers with random ones, drawn where single samples are at hand."""

    cookers = (Cooker(lambda sample: (sample["json"]["n"], drawn())),)

    def preencode_sample(self, sample: Any) -> Any:
        for part in "ab":
            yield (*sample, drawn(), part)

    def postencode_sample(self, sample: Any) -> Any:
        return (*sample, drawn())

    def batch(self, samples: Any) -> Any:
        return samples


def test_what_is_drawn_for_a_sample_depends_on_sample_and_epoch_alone(folder: Path) -> None:
    def epochs(**options: Any) -> list[set[Any]]:
        defaults = {"batch_size": 1, "task_encoder": DrawingSamples()}
        dataset = get_train_dataset(folder, repeat=False, **{**defaults, **options})
        loader = get_loader(dataset)
        return [{sample for batch in loader for sample in batch} for _ in range(2)]

    first, second = epochs(worker_config=here())
    assert epochs(worker_config=here(lanes=5), batch_size=4) == [first, second]
    assert epochs(worker_config=here(), shuffle_buffer_size=7) == [first, second]
    assert len(first) == len(second) == 24
    # cook, preencode and postencode of the two parts of each sample in each epoch
    cooked = {sample[1] for sample in first | second}
    others = {numbers for sample in first | second for numbers in (sample[2], sample[4])}
    assert (len(cooked), len(others), len(cooked | others)) == (24, 96, 120)
    assert not first & set().union(*epochs(worker_config=here(seed_offset=1)))


def test_what_is_drawn_for_a_batch_differs_by_lane_epoch_and_place(folder: Path) -> None:
    dataset = get_train_dataset(
        folder, batch_size=1, repeat=False, task_encoder=DrawingBatches(),
        worker_config=here(lanes=3),
    )  # fmt: skip
    loader = get_loader(dataset)
    found = [numbers for _epoch in range(3) for numbers in loader]
    assert len(found) == len({pair for numbers in found for pair in numbers}) / 2 == 36
    again = get_loader(dataset)
    assert [numbers for _epoch in range(3) for numbers in again] == found


def test_validation_draws_the_same_every_time(folder: Path) -> None:
    for encoder in (DrawingBatches(), DrawingSamples()):
        loader = get_loader(val(folder, batch_size=2, task_encoder=encoder))
        assert list(loader) == list(loader)


def test_stateless_methods_are_not_seeded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Marked(Everything):
        preencode_sample = stateless(lambda self, sample: sample["json"]["n"])
        postencode_sample = stateless(restore_seeds=True)(lambda self, sample: sample)
        batch = stateless(failure_tolerance=5)(lambda self, samples: samples)

    class MarkedCook(Encoder):
        cookers = (Cooker(stateless(lambda sample: sample)), Cooker(lambda sample: sample))

    seeded: list[str] = []
    reseed = seeds.reseed
    monkeypatch.setattr(
        seeds, "reseed", lambda seed, what: (seeded.append(what), reseed(seed, what))
    )
    load(folder, batch_size=4, task_encoder=Marked())
    assert Counter(seeded) == {"postencode_sample": 12, "encode_batch": 3}
    seeded.clear()
    load(folder, batch_size=4, task_encoder=AugmentTaskEncoder(Marked()), packing_buffer_size=6)
    assert Counter(seeded) == {
        "select_samples_to_pack": 2,
        "postencode_sample": 12,
        "pack_selected_samples": 4,
        "encode_batch": 1,
    }
    seeded.clear()
    load(folder, task_encoder=MarkedCook())
    load(folder)
    assert not seeded
