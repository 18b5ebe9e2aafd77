"""What is said of a pipeline is what runs, and it fits where it is shown."""

from __future__ import annotations

import itertools
import pickle
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import shards, write_tar
from encoders import Encoder, Everything, Halves, Numbers, cook_text, cook_words, here, shout

from energon_fn import (
    AugmentTaskEncoder,
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    best_fit,
    blend,
    blend_epochized,
    concat,
    describe,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    join,
    knapsack,
    open_source,
    stateless,
    using,
)
from energon_fn.look.drawing import LEFT, MOST, PAGE, Part, Row, ending, lines_of

STRANGE = "<b>&\x1b[31m \u202e日本語'\""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Datasets by name, in folders with long names."""
    root = tmp_path_factory.mktemp("storage") / "a-team-with-a-long-name" / "2026-11"
    for name, counts in {"a": [4, 3], "b": [10], "c": [2, 2, 1], "d": [6]}.items():
        shards(root / f"{name}-filtered-and-deduplicated" / name, counts)
    (root / "lines.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    found = {name: str(root / f"{name}-filtered-and-deduplicated" / name) for name in "abcd"}
    return found | {"lines": str(root / "lines.jsonl")}


def train(path: Any, **options: Any) -> Any:
    return get_train_dataset(path, **{"batch_size": 2, "worker_config": here(), **options})


def rows_of(thing: Any) -> list[Row]:
    return [row for _, rows in describe(thing).stages for row in rows]


def said(thing: Any) -> dict[str, Row]:
    """All rows by their labels."""
    about = describe(thing)
    return {row.label: row for row in (*about.order, *rows_of(thing), *about.running)}


# ----------------------------------------------------------------------------------------- stages

FORMS = ((), ("encode_sample",), ("preencode_sample",), ("postencode_sample",),
         ("preencode_sample", "postencode_sample"))  # fmt: skip


def noting(log: list[str], *names: str, cooks: bool) -> Any:
    """An encoder with these methods, which write down that they were called."""

    def method(name: str) -> Any:
        results = {
            "select_samples_to_pack": lambda samples: [samples],
            "pack_selected_samples": lambda samples: samples[0],
            "batch_group_criterion": lambda sample: (0, 2),
        }

        def noted(self: Any, given: Any) -> Any:
            log.append(name)
            return results.get(name, lambda same: same)(given)

        return noted

    def cook(sample: Any) -> Any:
        log.append("cook")
        return cook_text(sample)

    def decoder(self: Any, raw: Any) -> Any:
        log.append("decode")
        return shout(raw)

    members = {"decoder": decoder, **{name: method(name) for name in names}}
    return type("Noting", (Encoder,), members | {"cookers": [Cooker(cook)] * cooks})()


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_stages_are_those_that_run(places: Any, form: Any, packs: bool) -> None:
    """All functions that are called, in the order in which a sample comes to them."""
    packing = ("select_samples_to_pack", "pack_selected_samples") if packs else ()
    for groups, cooks, batches, encodes, size in itertools.product(*[[False, True]] * 4, [None, 2]):
        log: list[str] = []
        names = (*form, *packing, *["batch_group_criterion"] * groups, *["batch"] * batches,
                 *["encode_batch"] * encodes)  # fmt: skip
        options: dict[str, Any] = {"packing_buffer_size": 2} if packs else {}
        encoder = noting(log, *names, cooks=cooks)
        dataset = train(places["b"], batch_size=size, task_encoder=encoder, repeat=False, **options)
        rows = rows_of(dataset)
        assert list(get_loader(dataset))
        own = [row.label for row in rows if row.label != "load" and "default" not in row.notes]
        assert own == list(dict.fromkeys(log))
        makes_batches = "batch" in [row.label for row in rows]
        assert makes_batches == (size is not None or groups)


def test_what_comes_of_the_stages(places: Any) -> None:
    def made(**options: Any) -> list[str]:
        return [name for name, _ in describe(train(places["a"], **options)).stages]

    assert made() == ["samples", "batches"]
    assert made(batch_size=None) == ["samples"]
    packing = {"packing_buffer_size": 4, "task_encoder": Halves()}
    assert made(**packing) == ["samples", "packs", "batches"]
    assert made(**packing, batch_size=None) == ["samples", "packs"]


def test_functions_are_named_with_what_is_known_of_them(places: Any) -> None:
    class Words(Encoder):
        cookers = (
            Cooker(cook_words, has_subflavors={"kind": "news", "year": 7}),
            Cooker(cook_text),
        )
        select_samples_to_pack = knapsack(cost=len, capacity=4096)

        @stateless
        def preencode_sample(self, sample: Any) -> Any:
            return sample

        @stateless(restore_seeds=True)
        def postencode_sample(self, sample: Any) -> Any:
            yield sample

        def pack_selected_samples(self, samples: Any) -> Any:
            return samples[0]

        def batch_group_criterion(self, sample: Any) -> Any:
            return 0, None

    options = {"packing_buffer_size": 64, "batch_drop_last": True, "repeat": False}
    assert rows_of(train(places["a"], task_encoder=Words(), min_size=224, **options)) == [
        Row("load", "", ("each when it is due",)),
        Row("decode", "SampleDecoder", ("torchrgb", "min_size 224")),
        Row("cook", "cook_words", ("of kind: news, year: 7", "seeded", "generator")),
        Row("cook", "cook_text", ("seeded",)),
        Row("preencode_sample", "Words.preencode_sample", ("stateless",)),
        Row(
            "select_samples_to_pack", "knapsack", ("seeded", "from buffers of 64", "capacity 4096")
        ),
        Row("postencode_sample", "Words.postencode_sample", ("seeded", "generator")),
        Row("pack_selected_samples", "Words.pack_selected_samples", ("seeded",)),
        Row("batch_group_criterion", "Words.batch_group_criterion", ("seeded",)),
        Row("batch", "collate", ("default", "2 samples unless the criterion says",
                                 "short ones dropped")),
    ]  # fmt: skip


def test_functions_of_other_kinds(places: Any) -> None:
    class Around(AugmentTaskEncoder[Any, Any, Any, Any]):
        def encode_batch(self, batch_data: Any) -> Any:
            return batch_data

        def cook_crude_sample(self, sample: Any, cooker: Any, aux: Any) -> Any:
            return cooker.cook(sample)

    class Inside(Numbers):
        cookers = (Cooker(cook_text),)
        select_samples_to_pack = best_fit(cost=len, capacity=7)

        def pack_selected_samples(self, samples: Any) -> Any:
            return samples[0]

    rows = said(
        train(places["a"], task_encoder=Around(Inside()), decoder=shout, packing_buffer_size=4)
    )
    assert [rows[name].name for name in ("decode", "encode_sample", "batch", "encode_batch")] == [
        "shout", "Numbers.encode_sample", "Numbers.batch", "Around.encode_batch",
    ]  # fmt: skip
    assert rows["select_samples_to_pack"].name == "best_fit"
    assert rows["cook"] == Row("cook", "Around.cook_crude_sample", ("with cook_text", "seeded"))
    typed = DefaultTaskEncoder(encoded_sample_type=dict)  # type: ignore[var-annotated]
    assert said(train(places["a"], task_encoder=typed))["encode_sample"].name == (
        "DefaultTaskEncoder.encode_sample"
    )
    assert said(train(places["a"], auto_decode=False))["decode"].notes == ("no: parts stay bytes",)


# ------------------------------------------------------------------------------------ the sources


def leaf_shares(part: Part) -> Iterator[float]:
    if part.parts and not part.joined:
        for one in part.parts:
            yield from leaf_shares(one)
    else:
        assert part.share is not None
        yield part.share


def test_shares_are_what_is_drawn(places: Any) -> None:
    """Of each leaf of the order; of a concatenation all together."""
    a, b, c, d = (places[name] for name in "abcd")
    for recipe in (
        blend([(a, 3), (b, 1)]),
        blend_epochized([(a, 2), (b, 0.3), (c, 1)]),
        blend([(a, 0.5), (blend_epochized([(b, 2), (blend([(c, 5), (d, 1)]), 1.5)]), 2)]),
        blend([(blend([(a, 1), (b, 2)], random=False), 3), (c, 0.1), (d, 2)]),
    ):
        dataset = train(recipe, batch_size=1, task_encoder=Numbers())
        loader = get_loader(dataset)
        number = 600
        list(itertools.islice(loader, number))
        shares = [*leaf_shares(describe(dataset).sources)]
        assert sum(shares) == pytest.approx(1)
        for share, drawn in zip(shares, loader.drawn().values(), strict=True):
            assert drawn == pytest.approx(share * number, abs=6)


def test_a_concatenation_has_the_shares_of_its_sizes(places: Any) -> None:
    a, b, c = (places[name] for name in "abc")
    parts = describe(train(blend([(a, 1), (concat([b, c]), 3)]))).sources.parts
    assert [(part.name, part.amount, part.share) for part in parts] == [
        (a, "weight 1", 0.25), ("concat", "weight 3", 0.75),
    ]  # fmt: skip
    assert [(part.name, part.share) for part in parts[1].parts] == [(b, 0.5), (c, 0.25)]
    validation = get_val_dataset(
        blend([(a, 1), (b, 3)]), batch_size=2, split_part="train", worker_config=here()
    )
    sources = describe(validation).sources
    assert (sources.name, [part.share for part in sources.parts]) == ("concat", [7 / 17, 10 / 17])


def ramp(n: int) -> float:
    return 1 + n / 100


class Pair(Sample):
    @staticmethod
    def from_joined(left: Any, right: Any) -> Any:
        return left


def test_all_kinds_of_sources(places: Any, pets: Path) -> None:
    a, b = places["a"], places["b"]
    both = join({"left": a, "right": b}, Pair, nonmatch={"right": "skip"})
    tagged = using(places["lines"], subflavors={"kind": "text"})
    recipe = blend([(both, ramp), (tagged, 2), (str(pets), 1)], random=True)
    sources = describe(train(recipe)).sources
    assert sources == Part(
        "blend",
        ("drawn at random",),
        share=1.0,
        parts=(
            Part("join for Pair", ("7 samples",), "ramp", joined=True, parts=(
                Part(a, ("crude", "7 samples", "2 shards of train"), "left"),
                Part(b, ("nonmatch: skip", "crude", "10 samples", "1 shard of train"), "right"),
            )),
            Part(places["lines"], ("crude", "2 samples", "1 file", "kind: text"), "weight 2"),
            sources.parts[2],
        ),
    )  # fmt: skip
    assert sources.parts[2].notes[0] == "CaptioningSample"


def test_sources_without_samples_are_told(places: Any) -> None:
    """They are no part of the order, but somebody may look for them."""
    empty = open_source(places["b"]).cut(0, 0)
    for recipe in (concat([empty, places["a"]]), blend_epochized([(empty, 1), (places["a"], 2)])):
        sources = describe(train(recipe)).sources
        found = {part.name: (part.notes[1], part.share) for part in sources.parts}
        assert found == {places["b"]: ("0 samples", 0.0), places["a"]: ("7 samples", 1.0)}
    alone = describe(train(empty, repeat=False))
    assert alone.sources.notes == ("crude", "0 samples", "0 shards of train")
    assert "0 batches an iteration" in alone.text()


# ------------------------------------------------------------------------ order, lanes and length


def test_the_order(places: Any) -> None:
    def order(**options: Any) -> list[str]:
        dataset = train(places["a"], worker_config=here(seed_offset=7), **options)
        return [", ".join(row.notes) for row in describe(dataset).order]

    assert order() == ["whole shards", "for ever", "7"]
    assert order(
        max_samples_per_sequence=20,
        shuffle_buffer_size=100,
        shuffle_over_epochs_multiplier=3,
        repeat=False,
    ) == ["pieces of 20 of 3 rounds together, then a buffer of 100", "no: every sample once", "7"]
    assert order(shuffle_over_epochs_multiplier=None)[0] == "whole shards in their order"
    rounds = train(blend_epochized([(places["a"], 2), (places["b"], 0.5)]), repeat=False)
    assert said(rounds)["repeat"].notes == ("no: an epoch of 19 samples",)


def test_lanes_and_length(places: Any) -> None:
    def running(**options: Any) -> list[str]:
        config = WorkerConfig(rank=1, world_size=2, num_workers=2, lanes=12)
        dataset = train(places["b"], **{"worker_config": config, **options})
        return [f"{row.label}: {', '.join(row.notes)}" for row in describe(dataset).running]

    lanes = [
        "lanes: 12, of which this rank has 6: 1, 3, 5, 7, ...", "rank: 1 of 2",
        "workers: 2 processes",
    ]  # fmt: skip
    assert running() == [*lanes, "length: no end: batches for ever"]
    assert running(virtual_epoch_length=12)[-1] == (
        "length: 12 batches an iteration on each rank, the next goes on"
    )
    assert running(repeat=False, worker_config=here()) == [
        "lanes: 1", "workers: none: all is here",
        "length: 5 batches an iteration, if no function skips samples",
    ]  # fmt: skip
    packs = {"packing_buffer_size": 4, "task_encoder": Halves(), "repeat": False}
    assert running(**packs)[-1] == "length: not known before: functions may give none or many"
    loader = get_loader(train(places["b"], batch_size=None), threads=3)
    assert "3 threads" in said(loader)["workers"].notes
    assert said(loader)["load"].notes == ("ahead, in 3 threads",)
    assert said(loader)["length"].notes == ("no end: samples for ever",)


# -------------------------------------------------------------------------------- how it is shown


def odd(places: Any) -> Any:
    """All at once, with a nested blend of long paths and strange subflavors."""

    def scheduled_by_a_function_with_a_long_name(n: int) -> float:
        return 1.0

    class AnEncoderWithQuiteALongNameSoThatItHardlyFits(Everything):
        cookers = (Cooker(cook_text, has_subflavors={"kind": STRANGE}), Cooker(cook_text))

        def batch_group_criterion(self, sample: Any) -> Any:
            return 0, None

    inner = blend([(places["a"], scheduled_by_a_function_with_a_long_name), (places["b"], 1)])
    recipe = blend_epochized(
        [
            (using(inner, subflavors={STRANGE: STRANGE}), 2.5),
            (join([places["a"], places["b"]], Pair, nonmatch="skip"), 1),
            (blend([(concat([places["c"], places["d"]]), 2), (places["d"], 1)]), 0.01),
        ]
    )
    return train(
        recipe,
        task_encoder=AnEncoderWithQuiteALongNameSoThatItHardlyFits(),
        packing_buffer_size=10,
        decoder=lambda raw: raw,
        worker_config=WorkerConfig(rank=3, world_size=8, num_workers=3),
    )


def test_the_text_fits_any_width(places: Any) -> None:
    about = describe(odd(places))
    for width in range(40, 120):
        lines = about.text(width).splitlines()
        assert max(map(len, lines)) <= width
        assert all(line.strip() for line in lines)
        text = " ".join(" ".join(lines).split())
        assert "\x1b" not in text
        assert "\u202e" not in text
        for word in ("blend_epochized", "concat", "join for Pair", "2.5 x", "cook_text", "24, of"):
            assert word in text
        for name in "abcd":
            assert re.search(rf"deduplicated/{name}\b" if width > 60 else rf"/{name}\b", text)
    assert str(about) == repr(about) == about.text(80)


def test_the_text_takes_the_width_of_the_terminal(
    places: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = describe(odd(places))
    for columns, width in ((200, 80), (50, 50)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert str(about) == about.text(width)


def test_a_path_is_cut_at_its_beginning() -> None:
    chance = random.Random(0)
    for _ in range(300):
        path = "/" + "".join(chance.choice("ab日/ .é") for _ in range(chance.randrange(40)))
        path = " ".join(path.split())
        for width in (5, 12, 30):
            short = ending(path, width)
            assert path.endswith(short.removeprefix("…"))
            assert len(short) <= width
            assert (short == path) == (not short.startswith("…"))


def elements(drawing: str) -> list[ElementTree.Element]:
    return [*ElementTree.fromstring(drawing).iter()]


def test_the_drawing_is_plain_and_says_what_the_text_says(places: Any) -> None:
    about = describe(odd(places))
    drawing = about._repr_html_()
    tags = {
        element.tag.removeprefix("{http://www.w3.org/2000/svg}") for element in elements(drawing)
    }
    assert tags == {"svg", "g", "rect", "path", "text", "tspan"}  # no style, script or link
    shown = ["".join(element.itertext()) for element in elements(drawing) if "text" in element.tag]
    for row in (*about.order, *rows_of(odd(places)), *about.running):
        assert any(row.label in words for words in shown)
    shares = [f"{100 * share:.1f} %" for share in leaf_shares(about.sources.parts[2])]
    assert len(shares) == 3
    assert set(shares) < {*shown}
    assert "\x1b" not in drawing
    assert "decode<lambda>" in shown
    assert any("<b>&" in words for words in shown)


def test_samples_flow_from_each_leaf(places: Any) -> None:
    """From a join, not from its parts; as thick as the shares."""
    drawing = describe(odd(places))._repr_html_()
    flows = [one.attrib["d"] for one in elements(drawing) if one.get("fill-opacity") == "0.4"]
    assert len(flows) == 6

    def thick(*parts: Any) -> list[float]:
        flows = [
            [float(number) for number in re.findall(r"[\d.]+", path.get("d", ""))]
            for path in elements(describe(train(blend(parts)))._repr_html_())
            if path.get("fill-opacity") == "0.4"
        ]
        return [numbers[8] - numbers[7] for numbers in flows]

    a, b, c, d = (places[name] for name in "abcd")
    first, second = thick((a, 3), (b, 1))
    assert first == pytest.approx(3 * second, abs=0.3)
    assert thick((a, 1), (blend([(b, ramp), (c, 2), (d, 5)]), 1)) == pytest.approx(
        [(first + second) / 2, *[(first + second) / 6] * 3], abs=0.3
    )


def test_the_drawing_fits_light_and_dark_pages(places: Any) -> None:
    """What is text, or a frame, has the colour of the page's text; no box is opaque but stripes."""
    for element in elements(describe(odd(places))._repr_html_()):
        fill = element.get("fill")
        if "text" in element.tag:
            assert fill is None
        elif "rect" in element.tag and float(element.attrib["width"]) > 20:
            assert float(element.attrib["fill-opacity"]) < 0.2
        if fill not in (None, "currentColor"):
            red, green, blue = (int(fill[n : n + 2], 16) for n in (1, 3, 5))
            assert 70 < 0.3 * red + 0.6 * green + 0.1 * blue < 190


