"""Exporters and trackers from the extras."""

import numpy as np
import pytest
import torch
from test_shift import inputs, smallest_unet, tiny_unet
from tiny import tiny_config

from latent_shift.shift import Shift, frames, inflate
from latent_shift.training.loop import train


@pytest.mark.parametrize(
    ("edge", "network"), [("zero", smallest_unet), pytest.param("wrap", tiny_unet, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_onnx_export_accepts_any_number_of_frames(edge, network, tmp_path):
    """Exported at four frames with the whole batch as one clip; run at four and at seven."""
    import onnxruntime

    unet = inflate(network(), Shift(edge=edge))
    path = tmp_path / "unet.onnx"
    free = torch.export.Dim("frames", min=2, max=1024)
    with frames(unet, -1):
        x, t, text = inputs(4)
        torch.onnx.export(
            unet, (x, t, text), path, dynamo=True, verbose=False,
            dynamic_shapes={"sample": {0: free}, "timestep": None, "encoder_hidden_states": {0: free}},
        )  # fmt: skip
        session = onnxruntime.InferenceSession(path)
        for num in (4, 7):
            x, t, text = inputs(num)
            feeds = dict(
                zip(
                    (entry.name for entry in session.get_inputs()),
                    (x.numpy(), t.numpy(), text.numpy()),
                    strict=True,
                )
            )
            np.testing.assert_allclose(
                session.run(None, feeds)[0], unet(x, t, text).sample.numpy(), atol=1e-4
            )


def test_tensorboard_tracker_writes_statistics(packed, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_config("autoencoder", packed, steps=2, train={"tracker": "tensorboard"}), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
