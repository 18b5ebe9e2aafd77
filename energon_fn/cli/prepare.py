"""``energon-fn prepare`` and ``prepare-media``: make what is needed to read a dataset."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from energon_fn.cli import assistant
from energon_fn.cli.info import range_of, show_folder, show_jsonl, show_metadataset
from energon_fn.decoding import decoder
from energon_fn.disk import files, media, metadata
from energon_fn.disk.fields import check_field_map, sample_type_named
from energon_fn.disk.jsonl import is_jsonl, jsonl_files, prepare_jsonl
from energon_fn.disk.prepare import prepare_dataset, write_dataset_yaml, write_media_metadata
from energon_fn.disk.source import open_source
from energon_fn.errors import SampleError, logger
from energon_fn.look.values import counted
from energon_fn.recipes.metadataset import is_metadataset
from energon_fn.recipes.opening import prepare_metadataset

ERROR = 2


def prepare(args: argparse.Namespace) -> int:
    folder = args.path
    if is_jsonl(folder):
        return _prepare_jsonl(args)
    if is_metadataset(folder):
        return _prepare_metadataset(args)
    if not os.path.isdir(folder):
        raise ValueError(
            f"{folder} is not a folder. Give the folder that holds the shards, a .jsonl file or "
            "the .yaml of a metadataset."
        )
    if args.tar_index_only:
        shards = list(metadata.read_info(folder))
    else:
        shards = _not_excluded(files.list_tars(folder), args.exclude)
    if not shards:
        raise ValueError(
            f"no shards to prepare in {folder}: no file below it ends in "
            f"{', '.join(files.TAR_SUFFIXES)}" + (" and is not excluded." if args.exclude else ".")
        )
    print(f"{folder}: {counted(len(shards), 'shard')}, {range_of(shards)}")

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
        media_filter=args.media_metadata_by,
        fix_duplicates=args.fix_duplicates,
    )
    if duplicates:  # the log has told which
        return ERROR
    if about is not None:
        name = args.dataset_yaml_name
        write_dataset_yaml(folder, about.sample_type, about.field_map, parts=part_names, name=name)
    print()
    show_folder(folder, args.dataset_yaml_name, metadata.SPLIT_YAML)
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
    if args.media_metadata_by in media.FILTERS:
        words += [f"--media-metadata-by-{args.media_metadata_by}"]
    elif args.media_metadata_by:
        words += ["--media-metadata-by-glob", args.media_metadata_by]
    if args.fix_duplicates:
        words += ["--fix-duplicates"]
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


def _bar(
    items: Iterable[Any],
    count: int,
    show: bool | None,
    desc: str = "indexing",
    unit: str = "shards",
) -> Iterable[Any]:
    return tqdm(
        items,
        total=count,
        desc=desc,
        unit=f" {unit}",
        leave=False,
        disable=None if show is None else not show,
    )


def _prepare_jsonl(args: argparse.Namespace) -> int:
    """Index files of JSON lines: there is nothing to split and to ask."""
    _warn_of_ignored(args, "A file of JSON lines has no split, and its samples are crude.")
    for file in jsonl_files(args.path):
        with tqdm(
            total=files.size_mtime(file)[0],
            desc="indexing",
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None if args.progress is None else not args.progress,
        ) as bar:
            prepare_jsonl(file, bar.update)
    show_jsonl(args.path)
    print(f"\nCheck every sample: {shlex.join(['energon-fn', 'lint', args.path])}")
    print("\nNext, in Python:\n")
    path = json.dumps(os.path.abspath(args.path), ensure_ascii=False)
    print(SNIPPET.format(path=path, options=""))
    print("\nIts samples are dicts; cookers in a task encoder make more of them.")
    return 0


def _prepare_metadataset(args: argparse.Namespace) -> int:
    """Make the indexes of its joins; its datasets are prepared one by one."""
    _warn_of_ignored(args, "Of a metadataset the indexes of joins are made, and nothing else.")
    done = prepare_metadataset(args.path, anew=args.force_overwrite)
    show_metadataset(args.path, done.splits)
    print()
    for table in done.removed:
        print(f"removed {table}, which is not used any more")
    for table in done.made:
        print(f"made {table}")
    if not done.made:
        print(
            "Nothing to do: "
            + ("the index of each join is there." if done.kept else "it joins no datasets.")
        )
    print(f"Check every sample: {shlex.join(['energon-fn', 'lint', args.path])}")
    return 0


def _warn_of_ignored(args: argparse.Namespace, why: str) -> None:
    names = ("split_ratio", "split_parts", "exclude", "sample_type", "field_map", "shuffle_tars",
             "fix_duplicates", "media_metadata_by")  # fmt: skip
    if ignored := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]:
        logger.warning("ignored: %s. %s", ", ".join(ignored), why)


def prepare_media(args: argparse.Namespace) -> int:
    unit = "shards" if metadata.is_prepared(args.path) else "files"
    count = write_media_metadata(
        args.path,
        args.media_metadata_by,
        workers=args.num_workers,
        progress_fn=lambda items, length: _bar(items, length, args.progress, "reading", unit),
    )
    database = metadata.meta_file(args.path, "index.sqlite")
    print(f"{args.path}: the metadata of {counted(count, 'media file')} is in {database}")
    return 0
