"""The small text files in a dataset's ``.nv-meta`` folder: sample type, splits, counts.

``dataset.yaml`` says what a sample is: a sample type and where each of its fields comes from.
``split.yaml`` says which shards are for training, validation and test, and what is left out.
``.info.json`` counts the samples of every shard. The format is that of the published
megatron-energon (its document "Dataset Format on Disk"), read and written.

These files are data, not code. Sample types are looked up in our own table
(:data:`energon_fn.samples.SAMPLE_TYPES`); a type from another module, a ``sample_loader`` or a
``part_filter`` runs only with ``trust_dataset_code=True``.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml
from braceexpand import braceexpand

from . import files
from .errors import DatasetError, SampleError
from .samples import BOOKKEEPING, SAMPLE_TYPES

META_FOLDER = ".nv-meta"
DATASET_YAML = "dataset.yaml"
SPLIT_YAML = "split.yaml"
INFO_JSON = ".info.json"
INFO_YAML = ".info.yaml"  # older datasets

# The release of megatron-energon whose format we write; it stands in .info.json, which admits no
# key of our own.
FORMAT_VERSION = "7.4.1"

TRUST_HINT = (
    "That is code: if you trust whoever made this dataset, allow it with "
    "trust_dataset_code=True (command line: --trust)."
)

_DATASET_KEYS = (
    "__module__", "__class__", "__function__",
    "sample_type", "field_map", "sample_loader", "part_filter", "subflavors",
)  # fmt: skip
# Where megatron-energon keeps a sample type that its main module does not export.
_ELSEWHERE = {"VQAOCRSample": "megatron.energon.flavors.vqa_and_ocr"}


def meta_file(folder: str | Path, name: str) -> Path:
    """The path of a file in the dataset's ``.nv-meta`` folder.

    >>> meta_file("/data/cats", "split.yaml").as_posix()
    '/data/cats/.nv-meta/split.yaml'
    """
    return Path(folder) / META_FOLDER / name


# ---------------------------------------------------------------------------------- dataset.yaml


@dataclass(frozen=True)
class CodeRef:
    """A function in a Python file of the dataset, such as ``sample_loader.py:sample_loader``.

    It is a path and a name, so it pickles; each process runs the file once, at the first call.
    """

    path: str
    name: str

    def __call__(self, value: Any) -> Any:
        return self.function(value)

    @property
    def function(self) -> Callable[[Any], Any]:
        """The function itself. Raises DatasetError when the file or the function is missing."""
        return _function(self.path, self.name)


@dataclass(frozen=True)
class DatasetConfig:
    """What a ``dataset.yaml`` says, with its names resolved.

    ``sample_type`` is None for a crude dataset, whose samples stay dicts until the user's code
    cooks them. Otherwise exactly one of ``field_map`` (field -> access) and ``sample_loader`` is
    there. ``path`` is the yaml file, for messages.
    """

    path: Path
    sample_type: type[Any] | None = None
    field_map: Mapping[str, str] | None = None
    sample_loader: CodeRef | None = None
    part_filter: CodeRef | None = None
    subflavors: Mapping[str, Any] = field(default_factory=dict)

    @property
    def crude(self) -> bool:
        """True when the samples are plain dicts (``CrudeWebdataset``)."""
        return self.sample_type is None


def read_dataset_config(
    folder: str | Path, name: str = DATASET_YAML, trust_dataset_code: bool = False
) -> DatasetConfig:
    """Read ``.nv-meta/dataset.yaml`` (or the file called ``name`` beside it) and check all of it.

    Raises DatasetError for a missing or broken file, an unknown key, sample type or field, a
    required field that the field map lacks, and for code unless ``trust_dataset_code``.
    """
    path = meta_file(folder, name)
    content = _read_mapping(path)
    with _located(path):
        for key in content:
            if key not in _DATASET_KEYS:
                _fail([key], f"unknown key {key!r}",
                      "Options of the loader are arguments of get_dataset, not of the dataset.",
                      str(key), _DATASET_KEYS)
        sample_type = _sample_type(content, trust_dataset_code)
        _check_combination(sample_type, content)
        subflavors = content.get("subflavors") or {}
        if not isinstance(subflavors, dict):
            _fail(["subflavors"], f"subflavors must be a mapping, not {subflavors!r}")
        refs = {
            key: _code_ref(path, key, content[key], trust_dataset_code)
            for key in ("sample_loader", "part_filter")
            if key in content
        }
        return DatasetConfig(path=path, sample_type=sample_type, subflavors=subflavors,
                             field_map=content.get("field_map"), **refs)


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
    path = meta_file(folder, name)
    optional = {"field_map": field_map, "sample_loader": sample_loader,
                "part_filter": part_filter, "subflavors": subflavors}
    content = {key: value for key, value in optional.items() if value}
    if isinstance(sample_type, str):
        sample_type = sample_type_named(sample_type)
    with _located(path, writing=True):
        _check_combination(sample_type, content)
        for key in ("sample_loader", "part_filter"):
            if key in content:
                _file_and_function(key, content[key])
    if field_map:
        # megatron-energon does not strip the blanks of "jpg, png".
        content["field_map"] = {
            key: ",".join(str(access) for access in _parse_accesses(text))
            for key, text in field_map.items()
        }
    _write_yaml(path, _type_content(sample_type) | content)
    return path


def sample_type_named(name: str) -> type[Any] | None:
    """The sample type called ``name``, or whose old dataset class is; None for a crude dataset.

    Raises DatasetError, with what there is, for a name that is not in our table.

    >>> sample_type_named("CaptioningWebdataset") is sample_type_named("CaptioningSample")
    True
    >>> sample_type_named("CrudeWebdataset") is None
    True
    """
    known = {n: t for n, t in SAMPLE_TYPES.items() if _has_fields(t)}
    if name in ("CrudeWebdataset", "CrudeSample"):
        return None
    sample_name = name.removesuffix("Webdataset") + "Sample" * name.endswith("Webdataset")
    if sample_name not in known:
        names = [*known, "CrudeWebdataset"]
        raise DatasetError(
            f"unknown sample type {name!r}; there are: {', '.join(names)}.{_suggest(name, names)}"
        )
    return known[sample_name]


def sample_fields(sample_type: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The fields that a sample is made with, by name, bookkeeping included."""
    return {f.name: f for f in dataclasses.fields(sample_type) if f.init}


