"""Folders as people have them: every file is read, or named with the reason, and one bad file costs itself alone."""

import codecs
import io
import json
import os
import socket
import tarfile

import numpy as np
import pytest
from typer.testing import CliRunner

from latent_shift import video
from latent_shift.cli.main import app
from latent_shift.data import readers, shards
from latent_shift.data.check import check
from latent_shift.data.decode import size_flaws
from latent_shift.data.pack import pack
from latent_shift.data.records import Problem, escape
from latent_shift.data.store import Store


def add_clip(path, caption: str | bytes | None = "a square", *, seed: int = 0, num_frames: int = 20):
    """Write a clip of a moving square, with a caption in a .txt."""
    colour = np.random.default_rng(seed).integers(0, 200, 3)
    frames = np.full((num_frames, 32, 32, 3), 255, np.uint8)
    for k in range(num_frames):
        frames[k, 8:16, k % 24 : k % 24 + 8] = colour
    video.write(frames, path, fps=8)
    if caption is not None:
        content = caption if isinstance(caption, bytes) else caption.encode()
        path.with_suffix(".txt").write_bytes(content)
    return path


def outcomes(source) -> dict[str, str]:
    """Return {file name: "read", or outcome and reason}."""
    return {
        record.file_name: f"{media.outcome}: {media.reason}" if isinstance(media, Problem) else "read"
        for record, media in readers.read(source)
    }


@pytest.fixture
def folder(tmp_path):
    """A folder with one good clip."""
    (tmp_path / "data").mkdir()
    add_clip(tmp_path / "data" / "good.webp")
    return tmp_path / "data"


def test_read_names_files_of_other_formats(folder):
    for suffix in (".bmp", ".tif", ".heic", ".rm", ""):
        (folder / f"x{suffix}").write_bytes(b"x")
    (folder / "x.txt").write_text("caption of x")
    (folder / "alone.txt").write_text("no media")
    (folder / "more.zip").write_bytes(b"x")
    (folder / "README.md").write_text("x")
    found = outcomes(folder)
    assert found.pop("good.webp") == "read"
    assert found.pop("README.md") == "ignored: neither a video, a picture nor a caption"
    assert found.pop("x.txt").startswith("ignored")
    assert found.pop("x").startswith("skipped: a file without suffix is not read; expected .3gp .apng")
    assert found.pop("more.zip").startswith("skipped: an archive beside loose files")
    assert found.pop("alone.txt") == "skipped: a text without a video or picture of its name"
    assert set(found) == {"x.bmp", "x.tif", "x.heic", "x.rm"}
    assert all(f"skipped: .{name[2:]} is not read; expected" in reason for name, reason in found.items())


def test_check_counts_add_up(folder):
    add_clip(folder / "short.webp", num_frames=3)
    video.write(np.zeros((1, 32, 32, 3), np.uint8), folder / "still.png")
    (folder / "still.txt").write_text("black")
    (folder / "broken.mp4").write_bytes(b"x")
    (folder / "broken.txt").write_text("broken")
    (folder / "film.wmv").write_bytes(b"x")
    (folder / "notes.md").write_text("x")
    counts, problems = check(folder)
    assert counts == {"clips": 2, "stills": 1, "skipped": 2, "concepts": 2}
    assert len(list(readers.read(folder))) == 2 + 1 + 2 + sum(p.outcome == "ignored" for p in problems)
    result = CliRunner().invoke(app, ["data", "check", str(folder), "--workers", "1"])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "2 clips, 1 stills, 2 skipped, 2 concepts, 3 with problems"
    assert "short.webp: 3 frames at 8 fps, expected at least 16 (kept)" in result.output.splitlines()
    (folder / "short.webp").unlink()
    (folder / "broken.mp4").unlink()
    (folder / "film.wmv").unlink()
    for name in ("short.txt", "broken.txt"):
        (folder / name).unlink()
    result = CliRunner().invoke(app, ["data", "check", str(folder), "--workers", "1"])
    assert (result.exit_code, "notes.md" in result.output) == (
        0,
        True,
    )  # a file that is ignored is no problem


