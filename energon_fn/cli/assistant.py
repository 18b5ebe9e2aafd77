"""The questions of ``energon-fn prepare``: how to split, what a sample is, where its fields are.

Every answer is tried on real samples at once. Nothing is written here.
"""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from energon_fn.cli.terminal import columns
from energon_fn.decoding import decode_part
from energon_fn.disk import files
from energon_fn.disk.fields import (
    Access,
    parse_accesses,
    required_fields,
    sample_fields,
    sample_type_named,
)
from energon_fn.disk.prepare import guess_field_map, split_by_ratio
from energon_fn.disk.tars import index_shard
from energon_fn.errors import DatasetError, SampleError
from energon_fn.look.values import describe, one_line, shorten
from energon_fn.samples import BOOKKEEPING, SAMPLE_TYPES

T = TypeVar("T")
Ratio = list[tuple[str, float]]

CRUDE = "CrudeWebdataset"
TRIED = 8
"""Samples that every answer is tried on: the first of the first shard."""

# What several types would fit goes to the first of these.
_USUAL = ("CaptioningSample", "VQASample", "ImageSample", "TextSample")


@dataclass(frozen=True)
class Look:
    """What is in the first shard: how many samples have which part, and the first samples."""

    shard: str
    count: int
    parts: Mapping[str, int]
    samples: list[dict[str, Any]]
    """Decoded, pictures by Pillow. A part that cannot be decoded is its :class:`SampleError`."""


def look_into(folder: str | os.PathLike[str], shard: str) -> Look:
    """Look into a shard. Raises DatasetError for one that is broken or empty."""
    path = os.path.join(folder, shard)
    index = index_shard(path, shard)
    if not len(index):
        raise DatasetError(
            f"{path} has no samples (files called KEY.PART). Remove the shard, or exclude it."
        )
    counts = Counter(part for parts in index.parts for part, _, _ in parts)
    samples = [
        {"__key__": key, **{part: _decoded(part, path, *place) for part, *place in parts}}
        for key, parts in zip(index.keys[:TRIED], index.parts, strict=False)
    ]
    return Look(shard, len(index), dict(sorted(counts.items())), samples)


def _decoded(part: str, path: str, offset: int, size: int) -> Any:
    try:
        return decode_part(part, files.read_at(path, offset, size), image="pil")
    except SampleError as error:
        return error


def ratio_of(text: str) -> Ratio:
    """The split ratio that an answer or option says; ValueError if it is none.

    >>> ratio_of("8,1,1")
    [('train', 8.0), ('val', 1.0), ('test', 1.0)]
    """
    try:
        train, val, test = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"the split ratio must be three numbers, for train, val and test, such as 8,1,1; not "
            f"{text!r}"
        ) from None
    return [("train", train), ("val", val), ("test", test)]


# ----------------------------------------------------------------------------------- the questions


def ask_split(shards: Sequence[str], shuffle_seed: int | None) -> Ratio:
    """Ask in which ratio the shards are to be shared out."""
    count = len(shards)
    usual = ["1,0,0", "1,1,0"][count - 1] if count < 3 else "8,1,1"
    if count > 2 and not all(split_by_ratio(shards, ratio_of(usual)).values()):
        usual = f"{count - 2},1,1"

    def checked(answer: str) -> Ratio:
        ratio = ratio_of(answer)
        split = split_by_ratio(shards, ratio, shuffle_seed)
        said = ", ".join(f"{part} {len(names)}" for part, names in split.items())
        print(f"  -> {said} of {count} shards")
        if not split["train"]:
            raise ValueError("nothing is left to train on: give train a greater share")
        return ratio

    _say("In which ratio shall the shards be split into train, val and test?")
    return ask("Ratio", usual, checked)


