"""Stores: every file by its name, from tars, folders and ranges of bytes, and nothing else."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import jpeg, numbered, shards, write_tar
from hypothesis import example, given
from hypothesis import strategies as st

from energon_fn import CrudeSample, TextSample, basic_sample_keys, open_source, stateless
from energon_fn.decoding import decoder
from energon_fn.disk.files import is_tar
from energon_fn.disk.joined import open_joined
from energon_fn.disk.jsonl import open_jsonl
from energon_fn.disk.media import ImageMetadata
from energon_fn.disk.prepare import prepare_dataset, write_dataset_yaml, write_media_metadata
from energon_fn.errors import DatasetError, SampleError
from energon_fn.stages import Cooker, cook, cooker, needs_of
from energon_fn.stores import (
    ByteRangeFileStore,
    DecodeFileStore,
    FileStore,
    PrimaryFileStore,
    SystemFileStore,
    cooker_arguments,
    open_store,
    primary_store,
)


def media(n: int) -> dict[str, bytes]:
    return {
        "jpg": jpeg(n),
        "left.jpg": jpeg(n + 100),
        "json": json.dumps({"n": n}).encode(),
        "txt": f"ä {n}".encode(),
        "bin": bytes([n]),
    }


def write_images(folder: Path) -> Path:
    """Two shards of keys in folders, one in each split part."""
    for shard in range(2):
        keys = [f"images.d/{n:04d}" for n in range(shard * 3, shard * 3 + 3)]
        write_tar(folder / f"{shard}.tar", [(key, media(int(key[-4:]))) for key in keys])
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_images(tmp_path_factory.mktemp("images"))
    prepare_dataset(
        folder, ["0.tar", "1.tar"], split_parts_ratio=[("train", 1), ("val", 1)], shuffle_seed=None,
        media_filter="extension",
    )  # fmt: skip
    write_dataset_yaml(folder, "CrudeWebdataset", None)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in a folder, and beside it what nobody may read."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret").write_text("secret")
    root = outside / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a").write_text("inside a")
    (root / "sub" / "b").write_text("inside b")
    (root / "inner").symlink_to(root / "sub" / "b")
    (root / "out").symlink_to(outside / "secret")
    (root / "up").symlink_to(outside)
    (outside / "root2").mkdir()
    (outside / "root2" / "secret").write_text("secret")
    return root


def tar_files(dataset: Path) -> dict[str, tuple[str, bytes]]:
    """What Python's tarfile finds: shard and content by name."""
    found = {}
    for path in sorted(filter(is_tar, dataset.iterdir())):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                found[member.name] = path.name, content.read()
    return found


# ------------------------------------------------------------------------------ prepared datasets


def test_every_file_of_every_split_part_is_there(images: Path) -> None:
    store, expected = open_store(images), tar_files(images)
    assert len(expected) == 30
    for name, (shard, data) in expected.items():
        sample: dict[str, Any] = {"__key__": "me", "__sources__": ()}
        assert store.get(name, sample) == store.get(name) == data
        (source,) = sample["__sources__"]
        assert (source.dataset_path, source.index) == (str(images), name)
        assert (source.shard_name, source.file_names) == (shard, (name,))
    assert store.get_path() == str(images)


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_a_folder_of_tars_need_not_be_prepared(tmp_path: Path, ending: str) -> None:
    samples = [("a/1", media(1)), ("a/2", media(2)), ("a/1", {"x": b"!"})]  # the same key again
    write_tar(tmp_path / f"0.{ending}", samples)
    store = open_store(tmp_path)
    assert {name: store.get(name) for name in tar_files(tmp_path)} == {
        name: data for name, (_, data) in tar_files(tmp_path).items()
    }


def test_an_index_without_parts_is_made_anew(images: Path, tmp_path: Path) -> None:
    write_images(tmp_path)
    prepare_dataset(tmp_path, ["0.tar", "1.tar"], split_parts_ratio=[("train", 1)])
    (tmp_path / ".nv-meta" / "index.sqlite").unlink()
    assert open_store(tmp_path).get("images.d/0004.txt") == "ä 4".encode()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("images.d/0001.png", "the sample 'images.d/0001' has the parts jpg, left.jpg, json"),
        ("images.d/0009.jpg", "no sample has that key"),
        ("images.d/0001", "no sample has that key"),
        ("0001.jpg", "no sample has that key"),
        ("", "no sample has that key"),
    ],
)
def test_what_is_not_there_is_told_with_store_file_and_sample(
    images: Path, name: str, told: str
) -> None:
    with pytest.raises(SampleError) as error:
        open_store(images).get(name, {"__key__": "me"})
    assert f"{images} has no file {name!r}" in str(error.value)
    assert told in str(error.value)
    assert error.value.__notes__ == ["asked for by sample me"]


