"""A request to forget a class: weights are zeroed step by step until the class is no longer classified.

One weight of a layer can take over another's work. Scores that are computed once do not show this. So pruning iterates:
`prune` scores all weights on the classifier masked so far, zeroes the highest-scoring ones, and yields. The caller
decides when to stop. `choose_kappa` stops where the class is forgotten and further zeros would cost accuracy. `Pruning`
serves several kappas in turn.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimu.errors import InputError, named
from mimu.graph import MaskingGCN
from mimu.saliency import ActivationGraphs, ranked, saliency
from mimu.samples import FEW, Split, margins
from mimu.seeds import seeded
from mimu.settings import Amount, Bounds, Count, NonNegative, Positive, number_of_weights
from mimu.training import forgetting_loss

LEAST_SHARE = 1 / 16  # if layers compete, each offers at least this share of one neuron's weights in a step
COUNTED_AT_ONCE = 100  # samples of the forget class after which counting may stop
UNNOTICED = 1e-3  # nats that the retained classes may lose at no cost where layers compete
CONFIDENCE = 0.95  # one-sided, of what samples show
STEPS_PER_SNAPSHOT = 6  # at least, once the class is forgotten: the scores then change slowly
PRIOR_SAMPLES = 4  # weight of the variance of all samples then, in samples

# From the number of a step and the vertices zeroed before it to the scores of all weights, (vertices).
Ranking = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class PruningConfig:
    """The settings of a request.

    step: weights zeroed in a step, a number or a share of the masked ones; if layers compete, one layer's share of it.
        None: they are scored only once
    snapshot_every: steps from one snapshot to the next until the class is forgotten, first-order updates between;
        None: a single snapshot. Snapshots whose records are too large to keep are taken in every step
    momentum: of the running mean of the scores over the steps
    group_size: samples of every class in a snapshot
    retain_weight: weight of the damage to the retained classes in the score
    penalty_growth: divides `retain_weight` after each step in which forgetting stalls
    target: a class is forgotten if less than this percentage of its samples is classified correctly
    max_kappa: weights, at most, that are zeroed for a request that searches for kappa
    tolerance: nats that the retained classes' loss may rise by once the class is forgotten, while further weights are
        zeroed; None: none are
    """

    step: Amount | None
    snapshot_every: Count | None
    momentum: Annotated[float, Bounds(ge=0, lt=1)]
    group_size: Count
    retain_weight: Positive
    penalty_growth: Annotated[float, Bounds(ge=1)]
    target: Positive
    max_kappa: Amount
    tolerance: NonNegative | None


class PruningResult(NamedTuple):
    """The weights to zero for a request, after some step or at its end.

    vertices: in the order in which they are zeroed, (kappa)
    seconds: what finding them took, steps for a smaller kappa included
    num_needed: how many of them already forget the class; 0 if it is not forgotten, or nothing counts it
    scores: those of the last step (vertices), before the running mean, of the classifier before the zeros of the step
    message: "" if the class is forgotten; a text on how much of it remains if max_kappa is reached; None if the caller
        may go on
    """

    vertices: Tensor
    seconds: float
    num_needed: int = 0
    scores: Tensor | None = None
    message: str | None = None


@torch.no_grad()
def prune(
    graphs: ActivationGraphs,
    class_index: int,
    config: PruningConfig,
    seed: int,
    gcn: MaskingGCN | None = None,
    ranking: Ranking | None = None,
    zeroed: Tensor | None = None,
    counter: "RemainingCounter | None" = None,
) -> Iterator[PruningResult]:
    """Chooses weights to zero, step by step, and yields after every step; it ends when no weight is left.

    Iterative pruning after Molchanov et al. 2017, arXiv:1611.06440. A step follows a running mean of the scores, since
    each snapshot is drawn from few samples: m = momentum m + (1 - momentum) s / std(s).

    Args:
        graphs: the classifier, its samples and its masked weights
        class_index: the index of the class to forget in `graphs.classes`
        seed: decides, with the class and the number of the step, which samples are drawn
        gcn: rescales the scores of the formula; None: the formula as it is
        ranking: scores the weights in place of snapshots and the formula
        zeroed: the vertices that are zeroed to begin with
        counter: tells when the class is forgotten; snapshots are then rarer; None: all steps are alike

    Raises:
        InputError: if a score is not finite
    """
    zeroed = graphs.nothing if zeroed is None else zeroed
    features = () if gcn is None else graphs.config.features
    newest, snapshot, scores, running_mean = graphs.nothing, None, None, None
    penalty, loss, seconds, num_needed = 1.0, math.inf, 0.0, 0
    max_kappa = largest_kappa(graphs, config, len(zeroed))
    for step in itertools.count():
        started = time.perf_counter()
        if step > 0 and config.step is None:
            pass  # the scores of the first step serve all others
        elif ranking is not None:
            scores = ranking(step, zeroed)
        else:
            every = config.snapshot_every and max(config.snapshot_every, STEPS_PER_SNAPSHOT if num_needed else 1)
            if snapshot is not None and snapshot.records[0] and (every is None or step % every > 0):
                snapshot = snapshot.first_order_update(newest)
            else:
                snapshot = None  # two snapshots at a time could take too much memory
                samples = graphs.draw(config.group_size, seeded("request", seed, graphs.classes[class_index], step))
                snapshot = graphs.snapshot(samples, class_index, zeroed, features)
            previous_loss, loss = loss, F.softplus(snapshot.log_odds[0]).mean().item()
            if is_stalled(loss, previous_loss, config):
                penalty /= config.penalty_growth
            scores = saliency(snapshot, penalty * config.retain_weight, gcn)
        standardised = in_standard_deviations(scores)
        running_mean = standardised if step == 0 else torch.lerp(standardised, running_mean, config.momentum)
        newest = next_vertices(graphs, class_index, config, running_mean, zeroed)
        zeroed = torch.cat([zeroed, newest])
        if counter is not None and not num_needed and counter.is_forgotten(zeroed[:max_kappa]):
            num_needed = len(zeroed[:max_kappa])
        seconds += time.perf_counter() - started
        yield PruningResult(zeroed, seconds, num_needed, scores)
        if len(zeroed) == graphs.graph.num_vertices:
            return


def largest_kappa(graphs: ActivationGraphs, config: PruningConfig, num_zeroed: int) -> int:
    """The number of vertices, at most, that are zeroed by a request that begins with num_zeroed of them."""
    num_vertices = graphs.graph.num_vertices
    return min(num_zeroed + number_of_weights(config.max_kappa, num_vertices), num_vertices)


def is_stalled(loss: float, previous_loss: float, config: PruningConfig) -> bool:
    """True if the class's mean -log(1 - p) is above target / 100 nats, and fell by less than the factor penalty_growth.

    The damage penalty is then lowered. Penalty methods likewise raise the weight of a constraint that a constant weight
    only balances against the objective (Nocedal and Wright 2006, Numerical Optimization, chapter 17).
    """
    return loss > config.target / 100 and loss > previous_loss / config.penalty_growth


def in_standard_deviations(scores: Tensor) -> Tensor:
    """Divides scores (vertices) by their standard deviation. Raises InputError if one of them is not finite."""
    if not scores.isfinite().all():
        raise InputError("scores of weights are not finite: look at the inputs, the weights and the GCN")
    return scores / scores.std().clamp_min(1e-12)


def next_vertices(
    graphs: ActivationGraphs, class_index: int, config: PruningConfig, scores: Tensor, zeroed: Tensor
) -> Tensor:
    """Chooses the vertices of one step: those of the highest scores; if layers compete, within the best layer."""
    num_vertices = graphs.graph.num_vertices
    if config.step is None:  # fine enough to find the smallest kappa that forgets
        count = max(1, number_of_weights(config.max_kappa, num_vertices) // 100)
    else:
        count = number_of_weights(config.step, num_vertices)
    if graphs.config.scope == "measured" and len(graphs.graph.layers) > 1:
        return best_of_one_layer(graphs, class_index, config.group_size, count, scores, zeroed)
    return ranked(scores, zeroed, count)


def best_of_one_layer(
    graphs: ActivationGraphs, class_index: int, group_size: int, count: int, scores: Tensor, zeroed: Tensor
) -> Tensor:
    """Chooses the vertices of one step in the layer where they do best.

    Each layer offers its highest-scoring vertices, as many as its share of a step. Scores of different layers are not
    comparable; the changes of the losses by their zeros are. The best vertices lower the forgetting loss -log(1 - p)
    most for every nat by which they raise the cross entropy of the retained classes. If none lowers it, the best ones
    are those that raise that cross entropy least.
    """
    graph, best_merit, best_vertices = graphs.graph, None, None
    samples = graphs.by_class[:, :group_size]
    losses = losses_without(graphs, class_index, samples, zeroed)
    offset = 0
    for layer_scores in graph.split(scores.index_fill(0, zeroed, float("-inf"))):
        share = max(1, round(count * layer_scores.numel() / len(scores)), int(LEAST_SHARE * layer_scores[0].numel()))
        share = min(share, int((layer_scores > float("-inf")).sum()))
        vertices = offset + layer_scores.flatten().topk(share).indices
        offset += layer_scores.numel()
        changes = losses_without(graphs, class_index, samples, torch.cat([zeroed, vertices])) - losses
        forget, retain = changes.tolist()
        merit = (forget < 0, -forget / max(retain, UNNOTICED) if forget < 0 else -retain)
        if share and (best_merit is None or merit > best_merit):
            best_merit, best_vertices = merit, vertices
    return best_vertices


def losses_without(graphs: ActivationGraphs, class_index: int, samples: Tensor, zeroed: Tensor) -> Tensor:
    """Computes `forgetting_loss` and the mean cross entropy of the retained classes with vertices zeroed, (2), in nats.

    samples: indices, (classes, samples)
    """
    indices = samples.flatten()
    logits = graphs.logits(graphs.cached_inputs[indices], zeroed)
    p = logits.unflatten(0, samples.shape)[class_index].softmax(1)[:, graphs.classes[class_index]]
    losses = F.cross_entropy(logits, graphs.labels[indices], reduction="none").view(samples.shape).mean(1)
    return torch.stack([forgetting_loss(p), (losses.sum() - losses[class_index]) / (len(losses) - 1)])


class RemainingCounter:
    """Counts how much of a class is still classified correctly while its weights are zeroed.

    samples: those of the class, as the classifier takes them, or of several classes that it takes for one
    """

    def __init__(self, graphs: ActivationGraphs, class_index: int, samples: Split, target: float) -> None:
        self.graphs, self.label, self.target = graphs, graphs.classes[class_index], target
        self.name = named(graphs.classifier.merged or [self.label])
        self.labels, self.suffix = samples.labels, graphs.suffix.merging(())
        self.inputs = graphs.classifier.prefix_activations(graphs.graph.layers, samples.images)
        self.order = torch.arange(len(self.labels), device=self.labels.device)

    @torch.no_grad()
    def percent_remaining(self, zeroed: Tensor, enough: float = math.inf) -> float:
        """Counts the percentage of samples classified correctly; it stops early once that reaches `enough`.

        With fewer than 100 / target samples, a single one is more than the target. The percentage of new samples is
        then estimated (`percent_above_zero`).
        """
        graphs, order, logits = self.graphs, self.order, []
        is_correct = torch.zeros(len(self.inputs), dtype=torch.bool, device=self.inputs.device)
        weights = graphs.graph.zeroing(zeroed).weights(graphs.classifier)
        for part in order.split(min(COUNTED_AT_ONCE, graphs.suffix.samples_at_once)):
            logits.append(self.suffix.outputs(self.inputs[part], weights)[1])
            is_correct[part] = logits[-1].argmax(1) == self.labels[part]
            percent = 100 * int(is_correct.sum()) / len(self.inputs)
            if percent >= enough:
                break
        # Samples that were still correct come first the next time: a few of them are then enough.
        self.order = is_correct.int().argsort(descending=True, stable=True)
        if percent < enough and len(self.inputs) < 100 / self.target:
            spread = float(margins(graphs.predictions, graphs.labels).std())
            percent = max(percent, percent_above_zero(margins(torch.cat(logits), self.labels[order]), spread))
        return percent

    def is_forgotten(self, zeroed: Tensor) -> bool:
        """True if less than the target remains."""
        return self.percent_remaining(zeroed, self.target) < self.target

    def message(self, zeroed: Tensor) -> str:
        """Says how much of the class remains."""
        return f"{self.percent_remaining(zeroed):.1f} % of {self.name} remains"


def percent_above_zero(margins: Tensor, spread: float) -> float:
    """Estimates the percentage of further samples that are classified correctly, from the margins (n) of some.

    Margins are taken to be normally distributed. With fewer than FEW, the variance is that of their predictive
    distribution: their own variance pooled with spread^2, which counts as PRIOR_SAMPLES, plus that of their mean.
    """
    count, mean = len(margins), float(margins.double().mean())
    variance = float(margins.double().var()) if count > 1 else 0.0
    if count < FEW:
        pooled = ((count - 1) * variance + PRIOR_SAMPLES * spread**2) / (count - 1 + PRIOR_SAMPLES)
        variance = pooled * (1 + 1 / count)
    return 100 - 100 * NormalDist(mean, math.sqrt(variance)).cdf(0) if variance > 0 else 100.0 * (mean > 0)


def retained_losses(graphs: ActivationGraphs, label: int, zeroed: Tensor) -> Tensor:
    """The cross entropy of the samples held out from the scores, but for those of a class, (samples), nats."""
    is_retained = graphs.held_out.labels != label
    logits = graphs.logits(graphs.held_out_inputs[is_retained], zeroed)
    return F.cross_entropy(logits, graphs.held_out.labels[is_retained], reduction="none").double()


def largest_rise(rises: Tensor) -> float:
    """The upper end of a one-sided interval for the mean of rises, (samples)."""
    return float(rises.mean() + NormalDist().inv_cdf(CONFIDENCE) * rises.std() / math.sqrt(len(rises)))


def choose_kappa(
    steps: Iterable[PruningResult], counter: RemainingCounter, config: PruningConfig, num_zeroed: int = 0
) -> Iterator[PruningResult]:
    """Drives steps until further zeros cost accuracy, and yields after each; the last result has kappa auto.

    First the class is forgotten, with as few whole steps as do it. Steps then go on while the loss of the retained
    classes rises by at most `config.tolerance` nats on held-out samples (`largest_rise`): the predictions for the
    class come closer to those after retraining. At most `config.max_kappa` weights are zeroed.

    num_zeroed: how many vertices were zeroed to begin with
    """
    graphs, first_losses, last, seconds = counter.graphs, None, None, 0.0
    max_kappa = largest_kappa(graphs, config, num_zeroed)
    goes_on = config.tolerance is not None and len(graphs.held_out.labels.unique()) == graphs.num_classes
    for step in steps:
        zeroed, started = step.vertices[:max_kappa], time.perf_counter()
        if step.num_needed and goes_on:
            losses = retained_losses(graphs, counter.label, zeroed)
            first_losses = losses if first_losses is None else first_losses
            if largest_rise(losses - first_losses) > config.tolerance:
                break
        seconds += time.perf_counter() - started
        last = step._replace(vertices=zeroed, seconds=step.seconds + seconds)
        yield last
        if len(zeroed) == max_kappa or (step.num_needed and not goes_on):
            break
    yield last._replace(message="" if last.num_needed else counter.message(last.vertices))


class Pruning:
    """The steps of one request, kept from one kappa to the next: the mask at kappa is the first kappa entries.

    steps: as `prune` yields them
    """

    def __init__(self, steps: Iterator[PruningResult], counter: RemainingCounter, config: PruningConfig) -> None:
        self._steps, self._counter, self._config = steps, counter, config
        self._chosen: PruningResult | None = None

    def steps(self) -> Iterator[PruningResult]:
        """Yields every step from the first on; a step is computed once."""
        self._steps, steps = itertools.tee(self._steps)
        return steps

    def at(self, kappa: int) -> PruningResult:
        """The first kappa vertices."""
        step = next(step for step in self.steps() if len(step.vertices) >= kappa)
        return PruningResult(step.vertices[:kappa], step.seconds)

    def chosen(self) -> PruningResult:
        """The vertices that `choose_kappa` chooses."""
        if self._chosen is None:
            *_, self._chosen = choose_kappa(self.steps(), self._counter, self._config)
        return self._chosen
