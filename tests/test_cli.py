"""The command line as a user meets it: processes, terminals, exit statuses, files."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import jpeg, shards, write_tar
from PIL import Image
from processes import (
    REPOSITORY,
    Result,
    check_ctrl_c,
    group_is_empty,
    run,
    run_function,
    run_on_terminal,
    start,
)

from energon_fn import WorkerConfig, get_loader, get_train_dataset, open_source
from energon_fn.demo import CaptioningTaskEncoder, build_demo, captions_of, demo_tokenizer
from energon_fn.disk.files import expand_braces
from energon_fn.disk.metadata import collapse_braces

PUBLISHED = Path(os.environ.get("ENERGON_PYTHON", sys.executable)).with_name("energon")
CAPTIONING = ("--sample-type", "CaptioningSample")
FIELD_MAP = ("--field-map", '{"image": "jpg", "caption": "txt"}')


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    build_demo(folder, samples=36, shards=6)
    return folder


@pytest.fixture
def tars(drawn: Path, tmp_path: Path) -> Path:
    """Six shards of six captioned pictures, not prepared, in a folder called tars."""
    return Path(shutil.copytree(drawn, tmp_path / "tars"))


def prepare(folder: Path, *options: str) -> Result:
    result = run("prepare", folder, "--non-interactive", *options)
    assert result.status == 0, result
    return result


def meta(folder: Path) -> dict[str, Any]:
    """The yaml files of a prepared folder by name."""
    found = (folder / ".nv-meta").glob("*.yaml")
    return {path.name: yaml.safe_load(path.read_text()) for path in found}


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---------------------------------------------------------------------------------------- the whole


def test_help_needs_no_torch_and_has_examples() -> None:
    # The package's own module is left out: what it imports is no matter of the command line.
    code = f"""
import sys, types
package = types.ModuleType("energon_fn")
package.__path__ = [{str(REPOSITORY / "energon_fn")!r}]
sys.modules["energon_fn"] = package
from energon_fn.cli import main
for words in ([], ["prepare"], ["prepare-media"], ["info"], ["lint"], ["exclude"], ["trace"],
              ["preview"], ["demo"]):
    try:
        main([*words, "--help"])
    except SystemExit as end:
        assert end.code == 0
for heavy in ("torch", "numpy", "PIL", "yaml", "tqdm"):
    assert heavy not in sys.modules, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^example:\n  energon-fn (\w+)", done.stdout, re.MULTILINE)) == 8


def test_what_data_has_in_its_names_does_not_reach_the_terminal(tmp_path: Path) -> None:
    key = "k0\x1b]0;owned\x07\x1b[2J"
    write_tar(tmp_path / "0.tar", [(key, {"jpg": b"no\nJPEG"}), ("k1", {"jpg": jpeg()})])
    logged = run("profile", tmp_path, "--seconds", "0.05", "--batch-size", "1")
    assert "k0\ufffd]0;owned" in logged.err
    (tmp_path / "1\x1b[2J.tar").write_bytes(b"no tar")
    failed = run("info", tmp_path)
    assert failed.status == 2
    for text in (logged.err, failed.err):
        assert all(line.startswith(("error: ", "warning: ")) for line in text.splitlines())
        assert "\x1b" not in text


def test_nothing_to_do_shows_help() -> None:
    result = run()
    assert result.status == 2
    assert "energon-fn demo" in result.err