def test_check_pack_and_the_store_list_the_same_problems(folder, tmp_path):
    for name, caption in (("a", b"\xff\xfeg"), ("b", ""), ("c", "x\0")):
        add_clip(folder / f"{name}.webp", caption)
    add_clip(folder / "short.webp", num_frames=3)
    (folder / "film.wmv").write_bytes(b"x")
    checked = [problem for problem in check(folder)[1] if "duplicate" not in problem.reason]
    packed = pack(folder, tmp_path / "store", size=32, fps=8, min_frames=16)
    assert packed == checked
    assert {problem.file_name: problem.outcome for problem in packed} == {
        "a.webp": "skipped", "b.webp": "skipped", "c.webp": "skipped", "film.wmv": "skipped", "short.webp": "kept",
    }  # fmt: skip
    lines = (tmp_path / "store" / "problems.txt").read_text().splitlines()
    assert lines == [str(problem) for problem in packed]
    assert [record.file_name for record in Store(tmp_path / "store").records] == ["good.webp", "short.webp"]


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("grün".encode("cp1252"), "expected UTF-8 text, got byte 0xfc at position 2"),
        ("a cat".encode("utf-16"), "expected UTF-8 text, got UTF-16"),
        ("a cat".encode("utf-16-le"), "the caption holds a NUL character; expected UTF-8 text"),
        (b"\xed\xa0\xbd half an emoji", "expected UTF-8 text, got byte 0xed at position 0"),
        pytest.param(b"x" * (2**20 + 1), "expected at most 1048576 bytes of text, got 1048577", id="large"),
        (b" \n\n", "no caption"),
        (b"", "no caption"),
    ],
)
def test_broken_captions_cost_their_clip(folder, caption, reason):
    add_clip(folder / "bad.webp", caption)
    ((_, got, outcome),) = [problem for problem in check(folder)[1] if problem.file_name == "bad.webp"]
    assert reason in got and outcome == "skipped"


def test_a_byte_order_mark_is_no_part_of_a_caption(folder):
    add_clip(folder / "bom.webp", codecs.BOM_UTF8 + b"a cat\r\nthe cat")
    assert [record.texts for record, _ in readers.read(folder)] == [("a cat", "the cat"), ("a square",)]


