"""Feature extractors: real classes at tiny size, and TorchScript files with the published signatures."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessorPil,
    VideoMAEModel,
)

from latent_shift.evaluation import features
from latent_shift.evaluation.features import Weights
from latent_shift.evaluation.measures import MEASURES
from latent_shift.evaluation.statistics import MeasureUnavailable


def clips(num: int = 3, num_frames: int = 16, side: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, num_frames, side, side, 3), np.uint8)


class I3D(nn.Module):
    """The signature of i3d_torchscript.pt; it returns some pixels: the corners of the first frames, channel by channel."""

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        assert rescale and resize and return_features
        assert x.dtype == torch.float32
        return x[:, :, :4, :10, :10].flatten(1)[:, :400]


class Narrow(nn.Module):
    """The same signature, another width."""

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        return x[:, :, :4, :10, :10].flatten(1)[:, :399]


class Inception(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        assert x.dtype == torch.uint8 and return_features != no_output_bias
        y = x[:, :, :28, :28].float().flatten(1)
        return y[:, :2048] if return_features else torch.softmax(y[:, :1008] / 50, 1)


class C3D(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x[:, :, :4, :6, :6].flatten(1)[:, :101] / 50, 1)


class Logits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :4, :6, :6].flatten(1)[:, :101]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    for name, network in (("i3d", I3D()), ("inception", Inception()), ("c3d", C3D())):
        torch.jit.script(network).save(str(folder / f"{name}.pt"))
    return folder


def test_scripted_extractors_call_networks_as_published(scripts):
    """StyleGAN-V's files take clips (B, 3, F, H, W) of float32 in 0..255, StyleGAN2-ADA's images (N, 3, H, W) of uint8; sizes and ranges
    they change themselves."""
    some = clips()
    i3d = features.i3d(scripts / "i3d.pt", trust=True)
    assert (MEASURES["fvd"].network, MEASURES["kvd"].network, i3d.unit) == ("i3d", "i3d", "clip")
    red = [
        [some[clip, frame, y, x, 0] for frame in range(4) for y in range(10) for x in range(10)]
        for clip in range(3)
    ]
    np.testing.assert_array_equal(i3d(some, batch_size=2), np.array(red, np.float32)[:, None])
    inception = features.inception(scripts / "inception.pt", trust=True)
    planes = [
        [
            [some[clip, frame, y, x, channel] for channel in range(3) for y in range(28) for x in range(28)][
                :2048
            ]
            for frame in range(16)
        ]
        for clip in range(3)
    ]
    np.testing.assert_array_equal(inception(some), np.array(planes, np.float32))
    probabilities = features.inception(scripts / "inception.pt", trust=True, probabilities=True)
    powers = np.exp(np.array(planes, np.float64)[..., :1008] / 50)
    np.testing.assert_allclose(probabilities(some), powers / powers.sum(axis=2, keepdims=True), rtol=1e-4)
    assert inception.name != probabilities.name  # their features lie in one folder
    red = [
        [some[clip, frame, y, x, 0] for frame in range(4) for y in range(6) for x in range(6)][:101]
        for clip in range(3)
    ]
    powers = np.exp(np.array(red, np.float64) / 50)
    np.testing.assert_allclose(
        features.c3d(scripts / "c3d.pt", trust=True)(some)[:, 0],
        powers / powers.sum(axis=1, keepdims=True),
        rtol=1e-4,
    )
    with pytest.raises(ValueError, match="takes clips of 16 frames, these have 8"):
        i3d(clips(num_frames=8))
    with pytest.raises(ValueError, match=r"expected clips \(B, F, H, W, 3\) uint8"):
        i3d(some.astype(np.float32))


def test_scripted_extractors_refuse_other_networks(scripts, tmp_path):
    for name in ("c3d", "inception"):
        with pytest.raises(ValueError, match="cannot be called as the TorchScript file i3d"):
            features.i3d(scripts / f"{name}.pt", trust=True)
    torch.jit.script(Narrow()).save(str(tmp_path / "narrow.pt"))
    with pytest.raises(
        ValueError,
        match=r"returns features of shape \(1, 399\) instead of 400; expected the TorchScript file i3d",
    ):
        features.i3d(tmp_path / "narrow.pt", trust=True)
    with pytest.raises(ValueError, match="no such file"):
        features.i3d(tmp_path / "gone.pt", trust=True)
    (tmp_path / "text.pt").write_text("x")
    with pytest.raises(ValueError, match="expected a TorchScript file"):
        features.c3d(tmp_path / "text.pt", trust=True)
    torch.jit.script(Logits()).save(str(tmp_path / "logits.pt"))
    with pytest.raises(
        ValueError, match="does not return probabilities; expected the TorchScript file c3d_ucf101"
    ):
        features.c3d(tmp_path / "logits.pt", trust=True)


def videomae_config() -> VideoMAEConfig:
    return VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=4, tubelet_size=2, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=7,
    )  # fmt: skip


# As the cards of the published weights have it.
IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])


def videomae_folder(folder):
    torch.manual_seed(0)
    VideoMAEForVideoClassification(videomae_config()).save_pretrained(folder)
    VideoMAEImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, **IMAGENET
    ).save_pretrained(folder)
    return folder


def test_videomae_returns_input_of_its_classifier(tmp_path):
    """The shorter side to 32, the middle, ImageNet's mean and deviation."""
    network = VideoMAEForVideoClassification.from_pretrained(videomae_folder(tmp_path)).eval()
    found = features.videomae(tmp_path)
    assert (found.num_frames, MEASURES["fvd-videomae"].network) == (4, "videomae")
    some = np.random.default_rng(0).integers(0, 256, (2, 4, 40, 60, 3), np.uint8)
    mean, std = (torch.tensor(each) for each in IMAGENET.values())
    resized = np.stack(
        [
            [np.asarray(Image.fromarray(f).resize((48, 32), Image.Resampling.BILINEAR)) for f in clip]
            for clip in some
        ]
    )
    pixels = ((torch.from_numpy(resized[:, :, :, 8:40]) / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        logits = network(pixels).logits
        torch.testing.assert_close(
            network.classifier(torch.from_numpy(found(some)[:, 0])), logits, rtol=1e-4, atol=1e-4
        )


def test_videomae_refuses_weights_without_classifier(tmp_path):
    VideoMAEModel(videomae_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="VideoMAEForVideoClassification"):
        features.videomae(tmp_path)


@pytest.fixture(scope="module")
def clip_folder(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(texts / "tokenizer")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=20, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return folder


def test_clip_similarity_equals_mean_logits(clip_folder):
    found, some, prompts = features.Clip(clip_folder), clips(2, 3), ["red", "a green square"]
    network, processor = (
        CLIPModel.from_pretrained(clip_folder).eval(),
        CLIPImageProcessorPil.from_pretrained(clip_folder),
    )
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    for clip, prompt, value in zip(some, prompts, found(some, prompts), strict=True):
        inputs = tokenizer([prompt], return_tensors="pt") | processor(
            [Image.fromarray(f) for f in clip], return_tensors="pt"
        )
        with torch.no_grad():
            logits = network(**inputs).logits_per_image[:, 0] / network.logit_scale.exp()
        assert value == pytest.approx(float(logits.mean()), abs=1e-5)


def test_efficientnet_motion_adds_mean_change_of_features():
    some = clips(2, 4, 32)
    frames, motion = features.efficientnet(), features.efficientnet(motion=True)
    each = frames(some)
    assert each.shape == (2, 4, 1280)
    expected = np.concatenate([each.mean(axis=1), np.abs(np.diff(each, axis=1)).mean(axis=1)], axis=1)
    np.testing.assert_allclose(motion(some)[:, 0], expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(MeasureUnavailable, match="takes clips of 2 frames or more, these have 1"):
        motion(some[:, :1])
    assert MEASURES["fd-efficientnet-lite0"].options == {} and MEASURES[
        "kd-efficientnet-lite0-motion"
    ].options == {"motion": True}
    frozen = np.repeat(some[:, :1], 4, axis=1)
    np.testing.assert_allclose(motion(frozen)[..., 1280:], 0, atol=1e-5)


def test_digest_differs_between_weights(scripts, clip_folder, tmp_path):
    assert features.digest(scripts / "i3d.pt") != features.digest(scripts / "c3d.pt")
    before = features.digest(clip_folder)
    assert before == features.digest(clip_folder)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.json").write_text("1")
    one = features.digest(tmp_path)
    (tmp_path / "a" / "x.json").write_text("2")
    assert features.digest(tmp_path) != one


def test_weights_open_says_where_missing_weights_are_published(scripts):
    weights = Weights({"i3d": str(scripts / "i3d.pt")}, trust=True)
    assert weights.open("i3d") is weights.open("i3d")
    with pytest.raises(MeasureUnavailable, match=r"needs the TorchScript file c3d_ucf101\.pt of StyleGAN-V"):
        weights.open("c3d")
    with pytest.raises(ValueError, match="--weights c3d=: expected i3d=PATH, c3d=PATH"):
        Weights.parse(["i3d=a", "c3d="])


def test_weights_that_can_run_programs_need_trust(scripts, clip_folder, tmp_path):
    """A TorchScript file that writes files is not even opened; a folder of pickles neither."""
    for open_network in (features.i3d, features.c3d, features.inception):
        with pytest.raises(ValueError, match=r"can write files and run any operation .* use --trust-weights"):
            open_network(scripts / "i3d.pt")
    with pytest.raises(ValueError, match="use --trust-weights"):
        Weights.parse([f"i3d={scripts / 'i3d.pt'}"])
    assert Weights.parse([f"i3d={scripts / 'i3d.pt'}"], trust=True).open("i3d").name == "i3d-kinetics400"
    pickled = shutil.copytree(clip_folder, tmp_path / "clip")
    expected = features.Clip(clip_folder)(clips(1, 2), ["red"])
    torch.save(CLIPModel.from_pretrained(clip_folder).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickles can run any program when they are opened"):
        features.Clip(pickled)
    np.testing.assert_allclose(features.Clip(pickled, trust=True)(clips(1, 2), ["red"]), expected, rtol=1e-5)