def required_fields(sample_type: type[Any]) -> list[str]:
    """The data fields without a default.

    >>> from energon_fn.samples import VQASample
    >>> required_fields(VQASample)
    ['image', 'context']
    """
    return [
        name for name, f in sample_fields(sample_type).items()
        if name not in BOOKKEEPING
        and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]


def to_sample(config: DatasetConfig) -> Callable[[dict[str, Any]], Any]:
    """The function that makes a sample of ``config.sample_type`` from a decoded raw dict.

    The field map is taken apart once, here. The result pickles. A crude dataset's samples are
    returned as they are. At sample time SampleError names the key and the part that is missing.

    >>> from energon_fn.samples import TextSample
    >>> config = DatasetConfig(Path("dataset.yaml"), TextSample, {"text": "txt,json[title][0]"})
    >>> make = to_sample(config)
    >>> make({"__key__": "a", "txt": "hello"}).text
    'hello'
    >>> make({"__key__": "b", "json": {"title": ["bye"]}}).text
    'bye'
    """
    if config.sample_type is None:
        return _identity
    if config.sample_loader is not None:
        return LoaderToSample(config.sample_type, config.sample_loader)
    return FieldMapToSample.compiled(config)


def part_filter(config: DatasetConfig) -> Callable[[str], bool]:
    """The function that says which parts of a sample have to be read: those the field map names.

    With a sample loader it is the dataset's own ``part_filter``; otherwise every part is read.

    >>> from energon_fn.samples import TextSample
    >>> wanted = part_filter(DatasetConfig(Path("d.yaml"), TextSample, {"text": "txt,json[a]"}))
    >>> [part for part in ("jpg", "txt", "json") if wanted(part)]
    ['txt', 'json']
    """
    if config.part_filter is not None:
        return config.part_filter
    if config.field_map is None:
        return PartFilter(None)
    return PartFilter(frozenset(
        access.part
        for text in config.field_map.values()
        for access in _parse_accesses(text)
    ))


@dataclass(frozen=True)
class PartFilter:
    """True for the parts in a set; None stands for all parts.

    >>> PartFilter(frozenset({"jpg"}))("txt"), PartFilter(None)("txt")
    (False, True)
    """

    parts: frozenset[str] | None

    def __call__(self, part: str) -> bool:
        return self.parts is None or part in self.parts


