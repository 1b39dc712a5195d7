"""Fine-tune a checkpoint on a folder of videos to a video model or a LoRA, with the recipe that users run, at tiny size."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel, CLIPTokenizer

from latent_shift.benchmark.hardware import matrix_rate
from latent_shift.config import Config
from latent_shift.data.store import Store
from latent_shift.models import sizes
from latent_shift.pipelines import loading
from latent_shift.pipelines.lora import load_lora
from latent_shift.recipe import load
from latent_shift.runtime import seed
from latent_shift.shift import Shift, shift_of
from latent_shift.training import memory, prepare, stages
from latent_shift.training.loop import train

RECIPE = Path(__file__).parent.parent / "recipes" / "finetune-sd15.toml"
TINY = ["data.num_frames=4", "optim.steps=3", "optim.warmup_steps=1", "optim.accumulate=2", "optim.lr=1e-2", "train.precision=no",
        "train.sample_steps=2", "train.sample_every=2", "train.log_every=1", "optim.ema=0"]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(texts, tmp_path_factory):
    """A Stable Diffusion folder as people have them: created and saved by diffusers alone."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=sizes.autoencoder("tiny"), unet=sizes.unet("tiny", sample_size=4), text_encoder=CLIPTextModel.from_pretrained(texts / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(texts / "tokenizer"), safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    pipe.save_pretrained(folder)
    return folder


def resolved(checkpoint, media, *overrides):
    return load(RECIPE, [f"model={checkpoint}", f"data={media}", *TINY, *overrides])


def image(folder, **changes):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name, value in changes.items():
        getattr(pipe, name)(value)
    return pipe("red", num_inference_steps=2, generator=seed(0), output_type="np").images


def test_recipe_trains_a_video_model_from_a_checkpoint_and_a_folder(checkpoint, media, tmp_path):
    printed = run("train", RECIPE, "--run", tmp_path / "run", f"model={checkpoint}", f"data={media}", *TINY)
    assert "memory of a training step: " in printed
    model = tmp_path / "run" / "model"
    assert printed.splitlines()[-1] == str(model)
    pipe = loading.load(model)
    assert shift_of(pipe.unet) == Shift(edge="hold")
    assert pipe.call_defaults == {
        "num_frames": 4, "fps": 8, "shared_noise": 0.5, "noise_correlation": 0.7, "num_inference_steps": 2, "guidance_scale": 7.5,
        "distilled_steps": 0,
    }  # fmt: skip
    assert not np.allclose(
        image(model), image(checkpoint), atol=1e-3
    )  # the weights changed, and diffusers reads them
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "00000002.png",
        "00000002.webp",
    ]


def test_lora_is_small_resumes_exactly_and_loads_in_diffusers(checkpoint, media, tmp_path):
    settings = resolved(checkpoint, media, "lora.rank=2")
    uninterrupted = train(settings, tmp_path / "uninterrupted") / "pytorch_lora_weights.safetensors"
    part = settings.model_copy(update={"optim": settings.optim.model_copy(update={"steps": 2})})
    train(part, tmp_path / "part")
    saved = load_file(next((tmp_path / "part" / "checkpoints").glob("*/model.safetensors")))
    assert all(".lora_" in name for name in saved)
    resumed = train(settings, tmp_path / "part") / "pytorch_lora_weights.safetensors"
    weights, before = load_file(resumed), load_file(uninterrupted)
    assert weights.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(weights[name], tensor)
    newest = sorted((tmp_path / "part" / "checkpoints").iterdir())[-1] / "model.safetensors"
    (name, tensor), *others = load_file(newest).items()
    save_file(
        {f"{name[:-1]}_": tensor, **dict(others)}, newest, metadata={"format": "pt"}
    )  # the file keeps its size
    with pytest.raises(ValueError, match=r"expected the .* trained tensors of this run"):
        train(settings, tmp_path / "part")
    convolutions = [tensor for name, tensor in weights.items() if "resnets.0.conv1.lora" in name]
    assert convolutions
    assert all(tensor.any() for tensor in convolutions)  # the second matrix starts at zero, so it was trained
    assert not np.allclose(
        image(checkpoint), image(checkpoint, load_lora_weights=str(uninterrupted.parent)), atol=1e-3
    )


