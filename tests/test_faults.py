"""Each fault of faults.py, done a few times: nothing is lost. `make faults` does them many times and prints the table."""

import faults
import pytest


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    config = faults.prepare(folder)
    faults.finish(config, folder / "whole")
    return config, folder


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_nothing_is_lost(fault, prepared, tmp_path):
    config, folder = prepared
    fault(config, tmp_path / "run", 2)
    assert faults.lost(tmp_path / "run", folder / ("latents" if fault is faults.encoding_killed else "whole")) == []


def test_what_is_lost_is_seen(prepared, tmp_path):
    config, folder = prepared
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 1})})
    faults.finish(other, tmp_path / "run")
    assert faults.lost(tmp_path / "run", folder / "whole") == ["model.safetensors", "average.safetensors", "optimizer", "losses"]
