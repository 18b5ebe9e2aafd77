"""The benchmarks run. (What they measure is for people to look at.)"""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from energon_fn import open_source


def imported(name: str) -> Any:
    """A fixture that is the benchmark of this name, as a module."""

    @pytest.fixture
    def module(monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
        yield importlib.import_module(name)
        del sys.modules[name]

    return module


state, join, opening = imported("state"), imported("join"), imported("opening")
throughput, contenders = imported("throughput"), imported("contenders")
shares = imported("shares")


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


@pytest.mark.parametrize("peer", [False, True])
def test_a_join_is_timed(
    join: Any,
    peer: bool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    python = request.getfixturevalue("published_python") if peer else ""
    sizes = ["--samples=50", "--shards=3", "--rounds=1", f"--json={tmp_path / 'found.json'}"]
    join.main([*sizes, f"--peer-python={python}"])
    rounds = json.loads((tmp_path / "found.json").read_text())["rounds"]
    assert list(rounds) == ["energon_fn", "megatron.energon"][: 1 + peer]
    (measured,) = rounds["energon_fn"]
    assert measured.pop("samples") == 50
    printed = capsys.readouterr().out
    for each in (measured, *(one for theirs in rounds.values() for one in theirs)):
        assert all(value > 0 for value in each.values())
        assert all(name in printed for name in each)


def test_the_join_says_what_it_does(join: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        join.main(["--help"])
    assert "seconds to join, without those for imports" in capsys.readouterr().out


def test_opening_and_preparing_are_measured(
    opening: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--shards=7", "--samples=50", "--lines=40", "--rounds=1", "--workers=1"]
    sizes += ["--prepared-shards=2", "--prepared-samples=9", "--bytes=100"]
    opening.main([*sizes, "--peer-python=", f"--json={tmp_path / 'found.json'}"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["options"]["shards"] == 7
    (measured,) = found["rounds"]["energon_fn"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in measured)
    assert all(value > 0 for name, value in measured.items() if not name.endswith("_mb"))
    assert measured["open_tars_mb"] < 100


def test_what_is_opened_is_as_large_as_it_says(opening: Any, tmp_path: Path) -> None:
    opening.make_opened(tmp_path / "set", 7, 50)
    source = open_source(tmp_path / "set")
    assert (len(source), len(source.shards)) == (50, 7)
    assert [source.find(f"{n:09}") for n in (0, 49, 50)] == [0, 49, None]


def test_the_one_for_opening_says_what_it_does(
    opening: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        opening.main(["--help"])
    assert "only their index" in capsys.readouterr().out


def test_throughput_is_measured(
    throughput: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--work=text", "--workers=0", "--scale=0.005", "--rounds=1"]
    throughput.main([*sizes, "--peer-python=", f"--json={tmp_path / 'found.json'}"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["options"]["scale"] == 0.005
    assert found["machine"]["cores"] >= 1
    (rounds,) = found["rounds"].values()
    assert {"floor", "DataLoader", "energon_fn"} <= {*rounds}
    printed = capsys.readouterr().out
    for contender, ((measured,)) in rounds.items():
        assert all(value > 0 for value in measured.values())
        assert contender in printed


def test_throughput_says_what_it_does(throughput: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        throughput.main(["--help"])
    assert "12-megapixel JPEGs, to 224" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        throughput.main(["--work=test"])
    assert "there is no test, but text, jpeg, pack" in capsys.readouterr().err


def test_ratios_are_medians_of_ratios(throughput: Any) -> None:
    def rounds(*pairs: tuple[float, float]) -> list[dict[str, float]]:
        return [{"cpu_us": cpu, "samples_per_s": speed} for cpu, speed in pairs]

    found = {
        "floor": rounds((10, 100), (20, 50), (30, 25)),
        "energon_fn": rounds((11, 90), (40, 25), (36, 20)),
    }
    printed = [line.split() for line in throughput.table("text, 0 workers", found).splitlines()]
    assert printed[1][3:] == ["cpu_us", "x", "floor", "x", "ours", "samples_per_s", "ours", "is"]
    assert printed[2] == ["floor", "20", "1", "0.8333", "50", "0.8"]
    assert printed[3] == ["energon_fn", "36", "1.2", "1", "25", "1"]


def test_all_contenders_do_the_same_work(throughput: Any, contenders: Any, tmp_path: Path) -> None:
    # 128 texts: webdataset leaves out those of an epoch that fill no batch.
    for kind, scale in (("text", 0.0064), ("jpeg", 0.04)):
        throughput.make_dataset(tmp_path / kind, kind, scale)
    shapes = {
        "text": ("tokens", (64, 64)),
        "pack": ("tokens", (1, 4096)),
        "jpeg": ("images", (32, 3, 224, 224)),
        "jpeg packs": ("images", (4, 3, 224, 4 * 224)),
    }
    delivered: dict[str, list[set[Any]]] = {"text": [], "pack": []}
    for work, (part, shape) in shapes.items():
        for name in throughput.CONTENDERS.get(work, ["energon_fn"]):
            if name.startswith(throughput.PEER):
                continue
            folder = str(tmp_path / ("text" if part == "tokens" else "jpeg"))
            run = contenders.Run("speed", name, work, folder, workers=0, samples=40, buffer=8)
            batches = contenders.CONTENDERS[name](run)
            found = [next(batches)[part] for _ in range(3 if part == "images" else 40)]
            assert {tensor.shape for tensor in found} == {shape}
            if part == "tokens":  # several times through the dataset
                tokens = {token for each in found for token in each.flatten().tolist()}
                delivered[work].append(tokens - {0})
    for first, *others in delivered.values():
        assert len(first) > 1
        assert all(other == first for other in others)


def test_states_and_memory_of_loaders_are_measured(
    throughput: Any, contenders: Any, tmp_path: Path
) -> None:
    throughput.make_dataset(tmp_path, "text", 0.002)

    def run(kind: str, name: str, samples: int = 100) -> Any:
        state = str(tmp_path / "state")
        made = contenders.Run(kind, name, "text", str(tmp_path), 1, samples, 10, state)
        return contenders.KINDS[kind](made)

    assert run("save", "energon_fn")["state_kb"] < 10
    assert run("resume", "energon_fn")["at"] > 0
    found = run("memory", "DataLoader")
    assert 1 < found["worker_own_mb"] < found["worker_mb"] < found["slow_consumer_mb"]


def test_cpu_time_is_that_of_all_processes(contenders: Any) -> None:
    before = contenders.cpu_seconds()
    busy = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        while_it_runs = contenders.cpu_seconds()
        child.communicate(b"\n")
    assert 0.5 <= while_it_runs - before <= contenders.cpu_seconds() - before < 5


@pytest.mark.parametrize("work", ["pictures", "texts"])
def test_the_report_to_be_compared_has_its_stages(
    work: str, shares: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shares.SAMPLES = 40
    shares.write(work, tmp_path)
    shares.main(["--seconds", "0.1", "--child", work, str(tmp_path)])
    report = json.loads(capsys.readouterr().out)
    stages = {name.removesuffix("/share") for name in report if name.endswith("/share")}
    assert stages == {*shares.MARKS.values(), shares.OWN, "wait"}


def test_stacks_are_given_to_stages(shares: Any) -> None:
    before = "main (shares.py:1);Local.receive (a/workers.py:9);deliveries (a/turns.py:70)"
    stacks = [
        "main (shares.py:1);_path_join (os.py:3) 7",
        f"{before};load (a/pipeline.py:4);raw_sample (a/pipeline.py:5);pread (a/files.py:1) 1",
        f"{before};load (a/pipeline.py:4);call (a/guard.py:4);Source.make (a/disk/source.py:5) 2",
        f"{before};call (a/guard.py:2);Texts.encode_sample (shares.py:3);load (json.py:1) 3",
        f"{before};batch (a/stages.py:2) 4",
    ]
    found = shares.sampled("\n".join(stacks))
    assert found == {"load": 0.1, "decode": 0.2, "encode_sample": 0.3, shares.OWN: 0.4}
