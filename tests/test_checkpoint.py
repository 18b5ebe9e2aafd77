"""States: taken anywhere, restored anywhere, on any layout that the lanes allow; or refused."""

import io
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shards
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import Drawing, Grouping, Numbers, Packing, Skipping, train, val

from energon_fn import DatasetError, StateError, WorkerConfig, checkpoint, cli

ENCODERS = [Numbers, Skipping, Drawing, Packing, Grouping]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    shards(path, (13, 1, 20, 7))
    return path


def config(workers: int = 0, lanes: int = 4, rank: int = 0, world_size: int = 1) -> WorkerConfig:
    return WorkerConfig(rank=rank, world_size=world_size, num_workers=workers, lanes=lanes)


def make(folder: Path, encoder: type = Numbers, layout: Any = None, **options: Any) -> Any:
    size = 7 if encoder is Packing else None
    layout = layout or config()
    return train(folder, layout, task_encoder=encoder(), packing_buffer_size=size, **options)


def by_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def by_torch(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("carry", [by_json, by_torch])
def test_every_step_can_be_gone_on_from(folder: Path, encoder: type, carry: Any) -> None:
    whole, states = [], []
    loader = make(folder, encoder)
    states.append(loader.state_dict())
    for batch in itertools.islice(loader, 40):
        whole.append(batch)
        states.append(carry(loader.state_dict()))
    for done, state in enumerate(states[:-4]):
        loader = make(folder, encoder)
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert list(itertools.islice(loader, 4)) == whole[done : done + 4]


@pytest.mark.parametrize("options", [{}, {"virtual_epoch_length": 6}, {"repeat": False}])
def test_save_and_resume_again_and_again_is_the_uninterrupted_stream(
    folder: Path, options: dict[str, Any]
) -> None:
    straight, whole = make(folder, Skipping, **options), []
    while len(whole) < 40:
        whole += itertools.islice(straight, 40 - len(whole))
    found: list[Any] = []
    state = make(folder, Skipping, **options).state_dict()
    for step in itertools.cycle((1, 5, 2, 3)):
        loader = make(folder, Skipping, config(workers=step % 2), **options)
        loader.load_state_dict(by_json(state))
        for taken, batch in enumerate(loader, 1):
            found.append(batch)
            state = loader.state_dict()
            if taken == step:
                break
        else:
            state = loader.state_dict()  # at the epoch's end
        if len(found) >= 40:
            break
    assert found[:40] == whole


def test_a_state_taken_with_batches_made_ahead_is_behind_the_delivered_one(folder: Path) -> None:
    loader = make(folder, layout=config(workers=2))
    whole = list(itertools.islice(make(folder), 12))
    iterator = iter(loader)
    for done in range(1, 8):
        next(iterator)
        again = make(folder)
        again.load_state_dict(loader.state_dict())
        assert next(iter(again)) == whole[done]


def layouts(lanes: int) -> list[tuple[int, int]]:
    return [(w, n) for w in range(1, lanes + 1) if lanes % w == 0 for n in (0, 1, 2)]


def steps(loaders: list[Any], count: int) -> list[Any]:
    """``count`` batches of each rank, in the order of the global micro-batches of a step."""
    iterators = [iter(loader) for loader in loaders]
    return [[next(iterator) for iterator in iterators] for _ in range(count)]


@settings(max_examples=10)
@given(
    encoder=st.sampled_from(ENCODERS),
    lanes=st.sampled_from([4, 6]),
    data=st.data(),
)
def test_the_sequence_is_the_same_for_all_layouts_also_across_a_resume(
    folder: Path, encoder: type, lanes: int, data: st.DataObject
) -> None:
    whole = list(itertools.islice(make(folder, encoder, config(lanes=lanes)), 8 * lanes))
    state, done = None, 0
    while done < 4 * lanes:
        world_size, workers = data.draw(st.sampled_from(layouts(lanes)))
        loaders = [
            make(folder, encoder, config(workers, lanes, rank, world_size))
            for rank in range(world_size)
        ]
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(state)
        count = data.draw(st.integers(1, 3))
        for step in steps(loaders, count):
            expected = whole[done : done + world_size]
            assert sorted(map(str, step)) == sorted(map(str, expected))
            if done % world_size == 0:
                assert step == expected
            done += world_size
        state = by_json(checkpoint.merge([loader.state_dict() for loader in loaders]))
        for loader in loaders:
            loader.close()


def test_one_ranks_state_is_not_enough_for_another_layout(folder: Path) -> None:
    loader = make(folder, layout=config(rank=1, world_size=2))
    next(iter(loader))
    state = loader.state_dict()
    with pytest.raises(StateError, match=r"has the lanes 1, 3, but 0, 2 are needed.*merge"):
        make(folder).load_state_dict(state)
    make(folder, layout=config(rank=1, world_size=2)).load_state_dict(state)
    make(folder, layout=config(rank=3, world_size=4)).load_state_dict(state)


def test_states_that_do_not_belong_together_are_not_merged(folder: Path) -> None:
    ranks = [make(folder, layout=config(rank=rank, world_size=2)) for rank in range(2)]
    early = ranks[0].state_dict()
    for loader in ranks:
        next(iter(loader))
    states = [loader.state_dict() for loader in ranks]
    checkpoint.merge(states)
    with pytest.raises(StateError, match="saved at different batches"):
        checkpoint.merge([early, states[1]])
    with pytest.raises(StateError, match="two of the states have lane 0"):
        checkpoint.merge([states[0], states[0]])
    other = make(folder, layout=config(rank=1, world_size=2), batch_size=4).state_dict()
    with pytest.raises(StateError, match="fingerprint is"):
        checkpoint.merge([states[0], other])
    with pytest.raises(StateError, match="no state to merge"):
        checkpoint.merge([])


def test_redistributing_names_the_layouts_that_fit(folder: Path) -> None:
    states = [make(folder, layout=config(lanes=6)).state_dict()]
    with pytest.raises(StateError, match="6 lanes cannot be shared out evenly to 4 ranks; 2, 3, 6"):
        checkpoint.redistribute(states, 4)
    for rank, state in enumerate(checkpoint.redistribute(states, 3)):
        make(folder, layout=config(lanes=6, rank=rank, world_size=3)).load_state_dict(state)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch_size": 4}, "batch_size: saved with 3, here 4"),
        ({"shuffle_buffer_size": 6}, "shuffle_buffer_size: saved with 5, here 6"),
        ({"encoder": Grouping}, "stages: saved with"),
        ({"layout": config(lanes=2)}, "lanes: saved with 4, here 2"),
    ],
)
def test_what_does_not_fit_is_refused_and_both_sides_shown(
    folder: Path, changed: dict[str, Any], said: str
) -> None:
    state = make(folder).state_dict()
    with pytest.raises(StateError, match=said):
        make(folder, **changed).load_state_dict(state)


