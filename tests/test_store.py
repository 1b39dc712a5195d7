"""Stores: frames and records are read as they were written, and damaged stores are refused."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny import tiny_config

from latent_shift import video
from latent_shift.data.encode import encode
from latent_shift.data.latents import LatentStore, open_store
from latent_shift.data.pack import pack
from latent_shift.data.records import Record
from latent_shift.data.sampler import BalancedSampler
from latent_shift.data.store import Store
from latent_shift.data.store_writer import PIXELS, StoreWriter, store_folder
from latent_shift.training import prepare
from latent_shift.training.stages import DenoiserStage


@pytest.fixture
def two_sizes(tmp_path):
    """A store of the concept "a" with a wide and a tall clip, and of "b" with a wide clip; pixels hold the number of the frame."""
    writer = StoreWriter(tmp_path / "two_sizes", shard_mb=1e-3)
    for number, (concept, shape) in enumerate((("a", (8, 16)), ("b", (8, 16)), ("a", (16, 8)))):
        frames = np.broadcast_to(
            np.arange(20, dtype=np.uint8)[:, None, None, None] + 50 * number, (20, *shape, 3)
        )
        writer.add(Record(f"{number}.mp4", (concept,), concept, loop=number == 2), frames)
    writer.close(dtype="uint8")
    return Store(tmp_path / "two_sizes")


def test_store_returns_the_packed_frames(media, packed, tmp_path):
    store = Store(packed)
    for index, record in enumerate(store.records):
        frames, _ = video.read(media / record.file_name, fps=8, size=32)
        assert np.array_equal(store.window(index, 0, len(frames)), frames)
    assert (store.info["fps"], store.num_frames) == (8, 61)
    assert pack(media, tmp_path / "two", size=32, fps=8, workers=2) == []
    assert (
        Store(tmp_path / "two").shapes == store.shapes
    )  # names are hashes: the same frames in the same order
    assert pack(media, tmp_path / "two", size=32, fps=8, shard_mb=0.05) == []
    small = Store(tmp_path / "two")
    assert len(small.shapes) > 1 == len(store.shapes)
    assert sorted(path.stem for path in (small.folder / "shards").iterdir()) == sorted(
        small.shapes
    )  # the old shards are removed
    for index, record in enumerate(store.records):
        assert np.array_equal(
            small.window(index, 0, record.num_frames), store.window(index, 0, record.num_frames)
        )


def test_window_wraps_around_in_loops_and_stays_inside_other_clips(packed):
    store = Store(packed)
    red, green = (
        next(i for i, record in enumerate(store.records) if record.concept == name)
        for name in ("red", "green")
    )
    clip = store.window(red, 0, 20)
    assert np.array_equal(store.window(red, 18, 4), clip[[18, 19, 0, 1]])
    rng = np.random.default_rng(0)
    starts = {store.draw_window(rng, green, 4)[0].tobytes() for _ in range(200)}
    assert len(starts) == 17  # 20 - 4 + 1 positions
    assert len({store.draw_window(rng, red, 4)[0].tobytes() for _ in range(300)}) == 20
    assert store.select(num_frames=30).tolist() == [red]
    assert len(store.select(splits=("val_concept",))) == 1


def test_window_with_stride_skips_frames(two_sizes):
    assert two_sizes.window(0, 1, 4, stride=3)[:, 0, 0, 0].tolist() == [1, 4, 7, 10]
    assert two_sizes.window(2, 10, 4, stride=3)[:, 0, 0, 0].tolist() == [110, 113, 116, 119]
    assert two_sizes.window(2, 16, 3, stride=3)[:, 0, 0, 0].tolist() == [116, 119, 102]  # wraps around
    rng = np.random.default_rng(0)
    firsts = {int(two_sizes.draw_window(rng, 0, 4, stride=6)[0, 0, 0, 0]) for _ in range(100)}
    assert firsts == {0, 1}  # the window spans 19 of 20 frames
    assert two_sizes.select(num_frames=4, stride=6).tolist() == [0, 1, 2]
    assert two_sizes.select(num_frames=4, stride=7).tolist() == [2]  # only the loop


def test_sampler_draws_batches_of_one_size_and_concepts_equally_often(two_sizes):
    assert [two_sizes.frame_shape(index) for index in range(3)] == [(8, 16, 3), (8, 16, 3), (16, 8, 3)]
    sampler, rng = BalancedSampler(two_sizes, [0, 1, 2]), np.random.default_rng(0)
    draws = [sampler.draw(rng, 4) for _ in range(1500)]
    assert all(len({two_sizes.frame_shape(index) for index in draw}) == 1 for draw in draws)
    share = np.bincount(np.concatenate(draws), minlength=3) / 6000
    assert np.allclose(
        share, [0.25, 0.5, 0.25], atol=0.04
    )  # "a" as often as "b", and both of its clips equally often
    weighed = BalancedSampler(two_sizes, [0, 1, 2], {two_sizes.records[1].concept: 3.0})
    share = np.bincount(np.concatenate([weighed.draw(rng, 4) for _ in range(1500)]), minlength=3) / 6000
    assert np.allclose(share, [0.125, 0.75, 0.125], atol=0.04)
    with pytest.raises(ValueError, match="no record to train on"):
        BalancedSampler(two_sizes, [])


def test_store_opens_several_stores_as_one(media, packed, autoencoder, texts, tmp_path):
    for name in ("b", "a"):
        pack(media, tmp_path / "parts" / name, size=32, fps=8, shard_mb=0.05 if name == "b" else 64)
    writer = StoreWriter(tmp_path / "parts" / "c")  # with another caption and split
    writer.add(
        Record("c.mp4", ("a grey square",), "grey", split="test"), np.full((9, 32, 32, 3), 99, np.uint8)
    )
    writer.close(dtype="uint8", fps=8, size=32, source="c")
    for name in "abc":
        encode(tmp_path / "parts" / name, tmp_path / "latents" / name, autoencoder=autoencoder, texts=texts)

    one, both = Store(packed), Store(tmp_path / "parts" / "[ab]")
    assert [record.file_name for record in both.records] == 2 * [record.file_name for record in one.records]
    assert both.records[-1] == both.records[len(both.records) - 1] and len(both.records[1:3]) == 2
    for index in range(len(both.records)):
        num = both.records[index].num_frames
        assert np.array_equal(both.window(index, 0, num), one.window(index % len(one.records), 0, num))
    latents = LatentStore(tmp_path / "latents" / "*")
    assert latents.splits == one.splits | {"test"} and latents.num_frames == 2 * 61 + 9
    assert latents.select(splits=["test"]).tolist() == [len(both.records)]
    config = tiny_config("video", tmp_path / "latents" / "*", data={"splits": ["train", "test"]})
    clips, _, _, _ = DenoiserStage(config, prepare.prepare(config, tmp_path / "run")).draw_batch(
        np.random.default_rng(0)
    )
    assert clips.shape == (config.data.batch_size, 4, 4, 4, 4)
    for folder in latents.folders:
        part = LatentStore(folder)
        captions = ["", *(text for record in part.records for text in record.texts)]
        assert np.array_equal(latents.embed(captions), part.embed(captions))
    sampler = BalancedSampler(latents, latents.select(splits=latents.splits))
    draws = np.bincount(sampler.draw(np.random.default_rng(0), 4000), minlength=7)
    num_concepts = len({record.concept for record in latents.records})
    assert draws[-1] == pytest.approx(4000 / num_concepts, rel=0.1)  # concepts are balanced, not stores

    encode(tmp_path / "parts" / "*", tmp_path / "combined", autoencoder=autoencoder, texts=texts)
    assert len(LatentStore(tmp_path / "combined").records) == len(latents.records)
    (tmp_path / "parts" / "c" / "store.json").unlink()
    with pytest.raises(ValueError, match="c: not a packed data set"):
        Store(tmp_path / "parts" / "*")
    shutil.rmtree(tmp_path / "parts" / "c")
    pack(media, tmp_path / "parts" / "c", size=32, fps=4)
    with pytest.raises(
        ValueError, match=r"c: fps is 4 here and 8 in .*a; expected stores with equal settings"
    ):
        Store(tmp_path / "parts" / "*")


def read_folder(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pack_spares_the_files_of_others_and_intact_stores(packed, media, tmp_path):
    """A failed call deletes neither a user's files nor an intact store."""
    foreign = tmp_path / "foreign"
    (foreign / "shards").mkdir(parents=True)
    (foreign / "shards" / f"{'0' * 24}.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match="foreign: holds shards, which latent-shift did not write there"):
        pack(media, foreign, size=32, fps=8)
    pack(media, foreign, size=32, fps=8, force=True)
    assert (foreign / "shards" / f"{'0' * 24}.npy").read_bytes() == b"x"
    intact = tmp_path / "intact"
    shutil.copytree(packed, intact)
    (intact / "notes.md").write_text("mine")
    files = read_folder(intact)
    with pytest.raises(ValueError, match="none of 2 files can be used"):
        pack(str(tmp_path / "absent-{0..1}.tar"), intact, size=32, fps=8, force=True)
    assert read_folder(intact) == files
    pack(media, intact, size=16, fps=8)
    assert (intact / "notes.md").read_text() == "mine"
    with pytest.raises(ValueError, match="fps must be above 0"):
        pack(tmp_path, tmp_path / "new", size=32, fps=0)
    assert not (tmp_path / "new").exists()


def test_pack_keeps_the_old_store_until_the_new_one_is_complete(packed, media, tmp_path, monkeypatch):
    """At every file that it writes, the call is interrupted once, and the old frames can be read."""
    store = tmp_path / "store"
    shutil.copytree(packed, store)
    old = Store(packed)
    replace, num_replaced = os.replace, 0

    def interrupted_replace(*paths) -> None:
        nonlocal num_replaced
        num_replaced += 1
        if num_replaced == interrupt_at:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted_replace)
    interrupt_at = 0
    while interrupt_at < 20:
        interrupt_at, num_replaced = interrupt_at + 1, 0
        try:
            pack(media, store, size=16, fps=8, shard_mb=0.02)
            break
        except KeyboardInterrupt:
            again = Store(store)
            assert again.records[:] == old.records[:]
            assert np.array_equal(again.window(1, 0, 20), old.window(1, 0, 20))
    assert interrupt_at > 5
    new = Store(store)
    assert new.frame_shape(0) == (16, 16, 3)
    assert {path.stem for path in (store / "shards").glob("*")} == set(new.shapes)
    assert len(list(store.glob("index*"))) == 2


