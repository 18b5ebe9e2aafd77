"""``energon-fn lint`` and ``preview``: read the samples of a dataset."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from tqdm import tqdm

from energon_fn.cli.info import has_meta
from energon_fn.cli.terminal import can_draw, columns, half_blocks, seen_from
from energon_fn.decoding import decoder
from energon_fn.disk import files, metadata
from energon_fn.disk.jsonl import is_jsonl, open_jsonl
from energon_fn.disk.source import Samples, Source, open_source
from energon_fn.errors import DatasetError
from energon_fn.failures.lint import BadSample, open_shards, shard_names
from energon_fn.failures.lint import lint as bad_samples_of
from energon_fn.failures.quarantine import append
from energon_fn.look.inside import pictures_in
from energon_fn.look.sheet import picture_of
from energon_fn.look.show import show
from energon_fn.look.values import counted, describe, one_line
from energon_fn.recipes.metadataset import is_metadataset, splits_of
from energon_fn.recipes.opening import open_recipe
from energon_fn.samples import SourceInfo

BAD = 1


def lint(args: argparse.Namespace) -> int:
    bad_samples = bad_shards = 0
    is_meta = is_metadataset(args.path)

    def show(bad: BadSample) -> None:
        nonlocal bad_samples, bad_shards
        bad_samples += bad.key is not None
        bad_shards += bad.key is None
        tqdm.write(one_line(str(bad)), file=sys.stdout)
        sys.stdout.flush()
        if args.quarantine:
            append(args.quarantine, bad.failure)

    if args.quarantine:
        append(args.quarantine)  # what is wrong with the file is said before an hour's work

    sources: list[Samples] = []
    try:
        sources = [source for part in sources_of(args).values() for source in part]
    except DatasetError:
        if args.split_part or has_meta(args.path) or is_jsonl(args.path) or is_meta:
            raise
        for found in open_shards(args.path):  # one broken shard must not hide the others
            if isinstance(found, BadSample):
                show(found)
            else:
                sources.append(found)
    total = sum(map(len, sources))
    if is_meta:
        among = counted(len(sources), "dataset")
    else:
        shards = sum(len({*shard_names(source)}) for source in sources)
        among = counted(bad_shards + shards, "shard")
    with tqdm(total=total, desc="lint", unit=" samples", leave=False, disable=None) as bar:
        for source in sources:
            for bad in bad_samples_of(source, args.image_decode, args.num_workers, bar.update):
                show(_placed(args, bad, source) if is_meta else bad)
    counts = [(bad_samples, "bad sample"), (bad_shards, "unreadable shard")]
    problems = " and ".join(counted(count, thing) for count, thing in counts if count)
    done = problems or "all can be read and decoded"
    print(f"{counted(total, 'sample')} in {among}: {done}")
    if problems and args.quarantine and has_meta(args.path):
        print(f"next: energon-fn exclude {args.path} {args.quarantine}")
    return BAD if problems else 0


def _placed(args: argparse.Namespace, bad: BadSample, source: Samples) -> BadSample:
    """The same with the dataset that it is in, seen from the metadataset's folder."""
    where = seen_from(os.path.dirname(os.path.abspath(args.path)), source.path)
    return replace(bad, shard=f"{where}/{bad.shard}" if isinstance(source, Source) else where)


def sources_of(args: argparse.Namespace) -> dict[str, list[Samples]]:
    """The datasets of each part, or split of a metadataset, that the options ask for; else all."""
    configs = {"dataset_config": args.dataset_config, "split_config": args.split_config}
    parts = parts_of(args)
    if is_metadataset(args.path):
        return {
            split: [
                *open_recipe(args.path, split, **configs, trust_dataset_code=args.trust).sources
            ]
            for split in parts
        }
    if is_jsonl(args.path):
        return {part: [open_jsonl(args.path, part)] for part in parts}
    return {
        part: [open_source(args.path, part, **configs, trust_dataset_code=args.trust)]
        for part in parts
    }


