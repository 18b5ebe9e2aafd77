"""The stages: each is the loop that one would write by hand, and pulls no more than that loop."""

from __future__ import annotations

import inspect
import io
import pickle
import random
import tarfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toolz import compose, pipe

from energon_fn.errors import DatasetError, IgnoreSample, SkipSample
from energon_fn.samples import CrudeSample
from energon_fn.stages import (
    Cooker,
    PackedSamplesOutput,
    Stage,
    batch,
    cook,
    decode,
    encode_batch,
    encode_sample,
    epochize,
    group,
    limit,
    pack,
    postencode_sample,
    preencode_sample,
    shuffle,
    stage,
)

# A user's function does one of five things, here by its argument; what comes of it is listed twice:
# as a function, and by hand.


def kind_of(item: Any) -> int:
    return sum(flat(item)) % 5


def flat(item: Any) -> list[int]:
    if isinstance(item, str):
        return []
    return [item] if isinstance(item, int) else [n for part in item for n in flat(part)]


def user(item: Any) -> Any:
    kind = kind_of(item)
    if kind == 0:
        raise SkipSample
    return ("one", item) if kind == 1 else several(kind, item)


def several(kind: int, item: Any) -> Iterator[Any]:
    if kind == 2:
        yield "first", item
        yield "second", item
    if kind == 3:
        yield "before the skip", item
        raise IgnoreSample


def by_hand(item: Any) -> list[Any]:
    return {
        0: [],
        1: [("one", item)],
        2: [("first", item), ("second", item)],
        3: [("before the skip", item)],
        4: [],
    }[kind_of(item)]


class Counted:
    """Items that count how many of them were pulled."""

    def __init__(self, items: Iterable[Any]):
        self.items, self.pulled = items, 0

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            self.pulled += 1
            yield item


def traced(stage: Callable[[Any], Iterable[Any]], items: Iterable[Any]) -> list[Any]:
    """Each output, and how many items had been pulled by then."""
    source = Counted(items)
    return [(output, source.pulled) for output in stage(source)]


items = st.lists(st.integers(0, 99), max_size=40)
sizes = st.integers(1, 9)


# --- each stage is its loop -------------------------------------------------------------------


@given(items)
@pytest.mark.parametrize("make", [encode_sample, preencode_sample, postencode_sample, encode_batch])
def test_encode_is_its_loop(make: Callable[..., Any], items: list[int]) -> None:
    expected = []
    for pulled, item in enumerate(items, 1):
        for output in by_hand(item):
            expected.append((output, pulled))
    assert traced(make(user), items) == expected


@given(items, sizes, st.booleans())
def test_batch_is_its_loop(items: list[int], size: int, drop_last: bool) -> None:
    expected, waiting = [], []
    for pulled, item in enumerate(items, 1):
        waiting.append(item)
        if len(waiting) == size or (pulled == len(items) and not drop_last):
            expected += [(output, pulled) for output in by_hand(waiting)]
            waiting = []
    assert traced(batch(size, user, drop_last=drop_last), items) == expected


def thirds(buffer: list[int]) -> list[list[int]]:
    """Groups of different sizes, an empty one too; every fourth item is in none."""
    if kind_of(buffer) == 4:
        raise SkipSample
    return [buffer[1::4], [], buffer[::4], buffer[2::4]]


def thirds_one_by_one(buffer: list[int]) -> Iterator[list[int]]:
    if kind_of(buffer) == 4:
        raise SkipSample
    for at in (1, 0, 2):
        yield buffer[at::4]


@given(items, sizes, st.booleans(), st.sampled_from([thirds, thirds_one_by_one]))
def test_pack_is_its_loop(
    items: list[int], size: int, halved: bool, select: Callable[[list[int]], Any]
) -> None:
    expected: list[Any] = []
    for first in range(0, len(items), size):
        buffer = items[first : first + size]
        if kind_of(buffer) == 4:
            continue
        for chosen in (buffer[1::4], buffer[::4], buffer[2::4]):
            if halved:
                chosen = [output for item in chosen for output in by_hand(item)]
            if chosen:
                expected += [(output, first + len(buffer)) for output in by_hand(chosen)]
    stage = pack(select, user, buffer_size=size, postencode=user if halved else None)
    assert traced(stage, items) == expected


