"""The small text files in a dataset's ``.nv-meta`` folder: sample type, splits, counts.

``dataset.yaml`` says what a sample is: a sample type and where each of its fields comes from.
``split.yaml`` says which shards are for training, validation and test, and what is left out.
``.info.json`` counts the samples of every shard. The format is that of the published
megatron-energon (its document "Dataset Format on Disk"), read and written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from toolz import identity

from energon_fn.disk import files
from energon_fn.disk.braces import collapse_braces, escape_braces, expand_braces
from energon_fn.disk.fields import (
    TRUST_HINT,
    DatasetCode,
    EntryError,
    FieldMap,
    SampleLoader,
    check_field_map,
    required_fields,
    sample_type_named,
    sample_type_of,
    there_are,
)
from energon_fn.errors import DatasetError, logger
from energon_fn.samples import SAMPLE_TYPES

META_FOLDER = ".nv-meta"
DATASET_YAML = "dataset.yaml"
SPLIT_YAML = "split.yaml"
INFO_JSON = ".info.json"
INFO_YAML = ".info.yaml"  # older datasets

# The release of megatron-energon whose format we write; it stands in .info.json, which admits no
# key of our own.
FORMAT_VERSION = "7.4.1"


def meta_file(folder: str | Path, name: str) -> Path:
    """The path of a file in the dataset's ``.nv-meta`` folder.

    >>> meta_file("/data/cats", "split.yaml").as_posix()
    '/data/cats/.nv-meta/split.yaml'
    """
    return Path(folder) / META_FOLDER / name


def is_prepared(folder: str | Path) -> bool:
    """Whether it is a dataset of shards that was prepared.

    >>> is_prepared("/no/such/folder")
    False
    """
    return any(meta_file(folder, name).exists() for name in (INFO_JSON, INFO_YAML))


# ------------------------------------------------------------------------------------ dataset.yaml

_KEYS = ("sample_type", "field_map", "sample_loader", "part_filter", "subflavors", "__module__",
         "__class__")  # fmt: skip
# Options of the loader that megatron-energon takes from here too.
_IGNORED_KEYS = ("decoder", "shuffle_over_epochs", "parallel_shard_iters",
                 "max_samples_per_sequence")  # fmt: skip
# Old dataset classes that leave the sample type to be named.
_FACTORIES = ("StandardWebdatasetFactory", "DefaultGenericWebdatasetFactory")
# Where megatron-energon keeps a sample type that its main module does not export.
_ELSEWHERE = {"VQAOCRSample": "megatron.energon.flavors.vqa_and_ocr"}


def every_part(part: str) -> bool:
    """The part filter that wants everything."""
    return True


@dataclass(frozen=True)
class DatasetConfig:
    """What a ``dataset.yaml`` says, with its names resolved."""

    sample_type: type[Any] | None = None
    """None for a crude dataset, whose samples stay dicts until the user's code cooks them."""
    to_sample: Callable[[dict[str, Any]], Any] = identity
    """Makes a sample of a decoded raw one; a crude one is returned as it is. Pickles."""
    part_filter: Callable[[str], bool] = every_part
    """Says which parts have to be read. Pickles."""
    subflavors: Mapping[str, Any] = field(default_factory=dict)
    field_map: Mapping[str, str] = field(default_factory=dict)
    """As it is written; empty if there is none."""


