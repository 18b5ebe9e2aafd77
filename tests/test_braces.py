"""Names in braces: expanding undoes collapsing, and both undo escaping."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from energon_fn.disk.braces import collapse_braces, escape_braces, expand_braces
from energon_fn.errors import DatasetError

NAMES = st.text(alphabet="019{}\\,.-_$/a", min_size=1, max_size=7)


def expanded(patterns: list[str]) -> list[str]:
    return [name for pattern in patterns for name in expand_braces(pattern)]


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ("a_9 a_10", "a_9 a_10"),
        ("a_08 a_09 a_10", "a_{08..10}"),
        ("a_0_x a_1_x", "a_{0..1}_x"),
        ("1/a 2/a 2/b", "{1..2}/a 2/b"),
        ("s1.mp4 s2.mp4", "s{1..2}.mp4"),
        ("a_1 a_0", "a_1 a_0"),
        ("a_1 a_2 a_4 a_5", "a_{1..2} a_{4..5}"),
        ("a1_9 a2_9 a2_8", "a{1..2}_9 a2_8"),
        ("a0_0 a0_1 a1_1", "a0_{0..1} a1_1"),
    ],
)
def test_runs_of_numbers_become_braces(names: str, patterns: str) -> None:
    assert collapse_braces(names.split()) == patterns.split()


@given(st.lists(NAMES, max_size=12))
def test_expanding_undoes_collapsing(names: list[str]) -> None:
    assert expanded(collapse_braces(names)) == names


@given(st.lists(st.integers(0, 1200), max_size=40), st.integers(0, 4))
def test_expanding_undoes_collapsing_numbers(numbers: list[int], width: int) -> None:
    names = [f"s/x_{n:0{width}d}.tar" for n in numbers]
    assert expanded(collapse_braces(names)) == names


@given(NAMES)
def test_an_escaped_name_stands_for_itself(name: str) -> None:
    assert expand_braces(escape_braces(name)) == [name]


@pytest.mark.parametrize("pattern", ["a{0..1", "a}b", "{a,b}}"])
def test_unpaired_braces_are_explained(pattern: str) -> None:
    with pytest.raises(DatasetError, match=r"braces do not match .* Write \\\{ for one that is"):
        expand_braces(pattern)
