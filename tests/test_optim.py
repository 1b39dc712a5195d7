"""Steps whose gradients are not finite are skipped; many in a row end the run."""

import json

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny import tiny_config

from latent_shift.pipelines.loading import load
from latent_shift.training import checkpoint, muon, optimizer, stages
from latent_shift.training.loop import train
from latent_shift.training.optimizer import create_optimizer, step_if_finite


@pytest.mark.parametrize("bad_value", [float("nan"), float("inf")])
def test_train_skips_steps_with_infinite_gradients(bad_value, latents, tmp_path, monkeypatch):
    """The second of four batches is not finite: weights and statistics come from the other three."""
    draw, batches = stages.DenoiserStage.draw_batch, iter(range(10))

    def bad(*args, **options):
        first, *rest = draw(*args, **options)
        return (first * bad_value if next(batches) == 1 else first, *rest)

    monkeypatch.setattr(stages.DenoiserStage, "draw_batch", bad)
    train(tiny_config("video", latents, train={"log_every": 4}), tmp_path)
    (row,) = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert row["skipped"] == 0.25 and all(np.isfinite(value) for value in row.values())
    newest = checkpoint.steps(tmp_path)[-1]
    for name in ("model", "average"):
        assert all(tensor.isfinite().all() for tensor in load_file(newest / f"{name}.safetensors").values())


def test_train_ends_after_many_skipped_steps(latents, tmp_path, monkeypatch):
    """The error says so, and stats.jsonl stays valid JSON."""
    draw = stages.DenoiserStage.draw_batch

    def bad(*args, **options):
        first, *rest = draw(*args, **options)
        return (first * torch.nan, *rest)

    monkeypatch.setattr(stages.DenoiserStage, "draw_batch", bad)
    monkeypatch.setattr(optimizer, "MAX_SKIPPED_STEPS", 3)
    with pytest.raises(
        RuntimeError, match=r"no gradient was finite in the last 3 steps, to step 3; try a smaller optim\.lr"
    ):
        train(tiny_config("video", latents), tmp_path)
    rows = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "stats.jsonl").read_text().splitlines()
    ]
    assert [(row["loss"], row["skipped"]) for row in rows] == [(None, 1), (None, 1)]


def test_layers_that_read_shifted_channels_learn_faster(latents, image_model, tmp_path):
    """With AdamW a first step moves every number by the learning rate; a resumed run goes on at the rates of its recipe."""
    settings = {"init": str(image_model), "channels": "cheapest"}
    optim = {"lr": 1e-3, "shift_lr_scale": 3.0, "weight_decay": 0.0, "warmup_steps": 0, "ema": 0.0}
    before = load(image_model, device="cpu", dtype=torch.float32).unet.state_dict()

    def steps_of(num):
        config = tiny_config(
            "video", latents, steps=num, model=settings, optim=optim, train={"precision": "no"}
        )
        train(config, tmp_path / "run")
        after = load_file(checkpoint.steps(tmp_path / "run")[-1] / "model.safetensors")
        return {
            name: (tensor - before[name.removeprefix("unet.")]).abs().max() for name, tensor in after.items()
        }

    for name, step in steps_of(1).items():
        rate = 3e-3 if ".conv1." in name else 1e-3
        assert step == pytest.approx(rate, rel=0.05) or not step, (
            name
        )  # no gradient: attention to a single position
    steps = steps_of(2)
    readers = [float(step) for name, step in steps.items() if ".conv1.weight" in name]
    assert min(readers) > 4e-3 and len(readers) > 5
    adapters = {"rank": 2, "modules": ["to_q"]}
    with pytest.raises(
        ValueError, match="shift_lr_scale has no effect: no layer that reads shifted channels is trained"
    ):
        train(
            tiny_config("video", latents, model={"init": str(image_model)}, optim=optim, lora=adapters),
            tmp_path / "lora",
        )
    with pytest.raises(ValidationError, match="shift_lr_scale needs a shift"):
        tiny_config("video", latents, model={"init": "x", "temporal": "none"}, optim=optim)


