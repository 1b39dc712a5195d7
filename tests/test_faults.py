"""Every fault of faults.py a few times: nothing is lost. `python tests/faults.py 50` repeats them many times and prints the table."""

import faults
import pytest


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    config = faults.prepare(folder)
    faults.run_to_end(config, folder / "whole")
    return config, folder


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_fault_loses_nothing(fault, prepared, tmp_path):
    config, folder = prepared
    fault(config, tmp_path / "run", 2)
    assert (
        faults.find_differences(
            tmp_path / "run", folder / ("latents" if fault is faults.encoding_killed else "whole")
        )
        == []
    )


def test_find_differences_reports_another_run(prepared, tmp_path):
    config, folder = prepared
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 1})})
    faults.run_to_end(other, tmp_path / "run")
    assert faults.find_differences(tmp_path / "run", folder / "whole") == [
        "model.safetensors",
        "average.safetensors",
        "optimizer",
        "losses",
    ]
