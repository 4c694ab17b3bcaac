"""The published objective on the published graphs: sufficiency and prior on single samples, and the set difference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval import Request, unlearning_method
from mimu.graph import MaskingGCN
from mimu.pruning import PruningResult
from mimu.saliency import ActivationGraphs
from mimu.seeds import seeded, seeded_initialisation
from mimu.settings import Count, NonNegative, Positive
from mimu.training import descend
from trainer import LEAST_SPREAD, masked_weights, top_k_mask

FEATURES = ("input_activation", "output_activation", "weight", "gradient")


@dataclass(frozen=True)
class Published:
    """The objective, its training, and from how many samples of a class the scores are averaged.

    sufficiency, prior: the weights of the terms; gumbel: the scale of the noise on the scores of the sufficiency term
    temperature: of the backward sigmoid, in standard deviations of the scores
    """

    hidden: Count
    rounds: Count
    steps: Count
    learning_rate: Positive
    samples: Count
    temperature: Positive
    gumbel: NonNegative
    sufficiency: NonNegative
    prior: NonNegative
    draws: Count


def importance(gcn: MaskingGCN, graphs: ActivationGraphs, samples: Tensor) -> Tensor:
    """The logits (classes, vertices) of the graphs of single samples, one of every class, (classes, 1)."""
    of_graphs = replace(graphs.config, features=FEATURES, other_classes=False)
    snapshot = replace(graphs.snapshot(samples, FEATURES), config=of_graphs)
    x = torch.cat([snapshot.class_graph(row) for row in range(graphs.num_classes)])
    return torch.cat([gcn.readout(part).flatten(1) for part in gcn.hidden(x, graphs.graph)], 1)


def prior_divergence(logits: Tensor, weights: Tensor) -> Tensor:
    """KL(Q || P) in nats (graphs), Q = softmax(logits) (graphs, vertices), P proportional to |w| + 1e-12 (vertices)."""
    log_p = (weights.abs() + 1e-12).log().log_softmax(-1)
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def insufficiency(
    logits: Tensor, graphs: ActivationGraphs, config: Published, top_k: int, generator: torch.Generator
) -> Tensor:
    """Cross entropy of samples of every class with the top-K weights of that class alone, nats."""
    scores = logits / logits.std(1, keepdim=True).clamp_min(LEAST_SPREAD)
    # The k largest of logits + Gumbel noise are a sample without replacement (Kool et al. 2019, arXiv:1903.06059).
    noise = -torch.empty(scores.shape).exponential_(generator=generator).log()
    keep = top_k_mask(scores + config.gumbel * noise.to(scores.device), top_k, config.temperature)
    weights = masked_weights(graphs.classifier, graphs.graph, keep)
    samples = graphs.draw(max(1, config.samples // graphs.num_classes), generator)
    found = []
    for row, chosen in enumerate(samples):
        of_class = {name: weight[row] for name, weight in weights.items()}
        found.append(graphs.suffix.outputs(graphs.cached_inputs[chosen], of_class)[1])
    return F.cross_entropy(torch.cat(found), graphs.labels[samples.flatten()])


@torch.enable_grad()
def trained(request: Request, config: Published) -> MaskingGCN:
    """The rounds of the masking GCN, read out to one logit for every weight, trained once for all requests."""
    if "published" in request.kept:
        return request.kept["published"]
    graphs, top_k = request.graphs, request.top_k
    with seeded_initialisation(request.seed):
        gcn = MaskingGCN(len(FEATURES), config.hidden, config.rounds)
        gcn.readout = nn.Linear(config.hidden, 1, bias=False)
    gcn.to(graphs.labels.device)
    weights = torch.cat([weight.flatten() for weight in graphs.weights()])
    optimizer = torch.optim.Adam(gcn.parameters(), config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    generator = seeded("published", request.seed, top_k)
    for step in range(config.steps):
        logits = importance(gcn, graphs, graphs.draw(1, generator))
        loss = config.sufficiency * insufficiency(logits, graphs, config, top_k, generator)
        loss = loss + config.prior * prior_divergence(logits, weights).mean()
        descend(optimizer, {"loss": loss}, step, "eval.hyperparameters.published")
        schedule.step()
    request.kept["published"] = gcn
    return gcn


@torch.no_grad()
def mean_importance(request: Request, config: Published) -> Tensor:
    """The mean logits (classes, vertices) of graphs of `config.draws` samples of every class."""
    graphs, gcn = request.graphs, trained(request, config)
    generator = seeded("published request", request.seed, request.forget_class)
    found = [importance(gcn, graphs, graphs.draw(1, generator)) for _ in range(config.draws)]
    return torch.stack(found).mean(0)


def set_difference(importance: Tensor, top_k: int) -> Tensor:
    """Weights in the top-K of class d alone come first, by Q_d; the others follow by Q_d less the mean over the others.

    Shapes: importance Q (classes, vertices) to scores (classes, vertices), larger is zeroed earlier.
    """
    in_top_k = torch.zeros_like(importance).scatter_(1, importance.topk(top_k, 1).indices, 1.0)
    only_here = (in_top_k == 1) & (in_top_k.sum(0) == 1)
    rest = importance - (importance.sum(0) - importance) / (len(importance) - 1)
    lift = rest.amax(1, keepdim=True) - importance.amin(1, keepdim=True) + 1
    return torch.where(only_here, importance + lift, rest)


def most_needed(request: Request) -> Tensor:
    config = Published(**request.config.hyperparameters["published"])
    return mean_importance(request, config)[request.class_index].topk(request.top_k).indices


@unlearning_method("published", uses_kappa=True, most_needed=most_needed, touches="a mask", runs_with="name")
def published(request: Request, *, config: Published) -> PruningResult:
    """All at once, by the set difference of the top-K weights of a GCN trained for sufficiency and the prior alone."""

    def ranking(step: int, zeroed: Tensor) -> Tensor:
        return set_difference(mean_importance(request, config), request.top_k)[request.class_index]

    return request.in_steps("published", ranking, all_at_once=True)
