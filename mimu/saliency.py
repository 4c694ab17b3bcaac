"""Snapshots of a classifier, class graphs, and the score of every weight by the formula or with the masking GCN."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimu.graph import MaskingGCN, WeightGraph
from mimu.hooked import HookedClassifier, log_odds, samples_that_fit
from mimu.layers import FeatureRecord, LayerRecord, Record
from mimu.samples import FEW, HELD_OUT, Split, held_out, some_of_every_class
from mimu.settings import Count

# Divides the log-odds in the forgetting loss; at 1, a few samples that are forgotten suggest too soon that all are.
FORGETTING_TEMPERATURE = 2.0


def loss_gradient(layer: LayerRecord, record: Record, factor: Tensor) -> Tensor:
    """Returns the mean gradient of the cross entropy -log p."""
    return layer.gradient(factor * -(-record.log_odds).sigmoid())  # p - 1


def forgetting_gradient(layer: LayerRecord, record: Record, factor: Tensor) -> Tensor:
    """Returns the mean gradient of -log(1 - p), at a temperature."""
    return layer.gradient(factor * (record.log_odds / FORGETTING_TEMPERATURE).sigmoid())


# K = -t log p - (1 - t) log(1 - p), with the odds t / (1 - t) that a sample is to keep, has the derivatives p - t and
# p (1 - p) by the log-odds.
def retention_gradient(layer: LayerRecord, record: Record, factor: Tensor) -> Tensor:
    """Returns the mean gradient of K."""
    return layer.gradient(factor * (record.log_odds.sigmoid() - record.kept_log_odds.sigmoid()))


def retention_curvature(layer: LayerRecord, record: Record, factor: Tensor) -> Tensor:
    """Returns the mean second derivative of K by each weight, for log-odds that are linear in it."""
    return layer.squared_gradient(factor * record.log_odds.sigmoid() * (-record.log_odds).sigmoid())


# From the record of a layer, that of all layers, and the share of every sample (samples) to a mean over the samples.
Mean = Callable[[LayerRecord, Record, Tensor], Tensor]
RETENTION_MEANS: set[Mean] = {retention_gradient, retention_curvature}
# These means depend on the log-odds; a first-order update leaves all other ones as they are.
MEANS_OF_LOG_ODDS: set[Mean] = RETENTION_MEANS | {loss_gradient, forgetting_gradient}


class Feature(NamedTuple):
    """A feature of weights.

    mean: a function from a layer's record to a mean over samples, (groups, m, n) or what broadcasts to it; None: the
        feature depends on the weight alone
    of: a function from that mean and the weights, (groups, m, n), from neuron c to r, to the feature
    """

    mean: Mean | None
    of: Callable[[Tensor, Tensor], Tensor]


# E is the mean over samples. A sample's gradient of a kernel is the sum over positions, its activations are means.
FEATURES: dict[str, Feature] = {
    # E[a_c], E[h_r]
    "input_activation": Feature(lambda layer, _, factor: layer.input(factor), lambda mean, weight: mean),
    "output_activation": Feature(lambda layer, _, factor: layer.output(factor), lambda mean, weight: mean),
    "weight": Feature(None, lambda _, weight: weight),
    "gradient": Feature(loss_gradient, lambda mean, weight: mean),  # E[dL/dw]
    # w E[dL/dw]: the first-order decrease of the loss when the weight is removed (Molchanov et al. 2017)
    "taylor": Feature(loss_gradient, lambda mean, weight: weight * mean),
    # w E[dF/dw]: the first-order decrease of F = -log(1 - p), which forgetting lowers
    "forgetting": Feature(forgetting_gradient, lambda mean, weight: weight * mean),
    # w E[dK/dw]: the first-order decrease of K
    "retention": Feature(retention_gradient, lambda mean, weight: weight * mean),
    # |w| sqrt(E[p (1 - p) (d log(p / (1 - p))/dw)^2]): the root of K's second-order increase
    "curvature": Feature(retention_curvature, lambda mean, weight: weight.abs() * mean.sqrt()),
    # |w| E[unit r is active * a_c]: the signal that the weight passes on
    "coactivation": Feature(lambda layer, _, factor: layer.signal(factor), lambda mean, weight: weight.abs() * mean),
}


@dataclass(frozen=True)
class GraphConfig:
    """The settings of the activation graphs.

    mask_layer: the index of the masked layer, the indices of several, or None for all layers
    scope: `global`: all masked weights compete; `measured`: a step zeroes weights of the layer where that costs least
    features: names of FEATURES
    other_classes: every feature except the weight appears twice: for the class, and averaged over the other classes
    samples_per_class: the samples of every class that are recorded
    """

    mask_layer: int | tuple[int, ...] | None
    scope: Literal["global", "measured"]
    features: tuple[str, ...]
    other_classes: bool
    samples_per_class: Count

    def __post_init__(self) -> None:
        if not self.features or len(set(self.features)) < len(self.features) or set(self.features) - set(FEATURES):
            raise ValueError(f"features must be some of {', '.join(FEATURES)}, each once, not {list(self.features)}")

    @property
    def num_features(self) -> int:
        """The number of features of a vertex in a class graph."""
        return len(self.features) + self.other_classes * sum(name != "weight" for name in self.features)


Sums = list[dict[Mean, Tensor]]  # of every masked layer: weighted sums over samples, which are means


def sums_over(records: Iterable[Record], all_shares: Sequence[Mapping[Mean, Tensor]]) -> list[Sums]:
    """Sums over samples, whose records come part by part, by the shares of every sample (samples) in each mean."""
    all_sums: list[Sums] = [[] for _ in all_shares]
    start = 0
    for record in records:
        part = slice(start, start := start + len(record.log_odds))
        for sums, shares in zip(all_sums, all_shares):
            sums.extend({} for _ in record.layers[len(sums) :])
            for by_mean, layer in zip(sums, record.layers):
                for mean, share in shares.items():
                    value = mean(layer, record, share[part])
                    by_mean[mean] = by_mean[mean].add_(value) if mean in by_mean else value
    return all_sums


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A pass of samples through a classifier, which may be masked: what it tells of a class and of the other classes.

    features: names of the FEATURES of its class graph
    weights: the weights of each masked layer under the mask, (groups, m, n)
    log_odds: the log-odds of the label of the class's samples, (samples), and of the others', (classes, samples)
    places: where the class's samples, and the others', stand in the records, which hold a repeated sample once
    records: those of parts of the class's samples, and of the others'; empty if they were too large to keep
    own, others: means over the samples of the class, and of the other classes
    retained: means over those of the other classes, in which each class is weighted by (its cross entropy + 0.02)^0.5:
        the more the mask so far has damaged a class, the more it counts
    """

    config: GraphConfig
    graph: WeightGraph
    features: tuple[str, ...]
    weights: list[Tensor]
    log_odds: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor]
    records: tuple[list[Record], list[Record]]
    own: Sums = field(default_factory=list)
    others: Sums = field(default_factory=list)
    retained: Sums = field(default_factory=list)

    def averaged(self, records: Sequence[Iterable[Record]], are_updated: bool = False) -> "Snapshot":
        """Returns the snapshot with means over the samples of these records, of the class and of the others.

        are_updated: only the means that depend on the log-odds are computed; all others stay
        """
        own, others = self.log_odds
        damage = (F.softplus(-others).mean(1, keepdim=True) + 0.02).sqrt()
        of_features = {FEATURES[name].mean for name in self.features} - {None}
        of_others = of_features if self.config.other_classes else set()
        wanted = [
            (self.places[0], torch.full_like(own, 1 / len(own)), {forgetting_gradient} | of_features),
            (self.places[1], torch.full_like(others, 1 / max(1, others.numel())), of_others),
            (self.places[1], (damage / damage.sum() / others.shape[1]).expand_as(others), RETENTION_MEANS),
        ]
        shares = []
        for places, share, means in wanted:
            share = torch.zeros_like(places, dtype=own.dtype).index_add(0, places, share.flatten())
            shares.append(dict.fromkeys(means & MEANS_OF_LOG_ODDS if are_updated else means, share))
        sums = sums_over(records[0], shares[:1]) + sums_over(records[1], shares[1:])
        if are_updated:
            kept = self.own, self.others, self.retained
            sums = [[old | new for old, new in zip(before, after)] for before, after in zip(kept, sums)]
        return replace(self, own=sums[0], others=sums[1], retained=sums[2])

    def feature(self, name: str, sums: Sums) -> Tensor:
        """Returns one of the FEATURES, (vertices), not standardised, for means over some of the samples."""
        feature, parts = FEATURES[name], []
        for by_mean, weight in zip(sums, self.weights):
            parts.append(feature.of(by_mean.get(feature.mean), weight).expand(weight.shape).flatten())
        return torch.cat(parts)

    def class_graph(self) -> Tensor:
        """Returns the vertex features of the class, (1, vertices, features), standardised over the vertices."""
        features = [self.feature(name, self.own) for name in self.features]
        if self.config.other_classes:
            features += [self.feature(name, self.others) for name in self.features if name != "weight"]
        x = torch.stack(features)
        features.clear()  # large ones would stay in memory with the copy
        # torch.std_mean takes ten times as long.
        x -= x.mean(-1, keepdim=True)
        deviation = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / max(1, x.shape[-1] - 1) ** 0.5
        x /= deviation.clamp_min(1e-12)
        return x.T[None].contiguous()

    def first_order_update(self, vertices: Tensor) -> "Snapshot":
        """Estimates the snapshot without further weights, to first order, without a pass through the network.

        Zeroing a weight w from neuron c to r takes w a_c from the pre-activation of r. With the gradient g_r of the
        log-odds there, it takes g_r w a_c from the log-odds, summed over positions. Gradients and activations stay as
        they are. The records must have been kept.
        """
        is_removed = vertices.new_zeros(self.graph.num_vertices).index_fill(0, vertices, 1)
        removed = [part.nonzero()[:, 0] for part in is_removed.split(self.graph.sizes)]
        records: tuple[list[Record], list[Record]] = ([], [])
        log_odds = []
        for updated, kept, places, before in zip(records, self.records, self.places, self.log_odds):
            for record in kept:
                odds = record.log_odds
                for layer, weight, at in zip(record.layers, self.weights, removed):
                    odds = odds - layer.log_odds_drop(weight, at)
                updated.append(record._replace(log_odds=odds))
            log_odds.append(torch.cat([record.log_odds for record in updated])[places].view_as(before))
        weights = [weight.flatten().index_fill(0, at, 0).view_as(weight) for weight, at in zip(self.weights, removed)]
        updated = replace(self, weights=weights, log_odds=tuple(log_odds), records=records)
        return updated.averaged(records, are_updated=True)


