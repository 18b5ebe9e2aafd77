"""``energon-fn info``: what there is in a dataset, and of what a metadataset is made."""

from __future__ import annotations

import argparse
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import yaml

from energon_fn.cli.terminal import columns
from energon_fn.cli.tree import draw
from energon_fn.disk import files, media, metadata
from energon_fn.disk.braces import collapse_braces
from energon_fn.disk.index import cached_index, has_parts
from energon_fn.disk.jsonl import INDEX_ENDING, is_jsonl, open_jsonl
from energon_fn.disk.source import open_source
from energon_fn.errors import DatasetError
from energon_fn.look.values import counted, describe, one_line, size
from energon_fn.recipes.metadataset import is_metadataset, splits_of
from energon_fn.recipes.opening import Opened, open_recipe
from energon_fn.recipes.outline import outline


def info(args: argparse.Namespace) -> int:
    if is_jsonl(args.path):
        show_jsonl(args.path)
    elif is_metadataset(args.path):
        configs = {"dataset_config": args.dataset_config, "split_config": args.split_config}
        splits = splits_of(args.path)
        show_metadataset(
            args.path,
            {split: open_recipe(args.path, split, **configs, make=False) for split in splits},
        )
    else:
        show_folder(args.path, args.dataset_config, args.split_config)
    return 0


def show_metadataset(path: str, splits: Mapping[str, Opened]) -> None:
    """Print of what the splits are made; they may have been opened without ``make``."""
    print(f"{path}: {counted(len(splits), 'split')}")
    for split, opened in splits.items():
        draw(split, outline(path, split), opened, os.path.dirname(os.path.abspath(path)))


def show_jsonl(path: str) -> None:
    source = open_jsonl(path)
    total = sum(files.size_mtime(lines.file)[0] for lines in source.lines)
    prepared = all(lines.offsets == lines.file + INDEX_ENDING for lines in source.lines)
    _show(
        f"{path}: {counted(len(source), 'sample')} in {counted(len(source.lines), 'file')}, "
        + size(total)
        + ("" if prepared else ", not prepared"),
        [
            ("sample type", "crude: its samples are dicts with what is in a line as json"),
            ("splits", "none: all samples are in every part"),
            (
                "first line",
                describe(source.load(0)["json"].decode(errors="replace"), columns() - 16),
            ),
        ],
    )


def show_folder(path: str, dataset_config: str, split_config: str) -> None:
    prepared = has_meta(path)
    if prepared:
        root, counts = path, metadata.read_info(path)
        rows = _sample_type_rows(path, dataset_config) + _split_rows(path, split_config, counts)
    else:
        source = open_source(path)
        root, counts = source.path, dict.fromkeys(source.shards, 0)
        for shard, start, stop in source.segments:
            counts[source.shards[shard]] += stop - start
        rows = [("sample type", "none: its samples are dicts of their parts")]
    parts = _parts(path)
    widest = max(map(len, parts), default=0)
    rows += _labelled(
        "parts",
        (
            f"{one_line(part):<{widest}}  {counted(count, 'sample'):>14}  {size(total):>9}"
            for part, (count, total) in parts.items()
        ),
    )
    rows += _media_rows(path)
    rows += [("shards", range_of(list(counts)))]
    there = [name for name in counts if os.path.exists(os.path.join(root, name))]
    if missing := [name for name in counts if name not in set(there)]:
        rows += [("missing", _some(missing))]
    total = sum(files.size_mtime(os.path.join(root, name))[0] for name in there)
    _show(
        f"{path}: {counted(sum(counts.values()), 'sample')} in {counted(len(counts), 'shard')}, "
        + size(total)
        + ("" if prepared else ", not prepared"),
        rows,
    )


def _show(title: str, rows: Iterable[tuple[str, str]]) -> None:
    print(title)
    for label, text in rows:
        print(f"  {label:<11}  {text}")


