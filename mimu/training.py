"""The steps that train a model, and the errors of a training that diverges."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mimu.errors import TrainingError
from mimu.samples import Split


def check_finite(losses: dict[str, float], step: int, setting: str) -> None:
    """Raises TrainingError if a loss is infinite or not a number; the message names the setting to look at."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise TrainingError(f"{name} is {loss} at step {step}: training diverged, see {setting}")


def descend(optimizer: torch.optim.Optimizer, losses: dict[str, Tensor], step: int, setting: str) -> None:
    """Takes a step down the sum of losses, scalars by their names. Raises TrainingError as `check_finite` does."""
    # One copy of all losses, so that a GPU is waited for once a step.
    values = torch.stack([loss.detach() for loss in losses.values()]).tolist()
    check_finite(dict(zip(losses, values)), step, setting)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()


def forgetting_loss(p: Tensor) -> Tensor:
    """Computes the mean of -log(1 - p) in nats; p is the probability of the forget class on its samples."""
    return -torch.log1p(-p.clamp(max=1 - 1e-6)).mean()


def is_finite(model: nn.Module) -> bool:
    """Says whether all weights of a model are finite numbers."""
    return all(weight.isfinite().all() for weight in model.state_dict().values())


def check_weights(model: nn.Module, name: str, setting: str) -> None:
    """Raises TrainingError if a weight of a trained model is not finite, which the last step may have done."""
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
) -> nn.Module:
    """Trains a model in place on random batches of samples, drawn anew in every epoch, and returns it.

    Args:
        loss: a function of images and labels; None: the cross entropy of the model's logits
        setting: the setting that a TrainingError names if a loss is infinite or not a number
    """
    model.train()
    loss = loss or (lambda images, labels: F.cross_entropy(model(images), labels))
    steps = tqdm(range(epochs * samples.num_batches(batch_size)), "training", delay=1, leave=False, disable=None)
    for step, batch in zip(steps, samples.batches(batch_size, generator)):
        descend(optimizer, {"loss": loss(batch.images, batch.labels)}, step, setting)
    return model.eval()