def test_a_shard_that_changed_is_told(tmp_path: Path) -> None:
    write_images(tmp_path)
    prepare_dataset(tmp_path, ["0.tar", "1.tar"], split_parts_ratio=[("train", 1)])
    store = open_store(tmp_path)
    write_tar(tmp_path / "1.tar", [("other", {"jpg": b"?"})])
    with pytest.raises(DatasetError, match=r"1\.tar changed since it was indexed"):
        store.get("images.d/0004.txt")


def test_media_metadata_are_those_of_the_files(images: Path) -> None:
    store = open_store(images)
    expected = ImageMetadata(width=24, height=16, format="JPEG", mode="RGB")
    for wrapped, name in (
        (store, "images.d/0003.left.jpg"),
        (DecodeFileStore(store, decoder=decoder()), "images.d/0003.jpg"),
        (PrimaryFileStore(store, "images.d/0001"), ".left.jpg"),
    ):
        assert wrapped.get_media_metadata(name) == expected
    with pytest.raises(SampleError, match=r"no media metadata of 'images\.d/0003\.txt'"):
        store.get_media_metadata("images.d/0003.txt")


def test_folders_have_media_metadata_too(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jpg").write_bytes(jpeg(0, (30, 20)))
    write_media_metadata(tmp_path, "extension", workers=1)
    found = open_store(f"filesystem://{tmp_path}").get_media_metadata("sub/a.jpg")
    assert isinstance(found, ImageMetadata)
    assert (found.width, found.height) == (30, 20)


def test_without_media_metadata_the_remedy_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"energon-fn prepare-media {folder}"):
        SystemFileStore(folder).get_media_metadata("a")
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DatasetError, match="holds no media"):
        primary_store(open_jsonl(tmp_path / "a.jsonl")).get_media_metadata("0.json")


# -------------------------------------------------------------------------------------- __sources__


def test_sources_are_added_to_whatever_a_sample_is(folder: Path) -> None:
    @dataclass(frozen=True)
    class Frozen:
        __sources__: Any = None

    store = SystemFileStore(folder)
    text = TextSample(__key__="t", text="?")
    samples: list[Any] = [text, Frozen(), {}, {"__sources__": None}, CrudeSample(__key__="c")]
    for sample in samples:
        store.get("a", sample)
        store.get("sub/b", sample)
        sources = sample["__sources__"] if isinstance(sample, dict) else sample.__sources__
        assert [source.file_names for source in sources] == [("a",), ("sub/b",)]
        assert [source.dataset_path for source in sources] == [str(folder)] * 2
    assert basic_sample_keys(samples[-1])["__sources__"] == samples[-1]["__sources__"]
    with pytest.raises(TypeError, match="a list cannot hold the __sources__"):
        store.get("a", [text])


# ---------------------------------------------------------------------------------------- decoding


def plain(value: Any) -> Any:
    """Something to compare: type, shape and pixels of pictures, other values as they are."""
    return (type(value), np.asarray(value).tolist()) if hasattr(value, "size") else value


@pytest.mark.parametrize("option", ["pilrgb", "torchrgb8", "rgb8", None])
def test_files_are_decoded_as_parts_of_samples_are(images: Path, option: str | None) -> None:
    decode = decoder(option)
    store, source = DecodeFileStore(open_store(images), decoder=decode), open_source(images)
    for sample in map(decode, source):
        for part in media(0):
            assert plain(store.get(f"{sample['__key__']}.{part}")) == plain(sample[part])
    assert len(source) == 3