def test_a_group_with_nothing_in_it_is_not_joined() -> None:
    def none_left(item: int) -> int:
        if item < 3:
            raise SkipSample
        return item

    split = pack(lambda buffer: [buffer[:2], [], buffer[2:]], len, buffer_size=4)
    assert list(split([1, 2, 3])) == [2, 1]
    halved = pack(lambda buffer: [buffer[:2], buffer[2:]], len, buffer_size=4, postencode=none_left)
    assert list(halved([1, 2, 3])) == [1]


def test_select_that_skips_after_some_groups_keeps_those() -> None:
    def select(buffer: list[int]) -> Iterator[list[int]]:
        yield buffer[:1]
        raise SkipSample

    assert list(pack(select, list, buffer_size=2)([1, 2, 3])) == [[1], [3]]


def odd_back(buffer: list[int]) -> Any:
    """The even ones in one group; the odd ones wait, but if there are only such, one goes."""
    even, odd = [n for n in buffer if n % 2 == 0], [n for n in buffer if n % 2]
    return PackedSamplesOutput([even or odd[:1]], odd if even else odd[1:])


@given(items, sizes)
def test_items_given_back_come_first_in_the_next_buffer(items: list[int], size: int) -> None:
    expected: list[Any] = []
    waiting: list[int] = []
    rest, pulled = list(items), 0
    while waiting or rest:
        new = size - len(waiting)
        buffer, rest = waiting + rest[:new], rest[new:]
        pulled = min(pulled + new, len(items))
        (chosen,), waiting = odd_back(buffer), odd_back(buffer).pushback
        expected += [(output, pulled) for output in by_hand(chosen)]
    assert traced(pack(odd_back, user, buffer_size=size), items) == expected


def test_what_is_given_back_is_seen_and_can_be_carried_on() -> None:
    def fours(buffer: list[int]) -> Any:
        return PackedSamplesOutput([buffer[:4]] if len(buffer) >= 4 else [], buffer[4:])

    def whole_fours(buffer: list[int]) -> Any:
        return fours(buffer) if len(buffer) >= 4 else PackedSamplesOutput([], buffer)

    held: list[int] = []
    seen = [list(held) for _ in pack(fours, len, buffer_size=6, held=held)(range(9))]
    assert seen == [[4, 5], [8]]
    assert held == []
    assert list(pack(whole_fours, list, buffer_size=6, held=held)(range(9))) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]
    assert held == [8]  # no group can be made of it, and no more comes
    assert list(pack(whole_fours, list, buffer_size=6, held=held)(range(3))) == [[8, 0, 1, 2]]


def test_a_selection_may_skip_what_was_given_back() -> None:
    def select(buffer: list[int]) -> Any:
        if len(buffer) < 3:
            raise SkipSample
        return PackedSamplesOutput([buffer[:1]], buffer[1:2])

    assert list(pack(select, list, buffer_size=3)(range(6))) == [[0], [1]]


def test_selecting_may_change_its_list_but_not_lose_what_it_gives_back() -> None:
    def popping(buffer: list[list[int]]) -> Any:
        group = []
        while buffer and len(group) < 2:
            group.append(buffer.pop(0))
        return PackedSamplesOutput([group], buffer)

    found = list(pack(popping, tuple, buffer_size=3)([n] for n in range(5)))
    assert found == [([0], [1]), ([2], [3]), ([4],)]


@pytest.mark.parametrize(
    ("pushback", "said"),
    [
        (lambda buffer: buffer, "gave back all 3 of a full buffer"),
        (lambda buffer: [[0]], "not in its buffer"),
        (lambda buffer: [buffer[0], buffer[0]], "the same sample twice"),
    ],
)
def test_what_cannot_be_given_back_is_told(pushback: Callable[[Any], Any], said: str) -> None:
    def select(buffer: list[Any]) -> Any:
        return PackedSamplesOutput([buffer[:1]], pushback(buffer))

    with pytest.raises(ValueError, match=said):
        list(pack(select, list, buffer_size=3)([n] for n in range(9)))


def test_an_output_with_pushback_is_its_list_of_packs() -> None:
    output = PackedSamplesOutput(packs=[[1, 2], [3]], pushback=(4,))
    again = pickle.loads(pickle.dumps(output))
    for one in (output, again):
        assert one == one.packs == [[1, 2], [3]]
        assert one.pushback == [4]
    assert PackedSamplesOutput([]).pushback == []


def criterion(item: int) -> tuple[str, int | None]:
    if item % 7 == 6:
        raise SkipSample
    return f"of {item % 3}", (item % 3 or None) and item % 3 + 1


