"""Every fault of faults.py a few times: nothing is lost. `python tests/faults.py 50` repeats them many times and prints the table."""

import command_faults
import faults
import pytest


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    config = faults.prepare(folder)
    faults.run_to_end(config, folder / "whole")
    return config, folder


TWINS = {  # fault of the slow tier -> what the fast tier has in its place
    "killed_in_the_middle": "killed_while_it_saves",
    "killed_at_random_moments": "killed_while_it_saves",
    "asked_to_stop": "interrupted",
    "cut_statistics": "cut_checkpoint",
    "other_settings": "test_train.py::test_check_same_run_refuses_another_run",
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.__name__, marks=[pytest.mark.slow] * (fault.__name__ in TWINS))
        for fault in faults.FAULTS
    ],
)
def test_fault_loses_nothing(fault, prepared, tmp_path):
    config, folder = prepared
    fault(config, tmp_path / "run", 2)
    assert (
        faults.find_differences(
            tmp_path / "run", folder / ("latents" if fault is faults.encoding_killed else "whole")
        )
        == []
    )


@pytest.mark.slow  # trains another model; its fast twin is below
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


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return command_faults.prepare(tmp_path_factory.mktemp("commands"))


FAST = {("generate", "full_disk"), ("sheet", "interrupted")}
"""Cases of the fast tier, where test_folders.py has two processes; the slow tier has all."""


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param(name, fault, id=f"{name}-{fault.__name__}", marks=[pytest.mark.slow] * ((name, fault.__name__) not in FAST))
        for name, fault in command_faults.CASES
    ],
)  # fmt: skip
def test_fault_of_a_command_loses_nothing(name, fault, commands, tmp_path):
    _, lost = command_faults.inflict(fault, commands[name], tmp_path)
    assert lost == []


def test_find_differences_reports_other_files(tmp_path):
    for name, text in (
        ("a/same", "1"),
        ("a/other", "1"),
        ("a/more", ""),
        ("b/same", "1"),
        ("b/other", "2"),
        ("b/.lock", ""),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert command_faults.find_differences(tmp_path / "a", tmp_path / "b") == ["more", "other"]