def test_debris_of_systems_is_passed_over(folder):
    apple_double = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "
    for name in ("._good.webp", "._good.txt", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(apple_double)
    for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints"):
        (folder / name).mkdir()
        (folder / name / "x.mp4").write_bytes(b"x")
    assert outcomes(folder) == {"good.webp": "read"}


def test_linked_folders_are_read_once(folder, tmp_path):
    add_clip(tmp_path / "elsewhere" / "b.webp")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    for name in ("linked", "again"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (folder / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    found = outcomes(folder)
    assert [name.rpartition("/")[2] for name, outcome in found.items() if outcome == "read"] == [
        "b.webp",
        "good.webp",
    ]
    assert found["gone.mp4"] == found["loop.mp4"] == "skipped: a link to a file that does not exist"
    assert len(found) == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_markers_that_are_none_do_not_end_the_work(folder, tmp_path):
    """Nobody but this package writes such a file, but a downloaded data set may hold anything."""
    for name in ("a", "b", "c"):
        add_clip(folder / name / "clip.webp")
    (folder / "a" / ".latent-shift.json").mkdir()
    (folder / "b" / ".latent-shift.json").write_text("[" * 100_000)
    os.mkfifo(folder / "c" / ".latent-shift.json")
    assert list(outcomes(folder).values()) == ["read"] * 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_special_files_are_named_and_not_opened(folder, tmp_path):
    os.mkfifo(folder / "pipe.mp4")
    os.mkfifo(folder / "good2.txt")
    add_clip(folder / "good2.webp", None)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(folder / "s.mp4"))  # the name of a socket is short
    found = outcomes(folder)
    assert found["pipe.mp4"] == found["good2.txt"] == "skipped: is a pipe, expected a file"
    assert found["s.mp4"] == "skipped: is a socket, expected a file"
    (tmp_path / "list.jsonl").write_text('{"file_name": "data/pipe.mp4", "text": "x"}\n')
    ((_, reason, _),) = check(tmp_path / "list.jsonl")[1]
    assert reason == "is a pipe, expected a file"
    os.mkfifo(tmp_path / "list.csv")
    with pytest.raises(ValueError, match=r"list\.csv: is a pipe, expected a file"):
        readers.read(tmp_path / "list.csv")
    os.mkfifo(tmp_path / "s.tar")
    ((_, reason, _),) = check(tmp_path / "s.tar")[1]
    assert reason == f"cannot read the shard: {tmp_path}/s.tar: is a pipe, expected a file"


def test_names_of_any_bytes_are_packed(folder, tmp_path, monkeypatch):
    names = [
        b"caf\xe9.webp",
        "日本.webp".encode(),
        b"12:30.webp",
        b"http:x.webp",
        b"a\nb.webp",
        b"%s{0..3}.webp",
    ]
    for number, name in enumerate(names):
        path = os.fsencode(folder) + b"/" + name
        os.link(folder / "good.webp", path)
        with open(path.replace(b".webp", b".txt"), "w") as file:
            file.write(f"caption {number}")
    (folder / "good.webp").unlink()
    (folder / "good.txt").unlink()
    monkeypatch.chdir(folder)
    problems = pack(".", tmp_path / "store", size=32, fps=8)
    assert problems == []
    assert {record.file_name for record in Store(tmp_path / "store").records} == {
        r"caf\xe9.webp", "日本.webp", "12:30.webp", "http:x.webp", r"a\nb.webp", "%s{0..3}.webp",
    }  # fmt: skip


def test_escape_keeps_letters_and_replaces_what_cannot_be_printed():
    assert escape("häß 中 👩‍🚀\u3000") == "häß 中 👩‍🚀\u3000"
    assert escape("a\x1b[2J\udce9\ud83d\n\x9b") == r"a\x1b[2J\xe9\ud83d\n\x9b"


def test_rows_cost_themselves_alone(folder):
    rows = [
        '{"file_name": "good.webp", "text": "x"}', "", "  ", "{", "[]", "null", "3", '"x"', "{}", "[" * 50_000,
        '{"file_name": "good.webp"}', '{"text": "x"}', '{"file_name": 3, "text": "x"}', '{"file_name": "good.webp", "text": 3}',
        '{"file_name": "good.webp", "text": [3]}', '{"file_name": "good.webp", "text": {"a": 1}}',
        '{"file_name": "good.webp", "text": "cut \\ud83d"}', '{"file_name": "good.webp", "text": "x", "concept": ["x"]}',
        '{"file_name": "good.webp", "text": "x", "split": 3}', '{"file_name": "good.webp", "text": "x", "loop": 3}',
        '{"file_name": "good.webp", "text": "\\u0000"}', '{"file_name": "/etc/x.mp4", "text": "x"}',
        '{"file_name": "../data/good.webp", "text": "x"}', '{"file_name": "a/../../x.mp4", "text": "x"}',
        '{"file_name": "http://127.0.0.1/x.mp4", "text": "x"}', '{"file_name": "", "text": "x"}',
        '{"file_name": "a\\u0000.mp4", "text": "x"}', '{"file_name": "good.webp", "text": "y", "concept": 5}', "1" * 5000,
    ]  # fmt: skip
    (folder / "metadata.jsonl").write_bytes(
        "\n".join(rows).encode() + b'\n{"file_name": "good.webp", "text": "\xfc"}\n'
    )
    found = list(readers.read(folder))
    assert [record.texts for record, media in found if not isinstance(media, Problem)] == [("x",), ("y",)]
    problems = {media.file_name: media.reason for _, media in found if isinstance(media, Problem)}
    blank, good = (2, 3), (1, 28)
    assert set(problems) == {
        "good.txt", *(f"metadata.jsonl:{line}" for line in range(1, len(rows) + 2) if line not in (*blank, *good))
    }  # fmt: skip
    assert "leaves the folder of the table" in problems["metadata.jsonl:23"]
    assert "is an address" in problems["metadata.jsonl:25"]
    assert r"holds '\ud83d', which is not a character" in problems["metadata.jsonl:17"]
    assert check(folder)[0]["clips"] == 2


def test_csv_rows_cost_themselves_alone(folder):
    (folder / "metadata.csv").write_bytes(
        b"\xef\xbb\xbffile_name,text\r\ngood.webp,one\r\n\r\ngood.webp\r\ngood.webp,gr\xfcn\r\n"
        b'good.webp,"x"y\r\ngood.webp,two\r\ngood.webp,"never closed\r\ngood.webp,lost\r\n'
    )
    found = list(readers.read(folder))
    assert [record.texts for record, media in found if not isinstance(media, Problem)] == [("one",), ("two",)]
    problems = {media.file_name: media.reason for _, media in found if isinstance(media, Problem)}
    assert set(problems) == {"good.txt", *(f"metadata.csv:{line}" for line in (4, 5, 6, 8))}
    assert "lines 8 to the end: unexpected end of data" in problems["metadata.csv:8"]
    (folder / "metadata.csv").write_text("file_name;text\na.mp4;b\n")
    with pytest.raises(ValueError, match="expected the columns file_name and text, got 'file_name;text'"):
        readers.read(folder)
    (folder / "metadata.csv").write_text("file_name,text\na.mp4,b\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"metadata\.csv: expected UTF-8 text, got UTF-16"):
        readers.read(folder)


def test_media_that_a_table_leaves_out_are_named(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "./good.webp", "text": "x"}\n')
    add_clip(folder / "sub" / "other.webp", None)
    assert outcomes(folder) == {
        "./good.webp": "read",
        "good.txt": "ignored: a text that is not read",
        "sub/other.webp": "skipped: is not listed in metadata.jsonl",
    }


def test_archives_and_loose_files_beside_each_other(folder):
    (folder / "sub").mkdir()
    tar(folder / "sub" / "x.tar", {"a.webp": b"x", "a.txt": b"x"})
    assert outcomes(folder)["sub/x.tar"].startswith("skipped: an archive beside loose files")
    (folder / "good.txt").unlink()
    (folder / "sub" / "x.tar").rename(folder / "x.tar")
    found = outcomes(folder)
    assert found[f"{folder}/x.tar/a.webp"] == "read"
    assert found["good.webp"] == "skipped: lies beside shards, which are read instead"


@pytest.mark.parametrize(
    "annotations",
    [
        {"videos": None, "sentences": None}, {"videos": [], "sentences": []}, {"videos": [{}], "sentences": [{}]},
        {"videos": [None, 3], "sentences": ["x"]}, {"videos": {"a": 1}, "sentences": []},
        {"videos": [{"video_id": "video0"}], "sentences": [{"video_id": "video0", "caption": None}]},
        {"videos": [{"video_id": "video" + "9" * 5000}], "sentences": [{"video_id": [], "caption": "x"}]},
        {"videos": [{"video_id": 3}, {"video_id": "x", "split": None}], "sentences": [{"caption": "x"}]},
    ],
)  # fmt: skip
def test_annotations_of_any_shape_end_without_a_traceback(folder, annotations):
    (folder / "ann.json").write_text(json.dumps(annotations))
    result = CliRunner().invoke(app, ["data", "check", str(folder), "--workers", "1"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "clips" in result.output.splitlines()[-1]


def test_msrvtt_rows_cost_themselves_alone(tmp_path):
    add_clip(tmp_path / "video0.mp4", None)
    add_clip(tmp_path / "video5.mp4", None)
    videos = [{"video_id": "video0"}, {"video_id": "video0", "split": "test"}, {"split": "train"}]
    sentences = [{"video_id": "video0", "caption": " x "}, {"video_id": "video0", "caption": None}]
    (tmp_path / "ann.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    assert outcomes(tmp_path) == {
        "video0.mp4": "read",
        "ann.json: sentences[1]": "skipped: expected video_id and caption as text, got {'video_id': 'video0', 'caption': None}",
        "ann.json: videos[1]": "skipped: video0 is listed twice; the first is used",
        "ann.json: videos[2]": "skipped: expected video_id and split as text, got {'split': 'train'}",
        "video5.mp4": "skipped: is not listed in the annotations of MSR-VTT, which are read instead",
    }
    (tmp_path / "ann.json").write_text("[" * 100_000 + '"videos"')
    with pytest.raises(ValueError, match="or media files each with a caption"):
        readers.read(tmp_path)


def test_pack_ignores_a_store_inside_of_its_source(folder):
    pack(folder, folder / "store", size=32, fps=8)
    assert outcomes(folder) == {"good.webp": "read", "store": "ignored: holds a data set of pixels"}
    with pytest.raises(ValueError, match="store: is a packed data set already; expected captioned videos"):
        readers.read(folder / "store")


def test_size_flaws_of_enlarged_and_cropped_clips():
    assert size_flaws(128, 128, [(128, 128)]) == []
    assert size_flaws(90, 160, [(64, 64)]) == []  # 44 % are lost
    assert size_flaws(64, 64, [(128, 128)]) == ["64x64 pixels are enlarged 2.0 times"]
    assert size_flaws(100, 300, [(100, 100)]) == ["67% of the picture is cropped away"]
    assert size_flaws(100, 300, [(100, 100), (64, 128)]) == []  # the nearest aspect ratio
    assert size_flaws(32, 16, [(64, 64)]) == ["16x32 pixels are enlarged 4.0 times"]


def test_pack_and_check_say_which_clips_are_enlarged(folder, tmp_path):
    expected = Problem("good.webp", "32x32 pixels are enlarged 2.0 times", "kept")
    assert pack(folder, tmp_path / "store", size=64, fps=8) == [expected]
    assert check(folder, size=64)[1] == [expected]
    assert check(folder)[1] == check(folder, size=32)[1] == []


# Shards


def tar(path, members: dict[str, bytes], **options):
    with tarfile.open(path, "w", **options) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def members(folder):
    clip = (folder / "good.webp").read_bytes()
    return {
        "a.webp": clip,
        "a.txt": b"one",
        "b.webp": clip,
        "b.txt": b"two",
        "c.txt": b"alone",
        "d.webp": clip,
    }


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [0, 2, 5, 4, 3, 1], [3, 1, 4, 5, 2, 0]])
@pytest.mark.parametrize("prefix", ["", "./", "./sub/"])
def test_shards_in_any_order(tmp_path, members, order, prefix):
    names = [list(members)[k] for k in order]
    path = tar(tmp_path / "s.tar", {prefix + name: members[name] for name in names})
    clips = {
        record.file_name.rpartition("/")[2]: (record.texts, media) for record, media in readers.read(path)
    }
    assert {name: texts for name, (texts, _) in clips.items()} == {
        "a.webp": ("one",), "b.webp": ("two",), "c": (), "d.webp": (),
    }  # fmt: skip
    assert clips["a.webp"][1] == members["a.webp"]
    assert clips["c"][1].reason == "no media among .txt"


def test_shards_of_a_mac(tmp_path, members):
    debris = {f"./._{name}": b"\x00\x05\x16\x07" for name in members}
    both = {
        key: value
        for name in members
        for key, value in ((f"./._{name}", debris[f"./._{name}"]), (f"./{name}", members[name]))
    }
    path = tar(tmp_path / "s.tar", {**both, "__MACOSX/._a.webp": b"x"})
    assert [record.texts for record, _ in readers.read(path)] == [("one",), ("two",), (), ()]


def test_unsorted_shards_wait_within_bounds(tmp_path, members, monkeypatch):
    monkeypatch.setattr(shards, "MAX_WAITING_BYTES", 2 * len(members["a.webp"]) + 100)
    filler = {f"z{k}.webp": members["a.webp"] for k in range(3)}
    path = tar(tmp_path / "s.tar", {"a.webp": members["a.webp"], **filler, "a.txt": b"late"})
    reasons = {
        record.file_name.rpartition("/")[2]: getattr(media, "reason", "")
        for record, media in readers.read(path)
    }
    assert "sort the shard by name" in reasons["a.webp"]


def test_files_without_content_wait_within_bounds(tmp_path, monkeypatch):
    """A compressed shard may hold a hundred million empty files."""
    monkeypatch.setattr(shards, "MAX_WAITING_BYTES", 100 * 1024)
    path = tar(tmp_path / "s.tar", {f"{number}.txt": b"" for number in range(300)})
    reasons = [media.reason for _, media in readers.read(path)]
    assert len(reasons) == 300
    assert 200 < sum("sort the shard by name" in reason for reason in reasons) < 300


def test_a_sample_of_many_files_has_bounds(tmp_path, monkeypatch):
    """Of several clips the content of one is in memory; texts are small; other files are not remembered for ever."""
    monkeypatch.setattr(shards, "MAX_FILES", 10)
    sample = shards._Sample("a")
    for number in range(100):
        sample.add(f".{number}", b"x" * 1000)
    for suffix in (".jpg", ".mp4", ".png", ".webm", ".txt"):
        sample.add(suffix, suffix.encode() * 1000)
    assert (len(sample.files), sample.media_suffix) == (15, ".mp4")
    contents = {suffix: content for suffix, content in sample.files.items() if content}
    assert contents == {".mp4": b".mp4" * 1000, ".txt": b".txt" * 1000}
    assert sample.num_bytes == sum(map(len, contents.values())) + 15 * (1024 + 1)
    monkeypatch.setattr(shards, "MAX_TEXT_BYTES", 100)
    path = tar(tmp_path / "s.tar", {"a.webp": b"x" * 200, "a.txt": b"x" * 101, "a.json": b'{"caption": "b"}'})
    (problem, (record, media)) = readers.read(path)
    assert problem[1].reason == "has 101 bytes, expected at most 100"
    assert (record.texts, media) == (("b",), b"x" * 200)


def test_shards_of_any_case_are_read(tmp_path, members):
    path = tar(tmp_path / "S.TAR", members)
    assert [record.texts for record, _ in readers.read(path)] == [("one",), ("two",), (), ()]


def test_shards_take_the_video_and_not_its_thumbnail(tmp_path, folder):
    clip = add_clip(folder / "clip.mp4").read_bytes()
    path = tar(tmp_path / "s.tar", {"a.jpg": b"x", "a.mp4": clip, "a.txt": b"x"})
    ((record, media),) = readers.read(path)
    assert record.file_name.endswith("a.mp4") and media == clip


@pytest.mark.parametrize("caption", [b"gr\xfcn", b"\xff\xfeg\0", b"a\0"])
def test_broken_captions_in_shards_are_named(tmp_path, members, caption):
    path = tar(tmp_path / "s.tar", {**members, "a.txt": caption})
    reasons = [media.reason for _, media in readers.read(path) if isinstance(media, Problem)]
    assert any("expected UTF-8 text" in reason for reason in reasons)


def test_archive_bombs_are_named_and_end(tmp_path, members, monkeypatch):
    monkeypatch.setattr(shards, "MAX_FILE_BYTES", 2**20)

    class Zeros(io.RawIOBase):
        def read(self, size=-1) -> bytes:
            return bytes(size)

    def bomb(path, size: int, *, name="x.webp", kind=tarfile.REGTYPE):
        with tarfile.open(path, "w:gz", compresslevel=9) as file:
            info = tarfile.TarInfo(name)
            info.size, info.type = size, kind
            file.addfile(info, Zeros())
        return path

    reasons = [media.reason for _, media in readers.read(bomb(tmp_path / "file.tar.gz", 2**24))]
    assert reasons[0] == "has 16777216 bytes, expected at most 1048576"
    assert "more than 200 times as large as the file" in reasons[1]
    monkeypatch.setattr(shards, "MAX_FILE_BYTES", 2**25)
    (reason,) = [media.reason for _, media in readers.read(bomb(tmp_path / "zeros.tar.gz", 2**24))]
    assert "more than 200 times as large as the file" in reason
    (reason,) = [
        media.reason
        for _, media in readers.read(bomb(tmp_path / "name.tar.gz", 2**24, kind=tarfile.GNUTYPE_LONGNAME))
    ]
    assert "cannot read the shard: " in reason
    path = tar(tmp_path / "huge.tar", members)
    with path.open("r+b") as file:
        header = tarfile.TarInfo("a.webp")
        header.size = 2**50
        file.write(header.tobuf(tarfile.GNU_FORMAT))
    reasons = [media.reason for _, media in readers.read(path)]
    assert reasons[0].startswith("has 1125899906842624 bytes") and "cannot read the shard" in reasons[1]


def test_members_that_are_no_files_are_named(tmp_path, members):
    path = tar(tmp_path / "s.tar", members)
    with tarfile.open(path, "a") as file:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
            info = tarfile.TarInfo(f"e{number}.mp4")
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    reasons = [media.reason for _, media in readers.read(path) if isinstance(media, Problem)]
    assert sum(reason.startswith("is a link, a sparse or a special file") for reason in reasons) == 4


def test_shards_that_end_early_are_named(tmp_path, members):
    """`tarfile` takes a damaged or missing header for the end of the archive."""
    path = tar(tmp_path / "s.tar", members)
    content = path.read_bytes()
    end = content.index(b"b.webp\0")
    for damaged, reason in (
        (content[:end], "it ends without the mark of an archive's end"),
        (content[: end + 100], "it ends without the mark of an archive's end"),
        (content[:end] + b"x" + content[end + 1 :], "a damaged header; the files after it are not read"),
        (content + content, "more content after the end, as in joined archives"),
    ):
        path.write_bytes(damaged)
        clips = list(readers.read(path))
        assert clips[0][0].texts == ("one",)
        assert reason in clips[-1][1].reason and clips[-1][1].file_name == str(path)
    path.write_bytes(content)
    assert not any("cannot read" in getattr(media, "reason", "") for _, media in readers.read(path))


def test_ranges_of_shards_are_bounded():
    with pytest.raises(
        ValueError, match=r"\{0\.\.9999999999\} stands for 10000000000 shards; expected 1 to 1000000"
    ):
        readers.expand_braces("https://host/{0..9999999999}.tar")
    with pytest.raises(ValueError, match=r"\{3\.\.1\} stands for 0 shards"):
        readers.expand_braces("s/{3..1}.tar")


def test_signatures_of_addresses_are_not_passed_on(tmp_path, members):
    import fsspec

    assert shards.without_secrets(
        "GET https://me:pw@host/a%20b/{0..3}.tar?X-Sig=1&b=2#c failed, s3://k:s@b/x"
    ) == ("GET https://host/a%20b/{0..3}.tar failed, s3://b/x")
    assert shards.without_secrets("a.tar?x 12:30@x") == "a.tar?x 12:30@x"
    path = tar(tmp_path / "s.tar", members)
    fsspec.filesystem("memory").pipe("/web/s.tar?sig=secret", path.read_bytes())
    problems = pack(
        "memory://web/{s..s}.tar?sig=secret".replace("{s..s}", "s"), tmp_path / "store", size=32, fps=8
    )
    assert len(problems) == 2
    written = b"".join(file.read_bytes() for file in (tmp_path / "store").iterdir() if file.is_file())
    assert (
        b"secret" not in written
        and "secret" not in repr(problems)
        and b"memory://web/s.tar/a.webp" in written
    )
    with pytest.raises(ValueError, match="none of 1 files can be used") as error:
        pack("memory://web/none.tar?sig=secret", tmp_path / "other", size=32, fps=8)
    assert "secret" not in str(error.value)