@dataclass(frozen=True)
class Access:
    """One way to a value: a part, then keys and numbers inside it (``json[boxes][0]``)."""

    part: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.part + "".join(f"[{step}]" for step in self.path)


@dataclass(frozen=True)
class FieldMapToSample:
    """A field map, taken apart: raw dict -> sample. Made by :func:`to_sample`."""

    sample_type: type[Any]
    carried: tuple[str, ...]
    plain: tuple[tuple[str, str], ...]
    deep: tuple[tuple[str, tuple[Access, ...]], ...]
    config_path: str

    @classmethod
    def compiled(cls, config: DatasetConfig) -> FieldMapToSample:
        assert config.sample_type is not None
        field_map = config.field_map or {}
        accesses = {name: _parse_accesses(text) for name, text in field_map.items()}
        plain = {n: a[0].part for n, a in accesses.items() if len(a) == 1 and not a[0].path}
        deep = {n: a for n, a in accesses.items() if n not in plain}
        carried = tuple(
            n for n in BOOKKEEPING if n in sample_fields(config.sample_type) and n not in field_map
        )
        return cls(config.sample_type, carried, tuple(plain.items()), tuple(deep.items()),
                   str(config.path))

    def __call__(self, raw: dict[str, Any]) -> Any:
        values = {name: raw[name] for name in self.carried if name in raw}
        for name, part in self.plain:
            try:
                values[name] = raw[part]
            except KeyError:
                raise self._error(raw, name, (Access(part),)) from None
        for name, accesses in self.deep:
            for access in accesses:
                try:
                    values[name] = _get(raw, access)
                except (LookupError, ValueError):
                    continue
                break
            else:
                raise self._error(raw, name, accesses)
        return self.sample_type(**values)

    def _error(self, raw: dict[str, Any], name: str, accesses: tuple[Access, ...]) -> SampleError:
        text = ",".join(map(str, accesses))
        return SampleError(
            f"sample {_whereabouts(raw)}: no value for {name!r}: "
            + "; ".join(_why_missing(raw, access) for access in accesses)
            + f". The field map in {self.config_path} says {name}: {text}. Exclude the sample in "
            "split.yaml, or add an alternative after a comma."
        )


@dataclass(frozen=True)
class LoaderToSample:
    """The dataset's own ``sample_loader``: raw dict -> dict of fields -> sample."""

    sample_type: type[Any]
    loader: CodeRef

    def __call__(self, raw: dict[str, Any]) -> Any:
        values = self.loader(raw)
        where = f"{self.loader.path}:{self.loader.name}"
        if not isinstance(values, Mapping):
            raise DatasetError(
                f"{where} returned {type(values).__name__} for sample {_whereabouts(raw)}. "
                f"It must return a dict of the fields of {self.sample_type.__name__}."
            )
        known = sample_fields(self.sample_type)
        # The key is the loader's own business; where the sample comes from is not.
        kept = {name: raw[name] for name in BOOKKEEPING if name in raw and name in known}
        values = {**values, **kept, "__key__": values.get("__key__", raw["__key__"])}
        for name in values:
            if name not in known:
                raise DatasetError(
                    f"{where} returned the field {name!r}, which {self.sample_type.__name__} does "
                    f"not have.{_suggest(name, known)}"
                )
        for name in required_fields(self.sample_type):
            if name not in values:
                raise SampleError(
                    f"sample {_whereabouts(raw)}: {where} returned no {name!r}, which "
                    f"{self.sample_type.__name__} requires."
                )
        return self.sample_type(**values)


# ------------------------------------------------------------------------------------ split.yaml


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
                f"{self.path or SPLIT_YAML}: no split part {part!r}; it has: "
                f"{', '.join(self.split_parts) or 'none'}.{_suggest(part, self.split_parts)}"
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
    content = _read_mapping(path)
    with _located(path):
        for key in content:
            if key not in ("split_parts", "exclude"):
                _fail([key], f"unknown key {key!r}", "", str(key), ("split_parts", "exclude"))
        parts = content.get("split_parts")
        if not isinstance(parts, dict):
            _fail(["split_parts"], f"split_parts must map parts to lists of shards, not {parts!r}",
                  remedy="Write for example\nsplit_parts:\n  train:\n  - shard_{000..009}.tar")
        return SplitConfig(
            {str(part): _expanded(["split_parts", part], shards) for part, shards in parts.items()},
            _expanded(["exclude"], content.get("exclude", [])),
            path,
        )


