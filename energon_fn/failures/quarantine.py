"""The quarantine file: a line of JSON for each failure of a run, from all its processes.

What is in it is what the error handler is told, as plain data: which samples, where they lie, in
which stage they failed and of what. ``energon-fn trace`` replays one, ``energon-fn exclude`` leaves
them out of the next run.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from energon_fn import position
from energon_fn.checkpoint import tupled
from energon_fn.disk import files
from energon_fn.errors import DatasetError, ErrorHandler, log_exception
from energon_fn.guard import bookkeeping, members
from energon_fn.samples import SourceInfo


@dataclass(frozen=True)
class Failure:
    """A line of a quarantine file: what failed on a sample, or on several at once."""

    keys: tuple[str, ...]
    """Of the samples; of a batch or pack, those of all that are in it."""
    sources: tuple[SourceInfo, ...]
    """Where they were read from: dataset, shard and files."""
    stage: str
    """``"decode"``, ``"encode_sample"``, ``"batch"``, ..."""
    error: str
    """The name of the exception's type."""
    message: str
    traceback: str
    restore_keys: tuple[tuple[Any, ...], ...]
    """What :func:`~energon_fn.trace` replays the samples by, in this very epoch."""
    time: str
    """When it was, in UTC."""

    @classmethod
    def of(
        cls, exception: Exception, item: Any, sources: Iterable[Any] | None, stage: str
    ) -> Failure:
        """What an error handler is told, as plain data.

        >>> failure = Failure.of(ValueError("bad pixel"), {"__key__": "7"}, None, "encode_sample")
        >>> failure.keys, failure.error, failure.message
        (('7',), 'ValueError', 'bad pixel')
        """
        samples = members(item)
        keys = [
            bookkeeping(sample, "__key__") or bookkeeping(sample, "__keys__") for sample in samples
        ]
        restore_keys = [bookkeeping(sample, "__restore_key__") for sample in samples]
        return cls(
            keys=tuple(str(key) for one in keys for key in _listed(one)),
            sources=tuple(one for one in sources or () if isinstance(one, SourceInfo)),
            stage=stage,
            error=type(exception).__name__,
            message=str(exception),
            traceback="".join(traceback.format_exception(exception)),
            restore_keys=tuple(key for one in restore_keys for key in _restore_keys(one)),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _listed(keys: Any) -> Iterable[Any]:
    """The keys of a batch, or the one of a sample."""
    return keys if isinstance(keys, list | tuple) else [] if keys is None else [keys]


def _restore_keys(key: Any) -> Iterator[tuple[Any, ...]]:
    """That of a sample, or of all samples of a batch."""
    if isinstance(key, list | tuple) and key:
        if isinstance(key[0], str):
            yield tuple(key)
        else:
            for one in key:
                yield from _restore_keys(one)


def quarantine(path: str | os.PathLike[str], then: ErrorHandler = log_exception) -> ErrorHandler:
    """An error handler that writes each failure down as a line of JSON, then calls ``then``.

    path: the file. It is appended to, and made if it is not there: an empty one says that nothing
    failed. ``then``: another handler, which drops the sample by returning, or stops the run.

    A line is one write in append mode, so any number of processes may share the file. This holds on
    local file systems, and on network file systems that append atomically. On NFS it holds for the
    processes of one machine: give each machine a file of its own, :func:`read_quarantine` and
    ``energon-fn exclude`` take them one by one or all.

    Errors of the whole dataset, such as a missing shard, and programming errors, such as a wrong
    name, are no failures of samples: they end the run without asking any handler.

    Raises OSError if the file cannot be written.

    >>> import tempfile
    >>> from energon_fn import SkipSample
    >>> from energon_fn.guard import guarded
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     handler = quarantine(folder + "/bad.jsonl", then=lambda *failure: None)
    ...     length = guarded(lambda sample: len(sample["txt"]), "encode_sample", handler=handler)
    ...     for sample in {"__key__": "6", "txt": "a cat"}, {"__key__": "7"}:
    ...         try:
    ...             print(length(sample))
    ...         except SkipSample:
    ...             print("skipped")
    ...     for failure in read_quarantine(folder + "/bad.jsonl"):
    ...         print(failure.keys, failure.stage, failure.error, failure.message)
    5
    skipped
    ('7',) encode_sample KeyError 'txt'
    """
    path = os.path.abspath(path)
    append(path)
    return partial(_handle, path, then)


def _handle(
    path: str,
    then: ErrorHandler,
    exception: Exception,
    sample: Any = None,
    sources: tuple[Any, ...] | None = None,
) -> None:
    append(path, Failure.of(exception, sample, sources, position.here.stage))
    then(exception, sample, sources)


def append(path: str | os.PathLike[str], failure: Failure | None = None) -> None:
    """Write the failure as the file's last line. None: only see that this can be done.

    Raises OSError if it cannot.
    """
    line = b""
    if failure is not None:
        line = json.dumps(asdict(failure), default=repr).encode() + b"\n"
    files.append_line(path, line)


def read_quarantine(path: str | os.PathLike[str]) -> Iterator[Failure]:
    """The failures in a quarantine file, in the order in which they were written.

    Raises :class:`~energon_fn.DatasetError`, with its number, for a line that is none: the last one
    may be half written if the disk was full, or the process ended.
    """
    with files.open_file(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield _failure(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    half = "" if line.endswith(b"\n") else ", it is only half written"
                    raise DatasetError(
                        f"{path}, line {number}: this is no record of a failure{half} "
                        f"({type(error).__name__}: {error}). Remove the line to read the others."
                    ) from error


def _failure(content: Mapping[str, Any]) -> Failure:
    texts = {name: content[name] for name in ("stage", "error", "message", "traceback", "time")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"{name} is {text!r}, which is no text")
    return Failure(
        **texts,
        keys=tuple(map(str, content["keys"])),
        sources=tuple(
            SourceInfo(**{**source, "file_names": tuple(source["file_names"])})
            for source in content["sources"]
        ),
        restore_keys=tupled(content["restore_keys"]),
    )
