"""The task encoder: the documented classes, which methods count, and what the defaults do."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toolz import pipe

from energon_fn import stages
from energon_fn.collation import batch_list, batch_stack, collate
from energon_fn.errors import DatasetError
from energon_fn.samples import (
    Batch,
    CaptioningSample,
    CrudeSample,
    Sample,
    TextSample,
    VQASample,
    edataclass,
)
from energon_fn.stages import Cooker, cook
from energon_fn.task_encoder import (
    METHODS,
    AugmentTaskEncoder,
    DefaultTaskEncoder,
    TaskEncoder,
    convert,
    marks_of,
    method_of,
    stateless,
)


def captioning_samples() -> list[CaptioningSample]:
    """Pictures 2 x 3 and 2 x 5 pixels large, numbered by their brightness."""
    return [
        CaptioningSample(
            __key__=f"pets/{n:04}",
            __restore_key__=(0, n),
            __subflavors__={"split": "train"},
            image=torch.full((3, 2, 3 + 2 * (n % 2)), float(n)),
            caption=" ".join(["rose"] * (n + 1)),
        )
        for n in range(4)
    ]


# --- the documented classes --------------------------------------------------------------------


class Tokenizer:
    """Words to numbers, as a Hugging Face tokenizer gives them."""

    def __call__(self, texts: list[str]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(text.split()) for text in texts])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return {"input_ids": mask * 7, "attention_mask": mask}


# Type for intermediate batch, after batching operation
@dataclass
class CaptioningRawBatch:
    # (n,)
    __key__: list[str]
    # (n, c, h, w)
    image: torch.Tensor
    # (n,)
    caption: list[str]


# Typing for the resulting batch data
@dataclass
class CaptioningBatch:
    __keys__: list[str]
    # (n, c, h, w)
    images: torch.Tensor
    # (n, c)
    text_tokens: torch.Tensor
    # (n, c, c)
    text_attn_mask: torch.Tensor


class CaptioningTaskEncoder(
    DefaultTaskEncoder[CaptioningSample, CaptioningSample, CaptioningRawBatch, CaptioningBatch]
):
    """A simple task encoder for captioning."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        max_length: int = 128,
    ):
        super().__init__(batch_type=CaptioningRawBatch)
        self.tokenizer = tokenizer
        self.image_transform = image_transform
        self.max_length = max_length

    def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
        sample.image = self.image_transform(sample.image)
        return sample

    def batch(self, samples: list[CaptioningSample]) -> CaptioningRawBatch:
        return self._batch(
            samples,
            result_type=CaptioningRawBatch,
            actions={"image": batch_stack, "caption": batch_list},
        )

    def encode_batch(self, batch_data: CaptioningRawBatch) -> CaptioningBatch:
        tokenized = self.tokenizer(batch_data.caption)
        return CaptioningBatch(
            __keys__=batch_data.__key__,
            images=batch_data.image,
            text_tokens=tokenized["input_ids"],
            text_attn_mask=tokenized["attention_mask"],
        )


class WithoutBatch(CaptioningTaskEncoder):
    """The same; the document says that its ``batch`` is what the default does."""

    batch = DefaultTaskEncoder.batch


def left_half(image: torch.Tensor) -> torch.Tensor:
    return image[:, :, :2]


@pytest.mark.parametrize("encoder_type", [CaptioningTaskEncoder, WithoutBatch])
def test_the_documented_encoder_by_hand(encoder_type: type[CaptioningTaskEncoder]) -> None:
    encoder = encoder_type(tokenizer=Tokenizer(), image_transform=left_half)
    first, second = pipe(
        captioning_samples(),
        stages.encode_sample(method_of(encoder, "encode_sample")),
        stages.batch(3, method_of(encoder, "batch")),
        stages.encode_batch(method_of(encoder, "encode_batch")),
    )
    assert type(first) is type(second) is CaptioningBatch
    assert first.__keys__ == ["pets/0000", "pets/0001", "pets/0002"]
    assert first.images.shape == (3, 3, 2, 2)
    assert first.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert first.text_tokens.tolist() == [[7, 0, 0], [7, 7, 0], [7, 7, 7]]
    assert first.text_attn_mask.sum(1).tolist() == [1, 2, 3]
    assert (second.__keys__, second.images.shape) == (["pets/0003"], (1, 3, 2, 2))


