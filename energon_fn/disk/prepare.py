"""Prepare a folder of shards: index them, split them, write the ``.nv-meta`` folder.

What is written is what the published megatron-energon 7 writes, so it can load the dataset::

    .nv-meta/index.sqlite    where every sample and part lies
    .nv-meta/index.uuid      changes with the index
    .nv-meta/.info.json      how many samples each shard has
    .nv-meta/split.yaml      which shards are for training, validation, test
    .nv-meta/dataset.yaml    what a sample is (write_dataset_yaml)
    shard.tar.idx            the samples' offsets, beside every uncompressed shard

With media metadata the index has that too (:mod:`energon_fn.disk.media`).

Everything is written under temporary names and renamed at the end: a prepare that fails or is
interrupted leaves what was there.
"""

from __future__ import annotations

import json
import os
import random
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from energon_fn.disk import files, media
from energon_fn.disk.braces import expand_braces
from energon_fn.disk.duplicates import put_in_folder
from energon_fn.disk.fields import required_fields, sample_fields, sample_type_named
from energon_fn.disk.index import Index, has_parts, write_index, write_media
from energon_fn.disk.metadata import (
    DATASET_YAML,
    INFO_JSON,
    META_FOLDER,
    SPLIT_YAML,
    SplitConfig,
    info_text,
    is_prepared,
    meta_file,
    read_info,
    split_text,
    write_dataset_config,
)
from energon_fn.disk.tars import Media, ShardIndex, idx_bytes, in_order, index_shards
from energon_fn.errors import DatasetError, logger
from energon_fn.samples import BOOKKEEPING

SAMPLE_LOADER = "sample_loader.py"
INDEX_SQLITE = "index.sqlite"

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2")
_VIDEOS = ("mp4", "webm", "mkv", "mov", "avi")
# What is found in parts of these endings, unless a part is called like the field.
_ENDINGS = {
    "image": _IMAGES,
    "images": _IMAGES,
    "video": _VIDEOS,
    "caption": ("txt",),
    "text": ("txt",),
    "context": ("txt",),
    "label": ("cls", "index"),
}
# What the field may be called in a json.
_JSON_NAMES = {
    "caption": ("caption", "text"),
    "context": ("context", "question"),
    "answers": ("answers", "answer"),
    "label_name": ("label_name", "class_name"),
}


def prepare_dataset(
    path: str | Path,
    shards: Iterable[str | Path],
    *,
    split_parts_ratio: Sequence[tuple[str, float]] | None = None,
    split_parts_patterns: Sequence[tuple[str, str]] | None = None,
    progress_fn: Callable[..., Iterable[Any]] | None = None,
    tar_index_only: bool = False,
    shuffle_seed: int | None = 42,
    workers: int = 32,
    media_filter: str | None = None,
    fix_duplicates: bool = False,
) -> tuple[set[str], list[tuple[str, int]]]:
    """Index the shards, split them and write ``.nv-meta``; like megatron-energon's function.

    Args:
        path: the dataset's folder.
        shards: tars relative to it, in the order that they are to have; braces are expanded.
        split_parts_ratio: ``[("train", 8), ("val", 1), ("test", 1)]``, see :func:`split_by_ratio`.
        split_parts_patterns: ``[("train", "train/.*")]``, see :func:`split_by_patterns`. Exactly
            one of the two is needed, unless ``tar_index_only``.
        progress_fn: ``progress_fn(iterator, length)`` yields on what the iterator gives, one item
            per shard.
        tar_index_only: make the indices and counts again; ``split.yaml`` stays as it is.
        shuffle_seed: shuffles the shards before they are split by ratio; None keeps their order.
        workers: how many shards are indexed at the same time, at most.
        media_filter: which files' media metadata is kept, see :func:`media.media_metadata`. None:
            as in the index that is there; nobody's if there is none. It is made again in any case.
        fix_duplicates: if there are duplicate keys, **write all shards again** with their names as
            folders in the keys, see :mod:`energon_fn.disk.duplicates`.

    Returns:
        The part names found, and the duplicate keys, each with the number of samples that have it.
        **With duplicate keys nothing is written** (:func:`explain_duplicates` says what to do).

    Raises DatasetError for missing, broken and empty shards and for a split that makes no sense.

    >>> import io, tarfile, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with tarfile.open(f"{folder}/a.tar", "w") as tar:
    ...         for name in ("0001.jpg", "0001.txt", "0002.jpg"):
    ...             tar.addfile(tarfile.TarInfo(name))
    ...     parts, duplicates = prepare_dataset(
    ...         folder, ["a.tar"], split_parts_ratio=[("train", 1), ("val", 0)], workers=1)
    ...     sorted(parts), duplicates, sorted(p.name for p in Path(folder, ".nv-meta").iterdir())
    (['jpg', 'txt'], [], ['.info.json', 'index.sqlite', 'index.uuid', 'split.yaml'])
    """
    root = Path(path)
    names = _shard_names(root, shards)
    split = None
    if split_parts_ratio is not None and split_parts_patterns is not None:
        raise DatasetError("give split_parts_ratio or split_parts_patterns, not both.")
    if split_parts_ratio is not None:
        split = split_by_ratio(names, split_parts_ratio, shuffle_seed)
    elif split_parts_patterns is not None:
        split = split_by_patterns(names, split_parts_patterns)
    elif not tar_index_only:
        raise DatasetError(
            "split_parts_ratio or split_parts_patterns is needed. Give for example "
            'split_parts_ratio=[("train", 8), ("val", 1), ("test", 1)].'
        )
    if tar_index_only:
        split = None
    filters = media.filters_of(meta_file(root, INDEX_SQLITE))
    if media_filter is not None:
        media.check_filter(media_filter)
        filters = (media_filter,)
    progress = progress_fn or (lambda items, length: items)

    def write() -> set[str]:
        walk = partial(media.index_shard_with_media, filters) if filters else None
        with _folder(root / META_FOLDER):  # first: if that is not allowed, nothing is to be begun
            indexed = index_shards(root, names, _pool_size(workers), walk)
            return _write(root, progress(indexed, len(names)), split, filters)

    try:
        return write(), []
    except _DuplicatesError as error:
        if not fix_duplicates or error.twice_in:
            why = explain_duplicates(error.keys)
            if fix_duplicates:
                why = f"keys occur more than once within a shard: {', '.join(error.twice_in[:5])}. "
                why += "Keep the files of one sample together there, or exclude it."
            logger.error("%s: nothing was written: %s", root, why)
            return error.part_names, error.keys
        todo = [name for name in names if name not in error.fixed]
    logger.warning("%s: keys occur in several shards; writing %d of them again", root, len(todo))
    for name in progress(iter(todo), len(todo)):
        put_in_folder(root / name, name)
    return write(), []


