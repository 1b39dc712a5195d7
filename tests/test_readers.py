"""Every layout of captioned videos that can be read."""

import csv
import gzip
import http.server
import io
import json
import tarfile
import threading

import fsspec
import numpy as np
import pytest
from test_video import counting_clip
from typer.testing import CliRunner

from latent_shift import video
from latent_shift.cli.main import app
from latent_shift.data import readers
from latent_shift.data.check import check
from latent_shift.data.pack import pack
from latent_shift.data.records import Problem
from latent_shift.data.store import Store


def records(path):
    return [
        record
        for record, media in readers.read(path)
        if not (isinstance(media, Problem) and media.outcome == "ignored")
    ]


def texts_and_media(source):
    """Return the captions of each sample with its content, or with the reason why there is none."""
    return [(record.texts, getattr(media, "reason", media)) for record, media in readers.read(source)]


def test_read_media_with_caption_files(tmp_path):
    video.write(counting_clip(16), tmp_path / "sub" / "a.mp4")
    (tmp_path / "sub" / "a.txt").write_text("a cat\nthe same cat\n")
    video.write(counting_clip(16), tmp_path / "b.webm")
    assert [(record.file_name, record.texts) for record in records(tmp_path)] == [
        ("b.webm", ()),
        ("sub/a.mp4", ("a cat", "the same cat")),
    ]
    counts, problems = check(tmp_path)
    assert counts == {"clips": 1, "stills": 0, "skipped": 1, "concepts": 1}
    assert problems == [Problem("b.webm", "no caption")]
    (tmp_path / "sub" / "a.txt").unlink()
    with pytest.raises(
        ValueError,
        match=r"expected metadata.jsonl or metadata.csv, .tar shards, UCF-101, MSR-VTT, or media files",
    ):
        readers.read(tmp_path)
    with pytest.raises(ValueError, match="gone: no such folder"):
        readers.read(tmp_path / "gone")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "clips.jsonl", "clips.csv"])
def test_read_tables(tmp_path, name):
    rows = [
        {"file_name": "sub/a.mp4", "text": "a cat, seen", "concept": "cat", "split": "val", "loop": True},
        {"file_name": "b.mp4", "text": "a dog"},
    ]
    with (tmp_path / name).open("w", newline="") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\n".join(map(json.dumps, rows)))
    cat, dog = readers.read(tmp_path if name.startswith("metadata") else tmp_path / name)
    assert cat == (
        readers.Record("sub/a.mp4", ("a cat, seen",), "cat", "val", True),
        tmp_path / "sub" / "a.mp4",
    )
    assert dog == (readers.Record("b.mp4", ("a dog",), "a dog"), tmp_path / "b.mp4")


def test_read_table_names_invalid_lines(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "a"}\n{"file_name": "b.mp4"}\n')
    (record, _), (_, problem) = list(readers.read(tmp_path))[:2]
    assert record.file_name == "a.mp4" and problem.file_name == "metadata.jsonl:2"
    assert "expected file_name and text, got {'file_name': 'b.mp4'} (no 'text')" in problem.reason
    (tmp_path / "list.csv").write_text("file_name,caption\na.mp4,a\n")
    with pytest.raises(
        ValueError, match=r"list.csv: expected the columns file_name and text, got 'file_name, caption'"
    ):
        readers.read(tmp_path / "list.csv")
    with pytest.raises(ValueError, match=r"none.csv: no such file"):
        readers.read(tmp_path / "none.csv")


def test_read_treats_null_as_absent_and_logs_as_no_annotations(tmp_path):
    """pandas writes null for an empty cell."""
    row = {"file_name": "a.mp4", "text": "x", "concept": None, "split": None, "loop": None}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    ((record, _),) = readers.read(tmp_path)
    assert record == readers.Record("a.mp4", ("x",), "x")
    for name, value in (("file_name", 5), ("split", 3), ("loop", 2)):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({**row, name: value}))
        ((_, problem),) = readers.read(tmp_path)
        assert problem.file_name == "metadata.jsonl:1"
        assert "file_name and split must be text, loop must be true or false" in problem.reason
    (tmp_path / "metadata.jsonl").rename(tmp_path / "log.json")
    (tmp_path / "log.json").write_text('{"info": 1}\n{"info": 2}\n')
    video.write(np.zeros((2, 8, 8, 3), np.uint8), tmp_path / "b.mp4")
    (tmp_path / "b.txt").write_text("y")
    assert [
        (record.file_name, getattr(media, "outcome", "read")) for record, media in readers.read(tmp_path)
    ] == [
        ("b.mp4", "read"),
        ("log.json", "ignored"),
    ]
    assert readers.find_splits(tmp_path) == {"train"}
    assert readers.find_splits("x-{0..3}.tar") is None


