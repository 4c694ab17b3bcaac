"""Published methods that project the inputs of layers, without training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from eval import Request
from methods.controls import further
from mimu.erasing import class_direction
from mimu.probes import ridge_regression, standardised
from mimu.samples import some_of_every_class
from mimu.settings import Count, NonNegative, Positive


def projected(request: Request, removed: Callable[[int], Tensor]) -> nn.Module:
    """The classifier with W (I - P) in the place of every W, P (n, n) = removed(number of the layer)."""
    classifier = request.classifier
    for index, weight in enumerate(classifier.weights):
        matrix = weight.flatten(1).double()
        weight.copy_((matrix - matrix @ removed(index)).view_as(weight))
    return classifier


def separability(own: Tensor, others: Tensor, ridge: float) -> Tensor:
    """2 accuracy - 1, at least 0, of a linear probe between samples (samples, n) of two kinds, on the half held out."""
    x = torch.cat([own, others])
    sign = torch.cat([own.new_ones(len(own)), -own.new_ones(len(others))])
    known, held_out = standardised(x[::2], x[1::2])
    coefficients = ridge_regression(known, sign[::2, None], ridge)
    is_right = (held_out @ coefficients)[:, 0] * sign[1::2] > 0
    return (2 * is_right.double().mean() - 1).clamp_min(0)


@further("damp", paper="Hatami et al. 2026, arXiv:2604.15166")
@torch.no_grad()
def damp(request: Request, *, samples: Count, ridge: Positive, row: NonNegative) -> nn.Module:
    """DAMP: every layer loses the direction of the class's mean input that no other means span, the deeper the more;
    then, with `row` 0, the class's output row goes.

    W' = W (I - a q q^T), q = r / |r|, r = mu_d - R R^+ mu_d, the columns of R the means of the other classes;
    a = max(0, 2 acc - 1) l / L, acc the accuracy on held-out samples of a linear probe (here a ridge regression) of the
    class against as many others, l / L from 0 for the first layer, which is given pixels, to 1 for the last; the
    output row is multiplied by `row`. A stage of the paper is a layer here. After summaries of the paper, not its text.
    """
    d = request.forget_class
    last = len(request.original.names) - 1
    chosen = some_of_every_class(request.train, samples, "damp", request.seed, d)
    is_own = chosen.labels == d

    def removed(index: int) -> Tensor:
        x = request.original.mean_inputs(index, chosen.images).double()
        direction = class_direction(x, chosen.labels, d)
        others = x[~is_own][:: len(chosen.labels.unique()) - 1]
        alpha = separability(x[is_own], others, ridge) * (index / last if last else 1.0)
        return alpha * torch.outer(direction, direction)

    classifier = projected(request, removed)
    classifier.weights[-1][d] *= row
    return classifier