def read_dataset_config(
    folder: str | Path, name: str = DATASET_YAML, trust_dataset_code: bool = False
) -> DatasetConfig:
    """Read ``.nv-meta/dataset.yaml`` (or the file called ``name`` beside it) and check all of it.

    Raises DatasetError for a missing or broken file, an unknown key, sample type or field, a
    required field that the field map lacks, and for code unless ``trust_dataset_code``.
    """
    path = meta_file(folder, name)
    content = _read_mapping(path, (*_KEYS, *_IGNORED_KEYS))
    if ignored := [key for key in _IGNORED_KEYS if key in content]:
        logger.warning("%s: ignored: %s. Options of the loader are arguments of get_dataset.",
                       path, ", ".join(ignored))  # fmt: skip
    old = "__module__" in content and content.get("__class__") not in _FACTORIES
    with _located(path, *([] if old else ["sample_type"])):
        sample_type = sample_type_of(content if old else content.get("sample_type"),
                                     trust_dataset_code)  # fmt: skip
    with _located(path):
        _check_combination(sample_type, content)
        subflavors = content.get("subflavors") or {}
        if not isinstance(subflavors, dict):
            raise EntryError(f"subflavors must be a mapping, not {subflavors!r}.", "subflavors")
        code = _code(path, content)
        for key, function in code.items():
            if not trust_dataset_code:
                problem = f"{key}: {content[key]} runs Python code of the dataset."
                raise EntryError(f"{problem} {TRUST_HINT}", key)
            function.check()
    wanted: Callable[[str], bool] = code.get("part_filter", every_part)
    if sample_type is None:
        return DatasetConfig(part_filter=wanted, subflavors=subflavors)
    if "sample_loader" in code:
        load = SampleLoader(sample_type, code["sample_loader"])
        return DatasetConfig(sample_type, load, wanted, subflavors)
    make = FieldMap.of(sample_type, content["field_map"], where=str(path))
    return DatasetConfig(sample_type, make, make.part_filter, subflavors, content["field_map"])


def write_dataset_config(
    folder: str | Path,
    sample_type: str | type[Any] | None,
    field_map: Mapping[str, str] | None = None,
    *,
    sample_loader: str | None = None,
    part_filter: str | None = None,
    subflavors: Mapping[str, Any] | None = None,
    name: str = DATASET_YAML,
) -> Path:
    """Write ``.nv-meta/dataset.yaml`` such that megatron-energon loads it too; return its path.

    ``sample_type``: a type, a name for :func:`sample_type_named`, or None for a crude dataset.
    ``sample_loader``, ``part_filter``: ``file.py:function``, the file relative to ``.nv-meta``.
    What is written is checked first by the same rules as when it is read: DatasetError.
    """
    if isinstance(sample_type, str):
        sample_type = sample_type_named(sample_type)
    path = meta_file(folder, name)
    optional = {"field_map": field_map, "sample_loader": sample_loader,
                "part_filter": part_filter, "subflavors": subflavors}  # fmt: skip
    content: dict[str, Any] = {key: value for key, value in optional.items() if value}
    try:
        _check_combination(sample_type, content)
        _code(path, content)
    except EntryError as error:
        raise DatasetError(f"{path} is not written: {error}") from None
    if sample_type and field_map:  # megatron-energon does not strip the blanks of "jpg, png"
        parsed = check_field_map(sample_type, field_map)
        content["field_map"] = {key: ",".join(map(str, found)) for key, found in parsed.items()}
    names: dict[str, Any] = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    if sample_type is not None:
        class_name, module = sample_type.__qualname__, sample_type.__module__
        if SAMPLE_TYPES.get(class_name) is sample_type:
            module = _ELSEWHERE.get(class_name, "megatron.energon")
        names = {"sample_type": {"__module__": module, "__class__": class_name}}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, _yaml(names | content).encode())
    return path


def _check_combination(sample_type: type[Any] | None, content: Mapping[str, Any]) -> None:
    """Exactly one way from a raw dict to the fields, and none for a crude dataset."""
    ways = [key for key in ("field_map", "sample_loader") if key in content]
    if sample_type is None:
        if ways:
            remedy = "Remove it, or name a sample type instead."
            raise EntryError(f"a CrudeWebdataset has no {ways[0]}. {remedy}", ways[0])
    elif len(ways) != 1:
        example = "\n  ".join(["", *(f"{name}: PART" for name in required_fields(sample_type))])
        problem = "exactly one of field_map and sample_loader is needed."
        raise EntryError(f"{problem} Write for example\nfield_map:{example}", "sample_type")
    elif ways == ["field_map"]:
        if "part_filter" in content:
            remedy = "Remove it: a field map reads only the parts that it names."
            raise EntryError(f"part_filter goes with a sample_loader only. {remedy}", "part_filter")
        check_field_map(sample_type, content["field_map"])


