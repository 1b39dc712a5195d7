"""The pixel-space baseline: pixels stay pixels, and the whole path from videos to clips goes through them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import stage_of, tiny_config

from latent_shift.config import Model
from latent_shift.data.encode import encode
from latent_shift.data.latents import LatentStore
from latent_shift.data.pack import pack
from latent_shift.data.store import Store
from latent_shift.evaluation import systems
from latent_shift.models import sizes
from latent_shift.models.autoencoder import load_autoencoder, to_pixels
from latent_shift.models.baselines import PixelSpace, TemporalAttention, TemporalConv, VDMUNet
from latent_shift.pipelines import loading
from latent_shift.training.loop import train


def test_pixel_space_keeps_pixels():
    vae = load_autoencoder(loading.folder("pixels"))
    assert isinstance(vae, PixelSpace)
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    posterior = vae.encode(x).latent_dist
    torch.testing.assert_close(posterior.mean, x)
    torch.testing.assert_close(posterior.sample(), x, atol=1e-5, rtol=0)
    assert torch.equal(vae.decode(x).sample, x)
    assert torch.equal(vae.decode(x, return_dict=False)[0], x)


def test_vdm_unet_has_no_temporal_convolution():
    network = sizes.inflate_unet(sizes.unet("tiny", sample_size=8), Model(size="tiny", temporal="vdm"))
    kinds = {type(module) for module in network.modules()}
    assert TemporalAttention in kinds and TemporalConv not in kinds


@pytest.fixture(scope="module")
def in_pixels(media, tmp_path_factory):
    folder = tmp_path_factory.mktemp("in-pixels")
    pack(media, folder / "frames", size=32, fps=8)
    encode(
        folder / "frames",
        folder / "stored",
        autoencoder=loading.folder("pixels"),
        texts=loading.folder("emoji"),
    )
    return folder


def test_vdm_trains_and_generates_in_pixels(in_pixels, tmp_path):
    frames, stored = Store(in_pixels / "frames"), LatentStore(in_pixels / "stored")
    assert (stored.info["channels"], stored.info["factor"]) == (3, 1)
    expected = to_pixels(torch.from_numpy(frames.window(0, 0, 3))).numpy()
    np.testing.assert_allclose(stored.window(0, 0, 3)[:, 0], expected, atol=1e-3)
    np.testing.assert_array_equal(
        stored.draw_pixels(np.random.default_rng(0), 0, 3), frames.draw_window(np.random.default_rng(0), 0, 3)
    )
    config = tiny_config("video", in_pixels / "stored", steps=2, model={"size": "pixels", "temporal": "vdm"})
    run = train(config, tmp_path / "run")
    system = systems.open_system(str(run), num_inference_steps=2, device="cpu")
    pipe = system.pipe
    assert system.title == "Video Diffusion Models (Ho et al. 2022), in pixels"
    on_latents = SimpleNamespace(unet=pipe.unet, vae=None)
    assert systems._title(on_latents) == "Latent-VDM, the paper's baseline without convolution in time"
    assert isinstance(pipe.vae, PixelSpace) and isinstance(pipe.unet, VDMUNet)
    assert system.generate(["red", "blue"], [0, 1]).shape == (2, 4, 32, 32, 3)
    pipe.save_pretrained(tmp_path / "again")
    again = loading.load(tmp_path / "again", device="cpu")
    assert isinstance(again.vae, PixelSpace) and isinstance(again.unet, VDMUNet)
    with pytest.raises(
        ValueError, match=r"model\.temporal is attention, but .* was trained with vdm: set it to that"
    ):
        train(
            tiny_config("video", in_pixels / "stored", model={"init": str(run), "temporal": "attention"}),
            tmp_path / "other",
        )
    with pytest.raises(
        ValueError, match="has latents of 3 channels and texts 384 wide, the network takes 4 and 384"
    ):
        stage_of(tiny_config("video", in_pixels / "stored", model={"size": "emoji", "temporal": "vdm"}))
