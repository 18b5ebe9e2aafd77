"""Every method may skip, multiply and fail: what that costs, and who is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import (
    Encoder,
    Everything,
    Grouped,
    Halves,
    Numbers,
    Whole,
    flat,
    here,
    load,
    numbers_in,
    train,
    val,
)

from energon_fn import (
    AugmentTaskEncoder,
    FatalSampleError,
    IgnoreSample,
    SkipSample,
    get_loader,
    reraise_exception,
    stateless,
)

# What goes with sample 6 where the method is left out for it: method, base, packing, numbers.
LOST: list[tuple[str, type[Everything], int | None, set[int]]] = [
    ("encode_sample", Whole, None, {6}),
    ("encode_sample", Whole, 4, {6}),
    ("preencode_sample", Everything, None, {6}),
    ("preencode_sample", Everything, 4, {6}),
    ("postencode_sample", Everything, None, {6}),
    ("postencode_sample", Everything, 4, {6}),
    ("select_samples_to_pack", Everything, 4, {4, 5, 6, 7}),
    ("pack_selected_samples", Everything, 4, {4, 6}),
    ("batch_group_criterion", Grouped, None, {6}),
    ("batch_group_criterion", Grouped, 4, {4, 6}),
    ("batch", Everything, None, {4, 5, 6, 7}),
    ("batch", Grouped, None, {4, 5, 6, 7}),
    ("batch", Everything, 4, {0, 1, 2, 3, 4, 5, 6, 7}),
    ("encode_batch", Everything, None, {4, 5, 6, 7}),
    ("encode_batch", Grouped, None, {4, 5, 6, 7}),
    ("encode_batch", Everything, 4, {0, 1, 2, 3, 4, 5, 6, 7}),
]
METHODS = pytest.mark.parametrize(("method", "base", "packing", "lost"), LOST)


@METHODS
@pytest.mark.parametrize("error", [SkipSample, IgnoreSample("not this one"), SkipSample()])
def test_skipping_drops_what_the_method_is_called_with(
    folder: Path, method: str, base: Any, packing: int | None, lost: set[int], error: Any
) -> None:
    class Skipping(base):  # type: ignore[misc]
        def act(self, name: str, result: Any, numbers: list[int]) -> Any:
            if name == method and 6 in numbers:
                raise error
            return result

    found = load(folder, task_encoder=Skipping(), batch_size=4, packing_buffer_size=packing)
    assert numbers_in(found) == Counter(set(range(12)) - lost)


@METHODS
def test_failing_costs_the_same_and_is_told_to_the_handler(
    folder: Path, method: str, base: Any, packing: int | None, lost: set[int]
) -> None:
    told: list[Any] = []

    class Failing(base):  # type: ignore[misc]
        def act(self, name: str, result: Any, numbers: list[int]) -> Any:
            if name == method and 6 in numbers:
                raise ValueError("six")
            return result

    config = here(global_error_handler=lambda *error: told.append(error))
    options = {"batch_size": 4, "packing_buffer_size": packing, "task_encoder": Failing()}
    found = load(folder, worker_config=config, **options)
    assert numbers_in(found) == Counter(set(range(12)) - lost)
    ((error, item, _),) = told
    assert str(error) == "six"
    assert method in error.__notes__[0]
    assert 6 in flat([item["json"]["n"]] if isinstance(item, dict) else item)
    with pytest.raises(ValueError, match="six"):
        load(folder, worker_config=here(global_error_handler=reraise_exception), **options)


@pytest.mark.parametrize(
    ("method", "base", "packing", "lost"),
    [case for case in LOST if case[0] != "batch_group_criterion"],  # one question, one answer
)
def test_a_generator_may_skip_or_fail_after_some_results(
    folder: Path, method: str, base: Any, packing: int | None, lost: set[int]
) -> None:
    selects = method == "select_samples_to_pack"  # the one that gives many things anyway

    def skip() -> None:
        raise SkipSample

    def fail() -> None:
        raise ValueError("six")

    for end in (None, skip, fail):

        class Generating(base):  # type: ignore[misc]
            def act(self, name: str, result: Any, numbers: list[int]) -> Any:
                return self.results(result, numbers) if name == method else result

            def results(self, result: Any, numbers: list[int], end: Any = end) -> Iterator[Any]:
                first, second = result if selects else (result, result)
                yield first
                if end and 6 in numbers:
                    end()
                yield second

        config = here(global_error_handler=lambda *error: None)
        options = {"batch_size": 4, "packing_buffer_size": packing, "worker_config": config}
        found = numbers_in(load(folder, task_encoder=Generating(), **options))
        missing = ({5, 7} if selects else lost) if end else set()
        assert found == Counter(list(range(12)) * (1 if selects else 2)) - Counter(missing)


def test_results_before_a_failure_are_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Breaking(Numbers):
        def encode_sample(self, sample: Any) -> Any:
            n = sample["json"]["n"]
            yield n
            if n % 4 == 2:
                raise ValueError("no more")
            yield -n

    found = load(folder, task_encoder=Breaking())
    assert found == [m for n in range(12) for m in ((n,) if n % 4 == 2 else (n, -n))]
    assert len(caplog.records) == 3


def test_a_handler_that_raises_ends_the_run_with_its_own_error(folder: Path) -> None:
    class Stop(Exception):
        pass

    def handler(error: Exception, sample: Any, sources: Any) -> None:
        raise Stop(sources[0].shard_name) from error

    class Failing(Numbers):
        def encode_sample(self, sample: Any) -> Any:
            if sample["json"]["n"] == 5:
                raise ValueError("five")
            yield sample["json"]["n"]

    loader = get_loader(
        val(folder, task_encoder=Failing(), worker_config=here(global_error_handler=handler))
    )
    found: list[int] = []
    for _ in range(2):  # it stays where it was
        with pytest.raises(Stop, match=r"shard_001\.tar") as caught:
            found.extend(loader)
        assert isinstance(caught.value.__cause__, ValueError)
    assert found == [0, 1, 2, 3, 4]


def test_whatever_a_batch_has_as_its_sources_its_failure_is_told(folder: Path) -> None:
    class Odd(Encoder):
        def batch(self, samples: Any) -> Any:
            return {"__sources__": [sample["__sources__"] for sample in samples]}

        def encode_batch(self, batch_data: Any) -> Any:
            raise ValueError("not my batch")

    with pytest.raises(FatalSampleError, match="not my batch"):
        load(folder, batch_size=2, task_encoder=Odd(), worker_config=here(failure_tolerance=3))


@pytest.mark.parametrize("groups", [[], [[]], [[], []], ()])
def test_selecting_nothing_drops_the_buffer(folder: Path, groups: Any) -> None:
    class Picky(Halves):
        def select_samples_to_pack(self, samples: Any) -> Any:
            return groups if 0 in samples else [samples]

    found = load(folder, task_encoder=Picky(), packing_buffer_size=5)
    assert found == [(5, 6, 7, 8, 9), (10, 11)]
    if groups == []:
        assert load(folder, task_encoder=Picky(), packing_buffer_size=12) == []


def test_a_selection_that_forgets_to_return_is_told(folder: Path) -> None:
    class Forgetting(Halves):
        def select_samples_to_pack(self, samples: Any) -> Any:
            pass

    with pytest.raises(TypeError, match=r"returned None: return the groups"):
        load(folder, task_encoder=Forgetting(), packing_buffer_size=5)


@pytest.mark.parametrize("answer", [3, None, "ab", (1, 2, 3), ([1], 2), (1, "2"), (1, 2.5)])
def test_a_criterion_that_gives_no_key_and_size_is_told(folder: Path, answer: Any) -> None:
    class Wrong(Numbers):
        def batch_group_criterion(self, sample: Any) -> Any:
            return answer

    with pytest.raises(TypeError, match=r"batch_group_criterion returned .* must return \(key,"):
        load(folder, batch_size=2, task_encoder=Wrong())


@pytest.mark.parametrize("size", [np.int64(3), torch.tensor(3), 3])
def test_a_groups_size_may_be_any_whole_number(folder: Path, size: Any) -> None:
    class Sized(Numbers):
        def batch_group_criterion(self, sample: Any) -> Any:
            return [sample // 6, size]

    found = load(folder, task_encoder=Sized())
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_packing_may_yield_several_packs(folder: Path) -> None:
    class Cutting(Halves):
        def pack_selected_samples(self, samples: Any) -> Any:
            yield tuple(samples[:1])
            yield tuple(samples[1:])

    found = load(folder, task_encoder=Cutting(), packing_buffer_size=6)
    assert found == [(0,), (2, 4), (1,), (3, 5), (6,), (8, 10), (7,), (9, 11)]
    found = load(folder, task_encoder=Cutting(), packing_buffer_size=6, batch_size=3)
    assert found == [[(0,), (2, 4), (1,)], [(3, 5), (6,), (8, 10)], [(7,), (9, 11)]]


def test_failure_tolerance_of_one_method(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Encoder):
        @stateless(failure_tolerance=4)
        def encode_sample(self, sample: Any) -> Any:
            if sample["json"]["n"] in failing:
                raise ValueError("bad")
            return sample

    failing = {1, 2, 3, 5, 6, 7, 9, 10, 11}
    for encoder in (Failing(), AugmentTaskEncoder(Failing())):
        assert len(load(folder, task_encoder=encoder)) == 3
    failing = {4, 5, 6, 7}
    assert len(caplog.records) == 8 + 1  # of 18: the first ones, and the 16th
    with pytest.raises(FatalSampleError, match=r"encode_sample failed 4 times in a row.*00007"):
        load(folder, task_encoder=Failing())


def test_where_nothing_ever_comes_the_last_failure_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Encoder):
        def batch(self, samples: list[Any]) -> Any:
            raise ValueError("sizes differ")

    with pytest.raises(FatalSampleError, match=r"nothing came.*sizes differ in batch of samples 0"):
        train(folder, task_encoder=Failing(), batch_size=12)
    assert "12 samples together dropped: ValueError: sizes differ" in caplog.text
