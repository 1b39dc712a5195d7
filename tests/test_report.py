"""The page shows the results of evaluations, refers to nothing outside of it, and has labels for screen readers."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from test_cli import run

from latent_shift import video
from latent_shift.benchmark.training import runs
from latent_shift.evaluation import evaluate, protocols, systems
from latent_shift.evaluation.evaluate import add_paired_differences
from latent_shift.report.page import _enlarge, report

SWEEP = {
    "processor": "a CPU", "threads": 2, "device": "cpu", "torch": "2", "date": "2026-01-01", "dtype": "float32", "limits": {"flops_per_s": 1e11, "bytes_per_s": 1e10},
    "points": [
        {"line": "frames", "name": name, "frames": n, "side": 16, "seconds": n * k, "ratio": k, "share_of_the_roofline": 0.5}
        for k, name in ((1, "Latent-Shift"), (2, "AnimateDiff (UNetMotionModel)"))
        for n in (1, 16)
    ] + [{"line": "frames", "name": "AnimateDiff (UNetMotionModel)", "frames": 64, "cannot": "at most 32 frames"}],
    "whole clips": [{"model": "emoji", "frames": 16, "seconds_a_clip": 12.34, "clips_per_s": 0.1}],
    "memory": [{"name": "Latent-Shift", "frames": n, "side": 16, "gib_peak": 0.5 + n / 100} for n in (1, 16)],
}  # fmt: skip


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def evals(packed, video_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evals")
    task = protocols.open_protocol("own", packed, num=2, num_frames=4)
    for name, guidance in (("b", 1.0), ("a <shift>", 3.0)):
        system = systems.open_system(
            str(video_model),
            name=name,
            num_frames=4,
            num_inference_steps=1,
            guidance_scale=guidance,
            device="cpu",
        )
        evaluate.evaluate(system, task, folder / "compare")
    classes = protocols.open_protocol("classes", packed, num=2, num_frames=4)
    evaluate.evaluate(system, classes, folder / "classes")
    return folder


def test_report_shows_every_result(evals, packed, video_model, tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps(SWEEP))
    (tmp_path / "training.json").write_text(json.dumps(runs([video_model.parent])))
    path = report(
        tmp_path / "page", evals / "compare", show=["b", "a <shift>"], ablations=[evals / "compare"], training=tmp_path / "training.json",
        classes=evals / "classes", sweeps=[tmp_path / "sweep.json"] * 2, rows=2,
    )  # fmt: skip
    text = path.read_text()
    page = Page(text)
    assert page.all("html")[0]["lang"] == "en" and page.all("main")
    # Two prompts of two systems and of real clips, and two classes of four seeds.
    assert len(page.all("video")) == 2 * (2 + 1) + 2 * 4
    for element in (*page.all("video"), *page.all("img")):
        assert (path.parent / element["src"]).exists()
    for element in page.all("video"):
        assert element["aria-label"] and (path.parent / element["poster"]).exists()
        assert {"muted", "loop", "playsinline"} <= element.keys()
        frames, fps = video.read(path.parent / element["src"])
        assert frames.shape == (4, 128, 128, 3) and fps == pytest.approx(8)
    assert len(page.all("img")) == 4 and all(image["alt"] for image in page.all("img"))
    heads = re.findall(r'<th scope="col">([^<]*)<small>', text)
    assert heads[:3] == ["b", "a &lt;shift&gt;", "real clips"]  # in the order asked for, and escaped
    real = protocols.open_protocol("own", packed, num=2, num_frames=4).real(1)
    poster = np.asarray(Image.open(path.parent / page.all("video")[5]["poster"]))
    assert np.array_equal(poster, real[0].repeat(4, axis=0).repeat(4, axis=1))
    assert "Latent-Shift, 0.3 M parameters, 32x32, 1 steps, guidance 1" in text
    assert (
        "caption retrieval, top 1 \u2191" in text
        and "flicker, grey levels =" in text
        and "motion error, factor \u2193" in text
    )
    assert (
        "<dt>flicker, grey levels</dt><dd>mean absolute second difference" in text
        and text.count("<dt>motion R²</dt>") == 1
    )
    assert "<li>kd-efficientnet-lite0: the kernel distance needs three samples" in text  # there are two clips
    assert re.search(r'<th scope="row">per-frame motion R² at t = 875</th>', text)  # without an arrow
    assert (
        "By a &lt;shift&gt; (Latent-Shift, 0.3 M parameters, 32x32, 1 steps, guidance 3), 4 frames each"
        in text
    )
    assert len(page.all("figure")) == 2 * 4
    named = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(named) == len(set(named)) > 40  # including those in plots
    assert text.count("From a prompt to a clip, decoded: emoji, 16 frames 12.3 s.") == 2
    assert "Latent-Shift 0.66 at 16" in text and "limits are\n100 GFLOP/s and 10 GB/s;" in text
    results = json.loads((evals / "compare" / "b" / "results.json").read_text())
    (energy,) = [record for record in results["records"] if record["measure"] == "motion_energy"]
    (share, alike) = next(
        record["noise"] for record in results["records"] if record["measure"] == "denoising_error"
    )
    noise = "independent from frame to frame"
    if share or alike:
        noise = f"of which frames share {share:.0%}, with a correlation of {alike:g} from frame to frame in the rest"
    description = f"a part of protocol own. Denoising error and motion R² are measured on real clips under noise {noise}."
    assert text.count(f"2 clips of 4 frames a system, {description}") == 2  # also above the ablation
    assert (
        f"<td>{energy['value']:.4g} <small>{energy['low']:.4g} to {energy['high']:.4g}</small></td>" in text
    )
    (trained,) = runs([video_model.parent])
    assert f"<td>{trained['steps']}</td><td>{trained['loss']:.4f}</td><td></td>" in text
    energy = next(
        record
        for record in add_paired_differences(results_of(evals), evals / "compare")[1]["records"]
        if record["measure"] == "motion_energy"
    )["more"]
    assert (
        f"{energy['value']:+.3g} ({energy['low']:+.3g} to {energy['high']:+.3g})</small>" in text
        and "<b>" not in text
    )
    assert "clipsim" in text and "CLIPModel" in text  # what was not measured, and why
    outside = re.sub(
        r"http://www\.w3\.org/\S+|http://purl\.org/\S+|https://matplotlib\.org/?|http://creativecommons\.org/\S+",
        "",
        text,
    )
    assert "http" not in outside


def test_report_merges_training_seeds(evals, tmp_path):
    """Systems of one group share a column of the table, with mean and range over the seeds."""
    shutil.copytree(evals / "compare", tmp_path / "compare")
    for name, copy in (("a-shift", "a-seed-1"), ("b", "seed-2")):
        shutil.copytree(tmp_path / "compare" / name, tmp_path / "compare" / copy)
        path = tmp_path / "compare" / copy / "results.json"
        result = json.loads(path.read_text())
        result["system"]["system"] = copy
        for record in result["records"]:
            record["value"] = record["value"] + 100 if record["measure"] == "flicker" else record["value"]
        path.write_text(json.dumps(result))
    options = {"show": ["b", "a <shift>", "a-seed-1", "seed-2"], "rows": 1}
    text = report(
        tmp_path / "one", tmp_path / "compare", seeds={"b": ["seed-2"], "a <shift>": ["a-seed-1"]}, **options
    ).read_text()
    table = text[text.index('id="numbers"') :]
    assert re.findall(r'<th scope="col">([^<]*)<small>', table) == ["b", "a &lt;shift&gt;", "real clips"]
    assert table.count("2 training seeds") == 2 and "the least and greatest over the seeds" in table
    flicker = values_of(evals, "b")["flicker"]
    assert f"{flicker + 50:.4g} <small>({flicker:.4g} to {flicker + 100:.4g})</small>" in table
    by_name = report(tmp_path / "two", tmp_path / "compare", **options).read_text()
    assert re.findall(r'<th scope="col">([^<]*)<small>', by_name[by_name.index('id="numbers"') :])[:4] == [
        "b",
        "a &lt;shift&gt;",
        "a-seed-1",
        "seed-2",
    ]
    with pytest.raises(
        ValueError, match="--seeds: no results of c; expected some of a <shift>, a-seed-1, b, seed-2"
    ):
        report(tmp_path / "three", tmp_path / "compare", seeds={"b": ["c"]}, **options)


def values_of(evals, name) -> dict[str, float]:
    result = json.loads((evals / "compare" / name / "results.json").read_text())
    return {record["measure"]: record["value"] for record in result["records"]}


def results_of(evals) -> list[dict]:
    return [json.loads((evals / "compare" / name / "results.json").read_text()) for name in ("b", "a-shift")]


def test_stills_equal_clips_of_one_frame(evals, video_model):
    still = np.asarray(Image.open(evals / "compare" / "b" / "stills" / "000000.png"))
    words = json.loads((evals / "compare" / "prompts.json").read_text())[0]
    one = systems.open_system(
        str(video_model), num_frames=1, num_inference_steps=1, guidance_scale=1.0, device="cpu"
    )
    np.testing.assert_array_equal(one.generate([words], [0])[0, 0], still)


def test_report_times_script_by_frame_rates(evals, tmp_path):
    """A system may generate fewer frames a second than the real clips have."""
    shutil.copytree(evals / "compare", tmp_path / "compare")
    path = tmp_path / "compare" / "b" / "results.json"
    result = json.loads(path.read_text())
    result["system"]["fps"] = 4.0
    path.write_text(json.dumps(result))
    page = report(tmp_path / "page", tmp_path / "compare", rows=1).read_text()
    assert "4 frames at 4 or 8 fps" in re.sub(r"\s+", " ", page)
    assert "const frame = 0.25, slack = 0.03125;" in page


def test_report_shows_saved_real_clips_only(evals, tmp_path):
    shutil.copytree(evals / "compare", tmp_path / "compare")
    seen = []
    for number in (0, 1):
        (tmp_path / "compare" / "real" / "clips" / f"{number:06}.png").unlink()
        page = report(tmp_path / "page", tmp_path / "compare", rows=2).read_text()
        seen.append(
            (
                "real clips<small>of the same prompts" in page,
                page.count('<span class="quiet">none</span>'),
                page.count("<video"),
            )
        )
    assert seen == [(True, 1, 5), (False, 0, 4)]


def test_report_deletes_clips_that_it_shows_no_more(evals, tmp_path):
    report(tmp_path / "page", evals / "compare", classes=evals / "classes", rows=1)
    (tmp_path / "page" / "clips" / "mine.mp4").write_bytes(b"mine")
    page = report(tmp_path / "page", evals / "compare", show=["b"], rows=1)
    clips = {path.name for path in (tmp_path / "page" / "clips").iterdir()}
    shown = set(re.findall(r"clips/([^\"]+)", page.read_text(encoding="utf-8")))
    assert shown and clips == shown | {"mine.mp4"}


def test_report_separates_clips_of_two_evaluations(evals, tmp_path):
    for name, source in (("one", "compare"), ("two", "classes")):
        shutil.copytree(evals / source, tmp_path / name / "same")
    path = report(
        tmp_path / "page",
        tmp_path / "one" / "same",
        show=["a <shift>"],
        classes=tmp_path / "two" / "same",
        rows=2,
    )
    files = [path.parent / video["src"] for video in Page(path.read_text()).all("video")]
    assert len(set(files)) == len(files) == 2 * (1 + 1) + 8
    (first,) = {each.parent for each in files}
    kept = np.stack(
        [
            evaluate.SavedClips(tmp_path / name / "same" / "a-shift" / "clips", 4)(0)[0]
            for name in ("one", "two")
        ]
    )
    shown = np.stack(
        [np.asarray(Image.open(first / f"{name}-a-shift-000.png")) for name in ("compared", "classes")]
    )
    np.testing.assert_array_equal(shown, kept.repeat(4, axis=1).repeat(4, axis=2))


def test_enlarge_repeats_pixels():
    clip = np.arange(2 * 64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 64, 64, 3)
    large = _enlarge(clip)
    assert large.shape == (2, 128, 128, 3)
    np.testing.assert_array_equal(large[:, ::2, 1::2], clip)
    assert _enlarge(large) is large


def run_and_read(out, evals, *options) -> str:
    run("report", out / "one", evals / "compare", "--rows", 1, *options)
    return (out / "one" / "index.html").read_text()


def test_report_command_and_errors(evals, tmp_path):
    printed = run(
        "report", tmp_path / "page", evals / "compare", "--rows", 1, "--title", "mine", "--note", "of <mine>"
    )
    assert printed.strip() == str(tmp_path / "page" / "index.html")
    assert (
        "<title>mine</title>" in (text := (tmp_path / "page" / "index.html").read_text())
        and "of &lt;mine&gt;</p>" in text
    )
    with pytest.raises(ValueError, match=r"no \*/results\.json"):
        report(tmp_path / "page", tmp_path)
    assert "shift&gt;" not in run_and_read(tmp_path, evals, "--show", "b")
    with pytest.raises(ValueError, match="has no c; expected a <shift>, b"):
        report(tmp_path / "page", evals / "compare", show=["b", "c"])
    with pytest.raises(ValueError, match="has 2 clips a system, 3 rows asked for"):
        report(tmp_path / "page", evals / "compare", rows=3)


def test_report_refuses_a_missing_clip_of_a_system(evals, tmp_path):
    """Real clips may be missing: protocols of public sets save none."""
    shutil.copytree(evals / "compare", tmp_path / "compare")
    shutil.rmtree(tmp_path / "compare" / "real")
    page = Page(report(tmp_path / "page", tmp_path / "compare", rows=2).read_text())
    assert len(page.all("video")) == 2 * 2
    (tmp_path / "compare" / "b" / "clips" / "000001.png").unlink()
    with pytest.raises(ValueError, match=r"000001\.png: no such clip; expected all that b was measured on"):
        report(tmp_path / "page", tmp_path / "compare", rows=2)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("results.json", lambda result: [], "expected a JSON object"),
        ("results.json", lambda result: {**result, "records": {}}, "records: Input should be a valid list"),
        ("results.json", lambda result: {**result, "records": [{"measure": "fvd"}]}, "0.value: Field required"),
        ("results.json", lambda result: {**result, "system": {**result["system"], "fps": "8"}}, r"system\.fps: Input should be a valid number"),
        ("../prompts.json", lambda prompts: {"a": 1}, "Input should be a valid list"),
    ],
)  # fmt: skip
def test_report_names_damaged_files_of_an_evaluation(file, change, message, evals, tmp_path):
    folder = shutil.copytree(evals / "compare", tmp_path / "compare")
    path = next(folder.glob("*/results.json")).parent / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message) as error:
        report(tmp_path / "page", folder, rows=2)
    assert path.name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [([], "Input should be a valid dictionary"), ({**SWEEP, "points": [{"line": "side", "name": "a"}]}, "expected side in a point")],
)  # fmt: skip
def test_report_names_a_damaged_sweep(sweep, message, evals, tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    with pytest.raises(ValueError, match=message):
        report(tmp_path / "page", evals / "compare", sweeps=[tmp_path / "sweep.json"], rows=2)