def test_module_is_the_console_script(tars: Path) -> None:
    process = start("info", tars / "shard_000.tar")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.splitlines()[0].endswith("6 samples in 1 shard, 51 kB, not prepared")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prepare", "{}/nowhere", "--non-interactive"], "is not a folder"),
        (["prepare", "{}/empty", "--non-interactive"], "no shards to prepare"),
        (["prepare", "{}", "--non-interactive"], "--split-ratio"),
        (["prepare", "{}", "--non-interactive", "--split-ratio", "8,1"], "three numbers"),
        (["prepare", "{}", "--non-interactive", "--split-ratio", "0,0,0"], "split ratio"),
        (["prepare", "{}", "--non-interactive", "--split-parts", "train"], "PART:PATTERN"),
        (["prepare", "{}", "--non-interactive", "--split-parts", "train:("], "pattern '('"),
        (["prepare", "{}", "--non-interactive", "--split-parts", "train:x"], "no shard is in any"),
        (["prepare", "{}", "--exclude", "["], "--exclude '['"),
        (["prepare", "{}", "--exclude", "shard"], "not excluded"),
        (["prepare", "{}", "--tar-index-only"], ".info.json"),
        (["prepare", "{}", "--split-ratio", "8,1,1"], "--non-interactive"),  # no answers on stdin
        (["info", "{}/nowhere"], "nowhere"),
        (["lint", "{}/nowhere"], "nowhere"),
        (["lint", "{}", "--split-part", "val"], "'val'"),
        (["lint", "{}", "--image-decode", "torchrbg"], "'torchrgb'"),
        (["preview", "{}", "--sheet", "sheet.jpg"], ".png"),
        (["demo", "{}"], "something else"),
    ],
)
def test_errors_are_one_line(words: list[str], said: str, tars: Path) -> None:
    (tars / "empty").mkdir()
    before = listing(tars)
    result = run(*(word.replace("{}", str(tars)) for word in words))
    assert result.status == 2
    assert result.err.splitlines()[-1].startswith("error: ")
    assert all(line.startswith(("error: ", "warning: ")) for line in result.err.splitlines())
    assert said in result.err
    assert listing(tars) == before


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (["--sample-type", "CaptionSample"], "Did you mean 'CaptioningSample'?"),
        ([*FIELD_MAP], "--sample-type"),
        ([*CAPTIONING, "--field-map", '{"image"'], "not JSON"),
        ([*CAPTIONING, "--field-map", '["jpg"]'], "JSON object"),
        ([*CAPTIONING, "--field-map", '{"image": "jpg"}'], "'caption'"),
        ([*CAPTIONING, "--field-map", '{"image": "jpg", "capt": "txt"}'], "no field 'capt'"),
        ([*CAPTIONING, "--field-map", '{"image": "jpg", "caption": "json["}'], "'caption'"),
    ],
)
def test_wrong_declarations_are_seen_before_anything_is_written(
    about: list[str], said: str, tars: Path
) -> None:
    result = run("prepare", tars, "--non-interactive", "--split-ratio", "8,1,1", *about)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert said in result.err
    assert not (tars / ".nv-meta").exists()