def write_split_config(folder: str | Path, split: SplitConfig, name: str = SPLIT_YAML) -> Path:
    """Write ``.nv-meta/split.yaml``, runs of numbered shards in braces; return its path."""
    path = meta_file(folder, name)
    _write_yaml(path, split_content(split))
    return path


def split_content(split: SplitConfig) -> dict[str, Any]:
    """What is written to ``split.yaml``.

    >>> split_content(SplitConfig({"train": ("a_0.tar", "a_1.tar"), "val": ()}))
    {'split_parts': {'train': ['a_{0..1}.tar'], 'val': []}, 'exclude': []}
    """
    return {
        "split_parts": {p: collapse_braces(shards) for p, shards in split.split_parts.items()},
        "exclude": [_escaped(entry) for entry in split.exclude],
    }


def expand_braces(patterns: Iterable[str]) -> tuple[str, ...]:
    """All names that the patterns of a ``split.yaml`` stand for; ValueError for unpaired braces.

    >>> expand_braces(["s_{08..10}.tar", "x.tar"])
    ('s_08.tar', 's_09.tar', 's_10.tar', 'x.tar')
    """
    return tuple(
        name
        for pattern in patterns
        for name in (braceexpand(pattern) if re.search(r"[{}\\]", pattern) else (pattern,))
    )


def collapse_braces(names: Iterable[str]) -> list[str]:
    """Write runs of consecutive numbers as one pattern; :func:`expand_braces` undoes it.

    >>> collapse_braces(["s_08.tar", "s_09.tar", "s_10.tar", "x.tar"])
    ['s_{08..10}.tar', 'x.tar']
    """
    return [_pattern(run, place) for run, place in _runs(names)]


# ------------------------------------------------------------------------------------ .info.json


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
            _fail(["shard_counts"], f"shard_counts must map shards to counts, not {counts!r}",
                  remedy=again)
        for shard, count in counts.items():
            if not isinstance(shard, str) or not isinstance(count, int) or count < 0:
                _fail(["shard_counts", shard], f"{count!r} is not a number of samples",
                      remedy=again)
    return dict(counts)


def write_info(folder: str | Path, shard_counts: Mapping[str, int]) -> Path:
    """Write ``.nv-meta/.info.json``; return its path."""
    path = meta_file(folder, INFO_JSON)
    files.write_atomic(path, info_content(shard_counts).encode())
    return path


def info_content(shard_counts: Mapping[str, int]) -> str:
    """The text of ``.info.json``: the format's version and the samples of each shard.

    >>> print(info_content({"a.tar": 5}))
    {
      "energon_version": "7.4.1",
      "shard_counts": {
        "a.tar": 5
      }
    }
    """
    content = {"energon_version": FORMAT_VERSION, "shard_counts": dict(shard_counts)}
    return json.dumps(content, indent=2, ensure_ascii=False)


# --------------------------------------------------------------------------------- names to things


def _sample_type(content: dict[str, Any], trust: bool) -> type[Any] | None:
    """The sample type that a dataset.yaml names, new style or old; None for crude."""
    if "__module__" not in content:
        if "sample_type" not in content:
            _fail([], "no sample_type", remedy=_SAMPLE_TYPE_HINT)
        return _named_type(["sample_type"], content["sample_type"], trust)
    # Old style: the whole file describes a dataset class, CaptioningWebdataset for one.
    module, name = _module_and_name([], content)
    if not _is_ours(module):
        _fail(["__module__"], f"a dataset class of another module: {module}.{name}",
              remedy="Name a sample type instead. " + _SAMPLE_TYPE_HINT)
    if name == "CrudeWebdataset":
        return None
    if name in ("StandardWebdatasetFactory", "DefaultGenericWebdatasetFactory"):
        return _named_type(["sample_type"], content.get("sample_type"), trust)
    known = {
        sample.removesuffix("Sample") + "Webdataset": sample
        for sample in SAMPLE_TYPES if _has_fields(SAMPLE_TYPES[sample])
    }
    if name not in known:
        _fail(["__class__"], f"unknown dataset class {name!r}", _SAMPLE_TYPE_HINT,
              name, ["CrudeWebdataset", *known])
    return SAMPLE_TYPES[known[name]]