@given(items, sizes, st.booleans())
def test_group_is_its_loop(items: list[int], size: int, drop_last: bool) -> None:
    sizes = {0: size, 1: 2, 2: 3}
    expected: list[Any] = []
    waiting: dict[int, list[int]] = {}
    for pulled, item in enumerate(items, 1):
        if item % 7 == 6:
            continue
        key = item % 3
        waiting[key] = [*waiting.get(key, []), item]
        if len(waiting[key]) == sizes[key]:
            expected.append((waiting.pop(key), pulled))
    rest = [] if drop_last else [(short, len(items)) for short in waiting.values()]
    assert traced(group(criterion, size, drop_last=drop_last), items) == expected + rest


@given(items, st.integers(0, 9))
def test_limit_is_its_loop_and_never_pulls_one_more(items: list[int], length: int) -> None:
    source = Counted(items)
    expected = [(item, pulled) for pulled, item in enumerate(items, 1) if pulled <= length]
    assert [(item, source.pulled) for item in limit(length)(source)] == expected
    assert source.pulled == min(length, len(items))


@given(items, sizes)
def test_epochize_cuts_and_leaves_the_rest_in_the_iterator(items: list[int], length: int) -> None:
    source = Counted(items)
    epochs = epochize(length)(source)
    for start in range(0, len(items), length):
        expected = [(items[at], at + 1) for at in range(start, min(start + length, len(items)))]
        assert [(item, source.pulled) for item in epochs] == expected
    assert list(epochs) == []
    assert len(epochs) == length

    upstream = iter(items)
    list(epochize(length)(upstream))
    assert list(upstream) == items[length:]


def test_an_epoch_that_was_left_early_loses_nothing() -> None:
    epochs = epochize(3)(range(9))
    assert next(iter(epochs)) == 0
    assert list(epochs) == [1, 2, 3]
    assert list(epochs) == [4, 5, 6]


@given(items, sizes, st.integers(0, 5))
def test_shuffle_pulls_one_more_than_it_holds_and_loses_nothing(
    items: list[int], size: int, seed: int
) -> None:
    numbered = list(enumerate(items))
    found = traced(shuffle(size, seed=seed), numbered)
    assert sorted(output for output, _ in found) == numbered
    assert [pulled for _, pulled in found] == [
        min(place + size + 1, len(items)) for place in range(len(items))
    ]


def test_shuffle_depends_on_its_seed_alone() -> None:
    random.seed(1)
    state = random.getstate()
    orders = [list(shuffle(10, seed=seed)(range(50))) for seed in (0, 1, 2, 1)]
    assert random.getstate() == state
    assert orders[1] == orders[3]
    assert len({tuple(order) for order in [range(50), *orders]}) == 4
    assert list(shuffle(10)(range(50))) == orders[0]
    assert list(shuffle(1)(range(50))) == list(range(50))


def test_shuffle_favours_no_item_of_its_buffer() -> None:
    firsts = Counter(next(iter(shuffle(4, seed=seed)(range(9)))) for seed in range(400))
    assert set(firsts) == {0, 1, 2, 3}
    assert min(firsts.values()) > 60  # 100 each, give or take
    lasts = Counter(list(shuffle(4, seed=seed)(range(4)))[-1] for seed in range(400))
    assert set(lasts) == {0, 1, 2, 3}
    assert min(lasts.values()) > 60


@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from(["a", "b", None]))))
def test_cook_is_its_loop(items: list[tuple[int, str | None]]) -> None:
    expected: list[Any] = []
    given: list[Any] = []
    for pulled, (n, kind) in enumerate(items, 1):
        if kind is None:  # no crude sample: passes as it is
            given.append({"n": n})
            expected.append(({"n": n}, pulled))
        else:
            given.append(CrudeSample({"n": n, "__subflavors__": {"kind": kind, "more": 1}}))
            expected += [((kind, output), pulled) for output in by_hand(n)]
    cookers = [
        Cooker(partial(cook_as, "a"), has_subflavors={"kind": "a"}),
        Cooker(partial(cook_as, "b")),  # takes what the first does not
    ]
    assert traced(cook(cookers), given) == expected


def cook_as(kind: str, sample: CrudeSample) -> Any:
    result = user(sample["n"])
    if inspect.isgenerator(result):
        return ((kind, output) for output in result)
    return kind, result


