"""The task encoder: a class whose methods say how raw samples become training batches.

This is the documented way to write a pipeline, and only a thin adapter:
:func:`energon_fn.pipeline.lifts` maps the methods that a user has overridden to the functions of
:mod:`energon_fn.stages`. A method that is not overridden is not called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, cast, overload

from energon_fn.collation import collate, generic_batch
from energon_fn.position import here
from energon_fn.samples import CrudeSample
from energon_fn.stages import Cooker

T_sample = TypeVar("T_sample", contravariant=True)
T_encoded_sample = TypeVar("T_encoded_sample")
T_raw_batch = TypeVar("T_raw_batch")
T_batch = TypeVar("T_batch", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])


class TaskEncoder(Protocol[T_sample, T_encoded_sample, T_raw_batch, T_batch]):
    """The methods of a task encoder, each with its default. An object that has some of them is one.

    Any of them may be a generator and yield none to many results, and may raise
    :class:`~energon_fn.SkipSample`. ``encode_sample`` and the pair ``preencode_sample``,
    ``postencode_sample`` exclude each other.
    """

    cookers: ClassVar[Sequence[Cooker]] = ()
    decoder: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    @property
    def current_sample_index(self) -> int:
        """The number of the sample at hand, counted over all lanes; it grows by lanes in each."""
        return here.sample_index

    @property
    def current_batch_index(self) -> int:
        """The number of the batch being made, in the order in which all ranks get them.

        Exact in ``batch`` and ``encode_batch``. Samples that wait for others (to be packed or
        grouped, or of a generator) are made again on a resume, for a later batch then.
        """
        return here.batch_index

    def cook_crude_sample(self, sample: CrudeSample, cooker: Cooker, aux: dict[str, Any]) -> Any:
        """Make a sample of a crude one, by the cooker that was found for it."""
        return cooker.cook(sample, **aux)

    def encode_sample(self, sample: T_sample) -> T_encoded_sample | Iterator[T_encoded_sample]:
        """Transform a sample: augment, tokenize, ..."""
        return cast("T_encoded_sample", sample)

    def preencode_sample(self, sample: T_sample) -> Any:
        """The first half of ``encode_sample``: what packing needs to know, its length say."""
        return sample

    def postencode_sample(self, sample: Any) -> T_encoded_sample | Iterator[T_encoded_sample]:
        """The second half of ``encode_sample``, which only selected samples go through."""
        return cast("T_encoded_sample", sample)

    def select_samples_to_pack(
        self, samples: list[T_encoded_sample]
    ) -> list[list[T_encoded_sample]]:
        """Select the groups of samples that are to be packed to one each.

        :mod:`energon_fn.packing` has functions that do. A
        :class:`~energon_fn.PackedSamplesOutput` can give samples back to the buffer.
        """
        raise TypeError("packing needs select_samples_to_pack: override it.")

    def pack_selected_samples(self, samples: list[T_encoded_sample]) -> T_encoded_sample:
        """Pack a group of samples to one."""
        raise TypeError("packing needs pack_selected_samples: override it.")

    def batch_group_criterion(self, sample: T_encoded_sample) -> tuple[Hashable, int | None]:
        """``(key, batch size or None)``: only samples of the same key share a batch."""
        return None, None

    def batch(self, samples: list[T_encoded_sample]) -> T_raw_batch:
        """Collate samples to a batch: tensors padded and stacked, everything else listed."""
        return cast("T_raw_batch", collate(samples))

    def encode_batch(self, batch_data: T_raw_batch) -> T_batch | Iterator[T_batch]:
        """Transform a batch: tokenize all texts at once, ..."""
        return cast("T_batch", batch_data)


class DefaultTaskEncoder(TaskEncoder[T_sample, T_encoded_sample, T_raw_batch, T_batch]):
    """What to derive a task encoder from; works as it is.

    encoded_sample_type, raw_batch_type, batch_type: the types that the default ``encode_sample``,
    ``batch`` and ``encode_batch`` give: a dataclass, whose fields are taken from what comes in, or
    dict. None keeps the type that comes in. Without a ``raw_batch_type``, ``batch`` gives
    ``batch_type``.

    >>> from energon_fn import TextSample
    >>> class Upper(DefaultTaskEncoder):
    ...     def encode_sample(self, sample):
    ...         sample.text = sample.text.upper()
    ...         return sample
    >>> encoder = Upper(batch_type=dict)
    >>> encoder.batch([encoder.encode_sample(TextSample(__key__="1", text="a rose"))])["text"]
    ['A ROSE']
    """

    # On the class, so that a subclass need not call __init__.
    _encoded_sample_type: type[Any] | None = None
    _raw_batch_type: type[Any] | None = None
    _batch_type: type[Any] | None = None

    def __init__(
        self,
        *,
        encoded_sample_type: type[T_encoded_sample] | None = None,
        raw_batch_type: type[T_raw_batch] | None = None,
        batch_type: type[Any] | None = None,
    ):
        self._encoded_sample_type = encoded_sample_type
        self._raw_batch_type = raw_batch_type
        self._batch_type = batch_type

    def encode_sample(self, sample: T_sample) -> T_encoded_sample | Iterator[T_encoded_sample]:
        return cast("T_encoded_sample", convert(sample, self._encoded_sample_type))

    def batch(self, samples: list[T_encoded_sample]) -> T_raw_batch:
        return self._batch(samples, self._raw_batch_type or self._batch_type)

    def encode_batch(self, batch_data: T_raw_batch) -> T_batch | Iterator[T_batch]:
        return cast("T_batch", convert(batch_data, self._batch_type))

    def _batch(
        self,
        samples: list[T_encoded_sample],
        result_type: type[T_raw_batch] | None = None,
        actions: Mapping[str, Callable[[list[Any]], Any]] | None = None,
        default_action: Callable[[list[Any]], Any] = generic_batch,
    ) -> T_raw_batch:
        """Collate ``samples`` field by field; see :func:`energon_fn.collate`."""
        return cast("T_raw_batch", collate(samples, result_type, actions, default_action))


def _delegate(name: str) -> Any:
    def method(self: AugmentTaskEncoder[Any, Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        own = getattr(self._task_encoder, name, None)
        if own is None:  # what the other one leaves to the default
            return getattr(DefaultTaskEncoder, name)(self, *args, **kwargs)
        return own(*args, **kwargs)

    method.__name__ = name
    method.delegates = True  # type: ignore[attr-defined]  # read by method_of
    return method


class AugmentTaskEncoder(DefaultTaskEncoder[T_sample, T_encoded_sample, T_raw_batch, T_batch]):
    """A task encoder that goes before or after the methods of another one.

    >>> from energon_fn import TextSample
    >>> class Shout(AugmentTaskEncoder):
    ...     def encode_sample(self, sample):
    ...         sample.text += "!"
    ...         return super().encode_sample(sample)
    >>> shout = Shout(DefaultTaskEncoder(encoded_sample_type=dict))
    >>> shout.encode_sample(TextSample(__key__="1", text="a rose"))["text"]
    'a rose!'
    """

    def __init__(self, task_encoder: TaskEncoder[T_sample, T_encoded_sample, T_raw_batch, T_batch]):
        self._task_encoder = task_encoder
        # Its own cookers come first, then those of the encoder inside.
        inner = getattr(task_encoder, "cookers", ())
        self.cookers = (*type(self).cookers, *inner)  # type: ignore[misc]  # for this instance
        if type(self).decoder is None:
            self.decoder = getattr(task_encoder, "decoder", None)

    if not TYPE_CHECKING:  # to a checker they are those it inherits
        cook_crude_sample = _delegate("cook_crude_sample")
        encode_sample = _delegate("encode_sample")
        preencode_sample = _delegate("preencode_sample")
        postencode_sample = _delegate("postencode_sample")
        select_samples_to_pack = _delegate("select_samples_to_pack")
        pack_selected_samples = _delegate("pack_selected_samples")
        batch_group_criterion = _delegate("batch_group_criterion")
        batch = _delegate("batch")
        encode_batch = _delegate("encode_batch")
        _batch = _delegate("_batch")


def convert(thing: Any, result_type: type[Any] | None) -> Any:
    """``thing`` as a ``result_type`` made of its fields; as it is where the type is None or fits.

    >>> from energon_fn import CaptioningSample, TextSample
    >>> sample = CaptioningSample(__key__="1", image=None, caption="a rose")
    >>> convert(sample, dict)["caption"]
    'a rose'
    """
    if result_type is None or isinstance(thing, result_type):
        return thing
    if isinstance(thing, dict):
        fields = thing
    else:  # the declared ones, and what the user has set besides
        names = [*_declared(thing), *getattr(thing, "__dict__", ())]
        fields = {name: getattr(thing, name) for name in names}
    if declared := _declared(result_type):
        if "__key__" in fields:  # a batch's other name for it, as in collate
            fields = {"__keys__": fields["__key__"], **fields}
        fields = {name: fields[name] for name in declared if name in fields}
    return result_type(**fields)


def _declared(record: Any) -> list[str]:
    if dataclasses.is_dataclass(record):
        return [field.name for field in dataclasses.fields(record) if field.init]
    return list(getattr(record, "_fields", ()))  # of a namedtuple


@overload
def stateless(
    fn: None = None, *, restore_seeds: bool = False, failure_tolerance: int | None = None
) -> Callable[[F], F]: ...
@overload
def stateless(fn: F, *, restore_seeds: bool = False, failure_tolerance: int | None = None) -> F: ...
def stateless(
    fn: F | None = None, *, restore_seeds: bool = False, failure_tolerance: int | None = None
) -> F | Callable[[F], F]:
    """Declare that a method's result depends on its argument alone.

    Without it a method is seeded for every call, so that its random numbers depend on the sample
    and the epoch only. ``@stateless`` says that it draws none, which spares the seeding;
    ``@stateless(restore_seeds=True)`` that it does.
    failure_tolerance: how many failures of this method in a row end the run.

    >>> @stateless(failure_tolerance=10)
    ... def encode_sample(self, sample): ...
    """

    if failure_tolerance is not None and failure_tolerance < 1:
        raise ValueError(f"failure_tolerance is {failure_tolerance}; it must be 1 or more")

    def mark(fn: F) -> F:
        fn.__dict__.update(_draws=restore_seeds, _failure_tolerance=failure_tolerance)
        return fn

    return mark if fn is None else mark(fn)


METHODS = tuple(
    name for name, thing in vars(TaskEncoder).items() if callable(thing) and name[0] != "_"
)
"""The names of a task encoder's methods."""


