"""Stage tiny_autoencoder: a small decoder for the latents of a model."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from safetensors.torch import load_file
from tiny import stage_of, tiny_config

from latent_shift.data.store import Store
from latent_shift.evaluation.decoders import compare_decoders
from latent_shift.models import sizes
from latent_shift.models.autoencoder import decode_latents, load_tiny_autoencoder, posterior
from latent_shift.pipelines.loading import load as load_pipeline
from latent_shift.runtime import seed
from latent_shift.training import checkpoint
from latent_shift.training.loop import train


def config(packed, autoencoder, **changes):
    return tiny_config("tiny_autoencoder", packed, model={"init": str(autoencoder)}, **changes)


@pytest.fixture(scope="module")
def tiny(packed, autoencoder, tmp_path_factory):
    """The folder of a trained tiny autoencoder."""
    run = tmp_path_factory.mktemp("tiny_autoencoder")
    return train(config(packed, autoencoder, train={"sample_every": 2}), run)


@pytest.mark.parametrize("factor", [1, 2, 8])
def test_sides_and_channels_are_those_of_the_latents(factor):
    vae = sizes.tiny_autoencoder(factor=factor, latent_channels=5)
    pixels = torch.zeros(1, 3, 16, 24)
    latents = vae.encode(pixels).latents
    assert latents.shape == (1, 5, 16 // factor, 24 // factor)
    assert vae.decode(latents).sample.shape == pixels.shape


def test_folder_opens_in_diffusers_and_samples_are_written(tiny):
    vae = AutoencoderTiny.from_pretrained(tiny)
    assert vae.config.scaling_factor == 1
    tensors = load_file(tiny / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert (tiny.parent / "samples" / "00000002.png").exists()


def test_it_goes_on_from_the_tiny_vae_of_the_folder(packed, autoencoder, tiny, tmp_path):
    shutil.copytree(autoencoder, tmp_path / "model")
    shutil.copytree(tiny, tmp_path / "model" / "tiny_vae")
    stage, other = (stage_of(config(packed, init)) for init in (tmp_path / "model", autoencoder))
    weights = load_file(tiny / "diffusion_pytorch_model.safetensors")
    assert all(
        torch.equal(stage.model.state_dict()[name], weight.float()) for name, weight in weights.items()
    )
    assert not all(
        torch.equal(other.model.state_dict()[name], weight.float()) for name, weight in weights.items()
    )
    stage.export(tmp_path / "again", {name: weight.float() for name, weight in weights.items()})
    assert (tmp_path / "again" / "config.json").read_text() == (tiny / "config.json").read_text()


def test_it_learns_and_the_teacher_does_not(packed, autoencoder):
    stage = stage_of(config(packed, autoencoder))
    teacher = {name: tensor.clone() for name, tensor in stage.objective.teacher.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in stage.objective.parameters() if p.requires_grad], 2e-3)
    batch = stage.draw_batch(np.random.default_rng(0))
    losses = []
    for _ in range(60):
        loss, terms = stage.objective(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append({name: float(term) for name, term in terms.items()})
    # Logarithms of squared errors.
    assert losses[-1]["frames"] < losses[0]["frames"] + np.log(0.25)
    assert losses[-1]["latents"] < losses[0]["latents"] + np.log(0.9)
    assert all(
        torch.equal(tensor, teacher[name]) for name, tensor in stage.objective.teacher.state_dict().items()
    )


def test_loss_of_the_decoder_is_the_log_of_its_error_on_the_frames(packed, autoencoder):
    objective = stage_of(config(packed, autoencoder)).objective
    pixels = torch.rand(2, 3, 32, 32, generator=seed(0)) * 2 - 1
    noise = torch.zeros(2, 4, 4, 4)
    _, terms = objective(pixels, noise)
    with torch.no_grad():
        mean, _ = posterior(objective.teacher, pixels)
        decoded = objective.vae.decode(mean).sample
    psnr = 10 * np.log10(4 / (decoded - pixels).square().mean(dim=(1, 2, 3)).numpy())
    assert float(terms["frames"]) == pytest.approx(np.log(4) - psnr.mean() * np.log(10) / 10, abs=1e-3)


def test_checkpoints_hold_the_tiny_network_alone_and_resume(packed, autoencoder, tiny, tmp_path):
    saved = load_file(checkpoint.steps(tiny.parent)[-1] / "model.safetensors")
    assert all(name.startswith("vae.") for name in saved)
    train(config(packed, autoencoder, steps=2), tmp_path)
    resumed = train(config(packed, autoencoder), tmp_path)
    expected = load_file(tiny / "diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(resumed / "diffusion_pytorch_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name])


def test_perceptual_loss_counts(packed, autoencoder):
    loss, terms = stage_of(config(packed, autoencoder, loss={"perceptual": 0.5})).objective(
        torch.rand(1, 3, 32, 32), torch.zeros(1, 4, 4, 4)
    )
    assert float(loss) == pytest.approx(
        float(terms["frames"] + terms["latents"] + 0.5 * terms["perceptual"]), rel=1e-5
    )


def test_pipelines_decode_with_it(video_model, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(video_model, folder)
    assert load_tiny_autoencoder(folder) is None
    shutil.copytree(tiny, folder / "tiny_vae")
    pipe = load_pipeline(folder, device="cpu")
    pipe.vae = load_tiny_autoencoder(folder)
    latents = pipe("a red square", generator=seed(0), num_inference_steps=1, output_type="latent").frames
    frames = pipe("a red square", generator=seed(0), num_inference_steps=1, output_type="pt").frames
    decoded = decode_latents(pipe.vae, latents[0].swapaxes(0, 1)).detach()
    torch.testing.assert_close(frames[0], (decoded / 2 + 0.5).clamp(0, 1))
    # diffusers' own pipeline opens the folder as before, and the tiny one takes the autoencoder's place there too
    vae = AutoencoderTiny.from_pretrained(folder / "tiny_vae")
    other = StableDiffusionPipeline.from_pretrained(
        folder, vae=vae, safety_checker=None, torch_dtype=torch.float32
    )
    other.set_progress_bar_config(disable=True)
    assert other("a red square", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


def test_a_tiny_autoencoder_of_other_latents_is_not_exported(video_model, tmp_path):
    pytest.importorskip("onnxscript")
    from latent_shift.engines.export import export

    folder = tmp_path / "model"
    shutil.copytree(video_model, folder)
    sizes.tiny_autoencoder(factor=4, latent_channels=4).save_pretrained(folder / "tiny_vae")
    with pytest.raises(
        ValueError, match="tiny_vae: expected 8 pixels to a latent and 4 channels, got 4 and 4"
    ):
        export(str(folder), tmp_path / "exported")


def test_decoders_are_compared(video_model, packed, tiny):
    split = sorted(Store(packed).splits)[0]
    result = compare_decoders(video_model, packed, splits=[split], tiny=tiny, num=3, rounds=1)
    assert {"frames", "large", "tiny"} == set(result)
    for each in (result["large"], result["tiny"]):
        assert each["seconds"] > 0 and each["psnr_db"]["low"] <= each["psnr_db"]["value"]
    assert result["tiny"]["difference_db"]["value"] == pytest.approx(
        result["tiny"]["psnr_db"]["value"] - result["large"]["psnr_db"]["value"]
    )
    json.dumps(result, allow_nan=False)
    with pytest.raises(ValueError, match="has no tiny autoencoder"):
        compare_decoders(video_model, packed, splits=[split])
    with pytest.raises(ValueError, match="has no records in night"):
        compare_decoders(video_model, packed, splits=["night"], tiny=tiny)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"size": "tiny"}}, "stage tiny_autoencoder needs model.init"),
        ({"loss": {"kl": 0.1}}, "loss.kl has no effect in stage tiny_autoencoder"),
        ({"data": {"num_frames": 2}}, "stage tiny_autoencoder trains on single frames"),
        ({"train": {"shard": True}}, "train.shard needs stage image or video"),
    ],
)
def test_settings_that_contradict_are_refused(packed, autoencoder, changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_config("tiny_autoencoder", packed, **{"model": {"init": str(autoencoder)}, **changes})
