"""Checkpoints as they circulate, and damaged ones: loaded as what they are, or refused in one line that names the file."""

import json
import logging
import random
import shutil

import numpy as np
import original_layout
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_single_file import small  # noqa: F401
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from latent_shift.models import sizes
from latent_shift.models.loading import check_types, open_tokenizer
from latent_shift.models.parts import part_shapes, variants
from latent_shift.pipelines import catalog, single_file
from latent_shift.pipelines.descriptions import describe
from latent_shift.pipelines.loading import load
from latent_shift.pipelines.lora import load_lora
from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline
from latent_shift.runtime import seed

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_LAYER = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(texts, tmp_path_factory):
    """The folder of a tiny pipeline."""
    torch.manual_seed(0)
    pipe = LatentShiftPipeline(
        sizes.autoencoder("tiny").eval(),
        CLIPTextModel.from_pretrained(texts / "text_encoder"),
        CLIPTokenizer.from_pretrained(texts / "tokenizer"),
        sizes.unet("tiny", sample_size=4).eval(),
        DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        latent_shift={"num_frames": 2, "num_inference_steps": 2, "guidance_scale": 3.0},
    )
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


def sample(pipe, prompt: str = "red") -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, generator=seed(0)).frames


def edit(path, **changes) -> None:
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **changes}))


def refusal(model, **options) -> str:
    """The message of the ValueError that loading ends in, of one line and with the name of the model."""
    with pytest.raises(ValueError, match=r".") as error:
        load(model, device="cpu", **options)
    message = str(error.value)
    assert "\n" not in message and str(model) in message
    return message


# Folders.


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"in_channels": 9}, r"takes 9 channels \(an inpainting, depth or edit model"),
        ("unet/config.json", {"in_channels": 5}, r"takes 5 channels"),
        ("unet/config.json", {"class_embed_type": "projection"}, "takes more than text, as unCLIP models do"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "with 1 text encoders"),
        ("unet/config.json", {"cross_attention_dim": 768}, "takes texts 768 wide, its text encoders return 32"),
        ("unet/config.json", {"layers_per_block": 900}, "unet has 900 layers by its config.json, but weights of"),
        ("unet/config.json", {"block_out_channels": [16, 32, 64]}, "cannot be opened as UNet2DConditionModel"),
        ("unet/config.json", {"flip_sin_to_cos": "false"}, "flip_sin_to_cos: expected true or false, got 'false'"),
        ("vae/config.json", {"scaling_factor": "0.18215"}, "scaling_factor: Input should be a valid number"),
        ("vae/config.json", {"block_out_channels": None, "latents_mean": "x"}, "latents_mean: Input should be a valid list"),
        ("text_encoder/config.json", {"hidden_size": 10**9}, "hidden_size: Input should be less than or equal to"),
        ("text_encoder/config.json", {"num_attention_heads": "two"}, "num_attention_heads"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "trained in the formulation of EDM"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"),
        ("scheduler/scheduler_config.json", {"_class_name": "NoScheduler"}, "diffusers has no scheduler NoScheduler"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "no"}, "cannot be opened as DDIMScheduler"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type: Input should be 'epsilon'"),
        ("model_index.json", {"unet": ["diffusers", "UNet3DConditionModel"]}, "its unet is a UNet3DConditionModel"),
        ("model_index.json", {"vae": "vae"}, "vae: expected a library and a class, got \"vae\""),
        ("model_index.json", {"latent_shift": {"num_frames": "many"}}, "latent_shift.num_frames: Input should be a valid"),
        ("model_index.json", {"text_encoder": ["transformers", "NoModel"]}, "transformers has no NoModel"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, "from 3 to 20"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "20"}, "from 3 to 20, .* got '20'"),
        ("tokenizer/tokenizer_config.json", {"pad_token": None}, "cannot be opened as a tokenizer"),
        ("vae/config.json", {"scaling_factor": 1e300}, "scaling_factor: Input should be less than or equal to 1000"),
        ("text_encoder/config.json", {"eos_token_id": [1, 2]}, "eos_token_id: Input should be a valid integer"),
        ("unet/config.json", {"sample_size": 10_000}, "sample_size: Input should be less than or equal to 1024"),
        ("vae/config.json", {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "latents_mean: .*expected 4 numbers"),
        ("vae/config.json", {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 5}, "latents_std: .*expected 4 numbers"),
        ("unet/config.json", {"mid_block_type": None}, "tensors that a UNet2DConditionModel of its config.json lacks, such as mid"),
        ("vae/config.json", {"use_post_quant_conv": False}, "have 2 tensors that a AutoencoderKL of .* lacks, such as post_quant"),
        ("text_encoder/config.json", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)  # fmt: skip
def test_load_refuses_settings_of_other_models_and_types(file, changes, message, copied):
    edit(copied / file, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load(copied, device="cpu")
    assert str(copied) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_load_refuses_tensors_that_no_layer_takes(part, copied):
    (file,) = (copied / part).glob("*.safetensors")
    save_file({**load_file(file), "other.weight": torch.zeros(3)}, file, metadata={"format": "pt"})
    assert "its weights have 1 tensors that a " in refusal(copied) and "such as other.weight" in refusal(
        copied
    )


def test_load_takes_a_whole_clip_for_its_text_encoder(model, copied):
    expected = sample(load(model, device="cpu"))
    text = CLIPTextModel.from_pretrained(copied / "text_encoder")
    vision = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    clip = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=vision, projection_dim=8))
    whole = {name: value for name, value in clip.state_dict().items() if not name.startswith("text_model.")}
    assert {name.split(".")[0] for name in whole} == {
        "vision_model",
        "visual_projection",
        "text_projection",
        "logit_scale",
    }
    for name, value in text.state_dict().items():
        whole[f"text_model.{name.removeprefix('text_model.')}"] = value
    save_file(whole, copied / "text_encoder" / "model.safetensors")
    np.testing.assert_array_equal(sample(load(copied, device="cpu")), expected)