def _labelled(label: str, texts: Iterable[str]) -> list[tuple[str, str]]:
    """Rows of which only the first has the label."""
    return [(label if not number else "", text) for number, text in enumerate(texts)]


def _sample_type_rows(path: str, dataset_config: str) -> list[tuple[str, str]]:
    """What dataset.yaml says, or what is wrong with it. None of its code is run."""
    label, file = "sample type", metadata.meta_file(path, dataset_config)
    if not file.exists():
        return [(label, f"not known: there is no {file}")]
    try:
        config = metadata.read_dataset_config(path, dataset_config)
    except DatasetError as error:
        code = _code_rows(file)
        return _labelled(label, code) if code else [(label, str(error))]
    name = "crude: its samples are dicts of their parts"
    if config.sample_type is not None:
        name = config.sample_type.__name__
    field_map = config.field_map or {}
    widest = max(map(len, field_map), default=0)
    fields = (f"{field:<{widest}}  {access}" for field, access in field_map.items())
    flavors = (f"{name}: {value}" for name, value in config.subflavors.items())
    return _labelled(label, [name, *fields]) + _labelled("subflavors", flavors)


def _code_rows(file: Path) -> list[str]:
    """What a dataset.yaml says that names code, such as a sample loader; else nothing."""
    try:
        content = yaml.safe_load(files.read_bytes(file))
        name = content["sample_type"]["__class__"]
        code = [f"{key}: {content[key]}" for key in CODE_KEYS if key in content]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return []
    return [str(name), *code, "This is code of the dataset: --trust runs it."] if code else []


CODE_KEYS = ("sample_loader", "part_filter")


def _split_rows(path: str, split_config: str, counts: dict[str, int]) -> list[tuple[str, str]]:
    split = metadata.read_split_config(path, split_config)
    total = sum(counts.values()) or 1
    texts = []
    widest = max(map(len, split.split_parts), default=0)
    for part in split.split_parts:
        shards = split.shards(part)
        count = sum(counts.get(shard, 0) for shard in shards)
        count -= sum(len(keys) for keys in split.excluded_keys(shards).values())
        texts.append(
            f"{part:<{widest}}  {counted(count, 'sample'):>14}  {100 * count / total:5.1f} %  "
            f"{counted(len(shards), 'shard')}"
        )
    rows = _labelled("splits", texts)
    return rows + ([("excluded", _some(split.exclude))] if split.exclude else [])


def _parts(path: str) -> dict[str, tuple[int, int]]:
    """Part name -> in how many samples, how many bytes in all."""
    if has_meta(path):
        index = str(metadata.meta_file(path, "index.sqlite"))
        if not has_parts(index):  # made by an older release
            index, _ = cached_index(path, list(metadata.read_info(path)))
    else:
        index = open_source(path).index.path
    query = """SELECT part_name, COUNT(*), SUM(content_byte_size) FROM sample_parts
        GROUP BY part_name ORDER BY part_name"""
    uri = Path(index).absolute().as_uri() + "?mode=ro&immutable=1"
    with closing(sqlite3.connect(uri, uri=True)) as db:
        return {name: (count, total) for name, count, total in db.execute(query)}


def _media_rows(path: str) -> list[tuple[str, str]]:
    """Of how many files there is media metadata, if it was asked for, and how they were found."""
    database = str(metadata.meta_file(path, "index.sqlite"))
    filters = media.filters_of(database)
    if not filters:
        return []
    how = " and ".join(f"by {f if f in media.FILTERS else repr(f)}" for f in filters)
    return [("media", f"{counted(media.count(database), 'file')} {how}")]


def has_meta(path: str) -> bool:
    return os.path.isdir(os.path.join(path, metadata.META_FOLDER))


def range_of(shards: Sequence[str]) -> str:
    patterns = collapse_braces(shards)
    return ", ".join(patterns if len(patterns) <= 3 else [*patterns[:2], "...", patterns[-1]])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