def test_reader_that_goes_away(tars: Path) -> None:
    # More than a pipe holds, so that writing must fail.
    words = [sys.executable, "-m", "energon_fn", "preview", str(tars), "-n", "36"]
    with subprocess.Popen(
        words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


# ----------------------------------------------------------------------------------------- prepare


def test_prepare(tars: Path) -> None:
    result = prepare(tars, "--split-ratio", "4,1,1", *CAPTIONING, *FIELD_MAP)
    assert meta(tars) == {
        "dataset.yaml": {
            "sample_type": {"__module__": "megatron.energon", "__class__": "CaptioningSample"},
            "field_map": {"image": "jpg", "caption": "txt"},
        },
        "split.yaml": {
            "split_parts": {
                "train": ["shard_{000..003}.tar"],
                "val": ["shard_004.tar"],
                "test": ["shard_005.tar"],
            },
            "exclude": [],
        },
    }
    assert result.err == ""
    assert re.search(r"train\s+24 samples\s+66.7 %\s+4 shards", result.out)
    val = open_source(tars, "val")
    assert [val.key(i) for i in range(len(val))] == [f"{i:06d}" for i in range(24, 30)]


def test_printed_python_runs(tars: Path) -> None:
    for options in (
        (*CAPTIONING, *FIELD_MAP),
        ("--sample-type", "CrudeWebdataset", "--dataset-yaml-name", "crude.yaml"),
    ):
        printed = prepare(tars, "--force-overwrite", "--split-ratio", "1,0,0", *options).out
        code = printed[printed.index("from energon_fn import") :].split("\n\nIts samples")[0]

        def execute(code: str = code) -> int:
            exec(code, {})
            return 0

        result = run_function(execute)
        assert result.status == 0, result.err
        assert "float32 (" in result.out
        assert " on a " in result.out


def test_split_parts_exclude_and_names(tars: Path) -> None:
    prepare(
        tars,
        "--exclude", "_00[01]",
        "--split-parts", r"train:shard_00{2..3}\.tar",
        "--split-parts", "val:shard_004",
        "--sample-type", "CrudeWebdataset",
        "--dataset-yaml-name", "crude.yaml",
    )  # fmt: skip
    written = meta(tars)
    assert written.keys() == {"crude.yaml", "split.yaml"}
    assert written["split.yaml"]["split_parts"] == {
        "train": ["shard_{002..003}.tar"],
        "val": ["shard_004.tar"],
    }
    assert len(open_source(tars, dataset_config="crude.yaml")) == 12


def test_shuffled_shards_are_all_there(tars: Path) -> None:
    prepare(tars, "--split-ratio", "2,2,2", "--shuffle-tars")
    parts = meta(tars)["split.yaml"]["split_parts"].values()
    patterns = [pattern for part in parts for pattern in part]
    assert patterns != collapse_braces([f"shard_{i:03d}.tar" for i in range(6)])
    names = [name for pattern in patterns for name in expand_braces(pattern)]
    assert sorted(names) == [f"shard_{i:03d}.tar" for i in range(6)]


def test_what_is_prepared_stays(tars: Path) -> None:
    options = ("--split-ratio", "6,0,0", "--sample-type", "CrudeWebdataset")
    prepare(tars, *options)
    again = run("prepare", tars, "--non-interactive", "--split-ratio", "0,6,0")
    assert again.status == 2
    assert "--force-overwrite" in again.err
    assert len(open_source(tars, "train")) == 36
    # Without a sample type dataset.yaml is not touched.
    prepare(tars, "--force-overwrite", "--split-ratio", "3,3,0")
    assert len(open_source(tars, "val")) == 18


def test_tar_index_only_follows_changed_shards(tars: Path) -> None:
    prepare(tars, "--split-ratio", "6,0,0", "--sample-type", "CrudeWebdataset")
    split = (tars / ".nv-meta/split.yaml").read_bytes()
    write_tar(tars / "shard_002.tar", [("new", {"txt": b"one more"})])
    assert run("lint", tars).status == 1
    prepare(tars, "--tar-index-only")
    assert run("lint", tars).status == 0
    assert open_source(tars).find("new") is not None
    assert (tars / ".nv-meta/split.yaml").read_bytes() == split


def test_sample_loader_is_a_template_to_fill_in(tars: Path) -> None:
    result = prepare(tars, "--split-ratio", "6,0,0", *CAPTIONING)
    loader = tars / ".nv-meta/sample_loader.py"
    assert f"fill in {loader}" in result.out
    assert "trust_dataset_code=True" in result.out
    template = loader.read_text()
    loader.write_text(
        template.replace('image=raw["FIXME"]', 'image=raw["jpg"]').replace(
            'caption=raw["FIXME"]', 'caption=raw["json"]["background"]'
        )
    )
    assert "--trust" in run("lint", tars).err
    assert run("lint", tars, "--trust").status == 0
    assert "caption  navy" in run("preview", tars, "--trust", "-n", "1").out
    described = run("info", tars)
    assert "sample_loader: sample_loader.py:sample_loader" in described.out
    assert described.status == 0


def test_duplicate_keys(tars: Path) -> None:
    shutil.copy(tars / "shard_000.tar", tars / "shard_006.tar")
    before = listing(tars)
    result = run("prepare", tars, "--non-interactive", "--split-ratio", "8,1,1")
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert result.err.startswith("error: ")
    assert "6 keys occur more than once: '000000' (2 samples)" in result.err
    assert listing(tars) == before


def test_field_map_that_does_not_fit_is_warned_of(tars: Path) -> None:
    result = prepare(
        tars, "--split-ratio", "6,0,0", *CAPTIONING,
        "--field-map", '{"image": "jpg", "caption": "json[caption]"}',
    )  # fmt: skip
    assert result.err.startswith(
        "warning: sample '000000' in shard_000.tar: no value for 'caption'"
    )


@pytest.mark.skipif(not PUBLISHED.exists(), reason="megatron-energon is not installed")
@pytest.mark.parametrize(
    "options",
    [
        ["--split-ratio", "0.5,0.3,0.2", "--shuffle-tars", "--num-workers", "1", "--no-progress",
         *CAPTIONING, *FIELD_MAP],
        ["--split-parts", "train:shard_00{0..3}.tar", "--split-parts", "val:shard_00[45]",
         "--exclude", "_001", "--sample-type", "CrudeWebdataset", "--dataset-yaml-name", "c.yaml"],
    ],
)  # fmt: skip
def test_as_the_published_command(options: list[str], tars: Path, tmp_path: Path) -> None:
    theirs = Path(shutil.copytree(tars, tmp_path / "theirs"))
    prepare(tars, *options)
    words = [str(PUBLISHED), "prepare", str(theirs), "--non-interactive", *options]
    subprocess.run(words, check=True, capture_output=True)
    assert listing(tars) == listing(theirs)
    assert meta(tars) == meta(theirs)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="megatron-energon is not installed")
