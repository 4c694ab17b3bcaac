"""What a classifier does with a split, and what its predictions betray."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimu.samples import Split, is_correct


@dataclass(frozen=True)
class Predictions:
    """What a classifier does with a split, on the CPU.

    logits: (samples, classes); labels: (samples)
    hidden: inputs of the linear layers after the first, (samples, n) each, the last of them the representation; where
        one alone reads features, of the last layer before it, too: its mean over tokens or pixels
    """

    logits: Tensor
    hidden: tuple[Tensor, ...]
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        """1 for each sample that is classified correctly, else 0, (samples)."""
        return is_correct(self.logits, self.labels).double()

    @property
    def loss(self) -> Tensor:
        """Cross entropy of every sample, (samples), nats, in double precision."""
        return F.cross_entropy(self.logits.double(), self.labels, reduction="none")

    @property
    def has_diverged(self) -> bool:
        """Whether an output is not a number, or infinite; a logit of minus infinity is a removed class."""
        return not (self.hidden[-1].isfinite().all() and (self.logits < torch.inf).all())


@torch.no_grad()
def predictions_of(model: nn.Module, split: Split) -> Predictions:
    """Runs a classifier of one or several linear layers on a split."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    # A classifier of one layer represents the images by themselves.
    hidden: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers[1:] or layers}
    pooled: dict[nn.Module, list[Tensor]] = {layer: [] for layer in hidden}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if x.ndim == 2:
            return hidden[layer].append(x)
        # (samples, n, rows, columns) or (samples, tokens, n)
        pooled[layer].append(x.mean((2, 3)) if isinstance(layer, nn.Conv2d) else x.flatten(1, -2).mean(1))

    hooks = [layer.register_forward_pre_hook(note) for layer in hidden]
    logits = torch.cat([model(images) for images in split.images.split(10_000)])
    for hook in hooks:
        hook.remove()
    recorded, before = ([*filter(None, of.values())] for of in (hidden, pooled))
    if len(recorded) == 1:
        recorded = before[-1:] + recorded
    return Predictions(logits.cpu(), tuple(torch.cat(inputs).cpu() for inputs in recorded), split.labels.cpu())


def jensen_shannon(logits: Tensor, others: Tensor) -> float:
    """Jensen-Shannon divergence of two classifiers' predictions, mean over samples, bits: 0 to 1, 0 where they agree.

    Lin 1991, Divergence measures based on the Shannon entropy. Both are logits (samples, classes).
    """
    p = logits.double().softmax(1)
    q = others.double().softmax(1)
    middle = (p + q) / 2
    terms = [torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (p, q)]
    return (sum(term.sum(1) for term in terms).mean() / (2 * math.log(2))).item()


def loss_attack(members: Tensor, others: Tensor) -> float:
    """Membership inference by the loss (samples): the area under the ROC curve when a smaller one says "member".

    The probability that a member's is below that of a non-member, ties counted half: 0.5 tells nothing. Not a number
    where no loss is finite. Yeom et al. 2018, arXiv:1709.01604.
    """
    if not members.isfinite().any() and not others.isfinite().any():
        return math.nan
    ordered = others.sort().values
    above = len(others) - torch.searchsorted(ordered, members, right=True)
    not_below = len(others) - torch.searchsorted(ordered, members, right=False)
    return ((above + not_below).double().mean() / (2 * len(others))).item()


def passing(members: Tensor, others: Tensor, asked: Tensor) -> float:
    """Percent of some numbers that pass for members, by logistic regression on them, both kinds with the same weight.

    Shapes: (samples) each. Not a number where all those of the first two kinds are the same, or others are missing.
    """
    x = torch.cat([members, others])
    if not len(others) or x.max() == x.min():
        return math.nan
    is_member = torch.cat([torch.ones_like(members), torch.zeros_like(others)])
    weight = is_member * len(x) / (2 * len(members)) + (1 - is_member) * len(x) / (2 * len(others))
    inputs = torch.stack([x, torch.ones_like(x)], 1)
    solution = x.new_zeros(2)
    penalty = x.new_tensor([1.0, 0.0])  # of the slope, as scikit-learn has it
    for _ in range(30):  # Newton's method, far more steps than it takes
        p = (inputs @ solution).sigmoid()
        gradient = inputs.T @ (weight * (p - is_member)) + penalty * solution
        hessian = inputs.T @ (inputs * (weight * p * (1 - p))[:, None]) + torch.diag(penalty)
        solution = solution - torch.linalg.solve(hessian + 1e-9 * torch.eye(2).to(hessian), gradient)
    slope, offset = solution
    return 100 * (slope * asked + offset > 0).double().mean().item()


def entropy_attack(retain: Tensor, test: Tensor, forget: Tensor) -> float:
    """The membership attack of the SSD paper: percent of the forget class's training samples that pass for members.

    By the entropy of the prediction, the retain set's training samples as members and the test split as non-members;
    all are logits (samples, classes). Foster et al. 2023, arXiv:2308.07707, after arXiv:2205.08096.
    """
    return passing(*(torch.special.entr(x.double().softmax(1)).sum(1) for x in (retain, test, forget)))
