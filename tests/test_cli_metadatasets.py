"""The command line on metadatasets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import jpeg, shards
from processes import run, run_on_terminal
from test_outline import beside, crude, write

JOINER = "joiner: {__module__: users_module, __class__: Pair}"
USERS_MODULE = """
from dataclasses import dataclass
from typing import Any

@dataclass
class Pair:
    one: Any
    other: Any

    @staticmethod
    def from_joined(one, other):
        if one["__key__"] == "c":
            raise ValueError("this joiner has no c")
        return Pair(one["txt"], other and other["txt"])
"""


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    """A metadataset of everything."""
    crude(tmp_path / "texts", "abc", "def")
    crude(tmp_path / "others", "fb")
    (tmp_path / "lines.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    (tmp_path / "code").mkdir()
    (tmp_path / "code/users_module.py").write_text(USERS_MODULE)
    write(
        tmp_path / "inner.yaml",
        train="blend_epochized:\n"
        '- {path: texts, repetitions: 2, subflavors: {kind: [text, "two\\nlines"]}}\n'
        "- {path: lines.jsonl, repetitions: 0.5}",
        val="path: others\nsplit_part: train",
    )
    return write(
        tmp_path / "m.yaml",
        train=f"""\
blend:
- weight: 5
  join: {{one: {{path: texts}}, other: {{path: others, nonmatch: none}}}}
  {JOINER}
- {{weight: 2, path: inner.yaml, subset: {{range: [0%, 50%]}}, aux: {{pics: 'filesystem://code'}}}}
- {{weight: 1, path: others}}""",
        val="path: inner.yaml",
    )


TREE = """\
  train: 12 samples, 4 datasets
    12  blend
     6    62.5 %  join for users_module.Pair
     6      one: texts
     2      other: others, nonmatch: none
     4    25.0 %  inner.yaml: blend_epochized, 6.5 an epoch, subset: 0% to 50%
                  aux pics: filesystem://code
     3        2 x  texts
                   subflavors: {"kind": ["text", "two\\nlines"]}
     1      0.5 x  lines.jsonl
     2    12.5 %  others
  val: 2 samples, 1 dataset
    2  inner.yaml: others, split_part: train
"""


def test_info(meta: Path) -> None:
    result = run("info", meta)
    assert (result.status, result.err) == (0, "")
    assert result.out == f"{meta}: 2 splits\n{TREE}"


def test_info_fits_the_width(meta: Path) -> None:
    folder = meta.parent / ("a" * 70)
    crude(folder, "ab")
    text = meta.read_text().replace("range: [0%, 50%]", "range: [12.5%, 87.5%]")
    meta.write_text(text + f"  test: {{path: {folder.name}, split_part: train}}\n")
    lines = run("info", meta, columns=50).out.splitlines()[1:]
    assert f"    2  {folder.name}," in lines  # a path stays whole, to be copied
    assert max(len(line) for line in lines if folder.name not in line) <= 49
    found = [line.split("blend_epochized")[0] for line in lines if "blend_epochized" in line]
    assert found == ["     6    25.0 %  inner.yaml: "]
    drawn = run_on_terminal(["info", meta], columns=50).out
    assert drawn.splitlines()[2:4] == [
        "    14  blend",
        "     6    62.5 %  join for users_module.Pair",
    ]
    assert "\x1b" not in drawn


def test_info_of_other_configurations(tmp_path: Path) -> None:
    crude(tmp_path / "a", "ab", "c")
    (tmp_path / "a/.nv-meta/half.yaml").write_text("split_parts: {train: [1.tar]}\n")
    file = write(
        tmp_path / "m.yaml", train="concat: [{path: a}, {path: a, split_config: half.yaml}]"
    )
    assert "     3" not in run("info", file, "--split-config", "half.yaml").out
    assert "    1    a, split_config: half.yaml" in run("info", file).out


def test_prepare(meta: Path) -> None:
    result = run("prepare", meta)
    (table,) = beside(meta)
    assert (result.status, result.err) == (0, "")
    assert result.out == (
        f"{meta}: 2 splits\n{TREE}\nmade {meta}.cache/{table}\n"
        f"Check every sample: energon-fn lint {meta}\n"
    )
    again = run("prepare", meta, "--non-interactive")
    assert "\nNothing to do: the index of each join is there.\n" in again.out
    assert f"\nmade {meta}.cache/{table}\n" in run("prepare", meta, "--force-overwrite").out

    meta.write_text(meta.read_text().replace("nonmatch: none", "nonmatch: skip"))
    changed = run("prepare", meta)
    (other,) = beside(meta)
    assert f"\nremoved {meta}.cache/{table}, which is not used any more\n" in changed.out
    assert f"\nmade {meta}.cache/{other}\n" in changed.out
    assert "    2    62.5 %  join for users_module.Pair\n" in changed.out

    nothing = run("prepare", meta.with_name("inner.yaml"), "--split-ratio", "8,1,1")
    assert "\nNothing to do: it joins no datasets.\n" in nothing.out
    assert nothing.err == (
        "warning: ignored: --split-ratio. Of a metadataset the indexes of joins are made, and "
        "nothing else.\n"
    )


@pytest.fixture
def importable(meta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The joiner's module can be imported, by the processes that the commands run in."""
    monkeypatch.syspath_prepend(str(meta.parent / "code"))


