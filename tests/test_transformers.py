"""The laws of the shift in diffusers' transformers: PixArt, Sana, Stable Diffusion 3 and Flux, all at tiny size."""

from __future__ import annotations

import copy
import functools
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    LatteTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet3DConditionModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

import latent_shift as ls
from latent_shift.models import sizes
from latent_shift.models.channel_cost import cheapest_channels
from latent_shift.pipelines.noise import draw_noise
from latent_shift.shift import Shift, deflate, frames, inflate, neighbors, reach, shift_of, streaming

NUM_LAYERS = 2
PLACES = ("kv", "attn", "ffn", "both")


def pixart():
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=NUM_LAYERS, cross_attention_dim=24,
        sample_size=8, patch_size=2, caption_channels=8, use_additional_conditions=False,
    )  # fmt: skip


def sana():
    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=NUM_LAYERS, num_cross_attention_heads=2,
        cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8, sample_size=8, patch_size=1,
    )  # fmt: skip


def sd3(**options):
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=NUM_LAYERS, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=24, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8, **options,
    )  # fmt: skip


def flux():
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip


NETWORKS = {"pixart": pixart, "sana": sana, "sd3": sd3, "flux": flux}


def network_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    make = NETWORKS.get(name) or functools.partial(sd3, dual_attention_layers=(0, 1))  # "sd35"
    network = make().eval()
    for parameter in network.parameters():  # some start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def predict(network: torch.nn.Module, x_NCHW: torch.Tensor) -> torch.Tensor:
    """Return the prediction for latents `(N, 4, 8, 8)`, all with one text and timestep."""
    num, plain = len(x_NCHW), getattr(network, "_orig_mod", network)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, 5, 8, generator=generator).expand(num, -1, -1)
    t = torch.full((num,), 300)
    if isinstance(plain, FluxTransformer2DModel):
        ids = torch.zeros(64, 3)
        ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
        out_NSC = network(
            x_NCHW.flatten(2).transpose(1, 2), encoder_hidden_states=text, pooled_projections=text[:, 0], timestep=t / 1000, img_ids=ids,
            txt_ids=torch.zeros(5, 3),
        ).sample  # fmt: skip
        return out_NSC.transpose(1, 2).unflatten(2, (8, 8))
    pooled = {"pooled_projections": text[:, 0]} if isinstance(plain, SD3Transformer2DModel) else {}
    if isinstance(plain, PixArtTransformer2DModel):
        pooled = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return network(x_NCHW, encoder_hidden_states=text, timestep=t, **pooled).sample


@pytest.fixture(
    params=[(name, place) for name in NETWORKS for place in PLACES], ids=lambda pair: "-".join(pair)
)
def plain_and_place(request):
    return network_of(request.param[0]), request.param[1]


@torch.no_grad()
def test_one_frame_is_the_image_network_bit_for_bit(plain_and_place):
    plain, place = plain_and_place
    network = inflate(copy.deepcopy(plain), Shift(place=place))
    x = torch.randn(6, 4, 8, 8)
    expected = predict(plain, x)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert torch.equal(predict(network, x), expected)
    with frames(network, 1):
        assert torch.equal(predict(network, x), expected)
    with frames(network, 3):
        assert (predict(network, x) - expected).abs().max() > 1e-4
    assert shift_of(network) == Shift(place=place)
    assert torch.equal(predict(deflate(network), x), expected)
    assert not any(layer._forward_pre_hooks for layer in network.modules())
    with pytest.raises(ValueError, match="is not inflated"), frames(network, 2):
        pass


