"""CUDA graphs of a network's calls: what the host launches once is replayed by the GPU, one graph for each shape of the inputs.

A small U-Net waits for the host, which takes 7 to 8 ms to launch the kernels of a step whatever they compute.
"""

from __future__ import annotations

import logging
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from latent_shift.shift_kernels import collect_tables

log = logging.getLogger("latent_shift")

_WARM_UPS = 2
"""Calls before a graph is recorded, in which libraries allocate their workspaces."""


def use_cuda_graphs(network: nn.Module, *, max_graphs: int = 8) -> CudaGraphs:
    """Replay the calls of a network on a GPU as CUDA graphs, from the second call of a shape on.

    A graph is used only if its output equals that of the network, bit for bit. Calls that a graph cannot repeat run as before:
    on a CPU, with gradients or autocast, of streams, with a LoRA that is not fused or other `cross_attention_kwargs`, and of a
    compiled network.

    Args:
        network: an inflated U-Net on the device where it stays.
        max_graphs: graphs that are kept, those that were used last. Each takes the memory of a call's inputs and outputs; they
            share the rest.

    Returns:
        The graphs; `remove()` takes them off the network again.

    Raises:
        ValueError: the network has graphs, or is offloaded to the CPU between calls.
    """
    if isinstance(network.__dict__.get("forward"), CudaGraphs):
        raise ValueError(f"{type(network).__name__} has CUDA graphs already")
    if any(hasattr(module, name) for module in network.modules() for name in ("_hf_hook", "_diffusers_hook")):
        raise ValueError(
            f"{type(network).__name__} moves between devices, and a graph needs its weights where they were"
        )
    if max_graphs < 1:
        raise ValueError(f"max_graphs must be 1 or more, got {max_graphs}")
    graphs = CudaGraphs(network, max_graphs)
    network.forward = graphs  # type: ignore[assignment]
    return graphs


@dataclass
class _Recording:
    """A graph: copy `inputs`, replay, read `outputs`."""

    inputs: list[Tensor]
    outputs: Any
    replay: Callable[[], None]
    tables: list[Any]
    """What the kernels read beside the inputs and the weights."""

    def __call__(self, tensors: list[Tensor]) -> Any:
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        self.replay()
        return tree_map_only(Tensor, torch.clone, self.outputs)


class CudaGraphs:
    """The forward pass of a network as graphs, see `use_cuda_graphs`.

    Attributes:
        graphs: by shapes and settings, those used last at the end; None for what a graph does not repeat exactly.
    """

    def __init__(self, network: nn.Module, max_graphs: int):
        self.network, self.max_graphs = network, max_graphs
        self.graphs: OrderedDict[Hashable, _Recording | None] = OrderedDict()
        self._seen: set[Hashable] = set()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> Callable[..., Any]:
        """A copy of the network has no graphs: its weights are elsewhere."""
        network = memo[id(self.network)]
        return types.MethodType(type(network).forward, network)

    def __reduce__(self) -> Any:
        raise TypeError("a network with CUDA graphs cannot be pickled: call remove() first")

    def remove(self) -> None:
        """Take the graphs off the network, and free their memory."""
        if self.network.__dict__.get("forward") is self:
            del self.network.forward
        self.graphs.clear()
        self._seen.clear()

    def __call__(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_tensor(timestep):
            timestep = torch.tensor(timestep, device=sample.device)
        timestep = timestep.to(sample.device)

        def call(values: tuple[tuple, dict]) -> Any:
            return type(self.network).forward(self.network, *values[0], **values[1])

        given = ((sample, timestep, *args), kwargs)
        if not self._applies(sample, kwargs):
            return call(given)
        leaves, spec = tree_flatten(given)
        tensors = [leaf for leaf in leaves if torch.is_tensor(leaf)]
        others = tuple((None,) if torch.is_tensor(leaf) else leaf for leaf in leaves)
        shapes = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        state: Any = self.network._shift_state
        key = (spec, shapes, others, state.num_frames, state.edge, state, self._weights())
        with self._lock:
            if key in self.graphs:
                self.graphs.move_to_end(key)
                recording = self.graphs[key]
                return call(given) if recording is None else recording(tensors)
            expected = call(given)
            if key not in self._seen:  # a shape that comes once needs no graph
                self._seen = {*list(self._seen)[-self.max_graphs :], key}
                return expected
            self._seen.discard(key)
            own = [tensor.clone() for tensor in tensors]

            def call_on_own() -> Any:
                remaining = iter(own)
                values = [next(remaining) if torch.is_tensor(leaf) else leaf for leaf in leaves]
                return call(tree_unflatten(values, spec))

            self.graphs[key] = self._record(call_on_own, own, tensors, expected)
            while len(self.graphs) > self.max_graphs:
                self.graphs.popitem(last=False)
            return expected

    def _applies(self, sample: Tensor, kwargs: dict[str, Any]) -> bool:
        """Return whether a graph could repeat a call."""
        network = self.network
        state = getattr(network, "_shift_state", None)
        return (
            _can_record(sample)
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled(sample.device.type)  # it frees its copies of the weights
            and state is not None
            and state.memory is None
            and state.neighbors is None
            and not kwargs.get("cross_attention_kwargs")
            and "image_embeds" not in (kwargs.get("added_cond_kwargs") or {})
            and not getattr(network, "peft_config", None)
            and network._compiled_call_impl is None
        )

    def _weights(self) -> Hashable:
        """Where the weights are, and what else changes the result: FreeU's factors, attention processors, training."""
        blocks = getattr(self.network, "up_blocks", ())
        freeu = tuple(getattr(block, name, None) for block in blocks for name in ("s1", "s2", "b1", "b2"))
        places, processors = [], []
        for module in self.network.modules():
            places += [
                parameter.data_ptr() for parameter in module._parameters.values() if parameter is not None
            ]
            if (processor := getattr(module, "processor", None)) is not None:
                processors.append(id(processor))
        return (
            tuple(places),
            tuple(processors),
            freeu,
            self.network.training,
            torch.is_inference_mode_enabled(),
        )

    def _record(
        self, call: Callable[[], Any], own: list[Tensor], tensors: list[Tensor], expected: Any
    ) -> _Recording | None:
        """Return a recorded call; None, after a word in the log, if it cannot be recorded or differs."""
        try:
            with collect_tables() as tables:
                recording = _Recording(own, *_record(call, own[0].device), tables)
            if _equal(recording(tensors), expected):
                return recording
            reason = "its output differs"
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
        log.warning("no CUDA graph for inputs %s: %s", [tuple(tensor.shape) for tensor in tensors], reason)
        return None


def _can_record(sample: Tensor) -> bool:
    return sample.is_cuda


def _record(call: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """Record a call as a CUDA graph; return its outputs, which a replay overwrites, and the replay."""
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                call()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=_memory_pool(device), capture_error_mode="thread_local"):
                outputs = call()
        finally:
            torch.cuda.set_stream(current)  # a recording that fails leaves its own stream behind
    return outputs, graph.replay


_pools: dict[torch.device, Any] = {}


def _memory_pool(device: torch.device) -> Any:
    """Return the memory that the graphs of a device share: they run one after the other, and their outputs are copied."""
    if device not in _pools:
        _pools[device] = torch.cuda.graph_pool_handle()
    return _pools[device]


def _equal(a: Any, b: Any) -> bool:
    pairs = zip(tree_flatten(a)[0], tree_flatten(b)[0], strict=True)
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs)
