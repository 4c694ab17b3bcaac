"""Saliencies, which score weights without a masking GCN, and controls, which show what is trivial."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from eval import Request, unlearning_method
from mimu.graph import WeightGraph
from mimu.masks import Mask
from mimu.pruning import PruningResult
from mimu.tracing import HookedClassifier
from trainer import Trained

further = partial(unlearning_method, runs_with="all")
MOZER = "after Mozer and Smolensky 1988, NIPS"


def output_layer(classifier: HookedClassifier) -> nn.Module:
    """The last of its layers, which is given the representation."""
    return classifier.network.get_submodule(classifier.names[-1].rpartition(".")[0])


@unlearning_method("saliency", uses_kappa=True, touches="a mask")
def saliency(request: Request) -> PruningResult:
    """No GCN: in the same steps, by the formula that the GCN adapts."""
    return request.in_steps("saliency")


def largest(request: Request, count: int | None = None) -> Tensor:
    """The vertices of the masked weights that are largest in magnitude, (count); None: the top K."""
    magnitudes = torch.cat([weight.flatten() for weight in request.graphs.weights()]).abs()
    return magnitudes.topk(request.top_k if count is None else count).indices


@unlearning_method("magnitude", uses_kappa=True, most_needed=largest, touches="a mask", needs="nothing")
def magnitude(request: Request) -> Mask:
    """The second control: the kappa largest weights of the same layers."""
    return request.graphs.graph.zeroing(largest(request, request.kappa))


def removal_effect(request: Request) -> Tensor:
    """-w E_c[dL/dw], the first-order rise of the loss of each class c when a weight is removed, (classes, vertices)."""
    return -request.graphs.snapshot(request.graphs.by_class(), ["taylor"]).feature("taylor")


@further("first_order", uses_kappa=True, paper=MOZER, touches="a mask", needs="forget set")
def first_order(request: Request) -> PruningResult:
    """All at once, the weights whose removal raises the forget class's loss most to first order, by -w dL/dw."""
    return request.in_steps("first_order", lambda *_: removal_effect(request)[request.class_index], all_at_once=True)


@further("saliency_contrast", uses_kappa=True, paper=MOZER, touches="a mask")
def saliency_contrast(request: Request) -> PruningResult:
    """All at once, by the first-order saliency on the forget class less its mean over the retain classes."""

    def ranking(step: int, zeroed: Tensor) -> Tensor:
        rise = removal_effect(request)
        own = rise[request.class_index]
        return own - (rise.sum(0) - own) / (len(rise) - 1)

    return request.in_steps("saliency_contrast", ranking, all_at_once=True)


@further("output_row", touches="a mask", needs="nothing")
def output_row(request: Request) -> Mask:
    """The trivial mask: the forget class's row of the output layer, so that its logit is always 0 (or its bias)."""
    graph = WeightGraph(request.graphs.classifier, -1)
    (vertices,) = graph.split(torch.arange(graph.num_vertices))
    return graph.zeroing(vertices[request.forget_class])


@further("logit_removed", touches="the output", needs="nothing")
def logit_removed(request: Request) -> nn.Module:
    """The trivial filter: the forget class's logit is minus infinity, all weights stay."""

    def removed(module: nn.Module, images: tuple[Tensor], logits: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor([request.forget_class], device=logits.device), float("-inf"))

    classifier = request.classifier
    classifier.register_forward_hook(removed)
    return classifier


@further("retrain_again", needs="retain set")
def retrain_again(request: Request) -> Trained:
    """Retrained from other initial weights: how far two classifiers are apart that never saw the class."""
    return request.retrained(request.trainer.seed + 1_000_000)


@unlearning_method("retrain_third", needs="retain set", runs_with="name")
def retrain_third(request: Request) -> Trained:
    """Retrained from yet other initial weights: with `retrain_again`, how much retraining varies in what it leaves."""
    return request.retrained(request.trainer.seed + 2_000_000)
