"""Which exception is which, and what the two handlers do."""

from __future__ import annotations

import logging
import pickle

import pytest

from energon_fn.errors import (
    PROGRAMMING_ERRORS,
    DatasetError,
    FatalSampleError,
    IgnoreSample,
    SampleError,
    SkipSample,
    log_exception,
    reraise_exception,
)


def test_the_two_names_of_a_skip_are_one_thing() -> None:
    assert IgnoreSample is SkipSample
    with pytest.raises(SkipSample):
        raise IgnoreSample("the documented name")


def test_a_skip_goes_past_except_exception() -> None:
    def careless() -> None:
        try:
            raise SkipSample
        except Exception:
            pytest.fail("swallowed")

    with pytest.raises(SkipSample):
        careless()


def test_errors_are_told_apart() -> None:
    kinds = [DatasetError, SampleError, FatalSampleError]
    assert all(issubclass(kind, Exception) for kind in kinds)
    for kind in kinds:  # catching one must not catch another
        assert [other for other in kinds if issubclass(other, kind)] == [kind]
    assert not issubclass(SkipSample, Exception)
    # One bad sample's error is not among those that end the run.
    assert not issubclass(SampleError, PROGRAMMING_ERRORS)


@pytest.mark.parametrize("kind", [SkipSample, DatasetError, SampleError, FatalSampleError])
def test_errors_cross_to_another_process(kind: type[BaseException]) -> None:
    again = pickle.loads(pickle.dumps(kind("shard-0.tar is cut off")))
    assert (type(again), again.args) == (kind, ("shard-0.tar is cut off",))


def test_log_exception_logs_error_place_and_traceback(caplog: pytest.LogCaptureFixture) -> None:
    def decode() -> None:
        raise ValueError("bad pixel")

    try:
        decode()
    except ValueError as error:
        error.add_note("in encode_sample of sample 0007 from shards/a.tar")
        with caplog.at_level(logging.ERROR, logger="energon_fn"):
            log_exception(error, {"__key__": "0007"}, None)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("energon_fn", "ERROR")
    for part in ("ValueError: bad pixel", "in encode_sample of sample 0007 from shards/a.tar"):
        assert part in record.getMessage()
    assert "in decode" in caplog.text


def test_reraise_exception_raises_that_very_error() -> None:
    error = ValueError("bad pixel")
    with pytest.raises(ValueError, match="bad pixel") as caught:
        reraise_exception(error, {}, ())
    assert caught.value is error


def test_a_failure_is_told_at_length_once_and_a_bad_sample_in_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(n: int) -> None:
        try:
            raise ValueError(f"pixel {n}")
        except ValueError as error:
            error.add_note("in encode_sample of sample 0001")
            log_exception(error)

    fail(1)
    assert caplog.text.count("Traceback") == 1
    fail(2)
    assert caplog.text.count("Traceback") == 1
    assert "sample dropped: ValueError: pixel 2 in encode_sample of sample 0001" in caplog.text
    for n in range(3, 101):
        fail(n)
    assert len(caplog.records) == 8 + len([16, 32, 64])
    assert "pixel 64 in encode_sample of sample 0001 (this is number 64;" in caplog.text
    caplog.clear()
    for _ in range(20):
        log_exception(SampleError("cannot decode part 'jpg'"))
    assert len(caplog.records) == 20
    caplog.clear()
    log_exception(SampleError("cannot decode part 'jpg'"))
    assert len(caplog.text.splitlines()) == 1
