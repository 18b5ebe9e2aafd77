"""``trace``: one sample's way through the functions of a dataset, value by value.

The pipeline runs as it does in training, with the same random numbers; only what guards the
functions also keeps what they give (see ``guarded`` in :func:`energon_fn.pipeline.lifts`).
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from energon_fn import position, seeds
from energon_fn.checkpoint import listed, tupled
from energon_fn.errors import DatasetError, SampleError, StateError
from energon_fn.failures.watch import Step, Watch
from energon_fn.guard import bookkeeping
from energon_fn.look.inside import pictures_in
from energon_fn.look.show import show
from energon_fn.look.values import describe, fields_of, one_line, seen, shorten
from energon_fn.pipeline import Dataset, lifts, steps
from energon_fn.samples import key_of

PACKAGE = os.path.dirname(os.path.dirname(__file__))
PICTURE = 160
"""Pixels of a picture in a notebook."""
PRE = "<pre style='margin:0;background:none;font-family:monospace;white-space:pre'>"
"""Columns are aligned whatever the notebook's style says."""


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """What :func:`trace` gives; printed, or in a notebook, all of it."""

    key: str
    paths: tuple[str, ...]
    """Of the shard or file that the sample is in; of several in a join, of none for a batch."""
    restore_key: tuple[Any, ...]
    steps: tuple[Step, ...]

    @property
    def error(self) -> Exception | None:
        """Of what it failed, if it did."""
        return next((step.error for step in self.steps if step.error is not None), None)

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def text(self, width: int = 79) -> str:
        """All steps in lines of at most ``width`` columns."""
        head = f"{self.restore_key[0]} {self.key}"
        if self.paths:
            head += f" of {' and '.join(map(seen, self.paths))}"
        lines = textwrap.wrap(one_line(head), width, subsequent_indent="  ", break_on_hyphens=False)
        lines += textwrap.wrap(f"restore key {json.dumps(listed(self.restore_key))}", width)
        widest = max((len(step.stage) for step in self.steps), default=0)
        for step in self.steps:
            time = f"{1000 * step.seconds:,.1f} ms" if step.seconds else ""
            start = f"{step.stage:<{widest}}  "
            room = width - len(start) - len(time) - 2
            left = start + shorten(step.function, room) if room > 0 else shorten(step.stage, width)
            time = time if room > 0 else ""
            lines += ["", (left.ljust(width - len(time)) + time).rstrip()]
            for number, value in enumerate(step.values, 1):
                lines += _value_lines(step, number, value, width)
            if step.skipped:
                lines.append("  " + shorten("skipped: SkipSample was raised", width - 2))
            if step.error is not None:
                lines += _error_lines(step.error, width)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        first, *rest = self.text(width=84).split("\n\n")
        rows = "".join(
            f"<tr><td style='text-align:left;vertical-align:top'>{PRE}"
            f"{html.escape(text)}</pre></td><td>{_picture(step.values)}</td></tr>"
            for text, step in zip(rest, self.steps, strict=True)
        )
        return f"{PRE}{html.escape(first)}</pre><table>{rows}</table>"


def trace(dataset: Dataset[Any], key: Any) -> Trace:
    """Run one sample, also one that fails, through the dataset's functions and keep every value.

    dataset: what :func:`~energon_fn.get_train_dataset` and its kind give.
    key: a sample's key, in the first of the dataset's sources that has it; ``(path, key)``, in the
    source at that path; or a ``__restore_key__``, which a quarantine file has, too: then random
    numbers are those of that very epoch, else those of the first. That of a batch shows the samples
    that made it, and what was made of them; with packing, a sample's way ends before the packing.

    Error handlers are not asked, nothing is counted, and nothing is raised for what fails: it is in
    the last step. Raises ValueError for a key that is not there, :class:`~energon_fn.StateError`
    for a restore key of which nothing comes.

    >>> import tempfile, webdataset
    >>> from energon_fn import DefaultTaskEncoder, get_train_dataset
    >>> class Encoder(DefaultTaskEncoder):
    ...     def encode_sample(self, sample):
    ...         return sample["txt"].split()[4]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with webdataset.TarWriter(folder + "/0.tar") as tar:
    ...         size = tar.write({"__key__": "7", "txt": "a cat"})
    ...     way = trace(get_train_dataset(folder, batch_size=1, task_encoder=Encoder()), "7")
    >>> [(step.stage, step.values[0]["txt"]) for step in way.steps[:2]]
    [('load', b'a cat'), ('decode', 'a cat')]
    >>> way.steps[2].stage, way.error
    ('encode_sample', IndexError('list index out of range'))
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"trace takes a dataset, not {dataset!r}: that of a loader is its .dataset")
    with seeds.untouched(), position.apart():
        return _traced(replace(dataset, threads=0), tupled(key))


def index_of(dataset: Dataset[Any], key: str, path: str | None = None) -> int | None:
    """The index of the first sample with that key, in the sources at that path if one is given."""
    for start, source in zip(dataset.starts, dataset.sources, strict=False):
        if path is None or os.path.realpath(source.path) == os.path.realpath(path):
            found = source.find(key)
            if found is not None:
                return start + found
    return None


def _traced(dataset: Dataset[Any], key: Any) -> Trace:
    match key:
        case str() | (str(), str()):
            path, name = (None, key) if isinstance(key, str) else key
            index = index_of(dataset, name, path)
            if index is None:
                paths = [path] if path else dict.fromkeys(one.path for one in dataset.sources)
                raise ValueError(
                    f"no sample has the key {name!r} in {', '.join(paths)}: check its spelling and "
                    "the split part, and whether split.yaml excludes it"
                )
            return _sample(dataset, 0, index, ("sample", 0, index, 0), name)
        case ("sample", int() as epoch, int() as index, int()) if 0 <= index < dataset.starts[-1]:
            return _sample(dataset, epoch, index, key, f"number {index}")
        case ("batch", int() as epoch, int() as lane, (_, int()) as state) if (
            0 <= lane < dataset.order.lanes
        ):
            return _batch(dataset, epoch, lane, state, key)
    raise StateError(
        f"no sample or batch of this dataset has the restore key {key!r}. Give the "
        "__restore_key__ of one that was made with the same arguments, or a sample's key."
    )


def _sample(
    dataset: Dataset[Any], epoch: int, index: int, key: tuple[Any, ...], name: str
) -> Trace:
    """name: in case that the sample's key cannot be read."""
    watch = Watch(dataset)
    staged = lifts(watch.dataset, 0, 0, watch)[0](lambda state: iter([((epoch, index), None)]))
    try:
        for _ in staged(None):
            pass
    except StateError:
        raise
    except Exception as error:
        watch.outside(error)
    raw = watch.steps[0].values[0] if watch.steps[0].values else {}
    paths = dict.fromkeys(
        path if os.path.isfile(path := one.dataset_path) else os.path.join(path, one.shard_name)
        for one in raw.get("__sources__", ())
    )
    found = tuple(paths) or (dataset.sources[dataset.place(index)[0]].path,)
    return Trace(raw.get("__key__", name), found, key, watch.steps)


