"""Controls: what the saliency does without a GCN, and what trivial edits and another retraining come to."""

import torch
from torch import Tensor, nn

from eval import Request, unlearning_method
from mimu.graph import WeightGraph
from mimu.masks import Mask
from mimu.pruning import PruningResult
from trainer import Trained


@unlearning_method("saliency", uses_kappa=True, touches="a mask")
def saliency(request: Request) -> PruningResult:
    """Saliency without the GCN: the weights that the formula scores highest are zeroed, in the same steps."""
    return request.in_steps("saliency")


def largest(request: Request, count: int | None = None) -> Tensor:
    """Returns the vertices of the masked weights that are largest in magnitude: `count` of them, or `top_k`."""
    magnitudes = torch.cat([weight.flatten() for weight in request.graphs.weights()]).abs()
    return magnitudes.topk(count or request.top_k).indices


@unlearning_method("magnitude", uses_kappa=True, most_needed=largest, touches="a mask", needs="nothing")
def magnitude(request: Request) -> Mask:
    """The second control: the kappa weights of the same layers that are largest in magnitude are zeroed."""
    return request.graphs.graph.zeroing(largest(request, request.kappa))


@unlearning_method("output_row", runs_with="all", touches="a mask", needs="nothing")
def output_row(request: Request) -> Mask:
    """The trivial mask: the class's output weights are zeroed, so that its logit is always 0, or its bias."""
    graph = WeightGraph(request.graphs.classifier.trace.layers, -1)
    (vertices,) = graph.split(torch.arange(graph.num_vertices))
    return graph.zeroing(vertices[request.forget_class])


@unlearning_method("logit_removed", runs_with="all", touches="the output", needs="nothing")
def logit_removed(request: Request) -> nn.Module:
    """The trivial filter: the class's logit becomes minus infinity, and all weights stay."""

    def remove(module: nn.Module, images: tuple[Tensor], logits: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor([request.forget_class], device=logits.device), float("-inf"))

    classifier = request.classifier
    classifier.register_forward_hook(remove)
    return classifier


@unlearning_method("retrain_again", runs_with="all", needs="retain set")
def retrain_again(request: Request) -> Trained:
    """Retraining from other initial weights: how far apart two classifiers are that never saw the class."""
    return request.retrained(request.trainer.seed + 1_000_000)
