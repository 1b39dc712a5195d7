"""Engines that run ONNX graphs: ONNX Runtime and OpenVINO. Each is imported when it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

CACHE = ".openvino"
"""Folder, within that of an exported model, in which OpenVINO keeps what it has compiled."""


class Engine(Protocol):
    """What `ExportedPipeline` needs of an engine."""

    name: str
    package: str

    def __init__(self, folder: Path, parts: Sequence[str], threads: int | None): ...

    def run(self, part: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the one output of a graph. Inputs that the graph does not have are left out."""

    def describe(self) -> dict[str, str]:
        """Return the version of the engine, and the precision in which it computes."""


class OnnxEngine:
    """ONNX Runtime on the CPU.

    Args:
        folder: of the graphs.
        parts: names of the graphs, without ".onnx".
        threads: None takes all cores.
    """

    name, package = "onnx", "onnxruntime"

    def __init__(self, folder: Path, parts: Sequence[str], threads: int | None = None):
        try:
            import onnxruntime
        except ImportError as error:
            raise RuntimeError(
                "engine onnx needs the extra: pip install 'latent-shift-video[onnx]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")

        def load(part: str) -> Any:
            return onnxruntime.InferenceSession(
                str(folder / f"{part}.onnx"), options, providers=["CPUExecutionProvider"]
            )

        self._sessions = _load_all(parts, load)

    def run(self, part: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        session = self._sessions[part]
        names = {entry.name for entry in session.get_inputs()}
        result: np.ndarray = session.run(None, {name: inputs[name] for name in names})[0]
        return result

    def describe(self) -> dict[str, str]:
        import onnxruntime

        return {"version": onnxruntime.__version__, "precision": "float32"}


class OpenVinoEngine:
    """OpenVINO on the CPU, in bfloat16 where the CPU computes in it; arguments as of `OnnxEngine`."""

    name, package = "openvino", "openvino"

    def __init__(self, folder: Path, parts: Sequence[str], threads: int | None = None):
        try:
            import openvino
        except ImportError as error:
            raise RuntimeError(
                "engine openvino needs the extra: pip install 'latent-shift-video[openvino]'"
            ) from error
        core = openvino.Core()
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "CACHE_DIR": str(folder / CACHE)}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        self._models = _load_all(
            parts, lambda part: core.compile_model(str(folder / f"{part}.onnx"), "CPU", config)
        )

    def run(self, part: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        model = self._models[part]
        names = {name for entry in model.inputs for name in entry.names}
        outputs = model({name: value for name, value in inputs.items() if name in names})
        result: np.ndarray = outputs[0]
        return result

    def describe(self) -> dict[str, str]:
        import openvino

        precision = self._models["unet"].get_property("INFERENCE_PRECISION_HINT")
        return {
            "version": openvino.__version__,
            "precision": str(getattr(precision, "get_type_name", lambda: precision)()),
        }


def _load_all(parts: Sequence[str], load: Callable[[str], Any]) -> dict[str, Any]:
    """Load graphs at the same time: the first clip waits for the slowest alone."""
    with ThreadPoolExecutor(len(parts)) as pool:
        return dict(zip(parts, pool.map(load, parts), strict=True))


ENGINES: dict[str, type[Engine]] = {"onnx": OnnxEngine, "openvino": OpenVinoEngine}
"""Engines of exported models, by name."""
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}
"""What each imports."""