def test_a_model_without_a_size_asks_for_one(copied):
    edit(copied / "unet" / "config.json", sample_size=None)
    pipe = load(copied, device="cpu")
    with pytest.raises(
        ValueError, match=r"expected height and width \(--height, --width\): unet/config.json"
    ):
        pipe("red", height=32)
    assert pipe("red", height=16, width=32).frames.shape[2:] == (16, 32, 3)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("text", ["[]", "", '{"a": ', "\x00", "null", "[" * 100_000])
def test_load_refuses_files_that_hold_no_object(file, text, copied):
    (copied / file).write_text(text)
    assert "expected a JSON" in refusal(copied)
    with pytest.raises(ValueError, match="expected a JSON"):
        describe(copied)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_load_refuses_damaged_weights(part, copied):
    (file,) = (copied / part).glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert "the file is cut short, download it again" in refusal(copied)
    tensors = load_file(file) if file.write_bytes(whole) else {}
    lost = min(tensors)
    save_file(
        {name: value for name, value in tensors.items() if name != lost}, file, metadata={"format": "pt"}
    )
    assert f"its weights lack 1 of {len(tensors)} tensors" in refusal(copied) and lost in refusal(copied)
    save_file({**tensors, lost: torch.zeros(3)}, file, metadata={"format": "pt"})
    assert "cannot be opened as" in refusal(copied)
    torch.save(tensors, file.with_name(file.stem + ".bin"))
    file.unlink()
    assert (
        f"{part} has no .safetensors weights, only {file.stem}.bin (pickle files can run any program"
        in refusal(copied)
    )


