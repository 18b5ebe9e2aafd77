"""Values in a few words: what is said is true, short, and never an error."""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from energon_fn.look import values
from energon_fn.look.values import brief, describe, fields_of


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.tensor([[1.5, -2.0]]), "float32 (1, 2) -2..1.5"),
        (torch.tensor([0, 50256]), "int64 (2,) 0..50256"),
        (torch.tensor([0, 255], dtype=torch.uint8), "uint8 (2,) 0..255"),
        (torch.tensor([True, False]), "bool (2,) False..True"),
        (torch.tensor([1.0, 0.5], dtype=torch.bfloat16), "bfloat16 (2,) 0.5..1"),
        (torch.tensor([1.0, torch.nan, 3.0]), "float32 (3,) 1..3 and nan"),
        (torch.tensor([torch.nan]), "float32 (1,) nan"),
        (torch.tensor([-torch.inf, 2.0]), "float32 (2,) -inf..2"),
        (torch.tensor([2.0], requires_grad=True), "float32 (1,) 2"),
        (torch.zeros(0, 3), "float32 (0, 3)"),
        (torch.empty(2, device="meta"), "float32 (2,)"),
        (torch.zeros(2, dtype=torch.complex64), "complex64 (2,)"),
        (np.array([[3, 1]], np.int16), "int16 (1, 2) 1..3"),
        (np.array([1 + 2j]), "complex128 (1,)"),
        (np.array(["a", "b"]), "<U1 (2,)"),
        (Image.new("L", (4, 3)), "picture L 4 x 3"),
        ([torch.zeros(2), "a"], "2 values: float32 (2,) 0, 'a'"),
        ({"ids": torch.ones(2), "n": 1}, "2 entries: ids: float32 (2,) 1, n: 1"),
        ({3: None}, '{"3": null}'),
        (deque([1, 2]), "2 values: 1, 2"),
        (range(10**9), "range(0, 1000000000)"),
        ("", '""'),
        (b"1234", "4 bytes"),
    ],
)
def test_what_is_said_of_a_value(value: Any, says: str) -> None:
    assert describe(value, 80) == says


def test_the_range_of_a_large_tensor_is_that_of_a_marked_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(values, "MAX_NUMBERS", 100)
    assert describe(torch.arange(100.0), 80) == "float32 (100,) 0..99"
    assert describe(torch.arange(200.0), 80) == "float32 (200,) ~0..198"
    assert describe(torch.arange(400).view(1, 2, 200), 80) == "int64 (1, 2, 200) ~0..198"
    assert describe(np.arange(400.0).reshape(100, 4), 80) == "float64 (100, 4) ~0..387"


def test_a_long_list_is_not_gone_through() -> None:
    class Endless(list[int]):
        def __len__(self) -> int:
            return 10**9

        def __iter__(self) -> Any:
            yield from range(1000)
            raise AssertionError("who reads all of it?")

    assert describe(Endless(), 60) == "1000000000 values: 0, 1, 2, 3, …"


class Point(NamedTuple):
    x: int
    y: str


@dataclasses.dataclass
class Declared:
    image: Any
    label: int = 3


class Slotted:
    __slots__ = ("x",)


def test_fields() -> None:
    own = Declared(None)
    own.extra = 1  # type: ignore[attr-defined]
    assert fields_of(own) == {"image": None, "label": 3, "extra": 1}
    del own.image
    assert fields_of(own) == {"label": 3, "extra": 1}
    assert fields_of(Point(1, "b")) == {"x": 1, "y": "b"}
    for one in ([1], (1, 2), "text", 7, None, torch.ones(2), Declared, len, (i for i in "ab")):
        assert fields_of(one) is None


VALUES = st.recursive(
    st.none() | st.integers() | st.floats() | st.text() | st.binary() | st.just(torch.rand(3)),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(), inner)
        | st.builds(Declared, inner)
        | st.sets(st.integers())
        | st.tuples(inner)
    ),
)


@given(st.dictionaries(st.text(max_size=150), VALUES, max_size=30))
@settings(deadline=None, max_examples=60)
def test_any_value_is_told_in_few_lines_of_at_most_100_columns(fields: dict[str, Any]) -> None:
    lines = brief({**fields, "__key__": "k" * 200}).split("\n")
    assert len(lines) <= values.MAX_FIELDS + 3
    for line in lines:
        assert values._columns(line) <= 100
        assert values.one_line(line) == line.strip()  # nothing moves the cursor


class Bad:
    def __repr__(self) -> str:
        raise RuntimeError("no repr today")


class Sinister:
    def __init__(self) -> None:
        self.x = 1

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no fields today")


def test_values_whose_own_methods_fail_are_told_by_their_type() -> None:
    assert brief({"a": Bad(), "b": [Bad()], "c": 1}) == "dict(a: <Bad>, b: <list>, c: 1)"
    assert brief(Sinister()) == "Sinister()"
    endless: list[Any] = []
    endless.append(endless)
    assert re.fullmatch(r"dict\(a: .*\)", brief({"a": endless}))


def test_keys_and_missing_values() -> None:
    assert brief({"__key__": ["a"], "x": None, "y": None}) == "dict('a', None: x, y)"
    assert brief({"__key__": ["a", "b", "c"]}) == "dict('a' .. 'c' (3))"
    assert brief({"__keys__": ()}) == "dict()"
    assert brief({"__key__": "a", "__subflavors__": {"x": 1}}) == "dict('a')"


def test_many_fields_are_not_all_told() -> None:
    assert brief({f"f{i}": i for i in range(100)}).endswith("f19: 19,\n  and 80 more)")