@pytest.mark.parametrize("place", ["conv1", pytest.param("conv2", marks=pytest.mark.slow), "end"])
def test_load_lora_restores_shift_and_size(checkpoint, media, tmp_path, place):
    settings = resolved(
        checkpoint,
        media,
        "lora.rank=2",
        "model.forward=0.25",
        f"model.place={place}",
        "data.size=16",
        'lora.modules=["to_q", "conv1"]',
    )
    file = train(settings, tmp_path) / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["latent_shift"])
    pipe = loading.load(checkpoint)
    load_lora(pipe, file)
    assert shift_of(pipe.unet) == Shift(forward=0.25, place=place, edge="hold")
    assert pipe.unet.config.sample_size == 2
    assert pipe.call_defaults["num_frames"] == metadata["num_frames"] == 4
    plain = loading.load(checkpoint)
    clip, without = (
        pipeline(
            "red",
            height=16,
            width=16,
            num_inference_steps=2,
            generator=seed(0),
            num_frames=4,
            output_type="latent",
        ).frames
        for pipeline in (pipe, plain)
    )
    assert not torch.allclose(clip, without, atol=1e-3)
    with pytest.raises(ValueError, match=r"a pickle file can run any program"):
        load_lora(pipe, tmp_path / "lora.ckpt")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_add_lora_freezes_the_model_in_the_precision_of_the_run(checkpoint, media, tmp_path, precision):
    settings = resolved(checkpoint, media, "lora.rank=2", f"train.precision={precision}")
    unet = stages.DenoiserStage(settings, prepare.prepare(settings, tmp_path)).model
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in unet.parameters()}
    assert dtypes == {
        (True, torch.float32),
        (False, {"no": torch.float32, "bf16": torch.bfloat16}[precision]),
    }
    if precision == "bf16":
        assert train(settings, tmp_path / "run").exists()
        assert len(list((tmp_path / "run" / "samples").iterdir())) == 2


def test_prepare_builds_everything_once(checkpoint, media, packed, latents, tmp_path, monkeypatch):
    """A folder of videos, a store of pixels, a store of latents; a checkpoint that is a variant."""
    prepared = prepare.prepare(resolved(checkpoint, media), tmp_path)
    assert prepared == prepare.Prepared(str(tmp_path / "latents"), checkpoint, "no")
    before = (tmp_path / "latents" / "store.json").stat().st_mtime_ns
    assert prepare.prepare(resolved(checkpoint, media), tmp_path) == prepared
    assert prepare.prepare(resolved(checkpoint, prepared.store), tmp_path) == prepared
    assert (tmp_path / "latents" / "store.json").stat().st_mtime_ns == before
    assert set(Store(tmp_path / "pixels").shapes.values()) == {(61, 32, 32, 3)}  # the model's size

    of_pixels = prepare.prepare(resolved(checkpoint, packed), tmp_path / "2")
    assert of_pixels.store == str(tmp_path / "2" / "latents")
    assert not (tmp_path / "2" / "pixels").exists()
    assert prepare.prepare(resolved(checkpoint, latents), tmp_path / "3").store == str(latents)
    assert not (tmp_path / "3").exists()
    with pytest.raises(ValueError, match=r"data\.size has no effect: .* is packed already"):
        prepare.prepare(resolved(checkpoint, packed, "data.size=16"), tmp_path / "4")
    with pytest.raises(ValueError, match=r"data\.mirror has no effect: .* is encoded already"):
        prepare.prepare(resolved(checkpoint, latents, "data.mirror=true"), tmp_path / "4")
    mirrored = prepare.prepare(resolved(checkpoint, packed, "data.mirror=true"), tmp_path / "4")
    assert len(Store(mirrored.store).records) == 2 * len(Store(packed).records)
    assert set(Store(finetune_path(checkpoint, media, tmp_path / "5")).shapes.values()) == {(61, 16, 16, 3)}

    half = tmp_path / "half"
    StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None).to(
        torch.float16
    ).save_pretrained(half, variant="fp16")
    settings = resolved(half, latents)
    of_variant = prepare.prepare(settings, tmp_path / "6")
    assert of_variant.init == tmp_path / "6" / "base"
    assert isinstance(
        stages.DenoiserStage(settings, of_variant).model, UNet2DConditionModel
    )  # an image model fits any edge
    with pytest.raises(ValueError, match=r"was made of .* delete it or choose another folder"):
        prepare.prepare(resolved(checkpoint, media, "data.size=16"), tmp_path)
    for setting in ("data.size=20", "data.aspects=12"):
        with pytest.raises(ValueError, match=f"{setting}: the autoencoder of .* needs a multiple of 8"):
            prepare.prepare(resolved(checkpoint, media, setting), tmp_path / "7")
    assert not (tmp_path / "7").exists()
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents" / "shards").iterdir()}
    prepare.prepare(resolved(checkpoint, media, "data.strides=[1, 2]"), tmp_path)  # encodes captions only
    assert Store(tmp_path / "latents").info["strides"] == [1, 2]
    assert {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents" / "shards").iterdir()
    } == shards
    monkeypatch.setenv("RANK", "1")  # other processes use what the first has built
    assert prepare.prepare(resolved(checkpoint, media), tmp_path) == prepared
    ready, is_enough = tmp_path / "ready", threading.Event()
    waiting = threading.Thread(
        target=lambda: prepare._claim_build(ready, "store.json", {"data": 1}, is_enough.is_set)
    )
    waiting.start()
    ready.mkdir()
    (tmp_path / "ready.json").write_text('{"data": 1}')
    (ready / "store.json").write_text("{}")
    waiting.join(0.6)
    assert waiting.is_alive()  # the store lacks what this process needs
    is_enough.set()
    waiting.join(5)
    assert not waiting.is_alive()