def test_options_are_the_published_ones() -> None:
    def options(text: str) -> set[str]:
        return set(re.findall(r"--[a-z][a-z-]+", text))

    theirs = subprocess.run([str(PUBLISHED), "prepare", "--help"], capture_output=True, text=True)
    # --tmp-path is for folders that are not on local disks.
    assert options(theirs.stdout) - {"--tmp-path"} == options(run("prepare", "--help").out)


# ------------------------------------------------------------------------------------ the assistant


def test_assistant_takes_enter_for_everything(tars: Path) -> None:
    result = run("prepare", tars, stdin="\n" * 4)
    assert result.status == 0, result
    written = meta(tars)
    assert written["dataset.yaml"]["field_map"] == {"image": "jpg", "caption": "txt"}
    assert written["split.yaml"]["split_parts"]["train"] == ["shard_{000..003}.tar"]
    assert "picture RGB 240 x 272" in result.out
    assert "json[background]" in result.out

    # What it prints to do the same without questions does the same.
    words = shlex.split(result.out.strip().splitlines()[-1])
    assert words[:2] == ["energon-fn", "prepare"]
    shutil.rmtree(tars / ".nv-meta")
    assert run(*words[1:]).status == 0
    assert meta(tars) == written


def test_assistant_tries_each_answer(tmp_path: Path) -> None:
    def parts(n: int) -> dict[str, bytes]:
        text = json.dumps({"asked": f"what is {n}?", "said": [f"a {n}"]})
        return {"jpg" if n % 2 else "png": jpeg(n), "info.json": text.encode()}

    folder = tmp_path / "tars"
    shards(folder, [6, 2, 2], parts)
    answers = {
        "Ratio [1,1,1]": ["1,2", "a,b,c", "0,1,1", "1,1,1"],
        "Number [2]": ["13", "VQA", "VQASample"],
        "  image [jpg,png]": ["png", "jpg[", "png, jpg"],
        "  context": ["", "info.json", "info.json[nothing]", "info.json[asked]"],
        "Which of these are there? [none]": ["answer", "answers"],
        "  answers": ["info.json[said]"],
    }
    typed = [answer for several in answers.values() for answer in several]
    result = run("prepare", folder, stdin="\n".join([*typed, ""]))
    assert result.status == 0, result
    for question, several in answers.items():
        assert result.out.count(f"{question}: ") == len(several), question
    for said in (
        "three numbers, for train, val and test",
        "nothing is left to train on",
        "a number from 1 to 12",
        "unknown sample type 'VQA'",
        "sample 00001: no part 'png'",
        "'jpg['",
        "context must be a text, info.json is {",
        "sample 00000: no info.json[nothing] (info.json has",
        "'answer' is none of answers, answer_weights",
        "-> what is 0?",
        '-> ["a 0"]',
    ):
        assert said in " ".join(result.out.split()), said
    assert meta(folder)["dataset.yaml"] == {
        "sample_type": {"__module__": "megatron.energon", "__class__": "VQASample"},
        "field_map": {
            "image": "png,jpg", "context": "info.json[asked]", "answers": "info.json[said]",
        },
    }  # fmt: skip
    assert open_source(folder).to_sample is not None
    assert run("lint", folder).status == 0


def test_assistant_makes_crude_datasets(tars: Path) -> None:
    result = run("prepare", tars, stdin="\ncrude\n")
    assert result.status == 0, result
    assert meta(tars)["dataset.yaml"] == {
        "__module__": "megatron.energon",
        "__class__": "CrudeWebdataset",
    }


def test_assistant_asks_before_it_overwrites(tars: Path) -> None:
    prepare(tars, "--split-ratio", "6,0,0", "--sample-type", "CrudeWebdataset")
    before = meta(tars)
    kept = run("prepare", tars, stdin="\n")
    assert (kept.status, meta(tars)) == (0, before)
    overwritten = run("prepare", tars, stdin="perhaps\ny\n\n\n\n\n")
    assert overwritten.status == 0, overwritten
    assert "answer y or n" in overwritten.out
    assert meta(tars) != before


def test_assistant_on_a_narrow_terminal(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tars.parent)
    result = run_on_terminal(["prepare", tars.name], ["", "", "", "nowhere", ""])
    assert result.status == 0, result.out
    assert meta(tars)["dataset.yaml"]["field_map"] == {"image": "jpg", "caption": "txt"}
    questions = result.out.split("Next, in Python")[0].replace("\r", "\n")
    assert max(map(len, questions.splitlines())) <= 60, questions