def test_read_csv_keeps_commas_and_line_breaks_in_captions(tmp_path):
    table = tmp_path / "list.csv"
    table.write_text('file_name,text\na.mp4,"one, two\nthree"\nb.mp4,\nc.mp4,line\u2028separator\n')
    assert [record.texts for record, _ in readers.read(table)] == [
        ("one, two\nthree",),
        (),
        ("line\u2028separator",),
    ]
    table.write_text("file_name,text\na.mp4,a cat, seen from above, by day\n")
    ((_, problem),) = readers.read(table)
    assert "2 more columns than the header; a comma in a caption needs quotes" in problem.reason


@pytest.mark.parametrize(
    ("loop", "expected"),
    [(word, True) for word in ("1", "1.0", "True ", "Y", "on", "t", " YES")]
    + [(word, False) for word in ("0", "0.0", "False", "n", "OFF", "f", "no ", "", " ")],
)
def test_read_csv_takes_usual_spellings_of_loop(tmp_path, loop, expected):
    (tmp_path / "list.csv").write_text(f"file_name,text,loop\na.mp4,x,{loop}\n")
    ((record, media),) = readers.read(tmp_path / "list.csv")
    assert (record.loop, media) == (expected, tmp_path / "a.mp4")


@pytest.mark.parametrize("loop", ["2", "maybe", "nan"])
def test_read_csv_names_the_row_of_another_loop(tmp_path, loop):
    (tmp_path / "list.csv").write_text(f"file_name,text,loop\na.mp4,x,{loop}\n")
    ((_, problem),) = readers.read(tmp_path / "list.csv")
    assert problem.file_name == "list.csv:2"
    assert "loop must be true or false" in problem.reason


def test_read_tables_refuse_a_column_twice(tmp_path):
    table = tmp_path / "list.csv"
    for header in ("file_name,text,text", "file_name, text,split,text ", "file_name,text,split,split"):
        table.write_text(f"{header}\na.mp4,x,y,z\n")
        with pytest.raises(ValueError, match=r"list.csv: has 2 columns (text|split); expected one, rename"):
            readers.read(table)
    table.write_text("file_name,text,,\na.mp4,x,,\n")  # a spreadsheet's empty columns
    ((record, _),) = readers.read(table)
    assert record.texts == ("x",)
    rows = tmp_path / "list.jsonl"
    rows.write_text('{"file_name": "a.mp4", "text": "x", "text": "y"}\n')
    ((_, problem),) = readers.read(rows)
    assert "'text' comes 2 times; expected it once" in problem.reason


