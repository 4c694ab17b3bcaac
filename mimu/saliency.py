"""Snapshots of a classifier, class graphs, and the score of every weight by the formula or with the masking GCN."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimu.graph import MaskingGCN, WeightGraph
from mimu.hooked import HookedClassifier, log_odds, samples_that_fit
from mimu.layers import FeatureRecord, LayerRecord, Record
from mimu.masks import Mask
from mimu.samples import Split, some_of_every_class
from mimu.settings import Count

# Divides the log-odds in the forgetting loss; at 1, a few samples that are forgotten suggest too soon that all are.
FORGETTING_TEMPERATURE = 2.0


def loss_gradient(layer: LayerRecord, record: Record) -> Tensor:
    """Returns the mean gradient of the cross entropy -log p."""
    return layer.mean_gradient(-(-record.log_odds).sigmoid())  # p - 1


def forgetting_gradient(layer: LayerRecord, record: Record) -> Tensor:
    """Returns the mean gradient of -log(1 - p), at a temperature."""
    return layer.mean_gradient((record.log_odds / FORGETTING_TEMPERATURE).sigmoid())


# K = -t log p - (1 - t) log(1 - p), with the odds t / (1 - t) that a sample is to keep, has the derivatives p - t and
# p (1 - p) by the log-odds.
def retention_gradient(layer: LayerRecord, record: Record) -> Tensor:
    """Returns the mean gradient of K."""
    return layer.mean_gradient(record.log_odds.sigmoid() - record.kept_log_odds.sigmoid())


def retention_curvature(layer: LayerRecord, record: Record) -> Tensor:
    """Returns the mean second derivative of K by each weight, for log-odds that are linear in it."""
    return layer.mean_squared_gradient(record.log_odds.sigmoid() * (-record.log_odds).sigmoid())


Mean = Callable[[LayerRecord, Record], Tensor]
# These means depend on the log-odds; a first-order update leaves all other ones as they are.
MEANS_OF_LOG_ODDS: tuple[Mean, ...] = (loss_gradient, forgetting_gradient, retention_gradient, retention_curvature)


class Feature(NamedTuple):
    """A feature of weights.

    mean: a function from a layer's record to its mean over the samples of each class, (classes * groups, m, n) or what
        broadcasts to it; None: the feature depends on the weight alone
    of: a function from that mean and the weights, (groups, m, n), from neuron c to r, to the feature, (classes, groups,
        m, n) or what broadcasts to it
    """

    mean: Mean | None
    of: Callable[[Tensor, Tensor], Tensor]


# E is the mean over a group. A sample's gradient of a kernel is the sum over positions, its activations are means.
FEATURES: dict[str, Feature] = {
    # E[a_c], E[h_r]
    "input_activation": Feature(lambda layer, _: layer.mean_input()[:, None], lambda mean, weight: mean),
    "output_activation": Feature(lambda layer, _: layer.mean_output()[..., None], lambda mean, weight: mean),
    "weight": Feature(None, lambda _, weight: weight[None]),
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
    "coactivation": Feature(lambda layer, _: layer.mean_signal(), lambda mean, weight: weight.abs() * mean),
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


def group_means(
    records: Iterable[Record], means: Iterable[Mean], group_size: int
) -> tuple[list[dict[Mean, Tensor]], Tensor]:
    """Averages over groups of samples, whose records come part by part.

    Returns:
        The means of every masked layer, (classes, groups, m, n) or what broadcasts to it, and the log-odds of all
        samples, (classes, group_size).
    """
    layer_means: list[dict[Mean, Tensor]] = []
    log_odds = []
    for record in records:
        share = record.log_odds.shape[1] / group_size
        layer_means = layer_means or [{} for _ in record.layers]
        for sums, layer in zip(layer_means, record.layers):
            for mean in means:
                part = mean(layer, record).mul_(share)  # in place, since the means of large kernels take much memory
                part = part.unflatten(0, (len(record.log_odds), -1))
                sums[mean] = sums[mean].add_(part) if mean in sums else part
        log_odds.append(record.log_odds)
    return layer_means, torch.cat(log_odds, 1)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A pass of samples through a classifier, which may be masked, and what it recorded in the masked layers.

    weights: the weights of each masked layer under the mask, (groups, m, n)
    means: the means of each masked layer over the samples of a class, (classes, groups, m, n) or what broadcasts to it
    log_odds: the log-odds of the label of every sample, (classes, samples)
    records: the records that the means were taken of, for parts of the samples; empty if they were too large to keep
    """

    config: GraphConfig
    graph: WeightGraph
    weights: list[Tensor]
    means: list[dict[Mean, Tensor]]
    log_odds: Tensor
    records: list[Record]

    def feature(self, name: str) -> Tensor:
        """Returns one of the FEATURES for every class, (classes, vertices), not standardised."""
        feature, parts = FEATURES[name], []
        for means, weight in zip(self.means, self.weights):
            part = feature.of(means.get(feature.mean), weight)
            parts.append(part.expand(len(self.log_odds), *weight.shape).flatten(1))
        return torch.cat(parts, 1)

    def class_graph(self, class_index: int) -> Tensor:
        """Returns the vertex features of one class, (1, vertices, features), standardised over the vertices."""
        features = [self.feature(name)[[class_index]] for name in self.config.features]
        for name in self.config.features:
            if self.config.other_classes and name != "weight":
                values = self.feature(name)
                features.append((values.sum(0) - values[[class_index]]) / (len(values) - 1))
        x = torch.stack(features)
        features.clear()  # large ones would stay in memory with the copy
        # torch.std_mean takes ten times as long.
        x -= x.mean(-1, keepdim=True)
        deviation = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / max(1, x.shape[-1] - 1) ** 0.5
        x /= deviation.clamp_min(1e-12)
        return x.permute(1, 2, 0).contiguous()

    def first_order_update(self, vertices: Tensor) -> "Snapshot":
        """Estimates the snapshot without further weights, to first order, without a pass through the network.

        Zeroing a weight w from neuron c to r takes w a_c from the pre-activation of r. With the gradient g_r of the
        log-odds there, it takes g_r w a_c from the log-odds, summed over positions. Gradients and activations stay as
        they are. The records must have been kept.
        """
        is_removed = vertices.new_zeros(self.graph.num_vertices).index_fill(0, vertices, 1)
        removed = [part.nonzero()[:, 0] for part in is_removed.split(self.graph.sizes)]
        records = []
        for record in self.records:
            log_odds = record.log_odds
            for layer, weight, at in zip(record.layers, self.weights, removed):
                log_odds = log_odds - layer.log_odds_drop(weight, at)
            records.append(record._replace(log_odds=log_odds))
        changed = [mean for mean in self.means[0] if mean in MEANS_OF_LOG_ODDS]
        means, log_odds = group_means(records, changed, self.log_odds.shape[1])
        means = [before | now for before, now in zip(self.means, means)]
        weights = [weight.flatten().index_fill(0, at, 0).view_as(weight) for weight, at in zip(self.weights, removed)]
        return replace(self, weights=weights, means=means, log_odds=log_odds, records=records)


