"""Snapshots of a classifier, class graphs, and the score of every weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimu.graph import MaskingGCN, WeightGraph
from mimu.layers import FeatureRecord, LayerRecord, Record
from mimu.masks import Mask
from mimu.samples import Split, some_of_every_class
from mimu.settings import Count
from mimu.tracing import HookedClassifier, log_odds, samples_that_fit

# Of the log-odds in what forgetting asks for: at 1 a few samples that are forgotten say too soon that all are.
FORGETTING_TEMPERATURE = 2.0


def loss_gradient(layer: LayerRecord, record: Record) -> Tensor:
    """Of the cross entropy -log p."""
    return layer.mean_gradient(-(-record.log_odds).sigmoid())  # p - 1


def forgetting_gradient(layer: LayerRecord, record: Record) -> Tensor:
    """Of -log(1 - p), at a temperature."""
    return layer.mean_gradient((record.log_odds / FORGETTING_TEMPERATURE).sigmoid())


# With the odds that are to be kept, t / (1 - t), these are of -t log p - (1 - t) log(1 - p), whose derivatives by the
# log-odds are p - t and p (1 - p).
def retention_gradient(layer: LayerRecord, record: Record) -> Tensor:
    return layer.mean_gradient(record.log_odds.sigmoid() - record.kept_log_odds.sigmoid())


def retention_curvature(layer: LayerRecord, record: Record) -> Tensor:
    return layer.mean_squared_gradient(record.log_odds.sigmoid() * (-record.log_odds).sigmoid())


Mean = Callable[[LayerRecord, Record], Tensor]
# The others stay as they are in a first-order update.
OF_LOG_ODDS: tuple[Mean, ...] = (loss_gradient, forgetting_gradient, retention_gradient, retention_curvature)


class Feature(NamedTuple):
    """A feature of weights, from a mean over a class's samples, or what broadcasts to it.

    mean: of what a layer does on samples of every class, a record of (classes * groups, samples, neurons[, positions]),
        (classes * groups, m, n); None where it is of the weight alone
    of: from that mean and the weight (groups, m, n), from neuron c to r, to the feature (classes, groups, m, n)
    """

    mean: Mean | None
    of: Callable[[Tensor, Tensor], Tensor]


# E is the mean over a group; a sample's gradient of a kernel is the sum over its positions, activations are means.
FEATURES: dict[str, Feature] = {
    # E[a_c], E[h_r]
    "input_activation": Feature(lambda layer, _: layer.mean_input()[:, None], lambda mean, weight: mean),
    "output_activation": Feature(lambda layer, _: layer.mean_output()[..., None], lambda mean, weight: mean),
    "weight": Feature(None, lambda _, weight: weight[None]),
    "gradient": Feature(loss_gradient, lambda mean, weight: mean),  # E[dL/dw]
    # w E[dL/dw]: the first-order fall of the loss when the weight is removed (Molchanov et al. 2017)
    "taylor": Feature(loss_gradient, lambda mean, weight: weight * mean),
    # w E[dF/dw]: the first-order fall of F = -log(1 - p), what forgetting asks for
    "forgetting": Feature(forgetting_gradient, lambda mean, weight: weight * mean),
    # w E[dK/dw]: the first-order fall of K = -t log p - (1 - t) log(1 - p), t the probability that p is to stay
    "retention": Feature(retention_gradient, lambda mean, weight: weight * mean),
    # |w| sqrt(E[p (1 - p) (d log(p / (1 - p))/dw)^2]): the root of K's second-order rise when the weight is removed
    "curvature": Feature(retention_curvature, lambda mean, weight: weight.abs() * mean.sqrt()),
    # |w| E[unit r is active * a_c]: the signal that the weight passes on
    "coactivation": Feature(lambda layer, _: layer.mean_signal(), lambda mean, weight: weight.abs() * mean),
}


@dataclass(frozen=True)
class GraphConfig:
    """What the activation graphs are made of."""

    mask_layer: int | tuple[int, ...] | None  # an index, several, or None for all layers
    scope: Literal["global", "measured"]  # all masked weights compete, or a step is of the layer measured to be best
    features: tuple[str, ...]  # names of FEATURES
    other_classes: bool  # adds to each feature (but the weight) its mean over the other classes
    samples_per_class: Count

    def __post_init__(self) -> None:
        if not self.features or len(set(self.features)) < len(self.features) or set(self.features) - set(FEATURES):
            raise ValueError(f"features must be some of {', '.join(FEATURES)}, each once, not {list(self.features)}")

    @property
    def num_features(self) -> int:
        """The features of a vertex in a class graph."""
        return len(self.features) + self.other_classes * sum(name != "weight" for name in self.features)


def group_means(
    records: Iterable[Record], means: Iterable[Mean], group_size: int
) -> tuple[list[dict[Mean, Tensor]], Tensor]:
    """Of every masked layer its means over each group, and the log-odds (classes, group_size), by parts of these."""
    found: list[dict[Mean, Tensor]] = []
    log_odds = []
    for record in records:
        share = record.log_odds.shape[1] / group_size
        found = found or [{} for _ in record.layers]
        for of_layer, layer in zip(found, record.layers):
            for mean in means:
                part = mean(layer, record).mul_(share)  # in place: of large kernels it takes much memory
                part = part.unflatten(0, (len(record.log_odds), -1))
                of_layer[mean] = of_layer[mean].add_(part) if mean in of_layer else part
        log_odds.append(record.log_odds)
    return found, torch.cat(log_odds, 1)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What groups of samples do in the masked layers of a classifier, masked or not: what features are made of.

    weights: the matrices of each masked layer (groups, m, n), as they are under the mask; m rows of each group
    means: of each masked layer those over the samples of a class, (classes, groups, m, n) or what broadcasts to it
    log_odds: of the label of every sample, (classes, samples)
    records: what the means are of, part after part of the samples, where it is kept
    """

    config: GraphConfig
    graph: WeightGraph
    weights: list[Tensor]
    means: list[dict[Mean, Tensor]]
    log_odds: Tensor
    records: list[Record]

    def feature(self, name: str) -> Tensor:
        """One of the FEATURES that were asked for, of every class, (classes, vertices), not standardised."""
        feature, parts = FEATURES[name], []
        for means, weight in zip(self.means, self.weights):
            part = feature.of(means.get(feature.mean), weight)
            parts.append(part.expand(len(self.log_odds), *weight.shape).flatten(1))
        return torch.cat(parts, 1)

    def class_graph(self, row: int, others: Snapshot | None = None) -> Tensor:
        """Vertex features (1, vertices, features) of one group, standardised over the graph.

        others: of the classes, a group for each, where the group is none of them; `row` is then that of its class
        """
        features = [self.feature(name)[[row if others is None else 0]] for name in self.config.features]
        for name in self.config.features:
            if self.config.other_classes and name != "weight":
                of_classes = (others or self).feature(name)
                features.append((of_classes.sum(0) - of_classes[[row]]) / (len(of_classes) - 1))
        x = torch.stack(features)
        features.clear()  # large ones would stay in memory with the copy
        # torch.std_mean takes ten times as long.
        x -= x.mean(-1, keepdim=True)
        deviation = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / max(1, x.shape[-1] - 1) ** 0.5
        x /= deviation.clamp_min(1e-12)
        return x.permute(1, 2, 0).contiguous()

    def first_order_update(self, vertices: Tensor) -> Snapshot:
        """What the groups would do without further weights, to first order: no sample goes through the network for it.

        A weight w from neuron c to r that is zeroed takes w a_c from the pre-activation of r, and with the gradient g_r
        of the log-odds there, g_r w a_c from the log-odds, summed over positions. Gradients and activations stay. Where
        no record is kept there is no update.
        """
        is_removed = torch.zeros(self.graph.num_vertices, dtype=torch.bool, device=vertices.device)
        is_removed[vertices] = True
        removed = [part.nonzero()[:, 0] for part in is_removed.split(self.graph.sizes)]
        records = []
        for record in self.records:
            log_odds = record.log_odds
            for layer, weight, at in zip(record.layers, self.weights, removed):
                log_odds = log_odds - layer.log_odds_drop(weight, at)
            records.append(record._replace(log_odds=log_odds))
        changed = [mean for mean in self.means[0] if mean in OF_LOG_ODDS]
        means, log_odds = group_means(records, changed, self.log_odds.shape[1])
        means = [before | now for before, now in zip(self.means, means)]
        weights = [weight.flatten().index_fill(0, at, 0).view_as(weight) for weight, at in zip(self.weights, removed)]
        return replace(self, weights=weights, means=means, log_odds=log_odds, records=records)


