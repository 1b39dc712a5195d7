"""Latents are made once, whole and the same, whoever makes them and whatever stops them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from latent_shift.data import encode as encoding
from latent_shift.data.encode import encode
from latent_shift.data.latents import LatentStore
from latent_shift.data.pack import pack
from latent_shift.data.store import Store
from latent_shift.diffusion import share_noise
from latent_shift.models.autoencoder import to_pixels


def everything(folder):
    """Every byte of a store of latents that training reads."""
    names = ["store.json", "index.jsonl", "index.npy", "texts.json", "texts.npy", "captions.npy"]
    return {path.name: path.read_bytes() for path in [*(folder / "shards").iterdir(), *(folder / name for name in names)]}


@pytest.fixture(scope="module")
def shards(media, tmp_path_factory):
    """The clips of `media` in several small shards."""
    folder = tmp_path_factory.mktemp("shards")
    pack(media, folder, size=32, fps=8, shard_mb=0.05)
    assert len(Store(folder).shapes) == 4
    return folder


@pytest.fixture(scope="module")
def once(shards, autoencoder, texts, tmp_path_factory):
    """What one process makes of `shards`, mirrored too."""
    folder = tmp_path_factory.mktemp("once")
    encode(shards, folder, autoencoder=autoencoder, texts=texts, mirror=True)
    return folder


def test_latents_are_whole(packed, latents, autoencoder):
    pixels, store = Store(packed), LatentStore(latents)
    assert list(store.shapes.values()) == [(61, 2, 4, 4, 4)]
    assert [record.texts for record in store.records] == [record.texts for record in pixels.records]
    vae = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        posterior = vae.encode(to_pixels(torch.from_numpy(pixels.window(1, 5, 3)))).latent_dist
    latent = torch.from_numpy(store.window(1, 5, 3).astype(np.float32))
    torch.testing.assert_close(latent[:, 0], posterior.mean, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(latent[:, 1], posterior.std, rtol=1e-2, atol=1e-3)
    # The cached embeddings are what diffusers' own pipeline computes from the words.
    captions = {text for record in pixels.records for text in record.texts} | {""}
    assert store.num_captions == len(captions) == len({text.tobytes() for text in store.embed(list(captions))})
    with pytest.raises(KeyError, match="a caption nobody gave"):
        store.embed(["", "a caption nobody gave"])


def test_cached_embeddings_are_the_pipelines(latents, video_model):
    store = LatentStore(latents)
    pipe = StableDiffusionPipeline.from_pretrained(video_model, dtype=torch.float32)
    ours = torch.from_numpy(store.embed(["a red square", ""]))
    theirs = torch.cat(pipe.encode_prompt("a red square", "cpu", 1, True))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=5e-3)


def test_mirror_images_but_of_what_names_a_side(media, shards, once, autoencoder, texts, tmp_path):
    pixels, store = Store(shards), LatentStore(once)
    assert [record.texts for record in store.records] == 2 * [record.texts for record in pixels.records]
    vae = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        mean = vae.encode(to_pixels(torch.from_numpy(pixels.window(0, 3, 2)[:, :, ::-1].copy()))).latent_dist.mean
    mirrored = torch.from_numpy(store.window(len(pixels.records), 3, 2)[:, 0].astype(np.float32))
    torch.testing.assert_close(mirrored, mean, rtol=1e-2, atol=1e-3)

    for name, caption in (
        ("a", "moves to the LEFT"), ("b", "a hand\nrightwards"), ("c", "a bright leftover of the feast"), ("d", "the leftmost car"),
        ("e", "a northeastern wind"), ("f", "turns anti-clockwise"), ("g", "eastbound"), ("h", "right-handed"),
    ):  # fmt: skip
        (tmp_path / f"{name}.webp").write_bytes((media / "red.webp").read_bytes())
        (tmp_path / f"{name}.txt").write_text(caption)
    pack(tmp_path, tmp_path / "pixels", size=32, fps=8)
    store = encode(tmp_path / "pixels", tmp_path / "latents", autoencoder=autoencoder, texts=texts, mirror=True)
    assert [record.file_name for record in store.records] == [*(f"{name}.webp" for name in "abcdefgh"), "c.webp"]
    assert not np.array_equal(store.window(2, 0, 1), store.window(8, 0, 1))


def test_other_settings_make_other_shards(shards, once, autoencoder, texts, tmp_path):
    vae = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1e-3
    vae.save_pretrained(tmp_path / "autoencoder")
    encode(shards, tmp_path / "out", autoencoder=autoencoder, texts=texts)
    plain = set(LatentStore(tmp_path / "out").shapes)
    assert plain < set(LatentStore(once).shapes)  # the mirror images are other shards, what is not mirrored is the same
    encode(shards, tmp_path / "out", autoencoder=tmp_path / "autoencoder", texts=texts)
    other = set(LatentStore(tmp_path / "out").shapes)
    assert not other & plain
    assert {path.stem for path in (tmp_path / "out" / "shards").iterdir()} == other


def test_any_number_of_processes_makes_the_same(shards, once, autoencoder, texts, tmp_path):
    done = []
    encode(shards, tmp_path / "two", autoencoder=autoencoder, texts=texts, mirror=True, workers=2, progress=lambda *both: done.append(both))
    assert everything(tmp_path / "two") == everything(once)
    assert done == [(number, 8) for number in range(1, 9)]


def test_what_stops_it_loses_no_shard_and_doubles_none(shards, once, autoencoder, texts, tmp_path):
    """Killed by SIGKILL as soon as a shard is there, again and again, until it is done."""
    code = (
        "import sys, latent_shift.encode as e, time; slow = e.Encoder.__call__\n"
        "e.Encoder.__call__ = lambda *args: (slow(*args), time.sleep(0.3))\n"
        "e.encode(sys.argv[1], sys.argv[2], autoencoder=sys.argv[3], texts=sys.argv[4], mirror=True)"
    )
    out, kept = tmp_path / "out", dict[str, int]()
    for kills in range(20):
        process = subprocess.Popen([sys.executable, "-c", code, *map(str, (shards, out, autoencoder, texts))])
        while process.poll() is None and len(list((out / "shards").glob("*.npy"))) < min(8, len(kept) + 3):
            time.sleep(0.02)
        if process.poll() is None and kills < 3:
            os.kill(process.pid, signal.SIGKILL)
        if process.wait() == 0:
            break
        with pytest.raises(ValueError, match="not a packed data set"):
            LatentStore(out)
        times = {path.name: path.stat().st_mtime_ns for path in (out / "shards").glob("*.npy")}
        assert kept.items() <= times.items()  # none is made again
        kept = times
    assert kills > 1 and process.returncode == 0
    assert everything(out) == everything(once)


def test_workers_end_with_who_started_them(shards, autoencoder, texts, tmp_path):
    code = "import sys, latent_shift.encode as e\ne.encode(sys.argv[1], sys.argv[2], autoencoder=sys.argv[3], texts=sys.argv[4], workers=2)"
    slow = tmp_path / "slow"  # as a script: workers import it anew, and it must do nothing then
    slow.mkdir()
    (slow / "run.py").write_text(f"if __name__ == '__main__':\n    exec({code!r})\n")
    process = psutil.Popen([sys.executable, slow / "run.py", *map(str, (shards, tmp_path / "out", autoencoder, texts))])
    while process.poll() is None and len(workers := [each for each in process.children() if "spawn_main" in " ".join(each.cmdline())]) < 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert psutil.wait_procs(workers, timeout=30)[1] == []


@pytest.mark.timeout(300)
def test_a_cluster_that_loses_a_machine_makes_the_same(shards, once, autoencoder, texts, tmp_path):
    """Two nodes of Ray, of which one is killed when the first shard is there."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    dies, done = cluster.add_node(num_cpus=1), []

    def progress(number, total):
        done.append(number)
        if number == 1:
            cluster.remove_node(dies, allow_graceful=False)

    try:
        out = tmp_path / "out"
        encode(shards, out, autoencoder=autoencoder, texts=texts, mirror=True, workers=2, ray=cluster.address, progress=progress)
        assert everything(out) == everything(once)
        assert done == list(range(1, 9))
    finally:
        cluster.shutdown()