def _code(path: Path, content: Mapping[str, Any]) -> dict[str, DatasetCode]:
    """The functions that are named as FILE:FUNCTION, the file beside the yaml; none is run."""
    found = {}
    for key in [key for key in ("sample_loader", "part_filter") if key in content]:
        match = re.fullmatch(r"(.+):([^\W\d]\w*)", str(content[key]))
        if match is None:
            example = f"Write for example\n{key}: sample_loader.py:{key}"
            raise EntryError(f"{key} must be FILE:FUNCTION, not {content[key]!r}. {example}", key)
        found[key] = DatasetCode(str(path.parent / match[1]), match[2])
    return found


# -------------------------------------------------------------------------------------- split.yaml


@dataclass(frozen=True)
class SplitConfig:
    """What a ``split.yaml`` says, braces expanded.

    ``split_parts``: part -> its shards, in order, relative to the dataset. ``exclude``: shards
    (``a.tar``) and single samples (``a.tar/key``) that are left out.
    """

    split_parts: Mapping[str, tuple[str, ...]]
    exclude: tuple[str, ...] = ()
    path: Path | None = None

    def shards(self, part: str) -> tuple[str, ...]:
        """The shards of a part in order, without the excluded ones.

        Raises DatasetError for an unknown part.

        >>> SplitConfig({"val": ("a.tar", "b.tar")}, exclude=("a.tar",)).shards("val")
        ('b.tar',)
        """
        if part not in self.split_parts:
            raise DatasetError(
                f"{self.path or SPLIT_YAML}: no split part {part!r}"
                + there_are(part, self.split_parts)
            )
        left_out = frozenset(self.exclude)
        return tuple(shard for shard in self.split_parts[part] if shard not in left_out)

    def excluded_keys(self, shards: Iterable[str]) -> dict[str, frozenset[str]]:
        """Shard -> keys of the single samples left out of it, for the shards that have any.

        >>> split = SplitConfig({}, exclude=("d/a.tar/0001", "d/a.tar/sub/0002", "b.tar"))
        >>> {shard: sorted(keys) for shard, keys in split.excluded_keys(["d/a.tar"]).items()}
        {'d/a.tar': ['0001', 'sub/0002']}
        """
        known = frozenset(shards)
        found: dict[str, set[str]] = {}
        # Shard names and keys both may have slashes: only the list of shards tells them apart.
        for entry in self.exclude:
            for slash in re.finditer("/", entry):
                if entry[: slash.start()] in known:
                    found.setdefault(entry[: slash.start()], set()).add(entry[slash.end() :])
        return {shard: frozenset(keys) for shard, keys in found.items()}


def read_split_config(folder: str | Path, name: str = SPLIT_YAML) -> SplitConfig:
    """Read ``.nv-meta/split.yaml`` (or the file called ``name`` beside it), braces expanded.

    Raises DatasetError for a missing or broken file, unknown keys, and lists that are none.
    """
    path = meta_file(folder, name)
    content = _read_mapping(path, ("split_parts", "exclude"))
    with _located(path):
        parts = content.get("split_parts")
        if not isinstance(parts, dict):
            raise EntryError(
                f"split_parts must map parts to lists of shards, not {parts!r}. Write for example"
                "\nsplit_parts:\n  train:\n  - shard_{000..009}.tar",
                "split_parts",
            )
        return SplitConfig(
            {str(part): _names(names, "split_parts", str(part)) for part, names in parts.items()},
            _names(content.get("exclude", []), "exclude"),
            path,
        )


def _names(patterns: Any, *keys: str) -> tuple[str, ...]:
    if not isinstance(patterns, list) or not all(isinstance(name, str) for name in patterns):
        raise EntryError(
            f"{keys[-1]} must be a list of names, not {patterns!r}. Write [] for an empty list.",
            *keys,
        )
    try:
        return tuple(name for pattern in patterns for name in expand_braces(pattern))
    except DatasetError as error:
        raise EntryError(str(error), *keys) from None


def split_text(split: SplitConfig) -> str:
    """What ``split.yaml`` has to hold, runs of numbered shards in braces.

    >>> print(split_text(SplitConfig({"train": ("a_0.tar", "a_1.tar"), "val": ()})), end="")
    split_parts:
      train:
      - a_{0..1}.tar
      val: []
    exclude: []
    """
    parts = {part: collapse_braces(shards) for part, shards in split.split_parts.items()}
    return _yaml(
        {"split_parts": parts, "exclude": [escape_braces(entry) for entry in split.exclude]}
    )


