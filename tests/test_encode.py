"""Encoding: the latents and embeddings are correct, and the same for any number of processes and after interruptions."""

import errno
import json
import shutil
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from tiny import forkserver
from transformers import CLIPTextModel, CLIPTokenizer
from typer.testing import CliRunner

from latent_shift.cli.main import app
from latent_shift.data import captions as captions_module
from latent_shift.data import encode as encoding
from latent_shift.data.encode import encode
from latent_shift.data.latents import LatentStore
from latent_shift.data.pack import pack
from latent_shift.data.store import Store
from latent_shift.data.workers import Workers
from latent_shift.models.autoencoder import to_pixels
from latent_shift.noise import correlated_noise
from latent_shift.runtime import start_worker


def read_files(folder) -> dict[str, bytes]:
    """Return the content of every file of a store of latents that training reads."""
    index = json.loads((folder / "store.json").read_text())["index"]
    names = ["store.json", f"{index}.jsonl", f"{index}.npy", "texts.json", "texts.npy", "captions.npy"]
    return {
        path.name: path.read_bytes()
        for path in [*(folder / "shards").iterdir(), *(folder / name for name in names)]
    }


@pytest.fixture(scope="module")
def shards(media, tmp_path_factory):
    """The clips of `media` in four small shards."""
    folder = tmp_path_factory.mktemp("shards")
    pack(media, folder, size=32, fps=8, shard_mb=0.05)
    assert len(Store(folder).shapes) == 4
    return folder


@pytest.fixture(scope="module")
def reference(shards, autoencoder, texts, tmp_path_factory):
    """`shards` encoded by one process, with mirror images."""
    folder = tmp_path_factory.mktemp("reference")
    encode(shards, folder, autoencoder=autoencoder, texts=texts, mirror=True)
    return folder


