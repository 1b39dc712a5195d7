"""Diffusion transformers in place of a U-Net: trained, sampled and saved with a shift or with attention over time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny import tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode

import latent_shift as ls
from latent_shift.benchmark.roofline import Work
from latent_shift.engines.export import export
from latent_shift.evaluation import systems
from latent_shift.models import dit, sizes
from latent_shift.models.network_classes import baseline_of
from latent_shift.pipelines import descriptions, loading
from latent_shift.shift import Shift, frames, shift_of
from latent_shift.training import memory
from latent_shift.training.loop import train

CLASSES = {"pixart": (dit.PixArtDenoiser, dit.PixArtVDM), "sana": (dit.SanaDenoiser, dit.SanaVDM)}


@pytest.fixture(params=CLASSES)
def size(request, monkeypatch):
    """A named size, with two narrow layers."""
    network, config = sizes.TRANSFORMERS[request.param]
    small = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 32,
    }
    small |= (
        {"num_cross_attention_heads": 2, "cross_attention_head_dim": 12} if request.param == "sana" else {}
    )
    monkeypatch.setitem(sizes.TRANSFORMERS, request.param, (network, {**config, **small}))
    return request.param


def test_training_saving_and_sampling(size, latents, tmp_path):
    """Of a flow, as such transformers are trained today; the other tests train them to predict noise."""
    flow = {"prediction": "flow_prediction"}
    image = train(tiny_config("image", latents, model={"size": size}, diffusion=flow), tmp_path / "image")
    settings = {"init": str(image), "edge": "hold"}
    folder = train(tiny_config("video", latents, model=settings, diffusion=flow), tmp_path / "video")
    pipe = loading.load(folder)
    assert pipe.scheduler.config.use_flow_sigmas
    assert descriptions.describe(folder)["predicts"] == "flow_prediction"
    assert type(pipe.unet) is CLASSES[size][0]
    assert shift_of(pipe.unet) == Shift(place="attn", edge="hold")
    assert (
        "widths" in descriptions.describe(folder) and "place attn" in descriptions.describe(folder)["shift"]
    )
    loop = pipe("a red square", num_inference_steps=2, generator=ls.seed(0), loop=True).frames
    again = loading.load(folder)(
        "a red square", num_inference_steps=2, generator=ls.seed(0), loop=True
    ).frames
    assert loop.shape == (1, 4, 32, 32, 3) and np.array_equal(loop, again)
    with pytest.raises(
        ValueError, match=r"diffusion\.prediction is epsilon, but .* trained with flow_prediction"
    ):
        train(tiny_config("video", latents, model={"init": str(folder), "edge": "hold"}), tmp_path / "other")
    with pytest.raises(ValueError, match=r"expected a model of Stable Diffusion 1\.x or 2\.x"):
        export(str(folder), tmp_path / "exported")


def test_memory_and_operations_of_a_step_are_estimated(size):
    """With position embeddings, which are no parameters; weights and gradients cost twice the forward pass."""
    config = tiny_config("video", "latents", model={"size": size}, train={"precision": "no"})
    with torch.device("meta"):
        network = sizes.unet(size, sample_size=8)
    needs = memory.estimate(config, network, latents=(4, 8, 8), text_length=5, device="cpu")
    assert needs.step > needs.weights == 4 * sizes.num_parameters(network) > 0
    num_frames = config.data.batch_size * config.data.num_frames
    with FakeTensorMode(), Work({"flops_per_s": 1.0, "bytes_per_s": 1.0}) as forward, torch.no_grad():
        network = sizes.unet(size, sample_size=8)
        network(torch.empty(num_frames, 4, 8, 8), 0, torch.empty(num_frames, 5, 32))
    assert needs.flops == pytest.approx(3 * forward.flops, rel=0.1)


def test_attention_over_time_starts_as_the_image_network(size):
    plain = sizes.unet(size, sample_size=8).eval()
    network = baseline_of(plain, "attention").from_config(plain.config)
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all("over_time" in name for name in missing)
    network.eval()
    x, t, text = torch.randn(6, 4, 8, 8), torch.tensor(7), torch.randn(2, 5, 32)
    with torch.no_grad(), frames(network, 3):
        expected = plain(x, t, text.repeat_interleave(3, dim=0)).sample
        torch.testing.assert_close(network(x, t, text).sample, expected)
        for name, parameter in network.named_parameters():
            if "over_time.to_out" in name:
                torch.nn.init.normal_(parameter)
        changed = x.clone()
        changed[0] += 1
        difference = (network(changed, t, text).sample - network(x, t, text).sample).abs().amax(dim=(1, 2, 3))
    assert (difference[:3] > 1e-4).all() and (difference[3:] < 1e-6).all()
    twin = copy.deepcopy(network)
    with torch.no_grad(), frames(twin, 3):
        assert torch.equal(twin(x, t, text).sample, twin(x, t, text).sample)
    with pytest.raises(ValueError, match="takes no timestep_cond"):
        plain(x, t, text, timestep_cond=torch.zeros(6, 2))


def test_texts_are_of_images_or_of_clips(size):
    network = sizes.unet(size, sample_size=8)
    for num, num_texts in ((5, 2), (1, 2), (3, 2)):
        with pytest.raises(
            ValueError, match=f"a text for each image or for each clip, got {num_texts} for {num}"
        ):
            network(torch.randn(num, 4, 8, 8), 0, torch.randn(num_texts, 5, 32))


def test_sizes_are_multiples_of_a_patch_and_loras_need_a_unet(size, latents, tmp_path):
    folder = train(tiny_config("image", latents, model={"size": size}, steps=1), tmp_path / "image")
    assert descriptions.sampling_defaults(folder)["multiple"] == 16
    with pytest.raises(ValueError, match="in multiples of 16, got 40 and 32"):
        loading.load(folder)("a red square", num_inference_steps=1, height=40)
    settings = {"init": str(folder)}
    video = train(tiny_config("video", latents, model=settings, steps=1), tmp_path / "video")
    more = tiny_config("video", latents, model={"init": str(video)}, steps=1)
    assert shift_of(loading.load(train(more, tmp_path / "more")).unet) == Shift(place="attn")
    with pytest.raises(ValueError, match="lora needs a U-Net, got a "):
        train(tiny_config("video", latents, model=settings, lora={"rank": 2}), tmp_path / "lora")


def test_the_baseline_trains(size, latents, tmp_path):
    image = train(tiny_config("image", latents, model={"size": size}, steps=1), tmp_path / "image")
    config = tiny_config(
        "video", latents, model={"init": str(image), "temporal": "attention"}, optim={"lr": 1e-2}
    )
    pipe = loading.load(train(config, tmp_path / "video"))
    assert type(pipe.unet) is CLASSES[size][1]
    assert systems._title(pipe) == "attention over time"
    assert any(p.any() for name, p in pipe.unet.named_parameters() if "over_time.to_out.weight" in name)
    assert pipe("a red square", num_inference_steps=1, generator=ls.seed(0)).frames.shape == (1, 4, 32, 32, 3)
    with pytest.raises(ValueError, match="there is no such baseline of a"):
        baseline_of(sizes.unet(size), "vdm")
