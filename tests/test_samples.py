"""Sample types carry their bookkeeping; a batch reaches every tensor that it holds."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from energon_fn.samples import (
    BOOKKEEPING,
    SAMPLE_TYPES,
    Batch,
    CaptioningSample,
    CrudeSample,
    ImageClassificationSample,
    Sample,
    SourceInfo,
    TextSample,
    VQASample,
    basic_sample_keys,
    edataclass,
    map_nested,
)

SOURCE_A = SourceInfo("/data/cats", 3, "0.tar", ("a.jpg", "a.txt"))
SOURCE_B = SourceInfo("/data/dogs", "b", "1.tar", ("b.jpg",))


def text_sample(key: str, **bookkeeping: Any) -> TextSample:
    return TextSample(__key__=key, text=f"text of {key}", **bookkeeping)


# ----------------------------------------------------------------------------- as they are told


@edataclass
class Pictures(Batch):
    images: torch.Tensor
    texts: list[str]


@dataclass
class OwnDataclass(Sample):
    tokens: torch.Tensor


@edataclass
class NoSample:
    tokens: torch.Tensor


@dataclass
class OwnWords(Sample):
    def __repr__(self) -> str:
        return "my own words"


@edataclass
class InheritsWords(OwnWords):
    tokens: torch.Tensor


def test_repr_tells_types_shapes_and_ranges_and_no_numbers() -> None:
    tokens = torch.arange(1000)
    told = "tokens: int64 (1000,) 0..999"
    assert repr(OwnDataclass(tokens, __key__="a")) == f"OwnDataclass('a', {told})"
    assert repr(NoSample(tokens=tokens)) == f"NoSample({told})"
    assert repr(CrudeSample(__key__="a", jpg=b"x" * 5000)) == "CrudeSample('a', jpg: 5.0 kB)"
    batch = Pictures(__key__=["a", "b"], images=torch.ones(2, 3, 9, 9), texts=["a cat", "a dog"])
    assert f"{batch}" == (
        "Pictures('a' .. 'b' (2), images: float32 (2, 3, 9, 9) 1, texts: [\"a cat\", \"a dog\"])"
    )


def test_repr_that_a_class_has_of_its_own_stays() -> None:
    assert repr(OwnWords(__key__="a")) == "my own words"
    assert repr(InheritsWords(__key__="a", tokens=torch.ones(2))) == "my own words"

    @edataclass
    class Mine:
        x: int

        def __repr__(self) -> str:
            return f"x is {self.x}"

    assert repr(Mine(x=3)) == "x is 3"


def test_repr_of_what_is_not_all_there() -> None:
    sample = OwnDataclass.__new__(OwnDataclass)
    assert repr(sample) == "OwnDataclass()"
    del (half := text_sample("a")).text
    assert repr(half) == "TextSample('a')"


def test_a_notebook_shows_pictures_beside_the_text() -> None:
    formatter = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    for shown in (
        CaptioningSample(__key__="a", image=torch.rand(3, 9, 9), caption="a cat"),
        Pictures(__key__=["a"], images=torch.rand(1, 3, 9, 9), texts=["a cat"]),
        NoSample(tokens=torch.rand(3, 9, 9)),
        CrudeSample(__key__="a", jpg=torch.rand(3, 9, 9)),
    ):
        data, _ = formatter.format(shown)
        assert data["text/plain"].replace("\n", "") == repr(shown).replace("\n", "")
        assert data["image/png"].startswith(b"\x89PNG")
    data, _ = formatter.format(text_sample("a"))
    assert data.keys() == {"text/plain"}


# ----------------------------------------------------------------------------- declaring types


def test_fields_are_given_by_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        TextSample("a", "text")


def test_edataclass_adds_required_fields_after_defaults() -> None:
    @edataclass
    class Audio(ImageClassificationSample):
        audio: torch.Tensor

    sample = Audio(__key__="a", image=torch.zeros(3, 1, 1), audio=torch.zeros(2))
    assert (sample.label, sample.audio.shape) == (None, (2,))
    with pytest.raises(TypeError, match="audio"):
        Audio(__key__="a", image=torch.zeros(3, 1, 1))


def test_plain_dataclass_subclass_takes_its_own_fields_by_position() -> None:
    @dataclass
    class Audio(Sample):
        audio: str
        rate: int = 16_000

    @dataclass
    class AudioBatch(Batch):
        audio: list[str]

    sample = Audio("beep", 8_000, __key__="a")
    assert (sample.audio, sample.rate, sample.__key__) == ("beep", 8_000, "a")
    assert Audio.derive_from(sample, audio="x") == Audio("x", __key__="a")
    assert AudioBatch.from_samples([sample], audio=["beep"]).audio == ["beep"]


def test_users_may_set_attributes() -> None:
    sample = text_sample("a")
    sample.text = "other"
    sample.tokens = [1, 2]
    assert (sample.text, sample.tokens) == ("other", [1, 2])


DOCUMENTED_FIELDS = {
    "CaptioningSample": "image caption",
    "ImageSample": "image",
    "ImageClassificationSample": "image label? label_name?",
    "InterleavedSample": "sequence",
    "SimilarityInterleavedSample": "images texts audio? video? similarity_matrix? "
    "matched_text_indices?",
    "MultiChoiceVQASample": "image context choices? correct_choice_idx?",
    "OCRSample": "image text block_boxes? block_classes? block_text? lines_boxes? lines_text? "
    "words_boxes? words_text? chars_boxes? chars_text?",
    "TextSample": "text",
    "VQASample": "image context answers? answer_weights?",
    "VQAOCRSample": "image context text answers? answer_weights? words_boxes? words_text?",
    "VidQASample": "video context answers? answer_weights?",
}
BOOKKEEPING_FIELDS = "__key__ __restore_key__? __subflavors__? __sources__?"


@pytest.mark.parametrize("name", DOCUMENTED_FIELDS)
def test_sample_types_have_the_documented_fields(name: str) -> None:
    fields = dataclasses.fields(SAMPLE_TYPES[name])
    found = [f.name + "?" * (f.default is not dataclasses.MISSING) for f in fields]
    assert " ".join(found) == f"{BOOKKEEPING_FIELDS} {DOCUMENTED_FIELDS[name]}"


def test_the_table_holds_every_sample_type_by_its_name() -> None:
    assert SAMPLE_TYPES.keys() == DOCUMENTED_FIELDS.keys() | {"CrudeSample"}
    assert all(name == kind.__name__ for name, kind in SAMPLE_TYPES.items())
    assert isinstance(CrudeSample(), dict)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_samples_survive_the_way_between_processes(way: Any) -> None:
    sample = text_sample("a", __restore_key__=("x", 1), __sources__=(SOURCE_A,))
    crude = CrudeSample({"__key__": "a", "txt": "a cat"})
    assert way(sample) == sample
    assert way(crude) == crude
    assert type(way(crude)) is CrudeSample


# ----------------------------------------------------------------------------------- bookkeeping


@given(
    st.text(),
    st.tuples(st.text(), st.integers()),
    st.none() | st.dictionaries(st.text(), st.integers()),
    st.none() | st.just((SOURCE_A, SOURCE_B)),
)
def test_derive_from_keeps_bookkeeping_and_nothing_else(
    key: str, restore_key: Any, subflavors: Any, sources: Any
) -> None:
    base = VQASample(
        __key__=key,
        __restore_key__=restore_key,
        __subflavors__=subflavors,
        __sources__=sources,
        image=torch.zeros(3, 1, 1),
        context="?",
        answers=["yes"],
    )
    derived = VQASample.derive_from(base, image=torch.ones(3, 1, 1), context="!")
    assert basic_sample_keys(derived) == basic_sample_keys(base)
    assert (derived.context, derived.answers) == ("!", None)
    assert (base.context, base.answers) == ("?", ["yes"])


def test_derive_from_a_crude_sample_and_from_a_type_with_fewer_fields() -> None:
    @dataclass
    class Small:
        __key__: str

    crude = CrudeSample({"__key__": "a", "__subflavors__": {"n": 1}, "txt": "a cat"})
    assert TextSample.derive_from(crude, text=crude["txt"]) == TextSample(
        __key__="a", __subflavors__={"n": 1}, text="a cat"
    )
    assert TextSample.derive_from(Small("b"), text="t") == TextSample(__key__="b", text="t")


def test_derive_from_to_a_subclass_that_cannot_take_all_bookkeeping() -> None:
    @edataclass
    class Fixed(Sample):
        __subflavors__: dict[str, Any] | None = dataclasses.field(default=None, init=False)

    base = text_sample("a", __subflavors__={"n": 1}, __restore_key__=(1,))
    derived = Fixed.derive_from(base)
    assert (derived.__restore_key__, derived.__subflavors__) == ((1,), None)


def test_a_given_field_goes_before_an_inherited_one() -> None:
    assert TextSample.derive_from(text_sample("a"), __key__="z", text="t").__key__ == "z"
    assert Batch.derive_from(Batch(__key__=["a"]), __key__=["z"]).__key__ == ["z"]
    assert Batch.from_samples([text_sample("a")], __key__=["z"]).__key__ == ["z"]


def test_unknown_and_missing_fields_are_type_errors() -> None:
    base, batch = text_sample("a"), Batch(__key__=["a"])
    with pytest.raises(TypeError, match="txet"):
        TextSample.derive_from(base, txet="t")
    with pytest.raises(TypeError, match="text"):
        TextSample.derive_from(base)
    with pytest.raises(TypeError, match="imgs"):
        Batch.derive_from(batch, imgs=1)
    with pytest.raises(TypeError, match="imgs"):
        Batch.from_samples([base], imgs=1)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.text(max_size=3),
            st.tuples(st.integers()),
            st.none() | st.just({"n": 1}),
            st.none() | st.lists(st.sampled_from([SOURCE_A, SOURCE_B]), max_size=2).map(tuple),
        )
    )
)
def test_from_samples_collects_bookkeeping_in_order(rows: list[Any]) -> None:
    samples = [
        text_sample(key, __restore_key__=restore, __subflavors__=flavors, __sources__=sources)
        for key, restore, flavors, sources in rows
    ]
    batch = Batch.from_samples(samples)
    assert batch.__key__ == [row[0] for row in rows]
    assert batch.__restore_key__ == tuple(row[1] for row in rows)
    assert batch.__subflavors__ == [row[2] for row in rows]
    expected: list[SourceInfo] = []
    for row in rows:
        expected += row[3] or ()
    if all(row[3] is None for row in rows):
        assert batch.__sources__ is None
    else:
        assert batch.__sources__ == tuple(expected)


def test_from_samples_takes_what_all_the_samples_have() -> None:
    @dataclass
    class Small:
        __key__: str
        text: str

    samples = [Small("a", "x"), {"__key__": "b", "__subflavors__": {}}]
    batch = Batch.from_samples(iter(samples))
    assert (batch.__key__, batch.__restore_key__, batch.__subflavors__) == (["a", "b"], (), None)


# ------------------------------------------------------------------------------ pin and to_device


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True)
class Frozen:
    inner: Any


@dataclass(slots=True)
class Slotted:
    inner: Any


class OwnList(list[Any]):
    """A list with an attribute of its own."""


class OwnPinning:
    """Neither a tensor nor a container, but it knows how to pin and to move itself."""

    def __init__(self, done: tuple[Any, ...] = ()) -> None:
        self.done = done

    def pin_memory(self) -> OwnPinning:
        return OwnPinning((*self.done, "pinned"))

    def to(self, device: Any, non_blocking: bool = False) -> OwnPinning:
        return OwnPinning((*self.done, device, non_blocking))


@edataclass
class AnyBatch(Batch):
    value: Any


# Each builds a container around the value given.
CONTAINERS: dict[str, Any] = {
    "dict": lambda x: {"other": "text", "key": x},
    "OrderedDict": lambda x: OrderedDict(a=1, key=x),
    "defaultdict": lambda x: defaultdict(list, key=x),
    "read-only mapping": lambda x: MappingProxyType({"key": x}),
    "CrudeSample": lambda x: CrudeSample(__key__="a", jpg=x),
    "list": lambda x: ["text", x, None],
    "list subclass": lambda x: OwnList([x]),
    "tuple": lambda x: (1, x),
    "namedtuple": lambda x: Pair(2.5, x),
    "dataclass": lambda x: ImageClassificationSample(__key__="a", image=x, label=3),
    "frozen dataclass": Frozen,
    "slotted dataclass": Slotted,
    "batch": lambda x: AnyBatch(__key__=["a"], value=x),
}


def leaves(value: Any) -> list[Any]:
    """What lies in these containers, written down independently of the code under test."""
    if isinstance(value, (dict, MappingProxyType)):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    if dataclasses.is_dataclass(value):
        return [leaf for f in dataclasses.fields(value) for leaf in leaves(getattr(value, f.name))]
    return [value]


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning as it can be seen without an accelerator: the pinned tensor is marked."""

    def pin_memory(self: torch.Tensor) -> torch.Tensor:
        pinned = self.clone()
        pinned.is_marked = True
        return pinned

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)


