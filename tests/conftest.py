"""Fixtures of the small real world of tiny.py, one for each process of pytest.

Nothing here imports torch before a test needs it: the process that shares the tests out never does.
"""

import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    from tiny import make_media

    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="session")
def packed(media, tmp_path_factory):
    from latent_shift.data.pack import pack

    folder = tmp_path_factory.mktemp("packed")
    assert pack(media, folder, size=32, fps=8) == []
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    from tiny import make_texts

    return make_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def autoencoder(packed, tmp_path_factory):
    return _train("autoencoder", packed, tmp_path_factory)


@pytest.fixture(scope="session")
def latents(packed, autoencoder, texts, tmp_path_factory):
    from latent_shift.data.encode import encode

    folder = tmp_path_factory.mktemp("latents")
    encode(packed, folder, autoencoder=autoencoder, texts=texts, batch_size=8)
    return folder


@pytest.fixture(scope="session")
def image_model(latents, tmp_path_factory):
    return _train("image", latents, tmp_path_factory)


@pytest.fixture(scope="session")
def video_model(latents, image_model, tmp_path_factory):
    return _train("video", latents, tmp_path_factory, model={"init": str(image_model)})


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


def _train(stage, data, tmp_path_factory, **tables):
    """Train a stage for a few steps, with samples; return the folder of the model."""
    from tiny import tiny_config

    from latent_shift.training.loop import train

    config = tiny_config(stage, data, train={"sample_every": 2}, **tables)
    return train(config, tmp_path_factory.mktemp(stage))
