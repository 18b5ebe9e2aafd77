"""The benchmarks run. (What they measure is for people to look at.)"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    yield importlib.import_module("state")
    del sys.modules["state"]


def test_the_cost_of_states_is_measured(
    state: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--samples=80", "--buffer=20", "--turns=1", "--rounds=1", "--workers=1"]
    state.main([*sizes, "--peer-python=", f"--json={tmp_path / 'found.json'}"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["options"]["buffer"] == 20
    (measured,) = found["rounds"]["energon_fn"]
    printed = capsys.readouterr().out
    for load in state.WORKLOADS:
        assert 100 < measured[load]["state_bytes_per_lane"] < 1000
        assert all(value > 0 for name, value in measured[load].items() if name[:8] != "slowdown")
        assert load in printed
        assert all(name in printed for name in measured[load])


def test_it_says_what_it_does(state: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        state.main(["--help"])
    assert "bytes of one rank's state" in capsys.readouterr().out


def test_states_of_any_kind_become_plain(state: Any) -> None:
    import numpy as np

    assert state.plain({1: (np.arange(2), b"\x01", None), "a": {2.5}}) == {
        "1": [[0, 1], "01", None],
        "a": [2.5],
    }