def is_marked(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "is_marked")


@pytest.mark.usefixtures("pinning")
@pytest.mark.parametrize("outer", CONTAINERS)
@pytest.mark.parametrize("inner", CONTAINERS)
def test_every_nested_tensor_is_pinned_and_the_types_are_kept(outer: str, inner: str) -> None:
    tensor = torch.arange(3)
    value = CONTAINERS[outer](CONTAINERS[inner](tensor))
    batch = AnyBatch(__key__=["a"], value=value)
    pinned = batch.pin_memory()

    assert type(pinned) is AnyBatch
    assert type(pinned.value) is type(value)
    assert [type(leaf) for leaf in leaves(pinned)] == [type(leaf) for leaf in leaves(batch)]
    (found,) = tensors(pinned.value)
    assert is_marked(found)
    assert found.tolist() == [0, 1, 2]
    # The batch that was given is as it was.
    assert batch.value is value
    (still,) = tensors(batch.value)
    assert still is tensor


@pytest.mark.parametrize("outer", CONTAINERS)
@pytest.mark.parametrize("inner", CONTAINERS)
def test_every_nested_tensor_is_moved(outer: str, inner: str) -> None:
    batch = AnyBatch(__key__=["a"], value=CONTAINERS[outer](CONTAINERS[inner](torch.arange(3))))
    moved = batch.to_device("meta")
    assert [t.device.type for t in tensors(moved)] == ["meta"]
    assert [t.device.type for t in tensors(batch)] == ["cpu"]
    assert [type(leaf) for leaf in leaves(moved)] == [type(leaf) for leaf in leaves(batch)]


