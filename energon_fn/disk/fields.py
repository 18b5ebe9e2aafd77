"""From a decoded raw sample to a sample: where each field of its type comes from.

Most datasets have a *field map*, which says for each field where its value lies::

    image: jpg,png                 the part jpg, or else png
    caption: detail.json[a][0]     in the part detail.json under the key a, there the first

Others have Python code of their own, a ``sample_loader`` that returns the fields as a dict. Code
runs only where the user trusts the dataset; so does the import of a sample type that is not one of
ours (:data:`energon_fn.samples.SAMPLE_TYPES`).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

from energon_fn.disk import files
from energon_fn.errors import DatasetError, SampleError
from energon_fn.samples import BOOKKEEPING, SAMPLE_TYPES

TRUST_HINT = (
    "That is code: if you trust whoever made this dataset, allow it with "
    "trust_dataset_code=True (command line: --trust)."
)


class EntryError(DatasetError):
    """What a dataset's yaml says is wrong. Its reader adds the file, and the line by the keys."""

    def __init__(self, message: str, *keys: str | int) -> None:
        super().__init__(message)
        self.keys = keys


def there_are(name: object, known: Iterable[str]) -> str:
    """How a message ends that says that there is no ``name``.

    >>> "no field 'txet'" + there_are("txet", ["image", "text"])
    "no field 'txet'; there are: image, text. Did you mean 'text'?"
    """
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    suggestion = f" Did you mean {close[0]!r}?" if close else ""
    return f"; there are: {', '.join(known) or 'none'}.{suggestion}"


# ------------------------------------------------------------------------------------ sample types


