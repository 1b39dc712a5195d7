"""Clips packed into a store, and the contact sheet of a store."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from test_video import counting_clip
from tiny import full_disk
from typer.testing import CliRunner

from latent_shift import video
from latent_shift.cli.main import app
from latent_shift.data.decode import aspect_sizes
from latent_shift.data.encode import encode
from latent_shift.data.latents import LatentStore
from latent_shift.data.pack import pack
from latent_shift.data.preview import preview
from latent_shift.data.records import Problem, Record
from latent_shift.data.store import Store
from latent_shift.data.store_writer import StoreWriter
from latent_shift.video.sheets import draw_text


def test_pack_keeps_line_separators_and_skips_clips_without_caption(tmp_path):
    video.write(counting_clip(16), tmp_path / "a.mp4")
    rows = [
        {"file_name": "a.mp4", "text": "one\u2028line"},
        {"file_name": "a.mp4", "text": ["", "a"]},
        {"file_name": "a.mp4", "text": " "},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert pack(tmp_path, tmp_path / "store", size=16, fps=8) == [Problem("a.mp4", "no caption")]
    assert sorted(record.texts for record in Store(tmp_path / "store").records) == [
        ("a",),
        ("one\u2028line",),
    ]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.mp4", "text": "a"}\n')
    with pytest.raises(ValueError, match=r"none of 2 files can be used; the first: gone.mp4: no such file"):
        pack(tmp_path, tmp_path / "other", size=16, fps=8)


def test_pack_reports_broken_files_and_does_not_replace_them(media, tmp_path):
    (tmp_path / "red.webp").write_bytes((media / "red.webp").read_bytes())
    (tmp_path / "broken.mp4").write_bytes(b"x")
    names = ["red.webp", "broken.mp4", "gone.mp4"]
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "text": name}) for name in names)
    )
    problems = pack(tmp_path, tmp_path / "store", size=16, fps=8)
    assert [problem.file_name for problem in problems] == ["broken.mp4", "gone.mp4"]
    assert [record.file_name for record in Store(tmp_path / "store").records] == ["red.webp"]


@pytest.mark.parametrize("workers", [1, 2])
def test_pack_writes_long_clips_through_a_file(tmp_path, monkeypatch, workers):
    """Memory does not grow with a film's length; the store is the same but for its shards."""
    folder = tmp_path / "media"
    for name, grey in (("a", counting_clip(12)), ("b", counting_clip(3))):
        video.write(np.concatenate([grey, 255 - grey]), folder / f"{name}.webp", fps=8)
        (folder / f"{name}.txt").write_text(name)
    pack(folder, tmp_path / "whole", size=16, fps=8, split_cuts=True)
    if workers == 1:
        monkeypatch.setattr("latent_shift.video.frame_file.MAX_MEMORY_BYTES", 8 * 16 * 16 * 3)
    pack(folder, tmp_path / "long", size=16, fps=8, split_cuts=True, workers=workers)
    whole, long = Store(tmp_path / "whole"), Store(tmp_path / "long")
    rows = {record.file_name: index for index, record in enumerate(whole.records)}
    assert len(rows) == 4 == len(long.records)
    for index, record in enumerate(long.records):
        assert record.num_frames == whole.records[rows[record.file_name]].num_frames
        frames = whole.window(rows[record.file_name], 0, record.num_frames)
        assert np.array_equal(long.window(index, 0, record.num_frames), frames)
    assert len(whole.shapes) == 1
    assert len(long.shapes) == (2 if workers == 1 else 1)
    assert not list((tmp_path / "long").glob("*.partial"))


@pytest.mark.parametrize("workers", [1, 2])
def test_pack_on_a_full_disk_ends_and_keeps_the_old_store(tmp_path, workers):
    """A long clip that does not fit on the disk is not a broken clip."""
    folder, out = tmp_path / "media", tmp_path / "store"
    video.write(counting_clip(2), folder / "a.webp", fps=0.1)  # 160 frames of 512x512 exceed MAX_MEMORY_BYTES
    (folder / "a.txt").write_text("a")
    pack(folder, out, size=16, fps=8)
    before = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with full_disk(2**20), pytest.raises(OSError, match="the disk is full; free some space") as error:
        pack(folder, out, size=512, fps=8, workers=workers)
    assert str(error.value.filename).startswith(str(out))
    assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_pack_does_not_take_errors_of_ours_for_broken_files(tmp_path, monkeypatch):
    video.write(counting_clip(2), tmp_path / "a.webp", fps=8)
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr("latent_shift.data.decode.clip_flaws", lambda record: [])
    with pytest.raises(TypeError, match="positional argument"):
        pack(tmp_path, tmp_path / "store", size=16, fps=8)


