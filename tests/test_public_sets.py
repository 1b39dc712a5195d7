"""The recipes for UCF-101, WebVid and MSR-VTT, each with one command, on small data sets in the layouts of the originals."""

import json

import numpy as np
import pytest
from test_cli import run
from test_finetune import RECIPE, TINY, checkpoint  # noqa: F401 (a fixture)
from test_readers import write_shard

from latent_shift import video
from latent_shift.data.latents import LatentStore

RECIPES = RECIPE.parent
SMALL = [*TINY, "optim.optimizer=adamw", "data.batch_size=2", "data.size=32"]


def moving_square(seed: int, *, height: int = 48, width: int = 64) -> np.ndarray:
    frames = np.full((24, height, width, 3), 255, np.uint8)
    for k in range(24):
        frames[k, 8:24, k : k + 16] = np.random.default_rng(seed).integers(0, 200, 3)
    return frames


def clip_bytes(folder, seed: int, **size: int) -> bytes:
    """Return the content of an .mp4 with a moving square."""
    path = video.write(moving_square(seed, **size), folder / "clip.mp4", fps=8)
    content = path.read_bytes()
    path.unlink()
    return content


def ucf101(folder):
    for number, (action, name) in enumerate(
        (("Archery", "Archery"), ("HandstandPushups", "HandStandPushups"), ("YoYo", "YoYo"))
    ):
        for group in (1, 8):
            path = folder / "UCF-101" / action / f"v_{name}_g{group:02}_c01.avi"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(clip_bytes(folder, 10 * number + group))
    lists = folder / "ucfTrainTestlist"
    lists.mkdir()
    names = [path.relative_to(folder / "UCF-101") for path in sorted(folder.rglob("*.avi"))]
    (lists / "trainlist01.txt").write_text("".join(f"{name} 1\n" for name in names if "_g08_" in name.name))
    (lists / "testlist01.txt").write_text("".join(f"{name}\n" for name in names if "_g01_" in name.name))
    return folder


def webvid(folder):
    for shard in range(2):
        samples = {}
        for number in range(3):
            caption = f"{'left' if number else 'some'} square {shard}"
            metadata = {"caption": caption, "videoid": number, "page_dir": "0", "status": "success"}
            width, height = (96, 64) if number == 2 else (64, 96)
            samples[f"{shard:05}{number:04}"] = {
                ".mp4": clip_bytes(folder, 10 * shard + number, width=width, height=height),
                ".txt": caption.encode(),
                ".json": json.dumps(metadata).encode(),
            }
        write_shard(folder / f"{shard:05}.tar", samples)
    return f"{folder}/{{00000..00001}}.tar"


def msrvtt(folder, split="train", wordings=1):
    videos = [{"video_id": f"video{number}", "split": split, "id": number} for number in range(3)]
    sentences = [
        {
            "caption": f"square {number}" + ", again" * wording,
            "video_id": f"video{number}",
            "sen_id": 3 * wording + number,
        }
        for wording in range(wordings)
        for number in range(3)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "train_val_videodatainfo.json").write_text(
        json.dumps({"info": {}, "videos": videos, "sentences": sentences})
    )
    for number in range(3):
        video.write(moving_square(number), folder / "TrainValVideo" / f"video{number}.mp4", fps=8)
    return folder


@pytest.mark.parametrize(
    ("recipe", "write_data"),
    [
        ("ucf101", ucf101),
        pytest.param("webvid-sd15", webvid, marks=pytest.mark.slow),
        pytest.param("webvid-sd15", msrvtt, marks=pytest.mark.slow),
    ],
)
def test_train_runs_the_recipe_of_a_public_data_set(recipe, write_data, checkpoint, tmp_path):  # noqa: F811
    (tmp_path / "data").mkdir()
    source = write_data(tmp_path / "data")
    overrides = [*SMALL, *(["data.aspects=8"] if recipe == "webvid-sd15" else ["train.val_batches=1"])]
    output = run(
        "train",
        RECIPES / f"{recipe}.toml",
        f"data={source}",
        f"model={checkpoint}",
        *overrides,
        "--run",
        tmp_path / "run",
    )
    assert output.strip().endswith(str(tmp_path / "run" / "model"))
    store = LatentStore(tmp_path / "run" / "latents")
    captions = {record.texts[0] for record in store.records}
    rows = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    if write_data is ucf101:
        assert captions == {
            "A person is doing archery",
            "A person is doing handstand pushups",
            "A person is playing with a yo-yo",
        }
        assert sorted(record.split for record in store.records) == 6 * ["test"] + 6 * [
            "train"
        ]  # with mirror images
        assert "val_loss" in rows[-1]
    elif write_data is webvid:
        assert len(store.records) == 6 + 2  # two of six captions name no direction
        assert len({store.frame_shape(index) for index in range(8)}) == 2
        assert store.embed(["some square 0, 4 fps"]).any()
    else:
        assert captions == {"square 0", "square 1", "square 2"}