@dataclass(eq=False)
class ActivationGraphs:
    """The activation graphs of a classifier, which batched passes record.

    A few hundred floats are kept of each sample, class after class. Vertex features are formed when they are needed.

    classes: the labels that there are samples of; tensors that stand class after class have their order
    by_class: the indices of all samples, (classes, samples_per_class); those of a smaller class are repeated
    held_out, held_out_inputs: further samples, which are not recorded, and what the masked layers are given for them
    nothing: no vertices, (0)
    predictions: the logits without a mask, (samples, num_classes)
    """

    classifier: HookedClassifier
    train: Split
    config: GraphConfig
    seed: int

    def __post_init__(self) -> None:
        classifier = self.classifier.eval()
        self.graph = WeightGraph(classifier.trace.layers, self.config.mask_layer)
        self.classes = self.train.labels.unique().tolist()
        self.num_classes = len(self.classes)
        if self.num_classes < 2:
            raise ValueError(f"there must be samples of two classes at least, not of {self.classes} alone")
        is_held_out, count = held_out(self.train.labels, FEW), self.config.samples_per_class
        self.samples = some_of_every_class(self.train[~is_held_out], count, "graphs", self.seed)
        self.held_out = some_of_every_class(self.train[is_held_out], -(-count // HELD_OUT), "held out", self.seed)
        self.labels = self.samples.labels
        counts = self.labels.unique(return_counts=True)[1].tolist()
        self.samples_per_class = max(counts)
        self.nothing = torch.empty(0, dtype=torch.long, device=self.labels.device)
        places = torch.arange(self.samples_per_class, device=self.labels.device)
        rows = [start + places % count for start, count in zip(accumulate(counts, initial=0), counts)]
        self.by_class = torch.stack(rows)
        # No mask changes the inputs of the first masked layer.
        self.cached_inputs, self.held_out_inputs = (
            classifier.prefix_activations(self.graph.layers, each.images) for each in (self.samples, self.held_out)
        )
        self.suffix = classifier.suffix_from(self.graph.layers)
        with torch.no_grad():
            self.predictions = self.suffix(self.cached_inputs)
        # The numbers of a sample in layers where its gradient by the weights is formed.
        layers = zip(self.graph.layers, self.graph.sizes)
        self._num_gradients = sum(size for layer, size in layers if classifier.layers[layer].positions)
        self.at_once = min(self.suffix.recorded_at_once(self.graph.layers), samples_that_fit(self._num_gradients))

    def draw(self, group_size: int, generator: torch.Generator) -> Tensor:
        """Draws columns of `by_class` for every class, without replacement: indices, (classes, group_size)."""
        keys = torch.rand(self.by_class.shape, generator=generator, dtype=torch.float32)
        return self.by_class.gather(1, keys.argsort(1)[:, :group_size].to(self.labels.device))

    def weights(self) -> list[Tensor]:
        """Returns the weights of the masked layers as they are now, in their own shapes."""
        return [self.classifier.weights[index].detach() for index in self.graph.layers]

    def snapshot(
        self,
        samples: Tensor,
        class_index: int,
        zeroed: Tensor | None = None,
        features: Sequence[str] = (),
        forgets: bool = True,
    ) -> Snapshot:
        """Runs samples of every class through the classifier, and records what features are formed from.

        Args:
            samples: indices, (classes, group_size)
            class_index: of the class that the snapshot is taken for
            zeroed: the vertices that are masked; None: none
            features: names of the FEATURES of its class graph
            forgets: whether the class is to be forgotten. It is then removed from the softmax of the other classes'
                samples, which are to keep the log-odds that the classifier has without a mask and without that class
        """
        zeroed = self.nothing if zeroed is None else zeroed
        masked = self.graph.zeroing(zeroed).weights(self.classifier)
        excluded_classes: list[int] = []
        if forgets:  # classes without samples are always excluded; of two classes, none is
            absent = set(range(self.predictions.shape[1])) - set(self.classes)
            excluded_classes = sorted(absent | {self.classes[class_index]} if self.num_classes > 2 else absent)
        groups = samples[class_index], torch.cat([samples[:class_index], samples[class_index + 1 :]])
        is_kept = samples.numel() <= samples_that_fit(self._num_gradients)
        kept: tuple[list[Record], list[Record]] = ([], [])

        def records(rows: Tensor, keep: list[Record]) -> Iterator[Record]:
            for record in self._records(rows, zeroed, masked, excluded_classes):
                yield record
                if is_kept:
                    keep.append(record._replace(layers=[layer.for_updates() for layer in record.layers]))

        rows, places = zip(*(group.flatten().unique(return_inverse=True) for group in groups))
        parts: list[Iterable[Record]] = [records(each, keep) for each, keep in zip(rows, kept)]
        if self._num_gradients:  # records may be too large to wait for the log-odds of all samples
            logits = [self.logits(self.cached_inputs[each], zeroed) for each in rows]
            odds = [log_odds(z, self.labels[each], excluded_classes) for z, each in zip(logits, rows)]
        else:
            parts = [[*each] for each in parts]
            nothing = self.predictions.new_empty(0)
            odds = [torch.cat([nothing, *(record.log_odds for record in each)]) for each in parts]
        matrices = zip(masked.values(), self.graph.groups)
        weights = [weight.unflatten(0, (groups, -1)).flatten(2) for weight, groups in matrices]
        own, others = (each[at].view(group.shape) for each, at, group in zip(odds, places, groups))
        snapshot = Snapshot(self.config, self.graph, tuple(features), weights, (own, others), places, kept)
        return snapshot.averaged(parts)

    @torch.no_grad()
    def logits(self, inputs: Tensor, zeroed: Tensor) -> Tensor:
        """Computes the logits (samples, classes) with some vertices zeroed. inputs: as in `cached_inputs`."""
        weights = self.graph.zeroing(zeroed).weights(self.classifier)
        return torch.cat([self.suffix.outputs(part, weights)[1] for part in inputs.split(self.suffix.samples_at_once)])

    def _records(
        self, samples: Tensor, zeroed: Tensor, weights: Mapping[str, Tensor], excluded_classes: Sequence[int] = ()
    ) -> Iterator[Record]:
        """Yields the records of parts of the samples, which are indices, (samples), with some vertices zeroed.

        weights: of the masked layers without these vertices, by name
        """
        for rows in samples.split(self.at_once) if len(samples) else ():
            inputs, labels = self.cached_inputs[rows], self.labels[rows]
            record = self.suffix.record(inputs, labels, self.graph.layers, excluded_classes, weights)
            if len(zeroed):  # without a mask, the samples are to keep the log-odds that they have
                kept_log_odds = log_odds(self.predictions[rows], labels, excluded_classes)
                record = record._replace(kept_log_odds=kept_log_odds)
            yield record

    def recorded(self) -> dict[str, Any]:
        """Returns what is saved: `layers`, `labels`, and for layers of features `log_odds` and `records`, by layer."""
        content = {"layers": list(self.graph.layers), "labels": self.labels, "records": []}
        if not self._num_gradients:  # the records of layers that read at many positions would be too large
            every = torch.arange(len(self.labels), device=self.labels.device)
            parts = [*self._records(every, self.nothing, {})]
            content["log_odds"] = torch.cat([part.log_odds for part in parts])
            for layers in zip(*(part.layers for part in parts)):
                values = zip(FeatureRecord._fields, zip(*layers))
                content["records"].append({name: torch.cat(each) for name, each in values})
        return content


def saliency(snapshot: Snapshot, retain_weight: float, gcn: MaskingGCN | None = None) -> Tensor:
    """Scores every weight, (vertices); the weights of the highest scores are zeroed first to forget a class.

        a_v w E_d[dF/dw] + retain_weight b_v (w E[dK/dw] - w^2 E[d2K/dw2] / 2)

    E_d[dF/dw], `forgetting` of FEATURES, is the mean gradient of -log(1 - p_d) on the class's samples: first-order
    saliency as in SNIP (Lee et al. 2019, arXiv:1810.02340), of the loss that forgetting lowers. The bracket estimates
    how much removing the weight lowers the retained classes' loss K, to second order (`retention` and `curvature` of
    FEATURES). K is smallest where their samples keep the odds of the original without the forget class.

    Args:
        snapshot: taken for that class (`ActivationGraphs.snapshot`), with the features that the GCN reads
        gcn: gives the factors a_v and b_v; without it, or before its training, they are 1
    """
    forget, curvature = snapshot.feature("forgetting", snapshot.own), snapshot.feature("curvature", snapshot.retained)
    retain = snapshot.feature("retention", snapshot.retained) - curvature**2 / 2
    if gcn is not None:
        forget_factors, retain_factors = gcn(snapshot.class_graph(), snapshot.graph)[0].unbind(-1)
        forget, retain = forget_factors * forget, retain_factors * retain
    return forget + retain_weight * retain


def ranked(scores: Tensor, zeroed: Tensor, count: int) -> Tensor:
    """Returns the vertices to zero next, (count): those of the highest scores (vertices) that are not yet `zeroed`."""
    count = min(count, len(scores) - len(zeroed))
    return scores.index_fill(0, zeroed, float("-inf")).topk(count).indices
