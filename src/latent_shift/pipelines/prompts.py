"""Prompts of a call as the text inputs of the U-Net: weights, prompts that change over a clip, warnings of
what is cut.

Shapes: B clips of F frames; L tokens, D width of the text embeddings.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latent_shift.models import text
from latent_shift.models.parts import text_width
from latent_shift.models.prompt_syntax import Segment, parse_prompt
from latent_shift.runtime import silenced

_LIBRARY_LOGGERS = (
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "transformers.tokenization_utils_base",
)
"""Loggers that warn of cut prompts, too: of some, and several times."""

_encoding = threading.Lock()
"""Threads that share a pipeline encode in turn: a fast tokenizer is set to the padding of each call, and diffusers sets a LoRA's scale."""


def encode_prompts(
    pipe, prompt: str | list[str] | dict[int, str] | None, *, negative_prompt, prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None, num_frames: int, num_videos: int, guided: bool, height: int, width: int,
    tensor_inputs: list[str], clip_skip: int | None, cross_attention_kwargs: dict | None, family: dict[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    """Encode prompts to the text inputs of the U-Net, by name: `(B, ...)` a clip, or `(B, F, ...)` where
    frames differ. With guidance each name also has a `negative_` one.

    Raises:
        ValueError: prompts, weights or embeddings that cannot be read, or that do not fit the model.
    """
    keys, prompt = _split_schedule(prompt, num_frames)
    if keys and isinstance(negative_prompt, (list, tuple)) and len(negative_prompt) > 1:
        raise ValueError(
            f"expected one negative prompt beside prompts that change, got {len(negative_prompt)}"
        )
    texts = {"prompt": prompt, "negative_prompt": negative_prompt}
    texts |= {name: family.get(name) for name in ("prompt_2", "negative_prompt_2")}
    parsed = _parse_texts(texts)
    _check_clip_skip(pipe, clip_skip)
    whole_clip, per_frame = _split_frame_embeds(
        pipe, {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}, num_frames
    )
    plain = {
        name: _plain(prompts, single=isinstance(texts[name], str) and len(prompts) == 1)
        for name, prompts in parsed.items()
    }
    encode = partial(
        pipe.encode_family_prompts, guided=guided, height=height, width=width, tensor_inputs=tensor_inputs,
        cross_attention_kwargs=cross_attention_kwargs,
    )  # fmt: skip
    second = {name: plain[name] for name in ("prompt_2", "negative_prompt_2") if name in plain}
    with _encoding, silenced(*_LIBRARY_LOGGERS):
        _warn_of_cut_words(pipe, parsed, guided=guided)
        embeds = encode(
            plain.get("prompt"), plain.get("negative_prompt"), whole_clip["prompt_embeds"], whole_clip["negative_prompt_embeds"],
            num_each=1 if keys else num_videos, clip_skip=clip_skip, family={**family, **second},
        )  # fmt: skip
        if not guided:
            embeds = {name: value for name, value in embeds.items() if not name.startswith("negative_")}
        for prefix in ("", "negative_"):
            name = f"{prefix}prompt_embeds"
            weights = _weights(pipe, parsed, prefix) if name in embeds else None
            if weights is not None:
                # diffusers skips no layer of negative prompts.
                skip = None if prefix else clip_skip
                null = encode([""], None, None, None, num_each=1, clip_skip=skip, family={})["prompt_embeds"]
                weights = weights.repeat_interleave(len(embeds[name]) // len(weights), dim=0)
                embeds[name] = torch.lerp(null, embeds[name], weights.to(null))
    for name, value in per_frame.items():
        if name in embeds:
            embeds[name] = value.repeat_interleave(num_videos, dim=0).to(embeds[name])
    if keys:
        for name, value in embeds.items():
            value = (
                value[:1] if name.startswith("negative_") else text.interpolate(value, keys, num_frames)[None]
            )
            embeds[name] = value.repeat_interleave(num_videos, dim=0)
    return embeds


def _split_schedule(prompt: Any, num_frames: int) -> tuple[list[int], Any]:
    """Return the key frames of a prompt that changes, else [], and the prompts."""
    if not isinstance(prompt, dict):
        return [], prompt
    frames = list(prompt)
    integers = all(isinstance(frame, int) and not isinstance(frame, bool) for frame in frames)
    if not frames or not integers or not all(0 <= frame < num_frames for frame in frames):
        raise ValueError(f"expected prompts for frames from 0 to {num_frames - 1}, got {frames}")
    return sorted(frames), [prompt[frame] for frame in sorted(frames)]


def _parse_texts(texts: dict[str, Any]) -> dict[str, list[list[Segment]]]:
    """Return the words and weights of each text that is given; one text beside a list of prompts is for all
    of them."""
    parsed = {}
    for name, prompts in texts.items():
        if prompts is None:
            continue
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(each, str) for each in prompts):
            raise ValueError(f"expected {name} as a text or a list of texts, got {prompts!r:.100}")
        if not prompts:
            raise ValueError(f"expected {name} as a text or a list of texts, got an empty list")
        parsed[name] = [parse_prompt(each) for each in prompts]
    for name in parsed:
        num = len(parsed.get("prompt", parsed[name]))
        if len(parsed[name]) == 1:
            parsed[name] *= num
        if len(parsed[name]) != num:
            raise ValueError(f"expected as many of {name} as prompts, {num}, got {len(parsed[name])}")
    return parsed


def _plain(prompts: list[list[Segment]], *, single: bool) -> str | list[str]:
    texts = ["".join(words for words, _ in segments) for segments in prompts]
    return texts[0] if single else texts


def _check_clip_skip(pipe, clip_skip: int | None) -> None:
    """Raise ValueError for layers that the text encoder does not have."""
    if clip_skip is None:
        return
    for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if encoder is None:
            continue
        # Stable Diffusion 1 and 2 normalize the earlier layer as the last one.
        if not hasattr(pipe, "text_encoder_2") and not hasattr(
            getattr(encoder, "text_model", encoder), "final_layer_norm"
        ):
            raise ValueError(
                f"clip_skip needs a text encoder of CLIP, got {type(encoder).__name__}; leave it out"
            )
        # Stable Diffusion XL reads the layer before the last.
        most = encoder.config.num_hidden_layers - hasattr(pipe, "text_encoder_2")
        if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 0 <= clip_skip <= most:
            raise ValueError(
                f"clip_skip must be a whole number from 0 to {most}, the layers of the text encoder, got {clip_skip!r}"
            )


def _split_frame_embeds(
    pipe, embeds: dict[str, Tensor | None], num_frames: int
) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """Check embeddings; return those of whole clips (the first frame's, where frames differ), and those of
    frames `(B, F, L, D)`."""
    whole_clip: dict[str, Tensor | None] = {}
    per_frame: dict[str, Tensor] = {}
    for name, value in embeds.items():
        if value is not None:
            width = text_width(pipe.unet.config)
            if not isinstance(value, Tensor) or value.ndim not in (3, 4) or value.shape[-1] != width:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"expected {name} of shape (clips, tokens, {width}) or (clips, frames, tokens, {width}), got {shape}"
                )
            if not value.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinite numbers")
            if value.ndim == 4:
                if value.shape[1] != num_frames:
                    raise ValueError(f"expected {name} of {num_frames} frames, got {value.shape[1]}")
                per_frame[name] = value
                value = value[:, 0]
        whole_clip[name] = value
    return whole_clip, per_frame


def _encoder_texts(pipe, prefix: str, parsed: dict[str, list]) -> list[tuple[Any, Any, str]]:
    """Return, for each text encoder of a pipeline, its tokenizer, itself, and the name of the text that it
    reads."""
    second = f"{prefix}prompt_2" if f"{prefix}prompt_2" in parsed else f"{prefix}prompt"
    names = (("tokenizer", "text_encoder", f"{prefix}prompt"), ("tokenizer_2", "text_encoder_2", second))
    encoders = [
        (getattr(pipe, tokenizer, None), getattr(pipe, encoder, None), name)
        for tokenizer, encoder, name in names
    ]
    return [(tokenizer, encoder, name) for tokenizer, encoder, name in encoders if encoder is not None]


def _weights(pipe, parsed: dict[str, list[list[Segment]]], prefix: str) -> Tensor | None:
    """Return the weights `(B, L, D)` of the embeddings of prompts, or None if all are 1."""
    encoders = _encoder_texts(pipe, prefix, parsed)
    given = [parsed[name] for _, _, name in encoders if name in parsed]
    if all(weight == 1 for prompts in given for prompt in prompts for _, weight in prompt):
        return None
    columns = []
    for tokenizer, encoder, name in encoders:
        spell_out = partial(_spell_out, pipe, tokenizer)
        prompts = parsed.get(name) or [[("", 1.0)]] * max(map(len, given))
        weights_BL = torch.stack([text.token_weights(tokenizer, prompt, spell_out) for prompt in prompts])
        columns.append(weights_BL[:, :, None].expand(-1, -1, encoder.config.hidden_size))
    return torch.cat(columns, dim=-1)


def _warn_of_cut_words(pipe, parsed: dict[str, list[list[Segment]]], *, guided: bool) -> None:
    """Warn once of each text that is longer than a text encoder reads."""
    done = set()
    for prefix in ("", "negative_") if guided else ("",):
        for tokenizer, _, name in _encoder_texts(pipe, prefix, parsed):
            if name not in parsed or (name, tokenizer.model_max_length) in done:
                continue
            done.add((name, tokenizer.model_max_length))
            plain = dict.fromkeys(_plain(parsed[name], single=False))
            text.warn_of_cut_words(tokenizer, [_spell_out(pipe, tokenizer, each) for each in plain], name)


def _spell_out(pipe, tokenizer, words: str) -> str:
    """Replace the tokens of textual inversions by those of all their vectors."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return convert(words, tokenizer) if convert else words
