"""What flows through a pipeline: samples, and the batches made of them.

A sample is a dataclass (or a :class:`CrudeSample`, a dict) of *data fields*, ``image`` or
``caption`` say, and four *bookkeeping fields* that the library fills and carries along:
``__key__``, ``__restore_key__``, ``__subflavors__`` and ``__sources__``.

Shapes are written ``(c, h, w)``. A picture is a float32 tensor in 0..1 of three channels unless
another ``image_decode`` was asked for (then it is what that option gives).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from itertools import chain
from typing import Any, Self, TypeVar, dataclass_transform

import torch

from energon_fn.look.show import png
from energon_fn.look.values import brief

T = TypeVar("T")


class _Shown:
    """Told in a few words, :func:`brief`, and in a notebook shown as a picture if it has one."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Its own, as ``@dataclass`` writes one, which prints tensors, only where it finds none.
        setattr(cls, "__repr__", cls.__repr__)  # noqa: B010 (mypy does not let a method be set)

    def __repr__(self) -> str:
        return brief(self)

    def _repr_png_(self) -> bytes | None:
        return png(self)


@dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
def edataclass(cls: type[T]) -> type[T]:
    """Make a class a dataclass whose fields are all given by keyword.

    A subclass may therefore add required fields after inherited fields with defaults. Its ``repr``
    tells types, shapes and ranges unless it has its own, and a notebook shows its pictures.

    >>> @edataclass
    ... class AudioSample(Sample):
    ...     audio: torch.Tensor
    >>> AudioSample(__key__="a", audio=torch.zeros(2))
    AudioSample('a', audio: float32 (2,) 0)
    """
    for name in ("__repr__", "_repr_png_"):
        if name not in vars(cls) and not issubclass(cls, _Shown):
            setattr(cls, name, getattr(_Shown, name))
    return dataclasses.dataclass(kw_only=True)(cls)


def key_of(item: Any) -> str | None:
    """The key of a sample, or the first and last one of a batch or list; None if there is none.

    >>> a, b = ({"__key__": key} for key in "ab")
    >>> key_of(a), key_of([a, b]), key_of(7)
    ('a', 'a .. b (2)', None)
    """
    # It is asked for every sample, and not for its __dict__, which would have to be made.
    own = item.get("__key__") if isinstance(item, dict) else getattr(item, "__key__", None)
    if isinstance(own, str):
        return own
    if own is None:
        if isinstance(item, list | tuple):
            own = [key for key in map(key_of, item) if key is not None]
        elif hasattr(item, "keys") and isinstance(item, Mapping):
            own = item.get("__key__") or item.get("__keys__")
        else:
            own = getattr(item, "__keys__", None)
    keys = list(own) if isinstance(own, list | tuple) else [own]
    if len(keys) > 1:
        return f"{keys[0]} .. {keys[-1]} ({len(keys)})"
    return keys[0] if keys and isinstance(keys[0], str) else None


@dataclasses.dataclass(slots=True, unsafe_hash=True)  # frozen would take thrice the time to make
class SourceInfo:
    """Where a sample was read from."""

    # The dataset's folder
    dataset_path: str
    # The sample's position in that dataset, or its key
    index: int | str
    # The tar file, relative to the dataset's folder
    shard_name: str
    # The files in that tar which were read for the sample
    file_names: tuple[str, ...]


def _concat(values: Iterable[Iterable[SourceInfo] | None]) -> tuple[SourceInfo, ...] | None:
    known = [value for value in values if value is not None]
    return tuple(chain.from_iterable(known)) if known else None


BOOKKEEPING: dict[str, Callable[[list[Any]], Any]] = {
    "__key__": list,
    "__restore_key__": tuple,
    "__subflavors__": list,
    "__sources__": _concat,
}
"""The bookkeeping fields, and how those of several samples become that of one batch."""


def basic_sample_keys(sample: Any) -> dict[str, Any]:
    """The bookkeeping fields that a sample has, to start another sample with.

    The sample may be a dataclass, any other object with these attributes, or a dict.

    >>> crude = CrudeSample({"__key__": "a", "__restore_key__": (), "txt": "a cat"})
    >>> TextSample(**basic_sample_keys(crude), text=crude["txt"]).__key__
    'a'
    """
    if isinstance(sample, Mapping):
        return {name: sample[name] for name in BOOKKEEPING if name in sample}
    return {name: getattr(sample, name) for name in BOOKKEEPING if hasattr(sample, name)}


def _fields_of(sample: Any) -> dict[str, Any]:
    return {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}


def _inherited(cls: Any, base: Any) -> dict[str, Any]:
    """Those bookkeeping fields of ``base`` that ``cls`` has too."""
    declared = {field.name for field in dataclasses.fields(cls) if field.init}
    return {name: value for name, value in basic_sample_keys(base).items() if name in declared}


