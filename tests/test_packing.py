"""Packing: selectors keep their budgets, lose nothing, and pack as well as they say."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import combinations, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import shards
from hypothesis import given, settings
from hypothesis import strategies as st

from energon_fn import (
    DefaultTaskEncoder,
    FatalSampleError,
    SkipSample,
    WorkerConfig,
    blend,
    get_dataset,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    position,
    subset,
)
from energon_fn.packing import Packer, best_fit, fill_ratio, knapsack
from energon_fn.stages import PackedSamplesOutput, pack
from energon_fn.testing import check_resume


class Doc(NamedTuple):
    """A sample: its number, what it costs, and what kind it is."""

    n: int
    tokens: float
    images: float = 0
    kind: int = 0


def tokens(doc: Doc) -> float:
    return doc.tokens


def both(doc: Doc) -> tuple[float, float]:
    return doc.tokens, doc.images


def named(doc: Doc) -> dict[str, float]:
    return {"images": doc.images, "tokens": doc.tokens}


def kind(doc: Doc) -> int:
    return doc.kind


MAKERS = [knapsack, best_fit]
each_maker = pytest.mark.parametrize("make", MAKERS)
BUDGETS: list[tuple[Callable[[Doc], Any], Any]] = [
    (tokens, 20),
    (both, (20, 4)),
    (named, {"tokens": 20, "images": 4}),
]
each_budget = pytest.mark.parametrize(("cost", "capacity"), BUDGETS)

amounts = st.integers(0, 20) | st.floats(0, 20) | st.sampled_from([0.1, 2.5, 6.7])
docs = st.lists(
    st.tuples(amounts, st.integers(0, 4), st.integers(0, 2)).map(lambda of: Doc(0, *of)),
    max_size=40,
).map(lambda found: [doc._replace(n=n) for n, doc in enumerate(found)])


def used(docs: Any, budget: str = "tokens") -> Fraction:
    return sum((Fraction(getattr(doc, budget)) for doc in docs), Fraction(0))


# --- what every selection keeps ----------------------------------------------------------------


@each_maker
@each_budget
@given(docs=docs)
def test_no_budget_is_exceeded_and_every_sample_comes_once(
    make: Any, cost: Any, capacity: Any, docs: list[Doc]
) -> None:
    packs = make(cost, capacity)(docs)
    assert all(used(pack) <= 20 for pack in packs)
    if cost is not tokens:
        assert all(used(pack, "images") <= 4 for pack in packs)
    assert sorted(doc.n for pack in packs for doc in pack) == list(range(len(docs)))
    assert all(packs)


@each_maker
@given(docs=docs)
def test_packs_keep_the_samples_order(make: Any, docs: list[Doc]) -> None:
    packs = make(both, (20, 4))(docs)
    assert all(pack == sorted(pack) for pack in packs)
    assert packs == sorted(packs)


@each_maker
@given(docs=docs)
def test_groups_never_mix_and_are_packed_as_if_alone(make: Any, docs: list[Doc]) -> None:
    packs = make(both, (20, 4), group_by=kind)(docs)
    assert all(len({doc.kind for doc in pack}) == 1 for pack in packs)
    alone = [
        pack
        for group in range(3)
        for pack in make(both, (20, 4))([doc for doc in docs if doc.kind == group])
    ]
    assert packs == sorted(alone)


@each_maker
@given(docs=docs)
def test_a_selection_depends_on_its_samples_alone_and_pickles(make: Any, docs: list[Doc]) -> None:
    select = make(named, {"tokens": 20, "images": 4}, group_by=kind, min_fill=0.5)
    again = pickle.loads(pickle.dumps(select))
    assert again == select
    random.seed(len(docs))
    first = select(docs)
    assert again(iter(docs)) == first
    assert again(docs).pushback == first.pushback


# --- which packs ---------------------------------------------------------------------------------


def shares(doc: Doc) -> Fraction:
    return Fraction(doc.tokens) / 20 + Fraction(doc.images) / 4


def fits(doc: Doc, pack: list[Doc]) -> bool:
    return used([*pack, doc]) <= 20 and used([*pack, doc], "images") <= 4


@given(docs=docs)
def test_the_knapsack_fills_one_pack_after_another(docs: list[Doc]) -> None:
    left, expected = sorted(docs, key=shares, reverse=True), []
    while left:
        pack: list[Doc] = []
        while (largest := next((doc for doc in left if fits(doc, pack)), None)) is not None:
            left.remove(largest)
            pack.append(largest)
        expected.append(sorted(pack))
    assert knapsack(both, (20, 4))(docs) == sorted(expected)


@given(docs=docs)
def test_best_fit_puts_each_where_least_is_left(docs: list[Doc]) -> None:
    packs: list[list[Doc]] = []
    for doc in sorted(docs, key=shares, reverse=True):
        room = [pack for pack in packs if fits(doc, pack)]
        if room:
            max(room, key=lambda pack: sum(map(shares, pack))).append(doc)
        else:
            packs.append([doc])
    assert best_fit(both, (20, 4))(docs) == sorted(map(sorted, packs))


@each_maker
@given(docs=docs)
def test_no_two_packs_would_go_in_one(make: Any, docs: list[Doc]) -> None:
    for one, other in combinations(make(both, (20, 4))(docs), 2):
        assert not (used(one + other) <= 20 and used(one + other, "images") <= 4)
    packs = make(tokens, 20)(docs)
    assert len(packs) <= 2 * used(docs) / 20 + 1


def fewest(lengths: tuple[int, ...], packs: tuple[int, ...] = ()) -> int:
    """The least number of packs of 20, by trying everything."""
    if not lengths:
        return len(packs)
    first, rest = lengths[0], lengths[1:]
    ways = [(*packs, first)] + [
        (*packs[:n], packs[n] + first, *packs[n + 1 :])
        for n in range(len(packs))
        if packs[n] + first <= 20
    ]
    return min(fewest(rest, way) for way in set(ways))


@given(st.lists(st.integers(1, 20), max_size=7))
def test_the_knapsack_is_as_near_the_best_as_is_proven(lengths: list[int]) -> None:
    best = fewest(tuple(lengths))
    assert len(knapsack(int, 20)(lengths)) <= 11 / 9 * best + 6 / 9
    assert len(best_fit(int, 20)(lengths)) <= 2 * best


# --- samples too long, packs too empty -----------------------------------------------------------


def halved(doc: Doc, capacity: int) -> Iterator[Doc]:
    left = doc.tokens
    while left > 0:
        yield doc._replace(tokens=min(left, capacity))
        left -= capacity


LONG = [Doc(0, 5), Doc(1, 47), Doc(2, 15), Doc(3, 20)]


@each_maker
def test_what_becomes_of_a_sample_that_is_too_long(make: Any) -> None:
    def lengths(**options: Any) -> list[list[float]]:
        return [[doc.tokens for doc in pack] for pack in make(tokens, 20, **options)(LONG)]

    assert lengths(too_long="skip") == [[5, 15], [20]]
    assert lengths(too_long="pass") == [[5, 15], [47], [20]]
    assert lengths(too_long=halved) == [[5, 15], [20], [20], [7], [20]]
    with pytest.raises(FatalSampleError, match=r"costs 47, more than the capacity 20.*too_long"):
        make(tokens, 20)(LONG)
    with pytest.raises(FatalSampleError, match=r"sample a costs \(3, 1\), more than"):
        make(lambda sample: sample["cost"], (2, 1))([{"__key__": "a", "cost": (3, 1)}])


def test_a_split_that_does_not_help_is_told() -> None:
    with pytest.raises(FatalSampleError, match=r"to parts that cost \[24, 23\].*no part may"):
        knapsack(int, 20, too_long=lambda n, most: [n - n // 2, n // 2])([47])


@each_maker
@given(docs=docs, least=st.floats(0.1, 1))
def test_packs_too_empty_are_given_back(make: Any, docs: list[Doc], least: float) -> None:
    whole = make(both, (20, 4), group_by=kind)(docs)
    output: PackedSamplesOutput[Doc]
    output = make(both, (20, 4), group_by=kind, min_fill=least)(docs)

    def fill(pack: list[Doc]) -> float:
        return max(float(used(pack) / 20), float(used(pack, "images") / 4))

    half = sorted(map(fill, whole))[-(len(whole) // 2 or 1) :]  # go out in any case
    assert output == [pack for pack in whole if fill(pack) >= min([least, *half])]
    back = [pack for pack in whole if pack not in output.packs]
    assert output.pushback == sorted(doc for pack in back for doc in pack)
    assert bool(output) == bool(docs)  # so it always goes on


def test_parts_of_a_sample_are_never_given_back() -> None:
    output = knapsack(tokens, 20, too_long=halved, min_fill=0.9)([Doc(0, 47), Doc(1, 3)])
    assert [[doc.tokens for doc in pack] for pack in output] == [[20], [20], [7, 3]]
    assert output.pushback == []
    output = knapsack(tokens, 20, too_long="pass", min_fill=0.9)([Doc(0, 47), Doc(1, 3)])
    assert (output, output.pushback) == ([[Doc(0, 47)]], [Doc(1, 3)])


# --- costs ---------------------------------------------------------------------------------------


@each_maker
@pytest.mark.parametrize(
    "number", [np.int64, np.float32, torch.tensor, Fraction, float, np.uint8, lambda n: n]
)
def test_costs_are_any_numbers(make: Any, number: Any) -> None:
    sizes = [7, 12, 3, 18, 20, 0, 1]
    assert make(number, 20)(sizes) == make(int, 20)(sizes)
    assert make(lambda n: (number(n), 1), (20, 2))(sizes) == make(lambda n: (n, 1), (20, 2))(sizes)


@each_maker
def test_the_cost_is_asked_once_for_each_sample(make: Any) -> None:
    asked: list[int] = []

    def cost(n: int) -> int:
        asked.append(n)
        return n

    make(cost, 10, min_fill=0.9)([3, 9, 1, 5])
    assert asked == [3, 9, 1, 5]


def test_nothing_to_pack() -> None:
    assert knapsack(int, 20)([]) == []
    assert knapsack(int, 20, too_long="skip")([21]) == []
    assert knapsack(int, 20, min_fill=0.5)([]).pushback == []


@pytest.mark.parametrize("value", [-1, -0.5, float("nan"), float("inf"), "3", None, [3]])
def test_a_cost_that_is_no_amount_is_told_with_its_sample(value: Any) -> None:
    select: Packer[Any] = knapsack(lambda sample: value, 20)
    with pytest.raises(ValueError, match=r"no amount: it must be a number, 0 or more") as caught:
        select([{"__key__": "a/07"}])
    assert "as the cost of sample a/07" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("cost", "capacity"),
    [((1, 2), (1, 2, 3)), (1, (1, 2)), ({"tokens": 1}, {"tokens": 1, "images": 2}), (1, {"a": 2})],
)
def test_a_cost_of_another_form_than_the_capacity_is_told(cost: Any, capacity: Any) -> None:
    select: Packer[Any] = knapsack(lambda sample: cost, capacity)
    with pytest.raises(TypeError, match="the capacity"):
        select([0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"capacity": 0}, "capacity is 0; it must be more than 0"),
        ({"capacity": (4, 0)}, r"capacity is \(4, 0\)"),
        ({"capacity": -1}, "-1 is no amount"),
        ({"too_long": "cut"}, "too_long is 'cut'; it must be one of error, skip, pass"),
        ({"min_fill": 0}, "min_fill is 0; it must be a share"),
        ({"min_fill": 90}, "min_fill is 90"),
    ],
)
@each_maker
def test_options_are_checked_at_once(make: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**{"cost": int, "capacity": 20, **options})


def test_the_fill_is_the_mean_share_of_each_budget() -> None:
    packs = [[Doc(0, 10, 1), Doc(1, 10)], [Doc(2, 5, 1)]]
    assert fill_ratio(packs, tokens, 20) == (1 + 0.25) / 2
    assert fill_ratio(packs, both, (20, 4)) == (0.625, 0.25)
    assert fill_ratio(packs, named, {"tokens": 20, "images": 4}) == {
        "tokens": 0.625,
        "images": 0.25,
    }
    assert (fill_ratio([], tokens, 20), fill_ratio([], both, (20, 4))) == (0, (0, 0))


@each_maker
def test_what_goes_out_is_counted_for_the_report(make: Any) -> None:
    position.here.meters.counts.clear()
    select = make(both, (20, 4), min_fill=0.9)
    packs = [*select([Doc(0, 20), Doc(1, 5, 3), Doc(2, 4)]), *select([Doc(2, 4), Doc(3, 6)])]
    fills = [max(float(used(p)) / 20, float(used(p, "images")) / 4) for p in packs]
    assert position.here.meters.counts == {"packs": len(packs), "fill": sum(fills)}


# --- in the stage and in a loader ----------------------------------------------------------------


@given(docs=docs, size=st.integers(1, 12), least=st.none() | st.floats(0.1, 1))
def test_in_the_stage_every_sample_comes_once(
    docs: list[Doc], size: int, least: float | None
) -> None:
    select: Packer[Doc] = knapsack(both, (20, 4), group_by=kind, min_fill=least)
    packs = list(pack(select, list, buffer_size=size)(docs))
    assert sorted(doc.n for pack in packs for doc in pack) == list(range(len(docs)))


def test_giving_back_fills_packs_better() -> None:
    chance = random.Random(0)
    docs = [Doc(n, min(1 + int(chance.lognormvariate(1.5, 1)), 20)) for n in range(2000)]

    def fill(least: float | None) -> float:
        select: Packer[Doc] = best_fit(tokens, 20, min_fill=least)
        return float(fill_ratio(pack(select, list, buffer_size=20)(docs), tokens, 20))

    assert fill(None) < fill(0.8) < fill(1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("numbers")
    shards(path, (13, 1, 20, 7))
    return path


def length(item: list[Any]) -> int:
    return int(1 + item[0] * 7 % 11)


class Packing(DefaultTaskEncoder[Any, Any, Any, Any]):
    """Samples are lists of their number and random ones; packs are lists of samples."""

    select = knapsack(cost=length, capacity=20, group_by=lambda item: item[0] % 2, min_fill=0.9)

    def encode_sample(self, sample: Any) -> Any:
        n = sample["json"]["n"]
        if n % 7 == 3:
            raise SkipSample
        for _ in range(1 + n % 2):
            yield [n, random.random(), self.current_sample_index]

    def select_samples_to_pack(self, samples: Any) -> Any:
        return self.select(samples)

    def pack_selected_samples(self, samples: Any) -> Any:
        return [*samples, random.random(), self.current_sample_index]

    def batch(self, samples: Any) -> Any:
        return samples


class AtRandom(Packing):
    """Gives back what it draws."""

    def select_samples_to_pack(self, samples: Any) -> Any:
        chosen = random.sample(samples, random.randint(1, len(samples)))
        back = [sample for sample in samples if not any(sample is one for one in chosen)]
        random.shuffle(back)
        return PackedSamplesOutput([chosen[::2], chosen[1::2]], back)


class Grouping(AtRandom):
    def batch_group_criterion(self, sample: Any) -> Any:
        return len(sample) % 2, None


@pytest.mark.parametrize("encoder", [Packing, AtRandom])
def test_every_sample_comes_once_though_some_are_given_back(folder: Path, encoder: Any) -> None:
    dataset = get_val_dataset(
        folder,
        split_part="train",
        batch_size=2,
        packing_buffer_size=6,
        task_encoder=encoder(),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0, lanes=3),
    )
    found = [
        sample[0] for batch in get_loader(dataset) for packed in batch for sample in packed[:-2]
    ]
    expected = [n for n in range(41) if n % 7 != 3 for _ in range(1 + n % 2)]
    assert sorted(found) == expected


@settings(max_examples=25)
@given(
    encoder=st.sampled_from([Packing, AtRandom, Grouping]),
    lanes=st.integers(1, 3),
    batch_size=st.integers(1, 4),
    size=st.integers(1, 9),
    is_train=st.booleans(),
    repeat=st.booleans(),
)
def test_going_on_from_every_state_gives_the_rest(
    folder: Path,
    encoder: Any,
    lanes: int,
    batch_size: int,
    size: int,
    is_train: bool,
    repeat: bool,
) -> None:
    dataset = get_dataset(
        folder,
        batch_size=batch_size,
        packing_buffer_size=size,
        shuffle=is_train,
        shuffle_buffer_size=4,
        max_samples_per_sequence=3,
        repeat=repeat,
        task_encoder=encoder(),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0, lanes=lanes),
    )
    longest = 16
    for lane in range(lanes):
        whole = list(islice(dataset.lane_stream(lane)(None), longest))
        for k, (_, state) in enumerate(whole, 1):
            assert list(islice(dataset.lane_stream(lane)(state), longest - k)) == whole[k:]


@pytest.mark.parametrize(("encoder", "blended"), [(Packing, True), (AtRandom, False)])
def test_a_loader_that_gives_samples_back_resumes_anywhere(
    folder: Path, encoder: Any, blended: bool
) -> None:
    halves = subset("0%", "50%")(folder), subset("50%", "100%")(folder)
    data = blend([(halves[0], 3), (halves[1], 1)]) if blended else folder

    def make_loader(worker_config: WorkerConfig) -> Any:
        return get_loader(
            get_train_dataset(
                data,
                batch_size=2,
                packing_buffer_size=6,
                shuffle_buffer_size=10,
                task_encoder=encoder(),
                worker_config=worker_config,
            )
        )

    said = check_resume(make_loader, batches=14, layouts=[(1, 0), (1, 2), (2, 0)])
    assert "resumed at" in said


def test_a_state_holds_little_for_each_held_sample(folder: Path) -> None:
    class Waiting(AtRandom):
        def encode_sample(self, sample: Any) -> Any:
            return sample

        def select_samples_to_pack(self, samples: Any) -> Any:
            return PackedSamplesOutput(
                [samples[:1]], samples[1:]
            )  # the more wait, the more it holds

    dataset = get_train_dataset(
        folder,
        batch_size=1,
        packing_buffer_size=20,
        task_encoder=Waiting(),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
    )
    loader = get_loader(dataset)
    for _ in islice(loader, 30):
        pass
    assert 19 * 20 < len(json.dumps(loader.state_dict()["lanes"])) < 19 * 70


@pytest.mark.parametrize("packing", [None, 6])
def test_the_samples_index_is_the_same_with_any_number_of_workers(
    folder: Path, packing: int | None
) -> None:
    class Indexed(Packing):
        def select_samples_to_pack(self, samples: Any) -> Any:
            return [samples[::2], samples[1::2]]

    def load(workers: int) -> list[Any]:
        dataset = get_train_dataset(
            folder,
            batch_size=1,
            packing_buffer_size=packing,
            task_encoder=Indexed(),
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers, lanes=2),
        )
        return list(islice(get_loader(dataset), 20))

    assert load(0) == load(2)