def test_the_name_in_the_store_does_not_change_how_a_file_is_decoded(tmp_path: Path) -> None:
    names = ["a.json", "__a__/b.json", "__a.json", "v1.2/x.json", ".json", "__key__.json"]
    for name in [*names, "README", "x.json/README", "__key__"]:
        path = tmp_path / "files" / name.replace("x.json/", "y.json/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[1]")
    store = DecodeFileStore(SystemFileStore(tmp_path / "files"), decoder=decoder())
    assert [store.get(name) for name in names] == [[1]] * len(names)
    assert [store.get(name) for name in ("README", "y.json/README", "__key__")] == [b"[1]"] * 3
    ranges = DecodeFileStore(ByteRangeFileStore(tmp_path / "files"), decoder=decoder())
    assert ranges.get("a.json#bytes=1:1") == 1


def test_what_cannot_be_decoded_is_told_with_its_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    store = DecodeFileStore(SystemFileStore(tmp_path), decoder=decoder())
    with pytest.raises(SampleError, match=f"cannot decode part 'json'.*{tmp_path}/a.json"):
        store.get("a.json")


def test_a_decoder_may_be_an_object_that_decodes_single_files(folder: Path) -> None:
    class Shout:
        def decode(self, fname: str, data: bytes) -> Any:
            return f"{fname}: {data.decode().upper()}"

    assert DecodeFileStore(SystemFileStore(folder), decoder=Shout()).get("sub/b") == (
        "sub/b: INSIDE B"
    )


# ------------------------------------------------------------------------------------------ folders

steps = st.sampled_from(["..", ".", "", "a", "sub", "b", "up", "out", "inner", "root", "secret"])


@given(st.lists(steps, max_size=5).map("/".join), st.booleans())
@example("../secret", False)
@example("up/secret", False)
@example("../root2/secret", False)
def test_nothing_outside_of_the_folder_is_read(folder: Path, name: str, absolute: bool) -> None:
    name = f"{folder}/{name}" if absolute else name
    path = Path(os.path.realpath(folder / name))
    told = "leads out of|no range"
    if path.is_relative_to(folder):
        told = "" if path.is_file() else "has no file|no range"
    for store, asked in (
        (SystemFileStore(folder), name),
        (ByteRangeFileStore(folder), f"{name}#bytes=0:6"),
    ):
        if told:
            with pytest.raises(SampleError, match=told):
                store.get(asked)
        else:
            assert path.read_bytes().startswith(b"inside")
            assert path.read_bytes().startswith(store.get(asked))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("../secret", "leads out of"),
        ("out", "leads out of"),
        ("up/secret", "leads out of"),
        ("/etc/passwd", "leads out of"),
        ("nothing", "has no file 'nothing'.*does not exist"),
        ("sub", "is a folder"),
        ("a\0b", "is no file name"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(folder: Path, name: str, told: str) -> None:
    with pytest.raises(SampleError, match=told):
        SystemFileStore(folder).get(name)
    with pytest.raises(SampleError, match=told):
        ByteRangeFileStore(folder).get(f"{name}#bytes=0:1")


def test_a_store_without_a_folder_takes_any_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert SystemFileStore().get("a") == SystemFileStore().get(f"{folder}/a") == b"inside a"


def test_a_relative_folder_stays_the_same_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    store = SystemFileStore("root")
    monkeypatch.chdir(tmp_path)
    assert (store.get("a"), store.get_path()) == (b"inside a", str(folder))


@given(st.binary(max_size=40), st.integers(0, 50), st.integers(0, 50))
def test_a_range_is_that_slice_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, offset: int, size: int
) -> None:
    folder = tmp_path_factory.mktemp("blobs")
    (folder / "sub").mkdir()
    (folder / "sub" / "blob.bin").write_bytes(data)
    store, sample = ByteRangeFileStore(folder), {"__key__": "me", "__sources__": ()}
    key = f"sub/blob.bin#bytes={offset}:{size}"
    if offset + size > len(data):
        with pytest.raises(SampleError, match=f"which has {len(data)} bytes"):
            store.get(key, sample)
    else:
        assert store.get(key, sample) == data[offset : offset + size]
        source: Any = sample["__sources__"][0]
        assert (source.index, source.shard_name) == (key, "sub/blob.bin")


@pytest.mark.parametrize("key", ["a", "a#bytes=1", "a#bytes=-1:2", "a#bytes=1:2x", "#bytes=0:1"])
def test_what_is_no_range_is_told(folder: Path, key: str) -> None:
    with pytest.raises(SampleError, match="is no range of bytes"):
        ByteRangeFileStore(folder).get(key)