def test_pack_refuses_a_folder_of_latents(media, latents, tmp_path):
    copy = tmp_path / "latents"
    shutil.copytree(latents, copy)
    files = read_folder(copy)
    with pytest.raises(ValueError, match="holds a data set of latents, expected a data set of pixels"):
        pack(media, copy, size=32, fps=8)
    (copy / ".latent-shift.json").unlink()  # as from an older version
    with pytest.raises(ValueError, match="which latent-shift did not write there"):
        pack(media, copy, size=32, fps=8)
    del files[".latent-shift.json"]
    assert read_folder(copy) == files


def test_two_processes_do_not_pack_into_one_folder(media, tmp_path):
    script = "import sys; from latent_shift.data.pack import pack; pack(*sys.argv[1:], size=32, fps=8)"
    command = [sys.executable, "-c", script, str(media), str(tmp_path / "store")]
    with store_folder(tmp_path / "store", PIXELS, source="clips"):
        second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1 and "another process is writing there" in second.stderr
    subprocess.run(command, check=True)
    assert len(Store(tmp_path / "store").records) == 4


def test_store_refuses_damaged_stores(packed, tmp_path):
    with pytest.raises(ValueError, match="not a packed data set"):
        Store(tmp_path)
    shutil.copytree(packed, tmp_path / "store")
    shard = next((tmp_path / "store" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"expected 61 frames \(32, 32, 3\), got 186520 bytes"):
        Store(tmp_path / "store")
    shard.unlink()
    with pytest.raises(ValueError, match="got 0 bytes; create the data set again"):
        Store(tmp_path / "store")
    with next((tmp_path / "store").glob("index-*.jsonl")).open("a") as file:
        file.write("{}")
    with pytest.raises(
        ValueError, match=r"index-\w+\.jsonl: expected \d+ bytes, got \d+; create the data set again"
    ):
        Store(tmp_path / "store")
    (tmp_path / "store" / "store.json").write_text("{}")
    with pytest.raises(ValueError, match="packed by an older version"):
        Store(tmp_path / "store")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shards", None),
        ("shards", {}),
        ("shards", {"../../../etc/x": [61, 32, 32, 3]}),
        ("shards", {"0" * 24: ["a", 32, 32, 3]}),
        ("dtype", "float64"),
        ("dtype", None),
        ("fps", "8"),
        ("fps", 0),
        ("fps", float("nan")),
        ("splits", [1]),
        ("index_bytes", -1),
        ("index", "../index"),
    ],
)
def test_store_refuses_other_values_in_store_json(packed, tmp_path, name, value):
    shutil.copytree(packed, tmp_path / "store")
    info = json.loads((packed / "store.json").read_text())
    (tmp_path / "store" / "store.json").write_text(json.dumps({**info, name: value}))
    with pytest.raises(ValueError, match=rf"store\.json: {name}[^\n]*; create the data set again$"):
        Store(tmp_path / "store")


