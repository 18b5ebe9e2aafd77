"""The README's examples run as they stand."""

import re
import runpy
from pathlib import Path

import pytest

from energon_fn.demo import build_demo
from energon_fn.disk.prepare import prepare_dataset, write_dataset_yaml

README = Path(__file__).parents[1] / "README.md"


CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
RECIPES = re.compile(r"## Beside other libraries\n.*?(?=\n## )", re.DOTALL)


def examples() -> list[str]:
    return CODE.findall(RECIPES.sub("", README.read_text()))


def recipes() -> dict[str, str]:
    """The recipes beside other libraries, by library, each behind what they have in common."""
    (section,) = RECIPES.findall(README.read_text())
    common, *recipes = CODE.findall(section)
    library = re.compile(r"^(?:import|from) (\w+)")
    return {library.findall(recipe)[0]: f"{common}\n{recipe}" for recipe in recipes}


def demo_dataset(folder: Path) -> None:
    """What the demo leaves in the folder, but less of it."""
    path = folder / "energon_fn_demo"
    names = build_demo(path, samples=80, shards=4)
    prepare_dataset(path, names, split_parts_ratio=[("train", 1)])
    write_dataset_yaml(path, "CaptioningSample", {"image": "jpg", "caption": "txt"})


def test_its_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo_dataset(tmp_path)
    monkeypatch.chdir(tmp_path)
    # The training script is run in test_distributed.py.
    short = [example for example in examples() if "save_state_global" not in example]
    assert len(short) == len(examples()) - 1 == 4
    for number, example in enumerate(short):
        # As a script, since workers send instances of its classes.
        script = tmp_path / f"example_{number}.py"
        script.write_text(example)
        runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert said.count("torch.Size([32, 3, 224, 224])") == 10
    assert "background" in said
    assert "'energon_fn_demo" not in said  # paths are whole
    assert ": 60," in said
    assert ": 20}" in said