def _batch(dataset: Dataset[Any], epoch: int, lane: int, state: Any, key: tuple[Any, ...]) -> Trace:
    by_stage = steps(dataset)
    joins = (
        "batch" if "batch" in by_stage else "pack_selected_samples" if "pack" in by_stage else ""
    )
    watch = Watch(dataset, only=[joins, "encode_batch"] if joins else None)
    batch, _ = next(watch.dataset.lane_stream(lane, epoch, watch)(state), (None, None))
    if batch is None:
        raise StateError(f"nothing comes where the restore key {key!r} is from: the dataset ends")
    found, calls = watch.steps, watch.calls
    # What comes before was made on the way to it, from where the state is.
    last = max(n for n, call in enumerate(calls) if call.stage == (joins or "load"))
    members = [Step("samples", "", tuple(calls[last].members), 0.0)] if joins else []
    found = (*members, *found[last:])
    return Trace(key_of(batch) or "", (), key, found)


# ----------------------------------------------------------------------------------------- showing


def _value_lines(step: Step, number: int, value: Any, width: int) -> Iterator[str]:
    if step.stage == "samples":
        restore_key = bookkeeping(value, "__restore_key__")
        yield "  " + shorten(f"{key_of(value)}  {json.dumps(restore_key, default=repr)}", width - 2)
        return
    indent = "  "
    if len(step.values) > 1:
        yield f"  {number} of {len(step.values)}"
        indent = "    "
    fields = fields_of(value)
    if fields is None:
        yield indent + describe(value, width - len(indent))
        return
    if parts := fields.get("__parts__"):  # of a join
        fields = {
            f"{n}.{name}": data
            for n, part in enumerate(parts)
            for name, data in (part or {}).items()
            if not name.startswith("__")
        }
    fields = {name: data for name, data in fields.items() if not name.startswith("__")}
    widest = min(max(map(len, fields), default=0), width // 3)
    for name, data in fields.items():
        start = f"{indent}{shorten(name, widest):<{widest}}  "
        yield start + describe(data, width - len(start))


def _error_lines(error: Exception, width: int) -> Iterator[str]:
    """What it says, and where it was raised: from the user's function on, if it was one."""
    message = one_line(f"{type(error).__name__}: {error}")
    yield from textwrap.wrap(
        message, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False,
        max_lines=8, placeholder=" …",
    )  # fmt: skip
    frames = traceback.extract_tb(error.__traceback__)
    first = next((n for n, frame in enumerate(frames) if not _is_ours(frame.filename)), -1)
    if first < 0 and isinstance(error, SampleError | DatasetError):
        return  # what is wrong is said
    for frame in frames[first:]:
        file = seen(frame.filename)
        place = f":{frame.lineno} in {frame.name}"
        room = max(width - 4 - len(place), 12)
        yield "    " + (file if len(file) <= room else "…" + file[1 - room :]) + place
        if frame.line:
            yield "      " + shorten(frame.line, width - 6)


def _is_ours(file: str) -> bool:
    return file.startswith(PACKAGE + os.sep) or os.path.basename(file) == "contextlib.py"


def _picture(values: tuple[Any, ...]) -> str:
    """An image for a notebook, if there are pictures in the values."""
    try:
        if next(pictures_in(values), None) is None:
            return ""
        file = io.BytesIO()
        show(values, columns=4, cell=PICTURE, limit=16).save(file, "PNG")
    except Exception:  # then its text has to do
        return ""
    return f"<img src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"
