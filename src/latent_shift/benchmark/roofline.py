"""The roofline of a machine (Williams et al. 2009): the least time that a step's operations can take, given
what the machine computes and moves a second. Here it is computed operation by operation.
"""

from __future__ import annotations

import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latent_shift.benchmark.hardware import matrix_rate
from latent_shift.training import memory

# These do not read their first argument.
_OVERWRITES = {torch.ops.aten.copy_, torch.ops.aten.fill_, torch.ops.aten.zero_}
# These move some rows of their first argument, as often as it says here.
_ROWS = {torch.ops.aten.index_fill_: 1, torch.ops.aten.index_copy_: 2, torch.ops.aten.index_add_: 3}


class Work(TorchDispatchMode):
    """Count the work of a call while it is active.

    Each operation takes at least as long as its multiplications at the machine's rate or its bytes at the
    machine's bandwidth, the longer of the two. Caches and fused kernels may be faster than that.

    Attributes:
        flops: multiplications and additions.
        bytes: read and written by all operations.
        seconds: least time of all operations.
    """

    def __init__(self, limits: dict[str, float]):
        super().__init__()
        self.limits, self.flops, self.bytes, self.seconds = limits, 0, 0, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        # Views and uninitialized tensors move nothing.
        if func.is_view or func.name().startswith(("aten::empty", "aten::_unsafe_view")):
            return output
        count = memory.FLOPS.get(func._overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=output) if count else 0
        read = args[1:] if func._overloadpacket in _OVERWRITES else args
        moved = sum(
            leaf.nbytes for leaf in tree_leaves((read, kwargs, output)) if isinstance(leaf, torch.Tensor)
        )
        if func._overloadpacket == torch.ops.aten.index_select:
            moved = 2 * output.nbytes + args[2].nbytes
        if func._overloadpacket in _ROWS:
            whole, dim, index = args[:3]
            rows = whole.nbytes * index.numel() // whole.shape[dim]
            moved = rows * _ROWS[func._overloadpacket] + index.nbytes
        self.flops += flops
        self.bytes += moved
        self.seconds += max(flops / self.limits["flops_per_s"], moved / self.limits["bytes_per_s"])
        return output


def limits(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    seconds: float = 0.3,
    num_bytes: int = 2**30,
) -> dict[str, float]:
    """Measure the limits of a machine for about `seconds` each, with copies of `num_bytes`: more than any cache holds.

    Returns:
        `flops_per_s`, the rate of large matrix products, and `bytes_per_s`, the bytes read and written a
        second in the copies.
    """
    source = torch.ones(num_bytes // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    num, start = 0, 0.0
    while num == 0 or time.perf_counter() - start < seconds:
        target.copy_(source)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        num += 1
        if num == 1:  # the first copy allocates the pages
            start = time.perf_counter()
    rate = 2 * (num - 1) * source.nbytes / (time.perf_counter() - start) if num > 1 else 0.0
    return {"flops_per_s": matrix_rate(device, dtype), "bytes_per_s": rate}