_SAMPLE_TYPE_HINT = (
    "Write for example\nsample_type:\n  __module__: megatron.energon\n  __class__: CaptioningSample"
)


def _named_type(keys: list[Any], value: Any, trust: bool) -> type[Any]:
    module, name = _module_and_name(keys, value)
    if _is_ours(module):
        return _our_type([*keys, "__class__"], name)
    what = f"the sample type {name} is to be imported from the module {module}"
    if not trust:
        _fail(keys, what, remedy=TRUST_HINT)
    try:
        found: Any = importlib.import_module(module)
        for step in name.split("."):
            found = getattr(found, step)
    except (ImportError, AttributeError) as error:
        _fail(keys, f"{what}, but {error}",
              remedy="Install or correct the module, or put it on PYTHONPATH.")
    if not _has_fields(found):
        _fail(keys, f"{module}.{name} is no sample type: it must be a dataclass")
    return found  # type: ignore[no-any-return]  # just checked


def _our_type(keys: list[Any], name: str) -> type[Any]:
    known = [n for n, t in SAMPLE_TYPES.items() if _has_fields(t)]
    if name not in known:
        _fail(keys, f"unknown sample type {name!r}",
              "For samples that stay dicts the whole file is\n"
              "__module__: megatron.energon\n__class__: CrudeWebdataset", name, known)
    return SAMPLE_TYPES[name]


def _module_and_name(keys: list[Any], value: Any) -> tuple[str, str]:
    names = value if isinstance(value, dict) else {}
    module, name = names.get("__module__"), names.get("__class__", names.get("__function__"))
    if not isinstance(module, str) or not isinstance(name, str):
        _fail(keys, f"__module__ and __class__ are needed, not {value!r}",
              remedy=_SAMPLE_TYPE_HINT)
    return module, name


def _is_ours(module: str) -> bool:
    return re.match(r"(energon_fn|megatron\.energon)(\.|$)", module) is not None


def _has_fields(thing: Any) -> bool:
    return isinstance(thing, type) and dataclasses.is_dataclass(thing)


def _type_content(sample_type: type[Any] | None) -> dict[str, Any]:
    if sample_type is None:
        return {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    name, module = sample_type.__qualname__, sample_type.__module__
    if SAMPLE_TYPES.get(name) is sample_type:
        module = _ELSEWHERE.get(name, "megatron.energon")
    return {"sample_type": {"__module__": module, "__class__": name}}


def _check_combination(sample_type: type[Any] | None, content: Mapping[str, Any]) -> None:
    """Exactly one way from a raw dict to the fields, and none for a crude dataset."""
    if sample_type is None:
        for key in ("field_map", "sample_loader"):
            if key in content:
                _fail([key], f"a CrudeWebdataset has no {key}",
                      remedy="Remove it, or name a sample_type instead of CrudeWebdataset.")
        return
    if ("field_map" in content) == ("sample_loader" in content):
        _fail(["sample_type"], "exactly one of field_map and sample_loader is needed",
              remedy="Write for example\nfield_map:\n"
              + "\n".join(f"  {name}: PART" for name in required_fields(sample_type)))
    if "field_map" in content:
        if "part_filter" in content:
            _fail(["part_filter"], "part_filter goes with a sample_loader only",
                  remedy="Remove it: a field map reads only the parts that it names.")
        _check_field_map(sample_type, content["field_map"])


# --------------------------------------------------------------------------------- code of datasets


def _code_ref(path: Path, key: str, value: Any, trust: bool) -> CodeRef:
    file, function = _file_and_function(key, value)
    if not trust:
        _fail([key], f"{key}: {value} runs Python code of the dataset", remedy=TRUST_HINT)
    ref = CodeRef(str(path.parent / file), function)
    # It may have been edited since this process last read the dataset.
    _function.cache_clear()
    _module.cache_clear()
    _ = ref.function
    return ref


def _file_and_function(key: str, value: Any) -> tuple[str, str]:
    file, _, function = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if not file or not function.isidentifier():
        _fail([key], f"{key} must be FILE:FUNCTION, not {value!r}",
              remedy=f"Write for example\n{key}: sample_loader.py:{key}")
    return file, function


@cache
def _function(path: str, name: str) -> Callable[[Any], Any]:
    function = getattr(_module(path), name, None)
    if not callable(function):
        functions = [n for n, v in vars(_module(path)).items() if callable(v)]
        raise DatasetError(f"{path} has no function {name!r}.{_suggest(name, functions)}")
    return function  # type: ignore[no-any-return]  # what it returns is checked where it is used


@cache
def _module(path: str) -> ModuleType:
    """Run a dataset's Python file, read through the seam and leaving no cache beside the data."""
    name = "energon_fn_dataset_" + hashlib.sha256(path.encode()).hexdigest()[:16]
    module = ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module  # so that classes defined in the file can find their module
    try:
        exec(compile(files.read_bytes(path), path, "exec"), vars(module))
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path} failed to load: {type(error).__name__}: {error}") from error
    return module


