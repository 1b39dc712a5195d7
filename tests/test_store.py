"""Shards of frames and their index: what goes in comes out, at any stride, in any size; what is damaged is refused."""

import shutil

import numpy as np
import pytest
from conftest import tiny_config

from latent_shift import video
from latent_shift.data.encode import encode
from latent_shift.data.latents import LatentStore
from latent_shift.data.pack import pack, sizes_of
from latent_shift.data.readers import Record
from latent_shift.data.sampler import BalancedSampler
from latent_shift.data.store import Store, StoreWriter
from latent_shift.training import prepare
from latent_shift.training.stages import DenoiserStage


@pytest.fixture
def sizes(tmp_path):
    """Two concepts in two sizes: "a" has one clip of each, "b" one wide clip; frames are numbered from 0 on."""
    writer = StoreWriter(tmp_path / "sizes", shard_mb=1e-3)
    for number, (concept, shape) in enumerate((("a", (8, 16)), ("b", (8, 16)), ("a", (16, 8)))):
        frames = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None] + 50 * number, (20, *shape, 3))
        writer.add(Record(f"{number}.mp4", (concept,), concept, loop=number == 2), frames)
    writer.close(dtype="uint8")
    return Store(tmp_path / "sizes")


def test_a_store_gives_back_what_was_packed(media, packed, tmp_path):
    store = Store(packed)
    for index, record in enumerate(store.records):
        frames, _ = video.read(media / record.file_name, fps=8, size=32)
        assert np.array_equal(store.window(index, 0, len(frames)), frames)
    assert (store.info["fps"], store.num_frames) == (8, 61)
    assert pack(media, tmp_path / "two", size=32, fps=8, workers=2) == []
    assert Store(tmp_path / "two").shapes == store.shapes  # named by what is in them: the same frames in the same order
    assert pack(media, tmp_path / "two", size=32, fps=8, shard_mb=0.05) == []
    small = Store(tmp_path / "two")
    assert len(small.shapes) > 1 == len(store.shapes)
    assert sorted(path.stem for path in (small.folder / "shards").iterdir()) == sorted(small.shapes)  # what it was before is gone
    for index, record in enumerate(store.records):
        assert np.array_equal(small.window(index, 0, record.num_frames), store.window(index, 0, record.num_frames))


def test_windows_of_a_loop_go_round_and_others_stay_inside(packed):
    store = Store(packed)
    red, green = (next(i for i, record in enumerate(store.records) if record.concept == name) for name in ("red", "green"))
    whole = store.window(red, 0, 20)
    assert np.array_equal(store.window(red, 18, 4), whole[[18, 19, 0, 1]])
    rng = np.random.default_rng(0)
    starts = {store.draw_window(rng, green, 4)[0].tobytes() for _ in range(200)}
    assert len(starts) == 17  # 20 - 4 + 1 places
    assert len({store.draw_window(rng, red, 4)[0].tobytes() for _ in range(300)}) == 20
    assert store.select(num_frames=30).tolist() == [red]
    assert len(store.select(splits=("val_concept",))) == 1


def test_a_stride_takes_every_other_frame(sizes):
    assert sizes.window(0, 1, 4, stride=3)[:, 0, 0, 0].tolist() == [1, 4, 7, 10]
    assert sizes.window(2, 10, 4, stride=3)[:, 0, 0, 0].tolist() == [110, 113, 116, 119]
    assert sizes.window(2, 16, 3, stride=3)[:, 0, 0, 0].tolist() == [116, 119, 102]  # round the end
    rng = np.random.default_rng(0)
    firsts = {int(sizes.draw_window(rng, 0, 4, stride=6)[0, 0, 0, 0]) for _ in range(100)}
    assert firsts == {0, 1}  # 19 frames of 20 are spanned
    assert sizes.select(num_frames=4, stride=6).tolist() == [0, 1, 2]
    assert sizes.select(num_frames=4, stride=7).tolist() == [2]  # a loop alone


def test_clips_of_one_size_are_drawn_together_and_concepts_equally_often(sizes):
    assert [sizes.shape(index) for index in range(3)] == [(8, 16, 3), (8, 16, 3), (16, 8, 3)]
    sampler, rng = BalancedSampler(sizes, [0, 1, 2]), np.random.default_rng(0)
    draws = [sampler.draw(rng, 4) for _ in range(1500)]
    assert all(len({sizes.shape(index) for index in draw}) == 1 for draw in draws)
    share = np.bincount(np.concatenate(draws), minlength=3) / 6000
    assert np.allclose(share, [0.25, 0.5, 0.25], atol=0.04)  # "a" as often as "b", and of its clips each
    with pytest.raises(ValueError, match="no record to train on"):
        BalancedSampler(sizes, [])


def test_shapes_are_kept_in_sizes_of_one_area(tmp_path):
    sizes = sizes_of(64, 16)
    assert (64, 64) in sizes and (32, 64) not in sizes
    assert all(height % 16 == 0 == width % 16 and height * width <= 64**2 and 0.5 <= height / width <= 2 for height, width in sizes)
    assert {(width, height) for height, width in sizes} & set(sizes) >= {(64, 64)}
    with pytest.raises(ValueError, match="no size of at most 32x32 pixels has the factor 64"):
        sizes_of(32, 64)
    wide = np.zeros((8, 90, 160, 3), np.uint8)
    wide[:, :, 80:] = 200
    for name, frames in (("wide", wide), ("tall", wide.transpose(0, 2, 1, 3)), ("square", wide[:, :, 35:125])):
        video.write(frames, tmp_path / f"{name}.webp", fps=8)
        (tmp_path / f"{name}.txt").write_text(name)
    assert pack(tmp_path, tmp_path / "store", size=64, fps=8, aspects=16) == []
    store = Store(tmp_path / "store")
    shapes = {record.texts[0]: store.shape(index)[:2] for index, record in enumerate(store.records)}
    assert shapes == {"square": (64, 64), "tall": (80, 48), "wide": (48, 80)}
    row = store.window([record.texts[0] for record in store.records].index("wide"), 0, 1)[0, 24, :, 0].astype(int)
    assert (row[:38] < 5).all() and (row[42:] > 195).all()  # the middle is in the middle: nothing is stretched or moved