@given(
    st.none() | st.dictionaries(st.sampled_from("abc"), st.integers(0, 1) | st.none()),
    st.none() | st.dictionaries(st.sampled_from("abc"), st.integers(0, 1) | st.none()),
)
def test_a_cooker_takes_what_has_all_that_it_asks_for(
    wanted: dict[str, Any] | None, has: dict[str, Any] | None
) -> None:
    asked, given = set((wanted or {}).items()), set((has or {}).items())
    assert Cooker(dict, wanted).takes({"__subflavors__": has}) == (asked <= given)


def test_a_crude_sample_that_no_cooker_takes_is_named() -> None:
    crude = CrudeSample({"__key__": "a/07", "__subflavors__": {"kind": "audio"}})
    cookers = [Cooker(dict, has_subflavors={"kind": "text"})]
    with pytest.raises(DatasetError, match=r"a/07.*audio.*text.*Add a cooker"):
        list(cook(cookers)([crude]))


@pytest.mark.parametrize("image", ["torchrgb", None])
def test_decode_is_the_decoder_on_each_sample(image: str | None) -> None:
    from energon_fn.decoding import decoder

    raws = [{"__key__": str(n), "cls": str(n).encode(), "json": b'{"n": 1}'} for n in range(3)]
    expected = [(decoder(image)(raw), pulled) for pulled, raw in enumerate(raws, 1)]
    assert traced(decode(image), raws) == expected
    assert isinstance(expected[0][0]["cls"], bytes if image is None else int)


def test_an_unknown_image_option_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="did you mean 'torchrgb'"):
        decode("torchrbg")


# --- pulls, where a pipeline is longer than a stage -------------------------------------------


def test_a_pipeline_pulls_what_its_next_output_needs() -> None:
    def run(*stages: Any) -> list[int]:
        source = Counted(range(100))
        outputs = iter(pipe(source, *stages))
        pulls = []
        for _ in range(3):
            next(outputs)
            pulls.append(source.pulled)
        return pulls

    assert run(encode_sample(str)) == [1, 2, 3]
    assert run(batch(4, list)) == [4, 8, 12]
    assert run(encode_sample(str), batch(4, list), encode_batch(len)) == [4, 8, 12]
    assert run(pack(thirds_one_by_one, tuple, buffer_size=10), batch(2, list)) == [10, 20, 20]
    assert run(shuffle(5), batch(2, list)) == [7, 9, 11]
    assert run(group(lambda n: (n % 2, 3)), encode_batch(sum)) == [5, 6, 11]
    assert run(batch(2, list), limit(3)) == [2, 4, 6]
    assert run(encode_sample(str), epochize(3)) == [1, 2, 3]
    assert run(encode_sample(str), shuffle(500)) == [100, 100, 100]


STAGES = [
    (encode_sample(str), "encode_sample(str)"),
    (batch(2), "batch(2)"),
    (batch(2, list, drop_last=True), "batch(2, list, drop_last=True)"),
    (limit(3), "limit(3)"),
    (epochize(length=3), "epochize(length=3)"),
    (shuffle(3, seed=1), "shuffle(3, seed=1)"),
    (group(criterion, 2), "group(criterion, 2)"),
    (
        pack(thirds, tuple, buffer_size=4, postencode=user),
        "pack(thirds, tuple, buffer_size=4, postencode=user)",
    ),
    (encode_sample(partial(cook_as, "a")), "encode_sample(partial(cook_as, 'a'))"),
    (cook([]), "cook([])"),
    (decode("pil"), "decode('pil')"),
]


@pytest.mark.parametrize("stage", [stage for stage, _ in STAGES], ids=repr)
def test_nothing_is_pulled_before_the_first_item_is_asked_for(stage: Stage[Any, Any]) -> None:
    source = Counted([{"n": n} for n in range(9)])
    outputs = stage(source)
    assert source.pulled == 0
    iter(outputs)
    assert source.pulled == 0


@pytest.mark.parametrize(("stage", "shown"), STAGES, ids=[shown for _, shown in STAGES])
def test_stages_pickle_and_say_what_they_are(stage: Stage[Any, Any], shown: str) -> None:
    assert repr(stage) == shown
    again = pickle.loads(pickle.dumps(stage))
    assert repr(again) == shown
    items = {"cook": [{"n": 1}], "pil": [{"txt": b"a"}], "partial": [{"n": 3}, {"n": 2}]}
    given = next((own for name, own in items.items() if name in shown), list(range(9)))
    assert list(map(as_list, again(given))) == list(map(as_list, stage(given))) != []


def as_list(output: Any) -> Any:
    return list(output) if inspect.isgenerator(output) else output


# --- skips and errors --------------------------------------------------------------------------


