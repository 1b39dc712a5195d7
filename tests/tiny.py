"""A small real world for the tests: three animated squares with captions, a CLIP text encoder and models of size "tiny"."""

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latent_shift import video
from latent_shift.config import Config
from latent_shift.runtime import keep_freed_memory
from latent_shift.training.loop import STAGES
from latent_shift.training.prepare import Prepared
from latent_shift.training.stages import Stage

keep_freed_memory()  # as the command does before it trains

START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # Windows
forkserver = multiprocessing.get_context(START_METHOD)
"""Starts processes that have imported the training loop already, where there is a forkserver; imports take seconds."""
if START_METHOD == "forkserver":
    forkserver.set_forkserver_preload(
        ["latent_shift.training.loop", "transformers.models.clip.modeling_clip", "pytest"]
    )

ROUNDING = 1e-3 if torch.cuda.is_available() else 0.0
"""How far apart two runs of the same may be: a GPU's kernels add in another order every time."""


def alike(a, b) -> bool:
    """The same tensors, on a CPU to the last bit, on a GPU nearly so beside their largest value; in whatever holds them."""
    if isinstance(a, torch.Tensor):
        if not ROUNDING or not a.is_floating_point():
            return torch.equal(a, b)
        return a.shape == b.shape and bool((a - b).abs().max() <= ROUNDING * b.abs().max())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(alike, a, b)) if isinstance(a, (list, tuple)) else a == b


COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255)}


def enter_process(log: Path, file_bytes: int | None) -> None:
    """Set up a process of its own for a fault: its output goes to a log, and its files have at most `file_bytes`."""
    import resource

    os.setpgrp()  # Ctrl-C reaches a command and its workers
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    # Jobs in the background of a shell ignore Ctrl-C, and a fork server that data workers have started blocks it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))


def launch(function: Callable[..., object], *args: object, processes: int = 2) -> None:
    """Call a function in several processes, with the variables that torchrun sets."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    workers = [
        forkserver.Process(
            target=_call_as_rank, args=({**variables, "RANK": str(k), "LOCAL_RANK": str(k)}, function, args)
        )
        for k in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0] * processes


def _call_as_rank(variables: dict[str, str], function: Callable[..., object], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= variables
    function(*args)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def full_disk(num_bytes: int):
    """Let no file grow beyond a size in the block; the effect is that of a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def make_media(folder: Path) -> Path:
    """A folder of three clips of 20 frames (the red one loops) and a still, 32x32, with metadata.jsonl."""
    rows = []
    for name, colour in COLOURS.items():
        frames = np.full((20, 32, 32, 3), 255, np.uint8)
        for k in range(20):
            frames[k, 8:16, k : k + 8] = colour
        video.write(frames, folder / f"{name}.webp", fps=8)
        rows.append(
            {
                "file_name": f"{name}.webp",
                "text": [f"a {name} square", name],
                "concept": name,
                "loop": name == "red",
            }
        )
    video.write(frames[:1], folder / "still.png")
    rows.append(
        {"file_name": "still.png", "text": "a still square", "concept": "blue", "split": "val_concept"}
    )
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def make_texts(folder: Path) -> Path:
    """tokenizer/ and text_encoder/ as a Stable Diffusion folder holds them: CLIP, 32 wide."""
    folder.mkdir(exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=20)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=20, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


def traced(graphs: list):
    """Return `nn.Module.compile` without code generation, which takes minutes: graphs are captured, collected and run eagerly."""
    compile = torch.nn.Module.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph

    return lambda module, **options: compile(module, backend=backend, **options)


def tiny_config(stage: str, path, *, steps: int = 4, **sections) -> Config:
    """A config of a few steps; `sections` override table by table."""
    tables = {
        "data": {
            "path": str(path),
            "batch_size": 2,
            **{
                "autoencoder": {"crop": 32},
                "tiny_autoencoder": {"crop": 32},
                "image": {},
                "video": {"num_frames": 4},
                "distill": {"num_frames": 4},
            }[stage],
        },
        "model": {"size": "tiny"},
        "optim": {"steps": steps, "lr": 1e-3, "warmup_steps": 1},
        "train": {"precision": "no", "log_every": 1, "sample_every": 1000},
    }
    if stage in ("image", "video"):
        tables["train"]["sample_steps"] = 2
    for name, values in sections.items():
        tables[name] = values if name == "model" else {**tables.get(name, {}), **values}
    return Config.model_validate({"stage": stage, **tables})


def two_back(num_channels: int) -> list[int]:
    """A rule of the shift: half of the channels come from two frames before."""
    return [-2] * (num_channels // 2) + [0] * (num_channels - num_channels // 2)


def stage_of(config: Config) -> Stage:
    """The stage of a config whose data is a store and whose model.init, if any, is a diffusers folder."""
    init = Path(config.model.init) if config.model.init else None
    return STAGES[config.stage](config, Prepared(config.data.path, init, "no"))
