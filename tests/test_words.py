"""Composed clips show what their captions say, their combinations are held out, and the measures of adherence see what is shown."""

import io
import json
import re
import tarfile
from collections import Counter
from dataclasses import replace

import compose
import numpy as np
import pytest
import splits
import wordings
from PIL import Image, ImageDraw

from latent_shift.data.records import Record
from latent_shift.data.store_writer import PIXELS, StoreWriter, store_folder
from latent_shift.evaluation import adherence, clip_metrics, detection, protocols
from latent_shift.evaluation.evaluate import evaluate
from latent_shift.evaluation.systems import System

ENTRIES = [
    {"label": label, "hexcode": f"1F{number:03X}", "group": 3 + number % 5, "tags": []}
    for number, label in enumerate(
        ["red apple", "dog face", "crossed swords", "mouse", "person: blond hair", "pizza"] * 4
    )
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as fetch.py writes it: stills with no symmetry, in one colour each, and two animations."""
    folder = tmp_path_factory.mktemp("emoji")
    for name in ("stills", "clips", "packages"):
        (folder / name).mkdir()
    records = []
    for number, entry in enumerate(ENTRIES):
        image = Image.new("RGBA", (96, 96))
        draw = ImageDraw.Draw(image)
        corners = np.random.default_rng(number).integers(8, 88, (5, 2))
        draw.polygon(
            [(10, 80), *map(tuple, corners[:3].tolist()), (85, 60), (70, 85)], fill=(40, 90, 230, 255)
        )
        draw.ellipse((45, 55, 60, 70), fill=(20, 40, 150, 255))
        image.save(folder / "stills" / f"{entry['hexcode'].lower()}.webp", lossless=True)
        if number == 1:
            turning = image
    moved = [turning.rotate(12 * number) for number in range(4)]
    for code in ("1f000", "1f001"):
        path = folder / "clips" / f"{code}.webp"
        moved[0].save(path, save_all=True, append_images=moved[1:], duration=125, lossless=True)
        records.append({"file_name": f"clips/{path.name}", "split": "train", "text": ["red apple"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    body = json.dumps(ENTRIES).encode()
    with tarfile.open(folder / "packages" / "emojibase-data-1.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("package/en/data.json")
        member.size = len(body)
        tar.addfile(member, io.BytesIO(body))
    return folder


@pytest.fixture(scope="module")
def world(data):
    things, weights = compose.open_things(data)
    return things, weights, compose.Cutouts(data, things)


@pytest.mark.parametrize("motion", list(wordings.VERBS))
def test_each_motion_is_seen_as_it_is_drawn(world, motion):
    *_, cutouts = world
    for number, background in enumerate(["", "yellow"]):
        frames = compose.render(
            compose.Scene(("1f001",), motion, background=background), cutouts, np.random.default_rng(number)
        )
        assert frames.shape == (16, 128, 128, 3)
        seen = detection.detected(frames)
        assert (seen["motion"], seen["background"]) == (detection.CLASSES[motion], background or "white")


def test_colours_and_numbers_are_seen_as_they_are_drawn(world):
    *_, cutouts = world
    for number, colour in enumerate(detection.HUES):
        frames = compose.render(
            compose.Scene(("1f001",), colour=colour), cutouts, np.random.default_rng(number)
        )
        assert detection.detected(frames)["colour"] == colour
    for number in (1, 2, 3):
        scene = compose.Scene(("1f001",), "spin", count=number)
        seen = detection.detected(
            compose.render(scene, cutouts, np.random.default_rng(number)), f"{number}x1"
        )
        assert (seen["number"], seen["motion"]) == (str(number), "spin")


def test_noise_and_nothing_are_no_motion():
    noise = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), np.uint8)
    assert detection.detected(noise)["motion"] == "other"
    assert detection.detected(np.full((16, 64, 64, 3), 200, np.uint8))["motion"] == "other"
    one_colour = np.full((16, 64, 64, 3), 255, np.uint8)
    one_colour[:, 20:40, 20:40] = 90
    assert detection.detected(one_colour)["motion"] == "still"


@pytest.mark.parametrize("shape", ["ellipse", "rectangle"])
def test_what_looks_alike_turned_is_not_seen_to_turn(shape):
    def clip(place=lambda k: (0, 0), side=lambda k: 40, grey=lambda k: 90, noise=0.0):
        frames = []
        for k in range(16):
            image = Image.new("RGB", (128, 128), "white")
            (x, y), half = place(k), side(k) / 2
            getattr(ImageDraw.Draw(image), shape)(
                (64 + x - half, 64 + y - half, 64 + x + half, 64 + y + half), fill=(grey(k),) * 3
            )
            frames.append(np.asarray(image) + np.random.default_rng(k).normal(0, noise, (128, 128, 3)))
        return np.stack(frames).clip(0, 255).astype(np.uint8)

    def motion(frames):
        return detection.detected(frames)["motion"]

    assert motion(clip()) == motion(clip(noise=1)) == "still"
    assert motion(clip(lambda k: (3 * k - 22, 0))) == "right"
    assert motion(clip(lambda k: (0, 22 - 3 * k))) == "up"
    assert motion(clip(side=lambda k: 24 + 4 * k)) == "grow"
    assert motion(clip(lambda k: (0, -16 * abs(np.sin(k * np.pi / 8))))) == "bounce"
    assert motion(clip(grey=lambda k: 90 + 10 * (k % 3))) in ("other", "still")
    blink = clip()
    blink[7] = 255
    assert motion(blink) not in ("flip", "spin", "swing")


def test_equal_things_in_a_row_are_counted_and_no_others():
    thing = np.full((24, 18, 3), 255, np.uint8)
    thing[2:20, 3:15] = (200, 40, 40)
    thing[2:9, 3:9] = (20, 40, 200)

    def number(*rows):
        frame = np.full((128, 128, 3), 255, np.uint8)
        for y, row in enumerate(rows):
            for x, part in enumerate(row):
                top, left = (2 * y + 1) * 64 // len(rows) - 12, (2 * x + 1) * 64 // len(row) - 9
                frame[top : top + 24, left : left + 18] = part
        return detection.detected(np.stack([frame] * 4))["number"]

    other = np.full((24, 18, 3), 255, np.uint8)
    other[10:14, 2:17] = (30, 160, 40)
    assert [number([thing] * n) for n in (1, 2, 3, 4, 6)] == ["1", "2", "3", "4", "6"]
    assert number([thing, thing], [thing, thing]) == "4"
    assert number([thing, other]) == "1"


def test_rank_among_the_next_rows():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((30, 64))
    names = np.array([f"{k % 15}" for k in range(30)])
    assert clip_metrics.retrieval_ranks(real, real, names=names, num=20).tolist() == [1] * 30
    others = clip_metrics.retrieval_ranks(np.roll(real, 3, axis=0), real, names=names, num=20)
    assert others.mean() > 5
    # Features that are all equal recognise nothing.
    assert clip_metrics.retrieval_ranks(np.ones((30, 64)), np.ones((30, 64)), names=names, num=20).min() == 19


def test_cut_outs_are_alike_wherever_a_thing_is(world):
    *_, cutouts = world
    rng = np.random.default_rng(0)
    white = detection.cut_out(compose.render(compose.Scene(("1f001",), "stay still"), cutouts, rng))
    moved = detection.cut_out(
        compose.render(compose.Scene(("1f001",), "slide left", background="red"), cutouts, rng)
    )
    assert np.abs(white.astype(int) - moved).mean() < 12
    two = compose.render(compose.Scene(("1f001", "1f002"), beside=False), cutouts, rng)
    below = detection.cut_out(detection.cells(two, "1x2")[1])
    second = detection.cut_out(compose.render(compose.Scene(("1f002",), "stay still"), cutouts, rng))
    assert np.abs(second.astype(int) - below).mean() < 12 < np.abs(white.astype(int) - below).mean()


def test_scenes_follow_from_a_seed_and_no_held_out_pair_is_trained_on(data, monkeypatch):
    monkeypatch.setattr(compose, "is_held_out", lambda name: splits.is_held_out(name, 30))  # of few things
    trained = [compose.compose(data, 1, number) for number in range(30)]
    held_out = [compose.compose(data, compose.VALIDATION, number) for number in range(20)]
    kinds = [record.labels["held_out"] for record, _ in held_out]
    assert kinds == [*compose.HELD_OUT]
    record, frames = compose.compose(data, 1, 3)
    assert record == trained[3][0] and np.array_equal(frames, trained[3][1])
    for record, frames in (*trained, *held_out):
        assert (frames.shape, frames.dtype) == ((16, 128, 128, 3), np.uint8)
        assert len(set(record.texts)) == len(record.texts) >= 1
        labels = record.labels
        for text in record.texts:
            words = [
                labels["colour"],
                labels["background"],
                wordings.NUMBERS.get(int(labels["number"] or 0), ""),
            ]
            assert all(re.search(rf"\b{word}\b", text) for word in words if word not in ("", "white")), (
                words,
                text,
            )
    assert {record.split for record, _ in held_out} == {"val_words"}
    for record, _ in trained:
        assert record.split == "train" and record.labels["held_out"] == ""
        # Each thing with what is seen of its motion, whatever the motion is called and whichever thing comes first.
        for thing in record.labels["thing"].split():
            alone = compose.Scene((thing,), record.labels["motion"])
            assert not alone.held_out
    one, two = compose.Scene(("1f001", "1f002"), "fall"), compose.Scene(("1f002", "1f001"), "slide down")
    assert one.held_out == two.held_out


def test_a_scene_is_clear(world):
    things, _, cutouts = world
    apple, swords, blue_thing = "1f000", "1f002", "1f005"
    is_clear = lambda **scene: compose.is_clear(compose.Scene(**scene), things, cutouts)  # noqa: E731
    assert is_clear(things=(blue_thing,), colour="green", background="yellow")
    assert not is_clear(things=(blue_thing,), colour="blue")  # as it is
    assert not is_clear(things=(apple,), colour="green")  # "a green red apple"
    assert not is_clear(things=(blue_thing,), background="blue")
    assert not is_clear(things=(swords,), count=2)  # "two crossed swords" is one of them
    assert not is_clear(things=(blue_thing,), count=2, motion="slide left")


@pytest.mark.parametrize(
    ("noun", "several", "article"),
    [
        ("mouse", "mice", "a mouse"), ("slice of pizza", "slices of pizza", "a slice of pizza"), ("berry", "berries", "a berry"),
        ("crossed swords", None, "crossed swords"), ("ox", "oxen", "an ox"), ("unicorn", "unicorns", "a unicorn"),
        ("person with a beard", "people with a beard", "a person with a beard"), ("flag of Chile", "flags of Chile", "a flag of Chile"), ("man climbing", "men climbing", "a man climbing"), ("woman scientist", None, "a woman scientist"),
        ("people hugging", None, "people hugging"), ("leaf fluttering in wind", "leaves fluttering in wind", "a leaf fluttering in wind"),
        ("person lifting weights", "people lifting weights", "a person lifting weights"), ("rhinoceros", "rhinoceroses", "a rhinoceros"),
        ("hourglass done", "hourglasses done", "an hourglass done"), ("umbrella", "umbrellas", "an umbrella"), ("ewe", "ewes", "a ewe"),
        ("UFO", "UFOs", "a UFO"), ("OK hand", "OK hands", "an OK hand"), ("X-ray image", "X-ray images", "an X-ray image"),
        ("Christmas tree", "Christmas trees", "a Christmas tree"), ("Santa Claus", None, "Santa Claus"), ("snowman", "snowmen", "a snowman"),
        ("T-Rex", "T-Rexes", "a T-Rex"), ("one o’clock", None, "a one o’clock"), ("1st place medal", None, "a 1st place medal"),
    ],
)  # fmt: skip
def test_names_in_number_and_with_articles(noun, several, article):
    assert wordings.plural(noun) == several
    assert wordings.with_article(noun) == article


def test_names_are_nouns_and_synonyms():
    assert wordings.names("man: bald") == ("bald man",)
    assert wordings.names("person: beard") == ("person with a beard",)
    assert wordings.names("flag: Chile") == ("flag of Chile",)
    assert wordings.names("family: man, woman, boy") == ("family of man, woman and boy",)
    assert wordings.names("automobile") == ("automobile", "car")


def test_captions_name_motion_and_thing(world):
    things, *_ = world
    rng = np.random.default_rng(0)
    verbs = {
        motion: {*verb.participles, *verb.singular, *verb.adjectives}
        for motion, verb in wordings.VERBS.items()
    }
    for motion in verbs:
        for text in compose.captions(compose.Scene(("1f005",), motion, background="blue"), things, rng):
            assert "pizza" in text
            assert "blue" in text
            assert any(re.search(rf"\b{word}\b", text) for word in verbs[motion]), text


def test_splits():
    held = [code for code in map(str, range(2000)) if splits.split_of_concept(code, "", 9) == "val_concept"]
    assert 120 < len(held) < 200
    assert all(splits.split_of_concept(code, "", 3) == "train" for code in held)
    assert splits.split_of_file(held[0], "", 9, held[0], is_clip=True) == "val_concept"
    animations = [
        code
        for code in map(str, range(2000))
        if splits.split_of_file(code, "", 3, code, is_clip=True) == "val_animation"
    ]
    assert 60 < len(animations) < 140
    assert all(splits.split_of_file(code, "", 3, code, is_clip=False) == "train" for code in animations)
    # What is measured was trained on.
    assert len(splits.measured_captions()) == 100
    assert all(
        splits.split_of_file(code, "rocket", 9, code, is_clip=True) == "train"
        for code in (*held, *animations)
    )
    toned = Counter(
        splits.split_of_file(str(k), "rocket", 1, f"{k}-1f3fb", is_clip=False) for k in range(1000)
    )
    assert set(toned) == {"train", "val_combo"}
    assert 20 < toned["val_combo"] < 90


def test_protocol_of_words_counts_what_is_right(data, tmp_path, monkeypatch):
    """Real clips are right in everything; without words nothing is."""
    scenes = [
        compose.Scene(("1f001",), "spin", background="yellow"), compose.Scene(("1f002",), "grow"), compose.Scene(("1f003",), colour="green"),
        compose.Scene(("1f001",), "fall", count=3), compose.Scene(("1f002", "1f003")), compose.Scene(("1f003",), "fade out", background="red"),
        compose.Scene(("1f001",), colour="red"), compose.Scene(("1f001",), count=2), compose.Scene(("1f003", "1f004"), beside=False),
    ]  # fmt: skip
    things, _ = compose.open_things(data)
    cutouts, rng = compose.Cutouts(data, things), np.random.default_rng(0)
    with store_folder(tmp_path / "packed", PIXELS, source="") as (out, stale):
        writer = StoreWriter(out)
        for number, scene in enumerate(scenes):
            record = Record(
                str(number), (f"prompt {number}",), str(number), "val_words", labels=compose.labels(scene)
            )
            writer.add(record, compose.render(scene, cutouts, rng))
        writer.close(stale=stale, dtype="uint8", fps=8, size=128, source="")
    monkeypatch.setattr(adherence, "NUM_CANDIDATES", 10)
    protocol = protocols.open_protocol("words", tmp_path / "packed")
    assert (protocol.metadata["complete"], len(protocol.prompts)) == (False, 9)
    clips = {prompt: protocol.real(k) for k, prompt in enumerate(protocol.prompts)}
    real = System(
        "right", "right", 8.0, 0, {}, lambda prompts, _: np.stack([clips[prompt] for prompt in prompts]), None
    )
    white = replace(
        real,
        name="white",
        generate=lambda prompts, _: np.full((len(prompts), 16, 128, 128, 3), 255, np.uint8),
    )

    def values(system):
        result = evaluate(system, protocol, tmp_path / "evals")
        assert not result["skipped"]
        assert all(
            record["samples"] == record["clips"]
            for record in result["records"]
            if "chance" not in record["measure"]
        )
        return {record["measure"]: (record["value"], record["clips"]) for record in result["records"]}

    of_real = values(real)
    for kind, num in (
        ("motion", 4),
        ("colour", 2),
        ("background", 2),
        ("number", 2),
        ("thing", 7),
        ("company", 2),
    ):
        assert of_real[f"adherence_{kind}"] == (1.0, num)
    assert of_real["adherence_motion_chance"][0] == 0.25
    of_white = values(white)
    assert all(of_white[f"adherence_{kind}"][0] == 0 for kind in ("motion", "colour", "background", "number"))
    assert of_white["adherence_thing"][0] < 1  # whatever is seen in white: five of ten are right by chance
    with pytest.raises(ValueError, match="has 9 labelled clips of split val_words, 10 are needed"):
        protocols.open_protocol("words", tmp_path / "packed", num=10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"thing": "1f34e 1f415"}, "2 things in a layout of 1x1"),
        ({"motion": "spin", "held_out": "Motion"}, "held_out 'Motion': expected one kind of word"),
        ({"held_out": "motion"}, "held_out is motion, but there is no motion"),
        ({"motion": "dance"}, "motion 'dance': expected one of spin"),
        ({"layout": "2x2"}, "layout '2x2': expected 1x1"),
    ],
)
def test_labels_that_no_measure_knows_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        detection.check_labels(labels, "here")


@pytest.mark.parametrize("duration", [20, 25, 40, 42, 50])
def test_frames_of_an_animation_are_those_of_their_time(duration, tmp_path):
    frames = [Image.new("RGBA", (8, 8), (5 * index, 0, 0, 255)) for index in range(1000 // duration)]
    frames[0].save(
        tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=duration, lossless=True
    )
    shown = [frame.getpixel((0, 0))[0] // 5 for frame in compose.read_animation(tmp_path / "a.webp")]
    assert shown == [125 * index % (duration * len(frames)) // duration for index in range(16)]
