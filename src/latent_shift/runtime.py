"""The process and the machine: device, precision, seed, memory, worker processes, and the libraries' notices.

Torch is imported inside the functions, so that the command can import this file before it parses its arguments.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import platform
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rank() -> int:
    """This process among those that torchrun started, 0..world_size - 1."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_of(name: str | torch.device | None = None) -> torch.device:
    """A device that is there: None takes CUDA where there is one, else the CPU; of several GPUs None and "cuda" are that of the process
    (LOCAL_RANK). Raises ValueError for CUDA that is not there."""
    import torch

    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: this machine, or this build of PyTorch, has no CUDA; expected cpu")
    return device


def precision_of(name: str, device: torch.device) -> str:
    """What train.precision means on a device: "auto" is bf16 where there are units for it, on older GPUs fp16, else float32 ("no"). A
    CPU without them takes longer for a product of matrices in bf16 than in float32 (50 times with AVX2, PyTorch 2.13)."""
    import torch

    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if has_bf16_units() or device.type != "cpu" else "no"


def has_bf16_units() -> bool:
    """Whether this CPU multiplies in bf16. oneDNN says yes of every x86 with AVX-512, where it may only imitate it, and of some
    without, where it has no gradients."""
    import torch

    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_avx512_bf16_supported())
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def seed(number: int) -> torch.Generator:
    """A CPU generator: the same number gives the same noise on every device."""
    import torch

    return torch.Generator().manual_seed(number)


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of a `train.precision`: "no" is float32."""
    import torch

    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def exit_with_parent() -> None:
    """End this process when its parent process ends, in whatever way. A worker calls this first."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def quiet_libraries() -> None:
    """Keep the libraries' notices (bars for loading files, types they did not expect) out of the terminal."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # what they say when they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING)
    # But not what it says when a prompt is longer than the text encoder reads.
    diffusers.utils.logging.get_logger("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion").setLevel(logging.WARNING)


def start_worker(module: str, function: str, *args: object) -> None:
    """Initialize a process of a pool: watch its parent, silence the libraries, then import a module and call a function of it.

    The parent is watched before anything heavy is imported: imports take seconds, in which the parent may be killed.
    """
    exit_with_parent()
    quiet_libraries()
    getattr(importlib.import_module(module), function)(*args)


def peak_memory_gib(device: str | torch.device = "cpu") -> float:
    """GiB: the most that tensors of this process have taken on a GPU, or on a CPU the process as a whole."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if (status := Path("/proc/self/status")).exists():  # not ru_maxrss, which begins with that of the process that started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