def test_read_tables_strip_names_and_say_what_is_in_two_splits(tmp_path):
    table = tmp_path / "metadata.csv"
    table.write_text(
        "file_name ,text,split,concept\na.mp4 ,x,train ,cat \na.mp4,x,val,\n./a.mp4,y,train,\nb.mp4,x,Train,\nc.mp4,x,Train,\n"
    )
    clips = list(readers.read(table))
    assert clips[0] == (readers.Record("a.mp4", ("x",), "cat", "train"), tmp_path / "a.mp4")
    assert [media for _, media in clips[5:]] == [
        Problem("a.mp4", "in split val, also in split train; a held-out clip must be in one split alone", "kept"),
        Problem("metadata.csv", "split Train differs from split train in capitals alone, and is another split", "kept"),
    ]  # fmt: skip
    assert readers.find_splits(table) == {"train", "val", "Train"}
    video.write(counting_clip(16), tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    counts, problems = check(tmp_path)
    assert counts == {"clips": 4, "stills": 0, "skipped": 1, "concepts": 3}
    assert Problem("a.mp4", "duplicate of a.mp4 in split train", "kept") in problems
    assert Problem("b.mp4", "duplicate of a.mp4 in split train", "kept") in problems
    assert pack(tmp_path, tmp_path / "store", size=16, fps=8)[-2:] == [media for _, media in clips[5:]]


SEPARATORS = "a\u2028b\u2029c\x0bd\x0ce\x85f\x1cg"


def test_captions_end_at_line_ends_alone(tmp_path, clip):
    """`str.splitlines` would make seven captions of one."""
    folder = tmp_path / "media"
    (folder / "clip.txt").write_bytes(f"{SEPARATORS}\r\ntwo\rthree\n\n".encode())
    expected = (SEPARATORS, "two", "three")
    ((record, _),) = readers.read(folder)
    assert record.texts == expected
    shard = write_shard(tmp_path / "0.tar", {"0": {".mp4": clip, ".txt": (folder / "clip.txt").read_bytes()}})
    ((record, _),) = readers.read(shard)
    assert record.texts == expected
    row = json.dumps({"file_name": "a.mp4", "text": SEPARATORS}, ensure_ascii=False)
    (tmp_path / "list.jsonl").write_bytes(f"{row}\r\n\r{row}\r".encode())
    assert [record.texts for record, _ in readers.read(tmp_path / "list.jsonl")] == [(SEPARATORS,)] * 2


def test_read_refuses_other_files(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"clip.mp4: expected a folder, a .jsonl or .csv table or .tar shards"
    ):
        readers.read(tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match=r"none: no such folder"):
        readers.read(tmp_path / "none")


def write_shard(path, samples):
    """Write `samples`, {key: {suffix: content}}, as WebDataset's writer does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for key, parts in samples.items():
            for suffix, content in parts.items():
                member = tarfile.TarInfo(key + suffix)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def clip(tmp_path):
    return video.write(counting_clip(16), tmp_path / "media" / "clip.mp4").read_bytes()


@pytest.fixture
def shards(tmp_path, clip):
    folder = tmp_path / "shards"
    write_shard(
        folder / "web-000.tar",
        {
            "000": {".json": json.dumps({"caption": "a counter", "width": 32}).encode(), ".mp4": clip},
            "001": {".mp4": clip, ".txt": b"counting\nnumbers\n", ".json": b"{}"},
            "sub/002.first": {".mp4": clip, ".txt": b"no sample: the key ends at the first dot"},
        },
    )
    write_shard(
        folder / "web-001.tar",
        {"003": {".txt": b"words alone"}, "004": {".mp4": clip}, "005": {".MP4": clip, ".txt": b"loud"}},
    )
    return folder


def test_read_shards(shards, tmp_path):
    clips = list(readers.read(shards))
    assert [record.texts for record, _ in clips[:2]] == [("a counter",), ("counting", "numbers")]
    assert all(isinstance(media, bytes) for _, media in clips[:2])
    assert clips[2][1].reason.startswith("no media among")
    compressed = tmp_path / "web.tar.gz"
    compressed.write_bytes(gzip.compress((shards / "web-000.tar").read_bytes()))
    assert texts_and_media(compressed) == texts_and_media(shards)[:3]
    for caption in ([None, 3, " x "], 5, None):
        write_shard(
            tmp_path / "bad" / "0.tar",
            {"0": {".json": json.dumps({"caption": caption}).encode(), ".mp4": b""}},
        )
        ((record, _),) = readers.read(tmp_path / "bad")
        assert record.texts == (("x",) if isinstance(caption, list) else ())
    problems = pack(shards, tmp_path / "store", size=16, fps=8)
    assert [(name.rpartition("shards/")[2], reason) for name, reason, _ in problems] == [
        ("web-000.tar/sub/002", "no media among .first.mp4, .first.txt"),
        ("web-001.tar/003", "no media among .txt"),
        ("web-001.tar/004.mp4", "no caption"),
    ]
    store = Store(tmp_path / "store")
    assert [record.texts[0] for record in store.records] == ["a counter", "counting", "loud"]
    assert store.num_frames == 3 * 16


def test_read_shards_names_the_second_clip_of_a_sample(tmp_path, clip):
    path = write_shard(
        tmp_path / "0.tar",
        {
            "x": {".mp4": clip, ".webm": clip, ".jpg": b"a thumbnail", ".txt": b"red"},
            "y": {".png": b"", ".jpg": b"", ".txt": b"blue"},
        },
    )
    reason = "a second clip of its sample; {} is read"
    assert [(record.file_name.removeprefix(f"{path}/"), media) for record, media in readers.read(path)] == [
        ("x.mp4", clip), ("x.webm", Problem(f"{path}/x.webm", reason.format("x.mp4"))),
        ("y.png", b""), ("y.jpg", Problem(f"{path}/y.jpg", reason.format("y.png"))),
    ]  # fmt: skip


def test_read_shards_from_urls_with_ranges(shards):
    files = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        files.pipe(f"/web/{path.name}", path.read_bytes())
    remote = texts_and_media("memory://web/web-{000..001}.tar")
    assert remote == texts_and_media(shards / "web-{000..001}.tar")
    assert len(remote) == 6
    result = CliRunner().invoke(app, ["data", "check", f"file://{shards}/web-{{000..001}}.tar"])
    assert result.output.splitlines()[-1] == "3 clips, 0 stills, 3 skipped, 3 concepts, 5 with problems"
    assert readers.expand_braces("a{1..2}-{08..10}.tar") == [
        f"a{i}-{j}.tar" for i in (1, 2) for j in ("08", "09", "10")
    ]


def test_read_shards_from_a_server_that_breaks_off(shards):
    cut = {"/web-001.tar"}

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("?")[0]
            content = (shards / name[1:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if name in cut else content)

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/web-{{000..001}}.tar?signature=1"
        broken = list(readers.read(url))
        cut.clear()
        complete = list(readers.read(url))
        complete_texts = texts_and_media(url)
    finally:
        server.shutdown()
        server.server_close()
    assert complete_texts == texts_and_media(shards / "web-{000..001}.tar")
    assert broken[-1][1].reason.startswith("cannot read the shard: ")
    assert [media for _, media in broken[:2]] == [media for _, media in complete[:2]]
    assert "signature" not in repr(broken) + repr(complete)


def test_read_shards_reports_broken_shards_and_reads_the_others(shards):
    content = (shards / "web-000.tar").read_bytes()
    (shards / "web-000.tar").write_bytes(content[: len(content) // 2])
    (shards / "web-002.tar").write_bytes(b"no tar at all")
    clips = list(readers.read(shards))
    errors = [
        (record.file_name.rpartition("/")[2], media)
        for record, media in clips
        if isinstance(media, Problem) and "the shard" in media.reason
    ]
    assert [name for name, _ in errors] == ["web-000.tar", "web-002.tar"]
    assert any(record.texts == ("loud",) for record, _ in clips)
    ((_, error),) = list(readers.read(shards / "web-{7..7}.tar"))
    assert error.reason.startswith("cannot read the shard: [Errno 2]")
    with pytest.raises(ValueError, match="Protocol not known: nowhere"):
        list(readers.read("nowhere://web.tar"))


def test_read_shards_never_completes_a_sample_from_the_next_shard(tmp_path, clip):
    """A shard ends inside the caption of a sample, and the next one begins with a file of the same key."""
    path = write_shard(
        tmp_path / "web" / "0.tar",
        {"0": {".mp4": clip, ".txt": b"first"}, "1": {".mp4": clip, ".txt": b"x" * 5000}},
    )
    path.write_bytes(path.read_bytes()[:-15_000])  # a tar file is padded to 10,240 bytes
    write_shard(tmp_path / "web" / "1.tar", {"1": {".txt": b"second"}, "2": {".mp4": clip, ".txt": b"third"}})
    clips = list(readers.read(tmp_path / "web"))
    assert [record.texts for record, media in clips if isinstance(media, bytes)] == [("first",), ("third",)]
    assert clips[1][1].reason.startswith("cannot read the shard: ")
    assert clips[2][1].reason == "no media among .txt"


def test_read_ucf101_as_unpacked(tmp_path):
    sentences = readers.ucf101_sentences()
    assert len(sentences) == 101
    assert len(set(sentences.values())) == 101
    content = video.write(
        counting_clip(8), tmp_path / "clip.mp4"
    ).read_bytes()  # FFmpeg detects the container by its content
    for action, group in (("ApplyEyeMakeup", 1), ("ApplyEyeMakeup", 8), ("YoYo", 9)):
        path = tmp_path / "UCF-101" / action / f"v_{action}_g{group:02}_c01.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "clip.mp4").unlink()
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text(
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\nYoYo/v_YoYo_g09_c01.avi 101\n"
    )
    (lists / "testlist01.txt").write_text("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\n")
    (lists / "trainlist02.txt").write_text("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi 1\n")
    clips = records(tmp_path)
    assert [(record.texts[0], record.split) for record in clips] == [
        ("A person is applying eye makeup", "test"), ("A person is applying eye makeup", "train"), ("A person is playing with a yo-yo", "train"),
    ]  # fmt: skip
    assert [record.concept for record in clips] == ["ApplyEyeMakeup", "ApplyEyeMakeup", "YoYo"]
    stands = (
        tmp_path / "stands" / "HandstandPushups" / "v_HandStandPushups_g01_c01.avi"
    )  # the capitals of this class differ
    stands.parent.mkdir(parents=True)
    stands.write_bytes(content)
    assert [(record.concept, record.texts) for record in records(tmp_path / "stands")] == [
        ("HandstandPushups", (sentences["HandstandPushups"],))
    ]
    stands.unlink()
    assert check(tmp_path, min_frames=2) == (
        {"clips": 3, "stills": 0, "skipped": 0, "concepts": 2},
        [
            Problem(record.file_name, f"duplicate of {clips[0].file_name} in split test", "kept")
            for record in clips[1:]
        ],
    )
    other = tmp_path / "UCF-101" / "Sleeping" / "v_Sleeping_g01_c01.avi"
    other.parent.mkdir()
    other.write_bytes(b"")
    problem = Problem("UCF-101/Sleeping/v_Sleeping_g01_c01.avi", "Sleeping is not one of the 101 classes")
    assert problem in check(tmp_path, min_frames=2)[1]


def test_read_msrvtt_as_unpacked(tmp_path):
    rows = {
        "info": {"year": "2016"},
        "videos": [
            {
                "video_id": f"video{number}",
                "split": split,
                "category": 1,
                "url": "",
                "start time": 0.0,
                "end time": 1.0,
                "id": number,
            }
            for number, split in ((10, "test"), (2, "validate"), (1, "train"))
        ],
        "sentences": [
            {"caption": caption, "video_id": name, "sen_id": number}
            for number, (name, caption) in enumerate(
                [("video1", "one "), ("video10", "ten"), ("video1", "a first one"), ("video2", "two")]
            )
        ],
    }
    (tmp_path / "annotation").mkdir()
    (tmp_path / "annotation" / "MSR_VTT.json").write_text(json.dumps(rows))
    (tmp_path / "annotation" / "notes.json").write_text("[]")
    for number in (1, 10):
        video.write(counting_clip(8), tmp_path / "videos" / "all" / f"video{number}.mp4")
    assert [(record.file_name, record.texts, record.split) for record in records(tmp_path)] == [
        ("videos/all/video1.mp4", ("one", "a first one"), "train"),
        ("video2", ("two",), "val"),
        ("videos/all/video10.mp4", ("ten",), "test"),
    ]
    assert pack(tmp_path, tmp_path / "store", size=16, fps=8, workers=2) == [
        Problem("video2", "no such video"),
        Problem("annotation/notes.json", "neither a video, a picture nor a caption", "ignored"),
    ]
    assert np.array_equal(Store(tmp_path / "store").window(0, 0, 1).shape, (1, 16, 16, 3))


def test_read_tables_say_what_differs_in_capitals_alone_in_either_order(tmp_path):
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,text,split\na.mp4,x,Train\nb.mp4,x,train\nc.mp4,x,TRAIN\n")
    problems = [str(media) for _, media in readers.read(table) if isinstance(media, Problem)]
    assert [problem.split()[2] for problem in problems] == ["train", "TRAIN"]
    assert all("differs from split Train in capitals alone" in problem for problem in problems)
