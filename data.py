"""Image data sets in memory, their forget and retain splits, and the activation graphs of a classifier."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from mimu.images.sources import DATASET_ROOT, DataError, data_set, reading, seeded
from mimu.model import VERTICES_AT_ONCE, Mask, WeightGraph
from mimu.networks.hooked import LARGEST_ODDS, HookedClassifier, LayerRecord, losses, odds

if TYPE_CHECKING:
    from torch_geometric.data import Data

SCORED_AT_ONCE = 10_000  # samples of a batch without a backward pass

# What settings may be; a config is checked against these words.
Count = Annotated[int, "at least 1"]
Positive = Annotated[float, "above 0"]
NonNegative = Annotated[float, "at least 0"]
Share = Annotated[float, "above 0, at most 1"]
# A number of the masked weights, or a share of them.
Amount = Count | Annotated[float, "above 0, below 1"]


def number_of_weights(amount: Amount, num_vertices: int) -> int:
    """The amount as a number of the masked weights, one at least."""
    return amount if isinstance(amount, int) else max(1, round(amount * num_vertices))


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Modules made while the context is open get the weights of this seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Split:
    """Samples in memory. images: (samples, pixels) float, labels: (samples) int64."""

    images: Tensor
    labels: Tensor

    def forget(self, forget_class: int) -> Split:
        """The samples of the forget class."""
        return self[self.labels == forget_class]

    def retain(self, forget_class: int) -> Split:
        """The samples of all other classes."""
        return self[self.labels != forget_class]

    def __getitem__(self, chosen: Tensor | slice) -> Split:
        return Split(self.images[chosen], self.labels[chosen])

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Split]:
        """Random batches of the samples, again and again."""
        while True:
            order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
            for batch in order.split(batch_size):
                yield Split(self.images.index_select(0, batch), self.labels[batch])

    def loader(self, batch_size: int = SCORED_AT_ONCE) -> DataLoader:
        """Whole batches (images, labels) in order, cut from the tensors at once rather than sample by sample."""
        samples = TensorDataset(self.images, self.labels)
        batches = BatchSampler(SequentialSampler(samples), batch_size, drop_last=False)
        return DataLoader(samples, sampler=batches, batch_size=None)


def some_of_every_class(split: Split, count: int, *key: object) -> Split:
    """Random samples, class after class: `count` of every class that is there, or all where it has fewer; by a key."""
    chosen = []
    for label in split.labels.unique().tolist():
        of_class = (split.labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(of_class), generator=seeded(*key, label))
        chosen.append(of_class[order[:count].to(of_class.device)])
    found = torch.cat(chosen)
    # Copies rows; indexing copies numbers one by one.
    return Split(split.images.index_select(0, found), split.labels[found])


def is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Which samples are classified correctly, (samples): none whose logits (samples, classes) are not numbers."""
    # The largest of logits that are not numbers would be the first class.
    return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


class ImageData:
    """A training split that methods may use, a test split that scores them, and the names of the classes, by label.

    While a method runs, the test split is sealed: asking for it raises PermissionError.
    """

    def __init__(self, train: Split, test: Split, class_names: Sequence[str] = ()) -> None:
        self.train = train
        self.class_names = class_names
        self._test = test
        self._sealed = False

    @property
    def test(self) -> Split:
        if self._sealed:
            raise PermissionError("the test split is sealed while a method runs: it may use the training split only")
        return self._test

    @contextmanager
    def sealed(self) -> Iterator[None]:
        """Closes the test split for as long as the context is open."""
        before, self._sealed = self._sealed, True
        try:
            yield
        finally:
            self._sealed = before


