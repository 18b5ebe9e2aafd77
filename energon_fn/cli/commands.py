"""What the commands of ``energon-fn`` do. Each takes its options and returns the exit status."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import shlex
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from energon_fn.checkpoint import describe as describe_state
from energon_fn.checkpoint import merge, read_state, redistribute, write_state
from energon_fn.cli import assistant
from energon_fn.cli.terminal import (
    can_draw,
    columns,
    describe,
    half_blocks,
    one_line,
    picture_of,
    size,
)
from energon_fn.decoding import decoder
from energon_fn.demo import run_demo
from energon_fn.disk import files, metadata
from energon_fn.disk.braces import collapse_braces
from energon_fn.disk.fields import check_field_map, sample_type_named
from energon_fn.disk.index import cached_index, has_parts
from energon_fn.disk.prepare import prepare_dataset, write_dataset_yaml
from energon_fn.disk.source import Source, open_source
from energon_fn.errors import DatasetError, SampleError, logger
from energon_fn.lint import BadSample, open_shards
from energon_fn.lint import lint as bad_samples_of
from energon_fn.sheet import contact_sheet

BAD, ERROR = 1, 2

# ----------------------------------------------------------------------------------------- prepare


def prepare(args: argparse.Namespace) -> int:
    folder = args.path
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder. Give the folder that holds the shards.")
    if args.tar_index_only:
        shards = list(metadata.read_info(folder))
    else:
        shards = _not_excluded(files.list_tars(folder), args.exclude)
    if not shards:
        raise ValueError(
            f"no shards to prepare in {folder}: no file below it ends in "
            f"{', '.join(files.TAR_SUFFIXES)}" + (" and is not excluded." if args.exclude else ".")
        )
    print(f"{folder}: {_count(len(shards), 'shard')}, {_range_of(shards)}")

    interactive = not (args.non_interactive or args.tar_index_only)
    if not (args.tar_index_only or args.force_overwrite) and _prepared(args):
        if not interactive:
            raise ValueError(f"{folder} is prepared already. Overwrite it with --force-overwrite.")
        if not assistant.ask_yes(f"{folder} is prepared already. Prepare it again?"):
            return 0

    ratio = patterns = None
    seed = SHUFFLE_SEED if args.shuffle_tars else None
    if args.split_parts:
        patterns = [_part_and_pattern(text) for text in args.split_parts]
    elif args.split_ratio:
        ratio = assistant.ratio_of(args.split_ratio)
    elif interactive:
        ratio = assistant.ask_split(shards, seed)
    elif not args.tar_index_only:
        raise ValueError("--non-interactive needs --split-ratio (8,1,1, say) or --split-parts.")
    skip = args.tar_index_only or args.skip_dataset_yaml
    about = None if skip else _about_samples(args, shards[0], interactive)

    # All is known now: what follows asks nothing.
    part_names, duplicates = prepare_dataset(
        folder,
        shards,
        split_parts_ratio=ratio,
        split_parts_patterns=patterns,
        progress_fn=lambda shards, count: _bar(shards, count, args.progress),
        tar_index_only=args.tar_index_only,
        shuffle_seed=seed,
        workers=args.num_workers,
    )
    if duplicates:  # the log has told which
        return ERROR
    if about is not None:
        name = args.dataset_yaml_name
        write_dataset_yaml(folder, about.sample_type, about.field_map, parts=part_names, name=name)
    print()
    _show_info(folder, args.dataset_yaml_name, metadata.SPLIT_YAML)
    if not args.tar_index_only:
        _next_steps(args, ratio, about)
    return 0


SHUFFLE_SEED = 42  # that of prepare_dataset


@dataclass(frozen=True)
class About:
    """What dataset.yaml is to say: None for crude samples; no field map: a sample_loader.py."""

    sample_type: type[Any] | None
    field_map: dict[str, str] | None


def _not_excluded(shards: Iterable[str], regex: str | None) -> list[str]:
    try:
        return [shard for shard in shards if not (regex and re.search(regex, shard))]
    except re.error as error:
        raise ValueError(f"--exclude {regex!r} is not a regular expression: {error}") from error


def _prepared(args: argparse.Namespace) -> bool:
    """Whether anything that is to be written is there."""
    names = {".info.json", ".info.yaml", "split.yaml", "index.sqlite"}
    if not args.skip_dataset_yaml and (args.sample_type or not args.non_interactive):
        names.add(args.dataset_yaml_name)
    meta = os.path.join(args.path, metadata.META_FOLDER)
    return os.path.isdir(meta) and not names.isdisjoint(os.listdir(meta))


def _part_and_pattern(text: str) -> tuple[str, str]:
    part, colon, pattern = text.partition(":")
    if not (part and colon and pattern):
        raise ValueError(f"--split-parts must be PART:PATTERN, train:train/.* say, not {text!r}")
    return part, pattern


def _about_samples(args: argparse.Namespace, shard: str, interactive: bool) -> About | None:
    """What the options or the answers say of the samples; None: dataset.yaml is left alone."""
    if args.field_map and not args.sample_type and not interactive:
        raise ValueError("--field-map needs --sample-type.")
    sample_type, field_map = None, None
    if args.sample_type:
        sample_type = sample_type_named(args.sample_type)
    elif not interactive:
        return None
    if args.field_map:
        field_map = _json_map(args.field_map)
    if interactive and not (args.sample_type and (field_map or sample_type is None)):
        look = assistant.look_into(args.path, shard)
        assistant.show_parts(look)
        if not args.sample_type:
            sample_type = assistant.ask_sample_type(look)
        if sample_type is not None and field_map is None:
            return About(sample_type, assistant.ask_field_map(sample_type, look))
    if sample_type is None:  # a field map is of no use then, and megatron-energon ignores it too
        return About(None, None)
    if field_map is not None:
        check_field_map(sample_type, field_map)
    return About(sample_type, field_map)


def _json_map(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--field-map is not JSON: {error}. It is {text!r}.") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(
            f'--field-map must be a JSON object such as {{"image": "jpg"}}, not {text!r}.'
        )
    return found


def _next_steps(
    args: argparse.Namespace, ratio: Sequence[tuple[str, float]] | None, about: About | None
) -> None:
    name = args.dataset_yaml_name
    config = metadata.meta_file(args.path, name)
    if about is None:
        if not config.exists():
            print(f"\nNext: write {config}, or prepare again with --sample-type.")
        return
    options = "" if name == metadata.DATASET_YAML else f"\n    dataset_config={json.dumps(name)},"
    if about.sample_type is not None and about.field_map is None:
        print(f"\nNext: fill in {config.with_name('sample_loader.py')}, then:\n")
        options += "\n    trust_dataset_code=True,  # it runs sample_loader.py"
    else:
        _check_first_samples(args)
        print(f"\nCheck every sample: {shlex.join(['energon-fn', 'lint', args.path])}")
        print("\nNext, in Python:\n")
    path = json.dumps(os.path.abspath(args.path), ensure_ascii=False)
    print(SNIPPET.format(path=path, options=options))
    if about.sample_type is None:
        print("\nIts samples are dicts of parts; cookers in a task encoder make more of them.")
    if not args.non_interactive:
        print("\nThe same without questions:\n\n  " + _without_questions(args, ratio, about))


SNIPPET = """\
from energon_fn import get_loader, get_train_dataset

