"""What people add to Stable Diffusion, by compatibility: it must load as in diffusers and act on clips."""

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from latent_shift.models import sizes
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline
from latent_shift.runtime import seed
from latent_shift.shift import Shift, deflate, frames, inflate


@pytest.fixture
def pipe(texts):
    torch.manual_seed(0)
    made = LatentShiftPipeline(
        sizes.autoencoder("tiny").eval(),
        CLIPTextModel.from_pretrained(texts / "text_encoder"),
        CLIPTokenizer.from_pretrained(texts / "tokenizer"),
        sizes.unet("tiny", sample_size=4).eval(),
        DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        latent_shift={"num_frames": 4, "num_inference_steps": 2, "guidance_scale": 3.0},
    )
    made.set_progress_bar_config(disable=True)
    return made


def clip(pipe, **arguments) -> torch.Tensor:
    return pipe("red", generator=seed(0), output_type="pt", **arguments).frames


@pytest.fixture
def lora(pipe, tmp_path):
    """A LoRA file of attention and convolutions, as diffusers' training scripts write it."""
    network = sizes.unet("tiny", sample_size=4)
    torch.manual_seed(1)
    network.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)
    )
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(network))
    return tmp_path


def test_lora_loads_and_unloads(pipe, lora):
    before = clip(pipe)
    pipe.load_lora_weights(lora)
    with_lora = clip(pipe)
    assert not torch.allclose(with_lora, before)
    torch.testing.assert_close(clip(pipe, cross_attention_kwargs={"scale": 0.0}), before)
    pipe.fuse_lora()
    torch.testing.assert_close(clip(pipe), with_lora, atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(clip(pipe), before, atol=1e-4, rtol=1e-4)


def test_lcm_lora_works_with_its_scheduler(pipe, lora):
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(lora)
    assert clip(pipe, num_inference_steps=4, guidance_scale=1.0).shape == (1, 4, 3, 32, 32)


def test_inflate_after_a_lora_is_rejected_where_it_cannot_work(pipe, lora):
    pipe.load_lora_weights(lora)
    expected = clip(pipe)
    inflate(pipe.unet, Shift())  # norms carry the shift: a LoRA on convolutions is no obstacle
    torch.testing.assert_close(clip(pipe), expected)
    with pytest.raises(ValueError, match="inflate before adding adapters"):
        inflate(deflate(models_with_lora_on_conv2()), Shift(place="end"))


def models_with_lora_on_conv2():
    network = sizes.unet("tiny", sample_size=4)
    network.add_adapter(LoraConfig(r=2, target_modules=["conv2"]))
    return network


def test_ip_adapter_conditions_every_frame(pipe):
    """A picture beside the words: every frame of the clip sees it."""
    before = clip(pipe)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    embeds = [torch.zeros(2, 1, 16)]
    for arguments in ({"ip_adapter_image": picture}, {"ip_adapter_image_embeds": embeds}):
        with pytest.raises(
            ValueError, match=r"has no effect without an IP-Adapter; call pipe.load_ip_adapter"
        ):
            clip(pipe, **arguments)
    torch.manual_seed(2)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16, projection_dim=16)  # fmt: skip
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(config).eval(),
        feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
    )
    width, adapter = pipe.unet.config.cross_attention_dim, {}
    numbers = iter(range(1, 100, 2))
    for name in pipe.unet.attn_processors:
        if name.endswith("attn2.processor"):
            key = next(numbers)
            channels = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for part in ("k", "v"):
                adapter[f"{key}.to_{part}_ip.weight"] = torch.randn(channels, width) * 0.2
    projection = {"proj.weight": torch.randn(4 * width, 16), "proj.bias": torch.zeros(4 * width), "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}  # fmt: skip
    pipe.load_ip_adapter({"image_proj": projection, "ip_adapter": adapter}, subfolder="", weight_name="")
    for value in (embeds[0], embeds * 2, [0]):
        with pytest.raises(ValueError, match="expected ip_adapter_image_embeds as a list of 1 tensors"):
            clip(pipe, ip_adapter_image_embeds=value)
    with pytest.raises(ValueError, match="expected ip_adapter_image for the IP-Adapter of the model"):
        clip(pipe)
    with pytest.raises(ValueError, match="expected ip_adapter_image or ip_adapter_image_embeds, not both"):
        clip(pipe, ip_adapter_image=picture, ip_adapter_image_embeds=embeds)
    shown = clip(pipe, ip_adapter_image=picture)
    assert not torch.allclose(shown, before)
    pipe.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(clip(pipe, ip_adapter_image=picture), before, atol=1e-5, rtol=1e-5)
    pipe.set_ip_adapter_scale(1.0)
    both = pipe(
        ["red", "red"], generator=[seed(0), seed(0)], output_type="pt", ip_adapter_image=picture
    ).frames
    torch.testing.assert_close(both, shown.expand_as(both), atol=1e-5, rtol=1e-5)


def test_controlnet_takes_a_picture_for_every_frame(pipe):
    """diffusers' own pipeline with the inflated U-Net: F prompts and F pictures are one clip."""
    torch.manual_seed(3)
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 8, 8)).eval()
    pictures = [Image.fromarray(np.full((32, 32, 3), 60 * k, np.uint8)) for k in range(4)]
    theirs = StableDiffusionControlNetPipeline(
        **{**pipe.components, "controlnet": control}, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(4, 4, 4, 4, generator=seed(0))

    def controlled():
        with frames(pipe.unet, 4):
            return theirs(
                ["red"] * 4,
                pictures,
                latents=noise,
                num_inference_steps=2,
                guidance_scale=3.0,
                output_type="pt",
            ).images

    ours = pipe("red", latents=noise.transpose(0, 1)[None], output_type="pt").frames[0]
    torch.testing.assert_close(controlled(), ours, atol=1e-5, rtol=1e-5)  # a new ControlNet says nothing yet
    for parameter in control.controlnet_mid_block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert not torch.allclose(controlled(), ours, atol=1e-3)


@pytest.mark.parametrize(
    "enable",
    [
        lambda pipe: pipe.vae.enable_slicing(),
        lambda pipe: pipe.unet.fuse_qkv_projections(),
        lambda pipe: pipe.unet.set_attn_processor(dict(pipe.unet.attn_processors)),
        lambda pipe: pipe.enable_attention_slicing(1),
        lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
        lambda pipe: pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level"),
    ],
    ids=[
        "vae slicing",
        "fused projections",
        "processors",
        "attention slicing",
        "channels last",
        "group offload",
    ],
)
def test_memory_and_speed_options_keep_the_clip(pipe, enable):
    before = clip(pipe)
    enable(pipe)
    torch.testing.assert_close(clip(pipe), before, atol=1e-4, rtol=1e-4)


def test_vae_tiling_keeps_the_size(pipe):
    pipe.vae.enable_tiling()
    assert clip(pipe, height=64, width=64, num_inference_steps=1).shape == (1, 4, 3, 64, 64)


def test_freeu_changes_the_clip(pipe):
    before = clip(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert not torch.allclose(clip(pipe), before)
    pipe.disable_freeu()
    torch.testing.assert_close(clip(pipe), before)


def test_layerwise_casting_stores_weights_in_eight_bits(pipe):
    before = clip(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.unet.down_blocks[0].resnets[0].conv1.weight.dtype == torch.float8_e4m3fn
    after = clip(pipe)
    assert not torch.equal(after, before)
    assert (after - before).abs().mean() < 0.05


def test_weight_only_quantization_works(pipe):
    before = clip(pipe)
    quantize_(pipe.unet, Int8WeightOnlyConfig())
    after = clip(pipe)
    assert not torch.equal(after, before)
    assert (after - before).abs().mean() < 0.02


def test_half_precision_round_trip(pipe, tmp_path):
    pipe.to(torch.bfloat16)
    expected = clip(pipe)
    pipe.save_pretrained(tmp_path)
    again = LatentShiftPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    assert again.unet.dtype == torch.bfloat16
    torch.testing.assert_close(clip(again), expected)