def test_prepare_takes_the_prediction_and_variant_of_init(checkpoint, latents, tmp_path):
    """A checkpoint that says epsilon and predicts v; a folder with plain weights and a variant."""
    options = ["model.prediction=v_prediction", "diffusion.prediction=v_prediction"]
    prepared = prepare.prepare(resolved(checkpoint, latents, *options), tmp_path / "1")
    scheduler = json.loads((prepared.init / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    both = shutil.copytree(checkpoint, tmp_path / "both")
    for file in [*both.rglob("*.safetensors")]:
        zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
        save_file(zeros, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    prepared = prepare.prepare(resolved(both, latents, "model.variant=fp16"), tmp_path / "2")
    assert all(
        not tensor.any()
        for tensor in load_file(next((prepared.init / "unet").glob("*.safetensors"))).values()
    )
    assert prepare.prepare(resolved(both, latents), tmp_path / "3").init == both


def finetune_path(checkpoint, media, run_folder):
    prepare.prepare(resolved(checkpoint, media, "data.size=16"), run_folder)
    return run_folder / "pixels"


def test_prepare_reports_mistakes_before_packing(checkpoint, video_model, media, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "pack", lambda *_, **__: pytest.fail("the data was packed"))
    for options, message in (
        (["data.splits=['trian']"], "has no split trian; expected train, val_concept"),
        (["data.val_splits=['test']"], "has no split test"),
        (
            ["diffusion.prediction=v_prediction"],
            r"diffusion\.prediction is v_prediction, but .* was trained with epsilon",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(resolved(checkpoint, media, *options), tmp_path / "run")
    from_scratch = Config.model_validate(
        {
            "stage": "image",
            "data": {"path": str(media), "size": 32},
            "model": {"size": "tiny"},
            "optim": {"steps": 1000, "lr": 1e-3},
        }
    )
    with pytest.raises(ValueError, match=r"holds no latents, and there is no model\.init to encode it with"):
        train(from_scratch, tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"model\.temporal is none, but .* was trained with shift: set it to that"
    ):
        train(resolved(video_model, media, "model.temporal=none", "model.edge=zero"), tmp_path / "run")
    for options, message in (
        (["lora.rank=2", "model.place=end"], "conv2 shifts and takes no LoRA"),
        (["lora.rank=2", "lora.modules=[]"], "at least 1 item"),
        (["train.shard=true", "train.precision=fp16", "optim.optimizer=adamw"], "expected bf16 or no"),
        (["model.forward=0.6", "model.backward=0.6"], "at most 1 together"),
    ):
        with pytest.raises(ValueError, match=message):
            resolved(checkpoint, media, *options)


def test_train_reports_mistakes(checkpoint, media, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"a lora adds to the weights of a trained denoiser: expected stage image, video or distill, and model\.init",
    ):
        Config.model_validate({"stage": "image", "data": {"path": "x"}, "model": {"size": "tiny"}, "lora": {"rank": 2}, "optim": {"steps": 1000, "lr": 1e-3}})  # fmt: skip
    with pytest.raises(
        ValueError,
        match=r"diffusion\.prediction is v_prediction, but .* was trained with epsilon: set it to that",
    ):
        train(resolved(checkpoint, media, "diffusion.prediction=v_prediction"), tmp_path / "1")
    with pytest.raises(ValueError, match=r"Target modules .*nothing.* not found"):
        train(resolved(checkpoint, media, "lora.rank=2", 'lora.modules=["nothing"]'), tmp_path / "2")
    scratch = {
        "stage": "autoencoder",
        "data": {"path": str(media)},
        "model": {"size": "tiny"},
        "optim": {"steps": 1000, "lr": 1e-3},
    }
    with pytest.raises(ValueError, match=r"a folder of videos needs data\.size"):
        prepare.prepare(Config.model_validate(scratch), tmp_path / "3")
    with pytest.raises(ValueError, match=r"no_such: expected one of emoji, emoji@20, or an existing folder"):
        prepare.prepare(resolved("no_such", media), tmp_path / "4")
    with pytest.raises(ValueError, match=r"with model\.place=end .*conv2 shifts and takes no LoRA"):
        train(resolved(checkpoint, media, "lora.rank=2", "model.place=end"), tmp_path / "2b")
    double = tmp_path / "xl"
    shutil.copytree(checkpoint, double)
    (double / "text_encoder_2").mkdir()
    with pytest.raises(
        ValueError, match="the family of Stable Diffusion XL can generate here, but not be trained"
    ):
        prepare.prepare(resolved(double, media), tmp_path / "5")
    wrong = resolved(checkpoint, media, "lora.rank=3")
    train(wrong, tmp_path / "6")
    with pytest.raises(ValueError, match=r"holds a run with another lora"):
        train(resolved(checkpoint, media, "lora.rank=4"), tmp_path / "6")


@pytest.mark.slow  # its fast twins, the next two, compare with real steps
def test_estimate_counts_what_autograd_keeps(checkpoint, media, tmp_path):
    """The chain's memory is counted by hand; the U-Net's changes with the settings as it must."""
    live = memory._Live()
    x = torch.ones(1000, requires_grad=True)
    with live:
        y = x.exp()  # 4000 bytes, saved for the backward pass
        z = (y * 2).sum()  # 4000 more, freed after the sum
        del y
        z.backward()  # the gradients of y and of x
    assert 12_000 <= live.peak <= 16_100
    assert live.now <= 4_100  # x.grad and z

    def estimate_of(*overrides):
        settings = resolved(checkpoint, media, *overrides)
        return memory.estimate_run(settings, prepare.prepare(settings, tmp_path))

    plain, frozen = estimate_of(), estimate_of("lora.rank=2", "train.precision=bf16")
    number = sizes.num_parameters(sizes.unet("tiny"))
    assert plain.weights == 4 * number
    once = estimate_of("optim.optimizer=adamw", "optim.accumulate=1")
    assert once.optimizer == 4 * plain.optimizer
    assert once.step < plain.step  # no gradients of an earlier batch
    assert plain.step > 4 * number  # includes the gradients
    assert frozen.averaged < plain.averaged / 4
    assert frozen.step < plain.step - 3 * number
    assert frozen.weights < 0.6 * plain.weights
    assert estimate_of("data.batch_size=4").step > 2 * plain.step - 12 * number


def test_estimate_run_agrees_with_a_real_step(checkpoint, media, tmp_path):
    settings = resolved(checkpoint, media, "train.gradient_checkpointing=false")
    prepared = prepare.prepare(settings, tmp_path)
    stage = stages.DenoiserStage(settings, prepared)
    rng = np.random.default_rng(0)
    batch = next(batch for batch in iter(lambda: stage.draw_batch(rng), None) if batch[0].shape[1] > 1)
    live = memory._Live()
    stage.objective.train()
    with live, sdpa_kernel(SDPBackend.MATH):
        for _ in range(2):
            loss, _ = stage.objective(*batch)
            loss.backward()
    assert memory.estimate_run(settings, prepared, "cpu").step == pytest.approx(live.peak, rel=0.1)


def test_estimate_run_counts_the_flops_of_a_real_step(checkpoint, media, tmp_path):
    settings = resolved(checkpoint, media, "data.batch_size=2", "train.gradient_checkpointing=false")
    prepared = prepare.prepare(settings, tmp_path)
    stage = stages.DenoiserStage(settings, prepared)
    stage.objective.train()
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        stage.objective(*stage.draw_batch(np.random.default_rng(0)))[0].backward()
    accumulated = settings.optim.accumulate
    assert memory.estimate_run(settings, prepared, "cpu").flops == pytest.approx(
        accumulated * counted.get_total_flops(), rel=0.01
    )
    assert matrix_rate("cpu", torch.float32, seconds=0.01) > 1e9
