"""A request to forget a class, step by step: which weights are zeroed, and when it stops."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import NormalDist
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimu.errors import InputError
from mimu.graph import MaskingGCN
from mimu.saliency import TERMS, ActivationGraphs, Snapshot, ranked, saliency
from mimu.samples import Split, margins
from mimu.seeds import seeded
from mimu.settings import Amount, Bounds, Count, Positive, number_of_weights


@dataclass(frozen=True)
class PruningConfig:
    """How a request is answered: the snapshots that it takes, and how their scores rank the weights."""

    step: Amount | None
    snapshot_every: Count | None
    momentum: Annotated[float, Bounds(ge=0, lt=1)]
    group_size: Count
    retain_weight: Positive
    penalty_growth: Annotated[float, Bounds(ge=1)]
    target: Positive
    max_kappa: Amount


@dataclass(eq=False)
class SaliencyScorer:
    """The saliency of every weight on the classifier masked so far, by the formula or with a trained GCN.

    gcn: None for the formula
    """

    config: PruningConfig
    graphs: ActivationGraphs
    class_index: int
    seed: int
    gcn: MaskingGCN | None = None
    _snapshot: Snapshot | None = field(default=None, init=False)
    _zeroed: int = field(default=0, init=False)  # how many vertices were zeroed in that snapshot
    _left: float = field(default=float("inf"), init=False)  # the class's mean -log(1 - p) there
    _penalty: float = field(default=1.0, init=False)

    @torch.no_grad()
    def __call__(self, step: int, zeroed: Tensor) -> Tensor:
        """Scores (vertices), largest first to go, for the step that follows after the vertices `zeroed`."""
        snapshot = self._taken(step, zeroed)
        self._schedule(snapshot)
        return saliency(snapshot, self.class_index, self._penalty * self.config.retain_weight, self.gcn)

    def _taken(self, step: int, zeroed: Tensor) -> Snapshot:
        """The snapshot for a step, after every `config.snapshot_every` steps anew.

        Between, it is the last one's first-order update; of kernels too large for a record to be kept, a new one.
        """
        every, last = self.config.snapshot_every, self._snapshot
        goes_on = last is not None and bool(last.records) and (step % every if every else step)
        if goes_on:
            self._snapshot = last.first_order_update(zeroed[self._zeroed :])
        else:
            self._snapshot = last = None  # not two at a time in memory
            names = [*TERMS] if self.gcn is None else [*TERMS, *self.graphs.config.features]
            generator = seeded("request", self.seed, self.graphs.classes[self.class_index], step)
            samples = self.graphs.draw(self.config.group_size, generator)
            self._snapshot = self.graphs.snapshot(samples, names, self.graphs.mask_of(zeroed), self.class_index)
        self._zeroed = len(zeroed)
        return self._snapshot

    def _schedule(self, snapshot: Snapshot) -> None:
        """Lowers what the others weigh where the class stalls: where -log(1 - p) has not fallen enough since last time.

        As in penalty methods, where a constraint (nothing is left of the class) that a constant weight only balances
        against the objective is enforced by one that grows (Nocedal and Wright 2006, Numerical Optimization, ch. 17).
        """
        before, self._left = self._left, F.softplus(snapshot.log_odds[self.class_index]).mean().item()
        growth = self.config.penalty_growth
        if self._left > self.config.target / 100 and self._left > before / growth:
            self._penalty /= growth


FEWEST = 1 / 16  # of the weights of a neuron that a layer gives in a step, where several compete by what is measured
COUNTED_AT_ONCE = 100  # samples of the forget class, where it may be that no more are needed
UNNOTICED = 1e-3  # nats that the others may lose at no cost, there
FEW = 100  # samples of a class, below which they do not say themselves how much samples differ
PRIOR = 4  # samples as which counts then how much those of all classes do


def forgetting_loss(p: Tensor) -> Tensor:
    """Mean of -log(1 - p) in nats, p the probability of the forget class on its own samples: 0 where all forget it."""
    return -torch.log1p(-p.clamp(max=1 - 1e-6)).mean()


def percent_above_zero(margins: Tensor, spread: float) -> float:
    """The percentage of further samples that are classified correctly, by the margins (n) of some.

    Margins are taken to be normally distributed. Of fewer than FEW the variance is that of their predictive
    distribution: theirs, together with spread^2 as that of PRIOR more, and that of their mean.
    """
    count, mean = len(margins), float(margins.double().mean())
    variance = float(margins.double().var()) if count > 1 else 0.0
    if count < FEW:
        variance = ((count - 1) * variance + PRIOR * spread**2) / (count - 1 + PRIOR) * (1 + 1 / count)
    return 100 - 100 * NormalDist(mean, math.sqrt(variance)).cdf(0) if variance > 0 else 100.0 * (mean > 0)


class PruningResult(NamedTuple):
    """The weights to zero for a request, in their order, and what finding them took.

    seconds: of all steps up to there, those made before for another kappa included
    left: what is left of the class at the largest kappa, in words, or ""; None where no kappa was searched for
    """

    vertices: Tensor
    seconds: float
    left: str | None = None


@dataclass(eq=False)
class Pruning:
    """The order in which weights are zeroed to forget a class: the mask at kappa is its first kappa entries.

    Iterative pruning: weights stand in for one another, which scores given all at once cannot see (Molchanov et al.
    2017, arXiv:1611.06440). So a step zeroes `config.step` weights (None: all of them), and the next one is ranked on
    the classifier masked so far. Since each ranking is drawn from few samples, a step follows the running mean
    m = momentum m + (1 - momentum) s of the scores s, each divided by their standard deviation. A larger kappa goes on
    from the steps of a smaller one.

    class_index: the row of the class in the graphs
    ranking: from the number of the step and the vertices zeroed before it to scores (vertices), largest first to go
    zeroed: vertices that are zeroed so far, the first entries of the order; to begin with, none by default
    """

    config: PruningConfig
    graphs: ActivationGraphs
    class_index: int
    ranking: Callable[[int, Tensor], Tensor]
    zeroed: Tensor | None = None

    def __post_init__(self) -> None:
        step, num_vertices = self.config.step, self.graphs.graph.num_vertices
        self.step = num_vertices if step is None else number_of_weights(step, num_vertices)
        self.zeroed = self.graphs.nothing if self.zeroed is None else self.zeroed
        self._mean: Tensor | None = None
        self._ends = [len(self.zeroed)]  # how many are zeroed before the first step and after each
        self._seconds: list[float] = []
        self._forgetting: PruningResult | None = None
        self._counted: Tensor | None = None  # samples of the class in the order in which they are counted

    def answer(
        self, asked: int | Literal["auto"], forget: Split, is_too_much: Callable[[Tensor], bool] = lambda zeroed: False
    ) -> PruningResult:
        """The vertices to zero: so many, or with auto the fewest whole steps of them after which a class is forgotten.

        It is when less than `config.target` percent of its training samples, `forget`, are classified correctly, or of
        others like them where they are few (`_left`). At the largest kappa the search gives up, and where
        `is_too_much`, which it asks after every step of the vertices zeroed so far.
        """
        if asked != "auto":
            return self.first(asked)
        if self._forgetting is None:
            self._forgetting = self._search(forget, is_too_much)
        return self._forgetting

    def first(self, kappa: int) -> PruningResult:
        """The vertices to zero for this kappa: all of them where kappa is larger."""
        while len(self.zeroed) < min(kappa, self.graphs.graph.num_vertices):
            started = time.perf_counter()
            scores = self.ranking(len(self._seconds), self.zeroed)
            if not scores.isfinite().all():
                raise InputError("scores of weights are not finite: look at the inputs, the weights and the GCN")
            scores = scores / scores.std().clamp_min(1e-12)
            self._mean = scores if self._mean is None else torch.lerp(scores, self._mean, self.config.momentum)
            if self._is_measured:
                further = self._cheapest(self._mean.index_fill(0, self.zeroed, float("-inf")))
            else:
                further = ranked(self._mean, self.zeroed, self.step)
            self.zeroed = torch.cat([self.zeroed, further])
            self._ends.append(len(self.zeroed))
            self._seconds.append(time.perf_counter() - started)
        took = (seconds for seconds, start in zip(self._seconds, self._ends) if start < kappa)
        return PruningResult(self.zeroed[:kappa], sum(took))

    def steps(self) -> Iterator[PruningResult]:
        """What is zeroed after each step, up to `config.max_kappa`; where all is at once, in hundredths of that."""
        graph, kappa = self.graphs.graph, self._ends[0]
        limit = number_of_weights(self.config.max_kappa, graph.num_vertices)
        max_kappa = min(kappa + limit, graph.num_vertices)
        while kappa < max_kappa:
            self.first(kappa + 1)
            end = next(end for end in self._ends if end > kappa)
            kappa = min(end if self.config.step is not None else kappa + max(1, limit // 100), max_kappa)
            yield self.first(kappa)

    @torch.no_grad()
    def _search(self, forget: Split, is_too_much: Callable[[Tensor], bool]) -> PruningResult:
        graphs = self.graphs
        label = int(forget.labels[0])
        inputs = graphs.classifier.prefix_activations(graphs.graph.layers, forget.images)
        found, counting = self.first(self._ends[0]), 0.0
        for found in self.steps():
            started = time.perf_counter()
            ends = is_too_much(found.vertices)
            is_forgotten = self._left(found.vertices, inputs, label, self.config.target) < self.config.target
            counting += time.perf_counter() - started
            if is_forgotten:
                return PruningResult(found.vertices, found.seconds + counting, "")
            if ends:
                break
        percent = self._left(found.vertices, inputs, label)
        return PruningResult(found.vertices, found.seconds + counting, f"{percent:.1f} % of class {label} are left")

    @property
    def _is_measured(self) -> bool:
        """Whether steps are those that are measured to cost the others least."""
        return self.graphs.config.scope == "measured" and len(self.graphs.graph.layers) > 1

    @torch.no_grad()
    def _cheapest(self, scores: Tensor) -> Tensor:
        """Of the first vertices of every layer, its share of a step, those that are measured to be the best.

        Scores of different layers are not comparable; what their zeros do is. The best ones make the class lose the
        most for every nat that the others lose; where nothing makes it lose, those that the others stand best.
        """
        graphs, best, chosen = self.graphs, None, None
        samples = graphs.by_class()[:, : self.config.group_size]
        before = self._losses(self.zeroed, samples)
        for offset, part in zip(accumulate(graphs.graph.sizes, initial=0), graphs.graph.split(scores)):
            share = max(1, round(self.step * part.numel() / len(scores)), int(FEWEST * part[0].numel()))
            share = min(share, int((part > float("-inf")).sum()))
            vertices = offset + part.flatten().topk(share).indices
            forget, retain = (self._losses(torch.cat([self.zeroed, vertices]), samples) - before).tolist()
            merit = (forget < 0, -forget / max(retain, UNNOTICED) if forget < 0 else -retain)
            if share and (best is None or merit > best):
                best, chosen = merit, vertices
        return chosen

    def _losses(self, zeroed: Tensor, samples: Tensor) -> Tensor:
        """The terms of necessity on samples (classes, n): `forgetting_loss`, and the others' mean cross entropy (2)."""
        graphs, row, flat = self.graphs, self.class_index, samples.flatten()
        with graphs.graph.zeroing(zeroed).applied_to(graphs.classifier):
            logits = graphs.suffix(graphs.cached_inputs[flat])
        p = logits.unflatten(0, samples.shape)[row].softmax(1)[:, graphs.classes[row]]
        losses = F.cross_entropy(logits, graphs.labels[flat], reduction="none").view(samples.shape).mean(1)
        return torch.stack([forgetting_loss(p), (losses.sum() - losses[row]) / (len(losses) - 1)])

    def _left(self, zeroed: Tensor, inputs: Tensor, label: int, enough: float = math.inf) -> float:
        """The percentage of a class that is classified correctly, as far as it takes to find enough.

        Samples that are too few to show less than `config.target` percent stand for others (`percent_above_zero`).

        inputs: of the first masked layer, for samples of the class
        """
        graphs, found = self.graphs, []
        is_correct = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        weights = graphs.graph.zeroing(zeroed).weights(graphs.classifier)
        # Those that were correct the last time come first: of them a few are enough.
        order = torch.arange(len(inputs)) if self._counted is None else self._counted
        for part in order.to(inputs.device).split(min(COUNTED_AT_ONCE, graphs.suffix.samples_at_once)):
            found.append(graphs.suffix.outputs(inputs[part], weights)[1])
            is_correct[part] = found[-1].argmax(1) == label
            if (left := 100 * int(is_correct.sum()) / len(inputs)) >= enough:
                break
        self._counted = is_correct.int().argsort(descending=True, stable=True)
        if left < enough and len(inputs) < 100 / self.config.target:
            logits = torch.cat(found)
            spread = float(margins(graphs.predictions, graphs.labels).std())
            left = max(left, percent_above_zero(margins(logits, graphs.labels.new_full([len(logits)], label)), spread))
        return left