def test_the_documented_encoder_uses_the_overridden_methods_only() -> None:
    encoder = CaptioningTaskEncoder(Tokenizer())
    used = [name for name in METHODS if method_of(encoder, name) is not None]
    assert used == ["encode_sample", "batch", "encode_batch"]


def test_the_documented_encoder_pickles() -> None:
    encoder = pickle.loads(pickle.dumps(CaptioningTaskEncoder(Tokenizer(), left_half)))
    raw = encoder.batch([encoder.encode_sample(sample) for sample in captioning_samples()])
    assert type(raw) is CaptioningRawBatch


# --- which methods count ----------------------------------------------------------------------


def test_the_methods_are_the_documented_ones() -> None:
    assert set(METHODS) == {
        "cook_crude_sample",
        "encode_sample",
        "preencode_sample",
        "postencode_sample",
        "select_samples_to_pack",
        "pack_selected_samples",
        "batch_group_criterion",
        "batch",
        "encode_batch",
    }


class Nothing(TaskEncoder[Any, Any, Any, Any]):
    """Derived from the protocol itself."""


@pytest.mark.parametrize("encoder", [DefaultTaskEncoder(), Nothing(), object()], ids=repr)
def test_a_method_that_is_not_overridden_does_not_count(encoder: Any) -> None:
    for one in (encoder, AugmentTaskEncoder(encoder), AugmentTaskEncoder(Nothing())):
        assert [method_of(one, name) for name in METHODS] == [None] * len(METHODS)


def own(self: Any, *args: Any, **kwargs: Any) -> Any:
    return "own", *args


def test_each_overridden_method_counts_alone() -> None:
    for base in (DefaultTaskEncoder, TaskEncoder, object):
        for name in METHODS:
            derived = type("Derived", (base,), {name: own})
            again = type("Again", (derived,), {})
            for encoder in (derived(), again(), AugmentTaskEncoder(again())):
                found = {name: method_of(encoder, name) for name in METHODS}
                assert found.pop(name)("sample") == ("own", "sample")
                assert set(found.values()) == {None}


def test_a_method_may_be_any_callable() -> None:
    class Mixed(DefaultTaskEncoder):
        @staticmethod
        def encode_sample(sample: Any) -> Any:
            return "static", sample

        @classmethod
        def batch(cls, samples: Any) -> Any:
            return cls.__name__, samples

    encoder = Mixed()
    encoder.encode_batch = partial(max, 5)  # set on the object
    assert method_of(encoder, "encode_sample")(1) == ("static", 1)
    assert method_of(encoder, "batch")(1) == ("Mixed", 1)
    assert method_of(encoder, "encode_batch")(7) == 7


def test_going_back_to_the_default_makes_it_not_count() -> None:
    class Derived(DefaultTaskEncoder):
        encode_sample = own

    class Back(Derived):
        encode_sample = DefaultTaskEncoder.encode_sample

    assert method_of(Derived(), "encode_sample") is not None
    assert method_of(Back(), "encode_sample") is None


@dataclass
class Captions:
    __keys__: list[str]
    caption: list[str]


@pytest.mark.parametrize(
    ("types", "counts"),
    [
        ({"encoded_sample_type": dict}, ["encode_sample"]),
        ({"raw_batch_type": dict}, ["batch"]),
        ({"batch_type": dict}, ["batch", "encode_batch"]),
        ({"raw_batch_type": CaptioningRawBatch, "batch_type": Captions}, ["batch", "encode_batch"]),
    ],
)
def test_a_type_makes_the_default_method_count(types: dict[str, Any], counts: list[str]) -> None:
    for encoder in (DefaultTaskEncoder(**types), AugmentTaskEncoder(DefaultTaskEncoder(**types))):
        assert [name for name in METHODS if method_of(encoder, name) is not None] == counts


def test_packing_without_its_methods_says_what_to_write() -> None:
    for name in ("select_samples_to_pack", "pack_selected_samples"):
        with pytest.raises(TypeError, match=f"needs {name}: override it"):
            getattr(DefaultTaskEncoder(), name)([])


# --- classes of all kinds ---------------------------------------------------------------------


T = TypeVar("T")


class GenericEncoder(DefaultTaskEncoder[T, T, dict[str, Any], Batch], Generic[T]):
    """A user's own generic encoder."""