@torch.no_grad()
def test_a_frame_reaches_as_far_as_reach_says(plain_and_place):
    """And clips of a batch do not mix."""
    plain, place = plain_and_place
    network = inflate(plain, Shift(place=place))
    far = NUM_LAYERS  # twice in a block, but once where attention and feed-forward layer are side by side
    if place == "both":
        far = 3 if isinstance(plain, FluxTransformer2DModel) else 2 * NUM_LAYERS
    assert reach(network) == (far, far)
    x = torch.randn(22, 4, 8, 8)
    changed = x.clone()
    changed[5] += 1
    with frames(network, 11):
        difference = (predict(network, changed) - predict(network, x)).abs().amax(dim=(1, 2, 3))
    assert (difference > 1e-6).nonzero().flatten().tolist() == list(range(5 - far, 6 + far))


@torch.no_grad()
def test_a_loop_rolls_with_its_frames(plain_and_place):
    network = inflate(plain_and_place[0], Shift(place=plain_and_place[1], edge="wrap"))
    x = torch.randn(5, 4, 8, 8)
    with frames(network, 5):
        torch.testing.assert_close(
            predict(network, x.roll(2, 0)), predict(network, x).roll(2, 0), rtol=0, atol=1e-5
        )


@torch.no_grad()
def test_a_stream_equals_the_clip(plain_and_place):
    network = inflate(plain_and_place[0], Shift(backward=0, place=plain_and_place[1], edge="hold"))
    x, memory = torch.randn(5, 4, 8, 8), {}
    with frames(network, 5):
        clip = predict(network, x)
    for number in range(5):
        with streaming(network, memory):
            torch.testing.assert_close(
                predict(network, x[number : number + 1])[0], clip[number], rtol=0, atol=1e-5
            )


def pixart_pipeline(transformer):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    return PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=AutoencoderKL(), transformer=transformer, scheduler=scheduler
    )


def sana_pipeline(transformer):
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4, downsample_block_type="conv", upsample_block_type="interpolate",
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    return SanaPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler
    )


@pytest.mark.parametrize(("name", "make_pipeline"), [("pixart", pixart_pipeline), ("sana", sana_pipeline)])
def test_clips_are_made_inside_diffusers_own_pipelines(name, make_pipeline):
    """The frames of a clip are the images of one prompt; one frame is an image, bit for bit."""
    plain = network_of(name)
    text, mask = torch.randn(1, 5, 8), torch.ones(1, 5)
    options = dict(
        prompt=None, negative_prompt=None, prompt_embeds=text, prompt_attention_mask=mask, negative_prompt_embeds=0 * text,
        negative_prompt_attention_mask=mask, output_type="latent", num_inference_steps=2, use_resolution_binning=False,
    )  # fmt: skip
    pipes = [make_pipeline(network) for network in (plain, inflate(copy.deepcopy(plain)))]
    side = 8 * pipes[0].vae_scale_factor

    def generate(pipe, num_frames: int, latents: torch.Tensor) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            **options, height=side, width=side, num_images_per_prompt=num_frames, latents=latents
        ).images

    noise = ls.frame_noise(4, (4, 8, 8), generator=ls.seed(0), noise_correlation=0.7)
    images = generate(pipes[0], 4, noise)
    assert torch.equal(generate(pipes[1], 4, noise), images)
    with frames(pipes[1].transformer, 1):
        assert torch.equal(generate(pipes[1], 1, noise[:1]), generate(pipes[0], 1, noise[:1]))
    with frames(pipes[1].transformer, 4, edge="wrap"):
        loop = generate(pipes[1], 4, noise)
        torch.testing.assert_close(
            generate(pipes[1], 4, noise.roll(1, 0)), loop.roll(1, 0), rtol=0, atol=1e-4
        )
    assert (loop - images).abs().max() > 1e-3