def parts_of(args: argparse.Namespace) -> list[str]:
    """The parts, or splits of a metadataset, that the options ask for; else all."""
    asked: list[str] = args.split_part or []
    if asked:
        return asked
    if is_metadataset(args.path):
        return splits_of(args.path)
    if has_meta(args.path) and not is_jsonl(args.path):
        return list(metadata.read_split_config(args.path, args.split_config).split_parts)
    return ["train"]


# ----------------------------------------------------------------------------------------- preview


def preview(args: argparse.Namespace) -> int:
    if args.sheet and not args.sheet.lower().endswith(".png"):
        raise ValueError(f"--sheet writes a PNG file: {args.sheet!r} must end in .png")
    count = args.n or (24 if args.sheet else 5)
    decode = decoder()
    parts = [(part, inside) for part, inside in sources_of(args).items() if any(map(len, inside))]
    if not parts:
        raise ValueError(f"{args.path} has no samples there")
    samples: list[dict[str, Any]] = []
    failed = 0
    for part, inside in parts if args.split_part else parts[:1]:
        for source, i in _chosen(inside, count):
            raw = source.load(i)
            heading = f"{part} {i}: {raw['__key__']} in {_places(args, raw)}"
            try:
                sample = source.make(raw, decode)
            except Exception as error:  # a sample loader's may be any
                failed += 1
                print(one_line(heading), f"  error: {one_line(str(error))}\n", sep="\n")
                continue
            fields = sample if isinstance(sample, dict) else vars(sample)
            fields = {name: value for name, value in fields.items() if not name.startswith("__")}
            if args.sheet:
                samples.append({"__key__": raw["__key__"], **fields})
            else:
                _show_sample(heading, fields)
    if args.sheet:
        _write_sheet(args.sheet, samples)
    return BAD if failed else 0


def _chosen(sources: Sequence[Samples], count: int) -> Iterator[tuple[Samples, int]]:
    """``count`` samples of the datasets, as many of each as can be."""
    sources = [source for source in sources if len(source)]
    ends = [-(-count * n // len(sources)) for n in range(len(sources) + 1)]
    for source, (start, stop) in zip(sources, pairwise(ends), strict=True):
        yield from ((source, i) for i in _spread(len(source), stop - start))


def _spread(length: int, count: int) -> Iterator[int]:
    """``count`` positions, evenly over ``length``: samples of the same kind often lie together."""
    count = min(count, length)
    return (i * length // count for i in range(count))


def _places(args: argparse.Namespace, raw: dict[str, Any]) -> str:
    """The shards a sample is from; of a metadataset also the datasets, seen from its folder."""
    sources: Sequence[SourceInfo] = raw["__sources__"]
    if not is_metadataset(args.path):
        return str(sources[0].shard_name)
    paths = [  # the path of a file of JSON lines ends in its name already
        one.dataset_path
        if os.path.isfile(one.dataset_path)
        else os.path.join(one.dataset_path, one.shard_name)
        for one in sources
    ]
    folder = os.path.dirname(os.path.abspath(args.path))
    return " and ".join(seen_from(folder, path) for path in paths)


def _show_sample(heading: str, fields: dict[str, Any]) -> None:
    width = columns() - 1
    print(one_line(heading))
    widest = min(max(map(len, fields), default=0), width // 3)
    for name, value in fields.items():
        start = f"  {one_line(name):<{widest}}  "
        print(start + describe(value, width - len(start)))
    picture = picture_of(next(pictures_in(fields), None)) if can_draw(sys.stdout) else None
    if picture is not None:
        for line in half_blocks(picture, min(width - 2, 64), 18):
            print("  " + line)
    print()


def _write_sheet(path: str, samples: list[dict[str, Any]]) -> None:
    if not samples:
        raise ValueError("no sample can be drawn")
    across = min(6, math.ceil(len(samples) ** 0.5))
    sheet = show(samples, columns=across, cell=224, limit=len(samples))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    files.write_atomic(path, file.getvalue())
    print(f"{path}: {counted(len(samples), 'sample')}, {sheet.width} x {sheet.height} pixels")
