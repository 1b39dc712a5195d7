"""One sampling step on a GPU, with CUDA graphs and fused norms, beside other systems; and a clip of four steps.

Nothing here is particular to a GPU but the graphs and the kernels: on a CPU, with `full=False`, it is rehearsed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler

from latent_shift.benchmark.networks import FULL, SMALL, timed_networks
from latent_shift.benchmark.timing import time_in_rounds
from latent_shift.clip_text import share_text
from latent_shift.cuda_graphs import CudaGraphs, use_cuda_graphs
from latent_shift.fused_norm import fuse_norms
from latent_shift.models.autoencoder import decode_latents
from latent_shift.pipelines.denoise import denoise, unet_predictor
from latent_shift.pipelines.schedulers import distilled_scheduler
from latent_shift.shift import Shift, frames, inflate

LOADS = ((1, 32), (4, 32), (1, 64), (4, 64))
"""Clips of 16 frames, and the side of their latents."""


def compare_steps(
    *, full: bool = True, loads: Sequence[tuple[int, int]] = LOADS, num_frames: int = 16, rounds: int = 10, device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16, compiled: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Time a sampling step: frame by frame and with the shift, each plain, as a CUDA graph, fused and compiled.

    Args:
        full: widths of Stable Diffusion 1.5 instead of 64/128/256/256.
        loads: clips at once and side of the latents.
        num_frames: of a clip.
        rounds: counted rounds.
        device, dtype: of the networks.
        compiled: also time `torch.compile`, which takes minutes.

    Returns:
        For each load `step`, what `time_in_rounds` returns, with ratios to frame by frame as it is; `shift_overhead`, the time
        with the shift relative to that frame by frame with the same means; on a GPU `graphs_equal`, whether the output of the
        graph equals that of the network bit for bit, `graphs_used`, whether all graphs were recorded, `fused_difference`, the
        largest of the fused norms, relative to the largest output, and `peak_gib`.
    """
    result: dict[str, Any] = {}
    peers = timed_networks(full=full, device=device, dtype=dtype)
    plain = peers["frame by frame"].network
    shifted = peers["Latent-Shift"].network
    on_gpu = device.startswith("cuda")
    ways: dict[str, tuple[torch.nn.Module, bool]] = {
        "frame by frame": (plain, False),
        "with the shift": (shifted, True),
    }
    fused = find_spec("triton") is not None and on_gpu
    if on_gpu:
        # A network without the shift is one whose clips have a single frame.
        ways["frame by frame, CUDA graph"] = (_with_graphs(inflate(copy.deepcopy(plain), Shift(0, 0))), False)
        ways["with the shift, CUDA graph"] = (_with_graphs(copy.deepcopy(shifted)), True)
        if fused:
            ways["with the shift, fused"] = (fuse_norms(copy.deepcopy(shifted)), True)
            ways["with the shift, fused, CUDA graph"] = (
                _with_graphs(fuse_norms(copy.deepcopy(shifted))),
                True,
            )
    if compiled:
        for name in ("frame by frame", "with the shift"):
            network = copy.deepcopy(ways[name][0])
            network.compile(dynamic=False)
            ways[f"{name}, compiled"] = (network, ways[name][1])
    width = (FULL if full else SMALL).widths["cross_attention_dim"]
    for clips, side in loads:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        x = torch.randn(clips * num_frames, 4, side, side, device=device, dtype=dtype)
        text = torch.randn(clips, 77, width, device=device, dtype=dtype)
        calls = {
            name: _step(network, x, text, num_frames, together=together)
            for name, (network, together) in ways.items()
        }
        others = {
            name: peer.call(clips, num_frames, side) for name, peer in peers.items() if "Latent-Shift" not in name
        }  # fmt: skip
        others.pop("frame by frame")
        with torch.no_grad():
            load: dict[str, Any] = {"step": time_in_rounds(calls | others, rounds=rounds, warm_up=3)}
            seconds = {name: each["seconds"] for name, each in load["step"].items()}
            load["shift_overhead"] = {
                name: seconds[name] / seconds[reference]
                for name in ways
                if "with the shift" in name
                and (reference := name.replace("with the shift", "frame by frame").replace(", fused", ""))
                in seconds
            }
            expected = calls["with the shift"]()
            if on_gpu:
                load["graphs_equal"] = bool(torch.equal(calls["with the shift, CUDA graph"](), expected))
                load["graphs_used"] = all(_uses_graphs(network) for network, _ in ways.values())
            if fused:
                difference = (calls["with the shift, fused"]() - expected).abs().max() / expected.abs().max()
                load["fused_difference"] = float(difference)
        if on_gpu:
            load["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result[f"{clips} x {num_frames} x {side}x{side}"] = load
    return result


def clip_of_four_steps(
    *, full: bool = True, side: int = 64, num_frames: int = 16, rounds: int = 10, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:  # fmt: skip
    """Time a clip of a distilled model, four steps without guidance and its decoding, plain and with every means there is."""
    size = FULL if full else SMALL
    torch.manual_seed(0)
    with torch.device(device):
        unet = inflate(size.image_unet(), Shift(edge="hold")).to(dtype).eval()
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
            block_out_channels=(128, 256, 512, 512) if full else (8, 8, 16, 16), norm_num_groups=32 if full else 4,
        ).to(dtype).eval()  # fmt: skip
    fast = copy.deepcopy(unet)
    if device.startswith("cuda"):
        if find_spec("triton") is not None:
            fuse_norms(fast)
        use_cuda_graphs(fast)
    scheduler = distilled_scheduler(
        DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    )
    noise = torch.randn(1, 4, num_frames, side, side, device=device, dtype=dtype)
    text = torch.randn(1, 77, size.widths["cross_attention_dim"], device=device, dtype=dtype)

    def clip(network: torch.nn.Module) -> Callable[[], torch.Tensor]:
        share_text(network)  # type: ignore[arg-type]

        @torch.no_grad()
        def call() -> torch.Tensor:
            scheduler.set_timesteps(4, device=device)
            predict = unet_predictor(network, [{"prompt_embeds": text}])  # type: ignore[arg-type]
            latents = denoise(predict, scheduler, noise, scheduler.timesteps)
            return decode_latents(vae, latents[0].transpose(0, 1)).cpu()

        return call

    with torch.no_grad():
        return time_in_rounds({"plain": clip(unet), "fast": clip(fast)}, rounds=rounds, warm_up=3)


def _with_graphs(network: torch.nn.Module) -> torch.nn.Module:
    use_cuda_graphs(network)
    return network


def _uses_graphs(network: torch.nn.Module) -> bool:
    graphs = network.__dict__.get("forward")
    return not isinstance(graphs, CudaGraphs) or (bool(graphs.graphs) and all(graphs.graphs.values()))


def _step(
    network: torch.nn.Module, x: torch.Tensor, text: torch.Tensor, num_frames: int, *, together: bool
) -> Callable[[], torch.Tensor]:
    """Return a step as a pipeline runs it: one text a clip with the shift, one a frame without."""
    if not together:
        text = text.repeat_interleave(num_frames, dim=0)
        timestep = torch.tensor(500, device=x.device)
        return lambda: network(x, timestep, text, return_dict=False)[0]
    timestep = torch.tensor(500, device=x.device)

    def step() -> torch.Tensor:
        with frames(network, num_frames):
            output: torch.Tensor = network(x, timestep, text, return_dict=False)[0]
            return output

    return step
