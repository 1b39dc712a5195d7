"""Checkpoints as people have them: folders and single files of the three families, and everything that is not one."""

import struct
from dataclasses import replace

import numpy as np
import original_layout
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file

from latent_shift.pipelines import single_file
from latent_shift.pipelines.descriptions import describe
from latent_shift.pipelines.loading import load
from latent_shift.runtime import seed

SMALL_TEXTS = [
    dict(
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
    )
    for width in (32, 48)
]


@pytest.fixture
def small(monkeypatch):
    """The families with the layout they have, narrow."""
    for name, family in single_file.FAMILIES.items():
        levels = 3 if name == "sdxl" else 4
        unet = {
            **family.unet,
            "block_out_channels": (32, 32, 64, 64)[:levels],
            "layers_per_block": 1,
            "sample_size": 8,
        }
        unet |= {
            "cross_attention_dim": sum(text["hidden_size"] for text in SMALL_TEXTS[: len(family.texts)]),
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        }
        if name == "sdxl":
            unet |= {
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 48 + 6 * 8,
                "transformer_layers_per_block": (1, 1, 2),
            }
        vae = {
            **family.vae,
            "block_out_channels": (16, 16, 32, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
        }
        texts = tuple({**text, **small} for text, small in zip(family.texts, SMALL_TEXTS, strict=False))
        monkeypatch.setitem(single_file.FAMILIES, name, replace(family, unet=unet, vae=vae, texts=texts))


def test_families_match_the_published_models():
    """Parameters as the model cards say: 860 M, 865 M (866), 2.6 B."""
    counts = {
        name: [sum(p.numel() for p in part.parameters()) for part in _parts(name)]
        for name in single_file.FAMILIES
    }
    assert counts == {
        "sd1": [859_520_964, 83_653_863, 123_060_480],
        "sd2": [865_910_724, 83_653_863, 340_387_840],
        "sdxl": [2_567_463_684, 83_653_863, 123_060_480, 694_659_840],
    }


def _parts(name):
    pipe = single_file.blank(name, config_only=True)
    return [pipe.unet, pipe.vae, pipe.text_encoder, *([pipe.text_encoder_2] if name == "sdxl" else [])]


def test_tokenizer_is_clip():
    tokenizer = single_file.tokenizer()
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (
        tokenizer("An astronaut riding a horse, 4k!").input_ids
        == tokenizer("an  astronaut riding a horse, 4k!").input_ids
    )
    assert single_file.tokenizer("!")("", padding="max_length").input_ids == [49406, 49407, *[0] * 75]


@pytest.mark.parametrize("name", [pytest.param("sd1", marks=pytest.mark.slow), "sd2", "sdxl"])
def test_open_file_equals_the_model_it_was_made_from(name, small, tmp_path):
    torch.manual_seed(0)
    pipe = single_file.blank(name)
    save_file(
        {key: value.contiguous() for key, value in original_layout.of(pipe, name).items()},
        tmp_path / "model.safetensors",
    )
    loaded = load(tmp_path / "model.safetensors", device="cpu")
    assert type(loaded) is type(pipe)
    arguments = dict(num_frames=2, num_inference_steps=2, output_type="pt")
    for each in (pipe, loaded):
        each.set_progress_bar_config(disable=True)
    expected = pipe("a cat", generator=seed(0), **arguments).frames
    torch.testing.assert_close(loaded("a cat", generator=seed(0), **arguments).frames, expected)
    assert loaded.scheduler.config.prediction_type == ("v_prediction" if name == "sd2" else "epsilon")
    described = describe(tmp_path / "model.safetensors")
    assert described["family"] == single_file.FAMILIES[name].title
    assert described["unet"] == f"{sum(p.numel() for p in pipe.unet.parameters()) / 1e6:,.1f} M parameters"
    # What is saved, diffusers opens and makes the same image with.
    loaded.save_pretrained(tmp_path / "folder")
    theirs = (StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline).from_pretrained(
        tmp_path / "folder"
    )
    theirs.set_progress_bar_config(disable=True)
    assert {**describe(tmp_path / "folder"), "format": described["format"]}.items() >= {
        key: described[key] for key in described if key not in ("text_encoder", "predicts")
    }.items()
    by_file = "epsilon or v_prediction: loading finds out" if name == "sd2" else "epsilon"
    assert described["predicts"] == by_file
    assert describe(tmp_path / "folder")["predicts"] == loaded.scheduler.config.prediction_type
    ours = load(tmp_path / "folder", device="cpu")
    ours.set_progress_bar_config(disable=True)
    image = theirs("a cat", generator=seed(0), num_inference_steps=2, output_type="np").images
    np.testing.assert_array_equal(
        ours(
            "a cat",
            num_frames=1,
            generator=seed(0),
            num_inference_steps=2,
            guidance_scale=7.5 if name != "sdxl" else 5.0,
        ).frames[:, 0],
        image,
    )


def test_open_file_reads_the_prediction_type(small, tmp_path):
    tensors = {
        key: value.contiguous()
        for key, value in original_layout.of(single_file.blank("sdxl"), "sdxl").items()
    }
    save_file({**tensors, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "v.safetensors")
    scheduler = load(tmp_path / "v.safetensors", device="cpu").scheduler
    assert (scheduler.config.prediction_type, scheduler.config.rescale_betas_zero_snr) == (
        "v_prediction",
        True,
    )
    save_file(tensors, tmp_path / "e.safetensors")
    assert (
        load(
            tmp_path / "e.safetensors", device="cpu", prediction="v_prediction"
        ).scheduler.config.prediction_type
        == "v_prediction"
    )


def test_load_takes_the_only_variant(small, tmp_path):
    pipe = single_file.blank("sd1", dtype=torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert load(tmp_path, device="cpu").unet.dtype == torch.float32
    assert load(tmp_path, device="cpu", variant="fp16").unet.dtype == torch.float32


OTHERS = {
    "unet.down_blocks.0.lora_A.weight": "this is a LoRA",
    "control_model.input_blocks.0.0.weight": "this is a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "this is a ControlNet",
    "down_blocks.0.motion_modules.0.norm.weight": "motion module of AnimateDiff",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "this is a transformer",
    "down_blocks.0.resnets.0.conv1.weight": "no U-Net of Stable Diffusion's original layout",
}


@pytest.mark.parametrize(("tensor", "message"), OTHERS.items())
def test_load_names_other_kinds_of_files(tensor, message, tmp_path):
    save_file({tensor: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x.safetensors", device="cpu")


@pytest.mark.parametrize(
    ("part", "message"), [("cond_stage_model", "no text encoder"), ("first_stage_model", "no autoencoder")]
)
def test_load_names_a_missing_part_of_a_file(part, message, small, tmp_path):
    tensors = {
        key: value.contiguous() for key, value in original_layout.of(single_file.blank("sd1"), "sd1").items()
    }
    save_file(
        {key: value for key, value in tensors.items() if not key.startswith(part)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x.safetensors", device="cpu")


def test_load_rejects_unreadable_files(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match="a pickle file can run any program"):
        load(tmp_path / "model.ckpt", device="cpu")
    (tmp_path / "text.safetensors").write_text("hello, this is not a file of tensors")
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        load(tmp_path / "text.safetensors", device="cpu")
    save_file({"a": torch.zeros(100)}, tmp_path / "whole.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-40])
    with pytest.raises(
        ValueError, match=r"another size than its \d+ bytes: the file is cut short, download it again"
    ):
        load(tmp_path / "half.safetensors", device="cpu")
    (tmp_path / "empty.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}" + b"  ")
    with pytest.raises(ValueError, match=r"expected a \.safetensors file with weights"):
        load(tmp_path / "empty.safetensors", device="cpu")


def test_load_rejects_incomplete_folders(small, tmp_path):
    pipe = single_file.blank("sd1")
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_index\.json; it holds a UNet2DConditionModel alone"):
        load(tmp_path / "unet", device="cpu")
    (tmp_path / "text_encoder").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="has no text_encoder"):
        load(tmp_path, device="cpu")
    (tmp_path / "elsewhere").rename(tmp_path / "text_encoder")
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"unet has no .safetensors weights"):
        load(tmp_path, device="cpu")