def load_image_data(
    name: str = "MNIST", root: Path = DATASET_ROOT, device: torch.device | str = "cpu", held_out: int = 0
) -> ImageData:
    """Reads a data set into memory, standardised by its training split.

    held_out: this many training samples, the last, stand in the place of the test split, for choices it must not make
    Raises DataError where its files are missing and cannot be had or are damaged, or a split lacks a class.
    """
    source = data_set(name, root)
    num_classes, splits = len(source.class_names), []
    with reading(name, root / name):
        for kind in ("training", "test"):
            images, labels = source.read(kind == "training")
            counts = torch.bincount(labels, minlength=num_classes)
            if images.shape != (len(labels), *source.size) or len(counts) > num_classes or not counts.all():
                must, has = f"{source.size} pixels and every class from 0 to {num_classes - 1}", tuple(images.shape)
                raise ValueError(f"the {kind} split must be images of {must}, not {has} and {counts.tolist()} labels")
            splits.append(Split(images.to(device).flatten(1).float(), labels.to(device)))
    if held_out:
        total, splits = len(splits[0].labels), [splits[0][:-held_out], splits[0][-held_out:]]
        if any(len(split.labels.unique()) < num_classes for split in splits):
            raise DataError(f"held_out must be below {total} and leave every class on both sides, not {held_out}")
    deviation, mean = torch.std_mean(splits[0].images)
    if not deviation > 0:
        raise DataError(f"dataset {name} in {root / name}: all pixels of the training split are alike")
    for split in splits:
        split.images.sub_(mean).div_(deviation)  # in place, or a large data set would stand in memory twice
    return ImageData(*splits, source.class_names)


def mean_product(of_target: Tensor, of_source: Tensor) -> Tensor:
    """Mean over the samples of of_target[s, r] * of_source[s, c], summed over positions, (classes, m, n)."""
    if of_target.ndim == 4 and of_target.shape[2] > of_target.shape[3]:
        return torch.einsum("csmp,csnp->cmn", of_target, of_source).div_(of_source.shape[1])
    if of_target.ndim == 4:  # of many positions, what kernels read is more than the gradient: it is not copied
        total = of_target.new_zeros(len(of_target), of_target.shape[2], of_source.shape[2])
        for target, source in zip(of_target.unbind(1), of_source.unbind(1)):
            total.baddbmm_(target, source.mT)
        return total.div_(of_source.shape[1])
    return of_target.transpose(1, 2) @ of_source / of_source.shape[1]


def mean_squared_gradient(record: LayerRecord) -> Tensor:
    """Mean over the samples of (dL/dw)^2, (classes, m, n)."""
    if record.inputs.ndim == 3:
        return mean_product(record.loss_gradient**2, record.inputs**2)
    total = gradient = None
    for delta, a in zip(record.loss_gradient.unbind(1), record.inputs.unbind(1)):
        gradient = torch.bmm(delta, a.mT, out=gradient)  # of a sample of every class: those of all are too large
        total = gradient.square() if total is None else total.addcmul_(gradient, gradient)
    return total.div_(record.inputs.shape[1])


def mean_signal(record: LayerRecord) -> Tensor:
    """Mean over samples and positions of what a target neuron that is active is given, (classes, m, n)."""
    positions = record.inputs.shape[3] if record.inputs.ndim == 4 else 1
    return mean_product(record.active, record.inputs) / positions


def mean_activation(x: Tensor) -> Tensor:
    """Mean over the samples and the positions of a convolution, (classes, neurons)."""
    return (x.mean(3) if x.ndim == 4 else x).mean(1)


def scaled(record: LayerRecord, factor: Tensor) -> LayerRecord:
    """The record with every sample's gradient of the loss times a factor (groups, samples)."""
    delta = record.loss_gradient
    return record._replace(loss_gradient=delta * factor.view(*factor.shape, *[1] * (delta.ndim - 2)))


def mean_gradient(record: LayerRecord) -> Tensor:
    return mean_product(record.loss_gradient, record.inputs)


def mean_forgetting_gradient(record: LayerRecord) -> Tensor:
    return mean_gradient(scaled(record, -record.odds))


# With the odds o / (1 + o) = p and k / (1 + k) = t that are to be kept, and delta = -(1 - p) d(log o)/dz, these are of
# the loss -t log p - (1 - t) log(1 - p), whose derivatives by log o are p - t and p (1 - p).
def mean_retention_gradient(record: LayerRecord) -> Tensor:
    return mean_gradient(scaled(record, (record.kept_odds - record.odds) / (1 + record.kept_odds)))