# -------------------------------------------------------------------------------------- .info.json


def read_info(folder: str | Path) -> dict[str, int]:
    """Shard -> number of samples, in the order of the shards' numbers in the index.

    Reads ``.nv-meta/.info.json``, or ``.info.yaml`` of older datasets. Raises DatasetError.
    """
    path = meta_file(folder, INFO_JSON)
    if not path.exists() and meta_file(folder, INFO_YAML).exists():
        path = meta_file(folder, INFO_YAML)
    counts = _read_mapping(path).get("shard_counts")
    with _located(path):
        again = "Prepare the dataset again: energon-fn prepare --force-overwrite"
        if not isinstance(counts, dict):
            problem = f"shard_counts must map shards to counts, not {counts!r}."
            raise EntryError(f"{problem} {again}", "shard_counts")
        for shard, count in counts.items():
            if not isinstance(shard, str) or not isinstance(count, int) or count < 0:
                problem = f"{count!r} is not a number of samples."
                raise EntryError(f"{problem} {again}", "shard_counts", str(shard))
    return counts


def info_text(shard_counts: Mapping[str, int]) -> str:
    """What ``.info.json`` has to hold: the format's version and the samples of each shard.

    >>> print(info_text({"a.tar": 5}))
    {
      "energon_version": "7.4.1",
      "shard_counts": {
        "a.tar": 5
      }
    }
    """
    content = {"energon_version": FORMAT_VERSION, "shard_counts": dict(shard_counts)}
    return json.dumps(content, indent=2, ensure_ascii=False)


# -------------------------------------------------------------------------------- reading and lines

# What yaml.safe_load and safe_dump use, in C where there is: lists of shards can be long.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def _yaml(content: dict[str, Any]) -> str:
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _read_mapping(path: Path, known: tuple[str, ...] = ()) -> dict[Any, Any]:
    """A yaml or json file that holds a mapping, of the known keys if any are given."""
    try:
        data = files.read_bytes(path)
    except DatasetError as error:
        others = sorted(p.name for p in path.parent.glob("*.yaml"))
        raise DatasetError(
            f"{error} There is no {path.name} in {path.parent}{there_are(path.name, others)} A "
            f"dataset is prepared with: energon-fn prepare {path.parent.parent}"
        ) from error
    return _mapping(path, data, known)


def _mapping(path: Path, data: bytes, known: tuple[str, ...] = ()) -> dict[Any, Any]:
    """What the file holds, taken apart and its keys checked."""
    kind = "json" if path.suffix == ".json" else "yaml"
    try:
        content = json.loads(data) if kind == "json" else yaml.load(data, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise DatasetError(f"{path} is not valid {kind}: {error}. Correct the file.") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} must hold a mapping (key: value), not {content!r}.")
    with _located(path):
        for key in content:
            if known and key not in known:
                raise EntryError(f"unknown key {key!r}{there_are(key, known)}", str(key))
    return content


@contextmanager
def _located(path: Path, *within: str | int) -> Iterator[None]:
    """Put the file in front of what is wrong with an entry, and the line of its nested key."""
    try:
        yield
    except EntryError as error:
        line = _line(path, (*within, *error.keys))
        where = f"{path}, line {line}" if line else str(path)
        raise DatasetError(f"{where}: {error}") from error.__cause__


def _line(path: Path, keys: tuple[str | int, ...]) -> int | None:
    """The line, counted from 1, of the nested key, as far as the file has it."""
    return _line_in(yaml.compose(files.read_bytes(path), _Loader), keys)


def _line_in(node: yaml.Node | None, keys: tuple[str | int, ...]) -> int | None:
    """The same in a file that is taken apart already; numbers count the entries of lists."""
    line = None
    for key in keys:
        entries: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            entries = [(name, value) for name, value in node.value if name.value == str(key)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int):
            entries = [(value, value) for value in node.value[key : key + 1]]
        if not entries:
            break
        line, node = entries[-1][0].start_mark.line + 1, entries[-1][1]
    return line
