"""The baseline under the same contract: it begins as the image network, images stay images, clips never mix, and it sees time."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import ROUNDING, tiny_config

import latent_shift as ls
from latent_shift.clip_text import share_text
from latent_shift.config import Model
from latent_shift.models import sizes
from latent_shift.models.baselines import LatentVDMUNet, TemporalAttention
from latent_shift.pipelines import loading
from latent_shift.shift import reach, streaming
from latent_shift.training.loop import train


@pytest.fixture
def image():
    torch.manual_seed(0)
    return sizes.unet("tiny", sample_size=8).eval()


@pytest.fixture
def network(image):
    return sizes.inflate_unet(image, Model(size="tiny", temporal="attention")).eval()


def awake(network):
    """As after some training: nothing is zero any more."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "over_time" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def call(network, x, num_frames):
    text = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(2)).expand(len(x), -1, -1)
    with torch.no_grad(), ls.frames(network, num_frames):
        return network(x, torch.tensor(300), text).sample


def test_latent_vdm_starts_as_the_image_network(image, network):
    x = torch.randn(8, 4, 8, 8)
    ls.inflate(image, ls.Shift(0, 0))
    assert torch.equal(call(network, x, 4), call(image, x, 4))
    added = {name for name, _ in network.named_parameters()} - {name for name, _ in image.named_parameters()}
    assert added and all(".over_time." in name for name in added)
    blocks = sum(
        type(module).__name__ in ("_ResnetBlockWithTime", "_TransformerWithTime")
        for module in network.modules()
    )
    assert blocks == len({name.split(".over_time.")[0] for name in added})


def test_latent_vdm_relates_frames_but_not_clips(network):
    awake(network)
    x = torch.randn(8, 4, 8, 8)
    y = call(network, x, 4)
    changed = x.clone()
    changed[1] += 1
    apart = (call(network, changed, 4) - y).abs().amax(dim=(1, 2, 3))
    assert (apart[:4] > 1e-5).all() and (apart[4:] == 0).all()
    alone = torch.cat([call(network, frame[None], 1) for frame in x])
    torch.testing.assert_close(call(network, x, 1), alone)  # images of a batch are masked from each other
    assert not torch.allclose(alone, y, atol=1e-3)


def test_temporal_attention_is_the_formula():
    torch.manual_seed(0)
    layer = awake(torch.nn.ModuleDict({"over_time": TemporalAttention(8, 2, max_distance=3)}))["over_time"]
    x = torch.randn(6, 8, 1, 1)
    frames = layer.norm(x[:, :, 0, 0])
    q, k, v = layer.to_qkv(frames).split(8, dim=-1)
    heads = []
    for head, part in enumerate((slice(0, 4), slice(4, 8))):
        scores = q[:, part] @ k[:, part].T / 2
        for i in range(6):
            for j in range(6):
                scores[i, j] = scores[i, j] + layer.bias[head, max(-3, min(3, i - j)) + 3]
        heads.append(scores.softmax(dim=-1) @ v[:, part])
    expected = x[:, :, 0, 0] + layer.to_out(torch.cat(heads, dim=-1))
    torch.testing.assert_close(layer(x, 6)[:, :, 0, 0], expected)


def test_latent_vdm_rejects_what_only_a_shift_can_do(network):
    with pytest.raises(ValueError, match="has temporal layers of its own"):
        ls.inflate(network, ls.Shift())
    with pytest.raises(ValueError, match="cannot be run in chunks"):
        reach(network)
    with (
        pytest.raises(ValueError, match="only a shifted network can loop"),
        ls.frames(network, 4, edge="wrap"),
    ):
        pass
    with pytest.raises(ValueError, match="relates frames by layers of its own"), streaming(network, {}):
        pass


def test_deflate_refuses_a_network_with_temporal_layers(network):
    with pytest.raises(ValueError, match="cannot be deflated"):
        ls.deflate(network)
    call(network, torch.randn(4, 4, 4, 4), 4)  # and it still works


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_latent_vdm_trains_saves_and_generates(checkpointing, latents, image_model, tmp_path):
    options = {"gradient_checkpointing": checkpointing, "sample_every": 2, "sample_steps": 1}
    rows = []
    config = tiny_config(
        "video",
        latents,
        model={"init": str(image_model), "temporal": "attention"},
        optim={"lr": 1e-2},
        train=options,
    )
    pipe = loading.load(train(config, tmp_path / "run", report=rows.append))
    assert isinstance(pipe.unet, LatentVDMUNet)
    assert any(
        parameter.any()
        for name, parameter in pipe.unet.named_parameters()
        if "over_time.to_out.weight" in name
    )
    clip = pipe("a red square", num_inference_steps=2, generator=ls.seed(0)).frames
    again = loading.load(tmp_path / "run" / "model")(
        "a red square", num_inference_steps=2, generator=ls.seed(0)
    ).frames
    assert clip.shape == (1, 4, 32, 32, 3) and np.array_equal(clip, again)
    with pytest.raises(ValueError, match="only a shifted network can loop"):
        pipe("a red square", loop=True)
    going_on = tiny_config(
        "video", latents, steps=1, model={"init": str(tmp_path / "run" / "model"), "temporal": "attention"}
    )
    train(going_on, tmp_path / "on")
    if checkpointing:
        plain = tiny_config(
            "video", latents, model={"init": str(image_model), "temporal": "attention"}, optim={"lr": 1e-2}
        )
        others = []
        train(plain, tmp_path / "plain", report=others.append)
        assert [row["loss"] for row in rows] == pytest.approx(
            [row["loss"] for row in others], rel=1e-5 + ROUNDING
        )


def test_latent_vdm_shares_text(network):
    awake(network)
    x = torch.randn(8, 4, 8, 8)
    y = call(network, x, 4)
    assert share_text(network)
    text = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(2)).expand(2, -1, -1)
    with torch.no_grad(), ls.frames(network, 4):
        torch.testing.assert_close(network(x, torch.tensor(300), text).sample, y)
    assert isinstance(network, UNet2DConditionModel)