@pytest.mark.parametrize("kind", ["wrapped", "sharded", "scaled", "muon", "muon scaled"])
def test_step_if_finite_leaves_weights_and_states(latents, kind):
    """A skipped step changes neither weights nor optimizer states; wrapped by accelerate, the optimizer skips by itself, or the scaler,
    which halves its scale."""
    optim = {"optimizer": "muon", "lr": 1e-3} if "muon" in kind else {}
    config = tiny_config("video", latents, train={"shard": True} if kind == "sharded" else {}, optim=optim)
    weight = torch.nn.Parameter(torch.ones(32, 32) if optim else torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if "scaled" in kind else None
    adamw = create_optimizer(config, [weight])
    adamw = adamw if kind == "sharded" else AcceleratedOptimizer(adamw, scaler=scaler)
    for gradient, skipped in ((1.0, 0), (float("nan"), 1), (float("inf"), 1), (1.0, 0)):
        loss = (weight * gradient).sum()
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(adamw.optimizer)
        before = [
            tensor.clone() for tensor in (weight.detach(), *adamw.state_dict()["state"].get(0, {}).values())
        ]
        assert float(step_if_finite(adamw, weight.grad.norm(), config)) == skipped
        adamw.zero_grad()
        after = (weight.detach(), *adamw.state_dict()["state"][0].values())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False)) == bool(skipped)
    assert not scaler or scaler.get_scale() == 256


def test_muon_orthogonalizes_steps_of_weights_and_leaves_the_rest_to_adamw(latents, monkeypatch):
    """A step of a weight has singular values near 0.2 lr sqrt(longer side), one of a bias or a last layer is AdamW's; weight decay acts on
    both. Weights of one shape move together or one by one."""
    optim = {"optimizer": "muon", "lr": 0.01, "weight_decay": 0.5}
    config = tiny_config("image", latents, optim=optim)
    torch.manual_seed(0)
    shapes = [(48, 33, 2, 2), (48, 33, 2, 2), (256, 32, 2, 2), (32, 64), (12,), (3, 64, 3, 3), (64, 1, 3, 3)]
    gradients, before = [torch.randn(shape) for shape in shapes], [torch.randn(shape) for shape in shapes]

    def weights_after_a_step():
        weights = [torch.nn.Parameter(weight.clone()) for weight in before]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        create_optimizer(config, weights).step()
        return [weight.detach() for weight in weights]

    weights = weights_after_a_step()
    for weight, old, gradient in zip(weights, before, gradients, strict=True):
        step = old * (1 - 0.01 * 0.5) - weight
        if min(weight.shape[:2]) >= 32 and weight.ndim > 1:
            singular = torch.linalg.svdvals(step.flatten(1)) / (
                0.01 * 0.2 * max(step.flatten(1).shape) ** 0.5
            )
            assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3
            assert float((step * gradient).sum()) > 0
        else:
            torch.testing.assert_close(step, 0.01 * gradient.sign(), rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(muon, "_LARGEST_STACK", 1)
    for one, together in zip(weights_after_a_step(), weights, strict=True):
        torch.testing.assert_close(one, together)
    with pytest.raises(
        ValueError, match="muon has no effect: no weight has 32 or more input and output channels"
    ):
        create_optimizer(config, [torch.nn.Parameter(weight) for weight in before[4:]])


def test_muon_steps_along_nesterovs_momentum(latents):
    """Three steps agree with those of the exact orthogonal matrix of each momentum, to what Newton-Schulz leaves."""
    config = tiny_config("image", latents, optim={"optimizer": "muon", "lr": 0.01, "weight_decay": 0.0})
    torch.manual_seed(0)
    weight, momentum = torch.nn.Parameter(torch.zeros(32, 40)), torch.zeros(32, 40)
    optimizer = create_optimizer(config, [weight])
    for _ in range(3):
        gradient, before = torch.randn(32, 40), weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        left, _, right = torch.linalg.svd(0.05 * gradient + 0.95 * momentum, full_matrices=False)
        expected = -0.01 * 0.2 * 40**0.5 * left @ right
        step = weight.detach() - before
        cosine = (step * expected).sum() / step.norm() / expected.norm()
        assert float(cosine) > 0.97 and float(step.norm() / expected.norm()) == pytest.approx(1, abs=0.2)