def test_nothing_is_drawn_outside(places: Any) -> None:
    drawing = describe(odd(places))._repr_html_()
    root = ElementTree.fromstring(drawing)
    *_, width, height = map(float, root.attrib["viewBox"].split())
    assert width <= 800

    def look(element: ElementTree.Element, left: float, top: float) -> None:
        moved = re.findall(r"-?[\d.]+", element.get("transform", ""))
        left, top = left + float(moved[0] if moved else 0), top + float(moved[1] if moved else 0)
        x, y = left + float(element.get("x", 0)), top + float(element.get("y", 0))
        if "rect" in element.tag:
            assert x + float(element.attrib["width"]) <= PAGE
            assert y + float(element.attrib["height"]) <= height
        elif element.tag.endswith("text"):
            mono = "monospace" in element.get("font-family", "")
            long = len("".join(element.itertext())) * float(element.attrib["font-size"])
            long *= 0.605 if mono else 0.5
            end = element.get("text-anchor") == "end"
            first, last = (x - long, x) if end else (x, x + long)
            # Words stay in their column: the sources, or the stages.
            assert first >= 0 if last <= LEFT else first >= LEFT or y < 20
            assert last <= PAGE
            assert y <= height
        for inside in element:
            look(inside, left, top)

    look(root, 0, 0)