def test_typing_is_optional_and_subscripts_do_nothing() -> None:
    some = (CaptioningSample, CaptioningSample, CaptioningRawBatch, CaptioningBatch)
    for base in (
        DefaultTaskEncoder,
        DefaultTaskEncoder[some],
        TaskEncoder[some],
        GenericEncoder[TextSample],
        DefaultTaskEncoder["Unknown", Any, Any, Any],
    ):

        class Derived(base):
            def encode_sample(self, sample: Any) -> Any:
                return sample.caption

        assert method_of(Derived(), "encode_sample")(captioning_samples()[0]) == "rose"
    assert isinstance(DefaultTaskEncoder[some](batch_type=dict), DefaultTaskEncoder)
    assert isinstance(AugmentTaskEncoder[some](DefaultTaskEncoder()), AugmentTaskEncoder)
    with pytest.raises(TypeError):
        DefaultTaskEncoder[CaptioningSample, CaptioningSample]


def test_a_subclass_need_not_call_init() -> None:
    class Careless(DefaultTaskEncoder):
        def __init__(self, suffix: str):
            self.suffix = suffix

        def encode_batch(self, batch_data: Any) -> Any:
            return [caption + self.suffix for caption in batch_data.caption]

    encoder = Careless("!")
    assert [name for name in METHODS if method_of(encoder, name) is not None] == ["encode_batch"]
    (sample, *_) = samples = captioning_samples()
    assert encoder.encode_sample(sample) is sample
    batch = encoder.batch(samples)
    assert type(batch) is CaptioningSample
    assert batch.image.shape == (4, 3, 2, 5)
    assert encoder.encode_batch(batch)[0] == "rose!"
    assert encoder._batch(samples[:1], Captions).caption == ["rose"]


def test_super_gives_the_default() -> None:
    class Derived(DefaultTaskEncoder):
        def encode_sample(self, sample: Any) -> Any:
            return {**super().encode_sample(sample), "length": len(sample.caption)}

        def batch(self, samples: Any) -> Any:
            return {**super().batch(samples), "number": len(samples)}

        def encode_batch(self, batch_data: Any) -> Any:
            return super().encode_batch(batch_data)

    encoder = Derived(encoded_sample_type=dict, batch_type=dict)
    batch = encoder.batch([encoder.encode_sample(sample) for sample in captioning_samples()])
    assert (batch["length"], batch["number"]) == ([4, 9, 14, 19], 4)
    assert encoder.encode_batch(batch) is batch


def test_the_default_batch_pads_tensors_and_lists_the_rest() -> None:
    for encoder in (DefaultTaskEncoder(), Nothing()):
        batch = encoder.batch(captioning_samples()[:2])
        assert batch.image.shape == (2, 3, 2, 5)
        assert batch.image[0, :, :, 3:].abs().sum() == 0
        assert batch.caption == ["rose", "rose rose"]
        assert batch.__key__ == ["pets/0000", "pets/0001"]


def test_the_default_methods_of_the_protocol_pass_things_on() -> None:
    encoder, (sample, *_) = Nothing(), captioning_samples()
    for name in ("encode_sample", "preencode_sample", "postencode_sample", "encode_batch"):
        assert getattr(encoder, name)(sample) is sample
    assert encoder.batch_group_criterion(sample) == (None, None)


# --- types of samples and batches --------------------------------------------------------------


@edataclass
class EncodedSample(Sample):
    image: torch.Tensor
    tokens: list[int] | None = None


class Pair(NamedTuple):
    image: Any
    caption: Any = "none"


@dataclass(slots=True)
class Slotted:
    caption: Any
    length: int = 0


@dataclass
class WithRest:
    caption: Any
    rest: int = dataclasses.field(init=False, default=5)


@pytest.mark.parametrize(
    "result_type", [EncodedSample, Captions, Pair, Slotted, WithRest, VQASample]
)
@given(
    known=st.dictionaries(st.sampled_from(["caption", "image", "tokens", "more"]), st.integers())
)
def test_conversion_takes_the_fields_that_the_type_has(
    result_type: Any, known: dict[str, int]
) -> None:
    fields = {"__key__": "7", **known}
    parameters = inspect.signature(result_type).parameters
    expected = {name: fields[name] for name in parameters if name in fields}
    if "__keys__" in parameters:
        expected["__keys__"] = "7"
    required = [name for name, p in parameters.items() if p.default is p.empty]

    plain = type("Plain", (), {})()
    vars(plain).update(fields)
    for thing in (fields, CrudeSample(fields), plain):
        if set(required) <= set(expected):
            assert convert(thing, result_type) == result_type(**expected)
        else:
            with pytest.raises(TypeError, match="missing"):
                convert(thing, result_type)


