"""The process and the machine: device, precision, seed, rank, memory, worker processes, and notices of the
libraries.

Torch is imported inside the functions, so that the command can import this file before it parses its
arguments.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import multiprocessing
import operator
import os
import platform
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger("latent_shift")


def rank() -> int:
    """Return the number of this process among those that torchrun started, 0..world_size - 1."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve_device(name: str | torch.device | None = None) -> torch.device:
    """Return an available device.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps", ... None takes CUDA if available, else the CPU. On a machine
            with several GPUs, None and "cuda" are the GPU of this process (LOCAL_RANK). Apple's GPU ("mps")
            is only used if asked for, for sampling as for training: nothing here was measured on one.

    Raises:
        ValueError: an unknown device, or one that this machine or this build of PyTorch does not have.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device {name!r}: expected cpu, cuda, cuda:1 or mps") from error
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device}: this machine, or this build of PyTorch, has no CUDA; expected cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device}: this machine has {torch.cuda.device_count()} GPUs; expected cuda:0 and up"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {device}: this machine, or this build of PyTorch, has no MPS; expected cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        try:
            torch.empty(1, device=device).item()
        except (AssertionError, RuntimeError, ImportError) as error:
            raise ValueError(
                f"device {device}: this machine, or this build of PyTorch, does not have it; expected cpu, cuda or mps"
            ) from error
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """Return the precision that a `train.precision` means on a device: "no" (float32), "bf16" or "fp16".

    "auto" is bf16 on hardware with bf16 units, fp16 on older GPUs, and float32 elsewhere: a CPU without such
    units takes 50 times longer for a matrix product in bf16 than in float32 (AVX2, PyTorch 2.13).
    """
    import torch

    if name != "auto":
        return name
    if device.type == "cuda":
        return (
            "bf16"
            if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
            else "fp16"
        )
    return "bf16" if has_bf16_units() or device.type != "cpu" else "no"


def has_bf16_units() -> bool:
    """Return whether this CPU multiplies in bf16.

    oneDNN's own answer is not used on x86: it is yes for every CPU with AVX-512, where bf16 may only be
    emulated, and for some without, where it has no gradients.
    """
    import torch

    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_avx512_bf16_supported())
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_of_slow_bf16(device: torch.device, instead: str) -> None:
    """Warn where bf16 is asked for on a CPU without units for it.

    Args:
        device: that computes.
        instead: the option to choose.
    """
    if device.type == "cpu" and not has_bf16_units():
        log.warning(
            "this CPU has no units for bf16 and computes many times slower in it than in float32: %s", instead
        )


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of a resolved `train.precision`: "no" is float32."""
    import torch

    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def seed(number: int) -> torch.Generator:
    """Return a seeded CPU generator: the same number gives the same noise on every device.

    Raises:
        ValueError: not a whole number from -2^63 to 2^64 - 1.
    """
    import torch

    return torch.Generator().manual_seed(check_seed(number))


def check_seed(number: object) -> int:
    """Return a seed as an integer; raise ValueError for one that torch does not take, and for a bool."""
    try:
        integer = operator.index(number)  # type: ignore[arg-type]  # also of NumPy's and torch's integers
    except TypeError:
        integer = None
    if isinstance(number, bool) or integer is None or not -(2**63) <= integer < 2**64:
        raise ValueError(f"seed must be a whole number from -2^63 to 2^64 - 1, got {number!r:.60}")
    return integer


def skip_packages(names: Iterable[str]) -> None:
    """Keep diffusers, transformers and peft from importing optional packages that this process will not use.

    They import each of bitsandbytes, peft, torchao and scipy wherever it is installed, which takes a third
    of the time that `generate` spends on imports. Afterwards these packages look as if they were not
    installed, to everything in this process: only a command may call this, which runs once and knows what it
    needs (`catalog.unused_packages`). It does nothing after diffusers was imported.
    """
    if "diffusers" not in sys.modules and "transformers" not in sys.modules:
        for name in names:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # None makes `import name` raise ModuleNotFoundError


def set_passive_waiting() -> None:
    """Let idle OpenMP threads sleep instead of spin; call it before torch is imported.

    With a neighbour on the same cores, a clip takes 39 s instead of 88 s. Variables that the user set are
    respected. KMP_BLOCKTIME is the same setting of Intel's and LLVM's OpenMP, which PyTorch uses on Windows
    and macOS.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "KMP_BLOCKTIME" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["KMP_BLOCKTIME"] = "0"


def keep_freed_memory() -> None:
    """Keep large freed buffers in this process instead of returning them to the system; has an effect with
    glibc only.

    glibc maps large tensors anew and zeroes their pages at each use (24,528 page faults in a training step
    of the emoji U-Net on 64 frames, 1 with these settings). Where page faults are expensive, training on a CPU
    is up to 30 times slower for it, and sampling by a tenth or more. The calls equal MALLOC_MMAP_MAX_=0,
    MALLOC_TRIM_THRESHOLD_=-1 and MALLOC_TOP_PAD_=536870912; a variable that the user set is respected.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for variable, option, value in (
        ("MALLOC_MMAP_MAX_", -4, 0),  # M_MMAP_MAX: no buffer has a mapping of its own
        ("MALLOC_TRIM_THRESHOLD_", -1, -1),  # M_TRIM_THRESHOLD: the heap never shrinks
        ("MALLOC_TOP_PAD_", -2, 512 * 2**20),  # M_TOP_PAD: the heap grows by 512 MiB at a time
    ):
        if variable not in os.environ:
            libc.mallopt(option, value)


def exit_with_parent() -> None:
    """Make a worker process end when the process that started it does, however that ends. Call it first in
    the worker."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def quiet_libraries() -> None:
    """Keep notices of the libraries (progress bars of loading, warnings about types) out of the terminal."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # these warn when they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING)


_silent: ContextVar[frozenset[str]] = ContextVar("silent", default=frozenset())


@contextmanager
def silenced(*loggers: str) -> Iterator[None]:
    """Silence loggers inside this block, for this thread alone."""
    for name in loggers:
        logging.getLogger(name).addFilter(_is_heard)  # adding it again does nothing
    before = _silent.set(_silent.get() | set(loggers))
    try:
        yield
    finally:
        _silent.reset(before)


def _is_heard(record: logging.LogRecord) -> bool:
    return record.name not in _silent.get()


def start_worker(module: str, function: str, *args: object) -> None:
    """Initialize a worker process that uses networks: set its allocator, silence the libraries, then call a function
    given by name, whose imports are silent, too."""
    keep_freed_memory()
    quiet_libraries()
    getattr(importlib.import_module(module), function)(*args)


def peak_memory_gib(device: str | torch.device = "cpu") -> float:
    """Return the peak memory in GiB: of this process's tensors on a GPU, of the whole process on a CPU."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Not ru_maxrss, which starts at the peak of the parent process.
    if (status := Path("/proc/self/status")).exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
