"""Trackers from the extras."""

from tiny import tiny_config

from latent_shift.training.loop import train


def test_tensorboard_tracker_writes_statistics(packed, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_config("autoencoder", packed, steps=2, train={"tracker": "tensorboard"}), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