def write_media_metadata(
    path: str | Path,
    media_filter: str,
    *,
    workers: int = 32,
    progress_fn: Callable[..., Iterable[Any]] | None = None,
) -> int:
    """Keep the media metadata of all files in a folder; like `energon prepare-media`.

    It is kept in ``.nv-meta/index.sqlite``. If the folder is a prepared dataset, it is that of the
    files in its shards, as if it had been prepared with it; else of the files below it. What was
    kept before is made again.

    Args:
        path: the folder.
        media_filter: which files, see :func:`media.media_metadata`.
        workers: how many shards or files are read at the same time, at most.
        progress_fn: ``progress_fn(iterator, length)`` yields on what the iterator gives, one item
            per shard or file.

    Returns:
        Of how many files it is; broken ones are left out and told of.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("RGB", (20, 10)).save(f"{folder}/a.png")
    ...     count = write_media_metadata(folder, "*.png", workers=1)
    ...     count, media.read_media_metadata(f"{folder}/.nv-meta/index.sqlite", "a.png")
    (1, ImageMetadata(width=20, height=10, format='PNG', mode='RGB'))
    """
    root, filters = Path(path), (media_filter,)
    media.check_filter(media_filter)
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder. Give the folder that holds the files.")
    database = meta_file(root, INDEX_SQLITE)
    found: Iterable[Sequence[Media]]
    prepared = is_prepared(root)
    with _folder(root / META_FOLDER):  # first: if that is not allowed, nothing is to be begun
        if prepared:
            if not has_parts(database):
                raise DatasetError(
                    f"{database} does not say where the files lie: an older release made it. "
                    f"Prepare the dataset again: `energon-fn prepare {root}`."
                )
            counts = read_info(root)
            index = Index(str(database), str(root), tuple(counts))
            shards = [(index, i, count, filters) for i, count in enumerate(counts.values())]
            length = len(shards)
            found = in_order(media.media_of_shard, shards, _pool_size(workers))
        else:
            names = [name for name in files.list_files(root, META_FOLDER)
                     if media.is_wanted(name, media_filter)]  # fmt: skip
            if not names:
                raise DatasetError(
                    f"{root} has no media files: none below it is wanted by {media_filter!r}."
                )
            length = len(names)
            some = [(str(root), names[i : i + _FILES], filters) for i in range(0, length, _FILES)]
            results = in_order(media.media_of_files, some, _pool_size(workers))
            found = ([one] if one else [] for result in results for one in result)
        if progress_fn is not None:
            found = progress_fn(found, length)
        rows = media.filter_rows(filters)
        return write_media(database, found, rows, str(database) if prepared else None)


