"""Modes of sampling against what the network says about the whole clip."""

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from latent_shift.models import sizes
from latent_shift.pipelines.denoise import in_chunks, unet_predictor
from latent_shift.shift import Shift, frames, inflate, reach, streaming


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return sizes.unet("tiny", sample_size=4).eval().double()


TEXT = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def clips(num_frames: int) -> torch.Tensor:
    return torch.randn(
        2, 4, num_frames, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )


def predictor(unet, *, edge=None, calls=None):
    network = unet_predictor(unet, [{"prompt_embeds": TEXT}], edge=edge)

    @torch.no_grad()
    def predict(latents, timestep, frame_indices):
        if calls is not None:
            calls.append(frame_indices.tolist())
        return network(latents, timestep, frame_indices)

    return predict


@pytest.mark.parametrize("edge", ["zero", "hold", "wrap"])
@pytest.mark.parametrize("place", ["conv1", "end"])
def test_in_chunks_with_full_halo_equals_the_whole_clip(unet, edge, place):
    inflate(unet, Shift(place=place, edge=edge))
    halo, num_frames = reach(unet), 40
    assert halo == (sum(isinstance(module, ResnetBlock2D) for module in unet.modules()),) * 2
    loop = edge == "wrap"
    whole = predictor(unet)(clips(num_frames), torch.tensor(500), torch.arange(num_frames))
    calls = []
    chunked = in_chunks(predictor(unet, edge="hold" if loop else None, calls=calls), 5, halo, loop=loop)
    torch.testing.assert_close(chunked(clips(num_frames), torch.tensor(500), torch.arange(num_frames)), whole)
    assert len(calls) == 8
    assert max(map(len, calls)) <= 5 + sum(halo)
    shorter = in_chunks(predictor(unet, edge="hold" if loop else None), 5, (1, 1), loop=loop)(
        clips(num_frames), torch.tensor(500), torch.arange(40)
    )
    assert not torch.allclose(shorter, whole)


@pytest.mark.parametrize("edge", ["zero", "hold"])
@pytest.mark.parametrize("place", ["conv1", "conv2", "both", "end"])
def test_streaming_equals_the_whole_clip(unet, edge, place):
    inflate(unet, Shift(backward=0, edge=edge, place=place))
    whole = predictor(unet)(clips(6), torch.tensor(500), torch.arange(6))
    memory = {}
    for number in range(6):
        with torch.no_grad(), streaming(unet, memory):
            frame = unet(clips(6)[:, :, number], 500, TEXT).sample
        torch.testing.assert_close(frame, whole[:, :, number])
    assert reach(unet) == (len(memory), 0)
    with frames(unet, 6):  # and nothing stays behind
        torch.testing.assert_close(predictor(unet)(clips(6), torch.tensor(500), torch.arange(6)), whole)


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        (None, "is not inflated"),
        (Shift(), r"expected Shift\(backward=0\); here channels come from later frames"),
        (Shift(rule=lambda num: [1] * num), "expected a rule without positive offsets"),
        (Shift(backward=0, edge="wrap"), 'expected edge="zero" or "hold"'),
    ],
)
def test_streaming_requires_a_causal_shift(shift, message):
    network = sizes.unet("tiny", sample_size=4)
    if shift:
        inflate(network, shift)
    with pytest.raises(ValueError, match=message), streaming(network, {}):
        pass
