"""Datasets made of datasets: what a recipe says comes out, resumed and shared out anyhow."""

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from conftest import shards
from hypothesis import given, settings
from hypothesis import strategies as st

from energon_fn import (
    DatasetError,
    DefaultTaskEncoder,
    Loader,
    SkipSample,
    Source,
    WorkerConfig,
    blend,
    blend_epochized,
    checkpoint,
    concat,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    get_val_datasets,
    join,
    knapsack,
    open_source,
    repeat,
    subset,
    using,
)
from energon_fn.order.mixing import Blend, beginning, keys, leaves
from energon_fn.order.plan import Plan


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Three datasets, of 11, 6 and 2 samples: a0, a1, ..."""
    found = {}
    for name, counts in {"a": (4, 4, 3), "b": (6,), "c": (2,)}.items():
        folder = tmp_path_factory.mktemp(name)
        shards(folder, counts, lambda n, name=name: {"txt": f"{name}{n}".encode()})  # type: ignore[misc]
        found[name] = open_source(folder)
    return found


@dataclass
class Stages:
    """Which of the stages do what, to try them in all combinations."""

    skip: int = 0
    many: bool = False
    draw: bool = False
    pack: int | None = None
    group: bool = False


def encoder(stages: Stages) -> Any:
    def encode_sample(self: Any, sample: Any) -> Iterator[str]:
        word = sample["txt"]
        if stages.skip and int(word[1:].rstrip("?")) % 5 == stages.skip:
            raise SkipSample
        for n in range(1 + (stages.many and int(word[1:].rstrip("?")) % 2)):
            yield f"{word}{'!' * n}{random.random() if stages.draw else ''}"

    def select_samples_to_pack(self: Any, samples: list[str]) -> list[list[str]]:
        chosen = random.sample(samples, len(samples)) if stages.draw else samples
        return [chosen[::2], chosen[1::2]]

    methods: dict[str, Any] = {"batch": lambda self, samples: samples}
    if stages.skip or stages.many or stages.draw:
        methods["encode_sample"] = encode_sample
    else:
        methods["encode_sample"] = lambda self, sample: sample["txt"]
    if stages.pack:
        methods["select_samples_to_pack"] = select_samples_to_pack
        methods["pack_selected_samples"] = lambda self, samples: "+".join(samples)
    if stages.group:
        methods["batch_group_criterion"] = lambda self, word: (len(word) % 2, 2)
    return type("Encoder", (DefaultTaskEncoder,), methods)()


def loader(recipe: Any, stages: Stages | None = None, layout: Any = None, **options: Any) -> Any:
    stages = stages or Stages()
    rank, world_size, workers, lanes = layout or (0, 1, 0, 4)
    config = WorkerConfig(rank=rank, world_size=world_size, num_workers=workers, lanes=lanes)
    defaults = {
        "batch_size": 2,
        "shuffle_buffer_size": 3,
        "max_samples_per_sequence": 2,
        "packing_buffer_size": stages.pack,
        "task_encoder": encoder(stages),
        "worker_config": config,
    }
    threads = options.pop("threads", 0)
    return get_loader(get_train_dataset(recipe, **{**defaults, **options}), threads=threads)


def words(loader: Loader[Any], batches: int | None = None) -> list[str]:
    return [word for batch in itertools.islice(loader, batches) for word in batch]


def datasets_of(found: list[str]) -> Counter[str]:
    return Counter(word[0] for word in found)


# -------------------------------------------------------------------------- what a recipe means


def test_a_blend_draws_by_weight_however_small_a_dataset(sources: dict[str, Source]) -> None:
    recipe = blend([(sources["a"], 5), (sources["c"], 3)])
    found = words(loader(recipe), 400)
    assert datasets_of(found) == {"a": 500, "c": 300}
    each = Counter(found)
    assert {each["c0"], each["c1"]} <= {149, 150, 151}
    assert {each[f"a{n}"] for n in range(11)} <= {44, 45, 46, 47}


def test_a_random_blend_draws_by_weight_in_the_long_run(sources: dict[str, Source]) -> None:
    recipe = blend([(sources["a"], 1), (sources["b"], 1)], random=True)
    found = words(loader(recipe), 1000)
    assert abs(datasets_of(found)["a"] - 1000) < 120  # five standard deviations
    steady = words(loader(blend([(sources["a"], 1), (sources["b"], 1)])), 1000)
    assert datasets_of(steady) == {"a": 1000, "b": 1000}


def test_a_curriculum_moves_from_one_dataset_to_another(sources: dict[str, Source]) -> None:
    recipe = blend([(sources["a"], lambda n: n < 80), (sources["b"], lambda n: n >= 80)])
    found = words(loader(recipe), 80)
    assert datasets_of(found[:80]) == {"a": 80}
    assert datasets_of(found[80:]) == {"b": 80}


def test_an_epoch_of_a_make_up_is_exact_and_fractions_go_on_in_the_next(
    sources: dict[str, Source],
) -> None:
    recipe = blend_epochized([(sources["a"], 2), (sources["b"], 0.75), (sources["c"], 1)])
    epochs = loader(recipe, repeat=False)
    first, second = words(epochs), words(epochs)
    assert datasets_of(first) == {"a": 22, "b": 4, "c": 2}
    assert datasets_of(second) == {"a": 22, "b": 5, "c": 2}
    assert set(Counter(word for word in first if word[0] == "a").values()) == {2}
    # Nine of b's six samples: none comes a second time before all have come once.
    of_b = Counter(word for word in first + second if word[0] == "b")
    assert sorted(of_b.values()) == [1, 1, 1, 2, 2, 2]
    assert first != second


def test_an_epochs_datasets_are_mixed_all_through(sources: dict[str, Source]) -> None:
    recipe = blend_epochized([(sources["a"], 20), (sources["b"], 20)])
    found = words(loader(recipe, repeat=False))
    for start in range(0, len(found), 34):
        assert abs(datasets_of(found[start : start + 34])["a"] - 22) <= 4


def test_nested_recipes_multiply(sources: dict[str, Source]) -> None:
    inner = blend_epochized([(sources["a"], 2), (sources["b"], 1)])
    both = blend_epochized([(inner, 3), (sources["c"], 1)])
    assert datasets_of(words(loader(both, repeat=False))) == {"a": 66, "b": 18, "c": 2}
    mixed = blend([(blend([(sources["a"], 1), (sources["b"], 3)]), 1), (sources["c"], 1)])
    assert datasets_of(words(loader(mixed), 400)) == {"a": 100, "b": 300, "c": 400}
    drawn = blend_epochized([(blend([(sources["a"], 1), (sources["b"], 1)]), 2)])
    assert datasets_of(words(loader(drawn, repeat=False))) == {"a": 17, "b": 17}
    assert datasets_of(words(loader(repeat(3)(sources["c"]), repeat=False))) == {"c": 6}


def test_concat_is_one_dataset_to_training_and_an_order_to_validation(
    sources: dict[str, Source],
) -> None:
    recipe = concat([sources["c"], sources["b"]])
    found = words(loader(recipe, repeat=False))
    assert sorted(found) == ["b0", "b1", "b2", "b3", "b4", "b5", "c0", "c1"]
    assert len(leaves(loader(recipe).dataset.order)) == 1
    mixed = concat([blend([(sources["a"], 1), (sources["b"], 1)]), sources["c"]])
    assert datasets_of(words(loader(mixed, repeat=False)))["c"] == 2


@pytest.mark.parametrize("how", [blend, blend_epochized])
def test_validation_takes_one_after_the_other_each_once(
    sources: dict[str, Source], how: Callable[..., Any]
) -> None:
    recipe = how([(sources["c"], 5), (concat([sources["b"]]), 0.25), (sources["c"], 1)])
    config = WorkerConfig(rank=0, world_size=1, num_workers=0, lanes=3)
    dataset = get_val_dataset(
        recipe, batch_size=2, task_encoder=encoder(Stages()), worker_config=config
    )
    assert words(get_loader(dataset)) == ["c0", "c1", *(f"b{n}" for n in range(6)), "c0", "c1"]
    each = get_val_datasets(
        recipe, batch_size=2, task_encoder=encoder(Stages()), worker_config=config
    )
    assert [words(get_loader(one)) for one, _ in each] == [
        ["c0", "c1"],
        [f"b{n}" for n in range(6)],
        ["c0", "c1"],
    ]
    assert [source.path for _, source in each] == [sources[name].path for name in "cbc"]


def test_a_subset_of_a_subset_is_its_part(sources: dict[str, Source]) -> None:
    def left(recipe: Any) -> set[str]:
        return set(words(loader(recipe, repeat=False)))

    assert left(subset("0%", "50%")(subset("25%", "75%")(sources["a"]))) == {"a2", "a3", "a4"}
    assert left(subset("50%", "100%")(subset(2, 6)(sources["a"]))) == {"a4", "a5"}
    assert left(subset(9, "end")(sources["a"])) == {"a9", "a10"}
    halves = subset("0%", "50%")(blend_epochized([(sources["a"], 1), (sources["b"], 1)]))
    assert left(halves) == {f"a{n}" for n in range(5)} | {"b0", "b1", "b2"}
    parts = [subset(f"{n}%", f"{n + 20}%")(sources["a"]) for n in range(0, 100, 20)]
    assert left(concat(parts)) == {f"a{n}" for n in range(11)}


def test_subsets_that_cannot_be_are_refused(sources: dict[str, Source]) -> None:
    with pytest.raises(DatasetError, match=r"around a blend of several datasets"):
        loader(subset(0, 5)(blend([(sources["a"], 1), (sources["b"], 1)])))
    with pytest.raises(DatasetError, match=r"two subsets by numbers of samples"):
        loader(subset(0, 3)(subset(0, 5)(sources["a"])))
    with pytest.raises(DatasetError, match=r"from 5 to 12 is not within .* has 11 samples"):
        loader(subset(5, 12)(sources["a"]))
    for wrong in ["half", "101%", "-1%", -1, 1.5, "3"]:
        with pytest.raises(ValueError, match="the bound"):
            subset(wrong, "end")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds no samples"):
        subset("50%", "50%")


@pytest.mark.parametrize("block", ["path: m.yaml", "join: [{path: a}, {path: m.yaml}]"])
def test_a_metadataset_that_leads_to_itself_is_told(tmp_path: Path, block: str) -> None:
    header = "__module__: megatron.energon\n__class__: MetadatasetV2\n"
    path = tmp_path / "m.yaml"
    joiner = "    joiner: {__module__: megatron.energon, __class__: TextSample}\n" * (
        "join" in block
    )
    path.write_text(f"{header}splits:\n  train:\n    {block}\n{joiner}")
    with pytest.raises(DatasetError, match=f"leads to itself: {path} -> {path}"):
        loader(path)


def test_what_is_wrong_is_told_with_its_line_once(tmp_path: Path) -> None:
    shards(tmp_path / "a", (3,))
    header = "__module__: megatron.energon\n__class__: MetadatasetV2\n"
    joiner = "joiner: {__module__: megatron.energon, __class__: TextSample}"
    path = tmp_path / "m.yaml"
    for block in (
        "join: [{path: a}, {path: nowhere}]\n    " + joiner,
        "join:\n    - path: a\n    - blend: [{path: a}, {path: a}]\n    " + joiner,
        "path: a\n    aux: {pictures: filesystem://nowhere}",
        "path: a\n    subset: {range: [0, 9]}",
    ):
        path.write_text(f"{header}splits:\n  train:\n    {block}\n")
        with pytest.raises(DatasetError) as caught:
            loader(path)
        assert re.match(rf"{path}, line \d+: ", str(caught.value))
        assert str(caught.value).count(f"{path}, line") == 1


def test_what_is_said_further_inside_wins(tmp_path: Path) -> None:
    shards(tmp_path / "a", (3,))
    inner = using(str(tmp_path / "a"), subflavors={"kind": "inner", "own": 1})
    recipe = using(inner, subflavors={"kind": "outer", "all": 2})
    dataset = get_train_dataset(
        recipe, batch_size=None, worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0)
    )
    sample = next(iter(get_loader(dataset)))
    assert sample["__subflavors__"] == {"kind": "inner", "own": 1, "all": 2}
    with pytest.raises(DatasetError, match="no split part 'val'"):
        loader(using(inner, split_part="val"))


# ------------------------------------------------------------------------------- what is wrong


def test_one_epoch_of_a_blend_is_refused_with_its_remedy(sources: dict[str, Source]) -> None:
    with pytest.raises(ValueError, match="blend_epochized"):
        loader(blend([(sources["a"], 1), (sources["b"], 2)]), repeat=False)


def test_parts_without_samples(sources: dict[str, Source], caplog: Any) -> None:
    nothing = sources["a"].cut(0, 0)
    with pytest.raises(DatasetError, match=f"no samples to draw: {nothing.path}"):
        loader(blend([(nothing, 1), (sources["b"], 2)]))
    recipe = blend_epochized([(nothing, 3), (sources["c"], 1)])
    assert sorted(words(loader(recipe, repeat=False))) == ["c0", "c1"]
    assert words(loader(blend_epochized([(nothing, 3)]), repeat=False)) == []
    assert "has no samples" in caplog.text
    rare = blend([(blend_epochized([(sources["c"], 0.25)]), 1), (sources["b"], 1)])
    assert datasets_of(words(loader(rare), 40)) == {"b": 40, "c": 40}


def test_wrong_amounts_and_empty_recipes() -> None:
    for weight in (-1, 0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the weight of"):
            blend([("a", weight)])
    with pytest.raises(ValueError, match="repetitions"):
        blend_epochized([("a", 0)])
    for make in (blend, blend_epochized, concat):
        with pytest.raises(ValueError, match="no datasets"):
            make([])
    with pytest.raises(ValueError, match="nonmatch has 'ignore'"):
        join(["a", "b"], dict, nonmatch="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nonmatch has 2"):
        join(["a", "b"], dict, nonmatch={2: "skip"})


@pytest.mark.parametrize("wrong", [{"a": 1}, [("a", "3")], [(3, "a")], [("a", 1, 2)], ["ab"], "ab"])
def test_pairs_that_are_none_are_shown_with_the_form(wrong: Any) -> None:
    for make, amount in ((blend, "weight"), (blend_epochized, "repetitions")):
        form = re.escape(f"{make.__name__}([(dataset, {amount}), ...])")
        with pytest.raises(TypeError, match=form):
            make(wrong)


@pytest.mark.parametrize("wrong", ["data/a", Path("data/a"), blend([("data/a", 1)]), 3])
def test_one_dataset_is_no_list_of_them(wrong: Any, sources: dict[str, Source]) -> None:
    for one in (wrong, next(iter(sources.values()))):
        with pytest.raises(TypeError, match=r"concat was given .*: concat\(\[dataset, ...\]\)"):
            concat(one)
        with pytest.raises(TypeError, match=r"join was given .*: join\(\[dataset, ...\], joiner\)"):
            join(one, first_of)
    assert concat(Path(name) for name in "ab") == concat([Path("a"), Path("b")])
    assert join({"x": "a", "y": "b"}, first_of).parts == ("a", "b")


def test_sibling_blends_draw_independently() -> None:
    pair = [Plan((9,), shuffle=True, repeat=True, first=9 * n) for n in range(4)]
    half = (Fraction(1), Fraction(1))
    inner = [Blend((pair[2 * n], pair[2 * n + 1]), half, 1, 0, random=True) for n in range(2)]
    both = Blend(tuple(inner), half, 1, 0)
    drawn: list[list[int]] = [[], []]
    for (_, index), _ in itertools.islice(keys(both, 0), 600):
        drawn[index // 18].append(index % 18 // 9)
    agreeing = sum(a == b for a, b in zip(*drawn, strict=True))
    assert 100 < agreeing < 200


def test_weights_may_have_any_denominators(sources: dict[str, Source]) -> None:
    many = blend([(sources["a"], Fraction(1, n)) for n in range(1, 900)])
    assert len(words(loader(many), 40)) == 80


def test_an_epoch_deep_inside_of_blends_begins() -> None:
    order: Any = Plan((9,), shuffle=True, repeat=True)
    for _ in range(4):
        order = Blend((order,), (Fraction(1),), 1, 0)
    first, second = (
        [key for key, _ in itertools.islice(keys(order, 0, beginning(order, epoch)), 20)]
        for epoch in (0, 1)
    )
    assert not {*first} & {*second}


def test_a_state_of_another_blend_is_refused(sources: dict[str, Source]) -> None:
    saved = loader(blend([(sources["a"], 1), (sources["b"], 2)])).state_dict()
    with pytest.raises(Exception, match="blend"):
        loader(blend([(sources["a"], 1), (sources["b"], 3)])).load_state_dict(saved)
    changed = loader(blend([(sources["a"], 1), (sources["b"], 3)]))
    changed.load_state_dict(saved, accept=["blend"])
    before = words(loader(blend([(sources["a"], 1), (sources["b"], 3)])), 20)
    assert words(changed, 20) != before  # it goes on with samples in another order


# ----------------------------------------------------------------- any pipeline over any recipe

pipelines = st.builds(
    Stages,
    skip=st.sampled_from([0, 2, 3]),
    many=st.booleans(),
    draw=st.booleans(),
    pack=st.none() | st.integers(1, 7),
    group=st.booleans(),
)
amounts = st.sampled_from([1, 2, 0.5, Fraction(1, 3), 1.25])


def first_of(one: Any, other: Any) -> Any:
    """The primary sample, which says whether the other one was there."""
    return {**one, "txt": one["txt"] + ("" if other else "?")}


def recipes(sources: dict[str, Source]) -> st.SearchStrategy[Any]:
    whole = st.sampled_from(list(sources.values()))
    cut = st.builds(lambda one, n: subset(f"{n}%", "100%")(one), whole, st.integers(0, 50))
    parted = st.builds(lambda one: subset("50%", "100%")(one), whole)
    joined = st.sampled_from(
        [
            join([sources["a"], sources["b"]], first_of, nonmatch={1: "skip"}),
            join(
                {"one": sources["a"], "other": sources["c"]}, first_of, nonmatch={"other": "none"}
            ),
            subset(1, 5)(join([sources["b"], sources["a"]], first_of)),
        ]
    )

    def deeper(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        pairs = st.lists(st.tuples(inner, amounts), min_size=1, max_size=3)
        return (
            st.builds(blend, pairs, random=st.booleans())
            | st.builds(blend_epochized, pairs)
            | st.builds(concat, st.lists(inner, min_size=1, max_size=2))
        )

    return st.recursive(whole | cut | parted | joined, deeper, max_leaves=5)


@settings(max_examples=30)
@given(data=st.data(), stages=pipelines)
def test_every_step_of_any_pipeline_over_any_recipe_can_be_gone_on_from(
    sources: dict[str, Source], data: st.DataObject, stages: Stages
) -> None:
    recipe = data.draw(recipes(sources))
    straight, whole, states = loader(recipe, stages), [], []
    for batch in itertools.islice(straight, 24):
        whole.append(batch)
        states.append(json.loads(json.dumps(straight.state_dict())))
    for done, state in enumerate(states[:-3], 1):
        again = loader(recipe, stages)
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert list(itertools.islice(again, 3)) == whole[done : done + 3]


@settings(max_examples=30)
@given(data=st.data(), stages=pipelines)
def test_any_pipeline_over_any_recipe_is_the_same_on_every_pair_of_layouts(
    sources: dict[str, Source], data: st.DataObject, stages: Stages
) -> None:
    recipe, lanes = data.draw(recipes(sources)), data.draw(st.sampled_from([2, 4, 6]))
    sizes = [size for size in range(1, lanes + 1) if lanes % size == 0]
    whole = list(itertools.islice(loader(recipe, stages, (0, 1, 0, lanes)), 4 * lanes))
    state, done = None, 0
    for _ in range(2):
        size = data.draw(st.sampled_from(sizes))
        threads = data.draw(st.sampled_from([0, 1, 3]))
        ranks = [
            loader(recipe, stages, (rank, size, 0, lanes), threads=threads) for rank in range(size)
        ]
        for one in ranks:
            if state is not None:
                one.load_state_dict(state)
        steps = data.draw(st.integers(1, 2 * lanes // size))
        found = [list(itertools.islice(one, steps)) for one in ranks]
        expected = whole[done : done + steps * size]
        if done % size == 0:  # else the ranks' turns do not begin with the first
            assert [batch for step in zip(*found, strict=True) for batch in step] == expected
        assert sorted(map(str, itertools.chain(*found))) == sorted(map(str, expected))
        done += steps * size
        state = json.loads(json.dumps(checkpoint.merge([one.state_dict() for one in ranks])))


@settings(max_examples=4)
@given(data=st.data(), stages=pipelines)
def test_worker_processes_change_nothing(
    sources: dict[str, Source], data: st.DataObject, stages: Stages
) -> None:
    recipe = data.draw(recipes(sources))
    whole = list(itertools.islice(loader(recipe, stages), 16))
    with loader(recipe, stages, (0, 1, 2, 4), threads=2) as first:
        found = list(itertools.islice(first, 7))
        state = first.state_dict()
    with loader(recipe, stages, (0, 1, 1, 4)) as second:
        second.load_state_dict(state)
        assert found + list(itertools.islice(second, 9)) == whole


def test_blended_samples_and_batches_are_restored(sources: dict[str, Source]) -> None:
    recipe = blend([(sources["a"], 1), (sources["b"], 2)], random=True)
    dataset = get_train_dataset(recipe, batch_size=None, worker_config=WorkerConfig(
        rank=0, world_size=1, num_workers=0, lanes=3))  # fmt: skip
    for sample in itertools.islice(get_loader(dataset), 30):
        again = dataset.restore_sample(sample["__restore_key__"])
        assert again == sample


def test_what_was_drawn_is_told_and_survives_a_resume(sources: dict[str, Source]) -> None:
    paths = {source.path: name for name, source in sources.items()}
    recipe = blend([(sources["a"], 1), (blend_epochized([(sources["b"], 1.5)]), 2)])
    straight, found = loader(recipe), Counter[str]()
    for batch in itertools.islice(straight, 25):
        found.update(datasets_of(batch))
        drawn = {paths[path]: count for path, count in straight.drawn().items()}
        assert drawn == {"a": found["a"], "b": found["b"]}
    again = loader(recipe)
    again.load_state_dict(straight.state_dict())
    assert again.drawn() == straight.drawn()
    packed = loader(recipe, Stages(pack=6))
    next(iter(packed))
    assert sum(packed.drawn().values()) == 6  # a buffer of one lane
    seeking = loader(recipe)
    seeking.seek(25, exact=False)
    assert seeking.drawn() == straight.drawn()


def test_what_was_drawn_of_an_epoch_that_ended(sources: dict[str, Source]) -> None:
    one = loader(concat([sources["a"], sources["b"]]), repeat=False)
    for taken, _ in enumerate(one, 1):
        if taken == 8:
            break
    assert sum(one.drawn().values()) == 16
    name = f"{sources['a'].path} + {sources['b'].path}"
    assert sum(1 for _ in one) + 8 == 9  # one lane has five samples, the others four
    assert one.drawn() == {name: 17}


def test_what_validation_draws_counts_from_the_beginning_of_its_epoch(
    sources: dict[str, Source],
) -> None:
    dataset = get_val_dataset(
        concat([sources["a"], sources["b"]]),
        batch_size=2,
        task_encoder=encoder(Stages()),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0, lanes=4),
    )
    one, name = get_loader(dataset), f"{sources['a'].path} + {sources['b'].path}"
    for _epoch in range(3):
        count = 0
        for batch in one:
            count += len(batch)
            assert one.drawn() == {name: count}
        assert count == 17


def test_what_was_drawn_of_one_folder_in_several_parts(sources: dict[str, Source]) -> None:
    parts = [subset(*part)(sources["a"]) for part in ((0, 2), (2, 5), (5, "end"))]
    one = loader(blend([(part, n) for n, part in enumerate(parts, 1)]))
    words(one, 30)
    path = sources["a"].path
    assert one.drawn() == {path: 10, f"{path} (2)": 20, f"{path} (3)": 30}


class Fitting(DefaultTaskEncoder[Any, Any, Any, Any]):
    select_samples_to_pack = knapsack(cost=len, capacity=10)

    def encode_sample(self, sample: Any) -> Any:
        return sample["txt"]

    def pack_selected_samples(self, samples: list[str]) -> Any:
        return "".join(samples)

    def batch(self, samples: list[Any]) -> list[Any]:
        return samples


@pytest.mark.parametrize("workers", [0, 2])
def test_the_report_tells_how_full_packs_are(sources: dict[str, Source], workers: int) -> None:
    recipe = blend_epochized([(sources["a"], 1), (sources["b"], 2)])
    dataset = get_train_dataset(
        recipe,
        batch_size=2,
        packing_buffer_size=9,
        repeat=False,
        task_encoder=Fitting(),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers, lanes=2),
    )
    with get_loader(dataset) as one:
        packs = words(one)
        report = one.report()
    assert report["packs"] == len(packs)
    assert report["fill"] == pytest.approx(sum(map(len, packs)) / 10 / len(packs))
    assert report[f"drawn/{sources['b'].path}"] == 12


def test_seeking_goes_by_the_blend(sources: dict[str, Source]) -> None:
    recipe = blend([(sources["a"], 1), (blend_epochized([(sources["b"], 0.5)]), 2)])
    whole = list(itertools.islice(loader(recipe), 30))
    for n in (0, 1, 7, 22):
        for exact in (True, False):
            one = loader(recipe)
            one.seek(n, exact=exact)
            assert list(itertools.islice(one, 5)) == whole[n : n + 5]