@edataclass
class Sample(_Shown):
    """The bookkeeping fields of every sample. Inherit from it and add the data fields."""

    # Unique in its dataset: the path in the tar up to the base name's first dot
    __key__: str
    # How to load exactly this sample again: nested tuples of str and int
    __restore_key__: tuple[Any, ...] = ()
    # The dataset's labels, as its configuration gives them
    __subflavors__: dict[str, Any] | None = None
    # The files that it was made of; several for a joined or packed sample
    __sources__: tuple[SourceInfo, ...] | None = None

    @classmethod
    def derive_from(cls, base_sample: Any, **fields: Any) -> Self:
        """A sample of this type with the bookkeeping of ``base_sample`` and the given fields.

        A given field goes before an inherited one. ``base_sample`` may be of any type, a dict too;
        its data fields are not taken over.

        >>> text = TextSample(__key__="a", __subflavors__={"lang": "en"}, text="a cat")
        >>> vqa = VQASample.derive_from(text, image=torch.zeros(3, 2, 2), context="Which pet?")
        >>> vqa.__key__, vqa.__subflavors__
        ('a', {'lang': 'en'})
        """
        return cls(**{**_inherited(cls, base_sample), **fields})

    @classmethod
    def from_samples(cls, samples: Iterable[Any], **fields: Any) -> Self:
        """A sample of this type made of several, a pack say, with the given fields.

        Its key names all of theirs, restore keys and sources are those of all, the subflavors are
        the first one's.

        >>> texts = [TextSample(__key__=key, text=key * 2) for key in "ab"]
        >>> TextSample.from_samples(texts, text="".join(sample.text for sample in texts))
        TextSample('a,b', text: 'aabb')
        """
        known = [basic_sample_keys(sample) for sample in samples]
        packed = {
            "__key__": ",".join(str(one.get("__key__")) for one in known),
            "__restore_key__": tuple(one.get("__restore_key__") for one in known),
            "__subflavors__": known[0].get("__subflavors__") if known else None,
            "__sources__": tuple(s for one in known for s in one.get("__sources__") or ()),
        }
        return cls(**{**_inherited(cls, packed), **fields})

    @classmethod
    def from_joined(cls, *samples: Any, **named: Any) -> Self:
        """A sample of this type of those that a join puts together, one of each dataset.

        As it is here, it has all their data fields, a later one's before an earlier one's; key and
        subflavors of the first, the sources of all. None, which stands for a missing sample, is
        passed over. For anything else write this method in your sample type: static or of the
        class, with a parameter for each dataset (of its name, if the datasets are joined by name).

        >>> picture = ImageSample(__key__="a", image=torch.zeros(3, 2, 2))
        >>> label = ImageClassificationSample(__key__="a", image=torch.ones(3, 1, 1), label=7)
        >>> ImageClassificationSample.from_joined(label, picture)
        ImageClassificationSample('a', image: float32 (3, 2, 2) 0, label: 7, None: label_name)
        """
        if named:
            raise TypeError(
                f"{cls.__name__} has no from_joined for datasets by name ({', '.join(named)}): "
                "write one, or join a list of datasets"
            )
        values: dict[str, Any] = {}
        for sample in samples:
            if sample is not None:
                own = sample if isinstance(sample, Mapping) else _fields_of(sample)
                values |= {name: own[name] for name in own if name not in BOOKKEEPING}
        sources = _concat(basic_sample_keys(sample).get("__sources__") for sample in samples)
        try:
            return cls.derive_from(samples[0], __sources__=sources, **values)
        except TypeError as error:
            raise TypeError(
                f"{error}. The joined samples have {', '.join(values)}: write a from_joined that "
                "says what becomes of them, in a sample type of your own"
            ) from error


@edataclass
class CaptioningSample(Sample):
    """A picture and what is said of it."""

    # (c, h, w)
    image: torch.Tensor
    # The whole caption
    caption: str


@edataclass
class ImageSample(Sample):
    """A picture alone."""

    # (c, h, w)
    image: torch.Tensor


@edataclass
class ImageClassificationSample(Sample):
    """A picture and its class."""

    # (c, h, w)
    image: torch.Tensor
    # The class, counted from 0
    label: int | None = None
    # The class by name
    label_name: str | None = None


@edataclass
class InterleavedSample(Sample):
    """Texts and pictures in reading order."""

    # Pictures (c, h, w) and texts
    sequence: list[torch.Tensor | str]


@edataclass
class SimilarityInterleavedSample(Sample):
    """Texts and pictures whose order is given by how well they match."""

    # n pictures (c, h, w)
    images: list[torch.Tensor]
    # m texts
    texts: list[str]
    # Sounds, as the decoder gives them
    audio: list[torch.Tensor] | None = None
    # Videos, as the decoder gives them
    video: list[torch.Tensor] | None = None
    # (n, m) float, how well picture i matches text j
    similarity_matrix: torch.Tensor | None = None
    # n numbers: the text that picture i belongs to
    matched_text_indices: list[int] | None = None


