"""Benchmarks time the right networks, called as their pipelines call them."""

import contextlib
import copy
import ctypes
import json
import platform

import numpy as np
import pytest
import torch
from test_cli import run
from test_finetune import RECIPE
from tiny import traced

from latent_shift.benchmark import gpu, networks, step, throughput
from latent_shift.benchmark import memory as benchmark_memory
from latent_shift.benchmark.memory import _long_clip, long_clips, training_memory
from latent_shift.benchmark.roofline import Work
from latent_shift.benchmark.step import shift_overhead
from latent_shift.benchmark.throughput import encoding, index
from latent_shift.benchmark.timing import run_alone
from latent_shift.benchmark.training import resuming, runs, training_step
from latent_shift.models import sizes
from latent_shift.recipe import load
from latent_shift.runtime import has_bf16_units, peak_memory_gib
from latent_shift.shift import Shift, frames, inflate
from latent_shift.training import memory


# In bf16 where a CPU has units for it: without them this takes minutes.
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {"dtype": torch.bfloat16 if has_bf16_units() else torch.float32, "channels_last": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_against_peers_times_networks_of_the_same_widths(options):
    result = step.against_peers(num_frames=2, text_length=8, rounds=1, **options)
    ours, image, attention, animatediff, modelscope = result.values()
    assert image["parameters"] < attention["parameters"]
    assert (ours["ratio"], ours["parameters"]) == (1, image["parameters"])
    assert image["parameters"] < animatediff["parameters"] < modelscope["parameters"]
    assert all(each["seconds"] > 0 for each in result.values())


def test_shift_adds_no_flops_and_few_bytes():
    """Counted work does not depend on the machine: at the size of Stable Diffusion 1.5 the shift reads and writes 1.6 %
    more than the same U-Net frame by frame; one more copy would be 3 %."""
    with torch.device("meta"):
        plain = networks.FULL.image_unet().eval()
        latents, text = torch.empty(16, 4, 32, 32), torch.empty(16, 77, 768)
    shifted, works = inflate(copy.deepcopy(plain), Shift()), []
    for network, together in ((plain, contextlib.nullcontext()), (shifted, frames(shifted, 16))):
        with Work({"flops_per_s": 1.0, "bytes_per_s": 1.0}) as work, torch.no_grad(), together:
            network(latents, 500, text)
        works.append(work)
    assert works[0].flops == works[1].flops > 1e12
    assert 1 < works[1].bytes / works[0].bytes < 1.02


def test_shift_overhead_asks_for_a_size_where_the_model_has_none():
    with pytest.raises(ValueError, match="expected size"):
        shift_overhead(unet=sizes.unet("tiny", sample_size=None))


@pytest.mark.slow
def test_shift_overhead_is_a_few_percent():
    """The time of a step with the shift is within a few percent of the same U-Net frame by frame (alone: 0.4 %). The least
    ratio of three tries counts, because other work on the machine disturbs it."""
    ratios = []
    for _ in range(3):
        result = shift_overhead(num_frames=16, size=16, text_length=8, rounds=5)
        ratios.append(
            [
                result[name]["ratio"]
                for name in ("with the shift", "with the shift, one text a clip as the pipeline has it")
            ]
        )
        if (np.min(ratios, axis=0) < 1.1).all():
            return
    raise AssertionError(f"a step with the shift takes {np.min(ratios, axis=0)} of one without")


def test_savings_times_equal_computations(monkeypatch):
    def outputs(calls, rounds):
        made = [call() for call in calls.values()]
        return [
            torch.cat([each.sample for each in out]) if isinstance(out, list) else out.sample for out in made
        ]

    monkeypatch.setattr(step, "time_in_rounds", outputs)
    once, each, twice = step.savings(num_frames=2, text_length=8)
    torch.testing.assert_close(each, once, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(twice, once, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["whole", "chunks", "stream"])
def test_long_clip_returns_a_row(video_model, mode):
    row = _long_clip(str(video_model), mode, 3)
    assert (row["mode"], row["frames"]) == (mode, 3) and row["seconds"] > 0


@pytest.mark.slow
def test_long_clips_measures_every_mode(video_model):
    whole, chunks, stream = long_clips(str(video_model), num_frames=(3,))
    assert [each["mode"] for each in (whole, chunks, stream)] == ["whole", "chunks", "stream"]
    assert all(0.1 < each["gib_peak"] < 8 for each in (whole, chunks, stream))


def test_run_alone_has_its_own_peak_memory():
    """The ballast of this process does not count."""
    ballast = b"1" * 1_500_000_000
    assert run_alone(peak_memory_gib) < 1
    del ballast


@pytest.mark.slow  # imports torch in another process; its fast twin is the test above
def test_run_alone_sets_the_allocator_of_training(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    assert run_alone(_mapped_blocks) in (0, None)


def _mapped_blocks() -> int | None:
    """Return how many mappings of their own 64 MiB take; None without glibc."""
    if platform.libc_ver()[0] != "glibc":
        return None
    names = [
        "arena",
        "ordblks",
        "smblks",
        "hblks",
        "hblkhd",
        "usmblks",
        "fsmblks",
        "uordblks",
        "fordblks",
        "keepcost",
    ]
    fields = [(name, ctypes.c_size_t) for name in names]
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = type("Info", (ctypes.Structure,), {"_fields_": fields})
    before = libc.mallinfo2().hblks
    block = torch.empty(2**26, dtype=torch.uint8)
    mapped = libc.mallinfo2().hblks - before
    del block
    return mapped


@pytest.mark.slow
def test_training_memory_shrinks_with_checkpointing_and_lora():
    """Estimated at the size of Stable Diffusion 1.5; nothing is allocated."""
    result = training_memory()
    totals = [each["total"] for each in result.values()]
    assert len(totals) == 4
    assert result["LoRA of rank 32, checkpointing"]["total"] == min(totals)
    assert result["every weight"]["total"] == max(totals)
    assert result["every weight"]["weights"] == pytest.approx(859_520_964 * 4 / 2**30)


def test_training_memory_estimates_the_recipe(monkeypatch):
    asked = []
    monkeypatch.setattr(
        benchmark_memory.memory,
        "estimate",
        lambda config, unet, **shape: asked.append(config) or memory.Estimate(0, 0, 0, 0, 0),
    )
    training_memory()
    recipe = load(RECIPE)
    for config in asked:
        assert config.model.model_copy(update={"init": recipe.model.init}) == recipe.model
        assert (config.data.batch_size, config.data.num_frames) == (
            recipe.data.batch_size,
            recipe.data.num_frames,
        )
        assert (config.optim.accumulate, config.optim.optimizer) == (
            recipe.optim.accumulate,
            recipe.optim.optimizer,
        )
        assert config.train.precision == recipe.train.precision


@pytest.mark.slow  # five networks of 34 M parameters
def test_bench_gpu_is_rehearsed_on_a_cpu():
    steps = gpu.compare_steps(
        full=False, loads=[(1, 8)], num_frames=2, rounds=1, device="cpu", dtype=torch.float32, compiled=False
    )
    (load,) = steps.values()
    assert {"frame by frame", "with the shift", "AnimateDiff (UNetMotionModel)"} < load["step"].keys()
    clip = gpu.clip_of_four_steps(
        full=False, side=8, num_frames=2, rounds=1, device="cpu", dtype=torch.float32
    )
    assert all(each["seconds"] > 0 for each in clip.values())


def test_bench_peers_prints_what_it_writes(monkeypatch, tmp_path):
    def against_peers(**options):
        return {"options": sorted(map(str, options))}

    monkeypatch.setattr(step, "against_peers", against_peers)
    monkeypatch.setattr(step, "savings", lambda **options: options)
    result = json.loads(run("bench", "peers", "--frames", 3, "-o", tmp_path / "peers.json"))
    assert result == json.loads((tmp_path / "peers.json").read_text())
    assert len([name for name in result if name.startswith(("float32", "bfloat16"))]) == 4
    assert result["guided step"]["num_frames"] == 3


def test_bench_runs_compares_training_runs(image_model, video_model, tmp_path):
    printed = run("bench", "runs", image_model.parent, video_model.parent, "-o", tmp_path / "runs.json")
    assert len(printed.strip().splitlines()) == 4
    image, clips = json.loads((tmp_path / "runs.json").read_text())
    rows = [json.loads(line) for line in (video_model.parent / "stats.jsonl").read_text().splitlines()]
    assert image["parameters"] == clips["parameters"] == sizes.num_parameters(sizes.unet("tiny"))
    assert clips["steps"] == 4 and clips["val_loss"] is None
    assert clips["loss"] == pytest.approx((rows[2]["loss"] + rows[3]["loss"]) / 2)
    assert clips["gib_peak"] == max(row["gib_peak"] for row in rows) > 0.1
    assert 0 < clips["data_wait_share"] < 1
    with pytest.raises(ValueError, match="holds no model; expected the folder of a completed run"):
        runs([tmp_path])


def test_training_step_returns_times(video_model, monkeypatch):
    graphs: list = []
    monkeypatch.setattr(torch.nn.Module, "compile", traced(graphs))
    found = training_step(str(video_model), clips=2, num_frames=4, rounds=1)
    assert list(found) == [
        "8 images",
        *(
            f"2 clips of 4 frames, {name}"
            for name in ("shift", "none", "attention", "mixed", "shift, compiled")
        ),
    ]
    assert len(graphs) == 1
    assert found["8 images"]["ratio"] == 1 and all(row["seconds"] > 0 for row in found.values())


@pytest.mark.parametrize("workers", [(1,), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_encoding_returns_times(video_model, workers):
    rows = encoding(str(video_model), workers=workers, shards=4, frames_a_shard=4, size=32)
    assert [row["workers"] for row in rows] == list(workers) and rows[0]["efficiency"] == 1
    assert all(row["frames_per_s"] > 0 and row["seconds"] > row["seconds_before_the_first"] for row in rows)


@pytest.mark.slow
def test_resuming_returns_times(video_model):
    found = resuming("tiny", model=str(video_model), num_frames=2, batch_size=1)
    # Parts are timed in processes of their own and need not add up on a busy machine.
    assert set(found) == {"seconds", "of_these_imports", "seconds_a_step", "seconds_of_a_first_start"}
    assert all(value > 0 for value in found.values())


def test_index_returns_times(monkeypatch):
    monkeypatch.setattr(
        throughput, "run_alone", lambda function, *args: function(*args)
    )  # which a test above has
    found = index(300, num_frames=2, clips_a_shard=50, clips_a_part=200)
    assert (found["clips"], found["parts"], found["shards"]) == (300, 2, 6)
    assert all(value >= 0 for value in found.values())
