"""Group norm, SiLU and shift in Triton: its interpreter against PyTorch, at the smallest size, in a process of its own."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from test_shift import tiny_unet

from latent_shift import fused_norm
from latent_shift.shift import Shift, frames, inflate

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SCRIPT = """
import torch
from torch import nn
from latent_shift.fused_norm import norm_silu_shift
from latent_shift.shift import Shift, temporal_shift

torch.manual_seed(0)
norm = nn.GroupNorm(2, 8)
nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
x = 3 + 2 * torch.randn(6, 8, 3, 5)
for edge in ("zero", "hold", "wrap"):
    far = Shift(rule=lambda num_channels: [2, -1, 0, 7, (-1, 0, 1), -4, (0, 3), -9], edge=edge)
    for num_frames, shift in ((3, Shift(edge=edge)), (6, Shift(0.5, 0.25, edge=edge)), (3, Shift(0, 0.5, edge=edge)), (3, far)):
        expected = torch.nn.functional.silu(temporal_shift(norm(x), num_frames, shift))
        torch.testing.assert_close(norm_silu_shift(x, norm, num_frames, shift.groups(8), edge), expected, rtol=1e-5, atol=1e-5)
groups, last = Shift().groups(8), x.to(memory_format=torch.channels_last)
for wrong, words in (
    (lambda: norm_silu_shift(x, norm, 4, groups), "does not divide"), (lambda: norm_silu_shift(last, norm, 3, groups), "contiguous"),
):
    try:
        wrong()
    except ValueError as error:
        assert words in str(error)
    else:
        raise AssertionError(words)
half = x.to(torch.bfloat16)
expected = temporal_shift(torch.nn.functional.silu(norm(half.float())), 3, Shift())
torch.testing.assert_close(norm_silu_shift(half, norm, 3, groups).float(), expected, rtol=1e-2, atol=1e-2)
print("right")
"""

NETWORK = """
import copy, torch
from test_shift import tiny_unet
from latent_shift import shift_kernels
from latent_shift.fused_norm import FusedResnetBlock2D, fuse_norms
from latent_shift.shift import Shift, frames, inflate

torch.manual_seed(0)
for place in ("conv1", "both", "end"):
    unet = inflate(tiny_unet(block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                             attention_head_dim=2), Shift(edge="hold", place=place)).eval()
    fused = fuse_norms(copy.deepcopy(unet))
    assert fused.state_dict().keys() == unet.state_dict().keys()
    inputs = torch.randn(2, 4, 2, 2), torch.tensor(7), torch.randn(2, 3, unet.config.cross_attention_dim)
    calls = []
    forward = FusedResnetBlock2D._applies
    FusedResnetBlock2D._applies = lambda block, x: calls.append(forward(block, x)) or calls[-1]
    with torch.no_grad(), frames(unet, 2), frames(fused, 2):
        torch.testing.assert_close(fused(*inputs).sample, unet(*inputs).sample, rtol=1e-4, atol=1e-4)
    assert calls and all(calls)
    num_tables = len(shift_kernels._tables)
    with torch.no_grad(), frames(fused, 2):
        fused(*inputs)
    assert len(shift_kernels._tables) == num_tables
    FusedResnetBlock2D._applies = forward
    last = copy.deepcopy(fused).to(memory_format=torch.channels_last)  # of the weights alone
    with torch.no_grad(), frames(unet, 2), frames(last, 2):
        torch.testing.assert_close(last(*inputs).sample, unet(*inputs).sample, rtol=1e-4, atol=1e-4)
    with frames(unet, 2), frames(fused, 2):  # with gradients: PyTorch's own form, bit for bit
        assert torch.equal(fused(*inputs).sample, unet(*inputs).sample)
print("right")
"""


@needs_triton
@pytest.mark.parametrize("script", [SCRIPT, NETWORK], ids=["operation", "network"])
def test_interpreter_gives_what_pytorch_gives(script):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=os.path.dirname(__file__),
    )
    assert result.stdout == "right\n", result.stderr[-3000:]


def test_networks_that_cannot_be_fused_are_refused(monkeypatch):
    monkeypatch.setattr(fused_norm, "triton", None)
    with pytest.raises(RuntimeError, match="fuse_norms needs Triton"):
        fused_norm.fuse_norms(inflate(tiny_unet()))
    monkeypatch.setattr(fused_norm, "triton", object())
    with pytest.raises(ValueError, match="no residual block can be fused"):
        fused_norm.fuse_norms(inflate(tiny_unet(resnet_time_scale_shift="scale_shift")))


def test_on_a_cpu_nothing_changes(monkeypatch):
    monkeypatch.setattr(fused_norm, "triton", object())
    torch.manual_seed(0)
    unet = inflate(tiny_unet(), Shift()).eval()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 3, unet.config.cross_attention_dim)
    with torch.no_grad(), frames(unet, 2):
        expected = unet(*inputs).sample
        names = list(unet.state_dict())
        fused_norm.fuse_norms(unet)
        assert list(unet.state_dict()) == names
        assert sum(isinstance(block, fused_norm.FusedResnetBlock2D) for block in unet.modules()) > 2
        assert torch.equal(unet(*inputs).sample, expected)


@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_gives_what_pytorch_gives(dtype):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(32, 320).to("cuda", dtype)
    x = torch.randn(32, 320, 33, 31, device="cuda", dtype=dtype)
    for edge in ("zero", "hold", "wrap"):
        shift = Shift(edge=edge)
        expected = fused_norm.F.silu(norm(x))
        from latent_shift.shift import temporal_shift

        found = fused_norm.norm_silu_shift(x, norm, 16, shift.groups(320), edge)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, temporal_shift(expected, 16, shift), rtol=tolerance, atol=tolerance)