# ------------------------------------------------------------------------------------- field maps


def _check_field_map(sample_type: type[Any], field_map: Any) -> None:
    known = [name for name in sample_fields(sample_type) if name not in BOOKKEEPING]
    if not isinstance(field_map, Mapping):
        _fail(["field_map"], f"field_map must map fields to parts, not {field_map!r}")
    for name, text in field_map.items():
        if name not in known and name not in BOOKKEEPING:
            _fail(["field_map", name], f"{sample_type.__name__} has no field {name!r}",
                  "", str(name), known)
        if not isinstance(text, str):
            _fail(["field_map", name],
                  f"field {name!r} must name a part, such as jpg or json[text], not {text!r}")
        try:
            _parse_accesses(text)
        except ValueError as error:
            _fail(["field_map", name], f"field {name!r}: {error}",
                  remedy="Write PART, PART[key][0] or several of these with commas between.")
    for name in required_fields(sample_type):
        if name not in field_map:
            _fail(["field_map"],
                  f"{sample_type.__name__} requires the field {name!r}, which has no entry",
                  remedy=f"Add for example\n  {name}: PART")


_ACCESS = re.compile(r"([^\[\],]+)((?:\[[^\[\]]+\])*)")


def _parse_accesses(text: str) -> tuple[Access, ...]:
    """Take ``jpg,json[a][0]`` apart; ValueError says what is wrong."""
    found = []
    for alternative in text.split(","):
        match = _ACCESS.fullmatch(alternative.strip())
        if match is None:
            raise ValueError(f"{alternative!r} in {text!r} is not a part with optional [keys]")
        found.append(Access(match[1], tuple(re.findall(r"\[([^\]]+)\]", match[2]))))
    return tuple(found)


def _get(raw: Mapping[str, Any], access: Access) -> Any:
    """The value; LookupError or ValueError when the sample has none."""
    value = raw[access.part]
    for step in access.path:
        if isinstance(value, Mapping):
            value = value[step]
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            value = value[int(step)]
        else:
            raise LookupError(f"a {type(value).__name__} has no [{step}]")
    return value


def _why_missing(raw: Mapping[str, Any], access: Access) -> str:
    if access.part not in raw:
        parts = [name for name in raw if not name.startswith("__")]
        return (f"no part {access.part!r} (of the parts that are read it has: "
                f"{', '.join(parts) or 'none'})")
    for length in range(1, len(access.path) + 1):
        here = Access(access.part, access.path[:length])
        try:
            _get(raw, here)
        except (LookupError, ValueError):
            outer = Access(access.part, access.path[: length - 1])
            value = _get(raw, outer)
            if isinstance(value, Mapping):
                has = f"has the keys {', '.join(map(str, list(value)[:20])) or '(none)'}"
            elif isinstance(value, list | tuple):
                has = f"is a list of {len(value)}"
            else:
                has = f"is a {type(value).__name__}"
            return f"no {here} ({outer} {has})"
    return f"no {access}"


def _whereabouts(raw: Mapping[str, Any]) -> str:
    """The sample's key and shard, for messages."""
    shards = {source.shard_name for source in raw.get("__sources__") or ()}
    return repr(raw.get("__key__")) + "".join(f" in {shard}" for shard in sorted(shards))


def _identity(raw: dict[str, Any]) -> dict[str, Any]:
    return raw


# ---------------------------------------------------------------------------------------- braces