def mean_curvature(record: LayerRecord) -> Tensor:
    return mean_squared_gradient(scaled(record, record.odds.sqrt()))


Mean = Callable[[LayerRecord], Tensor]
# The others stay where it is foreseen what zeros do.
OF_THE_LOSS: tuple[Mean, ...] = (
    mean_gradient, mean_squared_gradient, mean_forgetting_gradient, mean_retention_gradient, mean_curvature
)  # fmt: skip


class Feature(NamedTuple):
    """A feature of weights, from a mean over a group's samples, (classes, m, n) or what broadcasts to it.

    mean: of what a layer does on a group of every class, a record of (classes, samples, neurons[, positions]); None
        where it is of the weight alone
    of: from that mean and the weight (m, n) to the feature; the weight leads from neuron c to r
    """

    mean: Mean | None
    of: Callable[[Tensor, Tensor], Tensor]


# E is the mean over a group; a sample's gradient of a kernel is the sum over its positions, activations are means.
FEATURES: dict[str, Feature] = {
    # E[a_c], E[h_r]
    "input_activation": Feature(lambda record: mean_activation(record.inputs)[:, None], lambda mean, weight: mean),
    "output_activation": Feature(lambda record: mean_activation(record.outputs)[..., None], lambda mean, weight: mean),
    "weight": Feature(None, lambda _, weight: weight[None]),
    "gradient": Feature(mean_gradient, lambda mean, weight: mean),  # E[dL/dw]
    # w E[dL/dw]: the first-order fall of the loss when the weight is removed
    "effect": Feature(mean_gradient, lambda mean, weight: weight * mean),
    # |w| sqrt(E[(dL/dw)^2]): the root of the diagonal Fisher information of removing the weight
    "fisher": Feature(mean_squared_gradient, lambda mean, weight: weight.abs() * mean.sqrt()),
    # w E[d(logit of the class - mean logit)/dw]: the first-order fall of the margin when the weight is removed
    "margin": Feature(lambda of: mean_product(of.margin_gradient, of.inputs), lambda mean, weight: weight * mean),
    # w E[d(-log(1 - p))/dw], p of the class: the first-order fall of what forgetting asks for, of what is left alone
    "forgetting": Feature(mean_forgetting_gradient, lambda mean, weight: weight * mean),
    # w E[dK/dw]: the first-order fall of K = -t log p - (1 - t) log(1 - p), t the probability that p is to stay
    "retention": Feature(mean_retention_gradient, lambda mean, weight: weight * mean),
    # |w| sqrt(E[p (1 - p) (d log(p / (1 - p))/dw)^2]): the root of K's second-order rise when the weight is removed
    "curvature": Feature(mean_curvature, lambda mean, weight: weight.abs() * mean.sqrt()),
    # |w| E[unit r is active * a_c]: the signal that the weight passes on
    "coactivation": Feature(mean_signal, lambda mean, weight: weight.abs() * mean),
}


@dataclass(frozen=True)
class GraphConfig:
    """What the activation graphs are made of."""

    mask_layer: int | tuple[int, ...] | None  # an index, several, or None for all layers
    # All masked weights compete, every layer gives the same share of its own, or the layer that is measured to be best.
    scope: Literal["global", "layerwise", "measured"]
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


def vertex_features(features: list[Tensor]) -> Tensor:
    """Features (groups, vertices), standardised over the vertices, as (groups, vertices, features). Clears the list."""
    x = torch.stack(features)
    features.clear()  # large ones would stay in memory with the copy
    # torch.std_mean takes ten times as long.
    x -= x.mean(-1, keepdim=True)
    deviation = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / max(1, x.shape[-1] - 1) ** 0.5
    x /= deviation.clamp_min(1e-12)
    return x.permute(1, 2, 0).contiguous()


