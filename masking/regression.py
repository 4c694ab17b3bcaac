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


def ridge_regression(features: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Coefficients (A + ridge I)^-1 B, A = H^T H / N and B = H^T T / N, of standardised features H.

    Shapes: features H (..., samples, n), targets T (..., samples, k) to (..., n, k).
    """
    transposed = features.mT / features.shape[-2]
    correlation = transposed @ features + ridge * torch.eye(features.shape[-1]).to(features)
    return torch.linalg.solve(correlation, transposed @ targets)


def held_out_variance(features: Tensor, target: Tensor, ridge: float) -> Tensor:
    """R^2 of the ridge regression to a target when each sample is predicted from all others, differentiable.

        1 - sum_i (e_i / (1 - h_i))^2 / sum_i t_i^2,  h_i = 1 / N + H_i (H^T H + ridge N I)^-1 H_i^T

    H the standardised features, t the centred target, e the residuals (PRESS; Allen 1974, Technometrics 16). At most 1;
    0 or less where the features say nothing of the target. Shapes: features (samples, n), target (samples).
    """
    (h,) = standardised(features)
    t = target - target.mean()
    samples, n = h.shape
    inverse = torch.linalg.inv(h.T @ h + samples * ridge * torch.eye(n).to(h))
    hat = h @ inverse
    left_out = (t - hat @ (h.T @ t)) / (1 - 1 / samples - (hat * h).sum(1))
    return 1 - left_out.square().sum() / t.square().sum().clamp_min(1e-12)
