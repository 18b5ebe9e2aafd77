"""What can go wrong with data, and who decides what happens then.

Three kinds of exception, told apart by what should follow:

* :class:`SkipSample` - the user asks to drop this sample, group or batch. Not a failure.
* any other exception in a user's function or a decoder - goes to an *error handler*, which logs
  it (the default), raises it, or does what the user wants. The sample is dropped.
* :class:`FatalSampleError` and :class:`DatasetError` - the run cannot go on.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("energon_fn")

ErrorHandler = Callable[[Exception, Any, "tuple[Any, ...] | None"], None]
"""``handler(exception, sample_or_samples, sources)``: return to drop the sample, raise to stop."""

PROGRAMMING_ERRORS = (
    ImportError,
    MemoryError,
    NameError,
    NotImplementedError,
    RecursionError,
    SyntaxError,
    SystemError,
)
"""Errors that no other sample will cure: they are raised at once instead of being handled."""


class SkipSample(BaseException):
    """Raise it in any user function to drop the sample, group or batch at hand.

    It derives from ``BaseException`` so that an ``except Exception`` in the user's own code does
    not swallow it.

    >>> from energon_fn import encode_sample
    >>> def only_even(n):
    ...     if n % 2:
    ...         raise SkipSample
    ...     return n
    >>> list(encode_sample(only_even)(range(6)))
    [0, 2, 4]
    """


IgnoreSample = SkipSample
"""The documented name of :class:`SkipSample`."""


class DatasetError(Exception):
    """The dataset or its metadata is wrong. The message names the thing and the remedy."""


class SampleError(Exception):
    """One sample cannot be read or decoded. The message names shard, key and part."""


class FatalSampleError(Exception):
    """Too many samples in a row failed: the fault is not in single samples."""


class StateError(Exception):
    """A saved state does not fit. The message shows both sides and names the remedy."""


class WorkerError(Exception):
    """Worker processes died more often than is made good."""


def log_exception(
    exception: Exception, sample: Any = None, sources: tuple[Any, ...] | None = None
) -> None:
    """Log the exception and go on with the next sample (the default handler).

    What is wrong with a sample is one line. An exception of a user's function comes with its
    traceback the first time that a process meets it at its place in the code, then as one line;
    from the 9th time on only the 16th, the 32nd, ... is told. ``quarantine`` writes all down.

    >>> log_exception(ValueError("bad pixel"))  # goes to the logger "energon_fn"
    """
    trace = exception.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = type(exception), trace and (trace.tb_frame.f_code, trace.tb_lineno)
    notes = " ".join(getattr(exception, "__notes__", ()))
    times = _times[place] = _times[place] + 1
    dropped = "sample"
    if isinstance(sample, list) and len(sample) > 1:
        dropped = f"{len(sample)} samples together"
    what = f"{dropped} dropped: {type(exception).__name__}: {exception} {notes}"
    if isinstance(exception, SampleError) or 1 < times <= 8:
        logger.error(what)
    elif times == 1:
        logger.error(what, exc_info=exception)
    elif times & (times - 1) == 0:
        logger.error(f"{what} (this is number {times}; those between are not told)")


_times: Counter[object] = Counter()
"""How often this process met an exception at its place in the code."""


def reraise_exception(
    exception: Exception, sample: Any = None, sources: tuple[Any, ...] | None = None
) -> None:
    """Raise the exception: one bad sample ends the run.

    >>> reraise_exception(ValueError("bad pixel"))
    Traceback (most recent call last):
        ...
    ValueError: bad pixel
    """
    raise exception
