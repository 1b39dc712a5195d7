"""Classes of networks: by the name in a config.json, and the baselines of a recipe's `model.temporal`."""

from __future__ import annotations

from pathlib import Path

from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny, ModelMixin

from latent_shift.files import read_json_object
from latent_shift.models.baselines import LatentVDMUNet, PixelSpace, VDMUNet
from latent_shift.models.dit import PixArtDenoiser, PixArtVDM, SanaDenoiser, SanaVDM

BASELINES: dict[str, tuple[type[ModelMixin], ...]] = {
    "attention": (LatentVDMUNet, PixArtVDM, SanaVDM),
    "vdm": (VDMUNet,),
}
"""Networks of a recipe's `model.temporal`, each for a kind of image network, whose subclass it is."""


def baseline_of(network: ModelMixin, temporal: str) -> type[ModelMixin]:
    """Return the class of the baseline `temporal` for an image network.

    Raises:
        ValueError: there is none for this kind of network.
    """
    for baseline in BASELINES[temporal]:
        if baseline is type(network) or type(network) in baseline.__mro__:
            return baseline
    raise ValueError(f"model.temporal={temporal}: there is no such baseline of a {type(network).__name__}")


def baseline_name(network_class: type[ModelMixin]) -> str | None:
    """Return the `model.temporal` of a network's class; None if it is no baseline."""
    return next((name for name, networks in BASELINES.items() if network_class in networks), None)


def saved_class(folder: str | Path, default: type[ModelMixin]) -> type[ModelMixin]:
    """Return the class of the network saved in `folder`: one of this package or another autoencoder of images if
    its config.json names it, else `default`."""
    path = Path(folder) / "config.json"
    name = read_json_object(path).get("_class_name") if path.exists() else None
    return next((cls for cls in _SAVED_CLASSES if cls.__name__ == name), default)


_SAVED_CLASSES = (
    *(network for networks in BASELINES.values() for network in networks),
    PixArtDenoiser, SanaDenoiser, PixelSpace, AutoencoderTiny, AsymmetricAutoencoderKL,
)  # fmt: skip
