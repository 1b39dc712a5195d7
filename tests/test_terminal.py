"""What the command shows while it works."""

import pytest

from latent_shift.cli import terminal
from latent_shift.cli.terminal import Progress, TrainingProgress, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.5 s"), (42.31, "42.3 s"), (99.9, "99.9 s"), (100, "1.67 min"), (3600, "60 min"), (5999, "100 min"),
     (6000, "1.67 h"), (47 * 3600, "47 h"), (48 * 3600, "2 days"), (1e6, "11.6 days")],
)  # fmt: skip
def test_duration_uses_the_unit_that_people_would(seconds, text):
    assert duration(seconds) == text


def test_progress_prints_a_line_now_and_then_when_piped(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with Progress("packing") as progress:
        for done in range(1, 101):
            now += 1.0
            progress(done, 100)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[:2] == ["packing: 15 of 100, 85 s left", "packing: 30 of 100, 70 s left"]
    assert lines[6:] == ["packing: 100 in 1.67 min"]


def test_training_progress_prints_rows_when_piped(capsys):
    with TrainingProgress("video", 100) as report:
        report({"step": 7, "loss": 0.25, "clips_per_s": 3.21, "data_wait_s": 0.5, "eta_s": 5400})
    assert capsys.readouterr().out == "step 7  loss 0.2500  3.2 clips/s  waited 0.5 s  90 min left\n"