@dataclass(eq=False)
class ActivationGraphs:
    """The activation graphs of a classifier, which batched passes record.

    A few hundred floats are kept of each sample, class after class. Vertex features are formed when they are needed.

    classes: the labels that there are samples of; tensors that stand class after class have their order
    by_class: the indices of all samples, (classes, samples_per_class); those of a smaller class are repeated
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
        classes, counts = self.train.labels.unique(return_counts=True)
        self.classes = classes.tolist()
        self.num_classes = len(self.classes)
        if self.num_classes < 2:
            raise ValueError(f"there must be samples of two classes at least, not of {self.classes} alone")
        counts = counts.clamp(max=self.config.samples_per_class).tolist()
        self.samples_per_class = max(counts)
        self.samples = some_of_every_class(self.train, self.samples_per_class, "graphs", self.seed)
        self.labels = self.samples.labels
        self.nothing = torch.empty(0, dtype=torch.long, device=self.labels.device)
        places = torch.arange(self.samples_per_class, device=self.labels.device)
        rows = [start + places % count for start, count in zip(accumulate(counts, initial=0), counts)]
        self.by_class = torch.stack(rows)
        # No mask changes the inputs of the first masked layer.
        self.cached_inputs = classifier.prefix_activations(self.graph.layers, self.samples.images)
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
        self, samples: Tensor, names: Sequence[str], zeroed: Tensor | None = None, class_index: int | None = None
    ) -> Snapshot:
        """Runs samples of every class through the classifier, and records what features are formed from.

        Args:
            samples: indices, (classes, group_size)
            names: of the FEATURES that the snapshot can form
            zeroed: the vertices that are masked; None: none
            class_index: of a class to forget. It is removed from the softmax of the retained classes' samples, which
                are to keep the log-odds that the classifier has without a mask and without that class
        """
        mask = self.graph.zeroing(self.nothing if zeroed is None else zeroed)
        excluded_classes: list[int] = []
        if class_index is not None:  # classes without samples are always excluded; of two classes, none is
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
        layer_means, log_odds = group_means(records(), means, samples.shape[1])
        weights = mask.weights(self.classifier).values()
        matrices = [weight.unflatten(0, (groups, -1)).flatten(2) for weight, groups in zip(weights, self.graph.groups)]
        return Snapshot(self.config, self.graph, matrices, layer_means, log_odds, kept)

    def _records(self, samples: Tensor, mask: Mask, excluded_classes: Sequence[int] = ()) -> Iterator[Record]:
        """Yields the records of parts of the samples."""
        with mask.applied_to(self.classifier):
            for part in samples.split(max(1, self.at_once // len(samples)), 1):
                rows = part.flatten()
                inputs, labels = self.cached_inputs[rows], self.labels[rows]
                record = self.suffix.record(inputs, labels, self.graph.layers, excluded_classes)
                kept = record.log_odds
                if mask.num_zeroed:  # without a mask, the samples are to keep the log-odds that they have
                    kept = log_odds(self.predictions[rows], labels, excluded_classes)
                layers = [layer.by_class(len(samples)) for layer in record.layers]
                yield Record(layers, record.log_odds.view(part.shape), kept.view(part.shape))

    def recorded(self) -> dict[str, Any]:
        """Returns what is saved: `layers`, `labels`, and for layers of features `log_odds` and `records`, by layer."""
        content = {"layers": list(self.graph.layers), "labels": self.labels, "records": []}
        if not self._num_gradients:  # the records of layers that read at many positions would be too large
            every = torch.arange(len(self.labels), device=self.labels.device)
            parts = [*self._records(every[None], self.graph.zeroing(self.nothing))]
            content["log_odds"] = torch.cat([part.log_odds[0] for part in parts])
            for layers in zip(*(part.layers for part in parts)):
                values = zip(FeatureRecord._fields, zip(*layers))
                content["records"].append({name: torch.cat(each, 1)[0] for name, each in values})
        return content


TERMS = ("forgetting", "retention", "curvature")  # the features that the saliency is made of


def retain_saliency(snapshot: Snapshot, class_index: int) -> Tensor:
    """Estimates how much removing each weight lowers the retained classes' loss K, to second order, (vertices).

    K is smallest where their samples keep the odds of the original without the forget class (`retention` and
    `curvature` of FEATURES). In the mean over the retained classes, each one is weighted by (its cross entropy +
    0.02)^0.5: the more the mask so far has damaged a class, the more it counts.
    """
    class_weights = (F.softplus(-snapshot.log_odds).mean(1) + 0.02).sqrt()
    class_weights[class_index] = 0
    lowered_losses = snapshot.feature("retention") - snapshot.feature("curvature") ** 2 / 2
    return class_weights @ lowered_losses / class_weights.sum()


def saliency(snapshot: Snapshot, class_index: int, retain_weight: float, gcn: MaskingGCN | None = None) -> Tensor:
    """Scores every weight, (vertices); the weights of the highest scores are zeroed first to forget a class.

        a_v w E_d[dF/dw] + retain_weight b_v retain_saliency

    E_d[dF/dw], `forgetting` of FEATURES, is the mean gradient of -log(1 - p_d) on the class's samples: first-order
    saliency as in SNIP (Lee et al. 2019, arXiv:1810.02340), of the loss that forgetting lowers.

    Args:
        snapshot: taken for that class (`ActivationGraphs.snapshot`), with the TERMS and the features that the GCN reads
        gcn: gives the factors a_v and b_v; without it, or before its training, they are 1
    """
    forget, retain = snapshot.feature("forgetting")[class_index], retain_saliency(snapshot, class_index)
    if gcn is not None:
        forget_factors, retain_factors = gcn(snapshot.class_graph(class_index), snapshot.graph)[0].unbind(-1)
        forget, retain = forget_factors * forget, retain_factors * retain
    return forget + retain_weight * retain


def ranked(scores: Tensor, zeroed: Tensor, count: int) -> Tensor:
    """Returns the vertices to zero next, (count): those of the highest scores (vertices) that are not yet `zeroed`."""
    count = min(count, len(scores) - len(zeroed))
    return scores.index_fill(0, zeroed, float("-inf")).topk(count).indices
