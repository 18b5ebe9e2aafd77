"""The user's task encoder by its name on the command line: ``my_module:MyEncoder``."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from difflib import get_close_matches
from typing import Any

from energon_fn.task_encoder import METHODS, DefaultTaskEncoder


def load_encoder(name: str | None) -> Any:
    """The task encoder of that name; the default one for None.

    name: ``module:name`` of a class, or a function, that is called without arguments, or of a task
    encoder. The module is imported as ``python`` would here: the current folder comes first.

    Raises ValueError for what there is not, cannot be imported or made, or is no task encoder.
    """
    if name is None:
        return DefaultTaskEncoder[Any, Any, Any, Any]()
    module_name, colon, attribute = name.partition(":")
    if not (colon and attribute.isidentifier()) or module_name.endswith(".py"):
        raise ValueError(
            f"--task-encoder is {name!r}: write MODULE:NAME, my_module:MyEncoder say, for the "
            "class MyEncoder in my_module.py"
        )
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            raise ValueError(
                f"--task-encoder {name}: there is no module {error.name}, neither in {here} nor "
                "among what is installed. Run the command in the folder where the module lies."
            ) from error
        raise _failed(f"{module_name} cannot be imported", name, error) from error
    if not hasattr(module, attribute):
        near = get_close_matches(attribute, vars(module), 1)
        raise ValueError(
            f"--task-encoder {name}: {module.__file__} has no {attribute}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    thing = getattr(module, attribute)
    if callable(thing) and (isinstance(thing, type) or not _is_encoder(thing)):
        try:
            thing = thing()
        except Exception as error:
            raise _failed(
                f"{attribute}() failed. Name a function without arguments that makes the task "
                "encoder",
                name,
                error,
            ) from error
    if not _is_encoder(thing):
        raise ValueError(
            f"--task-encoder {name}: {thing!r} is no task encoder: it has none of "
            f"{', '.join(METHODS)}"
        )
    return thing


def _is_encoder(thing: Any) -> bool:
    return hasattr(thing, "cookers") or any(hasattr(thing, method) for method in METHODS)


def _failed(what: str, name: str, error: Exception) -> ValueError:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = ""
    if last.filename != __file__ and os.path.exists(last.filename):
        where = f" ({os.path.relpath(last.filename)}, line {last.lineno})"
    return ValueError(f"--task-encoder {name}: {what}: {type(error).__name__}: {error}{where}")
