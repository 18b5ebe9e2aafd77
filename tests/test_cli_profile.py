"""``energon-fn profile``: which stage takes the time, with the user's own task encoder."""

from pathlib import Path

import pytest
from conftest import pet, shards
from processes import group_is_empty, interrupt, run, start, wait_for_children

ENCODER = """
import time
from energon_fn import DefaultTaskEncoder

class Slow(DefaultTaskEncoder):
    def encode_sample(self, sample):
        time.sleep(0.005)
        return sample["cls"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pets")
    shards(path, (9, 8), pet)
    (path / "slow_encoders.py").write_text(ENCODER)
    return path


@pytest.mark.parametrize("options", [(), ("--num-workers", "2"), ("--threads", "2")])
def test_the_slowest_stage_is_named(
    folder: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    command = ("profile", folder, "--seconds", "0.5", "--batch-size", "4", *options)
    result = run(*command, "--task-encoder", "slow_encoders:Slow")
    assert result.status == 0, result
    assert "batches, of" in result.out.splitlines()[0]
    assert "most of all encode_sample" in " ".join(result.out.split())
    assert "worker" in result.out or options[:1] != ("--num-workers",)
    assert result.err == ""


def test_ctrl_c_ends_it_and_its_workers(folder: Path) -> None:
    process = start("profile", folder, "--seconds", "60", "--num-workers", "2")
    wait_for_children(process, 2)
    interrupt(process, whole_group=True)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err.strip()) == (130, "", "interrupted")
    assert group_is_empty(process.pid)
