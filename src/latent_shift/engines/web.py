"""A page that runs an exported model in the browser, with no server behind it: its own files, the model, and the libraries it needs.

The folder holds

    index.html, page.js, worker.js, ...   the page, from page/ beside this file
    web.json       sampling steps, names of what the model knows, sizes of the files, a version
    model/         the exported model, packed with gzip; its weights quantized to 8 bits
    vendor/        files of npm packages: ONNX Runtime, the tokenizers of Hugging Face, encoders of gif and mp4
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from latent_shift.engines.exported import (
    PARTS,
    SETTINGS,
    Settings,
    is_exported,
    read_settings,
    steps_of,
    write_settings,
)
from latent_shift.models import names as names_of
from latent_shift.pipelines import preview
from latent_shift.pipelines.catalog import examples
from latent_shift.pipelines.limits import possible_steps

MANIFEST = "web.json"


@dataclass(frozen=True)
class Package:
    """Files of an npm package.

    Attributes:
        name, version: of the package.
        integrity: of its archive, as npm gives it.
        files: paths in the archive, below "package/".
    """

    name: str
    version: str
    integrity: str
    files: tuple[str, ...]

    @property
    def archive(self) -> str:
        """The name that `npm pack` gives the archive."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package(
        "onnxruntime-web", "1.30.0", "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        ("package.json", "dist/ort.wasm.min.mjs", "dist/ort-wasm-simd-threaded.mjs", "dist/ort-wasm-simd-threaded.wasm",
         "dist/ort.webgpu.min.mjs", "dist/ort-wasm-simd-threaded.asyncify.mjs", "dist/ort-wasm-simd-threaded.asyncify.wasm"),
    ),
    Package("@huggingface/tokenizers", "0.2.0", "sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==", ("LICENSE", "dist/tokenizers.min.mjs")),
    Package("gifenc", "1.0.3", "sha512-xdr6AdrfGBcfzncONUOlXMBuc5wJDtOueE3c5rdG0oNgtINLD+f2iFZltrBRZYzACRbKr+mSVU/x98zv2u3jmw==", ("LICENSE.md", "dist/gifenc.esm.js")),
    Package("mediabunny", "1.61.0", "sha512-WciPOYwKZwgYkoBKcEK6JzzIf+w5whypPzFdOihOylZ/5Qv19FmNfRnTcaprH+jD136YpEASU30Eb6VNCJiz3A==", ("LICENSE", "dist/bundles/mediabunny.min.mjs")),
)  # fmt: skip
_RUNTIME = {
    name: {
        "module": f"vendor/ort.{name}.min.mjs",
        "loader": f"vendor/ort-wasm-simd-threaded{build}.mjs",
        "binary": f"vendor/ort-wasm-simd-threaded{build}.wasm.gz",
    }
    for name, build in {"wasm": "", "webgpu": ".asyncify"}.items()
}
_STEPS = (8, 10, 20, 50)
"""Numbers of sampling steps that the page offers, besides its default, of a model that takes any number."""


def export_web(
    model: str, folder: str | Path, packages: str | Path | None = None, *, large_decoder: bool = False
) -> Path:
    """Write a page that runs a model in the browser.

    Args:
        model: as of `export`, or a folder that it has written.
        folder: where it is written; made if missing.
        large_decoder: as of `export`.
        packages: a folder with the archives of `PACKAGES`, as `npm pack` writes them; None gets them by npm.

    Returns:
        `folder`.

    Raises:
        ValueError: see `export`; a package is missing or is not the one that is expected.
        RuntimeError: npm is needed and is not there, or fails.
    """
    folder = Path(folder)
    inside, vendor = folder / "model", folder / "vendor"
    exported = is_exported(model)
    if exported and large_decoder:
        raise ValueError(
            "--large-decoder has no effect on a model that is exported already: export it again with it"
        )
    vendor.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for package in PACKAGES:
            archive = _archive(package, Path(packages or temporary), download=packages is None)
            _unpack(package, archive, vendor)
    if exported:
        shutil.copytree(model, inside, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    else:
        from latent_shift.engines.export import export

        export(model, inside, large_decoder=large_decoder)
    for part in PARTS[:2]:  # the decoder is small, and its rounding would be seen
        _quantize_weights(inside / f"{part}.onnx")
    settings, names = read_settings(inside), names_of.read_names(inside)
    write_settings(
        settings.model_copy(update={"model": Path(settings.model).name}), inside
    )  # no path of this machine
    for name in (*(f"{part}.onnx" for part in PARTS), "tokenizer.json", SETTINGS):
        _gzip(inside / name)
    for name in (names_of.FILE, preview.FILE):  # the page has the names in its manifest
        (inside / name).unlink(missing_ok=True)
    page = {path.name: path.read_bytes() for path in (files("latent_shift.engines") / "page").iterdir()}
    for name, content in page.items():
        (folder / name).write_bytes(content)
    graphs = {part: f"model/{part}.onnx.gz" for part in PARTS}
    large = [
        *graphs.values(),
        "model/tokenizer.json.gz",
        f"model/{SETTINGS}.gz",
        *(build["binary"] for build in _RUNTIME.values()),
    ]
    manifest = {
        "model": Path(settings.model).name, "graphs": graphs, "runtime": _RUNTIME, "steps": _tables(settings),
        "examples": examples(settings.model), "names": [] if names is None else sorted(names.names),
        "files": {name: (folder / name).stat().st_size for name in large}, "version": _version(folder),
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False) + "\n", encoding="utf-8")
    small = [
        *page,
        MANIFEST,
        *(f"vendor/{path.name}" for path in vendor.iterdir() if path.suffix in (".mjs", ".js")),
    ]
    service_worker = page["sw.js"].decode()
    for name, value in {'VERSION = ""': manifest["version"], "FILES = []": sorted(small)}.items():
        assert name in service_worker
        service_worker = service_worker.replace(name, f"{name.split()[0]} = {json.dumps(value)}")
    (folder / "sw.js").write_text(service_worker, encoding="utf-8")
    return folder