def test_of_many_parts_only_some_are_drawn(places: Any) -> None:
    for count in (MOST, MOST + 1, 40):
        about = describe(train(blend([(places["a"], n + 1) for n in range(count)])))
        drawing = about._repr_html_()
        assert drawing.count(">weight ") == (count if count <= MOST else MOST - 1)
        assert (f"and {count - MOST + 1} more" in drawing) == (count > MOST)
        assert about.text().count("weight") == count
    ranks = train(places["a"], worker_config=WorkerConfig(rank=0, world_size=512, num_workers=2))
    assert describe(ranks)._repr_html_().count("<rect") < 20


def test_datasets_and_loaders_have_a_short_repr(places: Any) -> None:
    one = train(places["a"])
    assert repr(one) == f"Dataset(7 samples of {places['a']}, batches of 2)"
    several = train(blend([(places["a"], 1), (places["b"], 1)]), batch_size=None)
    assert repr(several) == "Dataset(17 samples of 2 datasets)"
    assert repr(get_loader(one)) == f"Loader({one!r}, 0 workers, 1 lane)"


def test_it_is_plain_data_and_nothing_is_read(places: Any, tmp_path: Path) -> None:
    write_tar(tmp_path / "left" / "0.tar", [("a", {"txt": b"x"}), ("b", {"txt": b"y"})])
    shutil.copytree(tmp_path / "left", tmp_path / "right")
    sources = str(tmp_path / "left"), str(tmp_path / "right")
    dataset = train(blend([(join(sources, Pair), 1), (sources[0], 2)]), task_encoder=Numbers())
    again = pickle.loads(pickle.dumps(dataset))
    for source in sources:
        shutil.rmtree(source)
    about = describe(dataset)
    assert (
        describe(again)
        == describe(get_loader(dataset))
        == about
        == pickle.loads(pickle.dumps(about))
    )
    assert hash(about) == hash(describe(again))
    assert len([*lines_of(about.sources)]) == 5


def test_anything_else_is_refused(places: Any) -> None:
    with pytest.raises(TypeError, match=r"takes a dataset or a loader, not '/data'"):
        describe("/data")  # type: ignore[arg-type]
