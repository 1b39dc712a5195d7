"""Systems: the real pipelines of diffusers at tiny size, saved and opened from their folders."""

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DDPMPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MotionAdapter,
    TextToVideoSDPipeline,
    UNet2DModel,
    UNet3DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from latent_shift.evaluation import clip_metrics, evaluate, protocols, systems
from latent_shift.models import sizes
from latent_shift.pipelines.loading import load
from latent_shift.shift import Shift, inflate


def t5(kind=T5EncoderModel, config=T5Config):
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters], extra_ids=0
    )
    network = kind(config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    return {"tokenizer": tokenizer, "text_encoder": network.eval()}


def clip_texts(texts):
    encoder = CLIPTextModel.from_pretrained(texts / "text_encoder")
    return {"tokenizer": CLIPTokenizer.from_pretrained(texts / "tokenizer"), "text_encoder": encoder}


def animatediff(texts):
    unet = sizes.unet("tiny", sample_size=4)
    adapter = MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
    )
    return AnimateDiffPipeline(
        vae=sizes.autoencoder("tiny"),
        unet=unet,
        motion_adapter=adapter,
        scheduler=DDIMScheduler(clip_sample=False),
        **clip_texts(texts),
    )


def modelscope(texts):
    unet = UNet3DConditionModel(
        sample_size=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    return TextToVideoSDPipeline(
        vae=sizes.autoencoder("tiny"),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False),
        **clip_texts(texts),
    )


def cogvideox(texts, **options):
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=16, num_layers=1,
        sample_width=4, sample_height=4, sample_frames=9, patch_size=2, max_text_seq_length=226, **options,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8),
        latent_channels=4, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    return CogVideoXPipeline(transformer=transformer, vae=vae, scheduler=CogVideoXDDIMScheduler(), **t5())


def wan_transformer():
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=16, freq_dim=16,
        ffn_dim=16, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=16,
    )  # fmt: skip


def wan(texts, **options):
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return WanPipeline(
        transformer=wan_transformer(),
        vae=vae,
        scheduler=scheduler,
        **t5(UMT5EncoderModel, UMT5Config),
        **options,
    )


def ltx(texts):
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    return LTXPipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **t5())


MAKERS = {
    "AnimateDiffPipeline": (animatediff, 3), "TextToVideoSDPipeline": (modelscope, 3), "CogVideoXPipeline": (cogvideox, 9),
    "WanPipeline": (wan, 5), "LTXPipeline": (ltx, 9),
}  # fmt: skip


@pytest.mark.parametrize("kind", systems.PEERS)
def test_open_system_opens_every_peer(kind, texts, tmp_path):
    make, num_frames = MAKERS[kind]
    size = 32
    torch.manual_seed(0)
    pipe = make(texts)
    pipe.save_pretrained(tmp_path)
    options = dict(num_frames=num_frames, height=size, width=size, num_inference_steps=2, guidance_scale=3.0)
    system = systems.open_system(str(tmp_path), name="peer", device="cpu", **options)
    assert (system.title, system.fps) == systems.PEERS[kind][:2]
    assert (system.settings["pipeline"], system.settings["dtype"], system.settings["every"]) == (
        kind,
        "float32",
        1,
    )
    assert {key: system.settings[key] for key in options} == options
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    assert system.parameters >= sum(parameter.numel() for parameter in network.parameters()) > 0
    clips = system.generate(["red", "a square"], [0, 1])
    assert clips.shape == (2, num_frames, size, size, 3)
    assert clips.dtype == np.uint8
    assert not np.array_equal(clips[0], clips[1])
    assert system.settings.get("frame_rate") == (24 if kind == "LTXPipeline" else None)
    np.testing.assert_array_equal(system.generate(["red", "a square"], [0, 1]), clips)
    assert not np.array_equal(system.generate(["red", "a square"], [2, 1])[0], clips[0])