def test_what_fits_is_not_copied() -> None:
    (sample, *_) = captioning_samples()
    assert convert(sample, None) is sample
    assert convert(sample, CaptioningSample) is sample
    assert convert(sample, Sample) is sample
    crude = CrudeSample({"txt": "a"})
    assert convert(crude, dict) is crude


def test_a_dict_gets_all_fields_and_what_the_user_has_set() -> None:
    (sample, *_) = captioning_samples()
    sample.tokens = [1, 2]
    found = convert(sample, dict)
    assert found == {**vars(sample), "tokens": [1, 2]}
    assert convert(sample, EncodedSample).tokens == [1, 2]
    assert convert(sample, EncodedSample).__restore_key__ == (0, 0)
    assert convert(Slotted("a rose", 6), dict) == {"caption": "a rose", "length": 6}
    assert convert(Pair(1, "a rose"), Slotted) == Slotted("a rose")


@pytest.mark.parametrize("result_type", [CaptioningRawBatch, Captions, Pair, Slotted, dict])
def test_converting_a_batch_is_batching_to_that_type(result_type: Any) -> None:
    samples = captioning_samples()
    by_way_of_a_dict = convert(collate(samples, dict), result_type)
    at_once = collate(samples, result_type)
    assert type(by_way_of_a_dict) is type(at_once) is result_type
    assert repr(by_way_of_a_dict) == repr(at_once)


def test_types_are_applied_one_after_the_other() -> None:
    encoder = DefaultTaskEncoder(
        encoded_sample_type=EncodedSample, raw_batch_type=dict, batch_type=CaptioningRawBatch
    )
    samples = captioning_samples()
    encoded = [encoder.encode_sample(sample) for sample in samples]
    assert {type(sample) for sample in encoded} == {EncodedSample}
    raw = encoder.batch([{**vars(sample), "caption": "x"} for sample in encoded])
    assert type(raw) is dict
    assert type(encoder.encode_batch(raw)) is CaptioningRawBatch
    assert type(DefaultTaskEncoder(batch_type=Captions).batch(samples)) is Captions


# --- an encoder around another -----------------------------------------------------------------


class Inner(DefaultTaskEncoder):
    """Tells who was called, and when."""

    def encode_sample(self, sample: Any) -> Any:
        return [*sample, "inner encode"]

    @stateless(failure_tolerance=7)
    def batch(self, samples: Any) -> Any:
        return [*samples, "inner batch"]


class Outer(AugmentTaskEncoder):
    def encode_sample(self, sample: Any) -> Any:
        return [*super().encode_sample([*sample, "before"]), "after"]

    @stateless
    def encode_batch(self, batch_data: Any) -> Any:
        return [*super().encode_batch(batch_data), "outer encode"]


def test_an_augmenting_encoder_goes_before_and_after() -> None:
    encoder = Outer(Inner())
    assert encoder.encode_sample([]) == ["before", "inner encode", "after"]
    assert encoder.batch([]) == ["inner batch"]
    assert encoder.encode_batch([]) == ["outer encode"]
    twice = Outer(encoder)
    assert twice.encode_sample([]) == ["before", "before", "inner encode", "after", "after"]
    for one in (encoder, twice, pickle.loads(pickle.dumps(twice))):
        used = [name for name in METHODS if method_of(one, name) is not None]
        assert used == ["encode_sample", "batch", "encode_batch"]
        assert marks_of(one, "encode_sample") == (True, None)
        assert marks_of(one, "batch") == (False, 7)
        assert marks_of(one, "encode_batch") == (False, None)
        assert method_of(one, "batch")([]) == ["inner batch"]


