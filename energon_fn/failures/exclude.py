"""Leave the samples of a quarantine file out of a dataset: entries of ``exclude`` in split.yaml."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from energon_fn.disk import files
from energon_fn.disk.braces import escape_braces
from energon_fn.disk.jsonl import is_jsonl
from energon_fn.disk.metadata import SPLIT_YAML, meta_file, read_split_config
from energon_fn.disk.tars import split_name
from energon_fn.errors import DatasetError
from energon_fn.failures.quarantine import Failure
from energon_fn.recipes.metadataset import is_metadataset
from energon_fn.samples import SourceInfo

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Excluded:
    """What :func:`exclude` did."""

    added: tuple[str, ...]
    """The new entries: ``shard.tar/key``, or ``shard.tar`` for a shard that cannot be read."""
    known: int
    """Samples that were left out already."""
    several: Mapping[str, int]
    """Failures of several samples at once, by stage: whose fault it is cannot be told."""
    elsewhere: Mapping[str, int]
    """Failures of other datasets, by path; of what was not read from a file, as ``""``."""


def exclude(
    path: str | os.PathLike[str],
    failures: Iterable[Failure],
    *,
    split_config: str = SPLIT_YAML,
    dry_run: bool = False,
) -> Excluded:
    """Add the samples that failed to ``exclude`` in the dataset's ``split.yaml``.

    All else in the file stays as it is. A failed batch or pack is left out and told of, not
    excluded, since most of its samples are sound. A saved state of a run on the dataset then needs
    ``load_state_dict(state, accept=["dataset"])``.

    path: a prepared folder. failures: what :func:`~energon_fn.read_quarantine` gives.
    split_config: the file in ``.nv-meta``. dry_run: write nothing.

    Raises :class:`~energon_fn.DatasetError` if there is no such file, or none that can be added to.
    """
    if is_jsonl(path) or is_metadataset(path):
        raise DatasetError(
            f"{path} has no {SPLIT_YAML} to exclude samples in: give a prepared folder of shards, "
            "of a metadataset one folder after the other"
        )
    split = read_split_config(os.fspath(path), split_config)
    there = os.path.realpath(path)
    new: dict[str, None] = {}
    several: Counter[str] = Counter()
    elsewhere: Counter[str] = Counter()
    known, excluded = set[str](), {*split.exclude}
    for failure in failures:
        inside = [one for one in failure.sources if os.path.realpath(one.dataset_path) == there]
        places = {(one.shard_name, _key(one, failure)) for one in inside}
        if not inside:
            elsewhere[failure.sources[0].dataset_path if failure.sources else ""] += 1
        elif len(places) > 1 or len(failure.keys) > 1:
            several[failure.stage] += 1
        else:
            [(shard, key)] = places
            entry = shard if key is None else f"{shard}/{key}"
            if {shard, entry} & excluded:
                known.add(entry)
            else:
                new[entry] = None
    file = meta_file(os.fspath(path), split_config)
    if new:
        text = files.read_bytes(file).decode()
        text = _with_entries(text, [*map(escape_braces, new)], file)
        if not dry_run:
            files.write_atomic(file, text.encode())
    return Excluded(tuple(new), len(known), several, elsewhere)


def _key(source: SourceInfo, failure: Failure) -> str | None:
    """The key that the sample has in its shard: a cooker may have given it another one."""
    for name in source.file_names:
        if found := split_name(name):
            return found[0]
    return failure.keys[0] if failure.keys else None


def _with_entries(text: str, entries: Sequence[str], file: object) -> str:
    """The text of a split.yaml with these entries at the end of ``exclude``.

    >>> print(_with_entries("exclude: []  # none yet\\n", ["a.tar/1"], ""), end="")
    exclude:  # none yet
    - a.tar/1
    """
    old = yaml.load(text, _Loader)
    due = {**old, "exclude": [*old.get("exclude", ()), *entries]}
    written = _inserted(text, entries)
    try:
        found = yaml.load(written, _Loader)
    except yaml.YAMLError:
        found = None
    if found != due:
        raise DatasetError(
            f"{file}: nothing can be added to `exclude` the way it is written. Write it as a list "
            f"with an entry a line, and add\n{_block(entries, '')}"
        )
    return written


def _inserted(text: str, entries: Sequence[str]) -> str:
    """The same, if the file is written in one of the usual ways."""
    root: Any = yaml.compose(text, _Loader)
    found: Any = next((value for name, value in root.value if name.value == "exclude"), None)
    if found is None:
        ended = text if text.endswith("\n") else text + "\n"
        return f"{ended}exclude:\n{_block(entries, '')}"
    start, stop = found.start_mark.index, found.end_mark.index
    if found.flow_style and found.value:
        inside = text[start : stop - 1].rstrip()
        comma = "" if inside.endswith(",") else ","
        return f"{text[:start]}{inside}{comma} {_flow(entries)}{text[stop - 1 :]}"
    if found.flow_style and root.flow_style:
        return f"{text[:start]}[{_flow(entries)}]{text[stop:]}"
    if found.value:
        stop = found.value[-1].end_mark.index
    end = text.find("\n", stop)
    end = len(text) if end < 0 else end
    before, comment = text[:stop], text[stop:end]
    if found.flow_style:
        before, comment = text[:start].rstrip(), comment.rstrip()
    indent = "" if found.flow_style else " " * found.start_mark.column
    return f"{before}{comment}\n{_block(entries, indent)}{text[end + 1 :]}"


def _block(entries: Sequence[str], indent: str) -> str:
    return "".join(f"{indent}{_yaml([entry], False)}" for entry in entries)


def _flow(entries: Sequence[str]) -> str:
    return _yaml([*entries], True).strip()[1:-1]


def _yaml(entries: list[Any], flow: bool) -> str:
    # No line is broken, however long a name is.
    return str(yaml.safe_dump(entries, default_flow_style=flow, allow_unicode=True, width=2**30))