@pytest.mark.parametrize("name", ["texts", "strides", "factor", "channels"])
@pytest.mark.parametrize("value", [None, "absent"])
def test_store_refuses_latents_without_their_settings(latents, tmp_path, name, value):
    shutil.copytree(latents, tmp_path / "store")
    info = json.loads((latents / "store.json").read_text()) | {name: value}
    if value == "absent":
        del info[name]
    (tmp_path / "store" / "store.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=rf"store\.json: {name}: [^\n]*; create the data set again$"):
        open_store(tmp_path / "store")


def test_store_json_of_others_gets_defaults(packed, latents, tmp_path):
    for source in (packed, latents):
        shutil.copytree(source, tmp_path / source.name)
        info = json.loads((source / "store.json").read_text())
        del info["fps"], info["size"]
        (tmp_path / source.name / "store.json").write_text(json.dumps(info))
        store = open_store(tmp_path / source.name)
        assert (store.info["fps"], store.info["size"]) == (8, 32)
    info = json.loads((packed / "store.json").read_text()) | {"texts": None}
    (tmp_path / packed.name / "store.json").write_text(json.dumps(info))
    assert type(open_store(tmp_path / packed.name)) is Store


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_store_refuses_a_store_json_that_is_none(packed, tmp_path, content):
    shutil.copytree(packed, tmp_path / "store")
    (tmp_path / "store" / "store.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"store\.json: [^\n]+$"):
        Store(tmp_path / "store")


def read_all(folder) -> None:
    store = open_store(folder)
    store.records[:]
    store.window(0, 0, 1)


def test_store_refuses_damaged_arrays_and_lines(packed, latents, tmp_path):
    def damage(source, pattern: str, change) -> str:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(source, tmp_path / "store")
        (path,) = (tmp_path / "store").glob(pattern)
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(ValueError, match="create the data set again") as error:
            read_all(tmp_path / "store")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    damage(packed, "index-*.npy", lambda content: content[:-1])
    damage(packed, "index-*.npy", lambda content: b"PK\3\4" + content)
    damage(packed, "index-*.npy", lambda content: content[:128] + b"\xff" * (len(content) - 128))
    damage(packed, "index-*.jsonl", lambda content: b"x" + content[1:])
    damage(packed, "index-*.jsonl", lambda content: content.replace(b'"texts"', b'"texxt"'))
    damage(packed, "shards/*.npy", lambda content: content.replace(b"(61, 32, 32, 3)", b"(61, 32, 31, 3)"))
    damage(latents, "texts.npy", lambda content: content[:-10])
    damage(latents, "texts.npy", lambda content: content.replace(b"<f2", b"<i2"))
    damage(latents, "captions.npy", lambda content: b"")


def test_store_of_an_earlier_version_is_read_and_replaced(packed, media, tmp_path):
    """There the index had no key, and the folder no marker."""
    shutil.copytree(packed, tmp_path / "store")
    info = json.loads((packed / "store.json").read_text())
    for suffix in (".jsonl", ".npy"):
        (tmp_path / "store" / f"{info['index']}{suffix}").rename(tmp_path / "store" / f"index{suffix}")
    del info["index"]
    (tmp_path / "store" / "store.json").write_text(json.dumps(info))
    (tmp_path / "store" / ".latent-shift.json").unlink()
    assert Store(tmp_path / "store").records[:] == Store(packed).records[:]
    pack(media, tmp_path / "store", size=32, fps=8)
    assert not (tmp_path / "store" / "index.jsonl").exists()
    assert Store(tmp_path / "store").shapes == Store(packed).shapes