_FILES = 64  # files that a process reads at a time


def _pool_size(workers: int) -> int:
    """Walking a tar is work for a processor, on a slow disk it is waiting: a few to each."""
    if workers < 1:
        raise DatasetError(f"workers must be 1 or more, not {workers}.")
    return min(workers, 4 * (os.cpu_count() or 1))


class BaseWebdatasetFactory:
    """The published name of :func:`prepare_dataset`; no class is needed for it."""

    prepare_dataset = staticmethod(prepare_dataset)


def explain_duplicates(duplicates: Sequence[tuple[str, int]]) -> str:
    """What to tell the user of the duplicate keys that :func:`prepare_dataset` returned.

    >>> explain_duplicates([("0001", 2)])
    "1 key occurs more than once: '0001' (2 samples). Keys ... unique in a dataset: ..."
    """
    shown = ", ".join(f"{key!r} ({count} samples)" for key, count in duplicates[:5])
    return (
        (f"{len(duplicates)} keys occur" if len(duplicates) > 1 else "1 key occurs")
        + f" more than once: {shown}{', ...' if len(duplicates) > 5 else ''}. Keys must be unique "
        "in a dataset: let `energon-fn prepare --fix-duplicates` write the shards again with the "
        "shard's name as a folder in each key (shard_0.tar/0001.jpg), or keep the files of one "
        "sample together, or exclude a shard."
    )


# ----------------------------------------------------------------------------------------- splits


