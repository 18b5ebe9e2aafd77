"""From a list of samples to one batch.

:func:`collate` goes field by field; how the values of one field become one value is an *action*:
:func:`batch_list`, :func:`batch_stack`, :func:`batch_pad_stack`, :func:`generic_batch`, or any
function of yours that takes the list of values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import torch

from energon_fn.samples import BOOKKEEPING, CrudeSample

T = TypeVar("T")

Action = Callable[[list[Any]], Any]
"""``action(values)``: the values of one field, one for each sample -> the batch's value."""

_NUMBERS = {bool, int, float, complex}
_MISSING = object()


def batch_list(values: Iterable[T]) -> list[T]:
    """The values as a list, untouched.

    >>> batch_list(("a cat", "a dog"))
    ['a cat', 'a dog']
    """
    return list(values)


def batch_stack(values: Iterable[Any]) -> torch.Tensor:
    """Stack n tensors of one shape to a tensor (n, ...), as ``torch.stack`` does.

    Numbers and NumPy arrays are made tensors first (an int is int64, a float torch's default
    dtype, an array keeps its dtype). Raises ValueError when shapes differ, TypeError for anything
    that is no tensor, array or number.

    >>> batch_stack([torch.tensor([1, 2]), torch.tensor([3, 4])])
    tensor([[1, 2],
            [3, 4]])
    >>> batch_stack([1, 0, 2])
    tensor([1, 0, 2])
    """
    tensors = _as_tensors(values)
    if isinstance(tensors, torch.Tensor):
        return tensors
    _check_equal("shapes", [tuple(t.shape) for t in tensors], "batch_pad_stack or batch_list")
    return torch.stack(tensors)


def batch_pad_stack(values: Iterable[Any]) -> torch.Tensor:
    """Stack n tensors to one (n, ...), each dimension padded at its end with zeros to the longest.

    The dtype is kept; where all shapes are equal this is ``torch.stack``. Takes what
    :func:`batch_stack` takes. Raises ValueError when the numbers of dimensions, or the dtypes,
    differ.

    >>> batch_pad_stack([torch.tensor([1, 2, 3]), torch.tensor([4])])
    tensor([[1, 2, 3],
            [4, 0, 0]])
    """
    tensors = _as_tensors(values)
    if isinstance(tensors, torch.Tensor):
        return tensors
    _check_equal("numbers of dimensions", [t.dim() for t in tensors], "batch_list")
    _check_equal("dtypes", [t.dtype for t in tensors], "batch_list, or convert them before")
    shapes = [t.shape for t in tensors]
    if all(shape == shapes[0] for shape in shapes):
        return torch.stack(tensors)
    batch = tensors[0].new_zeros(len(tensors), *map(max, zip(*shapes, strict=True)))
    for i, tensor in enumerate(tensors):
        corner = tuple(slice(length) for length in tensor.shape)
        batch[i][corner] = tensor
    return batch


def generic_batch(values: Iterable[Any]) -> Any:
    """The default action: tensors are padded and stacked, anything else becomes a list.

    Dicts with the same keys become one dict, each key batched by this same rule. A None among
    tensors makes it a list.

    >>> generic_batch([{"n": 1, "ids": torch.tensor([5])}, {"n": 2, "ids": torch.tensor([6, 7])}])
    {'n': [1, 2], 'ids': tensor([[5, 0],
            [6, 7]])}
    """
    values = list(values)
    if values and all(isinstance(value, torch.Tensor) for value in values):
        return batch_pad_stack(values)
    if values and all(
        isinstance(value, Mapping) and value.keys() == values[0].keys() for value in values
    ):
        return {key: generic_batch([value[key] for value in values]) for key in values[0]}
    return values


def concat_pad(values: Iterable[Any]) -> torch.Tensor:
    """Put tensors (n1, ...), (n2, ...), one behind the other: (n1 + n2, ...), for joining batches.

    All dimensions but the first are padded at their ends with zeros to the longest. The dtype is
    kept. Raises ValueError when the numbers of dimensions, or the dtypes, differ, or there are no
    dimensions; TypeError for anything that is no tensor or array.

    >>> concat_pad([torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5]])])
    tensor([[1, 2],
            [3, 4],
            [5, 0]])
    """
    tensors = _as_tensors(values)
    if isinstance(tensors, torch.Tensor) or not tensors[0].dim():
        raise ValueError("cannot concatenate numbers: they have no dimension; use batch_stack")
    _check_equal("numbers of dimensions", [t.dim() for t in tensors], "batch_list")
    _check_equal("dtypes", [t.dtype for t in tensors], "batch_list, or convert them before")
    longest = list(map(max, zip(*(t.shape for t in tensors), strict=True)))
    parts = [tensor.new_zeros(len(tensor), *longest[1:]) for tensor in tensors]
    for part, tensor in zip(parts, tensors, strict=True):
        part[tuple(slice(length) for length in tensor.shape)] = tensor
    return torch.cat(parts)