def test_frame_noise_is_that_of_a_clip():
    noise = ls.frame_noise(3, (4, 8, 8), generator=ls.seed(0), shared_noise=0.2, noise_correlation=0.5)
    expected = draw_noise(
        (1, 4, 3, 8, 8),
        generator=ls.seed(0),
        device=torch.device("cpu"),
        shared_noise=0.2,
        noise_correlation=0.5,
    )
    assert torch.equal(noise, expected[0].transpose(0, 1))
    assert ls.frame_noise(2, (4, 8, 8), loop=True).shape == (2, 4, 8, 8)
    assert torch.equal(ls.frame_noise(3, (4, 8, 8), generator=ls.seed(0), shared_noise=0.2, noise_correlation=0.5, dtype=torch.float16), noise.half())  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"shared_noise": 2}, {"shared_noise": -1}, {"shared_noise": math.nan}, {"noise_correlation": 1.5}, {"noise_correlation": 1, "loop": True},
        {"num_frames": 0}, {"num_frames": 1.5}, {"generator": 3}, {"shape_Chw": 4}, {"shape_Chw": (4, -8, 8)}, {"shape_Chw": (4, 8)},
    ],
)  # fmt: skip
def test_frame_noise_refuses_what_is_no_noise(options):
    with pytest.raises(ValueError, match=r"expected|must be 1 or more"):
        ls.frame_noise(**{"num_frames": 3, "shape_Chw": (4, 8, 8)} | options)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_keys_and_values_come_from_the_neighbours(name):
    """Queries and the text do not: with keys and values of the frame itself, nothing is shifted."""
    plain = network_of(name)
    network = inflate(copy.deepcopy(plain), Shift(1, 0, place="kv", edge="wrap"))
    attention = next(module for module in network.modules() if hasattr(module, "to_k"))
    inputs = {}
    for layer in ("to_q", "to_k", "to_v"):
        getattr(attention, layer).register_forward_hook(
            lambda _, args, __, name=layer: inputs.update({name: args[0]})
        )
    with frames(network, 4):
        predict(network, torch.randn(4, 4, 8, 8))
    assert torch.equal(inputs["to_k"], inputs["to_q"].roll(1, 0)) and torch.equal(
        inputs["to_v"], inputs["to_k"]
    )
    assert not torch.equal(inputs["to_k"], inputs["to_q"])