def test_encode_writes_posterior_moments_and_all_captions(packed, latents, autoencoder):
    pixels, store = Store(packed), LatentStore(latents)
    assert list(store.shapes.values()) == [(61, 2, 4, 4, 4)]
    assert [record.texts for record in store.records] == [record.texts for record in pixels.records]
    vae = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        posterior = vae.encode(to_pixels(torch.from_numpy(pixels.window(1, 5, 3)))).latent_dist
    latent = torch.from_numpy(store.window(1, 5, 3).astype(np.float32))
    torch.testing.assert_close(latent[:, 0], posterior.mean, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(latent[:, 1], posterior.std, rtol=1e-2, atol=1e-3)
    captions = {text for record in pixels.records for text in record.texts} | {""}
    assert (
        store.num_captions
        == len(captions)
        == len({embedding.tobytes() for embedding in store.embed(list(captions))})
    )
    with pytest.raises(KeyError, match="a caption that was not encoded"):
        store.embed(["", "a caption that was not encoded"])


def test_embed_returns_what_the_diffusers_pipeline_computes(latents):
    pipe = StableDiffusionPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(latents / "tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(latents / "text_encoder"),
        vae=None, unet=None, scheduler=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    cached = torch.from_numpy(LatentStore(latents).embed(["a red square", ""]))
    computed = torch.cat(pipe.encode_prompt("a red square", "cpu", 1, True))
    torch.testing.assert_close(cached, computed, rtol=1e-2, atol=5e-3)


def test_encode_mirrors_clips_whose_captions_name_no_direction(
    media, shards, reference, autoencoder, texts, tmp_path
):
    pixels, store = Store(shards), LatentStore(reference)
    assert [record.texts for record in store.records] == 2 * [record.texts for record in pixels.records]
    vae = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        mean = vae.encode(
            to_pixels(torch.from_numpy(pixels.window(0, 3, 2)[:, :, ::-1].copy()))
        ).latent_dist.mean
    mirrored = torch.from_numpy(store.window(len(pixels.records), 3, 2)[:, 0].astype(np.float32))
    torch.testing.assert_close(mirrored, mean, rtol=1e-2, atol=1e-3)

    for name, caption in (
        ("a", "moves to the LEFT"), ("b", "a hand\nrightwards"), ("c", "a bright leftover of the feast"), ("d", "the leftmost car"),
        ("e", "a northeastern wind"), ("f", "turns anti-clockwise"), ("g", "eastbound"), ("h", "right-handed"),
    ):  # fmt: skip
        (tmp_path / f"{name}.webp").write_bytes((media / "red.webp").read_bytes())
        (tmp_path / f"{name}.txt").write_text(caption)
    pack(tmp_path, tmp_path / "pixels", size=32, fps=8)
    store = encode(
        tmp_path / "pixels", tmp_path / "latents", autoencoder=autoencoder, texts=texts, mirror=True
    )
    assert [record.file_name for record in store.records] == [
        *(f"{name}.webp" for name in "abcdefgh"),
        "c.webp",
    ]
    assert not np.array_equal(store.window(2, 0, 1), store.window(8, 0, 1))


def test_encode_with_another_autoencoder_writes_other_shards(shards, reference, autoencoder, texts, tmp_path):
    vae = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1e-3
    vae.save_pretrained(tmp_path / "autoencoder")
    encode(shards, tmp_path / "out", autoencoder=autoencoder, texts=texts)
    before = set(LatentStore(tmp_path / "out").shapes)
    assert before < set(LatentStore(reference).shapes)  # mirror images are further shards
    encode(shards, tmp_path / "out", autoencoder=tmp_path / "autoencoder", texts=texts)
    after = set(LatentStore(tmp_path / "out").shapes)
    assert not before & after
    assert {path.stem for path in (tmp_path / "out" / "shards").iterdir()} == after


def test_encode_with_two_workers_writes_the_same_files(
    shards, reference, autoencoder, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(encoding.multiprocessing, "get_context", lambda _: forkserver)
    progress = []
    encode(
        shards, tmp_path, autoencoder=autoencoder, texts=texts, mirror=True, workers=2,
        progress=lambda num_done, num_shards: progress.append((num_done, num_shards)),
    )  # fmt: skip
    assert read_files(tmp_path) == read_files(reference)
    assert progress == [(num_done, 8) for num_done in range(1, 9)]


@pytest.mark.parametrize(("start_seconds", "num_processes"), [(1e9, 1), (1e-9, 2)])
def test_encode_workers_none_starts_only_processes_that_save_time(
    shards, autoencoder, texts, tmp_path, monkeypatch, start_seconds, num_processes
):
    pools = []

    def encode_in_pool(tasks, encoder_args, workers):
        pools.append(workers)
        return encoding._encode_here(tasks, encoding.Encoder(*encoder_args))

    monkeypatch.setattr(encoding, "WORKER_START_SECONDS", start_seconds)
    monkeypatch.setattr(encoding.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(encoding, "_encode_in_pool", encode_in_pool)
    encode(shards, tmp_path, autoencoder=autoencoder, texts=texts, workers=None)
    assert pools == ([] if num_processes == 1 else [num_processes])


def encode_step_by_step(connection, *args, **options) -> None:
    """Encode, and wait for a message after each shard."""

    def progress(num_done: int, num_shards: int) -> None:
        connection.send(num_done)
        connection.recv()

    encode(*args, **options, progress=progress)


def test_encode_continues_after_it_was_killed(shards, reference, autoencoder, texts, tmp_path):
    """SIGKILL when 2, 3 and 6 of 8 shards are there: no shard is encoded twice, and the files are the same in the end."""
    options = {"autoencoder": autoencoder, "texts": texts, "mirror": True}
    complete: dict[str, int] = {}
    for num_shards in (2, 3, 6):
        ours, theirs = forkserver.Pipe()
        process = forkserver.Process(
            target=encode_step_by_step, args=(theirs, shards, tmp_path), kwargs=options
        )
        process.start()
        theirs.close()
        while ours.recv() < num_shards:
            ours.send(None)
        process.kill()
        process.join()
        with pytest.raises(ValueError, match="not a packed data set"):
            LatentStore(tmp_path)
        times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*.npy")}
        assert len(times) == num_shards and complete.items() <= times.items()
        complete = times
    encode(shards, tmp_path, **options)
    assert (
        complete.items()
        <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}.items()
    )
    assert read_files(tmp_path) == read_files(reference)


def test_encode_shares_its_shards_with_processes_of_the_same_task(
    shards, reference, autoencoder, texts, tmp_path
):
    """The first waits after a shard until the second, started later, has encoded the others and waits for it."""
    options = {"autoencoder": autoencoder, "texts": texts, "mirror": True}
    ours, theirs = forkserver.Pipe()
    leader = forkserver.Process(target=encode_step_by_step, args=(theirs, shards, tmp_path), kwargs=options)
    leader.start()
    theirs.close()
    assert ours.recv() == 1
    with pytest.raises(ValueError, match="another process is writing there"):
        encode(shards, tmp_path, autoencoder=autoencoder, texts=texts)  # without mirror images
    helper = forkserver.Process(target=encode, args=(shards, tmp_path), kwargs=options)
    helper.start()
    while len(list((tmp_path / "shards").glob("*.npy"))) < 8:
        assert helper.is_alive()
        time.sleep(0.05)
    for _ in range(7):
        ours.send(None)
        ours.recv()
    ours.send(None)
    for process in (leader, helper):
        process.join()
        assert process.exitcode == 0
    assert read_files(tmp_path) == read_files(reference)


def test_encode_says_that_the_disk_is_full_before_the_work(shards, autoencoder, texts, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(ValueError, match=r"needs \d+ MiB, but the disk has 0 MiB left"):
        encode(shards, tmp_path, autoencoder=autoencoder, texts=texts)
    monkeypatch.undo()

    def allocate(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(captions_module.os, "posix_fallocate", allocate)
    with pytest.raises(OSError, match=r"the disk is full.*texts\.partial\.npy"):
        encode(shards, tmp_path, autoencoder=autoencoder, texts=texts)
    monkeypatch.undo()
    assert encode(shards, tmp_path, autoencoder=autoencoder, texts=texts).num_frames == 61


def test_encode_says_how_many_captions_are_cut(media, autoencoder, texts, tmp_path, caplog):
    (tmp_path / "a.webp").write_bytes((media / "red.webp").read_bytes())
    (tmp_path / "a.txt").write_text("short\n" + "long " * 30)
    pack(tmp_path, tmp_path / "pixels", size=32, fps=8)
    encode(tmp_path / "pixels", tmp_path / "latents", autoencoder=autoencoder, texts=texts)
    assert (
        "caption is truncated to the 20 tokens that the text encoder reads; not read of 'long" in caplog.text
    )


def test_encode_replaces_incomplete_shards(shards, reference, autoencoder, texts, tmp_path):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    shard = next((tmp_path / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    shard.with_name(f".{shard.name}.1.partial").write_bytes(b"x")
    encode(shards, tmp_path, autoencoder=autoencoder, texts=texts, mirror=True)
    assert read_files(tmp_path) == read_files(reference)


def test_encode_keeps_a_shard_that_another_process_completes(
    shards, reference, autoencoder, texts, tmp_path, monkeypatch
):
    """A shard that is incomplete when the work begins may be complete when its turn comes."""
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    paths = sorted((tmp_path / "shards").iterdir())
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1])
    inodes = {}

    def complete(tasks, encoder):
        for path in paths[1:]:
            shutil.copy(reference / "shards" / path.name, tmp_path / "copy")
            (tmp_path / "copy").rename(path)
            inodes[path] = path.stat().st_ino
        return encode_here(tasks, encoder)

    encode_here = encoding._encode_here
    monkeypatch.setattr(encoding, "_encode_here", complete)
    encode(shards, tmp_path, autoencoder=autoencoder, texts=texts, mirror=True)
    assert {path: path.stat().st_ino for path in paths[1:]} == inodes
    assert read_files(tmp_path) == read_files(reference)


def test_encode_refuses_a_text_encoder_that_overflows(shards, autoencoder, texts, tmp_path):
    shutil.copytree(texts, tmp_path / "texts")
    encoder = CLIPTextModel.from_pretrained(texts / "text_encoder")
    encoder.state_dict()["final_layer_norm.bias"].fill_(1e5)
    encoder.save_pretrained(tmp_path / "texts" / "text_encoder")
    with pytest.raises(
        ValueError, match=r"embeds the caption '[^\n]*' to numbers that are not finite in float16"
    ):
        encode(shards, tmp_path / "out", autoencoder=autoencoder, texts=tmp_path / "texts")


def wait_for_end(*processes: psutil.Process) -> None:
    """Return when no process runs; the orphans of this test may stay zombies. The test's timeout limits the wait."""
    for process in processes:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)


def test_encode_workers_end_with_their_parent(shards, autoencoder, texts, tmp_path):
    options = {"autoencoder": autoencoder, "texts": texts, "workers": 2}
    process = forkserver.Process(target=encode, args=(shards, tmp_path), kwargs=options)
    process.start()
    workers: list[psutil.Process] = []
    while len(workers) < 2:
        assert process.is_alive()
        workers = [
            child
            for child in psutil.Process(process.pid).children()
            if "spawn_main" in " ".join(child.cmdline())
        ]
        time.sleep(0.002)
    process.kill()
    process.join()
    wait_for_end(*workers)


def pack_step_by_step(connection, *args, **options) -> None:
    """Pack, and wait for a message after each clip."""

    def progress(num_done: int, num_clips: int) -> None:
        connection.send(num_done)
        connection.recv()

    pack(*args, **options, progress=progress)


def test_pack_workers_end_with_their_parent(media, tmp_path):
    ours, theirs = forkserver.Pipe()
    process = forkserver.Process(
        target=pack_step_by_step,
        args=(theirs, media, tmp_path / "store"),
        kwargs={"size": 32, "fps": 8, "workers": 2},
    )
    process.start()
    assert ours.recv() == 1
    workers = [
        child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
    ]
    process.kill()
    process.join()
    assert len(workers) == 2
    wait_for_end(*workers)


def start_importing_worker(connection, folder: str) -> None:
    """Start a worker that never ends its imports, and send its process id."""
    sys.path.insert(0, folder)
    with Workers(len, 1, initializer=start_worker, initargs=("endless", "start")) as pool:
        (worker,) = pool._all
        connection.send(worker.pid)
        worker.join()


def test_worker_watches_its_parent_while_it_imports(tmp_path):
    started = tmp_path / "started"
    (tmp_path / "endless.py").write_text(
        f"import time\nopen({str(started)!r}, 'w').close()\nwhile True:\n    time.sleep(1)\n"
    )
    ours, theirs = forkserver.Pipe()
    parent = forkserver.Process(target=start_importing_worker, args=(theirs, str(tmp_path)))
    parent.start()
    worker = psutil.Process(ours.recv())
    while not started.exists():
        assert worker.is_running()
        time.sleep(0.002)
    parent.kill()
    parent.join()
    wait_for_end(worker)


def test_ray_encoder_encodes_the_shard_of_a_row(shards, reference, autoencoder, texts, tmp_path):
    (tmp_path / "shards").mkdir()
    tasks, _, shapes = encoding._plan_shards(
        Store(shards), tmp_path, encoding.Encoder(autoencoder), mirror=True
    )
    assert shapes == LatentStore(reference).shapes
    with encoding.single_thread():
        encoder = encoding._RayEncoder(tasks, (reference / "autoencoder", None, "cpu"))
        for index, task in enumerate(tasks):
            assert encoder({"id": index}) == {"id": index, "error": ""}
            assert task.out.read_bytes() == (reference / "shards" / task.out.name).read_bytes()
            task.out.unlink()
        encoder.encoder.vae.quant_conv.bias.data.fill_(float("nan"))
        assert "numbers that are not finite" in encoder({"id": 0})["error"]


@pytest.mark.slow  # starts two nodes and their workers; its fast twin is the test above
@pytest.mark.timeout(300)
def test_encode_on_ray_survives_the_loss_of_a_machine(shards, reference, autoencoder, texts, tmp_path):
    """One of two nodes is killed after the first shard."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    shards_done = []

    def progress(num_done: int, num_shards: int) -> None:
        shards_done.append(num_done)
        if num_done == 1:
            cluster.remove_node(node, allow_graceful=False)

    try:
        encode(
            shards,
            tmp_path,
            autoencoder=autoencoder,
            texts=texts,
            mirror=True,
            workers=2,
            ray=cluster.address,
            progress=progress,
        )
        assert read_files(tmp_path) == read_files(reference)
        assert shards_done == list(range(1, 9))
    finally:
        cluster.shutdown()


def test_encode_refuses_an_input_as_output(shards, autoencoder, texts, tmp_path):
    for name in "ab":
        shutil.copytree(shards, tmp_path / name)
    for packed, out in ((shards, shards), (tmp_path / "*", tmp_path / "b")):
        with pytest.raises(ValueError, match="is also an input; choose another folder"):
            encode(packed, out, autoencoder=autoencoder, texts=texts)
        assert Store(out).info["dtype"] == "uint8"


def test_encode_refuses_invalid_strides_and_sides(media, shards, autoencoder, texts, tmp_path):
    with pytest.raises(ValueError, match="strides must be 1 or more"):
        encode(shards, tmp_path / "latents", autoencoder=autoencoder, texts=texts, strides=[1, 0])
    pack(media, tmp_path / "pixels", size=33, fps=8)
    with pytest.raises(
        ValueError, match="frames with sides of 33 pixels, but the autoencoder needs multiples of 8"
    ):
        encode(tmp_path / "pixels", tmp_path / "latents", autoencoder=autoencoder, texts=texts)
    assert not (tmp_path / "latents").exists()


def test_encode_invalidates_a_store_before_it_changes(shards, autoencoder, texts, tmp_path, monkeypatch):
    encode(shards, tmp_path, autoencoder=autoencoder, texts=texts)
    embed = captions_module.text.embed

    def interrupt(tokenizer, text_encoder, captions):
        if captions != [""]:  # those for the shape of an embedding
            raise KeyboardInterrupt
        return embed(tokenizer, text_encoder, captions)

    monkeypatch.setattr(captions_module.text, "embed", interrupt)
    encode(shards, tmp_path, autoencoder=autoencoder, texts=texts)  # nothing is left to do
    with pytest.raises(KeyboardInterrupt):
        encode(shards, tmp_path, autoencoder=autoencoder, texts=texts, strides=[1, 2])
    with pytest.raises(ValueError, match="not a packed data set"):
        LatentStore(tmp_path)


def test_worker_device_takes_the_gpus_in_turn():
    assert [encoding.worker_device("cuda", worker, 2) for worker in range(4)] == [
        "cuda:0",
        "cuda:1",
        "cuda:0",
        "cuda:1",
    ]
    assert encoding.worker_device("cuda:1", 0, 2) == "cuda:1"
    assert encoding.worker_device("cpu", 3, 0) == "cpu"


def test_encode_continues_with_the_captions_after_an_interruption(
    shards, reference, autoencoder, texts, tmp_path, monkeypatch
):
    embedded = []
    embed = captions_module.text.embed

    def embed_and_record(tokenizer, text_encoder, captions):
        embedded.extend(captions)
        if len(embedded) == max_captions:
            raise KeyboardInterrupt
        return embed(tokenizer, text_encoder, captions)

    monkeypatch.setattr(captions_module, "CAPTION_SAVE_INTERVAL", 1)
    monkeypatch.setattr(captions_module.text, "embed", embed_and_record)
    max_captions = 5
    with pytest.raises(KeyboardInterrupt):
        encode(shards, tmp_path, autoencoder=autoencoder, texts=texts, batch_size=1)
    first = embedded[1:4]  # after the null prompt, which gives the shape of an embedding
    embedded.clear()
    max_captions = None
    store = encode(shards, tmp_path, autoencoder=autoencoder, texts=texts, batch_size=1)
    captions = json.loads((tmp_path / "texts.json").read_text(encoding="utf-8"))["captions"]
    assert captions == [*first, *embedded[1:]] and store.num_captions == len(captions)
    assert np.array_equal(store.embed(captions), LatentStore(reference).embed(captions))
    assert not (tmp_path / "texts.partial.json").exists()


def test_frame_correlation_recovers_the_settings_of_noise(latents, monkeypatch):
    store = LatentStore(latents)
    store.index["loop"] = False
    rng = np.random.default_rng(0)
    frames = np.zeros((store.num_frames, 2, 4, 64, 64))
    for record in store.records:
        frame_noise, clip_noise = (
            rng.standard_normal((1, number, 4, 64, 64)) for number in (record.num_frames, 1)
        )
        frames[record.start : record.start + record.num_frames, 0] = (
            2 * correlated_noise(frame_noise, clip_noise, 0.6, 0.8)[0]
        )
    monkeypatch.setattr(store, "_open_shard", lambda _: frames)
    result = store.frame_correlation(num_clips=50)
    assert result["diffusion.shared_noise"] == pytest.approx(0.6, abs=0.05)
    assert result["diffusion.noise_correlation"] == pytest.approx(0.8, abs=0.05)
    assert result["correlation 2 apart"] == pytest.approx(0.6 + 0.4 * 0.64, abs=0.03)


def test_frame_correlation_of_uniform_motion_has_no_shared_noise(latents, monkeypatch):
    """The difference between its frames grows faster than that of any correlated noise, so the fit is the nearest one."""
    store = LatentStore(latents)
    store.index["loop"] = False
    phase = np.arange(store.num_frames)[:, None, None, None, None] / 6 + np.linspace(0, 6, 64)
    frames = np.sin(phase) * np.ones((1, 2, 4, 64, 1))
    monkeypatch.setattr(store, "_open_shard", lambda _: frames)
    result = store.frame_correlation(num_clips=50)
    shared, r = result["diffusion.shared_noise"], result["diffusion.noise_correlation"]
    assert 1 - result["correlation 4 apart"] > 2 * (1 - result["correlation 2 apart"]) and shared < 0.05
    for k in (2, 4):
        assert shared + (1 - shared) * r**k == pytest.approx(result[f"correlation {k} apart"], abs=0.1)


def test_data_noise_prints_the_settings_also_under_its_former_name(latents):
    result = CliRunner().invoke(app, ["data", "noise", str(latents)])
    assert result.exit_code == 0 and result.stderr == ""
    names = [line.replace("=", ": ").partition(": ")[0] for line in result.stdout.splitlines()]
    assert names == [
        *(f"correlation {k} apart" for k in (1, 2, 4, 8)),
        "diffusion.shared_noise",
        "diffusion.noise_correlation",
    ]
    former = CliRunner().invoke(app, ["data", "likeness", str(latents)])
    assert former.stdout == result.stdout
    assert "data likeness is now latent-shift data noise" in former.stderr