def generic_concat(values: Iterable[Any]) -> Any:
    """Join values of several batches: tensors by :func:`concat_pad`, anything else as a list.

    Dicts with the same keys, dataclasses and namedtuples of one type become one of that type, each
    field joined by this same rule; so lists become a list of lists. A None among tensors makes it a
    list.

    >>> generic_concat([{"ids": torch.tensor([[5]]), "texts": ["a cat"]},
    ...                 {"ids": torch.tensor([[6, 7]]), "texts": ["a dog"]}])
    {'ids': tensor([[5, 0],
            [6, 7]]), 'texts': [['a cat'], ['a dog']]}
    """
    values = list(values)
    if values and all(isinstance(value, torch.Tensor) for value in values):
        return concat_pad(values)
    first = values[0] if values else None
    if not _is_record(first) or any(type(value) is not type(first) for value in values):
        return values
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            return values
        return {key: generic_concat([value[key] for value in values]) for key in first}
    make: Any = type(first)
    names = _declared(make, first)
    return make(**{name: generic_concat([getattr(v, name) for v in values]) for name in names})


def homogeneous_concat_mix(samples: Iterable[T]) -> T | list[T]:
    """One batch of several: joined by :func:`generic_concat` if they are of one type, else listed.

    >>> homogeneous_concat_mix([torch.tensor([1]), torch.tensor([2, 3])])
    tensor([1, 2, 3])
    >>> homogeneous_concat_mix([torch.tensor([1]), {"ids": torch.tensor([2, 3])}])
    [tensor([1]), {'ids': tensor([2, 3])}]
    """
    batches = list(samples)
    if not batches:
        raise ValueError("cannot mix no batches")
    if any(type(batch) is not type(batches[0]) for batch in batches):
        return batches
    mixed: T = generic_concat(batches)
    return mixed


@overload
def collate(
    samples: Iterable[Any],
    result_type: type[T],
    actions: Mapping[str, Action] | None = None,
    default_action: Action = generic_batch,
) -> T: ...
@overload
def collate(
    samples: Iterable[Any],
    result_type: None = None,
    actions: Mapping[str, Action] | None = None,
    default_action: Action = generic_batch,
) -> Any: ...
def collate(
    samples: Iterable[Any],
    result_type: type[Any] | None = None,
    actions: Mapping[str, Action] | None = None,
    default_action: Action = generic_batch,
) -> Any:
    """Make one batch of several samples, field by field.

    Samples are dataclasses, dicts or namedtuples, all with the same fields; or plain values, which
    go to ``default_action`` as they are. Each field's values go, as a list in the order of the
    samples, to its action in ``actions`` or else to ``default_action``. Keys become a list,
    restore keys a tuple, subflavors a list, and sources are put one after the other.

    The batch is a ``result_type``: a dataclass or namedtuple, whose declared fields are the only
    ones batched (one named ``__keys__`` gets the keys), or a dict, which gets all. Without it, it
    is of the type of the first sample.

    Raises TypeError for a field that ``result_type`` requires, or ``actions`` names, and no sample
    has; ValueError when samples differ in their fields. An error of an action gets a note that
    names the field and the samples' keys.

    >>> from energon_fn.samples import CaptioningSample
    >>> @dataclasses.dataclass
    ... class CaptioningRawBatch:
    ...     __key__: list[str]
    ...     image: torch.Tensor
    ...     caption: list[str]
    >>> samples = [
    ...     CaptioningSample(__key__="a", image=torch.zeros(3, 2, 2), caption="a cat"),
    ...     CaptioningSample(__key__="b", image=torch.zeros(3, 2, 4), caption="a dog"),
    ... ]
    >>> batch = collate(samples, CaptioningRawBatch, actions={"image": batch_pad_stack})
    >>> batch.__key__, batch.image.shape, batch.caption
    (['a', 'b'], torch.Size([2, 3, 2, 4]), ['a cat', 'a dog'])
    """
    samples = list(samples)
    if not samples:
        raise ValueError("cannot make a batch of no samples")
    first, actions = samples[0], actions or {}
    for name in actions:
        if all(_value(sample, name) is _MISSING for sample in samples):
            raise TypeError(
                f"there is an action for the field {name!r}, but the samples have "
                f"{_describe(first)}: correct the name, or leave the action out"
            )
    if result_type is None and not _is_record(first):
        return _act(default_action, samples, "samples", samples)

    takes_all = result_type is None or issubclass(result_type, dict)
    if result_type is None:
        is_dict = isinstance(first, Mapping) and not isinstance(first, CrudeSample)
        result_type = dict if is_dict else type(first)
    if takes_all:
        _check_same_fields(samples)

    fields = {}
    for name, required in _declared(result_type, first).items():
        values = [_value(sample, name) for sample in samples]
        if name == "__keys__" and _none_has(values):
            values = [_value(sample, "__key__") for sample in samples]
            action: Action = batch_list
        else:
            action = actions.get(name) or BOOKKEEPING.get(name, default_action)
        if not _none_has(values):
            for i, value in enumerate(values):
                if value is _MISSING:
                    raise ValueError(
                        f"sample {_keys(samples)[i]} has no field {name!r}, others of its batch "
                        f"have it: it has {_describe(samples[i])}. Give every sample the field"
                    )
            fields[name] = _act(action, values, f"field {name!r}", samples)
        elif required:
            raise TypeError(
                f"{result_type.__name__} requires the field {name!r}, but the samples have "
                f"{_describe(first)}: override `batch` to fill it, or give it a default"
            )
    return result_type(fields) if issubclass(result_type, dict) else result_type(**fields)


