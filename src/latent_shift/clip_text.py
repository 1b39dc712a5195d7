"""Cross-attention of the frames of a clip to one text, computed once a clip.

Shapes: B clips, F frames, S positions of a frame, L tokens, D width.
"""

from __future__ import annotations

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn


class ClipTextProcessor(AttnProcessor2_0):
    """Cross-attention of all frames of a clip to one text: keys and values are computed once a clip instead
    of once a frame.

    With `(B, L, D)` text and `(B*F, S, D)` positions the queries of a clip become one sequence of F*S, which
    gives the same sums.
    """

    def __call__(self, attn: Attention, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return super().__call__(attn, hidden_states, *args, **kwargs).reshape(hidden_states.shape)


def share_text(network: nn.Module) -> bool:
    """Let the cross-attention layers of a U-Net take one text a clip; return whether all of them do.

    Layers with a custom processor (an IP-Adapter's, for example) keep it; the text must then be repeated for
    each frame.
    """
    layers = _cross_attentions(network)
    for layer in layers:
        if type(layer.processor) is AttnProcessor2_0:
            layer.set_processor(ClipTextProcessor())
    return all(isinstance(layer.processor, ClipTextProcessor) for layer in layers)


def unshare_text(network: nn.Module) -> None:
    """Undo `share_text`."""
    for layer in _cross_attentions(network):
        if type(layer.processor) is ClipTextProcessor:
            layer.set_processor(AttnProcessor2_0())


def _cross_attentions(network: nn.Module) -> list[Attention]:
    return [
        module for module in network.modules() if isinstance(module, Attention) and module.is_cross_attention
    ]
