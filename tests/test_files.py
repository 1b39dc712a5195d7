"""Arrays and JSON in files: what is written is read, and a damaged or special file is one line that names it."""

import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from tiny import full_disk

from latent_shift import files


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (4, 5, 6)])
def test_write_array_keeps_values_of_any_layout(order, shape, tmp_path):
    array = np.asarray(np.random.default_rng(0).normal(size=shape), np.float32, order=order)
    files.write_array(tmp_path / "a.npy", array)
    for read in (files.open_array, np.load):
        got = read(tmp_path / "a.npy")
        assert got.dtype == np.float32 and got.shape == shape and np.array_equal(got, array)


def test_write_array_blocks_writes_the_rows_one_after_the_other(tmp_path):
    array = np.arange(60, dtype=np.int16).reshape(10, 3, 2)
    blocks = (block[:, :, ::-1] for block in np.split(array, [4, 9]))
    files.write_array_blocks(tmp_path / "a.npy", blocks, array.dtype, array.shape)
    assert np.array_equal(np.load(tmp_path / "a.npy"), array[:, :, ::-1])


def test_array_header_has_the_same_length_for_any_number_of_rows():
    assert len({len(files.array_header("uint8", (num, 64, 64, 3))) for num in (0, 9, 10**6, 10**12)}) == 1


def test_write_array_blocks_on_a_full_disk_keeps_the_old_file(tmp_path):
    """A growing memory map would end the process with SIGBUS."""
    path = tmp_path / "a.npy"
    files.write_array(path, np.arange(3))
    blocks = (np.zeros((10, 100)) for _ in range(10))
    with full_disk(20_000), pytest.raises(OSError, match="the disk is full") as error:
        files.write_array_blocks(path, blocks, np.dtype(float), (100, 100))
    assert error.value.filename == str(path) and os.listdir(tmp_path) == ["a.npy"]
    assert np.array_equal(np.load(path), np.arange(3))


DAMAGES = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[:20],
    "cut": lambda content: content[:-1],
    "another file": lambda content: b"PK\3\4" + content,
    "brackets": lambda content: content.replace(b"(5, 4)", b"((((((", 1),
    "a string that does not end": lambda content: content.replace(b"(5, 4)", b"'''(((", 1),
    "a name": lambda content: content.replace(b"(5, 4)", b"abcdef", 1),
    "no numbers": lambda content: content.replace(b"(5, 4)", b"('',4)", 1),
    "larger than the file": lambda content: content.replace(b"(5, 4), }", b"(5000, 4)}", 1),
    "larger than an address": lambda content: content.replace(b"(5, 4), }  ", b"(9" + b"9" * 6 + b",)}", 1),
    "beyond integers": lambda content: content.replace(
        b"(5, 4), }" + b" " * 20, b"(1" + b"0" * 25 + b",)}", 1
    ),
    "below zero": lambda content: content.replace(b"(5, 4)", b"(-5,4)", 1),
    "another type": lambda content: content.replace(b"<f8", b"|O8", 1),
    "no type": lambda content: content.replace(b"<f8", b"<?8", 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_arrays_are_one_line_with_their_name(damage, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    np.save(tmp_path / "whole.npy", np.ones((5, 4)))
    content = (tmp_path / "whole.npy").read_bytes()
    damaged = DAMAGES[damage](content)
    assert damaged != content
    path.write_bytes(damaged)
    if suffix == ".npz" and damage != "empty":  # of an intact archive
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", damaged)
    with pytest.raises(ValueError, match=rf"^{path}: expected a {suffix} file; [^\n]*; delete it to have"):
        (files.read_arrays if suffix == ".npz" else files.open_array)(path)


def test_read_arrays_refuses_what_np_savez_does_not_write(tmp_path):
    """A compressed archive may be a thousand times as large in memory."""
    np.savez(tmp_path / "a.npz", a=np.arange(3), b=np.ones(2))
    assert {name: list(array) for name, array in files.read_arrays(tmp_path / "a.npz").items()} == {
        "a": [0, 1, 2],
        "b": [1, 1],
    }
    content = (tmp_path / "a.npz").read_bytes()
    np.savez_compressed(tmp_path / "compressed.npz", a=np.zeros(10_000))
    np.save(tmp_path / "a.npy", np.arange(3))
    (tmp_path / "array.npz").write_bytes((tmp_path / "a.npy").read_bytes())
    (tmp_path / "cut.npz").write_bytes(content[:-30])
    (tmp_path / "changed.npz").write_bytes(content.replace(b"\x02" + b"\0" * 7, b"\x03" + b"\0" * 7, 1))
    flags = content.index(b"PK\x01\x02") + 8  # of the first entry of the archive's directory
    encrypted = content[:flags] + bytes([content[flags] | 1]) + content[flags + 1 :]
    (tmp_path / "encrypted.npz").write_bytes(encrypted)
    for name in ("compressed", "array", "cut", "changed", "encrypted"):
        with pytest.raises(ValueError, match=rf"{name}\.npz: expected a .npz file; [^\n]+$"):
            files.read_arrays(tmp_path / f"{name}.npz")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_readers_open_regular_files_alone(tmp_path):
    """A pipe would be waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    readers = (files.open_array, files.read_arrays, files.read_json, files.read_json_object)
    for read in (*readers, files.read_json_lines, files.read_bytes):
        for name in ("pipe", "folder"):
            with pytest.raises(ValueError, match=rf"^{tmp_path / name}: [^\n]*is a {name}, expected a file"):
                read(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b"\xff", b"1" * 10_000, b"[1] 2", b"\xef\xbb\xbf1"]
)
def test_json_that_is_none_is_one_line_with_its_name(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: expected a JSON file; [^\n]+$"):
        files.read_json(path)
    if content:
        with pytest.raises(ValueError, match=rf"^{path}, line 1: expected JSON; [^\n]+$"):
            files.read_json_lines(path)


def test_read_json_refuses_a_large_file_unopened(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match=r"a\.json: expected at most 67108864 bytes of text, got 67108865"):
        files.read_json(path)
    path.write_text(json.dumps({"a": "é"}, ensure_ascii=False), encoding="utf-8")
    assert files.read_json(path, max_bytes=None) == {"a": "é"}


def test_full_disk_is_named_also_by_libraries_with_errors_of_their_own(tmp_path):
    from safetensors.numpy import save_file

    message = pytest.raises(OSError, match="the disk is full")
    with full_disk(1000), message as error, files.full_disk_named(tmp_path / "model"):
        save_file({"x": np.zeros(10**6)}, tmp_path / "a.safetensors")
    assert error.value.filename == str(tmp_path / "model")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_bytes(bytes(10**6))
    with full_disk(1000), message, files.full_disk_named(tmp_path / "copy"):
        shutil.copytree(tmp_path / "source", tmp_path / "copy")
