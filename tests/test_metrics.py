"""Measures of clips with known answers."""

import sys

import numpy as np
import pytest
import torch
from test_check import clouds

from latent_shift.data.store import Store
from latent_shift.evaluation import clip_metrics, denoising
from latent_shift.models.autoencoder import to_frames, to_pixels
from latent_shift.pipelines.loading import load


def moving_square(step: int) -> np.ndarray:
    frames = np.zeros((6, 32, 32, 3), np.uint8)
    for k in range(6):
        frames[k, 8:16, k * step : k * step + 8] = 240
    return frames


def test_psnr_equals_its_definition():
    a = np.full((4, 4, 3), 100, np.uint8)
    assert clip_metrics.psnr(a, a) == float("inf")
    assert clip_metrics.psnr(a, a + 5) == pytest.approx(20 * np.log10(255 / 5))


def test_motion_coherence_and_flicker_of_known_clips():
    still, slow, fast = (moving_square(step) for step in (0, 1, 3))
    noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    assert clip_metrics.motion_energy(still) == 0
    # A step of one pixel changes two columns of eight pixels out of 32x32 by 240.
    assert clip_metrics.motion_energy(slow) == pytest.approx(240 * 16 / 1024)
    assert clip_metrics.motion_energy(fast) == pytest.approx(3 * clip_metrics.motion_energy(slow))
    assert clip_metrics.coherence(still) == pytest.approx(1)
    assert 1 > clip_metrics.coherence(slow) > clip_metrics.coherence(fast) > clip_metrics.coherence(noise)
    ramp = np.repeat(np.arange(6, dtype=np.uint8) * 20, 12).reshape(6, 2, 2, 3)
    assert clip_metrics.flicker(ramp) == 0
    blink = np.array([0, 100] * 3, np.uint8).repeat(12).reshape(6, 2, 2, 3)
    assert clip_metrics.flicker(blink) == 2 * clip_metrics.motion_energy(blink)


def test_persistence_grows_with_continued_motion():
    noise = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    assert clip_metrics.persistence(noise) == pytest.approx(1, abs=0.05)
    ramp = np.repeat(np.arange(12, dtype=np.uint8) * 20, 12).reshape(12, 2, 2, 3)
    assert clip_metrics.persistence(ramp) == pytest.approx(4, rel=1e-3)
    assert clip_metrics.persistence(np.zeros((6, 2, 2, 3), np.uint8)) == 1


def test_retrieval_ranks_equal_those_of_a_sort():
    rng = np.random.default_rng(0)
    generated, real = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.standard_normal((2, 20, 8)))
    expected = [1 + list(np.argsort(-(real @ row))).index(k) for k, row in enumerate(generated)]
    assert list(clip_metrics.retrieval_ranks(generated, real)) == expected
    assert (clip_metrics.retrieval_ranks(real, real) == 1).all()


def test_loop_gap_is_one_for_closed_loops():
    # Once round in four frames.
    turning = np.stack([np.roll(moving_square(0)[0], 8 * k, axis=1) for k in range(4)])
    assert clip_metrics.loop_gap(turning) == pytest.approx(1, abs=1e-3)
    assert clip_metrics.loop_gap(moving_square(1)) == pytest.approx(5, rel=1e-2)
    assert clip_metrics.loop_gap(np.zeros((6, 2, 2, 3), np.uint8)) == 1


def test_warping_error_ignores_motion_and_counts_changes():
    """A drifting image is all motion; new images and flicker are not."""
    drift, anew = clouds(8, 0), np.stack([clouds(1, k)[0] for k in range(8)])
    light = (drift.astype(int) + 20 * (np.arange(8) % 2)[:, None, None, None]).clip(0, 255).astype(np.uint8)
    assert clip_metrics.warping_error(np.repeat(drift[:1], 8, axis=0)) == pytest.approx(0, abs=1e-3)
    assert clip_metrics.warping_error(drift) < 0.35 * clip_metrics.motion_energy(drift)
    assert clip_metrics.warping_error(light) > 10
    assert clip_metrics.warping_error(anew) > 3 * clip_metrics.warping_error(drift)


def test_warping_error_names_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(RuntimeError, match=r"latent-shift-video\[eval\]"):
        clip_metrics.warping_error(moving_square(1))


def test_reconstruction_equals_psnr_of_held_out_frames(packed, video_model):
    """One of each concept, and of the splits asked for alone."""
    vae, store = load(video_model).vae, Store(packed)

    def of_frames(index: int) -> set[float]:
        clip = store.window(index, 0, int(store.index[index]["num_frames"]))
        pixels = to_pixels(torch.from_numpy(clip))
        with torch.no_grad():
            made = [
                to_frames(vae.decode(vae.encode(one[None]).latent_dist.mean).sample).numpy() for one in pixels
            ]
        return {round(clip_metrics.psnr(frame, again[0]), 2) for frame, again in zip(clip, made, strict=True)}

    for split in ("train", "val_concept"):
        indices = store.select(splits=(split,)).tolist()
        concepts = {store.records[index].concept: set[float]() for index in indices}
        for index in indices:
            concepts[store.records[index].concept] |= of_frames(index)
        values = denoising.reconstruction(vae, store, splits=(split,), num=9)
        assert len(values) == len(concepts)
        found = [
            {concept for concept, every in concepts.items() if round(value, 2) in every} for value in values
        ]
        assert set.union(*found) == set(concepts) and all(found), split