def sample_fields(sample_type: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The fields that a sample is made with, by name, bookkeeping included."""
    return {field.name: field for field in dataclasses.fields(sample_type) if field.init}


def required_fields(sample_type: type[Any]) -> list[str]:
    """The data fields without a default.

    >>> from energon_fn.samples import VQASample
    >>> required_fields(VQASample)
    ['image', 'context']
    """
    return [
        name
        for name, field in sample_fields(sample_type).items()
        if name not in BOOKKEEPING and field.default is field.default_factory is dataclasses.MISSING
    ]


def sample_type_named(name: str) -> type[Any] | None:
    """Our sample type called ``name``, or whose old dataset class is; None for a crude dataset.

    Raises DatasetError for an unknown name.

    >>> sample_type_named("CaptioningWebdataset") is sample_type_named("CaptioningSample")
    True
    >>> sample_type_named("CrudeWebdataset") is None
    True
    """
    old = name.endswith("Webdataset")
    types = {(n.removesuffix("Sample") + "Webdataset" if old else n): n for n in SAMPLE_TYPES}
    if name not in types:
        raise EntryError(f"unknown sample type {name!r}{there_are(name, types)}", "__class__")
    found = SAMPLE_TYPES[types[name]]
    return found if dataclasses.is_dataclass(found) else None


def is_ours(module: str) -> bool:
    """Whether a yaml's ``__module__`` is ours or the published package's, which stands for ours.

    >>> is_ours("megatron.energon"), is_ours("megatron.energonic")
    (True, False)
    """
    return re.match(r"(energon_fn|megatron\.energon)(\.|$)", module) is not None


def sample_type_of(names: Any, trust: bool = False) -> type[Any] | None:
    """The sample type that a yaml names by ``__module__`` and ``__class__``; None for crude.

    The published package's module stands for ours. Any other is imported, but only if ``trust``.
    Raises DatasetError.

    >>> sample_type_of({"__module__": "megatron.energon", "__class__": "TextSample"})
    <class 'energon_fn.samples.TextSample'>
    """
    try:
        module, name = str(names["__module__"]), str(names["__class__"])
    except (KeyError, TypeError):
        raise EntryError(
            f"a sample type is named by __module__ and __class__, not by {names!r}. Write for "
            "example\nsample_type:\n  __module__: megatron.energon\n  __class__: CaptioningSample"
        ) from None
    if is_ours(module):
        return sample_type_named(name)
    what = f"the sample type {name} is to be imported from the module {module}"
    if not trust:
        raise EntryError(f"{what}. {TRUST_HINT}", "__module__")
    try:
        found: type[Any] = attrgetter(name)(importlib.import_module(module))
        dataclasses.fields(found)
    except (ImportError, AttributeError, TypeError) as error:
        raise EntryError(
            f"{what}, but: {error}. It must be a dataclass in a module that is installed or on "
            "PYTHONPATH.",
            "__class__",
        ) from error
    return found


# -------------------------------------------------------------------------------------- field maps


class Access(NamedTuple):
    """One way to a value: a part, then keys and numbers inside it."""

    part: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.part + "".join(f"[{step}]" for step in self.path)

    def value(self, raw: Mapping[str, Any]) -> Any:
        """What lies there. LookupError says what is missing, and what there is instead.

        >>> Access("json", ("a", "2")).value({"json": {"a": [5, 6]}})
        Traceback (most recent call last):
            ...
        LookupError: no json[a][2] (json[a] has [5, 6])
        """
        if self.part not in raw:
            parts = ", ".join(name for name in raw if not name.startswith("__")) or "none"
            raise LookupError(f"no part {self.part!r} (of the parts that are read it has: {parts})")
        found = raw[self.part]
        for depth, step in enumerate(self.path):
            try:
                found = _inside(found, step)
            except (LookupError, ValueError):
                here = Access(self.part, self.path[:depth])
                has = reprlib.repr([*found] if isinstance(found, Mapping) else found)
                raise LookupError(f"no {here}[{step}] ({here} has {has})") from None
        return found


def _inside(value: Any, step: str) -> Any:
    if isinstance(value, Mapping):
        return value[step]
    if isinstance(value, list | tuple):
        return value[int(step)]
    raise LookupError(step)


def parse_accesses(text: Any) -> tuple[Access, ...]:
    """The alternatives that an entry of a field map lists; ValueError says what is wrong with it.

    >>> parse_accesses("txt, json[a][0]")
    (Access(part='txt', path=()), Access(part='json', path=('a', '0')))
    """
    if not isinstance(text, str):
        raise ValueError(f"it must name a part, not {text!r}")
    found = []
    for alternative in text.split(","):
        match = re.fullmatch(r"([^\[\],]+)((?:\[[^\[\]]+\])*)", alternative.strip())
        if match is None:
            raise ValueError(f"{alternative!r} in {text!r} is not a part with optional [keys]")
        found.append(Access(match[1], tuple(re.findall(r"\[([^\]]+)\]", match[2]))))
    return tuple(found)


def check_field_map(sample_type: type[Any], field_map: Any) -> dict[str, tuple[Access, ...]]:
    """The accesses of each field. Raises DatasetError for an unknown field or a missing one."""
    if not isinstance(field_map, Mapping):
        raise EntryError(f"field_map must map fields to parts, not {field_map!r}.", "field_map")
    type_name, known, found = sample_type.__name__, sample_fields(sample_type), {}
    for name, text in field_map.items():
        if name not in known:
            others = there_are(name, [field for field in known if field not in BOOKKEEPING])
            raise EntryError(f"{type_name} has no field {name!r}{others}", "field_map", str(name))
        try:
            found[name] = parse_accesses(text)
        except ValueError as error:
            remedy = "Write PART, PART[key][0] or several of these with commas between."
            raise EntryError(f"field {name!r}: {error}. {remedy}", "field_map", name) from None
    for name in required_fields(sample_type):
        if name not in found:
            problem = f"{type_name} requires the field {name!r}, which has no entry."
            raise EntryError(f"{problem} Add for example\n  {name}: PART", "field_map")
    return found


@dataclass(frozen=True)
class FieldMap:
    """A field map, taken apart once: a function from a decoded raw dict to a sample.

    It pickles. Raises :class:`SampleError` for a sample that lacks a value.

    >>> from energon_fn.samples import TextSample
    >>> make = FieldMap.of(TextSample, {"text": "txt,json[title][0]"})
    >>> make({"__key__": "a", "json": {"title": ["hello"]}}).text
    'hello'
    """

    sample_type: type[Any]
    accesses: Mapping[str, tuple[Access, ...]]
    carried: tuple[str, ...]
    where: str

    @classmethod
    def of(
        cls, sample_type: type[Any], field_map: Mapping[str, str], where: str = "the dataset"
    ) -> FieldMap:
        """Take it apart. ``where`` it is from is for messages. Raises DatasetError."""
        accesses = check_field_map(sample_type, field_map)
        known = sample_fields(sample_type)
        carried = tuple(name for name in BOOKKEEPING if name in known and name not in accesses)
        return cls(sample_type, accesses, carried, where)

    @property
    def part_filter(self) -> PartFilter:
        """True for the parts that it takes values from."""
        return PartFilter(frozenset(a.part for each in self.accesses.values() for a in each))

    def __call__(self, raw: dict[str, Any]) -> Any:
        # This runs for every sample: Access.value of each field's first alternative, written out.
        sample_type, carried, fields = self._at_hand
        values = {}
        for name in carried:
            if name in raw:
                values[name] = raw[name]
        for name, part, path, accesses in fields:
            try:
                value = raw[part]
                for step in path:
                    value = value[step] if type(value) is dict else _inside(value, step)
            except (LookupError, ValueError):
                value = self._value(raw, name, accesses)
            values[name] = value
        return sample_type(**values)

    def _value(self, raw: Mapping[str, Any], name: str, accesses: tuple[Access, ...]) -> Any:
        """What the first access that leads somewhere leads to."""
        missing = []
        for access in accesses:
            try:
                return access.value(raw)
            except LookupError as error:
                missing.append(str(error))
        raise SampleError(
            f"sample {_whereabouts(raw)}: no value for {name!r}: {'; '.join(missing)}. The "
            f"field map of {self.where} says {name}: {','.join(map(str, accesses))}. "
            "Exclude the sample in split.yaml, or add an alternative after a comma."
        )

    @cached_property
    def _at_hand(self) -> tuple[type[Any], tuple[str, ...], list[Any]]:
        """The type, the names that are carried, and name, part, path and accesses of each field."""
        fields = [(name, *accesses[0], accesses) for name, accesses in self.accesses.items()]
        return self.sample_type, self.carried, fields

    def __getstate__(self) -> dict[str, Any]:
        return {own.name: getattr(self, own.name) for own in dataclasses.fields(self)}


@dataclass(frozen=True)
class PartFilter:
    """Which parts of a sample have to be read. Those read from a pickle are equal."""

    parts: frozenset[str]

    def __call__(self, part: str) -> bool:
        return part in self.parts


def _whereabouts(raw: Mapping[str, Any]) -> str:
    shards = {source.shard_name for source in raw.get("__sources__") or ()}
    return repr(raw.get("__key__")) + "".join(f" in {shard}" for shard in sorted(shards))


# -------------------------------------------------------------------------------- code of datasets


@dataclass(frozen=True)
class DatasetCode:
    """A function in a Python file of the dataset.

    It is a path and a name, so it pickles; each process runs the file once, at the first call.
    """

    path: str
    name: str

    def __call__(self, value: Any) -> Any:
        return getattr(_run(self.path), self.name)(value)

    def check(self) -> None:
        """Run the file, again if it was: it may have been edited. Raises DatasetError."""
        _run.cache_clear()
        functions = [name for name, thing in vars(_run(self.path)).items() if callable(thing)]
        if self.name not in functions:
            raise EntryError(
                f"{self.path} has no function {self.name!r}{there_are(self.name, functions)}"
            )


@cache
def _run(path: str) -> ModuleType:
    """The module that a Python file makes, read through the seam and not cached beside the data."""
    code = files.read_bytes(path)
    module = ModuleType("energon_fn_dataset_" + hashlib.sha256(path.encode()).hexdigest()[:16])
    module.__file__ = path
    sys.modules[module.__name__] = module  # where classes defined in the file look for it
    try:
        exec(compile(code, path, "exec"), vars(module))
    except Exception as error:
        raise DatasetError(f"{path} failed to load: {type(error).__name__}: {error}") from error
    return module


@dataclass(frozen=True)
class SampleLoader:
    """The dataset's own ``sample_loader``: a function from a decoded raw dict to a sample."""

    sample_type: type[Any]
    code: DatasetCode

    def __call__(self, raw: dict[str, Any]) -> Any:
        values = self.code(raw)
        says = f"sample {_whereabouts(raw)}: {self.code.path}:{self.code.name} returned"
        wants = self.sample_type.__name__
        if not isinstance(values, Mapping):
            raise DatasetError(
                f"{says} {type(values).__name__}. It must return a dict of the fields of {wants}."
            )
        known, required = sample_fields(self.sample_type), required_fields(self.sample_type)
        # The key is the loader's own business; where the sample comes from is not.
        kept = {name: raw[name] for name in BOOKKEEPING if name in raw and name in known}
        values = {**values, **kept, "__key__": values.get("__key__", raw["__key__"])}
        for name in values.keys() - known.keys():
            raise DatasetError(f"{says} {name!r}, no field of {wants}{there_are(name, known)}")
        for name in required:
            if name not in values:
                raise SampleError(f"{says} no {name!r}, which {wants} requires.")
        return self.sample_type(**values)
