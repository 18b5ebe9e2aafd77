"""Beside other libraries, the real ones: every batch once, in the order of our loader, resumed."""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shards
from other_loaders_script import EPOCH, VIRTUAL, fit, numbers, plain, train
from test_distributed import finish, in_turn, start, torchrun
from test_readme import demo_dataset, recipes
from torch.utils.data import DataLoader

from energon_fn import batch, encode_sample, get_savable_loader, knapsack, pack, pipe, shuffle

SCRIPT = Path(__file__).with_name("other_loaders_script.py")
SAMPLES = 96


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    shards(path, (40, 16, 40))
    return path


@pytest.fixture(scope="module")
def whole(data: Path) -> list[Any]:
    """The global sequence."""
    loader = numbers(data, 0, 1, virtual_epoch_length=40)
    return [plain(batch) for batch in loader]


def on_two_ranks(job: str, data: Path, folder: Path) -> list[Any]:
    """What each rank found."""
    finish(start(*torchrun(2), SCRIPT, job, data, folder, cwd=folder))
    return [json.loads((folder / f"{job}_{rank}.json").read_text()) for rank in range(2)]


def check_epoch(ranks: list[Any]) -> None:
    assert sorted(n for rank in ranks for numbers, _ in rank for n in numbers) == list(
        range(SAMPLES)
    )
    assert len({len(rank) for rank in ranks}) == 1


# Lightning


@pytest.fixture(scope="module")
def lightning_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lightning")
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def lightning_ranks(data: Path, lightning_folder: Path) -> list[Any]:
    return on_two_ranks("lightning_ranks", data, lightning_folder)


def test_lightning_gives_each_rank_its_own(lightning_ranks: list[Any], whole: list[Any]) -> None:
    check_epoch([rank["epoch"] for rank in lightning_ranks])
    assert in_turn([rank["straight"] for rank in lightning_ranks]) == whole[:14]


def test_lightning_goes_on_within_an_epoch(lightning_ranks: list[Any], whole: list[Any]) -> None:
    assert in_turn([rank["resumed"] for rank in lightning_ranks]) == whole[14:24]


def test_lightnings_checkpoint_serves_another_number_of_ranks(
    data: Path, lightning_folder: Path, lightning_ranks: list[Any], whole: list[Any]
) -> None:
    loader = numbers(data, 0, 1, virtual_epoch_length=40)
    checkpoint = torch.load(lightning_folder / "step=7.ckpt", weights_only=False)
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    loader.load_state_dict(state)
    assert [plain(batch) for batch in loader] == whole[14:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [3, 10, 13])
@pytest.mark.parametrize("options", [EPOCH, VIRTUAL])
def test_lightning_resumes_at_any_step(
    data: Path, tmp_path: Path, steps: int, options: dict[str, Any]
) -> None:
    pytest.importorskip("lightning")
    loader = numbers(data, 0, 1, **options)
    expected = [plain(batch) for _ in range(3) for batch in loader][:26]
    straight = fit(data, tmp_path, every=steps, max_steps=steps, options=options)
    checkpoint = tmp_path / f"step={steps}.ckpt"
    resumed = fit(data, tmp_path, 1, checkpoint, max_steps=26, options=options, workers=1)
    assert straight + resumed == expected


# Hugging Face


@pytest.fixture(scope="module")
def hugging_face_ranks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    pytest.importorskip("accelerate")
    return on_two_ranks("hugging_face_ranks", data, tmp_path_factory.mktemp("hugging_face"))


def test_the_trainer_gives_each_rank_its_own(
    hugging_face_ranks: list[Any], whole: list[Any]
) -> None:
    assert in_turn([rank["straight"] for rank in hugging_face_ranks]) == whole[:16]
    assert in_turn([rank["resumed"] for rank in hugging_face_ranks]) == whole[10:16]


def test_accelerate_leaves_our_loader_as_it_is(hugging_face_ranks: list[Any]) -> None:
    found = [rank["accelerate"] for rank in hugging_face_ranks]
    assert all(rank["prepared as it was"] for rank in found)
    check_epoch([rank["epoch"] for rank in found])


def test_what_accelerate_would_share_out_twice_is_refused(hugging_face_ranks: list[Any]) -> None:
    first, second = (rank["accelerate"] for rank in hugging_face_ranks)
    assert "would share each rank's part out again" in first["dispatched: True"]
    for rank in (first, second):
        assert "would share each rank's part out again" in rank["dispatched: False"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [EPOCH, VIRTUAL, {}], ids=["epoch", "virtual", "endless"])