# ------------------------------------------------------------------------------ the primary dataset


def test_a_dot_in_front_means_the_current_sample(images: Path) -> None:
    store = primary_store(open_source(images))
    here = PrimaryFileStore(store, "images.d/0001")
    sample: dict[str, Any] = {"__key__": "images.d/0001"}
    assert here.get(".txt", sample) == "ä 1".encode()
    assert here.get("images.d/0005.txt", sample) == "ä 5".encode()  # of the other split part
    assert [s.file_names[0] for s in sample["__sources__"]] == [
        "images.d/0001.txt", "images.d/0005.txt",
    ]  # fmt: skip
    decoded = PrimaryFileStore(DecodeFileStore(store, decoder=decoder()), "images.d/0001")
    assert decoded.get(".json") == {"n": 1}
    assert decoded.get_path() == str(images)
    with pytest.raises(SampleError, match=r"images\.d/0001\.png"):
        here.get(".png")


def test_lines_of_json_are_files_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(3)))
    store = primary_store(open_jsonl(tmp_path / "a.jsonl"))
    sample: dict[str, Any] = {}
    assert PrimaryFileStore(store, "2").get(".json", sample) == b'{"n": 2}'
    assert store.get("0.json") == b'{"n": 0}'
    assert sample["__sources__"][0].file_names == ("2.json",)
    for name in ("3.json", "0.txt", "0.__key__", "0"):
        with pytest.raises(SampleError, match=f"has no '{name}'"):
            store.get(name)