# Records (groups, samples, ...) of every masked layer on a part of the samples, and their losses, nats.
Pass = tuple[list[LayerRecord], Tensor]


def group_means(
    passes: Iterable[Pass], means: Iterable[Mean], group_size: int
) -> tuple[list[dict[Mean, Tensor]], Tensor]:
    """Of every masked layer its means over each group, and the groups' mean losses, nats, by passes over its parts."""
    found, of_parts = defaultdict(dict), []
    for records, loss in passes:
        for index, record in enumerate(records):
            for mean in means:
                part = mean(record).mul_(loss.shape[1] / group_size)  # in place: of large kernels it takes much memory
                of_layer = found[index]
                of_layer[mean] = of_layer[mean].add_(part) if mean in of_layer else part
        of_parts.append(loss)
    return [found[index] for index in range(len(records))], torch.cat(of_parts, 1).mean(1)


@dataclass(eq=False)
class Look:
    """What groups of samples do in the masked layers of a classifier, masked or not: what features are made of.

    weights: the matrix of each masked layer (m, n), as it is under the mask
    means: of each masked layer those over every group, (groups, m, n) or what broadcasts to it
    loss: the mean cross entropy of each group (groups), nats; of the others among themselves, on a look for a class
    passes, log_odds: what the means are of, where it is kept, and log(p / (1 - p)) of each of its samples' labels now
    """

    config: GraphConfig
    graph: WeightGraph
    weights: list[Tensor]
    means: list[dict[Mean, Tensor]]
    loss: Tensor
    passes: list[Pass]
    log_odds: list[Tensor]

    def feature(self, name: str) -> Tensor:
        """One of FEATURES that were looked for, of every group, (groups, vertices), not standardised."""
        return self._flat(self._formed(name, slice(None)))

    def class_graphs(self, chosen: int | None = None) -> Iterator[Tensor]:
        """Vertex features (classes, vertices, features) of groups that are classes, standardised over each graph.

        As many at a time as fit in the cache but one at least; or of one class alone.
        """
        own, count = self.config.features, len(self.loss)
        names = [name for name in own if name != "weight"] if self.config.other_classes else []
        totals = {name: [part.sum(0) for part in self._formed(name, slice(None))] for name in names}
        at_once = max(1, VERTICES_AT_ONCE // self.graph.num_vertices) if chosen is None else 1
        for first in range(0, count, at_once) if chosen is None else [chosen]:
            some = slice(first, first + at_once)
            features = [self._flat(self._formed(name, some)) for name in own]
            for name in names:
                sums = (total - part for total, part in zip(totals[name], self._formed(name, some)))
                features.append(self._flat([part / (count - 1) for part in sums]))
            yield vertex_features(features)

    def without(self, vertices: Tensor) -> Look:
        """What the groups would do without further weights, foreseen: no sample goes through the network for it.

        The log-odds of every sample's label are taken to be linear in the weights since the last pass: a weight w from
        neuron c to r that is zeroed changes them by delta_r w a_c / (1 - p), and the gradients of the loss change with
        1 - p. Activations stay. Raises ValueError where kernels are masked, of which no pass is kept.
        """
        if not self.passes:
            raise ValueError(f"layers {self.graph.layers} have kernels: what they read is not kept, look again")
        is_removed = torch.zeros(self.graph.num_vertices, dtype=torch.bool, device=vertices.device)
        removed = [each.nonzero().T for each in self.graph.matrices(is_removed.index_fill(0, vertices, True))]
        log_odds, passes = [], []
        for (records, _), now in zip(self.passes, self.log_odds):
            left = 1 / (1 + records[0].odds)  # 1 - p
            for record, weight, (rows, columns) in zip(records, self.weights, removed):
                # Of a matrix columns are chosen thrice as fast.
                delta = record.loss_gradient.flatten(0, 1).index_select(1, rows)
                a = record.inputs.flatten(0, 1).index_select(1, columns)
                now = now + ((delta * a) @ weight[rows, columns]).view_as(now) / left
            scale, then = now.neg().sigmoid() / left, now.exp().clamp_max(LARGEST_ODDS)
            changed = (scaled(record, scale)._replace(odds=then) for record in records)
            log_odds.append(now)
            passes.append((list(changed), F.softplus(-now)))
        of_loss = [mean for mean in self.means[0] if mean in OF_THE_LOSS]
        means, loss = group_means(passes, of_loss, sum(part.shape[1] for part in log_odds))
        means = [before | now for before, now in zip(self.means, means)]
        weights = [weight.index_put(tuple(at), weight.new_zeros(())) for weight, at in zip(self.weights, removed)]
        return replace(self, weights=weights, means=means, loss=loss, log_odds=log_odds)

    def _formed(self, name: str, chosen: slice) -> list[Tensor]:
        """A feature of some groups in every masked layer, (groups, m, n), or with 1 for what it does not depend on."""
        feature, count = FEATURES[name], len(range(len(self.loss))[chosen])
        found = (of_layer.get(feature.mean) for of_layer in self.means)
        means = (mean if mean is None else mean[chosen] for mean in found)
        parts = [feature.of(mean, weight) for mean, weight in zip(means, self.weights)]
        return [part.expand(count, *part.shape[1:]) for part in parts]

    def _flat(self, parts: list[Tensor]) -> Tensor:
        """A feature of every masked layer as one of all vertices, (groups, vertices)."""
        shapes = ((len(target), len(source)) for target, source in zip(self.graph.targets, self.graph.sources))
        return torch.cat([part.expand(len(part), *shape).flatten(1) for part, shape in zip(parts, shapes)], 1)


@dataclass(eq=False)
class GraphGenerator:
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
        self.graph = WeightGraph.of(classifier, self.config.mask_layer)
        classes, counts = self.train.labels.unique(return_counts=True)
        self.classes = classes.tolist()  # those that there are samples of; graphs and features stand in their order
        self.num_classes = len(self.classes)
        if self.num_classes < 2:
            raise ValueError(f"there must be samples of two classes at least, not of {self.classes} alone")
        self.samples_per_class = min(self.config.samples_per_class, int(counts.min()))
        self.samples = some_of_every_class(self.train, self.samples_per_class, "graphs", self.seed)
        self.labels = self.samples.labels
        # No mask changes what comes before.
        self.inputs = classifier.prefix_activations(self.graph.layers, self.samples.images)
        with torch.no_grad():
            self.predictions = classifier(self.inputs, self.graph.layers)  # logits without a mask
        self.at_once = classifier.recorded_at_once(self.graph.layers)
        # What kernels read would be too much: their passes are made anew.
        self.are_kept = all(len(shape) == 2 for shape in self.graph.shapes)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def records(self) -> Pass:
        """What every sample does in the masked layers without a mask, and its loss, nats, where it is kept."""
        everything = torch.arange(len(self), device=self.labels.device).split(self.at_once)
        records, of_parts = zip(*(self._record(rows) for rows in everything))
        return [LayerRecord(*map(torch.cat, zip(*of_layer))) for of_layer in zip(*records)], torch.cat(of_parts)

    @property
    def nothing(self) -> Tensor:
        """No vertex of the weight graph."""
        return torch.empty(0, dtype=torch.long, device=self.labels.device)

    def by_class(self) -> Tensor:
        """Indices of all samples, (classes, samples_per_class)."""
        return torch.arange(len(self), device=self.labels.device).view(self.num_classes, -1)

    def draw(self, group_size: int, generator: torch.Generator) -> Tensor:
        """Indices of `group_size` random samples of every class, (classes, group_size), without repetition."""
        keys = torch.rand(self.num_classes, self.samples_per_class, generator=generator)
        return self.by_class().gather(1, keys.argsort(1)[:, :group_size].to(self.labels.device))

    def weights(self) -> list[Tensor]:
        """The weight matrices of the masked layers as they are now, (m, n) each."""
        return [self.classifier.layers[index].weight.detach() for index in self.graph.layers]

    def look(
        self, samples: Tensor, names: Sequence[str], mask: Mask | None = None, forget_class: int | None = None
    ) -> Look:
        """What groups of samples (groups, group_size) do on the classifier, or on the masked one, to form features of.

        names: of FEATURES
        forget_class: its place among the classes; the others are then told from one another alone, and are to keep the
            odds that the classifier without a mask gives them so
        """
        left_out = []
        if forget_class is not None:  # those that there is no sample of are forgotten, or to be
            own = [self.classes[forget_class]] * (self.num_classes > 2)  # a single other one is told from it
            left_out = sorted({*range(self.predictions.shape[1])} - {*self.classes} | {*own})
        passes, kept = self._passes(samples, mask, left_out), []
        if self.are_kept:
            passes = kept = list(passes)
        means = dict.fromkeys(FEATURES[name].mean for name in names if FEATURES[name].mean)
        found = group_means(passes, means, samples.shape[1])
        weights = self.weights() if mask is None else mask.weights(self.classifier).values()
        log_odds = [records[0].odds.clamp_min(1e-30).log() for records, _ in kept]
        return Look(self.config, self.graph, [weight.flatten(1) for weight in weights], *found, kept, log_odds)

    def _passes(self, samples: Tensor, mask: Mask | None, left_out: Sequence[int]) -> Iterator[Pass]:
        """Records and losses of groups, part after part of their samples; where nothing is new, those that are kept."""
        if mask is None and self.are_kept and not left_out:
            records, loss = self.records
            yield [LayerRecord(*(x[samples] for x in record)) for record in records], loss[samples]
            return
        with nullcontext() if mask is None else mask.applied_to(self.classifier):
            for part in samples.split(max(1, self.at_once // len(samples)), 1):
                rows = part.flatten()
                records, loss = self._record(rows, left_out)
                if mask is not None:  # without one they are as they are
                    kept_odds = odds(losses(self.predictions[rows], self.labels[rows], left_out))
                    records = [record._replace(kept_odds=kept_odds) for record in records]
                records = [LayerRecord(*(x.unflatten(0, part.shape) for x in record)) for record in records]
                yield records, loss.view(part.shape)

    def _record(self, rows: Tensor, left_out: Sequence[int] = ()) -> tuple[list[LayerRecord], Tensor]:
        return self.classifier.record(
            self.inputs[rows], self.labels[rows], self.graph.layers, self.graph.layers, left_out
        )

    def get_data(self, index: int, max_edges: int = 50_000_000) -> Data:
        """The graph of one sample for PyG: x (vertices, features), edge_index (2, edges), y (1).

        While the list of edges is built, an edge takes about 100 bytes. Raises IndexError where there is no such
        sample, ValueError on more than `max_edges`.
        """
        # Imported here, since it takes longer than the rest and only this export needs it.
        from torch_geometric.data import Data

        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is not there: valid are 0 to {len(self) - 1}")
        if (edges := self.graph.num_edges) > max_edges:
            raise ValueError(f"max_edges must be at least {edges:,} ({16 * edges / 1e9:.1f} GB), not {max_edges:,}")
        label, names = self.labels[index : index + 1], self.config.features
        own, classes = (self.look(at, names) for at in (torch.tensor([[index]], device=label.device), self.by_class()))
        others = [name for name in names if name != "weight"] if self.config.other_classes else []
        of_classes = map(classes.feature, others)
        place = self.classes.index(int(label))
        of_others = [(each.sum(0) - each[place : place + 1]) / (self.num_classes - 1) for each in of_classes]
        x = vertex_features([*map(own.feature, names), *of_others])[0]
        return Data(x=x, edge_index=self.graph.edge_index().to(label.device), y=label)

    def recorded(self) -> dict[str, Any]:
        """What was recorded, as it is saved: `layers`, `labels` (samples), and `records`, each layer's as a dict
        where they are kept."""
        records = [record._asdict() for record in self.records[0]] if self.are_kept else []
        return {"layers": list(self.graph.layers), "labels": self.labels, "records": records}