def test_the_trainer_resumes_at_a_checkpoint(
    data: Path, tmp_path: Path, whole: list[Any], options: dict[str, Any]
) -> None:
    pytest.importorskip("accelerate")
    accumulated = {"gradient_accumulation_steps": 2}
    loader = numbers(data, 0, 1, **options)
    endless = (plain(batch) for _ in range(9) for batch in loader)
    expected = list(itertools.islice(endless, 26))
    assert train(data, tmp_path, 5, options=options, **accumulated) == expected[:10]
    resumed = train(data, tmp_path, 13, 5, workers=1, options=options, **accumulated)
    assert resumed == expected[10:]


# Our stages over others' pipelines


def texts(number: int) -> dict[str, Any]:
    return {"number": number, "tokens": list(range(number % 7 + 1))}


def tokens_of(sample: dict[str, Any]) -> dict[str, Any]:
    return texts(sample["json"]["n"])


STAGES = (
    shuffle(10),
    pack(
        knapsack(cost=lambda sample: len(sample["tokens"]), capacity=16),
        lambda samples: [sample["number"] for sample in samples],
        buffer_size=20,
    ),
    batch(2, list),
)


def check_packs(batches: list[Any], numbers: range) -> None:
    packs = [pack for batch in batches for pack in batch]
    assert sorted(n for pack in packs for n in pack) == list(numbers)
    assert all(sum(len(texts(n)["tokens"]) for n in pack) <= 16 for pack in packs)
    assert len(packs) < len(numbers) / 2


@pytest.mark.parametrize("workers", [0, 2])
def test_stages_work_over_a_webdataset_pipeline(data: Path, workers: int) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(map(str, data.glob("*.tar")))
    rows = webdataset.WebDataset(urls[:2], shardshuffle=False).decode()
    packed = rows.compose(encode_sample(tokens_of), *STAGES)
    check_packs(list(DataLoader(packed, batch_size=None, num_workers=workers)), range(56))


def test_stages_work_over_a_hugging_face_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([texts(n) for n in range(50)]).to_iterable_dataset(2)
    check_packs(list(pipe(iter(rows), *STAGES)), range(50))
    # And the other way round: what the stages give is a dataset of theirs again.
    again = datasets.IterableDataset.from_generator(
        lambda: ({"packs": batch} for batch in pipe(iter(rows), *STAGES))
    )
    check_packs([row["packs"] for row in again], range(50))


# The README


# The models that they leave to their reader.
MODELS = {
    "lightning": """
import lightning, torch

class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
    def training_step(self, data):
        return self.layer(data["images"].mean().reshape(1, 1)).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)
""",
    "transformers": """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
    def forward(self, images):
        return {"loss": self.layer(images.mean().reshape(1, 1)).mean()}

model = Model()
""",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", [name for name in recipes() if name != "ray"])
def test_the_readmes_recipes_run(
    library: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = {"transformers": "accelerate"}
    pytest.importorskip(modules.get(library, library))
    demo_dataset(tmp_path)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / f"{library}_recipe.py"
    script.write_text(MODELS.get(library, "") + recipes()[library])
    runpy.run_path(str(script), run_name="__main__")


RECORD = """open(f"{PATH}.{context.get_world_size()}.{context.get_world_rank()}", "a").write(
            str(data["images"].mean((1, 2, 3)).tolist()) + "\\n"
        )"""


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_the_readmes_ray_job_goes_on_with_another_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.train")
    demo_dataset(tmp_path)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "ray_recipe.py"
    assert recipes()["ray"].count("        pass\n") == 1
    script.write_text(recipes()["ray"].replace("pass\n", f"{RECORD}\n"))
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80_000_000)
    try:
        made = runpy.run_path(str(script), run_name="__main__")
    finally:
        ray.shutdown()

    def recorded(workers: int) -> list[Any]:
        files = [tmp_path / f"energon_fn_demo.{workers}.{rank}" for rank in range(workers)]
        return in_turn([[json.loads(line) for line in file.open()] for file in files])

    loader = get_savable_loader(made["dataset"]())
    batches = (batch for _ in range(4) for batch in loader)  # four have half an epoch left
    expected = [batch["images"].mean((1, 2, 3)).tolist() for batch in batches]
    assert recorded(2) + recorded(4) == expected