def careless(function: Callable[..., Any], *args: Any) -> Any:
    """A user's code that catches every error."""
    try:
        return function(*args)
    except Exception:
        return "swallowed"


def test_a_skip_is_not_swallowed_by_except_exception() -> None:
    for make in (
        encode_sample,
        encode_batch,
        partial(batch, 1),
        partial(pack, thirds, buffer_size=9),
    ):
        function = partial(careless, user)
        outputs = list(make(function)([0, 5, 10]))  # all of kind 0
        assert outputs == []
    assert list(group(partial(careless, criterion), 1)([6, 13])) == []
    assert list(pack(partial(careless, thirds), list, buffer_size=2)([4, 0, 4, 5])) == []
    crude = [CrudeSample({"n": 0})]
    assert list(cook([Cooker(partial(careless, cook_as, "a"))])(crude)) == []


@pytest.mark.parametrize(
    "make",
    [
        encode_sample,
        partial(batch, 2),
        lambda fn: pack(lambda buffer: [buffer], fn, buffer_size=2),
        lambda fn: pack(fn, list, buffer_size=2),
        lambda fn: pack(lambda buffer: [buffer], list, buffer_size=2, postencode=fn),
        lambda fn: group(fn, 2),
        lambda fn: cook([Cooker(fn)]),
    ],
)
def test_other_errors_come_through_unchanged(make: Callable[..., Any]) -> None:
    error = ValueError("bad pixel")

    def fail(item: Any) -> Any:
        raise error

    with pytest.raises(ValueError, match="bad pixel") as caught:
        list(make(fail)([CrudeSample(), CrudeSample()]))
    assert caught.value is error


def test_an_upstream_skip_is_not_taken_for_the_stages_own() -> None:
    """Only what is raised in the user's function drops a sample; a broken source is not hidden."""

    def broken() -> Iterator[int]:
        yield 1
        raise SkipSample

    for make in (encode_sample(str), batch(2, list), shuffle(2), group(criterion, 2), cook([])):
        with pytest.raises(SkipSample):
            list(make(broken()))