def method_of(encoder: Any, name: str) -> Callable[..., Any] | None:
    """The user's method of that name, or None where there is only the default.

    >>> method_of(DefaultTaskEncoder(), "encode_batch") is None
    True
    """
    method = getattr(encoder, name, None)
    function = getattr(method, "__func__", method)
    if getattr(function, "delegates", False):
        return method_of(encoder._task_encoder, name)
    if function in (getattr(TaskEncoder, name), getattr(DefaultTaskEncoder, name)):
        types = {
            "encode_sample": ("_encoded_sample_type",),
            "batch": ("_raw_batch_type", "_batch_type"),
            "encode_batch": ("_batch_type",),
        }
        own_collate = name == "batch" and getattr(type(encoder), "_batch", None) not in (
            DefaultTaskEncoder._batch,
            None,
        )
        typed = any(getattr(encoder, attribute, None) for attribute in types.get(name, ()))
        if not (typed or own_collate):
            return None
    return cast("Callable[..., Any] | None", method)


def marks_of(encoder: Any, name: str) -> tuple[bool, int | None]:
    """What ``@stateless`` said of a method: whether it draws random numbers, its tolerance."""
    method = getattr(encoder, name, None)
    marks = getattr(getattr(method, "__func__", method), "__dict__", {})
    if marks.get("delegates"):
        return marks_of(encoder._task_encoder, name)
    return marks.get("_draws", True), marks.get("_failure_tolerance")