@edataclass
class MultiChoiceVQASample(Sample):
    """A picture, a question, and answers to choose from."""

    # (c, h, w)
    image: torch.Tensor
    # The question
    context: str
    # The answers offered
    choices: list[str] | None = None
    # Which of them is right, counted from 0
    correct_choice_idx: int | None = None


@edataclass
class OCRSample(Sample):
    """A picture of text, and the text; where known, the place of each block, line, word, character.

    Boxes are (n, 4): x, y, width, height; or (n, 5): a confidence besides.
    """

    # (c, h, w)
    image: torch.Tensor
    # All the text in the picture
    text: str
    # (blocks, 4) or (blocks, 5), x, y, width, height, confidence
    block_boxes: torch.Tensor | None = None
    # (blocks,) int64, or a name for each block
    block_classes: torch.Tensor | list[str] | None = None
    # The text of each block
    block_text: list[str] | None = None
    # (lines, 4) or (lines, 5), x, y, width, height, confidence
    lines_boxes: torch.Tensor | None = None
    # The text of each line
    lines_text: list[str] | None = None
    # (words, 4) or (words, 5), x, y, width, height, confidence
    words_boxes: torch.Tensor | None = None
    # The text of each word
    words_text: list[str] | None = None
    # (chars, 4) or (chars, 5), x, y, width, height, confidence
    chars_boxes: torch.Tensor | None = None
    # Each character
    chars_text: list[str] | None = None


@edataclass
class TextSample(Sample):
    """A text alone."""

    # The whole text
    text: str


@edataclass
class VQASample(Sample):
    """A picture, a question on it, and answers."""

    # (c, h, w)
    image: torch.Tensor
    # The question
    context: str
    # n possible answers
    answers: list[str] | None = None
    # (n,) float, the weight of each answer
    answer_weights: torch.Tensor | None = None


@edataclass
class VQAOCRSample(Sample):
    """A picture with text in it, a question on it, and answers."""

    # (c, h, w)
    image: torch.Tensor
    # The question
    context: str
    # All the text in the picture
    text: str
    # n possible answers
    answers: list[str] | None = None
    # (n,) float, the weight of each answer
    answer_weights: torch.Tensor | None = None
    # (words, 4) or (words, 5), x, y, width, height, confidence
    words_boxes: torch.Tensor | None = None
    # The text of each word
    words_text: list[str] | None = None


@edataclass
class VidQASample(Sample):
    """A video, a question on it, and answers."""

    # What the decoder gives: the file's bytes unless there is one for it
    video: Any
    # The question
    context: str
    # n possible answers
    answers: list[str] | None = None
    # (n,) float, the weight of each answer
    answer_weights: torch.Tensor | None = None


class CrudeSample(_Shown, dict[str, Any]):
    """A sample as it lies in the tar: part name -> decoded part, and the bookkeeping fields."""

    def __getattr__(self, name: str) -> Any:
        parts = [part for part in self if not part.startswith("__")]
        raise AttributeError(
            f"a crude sample has no attribute {name!r}; it is a dict with the parts "
            f"{', '.join(parts)}: sample['json'], say. For samples with fields write a cooker (see "
            "Cooker), or prepare the dataset with a sample type (energon-fn prepare)."
        )


SAMPLE_TYPES: dict[str, type] = {
    sample_type.__name__: sample_type
    for sample_type in (
        CaptioningSample,
        ImageSample,
        ImageClassificationSample,
        InterleavedSample,
        SimilarityInterleavedSample,
        MultiChoiceVQASample,
        OCRSample,
        TextSample,
        VQASample,
        VQAOCRSample,
        VidQASample,
        CrudeSample,
    )
}
"""The sample types by name: names in a dataset's files are looked up here, not imported."""


