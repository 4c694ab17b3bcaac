"""The published objective on the published graphs: sufficiency and a prior on single samples, then a set difference."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

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
    """The GCN, the two terms that it is trained on, and how many graphs of a class its scores are averaged over."""

    hidden: Count
    rounds: Count
    steps: Count
    learning_rate: Positive
    samples: Count  # of all classes together, in the sufficiency term of a step
    temperature: Positive  # of the backward sigmoid, in standard deviations of the scores
    gumbel: NonNegative  # scale of the noise on the scores in the sufficiency term
    sufficiency: NonNegative  # weight of the term
    prior: NonNegative  # weight of the term
    draws: Count  # graphs of a class


def importance(gcn: MaskingGCN, graphs: ActivationGraphs, samples: Tensor) -> Tensor:
    """Returns the logits (classes, vertices) of the graphs of single samples, one per class, (classes, 1)."""
    config = replace(graphs.config, features=FEATURES, other_classes=False)
    snapshots = [graphs.snapshot(sample[None], 0, features=FEATURES, forgets=False) for sample in samples]
    x = torch.cat([replace(snapshot, config=config).class_graph() for snapshot in snapshots])
    return torch.cat([gcn.readout(part).flatten(1) for part in gcn.hidden(x, graphs.graph)], 1)


def prior_divergence(logits: Tensor, weights: Tensor) -> Tensor:
    """Returns KL(Q || P) in nats (graphs), Q = softmax(logits) (graphs, vertices), P ~ |w| + 1e-12 (vertices)."""
    log_p = (weights.abs() + 1e-12).log().log_softmax(-1)
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def insufficiency(logits: Tensor, request: Request, config: Published, generator: Generator) -> Tensor:
    """Returns the cross entropy, in nats, of every class's samples with only the top-K weights of that class."""
    graphs, scores = request.graphs, logits / logits.std(1, keepdim=True).clamp_min(LEAST_SPREAD)
    # The k largest of logits + Gumbel noise are a sample without replacement (Kool et al. 2019, arXiv:1903.06059).
    noise = -torch.empty(scores.shape).exponential_(generator=generator).log()
    keep = top_k_mask(scores + config.gumbel * noise.to(scores.device), request.top_k, config.temperature)
    samples = graphs.draw(max(1, config.samples // graphs.num_classes), generator)
    weights = [masked_weights(graphs.classifier, graphs.graph, class_keep) for class_keep in keep]
    outputs = [graphs.suffix.outputs(graphs.cached_inputs[row], each)[1] for row, each in zip(samples, weights)]
    return F.cross_entropy(torch.cat(outputs), graphs.labels[samples.flatten()])


@torch.enable_grad()
def trained(request: Request, config: Published) -> MaskingGCN:
    """Returns the GCN, which gives one logit per weight; it is trained once for all requests on a classifier."""
    if "published" in request.kept:
        return request.kept["published"]
    graphs = request.graphs
    with seeded_initialisation(request.seed):
        gcn = MaskingGCN(len(FEATURES), config.hidden, config.rounds)
        gcn.readout = nn.Linear(config.hidden, 1, bias=False)
    gcn.to(graphs.labels.device)
    weights = torch.cat([weight.flatten() for weight in graphs.weights()])
    optimizer = torch.optim.Adam(gcn.parameters(), config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    generator = seeded("published", request.seed, request.top_k)
    for step in range(config.steps):
        logits = importance(gcn, graphs, graphs.draw(1, generator))
        sufficiency = config.sufficiency * insufficiency(logits, request, config, generator)
        losses = {"sufficiency": sufficiency, "prior": config.prior * prior_divergence(logits, weights).mean()}
        descend(optimizer, losses, step, "eval.hyperparameters.published")
        schedule.step()
    request.kept["published"] = gcn
    return gcn


@torch.no_grad()
def mean_importance(request: Request, config: Published) -> Tensor:
    """Returns the mean logits (classes, vertices) of the graphs of `config.draws` random samples per class."""
    graphs, gcn = request.graphs, trained(request, config)
    generator = seeded("published request", request.seed, request.forget_class)
    return torch.stack([importance(gcn, graphs, graphs.draw(1, generator)) for _ in range(config.draws)]).mean(0)


def set_difference(importance: Tensor, top_k: int) -> Tensor:
    """Returns scores by which weights that only class d has in its top-K come first, by Q_d; the remaining weights
    follow by Q_d minus its mean over the other classes.

    Shapes: importance Q (classes, vertices) to scores (classes, vertices); larger is zeroed earlier.
    """
    in_top_k = torch.zeros_like(importance).scatter_(1, importance.topk(top_k, 1).indices, 1.0)
    is_exclusive = (in_top_k == 1) & (in_top_k.sum(0) == 1)
    contrast = importance - (importance.sum(0) - importance) / (len(importance) - 1)
    lift = contrast.amax(1, keepdim=True) - importance.amin(1, keepdim=True) + 1
    return torch.where(is_exclusive, importance + lift, contrast)


def most_needed(request: Request) -> Tensor:
    config = Published(**request.config.hyperparameters["published"])
    return mean_importance(request, config)[request.class_index].topk(request.top_k).indices


@unlearning_method("published", uses_kappa=True, most_needed=most_needed, touches="a mask", runs_with="name")
def published(request: Request, *, config: Published) -> PruningResult:
    """The published system: weights are zeroed all at once, by the set difference of the top-K weights of a GCN that is
    trained for sufficiency and the prior alone."""

    def ranking(step: int, zeroed: Tensor) -> Tensor:
        return set_difference(mean_importance(request, config), request.top_k)[request.class_index]

    return request.in_steps("published", ranking, all_at_once=True)
