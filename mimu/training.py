"""One loop that trains a model on samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mimu.errors import TrainingError
from mimu.samples import Split


def check_finite(losses: dict[str, float], step: int, setting: str) -> None:
    """Raises TrainingError on a loss that is infinite or not a number; `setting` is what to look at."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise TrainingError(f"{name} is {loss} at step {step}: training diverged, see {setting}")


def descend(
    optimizer: torch.optim.Optimizer, losses: dict[str, Tensor], step: int, setting: str, norm: float | None = None
) -> None:
    """One step down the sum of the losses, its gradient cut to a norm. Raises TrainingError as `check_finite` does."""
    # All of them in one copy: a GPU is waited for once a step.
    values = torch.stack([loss.detach() for loss in losses.values()]).tolist()
    check_finite(dict(zip(losses, values)), step, setting)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    if norm is not None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], norm)
    optimizer.step()


def is_finite(model: nn.Module) -> bool:
    """Whether all its weights are finite numbers."""
    return all(weight.isfinite().all() for weight in model.state_dict().values())


def check_weights(model: nn.Module, name: str, setting: str) -> None:
    """Raises TrainingError on weights that the last step of a training has left without a finite number."""
    if not is_finite(model):
        raise TrainingError(f"a weight of the {name} is not a finite number: training diverged, see {setting}")


def learn(
    model: nn.Module,
    samples: Split,
    epochs: int,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    setting: str = "eval.hyperparameters",
    first_step: int = 0,
    before_epoch: Callable[[int], None] | None = None,
) -> nn.Module:
    """Trains a model in place on random batches of the samples, drawn anew in every epoch, and returns it.

    loss: of images and labels; None: the cross entropy
    first_step: the step to begin with; before_epoch: called with the step before each epoch's batches are drawn
    Raises TrainingError on a loss that is not a finite number, and names the `setting` to look at.
    """
    model.train()
    loss = loss or (lambda images, labels: F.cross_entropy(model(images), labels))
    of_epoch = -(-len(samples.labels) // batch_size)
    steps = range(first_step, epochs * of_epoch)
    batches = samples.batches(batch_size, generator)
    for step in tqdm(steps, "training", unit="step", delay=1, leave=False, disable=None):
        if before_epoch and step % of_epoch == 0:
            before_epoch(step)
        batch = next(batches)
        descend(optimizer, {"loss": loss(batch.images, batch.labels)}, step, setting)
    return model.eval()