def _archive(package: Package, folder: Path, *, download: bool) -> Path:
    """Return a package's archive, the one that is expected."""
    path = folder / package.archive
    wanted = f"npm pack {package.name}@{package.version}"
    if download:
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError(
                f"the page needs {package.name}, and npm is not installed: get its archive by `{wanted}` on another machine, and give "
                "the folder as --packages"
            )
        result = subprocess.run(
            [npm, *wanted.split()[1:]], cwd=folder, capture_output=True, encoding="utf-8", errors="replace"
        )
        if result.returncode:
            raise RuntimeError(f"`{wanted}` failed: {result.stderr.strip()[-500:]}")
    elif not path.is_file():
        raise ValueError(f"{folder}: has no {package.archive}; `{wanted}` makes it")
    algorithm, _, digest = package.integrity.partition("-")
    if hashlib.new(algorithm, path.read_bytes()).digest() != base64.b64decode(digest):
        raise ValueError(f"{path}: is not {package.name} {package.version}, its {algorithm} differs")
    return path


def _unpack(package: Package, archive: Path, vendor: Path) -> None:
    """Copy a package's files, those of WebAssembly packed, and its licence under the name of the package."""
    with tarfile.open(archive) as tar:
        for name in package.files:
            member = tar.extractfile(f"package/{name}")
            assert member is not None
            path = vendor / Path(name).name
            if not name.startswith("dist/"):
                path = vendor / f"{package.name.rpartition('/')[2]}.{Path(name).name}"
            path.write_bytes(member.read())
            if path.suffix == ".wasm":
                _gzip(path)


def _quantize_weights(path: Path) -> None:
    """Quantize the weights of a graph to 8 bits, each channel with a scale of its own, and dequantize them in the graph: engines do
    so once, when they load it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    weights = {weight.name: weight for weight in model.graph.initializer}
    nodes, scales = [], []
    for node in model.graph.node:
        weight = weights.get(node.input[0]) if node.op_type == "Cast" else None
        if weight is None or weight.data_type != TensorProto.FLOAT16 or len(weight.dims) < 2:
            nodes.append(node)
            continue
        integers, scale = _quantize_per_channel(numpy_helper.to_array(weight).astype(np.float32))
        name = node.output[0]
        weight.CopyFrom(numpy_helper.from_array(integers, f"{name}.int8"))
        scales.append(numpy_helper.from_array(scale, f"{name}.scale"))
        nodes.append(helper.make_node("Cast", [f"{name}.int8"], [f"{name}.cast"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"{name}.cast", f"{name}.scale"], [name]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(scales)
    onnx.save(model, path)


def _quantize_per_channel(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 8-bit integers, and scales along the first or the last axis: the one that leaves the smaller error."""
    found = []
    for axis in (0, values.ndim - 1):
        others = tuple(other for other in range(values.ndim) if other != axis)
        scale = np.maximum(np.abs(values).max(axis=others, keepdims=True), 1e-12) / 127
        integers = np.round(values / scale)
        found.append((float(np.square(integers * scale - values).sum()), integers.astype(np.int8), scale))
    _, integers, scale = min(found, key=lambda each: each[0])
    return integers, scale.astype(np.float32)


def _gzip(path: Path) -> None:
    """Replace a file by one that is packed with gzip."""
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 6, mtime=0))
    path.unlink()


def _tables(settings: Settings) -> dict[str, list[dict[str, float]]]:
    """Return the sampler's steps for every number of steps that the page offers."""
    if settings.distilled_steps:
        numbers = possible_steps(settings.distilled_steps)
    else:
        known = [num for num in _STEPS if num <= len(settings.alphas_cumprod)]
        numbers = sorted({settings.num_inference_steps, *known})
    return {str(num): [asdict(step) for step in steps_of(settings, num)] for num in numbers}


def _version(folder: Path) -> str:
    """Return a hash of all files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