def quantized(name: str, weight: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of quantized files by the name that gives them away: one weight in another dtype, or a scale."""
    scales = ("scaled_fp8", f"{name}_scale", f"{name.removesuffix('weight')}scale_weight")
    return {
        name: {name: (weight * 127).to(torch.int8)},
        **{scale: {name: weight.to(torch.float8_e4m3fn), scale: torch.ones(1)} for scale in scales},
    }


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_load_refuses_a_part_of_another_dtype(dtype, copied):
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "encoder.conv_in.weight": tensors["encoder.conv_in.weight"].to(dtype)}, file)
    assert "has encoder.conv_in.weight of" in refusal(copied)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_load_refuses_quantized_parts(part, copied):
    (file,) = (copied / part).glob("*.safetensors")
    tensors = load_file(file)
    name = min(name for name in tensors if name.endswith("weight"))
    for given_away, change in quantized(name, tensors[name]).items():
        save_file({**tensors, **change}, file)
        assert f"has {given_away} of" in refusal(copied) and "its weights are quantized" in refusal(copied)


def test_load_refuses_a_pickled_safety_checker(copied):
    (copied / "safety_checker").mkdir()
    torch.save({}, copied / "safety_checker" / "pytorch_model.bin")
    edit(copied / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert "safety_checker has no .safetensors weights, only pytorch_model.bin" in refusal(copied)


def test_load_says_how_a_transformer_is_shifted(tmp_path):
    index = {"_class_name": "PixArtSigmaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "holds a PixArtSigmaPipeline, whose transformer is shifted inside" in refusal(tmp_path)


def test_load_takes_shards_and_variants(model, copied):
    """Shards of a variant, and a part that has only plain weights."""
    expected = sample(load(model, device="cpu"))
    plain = copied / "unet" / "diffusion_pytorch_model.safetensors"
    unet = UNet2DConditionModel.from_pretrained(copied / "unet")
    plain.unlink()
    unet.save_pretrained(copied / "unet", max_shard_size="60KB", variant="fp16")
    assert variants(copied / "unet") == {"fp16"} and len(list((copied / "unet").glob("*-of-*"))) > 2
    assert part_shapes(copied / "unet") == {name: tuple(x.shape) for name, x in unet.state_dict().items()}
    for variant in (None, "fp16"):  # convolutions add in another order where a shard ends elsewhere in memory
        np.testing.assert_allclose(sample(load(copied, device="cpu", variant=variant)), expected, atol=1e-4)
    assert describe(copied)["unet"] == describe(model)["unet"]
    assert "unet has no weights of variant 'bf16'; it has fp16" in refusal(copied, variant="bf16")
    shard = min((copied / "unet").glob("*00002-of-*"))
    shard.rename(shard.with_name("away"))
    assert f"the shard {shard.name} is missing" in refusal(copied)
    save_file({"x": torch.zeros(1)}, shard)
    assert f"which {'diffusion_pytorch_model.safetensors.index.fp16.json'} says it holds" in refusal(copied)
    (index,) = (copied / "unet").glob("*.index*.json")
    edit(index, weight_map={"conv_in.weight": "../../secret.safetensors"})
    assert "expected the name of a .safetensors file beside it" in refusal(copied)


def test_load_takes_old_names_of_attention_and_positions(model, copied):
    """Folders from before diffusers 0.18 and transformers 4.31."""
    expected = sample(load(model, device="cpu"))
    encoder = copied / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": x for name, x in load_file(encoder).items()}
    save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(20)[None]}, encoder)
    np.testing.assert_array_equal(sample(load(copied, device="cpu")), expected)
    edit(copied / "model_index.json", feature_extractor=["transformers", "CLIPFeatureExtractor"])
    (copied / "feature_extractor").mkdir()
    (copied / "feature_extractor" / "preprocessor_config.json").write_text('{"crop_size": 32, "size": 32}')
    np.testing.assert_array_equal(sample(load(copied, device="cpu")), expected)


def test_load_runs_no_code_of_a_folder(copied, monkeypatch):
    """transformers would ask on standard input whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for folder in ("tokenizer", "text_encoder"):
        (copied / folder / "evil.py").write_text(f"open({str(copied / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit(
        copied / "tokenizer" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
        tokenizer_class="Evil",
    )
    assert "tokenizer" in refusal(copied)
    assert not (copied / "ran").exists()


def test_load_names_a_damaged_feature_extractor(copied):
    edit(copied / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    assert "feature_extractor: cannot be opened as the image processor of a safety checker" in refusal(copied)
    (copied / "feature_extractor").mkdir()
    (copied / "feature_extractor" / "preprocessor_config.json").write_text("[]")
    assert "feature_extractor" in refusal(copied)


@pytest.mark.parametrize("missing", ["tokenizer.json", "merges.txt"])
def test_load_refuses_a_tokenizer_without_vocabulary(missing, copied):
    """transformers opens it, and every prompt is the same."""
    vocabulary = json.loads((copied / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    (copied / "tokenizer" / "tokenizer.json").unlink()
    if missing == "merges.txt":
        tokens = {**vocabulary, **{f"ab{index}</w>": 54 + index for index in range(10)}}
        (copied / "tokenizer" / "vocab.json").write_text(json.dumps(tokens))
        (copied / "tokenizer" / "merges.txt").write_text("#version: 0.2\na b\n")
        assert "merges.txt has 1 merges for 10 tokens of vocab.json: it is cut short" in refusal(copied)
    else:
        assert "has no vocabulary; expected tokenizer.json, vocab.json with merges.txt" in refusal(copied)


def test_open_tokenizer_refuses_that_of_another_encoder(model):
    clip = single_file.tokenizer()
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder")
    clip.save_pretrained(model.parent / "clip-tokenizer")
    with pytest.raises(
        ValueError, match="has 49408 tokens, its text encoder 54: they belong to different models"
    ):
        open_tokenizer(model.parent / "clip-tokenizer", encoder)


def test_check_types_takes_settings_as_they_are_published(tmp_path):
    """null for a flag that is off (SDXL), one number for a list, a whole number for a fraction."""
    published = {
        "upcast_attention": None,
        "attention_head_dim": [5, 10],
        "mid_block_scale_factor": 1,
        "num_attention_heads": None,
    }
    check_types(
        UNet2DConditionModel, {**json.loads(sizes.unet("tiny").to_json_string()), **published}, tmp_path
    )
    for name, value in {"norm_eps": None, "attention_head_dim": "8", "act_fn": 1}.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            check_types(UNet2DConditionModel, {name: value}, tmp_path)


def test_load_takes_the_prediction_that_is_given(model):
    assert load(model, device="cpu").scheduler.config.prediction_type == "epsilon"
    assert (
        load(model, device="cpu", prediction="v_prediction").scheduler.config.prediction_type
        == "v_prediction"
    )
    with pytest.raises(ValueError, match="prediction: expected epsilon or v_prediction, got 'v'"):
        load(model, device="cpu", prediction="v")


def test_load_refuses_hub_ids_at_once_when_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="owner/name: no such folder, and HF_HUB_OFFLINE forbids to ask the Hub"
    ):
        catalog.check_model("owner/name")


def outcome(folder, expected: np.ndarray) -> str | None:
    """The message of the refusal of a model, or None for one that samples finite numbers."""
    try:
        clip = sample(load(folder, device="cpu"))
    except (ValueError, OSError) as error:
        return str(error)
    assert clip.shape != expected.shape or np.isfinite(clip).all()
    return None


def test_load_survives_random_damage(model, copied):
    """Any value anywhere: the same clip, or one line. `make fuzz` tries more."""
    rng, expected = random.Random(0), sample(load(model, device="cpu"))
    values = [None, "x", -1, 0, 1.5, [], {}, True, 10**12, [1, 2], float("nan")]
    files = [file for file in sorted(copied.rglob("*.json")) if file.name != "vocab.json"]
    for _ in range(25):
        file = rng.choice(files)
        text = file.read_text()
        settings = json.loads(text)
        name = rng.choice(sorted(settings))
        edit(file, **{name: rng.choice(values)})
        message = outcome(copied, expected)
        assert message is None or "\n" not in message, f"{file.name}: {name}"
        file.write_text(text)


# Single files.


def test_measure_prediction_tells_noise_from_v(small):  # noqa: F811
    """A network of SD 2's layout trained to predict the noise at the last timestep, where it is the input."""
    torch.manual_seed(0)
    pipe = single_file.blank("sd2")
    assert single_file.measure_prediction(pipe) == "v_prediction"
    optimizer = torch.optim.Adam(pipe.unet.parameters(), lr=2e-3)
    text = torch.zeros(4, 77, pipe.unet.config.cross_attention_dim)
    for _ in range(20):
        noise = torch.randn(4, 4, 8, 8)
        loss = (pipe.unet(noise, 999, text).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert single_file.measure_prediction(pipe) == "epsilon"


@pytest.mark.parametrize(
    ("step", "prediction", "picture"),
    [(875_000, "epsilon", 512), (220_000, "epsilon", 512), (140_000, None, 768)],
)
def test_file_prediction_reads_the_steps_of_stability(step, prediction, picture, small, tmp_path):  # noqa: F811
    tensors = original_layout.of(single_file.blank("sd2"), "sd2")
    path = tmp_path / "x.safetensors"
    save_file({**{k: v.contiguous() for k, v in tensors.items()}, "global_step": torch.tensor(step)}, path)
    assert catalog.file_prediction(path) == prediction
    pipe = load(path, device="cpu")
    assert pipe.scheduler.config.prediction_type == (prediction or "v_prediction")
    if prediction:
        assert pipe.unet.config.sample_size == 64 and describe(path)["picture"] == "512x512 pixels"


OTHER_FILES = {
    "edm_mean": "this is Playground 2.5",
    "edm_vpred.sigma_max": "this is CosXL",
    "model.diffusion_model.label_emb.0.0.weight": "this is an unCLIP model",
}


@pytest.mark.parametrize(("tensor", "message"), OTHER_FILES.items())
def test_load_names_files_that_look_like_another_family(tensor, message, small, tmp_path):  # noqa: F811
    tensors = original_layout.of(single_file.blank("sd2"), "sd2")
    path = tmp_path / "x.safetensors"
    save_file({**{k: v.contiguous() for k, v in tensors.items()}, tensor: torch.zeros(2, 2)}, path)
    assert message in refusal(path)
    with pytest.raises(ValueError, match=message):
        describe(path)


def test_load_refuses_a_file_that_lacks_tensors_or_has_others(small, tmp_path):  # noqa: F811
    tensors = {k: v.contiguous() for k, v in original_layout.of(single_file.blank("sd1"), "sd1").items()}
    path, unet = tmp_path / "x.safetensors", "model.diffusion_model.middle_block.0.in_layers.2.weight"
    for name, part in ((unet, "unet"), ("first_stage_model.encoder.conv_in.bias", "vae"),
                       ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text_encoder")):  # fmt: skip
        save_file({key: value for key, value in tensors.items() if key != name}, path)
        assert f"its {part} lacks 1 of" in refusal(path)
    save_file({**tensors, unet: torch.zeros(8, 8, 3, 3)}, path)
    assert "another model, or quantized" in refusal(path)
    for name, change in quantized(unet, tensors[unet]).items():
        save_file({**tensors, **change}, path)
        assert f"has {name} of" in refusal(path) and "its weights are quantized" in refusal(path)
        with pytest.raises(ValueError, match="its weights are quantized"):
            describe(path)


def test_load_takes_old_names_in_a_single_file(small, tmp_path):  # noqa: F811
    """CLIP without "text_model.", position_ids, and attention of the autoencoder by diffusers' names."""
    torch.manual_seed(0)
    pipe = single_file.blank("sd1")
    old = {"transformer.text_model.": "transformer.", "attn_1.q.": "attn_1.to_q.", "attn_1.k.": "attn_1.key.", "attn_1.v.": "attn_1.to_v.",
           "attn_1.proj_out.": "attn_1.to_out.0.", "attn_1.norm.": "attn_1.group_norm."}  # fmt: skip
    tensors = {"cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)[None]}
    for name, value in original_layout.of(pipe, "sd1").items():
        for present, before in old.items():
            name = name.replace(present, before)
        tensors[name] = (
            value[:, :, 0, 0].contiguous() if "attn_1" in name and value.ndim == 4 else value.contiguous()
        )
    save_file(tensors, tmp_path / "old.safetensors")
    loaded = load(tmp_path / "old.safetensors", device="cpu")
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(pipe, part).state_dict()
        assert all(
            torch.equal(value, expected[name]) for name, value in getattr(loaded, part).state_dict().items()
        )


# LoRA.


def lora_tensors(rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rank, 32, generator=generator), torch.randn(32, rank, generator=generator)


def lora_files() -> dict[str, dict[str, torch.Tensor]]:
    """The same LoRA of one layer by every naming."""
    down, up = lora_tensors()
    kohya = "lora_unet_" + LAYER.replace(".", "_")
    old = LAYER.replace(".to_q", ".processor.to_q_lora")
    return {
        "diffusers": {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up},
        "diffusers, older": {f"unet.{LAYER}.lora.down.weight": down, f"unet.{LAYER}.lora.up.weight": up},
        "diffusers, oldest": {f"unet.{old}.down.weight": down, f"unet.{old}.up.weight": up},
        "no prefix": {f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up},
        "peft": {f"base_model.model.{LAYER}.lora_A.weight": down, f"base_model.model.{LAYER}.lora_B.weight": up},
        "peft's layers": {f"base_model.model.{LAYER}.lora_A.default.weight": down, f"base_model.model.{LAYER}.lora_B.default.weight": up},
        "kohya": {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up, f"{kohya}.alpha": torch.tensor(2.0)},
    }  # fmt: skip


@pytest.mark.parametrize("naming", lora_files())
def test_load_lora_adds_the_same_matrices_by_any_naming(naming, model, tmp_path):
    """The layer's weight grows by up @ down."""
    save_file(lora_files()[naming], tmp_path / "l.safetensors")
    pipe = load(model, device="cpu")
    weight = pipe.unet.get_submodule(LAYER).weight.clone()
    load_lora(pipe, tmp_path / "l.safetensors")
    pipe.fuse_lora()
    down, up = lora_tensors()
    torch.testing.assert_close(pipe.unet.get_submodule(LAYER).base_layer.weight, weight + up @ down)


@pytest.mark.parametrize(
    ("naming", "alpha"),
    [
        ("diffusers", f"unet.{LAYER}.alpha"),
        ("diffusers, older", f"unet.{LAYER}.lora.alpha"),
        ("diffusers, oldest", f"unet.{LAYER.replace('.to_q', '.processor.to_q_lora')}.alpha"),
        ("no prefix", f"{LAYER}.alpha"),
        ("peft", f"base_model.model.{LAYER}.alpha"),
        ("kohya", f"lora_unet_{LAYER.replace('.', '_')}.alpha"),
    ],
)
def test_load_lora_scales_a_layer_by_its_alpha_over_its_rank(naming, alpha, model, tmp_path):
    """An alpha of 1 and a rank of 2; the file of peft beside it, of all layers, is for those without."""
    save_file({**lora_files()[naming], alpha: torch.tensor(1)}, tmp_path / "l.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    pipe = load(model, device="cpu")
    weight = pipe.unet.get_submodule(LAYER).weight.clone()
    load_lora(pipe, tmp_path / "l.safetensors")
    pipe.fuse_lora()
    down, up = lora_tensors()
    torch.testing.assert_close(pipe.unet.get_submodule(LAYER).base_layer.weight, weight + up @ down / 2)


@pytest.mark.parametrize("naming", ["diffusers", "kohya", "peft"])
def test_load_lora_adds_to_the_text_encoder(naming, model, tmp_path):
    (down, up), kohya = lora_tensors(), "lora_te_" + TEXT_LAYER.replace(".", "_")
    files = {
        "diffusers": {f"text_encoder.{TEXT_LAYER}.lora_linear_layer.down.weight": down, f"text_encoder.{TEXT_LAYER}.lora_linear_layer.up.weight": up},
        "kohya": {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up, f"{kohya}.alpha": torch.tensor(1.0)},
        "peft": {f"base_model.model.{TEXT_LAYER}.lora_A.weight": down, f"base_model.model.{TEXT_LAYER}.lora_B.weight": up},
    }  # fmt: skip
    save_file(files[naming], tmp_path / "l.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    pipe, layer = load(model, device="cpu"), TEXT_LAYER.removeprefix("text_model.")
    weight = pipe.text_encoder.get_submodule(layer).weight.clone()
    load_lora(pipe, tmp_path / "l.safetensors")
    pipe.fuse_lora()
    scale = {"diffusers": 1, "kohya": 1 / 2, "peft": 4 / 2}[naming]
    torch.testing.assert_close(
        pipe.text_encoder.get_submodule(layer).base_layer.weight, weight + scale * up @ down
    )


OTHER_LORAS = {
    "flux": "transformer.single_transformer_blocks.0.attn.to_q",
    "wan": "diffusion_model.blocks.0.self_attn.q",
    "motion": "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q",
    "second text encoder": f"text_encoder_2.{TEXT_LAYER}",
}


@pytest.mark.parametrize("layer", [*OTHER_LORAS.values(), "unet." + LAYER])
def test_load_lora_refuses_a_lora_of_which_no_tensor_fits(layer, model, tmp_path):
    width = 48 if layer.startswith("unet.") else 32
    pipe, path = load(model, device="cpu"), tmp_path / "l.safetensors"
    save_file(
        {f"{layer}.lora_A.weight": torch.randn(4, width), f"{layer}.lora_B.weight": torch.randn(width, 4)},
        path,
    )
    before = sample(pipe)
    with pytest.raises(ValueError, match=r"none of its 2 tensors, such as .*, fits a layer of this model"):
        load_lora(pipe, path)
    np.testing.assert_array_equal(sample(pipe), before)


def test_load_lora_counts_the_tensors_that_do_not_fit(model, tmp_path, caplog):
    other = OTHER_LORAS["motion"]
    down, up = lora_tensors()
    save_file(
        {**lora_files()["diffusers"], f"unet.{other}.lora_A.weight": down, f"unet.{other}.lora_B.weight": up},
        tmp_path / "l.safetensors",
    )
    pipe = load(model, device="cpu")
    with caplog.at_level(logging.WARNING, "latent_shift"):
        load_lora(pipe, tmp_path / "l.safetensors")
    assert (
        "2 of its 4 tensors fit no layer of this model and are left out, such as unet.down_blocks"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"lora_unet_x.hada_w1_a": 1}, None, "a LoHa, LoKr or OFT of LyCORIS"),
        (None, {"latent_shift": "{"}, "its header has settings that are not JSON"),
        (None, {"latent_shift": "[]"}, "Input should be a valid dictionary"),
        (None, {"latent_shift": '{"forward": 2}'}, "forward: Input should be less than or equal to 1"),
    ],
)
def test_load_lora_refuses_damaged_and_other_adapters(tensors, metadata, message, model, tmp_path):
    tensors = {name: torch.zeros(2, 2) for name in tensors} if tensors else lora_files()["diffusers"]
    save_file(tensors, tmp_path / "l.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=message) as error:
        load_lora(load(model, device="cpu"), tmp_path / "l.safetensors")
    assert "l.safetensors" in str(error.value)


@pytest.mark.parametrize("naming", ["diffusers", "kohya", "peft's layers"])
def test_load_lora_refuses_one_matrix_of_a_layer(naming, model, tmp_path):
    pipe = load(model, device="cpu")
    for half in list(lora_files()[naming])[:2]:
        save_file({half: lora_files()[naming][half]}, tmp_path / "l.safetensors")
        with pytest.raises(ValueError, match=r"no second matrix|KeyError|not been correctly renamed"):
            load_lora(pipe, tmp_path / "l.safetensors")


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_load_lora_refuses_numbers_that_are_no_weights(naming, model, tmp_path):
    pipe, tensors = load(model, device="cpu"), lora_files()[naming]
    up, layer = list(tensors)[1], list(tensors)[1].partition(".lora_")[0]
    changes = {
        r"lora_(B|up).weight holds torch.int8; expected a LoRA of floats": {up: tensors[up].to(torch.int8)},
        r"lora_(B|up).weight holds NaN or infinite numbers": {up: tensors[up] / 0},
        r"alpha: expected one finite number, got nan": {f"{layer}.alpha": torch.tensor(float("nan"))},
        r"alpha: expected one finite number, got \[1.0, 1.0\]": {f"{layer}.alpha": torch.ones(2)},
        r"dora_scale: a DoRA; expected a LoRA": {f"{layer}.dora_scale": torch.ones(32, 1)},
        r"lora_magnitude_vector: a DoRA": {f"{layer}.lora_magnitude_vector": torch.ones(32)},
    }
    for message, change in changes.items():
        save_file({**tensors, **change}, tmp_path / "l.safetensors")
        with pytest.raises(ValueError, match=message):
            load_lora(pipe, tmp_path / "l.safetensors")


def test_load_lora_refuses_matrices_of_different_ranks_and_lost_alphas(model, tmp_path):
    pipe, tensors = load(model, device="cpu"), lora_files()["diffusers"]
    for message, change in {
        "is of rank 2, .* of rank 3": {f"unet.{LAYER}.lora_B.weight": torch.ones(32, 3)},
        "x.alpha belongs to none of its matrices": {"x.alpha": torch.tensor(1.0)},
        "of several adapters": {f"unet.{LAYER}.lora_A.b.weight": torch.ones(2, 32)},
    }.items():
        save_file({**tensors, **change}, tmp_path / "l.safetensors")
        with pytest.raises(ValueError, match=message):
            load_lora(pipe, tmp_path / "l.safetensors")


def test_save_pretrained_merges_a_lora(model, tmp_path):
    """What is saved generates what the pipeline generates, here and in diffusers, and the pipeline keeps its LoRA."""
    network = sizes.unet("tiny", sample_size=4)
    torch.manual_seed(1)
    network.add_adapter(
        LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "conv1"], init_lora_weights=False)
    )
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(network))
    pipe = load(model, device="cpu")
    before = sample(pipe)
    load_lora(pipe, tmp_path / "pytorch_lora_weights.safetensors")
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(sample(pipe), expected)
    assert not np.allclose(expected, before, atol=1e-3)
    assert part_shapes(tmp_path / "saved" / "unet").keys() == part_shapes(model / "unet").keys()
    np.testing.assert_allclose(sample(load(tmp_path / "saved", device="cpu")), expected, atol=1e-4)
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "saved").unet.config.sample_size == 4