def test_lanes_and_seed_name_their_remedy_and_are_never_accepted(folder: Path) -> None:
    state = make(folder).state_dict()
    with pytest.raises(StateError, match=r"WorkerConfig\(lanes=\.\.\.\)"):
        make(folder, layout=config(lanes=8)).load_state_dict(state, accept=["lanes"])


def test_accepted_changes_begin_the_next_epoch(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = make(folder)
    for _ in itertools.islice(loader, 20):
        pass
    state = loader.state_dict()
    shards(tmp_path, (13, 1, 20, 7, 5))
    more = make(tmp_path)
    with pytest.raises(StateError, match=r"(?s)saved with 41 samples.*accept=\['dataset'\]"):
        more.load_state_dict(state)
    with caplog.at_level(logging.WARNING, logger="energon_fn"):
        more.load_state_dict(state, accept=["dataset"])
    assert "dataset changed: going on with epoch" in caplog.text
    numbers = [n for batch in itertools.islice(more, 30) for n in batch]
    assert set(numbers) == set(range(46))
    make(tmp_path).load_state_dict(more.state_dict())


def test_what_is_no_state_is_refused(folder: Path) -> None:
    with pytest.raises(StateError, match="no state of a loader"):
        make(folder).load_state_dict({"model": 1})
    with pytest.raises(StateError, match="has format 99"):
        make(folder).load_state_dict({**make(folder).state_dict(), "version": 99})
    with pytest.raises(StateError, match="there is no state"):
        make(folder).restore_state_global(None)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ({"lanes": None}, "lanes is missing"),
        ({"epoch": "2"}, "epoch is missing or not as"),
        ({"lanes": {"0": [1]}}, "lane 0 is"),
        ({"lanes": {"0": "endde"}}, "lane 0 is"),
    ],
)
def test_a_damaged_state_is_refused(folder: Path, damage: dict[str, Any], named: str) -> None:
    state = make(folder).state_dict()
    with pytest.raises(StateError, match=f"the state is damaged: {named}"):
        make(folder).load_state_dict({**state, **damage})


def test_what_is_accepted_has_a_name(folder: Path) -> None:
    state = make(folder).state_dict()
    with pytest.raises(ValueError, match="there is no 'datasets' to accept; there are: lanes, "):
        make(folder).load_state_dict(state, accept=["datasets"])
    loader = make(folder)
    loader.load_state_dict(state, accept="replay")
    assert loader.state_dict()["epoch"] == 1


