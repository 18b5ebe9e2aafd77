"""The law: from every state a dataset goes on as if it had not been left."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import DrawingBatches, Encoder, Numbers, here, load, val
from hypothesis import given, settings
from hypothesis import strategies as st

from energon_fn import (
    FatalSampleError,
    SkipSample,
    get_dataset,
    get_loader,
)


class Random(Encoder):
    """Does what its options say, and draws random numbers all along."""

    def __init__(self, skip: int, most: int, pack: bool, group: int, parts: int):
        self.skip, self.most, self.packs, self.group, self.parts = skip, most, pack, group, parts
        self.encode_sample = self.many if most > 1 else self.one  # type: ignore[method-assign]
        if pack:
            self.select_samples_to_pack = self.select  # type: ignore[method-assign]
            self.pack_selected_samples = self.join  # type: ignore[method-assign]
        if group:
            self.batch_group_criterion = self.criterion  # type: ignore[method-assign]
        if parts:
            self.encode_batch = self.part if parts > 1 else self.whole  # type: ignore[method-assign]

    def maybe_skip(self, n: int) -> None:
        if self.skip and (n + random.randrange(2)) % self.skip == 0:
            raise SkipSample

    def one(self, sample: Any) -> Any:
        n = sample["json"]["n"]
        self.maybe_skip(n)
        return [n, random.random()]

    def many(self, sample: Any) -> Any:
        for copy in range(sample["json"]["n"] % (self.most + 1)):
            yield [*self.one(sample), copy]

    def select(self, samples: Any) -> Any:
        groups = self.groups(samples)
        return groups if self.most == 1 else list(groups)

    def groups(self, samples: Any) -> Any:
        shuffled = random.sample(samples, len(samples))
        while shuffled:
            size = 1 + int(torch.randint(3, ()))
            yield shuffled[:size]
            shuffled = shuffled[size:]

    def join(self, samples: Any) -> Any:
        self.maybe_skip(int(samples[0][0]))
        return [n for sample in samples for n in sample] + [random.random()]

    def criterion(self, sample: Any) -> Any:
        return int(sample[0]) % self.group, 1 + int(sample[0]) % 3

    def batch(self, samples: Any) -> Any:
        return [*samples, float(np.random.rand())]

    def whole(self, batch_data: Any) -> Any:
        self.maybe_skip(len(batch_data))
        return [*batch_data, random.random()]

    def part(self, batch_data: Any) -> Any:
        for part in range(len(batch_data) % (self.parts + 1)):
            yield [batch_data[: part + 1], random.random()]


encoders = st.builds(
    Random,
    skip=st.sampled_from([0, 0, 2, 3]),
    most=st.integers(1, 3),
    pack=st.booleans(),
    group=st.integers(0, 3),
    parts=st.integers(0, 3),
)


@settings(max_examples=40)
@given(
    encoder=encoders,
    lanes=st.integers(1, 3),
    batch_size=st.none() | st.integers(1, 5),
    packing=st.integers(1, 7),
    drop_last=st.booleans(),
    is_train=st.booleans(),
    repeat=st.booleans(),
)
def test_going_on_from_every_state_gives_the_rest(
    folder: Path,
    encoder: Random,
    lanes: int,
    batch_size: int | None,
    packing: int,
    drop_last: bool,
    is_train: bool,
    repeat: bool,
) -> None:
    dataset = get_dataset(
        folder,
        batch_size=batch_size,
        batch_drop_last=drop_last,
        packing_buffer_size=packing if encoder.packs else None,
        shuffle=is_train,
        shuffle_buffer_size=4,
        max_samples_per_sequence=3,
        repeat=repeat,
        task_encoder=encoder,
        worker_config=here(lanes=lanes),
    )
    longest = 15
    alone = []
    try:
        for lane in range(lanes):
            stream = dataset.lane_stream(lane)
            whole = list(islice(stream(None), longest))
            alone.append([batch for batch, _ in whole])
            for k, (_, state) in enumerate(whole, 1):
                assert list(islice(stream(state), longest - k)) == whole[k:]
    except FatalSampleError:
        assert repeat  # everything is skipped
        return
    # In turn, the lanes do not disturb each other; nor do restarts anywhere.
    in_turn = [batches[turn] for turn in range(longest) for batches in alone if turn < len(batches)]
    loader, torn = get_loader(dataset), []
    for stop in (1, 3, 2, 5, 4):
        torn += islice(loader, min(stop, len(in_turn) - len(torn)))
        loader.close()
    assert torn == in_turn[:15]


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("batch_size", [None, 1, 3, 5])
@pytest.mark.parametrize("lanes", [1, 3, 13])
def test_the_plan_tells_where_a_batch_begins(
    folder: Path, lanes: int, batch_size: int | None, is_train: bool
) -> None:
    encoder = DrawingBatches() if batch_size else Numbers()
    dataset = get_dataset(
        folder, batch_size=batch_size, shuffle=is_train, repeat=True, task_encoder=encoder,
        worker_config=here(lanes=lanes),
    )  # fmt: skip
    for lane in range(lanes):
        whole = [batch for batch, _ in islice(dataset.lane_stream(lane)(None), 14)]
        for done in range(14):
            stream = dataset.lane_stream(lane)(dataset.lane_state(lane, done))
            assert [batch for batch, _ in islice(stream, 14 - done)] == whole[done:]


def test_leaving_the_loop_between_the_parts_of_a_batch(folder: Path) -> None:
    class Parting(Numbers):
        def encode_batch(self, batch_data: Any) -> Any:
            for n in batch_data:
                yield n, random.random()

    whole = load(folder, batch_size=5, task_encoder=Parting())
    assert [n for n, _ in whole] == list(range(12))
    assert len({drawn for _, drawn in whole}) == 12
    for stop in range(1, 12):
        loader = get_loader(val(folder, batch_size=5, task_encoder=Parting()))
        first = list(islice(loader, stop))
        assert first + list(loader) == whole