def test_a_generator_of_the_user_is_closed_with_the_pipeline() -> None:
    closed = []

    def words(n: int) -> Iterator[int]:
        try:
            yield n
            yield n
        finally:
            closed.append(n)

    outputs = encode_sample(words)([7])
    next(iter(outputs))
    outputs.close()
    assert closed == [7]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: batch(0), "batch_size is 0; it must be 1 or more"),
        (lambda: pack(thirds, list, buffer_size=-1), "pack's buffer_size is -1"),
        (lambda: shuffle(0), "shuffle's buffer_size is 0"),
        (lambda: epochize(0), "epochize's length is 0"),
        (lambda: limit(-1), "limit's length is -1; it must be 0 or more"),
        (lambda: group(lambda n: ("blue", 0)), "the batch size of group 'blue' is 0"),
        (lambda: group(lambda n: ("blue", None)), "no batch size for the group 'blue'"),
    ],
)
def test_a_size_that_makes_no_sense_is_named(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        list(make()(range(3)))


def test_wrong_arguments_are_said_where_they_are_written() -> None:
    with pytest.raises(TypeError, match=r"encode_sample: missing .*'fn'"):
        encode_sample()
    with pytest.raises(TypeError, match=r"too many positional.*encode_sample\(\.\.\.\)\(items\)"):
        encode_sample(str, range(3))
    with pytest.raises(TypeError, match=r"batch: .*'size'"):
        batch(3, size=3)
    assert list(inspect.signature(batch).parameters) == ["batch_size", "collate", "drop_last"]


# --- on any iterable, composed in any way ------------------------------------------------------


@stage
def every(items: Iterable[Any], n: int) -> Iterator[Any]:
    for at, item in enumerate(items):
        if at % n == 0:
            yield item


def test_ones_own_stage_is_like_the_others() -> None:
    assert repr(every(3)) == "every(3)"
    assert list(pickle.loads(pickle.dumps(every(n=3)))(range(7))) == [0, 3, 6]
    with pytest.raises(TypeError, match="every: missing"):
        every()


def length_first(text: str) -> tuple[int, str]:
    return len(text), text


@given(st.lists(st.text(max_size=3)), sizes, sizes)
def test_pipe_compose_and_nested_calls_are_the_same(
    texts: list[str], size: int, length: int
) -> None:
    stages = [encode_sample(length_first), shuffle(3), batch(size, list), limit(length)]
    piped = list(pipe(texts, *stages))
    composed: Callable[[Any], Iterable[Any]] = compose(*reversed(stages))
    assert list(composed(texts)) == piped
    assert list(pickle.loads(pickle.dumps(composed))(texts)) == piped
    nested = stages[3](stages[2](stages[1](stages[0](texts))))
    assert list(nested) == piped
    assert len(piped) == min(-(-len(texts) // size), length)


PICTURES = [np.full((2, 3, 3), 40 * n, dtype=np.uint8) for n in range(5)]


def raw_samples() -> list[dict[str, Any]]:
    samples = []
    for n, pixels in enumerate(PICTURES):
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "png")
        samples.append({"__key__": f"{n:04}", "png": png.getvalue(), "txt": f"number {n}".encode()})
    return samples


class HubDataset:
    """As a Hugging Face dataset: can be iterated again and again, has a length and columns."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return self.rows[at]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([dict(row) for row in self.rows])


def write_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for sample in raw_samples():
            for part in ("png", "txt"):
                info = tarfile.TarInfo(f"{sample['__key__']}.{part}")
                info.size = len(sample[part])
                tar.addfile(info, io.BytesIO(sample[part]))
    return path


def caption_and_brightness(sample: dict[str, Any]) -> dict[str, Any]:
    return {"text": sample["txt"], "image": sample["png"], "light": sample["png"].max()}


def check(batches: Iterable[Any]) -> None:
    first, second, third = batches
    assert [first["text"], second["text"], third["text"]] == [
        ["number 0", "number 1"],
        ["number 2", "number 3"],
        ["number 4"],
    ]
    assert first["image"].shape == (2, 3, 2, 3)
    assert torch.allclose(second["light"], torch.tensor([80 / 255, 120 / 255]))


PIPELINE = (decode(), encode_sample(caption_and_brightness), batch(2))


@pytest.mark.parametrize("kind", ["list", "generator", "hub", "webdataset"])
def test_stages_work_on_any_iterable(kind: str, tmp_path: Path) -> None:
    samples = {
        "list": raw_samples,
        "generator": lambda: (sample for sample in raw_samples()),
        "hub": lambda: HubDataset(raw_samples()),
        "webdataset": lambda: webdataset.WebDataset(
            str(write_tar(tmp_path / "a.tar")), shardshuffle=False
        ),
    }[kind]()
    check(pipe(samples, *PIPELINE))
    if kind != "generator":  # what can be iterated again can be piped again
        check(pipe(samples, *PIPELINE))


def test_stages_work_inside_a_webdataset_pipeline(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "a.tar"))
    check(webdataset.WebDataset(path, shardshuffle=False).compose(*PIPELINE))
    source = webdataset.SimpleShardList(path)
    check(webdataset.DataPipeline(source, webdataset.tarfile_to_samples(), *PIPELINE))


@pytest.mark.parametrize(
    "stage", [batch(8, len), pack(lambda them: [[it] for it in them], len, buffer_size=8)]
)
def test_what_was_used_is_let_go_of_before_others_are_made(stage: Any) -> None:
    living: list[weakref.ref[Any]] = []

    def items() -> Iterator[Any]:
        for n in range(24):
            if n % 8 == 0:  # the last one may still be at hand
                assert sum(it() is not None for it in living) <= 1
            item = np.zeros(1)
            living.append(weakref.ref(item))
            yield item
            del item

    assert len(list(stage(items()))) in (3, 24)


def test_batch_collates_by_default() -> None:
    samples = [{"ids": torch.arange(n), "name": "x" * n} for n in (1, 3)]
    (found,) = batch(2)(samples)
    assert found["name"] == ["x", "xxx"]
    assert found["ids"].tolist() == [[0, 0, 0], [0, 1, 2]]


def test_stages_do_not_change_their_input() -> None:
    items = list(range(10))
    for make, _ in STAGES[:8]:
        list(make(items))
    assert items == list(range(10))


def halves(items: list[Any]) -> Iterator[list[Any]]:
    yield items[::2]
    yield items[1::2]


@pytest.mark.parametrize(
    "stage",
    [encode_sample(str), batch(2, list), pack(halves, list, buffer_size=4)],
    ids=["encode_sample", "batch", "pack"],
)
def test_python_may_end_in_the_middle_of_the_items(
    stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = iter(stage(iter(range(9))))
    next(items)
    # The names of modules go before what still runs is closed.
    monkeypatch.setattr("energon_fn.stages.SkipSample", None)
    items.close()