def test_a_refused_seek_leaves_the_loader_at_its_beginning(folder: Path) -> None:
    loader = val(folder, config())
    whole = list(loader)
    with pytest.raises(ValueError, match="cannot seek to batch 1000: the first epoch ends before"):
        loader.seek(1000)
    assert list(loader) == whole


def test_restoring_during_an_iteration_is_told_and_before_the_next_is_right(folder: Path) -> None:
    whole = list(itertools.islice(make(folder), 9))
    loader = make(folder)
    next(iter(loader))
    state = loader.state_dict()
    iterator = iter(loader)
    next(iterator)
    loader.load_state_dict(state)
    with pytest.raises(StateError, match="restored during this iteration"):
        next(iterator)
    assert list(itertools.islice(loader, 3)) == whole[1:4]


def test_changed_user_code_is_not_refused(folder: Path) -> None:
    class Mended(Numbers):
        def encode_sample(self, sample: Any) -> int:
            return super().encode_sample(sample) + 1000

    loader = make(folder)
    whole = list(itertools.islice(loader, 5))
    state = loader.state_dict()
    mended = make(folder, Mended)
    mended.load_state_dict(state)
    following = list(itertools.islice(loader, 3))
    assert list(itertools.islice(mended, 3)) == [[n + 1000 for n in b] for b in following]
    assert whole


def test_states_stay_small_however_long_a_run(folder: Path) -> None:
    for encoder in ENCODERS:
        loader = make(folder, encoder, shuffle_buffer_size=1000)
        for _ in itertools.islice(loader, 200):
            pass
        lanes = loader.state_dict()["lanes"].values()
        assert max(len(json.dumps(lane)) for lane in lanes) < 1000


def test_validation_can_be_gone_on_with_too(folder: Path) -> None:
    loader = val(folder, config())
    whole = list(loader)
    for stop in range(1, len(whole)):
        for taken, _ in enumerate(loader, 1):
            if taken == stop:
                break
        again = val(folder, config(workers=1))
        again.load_state_dict(loader.state_dict())
        assert list(again) == whole[stop:]
        assert list(loader) == whole[stop:]


def test_files_are_read_alone_or_inside_of_a_training_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    loader = make(folder)
    next(iter(loader))
    state = loader.state_dict()
    for name in ("state.json", "state.pt"):
        checkpoint.write_state(tmp_path / name, state)
        assert checkpoint.read_state(tmp_path / name) == state
    torch.save({"model": {"w": torch.zeros(3)}, "loader": state}, tmp_path / "whole.pt")
    assert checkpoint.read_state(tmp_path / "whole.pt") == state
    torch.save({"model": {"w": torch.zeros(3)}}, tmp_path / "none.pt")
    with pytest.raises(StateError, match=r"none\.pt holds 0 states"):
        checkpoint.read_state(tmp_path / "none.pt")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(StateError, match=r"broken\.json cannot be read"):
        checkpoint.read_state(tmp_path / "broken.json")
    torch.save({"loader": Path("a state of another library")}, tmp_path / "objects.pt")
    with pytest.raises(StateError, match=r"objects\.pt holds more .* are not read"):
        checkpoint.read_state(tmp_path / "objects.pt")
    with pytest.raises(DatasetError, match=r"missing\.pt"):
        checkpoint.read_state(tmp_path / "missing.pt")


def test_the_command_hands_states_out_to_another_number_of_ranks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaders = [make(folder, layout=config(rank=rank, world_size=2)) for rank in range(2)]
    steps(loaders, 3)
    names = [str(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, loader in zip(names, loaders, strict=True):
        checkpoint.write_state(name, loader.state_dict())
    assert cli.run(["checkpoint", "info", *names]) == 0
    assert "3 batches delivered to each of 2 ranks" in capsys.readouterr().out
    out = tmp_path / "out"
    redist = ["checkpoint", "redist", *names, "--new-world-size"]
    assert cli.run([*redist, "4", str(out)]) == 0
    four = [make(folder, layout=config(rank=rank, world_size=4)) for rank in range(4)]
    for rank, loader in enumerate(four):
        loader.load_state_dict(checkpoint.read_state(out / f"rank_{rank:05d}.pt"))
    whole = list(itertools.islice(make(folder), 10))
    assert sorted(map(str, steps(four, 1)[0])) == sorted(map(str, whole[6:]))
    assert cli.run([*redist, "3", str(out)]) == 2
    assert "cannot be shared out evenly to 3 ranks; 1, 2, 4 ranks" in capsys.readouterr().err
    assert cli.run(["checkpoint", "info", names[0]]) == 0