def split_by_ratio(
    shards: Sequence[str], ratio: Sequence[tuple[str, float]], shuffle_seed: int | None = None
) -> dict[str, tuple[str, ...]]:
    """Share out the shards in the given proportions, in order, each to exactly one part.

    Part k ends at the floor of its cumulated share, as in megatron-energon (which counts in floats
    and so may lose the last shard). The shuffle is its own too, so the split is the same.

    >>> split_by_ratio(["a", "b", "c", "d"], [("train", 2), ("val", 1), ("test", 1)])
    {'train': ('a', 'b'), 'val': ('c',), 'test': ('d',)}
    """
    try:
        shares = [Fraction(str(share)) for _, share in ratio]
    except ValueError as error:
        raise DatasetError(f"the split ratio {list(ratio)} is not made of numbers") from error
    total = sum(shares)
    if min(shares, default=Fraction(-1)) < 0 or not total:
        raise DatasetError(
            f"the split ratio {list(ratio)} must be of numbers >= 0, not all 0. "
            'For example [("train", 8), ("val", 1), ("test", 1)].'
        )
    shards = list(shards)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(shards)
    ends = [len(shards) * share // total for share in accumulate(shares)]
    parts: dict[str, tuple[str, ...]] = {}
    for (part, _), (start, end) in zip(ratio, pairwise([0, *ends]), strict=True):
        parts[part] = parts.get(part, ()) + tuple(shards[start:end])
    if empty := [part for part, share in ratio if share and not parts[part]]:
        logger.warning(
            f"{len(shards)} shards are too few for {', '.join(f'{p} {s}' for p, s in ratio)}: "
            f"{' and '.join(empty)} got none. Take another ratio, or name shards by pattern."
        )
    return parts


def split_by_patterns(
    shards: Sequence[str], patterns: Sequence[tuple[str, str]]
) -> dict[str, tuple[str, ...]]:
    """Put into each part the shards whose name begins with a match of its pattern.

    A pattern is a regular expression in which ``{000..099}`` and ``{a,b}`` are expanded first. A
    part may have several patterns; a shard may be in several parts or in none.

    >>> split_by_patterns(["t1.tar", "t2.tar", "v1.tar"], [("train", "t.*"), ("val", "v{0..2}")])
    {'train': ('t1.tar', 't2.tar'), 'val': ('v1.tar',)}
    """
    parts: dict[str, tuple[str, ...]] = {}
    for part, pattern in patterns:
        try:
            # Brace expansion would take the backslashes of the regular expression away.
            expanded = expand_braces(pattern.replace("\\", "\\\\"))
            matches = [re.compile(one).match for one in expanded]
        except (DatasetError, re.error) as error:
            raise DatasetError(
                f"split part {part!r}: the pattern {pattern!r} is not a regular expression: {error}"
            ) from error
        found = [shard for shard in shards if any(match(shard) for match in matches)]
        if not found:
            logger.warning(
                "split part %r: no shard's name begins with a match of %r; the first shard is %r",
                part,
                pattern,
                shards[0] if shards else None,
            )
        old = parts.get(part, ())
        parts[part] = (*old, *(shard for shard in found if shard not in set(old)))
    if not any(parts.values()):
        raise DatasetError(
            f"no shard is in any split part: {list(patterns)} are matched from the beginning of "
            f"names such as {shards[0] if shards else None!r}. Correct the patterns."
        )
    return parts


# -------------------------------------------------------------------------------------- sample type


def guess_field_map(
    sample_type: str | type[Any],
    parts: Iterable[str],
    example: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """A field map for what the shards hold, as a proposal: fields without a guess are left out.

    ``parts`` are the part names found; ``example`` is a raw or decoded sample, whose json parts are
    looked into. A part called like the field goes first (``caption.txt``), then a part of the
    usual kind (``jpg`` for an image), then a key of a json.

    >>> guess_field_map("CaptioningSample", {"jpg", "txt", "json"})
    {'image': 'jpg', 'caption': 'txt'}
    >>> guess_field_map("CaptioningSample", {"png", "json"}, {"json": b'{"caption": "a cat"}'})
    {'image': 'png', 'caption': 'json[caption]'}
    """
    if isinstance(sample_type, str):
        named = sample_type_named(sample_type)
        if named is None:
            return {}
        sample_type = named
    parts = sorted(parts, key=lambda part: (part.count("."), part))
    jsons = {p: _json_object((example or {}).get(p)) for p in parts if _ending(p) == "json"}
    guessed = {}
    taken: set[str] = set()
    for field in sample_fields(sample_type):
        if field in BOOKKEEPING:
            continue
        found = (
            [part for part in parts if part.split(".")[0] == field]
            or _by_ending(parts, _ENDINGS.get(field, ()), taken)
            or [
                f"{part}[{key}]"
                for key in _JSON_NAMES.get(field, (field,))
                for part, content in jsons.items()
                if key in content
            ][:1]
        )
        if found:
            guessed[field] = ",".join(found)
            taken.update(found)
    return guessed


def write_dataset_yaml(
    path: str | Path,
    sample_type: str | type[Any] | None,
    field_map: Mapping[str, str] | None = None,
    *,
    parts: Iterable[str] = (),
    name: str = DATASET_YAML,
) -> list[Path]:
    """Write ``.nv-meta/dataset.yaml`` (or ``name``); return the files written.

    ``sample_type`` may be ``"CrudeWebdataset"`` or None for a crude dataset. With a sample type but
    no field map, a ``sample_loader.py`` to be filled in is written beside it, unless there is one.
    ``parts`` are the part names for its comments.
    """
    if isinstance(sample_type, str):
        sample_type = sample_type_named(sample_type)
    if sample_type is None or field_map is not None:
        return [write_dataset_config(path, sample_type, field_map, name=name)]
    loader = meta_file(path, SAMPLE_LOADER)
    written = []
    if not loader.exists():
        loader.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(loader, sample_loader_template(sample_type, parts).encode())
        written.append(loader)
    config = write_dataset_config(
        path,
        sample_type,
        sample_loader=f"{SAMPLE_LOADER}:sample_loader",
        part_filter=f"{SAMPLE_LOADER}:part_filter",
        name=name,
    )
    return [*written, config]


def sample_loader_template(sample_type: type[Any], parts: Iterable[str]) -> str:
    """The text of a ``sample_loader.py`` that is to be filled in.

    >>> from energon_fn.samples import TextSample
    >>> print(sample_loader_template(TextSample, ["txt"]))
    # Makes a TextSample of the parts of a sample: fill in every "FIXME".
    ...
    """
    parts = sorted(parts)
    required = required_fields(sample_type)
    fields = "".join(
        f'        {"" if name in required else "# "}{name}=raw["FIXME"],  # {field.type}'
        f"{'' if name in required else ', optional'}\n"
        for name, field in sample_fields(sample_type).items()
        if name not in BOOKKEEPING
    )
    return f'''# Makes a {sample_type.__name__} of the parts of a sample: fill in every "FIXME".
# Reading this dataset runs this file, so it has to be allowed: trust_dataset_code=True or --trust.


def sample_loader(raw: dict) -> dict:
    """`raw` has the decoded parts by name: {", ".join(parts) or "none found"}."""
    return dict(
        __key__=raw["__key__"],
{fields}    )


def part_filter(part: str) -> bool:
    """Only the parts for which this is true are read and decoded."""
    return part in {(*parts,)!r}
'''


# ----------------------------------------------------------------------------------------- helpers


class _DuplicatesError(Exception):
    """Leaves the block that would rename what was written."""

    def __init__(
        self,
        part_names: set[str],
        keys: list[tuple[str, int]],
        twice_in: list[str],
        fixed: set[str],
    ) -> None:
        super().__init__(keys)
        self.part_names = part_names
        self.keys = keys
        self.twice_in = twice_in
        """The shards that have a key more than once by themselves."""
        self.fixed = fixed
        """The shards whose keys are all in a folder called as the shard."""


def _write(
    root: Path,
    indexed: Iterable[ShardIndex],
    split: Mapping[str, tuple[str, ...]] | None,
    media_filters: Sequence[str],
) -> set[str]:
    """Write everything under temporary names, then rename; returns the part names."""
    with ExitStack() as renamed:

        def staged(path: Path) -> Path:
            return Path(renamed.enter_context(files.replacing(path)))

        # The last is renamed first: the .idx files (each right for its shard in any case), the
        # index, and what describes it.
        if split is not None:
            text = split_text(SplitConfig(split))
            staged(meta_file(root, SPLIT_YAML)).write_bytes(text.encode())
        info = staged(meta_file(root, INFO_JSON))
        staged(meta_file(root, "index.uuid")).write_text(str(uuid.uuid4()))
        sqlite = staged(meta_file(root, INDEX_SQLITE))
        twice_in: list[str] = []
        fixed: set[str] = set()

        def with_idx() -> Iterator[ShardIndex]:
            for shard in indexed:
                if not len(shard):
                    raise DatasetError(
                        f"{root / shard.name} has no samples (files called KEY.PART). "
                        "Remove the shard, or exclude it."
                    )
                if len({*shard.keys}) < len(shard):
                    twice_in.append(shard.name)
                if all(key.startswith(f"{shard.name}/") for key in shard.keys):
                    fixed.add(shard.name)
                idx, data = _idx_path(root, shard.name), idx_bytes(shard)
                if idx is not None and not _holds(idx, data):
                    staged(idx).write_bytes(data)
                yield shard

        summary = write_index(sqlite, with_idx(), media.filter_rows(media_filters))
        part_names = set(summary.part_names)
        if summary.duplicates:
            repeats = Counter(key for key, _ in summary.duplicates)
            keys = [(key, n + 1) for key, n in repeats.items()]
            raise _DuplicatesError(part_names, keys, twice_in, fixed)
        info.write_bytes(info_text(summary.counts).encode())
    return part_names


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """The folder, there while the block runs, and afterwards if anything is in it."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DatasetError(
            f"{folder} cannot be made: {error}. Preparing writes beside the shards: copy or link "
            "them to where you may write."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def _shard_names(root: Path, shards: Iterable[str | Path]) -> list[str]:
    if isinstance(shards, str | Path):
        shards = [shards]
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder. Give the folder that holds the shards.")
    names: list[str] = []
    for shard in shards:
        name = Path(os.path.normpath(shard)).as_posix()
        pattern = "{" in name and not (root / name).exists()
        names += expand_braces(name) if pattern else [name]
    if not names:
        raise DatasetError(
            f"no shards to prepare in {root}: a shard is called *.tar, *.tar.gz or *.tgz."
        )
    for name, count in Counter(names).items():
        if count > 1:
            raise DatasetError(f"the shard {name!r} is listed {count} times: list it once.")
        if name.startswith(("/", "../")) or not files.is_tar(name):
            raise DatasetError(
                f"{name!r} is not a shard's name: it must be relative to {root}, lie in it and end "
                f"in {', '.join(files.TAR_SUFFIXES)}."
            )
    return names


def _idx_path(root: Path, shard: str) -> Path | None:
    """Where megatron-energon looks for a shard's offsets; it cannot read compressed shards."""
    return root / f"{shard}.idx" if shard.endswith(".tar") else None


def _holds(path: Path, data: bytes) -> bool:
    return path.exists() and files.read_bytes(path) == data


def _ending(part: str) -> str:
    return part.rpartition(".")[2].lower()


def _by_ending(parts: Sequence[str], endings: Sequence[str], taken: set[str]) -> list[str]:
    """The parts that are nothing but a usual ending; else the only part that has one."""
    plain = [ending for ending in endings if ending in parts]
    if plain:
        return [part for part in plain if part not in taken]
    dotted = [part for part in parts if _ending(part) in endings and part not in taken]
    return dotted if len(dotted) == 1 else []


def _json_object(value: Any) -> Mapping[str, Any]:
    if isinstance(value, bytes | str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return value if isinstance(value, Mapping) else {}