def test_a_join_has_no_files_of_its_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shards(tmp_path / name, [2], lambda n, name=name: {name: b"?"})  # type: ignore[misc]
    sources = [open_source(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(DatasetError, match=r"need_primary.*Name the datasets.*`aux`"):
        primary_store(open_joined(sources, ["error", "error"], lambda a, b: a))


# ------------------------------------------------------------------------------------- opening them


def test_paths_are_relative_to_the_base_or_absolute(images: Path, folder: Path) -> None:
    base = images.parent
    assert open_store(images.name, base) == open_store(f"./{images.name}/", base)
    assert open_store(images.name, base) == open_store(images)
    near = os.path.relpath(folder, base)
    assert open_store(f"filesystem://{near}", base) == SystemFileStore(folder)
    assert open_store(f"filesystem://{folder}", base) == SystemFileStore(folder)
    assert open_store(f"byterange://{near}", base) == ByteRangeFileStore(folder)


@pytest.mark.parametrize(
    "url",
    ["msc://b/x", "filesystem+msc://b/x", "byterange+msc://b/x", "s3://b/x", "a://filesystem://b"],
)
def test_object_stores_are_refused(url: str) -> None:
    with pytest.raises(DatasetError, match=f"{url.replace('+', '.')}' is not on a file system"):
        open_store(url)


@pytest.mark.parametrize("url", ["nowhere", "filesystem://nowhere", "byterange://nowhere"])
def test_a_store_that_does_not_exist_is_told_at_once(url: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"'{url}' leads to {tmp_path}/nowhere"):
        open_store(url, tmp_path)


def test_a_folder_without_tars_is_told_at_once(folder: Path) -> None:
    with pytest.raises(DatasetError, match=f"write filesystem://{folder} if it holds"):
        open_store(folder)


# -------------------------------------------------------------------------- processes and threads


def read_all(store: FileStore, names: list[str]) -> list[bytes]:
    return [store.get(name) for name in names]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_stores_go_to_other_processes(images: Path, folder: Path, method: str) -> None:
    names = sorted(tar_files(images))
    stores: list[tuple[FileStore, list[str]]] = [
        (open_store(images), names),
        (PrimaryFileStore(primary_store(open_source(images)), "images.d/0001"), [".jpg", *names]),
        (DecodeFileStore(SystemFileStore(folder), decoder=decoder(None)), ["a", "sub/b"]),
        (ByteRangeFileStore(folder), ["a#bytes=0:3"]),
    ]
    here = [read_all(*job) for job in stores]  # what is open already must not disturb the others
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        there = [pool.submit(read_all, *job) for job in stores]
        assert [job.result() for job in there] == here
    assert all(len(pickle.dumps(store)) < 1000 for store, _ in stores)


def test_threads_may_share_a_store(images: Path) -> None:
    store, expected = open_store(images), tar_files(images)
    names = sorted(expected) * 20
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(store.get, names)) == [expected[name][1] for name in names]


# ------------------------------------------------------------------------------------------ cookers


def takes_images(sample: Any, images: FileStore) -> Any:
    return images


A = SystemFileStore("/a")
B = SystemFileStore("/b")


def test_a_cooker_gets_all_stores_and_what_it_asks_for() -> None:
    @stateless
    @cooker(need_primary=True, need_cache=True)
    def all_of_them(sample: Any, images: Any, *, sounds: Any, primary: Any, cache: Any) -> Any: ...

    arguments = cooker_arguments(all_of_them, {"images": A, "sounds": B}, A, "the pool")
    assert arguments({"__key__": "7"}) == {
        "images": A, "sounds": B, "cache": "the pool", "primary": PrimaryFileStore(A, "7"),
    }  # fmt: skip
    first = cooker_arguments(takes_images, {"images": A}, None, None)
    first({"__key__": "7"}).clear()  # a cook_crude_sample of the user's may do what it likes
    assert first({"__key__": "8"}) == {"images": A}
    assert cooker_arguments(lambda sample: sample, {}, A, "the pool")({}) == {}


def with_default(sample: Any, images: Any = None) -> Any: ...


def with_rest(sample: Any, **stores: Any) -> Any: ...


@cooker
def bare(sample: Any) -> Any: ...


@pytest.mark.parametrize(
    ("cook", "aux", "given"),
    [
        (with_default, {}, {}),
        (with_default, {"images": A}, {"images": A}),
        (with_rest, {"images": A, "sounds": B}, {"images": A, "sounds": B}),
        (partial(takes_images, images=B), {}, {}),
        (dict, {}, {}),
        (bare, {}, {}),
    ],
)
def test_parameters_may_have_defaults_or_take_the_rest(
    cook: Callable[..., Any], aux: dict[str, FileStore], given: dict[str, Any]
) -> None:
    assert cooker_arguments(cook, aux, None, None)({"__key__": "7"}) == given


def wants_cache(sample: Any, cache: Any) -> Any: ...


@cooker(need_cache=True)
def forgot_cache(sample: Any) -> Any: ...


@cooker(need_primary=True)
def wants_primary(sample: Any, primary: Any) -> Any: ...


@pytest.mark.parametrize(
    ("cook", "aux", "told"),
    [
        (takes_images, {"images": A, "sounds": B},
         r"takes_images has no parameter for the auxiliary store 'sounds' \(/b\).*"
         r"write def takes_images\(sample, images, sounds\)"),
        (takes_images, {}, "asks for 'images'.*no auxiliary stores. Name it under `aux`"),
        (takes_images, {"image": A}, "no parameter for the auxiliary store 'image'"),
        (wants_cache, {}, r"asks for 'cache'.*Decorate it with @cooker\(need_cache=True\)"),
        (forgot_cache, {}, r"has no parameter for 'cache'.*def forgot_cache\(sample, cache\)"),
        (wants_primary, {}, "asks for the primary dataset, and there is none"),
        (wants_primary, {"primary": A}, r"store 'primary' \(/a\) has the name of what the cooker"),
        (partial(partial(takes_images)), {}, "the cooker takes_images asks for 'images'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(
    cook: Callable[..., Any], aux: dict[str, FileStore], told: str
) -> None:
    with pytest.raises(DatasetError, match=told):
        cooker_arguments(cook, aux, None, None)


def test_what_a_cooker_needs_is_found_behind_partials_and_methods() -> None:
    class Cooks:
        @cooker(need_cache=True)
        def cook(self, sample: Any, cache: Any, extra: int) -> Any:
            return cache, extra

    of_method = partial(Cooks().cook, extra=3)
    assert needs_of(of_method) == (False, True)
    assert needs_of(takes_images) == needs_of(dict) == (False, False)
    assert cooker_arguments(of_method, {}, None, "pool")({}) == {"cache": "pool"}


def test_stores_work_with_the_bare_stage(images: Path) -> None:
    def caption(sample: Any, texts: FileStore) -> TextSample:
        text = texts.get(f"images.d/{int(sample['txt'][8:]):04d}.txt", sample)
        return TextSample(**basic_sample_keys(sample), text=text.decode())

    crude = [CrudeSample(__key__=str(n), **numbered(n)) for n in range(3)]
    cooked = cook([Cooker(partial(caption, texts=open_store(images)))])(crude)
    assert [(s.text, len(s.__sources__ or ())) for s in cooked] == [
        ("ä 0", 1), ("ä 1", 1), ("ä 2", 1),
    ]  # fmt: skip


# ------------------------------------------------------------------------- the published package

# Runs in the other Python, and here with our names in the place of theirs.
LOOK = """
import hashlib, json

def shown(value):
    if hasattr(value, "numpy"):
        return [list(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()]
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value

@stateless
@cooker(need_primary=True)
def look(sample, primary, images, files):
    n = int(sample["__key__"])
    found = [
        images.get(f"images.d/{n:04d}.left.jpg", sample), images.get(f"images.d/{n:04d}.json"),
        files.get("sub/b.txt", sample), files.get(f"{n}.json", sample),
        primary.get(".txt", sample), primary.get(f"{2 - n:05d}.json"),
    ]
    paths = [images.get_path(), files.get_path(), primary.get_path()]
    sources = [[str(s.dataset_path), s.index, s.shard_name, list(s.file_names)]
               for s in sample["__sources__"]]
    text = json.dumps([[shown(value) for value in found], paths, sources])
    return TextSample(**basic_sample_keys(sample), text=text)
"""

THEIR_SCRIPT = f"""
import sys
from megatron.energon import (Cooker, DefaultTaskEncoder, TextSample, WorkerConfig, cooker,
                              basic_sample_keys, get_loader, get_val_dataset, reraise_exception,
                              stateless)
{LOOK}
class Encoder(DefaultTaskEncoder):
    cookers = [Cooker(look)]

class Undecoded(Encoder):
    decoder = None

workers = WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)
for encoder in (Encoder(), Undecoded()):
    dataset = get_val_dataset(sys.argv[1], split_part="val", batch_size=None,
                              worker_config=workers, task_encoder=encoder)
    print("SEEN", json.dumps([json.loads(sample.text) for sample in get_loader(dataset)]))
"""


def test_the_published_package_sees_the_same(
    images: Path, tmp_path: Path, published_python: str
) -> None:
    primary, files = tmp_path / "primary", tmp_path / "files"
    prepare_dataset(primary, shards(primary, [2, 1]), split_parts_ratio=[("val", 1)])
    write_dataset_yaml(primary, "CrudeWebdataset", None)
    (files / "sub").mkdir(parents=True)
    (files / "sub" / "b.txt").write_text("ä")
    for n in range(3):
        (files / f"{n}.json").write_text(json.dumps([n]))
    yaml = tmp_path / "with_aux.yaml"
    yaml.write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  val:\n"
        f"    path: primary\n    aux: {{images: '{images}', files: 'filesystem://files'}}\n"
    )
    ran = subprocess.run([published_python, "-W", "ignore", "-c", THEIR_SCRIPT, str(yaml)],
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    theirs = [json.loads(line[5:]) for line in ran.stdout.splitlines() if line[:5] == "SEEN "]

    scope: dict[str, Any] = {
        "stateless": stateless, "cooker": cooker, "TextSample": TextSample,
        "basic_sample_keys": basic_sample_keys,
    }  # fmt: skip
    exec(LOOK, scope)
    look, source = scope["look"], open_source(primary, "val")
    ours = []
    for option in ("torchrgb", None):
        decode = decoder(option)
        image_store, file_store, own = (
            DecodeFileStore(store, decoder=decode)
            for store in (
                open_store(images),
                open_store("filesystem://files", tmp_path),
                primary_store(source),
            )
        )
        arguments = cooker_arguments(look, {"images": image_store, "files": file_store}, own, None)
        samples = [source.make(raw, decode) for raw in source]
        cooked = [look(sample, **arguments(sample)) for sample in samples]
        ours.append([json.loads(sample.text) for sample in cooked])
    assert ours == theirs
    assert [len(seen) for seen in ours] == [3, 3]
    assert ours[0] != ours[1]  # decoded, and as bytes
