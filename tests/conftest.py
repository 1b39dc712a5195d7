"""Fixtures of the small real world of tiny.py, made once for all processes of pytest.

Nothing here imports torch before a test needs it: the process that shares the tests out never does.
"""

import gc
import os
import signal
from pathlib import Path

import pytest

gc.set_threshold(
    200_000, 50, 1000
)  # the libraries' millions of objects stay: looking through them again and again takes long
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Return a function that returns a folder of a name, which the first process that asks for it has filled by a function."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name, make):
        folder, done = base / f"shared-{name}", base / f"shared-{name}.done"
        with FileLock(base / f"shared-{name}.lock"):
            if not done.exists():
                folder.mkdir(exist_ok=True)
                done.write_text(str(make(folder) or folder))
        return Path(done.read_text())

    return folder_of


@pytest.fixture(scope="session")
def media(shared):
    from tiny import make_media

    return shared("media", make_media)


@pytest.fixture(scope="session")
def packed(media, shared):
    from latent_shift.data.pack import pack

    def make(folder):
        assert pack(media, folder, size=32, fps=8) == []

    return shared("packed", make)


@pytest.fixture(scope="session")
def texts(shared):
    from tiny import make_texts

    return shared("texts", make_texts)


@pytest.fixture(scope="session")
def autoencoder(packed, shared):
    return _train("autoencoder", packed, shared)


@pytest.fixture(scope="session")
def latents(packed, autoencoder, texts, shared):
    from latent_shift.data.encode import encode

    def make(folder):
        encode(packed, folder, autoencoder=autoencoder, texts=texts, batch_size=8)

    return shared("latents", make)


@pytest.fixture(scope="session")
def image_model(latents, shared):
    return _train("image", latents, shared)


@pytest.fixture(scope="session")
def video_model(latents, image_model, shared):
    return _train("video", latents, shared, model={"init": str(image_model)})


@pytest.fixture(scope="module")
def api(video_model, tmp_path_factory):
    """A client of a server with a tiny model that is loaded and knows three names."""
    import numpy as np
    from serving import LIMITS, REQUEST, running

    from latent_shift.models.names import Names
    from latent_shift.serve.service import Settings

    names = Names(("red ball", "ball of wool", "blue box"), np.eye(3, dtype=np.float32), 0.5)
    folder = tmp_path_factory.mktemp("data")
    with running(folder, [video_model], settings=Settings(LIMITS), names={str(video_model): names}) as client:
        client.post("/v1/videos/sync", json=REQUEST).raise_for_status()
        yield client


def _train(stage, data, shared, **tables):
    """Train a stage for a few steps, with samples; return the folder of the model."""
    from tiny import tiny_config

    from latent_shift.training.loop import train

    config = tiny_config(stage, data, train={"sample_every": 2}, **tables)
    return shared(stage, lambda folder: train(config, folder))