def _expanded(keys: list[Any], names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        _fail(keys, f"{keys[-1]} must be a list of names, not {names!r}",
              remedy="Write [] for an empty list.")
    try:
        return expand_braces(names)
    except ValueError as error:
        _fail(keys, str(error), remedy=r"Write \{ for a brace that is part of a name.")


def _runs(names: Iterable[str]) -> Iterator[tuple[list[list[str]], int]]:
    """Runs of names, cut at their numbers, that count up in the same place; and that place."""
    run: list[list[str]] = []
    place = -1
    for name in names:
        tokens = re.split(r"([0-9]+)", name)  # numbers at the odd places
        here = _counts_up(run[-1], tokens) if run else -1
        if here >= 0 and place in (-1, here):
            run.append(tokens)
            place = here
        else:
            if run:
                yield run, place
            run, place = [tokens], -1
    if run:
        yield run, place


def _counts_up(tokens: list[str], following: list[str]) -> int:
    """The one place where the second is the first plus one, equally wide; -1 if there is none."""
    if len(tokens) != len(following):
        return -1
    differing = [i for i, (a, b) in enumerate(zip(tokens, following, strict=True)) if a != b]
    if len(differing) != 1 or differing[0] % 2 == 0:
        return -1
    a, b = tokens[differing[0]], following[differing[0]]
    return differing[0] if len(a) == len(b) and int(a) + 1 == int(b) else -1


def _pattern(run: list[list[str]], place: int) -> str:
    tokens = [_escaped(token) for token in run[0]]
    if place >= 0:
        tokens[place] = f"{{{run[0][place]}..{run[-1][place]}}}"
    return "".join(tokens)


def _escaped(name: str) -> str:
    return re.sub(r"([{}\\])", r"\\\1", name)


# ------------------------------------------------------------------------------- files and messages


# What yaml.safe_load and safe_dump use, in C where there is: lists of shards can be long.
_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SafeDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def _read_mapping(path: Path) -> dict[Any, Any]:
    """A yaml or json file whose content is a mapping. Raises DatasetError."""
    try:
        data = files.read_bytes(path)
    except DatasetError as error:
        others = sorted(p.name for p in path.parent.glob("*.yaml"))
        raise DatasetError(
            f"{error} {path.parent} has: {', '.join(others) or 'no yaml file'}."
            f"{_suggest(path.name, others)} A dataset is prepared with: energon-fn prepare "
            f"{path.parent.parent}"
        ) from error
    try:
        content = json.loads(data) if path.suffix == ".json" else yaml.load(data, _SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        kind = path.suffix.removeprefix(".") or "yaml"
        raise DatasetError(f"{path} is not valid {kind}: {error}. Correct the file.") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} must hold a mapping (key: value), not {content!r}.")
    return content


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, yaml_text(content).encode())


def yaml_text(content: dict[str, Any]) -> str:
    """Plain data as yaml, keys in their order.

    >>> print(yaml_text({"b": [], "a": "ä"}), end="")
    b: []
    a: ä
    """
    return str(yaml.dump(content, Dumper=_SafeDumper, sort_keys=False, allow_unicode=True))


class _WrongError(Exception):
    """Something in a file is wrong; :func:`_located` adds in which file and line."""

    def __init__(self, keys: list[Any], message: str) -> None:
        super().__init__(message)
        self.keys = keys


def _fail(
    keys: list[Any], problem: str, remedy: str = "", name: str = "", known: Iterable[str] = ()
) -> NoReturn:
    """Say what is wrong under the nested key and what to do; what is known instead of ``name``."""
    known = list(known)
    message = problem + (f"; there are: {', '.join(known)}." if known else ".")
    raise _WrongError(keys, message + _suggest(name, known) + (f" {remedy}" if remedy else ""))


@contextmanager
def _located(path: Path, writing: bool = False) -> Iterator[None]:
    try:
        yield
    except _WrongError as error:
        if writing:
            raise DatasetError(f"{path} is not written: {error}") from None
        line = _line(path, error.keys)
        raise DatasetError(f"{path}{f', line {line}' if line else ''}: {error}") from None


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _line(path: Path, keys: list[Any]) -> int | None:
    """The line, counted from 1, of the nested key; None if the file has no such key."""
    try:
        node = yaml.compose(files.read_bytes(path), _SafeLoader)
    except (DatasetError, yaml.YAMLError, ValueError):
        return None
    line = None
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            break
        found = [(k, v) for k, v in node.value if k.value == str(key)]
        if not found:
            break
        line, node = found[-1][0].start_mark.line + 1, found[-1][1]
    return line