NESTED = st.recursive(
    st.none() | st.integers() | st.text(max_size=2) | st.builds(lambda: torch.zeros(1)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.builds(Pair, inner, inner)
        | st.builds(Frozen, inner)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(NESTED)
def test_moving_changes_tensors_and_only_tensors(value: Any) -> None:
    batch = AnyBatch(__key__=["a"], value=value)
    moved = leaves(batch.to_device("meta").value)
    before = leaves(value)
    assert len(moved) == len(before)
    for new, old in zip(moved, before, strict=True):
        if isinstance(old, torch.Tensor):
            assert (new.device.type, new.shape) == ("meta", old.shape)
        else:
            assert new is old
    assert batch.to_device("cpu") is batch


def test_to_device_hands_device_and_non_blocking_on() -> None:
    own, inner = OwnPinning(), AnyBatch(__key__=["i"], value=OwnPinning())
    moved = AnyBatch(__key__=["a"], value=[own, inner]).to_device("somewhere", non_blocking=True)
    assert moved.value[0].done == ("somewhere", True)
    assert moved.value[1].value.done == ("somewhere", True)


def test_an_object_with_its_own_pinning_is_asked() -> None:
    class Special(AnyBatch):
        def pin_memory(self) -> Special:
            return dataclasses.replace(self, value="pinned by itself")

    batch = AnyBatch(
        __key__=["a"], value={"own": OwnPinning(), "batch": Special(__key__=["s"], value=1)}
    )
    pinned = batch.pin_memory().value
    assert pinned["own"].done == ("pinned",)
    assert (type(pinned["batch"]), pinned["batch"].value) == (Special, "pinned by itself")


@pytest.mark.usefixtures("pinning")
def test_an_overridden_pin_memory_can_call_the_inherited_one() -> None:
    class Extended(AnyBatch):
        def pin_memory(self) -> Extended:
            pinned = super().pin_memory()
            pinned.value.append("extra")
            return pinned

    pinned = Extended(__key__=["a"], value=[torch.zeros(1)]).pin_memory()
    assert is_marked(pinned.value[0])
    assert pinned.value[1:] == ["extra"]


@pytest.mark.usefixtures("pinning")
def test_attributes_beside_the_fields_are_pinned_too_and_kept() -> None:
    batch = AnyBatch(__key__=["a"], value=OwnList([torch.zeros(1)]))
    batch.extra = torch.ones(1)
    batch.value.note = "kept"
    pinned = batch.pin_memory()
    assert is_marked(pinned.extra)
    assert pinned.value.note == "kept"


@pytest.mark.usefixtures("pinning")
def test_a_field_that_was_never_set_and_init_are_left_alone() -> None:
    @edataclass
    class Lazy(Batch):
        image: torch.Tensor
        tokens: Any = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            self.image = self.image + 1

    pinned = Lazy(__key__=["a"], image=torch.zeros(1)).pin_memory()
    assert pinned.image.item() == 1
    assert is_marked(pinned.image)
    assert not hasattr(pinned, "tokens")


def test_classes_arrays_texts_and_bookkeeping_are_left_as_they_are() -> None:
    batch = AnyBatch(
        __key__=["a"],
        __sources__=(SOURCE_A,),
        value=[AnyBatch, OwnPinning, np.zeros(2), "text", b"bytes", range(3), torch.Size([1])],
    )
    assert batch.pin_memory() is batch
    assert batch.to_device("meta") is batch


def test_a_packed_sequence_is_moved_as_a_whole() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(1)])
    moved = AnyBatch(__key__=["a"], value=packed).to_device(torch.device("meta")).value
    assert moved.data.device.type == "meta"
    assert moved.batch_sizes.device.type == "cpu"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="pinning works here")
