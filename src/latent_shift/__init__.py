"""Latent-Shift: a text-to-image latent diffusion model becomes a text-to-video model by shifting channels
along time.

    import latent_shift as ls

    pipe = ls.load("emoji")
    clip = pipe("a dancing panda", generator=ls.seed(0)).frames[0]
    ls.save_video(clip, "panda.mp4", fps=8)

Names are imported when first used: `import latent_shift` itself imports neither torch nor diffusers.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from latent_shift.former_names import FormerNames

_MODULES = {
    "Shift": "shift",
    "temporal_shift": "shift",
    "inflate": "shift",
    "deflate": "shift",
    "frames": "shift",
    "shift_of": "shift",
    "frame_noise": "pipelines.noise",
    "LatentShiftPipeline": "pipelines.stable_diffusion",
    "LatentShiftXLPipeline": "pipelines.stable_diffusion",
    "LatentVDMUNet": "models.baselines",
    "load": "pipelines.loading",
    "seed": "runtime",
    "save_video": "video",
    "load_video": "video",
}
__all__ = list(_MODULES)

if TYPE_CHECKING:
    __version__: str
    from latent_shift.models.baselines import LatentVDMUNet as LatentVDMUNet
    from latent_shift.pipelines.loading import load as load
    from latent_shift.pipelines.noise import frame_noise as frame_noise
    from latent_shift.pipelines.stable_diffusion import LatentShiftPipeline as LatentShiftPipeline
    from latent_shift.pipelines.stable_diffusion import LatentShiftXLPipeline as LatentShiftXLPipeline
    from latent_shift.runtime import seed as seed
    from latent_shift.shift import Shift as Shift
    from latent_shift.shift import deflate as deflate
    from latent_shift.shift import frames as frames
    from latent_shift.shift import inflate as inflate
    from latent_shift.shift import shift_of as shift_of
    from latent_shift.shift import temporal_shift as temporal_shift
    from latent_shift.video import load_video as load_video
    from latent_shift.video import save_video as save_video


sys.meta_path.append(
    FormerNames()
)  # imports of modules that no longer exist fail without it; goes with the old names


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("latent-shift-video")
        except PackageNotFoundError:  # a source tree that is not installed
            return "0.0.0"
    if name not in _MODULES:
        raise AttributeError(f"module 'latent_shift' has no attribute {name!r}")
    return getattr(import_module(f"latent_shift.{_MODULES[name]}"), name)