def test_pack_with_source_and_output_inside_each_other(tmp_path):
    """A source is read as it was, and nothing of it is lost, also in a folder that is forced."""
    source = tmp_path / "media"
    video.write(counting_clip(2), source / "a.webp", fps=8)
    (source / "a.txt").write_text("a")
    (tmp_path / ".frames").mkdir()
    (tmp_path / ".frames" / "mine.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"which latent-shift did not write there; choose an empty folder"):
        pack(source, tmp_path, size=16, fps=8)
    for force in (False, True):
        with pytest.raises(ValueError, match="media: is also the input; choose another folder"):
            pack(source, source / ".." / "media", size=16, fps=8, force=force)
    with pytest.raises(ValueError, match=r"gone: no such folder"):
        pack(tmp_path / "gone", tmp_path / "store", size=16, fps=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected metadata\.jsonl .* caption in a \.txt"):
        pack(tmp_path / "empty", tmp_path / "store", size=16, fps=8)
    assert not (tmp_path / "store").exists()
    for out, force in (
        (source / "store", False),
        (source / "store", False),
        (tmp_path, True),
    ):
        problems = pack(source, out, size=16, fps=8, force=force)
        assert {problem.outcome for problem in problems} <= {"ignored"}
        assert [record.file_name for record in Store(out).records] == ["a.webp"]
        assert {path: path.read_bytes() for path in before} == before


def test_preview_shows_clips_with_their_captions(packed):
    store = Store(packed)
    sheet, captions = preview(store, rows=3, columns=5)
    assert sheet.shape == (3 * (32 + 14), 5 * 32 + 4 * 2, 3)
    assert set(captions) <= {text for record in store.records for text in record.texts}
    by_concept = {text: record.concept for record in store.records for text in record.texts}
    assert {by_concept[caption] for caption in captions} == {"red", "green", "blue"}
    sheet, captions = preview(store, rows=6, columns=4, num_frames=11, stride=2)
    suitable = [
        record
        for record in store.records
        if record.split == "train" and (record.num_frames >= 21 or record.loop)
    ]
    assert sheet.shape[0] >= len(suitable) * (32 + 14) and 0 < len(suitable) < len(store.records)
    assert len(captions) == len(suitable)  # each once
    assert set(captions) <= {f"{text}, 4 fps" for record in suitable for text in record.texts}
    with pytest.raises(ValueError, match="no record to train on"):
        preview(store, splits=("nowhere",))
    frames, strided = (store.draw_pixels(np.random.default_rng(1), 0, 4, stride=stride) for stride in (1, 2))
    assert np.array_equal(frames[[0, 2]], strided[:2])


def test_preview_of_latents_decodes_a_posterior_sample(packed, latents, autoencoder):
    frames = LatentStore(latents).draw_pixels(np.random.default_rng(0), 0, 3, stride=2)
    rng = np.random.default_rng(0)
    vae = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        pixels = (
            torch.from_numpy(Store(packed).draw_window(rng, 0, 3, stride=2)).permute(0, 3, 1, 2) / 127.5 - 1
        )
        posterior = vae.encode(pixels).latent_dist
        sample = posterior.mean + posterior.std * torch.from_numpy(
            rng.standard_normal(posterior.mean.shape, np.float32)
        )
        expected = ((vae.decode(sample).sample.permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255).numpy()
    assert np.abs(frames - expected).max() < 3 < expected.std()
    captions = preview(LatentStore(latents), rows=4, columns=4, stride=2)[1]
    assert all(caption.endswith(", 4 fps") for caption in captions)


def test_pack_keeps_aspect_ratios_at_one_area(tmp_path):
    sizes = aspect_sizes(64, 16)
    assert (64, 64) in sizes and (32, 64) not in sizes
    assert all(
        height % 16 == 0 == width % 16 and height * width <= 64**2 and 0.5 <= height / width <= 2
        for height, width in sizes
    )
    assert {(width, height) for height, width in sizes} & set(sizes) >= {(64, 64)}
    with pytest.raises(
        ValueError, match="no size of at most 32x32 pixels has sides that are multiples of 64"
    ):
        aspect_sizes(32, 64)
    wide = np.zeros((8, 90, 160, 3), np.uint8)
    wide[:, :, 80:] = 200
    for name, frames in (
        ("wide", wide),
        ("tall", wide.transpose(0, 2, 1, 3)),
        ("square", wide[:, :, 35:125]),
    ):
        video.write(frames, tmp_path / f"{name}.webp", fps=8)
        (tmp_path / f"{name}.txt").write_text(name)
    assert pack(tmp_path, tmp_path / "store", size=64, fps=8, aspects=16) == []
    store = Store(tmp_path / "store")
    names = [record.texts[0] for record in store.records]
    shapes = {name: store.frame_shape(index)[:2] for index, name in enumerate(names)}
    assert shapes == {"square": (64, 64), "tall": (80, 48), "wide": (48, 80)}
    row = store.window(names.index("wide"), 0, 1)[0, 24, :, 0].astype(int)
    assert (row[:38] < 5).all() and (row[42:] > 195).all()  # neither stretched nor moved


def test_aspect_sizes_without_factor_is_the_square():
    assert aspect_sizes(128, None) == [(128, 128)]


def test_preview_shows_every_clip_and_every_letter(tmp_path):
    """Also clips of other shapes; each caption is as high as its text needs, and letters without a glyph are escaped."""
    captions = ["short", "a long caption of many words, " * 8, "Tür 中", "un" * 100]
    writer = StoreWriter(tmp_path)
    for number, (caption, shape) in enumerate(
        zip(captions, ((8, 64), (64, 8), (16, 32), (8, 64)), strict=True)
    ):
        writer.add(Record(f"{number}.mp4", (caption,), "same"), np.full((4, *shape, 3), 9, np.uint8))
    writer.close(dtype="uint8", fps=8)
    sheet, shown = preview(Store(tmp_path), rows=None, columns=2)
    assert sorted(shown) == sorted(captions)
    width = 2 * 64 + 2
    for caption in captions:
        image = draw_text(caption, width)
        assert image.shape[1] == width
        assert (image[:, -1] == 255).all() and image.min() < 100  # nothing is cut at the side
    lines = [draw_text(caption, width).shape[0] // 14 for caption in captions]
    assert lines[0] == 1 and lines[1] > 6 and lines[3] > 3
    assert draw_text("a" * 10**6, width).shape[0] < 10_000  # long texts end with the number of their letters
    assert np.array_equal(draw_text("中", width), draw_text("\\u4e2d", width))
    assert not np.array_equal(draw_text("ü", width), draw_text("\\xfc", width))
    assert sheet.shape[0] == 14 * sum(lines) + 8 + 64 + 16 + 8


def test_data_preview_says_how_many_clips_it_shows(packed, tmp_path):
    command = [
        "data",
        "preview",
        str(packed),
        str(tmp_path / "sheet.png"),
        "--split",
        "train",
        "--split",
        "val_concept",
    ]
    for options, expected in (
        ([], "4 of 4 clips"),
        (["--rows", "2"], "2 of 4 clips"),
        (["--rows", "2", "--all"], "4 of 4 clips"),
    ):
        result = CliRunner().invoke(app, [*command, *options])
        assert expected in result.output.splitlines(), result.output


def test_pack_replaces_no_data_set_of_another_source(media, tmp_path):
    other = shutil.copytree(media, tmp_path / "other")
    pack(media, tmp_path / "out", size=32, fps=8)
    pack(media, tmp_path / "out", size=32, fps=4)
    with pytest.raises(
        ValueError, match=rf"out: holds a data set of pixels made of {media.name}, not of other; .* --force"
    ):
        pack(other, tmp_path / "out", size=32, fps=8)
    assert Store(tmp_path / "out").info["fps"] == 4
    pack(other, tmp_path / "out", size=32, fps=8, force=True)
    assert json.loads((tmp_path / "out" / "store.json").read_text())["source"] == "other"


def test_pack_and_encode_keep_stores_of_folders_of_the_same_name(autoencoder, texts, tmp_path):
    for parent, value in (("a", 0), ("b", 99)):
        video.write(counting_clip(2) + np.uint8(value), tmp_path / parent / "clips" / "x.webp", fps=8)
        (tmp_path / parent / "clips" / "x.txt").write_text("x")
        pack(tmp_path / parent / "clips", tmp_path / parent / "packed", size=16, fps=8)
    with pytest.raises(ValueError, match="holds a data set of pixels made of another source called clips"):
        pack(tmp_path / "b" / "clips", tmp_path / "a" / "packed", size=16, fps=8)
    pack(tmp_path / "a" / "clips", tmp_path / "a" / "packed", size=16, fps=4)  # again, with other settings
    models = {"autoencoder": autoencoder, "texts": texts}
    encode(tmp_path / "a" / "packed", tmp_path / "latents", **models)
    with pytest.raises(ValueError, match="holds a data set of latents made of another source called clips"):
        encode(tmp_path / "b" / "packed", tmp_path / "latents", **models)
    encode(tmp_path / "b" / "packed", tmp_path / "latents", **models, force=True)


def test_pack_keeps_a_list_of_problems_that_is_not_its_own(tmp_path):
    video.write(counting_clip(2), tmp_path / "clips" / "x.webp", fps=8)
    (tmp_path / "clips" / "x.txt").write_text("x")
    out = tmp_path / "out"
    out.mkdir()
    (out / "problems.txt").write_text("mine")
    pack(tmp_path / "clips", out, size=16, fps=8, force=True)
    with pytest.raises(ValueError, match=r"problems\.txt: latent-shift did not write it"):
        pack(tmp_path / "clips", out, size=16, fps=8)
    assert (out / "problems.txt").read_text() == "mine"
    (out / "problems.txt").unlink()
    (tmp_path / "clips" / "y.webp").write_bytes(b"cut")
    (tmp_path / "clips" / "y.txt").write_text("y")
    pack(tmp_path / "clips", out, size=16, fps=8)
    assert "y.webp" in (out / "problems.txt").read_text()
    (tmp_path / "clips" / "y.webp").unlink()
    (tmp_path / "clips" / "y.txt").unlink()
    pack(tmp_path / "clips", out, size=16, fps=8)
    assert not (out / "problems.txt").exists()  # its own, of before