loader = get_loader(get_train_dataset(
    {path},
    batch_size=8,
    shuffle_buffer_size=100,
    max_samples_per_sequence=100,{options}
))
for batch in loader:
    print(batch)
    break"""


def _without_questions(
    args: argparse.Namespace, ratio: Sequence[tuple[str, float]] | None, about: About
) -> str:
    words = ["energon-fn", "prepare", args.path, "--non-interactive", "--force-overwrite"]
    if ratio:
        words += ["--split-ratio", ",".join(f"{share:g}" for _, share in ratio)]
    for text in args.split_parts or ():
        words += ["--split-parts", text]
    if args.exclude:
        words += ["--exclude", args.exclude]
    if args.shuffle_tars:
        words += ["--shuffle-tars"]
    words += ["--sample-type", about.sample_type.__name__ if about.sample_type else assistant.CRUDE]
    if about.field_map:
        words += ["--field-map", json.dumps(about.field_map)]
    if args.dataset_yaml_name != metadata.DATASET_YAML:
        words += ["--dataset-yaml-name", args.dataset_yaml_name]
    return shlex.join(words)


def _check_first_samples(args: argparse.Namespace) -> None:
    """Warn if what was declared does not fit the first sample of each part."""
    for part in metadata.read_split_config(args.path).split_parts:
        source = open_source(args.path, part, dataset_config=args.dataset_yaml_name)
        if len(source):
            try:
                source.to_sample(decoder()(source.load(0)))
            except SampleError as error:
                logger.warning("%s", error)
                return


def _bar(items: Iterable[Any], count: int, show: bool | None) -> Iterable[Any]:
    return tqdm(
        items,
        total=count,
        desc="indexing",
        unit=" shards",
        leave=False,
        disable=None if show is None else not show,
    )


# -------------------------------------------------------------------------------------------- info


def info(args: argparse.Namespace) -> int:
    _show_info(args.path, args.dataset_config, args.split_config)
    return 0


def _show_info(path: str, dataset_config: str, split_config: str) -> None:
    prepared = _is_prepared(path)
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
            f"{one_line(part):<{widest}}  {_count(count, 'sample'):>14}  {size(total):>9}"
            for part, (count, total) in parts.items()
        ),
    )
    rows += [("shards", _range_of(list(counts)))]
    there = [name for name in counts if os.path.exists(os.path.join(root, name))]
    if missing := [name for name in counts if name not in set(there)]:
        rows += [("missing", _some(missing))]
    total = sum(files.size_mtime(os.path.join(root, name))[0] for name in there)
    print(
        f"{path}: {_count(sum(counts.values()), 'sample')} in {_count(len(counts), 'shard')}, "
        + size(total)
        + ("" if prepared else ", not prepared")
    )
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
            f"{part:<{widest}}  {_count(count, 'sample'):>14}  {100 * count / total:5.1f} %  "
            f"{_count(len(shards), 'shard')}"
        )
    rows = _labelled("splits", texts)
    return rows + ([("excluded", _some(split.exclude))] if split.exclude else [])


def _parts(path: str) -> dict[str, tuple[int, int]]:
    """Part name -> in how many samples, how many bytes in all."""
    if _is_prepared(path):
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


def _is_prepared(path: str) -> bool:
    return os.path.isdir(os.path.join(path, metadata.META_FOLDER))


def _range_of(shards: Sequence[str]) -> str:
    patterns = collapse_braces(shards)
    return ", ".join(patterns if len(patterns) <= 3 else [*patterns[:2], "...", patterns[-1]])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")


def _count(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


# -------------------------------------------------------------------------------------------- lint


def lint(args: argparse.Namespace) -> int:
    bad_samples = bad_shards = 0

    def show(bad: BadSample) -> None:
        nonlocal bad_samples, bad_shards
        bad_samples += bad.key is not None
        bad_shards += bad.key is None
        tqdm.write(one_line(str(bad)), file=sys.stdout)
        sys.stdout.flush()

    sources: list[Source] = []
    try:
        sources = _sources(args, args.split_part)
    except DatasetError:
        if args.split_part or _is_prepared(args.path):
            raise
        for found in open_shards(args.path):  # one broken shard must not hide the others
            if isinstance(found, BadSample):
                show(found)
            else:
                sources.append(found)
    total = sum(map(len, sources))
    shards = bad_shards + sum(len({s.shard for s in source.segments}) for source in sources)
    with tqdm(total=total, desc="lint", unit=" samples", leave=False, disable=None) as bar:
        for source in sources:
            for bad in bad_samples_of(source, args.image_decode, args.num_workers, bar.update):
                show(bad)
    counts = [(bad_samples, "bad sample"), (bad_shards, "unreadable shard")]
    problems = " and ".join(_count(count, thing) for count, thing in counts if count)
    print(
        f"{_count(total, 'sample')} in {_count(shards, 'shard')}: "
        + (problems or "all can be read and decoded")
    )
    return BAD if problems else 0


def _sources(args: argparse.Namespace, parts: list[str] | None) -> list[Source]:
    """The given parts of the dataset that the options name; None: all there are."""
    if parts is None:
        parts = ["train"]
        if _is_prepared(args.path):
            parts = list(metadata.read_split_config(args.path, args.split_config).split_parts)
    return [
        open_source(
            args.path,
            part,
            dataset_config=args.dataset_config,
            split_config=args.split_config,
            trust_dataset_code=args.trust,
        )
        for part in parts
    ]


# ----------------------------------------------------------------------------------------- preview


def preview(args: argparse.Namespace) -> int:
    if args.sheet and not args.sheet.lower().endswith(".png"):
        raise ValueError(f"--sheet writes a PNG file: {args.sheet!r} must end in .png")
    count = args.n or (24 if args.sheet else 5)
    decode = decoder()
    sources = [source for source in _sources(args, args.split_part) if len(source)]
    if not sources:
        raise ValueError(f"{args.path} has no samples there")
    cells: list[tuple[Any, str]] = []
    failed = 0
    for source in sources if args.split_part else sources[:1]:
        for i in _spread(len(source), count):
            raw = source.load(i)
            heading = f"{source.split_part} {i}: {raw['__key__']} in {_shard_of(raw)}"
            try:
                sample = source.to_sample(decode(raw))
            except Exception as error:  # a sample loader's may be any
                failed += 1
                print(one_line(heading), f"  error: {one_line(str(error))}\n", sep="\n")
                continue
            fields = sample if isinstance(sample, dict) else vars(sample)
            fields = {name: value for name, value in fields.items() if not name.startswith("__")}
            if args.sheet:
                cells.append((_picture(fields), _caption(fields) or raw["__key__"]))
            else:
                _show_sample(heading, fields)
    if args.sheet:
        _write_sheet(args.sheet, cells)
    return BAD if failed else 0


def _spread(length: int, count: int) -> Iterator[int]:
    """``count`` positions, evenly over ``length``: samples of the same kind often lie together."""
    count = min(count, length)
    return (i * length // count for i in range(count))


def _shard_of(raw: dict[str, Any]) -> str:
    return str(raw["__sources__"][0].shard_name)


def _show_sample(heading: str, fields: dict[str, Any]) -> None:
    width = columns() - 1
    print(one_line(heading))
    widest = min(max(map(len, fields), default=0), width // 3)
    for name, value in fields.items():
        start = f"  {one_line(name):<{widest}}  "
        print(start + describe(value, width - len(start)))
    picture = _picture(fields) if can_draw(sys.stdout) else None
    if picture is not None:
        for line in half_blocks(picture, min(width - 2, 64), 18):
            print("  " + line)
    print()


def _picture(fields: dict[str, Any]) -> Any:
    """The first picture in the fields, or None."""
    values = [v for value in fields.values() for v in (value if _is_list(value) else [value])]
    return next((found for value in values if (found := picture_of(value)) is not None), None)


def _caption(fields: dict[str, Any]) -> str:
    """The texts and numbers in the fields."""
    texts = []
    for name, value in fields.items():
        if isinstance(value, int | float):
            texts.append(f"{name}: {value}")
        texts += [v for v in (value if _is_list(value) else [value]) if isinstance(v, str)]
    return " · ".join(texts)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _write_sheet(path: str, cells: list[tuple[Any, str]]) -> None:
    if all(picture is None for picture, _ in cells):
        raise ValueError("there are no pictures in these samples to draw a sheet of")
    pictures, captions = zip(*cells, strict=True)
    sheet = contact_sheet(pictures, captions, columns=min(6, math.ceil(len(cells) ** 0.5)))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    files.write_atomic(path, file.getvalue())
    print(f"{path}: {_count(len(cells), 'sample')}, {sheet.width} x {sheet.height} pixels")


# -------------------------------------------------------------------------------------------- demo


def demo(args: argparse.Namespace) -> int:
    run_demo(args.folder)
    return 0


# -------------------------------------------------------------------------------------- checkpoint


def checkpoint(args: argparse.Namespace) -> int:
    """Show or redistribute the states in ``args.files``."""
    states = [read_state(file) for file in args.files]
    if args.action == "info":
        print(describe_state(merge(states)))
        return 0
    world_size, out = int(args.new_world_size[0]), Path(args.new_world_size[1])
    ranks, suffix = redistribute(states, world_size), Path(args.files[0]).suffix
    out.mkdir(parents=True, exist_ok=True)
    for rank, state in enumerate(ranks):
        write_state(out / f"rank_{rank:05d}{suffix}", state)
    print(f"{len(ranks)} states are in {out}: rank r loads {out}/rank_0000r{suffix}")
    return 0