@edataclass
class Batch(_Shown):
    """The bookkeeping fields of a batch. Inherit from it and add the data fields.

    Inheriting is not needed: any dataclass, namedtuple or dict can be a batch. It brings
    :meth:`pin_memory`, :meth:`to_device`, :meth:`derive_from` and :meth:`from_samples`.
    """

    # The samples' keys, in order
    __key__: list[str]
    # The samples' restore keys, in order
    __restore_key__: tuple[Any, ...] = ()
    # The samples' subflavors, in order
    __subflavors__: list[dict[str, Any] | None] | None = None
    # The samples' sources, one after the other
    __sources__: tuple[SourceInfo, ...] | None = None

    @classmethod
    def derive_from(cls, base_batch: Any, **fields: Any) -> Self:
        """A batch of this type with the bookkeeping of ``base_batch`` and the given fields.

        >>> Batch.derive_from(Batch(__key__=["a", "b"]), __subflavors__=[{}, {}]).__subflavors__
        [{}, {}]
        """
        return cls(**{**_inherited(cls, base_batch), **fields})

    @classmethod
    def from_samples(cls, samples: Iterable[Any], **fields: Any) -> Self:
        """A batch of this type with the collected bookkeeping of ``samples`` and the given fields.

        A bookkeeping field that not every sample has is left at its default.

        >>> @edataclass
        ... class TextBatch(Batch):
        ...     lengths: torch.Tensor
        >>> samples = [TextSample(__key__=k, text=k * 3) for k in "ab"]
        >>> TextBatch.from_samples(samples, lengths=torch.tensor([len(s.text) for s in samples]))
        TextBatch('a' .. 'b' (2), lengths: int64 (2,) 3)
        """
        known = [basic_sample_keys(sample) for sample in samples]
        collected = {
            name: join([sample[name] for sample in known])
            for name, join in BOOKKEEPING.items()
            if all(name in sample for sample in known)
        }
        return cls(**{**_inherited(cls, collected), **fields})

    def pin_memory(self) -> Self:
        """This batch with every tensor in pinned memory, however deeply it is nested.

        Goes through dicts, lists, tuples, namedtuples and dataclasses; an object with a
        ``pin_memory`` of its own is asked. As with a tensor's ``pin_memory``, what needs no change
        is not copied, and without an accelerator it is torch that decides (it raises).
        """
        # Not map_nested: that would ask this very method.
        pinned: Self = _map_inside(_pin, self)
        return pinned

    def to_device(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """This batch with every tensor on ``device``; what is there already is not copied.

        Goes where :meth:`pin_memory` goes; an object that has a ``pin_memory`` is asked for its
        ``to`` or ``to_device``.

        >>> @edataclass
        ... class ImageBatch(Batch):
        ...     image: torch.Tensor
        >>> ImageBatch(__key__=["a"], image=torch.zeros(1, 3, 2, 2)).to_device("meta").image.device
        device(type='meta')
        """

        def move(value: Any) -> Any:
            if not _has_pin_memory(value):
                return NotImplemented
            if isinstance(value, Batch):
                return value.to_device(device, non_blocking)
            own = getattr(value, "to", None) or getattr(value, "to_device", None)
            return NotImplemented if own is None else own(device, non_blocking=non_blocking)

        moved: Self = _map_inside(move, self)
        return moved


def _has_pin_memory(value: Any) -> bool:
    # The mark of what torch can move: a NumPy array has a to_device too, but of another meaning.
    return hasattr(value, "pin_memory") and not isinstance(value, type)


def _pin(value: Any) -> Any:
    return value.pin_memory() if _has_pin_memory(value) else NotImplemented


def pin_memory(batch: T) -> T:
    """Any batch with its tensors in pinned memory, as :meth:`Batch.pin_memory` does it.

    Unlike torch's own pinning it also goes into dataclasses that do not derive from :class:`Batch`.

    >>> pin_memory({"text": ["a rose"]})
    {'text': ['a rose']}
    """
    pinned: T = map_nested(_pin, batch)
    return pinned


def map_nested(leaf: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with everything inside it replaced by what ``leaf`` gives for it.

    ``leaf(x)`` returns the replacement of ``x``, or ``NotImplemented`` to have the function look
    inside ``x``: into mappings, lists, tuples, namedtuples and dataclasses. The containers are
    copied, keeping their type, where something in them changes, and otherwise kept as they are.
    Bookkeeping fields are not looked into.

    >>> map_nested(lambda x: x + 1 if isinstance(x, int) else NotImplemented, {"a": [1, (2, "b")]})
    {'a': [2, (3, 'b')]}
    """
    result = leaf(value)
    return _map_inside(leaf, value) if result is NotImplemented else result


def _map_inside(leaf: Callable[[Any], Any], value: Any) -> Any:
    parts: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        # The declared fields, and what the user has set besides.
        names = {f.name: None for f in dataclasses.fields(value)} | getattr(value, "__dict__", {})
        parts = [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    else:
        return value

    changed: dict[Any, Any] = {}
    for name, old in parts:
        new = old if name in BOOKKEEPING else map_nested(leaf, old)
        if new is not old:
            changed[name] = new
    if not changed:
        return value

    if isinstance(value, tuple):
        items = [changed.get(i, old) for i, old in enumerate(value)]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        make: Any = type(value)
        return make({**value, **changed})
    # A copy and not a new object: that keeps a subclass's own attributes, and runs no __init__.
    clone = copy.copy(value)
    for name, new in changed.items():
        if isinstance(clone, (list, MutableMapping)):
            clone[name] = new
        else:
            object.__setattr__(clone, name, new)  # works on a frozen dataclass too
    return clone