def test_several_stores_are_read_as_one(media, packed, sizes, autoencoder, texts, tmp_path):
    for name in ("b", "a"):
        pack(media, tmp_path / "parts" / name, size=32, fps=8, shard_mb=0.05 if name == "b" else 64)
        encode(tmp_path / "parts" / name, tmp_path / "latents" / name, autoencoder=autoencoder, texts=texts)
    # A third one, with a caption and a split that the others have not.
    writer = StoreWriter(tmp_path / "parts" / "c")
    writer.add(Record("c.mp4", ("a grey square",), "grey", split="test"), np.full((9, 32, 32, 3), 99, np.uint8))
    writer.close(dtype="uint8", fps=8, size=32, source="c")
    encode(tmp_path / "parts" / "c", tmp_path / "latents" / "c", autoencoder=autoencoder, texts=texts)

    one, both = Store(packed), Store(tmp_path / "parts" / "[ab]")
    assert [record.file_name for record in both.records] == 2 * [record.file_name for record in one.records]
    assert both.records[-1] == both.records[len(both.records) - 1] and len(both.records[1:3]) == 2
    for index in range(len(both.records)):
        num = both.records[index].num_frames
        assert np.array_equal(both.window(index, 0, num), one.window(index % len(one.records), 0, num))
    every = LatentStore(tmp_path / "latents" / "*")
    assert every.splits == one.splits | {"test"} and every.num_frames == 2 * 61 + 9
    assert every.select(splits=["test"]).tolist() == [len(both.records)]
    config = tiny_config("video", tmp_path / "latents" / "*", data={"splits": ["train", "test"]})
    clips, _, _, _ = DenoiserStage(config, prepare.prepare(config, tmp_path / "run")).draw_batch(np.random.default_rng(0))
    assert clips.shape == (config.data.batch_size, 4, 4, 4, 4)
    for part in every.folders:  # each caption is that of its own store
        store = LatentStore(part)
        captions = ["", *(text for record in store.records for text in record.texts)]
        assert np.array_equal(every.embed(captions), store.embed(captions))
    draws = np.bincount(BalancedSampler(every, every.select(splits=every.splits)).draw(np.random.default_rng(0), 4000), minlength=7)
    assert draws[-1] == pytest.approx(4000 / len({record.concept for record in every.records}), rel=0.1)  # concepts, not stores

    encode(tmp_path / "parts" / "*", tmp_path / "whole", autoencoder=autoencoder, texts=texts)
    assert len(LatentStore(tmp_path / "whole").records) == len(every.records)
    (tmp_path / "parts" / "c" / "store.json").unlink()
    with pytest.raises(ValueError, match="c: not a packed data set"):
        Store(tmp_path / "parts" / "*")
    pack(media, tmp_path / "parts" / "c", size=32, fps=4)
    with pytest.raises(ValueError, match=r"c: fps is 4, but 8 in .*a: expected stores made alike"):
        Store(tmp_path / "parts" / "*")


def test_what_is_not_the_stores_is_left_alone(packed, tmp_path):
    """Neither the user's own files in its way nor a store that is good are lost to a call that fails."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.tar").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds shards/00000\.tar, which is no part of a data set"):
        StoreWriter(tmp_path)
    assert (tmp_path / "shards" / "00000.tar").exists()
    good = tmp_path / "good"
    shutil.copytree(packed, good)
    before = sorted((path.name, path.stat().st_size) for path in good.rglob("*"))
    with pytest.raises(ValueError, match="none of 2 files can be used"):
        pack(str(tmp_path / "nothere-{0..1}.tar"), good, size=32, fps=8)
    assert sorted((path.name, path.stat().st_size) for path in good.rglob("*")) == before
    (good / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.md"):
        pack(tmp_path, good, size=32, fps=8)
    with pytest.raises(ValueError, match="fps must be above 0"):
        pack(tmp_path, tmp_path / "new", size=32, fps=0)


def test_damaged_stores_are_refused(packed, tmp_path):
    with pytest.raises(ValueError, match="not a packed data set"):
        Store(tmp_path)
    shutil.copytree(packed, tmp_path / "store")
    shard = next((tmp_path / "store" / "shards").iterdir())
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=r"expected 61 frames \(32, 32, 3\), got 186520 bytes"):
        Store(tmp_path / "store")
    shard.unlink()
    with pytest.raises(ValueError, match="got 0 bytes; make the data set again"):
        Store(tmp_path / "store")
    with (tmp_path / "store" / "index.jsonl").open("a") as file:
        file.write("{}")
    with pytest.raises(ValueError, match=r"index\.jsonl: expected \d+ bytes, got \d+; make the data set again"):
        Store(tmp_path / "store")
    (tmp_path / "store" / "store.json").write_text("{}")
    with pytest.raises(ValueError, match="packed by an older version"):
        Store(tmp_path / "store")
