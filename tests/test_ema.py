"""The averaged weights are what `optim.ema` says, from the first step on."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ROUNDING, tiny_config
from torch import nn

from latent_shift.training import checkpoint
from latent_shift.training.ema import EMA
from latent_shift.training.loop import train


def slow_average(weights: list[torch.Tensor], decay: float) -> torch.Tensor:
    """The sum over steps that the average stands for: the newest weighs 1, the one before `decay`, and so on, over their total."""
    shares = [decay ** (len(weights) - 1 - step) for step in range(len(weights))]
    return sum(share * weight.double() for share, weight in zip(shares, weights, strict=True)) / sum(shares)


@pytest.mark.parametrize("num_steps", [1, 2, 50])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99, 0.999])
def test_ema_update_is_the_weighted_sum_over_steps(decay, num_steps):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(100))
    ema, weights = EMA([parameter], decay), []
    for _ in range(num_steps):
        weights.append(torch.randn(100))
        parameter.data.copy_(weights[-1])
        ema.update()
    expected = slow_average(weights, decay)
    torch.testing.assert_close(ema.averages[0].double(), expected, rtol=1e-4, atol=1e-6)
    other = slow_average(weights, 0.99 if decay == 0.999 else 0.999)
    assert num_steps == 1 or (other - expected).abs().max() > 100 * (ema.averages[0] - expected).abs().max()


@pytest.mark.parametrize("decay", [0.99, 0.999])
def test_train_averages_with_the_decay_of_the_settings(decay, latents, tmp_path):
    """A checkpoint after every step holds the weights of that step; the last one holds their average."""
    every_step = {"checkpoint_minutes": 1e-9, "keep_checkpoints": 100}
    train(
        tiny_config("image", latents, steps=12, optim={"ema": decay, "lr": 1e-2}, train=every_step), tmp_path
    )
    folders = checkpoint.steps(tmp_path)
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    averages = load_file(folders[-1] / "average.safetensors")
    assert len(folders) == 12

    def distance(other_decay: float) -> float:
        expected = {name: slow_average([step[name] for step in weights], other_decay) for name in averages}
        return max(float((averages[name] - expected[name]).abs().max()) for name in averages)

    other = 0.99 if decay == 0.999 else 0.999
    assert distance(decay) < 1e-6 + ROUNDING
    assert distance(other) > 1e-4


def test_ema_applied_gives_the_averages_and_restores_the_weights():
    parameter = nn.Parameter(torch.zeros(3))
    ema = EMA([parameter], 0.5)
    for value in (0.0, 3.0):
        parameter.data.fill_(value)
        ema.update()
    with ema.applied():
        torch.testing.assert_close(parameter.detach(), torch.full((3,), 2.0))  # (0.5 * 0 + 1 * 3) / 1.5
    assert parameter.tolist() == [3.0, 3.0, 3.0]


def test_register_ema_resumes_from_the_average_of_a_checkpoint(latents, tmp_path):
    """Whatever average the checkpoint holds counts as that of the steps done: runs from before the bias correction resume."""
    train(tiny_config("image", latents, steps=2), tmp_path)
    path = checkpoint.steps(tmp_path)[-1] / "average.safetensors"
    before = {name: 2 * tensor for name, tensor in load_file(path).items()}
    save_file(before, path, metadata={"steps": "2"})
    train(tiny_config("image", latents, steps=3, optim={"ema": 0.5}), tmp_path)
    newest = checkpoint.steps(tmp_path)[-1]
    weights, averages = (load_file(newest / f"{name}.safetensors") for name in ("model", "average"))
    for name, average in averages.items():
        expected = (0.75 * 0.5 * before[name] + 0.5 * weights[name]) / 0.875
        torch.testing.assert_close(average, expected, rtol=1e-5 + ROUNDING, atol=1e-6)
