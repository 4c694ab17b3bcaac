"""What a ridge regression, a linear probe in closed form, finds of classes in features."""

from __future__ import annotations

import torch
from torch import Tensor


def standardised(features: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The features, then the others, less the features' mean, over their standard deviation + 0.001.

    Mean and deviation are over the samples. Shapes: (..., samples, n) each.
    """
    mean = features.mean(-2, keepdim=True)
    centred = features - mean
    # The square root has no derivative at 0, where a feature never changes.
    deviation = centred.square().mean(-2, keepdim=True).clamp_min(1e-20).sqrt() + 1e-3
    return centred / deviation, *((other - mean) / deviation for other in others)


def ridge_regression(features: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Coefficients (A + ridge I)^-1 B, and B: A = H^T H / N and B = H^T T / N, of standardised features H.

    Shapes: features H (..., samples, n), targets T (..., samples, k) to (..., n, k) both.
    """
    transposed = features.mT / features.shape[-2]
    correlation = transposed @ features + ridge * torch.eye(features.shape[-1]).to(features)
    products = transposed @ targets
    return torch.linalg.solve(correlation, products), products


def explained_variance(features: Tensor, num_own: int, ridge: float) -> Tensor:
    """R^2 of the ridge regression to the centred indicator t of the first `num_own` samples, differentiable.

        b^T (A + ridge I)^-1 b / var(t),  A = H^T H / N,  b = H^T t / N,  H the standardised features

    From 0, where the features say nothing of these samples, to 1. Shapes: features (..., samples, n) to (...).
    """
    is_own = torch.arange(features.shape[-2], device=features.device) < num_own
    target = is_own.expand(features.shape[:-1]).to(features)
    target = (target - target.mean(-1, keepdim=True))[..., None]
    coefficients, products = ridge_regression(*standardised(features), target, ridge)
    return (coefficients * products).sum((-2, -1)) / target.square().mean((-2, -1)).clamp_min(1e-12)
