"""Output folders: whose they are, and who is at work in them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latent_shift.files import MAX_JSON_BYTES
from latent_shift.folders import MARKER, output_folder, read_kind


def test_output_folder_takes_new_empty_and_own_folders(tmp_path):
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        with output_folder(folder, "clips") as path:
            assert path == folder and read_kind(folder) == "clips"
            (folder / "clip.png").touch()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".DS_Store").touch()
    with output_folder(tmp_path / "c", "clips"):
        pass


@pytest.mark.parametrize("marker", [None, "[]", "{", '{"kind": 3}', b"\xff"])
def test_output_folder_refuses_files_that_are_not_its_own(marker, tmp_path):
    (tmp_path / "index.html").write_text("mine")
    if marker is not None:
        (tmp_path / MARKER).write_bytes(marker if isinstance(marker, bytes) else marker.encode())
    with (
        pytest.raises(ValueError, match=r"holds .*, which latent-shift did not write there"),
        output_folder(tmp_path, "clips"),
    ):
        pass
    with output_folder(tmp_path, "clips", force=True):
        assert (tmp_path / "index.html").read_text() == "mine"


def test_output_folder_refuses_a_folder_of_another_kind(tmp_path):
    with output_folder(tmp_path, "clips"):
        (tmp_path / "clip.png").touch()
    with pytest.raises(ValueError, match="holds clips, expected a run"), output_folder(tmp_path, "a run"):
        pass


def test_output_folder_recognises_folders_from_before_the_marker(tmp_path):
    (tmp_path / "store.json").touch()
    with output_folder(tmp_path, "a store", is_own=lambda folder: (folder / "store.json").exists()):
        assert read_kind(tmp_path) == "a store"


def test_output_folder_takes_a_folder_with_debris_of_systems(tmp_path):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".Spotlight-V100").mkdir()
    with output_folder(tmp_path, "clips"):
        assert read_kind(tmp_path) == "clips"


def damage_marker(marker: Path, kind: str) -> None:
    if kind == "folder":
        marker.mkdir()
    elif kind == "pipe":
        os.mkfifo(marker)
    elif kind == "circle":
        marker.symlink_to(marker)
    else:
        marker.write_text({"nested": "[" * 100_000, "large": " " * (MAX_JSON_BYTES + 1)}[kind])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["folder", "pipe", "circle", "nested", "large"])
def test_marker_of_any_kind_is_none(kind, tmp_path):
    damage_marker(tmp_path / MARKER, kind)
    assert read_kind(tmp_path) is None
    with pytest.raises(ValueError, match=r"holds \.latent-shift\.json"), output_folder(tmp_path, "clips"):
        pass


def test_output_folder_refuses_a_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with (
            pytest.raises(ValueError, match="expected a folder, but a file is in its way"),
            output_folder(path, "clips"),
        ):
            pass


def test_output_folder_is_locked_against_other_processes(tmp_path):
    script = "import sys; from latent_shift.folders import output_folder\nwith output_folder(sys.argv[1], 'clips'): pass"
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    with output_folder(tmp_path / "out", "clips"):
        second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1 and "another process is writing there" in second.stderr
    assert subprocess.run(command).returncode == 0
