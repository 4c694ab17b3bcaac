"""Methods that remove directions of the class from the inputs of layers, and train no weights of the classifier."""

import torch
from torch import Tensor, nn

from eval import Request, unlearning_method
from mimu.erasing import ErasingConfig, class_directions, erase_classes
from mimu.masks import Mask
from mimu.probes import ridge_regression, standardised
from mimu.samples import some_of_every_class
from mimu.settings import Count, NonNegative, Positive


def separability(own: Tensor, retained: Tensor, ridge: float) -> Tensor:
    """Returns max(0, 2 accuracy - 1) of a linear probe that tells two kinds of samples apart.

    The probe is a ridge regression on every second sample; its accuracy is measured on the others.
    Shapes: own, retained (samples, n).
    """
    x = torch.cat([own, retained])
    sign = torch.cat([own.new_ones(len(own)), -own.new_ones(len(retained))])
    x_train, x_test = standardised(x[::2], x[1::2])
    coefficients = ridge_regression(x_train, sign[::2, None], ridge)
    is_correct = (x_test @ coefficients)[:, 0] * sign[1::2] > 0
    return (2 * is_correct.double().mean() - 1).clamp_min(0)


@unlearning_method("damp", runs_with="all", paper="Hatami et al. 2026, arXiv:2604.15166")
@torch.no_grad()
def damp(request: Request, *, samples: Count, ridge: Positive, row: NonNegative) -> nn.Module:
    """DAMP: every layer reads less of the class's direction, deeper layers more so, and with `row` 0 the class's output
    weights are zeroed.

    W' = W (I - a q q^T), q of the `class_directions` of the layer's mean inputs, a = max(0, 2 accuracy - 1) l / L: the
    held-out accuracy of a linear probe (here a ridge regression) of the class against as many retained samples, and a
    depth l / L from 0 for the first layer, which reads pixels, to 1 for the last. The class's output weights are then
    multiplied by `row`. A stage of the paper is a layer here. Written from summaries of the paper, not from its text.
    """
    chosen = some_of_every_class(request.train, samples, "damp", request.seed, request.forget_class)
    is_forget = chosen.labels == request.forget_class
    num_retained = len(chosen.labels.unique()) - 1
    classifier = request.classifier
    last = len(classifier.names) - 1
    for index, weight in enumerate(classifier.weights):
        x = request.original.mean_inputs(index, chosen.images).double()
        q = class_directions(x, chosen.labels, [request.forget_class])[:, 0]
        depth = index / last if last else 1.0
        alpha = separability(x[is_forget], x[~is_forget][::num_retained], ridge) * depth
        matrix = weight.flatten(1).double()
        weight.copy_((matrix - matrix @ (alpha * torch.outer(q, q))).view_as(weight))
    classifier.weights[-1][request.forget_class] *= row
    return classifier


@unlearning_method("erase", runs_with="all", paper="after Hatami et al. 2026, arXiv:2604.15166", touches="a mask")
def erase(request: Request, *, config: ErasingConfig) -> Mask:
    """Late layers lose the direction of the class, and the last its output weights, trained against attackers."""
    mask, _ = erase_classes(request.classifier, request.train, [request.forget_class], config, request.seed)
    return mask
