"""How much of a class a representation carries, in closed form: what a linear map of the features can say of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def standardised(features: Tensor) -> Tensor:
    """Features less their mean, over their standard deviation + 0.001, both over the samples: (..., samples, n)."""
    centred = features - features.mean(-2, keepdim=True)
    # The square root has no derivative at 0, where a feature never changes.
    return centred / (centred.square().mean(-2, keepdim=True).clamp_min(1e-20).sqrt() + 1e-3)


def ridge_regression(features: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Coefficients (A + ridge I)^-1 B, and B: A = H^T H / N and B = H^T T / N, of standardised features H.

    Shapes: features H (..., samples, n), targets T (..., samples, k) to (..., n, k) both.
    """
    transposed = features.mT / features.shape[-2]
    correlation = transposed @ features + ridge * torch.eye(features.shape[-1]).to(features)
    products = transposed @ targets
    return torch.linalg.solve(correlation, products), products


def explained_variance(features: Tensor, is_class: Tensor, ridge: float) -> Tensor:
    """R^2 of the ridge regression from the features to the indicator of a class, differentiable.

        b^T (A + ridge I)^-1 b / var(t),  A = H^T H / N,  b = H^T t / N

    H are the standardised features, t the centred indicator. 0 where the features say nothing of the class, at most 1.

    Shapes: features (..., samples, n), is_class (..., samples) to (...).
    """
    target = is_class.to(features)
    target = (target - target.mean(-1, keepdim=True))[..., None]
    coefficients, products = ridge_regression(standardised(features), target, ridge)
    return (coefficients * products).sum((-2, -1)) / target.square().mean((-2, -1)).clamp_min(1e-12)


def probe_recall(features: Tensor, labels: Tensor, num_classes: int, ridge: float) -> Tensor:
    """Percent of each class's samples that a ridge regression to all classes finds, (classes).

    Shapes: features (samples, n), labels (samples).
    """
    x = standardised(features)
    targets = F.one_hot(labels, num_classes).to(x)
    coefficients, _ = ridge_regression(x, targets - targets.mean(0), ridge)
    found = (x @ coefficients + targets.mean(0)).argmax(1) == labels
    return 100 * torch.stack([found[labels == label].double().mean() for label in range(num_classes)])


def nearest_classes(features: Tensor, labels: Tensor, num_classes: int, count: int) -> Tensor:
    """The classes whose means of the standardised features are nearest to each class's own, (classes, count)."""
    x = standardised(features)
    means = torch.stack([x[labels == label].mean(0) for label in range(num_classes)])
    distances = torch.cdist(means, means).fill_diagonal_(torch.inf)
    return distances.topk(count, largest=False).indices