def test_latents_never_lie_over_the_pixels_or_beside_another_autoencoder(shards, once, autoencoder, texts, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is read from; expected another folder"):
        encode(shards, shards, autoencoder=autoencoder, texts=texts)
    encode(shards, tmp_path / "latents", autoencoder=autoencoder, texts=texts)
    (tmp_path / "latents" / "texts.json").unlink()
    monkeypatch.setattr(encoding.text, "embed", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        encode(shards, tmp_path / "latents", autoencoder=autoencoder, texts=texts)
    with pytest.raises(ValueError, match="not a packed data set"):
        LatentStore(tmp_path / "latents")


def test_sides_that_the_autoencoder_would_cut_are_refused(media, autoencoder, texts, tmp_path):
    pack(media, tmp_path / "pixels", size=33, fps=8)
    with pytest.raises(ValueError, match="frames of 33 pixels: the autoencoder needs multiples of 8"):
        encode(tmp_path / "pixels", tmp_path / "latents", autoencoder=autoencoder, texts=texts)
    assert not (tmp_path / "latents").exists()


def test_no_part_of_a_pattern_is_written_over(shards, autoencoder, texts, tmp_path):
    for name in "ab":
        shutil.copytree(shards, tmp_path / name)
    with pytest.raises(ValueError, match="is read from; expected another folder"):
        encode(tmp_path / "*", tmp_path / "b", autoencoder=autoencoder, texts=texts)
    assert Store(tmp_path / "b").info["dtype"] == "uint8"
    with pytest.raises(ValueError, match="strides must be 1 or more"):
        encode(tmp_path / "a", tmp_path / "out", autoencoder=autoencoder, texts=texts, strides=[1, 0])


def test_workers_share_the_gpus():
    assert [encoding.worker_device("cuda", number, 2) for number in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert encoding.worker_device("cuda:1", 0, 2) == "cuda:1"
    assert encoding.worker_device("cpu", 3, 0) == "cpu"


def test_captions_that_are_embedded_are_not_embedded_again(shards, once, autoencoder, texts, tmp_path, monkeypatch):
    asked, embed = [], encoding.text.embed

    def counted(tokenizer, text_encoder, captions):
        asked.extend(captions)
        if len(asked) > 4:
            raise KeyboardInterrupt
        return embed(tokenizer, text_encoder, captions)

    monkeypatch.setattr(encoding, "CAPTION_SAVE_INTERVAL", 1)
    monkeypatch.setattr(encoding.text, "embed", counted)
    with pytest.raises(KeyboardInterrupt):
        encode(shards, tmp_path, autoencoder=autoencoder, texts=texts, batch_size=1)
    first = asked[1:4]  # before them the null prompt, to see the shape of an embedding
    asked.clear()
    monkeypatch.setattr(encoding.text, "embed", lambda *args: asked.extend(args[2]) or embed(*args))
    store = encode(shards, tmp_path, autoencoder=autoencoder, texts=texts, batch_size=1)
    captions = json.loads((tmp_path / "texts.json").read_text(encoding="utf-8"))["captions"]
    assert captions == [*first, *asked[1:]] and store.num_captions == len(captions)
    assert np.array_equal(store.embed(captions), LatentStore(once).embed(captions))
    assert not (tmp_path / "texts.partial.json").exists()


def test_the_noise_that_matches_clips_is_found(latents, monkeypatch):
    """In clips that are noise themselves, of a known share and correlation."""
    store = LatentStore(latents)
    store.index["loop"] = False
    rng = np.random.default_rng(0)
    frames = np.zeros((store.num_frames, 2, 4, 64, 64))
    for record in store.records:
        own, common = (rng.standard_normal((1, number, 4, 64, 64)) for number in (record.num_frames, 1))
        frames[record.start : record.start + record.num_frames, 0] = 2 * share_noise(own, common, 0.6, 0.8)[0]
    monkeypatch.setattr(store, "_open", lambda _: frames)
    found = store.likeness(num=50)
    assert found["diffusion.shared_noise"] == pytest.approx(0.6, abs=0.05)
    assert found["diffusion.noise_correlation"] == pytest.approx(0.8, abs=0.05)
    assert found["correlation 2 apart"] == pytest.approx(0.6 + 0.4 * 0.64, abs=0.03)
    # What moves evenly is farther apart four frames on than noise of any share and correlation: the nearest has nothing in common.
    still = np.sin(np.arange(400)[:, None, None, None, None] / 6 + np.linspace(0, 6, 64)) * np.ones((1, 2, 4, 64, 1))
    monkeypatch.setattr(store, "_open", lambda _: still[: store.num_frames])
    found = store.likeness(num=50)
    share, r = found["diffusion.shared_noise"], found["diffusion.noise_correlation"]
    assert 1 - found["correlation 4 apart"] > 2 * (1 - found["correlation 2 apart"]) and share < 0.05
    for k in (2, 4):
        assert share + (1 - share) * r**k == pytest.approx(found[f"correlation {k} apart"], abs=0.1)