def _act(action: Action, values: list[Any], what: str, samples: Sequence[Any]) -> Any:
    try:
        return action(values)
    except Exception as error:
        keys = _keys(samples)
        more = f", ... ({len(keys)} in all)" if len(keys) > 16 else ""
        error.add_note(
            f"while batching {what} with {getattr(action, '__name__', repr(action))}, "
            f"samples {', '.join(keys[:16])}{more}"
        )
        raise


def _as_tensors(values: Iterable[Any]) -> torch.Tensor | list[torch.Tensor]:
    """The values as tensors; numbers are stacked already, as only together they have a dtype."""
    values = list(values)
    if not values:
        raise ValueError("cannot stack no values")
    if all(type(value) in _NUMBERS for value in values):
        return torch.tensor(values)
    return [_as_tensor(value, i) for i, value in enumerate(values)]


def _as_tensor(value: Any, position: int) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        # The copy makes arrays fit for torch that are read-only or of negative strides.
        return torch.from_numpy(np.array(value))
    if type(value) in _NUMBERS:
        return torch.tensor(value)
    raise TypeError(
        f"cannot stack value {position}, a {type(value).__name__}: only tensors, NumPy arrays and "
        "numbers can be stacked; use batch_list, or make it a tensor in encode_sample"
    )


def _check_equal(what: str, found: list[Any], remedy: str) -> None:
    for i, one in enumerate(found):
        if one != found[0]:
            raise ValueError(
                f"cannot stack values whose {what} differ: {found[0]} (value 0) and {one} "
                f"(value {i}); use {remedy}"
            )


def _is_record(sample: Any) -> bool:
    return (
        isinstance(sample, Mapping)
        or hasattr(type(sample), "_fields")
        or (dataclasses.is_dataclass(sample) and not isinstance(sample, type))
    )


def _value(sample: Any, name: str) -> Any:
    if isinstance(sample, Mapping):
        return sample.get(name, _MISSING)
    # Fields, declared or set by the user; but no method that happens to have a field's name.
    if name in getattr(sample, "__dict__", ()) or name in _names(sample):
        return getattr(sample, name, _MISSING)
    return _MISSING


def _none_has(values: list[Any]) -> bool:
    return all(value is _MISSING for value in values)


def _declared(record: Any, sample: Any) -> dict[str, bool]:
    """Field name -> whether it is required, of a result type; a dict has the sample's fields."""
    if issubclass(record, dict):
        return dict.fromkeys(_names(sample), True)
    if dataclasses.is_dataclass(record):
        return {
            f.name: f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            for f in dataclasses.fields(record)
            if f.init
        }
    if hasattr(record, "_fields"):
        return {name: name not in record._field_defaults for name in record._fields}
    raise TypeError(
        f"result_type must be a dataclass, a namedtuple or dict, not {record.__name__}: "
        "override `batch` to make anything else"
    )


def _names(sample: Any) -> list[Any]:
    if isinstance(sample, Mapping):
        return list(sample)
    if dataclasses.is_dataclass(sample):
        return [field.name for field in dataclasses.fields(sample)]
    return list(getattr(sample, "_fields", ()))


def _check_same_fields(samples: Sequence[Any]) -> None:
    first = samples[0]
    for i, sample in enumerate(samples):
        if type(sample) is type(first) and not isinstance(sample, Mapping):
            continue
        if set(_names(sample)) != set(_names(first)):
            keys = _keys(samples)
            raise ValueError(
                f"samples of one batch differ in their fields: {keys[0]} has {_describe(first)}, "
                f"{keys[i]} has {_describe(sample)}. Give all the same, or name a result_type "
                "with those to batch"
            )


def _keys(samples: Sequence[Any]) -> list[str]:
    found = [_value(sample, "__key__") for sample in samples]
    return [f"number {i}" if key is _MISSING else repr(key) for i, key in enumerate(found)]


def _describe(sample: Any) -> str:
    names = ", ".join(map(str, _names(sample)))
    return f"{names or 'no fields'} ({type(sample).__name__})"