def test_without_an_accelerator_torch_decides() -> None:
    def outcome(pin: Any) -> type | None:
        try:
            pin()
        except Exception as error:
            return type(error)
        return None

    tensor = torch.zeros(1)
    batch = AnyBatch(__key__=["a"], value=tensor)
    assert outcome(batch.pin_memory) == outcome(tensor.pin_memory)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_tensors_are_pinned_and_moved() -> None:
    batch = AnyBatch(__key__=["a"], value={"x": [torch.arange(3)]})
    pinned = batch.pin_memory()
    assert pinned.value["x"][0].is_pinned()
    moved = pinned.to_device("cuda", non_blocking=True).value["x"][0]
    assert (moved.device.type, moved.tolist()) == ("cuda", [0, 1, 2])


def test_torch_finds_the_pinning_of_a_batch() -> None:
    class Asked(AnyBatch):
        def pin_memory(self) -> Asked:
            return dataclasses.replace(self, value="asked")

    pinned = torch.utils.data._utils.pin_memory.pin_memory([Asked(__key__=["a"], value=1)])
    assert pinned[0].value == "asked"


def test_map_nested_replaces_what_leaf_takes_and_keeps_the_rest() -> None:
    untouched = {"b": ["x"]}
    value = {"a": (1, Pair(2, "x")), "keep": untouched, "__key__": 5}
    result = map_nested(lambda x: x * 10 if isinstance(x, int) else NotImplemented, value)
    assert result == {"a": (10, Pair(20, "x")), "keep": untouched, "__key__": 5}
    assert result["keep"] is untouched
    assert value["a"] == (1, Pair(2, "x"))


def test_bookkeeping_names_the_fields_of_sample_and_batch() -> None:
    assert list(BOOKKEEPING) == [f.name for f in dataclasses.fields(Sample)]
    assert list(BOOKKEEPING) == [f.name for f in dataclasses.fields(Batch)]
    assert basic_sample_keys(CaptioningSample(__key__="a", image=torch.zeros(1), caption="c")) == {
        "__key__": "a",
        "__restore_key__": (),
        "__subflavors__": None,
        "__sources__": None,
    }