def test_an_augmenting_encoder_batches_as_the_inner_one() -> None:
    class Relisted(DefaultTaskEncoder):
        def _batch(self, *args: Any, **kwargs: Any) -> Any:
            return "inner", super()._batch(*args, **kwargs)

    for inner in (Relisted(), Nothing(), object()):

        class Own(AugmentTaskEncoder):
            def batch(self, samples: Any) -> Any:
                return self._batch(samples, result_type=Captions, actions={"caption": tuple})

        found = Own(inner).batch(captioning_samples()[:2])
        expected = Captions(["pets/0000", "pets/0001"], ("rose", "rose rose"))
        assert found == (("inner", expected) if isinstance(inner, Relisted) else expected)


def test_an_augmenting_encoder_goes_around_any_object() -> None:
    """An object that has some of the methods is a task encoder."""

    class Duck:
        def encode_sample(self, sample: Any) -> Any:
            yield from [*sample, "duck"]

    encoder = AugmentTaskEncoder(Duck())
    assert [name for name in METHODS if method_of(encoder, name) is not None] == ["encode_sample"]
    assert inspect.isgeneratorfunction(method_of(encoder, "encode_sample"))
    assert list(encoder.encode_sample(["a"])) == ["a", "duck"]
    assert encoder.encode_batch("as it is") == "as it is"
    assert encoder.batch(captioning_samples()[:1]).caption == ["rose"]
    assert (encoder.cookers, encoder.decoder) == ((), None)


# --- crude samples -----------------------------------------------------------------------------


def cook_text(sample: CrudeSample) -> TextSample:
    return TextSample.derive_from(sample, text=sample["txt"])


def cook_pet(sample: CrudeSample, **aux: Any) -> Iterator[TextSample]:
    for name in sample["names"]:
        yield TextSample.derive_from(sample, text=name + aux.get("suffix", ""))


class Cooking(DefaultTaskEncoder):
    cookers = (
        Cooker(cook_text, has_subflavors={"kind": "text"}),
        Cooker(cook_pet, has_subflavors={"kind": "pet"}),
    )


def test_cookers_make_samples_of_crude_ones() -> None:
    crude = [
        CrudeSample({"__key__": "1", "__subflavors__": {"kind": "text"}, "txt": "a rose"}),
        CrudeSample({"__key__": "2", "__subflavors__": {"kind": "pet"}, "names": ["Tom", "Kit"]}),
    ]
    for encoder in (Cooking(), AugmentTaskEncoder(Cooking())):
        found = list(cook(encoder.cookers)(crude))
        assert [(sample.__key__, sample.text) for sample in found] == [
            ("1", "a rose"),
            ("2", "Tom"),
            ("2", "Kit"),
        ]
        pets = encoder.cook_crude_sample(crude[1], Cooking.cookers[1], {"suffix": "!"})
        assert [pet.text for pet in pets] == ["Tom!", "Kit!"]
        assert method_of(encoder, "cook_crude_sample") is None
    with pytest.raises(DatasetError, match="no cooker takes"):
        list(cook(Cooking.cookers)([CrudeSample({"__subflavors__": {"kind": "audio"}})]))


# --- @stateless --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "draws", "tolerance"),
    [
        (lambda fn: fn, True, None),
        (stateless, False, None),
        (stateless(), False, None),
        (stateless(restore_seeds=True), True, None),
        (stateless(restore_seeds=False), False, None),
        (stateless(failure_tolerance=3), False, 3),
        (stateless(restore_seeds=True, failure_tolerance=3), True, 3),
    ],
)
def test_stateless_marks_and_changes_nothing_else(
    mark: Any, draws: bool, tolerance: int | None
) -> None:
    def encode_sample(self: Any, sample: Any) -> Iterator[Any]:
        yield sample

    marked = mark(encode_sample)
    assert marked is encode_sample
    for base in (DefaultTaskEncoder, object):
        derived = type("Derived", (base,), {"encode_sample": marked})
        for encoder in (derived(), type("Again", (derived,), {})(), AugmentTaskEncoder(derived())):
            assert marks_of(encoder, "encode_sample") == (draws, tolerance)
            assert marks_of(encoder, "batch") == (True, None)
            assert list(method_of(encoder, "encode_sample")(1)) == [1]


def test_an_override_does_not_inherit_the_mark() -> None:
    class Again(Inner):
        def batch(self, samples: Any) -> Any:
            return super().batch(samples)

    assert marks_of(Inner(), "batch") == (False, 7)
    assert marks_of(Again(), "batch") == (True, None)