@torch.no_grad()
def test_text_in_the_same_sequence_is_not_shifted():
    network = inflate(network_of("flux"), Shift(1, 0, place="ffn", edge="wrap"))
    block, inputs = network.single_transformer_blocks[0], {}
    block.norm.register_forward_hook(lambda _, args, output: inputs.update(norm=output[0]))
    block.proj_mlp.register_forward_hook(lambda _, args, __: inputs.update(mlp=args[0]))
    with frames(network, 4):
        predict(network, torch.randn(4, 4, 8, 8))
    assert torch.equal(inputs["mlp"][:, :5], inputs["norm"][:, :5])
    assert torch.equal(inputs["mlp"][:, 5:], inputs["norm"][:, 5:].roll(1, 0))


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_a_lora_sees_the_shifted_tokens(place):
    """Added before or after `inflate`: its sum with the weights equals the LoRA."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["to_k", "to_v", "to_q", "ff.net.2"], init_lora_weights=False
    )
    name = "sd3" if place in ("ffn", "both") else "sana"
    outputs, x = [], torch.randn(4, 4, 8, 8)
    for inflate_first in (True, False):
        network = network_of(name)
        if inflate_first:
            inflate(network, Shift(place=place))
        torch.manual_seed(0)
        network.add_adapter(config)
        if not inflate_first:
            inflate(network, Shift(place=place))
        with frames(network, 4):
            outputs.append(predict(network, x))
    network.fuse_lora()
    network.unload_lora()
    with frames(network, 4):
        fused = predict(network, x)
    # Of a stream or by indices, too, where nothing has been called inside `frames` before.
    network = inflate(network_of(name), Shift(place=place, backward=0))
    torch.manual_seed(0)
    network.add_adapter(config)
    memory: dict = {}
    for number in range(2):
        with streaming(network, memory):
            streamed = predict(network, x[number : number + 1])
    network = inflate(network_of(name), Shift(place=place, backward=0))
    torch.manual_seed(0)
    network.add_adapter(config)
    with neighbors(network, torch.tensor([2, 0]), torch.tensor([1, 2])):
        by_index = predict(network, x[:2])
    with frames(network, 2):
        expected = predict(network, x[:2])
    torch.testing.assert_close(streamed[0], expected[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_index, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(*outputs)
    torch.testing.assert_close(fused, outputs[0], rtol=1e-4, atol=1e-4)


def test_inflate_takes_a_transformer_and_says_what_it_cannot_shift():
    assert shift_of(inflate(network_of("pixart"))) == Shift(place="attn")
    assert shift_of(inflate(network_of("pixart"), Shift(edge="hold"))) == Shift(place="attn", edge="hold")
    with pytest.raises(
        ValueError, match='has no ResnetBlock2D to shift; use place="kv", "attn", "ffn" or "both"'
    ):
        inflate(network_of("pixart"), Shift(place="conv2"))
    with pytest.raises(
        ValueError, match="Linear has no transformer block to shift; expected one of BasicTransformerBlock"
    ):
        inflate(torch.nn.Linear(2, 2), Shift(place="kv"))
    with pytest.raises(ValueError, match="AutoencoderKL takes no timestep; expected a denoiser"):
        inflate(sizes.autoencoder("tiny"))
    with pytest.raises(ValueError, match="expected the settings as a Shift, got 'kv'"):
        inflate(network_of("pixart"), "kv")
    with pytest.raises(
        ValueError, match=r"expected a network such as pipe\.unet or pipe\.transformer, got a Pix"
    ):
        inflate(pixart_pipeline(network_of("pixart")))


@pytest.mark.parametrize("name", ["unet", "pixart"])
def test_deflate_reaches_through_wrappers(name):
    network = inflate(sizes.unet("tiny") if name == "unet" else network_of(name))
    deflate(torch.nn.Sequential(network))
    assert shift_of(network) is None
    with pytest.raises(ValueError, match="not inflated"), frames(network, 2):
        pass
    inflate(network)
    with pytest.raises(ValueError, match="between clips"), frames(network, 2):
        deflate(torch.nn.Sequential(network))


def test_networks_with_time_of_their_own_are_refused():
    latte = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, caption_channels=8, sample_size=8, patch_size=2,
        norm_type="ada_norm_single", video_length=4, in_channels=4, out_channels=4,
    )  # fmt: skip
    unet = UNet3DConditionModel(
        block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    for network, shift in ((latte, None), (unet, Shift()), (unet, Shift(place="kv"))):
        with pytest.raises(ValueError, match="has temporal layers of its own"):
            inflate(network, shift)


def test_attention_that_reads_the_text_alone_is_not_shifted():
    network = UNet2DConditionModel(
        block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8, layers_per_block=1, only_cross_attention=(True, False),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="has no transformer block to shift"):
        inflate(network, Shift(place="kv"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_fused_projections_are_not_ignored(name):
    """Fused, one layer reads the tokens of queries, keys and values."""
    network, x = inflate(network_of(name), Shift(place="kv")), torch.randn(4, 4, 8, 8)
    network.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"call unfuse_qkv_projections\(\)"), frames(network, 4):
        pass
    network.unfuse_qkv_projections()
    with frames(network, 4):
        predict(network, x)
    inflate(network, Shift(place="attn"))
    with frames(network, 4):
        expected = predict(network, x)
    network.fuse_qkv_projections()
    with frames(network, 4):
        torch.testing.assert_close(predict(network, x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("place", ["kv", "attn"])
def test_both_attentions_of_sd35_are_shifted(place):
    network = network_of("sd35")
    for block in network.transformer_blocks:  # what is left is the second attention of each block
        for projection in (block.attn.to_k, block.attn.to_v, block.attn.to_q):
            torch.nn.init.zeros_(projection.weight)
    inflate(network, Shift(place=place, backward=0))
    assert reach(network) == (2, 0)
    x = torch.randn(4, 4, 8, 8)
    other = x.clone()
    other[0] += 1
    with frames(network, 4):
        changed = (predict(network, x) - predict(network, other)).abs().amax(dim=(1, 2, 3)) > 1e-6
    assert changed.tolist() == [True, True, True, False]


@torch.no_grad()
@pytest.mark.parametrize(
    "place", ["both", *(pytest.param(place, marks=pytest.mark.slow) for place in ("kv", "attn", "ffn"))]
)
@pytest.mark.parametrize(  # graph capture takes seconds
    "name", ["pixart", "flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sana", "sd3"))]
)
def test_what_was_compiled_as_an_image_network_is_shifted_after_inflate(name, place):
    """Compiled code does not look for hooks that came later."""
    network = network_of(name)
    compiled, x = torch.compile(network, backend="eager"), torch.randn(4, 4, 8, 8)
    image = predict(compiled, x)
    inflate(network, Shift(place=place))
    with frames(network, 4):
        clip = predict(network, x)
        assert not torch.allclose(clip, image, atol=1e-3)
        torch.testing.assert_close(predict(compiled, x), clip)
    deflate(network)
    torch.testing.assert_close(predict(compiled, x), image)


@torch.no_grad()
def test_a_compiled_transformer_is_the_one_inside():
    network = inflate(network_of("pixart"))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    x = torch.randn(4, 4, 8, 8)
    with frames(network, 4):
        torch.testing.assert_close(predict(compiled, x), predict(network, x))
    assert reach(compiled) == reach(network) == (NUM_LAYERS, NUM_LAYERS)
    ls.deflate(compiled)
    assert shift_of(network) is None and not network.transformer_blocks[0].attn1.to_k._forward_pre_hooks


# The layers that read what a place shifts, beside each other, and the number of text tokens before it.
READERS = {
    ("pixart", "ffn"): ("transformer_blocks.0.ff.net.2", ["ff.net.2"], 0),
    ("pixart", "kv"): ("transformer_blocks.0.attn1", ["attn1.to_k", "attn1.to_v"], 0),
    ("sana", "attn"): ("transformer_blocks.0.attn1", ["attn1.to_q", "attn1.to_k", "attn1.to_v"], 0),
    ("sd35", "attn"): (
        "transformer_blocks.0.attn",
        [f"{attention}.to_{each}" for attention in ("attn", "attn2") for each in "qkv"],
        0,
    ),
    ("flux", "both"): (
        "single_transformer_blocks.0.attn",
        ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        5,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize(("name", "place"), READERS)
def test_the_cheapest_channels_change_the_layers_that_read_them_least(name, place):
    network, (layer, readers, num_text) = network_of(name), READERS[name, place]
    block, costs = network.get_submodule(".".join(layer.split(".")[:2])), []

    def measure(reader: torch.nn.Module, args: tuple) -> None:
        image_NDS = args[0].movedim(-1, 1)[:, :, num_text:] if args[0].ndim == 3 else args[0]
        change_D = torch.zeros(image_NDS.shape[1])
        for channel in range(len(change_D)):
            shifted_NDS = image_NDS.clone()
            shifted_NDS[1:, channel] = image_NDS[:-1, channel]
            outputs = (
                reader.forward(x if x.ndim == 4 else x.movedim(1, -1)) for x in (image_NDS, shifted_NDS)
            )
            change_D[channel] = (next(outputs) - next(outputs)).square().sum()
        costs.append(change_D)

    x = torch.randn(3, 4, 8, 8)
    handles = [block.get_submodule(reader).register_forward_pre_hook(measure) for reader in readers]
    predict(network, x)
    for handle in handles:
        handle.remove()
    shift = cheapest_channels(network, Shift(1 / 4, 1 / 8, place), lambda: predict(network, x), 3)
    moved = [offsets != (0,) for num, offsets in dict(shift.rule)[layer] for _ in range(num)]
    assert set(torch.tensor(moved).nonzero().flatten().tolist()) == set(
        sum(costs).argsort()[: sum(moved)].tolist()
    )
    assert sum(moved) == len(moved) // 4 + len(moved) // 8


@torch.no_grad()
def test_the_cheapest_channels_of_a_depthwise_convolution_have_the_smallest_kernels():
    """Where channels change alike."""
    network = network_of("sana")
    convolution = network.transformer_blocks[0].ff.conv_depth
    scale = torch.rand(convolution.in_channels)
    convolution.weight.copy_(scale[:, None, None, None].expand_as(convolution.weight))
    convolution.register_forward_pre_hook(
        lambda layer, args: torch.randn(1).expand_as(args[0]) + frame_numbers
    )
    frame_numbers = torch.arange(3.0)[:, None, None, None]
    x = torch.randn(3, 4, 8, 8)
    shift = cheapest_channels(network, Shift(1 / 4, 1 / 8, "ffn"), lambda: predict(network, x), 3)
    moved = [
        offsets != (0,)
        for num, offsets in dict(shift.rule)["transformer_blocks.0.ff.conv_depth"]
        for _ in range(num)
    ]
    num = sum(moved)
    assert num == len(moved) // 4 + len(moved) // 8
    assert set(torch.tensor(moved).nonzero().flatten().tolist()) == set(scale.argsort()[:num].tolist())


def test_copies_and_gradient_checkpointing(plain_and_place):
    network = inflate(plain_and_place[0], Shift(place=plain_and_place[1])).train()
    x = torch.randn(4, 4, 8, 8)
    gradients = []
    for checkpointing in (False, True):
        clone = copy.deepcopy(network)
        if checkpointing:
            clone.enable_gradient_checkpointing()
        with frames(clone, 4):
            output = predict(clone, x)
        output.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in clone.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_examples_of_the_documentation_run(tmp_path):
    """docs/method.md: a rule, and diffusers' own pipeline of PixArt, with a tiny T5; README: that pipeline."""
    root = Path(__file__).parent.parent
    examples, in_readme = (
        re.findall(r"```python\n(.*?)```", (root / page).read_text(encoding="utf-8"), re.DOTALL)
        for page in ("docs/method.md", "README.md")
    )
    assert len(examples) == 4
    (of_readme,) = [example for example in in_readme if "any/pixart" in example]
    letters = [(token, -1.0) for token in ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]]
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(letters), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    vae = AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    pipe = PixArtSigmaPipeline(
        tokenizer=T5Tokenizer(vocab=letters, extra_ids=0), text_encoder=encoder, vae=vae, transformer=network_of("pixart"),
        scheduler=DDIMScheduler(clip_sample=False),
    )  # fmt: skip
    pipe.save_pretrained(tmp_path)

    class Quick(PixArtSigmaPipeline):
        def __call__(self, *args, **options):
            return super().__call__(
                *args, **options, num_inference_steps=1, height=64, width=64, use_resolution_binning=False
            )

    names = {
        "ls": ls,
        "unet": sizes.unet("tiny"),
        "noisy": torch.randn(32, 4, 8, 8),
        "text": torch.randn(32, 5, 32),
        "PixArtTransformer2DModel": PixArtTransformer2DModel,
        "PixArtSigmaPipeline": Quick,
    }
    for example in (*examples, of_readme):
        example = re.sub(r"from diffusers import .*", "", example)  # the smaller ones
        exec(example.replace('"any/pixart"', repr(str(tmp_path))).replace("4, 128, 128", "4, 8, 8"), names)
        if "clip" in names:
            clip = names.pop("clip")
            assert len(clip) == 16 and clip[0].size == (64, 64)
        if "two_distances" in example:
            assert reach(names["unet"]) == (2 * 8, 2 * 8)
    assert reach(names["unet"]) == (6 * 8, 6 * 8)
    assert shift_of(names["transformer"]).place == "attn"