@pytest.mark.parametrize("kind", systems.PEERS)
def test_evaluate_measures_every_peer_at_the_protocols_rate(kind, texts, packed, tmp_path):
    make, _ = MAKERS[kind]
    torch.manual_seed(0)
    make(texts).save_pretrained(tmp_path / "peer")
    task = protocols.open_protocol("own", packed, num=2)
    options = dict(
        num_frames=16, fps=task.fps, height=32, width=64, num_inference_steps=1, guidance_scale=1.0
    )
    system = systems.open_system(str(tmp_path / "peer"), name="peer", device="cpu", **options)
    result = evaluate.evaluate(system, task, tmp_path / "evals")
    # At 8, 16, 24 fps with 4, 4, 8 frames a latent.
    asked = {"CogVideoXPipeline": 17, "WanPipeline": 33, "LTXPipeline": 49}.get(kind, 16)
    assert (system.fps, system.settings["num_frames"]) == (8, asked)
    clip = evaluate.SavedClips(tmp_path / "evals" / "peer" / "clips", 16)(0)
    assert clip.shape == (16, 32, 64, 3)  # as generated; its centre is measured
    records = {record["measure"]: record for record in result["records"]}
    middle = [evaluate.SavedClips(tmp_path / "evals" / "peer" / "clips", 16)(k)[:, :, 16:48] for k in (0, 1)]
    assert records["motion_energy"]["value"] == pytest.approx(
        np.mean([clip_metrics.motion_energy(clip) for clip in middle])
    )
    assert (records["motion_energy"]["made_at"], records["motion_energy"]["measured_at"]) == (
        [32, 64],
        [32, 32],
    )
    assert "is defined for models of this package" in result["skipped"]["denoising"]


def test_open_system_knows_rates_and_networks_within_families(texts, tmp_path):
    """CogVideoX 1.5 patches time, Wan 2.2 of 5 B expands timesteps, Wan 2.2 of 14 B has two transformers."""
    newer = cogvideox(texts, patch_size_t=2, use_rotary_positional_embeddings=True)
    for name, pipe in (
        ("1.5", newer),
        ("5b", wan(texts, expand_timesteps=True)),
        ("14b", wan(texts, transformer_2=wan_transformer(), boundary_ratio=0.9)),
    ):
        pipe.save_pretrained(tmp_path / name)
    opened = {name: systems.open_system(str(tmp_path / name), device="cpu") for name in ("1.5", "5b", "14b")}
    assert [each.fps for each in opened.values()] == [16, 24, 16]
    assert systems.open_system(str(tmp_path / "1.5"), device="cpu", fps=8).settings["every"] == 2
    assert opened["14b"].parameters == 2 * opened["5b"].parameters


def test_open_system_refuses_other_rates_and_nan(texts, tmp_path):
    torch.manual_seed(0)
    pipe = modelscope(texts)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"ModelScope .* generates 8 frames a second, 5 is no whole fraction"
    ):
        systems.open_system(str(tmp_path), device="cpu", fps=5)
    system = systems.open_system(
        str(tmp_path), device="cpu", num_frames=3, height=32, width=32, num_inference_steps=1
    )
    torch.nn.init.constant_(system.pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match=r"generates NaN or infinity in torch\.float32"):
        system.generate(["red"], [0])


def test_open_system_titles_own_models_by_shift(video_model, tmp_path):
    system = systems.open_system(str(video_model), num_frames=3, num_inference_steps=1, device="cpu")
    assert (system.title, system.name, system.fps) == ("Latent-Shift", str(video_model), 8)
    assert system.generate(["red"], [0]).shape == (1, 3, 32, 32, 3)
    assert (
        systems.default_num_frames(str(video_model))
        == load(video_model, device="cpu").call_defaults["num_frames"]
        == 4
    )
    assert systems.default_num_frames("emoji") == 16
    pipe = load(video_model, device="cpu")
    inflate(pipe.unet, Shift(1 / 8, 1 / 4, edge="hold"))
    assert systems._title(pipe) == "Latent-Shift, forward 0.125, backward 0.25, edge hold"
    inflate(pipe.unet, Shift(0, 0))
    pipe.save_pretrained(tmp_path / "still")
    still = systems.open_system(str(tmp_path / "still"), device="cpu")
    assert still.title == "the image model, frame by frame"
    assert still.settings["weights"] != system.settings["weights"]


def test_open_system_refuses_other_pipelines(tmp_path):
    DDPMPipeline(
        UNet2DModel(
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        DDIMScheduler(),
    ).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match="holds a DDPMPipeline; expected a Stable Diffusion folder or one of AnimateDiffPipeline",
    ):
        systems.open_system(str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="expected one of emoji, emoji@20, or an existing folder"):
        systems.open_system(str(tmp_path / "gone"), device="cpu")
