"""diffusers weights in the layout of the original repositories: the inverse of what `from_single_file` does, for any sizes."""

from __future__ import annotations

import torch
from torch import Tensor

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
          "conv_shortcut": "skip_connection"}  # fmt: skip


def unet(network) -> dict[str, Tensor]:
    places = {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
    }  # fmt: skip
    number = 1
    for level, block in enumerate(network.down_blocks):
        for layer in range(len(block.resnets)):
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for level, block in enumerate(network.up_blocks):
        attends = hasattr(block, "attentions")
        for layer in range(len(block.resnets)):
            places[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            if block.upsamplers and layer == len(block.resnets) - 1:
                places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number}.{1 + attends}.conv"
            number += 1
    return {
        f"model.diffusion_model.{_moved(name, places, RESNET)}": value
        for name, value in network.state_dict().items()
    }


def _moved(name: str, places: dict[str, str], inside: dict[str, str]) -> str:
    place = max((place for place in places if name.startswith(place + ".")), key=len)
    rest = name[len(place) + 1 :]
    if ".resnets." in place + ".":
        part, _, end = rest.partition(".")
        rest = f"{inside.get(part, part)}.{end}"
    return f"{places[place]}.{rest}"


def vae(network) -> dict[str, Tensor]:
    def renamed(name: str) -> str:
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace(
            "mid_block.resnets.1", "mid.block_2"
        )
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        for new, old in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
            ("group_norm", "norm"),
        ):
            name = name.replace(f"attn_1.{new}", f"attn_1.{old}")
        levels = len(network.config.block_out_channels)
        for level in range(levels):
            name = name.replace(f"down_blocks.{level}.resnets", f"down.{level}.block")
            name = name.replace(f"down_blocks.{level}.downsamplers.0", f"down.{level}.downsample")
            name = name.replace(f"up_blocks.{level}.resnets", f"up.{levels - 1 - level}.block")
            name = name.replace(f"up_blocks.{level}.upsamplers.0", f"up.{levels - 1 - level}.upsample")
        return name.replace("conv_shortcut", "nin_shortcut")

    tensors = {}
    for name, value in network.state_dict().items():
        attention = "mid_block.attentions" in name and name.endswith("weight") and "group_norm" not in name
        tensors[f"first_stage_model.{renamed(name)}"] = (
            value[:, :, None, None] if attention else value
        )  # linear layers were 1x1 convolutions
    return tensors


def clip(encoder, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}": value
        for name, value in encoder.state_dict().items()
    }


def open_clip(encoder, prefix: str) -> dict[str, Tensor]:
    weights = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    tensors = {
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "ln_final.weight": weights["final_layer_norm.weight"],
        "ln_final.bias": weights["final_layer_norm.bias"],
        "text_projection": weights.get(
            "text_projection.weight", torch.eye(encoder.config.hidden_size)
        ).T.contiguous(),
    }
    for layer in range(encoder.config.num_hidden_layers):
        old, new = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            tensors[f"{old}.attn.in_proj_{kind}"] = torch.cat(
                [weights[f"{new}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            for there, here in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                                ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):  # fmt: skip
                tensors[f"{old}.{there}.{kind}"] = weights[f"{new}.{here}.{kind}"]
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def of(pipe, family: str) -> dict[str, Tensor]:
    """The tensors of a whole pipeline, as a file of this family holds them."""
    if family == "sdxl":
        texts = clip(pipe.text_encoder, "conditioner.embedders.0.") | open_clip(
            pipe.text_encoder_2, "conditioner.embedders.1.model."
        )
    elif family == "sd2":
        texts = open_clip(pipe.text_encoder, "cond_stage_model.model.")
    else:
        texts = clip(pipe.text_encoder, "cond_stage_model.")
    return unet(pipe.unet) | vae(pipe.vae) | texts
