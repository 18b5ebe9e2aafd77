"""The README's examples run as they stand."""

import re
import runpy
from pathlib import Path

import pytest

from energon_fn.demo import build_demo
from energon_fn.prepare import prepare_dataset, write_dataset_yaml

README = Path(__file__).parents[1] / "README.md"


def test_its_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = build_demo("energon_fn_demo", samples=80, shards=4)
    prepare_dataset("energon_fn_demo", names, split_parts_ratio=[("train", 1)])
    write_dataset_yaml("energon_fn_demo", "CaptioningSample", {"image": "jpg", "caption": "txt"})
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == 2
    for number, example in enumerate(examples):
        # As a script, since workers send instances of its classes.
        script = tmp_path / f"example_{number}.py"
        script.write_text(example)
        runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert said.count("torch.Size([32, 3, 224, 224])") == 10
    assert "background" in said