@pytest.mark.parametrize("answers", [["^C"], ["", "^C"], ["", "", "", "^C"]])
def test_ctrl_c_at_a_question_writes_nothing(answers: Sequence[str], tars: Path) -> None:
    before = listing(tars)
    result = run_on_terminal(["prepare", tars], answers)
    assert result.status == 130
    assert result.out.endswith("\ninterrupted\n")
    assert "Traceback" not in result.out
    assert listing(tars) == before


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that take some seconds to index."""
    folder = tmp_path_factory.mktemp("many")
    shards(folder, [15_000], lambda n: {"txt": b""})
    for n in range(7):
        shutil.copy(folder / "shard_000.tar", folder / f"copy_{n}.tar")
    return folder


@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_while_indexing(whole_group: bool, many: Path) -> None:
    before = listing(many)
    process = start("prepare", many, "--non-interactive", "--split-ratio", "8,1,1")
    check_ctrl_c(process, whole_group)
    assert listing(many) == before


# --------------------------------------------------------------------------------- info and preview


def test_info(tars: Path) -> None:
    result = run("info", tars, columns=60)
    assert (
        result.out.splitlines()[0] == f"{tars}: 36 samples in 6 shards, {_size(tars)}, not prepared"
    )
    prepare(tars, "--split-ratio", "4,1,1", *CAPTIONING, *FIELD_MAP)
    split = tars / ".nv-meta/split.yaml"
    split.write_text(split.read_text().replace("exclude: []", "exclude: [shard_000.tar/000001]"))
    (tars / "shard_005.tar").unlink()
    lines = run("info", tars).out.splitlines()
    found = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:]}
    assert found["sample"] == "type CaptioningSample"
    assert found["caption"] == "txt"
    assert found["splits"] == "train 23 samples 63.9 % 4 shards"
    assert found["txt"].startswith("36 samples ")
    assert found["excluded"] == "shard_000.tar/000001"
    assert found["missing"] == "shard_005.tar"


def _size(folder: Path) -> str:
    return f"{round(sum(path.stat().st_size for path in folder.iterdir()) / 1000)} kB"


def test_info_says_what_is_wrong(tars: Path) -> None:
    prepare(tars, "--split-ratio", "6,0,0")
    assert "there is no" in run("info", tars).out
    (tars / ".nv-meta/dataset.yaml").write_text("sample_typ: 1\n")
    result = run("info", tars)
    assert result.status == 0
    assert "unknown key 'sample_typ'" in result.out


def test_preview_fits_the_width(tmp_path: Path) -> None:
    text = "\x1b[31mred\x07 and\nlong " + 50 * "語"
    write_tar(tmp_path / "0.tar", [("a", {"txt": text.encode(), "json": b'{"n": [1, 2]}'})])
    result = run("preview", tmp_path, columns=60)
    assert result.status == 0
    _, txt_line, json_line, _ = result.out.splitlines()
    assert json_line == '  json  {"n": [1, 2]}'
    assert txt_line.startswith("  txt   \ufffd[31mred\ufffd and long 語")
    assert txt_line.endswith("語…")
    assert 57 <= len(txt_line) + txt_line.count("語") <= 59
    assert "\x1b" not in result.out


def test_preview_shows_what_training_gets(tars: Path) -> None:
    prepare(tars, "--split-ratio", "3,2,1", *CAPTIONING, *FIELD_MAP)
    result = run("preview", tars, "-n", "3", "--split-part", "val,test")
    assert re.findall(r"^(val|test) (\d): (\d+) in (\S+)$", result.out, re.MULTILINE) == [
        ("val", "0", "000018", "shard_003.tar"),
        ("val", "4", "000022", "shard_003.tar"),
        ("val", "8", "000026", "shard_004.tar"),
        ("test", "0", "000030", "shard_005.tar"),
        ("test", "2", "000032", "shard_005.tar"),
        ("test", "4", "000034", "shard_005.tar"),
    ]
    assert len(re.findall(r"^  image    float32 \(3, \d+, \d+\) 0", result.out, re.MULTILINE)) == 6
    assert len(re.findall(r"^  caption  \w.* on a ", result.out, re.MULTILINE)) == 6


def test_preview_draws_on_terminals(tars: Path) -> None:
    drawn = run_on_terminal(["preview", tars, "-n", "1"]).out
    lines = [line for line in drawn.splitlines() if "▀" in line]
    assert 4 < len(lines) <= 18
    colours = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀", drawn)
    # The first sample's background: the corner of the picture and of the drawing agree.
    picture = Image.open(io.BytesIO(open_source(tars).load(0)["jpg"])).getpixel((2, 2))
    assert all(abs(int(a) - b) < 12 for a, b in zip(colours[0][:3], picture, strict=True))
    assert all(line.endswith("\x1b[0m") for line in lines)
    assert "\x1b" not in run_on_terminal(["preview", tars, "-n", "1"], NO_COLOR="1").out


def test_preview_goes_on_behind_a_bad_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a", {"jpg": jpeg()[:200]}), ("b", {"jpg": jpeg()})])
    result = run("preview", tmp_path)
    assert result.status == 1
    assert "a in 0.tar\n  error: cannot decode part 'jpg'" in result.out
    assert "b in 0.tar\n  jpg  float32 (3, 16, 24)" in result.out


def test_sheet(tars: Path, tmp_path: Path) -> None:
    prepare(tars, "--split-ratio", "6,0,0", *CAPTIONING, *FIELD_MAP)
    sheet = tmp_path / "sheet.png"
    result = run("preview", tars, "--sheet", sheet, "-n", "9")
    assert result.status == 0, result
    with Image.open(sheet) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert f"{picture.width} x {picture.height} pixels" in result.out
        assert picture.width > 3 * 200
        assert len(picture.getcolors(10**7) or ()) > 1000  # pictures, not an empty page
    assert [path.name for path in tmp_path.iterdir() if path.name != "tars"] == ["sheet.png"]


def test_sheet_of_texts(tmp_path: Path) -> None:
    shards(tmp_path, [3])
    result = run("preview", tmp_path, "--sheet", tmp_path / "sheet.png")
    assert (result.status, result.err) == (0, "")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 2 * 200
        assert len(picture.getcolors(10**7) or ()) > 10  # letters, with smooth edges


def test_sheet_needs_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a", {"jpg": jpeg()[:200]})])
    result = run("preview", tmp_path, "--sheet", tmp_path / "sheet.png")
    assert result.status == 2
    assert "cannot decode part 'jpg'" in result.out
    assert result.err == "error: no sample can be drawn\n"


# -------------------------------------------------------------------------------------------- demo


def test_demo(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "demo"
    process = start("demo", folder)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err == ""
    assert re.search(r"256 samples in .* samples/s", out)
    assert group_is_empty(process.pid)
    with Image.open(folder / "demo_batch.png") as picture:
        picture.load()
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]

    # What it says to do next works.
    for command in ("info", "preview", "lint"):
        assert f"energon-fn {command} {folder}" in out
        assert run(command, folder).status == 0

    shard = folder / "shard_000.tar"
    made = shard.stat().st_mtime_ns
    (folder / "demo_batch.png").unlink()
    assert run("demo", folder).status == 0
    assert shard.stat().st_mtime_ns == made
    assert (folder / "demo_batch.png").exists()


def test_demo_packs_every_sample_whole(tars: Path) -> None:
    prepare(tars, "--split-ratio", "6,0,0", *CAPTIONING, *FIELD_MAP)
    tokenizer = demo_tokenizer()
    encoder = CaptioningTaskEncoder(tokenizer, max_tokens=40)
    dataset = get_train_dataset(
        tars, batch_size=2, packing_buffer_size=12, task_encoder=encoder, repeat=False,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
    )  # fmt: skip
    source = open_source(tars)
    captions = {source.key(i): source.load(i)["txt"].decode() for i in range(len(source))}
    seen = []
    for batch in get_loader(dataset):
        keys = [key for pack in batch.__key__ for key in pack.split(",")]
        seen += keys
        assert list(captions_of(batch, tokenizer)) == [captions[key] for key in keys]
        assert batch.images.shape == (len(keys), 3, 128, 128)
        assert batch.tokens.shape[1] <= 40
        # A token looks at itself and what comes before it in its own sample, and at no padding.
        for members, mask in zip(batch.members.tolist(), batch.attention_mask, strict=True):
            for i, member in enumerate(members):
                looked_at = mask[i].nonzero().flatten().tolist()
                assert looked_at == [j for j in range(i + 1) if member and members[j] == member]
    assert sorted(seen) == sorted(captions)
