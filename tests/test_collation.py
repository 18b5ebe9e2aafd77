"""Batches hold what the samples held: padding adds zeros, and nothing is lost or reordered."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from energon_fn.collation import (
    batch_list,
    batch_pad_stack,
    batch_stack,
    collate,
    concat_pad,
    generic_batch,
    generic_concat,
    homogeneous_concat_mix,
)
from energon_fn.errors import SkipSample
from energon_fn.samples import (
    Batch,
    CaptioningSample,
    CrudeSample,
    ImageClassificationSample,
    SourceInfo,
    TextSample,
    edataclass,
)

DTYPES = [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool]
QUICK = settings(max_examples=60, deadline=None)


@st.composite
def same_rank_tensors(draw: st.DrawFn, same_shape: bool = False) -> list[torch.Tensor]:
    """One to five tensors of one dtype and number of dimensions (0 to 3); lengths may be 0.

    No element is zero, so that padding can be told from data.
    """
    rank, dtype = draw(st.integers(0, 3)), draw(st.sampled_from(DTYPES))
    one_shape = st.tuples(*[st.integers(0, 4)] * rank)
    shape = draw(one_shape)
    shapes = draw(st.lists(st.just(shape) if same_shape else one_shape, min_size=1, max_size=5))
    return [
        (torch.arange(int(np.prod(shape))) % 100 + 1 + i).reshape(shape).to(dtype)
        for i, shape in enumerate(shapes)
    ]


# --------------------------------------------------------------------------------------- actions


@QUICK
@given(same_rank_tensors())
def test_padding_keeps_each_sample_and_adds_zeros_after_it(values: list[torch.Tensor]) -> None:
    before = [value.clone() for value in values]
    batch = batch_pad_stack(values)

    assert batch.dtype == values[0].dtype
    longest = [max(value.shape[d] for value in values) for d in range(values[0].dim())]
    assert batch.shape == (len(values), *longest)
    for row, value in zip(batch, values, strict=True):
        inside = torch.zeros(row.shape, dtype=torch.bool)
        inside[tuple(slice(n) for n in value.shape)] = True
        assert torch.equal(row[inside], value.flatten())
        assert not row[~inside].any()
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


@QUICK
@given(same_rank_tensors(same_shape=True))
def test_equal_shapes_are_stacked_alike_by_all(values: list[torch.Tensor]) -> None:
    expected = torch.stack(values)
    for action in (batch_stack, batch_pad_stack, generic_batch):
        batch = action(values)
        assert torch.equal(batch, expected)
        assert batch.dtype == expected.dtype
        assert all(batch.data_ptr() != v.data_ptr() for v in values if v.numel())


@given(st.lists(st.integers() | st.text() | st.none() | st.binary()))
def test_lists_hold_the_very_values(values: list[Any]) -> None:
    for action in (batch_list, generic_batch):
        batch = action(values)
        assert isinstance(batch, list)
        assert batch is not values
        assert [id(value) for value in batch] == [id(value) for value in values]


def test_actions_take_any_iterable() -> None:
    def tensors() -> Any:
        return (torch.tensor([n]) for n in (3, 1, 2))

    assert batch_stack(tensors()).tolist() == [[3], [1], [2]]
    assert batch_pad_stack(tensors()).tolist() == [[3], [1], [2]]
    assert generic_batch(tensors()).tolist() == [[3], [1], [2]]
    assert [t.item() for t in batch_list(tensors())] == [3, 1, 2]


@pytest.mark.parametrize("action", [batch_stack, batch_pad_stack])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2], torch.tensor([1, 2])),
        ([1, 2.5], torch.tensor([1.0, 2.5])),
        ([True, False], torch.tensor([True, False])),
        ([np.float64(1), np.float64(2)], torch.tensor([1, 2], dtype=torch.float64)),
        ([np.int16(1), np.int16(2)], torch.tensor([1, 2], dtype=torch.int16)),
        ([np.ones(2, "float32"), np.zeros(2, "float32")], torch.tensor([[1.0, 1.0], [0.0, 0.0]])),
        ([np.array([1, 2])[::-1], torch.tensor([3, 4])], torch.tensor([[2, 1], [3, 4]])),
        ([torch.tensor(5), 6], torch.tensor([5, 6])),
    ],
)
def test_numbers_and_arrays_are_stacked_with_their_dtype(
    action: Callable[[Any], torch.Tensor], values: list[Any], expected: torch.Tensor
) -> None:
    batch = action(values)
    assert torch.equal(batch, expected)
    assert batch.dtype == expected.dtype


@pytest.mark.filterwarnings("error")
def test_read_only_arrays_are_copied() -> None:
    array = np.frombuffer(b"\x01\x02", dtype=np.uint8)
    assert batch_stack([array, array]).tolist() == [[1, 2], [1, 2]]
    assert batch_pad_stack([array, array[:1]]).tolist() == [[1, 2], [1, 0]]


def test_gradients_flow_back_through_the_padding() -> None:
    short, long = torch.ones(1, requires_grad=True), torch.ones(3, requires_grad=True)
    (batch_pad_stack([short, long]) * torch.tensor([[2.0] * 3, [5.0] * 3])).sum().backward()
    assert short.grad is not None
    assert long.grad is not None
    assert (short.grad.tolist(), long.grad.tolist()) == ([2.0], [5.0, 5.0, 5.0])


@pytest.mark.parametrize(
    ("action", "values", "error", "message"),
    [
        (batch_stack, [], ValueError, "no values"),
        (batch_pad_stack, [], ValueError, "no values"),
        (
            batch_stack,
            [torch.ones(2), torch.ones(2), torch.ones(3)],
            ValueError,
            r"shapes differ: \(2,\) \(value 0\) and \(3,\) \(value 2\); use batch_pad_stack",
        ),
        (
            batch_pad_stack,
            [torch.ones(2), torch.ones(2, 2)],
            ValueError,
            r"numbers of dimensions differ: 1 \(value 0\) and 2 \(value 1\); use batch_list",
        ),
        (
            batch_pad_stack,
            [torch.ones(2), torch.ones(2, dtype=torch.int64)],
            ValueError,
            r"dtypes differ: torch.float32 \(value 0\) and torch.int64 \(value 1\)",
        ),
        (batch_stack, ["a"], TypeError, "value 0, a str.*batch_list"),
        (batch_pad_stack, [torch.ones(1), None], TypeError, "value 1, a NoneType"),
    ],
)
def test_what_cannot_be_stacked_says_why_and_what_to_do(
    action: Any, values: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        action(values)


def test_generic_batch_goes_into_dicts_with_the_same_keys() -> None:
    values = [
        {"ids": torch.tensor([1]), "name": "a", "deep": {"x": torch.tensor(1.0), "y": None}},
        {"name": "b", "deep": {"y": 2, "x": torch.tensor(2.0)}, "ids": torch.tensor([2, 3])},
    ]
    batch = generic_batch(values)
    assert list(batch) == ["ids", "name", "deep"]
    assert batch["ids"].tolist() == [[1, 0], [2, 3]]
    assert batch["name"] == ["a", "b"]
    assert batch["deep"]["x"].tolist() == [1.0, 2.0]
    assert batch["deep"]["y"] == [None, 2]


@pytest.mark.parametrize(
    "values",
    [
        [{"a": 1}, {"b": 1}],
        [{"a": 1}, {"a": 1, "b": 2}],
        [{"a": 1}, None],
        [torch.ones(1), None],
        [torch.ones(1), "text"],
        [None, None],
        [np.ones(1), np.ones(1)],
        [(1, 2), (3, 4)],
        [],
    ],
)
def test_generic_batch_makes_a_list_of_anything_else(values: list[Any]) -> None:
    batch = generic_batch(values)
    assert isinstance(batch, list)
    assert len(batch) == len(values)
    assert all(a is b for a, b in zip(batch, values, strict=True))


# --------------------------------------------------------------------------------------- collate


@dataclass
class CaptioningRawBatch:
    __key__: list[str]
    image: torch.Tensor
    caption: list[str]


def captioning(key: str, value: float = 0.0, side: int = 2, **more: Any) -> CaptioningSample:
    image = torch.full((3, side, side), value)
    return CaptioningSample(__key__=key, image=image, caption=f"caption {key}", **more)


def test_the_documented_batch_type_with_fewer_fields() -> None:
    samples = [captioning("b", 1.0), captioning("a", 2.0)]
    actions = {"image": batch_stack, "caption": batch_list}
    batch = collate(samples, result_type=CaptioningRawBatch, actions=actions)
    assert type(batch) is CaptioningRawBatch
    assert (batch.__key__, batch.caption) == (["b", "a"], ["caption b", "caption a"])
    assert batch.image.shape == (2, 3, 2, 2)
    assert batch.image[:, 0, 0, 0].tolist() == [1.0, 2.0]
    # The same without naming the actions.
    default = collate(samples, CaptioningRawBatch)
    assert torch.equal(default.image, batch.image)
    assert (default.__key__, default.caption) == (batch.__key__, batch.caption)


@QUICK
@given(st.lists(st.tuples(st.text(max_size=3), st.integers(1, 4), st.integers(0, 9)), min_size=1))
def test_field_by_field_in_order_and_without_touching_the_samples(rows: list[Any]) -> None:
    samples = [captioning(key, float(value), side) for key, side, value in rows]
    before = copy.deepcopy(samples)
    batch = collate(samples)
    assert type(batch) is CaptioningSample
    assert batch.__key__ == [key for key, _, _ in rows]
    assert batch.caption == [f"caption {key}" for key, _, _ in rows]
    assert torch.equal(batch.image, batch_pad_stack([s.image for s in before]))
    for sample, old in zip(samples, before, strict=True):
        assert (sample.__key__, sample.caption) == (old.__key__, old.caption)
        assert torch.equal(sample.image, old.image)


def test_bookkeeping_becomes_the_batchs() -> None:
    here, there = (SourceInfo("/d", i, "0.tar", (f"{i}.jpg",)) for i in (0, 1))
    samples = [
        captioning("a", __restore_key__=(1,), __subflavors__={"n": 1}, __sources__=(here, there)),
        captioning("b", __restore_key__=(2,)),
        captioning("c", __restore_key__=(3,), __sources__=(here,)),
    ]
    batch: Any = collate(samples)
    assert batch.__restore_key__ == ((1,), (2,), (3,))
    assert batch.__subflavors__ == [{"n": 1}, None, None]
    assert batch.__sources__ == (here, there, here)
    assert collate(samples[1:2]).__sources__ is None


def test_an_action_may_be_given_for_bookkeeping() -> None:
    assert (
        collate([captioning("a"), captioning("b")], actions={"__key__": " ".join}).__key__ == "a b"
    )


def test_only_the_declared_fields_are_batched() -> None:
    calls = []

    def count(values: list[Any]) -> list[Any]:
        calls.append(values)
        return values

    collate(
        [captioning("a"), captioning("b")],
        CaptioningRawBatch,
        actions={"caption": count},
        default_action=count,
    )
    assert len(calls) == 2  # image and caption: nothing for subflavors and the like

    @dataclass
    class KeysOnly:
        __key__: list[str]

    different = [captioning("a"), CaptioningSample(__key__="b", image=torch.ones(1), caption="")]
    assert collate(different, KeysOnly).__key__ == ["a", "b"]


def test_defaults_stand_for_what_the_samples_lack_and_init_false_is_not_given() -> None:
    @edataclass
    class Wide(Batch):
        image: torch.Tensor
        tokens: list[int] | None = None
        extra: list[int] = dataclasses.field(default_factory=lambda: [7])
        computed: int = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            self.computed = len(self.__key__)

    batch = collate([captioning("a"), captioning("b")], Wide)
    assert (batch.tokens, batch.extra, batch.computed) == (None, [7], 2)


def test_keys_by_the_name_of_keys() -> None:
    @dataclass
    class Keys:
        __keys__: list[str]
        image: torch.Tensor

    assert collate([captioning("b"), captioning("a")], Keys).__keys__ == ["b", "a"]


def test_attributes_set_by_the_user_can_be_batched() -> None:
    @dataclass
    class Tokens:
        tokens: torch.Tensor

    samples = [captioning("a"), captioning("b")]
    for i, sample in enumerate(samples):
        sample.tokens = torch.arange(i + 1)
    assert collate(samples, Tokens).tokens.tolist() == [[0, 0], [0, 1]]


class Point(NamedTuple):
    x: torch.Tensor
    name: str
    weight: float = 1.0


def test_namedtuples_and_result_types_that_are() -> None:
    batch = collate([Point(torch.ones(1), "a"), Point(torch.ones(2), "b", 2.0)])
    assert type(batch) is Point
    assert (batch.x.tolist(), batch.name) == ([[1.0, 0.0], [1.0, 1.0]], ["a", "b"])
    assert batch.weight == [1.0, 2.0]
    made = collate([{"x": torch.ones(1), "name": "a"}], Point)
    assert (type(made), made.name, made.weight) == (Point, ["a"], 1.0)


@pytest.mark.parametrize(
    ("kind", "result"), [(dict, dict), (CrudeSample, CrudeSample), (UserDict, dict)]
)
def test_dicts(kind: Any, result: type) -> None:
    samples = [kind({"__key__": k, "n": i, "t": torch.ones(i)}) for i, k in enumerate("ab", 1)]
    batch = collate(samples)
    assert type(batch) is result
    assert list(batch) == ["__key__", "n", "t"]
    assert (batch["__key__"], batch["n"]) == (["a", "b"], [1, 2])
    assert batch["t"].tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_a_dict_as_result_type_gets_every_field() -> None:
    batch = collate([captioning("a"), captioning("b")], dict)
    assert list(batch) == [f.name for f in dataclasses.fields(CaptioningSample)]
    assert batch["__restore_key__"] == ((), ())
    assert type(collate([captioning("a")], CrudeSample)) is CrudeSample


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([torch.tensor([1]), torch.tensor([2, 3])], [[1, 0], [2, 3]]),
        (["a", "b"], ["a", "b"]),
        ([(1, 2), (3, 4)], [(1, 2), (3, 4)]),
        ([None], [None]),
    ],
)
def test_plain_values_go_to_the_default_action(samples: list[Any], expected: list[Any]) -> None:
    batch = collate(iter(samples))
    assert (batch.tolist() if isinstance(batch, torch.Tensor) else batch) == expected
    assert collate(samples, default_action=len) == len(samples)


# ---------------------------------------------------------------------------------------- errors


def test_a_required_field_that_no_sample_has() -> None:
    samples = [TextSample(__key__="a", text="t")]
    with pytest.raises(TypeError) as caught:
        collate(samples, CaptioningRawBatch)
    message = str(caught.value)
    for part in ("CaptioningRawBatch", "'image'", "__key__", "text", "TextSample", "`batch`"):
        assert part in message


def test_a_method_is_not_taken_for_a_field() -> None:
    @dataclass
    class Odd:
        derive_from: Any

    with pytest.raises(TypeError, match="'derive_from'"):
        collate([captioning("a")], Odd)

    @dataclass
    class Data:
        data: Any

    with pytest.raises(TypeError, match=r"'data'.*no fields \(Tensor\)"):
        collate([torch.ones(1)], Data)


@pytest.mark.parametrize("samples", [[captioning("a")], [{"image": 1}], [torch.ones(1)]])
@pytest.mark.parametrize("result_type", [None, CaptioningRawBatch, dict])
def test_an_action_for_a_field_that_no_sample_has(samples: list[Any], result_type: Any) -> None:
    with pytest.raises(TypeError, match="action for the field 'imgae'"):
        collate(samples, result_type, actions={"imgae": batch_stack})


def test_a_field_that_only_some_samples_have() -> None:
    samples = [captioning("a"), TextSample(__key__="b", text="t")]
    with pytest.raises(ValueError, match=r"'b' has no field 'image'.*text \(TextSample\)"):
        collate(samples, CaptioningRawBatch)


@pytest.mark.parametrize(
    "samples",
    [
        [{"__key__": "a", "jpg": 1}, {"__key__": "b", "jpg": 1, "txt": "t"}],
        [{"__key__": "a", "jpg": 1, "txt": "t"}, {"__key__": "b", "jpg": 1}],
        [captioning("a"), ImageClassificationSample(__key__="b", image=torch.ones(1))],
    ],
)
@pytest.mark.parametrize("result_type", [None, dict])
def test_nothing_is_dropped_where_samples_differ(samples: list[Any], result_type: Any) -> None:
    with pytest.raises(ValueError, match=r"differ in their fields: 'a' has .*'b' has .*"):
        collate(samples, result_type)


def test_an_error_of_an_action_names_the_field_and_the_samples() -> None:
    samples = [captioning("a"), captioning("b", side=3)]
    with pytest.raises(ValueError, match="shapes differ") as caught:
        collate(samples, CaptioningRawBatch, actions={"image": batch_stack})
    assert caught.value.__notes__ == [
        "while batching field 'image' with batch_stack, samples 'a', 'b'"
    ]


def test_the_note_of_a_large_batch_stays_readable() -> None:
    def broken(values: list[Any]) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        collate([torch.ones(1)] * 1000, default_action=broken)
    (note,) = caught.value.__notes__
    assert "batching samples with broken, samples number 0, number 1" in note
    assert note.endswith("... (1000 in all)")
    assert len(note) < 400


def test_skipping_a_batch_passes_through() -> None:
    def skip(values: list[Any]) -> None:
        raise SkipSample

    with pytest.raises(SkipSample) as caught:
        collate([captioning("a")], actions={"caption": skip})
    assert not hasattr(caught.value, "__notes__")


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="no samples"):
        collate([])
    with pytest.raises(TypeError, match=r"dataclass, a namedtuple or dict, not int.*`batch`"):
        collate([captioning("a")], int)


# ------------------------------------------------------------------------------- joining batches


@QUICK
@given(same_rank_tensors())
def test_concatenating_pads_all_dimensions_but_the_first(tensors: list[torch.Tensor]) -> None:
    if tensors[0].dim() == 0:
        with pytest.raises(ValueError, match="use batch_stack"):
            concat_pad(tensors)
        return
    joined = concat_pad(tensors)
    longest = [max(lengths) for lengths in zip(*(t.shape for t in tensors), strict=True)]
    assert joined.shape == (sum(map(len, tensors)), *longest[1:])
    assert joined.dtype == tensors[0].dtype
    start = 0
    for tensor in tensors:
        part = joined[start : start + len(tensor)]
        assert torch.equal(part[tuple(map(slice, tensor.shape))], tensor)
        assert int((part != 0).sum()) == tensor.numel()  # all else is padding
        start += len(tensor)


def test_what_cannot_be_concatenated_is_told() -> None:
    with pytest.raises(ValueError, match="numbers of dimensions differ"):
        concat_pad([torch.ones(2), torch.ones(2, 3)])
    with pytest.raises(ValueError, match="dtypes differ"):
        concat_pad([torch.ones(2), torch.ones(2, dtype=torch.int)])
    with pytest.raises(TypeError, match="value 1, a list"):
        concat_pad([torch.ones(2), [1]])
    with pytest.raises(ValueError, match="no values"):
        concat_pad([])
    with pytest.raises(ValueError, match="no batches"):
        homogeneous_concat_mix([])
    assert concat_pad([np.ones((1, 2)), np.ones((2, 1))]).tolist() == [[1, 1], [1, 0], [1, 0]]


class Pair(NamedTuple):
    ids: torch.Tensor
    texts: list[str]


@dataclass
class Texts:
    ids: torch.Tensor
    texts: list[str]


@pytest.mark.parametrize("kind", [Pair, Texts, dict])
def test_batches_of_one_type_become_one_of_that_type(kind: Any) -> None:
    batches = [
        kind(ids=torch.tensor([[1, 2], [3, 4]]), texts=["a", "b"]),
        kind(ids=torch.tensor([[5]]), texts=["c"]),
    ]
    for join in (generic_concat, homogeneous_concat_mix):
        joined: Any = join(batches)
        assert type(joined) is kind
        fields = joined if kind is dict else {n: getattr(joined, n) for n in ("ids", "texts")}
        assert fields["ids"].tolist() == [[1, 2], [3, 4], [5, 0]]
        assert fields["texts"] == [["a", "b"], ["c"]]


def test_what_is_not_of_one_kind_is_listed() -> None:
    ids = torch.tensor([1])
    for values in (
        [Pair(ids, []), Texts(ids, [])],
        [ids, None],
        [{"a": ids}, {"b": ids}],
        ["a", "b"],
        [1, 2],
        [None, None],
    ):
        assert generic_concat(values) is not values
        assert generic_concat(iter(values)) == values
    assert homogeneous_concat_mix([Pair(ids, []), Texts(ids, [])]) == [
        Pair(ids, []),
        Texts(ids, []),
    ]
    assert homogeneous_concat_mix([{"a": ids}, ids]) == [{"a": ids}, ids]


# Evaluated here and in the published package's Python.
CASES = """[
    show(concat_pad([ones(2, 3), ones(1, 3)])),
    show(concat_pad([ones(2, 3).int(), ones(1, 4).int()])),
    show(concat_pad([ones(2), ones(3)])),
    show(generic_concat([ones(2, 1, 2), ones(1, 3, 1)])),
    show(generic_concat([[1, 2], [3]])),
    show(generic_concat(["a", "b"])),
    show(generic_concat([None, None])),
    show(generic_concat([{"a": ones(1, 2), "b": ["x"]}, {"a": ones(2, 1), "b": ["y", "z"]}])),
    show(generic_concat([{"a": {"b": 1}}, {"a": {"b": 2}}])),
    show(homogeneous_concat_mix([{"a": ones(1, 2)}, {"a": ones(2, 3)}])),
    show(homogeneous_concat_mix([ones(1, 2), ones(2, 3)])),
    show(homogeneous_concat_mix([["a"], ["b", "c"]])),
]"""
SHOW = """
import json, sys
from torch import ones, is_tensor
def show(thing):
    if isinstance(thing, dict):
        return {key: show(value) for key, value in thing.items()}
    return [str(thing.dtype), thing.tolist()] if is_tensor(thing) else thing
"""


def test_the_published_functions_do_the_same(published_python: str) -> None:
    imported = "from {} import concat_pad, generic_concat, homogeneous_concat_mix"
    theirs = f"{SHOW}\n{imported.format('megatron.energon')}\nprint(json.dumps({CASES}))"
    command = [published_python, "-W", "ignore", "-c", theirs]
    found = subprocess.run(command, check=True, capture_output=True).stdout
    ours: dict[str, Any] = {}
    exec(f"{SHOW}\n{imported.format('energon_fn.collation')}\nfound = {CASES}", ours)
    assert json.loads(found) == ours["found"]
