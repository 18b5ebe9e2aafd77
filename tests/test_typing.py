"""What checkers are told of the arguments is what the functions take; usage that they read runs."""

import inspect
import typing
from pathlib import Path

import pytest
from test_readme import demo_dataset
from typing_usage import usage

from energon_fn import get_dataset, get_loader, get_train_dataset, get_val_dataset
from energon_fn.arguments import Common, Every, LoaderOptions, Train, Val


def test_the_usage_that_is_type_checked_runs(tmp_path: Path) -> None:
    demo_dataset(tmp_path)
    usage(str(tmp_path / "energon_fn_demo"))


def test_the_documented_arguments_are_those_of_get_dataset() -> None:
    taken, told = typing.get_type_hints(get_dataset), typing.get_type_hints(Every)
    named = {"path", "batch_size", "task_encoder", "return"}  # in the overloads themselves
    assert {name: of for name, of in taken.items() if name not in named} == told


def test_the_savable_loader_takes_what_get_loader_takes() -> None:
    taken, told = typing.get_type_hints(get_loader), typing.get_type_hints(LoaderOptions)
    named = {"dataset", "unknown", "return"}
    assert {name: of for name, of in taken.items() if name not in named} == told


@pytest.mark.parametrize(
    ("function", "arguments"), [(get_train_dataset, Train), (get_val_dataset, Val)]
)
def test_training_and_validation_have_arguments_of_their_own(
    function: typing.Callable[..., object], arguments: type
) -> None:
    own = inspect.signature(function).parameters.keys()
    own -= {"path", "batch_size", "task_encoder", "options"}
    assert arguments.__annotations__.keys() == Common.__annotations__.keys() | own