@dataclass(eq=False)
class ActivationGraphs:
    """Activation graphs of a classifier: what samples do in the masked layers, recorded in batched passes.

    What is kept of each sample are a few hundred floats, class after class; vertex features are formed when they are
    needed.
    """

    classifier: HookedClassifier
    train: Split
    config: GraphConfig
    seed: int

    def __post_init__(self) -> None:
        classifier = self.classifier.eval()
        self.graph = WeightGraph(classifier, self.config.mask_layer)
        classes, counts = self.train.labels.unique(return_counts=True)
        self.classes = classes.tolist()  # those that there are samples of; graphs and features stand in their order
        self.num_classes = len(self.classes)
        if self.num_classes < 2:
            raise ValueError(f"there must be samples of two classes at least, not of {self.classes} alone")
        counts = counts.clamp(max=self.config.samples_per_class).tolist()
        self.samples_per_class = max(counts)
        self.samples = some_of_every_class(self.train, self.samples_per_class, "graphs", self.seed)
        self.labels = self.samples.labels
        places = torch.arange(self.samples_per_class, device=self.labels.device)
        rows = [start + places % count for start, count in zip(accumulate(counts, initial=0), counts)]
        self._by_class = torch.stack(rows)
        # No mask changes what comes before.
        self.cached_inputs = classifier.prefix_activations(self.graph.layers, self.samples.images)
        self.suffix = classifier.suffix_from(self.graph.layers)
        with torch.no_grad():
            self.predictions = self.suffix(self.cached_inputs)  # logits without a mask
        positions = [classifier.positions(index) for index in self.graph.layers]
        # Of a sample, where a gradient by the weights is formed.
        self._num_gradients = sum(size for size, count in zip(self.graph.sizes, positions) if count)
        self.at_once = min(self.suffix.recorded_at_once(self.graph.layers), samples_that_fit(self._num_gradients))
        # What layers read at many positions would be too much: it is recorded anew.
        self.are_kept = not any(positions)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def record(self) -> Record:
        """What every sample does in the masked layers without a mask, where it is kept."""
        everything = torch.arange(len(self), device=self.labels.device)
        parts = [self._record(rows) for rows in everything.split(self.at_once)]
        of_layers = zip(*[part.layers for part in parts])
        layers = [FeatureRecord(*map(torch.cat, zip(*of_layer))) for of_layer in of_layers]
        log_odds = torch.cat([part.log_odds for part in parts])
        return Record(layers, log_odds, log_odds)

    @property
    def nothing(self) -> Tensor:
        """No vertex of the weight graph."""
        return torch.empty(0, dtype=torch.long, device=self.labels.device)

    def by_class(self) -> Tensor:
        """Indices of all samples, (classes, samples_per_class), again and again those of a class that has fewer."""
        return self._by_class

    def draw(self, group_size: int, generator: torch.Generator) -> Tensor:
        """Indices of `group_size` random samples of every class, (classes, group_size), each once in `by_class`."""
        keys = torch.rand(self.by_class().shape, generator=generator, dtype=torch.float32)
        return self.by_class().gather(1, keys.argsort(1)[:, :group_size].to(self.labels.device))

    def weights(self) -> list[Tensor]:
        """The weight matrices of the masked layers as they are now, (m, n) each."""
        return [self.classifier.weights[index].detach() for index in self.graph.layers]

    def mask_of(self, zeroed: Tensor) -> Mask | None:
        """The mask that switches off the vertices `zeroed`; None where there is none."""
        return self.graph.zeroing(zeroed) if len(zeroed) else None

    def class_index_of(self, forget_class: int) -> int:
        """The row of a class in what stands class after class."""
        return self.classes.index(forget_class)

    def snapshot(
        self, samples: Tensor, names: Sequence[str], mask: Mask | None = None, class_index: int | None = None
    ) -> Snapshot:
        """What groups of samples (groups, group_size) do on the classifier, or on the masked one, to form features of.

        names: of FEATURES
        class_index: that of a class without which the others are seen, their softmax restricted to the rest; they are
            to keep the log-odds that the classifier without a mask gives them so
        """
        excluded_classes: list[int] = []
        if class_index is not None:  # of two classes none is left out, but always those that there is no sample of
            absent = set(range(self.predictions.shape[1])) - set(self.classes)
            excluded_classes = sorted(absent | {self.classes[class_index]} if self.num_classes > 2 else absent)
        is_kept = samples.numel() <= samples_that_fit(self._num_gradients)
        kept: list[Record] = []

        def records() -> Iterator[Record]:
            for record in self._records(samples, mask, excluded_classes):
                yield record
                if is_kept:
                    kept.append(record._replace(layers=[layer.for_updates() for layer in record.layers]))

        means = dict.fromkeys(FEATURES[name].mean for name in names if FEATURES[name].mean)
        of_layers, log_odds = group_means(records(), means, samples.shape[1])
        weights = self.weights() if mask is None else mask.weights(self.classifier).values()
        matrices = [weight.unflatten(0, (groups, -1)).flatten(2) for weight, groups in zip(weights, self.graph.groups)]
        return Snapshot(self.config, self.graph, matrices, of_layers, log_odds, kept)

    def _records(self, samples: Tensor, mask: Mask | None, excluded_classes: Sequence[int]) -> Iterator[Record]:
        """What groups do, part after part of their samples; where nothing is new, what is kept."""
        if mask is None and self.are_kept and not excluded_classes:
            layers = [FeatureRecord(*(x[samples] for x in layer)) for layer in self.record.layers]
            yield Record(layers, self.record.log_odds[samples], self.record.log_odds[samples])
            return
        with nullcontext() if mask is None else mask.applied_to(self.classifier):
            for part in samples.split(max(1, self.at_once // len(samples)), 1):
                rows = part.flatten()
                record = self._record(rows, excluded_classes)
                kept = record.log_odds
                if mask is not None:  # without one the log-odds are what is to be kept
                    kept = log_odds(self.predictions[rows], self.labels[rows], excluded_classes)
                layers = [layer.by_class(len(samples)) for layer in record.layers]
                yield Record(layers, record.log_odds.view(part.shape), kept.view(part.shape))

    def _record(self, rows: Tensor, excluded_classes: Sequence[int] = ()) -> Record:
        return self.suffix.record(self.cached_inputs[rows], self.labels[rows], self.graph.layers, excluded_classes)

    def recorded(self) -> dict[str, Any]:
        """What was recorded, as it is saved: `layers`, `labels` and `log_odds` (samples), and `records`, each layer's
        as a dict, where they are kept."""
        about = {"layers": list(self.graph.layers), "labels": self.labels}
        if not self.are_kept:
            return about | {"records": []}
        records = [layer._asdict() for layer in self.record.layers]
        return about | {"log_odds": self.record.log_odds, "records": records}


TERMS = ("forgetting", "retention", "curvature")  # the features that the saliency is made of


def retain_saliency(snapshot: Snapshot, class_index: int) -> Tensor:
    """By how much removing a weight lowers the other classes' loss K, to second order, (vertices).

    K is least where their samples' odds are those of the original without the forget class (`retention`, `curvature` of
    FEATURES). The mean is over the other classes, each weighted by (its cross entropy + 0.02)^0.5: the more the more
    the mask so far has hurt it.
    """
    weighting = (F.softplus(-snapshot.log_odds).mean(1) + 0.02).sqrt()
    weighting[class_index] = 0
    falls = snapshot.feature("retention") - snapshot.feature("curvature") ** 2 / 2
    return weighting @ falls / weighting.sum()


def saliency(snapshot: Snapshot, class_index: int, retain_weight: float, gcn: MaskingGCN | None = None) -> Tensor:
    """How much a weight is to be zeroed to forget a class, (vertices); the largest go first.

        a_v w E_d[dF/dw] + retain_weight b_v retain_saliency

    E_d[dF/dw], `forgetting` of FEATURES, is the gradient of -log(1 - p_d) on the class's samples (first-order saliency
    as in SNIP, Lee et al. 2019, arXiv:1810.02340, of what forgetting asks for).

    snapshot: for that class (`ActivationGraphs.snapshot`), of which the TERMS, and what the GCN reads, were asked for
    gcn: gives the factors a_v and b_v from the class graph; without it, or before its training, they are 1
    """
    forget, retain = snapshot.feature("forgetting")[class_index], retain_saliency(snapshot, class_index)
    if gcn is not None:
        of_forget, of_retain = gcn(snapshot.class_graph(class_index), snapshot.graph)[0].unbind(-1)
        forget, retain = of_forget * forget, of_retain * retain
    return forget + retain_weight * retain


def ranked(scores: Tensor, zeroed: Tensor, count: int) -> Tensor:
    """The vertices to zero next, (count): those of the largest scores (vertices) that are not among `zeroed`."""
    count = min(count, len(scores) - len(zeroed))
    return scores.index_fill(0, zeroed, float("-inf")).topk(count).indices