def show_parts(look: Look) -> None:
    """Print the parts found, each with a value."""
    print()
    _say(f"Parts of the {look.count} samples in {look.shard}, and the first values:")
    rows: list[tuple[str, str, Any]] = []
    for part, count in look.parts.items():
        value = next((sample[part] for sample in look.samples if part in sample), "")
        rows.append((part, f"{count}x", value))
        if isinstance(value, Mapping):
            rows[-1] = (part, f"{count}x", f"{len(value)} entries")
            rows += [(f"  {part}[{key}]", "", value[key]) for key in list(value)[:16]]
            if len(value) > 16:
                rows.append(("  ...", "", f"{len(value) - 16} more"))
    first = min(max(len(name) for name, _, _ in rows), columns() // 2)
    second = max(len(count) for _, count, _ in rows)
    for name, times, value in rows:
        start = f"  {shorten_kept(name, first):<{first}}  {times:>{second}}  "
        print(start + describe(value, columns() - len(start) - 1))


def shorten_kept(name: str, width: int) -> str:
    """Shortened, with the blanks in front kept."""
    indent = name[: len(name) - len(name.lstrip())]
    return indent + shorten(name.lstrip(), width - len(indent))


def ask_sample_type(look: Look) -> type[Any] | None:
    """Ask what a sample is; None for crude samples."""
    types = [t for t in SAMPLE_TYPES.values() if hasattr(t, "__dataclass_fields__")]
    guessed = guess_sample_type(look)
    print()
    _say("What is a sample? (Fields in brackets may be left out.)")
    for number, one in enumerate(types, 1):
        print(shorten_kept(f" {number:3}  {one.__name__}: {_fields(one)}", columns() - 1))
    print(
        shorten_kept(
            f" {len(types) + 1:3}  crude: a dict of the parts, for your own code", columns() - 1
        )
    )

    def checked(answer: str) -> type[Any] | None:
        if answer.isdigit():
            if not 1 <= int(answer) <= len(types) + 1:
                raise ValueError(f"give a number from 1 to {len(types) + 1}")
            return [*types, None][int(answer) - 1]
        return None if answer == "crude" else sample_type_named(answer)

    usual = len(types) + 1 if guessed is None else types.index(guessed) + 1
    return ask("Number", str(usual), checked)


def _fields(sample_type: type[Any]) -> str:
    required = required_fields(sample_type)
    names = [name for name in sample_fields(sample_type) if name not in BOOKKEEPING]
    optional = [name for name in names if name not in required]
    return ", ".join(required) + (f" [{', '.join(optional)}]" if optional else "")


def guess_sample_type(look: Look) -> type[Any] | None:
    """The sample type most of whose fields can be guessed, required ones all; None for none."""
    ranked = [SAMPLE_TYPES[name] for name in _USUAL]
    ranked += [
        t for t in SAMPLE_TYPES.values() if t not in ranked and hasattr(t, "__dataclass_fields__")
    ]

    def score(sample_type: type[Any]) -> int:
        guessed = guess_field_map(sample_type, look.parts, look.samples[0])
        if not set(required_fields(sample_type)) <= set(guessed):
            return 0
        # A part that is called like the field says more than one of a kind that would do.
        return sum(2 if field in access else 1 for field, access in guessed.items())

    best = max(ranked, key=score)
    return best if score(best) else None


def ask_field_map(sample_type: type[Any], look: Look) -> dict[str, str]:
    """Ask where each field comes from."""
    guessed = guess_field_map(sample_type, look.parts, look.samples[0])
    required = required_fields(sample_type)
    optional = [
        name for name in sample_fields(sample_type) if name not in (*required, *BOOKKEEPING)
    ]
    print()
    _say(
        "Where do its fields come from? From a part (jpg), from inside a json (json[text][0]), or "
        "from the first that a sample has of several (jpg,png)."
    )
    field_map = {
        field: _ask_field(field, sample_type, guessed.get(field), look) for field in required
    }
    if optional:
        usual = [field for field in optional if field in guessed]

        def checked(answer: str) -> list[str]:
            names = [] if answer == "none" else [name.strip() for name in answer.split(",")]
            for name in names:
                if name not in optional:
                    raise ValueError(f"{name!r} is none of {', '.join(optional)}")
            return names

        _say(f"It may also have: {', '.join(optional)}.")
        wanted = ask("Which of these are there?", ",".join(usual) or "none", checked)
        field_map |= {
            field: _ask_field(field, sample_type, guessed.get(field), look) for field in wanted
        }
    return field_map


def _ask_field(field: str, sample_type: type[Any], usual: str | None, look: Look) -> str:
    wanted = _EXPECTED.get(str(sample_fields(sample_type)[field].type))

    def checked(answer: str) -> str:
        accesses = parse_accesses(answer)
        values = [_value(sample, accesses) for sample in look.samples]
        for value in values:
            if wanted is not None and not isinstance(value, wanted[1]):
                found = describe(value, columns() // 2)
                raise ValueError(f"{field} must be {wanted[0]}, {answer} is {found}")
        print("  -> " + describe(values[0], columns() - 6))
        return ",".join(map(str, accesses))

    return ask(f"  {field}", usual, checked)


# What the annotation of a field asks for; other annotations are not checked.
_EXPECTED: dict[str, tuple[str, Any]] = {
    "str": ("a text", str),
    "torch.Tensor": ("a picture or tensor", (Image.Image, torch.Tensor, np.ndarray)),
}


def _value(sample: dict[str, Any], accesses: Sequence[Access]) -> Any:
    """What the first access that the sample has gives; ValueError says why there is none."""
    missing = []
    for access in accesses:
        try:
            value = access.value(sample)
        except LookupError as error:
            missing.append(str(error))
            continue
        if isinstance(value, SampleError):
            raise ValueError(f"sample {sample['__key__']}: {value}")
        return value
    raise ValueError(f"sample {sample['__key__']}: {'; '.join(missing)}")


def ask_yes(question: str) -> bool:
    """Ask yes or no; Enter is no."""

    def checked(answer: str) -> bool:
        if answer.lower() not in ("y", "yes", "n", "no"):
            raise ValueError("answer y or n")
        return answer.lower().startswith("y")

    return ask(question, "n", checked)


def ask(question: str, usual: str | None, checked: Callable[[str], T]) -> T:
    """Ask until ``checked`` takes the answer; its ValueError or DatasetError is shown.

    usual: the answer that Enter stands for.
    """
    prompt = f"{question} [{usual}]: " if usual is not None else f"{question}: "
    while True:
        try:
            answer = input(prompt).strip() or usual
        except EOFError:
            print()
            raise ValueError(
                "the input ended before all questions were answered: give the answers as options "
                "with --non-interactive"
            ) from None
        if answer is None:
            continue
        try:
            return checked(answer)
        except (ValueError, DatasetError) as error:
            _say(f"{error}" + ("" if str(error).endswith((".", "?", "…")) else "."), "  ")


def _say(text: str, indent: str = "") -> None:
    width = columns() - 1
    print(textwrap.fill(one_line(text), width, initial_indent=indent, subsequent_indent=indent))