@pytest.mark.usefixtures("importable")
def test_lint_reads_all_splits_and_joins(meta: Path) -> None:
    (meta.parent / "lines.jsonl").write_text('{"n": 1}\n{"n": 2\n')
    shards(meta.parent / "pictures", [2], lambda n: {"jpg": jpeg()[: 10_000 if n else 200]})
    inner = meta.with_name("inner.yaml")
    inner.write_text(inner.read_text() + "  test: {path: pictures, split_part: train}\n")
    meta.write_text(
        meta.read_text() + "  test: {concat: [{path: inner.yaml}, {path: lines.jsonl}]}"
    )
    result = run("lint", meta, "--trust", "--num-workers", "0")
    assert (result.status, result.err) == (1, "")
    lines = result.out.splitlines()
    assert lines[0] == "texts c: ValueError: this joiner has no c"
    assert lines[1].startswith("pictures/shard_000.tar 00000: cannot decode part 'jpg'")
    assert lines[2].startswith("lines.jsonl 1: ")
    assert "is not JSON" in lines[2]
    assert lines[3:] == ["18 samples in 7 datasets: 3 bad samples"]
    val = run("lint", meta, "--split-part", "val")
    assert (val.status, val.out) == (
        0, "2 samples in 1 dataset: all can be read and decoded\n",
    )  # fmt: skip


@pytest.mark.usefixtures("importable")
def test_preview_shows_some_of_each_dataset(meta: Path) -> None:
    def headings(*options: str) -> list[str]:
        out = run("preview", meta, "--trust", *options).out
        return re.findall(r"^(?:train|val|test) .*", out, re.MULTILINE)

    assert headings() == [
        "train 0: a in texts/0.tar",
        "train 3: d in texts/1.tar",
        "train 0: a in texts/0.tar",
        "train 0: 0 in lines.jsonl",
        "train 0: f in others/0.tar",
    ]
    assert len(headings("-n", "1")) == 1
    assert len(headings("-n", "4")) == 4
    assert len(headings("-n", "100")) == 12
    assert headings("--split-part", "val,train", "-n", "1") == [
        "val 0: f in others/0.tar", "train 0: a in texts/0.tar",
    ]  # fmt: skip


@pytest.mark.usefixtures("importable")
def test_preview_shows_what_is_joined(meta: Path) -> None:
    result = run("preview", meta, "--trust", "-n", "9")
    assert result.status == 1  # of c
    shown = result.out.split("\n\n")
    assert shown[1] == "train 2: c in texts/0.tar\n  error: this joiner has no c"
    assert shown[2] == "train 4: e in texts/1.tar\n  one    texts e\n  other  None"
    found = run("preview", meta, "--trust", "-n", "100").out.split("\n\n")
    assert found[1].splitlines() == [
        "train 1: b in texts/0.tar and others/0.tar", "  one    texts b", "  other  others b",
    ]  # fmt: skip


def test_sheet_of_a_metadataset(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 9)):
        shards(tmp_path / name, [4], lambda n, seed=seed: {"jpg": jpeg(n + seed)})  # type: ignore[misc]
    file = write(tmp_path / "m.yaml", train="concat: [{path: a}, {path: b}]")
    result = run("preview", file, "--sheet", tmp_path / "sheet.png", "-n", "6")
    assert (result.status, result.err) == (0, "")
    assert re.match(r".*/sheet.png: 6 samples, \d+ x \d+ pixels$", result.out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lint", "{}/m.yaml"], "users_module. That is code"),
        (["preview", "{}/m.yaml"], "(command line: --trust)"),
        (["preview", "{}/m.yaml", "--trust"], "No module named 'users_module'"),
        (["info", "{}/no.yaml"], "no.yaml"),
        (["prepare", "{}/no.yaml"], "the .yaml of a metadataset"),
        (["lint", "{}/m.yaml", "--split-part", "tset"], "no split 'tset'; there are: train, val."),
        (["info", "{}/broken.yaml"], "broken.yaml, line 6: 'wieght' does not belong here"),
        (["prepare", "{}/broken.yaml"], "Did you mean 'weight'?"),
        (["prepare", "{}/gone.yaml"], "gone.yaml, line 4: no shard matches"),
        (["preview", "{}/gone.yaml"], "gone.yaml, line 4: no shard matches"),
        (["prepare", "{}/missing.yaml"], "4 of 6 samples"),
        (["info", "{}/missing.yaml"], "nonmatch: skip"),
        (["prepare", "{}/loop.yaml"], "a metadataset leads to itself"),
        (["info", "{}/loop.yaml"], "a metadataset leads to itself"),
    ],
)
def test_errors_are_one_line(words: list[str], said: str, meta: Path) -> None:
    write(meta.with_name("broken.yaml"), train="blend: [{path: texts,\nwieght: 2}]")
    write(meta.with_name("gone.yaml"), train="path: no_such_folder")
    write(meta.with_name("missing.yaml"),
          train="join: [{path: texts}, {path: others}]\n" + JOINER)  # fmt: skip
    write(meta.with_name("loop.yaml"), train="path: loop.yaml")
    result = run(*(word.replace("{}", str(meta.parent)) for word in words))
    assert (result.status, result.err.count("\n")) == (2, 1), result
    assert result.err.startswith("error: ")
    assert said in result.err


def test_what_is_written_in_data_does_not_reach_the_terminal(tmp_path: Path) -> None:
    shards(tmp_path / "a", [1])
    file = write(tmp_path / "m.yaml", train='path: a\nsubflavors: {"\\e[31mred\\a": "\\u202eback"}')
    result = run("info", file)
    assert result.status == 0
    assert not re.search("[\x1b\x07\u202e]", result.out)
    assert "red" in result.out
