"""Saliencies, which score weights without a masking GCN, and controls, which show what is trivial."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from data import NonNegative
from eval import Request, unlearning_method
from model import Mask, WeightGraph
from trainer import Trainer, Zeroing, contrast, mask_of, request_samples


def saliency_scores(
    request: Request, retain_weight: float, auxiliary_weight: float, step: int, zeroed: Tensor
) -> Tensor:
    """What removing a weight does to the forget class's margin and to the other classes' loss, (vertices).

        w E_d[d margin/dw] + retain_weight (w E_r[dL/dw] - w^2 E_r[(dL/dw)^2] / 2) + auxiliary_weight a

    The first term is the first-order fall of the margin, the bracket the second-order fall of the loss, with the Fisher
    information for the curvature; E_r is the mean over the other classes, weighted by damage as in `contrast`. a is the
    auxiliary feature of the weight: what else is asked of a mask.

    step, zeroed: as a ranking takes them (`trainer.ZeroingOrder`)
    """
    graphs, label = request.graphs, request.forget_class
    samples, mask = request_samples(request.config, graphs, request.seed, label, step), mask_of(graphs, zeroed)
    features, damage = graphs.class_features(samples, ("margin", "effect", "fisher"), mask)
    fall_of_loss = features["effect"] - features["fisher"] ** 2 / 2
    # With 0 for its own class, the contrast is minus the weighted mean over the others.
    fall_of_loss[label] = 0
    scores = features["margin"][label] + retain_weight * -contrast(fall_of_loss, damage)[label]
    if auxiliary_weight:
        (feature,) = graphs.auxiliary.feature(samples, [label], mask)
        scores += auxiliary_weight * feature
    return scores


@unlearning_method("saliency", uses_kappa=True, touches="a mask")
def saliency(request: Request, *, retain_weight: NonNegative, auxiliary_weight: NonNegative) -> Zeroing:
    """No GCN: in the same steps, the weights whose removal costs the class its margin and the others the least loss."""
    auxiliary = request.graphs.auxiliary
    asked = auxiliary_weight * auxiliary.weight if auxiliary else 0.0
    return request.in_steps("saliency", partial(saliency_scores, request, retain_weight, asked))


def largest_vertices(request: Request, count: int) -> Tensor:
    """The vertices of the masked weights that are largest in magnitude, (count)."""
    return torch.cat([weight.flatten() for weight in request.graphs.weights()]).abs().topk(count).indices


@unlearning_method(
    "magnitude",
    uses_kappa=True,
    most_needed=lambda request: largest_vertices(request, request.top_k),
    touches="a mask",
    needs="nothing",
)
def magnitude(request: Request) -> Mask:
    """The second control: the kappa largest weights of the same layers."""
    return request.zeroing(largest_vertices(request, request.kappa))


def removal_effect(request: Request) -> Tensor:
    """-w E_c[dL/dw], the first-order rise of the loss of each class c when a weight is removed, (classes, vertices)."""
    features, _ = request.graphs.class_features(request.graphs.by_class(), ["effect"])
    return -features["effect"]


MOZER = "after Mozer and Smolensky 1988, NIPS"


@unlearning_method(
    "first_order", uses_kappa=True, paper=MOZER, touches="a mask", needs="forget set", in_default_run=False
)
def first_order(request: Request) -> Zeroing:
    """All at once, the weights whose removal raises the forget class's loss most to first order, by -w dL/dw."""
    return request.in_steps(
        "first_order", lambda step, zeroed: removal_effect(request)[request.forget_class], all_at_once=True
    )


@unlearning_method("saliency_contrast", uses_kappa=True, paper=MOZER, touches="a mask", in_default_run=False)
def saliency_contrast(request: Request) -> Zeroing:
    """All at once, by the first-order saliency on the forget class less its mean over the retain classes."""
    return request.in_steps(
        "saliency_contrast",
        lambda step, zeroed: contrast(removal_effect(request))[request.forget_class],
        all_at_once=True,
    )


@unlearning_method("output_row", touches="a mask", needs="nothing", in_default_run=False)
def output_row(request: Request) -> Mask:
    """The trivial mask: the forget class's row of the output layer, so that its logit is always 0 (or its bias)."""
    output_layer = WeightGraph(request.graphs.classifier.shapes, -1)
    (vertices,) = output_layer.split(torch.arange(output_layer.num_vertices))
    return request.zeroing(vertices[request.forget_class], output_layer)


class WithoutLogit(nn.Module):
    """A classifier that gives one class the probability 0."""

    def __init__(self, classifier: nn.Module, forget_class: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.forget_class = forget_class

    def forward(self, images: Tensor) -> Tensor:
        removed = torch.tensor([self.forget_class], device=images.device)
        return self.classifier(images).index_fill(1, removed, float("-inf"))


@unlearning_method("logit_removed", touches="the output", needs="nothing", in_default_run=False)
def logit_removed(request: Request) -> nn.Module:
    """The trivial filter: the forget class's logit is minus infinity, all weights stay."""
    return WithoutLogit(request.classifier, request.forget_class)


@unlearning_method("retrain_again", needs="retain set", in_default_run=False)
def retrain_again(request: Request) -> nn.Module:
    """Retrained from other initial weights: how far two classifiers are apart that never saw the class."""
    trainer = Trainer(request.trainer.config, request.other_seed)
    return trainer.train(request.retain, request.graphs.num_classes)
